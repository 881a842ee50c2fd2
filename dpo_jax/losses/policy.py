"""Losses of policy gradients: arrays of one shape in, one unreduced value an element out.

Elements are tokens or whole responses, as the caller's log-probs are. Less is better. What was
fixed when the responses were sampled (advantages, old log-probs, old values, returns) carries no
gradient. Float32 or better inside and out, whatever comes in.
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses.divergence import LARGEST_EXPONENT
from dpo_jax.losses.door import floating
from dpo_jax.structs import Array


def reinforce(logp: Array, advantage: Array) -> jax.Array:
    """The score-function estimate, Williams 1992.

        -advantage logp

    Its mean over samples of the policy has the gradient of minus the expected advantage; its
    value means nothing. Any shape, both the same.
    """
    logp, advantage = floating(logp), _still(advantage)
    chex.assert_equal_shape([logp, advantage])
    return -advantage * logp


def clipped_surrogate(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    *,
    low: Array | float = 0.2,
    high: Array | float = 0.2,
    dual: Array | float | None = None,
) -> jax.Array:
    """The clipped objective of PPO, Schulman et al. 1707.06347 eq. 7, as a loss.

        max(-A r, -A clip(r, 1 - low, 1 + high)),   r = exp(logp - old_logp),   A = advantage

    Where the ratio r has left the trust region on the side that A favours, value and gradient
    stop. high above low: clip-higher of DAPO (2503.14476). dual: where A < 0 the loss is at most
    -dual A, with gradient 0 beyond (dual clip, 1912.09729, dual > 1); None = no bound.
    Any shape, all the same. The exponent of r stops at 80. At r = 1 the gradient is `reinforce`'s.
    """
    logp, old_logp, advantage = floating(logp), _still(old_logp), _still(advantage)
    chex.assert_equal_shape([logp, old_logp, advantage])
    # in full precision before they are added to 1
    low, high = jnp.asarray(low, logp.dtype), jnp.asarray(high, logp.dtype)
    ratio = jnp.exp(jnp.minimum(logp - old_logp, LARGEST_EXPONENT))
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
    if dual is None:
        return loss
    return jnp.where(advantage < 0, jnp.minimum(loss, -dual * advantage), loss)


def clipped_value(
    value: Array, old_value: Array, return_: Array, *, clip: Array | float
) -> jax.Array:
    """The value loss of PPO with a trust region, as in OpenAI's baselines.

        max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2

    R = return_, old = the value when the response was sampled. Any shape, all the same.
    """
    value, old_value, return_ = floating(value), _still(old_value), _still(return_)
    chex.assert_equal_shape([value, old_value, return_])
    near = jnp.clip(value, old_value - clip, old_value + clip)
    return jnp.maximum((value - return_) ** 2, (near - return_) ** 2) / 2


def _still(x: Array) -> jax.Array:
    return jax.lax.stop_gradient(floating(x))
