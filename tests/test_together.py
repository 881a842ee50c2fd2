"""Runs that train together equal the same runs trained alone."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from tiny import relative_error
from tiny_runs import EXPERIMENT, rows, timeless

import dpo_jax
from dpo_jax import losses, together
from dpo_jax.algorithms.preference import preference
from dpo_jax.experiment import override

SMALL = override(EXPERIMENT, {"run.steps": 5, "run.eval_every": 5})
MEMBERS = tuple(
    override(SMALL, {"algorithm.loss.beta": beta, "optim.learning_rate": rate, "run.seed": seed})
    for beta, rate, seed in ((0.1, 0.01, 0), (0.5, 0.02, 0), (1.0, 0.01, 3))
)


@pytest.fixture(scope="module")
def alone(place):
    """The members, each trained by itself."""
    return [dpo_jax.run(member, directory=f"alone{i}") for i, member in enumerate(MEMBERS)]


@pytest.fixture
def fresh(place):
    """No member is trained yet; their parent and its samples stay."""
    for folder in place.glob("runs/dpo-*"):
        shutil.rmtree(folder)


def test_members_are_parted_by_what_a_program_can_share():
    other = replace(SMALL, algorithm=partial(preference, loss=partial(losses.ipo, beta=0.5)))
    longer = override(SMALL, {"run.steps": 6})
    assert together.programs((MEMBERS[0], other, MEMBERS[1], longer, MEMBERS[2])) == [
        [0, 2, 4],
        [1],
        [3],
    ]
    found = together.differing(MEMBERS[:2])
    assert found == [
        {"algorithm.loss.beta": 0.1, "optim.learning_rate": 0.01},
        {"algorithm.loss.beta": 0.5, "optim.learning_rate": 0.02},
    ]


@pytest.mark.parametrize("at_once", [1, 2, None], ids=["one by one", "by two", "all"])
def test_the_first_losses_and_the_weights_are_those_of_single_runs(
    alone, fresh, monkeypatch, at_once
):
    monkeypatch.setattr(together, "AT_ONCE", {} if at_once is None else {"cpu": at_once})
    results = together.run_all(MEMBERS)
    for result, single in zip(results, alone, strict=True):
        assert result.directory.name.startswith("dpo-")
        assert relative_error(result.params, single.params) < 1e-4
        both = zip(timeless(result.directory), timeless(single.directory), strict=True)
        for one, other in both:
            assert one.keys() == other.keys()
            if "loss" in one:
                assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert result.metrics["eval_loss"] == pytest.approx(single.metrics["eval_loss"], rel=1e-4)


def test_finished_members_are_reused_and_others_still_trained(fresh, capsys):
    dpo_jax.run(MEMBERS[0])
    results = together.run_all(MEMBERS)
    said = capsys.readouterr().err
    assert f"{results[0].directory}: finished before, reused" in said
    assert f"{results[1].directory} and 1 more train together" in said
    again = together.run_all(MEMBERS)
    assert [each.metrics for each in again] == [each.metrics for each in results]


def test_a_broken_sweep_goes_on_where_it_stopped(fresh):
    members = [override(member, {"run.save_every": 2}) for member in MEMBERS]
    whole = together.run_all(members)
    for result in whole:  # as if it had been killed between a checkpoint and the end
        (result.directory / "result.json").unlink()
        (result.directory / "weights").rmtree()
        (result.directory / "checkpoints" / "5").rmtree()
    for one, other in zip(whole, together.run_all(members), strict=True):
        assert relative_error(one.params, other.params) == 0
        assert [row["step"] for row in rows(one.directory)] == sorted(
            row["step"] for row in rows(other.directory)
        )


PROGRAM = """
import sys
import numpy as np, jax
from dpo_jax import together, run
from dpo_jax.experiment import override
from test_together import MEMBERS
wide = [override(m, {"run.dtype": "float64", "run.steps": 12, "parent.run.steps": 3})
        for m in MEMBERS[::2]]
results = together.run_all(wide)
for i, (member, result) in enumerate(zip(wide, results)):
    alone = run(member, directory=f"wide{i}")
    for one, other in zip(jax.tree.leaves(result.params), jax.tree.leaves(alone.params)):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
"""


def test_a_whole_run_in_float64_is_equal_to_nine_digits(tmp_path):
    here = os.path.dirname(__file__)
    environment = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": here}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_seeds_draw_other_weights_and_batches(fresh):
    first, _, third = (jax.device_get(each.params) for each in together.run_all(MEMBERS))
    assert relative_error(first, third) > 1e-3
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(third))
