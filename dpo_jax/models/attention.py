"""Attention by the one rule: query q sees key k when k <= q < until[k]."""

import jax
import jax.numpy as jnp

NEVER = -1e30  # finite, so that a row of it stays finite


def visible(until_RS: jax.Array, queries: int, offset: jax.Array | int = 0) -> jax.Array:
    """The rule as a boolean mask_RTS; query t stands at place offset + t of the keys."""
    query_T = offset + jnp.arange(queries)
    key_S = jnp.arange(until_RS.shape[1])
    causal_TS = key_S[None, :] <= query_T[:, None]
    return causal_TS[None] & (query_T[None, :, None] < until_RS[:, None, :])


def dense(
    q_RTHE: jax.Array,
    k_RSJE: jax.Array,
    v_RSJE: jax.Array,
    until_RS: jax.Array,
    *,
    offset: jax.Array | int = 0,
) -> jax.Array:
    """Attention that holds every score: out_RTHE in the dtype of v, softmax in float32 or better.

    H query heads share J key/value heads, H / J each. Scale 1 / sqrt(E).
    """
    R, T, H, E = q_RTHE.shape
    J = k_RSJE.shape[2]
    grouped = q_RTHE.reshape(R, T, J, H // J, E)
    wide = jnp.promote_types(q_RTHE.dtype, jnp.float32)
    score = jnp.einsum("rtjhe,rsje->rjhts", grouped, k_RSJE, preferred_element_type=wide)
    mask_RTS = visible(until_RS, T, offset)
    score = jnp.where(mask_RTS[:, None, None], score * E**-0.5, NEVER)
    weight = jax.nn.softmax(score, axis=-1).astype(v_RSJE.dtype)
    return jnp.einsum("rjhts,rsje->rtjhe", weight, v_RSJE).reshape(R, T, H, E)


attention = dense
