"""How token log-probs become the log-prob of a response: what `preference(score=...)` takes.

A score is a function (x_RN, batch) -> x_RGK, linear in x_RN; policy and reference go through the
same one. One that compares the responses of a group declares how many with `needs(responses=...)`.
The plain sum is `logprobs.per_response`.
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.logprobs import per_response, response_lengths
from dpo_jax.losses.measure import per_token
from dpo_jax.losses.needs import needs
from dpo_jax.structs import Array, BadInput, Batch


def length_normalized(x_RN: Array, batch: Batch) -> jax.Array:
    """The mean over the response's tokens, which gives every loss its length-normalised form."""
    return per_token(per_response(x_RN, batch), response_lengths(batch))


@needs(responses=2)
def length_desensitized(x_RN: Array, batch: Batch, *, alpha: Array | float = 0.5) -> jax.Array:
    """LD-DPO, Liu et al. 2409.06411 eq. 9: tokens behind the shorter response's length count less.

        sum_{t <= m} x_t + alpha sum_{t > m} x_t,   m = min(len_w, len_l)

    alpha = 1 is the plain sum, alpha = 0 cuts both to the same length. Takes pairs, K = 2.
    """
    K = batch.end_RGK.shape[2]
    if K != 2:
        raise BadInput(f"scores.length_desensitized compares 2 lengths, the data has {K} a prompt")
    shorter_RG = jnp.min(response_lengths(batch), axis=-1)
    rest_RN = place_in_response(batch) >= _of_token(shorter_RG, batch)
    return per_response(jnp.where(rest_RN, alpha, 1.0) * x_RN, batch)


def place_in_response(batch: Batch) -> jax.Array:
    """How many scored tokens of its response stand before each scored token, place_RN."""
    slot_RN = jnp.asarray(batch.slot_RN)
    place_RN = jax.lax.broadcasted_iota(jnp.int32, slot_RN.shape, 1)
    new_RN = jnp.diff(slot_RN, axis=1, prepend=-2) != 0  # a response's tokens stand together
    return place_RN - jax.lax.cummax(jnp.where(new_RN, place_RN, 0), axis=1)


def _of_token(x_RG: jax.Array, batch: Batch) -> jax.Array:
    """The value of its group for every scored token, x_RN."""
    group_RN = jnp.maximum(batch.slot_RN, 0) // batch.end_RGK.shape[2]
    chex.assert_equal_shape_prefix([x_RG, group_RN], 1)
    return jnp.take_along_axis(x_RG, group_RN, axis=1)
