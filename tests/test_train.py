"""The step: microbatches, meshes, ln 2 at the start, updates that are skipped."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec
from tiny import groups, relative_error

from dpo_jax import losses, optim, parallel
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.sft import sft
from dpo_jax.data.packing import pack
from dpo_jax.logprobs import response_logps
from dpo_jax.models.transformer import decoder
from dpo_jax.structs import BadInput, TrainState
from dpo_jax.train import make_update, split

CONFIG = replace(tiny.CONFIG, L=2)
MODEL = decoder(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
OTHER = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), PARAMS)
DPO = partial(preference, loss=partial(losses.dpo, beta=0.1))
ALGORITHMS = {
    "dpo": DPO,
    "nll": partial(preference, loss=partial(losses.nll, per="token")),
    "sft": sft,
    "sft by sequence": partial(sft, measure=losses.measure.sequence_mean),
}


def batches(steps: int, rows: int = 8):
    return [
        pack(groups(11, seed=step), row_tokens=48, rows=rows, scored=48) for step in range(steps)
    ]


def start(algorithm, tx) -> TrainState:
    params, memory = algorithm.init(jax.random.key(1), OTHER, {})
    return TrainState(jnp.int32(0), params, tx.init(params), memory, jnp.int32(0))


def trained(algorithm, *, microbatches: int = 1, mesh=None, steps: int = 3):
    """Parameters and metrics after some steps of AdamW."""
    # eps above the float32 noise of gradients near 0, which Adam would make full steps of
    tx = optim.adamw(1e-2, eps=1e-6, weight_decay=0.1)
    update = jax.jit(make_update(algorithm, tx, microbatches=microbatches))
    state, frozen = start(algorithm, tx), {"reference": PARAMS}
    values = []
    for batch in batches(steps):
        if mesh is not None:
            state, frozen = (
                jax.device_put(x, parallel.shardings(mesh, x)) for x in (state, frozen)
            )
            batch = parallel.shard_batch(mesh, batch)
        state, metrics = update(state, frozen, batch, jax.random.key(0))
        values.append(metrics)
    return jax.device_get(state.params), jax.device_get(values)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_microbatches_change_nothing(name):
    algorithm = ALGORITHMS[name](MODEL)
    whole = trained(algorithm)
    for microbatches in (2, 4):
        assert relative_error(trained(algorithm, microbatches=microbatches), whole) < 1e-5


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_meshes_change_nothing(shape):
    algorithm = DPO(MODEL)
    alone = trained(algorithm)
    mesh = parallel.make_mesh(*shape)
    with jax.set_mesh(mesh):
        spread = trained(algorithm, mesh=mesh)
    assert relative_error(spread, alone) < 1e-5


def test_microbatches_on_a_mesh_change_nothing():
    algorithm = ALGORITHMS["nll"](MODEL)
    mesh = parallel.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        spread = trained(algorithm, mesh=mesh, microbatches=2)
    assert relative_error(spread, trained(algorithm)) < 1e-5


def test_policy_equal_to_reference_gives_ln_2_and_no_margin():
    algorithm = DPO(MODEL)
    frozen = {"reference": PARAMS}
    batch, _ = algorithm.collect(start(algorithm, optax.sgd(0.1)), frozen, batches(1)[0], None)
    loss, metrics = algorithm.objective(PARAMS, frozen, {}, algorithm.measure(batch), None)
    assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
    assert float(metrics["rewards/margins"]) == 0
    assert float(metrics["rewards/accuracies"]) == 0
    assert float(metrics["rewards/ties"]) == pytest.approx(1, abs=1e-6)


def test_metrics_are_weighted_means_over_the_groups():
    batch = batches(1)[0]
    algorithm = DPO(MODEL)
    frozen = {"reference": PARAMS}
    whole, _ = algorithm.collect(start(algorithm, optax.sgd(0.1)), frozen, batch, None)
    _, metrics = algorithm.objective(OTHER, frozen, {}, algorithm.measure(whole), None)
    margin_RGK = response_logps(MODEL, OTHER, batch) - response_logps(MODEL, PARAMS, batch)
    weight_RG = batch.weight_RG / batch.weight_RG.sum()
    for name, k in (("chosen", 0), ("rejected", 1)):
        expected = 0.1 * (weight_RG * margin_RGK[:, :, k]).sum()
        assert float(metrics[f"rewards/{name}"]) == pytest.approx(float(expected), rel=1e-4)
    wins_RG = np.asarray(margin_RGK[:, :, 0] > margin_RGK[:, :, 1])
    assert float(metrics["rewards/accuracies"]) == pytest.approx(
        (weight_RG * wins_RG).sum(), abs=1e-6
    )


def test_split_deals_rows_and_copies_shared_scalars():
    batch = replace(batches(1)[0], shared={"kl": jnp.float32(3.0)})
    parts = split(batch, 4)
    assert parts.tokens_RT.shape == (4, 2, 48)
    np.testing.assert_array_equal(parts.tokens_RT[1], batch.tokens_RT[[1, 5]])
    np.testing.assert_array_equal(parts.shared["kl"], [3.0] * 4)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    algorithm, tx = sft(MODEL), optim.adamw(1e-2)
    update = jax.jit(make_update(algorithm, tx))
    good = batches(1)[0]
    bad = replace(good, weight_RN=np.full_like(good.weight_RN, np.nan))
    state, _ = update(start(algorithm, tx), {}, good, None)
    after, metrics = update(state, {}, bad, None)
    assert int(metrics["skipped"]) == 1 and int(after.step) == 2
    assert relative_error((after.params, after.opt_state), (state.params, state.opt_state)) == 0
    again, metrics = update(after, {}, good, None)
    assert int(metrics["skipped"]) == 0
    assert relative_error(again.params, state.params) > 0


def test_three_responses_and_a_pair_loss_are_refused():
    algorithm = DPO(MODEL)
    with pytest.raises(BadInput, match=r"loss dpo compares 2 responses, the data has 3"):
        algorithm.prepare(groups(2, responses=3))


def test_the_reference_gets_no_gradient_and_stays():
    """A step moves the policy and leaves the frozen weights bit for bit."""
    algorithm, tx = DPO(MODEL), optim.adamw(1e-2)
    before = jax.device_get(PARAMS)
    state, _ = make_update(algorithm, tx)(
        start(algorithm, tx), {"reference": PARAMS}, batches(1)[0], None
    )
    assert relative_error(jax.device_get(PARAMS), before) == 0
    assert relative_error(state.params, OTHER) > 1e-3


def test_parameters_and_moments_lie_where_their_letters_say():
    mesh = parallel.make_mesh(2, 2, 2)
    tx = optim.adamw(1e-2)
    state = start(sft(MODEL), tx)
    places = parallel.shardings(mesh, state)
    spec = places.params["layers"]["q_DHE"].spec
    assert spec == PartitionSpec(None, "fsdp", "tensor", None)
    # 17 tokens do not divide over 2 devices
    assert places.params["embed_VD"].spec == PartitionSpec(None, "fsdp")
    assert places.opt_state[0].mu["layers"]["q_DHE"].spec == spec
    assert CONFIG.V % 2 == 1


def test_meshes_that_do_not_fit_are_refused():
    assert parallel.make_mesh(-1, 2, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    for sizes in ((3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1)):
        with pytest.raises(BadInput, match=r"run.mesh"):
            parallel.make_mesh(*sizes)
