"""Answers that can be checked: the arithmetic world, GSM8K's final numbers, length and format."""

import ast
import gzip
import json
from decimal import Decimal
from functools import partial
from itertools import islice

import numpy as np
import pytest

from dpo_jax.data.template import tokenize
from dpo_jax.structs import BadInput
from dpo_jax.worlds import arithmetic, verifiers


def value(line: str) -> int:
    """A line of sums and products by Python's own rules."""
    names = {ast.Add: int.__add__, ast.Sub: int.__sub__, ast.Mult: int.__mul__}

    def walk(node):
        if isinstance(node, ast.BinOp):
            return names[type(node.op)](walk(node.left), walk(node.right))
        return node.value

    return walk(ast.parse(line, mode="eval").body)


@pytest.mark.parametrize(
    "dial",
    [{}, {"digits": 1}, {"terms": 5, "digits": 3, "operations": "+-*"}, {"operations": "*"}],
)
def test_answers_are_right_and_as_hard_as_wanted(dial):
    for record in arithmetic.questions(n=200, seed=1, **dial):
        line = record["prompt"].removesuffix("=")
        # a leading zero is no number to Python, nor to us
        assert str(value(line)) == record["answer"] == record["responses"][0]
        numbers = line.replace("+", " ").replace("-", " ").replace("*", " ").split()
        assert len(numbers) == dial.get("terms", 2)
        assert max(map(len, numbers)) <= dial.get("digits", 2)
        assert set(line) <= set("0123456789") | set(dial.get("operations", "+-"))


def test_questions_come_from_the_seed_alone_and_do_not_end():
    some = arithmetic.questions(n=5, seed=3)
    assert some == list(islice(arithmetic.endless(seed=3), 1000))[:5]
    assert some != arithmetic.questions(n=5, seed=4)


def test_slips_are_as_many_as_wanted_and_the_checker_finds_them_all():
    records = arithmetic.questions(n=2000, seed=0, slips=0.3)
    said = [record["responses"][0] for record in records]
    right = arithmetic.correct(records, said)
    assert abs(right.mean() - 0.7) < 4 * np.sqrt(0.3 * 0.7 / 2000)
    assert arithmetic.correct(records, [record["answer"] for record in records]).all()
    wrong = [record for record, good in zip(records, right, strict=True) if not good]
    for record in wrong:
        pairs = zip(record["responses"][0], record["answer"], strict=True)
        assert sum(a != b for a, b in pairs) == 1


@pytest.mark.parametrize("text", ["", "043", "4 3", "43=", "44", "4", "433", "-43"])
def test_nothing_but_the_answer_is_correct(text):
    assert arithmetic.correct([{"answer": "43"}], [text]) == 0
    assert arithmetic.correct([{"answer": "43"}], ["43"]) == 1


def test_texts_survive_the_tokenizer():
    records = arithmetic.questions(n=20, seed=0, terms=3, operations="+-*")
    tokenizer = arithmetic.tokenizer()
    groups, counts = tokenize(records, tokenizer, row_tokens=64)
    assert not counts
    for record, group in zip(records, groups, strict=True):
        assert len(group.prompt) == 1 + len(record["prompt"])  # BOS
        ids = group.responses[0]
        assert tokenizer.decode(ids[:-1]) == record["answer"]
        assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "dial", [{"terms": 1}, {"digits": 0}, {"operations": "/"}, {"operations": ""}, {"slips": 2}]
)
def test_a_dial_that_cannot_be_is_refused(dial):
    with pytest.raises(BadInput, match=f"{next(iter(dial))}="):
        arithmetic.questions(n=1, seed=0, **dial)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 48+24 = 72.\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("####-5", "-5"),
        ("#### -$1,200.50", "-1200.50"),
        ("#### $-3", "-3"),
        ("#### 12 apples.", "12"),
        ("#### 40 miles per hour", "40"),
        ("#### 25%", "25"),
        ("#### .5", "0.5"),
        ("#### 7.0", "7"),
        ("A: 90,000", "90000"),
        ("#### 3\nwait\n#### 4\n", "4"),
        ("#### 3\nmore text", "3"),
        ("72", None),
        ("####", None),
        ("#### many", None),
        ("#### 3 + 4 = 7", None),
        ("#### 1,2", None),
        ("#### 2 million", None),
        ("#### --2", None),
        ("DNA: 3", None),
    ],
)
def test_the_number_behind_the_mark(text, number):
    assert verifiers.final_number(text) == (None if number is None else Decimal(number))
    assert verifiers.answered([{}], [text]) == (number is not None)


def rows(shared, name):
    with gzip.open(shared / "data" / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_the_verifier_agrees_with_the_published_labels(shared):
    records = {row["question"]: row for row in rows(shared, "gsm8k")}
    solutions = rows(shared, "gsm8k_solutions_binary")
    asked = [records[row["question"]] for row in solutions]
    score = verifiers.gsm8k(asked, [row["completion"] for row in solutions])
    np.testing.assert_array_equal(score, [float(row["label"]) for row in solutions])
    assert len(solutions) > 3000 and 0.2 < score.mean() < 0.6


def test_the_verifier_takes_the_written_solutions(shared):
    records = rows(shared, "gsm8k")
    answers = [row["answer"] for row in records]
    for asked in (records, [{"answer": answer} for answer in answers]):
        assert verifiers.gsm8k(asked, answers).all()
    assert not verifiers.gsm8k(records, ["no idea"] * len(records)).any()


def test_a_record_without_a_number_is_refused():
    with pytest.raises(BadInput, match=r"x.jsonl:3: gsm8k reads a number .* has 'many'"):
        verifiers.gsm8k([{"final": "many", "where": "x.jsonl:3"}], ["#### 3"])


def test_long_responses_are_punished_in_a_line():
    texts = [" ".join(["word"] * count) for count in (0, 6, 7, 8, 10, 99)]
    reward = partial(verifiers.overlong, words=10, margin=4)
    np.testing.assert_allclose(reward([{}] * 6, texts), [0, 0, -0.25, -0.5, -1, -1])
    with pytest.raises(BadInput, match="margin=0"):
        verifiers.overlong([{}], ["a"], margin=0)
