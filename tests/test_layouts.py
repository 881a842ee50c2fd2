"""Layouts: every form of row becomes a prompt and its responses, or is refused by its field."""

import gzip
import hashlib
import json
from functools import partial

import pytest

from dpo_jax.data import layouts
from dpo_jax.data.faults import Fault
from dpo_jax.data.records import canonical
from dpo_jax.data.sources import read
from dpo_jax.structs import BadInput


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def parts(**raw) -> tuple:
    """(prompt, responses) of a row."""
    record = canonical(raw, "here:1")
    return record["prompt"], record["responses"]


def fault(**raw) -> str:
    with pytest.raises(Fault) as caught:
        canonical(raw, "here:1")
    assert str(caught.value).startswith("here:1: ")
    return str(caught.value).removeprefix("here:1: ")


ASKED, WHOLE = [user("q")], [user("q"), said("a")]


@pytest.mark.parametrize(
    ("raw", "prompt", "responses"),
    [
        ({"prompt": ASKED}, ASKED, []),
        ({"prompt": ASKED, "completion": [said("a")]}, ASKED, [[said("a")]]),
        ({"prompt": ASKED, "completion": [said("a")], "label": True}, ASKED, [[said("a")]]),
        (
            {"prompt": ASKED, "chosen": [said("a")], "rejected": [said("b")]},
            ASKED,
            [[said("a")], [said("b")]],
        ),
        ({"chosen": WHOLE, "rejected": [*ASKED, said("b")]}, ASKED, [[said("a")], [said("b")]]),
        ({"prompt": ASKED, "responses": [[said("a")], "b"]}, ASKED, [[said("a")], [said("b")]]),
        ({"prompt": ASKED, "chosen": "a", "rejected": "b"}, ASKED, [[said("a")], [said("b")]]),
        # the prompt once more in every response, as a whole or as the text of its turn
        ({"prompt": ASKED, "chosen": WHOLE, "rejected": "b"}, ASKED, [[said("a")], [said("b")]]),
        (
            {"prompt": "q ", "chosen": WHOLE, "rejected": [*ASKED, said("b")]},
            ASKED,
            [[said("a")], [said("b")]],
        ),
        ({"messages": WHOLE}, ASKED, [[said("a")]]),
        (
            {"messages": [*WHOLE, user("r"), said("b"), user("s")]},
            ASKED,
            [[said("a"), user("r"), said("b")]],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            ASKED,
            [[said("a")]],
        ),
    ],
)
def test_conversations_stay_messages(raw, prompt, responses):
    assert parts(**raw) == (prompt, responses)


def test_a_pair_of_conversations_parts_at_the_first_turn_that_differs():
    first = [user("q"), said("a"), user("r"), said("b")]
    assert parts(chosen=first, rejected=[*first[:3], said("c")]) == (
        first[:3],
        [[said("b")], [said("c")]],
    )
    longer = [user("q"), said("x"), user("y"), said("z")]
    assert parts(chosen=first, rejected=longer) == (first[:1], [first[1:], longer[1:]])
    assert parts(chosen=first, rejected=first) == (first[:3], [[said("b")], [said("b")]])
    # one ends where the other goes on
    assert parts(chosen=WHOLE, rejected=first) == (ASKED, [[said("a")], first[1:]])


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (
            [user("q"), said("a"), user("r"), said("b")],
            [user("q"), said("a"), user("s"), said("b")],
        ),
        ([user("q"), said("a")], [user("r"), said("a")]),
        ([said("a")], [said("b")]),
        ("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: r\n\nAssistant: a"),
        ("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q"),
        ("\n\nHuman: q", "\n\nHuman: r"),
    ],
)
def test_pairs_of_different_prompts_are_counted_whatever_on_bad_says(chosen, rejected):
    rows = [{"chosen": chosen, "rejected": rejected}, {"chosen": "a b", "rejected": "a c"}]
    records, skipped = read(lambda: rows)
    assert len(records) == 1 and skipped == {"prompts differ": 1}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "responses"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is", [" blue.", " green."]),
        ("It is better", "It is best", "It is", [" better", " best"]),
        ("It is", "It is so", "It", [" is", " is so"]),
        ("Yes", "Yes please", "", ["Yes", "Yes please"]),
        ("a  b", "a  c", "a", ["  b", "  c"]),
        ("Q:\nA: yes", "Q:\nA: no", "Q:\nA:", [" yes", " no"]),
        (" a", " b", "", [" a", " b"]),
        ("a b", "a b", "a", [" b", " b"]),
        ("x", "y", "", ["x", "y"]),
    ],
)
def test_texts_part_before_the_first_word_that_differs(chosen, rejected, prompt, responses):
    assert parts(chosen=chosen, rejected=rejected) == (prompt, responses)


