"""Advantages against recorded ones, closed forms, and sums written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses.advantage import gae, group_normalized, leave_one_out, whitened

f32 = partial(np.asarray, dtype=np.float32)


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


# Generalised advantage estimates


def test_recorded_masked_gae_of_tunix(vectors):
    entry = vectors["tunix_verl_masked_gae_whitened"]
    inputs, expected = entry["inputs"], entry["expected"]
    reward, value, mask = (f32(inputs[name]) for name in ("rewards", "values", "mask"))
    found = np.asarray(gae(reward, value, mask, gamma=inputs["gamma"], lam=inputs["lam"]))
    there = mask == 1
    np.testing.assert_allclose(
        (found + value)[there], np.array(expected["returns"])[there], **entry["tol"]
    )
    whitened = (found - found[there].mean()) / found[there].std(ddof=1)
    np.testing.assert_allclose(
        whitened[there], np.array(expected["advantages"])[there], **entry["tol"]
    )
    np.testing.assert_array_equal(found[~there], 0)


@pytest.mark.parametrize("lam", ["1.0", "0.7", "0.4"])
def test_recorded_gae_of_rlax(vectors, lam):
    """Theirs bootstraps with a last value, and a discount of 0 ends an episode inside a row."""
    entry = vectors[f"rlax_truncated_gae_lambda{lam}"]
    inputs = entry["inputs"]
    for b, discounts in enumerate(np.array(inputs["discount_t"])):
        reward, value = np.array(inputs["r_t"])[b], np.array(inputs["values"])[b]
        ends = [*(np.flatnonzero(discounts == 0) + 1), len(reward)]
        found, start = [], 0
        for end in ends:
            piece = reward[start:end].copy()
            piece[-1] += discounts[end - 1] * value[end]  # the bootstrap as a last reward
            gamma = discounts.max()
            arrays = (f32(x)[None] for x in (piece, value[start:end], np.ones(end - start)))
            found.extend(gae(*arrays, gamma=gamma, lam=inputs["lambda_"])[0])
            start = end
        np.testing.assert_allclose(found, entry["expected"][b], **entry["tol"])


def ours(row, lam, last=None):
    """Returns of (rewards, discounts, values behind each step), a discount g_t a step:

        G_t = r_t + g_t ((1 - lam) V_t + lam G_{t+1}),   G_T = r_T + g_T V_T

    With D_t the product of the discounts before t, D G is the return to rewards D r and values
    D V without a discount: `gae` with gamma = 1 and the value of what comes first added. `last`:
    which steps there are, so that the one behind it is bootstrapped.
    """
    reward, discount, value = (np.array(x)[:last] for x in row)
    scale = np.cumprod([1.0, *discount])
    paid, before = scale[:-1] * reward, np.array([0.0, *(scale[1:] * value)[:-1]])
    paid[-1] += scale[-1] * value[-1]
    arrays = (f32(x)[None] for x in (paid, before, np.ones(len(paid))))
    return (np.asarray(gae(*arrays, gamma=1.0, lam=lam))[0] + before) / scale[:-1]


def test_recorded_returns_of_rlax(vectors):
    """Mixed by lambda, to the end, and of three steps."""
    entry = vectors["rlax_lambda_returns"]
    names = ("r_t", "discount_t", "v_t")
    rows = zip(*(entry["inputs"][name] for name in names), strict=True)
    found = [ours(row, entry["inputs"]["lambda_"]) for row in rows]
    np.testing.assert_allclose(found, entry["expected"], **entry["tol"])

    entry = vectors["rlax_discounted_returns"]
    inputs = entry["inputs"]
    for b, bootstrap in enumerate(inputs["bootstrap"]):
        row = (inputs["r_t"][b], inputs["discount_t"][b], [0, 0, 0, 0, bootstrap])
        found = ours(row, 1.0)
        np.testing.assert_allclose(found, entry["expected"][b], **entry["tol"])

    entry = vectors["rlax_n_step_returns_n3"]
    for b, expected in enumerate(entry["expected"]):
        row = [entry["inputs"][name][b] for name in names]
        tails = [[column[t:] for column in row] for t in range(len(expected))]
        found = [ours(tail, 1.0, last=entry["inputs"]["n"])[0] for tail in tails]
        np.testing.assert_allclose(found, expected, **entry["tol"])


def test_recorded_variance_of_tunix(vectors):
    """`whitened` divides by its root: what a gap of 1 becomes says it."""
    entry = vectors["tunix_masked_mean"]
    x, mask, expected = f32(entry["inputs"]["x"]), f32(entry["inputs"]["mask"]), entry["expected"]
    for rows, name in [(slice(None), "var_bessel"), (slice(1), "var_1d_first_row")]:
        found = np.asarray(whitened(x[rows], mask[rows], eps=0.0))
        np.testing.assert_allclose((found[0, 1] - found[0, 0]) ** -2, expected[name], rtol=1e-5)
        there = mask[rows] == 1
        mean = x[rows][there].mean()
        np.testing.assert_allclose(
            found[there], (x[rows][there] - mean) / np.sqrt(expected[name]), **entry["tol"]
        )
    # a mean of every row, each with a measure of its own
    means = [
        np.sum(losses.measure.token_mean(m[None]) * row[None])
        for row, m in zip(x, mask, strict=True)
    ]
    np.testing.assert_allclose(means, expected["axis1"], **entry["tol"])


def test_constant_reward(closed_forms):
    ones = np.ones((1, 5), np.float32)
    for gamma, lam in [(0.9, 0.7), (0.63, 1.0)]:
        found = gae(ones, 0 * ones, ones, gamma=gamma, lam=lam)
        close(found[0, 0], closed_forms["gae_const_reward_T5_gl0.63"])


@pytest.fixture
def walk():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 3, 7))
    mask = np.array([[1] * 7, [1, 1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1, 0]])
    return f32(reward), f32(value), mask


def test_lambda_0_is_the_td_error_and_1_the_return_less_the_value(walk):
    """gae_lambda0_is_td and gae_lambda1_is_mc_minus_v, over the tokens that are there."""
    reward, value, mask = walk
    errors, gaps = (np.asarray(gae(*walk, gamma=0.9, lam=lam)) for lam in (0.0, 1.0))
    for b in range(3):
        there = np.flatnonzero(mask[b])
        r, v = reward[b, there], value[b, there]
        later = np.append(v[1:], 0)
        close(errors[b, there], r + 0.9 * later - v)
        returns = [np.sum(r[t:] * 0.9 ** np.arange(len(r) - t)) for t in range(len(r))]
        close(gaps[b, there], np.array(returns) - v, 1e-5)


def test_masked_tokens_are_skipped_whatever_they_hold(walk):
    reward, value, mask = walk
    found = gae(*walk, gamma=0.9, lam=0.7)
    rubbish = gae(
        np.where(mask, reward, np.nan), np.where(mask, value, 1e9), mask, gamma=0.9, lam=0.7
    )
    np.testing.assert_array_equal(rubbish, found)
    np.testing.assert_array_equal(found[mask == 0], 0)
    there = np.array([1, 4, 5])
    short = gae(reward[2:, there], value[2:, there], mask[2:, there], gamma=0.9, lam=0.7)
    np.testing.assert_array_equal(found[2, there], short[0])
    np.testing.assert_array_equal(gae(reward, value, 0.25 * mask, gamma=0.9, lam=0.7), found)


def test_gae_is_traceable_and_precise(walk):
    traced = jax.jit(gae)(*walk, gamma=jnp.float32(0.9), lam=jnp.float32(0.7))
    close(traced, gae(*walk, gamma=0.9, lam=0.7))
    reward, value, mask = walk
    coarse = [jnp.asarray(x, jnp.bfloat16) for x in (reward, value)]
    gamma, lam = jnp.bfloat16(0.9), jnp.bfloat16(0.7)
    found = gae(coarse[0], coarse[1], mask, gamma=gamma, lam=lam)
    assert found.dtype == jnp.float32
    reward, value = (np.asarray(x, np.float32) for x in coarse)
    close(found, gae(reward, value, mask, gamma=float(gamma), lam=float(lam)))
    with jax.enable_x64(True):
        exact = gae(reward.astype(np.float64), value, mask, gamma=1.0, lam=1.0)
    assert exact.dtype == jnp.float64


# Groups


def test_recorded_leave_one_out(vectors, closed_forms):
    entry = vectors["tunix_rloo"]
    rewards = f32(entry["inputs"]["rewards"]).reshape(-1, entry["inputs"]["num_generations"])
    np.testing.assert_allclose(np.ravel(leave_one_out(rewards)), entry["expected"], **entry["tol"])
    np.testing.assert_array_equal(leave_one_out(rewards[:, :1]), np.zeros((2, 1)))
    close(leave_one_out(f32([[1, 0, 0, 0]]))[0], closed_forms["rloo_1000"])


def test_recorded_group_normalisation(vectors, closed_forms):
    entry = vectors["tunix_grpo_advantages"]
    rewards = f32(entry["inputs"]["rewards"]).reshape(-1, entry["inputs"]["num_generations"])
    np.testing.assert_allclose(
        np.ravel(group_normalized(rewards)), np.ravel(entry["expected"]), **entry["tol"]
    )
    one = f32([[1, 0, 0, 0]])
    close(group_normalized(one, eps=0.0)[0], closed_forms["grpo_1000_ddof1"])
    ddof0 = np.array(closed_forms["grpo_1000_ddof0"])  # the other convention, not this one
    close(group_normalized(one, eps=0.0)[0] * np.sqrt(4 / 3), ddof0)
    close(group_normalized(one, std=False)[0], [0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize("reward", [0.1, 1.0, -3e7, 0.0])
@pytest.mark.parametrize("K", [1, 3, 7, 16])
def test_equal_rewards_have_no_advantage(closed_forms, reward, K):
    equal = np.full((2, K), reward, np.float32)
    for advantage in (leave_one_out, group_normalized, partial(group_normalized, std=False)):
        np.testing.assert_array_equal(jax.jit(advantage)(equal), np.zeros((2, K)))
    np.testing.assert_array_equal(
        group_normalized(np.ones((1, 4)))[0], closed_forms["grpo_equal_rewards"]
    )


def test_leave_one_out_is_the_mean_of_the_others_taken_off():
    rewards = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    others = [[np.delete(row, k).mean() for k in range(5)] for row in rewards]
    close(leave_one_out(rewards), rewards - np.array(others))


def test_a_constant_added_to_a_group_changes_nothing():
    rewards = f32([[1.0, 0.5, -2.0], [0.25, 3.0, 8.0]])
    shift = f32([[64.0], [-1024.0]])
    for advantage in (leave_one_out, group_normalized):
        np.testing.assert_array_equal(advantage(rewards + shift), advantage(rewards))
        assert advantage(jnp.asarray(rewards, jnp.bfloat16)).dtype == jnp.float32


def test_advantage_is_a_door_of_losses():
    assert losses.advantage.gae is gae
    assert "advantage" in losses.__all__
