"""The keys and values that a decoder has made, so that it makes them once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax.parallel import over_rows
from dpo_jax.structs import Array


@struct.dataclass
class Cache:
    """Keys and values of S places, those of a head together, as products read them: an array for
    each layer where layers run one after another, one for all, with L in front, where they run in a
    loop. `index` is the first free place."""

    k_RJSE: tuple[jax.Array, ...]
    v_RJSE: tuple[jax.Array, ...]
    until_RS: jax.Array
    position_RS: jax.Array
    index: jax.Array


def dealt(
    cache: Cache, row_R: Array, start_R: Array, length_R: Array, *, width: int, places: int
) -> Cache:
    """A cache of `places` places with a row for every prompt, of one whose rows hold several.

    row_R, start_R, length_R: where a prompt stands; its row is counted on the device that has it,
    and the new row will be there too. The first `width` places are for prompts, behind them is
    room; the old cache has as many places to spare behind its tokens.
    """
    place_RS = jnp.arange(places, dtype=jnp.int32)[None, :]
    there_RS = place_RS < jnp.asarray(length_R)[:, None]
    stacked = cache.k_RJSE[0].ndim == 5  # L leads

    def own(_: None, arrays: Any, row_R: jax.Array, start_R: jax.Array) -> Any:
        return jax.tree.map(
            lambda x: jax.vmap(partial(_cut, x, width, places))(row_R, start_R), arrays
        )

    def turned(arrays: Any) -> Any:
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), arrays) if stacked else arrays

    found = over_rows(own, None, turned((cache.k_RJSE, cache.v_RJSE)), row_R, start_R)
    k_RJSE, v_RJSE = turned(found)
    until_RS = jnp.where(there_RS, places, 0)  # 0: nobody sees it
    position_RS = jnp.where(there_RS, place_RS, 0)
    return Cache(k_RJSE, v_RJSE, until_RS, position_RS, jnp.int32(width))


def _cut(x: jax.Array, width: int, places: int, row: jax.Array, start: jax.Array) -> jax.Array:
    """`width` places of a row from `start` on, and room behind them: the last axis but one."""
    starts = [jnp.int32(0)] * (x.ndim - 1)
    piece = jax.lax.dynamic_slice(
        x, [row, *starts[1:-1], start, starts[-1]], [1, *x.shape[1:-2], width, x.shape[-1]]
    )[0]
    return jnp.pad(piece, [(0, 0)] * (piece.ndim - 2) + [(0, places - width), (0, 0)])