def test_a_dialogue_of_hh_parts_at_its_last_marker():
    begun = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    chosen, rejected = f"{begun} I will say", f"{begun} I will not say"
    assert parts(chosen=chosen, rejected=rejected) == (begun, [" I will say", " I will not say"])


def test_every_row_of_hh_parts_as_its_authors_part_it(shared):
    """By the rule of the DPO authors, which is right in all rows but those counted here."""
    expected = json.loads((shared / "golden" / "hh_extract_prompt.json").read_text())
    columns = expected["columns"]
    assert columns[0] == "row" and columns[3:] == ["em_prompt_chars", "em_hash16", "em_rule_safe"]
    wanted = {row[0]: row[3:] for row in expected["rows"]}
    records, skipped = read(shared / "data" / "hh_harmless_test.jsonl.gz")
    safe = {row for row, (_, _, is_safe) in wanted.items() if is_safe}
    assert {record["row"] for record in records} == safe
    assert skipped == {"prompts differ": len(wanted) - len(safe)}
    for record in records:
        texts = "\x1f".join([record["prompt"], *record["responses"]])
        found = [len(record["prompt"]), hashlib.sha256(texts.encode()).hexdigest()[:16]]
        assert found == wanted[record["row"]][:2], record["where"]


def test_every_type_of_trl_is_read(shared):
    """13 types of data set: what each row becomes, rebuilt from its text in another way."""
    seen: dict[str, int] = {}
    with gzip.open(shared / "data" / "trl_zen_all_formats.jsonl.gz") as lines:
        rows = [json.loads(line) for line in lines]
    for each in rows:
        kind, row = each["config"], each["row"]
        seen[kind] = seen.get(kind, 0) + 1
        if "stepwise" in kind:
            assert "stepwise supervision is not supported" in fault(**row)
            continue
        prompt, responses = parts(**row)
        talk = kind.startswith("conversational")
        assert layouts.is_conversation(prompt) == talk
        whole = [prompt + response for response in responses] or [prompt]
        given = [row.get(name) for name in ("chosen", "rejected", "completion") if name in row]
        if "messages" in row or "text" in row:
            assert whole == [row.get("messages", row.get("text"))]
        elif "implicit" in kind:
            assert whole == given
            shorter = prompt[-1]["role"] == "user" if talk else not prompt.endswith(" ")
            assert shorter and responses[0] != responses[1]
        else:
            assert (prompt, responses) == (row["prompt"], given)
        label = canonical(row, "here:1").get("label")
        assert label == (float(row["label"]) if "unpaired" in kind else None)
    assert len(seen) == 13 and min(seen.values()) >= 10


