"""Advantages: rewards in, how much better than expected every token or response was.

Float32 or better inside and out; jit-able. Only `batch_leave_one_out` and `whitened` look beyond a
group or a response: give them the whole of a rollout.
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses.door import floating
from dpo_jax.structs import Array


def gae(
    reward_BT: Array,
    value_BT: Array,
    mask_BT: Array,
    *,
    gamma: Array | float,
    lam: Array | float,
) -> jax.Array:
    """Generalised advantage estimates, Schulman et al. 1506.02438 eq. 16.

        A_t = d_t + gamma lam A_{t+1},   d_t = r_t + gamma V_{t+1} - V_t

    t + 1 is the next token with a nonzero mask_BT: what is masked is skipped, its rewards and
    values are not read. After the last one V = A = 0. lam = 0 is the TD error, lam = 1 the return
    less the value. Returns advantage_BT, 0 at masked places; returns to fit values to are
    advantage + value.
    """
    reward_BT, value_BT = floating(reward_BT), floating(value_BT)
    mask_BT = jnp.asarray(mask_BT) != 0
    chex.assert_rank(reward_BT, 2)
    chex.assert_equal_shape([reward_BT, value_BT, mask_BT])
    dtype = jnp.promote_types(reward_BT.dtype, value_BT.dtype)
    gamma, lam = jnp.asarray(gamma, dtype), jnp.asarray(lam, dtype)

    def back(later, now):
        next_value_B, next_advantage_B = later
        reward_B, value_B, there_B = now
        error_B = reward_B + gamma * next_value_B - value_B
        advantage_B = error_B + gamma * lam * next_advantage_B
        here = (value_B, advantage_B)
        earlier = tuple(jnp.where(there_B, x, y) for x, y in zip(here, later, strict=True))
        return earlier, jnp.where(there_B, advantage_B, 0)

    end_B = jnp.zeros(reward_BT.shape[:1], dtype)
    steps_TB = tuple(x_BT.T for x_BT in (reward_BT.astype(dtype), value_BT.astype(dtype), mask_BT))
    _, advantage_TB = jax.lax.scan(back, (end_B, end_B), steps_TB, reverse=True)
    return advantage_TB.T


def leave_one_out(reward_BK: Array) -> jax.Array:
    """RLOO, Kool et al. 2019 and Ahmadian et al. 2402.14740.

        r_k - mean_{j != k} r_j

    Unbiased: the baseline does not see the response. Equal rewards and K = 1 give exactly 0.
    """
    centred_BK = _centred(reward_BK)
    K = centred_BK.shape[1]
    return centred_BK * (K / max(K - 1, 1))


def group_normalized(reward_BK: Array, *, std: bool = True, eps: Array | float = 1e-4) -> jax.Array:
    """GRPO, Shao et al. 2402.03300 section 4.1.2.

        (r_k - mean_j r_j) / (std_j r_j + eps)

    The sample standard deviation (ddof 1). std=False leaves the division out (Dr. GRPO,
    2503.20783). Equal rewards and K = 1 give exactly 0.
    """
    centred_BK = _centred(reward_BK)
    if not std or centred_BK.shape[1] == 1:
        return centred_BK
    return centred_BK / (jnp.std(centred_BK, axis=1, ddof=1, keepdims=True) + eps)


def batch_leave_one_out(reward_BK: Array) -> jax.Array:
    """REINFORCE with a baseline, Williams 1992: the mean of all other responses of the rollout.

        r_i - mean_{j != i} r_j      i, j over all B * K

    Unbiased as `leave_one_out`, and K may be 1. A lone response has advantage 0.
    """
    reward_BK = floating(reward_BK)
    return leave_one_out(reward_BK.reshape(1, -1)).reshape(reward_BK.shape)


def whitened(
    x_BT: Array, mask_BT: Array, *, shift: bool = True, eps: Array | float = 1e-8
) -> jax.Array:
    """Mean 0 and standard deviation 1 over the places with a nonzero mask_BT; 0 elsewhere.

        (x - mean) / sqrt(var + eps)

    The sample variance (ddof 1). shift=False leaves the mean where it is. One place or none gives
    the values back.
    """
    x_BT, there_BT = floating(x_BT), jnp.asarray(mask_BT) != 0
    chex.assert_equal_shape([x_BT, there_BT])
    count = jnp.sum(there_BT)
    mean = jnp.sum(jnp.where(there_BT, x_BT, 0)) / jnp.maximum(count, 1)
    gap_BT = jnp.where(there_BT, x_BT - mean, 0)
    variance = jnp.sum(gap_BT**2) / jnp.maximum(count - 1, 1)
    scaled_BT = gap_BT * jax.lax.rsqrt(variance + eps)
    scaled_BT = scaled_BT if shift else scaled_BT + mean
    return jnp.where(there_BT, jnp.where(count > 1, scaled_BT, x_BT), 0)


def _centred(reward_BK: Array) -> jax.Array:
    reward_BK = floating(reward_BK)
    chex.assert_rank(reward_BK, 2)
    # From the first reward on: equal rewards then differ by exactly 0, not by rounding.
    rise_BK = reward_BK - reward_BK[:, :1]
    return rise_BK - jnp.mean(rise_BK, axis=1, keepdims=True)
