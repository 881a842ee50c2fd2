"""Which blocks of a row see each other: made of `until` alone, once a forward pass.

Letters: X blocks of queries and Y of keys in a row, Q and W the places of one.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


class Sizes(NamedTuple):
    """How large pieces are."""

    block: int  # places of a block, at most
    row: int  # places of a row that is one block, at most
    scores: int  # of a tile that takes several rows, at most; one row of one block may have more
    grain: int = 8  # places that the blocks of a row are a multiple of
    lone: int = 1  # and the block of a row that has one


# Small blocks follow the edges of groups and stay in the first caches of a CPU: on two cores of an
# EPYC 64 beat 128 and 256 on packed rows of 1024 to 4096. A TPU wants whole registers, and tiles of
# M heads in its vector memory. What a GPU likes was not measured.
SIZES = {"cpu": Sizes(64, 128, 2**18), "tpu": Sizes(256, 256, 2**18, grain=128, lone=128)}
LARGE = Sizes(512, 512, 2**26, grain=16)


@struct.dataclass
class Schedule:
    """The blocks of keys that every block of queries walks: the first `count` of `keys`."""

    keys_RXY: jax.Array  # int32, ascending; after the first `count` comes what is not walked
    count_RX: jax.Array  # int32, 1 or more
    blocks: tuple[int, int] = struct.field(pytree_node=False)  # Q, W


def sizes() -> Sizes:
    """Those of the platform."""
    return SIZES.get(platform(), LARGE)


def platform() -> str:
    """Of the devices of the mesh, which need not be here; without a mesh, of the backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def block_of(T: int) -> int:
    """Places of a block: a row of up to `sizes().row` is one, a longer one is cut evenly."""
    most, row, _, grain, lone = sizes()
    parts = 1 if T <= row else -(-T // most)
    grain = lone if parts == 1 else grain
    return -(-T // (parts * grain)) * grain


def whole(T: int, blocks: tuple[int, int]) -> int:
    """The least number of places from T on that blocks of both kinds divide."""
    return -(-T // math.lcm(*blocks)) * math.lcm(*blocks)


def filled(until_RT: jax.Array, places: int) -> jax.Array:
    """`until` of rows with padding, which sees itself alone, up to `places`."""
    R, T = until_RT.shape
    own_T = jnp.arange(T + 1, places + 1, dtype=until_RT.dtype)
    own_RT = jnp.broadcast_to(own_T[None, :], (R, places - T))
    return jnp.concatenate([until_RT, own_RT], axis=1)


def schedule(until_RT: jax.Array, blocks: tuple[int, int] | None = None) -> Schedule:
    """Exactly the pairs of blocks with a query q that sees a key k: k <= q < until[k].

    blocks: places of a block of queries and of keys, `block_of` the row's by default. Every place
    sees itself, until[k] > k; the diagonal is listed whatever `until` says. What only a window
    hides is listed too.
    """
    T = until_RT.shape[1]
    Q, W = blocks or (block_of(T), block_of(T))
    until_RT = filled(until_RT, whole(T, (Q, W)))
    R, T = until_RT.shape
    first_X, first_Y = jnp.arange(0, T, Q)[:, None], jnp.arange(0, T, W)[None, :]
    farthest_RY = jnp.max(until_RT.reshape(R, T // W, W), axis=-1)
    begun_XY, diagonal_XY = first_Y < first_X + Q, first_Y + W > first_X
    reaching_RXY = farthest_RY[:, None, :] > first_X[None]
    live_RXY = begun_XY[None] & (diagonal_XY[None] | reaching_RXY)
    keys_RXY = jnp.argsort(~live_RXY, axis=-1, stable=True).astype(jnp.int32)
    return Schedule(keys_RXY, jnp.sum(live_RXY, axis=-1, dtype=jnp.int32), (Q, W))
