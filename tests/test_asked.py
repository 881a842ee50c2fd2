"""The last layer computes what is read: equal to all places and a gather, for less work."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, groups, relative_error

from dpo_jax.data.packing import pack
from dpo_jax.models import transformer
from dpo_jax.models.asked import distinct, spread, take
from dpo_jax.models.transformer import decoder
from dpo_jax.plan.products import products
from dpo_jax.structs import at_places

SMALL = replace(CONFIG, L=2)
KINDS = {
    "llama": SMALL,
    "one layer": CONFIG,
    "gemma": replace(SMALL, windows=(4, 0), qk_norm="head", norm_place="both", logit_cap=9.0),
    "neox": replace(SMALL, parallel=True, norm="layer", qkv_bias=True, o_bias=True, gated=False),
    "gpt2": replace(SMALL, positions="learned", P=32, norm="layer", mlp_bias=True),
    "olmo2": replace(SMALL, qk_norm="whole", norm_place="after"),
}
BATCH = pack(groups(5, seed=7, responses=3), row_tokens=32)
ROWS = (BATCH.tokens_RT, BATCH.positions_RT, BATCH.until_RT)


def test_the_distinct_places_come_first():
    at_RN = jnp.array([[5, 2, 5, 0, 0], [3, 4, 1, 2, 0]])
    these, index_RN = distinct(at_RN, 6)
    assert these.place_Rn.shape == (2, 5)
    np.testing.assert_array_equal(these.place_Rn[0, :3], [0, 2, 5])
    np.testing.assert_array_equal(these.place_Rn[1], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(at_places(these.place_Rn, index_RN), at_RN)


def test_more_questions_than_places():
    these, index_RN = distinct(jnp.array([[1, 1, 0, 1, 2, 2]]), 3)
    np.testing.assert_array_equal(these.place_Rn, [[0, 1, 2]])
    np.testing.assert_array_equal(index_RN, [[1, 1, 0, 1, 2, 2]])


def test_take_and_spread_are_each_others_transpose():
    these, _ = distinct(jnp.array([[5, 2, 5, 1], [3, 4, 1, 2]]), 6)
    x_RTD, y_RnD = (jax.random.normal(jax.random.key(i), (2, n, 3)) for i, n in enumerate((6, 4)))
    np.testing.assert_allclose(
        jnp.sum(take(x_RTD, these) * y_RnD), jnp.sum(x_RTD * spread(y_RnD, these)), rtol=1e-6
    )
    (back_RTD,) = jax.vjp(lambda x: take(x, these), x_RTD)[1](y_RnD)
    np.testing.assert_array_equal(back_RTD, spread(y_RnD, these))
    (back_RnD,) = jax.vjp(lambda y: spread(y, these), y_RnD)[1](x_RTD)
    np.testing.assert_array_equal(back_RnD, take(x_RTD, these))


@pytest.mark.parametrize(
    ("kind", "remat", "unrolled"),
    [(kind, "none", 8) for kind in KINDS] + [("gemma", "none", 0), ("llama", "full", 8)],
)
def test_what_is_asked_for_is_what_all_places_give(kind, remat, unrolled, monkeypatch):
    """In value and gradient; the prompt's last place is asked for by every response behind it."""
    monkeypatch.setattr(transformer, "UNROLLED", unrolled)
    model = decoder(KINDS[kind], remat=remat)
    params = model.init(jax.random.key(0))
    slope_RND = jax.random.normal(jax.random.key(1), (*BATCH.source_RN.shape, CONFIG.D))
    assert len(set(BATCH.source_RN[0].tolist())) < np.sum(BATCH.slot_RN[0] >= 0)

    def values(model):
        def total(params):
            hidden_RND, _ = model.hidden_at(params, BATCH.source_RN, *ROWS)
            return jnp.sum(slope_RND * hidden_RND), hidden_RND

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    assert relative_error(values(model), values(model._replace(hidden_only=None))) < 2e-6


def test_an_opened_cache_holds_the_keys_of_every_place():
    model = decoder(SMALL)
    params = model.init(jax.random.key(0))
    last_R1 = jnp.full((len(BATCH.tokens_RT), 1), 9)
    at = jax.jit(lambda params: model.hidden_at(params, last_R1, *ROWS, 40))
    hidden_R1D, cache = at(params)
    hidden_RTD, whole = jax.jit(lambda params: model.hidden(params, *ROWS, 40))(params)
    assert relative_error((hidden_R1D[:, 0], cache), (hidden_RTD[:, 9], whole)) < 2e-6


def test_the_last_layer_multiplies_for_these_places_alone():
    """Queries, output and MLP of one layer, for the places that nobody reads, are saved."""
    c, n = SMALL, 4
    model = decoder(c)
    params = jax.eval_shape(model.init, jax.random.key(0))
    at_Rn = jnp.zeros((len(BATCH.tokens_RT), n), jnp.int32)

    def flops(model) -> float:
        program = jax.make_jaxpr(lambda params: model.hidden_at(params, at_Rn, *ROWS)[0])(params)
        return products(program, [False] * len(jax.tree.leaves(params)), {}, 1).flops

    R, T = BATCH.tokens_RT.shape
    saved = 2 * R * (T - n) * (2 * c.D * c.H * c.E + 3 * c.D * c.F)
    assert flops(model._replace(hidden_only=None)) - flops(model) == saved
