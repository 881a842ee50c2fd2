"""The real sets of shared/data: what is read of each, what is left out and why."""

from collections import Counter
from functools import partial

import pytest
from trained import CHATML, byte_level

from dpo_jax.data.criteria import soft_ties, votes, without_ties
from dpo_jax.data.layouts import fields
from dpo_jax.data.published import oasst_tree, pandalm
from dpo_jax.data.sources import read
from dpo_jax.data.template import tokenize

PROMPTED = partial(fields, prompt="question")
SETS = {
    "hh_harmless_test": (None, 2, 1618, {"prompts differ": 3}, {"empty response": 3}),
    "llmbar_pairs": (
        partial(fields, prompt="prompt", chosen="chosen", rejected="rejected"),
        *(2, 856, {}, {"equal responses": 1, "empty response": 1}),
    ),
    "gsm8k": (partial(PROMPTED, completion="answer"), 1, 6241, {}, {}),
    "gsm8k_solutions_binary": (
        partial(PROMPTED, completion="completion", label="label"),
        *(1, 3888, {}, {}),
    ),
    "gsm8k_solutions_pairs": (
        partial(PROMPTED, chosen="chosen", rejected="rejected"),
        *(2, 1798, {}, {}),
    ),
    "blimp_pairs": (
        partial(fields, chosen="sentence_good", rejected="sentence_bad"),
        *(2, 5605, {}, {"equal responses": 1}),
    ),
    "mwe_persona_yesno": (
        partial(
            PROMPTED,
            chosen="answer_matching_behavior",
            rejected="answer_not_matching_behavior",
        ),
        *(2, 2663, {}, {}),
    ),
    "oasst_en100_ranked_pairs": (None, 2, 605, {}, {}),
    "oasst_en100_trees": (oasst_tree, None, 76, {}, {}),
    "pandalm_human3": (pandalm, 2, 648, {"wrong type": 6}, {"empty response": 31}),
    "fastchat_sharegpt_dummy": (None, 1, 353, {}, {}),
    "c4_minimal_text": (None, 1, 170, {}, {}),
    "vader_human_sentiment": (None, 1, 16741, {}, {}),
}


@pytest.fixture(scope="module")
def tokenizer():
    import copy

    made = copy.deepcopy(byte_level())
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_whole_but_for_its_known_defects(name: str, shared, tokenizer):
    layout, responses, rows, skipped, dropped = SETS[name]
    records, left_out = read(shared / "data" / f"{name}.jsonl.gz", layout=layout, on_bad="skip")
    assert left_out == skipped
    if name != "oasst_en100_trees":
        assert len(records) == rows - sum(skipped.values())
    some = records if dropped else records[:500]
    groups, counts = tokenize(some, tokenizer, row_tokens=1 << 16, responses=responses)
    assert counts == dropped
    for group in groups:
        assert len(group.prompt) and all(len(ids) for ids in group.responses)


def test_trees_hold_the_ranked_pairs(shared, tokenizer):
    """Every list of a tree as pairs is what the file of pairs holds, and no more."""
    folder = shared / "data"
    lists, _ = read(folder / "oasst_en100_trees.jsonl.gz", layout=oasst_tree)
    pairs, _ = read(folder / "oasst_en100_ranked_pairs.jsonl.gz")

    def text(*parts) -> tuple[str, ...]:
        return tuple("|".join(message["content"] for message in part) for part in parts)

    found = Counter(
        text(record["prompt"], better, worse)
        for record in lists
        for i, better in enumerate(record["responses"])
        for worse in record["responses"][i + 1 :]
    )
    assert found == Counter(text(record["prompt"], *record["responses"]) for record in pairs)
    assert Counter(len(record["responses"]) for record in lists).keys() >= {2, 3, 4}


def test_three_annotators_become_soft_labels_or_a_majority(shared, tokenizer):
    records, _ = read(shared / "data" / "pandalm_human3.jsonl.gz", layout=pandalm, on_bad="skip")
    groups, _ = tokenize(records, tokenizer, row_tokens=1 << 14)
    judged = votes(groups)
    shares = Counter(round(group.soft_label or 0, 3) for group in judged)
    assert set(shares) == {0.5, 0.667, 0.833, 1.0}
    clear = without_ties(judged)
    assert len(clear) == len(judged) - shares[0.5] and clear[0].soft_label is None
    assert sum(group.soft_label == 0.5 for group in soft_ties(judged)) == shares[0.5]
    for group, before in zip(judged, groups, strict=True):
        assert before.scores is not None and group.scores is not None
        assert group.scores[0].sum() >= group.scores[1].sum()
