"""The head: every statistic against the full logits in value and gradient, and what it holds."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, equations, groups, relative_error

from dpo_jax import head, parallel
from dpo_jax.data.packing import pack
from dpo_jax.logprobs import TokenStatistics, naive_token_statistics, token_logps, token_statistics
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import decoder
from dpo_jax.structs import Model

BATCH = pack(groups(9, seed=3), row_tokens=32, rows=4)
R, N = BATCH.target_RN.shape
FIXED = {"aligned_RN", "ref_logp_RN"}  # statistics without a gradient
KINDS = {  # model, tolerance of values, of gradients
    "untied": (replace(CONFIG, tied=False), "float32", 3e-6, 3e-6),
    "tied": (CONFIG, "float32", 3e-6, 3e-6),
    "capped": (replace(CONFIG, logit_cap=2.0, norm="layer"), "float32", 3e-6, 3e-6),
    "bfloat16": (CONFIG, "bfloat16", 5e-3, 2e-2),  # products of logits are rounded to 3 digits
    "float64": (CONFIG, "float64", 1e-13, 1e-12),
}


def chunks_of(monkeypatch, tokens: int, vocabulary: int, rows: int = R):
    """Let the head hold `tokens` columns of scored tokens of two models at a time."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 2 * tokens * rows * vocabulary)


def weights(model: Model, seed: int):
    """Weights whose distributions are far from even and from each other."""
    return jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(jax.random.key(seed), x.shape, x.dtype),
        model.init(jax.random.key(0)),
    )


def bent(found: TokenStatistics) -> jax.Array:
    """A sum of all that is there, under random weights: their gradient is its cotangent."""
    terms = jax.tree.leaves(found)
    keys = jax.random.split(jax.random.key(7), len(terms))
    drawn = (jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, terms, strict=True))
    return sum((jnp.sum(x * w) for x, w in zip(terms, drawn, strict=True)), jnp.zeros(()))


def both(model: Model, params, reference, batch=BATCH, **options):
    """(values, gradient under random cotangents), chunked and naive."""
    everything = {"policy_kl": True, "entropy": True, "aligned": True}

    def pulled(f, **options):
        def total(params):
            found = f(model, params, batch, reference=reference, **options)
            return bent(found), found

        gradient, found = jax.jit(jax.grad(total, has_aux=True))(params)
        return found, gradient

    return pulled(token_statistics, **everything, **options), pulled(
        naive_token_statistics, **options
    )


@pytest.mark.parametrize("kind, tokens", [*((kind, 3) for kind in KINDS), ("untied", 1000)])
def test_all_statistics_equal_those_of_the_full_logits(monkeypatch, kind, tokens):
    config, dtype, near, slope = KINDS[kind]
    chunks_of(monkeypatch, tokens, config.V)
    with jax.enable_x64(dtype == "float64"):
        model = decoder(config, dtype=dtype)
        params, reference = weights(model, 1), weights(model, 2)
        readout_D = jax.random.normal(jax.random.key(4), (config.D,))
        options = {"temperature": 0.7, "readout_D": readout_D}
        (found, gradient), (expected, naive) = both(model, params, reference, **options)
        for name, x_RN in found._asdict().items():
            assert x_RN is not None and x_RN.dtype == jnp.promote_types(dtype, jnp.float32)
            np.testing.assert_allclose(x_RN, getattr(expected, name), atol=near, rtol=near)
        assert relative_error(gradient, naive) < slope
        assert float(jnp.max(expected.kl_RN)) > 0.1
    assert (np.asarray(found.logp_RN)[BATCH.slot_RN < 0] == 0).all()


@pytest.mark.parametrize("name", [n for n in TokenStatistics._fields if n not in FIXED])
def test_each_statistic_alone_has_its_own_gradient(monkeypatch, name):
    chunks_of(monkeypatch, 4, CONFIG.V)
    model = decoder(CONFIG)
    params, reference = weights(model, 1), weights(model, 2)
    extra = {"reference": reference, "readout_D": jnp.arange(CONFIG.D, dtype=float)}
    slope_RN = jax.random.normal(jax.random.key(3), (R, N))

    def total(f, params):
        return jnp.sum(slope_RN * getattr(f(model, params, BATCH, **extra), name))

    mine = partial(token_statistics, policy_kl=True, entropy=True)
    gradient, naive = (
        jax.jit(jax.grad(partial(total, f)))(params) for f in (mine, naive_token_statistics)
    )
    assert relative_error(gradient, naive) < 3e-6


