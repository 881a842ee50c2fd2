"""The losses that compare pairs with each other: ranks, owners, empty slots, what is kept."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.structs import Array, Scored

BETA = 0.3
RNG = np.random.default_rng(0)
LOGP = RNG.normal(-20, 4, (7, 2)).astype(np.float32)
REF = RNG.normal(-20, 4, (7, 2)).astype(np.float32)
PAIRS = Scored(LOGP, ref_logp_BK=REF, weight_B=np.ones(7, np.float32))
FIRST_LESS_SECOND = np.array([1, -1], np.float32)
COUPLED = [
    partial(losses.aot, beta=BETA),
    partial(losses.aot, beta=BETA, label_smoothing=0.2),
    partial(losses.aot_unpaired, beta=BETA),
    partial(losses.beta_dpo, beta=BETA, rho=0.6),
]
each_loss = pytest.mark.parametrize("loss", COUPLED, ids=lambda loss: loss.func.__name__)


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def value_and_slopes(loss, scored, weight_B: Array | float = 1.0):
    """loss_B and d sum(weight_B loss_B) / d (policy, reference)."""

    def total(logp_BK, ref_logp_BK):
        value_B = loss(replace(scored, logp_BK=logp_BK, ref_logp_BK=ref_logp_BK))
        return jnp.sum(weight_B * value_B), value_B

    inputs = (jnp.asarray(scored.logp_BK), jnp.asarray(scored.ref_logp_BK))
    (_, value_B), slopes = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*inputs)
    return value_B, slopes


def interleaved(scored, places, count):
    """The pairs at `places` of `count` slots; the others are empty, or hold what must not count."""

    def spread(x, nothing):
        wide = np.full((count, *x.shape[1:]), nothing, np.float32)
        wide[places] = x
        return wide

    return Scored(
        spread(scored.logp_BK, 0.0),
        ref_logp_BK=spread(scored.ref_logp_BK, -3e4),
        weight_B=spread(scored.weight_B, 0.0),
        delta=scored.delta,
    )


@each_loss
@pytest.mark.parametrize("delta", [None, 0.4])
def test_empty_slots_between_the_pairs_change_nothing(loss, delta):
    scored = replace(PAIRS, delta=None if delta is None else jnp.float32(delta))
    places = np.array([1, 2, 4, 7, 8, 9, 11])
    value_B, slopes = value_and_slopes(loss, scored)
    wide_B, wide_slopes = value_and_slopes(loss, interleaved(scored, places, 13))
    np.testing.assert_array_equal(wide_B[places], value_B)
    for wide_BK, slope_BK in zip(wide_slopes, slopes, strict=True):
        np.testing.assert_array_equal(wide_BK[places], slope_BK)
        assert np.count_nonzero(np.delete(wide_BK, places, axis=0)) == 0
    np.testing.assert_array_equal(np.delete(wide_B, places), 0)


@each_loss
def test_without_weights_all_pairs_count(loss):
    np.testing.assert_array_equal(loss(replace(PAIRS, weight_B=None)), loss(PAIRS))


@each_loss
def test_a_batch_of_empty_slots_is_zero_and_finite(loss):
    nothing = Scored(jnp.zeros((3, 2)), ref_logp_BK=jnp.zeros((3, 2)), weight_B=jnp.zeros(3))
    value_B, slopes = value_and_slopes(loss, nothing)
    np.testing.assert_array_equal(value_B, [0, 0, 0])
    for slope_BK in slopes:
        np.testing.assert_array_equal(slope_BK, np.zeros((3, 2)))


@each_loss
def test_values_move_with_their_pairs(loss):
    order = RNG.permutation(7)
    moved = jax.tree.map(lambda x: x[order], PAIRS)
    close(loss(moved), loss(PAIRS)[order])


@each_loss
def test_a_value_depends_on_the_other_pairs(loss):
    apart = [loss(jax.tree.map(lambda x, b=b: x[b : b + 1], PAIRS))[0] for b in range(7)]
    assert not np.allclose(loss(PAIRS), apart, atol=1e-3)
    assert losses.needs(loss).coupled


@pytest.mark.parametrize("loss", [losses.aot, losses.aot_unpaired])
def test_aot_of_one_pair_is_dpo(loss):
    one = jax.tree.map(lambda x: x[:1], PAIRS)
    close(loss(one, beta=BETA), losses.dpo(one, beta=BETA))


def test_aot_by_hand():
    """w - l of 3, 1, 2 against rw - rl of 0.5, 0, -1: by rank 1 - -1, 2 - 0, 3 - 0.5."""
    scored = Scored(
        jnp.float32([[3, 0], [1, 0], [2, 0]]), ref_logp_BK=jnp.float32([[0.5, 0], [0, 0], [-1, 0]])
    )
    value_B, (slope, ref_slope) = value_and_slopes(partial(losses.aot, beta=1.0), scored)
    x = np.array([2.5, 2.0, 2.0])
    close(value_B, np.log1p(np.exp(-x)))
    push = -1 / (1 + np.exp(x))
    close(slope, np.stack([push, -push], axis=1))
    # The reference values of rank 1, 2, 3 stand at 2, 1, 0; their owners at 1, 2, 0.
    pull = -push[[0, 2, 1]]
    close(ref_slope, np.stack([pull, -pull], axis=1))


def test_aot_unpaired_by_hand():
    """a of 3, 1, 2 against b of 0, 5, -1: by rank 1 - -1, 2 - 0, 3 - 5."""
    scored = Scored(jnp.float32([[3, 0], [1, 5], [2, -1]]), ref_logp_BK=jnp.zeros((3, 2)))
    value_B, (slope, _) = value_and_slopes(partial(losses.aot_unpaired, beta=1.0), scored)
    x = np.array([-2.0, 2.0, 2.0])
    close(value_B, np.log1p(np.exp(-x)))
    push = -1 / (1 + np.exp(x))
    close(slope, np.stack([push, -push[[2, 0, 1]]], axis=1))


def test_the_weight_of_a_value_reaches_its_owner():
    """Only the pair whose value is weighed is pushed under the policy."""
    weight_B = jnp.zeros(7).at[3].set(1.0)
    _, (slope, _) = value_and_slopes(partial(losses.aot, beta=BETA), PAIRS, weight_B)
    assert np.all(slope[3] != 0)
    assert np.count_nonzero(slope) == 2


@pytest.mark.parametrize(
    ("rho", "kept"), [(0.0, 0), (0.01, 1), (0.3, 3), (0.5, 5), (0.61, 7), (0.7, 7), (1.0, 10)]
)
def test_beta_dpo_keeps_its_share_of_the_pairs(rho, kept):
    margins = jnp.arange(1.0, 11.0)
    scored = Scored(jnp.stack([margins, 0 * margins], axis=1), ref_logp_BK=jnp.zeros((10, 2)))
    value_B = losses.beta_dpo(scored, beta=0.1, rho=rho)
    np.testing.assert_array_equal(value_B != 0, np.arange(10) < kept)
    traced = jax.jit(lambda rho: losses.beta_dpo(scored, beta=0.1, rho=rho))(jnp.float32(rho))
    close(traced, value_B)


def test_beta_dpo_keeps_what_is_nearest_its_memory_and_the_earlier_of_a_tie():
    D = jnp.float32([5, 0, 1, 3, 3, 9])  # delta 2: distances 3 2 1 1 1 7
    scored = Scored(jnp.stack([D, 0 * D], axis=1), ref_logp_BK=jnp.zeros((6, 2)))
    value_B = losses.beta_dpo(replace(scored, delta=jnp.float32(2)), beta=1.0, rho=2 / 6)
    np.testing.assert_array_equal(value_B != 0, [False, False, True, True, False, False])


def test_beta_dpo_holds_its_beta_still():
    """The gradient is that of dpo under the batch's beta, for the pairs that are kept."""
    D = (LOGP - REF) @ FIRST_LESS_SECOND
    delta = np.float32(0.4)
    beta_b = BETA * (1 + 0.6 * float(np.mean(BETA * D) - delta))
    kept_B = np.argsort(np.argsort(abs(BETA * D - delta))) < 5  # ceil(0.6 * 7)
    scored = replace(PAIRS, delta=jnp.asarray(delta))
    value_B, (slope, _) = value_and_slopes(partial(losses.beta_dpo, beta=BETA, rho=0.6), scored)
    plain_B, (plain, _) = value_and_slopes(partial(losses.dpo, beta=beta_b), scored)
    close(value_B, kept_B * plain_B)
    close(slope, kept_B[:, None] * plain)
    pulled = jax.grad(lambda d: losses.beta_dpo(replace(PAIRS, delta=d), beta=BETA).sum())(0.4)
    assert pulled == 0


def test_beta_dpo_keeps_the_mean_of_its_margins():
    needs = losses.needs(partial(losses.beta_dpo, beta=BETA))
    (statistic,) = needs.statistics
    assert (statistic.field, statistic.keep) == ("delta", 0.9)
    assert needs.memory and needs.coupled
    close(statistic.value(PAIRS), BETA * (LOGP - REF) @ FIRST_LESS_SECOND)
    assert losses.needs(losses.beta_dpo).statistics[0].field == "delta"
