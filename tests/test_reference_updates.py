"""What changes from step to step and is not trained: running means and references that move."""

import shutil
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import (
    MODEL,
    POLICY,
    REFERENCE,
    Engine,
    groups,
    log_ratio,
    lone,
    mean,
    packed,
    started,
)
from tiny import relative_error
from tiny_runs import timeless

import dpo_jax
from dpo_jax import build, losses, parallel, parts
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.reference import soft_update
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.experiment import Data, Experiment, Optim, Run
from dpo_jax.member import Member
from dpo_jax.models.transformer import Config
from dpo_jax.structs import BadInput, Batch, Group, TrainState
from dpo_jax.worlds import sentiment

BETA = 0.3
DPO = partial(losses.dpo, beta=BETA)
BCO = partial(losses.bco, beta=BETA)
BETA_DPO = partial(losses.beta_dpo, beta=BETA, alpha=0.6, rho=0.7)
HALFWAY = partial(soft_update, alpha=0.6, every=2)
HARD = partial(soft_update, alpha=1.0, every=2)


def walked(
    engine: Engine, batches: Sequence[Batch], state: TrainState | None = None
) -> tuple[list[TrainState], list[dict[str, float]]]:
    """The states before the first step and after every one, and the metrics of every one."""
    states, values = [started(engine.algorithm) if state is None else state], []
    for batch in batches:
        after, metrics = engine(batch, states[-1])
        states.append(after)
        values.append(metrics)
    return states, values


# Running means


def judged(step: int) -> list[Group]:
    """Judgements whose weights differ from step to step."""
    return [replace(g, weight=g.weight * (1 + step)) for g in lone(11, seed=step)]


STEPS = {"bco": [judged(s) for s in range(3)], "beta_dpo": [groups(11, seed=s) for s in range(3)]}


@pytest.fixture(scope="module")
def remembering() -> dict[str, Engine]:
    """A compiled step of every loss with a running mean."""
    return {
        "bco": Engine(preference(MODEL, loss=BCO)),
        "beta_dpo": Engine(preference(MODEL, loss=BETA_DPO)),
    }


def test_bco_keeps_the_mean_of_all_rewards_so_far(remembering):
    states, values = walked(remembering["bco"], list(map(packed, STEPS["bco"])))
    assert float(states[0].memory["delta"]) == 0
    rewards = weights = 0.0
    for before, after, metrics, items in zip(
        states, states[1:], values, STEPS["bco"], strict=False
    ):
        reward = {g.record: BETA * log_ratio(g, policy=before.params) for g in items}
        rewards += sum(g.weight * reward[g.record] for g in items)
        weights += sum(g.weight for g in items)
        delta = rewards / weights
        assert float(after.memory["delta"]) == pytest.approx(delta, rel=1e-5)
        assert metrics["delta"] == pytest.approx(delta, rel=1e-5)
        sign = {g.record: 1 if g.label else -1 for g in items}
        z = {b: sign[b] * (reward[b] - delta) for b in reward}
        by_hand = mean(items, lambda g, z=z: np.log1p(np.exp(-z[g.record])))
        assert metrics["loss"] == pytest.approx(by_hand, rel=1e-5)
    assert len({round(m["delta"], 3) for m in values}) == 3


