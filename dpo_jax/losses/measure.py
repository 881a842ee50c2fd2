"""Measures: masks in, weights out. The only place in the house that divides by a count.

A measure takes the whole batch of one optimizer step, B rows of N scored tokens:
    mask_BN  0 = not scored; other values carry the weight of the example, alike on all its tokens
    slot_BN  which response of the row a token belongs to, -1 = unused; None = one response a row
and returns weight_BN, so that every mean is sum(weight_BN * x_BN). Nothing scored in the whole
batch: all weights are 0. Float32 or better; jit-able; a row, a group or a microbatch cannot
change a weight, only the whole batch can.
"""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses.door import floating
from dpo_jax.structs import Array

Measure = Callable[..., jax.Array]


def token_mean(mask_BN: Array, slot_BN: Array | None = None) -> jax.Array:
    """Every token of the batch weighs the same:  m_t / sum m."""
    mask_BN, _ = _used(mask_BN, slot_BN)
    return _normalized(mask_BN)


def sequence_mean(mask_BN: Array, slot_BN: Array | None = None) -> jax.Array:
    """Every response weighs the same, its tokens share equally:  (m_t / |y|) / sum_y m_y.

    |y| counts the scored tokens of the response, m_y is its weight (the mean of its m_t). A
    response without a scored token is not in the denominator.
    """
    mask_BN, slot_BN = _used(mask_BN, slot_BN)
    sorted_BN = jnp.sort(slot_BN, axis=1)
    first_BN = jax.vmap(partial(jnp.searchsorted, side="left"))(sorted_BN, slot_BN)
    after_BN = jax.vmap(partial(jnp.searchsorted, side="right"))(sorted_BN, slot_BN)
    return _normalized(per_token(mask_BN, after_BN - first_BN))


def fixed_length(n: Array | float) -> Measure:
    """The measure of Dr. GRPO (2503.20783 section 3.2):  m_t / (responses * n), n a constant.

    `responses` counts those with a scored token. Not renormalised: the weights sum to
    (mean length) / n, so that a token weighs the same in a short and in a long response.
    """
    return partial(_fixed_length, n=n)


def _fixed_length(mask_BN: Array, slot_BN: Array | None = None, *, n: Array | float) -> jax.Array:
    mask_BN, slot_BN = _used(mask_BN, slot_BN)
    # Sorted ids of a row rise once for every response that it holds.
    responses = jnp.sum(jnp.diff(jnp.sort(slot_BN, axis=1), axis=1, prepend=-1) > 0)
    return mask_BN / (jnp.maximum(responses, 1).astype(mask_BN.dtype) * n)


def per_token(x: Array, length: Array) -> jax.Array:
    """`x` divided by the token counts `length` of the same shape; where a count is 0, by 1."""
    x = floating(x)
    chex.assert_equal_shape([x, length])
    return x / jnp.maximum(floating(length), 1).astype(x.dtype)


def within(weight_B: Array, share: Array) -> jax.Array:
    """The measure of a class of groups: those of its weights in `weight_B` divided by `share`, what
    they sum to over the whole step; 0 for a class that is not there."""
    weight_B = floating(weight_B)
    return jnp.where(share > 0, weight_B / jnp.where(share > 0, share, 1), 0)


def _normalized(share_BN: jax.Array) -> jax.Array:
    total = jnp.sum(share_BN)
    return share_BN / jnp.where(total == 0, 1, total)


def _used(mask_BN: Array, slot_BN: Array | None) -> tuple[jax.Array, jax.Array]:
    """The mask without unused places, and the slots with -1 wherever nothing is scored."""
    mask_BN = floating(mask_BN)
    chex.assert_rank(mask_BN, 2)
    slot_BN = jnp.zeros(mask_BN.shape, jnp.int32) if slot_BN is None else jnp.asarray(slot_BN)
    chex.assert_equal_shape([mask_BN, slot_BN])
    mask_BN = jnp.where(slot_BN >= 0, mask_BN, 0)
    return mask_BN, jnp.where(mask_BN != 0, slot_BN, -1)
