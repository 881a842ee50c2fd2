"""Experiments and losses in files: how they are found, and what their source does to a digest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax import experiment
from dpo_jax.experiment import describe, digest, override
from dpo_jax.structs import BadInput

MODULE = """
from functools import partial
from dpo_jax import losses
from dpo_jax.experiment import Data, Experiment, Optim, Run
from dpo_jax.structs import BadInput
from dpo_jax.algorithms.preference import preference
from my_loss import mine, scaled

EXPERIMENT = Experiment(
    name="small", model=Run(steps=3), data=Data(source="x.jsonl", tokenizer="t"),
    algorithm=partial(preference, loss=LOSS), optim=Optim(learning_rate=1e-3), run=Run(steps=10),
)
"""
LOSS_FILE = """
def mine(scored, *, beta=0.1):
    return beta * scored.logp_BK[:, 0]

def scaled(factor):
    def inner(scored):
        return factor * scored.logp_BK[:, 0]
    return inner
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of experiments with a loss beside them; the path and the modules come back after."""
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a rewritten file is read again
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "experiments"
    made.mkdir()
    (made / "my_loss.py").write_text(LOSS_FILE)
    (made / "small.py").write_text(MODULE.replace("LOSS", "mine"))
    yield made
    for name in set(sys.modules) - set(before):
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.modules.pop("experiments", None)
    sys.modules.update({name: module for name, module in before.items() if "experiments" in name})


def fresh(folder: Path, loss: str, text: str = LOSS_FILE) -> str:
    """The digest of a module whose file is written anew."""
    (folder / "my_loss.py").write_text(text)
    (folder / "small.py").write_text(MODULE.replace("LOSS", loss))
    for name in ("my_loss", "experiments.small"):
        sys.modules.pop(name, None)
    return digest(experiment.load("experiments/small.py").EXPERIMENT)


def test_digest_knows_a_users_function_by_its_source(folder):
    same, edited = fresh(folder, "mine"), fresh(folder, "mine", LOSS_FILE + "# edited\n")
    assert same != edited
    assert same == fresh(folder, "mine")
    cases = ["mine", "partial(mine, beta=2)", "scaled(2)", "scaled(3)"]
    assert len({fresh(folder, loss) for loss in cases}) == len(cases)
    assert fresh(folder, "partial(mine, beta=0.1)") == same  # its default


def test_digest_is_the_same_in_every_process(folder, repository):
    code = (
        "from dpo_jax.experiment import *; print(digest(load('experiments/small.py').EXPERIMENT))"
    )
    loss = "lambda s, x=('a', 'b'): s in {'a', 'b', 'c'}"
    here = fresh(folder, loss)
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(repository), "PYTHONHASHSEED": "7"},
    )
    assert run.stdout.strip() == here


# Modules


def test_load_by_path_and_by_name(folder):
    by_path = experiment.load("experiments/small.py")
    assert by_path.__name__ == "experiments.small"
    assert experiment.load(str(folder / "small.py")) is by_path
    assert experiment.load("experiments.small") is by_path


def test_another_experiment_of_a_module(folder):
    with (folder / "small.py").open("a") as file:
        file.write("from dataclasses import replace\nSMOKE = replace(EXPERIMENT, name='smoke')\n")
    assert experiment.load("experiments/small.py:SMOKE").EXPERIMENT.name == "smoke"
    with pytest.raises(BadInput, match="defines no Experiment SMOK: there are EXPERIMENT, SMOKE"):
        experiment.load("experiments.small:SMOK")


def test_siblings_import_each_other(folder):
    (folder / "child.py").write_text(
        "from dataclasses import replace\nfrom experiments.small import EXPERIMENT as PARENT\n"
        "EXPERIMENT = replace(PARENT, name='child', model=None, parent=PARENT)\n"
        "FRONTIER = (EXPERIMENT, PARENT)\n"
    )
    module = experiment.load("experiments/child.py")
    assert module.EXPERIMENT.parent == experiment.load("experiments/small.py").EXPERIMENT
    assert module.EXPERIMENT.parent is experiment.load("experiments/small.py").EXPERIMENT


def test_the_file_that_is_named_is_the_one_that_is_read(folder, tmp_path):
    other = tmp_path / "elsewhere" / "experiments"
    other.mkdir(parents=True)
    (other / "small.py").write_text(MODULE.replace("LOSS", "mine").replace("small", "second"))
    (other / "my_loss.py").write_text(LOSS_FILE)
    assert experiment.load("experiments/small.py").EXPERIMENT.name == "small"
    assert experiment.load(str(other / "small.py")).EXPERIMENT.name == "second"
    assert experiment.load("experiments/small.py").EXPERIMENT.name == "small"


def test_a_folder_without_a_module_name(tmp_path, folder):
    odd = tmp_path / "my-tries"
    folder.rename(odd)
    assert experiment.load("my-tries/small.py").__name__ == "small"


def test_a_loss_in_a_file(folder):
    (folder / "small.py").write_text(MODULE.replace("LOSS", "partial(losses.dpo, beta=0.1)"))
    small = experiment.load("experiments/small.py").EXPERIMENT
    changed = override(small, {"algorithm.loss": "experiments/my_loss.py:mine"})
    assert changed.algorithm.keywords["loss"].keywords == {"beta": 0.1}
    assert describe(changed)["algorithm"]["loss"]["function"].startswith(
        "experiments.my_loss:mine@"
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("experiments/smal.py", None, ["no file", "nearest is experiments/small.py"]),
        ("experiments/small", None, ["no file", "nearest is experiments/small.py"]),
        ("experiments.smal", None, ["no module", "nearest is experiments/small.py"]),
        ("small", None, ["no module 'small'", "nearest is experiments/small.py"]),
        ("experiments/bad.py", "x = 1\n", ["experiments/bad.py defines no EXPERIMENT"]),
        ("experiments/bad.py", "x = (\n", ["bad.py:1", "never closed"]),
        ("experiments/bad.py", "x = 1\n1 / 0\n", ["bad.py:2", "ZeroDivisionError"]),
        ("experiments.bad", "\nimport gone\n", ["bad.py:2", "No module named 'gone'"]),
        (
            "experiments/bad.py",
            MODULE.replace("LOSS", "mine").replace("=10", "=0"),
            ["bad.py:11", "1 or"],
        ),
        (
            "experiments/bad.py",
            MODULE.replace("LOSS", "mine") + "FRONTIER = [EXPERIMENT]\n",
            ["FRONTIER must be a tuple"],
        ),
    ],
)
def test_a_module_that_cannot_be_used_is_refused(folder, name, text, said):
    if text is not None:
        (folder / "bad.py").write_text(text)
    with pytest.raises(BadInput) as caught:
        experiment.load(name)
    for part in said:
        assert part in str(caught.value)
