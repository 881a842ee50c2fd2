"""Attention by the one rule: query q sees key k when k <= q < until[k].

Where a layer has a window, the positions must be near as well: position[q] - position[k] < window.
Places are not positions: of two responses behind one prompt, the second stands further away in the
row and is as near.

`attention` is what the decoder calls for whole rows. `dense` holds every score: it is the slow
obvious version that the tests and `self_test` compare with, and it reads the cache of sampling,
where one token a row asks.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.schedule import sizes
from dpo_jax.models.walk import NEVER, walk, way
from dpo_jax.structs import precise


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


attention = walk


def in_use(dtype: str) -> str:
    """The name of what `attention` runs on this backend, on accelerators after the self-test.

    On a CPU the test suite is the self-test: every start would take half a second more, and seconds
    where nothing is compiled yet. dtype: of the computation. Raises: RuntimeError.
    """
    if jax.default_backend() != "cpu":
        self_test(dtype)
    return way().name


@lru_cache(maxsize=8)
def self_test(dtype: str) -> None:
    """Compares `attention` with `dense` on this backend, in value and gradient, on packed rows of
    several blocks, plain and with a window and a soft cap. Raises: RuntimeError where they differ.
    """
    backend = jax.default_backend()
    # accelerators round what products read, to bfloat16 or nearly
    close = 1e-4 if backend == "cpu" and dtype != "bfloat16" else 3e-2
    worst = max(jax.device_get(_differences(dtype)))
    if not worst < close:
        raise RuntimeError(
            f"attention {way().name} on {backend} in {dtype} is off the dense reference by "
            f"{worst:.1e} of its norm, {close:.0e} is allowed: jax {jax.__version__} computes it "
            "wrongly here. Another version of jax, or of its plugin or driver, may do better"
        )


def _differences(dtype: str) -> list[jax.Array]:
    """Norms of what differs, of the value and of three gradients, over the norms of `dense`."""
    R, H, J, E = 2, 4, 2, 16
    T = 2 * sizes().block + 40
    # groups of a prompt of 20 and responses of 25 and the rest, cut off at the end of the row
    group_R1 = np.array([[60], [77]])
    at_RT = np.arange(T)[None, :] % group_R1
    first_RT = (at_RT >= 20) & (at_RT < 45)
    until_RT = np.arange(T)[None, :] - at_RT + np.where(first_RT, 45, group_R1)
    until_RT = np.minimum(until_RT, T)
    position_RT = np.where(at_RT < 45, at_RT, at_RT - 25)

    @jax.jit  # of host arrays, which are the same to every process
    def compared(until_RT: jax.Array, position_RT: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = ((R, T, heads, E) for heads in (H, J, J, H))
        q, k, v, slope = map(partial(jax.random.normal, dtype=dtype), keys, shapes)

        def of(way: Callable[..., jax.Array], **options: Any) -> list[jax.Array]:
            out, back = jax.vjp(lambda q, k, v: way(q, k, v, until_RT, **options), q, k, v)
            return [precise(x) for x in (out, *back(slope))]

        found = []
        for options in ({}, {"window": 30, "softcap": 2.0, "positions": (position_RT,) * 2}):
            pairs = zip(of(attention, **options), of(dense, **options), strict=True)
            found += [jnp.linalg.norm(x - y) / jnp.linalg.norm(y) for x, y in pairs]
        return found

    return compared(until_RT.astype(np.int32), position_RT.astype(np.int32))
