"""Adapters as a function: what they compute, how they start, how they are merged."""

from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import relative_error
from tiny_runs import EXPERIMENT, SFT

from dpo_jax import losses, train
from dpo_jax.algorithms.preference import preference
from dpo_jax.data.packing import pack
from dpo_jax.experiment import Lora, describe, digest, options, override
from dpo_jax.logprobs import response_logps, token_logps
from dpo_jax.models.lora import WEIGHTS, alike, factors, merged
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.optim import matrices
from dpo_jax.parallel import make_mesh, shard_batch, shardings
from dpo_jax.structs import BadInput, TrainState, join, parted

GATED = replace(tiny.CONFIG, L=5)
PLAIN = replace(
    tiny.CONFIG,
    **dict.fromkeys(("parallel", "qkv_bias", "o_bias", "mlp_bias"), True),
    gated=False,
    L=2,
)
BATCH = pack(tiny.groups(6), row_tokens=24)
LORA = Lora(rank=3, alpha=7.0)


def drawn(config: Config, lora: Lora, key: int = 0):
    """{"base", "lora"} with factors of B that are not zero."""
    whole = decoder(config, lora=lora).init(jax.random.key(key))
    leaves, tree = jax.tree.flatten(whole["lora"])
    keys = jax.random.split(jax.random.key(key + 1), len(leaves))
    new = [jax.random.normal(k, x.shape) * 0.3 for k, x in zip(keys, leaves, strict=True)]
    return {"base": whole["base"], "lora": tree.unflatten(new)}


def explicit(whole, lora: Lora):
    """W + (alpha / rank) A B by reshaping into matrices, layer by layer."""
    layers = dict(whole["base"]["layers"])
    for weight in WEIGHTS.values():
        each = factors(weight)
        if each.a in whole["lora"]["layers"]:
            a, b = (whole["lora"]["layers"][name] for name in (each.a, each.b))
            product = jnp.stack(
                [
                    x.reshape(-1, lora.rank) @ y.reshape(lora.rank, -1)
                    for x, y in zip(a, b, strict=True)
                ]
            )
            layers[weight] += lora.alpha / lora.rank * product.reshape(layers[weight].shape)
    return {**whole["base"], "layers": layers}


@pytest.mark.parametrize("config", [GATED, PLAIN], ids=["gated", "plain"])
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("targets", [None, ("q", "o", "down")], ids=["all", "some"])
def test_value_and_gradient_are_those_of_the_whole_matrices(config, remat, targets):
    lora = Lora(3, 7.0, targets)
    whole, weight_RN = (
        drawn(config, lora),
        np.random.default_rng(0).normal(size=BATCH.slot_RN.shape),
    )

    def value(model, make, own):
        logp_RN = token_logps(model, make({"base": whole["base"], "lora": own}), BATCH)
        return jnp.sum(logp_RN * weight_RN)

    found = jax.jit(
        jax.value_and_grad(partial(value, decoder(config, remat=remat, lora=lora), lambda x: x))
    )(whole["lora"])
    wanted = jax.jit(
        jax.value_and_grad(partial(value, decoder(config), partial(explicit, lora=lora)))
    )(whole["lora"])
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    assert relative_error(found[1], wanted[1]) < 2e-5  # sums of float32 in another order
    base = token_logps(decoder(config), whole["base"], BATCH)
    assert np.abs(np.sum(base * weight_RN) - wanted[0]) > 1e-2


@pytest.mark.parametrize("config", [GATED, PLAIN], ids=["gated", "plain"])
def test_merged_weights_give_the_same_logits(config):
    whole, head_D = drawn(config, LORA), np.ones(config.D, np.float32)
    plain = merged({**whole, "reward_D": head_D}, LORA)
    assert plain.pop("reward_D") is head_D
    assert jax.tree.structure(plain) == jax.tree.structure(whole["base"])
    one, other = (
        response_logps(model, params, BATCH)
        for model, params in ((decoder(config), plain), (decoder(config, lora=LORA), whole))
    )
    np.testing.assert_allclose(one, other, atol=1e-5)
    half = merged(jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole), LORA)
    assert half["layers"]["q_DHE"].dtype == jnp.bfloat16


def test_new_adapters_change_nothing():
    """Bit for bit, and the base is the one that the key draws without them."""
    key, model = jax.random.key(0), decoder(GATED, lora=LORA)
    whole, plain = model.init(key), decoder(GATED).init(key)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole["base"], plain))
    expected = response_logps(decoder(GATED), plain, BATCH)
    np.testing.assert_array_equal(response_logps(model, whole, BATCH), expected)
    np.testing.assert_array_equal(response_logps(model, {"base": plain}, BATCH), expected)


