"""Input that cannot be used: one line with what, where and what to do, status 2, no file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_jax import cli

MODULE = """
from functools import partial
from dpo_jax import losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.experiment import Data, Evaluation, Experiment, Optim, Run
from dpo_jax.models.transformer import Config
from dpo_jax.worlds import sentiment

EXPERIMENT = Experiment(
    name="bad",
    model=Config(V=200, D=8, L=1, H=2, J=1, E=4, F=8),
    data=Data(source="pairs.jsonl", tokenizer=sentiment.tokenizer, groups=2, row_tokens=32),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.1)),
    optim=Optim(learning_rate=1e-3),
    run=Run(steps=2, dir="out"),
)
"""
PAIR = {"prompt": "the film", "chosen": "was good .", "rejected": "was bad ."}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with bad.py and pairs.jsonl, which is fine."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(MODULE)
    write("pairs.jsonl", PAIR, {**PAIR, "prompt": "this sequel"})
    yield tmp_path
    sys.modules.pop("bad", None)


def write(name: str, *records: Any) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], str]:
    """(lines before, the error) of a command that leaves the working directory as it was."""
    before = files()
    assert cli.main(["train", "bad.py", *words]) == 2
    out, error = capsys.readouterr()
    *earlier, last = error.splitlines()
    assert out == "" and "Traceback" not in error
    assert last.startswith("dpo-jax: error: ")
    assert [line for line in earlier if "records kept" not in line and "skipped" not in line] == []
    assert files() == before
    return earlier, last.removeprefix("dpo-jax: error: ")


def files() -> dict[str, bytes]:
    """What lies here, folders too, without Python's own cache."""
    return {
        str(path): path.read_bytes() if path.is_file() else b""
        for path in Path(".").rglob("*")
        if "__pycache__" not in str(path)
    }


def spoilt(**changes: Any) -> Callable[[], None]:
    """The second record of pairs.jsonl with other fields; None takes one away."""
    record = {name: text for name, text in {**PAIR, **changes}.items() if text is not None}
    return lambda: write("pairs.jsonl", PAIR, record)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda: Path("pairs.jsonl").unlink(), ["pairs.jsonl: no such file", "data.source"]),
        (lambda: write("pairs.jsonl"), ["pairs.jsonl: no records"]),
        (lambda: Path("pairs.jsonl").write_text("\n\n"), ["pairs.jsonl: no records"]),
        (lambda: Path("pairs.jsonl").write_text('{"prompt'), ["pairs.jsonl:1: not JSON"]),
        (spoilt(rejected=None), ["pairs.jsonl:2", '"rejected" is missing', "a pair needs"]),
        (spoilt(chosen=3), ["pairs.jsonl:2", '"chosen" is a number (3)', "must be text"]),
        (lambda: write("pairs.jsonl", [1, 2]), ["pairs.jsonl:1: a list", "instead of an object"]),
    ],
)
def test_faulty_files_are_named_by_line_and_field(place, capsys, spoil, said):
    spoil()
    earlier, error = refused(capsys)
    assert earlier == []
    for part in said:
        assert part in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.source=other.jsonl"], ["other.jsonl: no such file"]),
        (["data.sorce=other.jsonl"], ["no option data.sorce", "nearest is data.source"]),
        (["data.groups=many"], ["data.groups=many", "int"]),
        (["data.groups=0"], ["data.groups=0"]),
        (["algorithm.loss=losses.dp"], ["losses.dp", "dpo"]),
        (["algorithm.loss.betta=1"], ["nearest is algorithm.loss.beta"]),
        (["evaluation.source=missing.jsonl"], ["missing.jsonl: no such file"]),
        (["evaluation.samples=4"], ["evaluation.samples", "evaluation.prompts"]),
        (["run.mesh.tensor=3"], ["run.mesh", "number of devices"]),
        (["run.profile=1:9"], ["run.profile=1:9"]),
        (["model.V=100"], ["model.V=100", "tokenizer's 200 tokens"]),
        (["data.tokenizer=nowhere"], ["data.tokenizer=nowhere"]),
        (["optim.warmup=3"], ["warmup=3", "2 steps"]),
        (["parent=nowhere"], ["nowhere"]),
    ],
)
def test_faulty_options_are_named(place, capsys, words, said):
    _, error = refused(capsys, *words)
    for part in said:
        assert part in error


def test_prompts_longer_than_a_row_name_the_length_that_would_do(place, capsys):
    """BOS + 40 words, and two responses of 3 words and EOS: 49 tokens."""
    write("pairs.jsonl", {**PAIR, "prompt": "good " * 40}, {**PAIR, "prompt": "bad " * 39})
    _, error = refused(capsys)
    assert "2 too long" in error and "row_tokens=49" in error
    assert cli.main(["train", "bad.py", "data.row_tokens=49"]) == 0


def test_responses_that_truncation_empties_are_counted(place, capsys):
    """A prompt that fills the row leaves no place for a response."""
    full = {**PAIR, "prompt": "good " * 31}
    write("pairs.jsonl", full, full)
    _, error = refused(capsys, "data.truncation=response")
    assert "2 empty after truncation" in error
    write("pairs.jsonl", full, PAIR, full)
    assert cli.main(["train", "bad.py", "data.truncation=response"]) == 0
    assert "1 of 3 records kept, 2 empty after truncation" in capsys.readouterr().err


def test_skipped_records_are_counted(place, capsys):
    write("pairs.jsonl", PAIR, {"prompt": "a"} | {"chosen": "b"}, {**PAIR, "chosen": 1})
    refused(capsys)
    assert cli.main(["train", "bad.py", "data.on_bad=skip"]) == 0
    assert "data.source: skipped 1 missing field, 1 wrong type" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["data.source", "evaluation.source"])
@pytest.mark.parametrize("responses", [["good ."], ["good .", "boring .", "bad ."]])
def test_data_that_the_loss_cannot_compare_is_refused_before_the_first_step(
    place, capsys, option, responses
):
    write("others.jsonl", {"prompt": "the film was", "responses": responses})
    _, error = refused(capsys, f"{option}=others.jsonl")
    assert f"loss dpo compares 2 responses, the data has {len(responses)}" in error


def test_prompts_without_responses_are_no_training_data(place, capsys):
    write("others.jsonl", {"prompt": "the film was"})
    _, error = refused(capsys, "data.source=others.jsonl")
    assert "respon" in error


def test_a_text_that_the_tokenizer_cannot_read_is_shown(place, capsys):
    write("pairs.jsonl", PAIR, {**PAIR, "rejected": "was hapax ."})
    _, error = refused(capsys)
    assert "the tokenizer cannot read the text 'was hapax .'" in error


def test_a_directory_that_holds_something_else_stays_as_it_is(place, capsys):
    Path("out").mkdir()
    Path("out/note.txt").write_text("mine")
    _, error = refused(capsys)
    assert "out holds no readable experiment.json" in error
