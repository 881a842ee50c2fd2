"""The places of a row whose hidden states someone reads: behind the last layer's keys and values,
only they are computed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.structs import at_places


class Asked(NamedTuple):
    """n distinct places of every row, those asked for first, and where each stands among them.

    `take` and `spread` are each other's transpose, so that both ways are gathers: no scatter.
    """

    place_Rn: jax.Array
    rank_RT: jax.Array  # n and more: left out


def distinct(at_RN: jax.Array, T: int) -> tuple[Asked, jax.Array]:
    """The distinct places of at_RN in rows of T, and index_RN: at_RN = place_Rn[index_RN]."""
    N = at_RN.shape[1]
    wanted_RT = jax.vmap(lambda at_N: jnp.zeros(T, bool).at[at_N].set(True))(at_RN)
    order_RT = jnp.argsort(~wanted_RT, axis=1, stable=True)
    rank_RT = jnp.argsort(order_RT, axis=1)
    return Asked(order_RT[:, : min(N, T)], rank_RT), at_places(rank_RT, at_RN)


def take(x_RT: jax.Array, these: Asked | None) -> jax.Array:
    """x_Rn...: what stands at the places; x itself where all are asked for."""
    return x_RT if these is None else _taken(x_RT, these)


def spread(x_Rn: jax.Array, these: Asked | None) -> jax.Array:
    """x_RT...: every row of x at its place, 0 elsewhere; x itself where all are asked for."""
    return x_Rn if these is None else _spread(x_Rn, these)


@jax.custom_vjp
def _taken(x_RT: jax.Array, these: Asked) -> jax.Array:
    return at_places(x_RT, these.place_Rn)


@jax.custom_vjp
def _spread(x_Rn: jax.Array, these: Asked) -> jax.Array:
    n = these.place_Rn.shape[1]
    x_RT = at_places(x_Rn, jnp.minimum(these.rank_RT, n - 1))
    there_RT = (these.rank_RT < n).reshape(*these.rank_RT.shape, *[1] * (x_Rn.ndim - 2))
    return jnp.where(there_RT, x_RT, 0)


_taken.defvjp(lambda x, to: (_taken(x, to), to), lambda to, g: (_spread(g, to), None))
_spread.defvjp(lambda x, to: (_spread(x, to), to), lambda to, g: (_taken(g, to), None))