def test_no_gradient_reaches_the_reference_or_the_log_of_squares():
    model = decoder(CONFIG)
    params, reference = weights(model, 1), weights(model, 2)

    def total(params, reference):
        found = token_statistics(model, params, BATCH, reference=reference, aligned=True)
        ours, fixed = (found.kl_RN, found.ref_logp_RN), found.aligned_RN
        return sum(jnp.sum(jnp.asarray(x)) for x in ours), jnp.sum(jnp.asarray(fixed))

    for gradient in (
        jax.grad(lambda other: total(params, other)[0])(reference),
        jax.grad(lambda own: total(own, reference)[1])(params),
    ):
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


# Where it is called


@pytest.mark.parametrize("way", ["scan and remat", "vmap", "map"])
def test_it_works_inside(monkeypatch, way):
    chunks_of(monkeypatch, 4, CONFIG.V)
    model = decoder(CONFIG)
    params_M = jax.tree.map(lambda *x: jnp.stack(x), *(weights(model, seed) for seed in (1, 2)))
    temperature_M = jnp.array([0.7, 1.3])

    def total(f, params, temperature):
        return jnp.sum(jnp.sin(f(model, params, BATCH, temperature=temperature).logp_RN))

    def gradients(f):
        one = jax.grad(partial(total, f))
        if way == "vmap":
            return jax.jit(jax.vmap(one))(params_M, temperature_M)
        if way == "map":
            return jax.jit(lambda *both: jax.lax.map(lambda x: one(*x), both))(
                params_M, temperature_M
            )
        again = jax.checkpoint(partial(total, f))

        def summed(params):
            step = lambda so_far, temperature: (so_far + again(params, temperature), None)  # noqa: E731
            return jax.lax.scan(step, 0.0, temperature_M)[0]

        return jax.jit(jax.grad(summed))(jax.tree.map(lambda x: x[0], params_M))

    assert relative_error(gradients(token_statistics), gradients(naive_token_statistics)) < 1e-5


def odd(params, hidden):
    """A head of another make: a bias, a ban, and logits through a function of its own."""
    logits = jnp.tanh(hidden @ params["head"]["w"]) * 3 + jnp.broadcast_to(
        params["head"]["b"], (*hidden.shape[:-1], CONFIG.V)
    )
    banned = jnp.arange(CONFIG.V) == 0
    return jnp.where(jnp.broadcast_to(banned, logits.shape), -jnp.inf, logits)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_any_unembedding_will_do(monkeypatch, wrap):
    """One with a bias of 200, too, which overflows where a token is not a real one."""
    chunks_of(monkeypatch, 5, CONFIG.V)
    body = decoder(CONFIG)

    def drawn(seed):
        w_DV = jax.random.normal(jax.random.key(seed), (CONFIG.D, CONFIG.V))
        own = {"w": w_DV, "b": 200 + w_DV[0], "unread": jnp.ones(3)}
        return {"body": weights(body, seed), "head": own}

    model = Model(
        init=lambda key: drawn(0),
        hidden=lambda params, *rest: body.hidden(params["body"], *rest),
        unembed=wrap(odd),
    )
    params, reference = drawn(1), drawn(2)
    (found, gradient), _ = both(model, params, reference)
    # the same with a finite ban: the naive form cannot do with infinite logits
    finite = model._replace(unembed=lambda p, h: jnp.maximum(odd(p, h), 100.0))
    expected, naive = both(finite, params, reference)[1]
    for name, x_RN in found._asdict().items():
        if x_RN is not None:
            np.testing.assert_allclose(x_RN, getattr(expected, name), atol=2e-4)
    assert relative_error(gradient["head"], naive["head"]) < 1e-4
    assert (np.asarray(gradient["head"]["unread"]) == 0).all()


# What it costs


def compiled(model: Model, batch, *, reference: bool = False, **options):
    """The program of a gradient: (params, reference) -> gradient of a bent sum of everything."""

    def total(params, other):
        found = token_statistics(model, params, batch, reference=other, **options)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(found))

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.jit(jax.grad(total)).lower(shapes, shapes if reference else None).compile()


