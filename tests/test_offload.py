"""State in the memory of the host: where it lies, that steps and evaluations fetch it, and runs
that cannot tell."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import test_train
from tiny import relative_error
from tiny_runs import EXPERIMENT, rows, timeless, words

import dpo_jax
from dpo_jax import losses, offload, optim, parallel
from dpo_jax.algorithms.policy import grpo
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.reference import soft_update
from dpo_jax.algorithms.sft import sft
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.experiment import Lora, Run, digest, override
from dpo_jax.structs import BadInput, TrainState
from dpo_jax.together import run_all
from dpo_jax.train import Result, Stepper, jit_update

BOTH = ("reference", "opt_state")
ROUNDING = 2e-6
LOSSES = {
    "log-probs": partial(losses.dpo, beta=0.1),
    "heads": partial(losses.tdpo, beta=0.1),
}


def kinds(tree: Any) -> set[str]:
    """Where the arrays of a tree lie, scalars left out."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
    return {leaf.sharding.memory_kind or "device" for leaf in leaves}


# The step


def stepped(algorithm: Any, host: tuple[str, ...], shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """(state, frozen, metrics) after three steps of Adam on a mesh, the state given away each."""
    tx = optim.transformation(SimpleNamespace(**OPTIM), 3)
    mesh = parallel.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    state, frozen = test_train.start(algorithm, tx), {"reference": test_train.PARAMS}
    places = parallel.shardings(mesh, state, host)
    state = jax.device_put(jax.tree.map(jax.numpy.copy, state), places)
    frozen = jax.device_put(frozen, parallel.shardings(mesh, frozen, host))
    update, values = jit_update(algorithm, tx, places, 2), []
    with jax.set_mesh(mesh):
        for batch in test_train.batches(3):
            before, batch = state, parallel.shard_batch(mesh, batch)
            state, metrics = update(state, frozen, batch, jax.random.key(0))
            values.append(jax.device_get(metrics))
            given = jax.tree.leaves((before.params, before.opt_state))
            assert all(leaf.is_deleted() for leaf in given)
    return state, frozen, values


OPTIM = {
    # eps above the float32 noise of gradients near 0, which Adam would make full steps of
    "optimizer": partial(optim.adamw, eps=1e-6, weight_decay=0.1),
    "learning_rate": 1e-2,
    "schedule": optim.constant,
    "warmup": 0,
    "clip": 1.0,
    "ema": 0.5,
}


@pytest.mark.parametrize(
    ("shape", "name"),
    [((1, 1, 1), "log-probs"), ((2, 2, 2), "log-probs"), ((8, 1, 1), "heads")],
    ids=str,
)
def test_steps_are_the_same_and_leave_things_where_they_lay(shape, name):
    """To rounding: the update of each weight is compiled by itself, where XLA fuses otherwise."""
    algorithm = preference(test_train.MODEL, loss=LOSSES[name])
    here, frozen, values = stepped(algorithm, (), shape)
    assert kinds(here) == kinds(frozen) == {"device"}
    away, frozen, others = stepped(algorithm, BOTH, shape)
    assert kinds(away.opt_state) == kinds(frozen) == {parallel.HOST}
    assert kinds(away.params) == {"device"}
    assert all(leaf.sharding.memory_kind != parallel.HOST for leaf in scalars(away))
    assert relative_error(away, here) < ROUNDING
    assert relative_error(others[0], values[0]) < ROUNDING
    assert relative_error(others[1:], values[1:]) < 1e-4  # differences of log-probs among them


def scalars(state: TrainState) -> list[jax.Array]:
    found = [leaf for leaf in jax.tree.leaves(state) if not leaf.ndim]
    assert len(found) > 2  # the step, what was skipped, the counters of the optimizer
    return found


def coupled(opt_state: dict[str, Any], params: Any, tenth: Any) -> tuple[Any, Any]:
    """A step in which every weight moves by the moments of all."""
    total = sum(x.sum() for x in jax.tree.leaves(opt_state["mu"])) * tenth
    mu = jax.tree.map(lambda m, p: 0.5 * m + p, opt_state["mu"], params)
    moved = jax.tree.map(lambda p: p - total, params)
    return moved, {"mu": mu, "count": opt_state["count"] + 1}


@pytest.mark.parametrize("good", [True, False])
def test_a_weight_at_a_time_is_all_at_once(good):
    """Also where weights depend on each other's state; where the gradient is not finite nothing
    moves. Names that end in another's belong to the longer one."""
    one = {"w_D": np.arange(8.0, dtype=np.float32), "inner": {"w_D": np.ones(8, np.float32)}}
    state = {"mu": jax.tree.map(lambda x: x + 1, one), "count": np.int32(3)}
    assert offload._belonging(state, one) == [[0, 1], [2]]
    mesh = parallel.make_mesh()
    moved = partial(coupled, params=one, tenth=np.float32(0.1))

    @jax.jit
    def stepped(state: Any) -> Any:
        return offload.applied(moved, np.array(good), one, state)

    away = jax.device_put(state, parallel.shardings(mesh, state, ("mu",)))
    params, state_after = stepped(away)
    assert kinds(state_after["mu"]) == {parallel.HOST} and kinds(params) == {"device"}
    expected = moved(state) if good else (one, state)
    assert relative_error((params, state_after), expected) < 1e-6


def test_shards_of_the_host_are_those_of_the_devices():
    mesh, state = (
        parallel.make_mesh(2, 2, 2),
        test_train.start(sft(test_train.MODEL), optim.adamw(1e-2)),
    )
    here, away = (parallel.abstract(mesh, state, host) for host in ((), BOTH))
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(away), strict=True):
        assert one.sharding.spec == other.sharding.spec
    # two moments of every weight are on the host, and two counters stay
    moments = parallel.own_bytes(here.opt_state) - parallel.own_bytes(away.opt_state)
    assert moments == 2 * parallel.own_bytes(here.params)
    assert parallel.own_bytes(away, host=True) == moments
    assert parallel.own_bytes(here, host=True) == 0


