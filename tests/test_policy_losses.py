"""Losses of policy gradients: recorded values, and gradients where the clips begin and end."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses

LOW, HIGH = 0.2, 0.3


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def at_ratio(ratio, advantage, **keywords):
    """(value, slope in logp) of the surrogate where policy over old policy is `ratio`."""
    advantage = jnp.asarray(advantage, jnp.float32)
    logp, old_logp = jnp.log(jnp.asarray(ratio, jnp.float32)) - 2, jnp.float32(-2)
    loss = partial(losses.clipped_surrogate, **keywords)
    return jax.value_and_grad(lambda logp: loss(logp, old_logp, advantage))(logp)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 1), (1.5, -1), (0.5, 1), (0.5, -1)])
def test_recorded_clips(closed_forms, ratio, advantage):
    value, slope = at_ratio(ratio, advantage)
    close(value, closed_forms[f"ppo_clip_r{ratio}_A{advantage:+}_e.2"])
    outside = (ratio > 1) == (advantage > 0)  # further in the direction that pays
    close(slope, 0 if outside else -advantage * ratio)


@pytest.mark.parametrize("advantage", [2.0, -3.0, 0.0])
def test_where_the_policy_is_the_old_one_the_gradient_is_reinforce(advantage):
    value, slope = at_ratio(1.0, advantage)
    close(value, -advantage)
    reinforce = jax.grad(losses.reinforce)(jnp.float32(-2), jnp.float32(advantage))
    close(slope, reinforce)


@pytest.mark.parametrize(
    ("ratio", "advantage", "push"),
    [
        *[(0.79, 1, 1), (0.81, 1, 1), (1.29, 1, 1), (1.31, 1, 0)],
        *[(0.79, -1, 0), (0.81, -1, 1), (1.29, -1, 1), (1.31, -1, 1)],
    ],
)
def test_each_side_has_its_own_clip(ratio, advantage, push):
    _, slope = at_ratio(ratio, advantage, low=LOW, high=HIGH)
    close(slope, -push * advantage * ratio)


def test_the_dual_clip_bounds_the_loss_of_bad_responses_only():
    for ratio in (0.5, 1.0, 2.9):
        for advantage in (1.0, -2.0):
            plain, dual = at_ratio(ratio, advantage), at_ratio(ratio, advantage, dual=3.0)
            np.testing.assert_array_equal(plain, dual)
    value, slope = at_ratio(3.1, -2.0, dual=3.0)
    assert (value, slope) == (6, 0)
    assert at_ratio(1e6, -2.0, dual=3.0) == (6, 0)
    np.testing.assert_array_equal(at_ratio(3.1, 2.0), at_ratio(3.1, 2.0, dual=3.0))


@pytest.mark.parametrize("gap", [800.0, -800.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_beyond_floating_point_is_finite(gap, advantage):
    loss = losses.clipped_surrogate
    value, slope = jax.value_and_grad(loss)(jnp.float32(gap), jnp.float32(0), advantage)
    assert np.isfinite(value)
    assert slope == 0


def test_what_was_fixed_at_sampling_carries_no_gradient():
    x, old, fixed = jnp.float32([-1, -2, 0.5]), jnp.float32([-1.1, -1.5, 0]), jnp.float32([1, 2, 3])

    def total(loss):
        return lambda *arrays: jnp.sum(loss(*arrays))

    for loss, arrays in [
        (losses.reinforce, (x, fixed)),
        (losses.clipped_surrogate, (x, old, fixed)),
        (partial(losses.clipped_value, clip=0.2), (x, old, fixed)),
    ]:
        first, *others = jax.grad(total(loss), argnums=tuple(range(len(arrays))))(*arrays)
        assert np.any(first != 0)
        np.testing.assert_array_equal(others, np.zeros_like(others))
    # so the log-probs of the step themselves can stand as the old ones
    slope = jax.grad(lambda x: jnp.sum(losses.clipped_surrogate(x, x, fixed)))(x)
    close(slope, -fixed)


def test_the_score_function_estimate_climbs_the_expected_advantage():
    """Over all tokens of a small vocabulary: E[-A grad log p] = -grad E[A]."""
    logits, advantage_V = jnp.float32([0.3, -1.0, 0.7]), jnp.float32([2.0, -1.0, 0.5])
    p_V = jax.nn.softmax(logits)

    def sampled(logits):
        return jnp.sum(p_V * losses.reinforce(jax.nn.log_softmax(logits), advantage_V))

    expected = jax.grad(lambda logits: -jnp.sum(jax.nn.softmax(logits) * advantage_V))(logits)
    close(jax.grad(sampled)(logits), expected)


@pytest.mark.parametrize(
    ("value", "old", "return_", "expected", "slope"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),  # inside the region: half the square
        (2.0, 1.0, 3.0, 1.62, 0.0),  # nearer than the region lets it: the bound counts
        (2.0, 1.0, 0.0, 2.0, 2.0),  # moved the wrong way: pulled back
        (0.0, 1.0, 3.0, 4.5, -3.0),
    ],
)
def test_value_clip(value, old, return_, expected, slope):
    arrays = map(jnp.float32, (value, old, return_))
    found = jax.value_and_grad(partial(losses.clipped_value, clip=0.2))(*arrays)
    close(found, (expected, slope))


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        losses.reinforce(np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(AssertionError):
        losses.clipped_surrogate(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 1)))
