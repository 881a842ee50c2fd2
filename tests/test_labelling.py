"""Labels of an annotator as records: what is left out, and what the files of data read back."""

import json
from functools import partial
from typing import Any

import numpy as np
import pytest

from dpo_jax.data.sources import read
from dpo_jax.evaluate import Completions
from dpo_jax.labelling import labelled
from dpo_jax.worlds.annotators import Label, best, noiseless, plackett_luce, thumbs, ties

SCORES = [3.0, 1.0, 2.0, 0.0]
LENGTHS = [1.0, 1.0, 5.0, 7.0]


def drawn(texts: list[str], *, cut: tuple[int, ...] = ()) -> Completions:
    """Four responses to one prompt with the scores above; those of `cut` have no end."""
    assert len(texts) == 4
    return Completions(
        records=[{"prompt": "p", "mood": "calm"}],
        texts=[texts],
        rewards={"true": np.array([SCORES]), "length": np.array([LENGTHS])},
        kl=None,
        finished=np.array([[k not in cut for k in range(4)]]),
        tokens=np.ones((1, 4)),
    )


def ranked(*order: int):
    """An annotator of one opinion, which had probability 1/8."""

    def annotator(scores_KC, rng) -> list[Label]:
        np.testing.assert_array_equal(scores_KC, np.stack([SCORES, LENGTHS], axis=1))
        return [Label(order, 0.125)]

    return annotator


def rows(completions: Completions, annotator: Any) -> list[dict[str, Any]]:
    found = labelled(completions, annotator, np.random.default_rng(0))
    return json.loads(json.dumps(found, allow_nan=False))


def test_samples_of_a_conversation_answer_it():
    """Prompt and tools stay beside the answers, which are read back as turns of the assistant."""
    asked = [{"role": "user", "content": "q"}]
    talk = drawn(list("abcd"))
    talk.records[0].update(prompt=asked, tools=[{"name": "f"}])
    first = rows(talk, noiseless)[0]
    assert first["prompt"] == asked and first["tools"] == [{"name": "f"}]
    ((record,), _) = read(lambda: [first])
    assert record["responses"][0] == [{"role": "assistant", "content": "a"}]


def test_pairs_carry_all_scores_and_their_probability():
    found = rows(drawn(list("abcd")), noiseless)
    assert len(found) == 6
    assert found[0] == {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "scores": {"true": [3.0, 1.0], "length": [1.0, 1.0]},
        "p": 1.0,
    }
    assert [row["chosen"] + row["rejected"] for row in found] == [
        "ab",
        "ac",
        "ad",
        "cb",
        "bd",
        "cd",
    ]


def test_equal_and_unfinished_responses_make_no_pair():
    found = rows(drawn(["a", "b", "a", "d"], cut=(3,)), noiseless)
    assert [row["chosen"] + row["rejected"] for row in found] == ["ab", "ab"]
    assert [row["scores"]["true"] for row in found] == [[3, 1], [2, 1]]


@pytest.mark.parametrize(
    ("texts", "cut", "responses", "scores"),
    [
        ("abcd", (), ["c", "a", "d", "b"], [2, 3, 0, 1]),
        ("abcd", (0,), ["c", "d", "b"], [2, 0, 1]),
        ("abac", (), ["a", "c", "b"], [2, 0, 1]),  # the better placed of two that are equal
        ("abad", (2, 3), ["a", "b"], [3, 1]),  # the worse one where the better is cut
    ],
)
def test_a_ranking_keeps_the_rest_in_order(texts, cut, responses, scores):
    (row,) = rows(drawn(list(texts), cut=cut), ranked(2, 0, 3, 1))
    assert row["responses"] == responses and row["scores"]["true"] == scores
    assert set(row) == {"prompt", "responses", "scores"} | ({"p"} if len(responses) == 4 else set())
    assert row.get("p", 0.125) == 0.125


def test_a_ranking_of_fewer_than_two_is_none():
    assert rows(drawn(list("abcd"), cut=(0, 1, 3)), ranked(2, 0, 3, 1)) == []
    assert rows(drawn(list("aaaa")), ranked(2, 0, 3, 1)) == []


def test_judgements_stand_alone():
    found = rows(drawn(list("aacd"), cut=(3,)), partial(thumbs, threshold=1.5, temperature=1e-3))
    assert [(row["completion"], row["label"]) for row in found] == [
        ("a", True),
        ("a", False),
        ("c", True),
    ]
    assert found[2]["scores"] == {"true": [2.0], "length": [5.0]} and found[2]["p"] == 1.0


def test_the_best_alone_is_text_to_imitate():
    """Nothing is left where the best was cut: another in its place would be another policy's."""
    (row,) = rows(drawn(list("abcd")), best)
    assert row["completion"] == "a" and row["scores"]["true"] == [3.0] and "label" not in row
    assert rows(drawn(list("abcd"), cut=(0,)), best) == []


@pytest.mark.parametrize(
    ("annotator", "fields"),
    [
        (best, {"p"}),
        (noiseless, {"p"}),
        (partial(ties, threshold=1.0), {"p", "soft_label"}),
        (plackett_luce, {"p"}),
        (thumbs, {"p", "label"}),
    ],
)
def test_every_label_reads_back(tmp_path, annotator, fields):
    found = rows(drawn(list("abcd")), annotator)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    records, skipped = read(file)
    assert len(records) == len(found) > 0 and skipped == {}
    for record, row in zip(records, found, strict=True):
        expected = {"prompt", "responses", "where", "scores", "criteria"} | fields
        assert set(record) == expected
        assert record["criteria"] == ["true", "length"]
        by_text = dict(zip("abcd", map(list, zip(SCORES, LENGTHS, strict=True)), strict=True))
        assert record["scores"] == [by_text[text] for text in record["responses"]]
        assert all(record[name] == row[name] for name in fields)
