"""The decoder: the attention rule proven by gradients, the cache, remat, dtypes, names."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import groups, relative_error

from dpo_jax.data.packing import pack
from dpo_jax.experiment import describe, options
from dpo_jax.models import transformer
from dpo_jax.models.attention import attention, visible
from dpo_jax.models.transformer import Config, decoder, rms_norm, rotary, rotate
from dpo_jax.parallel import letters
from dpo_jax.structs import BadInput

CONFIG = replace(tiny.CONFIG, L=2)  # what one layer mixes the next one reads
MODEL = decoder(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))


def seen_by_gradient(batch, **options) -> np.ndarray:
    """Which place influences which: the gradient of hidden state t through the embedding of s."""
    R, T = batch.tokens_RT.shape
    model = decoder(replace(CONFIG, V=R * T, **options))

    def hidden(table_VD):
        # every place gets a token of its own, so that the gradient of the table is one of places
        ids = jnp.arange(R * T, dtype=jnp.int32).reshape(R, T)
        params = PARAMS | {"embed_VD": table_VD}
        return model.hidden(params, ids, batch.positions_RT, batch.until_RT)[0].sum(axis=-1)

    table_VD = jax.random.normal(jax.random.key(1), (R * T, CONFIG.D))
    _, pull = jax.vjp(hidden, table_VD)
    basis = jnp.eye(R * T).reshape(R * T, R, T)
    jacobian = jax.lax.map(lambda cotangent: pull(cotangent)[0], basis)  # (R*T, R*T, D)
    return np.abs(np.asarray(jacobian)).sum(axis=-1).reshape(R, T, R, T) > 0


def test_no_response_sees_its_sibling_and_no_group_another():
    batch = pack([([1, 2], [[3, 4, 5], [6, 7]]), ([8], [[9], [10, 11]])], row_tokens=13, rows=1)
    influence_TS = seen_by_gradient(batch)[0, :, 0, :]
    #        places: a a x x x y y  b z u u  padding
    owner = np.array([0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 5, 6, 7])
    prompt = {0: {0}, 1: {0, 1}, 2: {0, 2}, 3: {3}, 4: {3, 4}, 5: {3, 5}, 6: {6}, 7: {7}}
    allowed = np.array(
        [[owner[s] in prompt[owner[t]] and s <= t for s in range(13)] for t in range(13)]
    )
    np.testing.assert_array_equal(influence_TS, allowed)


def test_rows_do_not_see_each_other():
    influence = seen_by_gradient(pack(groups(5, seed=3), row_tokens=24))
    rows = influence.shape[0]
    for r in range(rows):
        others = [s for s in range(rows) if s != r]
        assert not influence[r][:, others].any()


def test_visible_is_the_rule_written_out():
    until_RS = np.array([[4, 2, 4, 4, 5], [1, 2, 3, 4, 5]])
    expected = [
        [[s <= t < until_RS[r, s] for s in range(5)] for t in range(2, 5)] for r in range(2)
    ]
    np.testing.assert_array_equal(visible(jnp.asarray(until_RS), 3, offset=2), expected)


@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"softcap": 0.7, "scale": 0.2}, {"window": 1, "softcap": 2.0}]
)
def test_attention_against_a_loop_over_queries_and_heads(options):
    rng = np.random.default_rng(0)
    R, T, H, J, E = 2, 6, 4, 2, 8
    q, k, v = (jnp.asarray(rng.normal(size=(R, T, x, E)), jnp.float32) for x in (H, J, J))
    until_RS = np.maximum(rng.integers(1, T + 1, (R, T)), np.arange(1, T + 1)[None, :])
    positions_RT = rng.integers(0, 3, (R, T)) + np.arange(T)[None, :] // 2
    both = (jnp.asarray(positions_RT), jnp.asarray(positions_RT))
    out = attention(q, k, v, jnp.asarray(until_RS), positions=both, **options)
    scale, cap = options.get("scale", E**-0.5), options.get("softcap", 1e6)
    for r, t, h in np.ndindex(R, T, H):
        near = positions_RT[r, t] - positions_RT[r] < options.get("window", 99)
        seen = [s for s in range(t + 1) if t < until_RS[r, s] and near[s]]
        score = np.array([q[r, t, h] @ k[r, s, h // 2] for s in seen]) * scale
        score = cap * np.tanh(score / cap)
        weight = np.exp(score - score.max())
        expected = (weight / weight.sum()) @ np.stack([v[r, s, h // 2] for s in seen])
        np.testing.assert_allclose(out[r, t, h], expected, rtol=2e-5, atol=2e-6)


def test_a_window_counts_positions_and_not_places():
    """Behind a prompt a a a: both responses are as near, though y y stand further away."""
    batch = pack([([1, 2, 3], [[3, 4], [6, 7]])], row_tokens=7, rows=1)
    influence_TS = seen_by_gradient(batch, windows=(3, 1))[0, :, 0, :]  # the second adds nothing
    #             a  a  a  x  x  y  y
    expected_TS = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(influence_TS, np.array(expected_TS, bool))


def test_layers_that_differ_are_the_same_in_a_loop_and_unrolled(monkeypatch):
    """Windows and ropes begin anew when they are used up."""
    config = replace(CONFIG, L=5, windows=(2, 0), ropes=("local", "global", "none"), rope_base=50.0)
    assert config.of_layers(config.ropes) == ["local", "global", "none", "local", "global"]
    assert config.of_layers(config.windows) == [2, 0, 2, 0, 2]
    batch = pack(groups(3, seed=2), row_tokens=32, rows=1)

    def values(unrolled: int):
        monkeypatch.setattr(transformer, "UNROLLED", unrolled)
        model = decoder(config)
        params = model.init(jax.random.key(3))

        def total(params):
            row = (batch.tokens_RT, batch.positions_RT, batch.until_RT)
            return jnp.sum(jnp.sin(model.hidden(params, *row)[0]))  # its squares add up to T D

        return jax.jit(jax.value_and_grad(total))(params)

    assert relative_error(values(0), values(5)) < 1e-5


def test_rope_depends_on_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(t: int, s: int) -> float:
        turned = [rotate(x, rotary(jnp.array([[p]]), 8, 100.0)) for x, p in ((q, t), (k, s))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(7, 4) == pytest.approx(score(13, 10), rel=1e-5)
    assert score(7, 4) != pytest.approx(score(7, 5), rel=1e-3)


def test_the_turn_is_made_once_for_all_layers():
    batch = pack(groups(5, seed=3), row_tokens=24)
    model = decoder(replace(CONFIG, L=transformer.UNROLLED))
    params = model.init(jax.random.key(0))

    def total(params, tokens_RT, positions_RT, until_RT):
        return model.hidden(params, tokens_RT, positions_RT, until_RT)[0].sum()

    read = (batch.tokens_RT, batch.positions_RT, batch.until_RT)
    program = jax.jit(jax.grad(total)).lower(params, *read).compile().as_text() or ""
    assert program.count(" cosine(") == program.count(" sine(") == 1


def test_rms_norm_by_hand():
    x = jnp.array([[[3.0, 4.0]]])
    expected = np.array([[[3.0, 8.0]]]) / np.sqrt((9 + 16) / 2)
    np.testing.assert_allclose(rms_norm(x, jnp.array([1.0, 2.0]), 0.0), expected, rtol=1e-6)


def test_cache_equals_full_forward():
    tokens_RT = jnp.asarray(np.random.default_rng(2).integers(0, CONFIG.V, (2, 9)))
    positions_RT = jnp.tile(jnp.arange(9), (2, 1))
    until_RT = jnp.full((2, 9), 9)
    whole, _ = MODEL.hidden(PARAMS, tokens_RT, positions_RT, until_RT)
    first, cache = MODEL.hidden(PARAMS, tokens_RT[:, :5], positions_RT[:, :5], until_RT[:, :5], 9)
    pieces = [first]
    for t in range(5, 9):
        part = (x[:, t : t + 1] for x in (tokens_RT, positions_RT, until_RT))
        hidden, cache = MODEL.hidden(PARAMS, *part, cache)
        pieces.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_value_and_no_gradient(remat):
    batch = pack(groups(3), row_tokens=24)

    def total(model, params):
        return jnp.sum(
            jnp.square(model.hidden(params, batch.tokens_RT, batch.positions_RT, batch.until_RT)[0])
        )

    plain, again = (
        jax.jit(jax.value_and_grad(partial(total, model)))(PARAMS)
        for model in (MODEL, decoder(CONFIG, remat=remat))
    )
    assert relative_error(again, plain) < 1e-6


def test_remat_saves_memory():
    big = Config(V=32, D=64, L=6, H=4, J=4, E=16, F=256)
    params = jax.eval_shape(decoder(big).init, jax.random.key(0))
    ids_RT = jax.ShapeDtypeStruct((4, 128), jnp.int32)

    def temporary(remat: str) -> int:
        def total(p, ids):
            return jnp.sum(decoder(big, remat=remat).hidden(p, ids, ids, ids)[0])

        analysis = jax.jit(jax.grad(total)).lower(params, ids_RT).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary("full") < 0.6 * temporary("none")


def test_bfloat16_keeps_float32_parameters_and_logits():
    model = decoder(CONFIG, dtype="bfloat16")
    params = model.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    ids = jnp.ones((1, 3), jnp.int32)
    hidden, _ = model.hidden(params, ids, jnp.arange(3)[None], jnp.full((1, 3), 3))
    assert hidden.dtype == jnp.bfloat16
    assert model.unembed(params, hidden).dtype == jnp.float32


GEMMA = {"norm_offset": 1.0, "norm_place": "both", "qk_norm": "head", "tied": True}
GPT = {"norm": "layer", "positions": "learned", "P": 5, "gated": False, "tied": False}
BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    "options", [{"tied": True}, {"tied": False}, GEMMA, GPT | BIASES, BIASES | {"qk_norm": "whole"}]
)
def test_every_name_carries_its_shape(options):
    config = Config(V=11, D=6, L=3, H=4, J=2, E=8, F=10, **options)
    params = jax.eval_shape(decoder(config).init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = letters(path)
        shape = tuple(getattr(config, axis) for axis in axes)
        assert leaf.shape in (shape, (config.L, *shape)), path
    assert ("unembed_DV" in params) is not config.tied


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"J": 3}, "model.H=4"),
        ({"E": 5}, "model.E=5"),
        ({"rope_share": 0.1}, "model.rope_share=0.1 of model.E=4"),
        ({"positions": "learned"}, "model.positions=learned wants model.P"),
        ({"norm": "batch"}, "model.norm='batch': rms, layer are known"),
        ({"ropes": ("global", "far")}, "model.ropes='far': global, local, none are known"),
        ({"windows": ()}, r"model.windows=\(\)"),
        ({"windows": (-1,)}, r"model.windows=\(-1,\)"),
        ({"logit_cap": 0.0}, "model.logit_cap=0.0 must be more than 0"),
    ],
)
def test_impossible_architectures_are_named(change, words):
    with pytest.raises(BadInput, match=words):
        decoder(replace(CONFIG, **change))


def test_options_added_later_leave_descriptions_alone():
    """So that a run from before they were there is still the same run."""
    first = {"V", "D", "L", "H", "J", "E", "F", "rope_base", "norm_eps", "tied"}
    assert describe(CONFIG).keys() == first | {"class"}
    changed = replace(CONFIG, windows=(4, 0), rope_scaling=transformer.Scaling("linear", 2.0))
    assert describe(changed).keys() == first | {"class", "windows", "rope_scaling"}
    listed, described = (dict(options(changed, described=flag)) for flag in (False, True))
    assert listed.keys() - described.keys() >= {"norm", "ropes"} and "windows" in described


def test_unknown_dtype_and_remat_are_named():
    with pytest.raises(BadInput, match=r"run.dtype='float16'"):
        decoder(CONFIG, dtype="float16")
    with pytest.raises(BadInput, match=r"run.remat='some'"):
        decoder(CONFIG, remat="some")
