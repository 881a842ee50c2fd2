"""Waiting for data: what is counted, what a run writes of it, and who gets an error of the data."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import SFT, rows

from dpo_jax import build, parts
from dpo_jax.feed import Feed
from dpo_jax.member import Member
from dpo_jax.structs import BadInput
from dpo_jax.train import Stepper, loop, run

PAUSE = 0.05  # seconds


def slept(step: int) -> int:
    time.sleep(PAUSE)
    return step


def test_an_idle_device_waits_for_the_batch():
    feed = Feed(slept)
    assert feed.batch(7, jax.block_until_ready(jnp.ones(3))) == 7
    assert PAUSE <= feed.waited < 20 * PAUSE


def test_a_device_at_work_waits_for_nothing():
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 400, lambda _, y: jnp.tanh(y @ x), x)

    x = jnp.full((600, 600), 1e-3)
    jax.block_until_ready(slow(x))  # compiled
    feed = Feed(lambda step: step)
    before = slow(x)
    feed.batch(0, before)
    assert not before.is_ready()
    assert feed.waited == 0


class Slow:
    """A loader that sleeps before each batch, and has none of a step."""

    def __init__(self, loader: Any, seconds: float, missing: int = -1):
        self._loader, self._seconds, self._missing = loader, seconds, missing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def batch(self, step: int) -> Any:
        if step == self._missing:
            raise BadInput("the record of step 3 is gone")
        time.sleep(self._seconds)
        return self._loader.batch(step)


def lines(folder: Path, seconds: float, **faults: int) -> list[dict[str, Any]]:
    """The lines of eight steps whose data takes so long."""
    experiment = replace(SFT, run=replace(SFT.run, steps=8, dir=str(folder)))
    mesh = parts.mesh(experiment)
    with jax.set_mesh(mesh):
        setup = build.setup(experiment, mesh, build.materials(experiment, run))
        setup = replace(setup, loader=Slow(setup.loader, seconds, **faults))
        loop([Member(experiment, setup)], Stepper)
    return [row for row in rows(folder) if "loss" in row]


def test_a_run_writes_the_share_of_time_that_it_waited(tmp_path):
    """Nearly all of the time where data takes far longer than a step of a tiny model."""
    shares = [row["data_wait_share"] for row in lines(tmp_path / "slow", 0.3)]
    first, *others, last = shares
    assert len(others) == 6 and 0.5 < min(others) <= max(others) <= 1
    assert first == 0  # the clock stands while the other shapes are compiled
    assert last == 0  # no batch comes behind the last step


def test_an_error_of_the_data_reaches_the_caller(tmp_path):
    with pytest.raises(BadInput, match="the record of step 3 is gone"):
        lines(tmp_path / "gone", 0.0, missing=3)
    assert [row["step"] for row in rows(tmp_path / "gone")] == [1, 2, 3]