def temporaries(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("everything", [False, True])
def test_temporaries_do_not_grow_with_the_vocabulary(monkeypatch, everything):
    """Eight times the vocabulary: besides the walk's sum of the gradient of the table, which has
    the size of the table, and its next term, less than the logits of one chunk more."""
    many = pack(groups(64, seed=5), row_tokens=192, rows=4)
    options = {"policy_kl": True, "entropy": True, "aligned": True} if everything else {}
    at_once = 2**14
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", at_once)
    found = {}
    for V in (512, 4096):
        model = decoder(replace(CONFIG, V=V, tied=False))
        found[V] = temporaries(compiled(model, many, reference=everything, **options))
    more = 4096 - 512
    allowed = 2 * 4 * CONFIG.D * more + 4 * at_once
    assert found[4096] - found[512] < allowed < 4 * many.target_RN.size * more / 8


def test_frozen_weights_cost_nothing_in_the_backward_pass():
    """With adapters: logits, logits once more, and the product that goes on to the body."""
    config = replace(CONFIG, V=67, tied=False)
    adapted = decoder(config, lora=Lora(rank=2))
    whole = jax.eval_shape(adapted.init, jax.random.key(0))

    def total(params, base, model):
        params = {"base": base, "lora": params} if base else params
        return jnp.sum(jnp.sin(token_logps(model, params, BATCH)))

    def products(params, base, model) -> int:
        jaxpr = jax.make_jaxpr(jax.grad(partial(total, model=model)))(params, base).jaxpr
        dots = [x for x in equations(jaxpr) if x.primitive.name == "dot_general"]
        kinds = [[v.aval.shape for v in (*dot.invars, *dot.outvars)] for dot in dots]
        return sum(any(config.V in shape for shape in shapes) for shapes in kinds)

    assert products(whole["lora"], whole["base"], adapted) == 3
    assert products(whole["base"], None, decoder(config)) == 4


# Meshes


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_meshes_change_nothing(monkeypatch, shape):
    config = replace(CONFIG, V=24)
    many = pack(groups(16, seed=3), row_tokens=32, rows=8)
    chunks_of(monkeypatch, 4, config.V, rows=1)
    model = decoder(config)
    params, reference = weights(model, 1), weights(model, 2)
    expected = both(model, params, reference, many)[1]
    data, fsdp, tensor = shape
    mesh = parallel.make_mesh(data, fsdp, tensor)
    with jax.set_mesh(mesh):
        own, other = (jax.device_put(x, parallel.shardings(mesh, x)) for x in (params, reference))
        found = both(model, own, other, parallel.shard_batch(mesh, many))[0]
    assert relative_error(found, expected) < 1e-5


def test_on_a_mesh_logits_are_parted_and_gradients_summed_once(monkeypatch):
    """By the compiled program: no array has a whole chunk's logits, or all tokens' hidden states,
    and the gradient of the table is summed over devices outside of the walk."""
    config = replace(CONFIG, V=96, tied=False)
    many = pack(groups(16, seed=3), row_tokens=32, rows=8)
    chunks_of(monkeypatch, 2, config.V, rows=1)
    mesh = parallel.make_mesh(2, 2, 2)
    model = decoder(config)
    with jax.set_mesh(mesh):
        params = weights(model, 1)
        params = jax.device_put(params, parallel.shardings(mesh, params))
        batch = parallel.shard_batch(mesh, many)

        def total(params, batch):
            return jnp.sum(jnp.sin(token_logps(model, params, batch)))

        text = jax.jit(jax.grad(total)).lower(params, batch).compile().as_text() or ""
    whole = {int(tokens) for tokens in re.findall(r"f32\[(\d+),96\]", text)} - {config.D}
    assert not whole, f"logits of {whole} tokens over the whole vocabulary"
    assert re.search(r"f32\[8,48\]", text)  # four tokens of two rows, half of the vocabulary
    sums = [line for line in text.splitlines() if re.search(r" = .* all-reduce\(", line)]
    tables = [line for line in sums if f"f32[{config.D},48]" in line.split("all-reduce(")[0]]
    walk = [line for line in sums if "shard_map/while/body" in line]
    assert tables and walk  # the walk sums totals over the vocabulary, and what flows back
    assert not set(tables) & set(walk)