# Whole runs

MOVED = {"run.offload": "both"}
SMALL = override(EXPERIMENT, {"optim.ema": 0.9, "optim.optimizer.eps": 1e-4})


@pytest.fixture(scope="module")
def plain(place) -> Result:
    """A run whose state lies on the devices."""
    return dpo_jax.run(SMALL, directory="plain")


def same(one: Any, other: Any) -> None:
    """The same weights to rounding, the same metrics and samples."""
    assert relative_error(one.params, other.params) < 1e-5
    for mine, others in zip(timeless(one.directory), timeless(other.directory), strict=True):
        assert mine == pytest.approx(others, rel=1e-3, abs=1e-5)
    mine, others = (rows(each.directory, "samples.jsonl") for each in (one, other))
    assert [row["response"] for row in mine] == [row["response"] for row in others]


@pytest.mark.parametrize("option", ["reference", "optimizer", "both"])
def test_a_run_that_moves_its_state_is_the_run(plain, option):
    """On eight devices, with evaluations of pairs and of samples, and a moving average."""
    moved = dpo_jax.run(override(SMALL, {"run.offload": option}), directory=option)
    same(moved, plain)
    assert kinds(moved.params) == {"device"}


def test_a_resumed_run_lies_there_again(plain, monkeypatch):
    """From a checkpoint of a run on the devices too: the option is none of its digest."""
    saving = override(SMALL, {"run.save_every": 2, "run.keep": 9})
    whole = dpo_jax.run(saving, directory="whole")
    seen, steps = [], Stepper.advance

    def advance(self: Stepper, step: int) -> Any:
        seen.append((step, kinds(self.state(0).opt_state), kinds(self.setup.frozen)))
        return steps(self, step)

    monkeypatch.setattr(Stepper, "advance", advance)
    for broken in ("whole", "resumed"):
        if broken == "resumed":
            dpo_jax.run(override(saving, MOVED), directory="resumed")
        shutil.copytree(broken, f"{broken}-again")
        Path(f"{broken}-again/result.json").unlink()
        for step in ("4", "6"):
            shutil.rmtree(f"{broken}-again/checkpoints/{step}")
        seen.clear()
        again = dpo_jax.run(override(saving, MOVED), directory=f"{broken}-again")
        assert seen == [(step, {parallel.HOST}, {parallel.HOST}) for step in range(2, 6)]
        assert relative_error(again.params, whole.params) < 1e-5
        assert Checkpoints(f"{broken}-again/checkpoints").steps() == [2, 4, 6]


