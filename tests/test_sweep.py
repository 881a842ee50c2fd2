"""Sweeps: which runs, how seeds are averaged, what is written; errors of the command."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import EXPERIMENT

from dpo_jax import cli, losses, sweep
from dpo_jax.experiment import Sweep, each, override
from dpo_jax.member import Result
from dpo_jax.structs import BadInput

BASE = override(EXPERIMENT, {"run.steps": 2, "run.eval_every": 0})
BETAS = each(BASE, "algorithm.loss.beta", {"dpo": 0.1, "sharper": 1.0}, seeds=2)


def result(member, **metrics) -> Result:
    return Result(Path("nowhere"), member, None, None, None, metrics)  # type: ignore[arg-type]


def test_each_gives_every_name_every_seed():
    assert [(m.name, m.run.seed) for m in BETAS] == [
        ("dpo", 0),
        ("dpo", 1),
        ("sharper", 0),
        ("sharper", 1),
    ]
    by_loss = each(BASE, "algorithm.loss", {"ipo": partial(losses.ipo, beta=0.3)}, seeds=1)
    assert by_loss[0].algorithm.keywords["loss"].func is losses.ipo


def test_seeds_are_averaged_and_the_error_is_that_of_their_mean():
    values = (1.0, 4.0, 2.0, 2.5)
    results = [
        result(m, **{"eval_samples/kl": 0.1, "eval_samples/reward": v, "eval_samples/kl_se": 9.0})
        for m, v in zip(BETAS, values, strict=True)
    ]
    first, second = sweep.summary(Sweep("x", BETAS), results)
    assert (first.line, second.line) == ("dpo", "sharper")
    assert (first.y.mean, first.y.count) == (2.5, 2)
    assert first.y.error == pytest.approx(np.std([1, 4], ddof=1) / np.sqrt(2))
    assert second.y.mean == 2.25 and first.x == sweep.Mean(0.1, 0.0, 2)
    assert "eval_samples/kl_se" not in first.metrics


def test_one_seed_keeps_the_error_of_its_evaluation():
    metrics = {"eval_samples/kl": 0.1, "eval_samples/reward": 1.0, "eval_samples/reward_se": 0.25}
    (point,) = sweep.summary(Sweep("x", BETAS[:1]), [result(BETAS[0], **metrics)])
    assert point.y == sweep.Mean(1.0, 0.25, 1)


def test_an_option_can_be_an_axis_and_tells_the_points_of_a_line_apart():
    members = tuple(override(BASE, {"algorithm.loss.beta": beta}) for beta in (0.1, 1.0))
    results = [result(member, loss=2.0) for member in members]
    points = sweep.summary(Sweep("x", members, x="algorithm.loss.beta", y="loss"), results)
    assert [(p.x.mean, p.label) for p in points] == [(0.1, ""), (1.0, "")]
    points = sweep.summary(Sweep("x", members, x="loss", y="loss"), results)
    assert [p.label for p in points] == ["beta=0.1", "beta=1.0"]
    with pytest.raises(BadInput, match=r"algorithm\.loss is no metric of dpo's evaluation and no"):
        sweep.summary(Sweep("x", members, x="algorithm.loss", y="loss"), results)


MODULE = """
from dpo_jax.experiment import Sweep
from tiny_runs import EXPERIMENT
SWEEP = {sweep}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("swept", None)


def test_a_sweep_from_the_command_line(place, capsys):
    """Two betas and two seeds: four runs in one program, a figure, a table and a record."""
    (place / "swept.py").write_text(
        "from dataclasses import replace\nfrom functools import partial\n"
        "from dpo_jax.experiment import Evaluation, override\n"
        "from dpo_jax.worlds import sentiment\nimport tiny_runs\n"
        "WORTH = Evaluation(prompts=partial(sentiment.prompts, n=4, seed=5),"
        " rewards=(tiny_runs.words,), max_tokens=8)\n"
        "EXPERIMENT = override(replace(tiny_runs.EXPERIMENT, evaluation=WORTH),"
        " {'run.steps': 2, 'run.eval_every': 0, 'parent.run.steps': 2})\n"
    )
    words_given = ["algorithm.loss.beta=.1,1.0", "run.seed=0,1"]
    assert cli.main(["sweep", "swept.py", *words_given]) == 0
    out, said = capsys.readouterr()
    assert "beta=0.1" in out and "beta=1.0" in out and "+-" in out
    assert "and 3 more train together" in said and "4 runs in 1 programs" in said
    record = json.loads(Path("runs/dpo_sweep/sweep.json").read_text())
    assert [point["label"] for point in record["points"]] == ["beta=0.1", "beta=1.0"]
    assert all(point["y"]["count"] == 2 for point in record["points"])
    assert Path("runs/dpo_sweep/sweep.png").read_bytes().startswith(b"\x89PNG")
    first = json.loads((Path(record["directories"][0]) / "result.json").read_text())["metrics"]
    second = json.loads((Path(record["directories"][1]) / "result.json").read_text())["metrics"]
    mean = (first["eval_samples/words"] + second["eval_samples/words"]) / 2
    assert record["points"][0]["y"]["mean"] == pytest.approx(mean)
    assert cli.main(["sweep", "swept.py", *words_given]) == 0  # all of it is found again
    assert "train together" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "words_given", "message"),
    [
        ("None", [], "a sweep compares several runs, these are 1"),
        ("3", [], "SWEEP must be a Sweep"),
        ("Sweep('one', (EXPERIMENT,))", [], "a sweep compares several runs, these are 1"),
        ("None", ["algorithm.loss.beta=.1,.1"], "a sweep compares several runs, these are 1"),
        ("None", ["algorithm.loss.bta=.1,.2"], "nearest is algorithm.loss.beta"),
    ],
)
def test_what_is_no_sweep_is_refused(place, capsys, written, words_given, message):
    (place / "swept.py").write_text(MODULE.format(sweep=written))
    assert cli.main(["sweep", "swept.py", *words_given]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.splitlines()) == 1 and message in error
    assert [path.name for path in place.iterdir() if path.name != "__pycache__"] == ["swept.py"]
