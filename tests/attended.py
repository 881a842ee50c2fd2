"""Packed rows, what they attend with, and what comes of it: shared by the tests of attention."""

import jax
import jax.numpy as jnp
import numpy as np

PADDED = 2  # places at the end of every row that `rows` leaves as padding, or more


def rows(R: int, T: int, *, responses: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """until_RT and positions_RT of packed groups; the last row is padding alone."""
    rng = np.random.default_rng(seed)
    until_RT, position_RT = np.tile(np.arange(1, T + 1), (R, 1)), np.zeros((R, T), int)
    for r in range(R - 1):
        start = 0
        while True:
            prompt, *sizes = rng.integers(1, 2 + T // 6, 1 + responses)
            end = start + prompt + sum(sizes)
            if end > T - PADDED:
                break
            until_RT[r, start : start + prompt] = end
            position_RT[r, start : start + prompt] = np.arange(prompt)
            start += prompt
            for size in sizes:
                until_RT[r, start : start + size] = start + size
                position_RT[r, start : start + size] = prompt + np.arange(size)
                start += size
    return until_RT.astype(np.int32), position_RT.astype(np.int32)


def drawn(R: int, T: int, H: int, J: int, E: int, dtype="float32") -> list[jax.Array]:
    """q, k, v and the slope of what comes out."""
    rng = np.random.default_rng(7)
    return [jnp.asarray(rng.normal(size=(R, T, heads, E)), dtype) for heads in (H, J, J, H)]


def value_and_slopes(way, *arrays, **options) -> tuple[jax.Array, ...]:
    """What comes out and the slopes of q, k and v; arrays: q, k, v, slope, until."""

    @jax.jit
    def both(q, k, v, slope, until_RT):
        out, back = jax.vjp(lambda q, k, v: way(q, k, v, until_RT, **options), q, k, v)
        return out, *back(slope)

    return both(*arrays)


def live_by_force(until_RT: np.ndarray, Q: int, W: int) -> np.ndarray:
    """live_RXY: some query of block x sees some key of block y."""
    R, T = until_RT.shape
    place_T = np.arange(T)
    seen_RTS = (place_T[None, :] <= place_T[:, None])[None] & (
        place_T[None, :, None] < until_RT[:, None, :]
    )
    return seen_RTS.reshape(R, T // Q, Q, T // W, W).any(axis=(2, 4))
