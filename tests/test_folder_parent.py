"""Runs that start from a folder of Hugging Face."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import EXPERIMENT, PAIRS, SFT

import dpo_jax
from dpo_jax import parts
from dpo_jax.experiment import Evaluation, Experiment, override
from dpo_jax.models import hf
from dpo_jax.models.transformer import decoder
from dpo_jax.structs import BadInput
from dpo_jax.worlds import sentiment

CONFIG = replace(SFT.model, family="qwen3", qk_norm="head", P=64)


@pytest.fixture(scope="module")
def weights(place: Path):
    """The parameters in the folder `base`."""
    params = decoder(CONFIG).init(jax.random.key(5))
    hf.save(place / "base", CONFIG, params)
    return params


def started(experiment: Experiment, **overrides) -> Experiment:
    """From the folder, without a step that moves it."""
    still = {"optim.learning_rate": 0.0, "run.steps": 1, **overrides}
    return override(replace(experiment, model=None, parent="base"), still)


def test_a_run_starts_from_the_weights_of_a_folder(weights):
    result = dpo_jax.run(started(SFT))
    assert jax.tree.all(jax.tree.map(np.array_equal, result.params, jax.device_get(weights)))


def test_a_finished_run_is_read_back(weights):
    again = dpo_jax.run(started(SFT))
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, jax.device_get(weights)))


def test_a_preference_run_samples_and_compares_with_the_folder(weights):
    sentiment.tokenizer().save_pretrained("base")
    pairs = replace(PAIRS, parent="base", n=48)  # few of a random model end
    base = replace(EXPERIMENT, data=replace(EXPERIMENT.data, source=pairs), evaluation=Evaluation())
    result = dpo_jax.run(started(base, **{"optim.learning_rate": 1e-3}))
    rows = map(json.loads, (result.directory / "metrics.jsonl").read_text().splitlines())
    first = next(row["loss"] for row in rows if "loss" in row)
    np.testing.assert_allclose(first, np.log(2), rtol=1e-6)


def test_what_is_no_parent_is_refused(place: Path):
    with pytest.raises(BadInput, match="no such folder, and not to be had from the hub"):
        dpo_jax.run(replace(started(SFT), parent="owner/nothing"))
    with pytest.raises(BadInput, match=r"nowhere.config\.json"):
        dpo_jax.run(replace(started(SFT), parent="nowhere"))
    with pytest.raises(BadInput, match="name its experiment"):
        parts.from_folder(str(dpo_jax.run(started(SFT)).directory))