def test_samples_are_held_to_a_reference_on_the_host(place):
    """Of an algorithm that samples: rollout and update read it."""
    algorithm = partial(grpo, rewards=(words,), n=2, max_tokens=8, beta=0.1, kl_in="loss")
    given = replace(SMALL, algorithm=algorithm, data=replace(SMALL.data, source=PROMPTS))
    given = replace(given, evaluation=replace(SMALL.evaluation, source=None))
    same(
        dpo_jax.run(override(given, MOVED), directory="sampled-moved"),
        dpo_jax.run(given, directory="sampled"),
    )


PROMPTS = SMALL.data.source.prompts


def test_runs_that_could_share_a_program_are_trained_one_by_one(place):
    members = [override(SMALL, {"run.seed": seed, "run.steps": 2, **MOVED}) for seed in (0, 1)]
    results = run_all(members, ["seed0", "seed1"])
    for member, result in zip(members, results, strict=True):
        alone = dpo_jax.run(
            override(member, {"run.offload": "none"}), directory=f"{result.directory}-here"
        )
        same(result, alone)


# What is refused


REMEDIES = (
    ("reference", " .* take run.offload=none"),
    ("both", " .* take run.offload=optimizer"),
)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cached": ({"run.reference": "cached"}, "run.reference=cached holds no reference"),
    "no reference": ({"algorithm": sft}, "sft holds no frozen reference"),
    "one that moves": (
        {"algorithm.reference": partial(soft_update, alpha=0.5, every=1)},
        r"preference\(.* holds no frozen reference",
    ),
    "new adapters": ({"lora": Lora(2, 2.0)}, r"preference\(.* holds no frozen reference"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_reference_that_is_not_there_is_not_moved(place, name):
    changes, said = REFUSED[name]
    for option, remedy in (("reference", ""), ("both", "")) if name == "cached" else REMEDIES:
        given = override(SMALL, {**changes, "run.offload": option})
        with pytest.raises(BadInput, match=rf"run.offload={option}: .*{said}{remedy}"):
            dpo_jax.run(given, directory="refused")
        assert not Path("refused").exists()
    with pytest.raises(BadInput, match=r"run.offload=host"):
        override(SMALL, {"run.offload": "host"})


def test_a_backend_without_the_memory_is_named():
    device = SimpleNamespace(
        platform="abacus", addressable_memories=lambda: [SimpleNamespace(kind="device")]
    )
    offload.check(Run(1), device)
    with pytest.raises(
        BadInput, match=r"run.offload=both: .* backend abacus has the memories device"
    ):
        offload.check(Run(1, offload="both"), device)


def test_auto_does_not_cache_what_is_moved():
    assert offload.reference(Run(1)) == "auto"
    assert offload.reference(Run(1, offload="optimizer")) == "auto"
    assert offload.reference(Run(1, offload="both")) == "live"
    assert offload.reference(Run(1, offload="reference", reference="live")) == "live"


def test_the_digest_is_that_of_the_run():
    assert digest(override(SMALL, MOVED)) == digest(SMALL)