def test_adapters_start_as_those_of_peft():
    """A uniform within the root of 1 / (fan in), every layer another; B zero."""
    whole = decoder(GATED, lora=Lora(rank=8)).init(jax.random.key(0))
    layers = whole["lora"]["layers"]
    for name, fan_in in (("q_a_DZ", 16), ("o_a_HEZ", 16), ("down_a_FZ", 24)):
        a, bound = np.asarray(layers[name]), fan_in**-0.5
        assert a.shape[0] == GATED.L and a.shape[-1] == 8
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert abs(a.std() - bound / 3**0.5) < 0.05 * bound
        assert not np.allclose(a[0], a[1])
    assert not any(np.any(x) for name, x in layers.items() if "_b_" in name)
    assert not np.array_equal(layers["q_a_DZ"], layers["k_a_DZ"])


def test_weight_decay_pulls_on_both_factors():
    own = drawn(GATED, LORA)["lora"]
    assert jax.tree.all(matrices(own))


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"rank": 0}, "lora.rank=0"),
        ({"rank": 2.5}, "lora.rank=2.5"),
        ({"alpha": 0}, "lora.alpha=0"),
        ({"alpha": float("nan")}, "lora.alpha=nan"),
        ({"targets": ("query",)}, "give some of q, k, v, o, gate, up, down"),
        ({"targets": ()}, "give some of"),
    ],
)
def test_what_no_adapter_can_be_is_refused(wrong, words):
    with pytest.raises(BadInput, match=words.replace("(", r"\(")):
        Lora(**wrong)


def test_a_target_that_the_model_lacks_is_refused_and_left_out_of_all():
    with pytest.raises(BadInput, match="no gate, it has q, k, v, o, up, down"):
        decoder(PLAIN, lora=Lora(targets=("q", "gate")))
    names = decoder(PLAIN, lora=Lora()).init(jax.random.key(0))["lora"]["layers"]
    assert {name.partition("_")[0] for name in names} == {"q", "k", "v", "o", "up", "down"}
    assert alike(Lora(), Lora(targets=("q", "k", "v", "o", "up", "down")), PLAIN)
    assert not alike(Lora(), Lora(targets=("q", "k", "v", "o", "up", "down")), GATED)
    assert not alike(Lora(), Lora(alpha=1.0), PLAIN)


def test_adapters_that_nobody_described_are_refused():
    with pytest.raises(BadInput, match=r"lora=Lora\(\.\.\.\)"):
        response_logps(decoder(GATED), drawn(GATED, LORA), BATCH)


def test_one_device_equals_a_mesh_of_eight():
    """Three steps of DPO from adapters that are not new, with the reference they were."""
    model = decoder(GATED, lora=LORA)
    algorithm = preference(model, loss=partial(losses.dpo, beta=0.3))
    trained, frozen = parted(drawn(GATED, LORA))
    batch = pack(tiny.groups(12), row_tokens=24, rows=8)
    tx = SFT.optim.optimizer(1e-2)
    steps = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(mesh):
            own, below = (jax.device_put(x, shardings(mesh, x)) for x in (trained, frozen))
            below |= {"reference": jax.tree.map(jnp.copy, own)}
            params, memory = algorithm.init(jax.random.key(0), own, below)
            state = TrainState(jnp.int32(0), params, tx.init(params), memory, jnp.int32(0))
            update = jax.jit(train.make_update(algorithm, tx))
            found = []
            for step in range(3):
                rows = shard_batch(mesh, batch)
                state, metrics = update(state, below, rows, jax.random.key(step))
                found.append(metrics["loss"])
            steps.append((found, state.params))
    assert steps[1][1]["lora"]["layers"]["q_b_ZHE"].shape == (5, 3, 4, 4)
    (one, params), (other, spread) = steps
    np.testing.assert_allclose(one[0], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert one[2] < 0.69
    assert relative_error(spread, params) < 1e-4  # Adam divides by small gradients


def test_parted_is_the_inverse_of_join():
    whole = drawn(GATED, LORA)
    assert join(*parted(whole)) == whole
    assert parted(whole["base"]) == (whole["base"], {})


# The option of an experiment


def test_an_experiment_without_lora_is_described_as_before():
    assert "lora" not in describe(EXPERIMENT)
    assert digest(replace(EXPERIMENT, lora=None)) == digest(EXPERIMENT)
    assert digest(replace(EXPERIMENT, lora=LORA)) != digest(EXPERIMENT)


def test_its_options_have_paths():
    adapted = replace(EXPERIMENT, lora=LORA)
    changed = override(adapted, {"lora.rank": "8", "lora.targets": "(q, v)"})
    assert changed.lora == Lora(8, 7.0, ("q", "v"))
    assert dict(options(changed))["lora.rank"] == 8
    assert override(adapted, {"lora": "None"}) == EXPERIMENT
    assert Lora(**asdict(changed.lora)) == changed.lora
    assert override(adapted, {"lora.targets": "(v, q, v)"}).lora == replace(changed.lora, rank=3)
    with pytest.raises(BadInput, match=r"lora\.rank=0"):
        override(adapted, {"lora.rank": "0"})
    with pytest.raises(BadInput, match=r"lora\.rank has no effect: lora is None"):
        override(EXPERIMENT, {"lora.rank": "8"})


def test_a_step_is_traced_without_weights():
    found = train.trace(replace(EXPERIMENT, lora=LORA))
    assert found["loss"].shape == ()
