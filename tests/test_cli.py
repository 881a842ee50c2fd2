"""The command: exit statuses, one line for what cannot be used, help with every option."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest

from dpo_jax import cli
from dpo_jax.experiment import Experiment, load, options
from dpo_jax.structs import BadInput

MODULE = '''
"""A small run."""
from dataclasses import replace
from functools import partial
from dpo_jax import losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.experiment import Data, Experiment, Optim, Run
from dpo_jax.models.transformer import Config

EXPERIMENT = Experiment(
    name="small",
    model=Config(V=8, D=8, L=1, H=2, J=1, E=4, F=8),
    data=Data(source="missing.jsonl", tokenizer="missing"),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.1)),
    optim=Optim(learning_rate=1e-3),
    run=Run(steps=10, dir="runs/mine"),
)
'''
FRONTIER = """
FRONTIER = tuple(
    replace(EXPERIMENT, algorithm=partial(preference, loss=partial(losses.dpo, beta=beta)))
    for beta in (0.1, 0.3)
)
"""
WHOLE = """
from functools import partial
from dpo_jax.algorithms.sft import sft
from dpo_jax.experiment import Data, Evaluation, Experiment, Optim, Run
from dpo_jax.models.transformer import Config
from dpo_jax.worlds import sentiment

EXPERIMENT = Experiment(
    name="whole",
    model=Config(V=512, D=8, L=1, H=2, J=1, E=4, F=8),
    data=Data(
        source=partial(sentiment.reviews, n=32, seed=0),
        tokenizer=sentiment.tokenizer, groups=8, row_tokens=64,
    ),
    algorithm=sft,
    optim=Optim(learning_rate=1e-3),
    run=Run(steps=2, dir="runs/whole"),
    evaluation=Evaluation(source=partial(sentiment.reviews, n=8, seed=1)),
)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with tries/small.py and tries/several.py."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tries").mkdir()
    (tmp_path / "tries" / "small.py").write_text(MODULE)
    (tmp_path / "tries" / "broken.py").write_text("raise ValueError('two\\nlines')\n")
    (tmp_path / "tries" / "several.py").write_text(MODULE + FRONTIER)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "tries":
            del sys.modules[name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["COMMAND"]),
        (["trian"], ["no command 'trian'", "nearest is train"]),
        (["--hlep"], ["no command '--hlep'"]),
        (["eval", "tries/small.py"], ["runs/mine holds no finished run of small"]),
        (["sample", "tries/small.py"], ["runs/mine holds no finished run of small"]),
        (["sample", "tries/small.py", "evaluation.prompts=x.jsonl"], ["no finished run of small"]),
        (["score", "tries/small.py", "x.jsonl"], ["no finished run of small"]),
        (["export", "tries/small.py", "x"], ["no finished run of small"]),
        (["eval", "tries/small.py", "x"], ["'x' is no override"]),
        (["export", "tries/small.py", "x", "--dtpe=y"], ["no argument '--dtpe=y'"]),
        (["train"], ["name an experiment"]),
        (["train", "tries/smal.py"], ["no file tries/smal.py", "nearest is tries/small.py"]),
        (["train", "tries.smal"], ["no module 'tries.smal'"]),
        (["train", "tries/broken.py"], ["broken.py:1: ValueError: two lines"]),
        (["train", "tries/small.py", "run.steps"], ["dotted.path=value"]),
        (["train", "tries/small.py", "=3"], ["dotted.path=value"]),
        (["train", "tries/small.py", "run.seed=1", "run.seed=2"], ["run.seed is given twice"]),
        (["train", "tries/small.py", "run.step=3"], ["nearest is run.steps"]),
        (["train", "tries/small.py", "run.steps=x"], ["run.steps=x: expected int"]),
        (["train", "tries/small.py", "--run.steps=3"], ["write run.steps=3 without dashes"]),
        (["train", "tries/small.py", "--halp"], ["--halp", "nearest is --help"]),
        (["train", "tries/small.py", "algorithm.loss.beta=.1,.2"], ["frontier"]),
        (["frontier", "tries/small.py"], ["compares several runs"]),
        (["frontier", "tries/several.py", "algorithm.loss.beta=1"], ["compares several runs"]),
    ],
)
def test_unusable_input_is_one_line_and_status_2(place, capsys, words, said):
    before = sorted(place.rglob("*"))
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dpo-jax: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    for part in said:
        assert part in err
    assert [path for path in sorted(place.rglob("*")) if "pycache" not in str(path)] == before


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help"], ["frontier", "-h"], ["score", "-h"], ["sample", "-h"]],
)
def test_help_of_the_command(capsys, words):
    try:
        status = cli.main(words)
    except SystemExit as leaving:  # argparse ends the process after its own help
        status = leaving.code
    assert status == 0
    assert "usage: dpo-jax" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["tries/small.py", "--help", "algorithm.loss.beta=0.7"],
        ["--help", "tries/small.py", "algorithm.loss.beta=0.7"],
        ["tries.small", "algorithm.loss.beta=0.7", "-h"],
    ],
)
def test_help_of_an_experiment_lists_every_option_with_its_value(place, capsys, words):
    assert cli.main(["train", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(" = ") for line in lines if " = " in line)
    listed = {path.strip(): value for path, value in listed.items()}
    assert list(listed) == [path for path, _ in options(load("tries.small").EXPERIMENT)]
    assert listed["algorithm.loss.beta"] == "0.7"
    assert listed["algorithm.loss.label_smoothing"] == "0.0"
    assert listed["algorithm.loss"] == "losses.dpo"
    assert listed["run.dir"] == "runs/mine"
    assert listed["model.D"] == "8"


def test_help_of_a_command_with_flags_says_what_they_do(place, capsys):
    assert cli.main(["score", "tries/small.py", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--reference-free" in said and "FILE" in said and "run.dir" in said


def test_members_of_a_frontier(place):
    module = load("tries/several.py")

    def betas(members: tuple[Experiment, ...]) -> list[float]:
        assert all(isinstance(each.algorithm, partial) for each in members)
        assert all(each.run.dir is None for each in members)
        return [dict(options(each))["algorithm.loss.beta"] for each in members]

    assert betas(cli.frontier_members(module, {})) == [0.1, 0.3]
    shorter = cli.frontier_members(module, {"run.steps": "3"})
    assert betas(shorter) == [0.1, 0.3]
    assert [each.run.steps for each in shorter] == [3, 3]
    listed = {"algorithm.loss.beta": ".5,.6", "run.seed": "1,2"}
    members = cli.frontier_members(module, listed)
    assert betas(members) == [0.5, 0.5, 0.6, 0.6]
    assert [each.run.seed for each in members] == [1, 2, 1, 2]
    with pytest.raises(BadInput, match="compares several runs"):
        cli.frontier_members(module, {"algorithm.loss.beta": ".5,.5"})


def test_train_eval_sample(place, capsys):
    (place / "tries" / "whole.py").write_text(WHOLE)
    (place / "ask.jsonl").write_text('{"prompt": "the"}\n{"prompt": "the editing"}\n')
    assert cli.main(["train", "tries/whole.py", "run.seed=5"]) == 0
    assert json.loads((place / "runs/whole/experiment.json").read_text())["name"] == "whole"
    lines = (place / "runs/whole/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]

    capsys.readouterr()
    assert cli.main(["eval", "tries/whole.py", "run.seed=5"]) == 0
    name, _, value = capsys.readouterr().out.strip().partition(" = ")
    assert name == "eval_loss"
    assert float(value) == pytest.approx(rows[-1]["eval_loss"], rel=1e-5)

    asked = ["evaluation.prompts=ask.jsonl", "evaluation.samples=2", "evaluation.max_tokens=4"]
    assert cli.main(["sample", "tries/whole.py", "run.seed=5", *asked]) == 0
    drawn = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in drawn] == ["the", "the", "the editing", "the editing"]

    assert cli.main(["eval", "tries/whole.py"]) == 2  # another seed is another experiment
    assert "runs/whole holds another experiment" in capsys.readouterr().err


def python(repository, *arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_the_module_runs_as_the_command(place, repository):
    run = python(repository, "-m", "dpo_jax", "train", "tries/small.py", "run.stesp=1", cwd=place)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.splitlines() == [
        "dpo-jax: error: no option run.stesp; nearest is run.steps (run has dir, dtype, "
        "eval_every, keep, log_every, mesh, microbatches, offload, profile, reference, remat, "
        "save_every, seed, steps)"
    ]


def test_importing_the_package_is_quick(repository, tmp_path):
    code = (
        "import time, jax, flax\n"
        "start = time.perf_counter()\n"
        "import dpo_jax\n"
        "print(time.perf_counter() - start)\n"
        "from dpo_jax import losses\n"
        "assert losses.dpo and dpo_jax.run\n"
    )
    run = python(repository, "-c", code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.3


def test_losses_are_listed_and_the_kl_estimators_measured(capsys):
    assert cli.main(["losses"]) == 0
    listed = capsys.readouterr().out
    assert "dpo(beta, " in listed and "2305.18290" in listed and "needs pairs, reference" in listed
    assert all(f"  {name}(" in listed for name in ("kto", "plackett_luce_dpo", "simpo", "mix"))
    assert cli.main(["losses", "kl"]) == 0
    assert "k3 per token: value unbiased" in capsys.readouterr().out
    assert cli.main(["losses", "all"]) == 2
    assert "invalid choice: 'all'" in capsys.readouterr().err
