"""Divergences between policy and reference: as scores inside a loss, and as estimates of KL.

Float32 or better inside and out, whatever comes in; elementwise unless a docstring says other.
Exponents are clamped at 80, with gradient 0 beyond: exp(80) is still a finite float32.
"""

from collections.abc import Callable
from functools import partial
from typing import overload

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses.door import floating
from dpo_jax.structs import Array

Divergence = Callable[[jax.Array], jax.Array]
LARGEST_EXPONENT = 80.0


# f-DPO, 2309.16240 theorem 1 and table 1: the optimal policy of the RLHF objective under a
# divergence f has reward = beta f'(policy / reference) + constant. A score is f' of the log-ratio
# x = log policy - log reference up to a constant, which cancels between the responses of a group.


def reverse_kl(x: Array) -> jax.Array:
    """s(x) = x, the score of KL(policy, reference): standard DPO. Same shape as x."""
    return floating(x)


def forward_kl(x: Array) -> jax.Array:
    """s(x) = -exp(-x), the score of KL(reference, policy) (2309.16240 table 1). Shape of x."""
    return -jnp.exp(bounded(-floating(x)))


def jensen_shannon(x: Array) -> jax.Array:
    """s(x) = log sigmoid(x), the score of Jensen-Shannon (2309.16240 table 1). Shape of x."""
    return jax.nn.log_sigmoid(floating(x))


@overload
def alpha_divergence(x: Array, *, alpha: Array | float = 0.5) -> jax.Array: ...
@overload
def alpha_divergence(x: None = None, *, alpha: Array | float = 0.5) -> Divergence: ...


def alpha_divergence(
    x: Array | None = None, *, alpha: Array | float = 0.5
) -> jax.Array | Divergence:
    """s(x) = exp((alpha-1) x) / (alpha-1), and x at alpha = 1 (2309.16240 table 1, alpha -> 1-a).

    Between `forward_kl` (alpha = 0) and `reverse_kl` (alpha = 1). Without x it returns the
    divergence of that alpha: `dpo(scored, beta=.1, divergence=alpha_divergence(alpha=.3))`.
    Near but not at alpha = 1 the constant 1/(alpha-1) costs digits.
    """
    if x is None:
        return partial(alpha_divergence, alpha=alpha)
    x = floating(x)
    slope = jnp.asarray(alpha, x.dtype) - 1
    limit = slope == 0
    safe = jnp.where(limit, 1, slope)  # the branch not taken must be finite for the gradient
    return jnp.where(limit, x, jnp.exp(bounded(safe * x)) / safe)


# Estimates of KL(policy, reference) per token, from tokens sampled from the policy; J. Schulman,
# "Approximating KL divergence", 2020. d = logp - ref_logp at the sampled token. The gradient
# named is that of the mean of the estimate over fixed samples.


def kl_k1(logp: Array, ref_logp: Array) -> jax.Array:
    """d. Value: unbiased, may be negative. Gradient: 0 in expectation, so no use as a loss.

    Any shape, both the same; as a penalty inside the reward it is the RLHF objective.
    """
    return _log_ratio(logp, ref_logp)


def kl_abs(logp: Array, ref_logp: Array) -> jax.Array:
    """|d|. Value: at least |KL|, biased. Gradient: that of sum_v |policy - reference|.

    Any shape, both the same; the gradient at d = 0 is 0.
    """
    return jnp.abs(_log_ratio(logp, ref_logp))


def kl_k2(logp: Array, ref_logp: Array) -> jax.Array:
    """d^2 / 2 ("mse"). Value: biased, E[d^2]/2. Gradient: that of KL(policy, reference).

    Any shape, both the same.
    """
    return _log_ratio(logp, ref_logp) ** 2 / 2


def kl_k3(logp: Array, ref_logp: Array) -> jax.Array:
    """exp(-d) - 1 + d. Value: unbiased, never negative. Gradient: that of KL(reference, policy).

    GRPO 2402.03300 eq. 4. Any shape, both the same.
    """
    d = _log_ratio(logp, ref_logp)
    # expm1 keeps the digits that 1 would swallow near d = 0.
    return jnp.expm1(bounded(-d)) + d


def kl_exact(logp_V: Array, ref_logp_V: Array) -> jax.Array:
    """sum_v p_v (log p_v - log q_v) over the last axis ("full"): value and gradient exact.

    logp_V, ref_logp_V: normalised log-probs of the policy and the reference, any leading axes,
    both the same shape. A token of policy probability 0 (-inf) counts 0. Returns leading axes.
    """
    logp_V, ref_logp_V = floating(logp_V), floating(ref_logp_V)
    chex.assert_equal_shape([logp_V, ref_logp_V])
    # Where the policy has no mass the difference may be inf - inf; the product must not see it.
    d_V = jnp.where(logp_V > -jnp.inf, logp_V - ref_logp_V, 0)
    return jnp.sum(jnp.exp(logp_V) * d_V, axis=-1)


def bounded(exponent: jax.Array) -> jax.Array:
    """The exponent up to 80, with gradient 0 beyond."""
    return jnp.minimum(exponent, LARGEST_EXPONENT)


def _log_ratio(logp: Array, ref_logp: Array) -> jax.Array:
    logp, ref_logp = floating(logp), floating(ref_logp)
    chex.assert_equal_shape([logp, ref_logp])
    return logp - ref_logp