@pytest.mark.parametrize(
    ("raw", "said_of_it"),
    [
        (
            {"prompt": [{"role": "alien", "content": "x"}]},
            'field "prompt[0].role" is text (\'alien',
        ),
        ({"prompt": [{"content": "x"}]}, 'field "prompt[0].role" is null'),
        ({"prompt": [{"role": "user"}]}, 'field "prompt[0].content" is missing'),
        ({"prompt": [user("x"), 3]}, 'field "prompt[1]" is a number (3); it must be a message'),
        ({"prompt": [user("\ud800")]}, 'field "prompt[0].content" holds the lone surrogate'),
        ({"prompt": WHOLE}, 'field "prompt[1]" is a turn of the assistant'),
        ({"prompt": []}, 'field "prompt" is a list ([]); it must be text or messages'),
        ({"prompt": ASKED, "completion": ASKED}, 'field "completion[0]" is a turn of user; a resp'),
        (
            {"prompt": ASKED, "completion": [user("x"), said("y")]},
            'field "completion[0]" is a turn of user; a response begins with the assistant\'s',
        ),
        (
            {"prompt": ASKED, "chosen": [said("a"), user("x")], "rejected": "b"},
            'field "chosen[1]" is a turn of user; a response ends with the assistant\'s',
        ),
        ({"prompt": "q", "completion": [said("a")]}, 'field "completion" is messages and "prompt"'),
        ({"prompt": "q", "chosen": [said("a")], "rejected": "b"}, 'field "chosen" is messages'),
        (
            {"prompt": "else", "chosen": WHOLE, "rejected": WHOLE},
            'field "chosen" is messages and "prompt" is text',
        ),
        ({"chosen": WHOLE, "rejected": "b"}, 'field "rejected" is text (\'b\'), unlike "chosen"'),
        ({"messages": ASKED}, 'field "messages" has no turn of the assistant'),
        ({"messages": [said("a")]}, 'field "messages" begins with assistant'),
        ({"messages": "hi"}, 'field "messages" is text'),
        ({"prompt": "p", "images": ["x.png"]}, 'field "images" holds images; only text'),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            'field "prompt[0].content[0]" is an object',
        ),
        ({"prompt": "p", "tools": "no json"}, 'field "tools" is text'),
        ({"prompt": "p", "tools": {"a": 1}}, 'field "tools" is an object'),
        ({"prompt": "p", "chat_template_kwargs": [1]}, 'field "chat_template_kwargs" is a list'),
    ],
)
def test_faults_of_layout_are_named_by_field(raw, said_of_it: str):
    assert fault(**raw).startswith(said_of_it)


def test_messages_keep_what_templates_read_and_lose_nulls():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": None}}]}
    told = {"role": "tool", "name": "f", "content": [{"type": "text", "text": "4"}], "x": None}
    record = canonical(
        {
            "messages": [user("q"), call | {"content": None}, told, said("a")],
            "tools": '[{"type": "function", "function": {"name": "f"}}]',
            "chat_template_kwargs": {"enable_thinking": False, "unset": None},
            "id": 7,
        },
        "here:1",
    )
    assert record["responses"] == [
        [
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            {"role": "tool", "name": "f", "content": "4"},
            said("a"),
        ]
    ]
    assert record["tools"] == [{"type": "function", "function": {"name": "f"}}]
    assert record["chat_template_kwargs"] == {"enable_thinking": False} and record["id"] == 7


def test_scores_of_chosen_and_rejected_are_scores():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 4.5}
    record = canonical(row, "here:1")
    assert record["scores"] == [4, 4.5] and record["responses"] == ["a", "b"]
    assert "score_chosen" not in record
    assert "scores" not in canonical(row | {"score_rejected": None}, "here:1")
    assert 'field "scores" is a list' in fault(**row | {"score_chosen": "good"})


def test_a_tie_by_label_makes_the_other_pairs_certain():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    records, _ = read(lambda: [pair, pair | {"label": "tie"}, pair | {"soft_label": 0.75}])
    assert [record["soft_label"] for record in records] == [1.0, 0.5, 0.75]
    assert all("label" not in record for record in records)
    records, _ = read(lambda: [pair, pair])
    assert all("soft_label" not in record for record in records)
    assert 'field "label" is text' in fault(prompt="p", completion="a", label="tie")


def test_columns_of_other_names():
    row = {"question": "q", "good": "a", "bad": "b", "label": 1, "id": 3}
    layout = partial(layouts.fields, prompt="question", chosen="good", rejected="bad")
    ((record,), _) = read(lambda: [row], layout=layout)
    where = record.pop("where")
    assert record == {"prompt": "q", "responses": ["a", "b"], "id": 3}
    message = f"{where}: data.layout fields cannot read the row (no column good; there is question)"
    with pytest.raises(BadInput) as caught:
        read(lambda: [{"question": "q"}], layout=layout)
    assert str(caught.value).endswith(message.partition("[0]")[2])
    records, skipped = read(lambda: [{"question": "q"}, row], layout=layout, on_bad="skip")
    assert len(records) == 1 and skipped == {"another layout": 1}


def test_one_row_may_make_several():
    def each(row):
        return ({"prompt": row["q"], "completion": answer} for answer in row["answers"])

    records, _ = read(
        lambda: [{"q": "p", "answers": ["a", "b"]}, {"q": "r", "answers": []}], layout=each
    )
    assert [(record["prompt"], *record["responses"]) for record in records] == [
        ("p", "a"),
        ("p", "b"),
    ]