def test_beta_dpo_keeps_a_moving_average_of_margins(remembering):
    """And takes beta and the choice of pairs from it: ceil(.7 * 11) = 8 are kept."""
    states, values = walked(remembering["beta_dpo"], list(map(packed, STEPS["beta_dpo"])))
    delta = 0.0
    for before, after, metrics, items in zip(
        states, states[1:], values, STEPS["beta_dpo"], strict=False
    ):
        policy = before.params
        M = {
            g.record: BETA * (log_ratio(g, policy=policy) - log_ratio(g, 1, policy)) for g in items
        }
        delta = 0.9 * delta + 0.1 * mean(items, lambda g, M=M: M[g.record])
        assert float(after.memory["delta"]) == pytest.approx(delta, rel=1e-5)
        assert metrics["delta"] == pytest.approx(delta, rel=1e-5)
        scale = 1 + 0.6 * (np.mean([*M.values()]) - delta)
        kept = sorted(M, key=lambda b, M=M, delta=delta: abs(M[b] - delta))[:8]
        value = {b: np.log1p(np.exp(-scale * M[b])) if b in kept else 0.0 for b in M}
        by_hand = mean(items, lambda g, value=value: value[g.record])
        assert metrics["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_only_losses_that_compare_groups_are_coupled(remembering):
    assert remembering["beta_dpo"].algorithm.coupled
    assert not remembering["bco"].algorithm.coupled
    assert not preference(MODEL, loss=partial(losses.kto, beta=BETA)).coupled


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_is_not_finite_leaves_no_trace_in_the_memory(remembering, name):
    engine, batches = remembering[name], list(map(packed, STEPS[name]))
    state, _ = engine(batches[0])
    broken = jax.tree.map(lambda x: x * np.nan, REFERENCE)
    after, metrics = engine(batches[1], state, reference=broken)
    assert metrics["skipped"] == 1
    assert jax.device_get(after.memory) == jax.device_get(state.memory)
    one, other = (engine(batches[2], each)[0] for each in (state, after))
    assert jax.device_get(one.memory) == jax.device_get(other.memory)
    assert relative_error(one.params, other.params) == 0
    assert np.isfinite(float(one.memory["delta"])) and float(one.memory["delta"]) != 0


def test_means_of_a_float64_run_are_float64():
    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda x: jnp.asarray(x, float), p) for p in (POLICY, REFERENCE)]
        algorithm = preference(MODEL, loss=BCO)
        engine, batch = Engine(algorithm), packed(STEPS["bco"][0])
        state, _ = engine(batch, started(algorithm, wide[0]), reference=wide[1])
        assert {name: x.dtype for name, x in state.memory.items()} == {
            "delta": np.float64,
            "delta_weight": np.float64,
        }
        expected = mean(STEPS["bco"][0], lambda g: BETA * log_ratio(g))
        assert float(state.memory["delta"]) == pytest.approx(expected, rel=1e-7)


# References that move


@pytest.fixture(scope="module")
def halfway() -> Engine:
    return Engine(preference(MODEL, loss=DPO, reference=HALFWAY))


PAIRS = [groups(11, seed=step) for step in range(5)]


def test_the_reference_moves_after_every_second_step(halfway):
    states, values = walked(halfway, list(map(packed, PAIRS)))
    assert halfway.algorithm.frozen == ()
    assert relative_error(states[0].memory["reference"], POLICY) == 0
    expected = jax.device_get(POLICY)
    for step, (before, after) in enumerate(pairwise(states)):
        if step in (2, 4):
            policy = jax.device_get(before.params)
            expected = {name: 0.6 * policy[name] + 0.4 * expected[name] for name in policy}
            assert relative_error(after.memory["reference"], before.memory["reference"]) > 1e-3
        else:
            assert relative_error(after.memory["reference"], before.memory["reference"]) == 0
        assert relative_error(after.memory["reference"], expected) < 1e-6

        def loss(group: Group, models=(before.params, expected)) -> float:
            D = log_ratio(group, 0, *models) - log_ratio(group, 1, *models)
            return float(np.log1p(np.exp(-BETA * D)))

        assert values[step]["loss"] == pytest.approx(mean(PAIRS[step], loss), rel=1e-5)
    assert abs(values[3]["rewards/margins"]) > 1e-4


