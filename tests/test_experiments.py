"""Every module in experiments/ is short, says what it costs, builds and traces."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from hub_configs import HUB

from dpo_jax import experiment, functions, train
from dpo_jax.experiment import Experiment

PATHS = sorted((Path(__file__).resolve().parent.parent / "experiments").glob("[!_]*.py"))
NAMES = [path.stem for path in PATHS]
MODELS = {name: config for name, (_, config) in HUB.items()}  # as their files on the hub say
MODELS["allenai/Llama-3.1-Tulu-3-8B-SFT"] = replace(MODELS["meta-llama/Llama-3.1-8B"], V=128264)


def without_the_hub(value: Experiment) -> Experiment:
    """The experiment with the architecture of a parent on the hub in place of its weights."""
    if isinstance(value.parent, Experiment):
        return replace(value, parent=without_the_hub(value.parent))
    if value.parent is None:
        return value
    return replace(value, parent=None, model=MODELS[value.parent])


def test_the_demo_is_there():
    assert "sentiment_dpo" in NAMES


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_module_is_short_and_says_what_it_costs(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "an experiment opens with a docstring: the command, Cost: ..., Result: ..."
    lines = docstring.splitlines()
    assert "dpo-jax " in lines[0] and f"experiments/{path.name}" in lines[0]
    labels = [line.split(":")[0] for line in lines if line.startswith(("Cost:", "Result:"))]
    assert lines[1].startswith("Cost:") and labels == ["Cost", "Result"]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_experiment_is_a_value(path):
    """It builds by path and by module name, hashes, and describes itself in JSON."""
    value = experiment.load(str(path)).EXPERIMENT
    assert isinstance(value, experiment.Experiment)
    assert value.name == path.stem, "runs/<name>-<digest> is found by the name of the file"
    described = experiment.describe(value)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    again = experiment.load(f"experiments.{path.stem}").EXPERIMENT
    assert experiment.digest(again) == experiment.digest(value)
    assert isinstance(hash(value), int)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_algorithm_traces(path):
    """Shapes and dtypes fit from the batch to the objective; nothing is computed or generated."""
    module = functions.import_file(str(path))
    for value in {x for x in vars(module).values() if isinstance(x, Experiment)}:
        leaves = jax.tree.leaves(train.trace(without_the_hub(value)))
        assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
