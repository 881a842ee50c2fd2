"""Attention by the one rule: query q sees key k when k <= q < until[k].

Where a layer has a window, the positions must be near as well: position[q] - position[k] < window.
Places are not positions: of two responses behind one prompt, the second stands further away in the
row and is as near.
"""

import jax
import jax.numpy as jnp

NEVER = -1e30  # finite, so that a row of it stays finite


def visible(
    until_RS: jax.Array,
    queries: int,
    offset: jax.Array | int = 0,
    *,
    window: jax.Array | int | None = None,
    positions: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The rule as a boolean mask_RTS; query t stands at place offset + t of the keys."""
    query_T = offset + jnp.arange(queries)
    key_S = jnp.arange(until_RS.shape[1])
    causal_TS = key_S[None, :] <= query_T[:, None]
    seen_RTS = causal_TS[None] & (query_T[None, :, None] < until_RS[:, None, :])
    if window is None:
        return seen_RTS
    if positions is None:
        raise ValueError("a window counts positions: give (position_RT, position_RS)")
    position_RT, position_RS = positions
    return seen_RTS & (position_RT[:, :, None] - position_RS[:, None, :] < window)


def dense(
    q_RTHE: jax.Array,
    k_RSJE: jax.Array,
    v_RSJE: jax.Array,
    until_RS: jax.Array,
    *,
    offset: jax.Array | int = 0,
    window: jax.Array | int | None = None,
    positions: tuple[jax.Array, jax.Array] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention that holds every score: out_RTHE in the dtype of v, softmax in float32 or better.

    H query heads share J key/value heads, H / J each. window: may be traced, and wants positions,
    (position_RT, position_RS) of queries and keys. softcap: scores become cap * tanh(score / cap)
    (Gemma 2, 2408.00118, section 2). scale: 1 / sqrt(E) by default.
    """
    R, T, H, E = q_RTHE.shape
    J = k_RSJE.shape[2]
    grouped = q_RTHE.reshape(R, T, J, H // J, E)
    wide = jnp.promote_types(q_RTHE.dtype, jnp.float32)
    score = jnp.einsum("rtjhe,rsje->rjhts", grouped, k_RSJE, preferred_element_type=wide)
    score = score * (E**-0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    mask_RTS = visible(until_RS, T, offset, window=window, positions=positions)
    score = jnp.where(mask_RTS[:, None, None], score, NEVER)
    weight = jax.nn.softmax(score, axis=-1).astype(v_RSJE.dtype)
    return jnp.einsum("rjhts,rsje->rtjhe", weight, v_RSJE).reshape(R, T, H, E)


attention = dense