@pytest.mark.parametrize("loss", [DPO, partial(losses.tdpo, beta=BETA)])
def test_after_a_hard_update_the_policy_is_the_reference(loss):
    """Also where both run side by side for their exact KL."""
    engine = Engine(preference(MODEL, loss=loss, reference=HARD))
    states, values = walked(engine, list(map(packed, PAIRS[:4])))
    assert relative_error(states[3].memory["reference"], states[2].params) == 0
    for step in (0, 2):
        assert values[step]["rewards/margins"] == pytest.approx(0, abs=1e-6)
        assert values[step]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    for step in (1, 3):
        assert abs(values[step]["rewards/margins"]) > 1e-4


def test_a_moving_reference_lies_where_the_policy_does(halfway):
    """On a mesh and in microbatches it is the same reference."""
    batches = list(map(packed, PAIRS[:3]))
    alone, _ = walked(halfway, batches)
    mesh = parallel.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        state = started(halfway.algorithm)
        places = parallel.shardings(mesh, state)
        assert places.memory["reference"] == places.params
        assert places.memory["reference"]["head_DV"].spec[0] == "fsdp"
        spread = [parallel.shard_batch(mesh, batch) for batch in batches]
        engine = Engine(halfway.algorithm, microbatches=2)
        states, _ = walked(engine, spread, jax.device_put(state, places))
    assert relative_error(states[-1].memory, alone[-1].memory) < 1e-5
    assert relative_error(states[-1].params, alone[-1].params) < 1e-5


def test_a_moving_reference_that_no_loss_reads_is_refused():
    with pytest.raises(BadInput, match=r"reference=soft_update has no effect: loss cpo"):
        preference(MODEL, loss=partial(losses.cpo, beta=BETA), reference=HALFWAY)


# Killed and resumed is never killed


def texts() -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    words = [word for word in sentiment.VOCABULARY if word.isalpha()]

    def text() -> str:
        return " ".join(rng.choice(words, size=rng.integers(2, 6)))

    return [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(24)]


def judgements() -> list[dict[str, str | bool]]:
    return [
        {"prompt": each["prompt"], "completion": each["chosen"], "label": b % 3 > 0}
        for b, each in enumerate(texts())
    ]


def experiment(algorithm: partial, source=texts) -> Experiment:
    return Experiment(
        name="resumed",
        model=Config(V=len(sentiment.VOCABULARY), D=8, L=1, H=2, J=1, E=4, F=8),
        data=Data(source=source, tokenizer=sentiment.tokenizer, groups=24, row_tokens=64),
        algorithm=algorithm,
        optim=Optim(learning_rate=0.02),
        run=Run(steps=5, save_every=1, keep=9),
    )


RUNS = {
    "bco": experiment(partial(preference, loss=BCO), judgements),
    "moving reference": experiment(partial(preference, loss=DPO, reference=HALFWAY)),
}


def last_state(run: Experiment, directory: str) -> TrainState:
    mesh = parts.mesh(run)
    setup = build.setup(run, mesh, build.materials(run, dpo_jax.run))
    like = parallel.abstract(mesh, Member(run, setup, directory).start())
    state, step = Checkpoints(f"{directory}/checkpoints").restore(like)
    assert step == 5
    return jax.device_get(state)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_remembers(tmp_path, capsys, name):
    """As if killed in step 4, when the checkpoint of step 3 was sealed."""
    run = RUNS[name]
    with chdir(tmp_path):
        dpo_jax.run(run, directory="unbroken")
        shutil.copytree("unbroken", "broken")
        Path("broken/result.json").unlink()
        for gone in ("weights", "checkpoints/4", "checkpoints/5"):
            shutil.rmtree(f"broken/{gone}")
        dpo_jax.run(run, directory="broken")
        assert "broken: resumed at step 3" in capsys.readouterr().err
        assert timeless("broken") == timeless("unbroken")
        one, other = (last_state(run, home) for home in ("broken", "unbroken"))
    assert relative_error(one.memory, other.memory) == 0
    assert relative_error((one.params, one.opt_state), (other.params, other.opt_state)) == 0
    remembered = one.memory.get("delta", one.memory.get("reference"))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(remembered)) > 1e-4
