"""Runs on conversations and on other layouts, by the command: what is said, counted and sampled."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from trained import CHATML

from dpo_jax import cli

MODULE = """
import sys
from functools import partial
sys.path.insert(0, TESTS)
import trained
from dpo_jax import losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.experiment import Data, Evaluation, Experiment, Optim, Run
from dpo_jax.models.transformer import Config

def words(records, responses):
    assert all(record["prompt"][-1]["role"] == "user" for record in records)
    return [float(len(text.split())) for text in responses]

EXPERIMENT = Experiment(
    name="talks",
    model=Config(V=512, D=8, L=1, H=2, J=1, E=4, F=8),
    data=Data(source="talks.jsonl", tokenizer=trained.byte_level, template="chat.jinja",
              groups=2, row_tokens=96),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.1)),
    optim=Optim(learning_rate=1e-3),
    run=Run(steps=2, dir="out"),
    evaluation=Evaluation(prompts="talks.jsonl", rewards=(words,), max_tokens=4),
)
"""
ASKED = [{"role": "user", "content": "why"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pair(chosen: str, rejected: str, **fields: Any) -> dict[str, Any]:
    return {"chosen": ASKED + said(chosen), "rejected": ASKED + said(rejected), **fields}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    folder = str(Path(__file__).parent)
    Path("talks.py").write_text(MODULE.replace("TESTS", repr(folder)))
    Path("chat.jinja").write_text(CHATML)
    write(pair("two", "four"), pair("a dog", "a fox"), pair("same", "same"), pair("x", "y " * 99))
    yield tmp_path
    sys.modules.pop("talks", None)


def write(*rows: dict[str, Any]) -> None:
    Path("talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_conversations_are_trained_on_sampled_from_and_resumed(place, capsys):
    assert cli.main(["train", "talks.py"]) == 0
    error = capsys.readouterr().err
    assert error.count("data.source: 2 of 4 records kept, 1 equal responses, 1 too long") == 1
    metrics = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    samples = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert samples[0]["prompt"] == ASKED
    assert cli.main(["sample", "talks.py"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4 and "<|im_end|>" not in rows[0]["response"]
    # a resumed run is on the same data
    assert cli.main(["train", "talks.py", "run.steps=3"]) == 0
    Path("chat.jinja").write_text(CHATML.replace("<|im_end|>", "!<|im_end|>"))
    assert cli.main(["train", "talks.py", "run.steps=4"]) == 2
    assert "data" in capsys.readouterr().err


def test_layouts_and_ties_are_options(place, capsys):
    votes = {"ann": [1, 0], "bob": [1, 0], "cyd": [0, 1]}
    tie = {"ann": [1, 0], "bob": [0, 1], "cyd": [0.5, 0.5]}
    write(
        {"question": ASKED, "answers": ["two", "four"], "judges": votes, "label": 3},
        {"question": ASKED, "answers": ["six", "four"], "judges": tie},
        {
            "question": ASKED,
            "answers": ["a", "b"],
            "judges": {"ann": [0, 1], "bob": [0, 1], "cyd": [0, 1]},
        },
    )
    words = [
        *("data.layout=data.layouts.fields", "data.layout.prompt=question"),
        *("data.layout.responses=answers", "data.layout.scores=judges"),
    ]
    hard = "data.arrange=(data.criteria.votes,data.criteria.without_ties)"
    assert cli.main(["train", "talks.py", *words, hard]) == 0
    assert "2 of 3 records kept by data.criteria.without_ties" in capsys.readouterr().err
    soft = [*words, "data.arrange=data.criteria.votes", "run.dir=soft"]
    assert cli.main(["train", "talks.py", *soft]) == 2
    assert "as data.arrange=data.criteria.without_ties does" in capsys.readouterr().err
    assert cli.main(["train", "talks.py", *soft, "algorithm.loss=losses.soft_dpo"]) == 0
    assert cli.main(["train", "talks.py", "run.dir=other"]) == 2
    assert 'talks.jsonl:1: field "prompt" is missing' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said_of_it"),
    [
        (["data.template=none.jinja"], "data.template=none.jinja: no such file"),
        (["data.template={% if %}"], "data.template: not a Jinja template"),
        (["data.template=None"], "the data holds conversations and the tokenizer has no c"),
        (["data.template={{ raise_exception('no') }}"], "talks.jsonl:1: the chat template cannot"),
        (["data.source=gs://bucket/x.jsonl"], "gs://bucket/x.jsonl: "),
        (["data.source=hub:o/n:train"], "hub:o/n:train: cannot be had from the hub"),
        (["data.source=tfds:nothing"], "tfds:nothing: TFDS cannot read it"),
        (["data.layout=data.published.pandalm"], "talks.jsonl:1: data.layout pandalm cannot read"),
    ],
)
def test_what_cannot_be_read_is_one_line(place, capsys, words, said_of_it: str):
    assert cli.main(["train", "talks.py", *words]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"dpo-jax: error: {said_of_it}")
    assert "Traceback" not in error and not Path("out").exists()
