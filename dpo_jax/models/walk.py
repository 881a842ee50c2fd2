"""Attention as a walk over the pairs of blocks that see each other, in plain XLA; on TPUs the
kernels of attention_tpu.py walk the same list.

Forwards an online softmax (Milakov and Gimelshein, 1805.02867); backwards the scores are made anew
from the logsumexp of every query (Dao et al., 2205.14135). Memory grows with T, time with the
pairs in the schedule. A row of one block is a walk of one pair: the same arithmetic, and a tile
then takes as many rows as `sizes().scores` has room for.

On a mesh every device walks its own rows and heads; heads that the tensor axis does not divide are
walked by all. Letters: X blocks of queries and Y of keys in a row, Q and W the places of one, M
query heads that share a key/value head. Arrays without letters are tiles of r rows: q [r,J,MQ,E],
k and v [r,J,W,E], scores [r,J,MQ,W].
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from dpo_jax.models.schedule import Schedule, filled, platform, schedule, sizes, whole
from dpo_jax.parallel import letters, partition
from dpo_jax.structs import precise

NEVER = -1e30  # finite, so that a row of it stays finite
SAVED = "attention"  # the name of what rematerialisation may keep instead of walking again
QUERIES, KEYS, PLACES = 3, 2, 1  # the axis of T in [R,J,M,T,...], in [R,J,T,E], in [R,T]


class Rule(NamedTuple):
    """What a walk is compiled for."""

    blocks: tuple[int, int]
    scale: float
    softcap: float | None


class Inputs(NamedTuple):
    """What a walk reads; positions and window are both there or neither is."""

    q_RJMTE: jax.Array
    k_RJTE: jax.Array
    v_RJTE: jax.Array
    keys_RXY: jax.Array
    count_RX: jax.Array
    until_RT: jax.Array
    position_RT: jax.Array | None
    window: jax.Array | None


class Seen(NamedTuple):
    """What a walk makes of it."""

    out_RJMTE: jax.Array
    lse_RJMT: jax.Array  # logsumexp of the scores of a query


class Kept(NamedTuple):
    """What the way back reads; slope: of what comes out."""

    arrays: Inputs
    seen: Seen
    slope_RJMTE: jax.Array


class Slopes(NamedTuple):
    """What it makes on the way back."""

    q_RJMTE: jax.Array
    k_RJTE: jax.Array
    v_RJTE: jax.Array


def walk(
    q_RTHE: jax.Array,
    k_RTJE: jax.Array,
    v_RTJE: jax.Array,
    until_RT: jax.Array,
    *,
    plan: Schedule | None = None,
    window: jax.Array | int | None = None,
    positions: tuple[jax.Array, jax.Array] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """`dense` where queries and keys are the same places: out_RTHE, without holding the scores.

    plan: `schedule(until_RT)`, where it is at hand. The gradient is that of q, k and v.
    """
    (R, T, H, E), J = q_RTHE.shape, k_RTJE.shape[2]
    plan = schedule(until_RT) if plan is None else plan
    if window is not None and positions is None:
        raise ValueError("a window counts positions: give (position_RT, position_RT)")
    places = whole(T, plan.blocks)

    def laid(x_RTHE: jax.Array, *heads: int) -> jax.Array:
        x_RTHE = jnp.pad(x_RTHE, ((0, 0), (0, places - T), (0, 0), (0, 0)))
        return jnp.moveaxis(x_RTHE.reshape(R, places, *heads, E), 1, -2)

    position_RT = near = None
    if window is not None and positions is not None:
        position_RT = jnp.pad(positions[0], ((0, 0), (0, places - T)))
        near = jnp.asarray(window, jnp.int32)
    arrays = Inputs(
        laid(q_RTHE, J, H // J),
        laid(k_RTJE, J),
        laid(v_RTJE, J),
        plan.keys_RXY,
        plan.count_RX,
        filled(until_RT, places),
        position_RT,
        near,
    )
    rule = Rule(plan.blocks, E**-0.5 if scale is None else scale, softcap)
    out_RTJME = jnp.moveaxis(_walked(rule, arrays), -2, 1)
    return out_RTJME[:, :T].reshape(R, T, H, E)


class Way(NamedTuple):
    """How a backend walks."""

    name: str
    forwards: Callable[[Rule, Inputs], Seen]
    backwards: Callable[[Rule, Kept], Slopes]


def way() -> Way:
    """The kernels of attention_tpu.py on TPUs, what is written here elsewhere."""
    if platform() == "tpu":
        from dpo_jax.models import attention_tpu

        return Way("pallas", attention_tpu.forwards, attention_tpu.backwards)
    return Way("walk", forwards, backwards)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walked(rule: Rule, arrays: Inputs) -> jax.Array:
    return _everywhere(partial(way().forwards, rule), arrays).out_RJMTE


def _begun(rule: Rule, arrays: Inputs) -> tuple[jax.Array, tuple[Inputs, Seen]]:
    seen = _everywhere(partial(way().forwards, rule), arrays)
    seen = Seen(*(checkpoint_name(x, SAVED) for x in seen))
    return seen.out_RJMTE, (arrays, seen)


def _returned(rule: Rule, kept: tuple[Inputs, Seen], slope_RJMTE: jax.Array) -> tuple[Inputs]:
    arrays, seen = kept
    back = _everywhere(partial(way().backwards, rule), Kept(arrays, seen, slope_RJMTE))
    return (Inputs(*back, *[None] * (len(arrays) - len(back))),)  # type: ignore[arg-type]


_walked.defvjp(_begun, _returned)


def forwards(rule: Rule, arrays: Inputs) -> Seen:
    """Query block by query block, each over the key blocks that it sees."""
    q_RJMTE, k_RJTE, v_RJTE = arrays[:3]
    (R, J, M, T, E), (Q, W) = q_RJMTE.shape, rule.blocks
    r, X, kind = _rows(rule, q_RJMTE), T // Q, precise(q_RJMTE).dtype

    def block(i: jax.Array, made: Seen) -> Seen:
        row, x = _block(i, r, X)
        q = _heads(_cut(q_RJMTE, QUERIES, row, x * Q, r, Q))

        def pair(n: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, sum_E = state
            y = _one(arrays.keys_RXY, row, x, n)
            k, v = (_cut(all_RJTE, KEYS, row, y * W, r, W) for all_RJTE in (k_RJTE, v_RJTE))
            score, _ = _scores(rule, arrays, q, k, row, x, y)
            # a query that sees no key of this block adds what its own key will multiply by 0
            higher = jnp.maximum(top, jnp.max(score, axis=-1))
            weight, shrink = jnp.exp(score - higher[..., None]), jnp.exp(top - higher)
            added = _product("rjqw,rjwe->rjqe", weight.astype(v.dtype), v)
            total = total * shrink + jnp.sum(weight, axis=-1)
            return higher, total, sum_E * shrink[..., None] + added

        none = jnp.zeros(q.shape[:-1], kind)
        state = (none + NEVER, none, jnp.zeros(q.shape, kind))
        top, total, sum_E = jax.lax.fori_loop(0, _pairs(rule, arrays, row, x), pair, state)
        out = (sum_E / total[..., None]).astype(q.dtype).reshape(r, J, M, Q, E)
        lse = (top + jnp.log(total)).reshape(r, J, M, Q)
        put = partial(_put, axis=QUERIES, row=row, place=x * Q)
        return Seen(put(made.out_RJMTE, out), put(made.lse_RJMT, lse))

    empty = Seen(jnp.zeros_like(q_RJMTE), jnp.zeros(q_RJMTE.shape[:-1], kind))
    return jax.lax.fori_loop(0, R // r * X, block, empty)


def backwards(rule: Rule, kept: Kept) -> Slopes:
    """The same walk; the slopes of keys and values grow where they lie."""
    arrays, (out_RJMTE, lse_RJMT), slope_RJMTE = kept
    q_RJMTE, k_RJTE, v_RJTE = arrays[:3]
    (R, J, M, T, E), (Q, W) = q_RJMTE.shape, rule.blocks
    r, X, kind = _rows(rule, q_RJMTE), T // Q, precise(q_RJMTE).dtype
    mean_RJMT = jnp.sum(precise(slope_RJMTE) * precise(out_RJMTE), axis=-1)

    def block(i: jax.Array, made: Slopes) -> Slopes:
        row, x = _block(i, r, X)
        reads = (q_RJMTE, slope_RJMTE, lse_RJMT, mean_RJMT)
        q, slope, lse, mean = (_heads(_cut(each, QUERIES, row, x * Q, r, Q)) for each in reads)

        def pair(n: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk_RJTE, dv_RJTE = state
            y = _one(arrays.keys_RXY, row, x, n)
            k, v = (_cut(all_RJTE, KEYS, row, y * W, r, W) for all_RJTE in (k_RJTE, v_RJTE))
            score, bend = _scores(rule, arrays, q, k, row, x, y)
            weight = jnp.exp(score - lse[..., None])
            of_weight = _product("rjqe,rjwe->rjqw", slope, v)
            of_score = weight * (of_weight - mean[..., None]) * (bend * rule.scale)
            weight, of_score = weight.astype(q.dtype), of_score.astype(q.dtype)
            dk = _product("rjqw,rjqe->rjwe", of_score, q)
            dv = _product("rjqw,rjqe->rjwe", weight, slope)
            dk_RJTE, dv_RJTE = (
                _put(all_RJTE, _cut(all_RJTE, KEYS, row, y * W, r, W) + new, KEYS, row, y * W)
                for all_RJTE, new in ((dk_RJTE, dk), (dv_RJTE, dv))
            )
            return dq + _product("rjqw,rjwe->rjqe", of_score, k), dk_RJTE, dv_RJTE

        state = (jnp.zeros(q.shape, kind), made.k_RJTE, made.v_RJTE)
        dq, *both = jax.lax.fori_loop(0, _pairs(rule, arrays, row, x), pair, state)
        dq = dq.astype(q.dtype).reshape(r, J, M, Q, E)
        return Slopes(_put(made.q_RJMTE, dq, QUERIES, row, x * Q), *both)

    empty = Slopes(*(jnp.zeros(x.shape, kind) for x in (q_RJMTE, k_RJTE, v_RJTE)))
    empty = empty._replace(q_RJMTE=jnp.zeros_like(q_RJMTE))
    back = jax.lax.fori_loop(0, R // r * X, block, empty)
    return Slopes(*(x.astype(like.dtype) for x, like in zip(back, arrays[:3], strict=True)))


def _scores(
    rule: Rule,
    arrays: Inputs,
    q: jax.Array,
    k: jax.Array,
    row: jax.Array,
    x: jax.Array,
    y: jax.Array,
) -> tuple[jax.Array, jax.Array | float]:
    """Scores of a tile, NEVER where a query does not see a key, and what the cap bends them by."""
    (Q, W), (r, J, MQ, _) = rule.blocks, q.shape
    score, bend = _product("rjqe,rjwe->rjqw", q, k) * rule.scale, 1.0
    if rule.softcap is not None:
        flat = jnp.tanh(score / rule.softcap)
        score, bend = rule.softcap * flat, 1 - flat * flat
    query_rQ1 = (x * Q + jnp.arange(Q))[None, :, None]
    key_r1W = (y * W + jnp.arange(W))[None, None, :]
    until_r1W = _cut(arrays.until_RT, PLACES, row, y * W, r, W)[:, None, :]
    visible = (key_r1W <= query_rQ1) & (query_rQ1 < until_r1W)
    if arrays.position_RT is not None and arrays.window is not None:
        query = _cut(arrays.position_RT, PLACES, row, x * Q, r, Q)[:, :, None]
        key = _cut(arrays.position_RT, PLACES, row, y * W, r, W)[:, None, :]
        visible &= query - key < arrays.window
    score = score.reshape(r, J, MQ // Q, Q, W)
    return jnp.where(visible[:, None, None], score, NEVER).reshape(r, J, MQ, W), bend


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=precise(x).dtype)


def _rows(rule: Rule, q_RJMTE: jax.Array) -> int:
    """Rows of a tile: several only where a row is one block, for their lists differ."""
    R, J, M, T, _ = q_RJMTE.shape
    if rule.blocks != (T, T):
        return 1
    room = max(1, sizes().scores // (J * M * T * T))
    return max(rows for rows in range(1, min(R, room) + 1) if R % rows == 0)


def _pairs(rule: Rule, arrays: Inputs, row: jax.Array, x: jax.Array) -> jax.Array | int:
    """How many blocks of keys a block of queries walks; known to the compiler where it is one."""
    return 1 if arrays.keys_RXY.shape[-1] == 1 else _one(arrays.count_RX, row, x)


def _block(i: jax.Array, r: int, X: int) -> tuple[jax.Array, jax.Array]:
    """The first row of the i-th of all blocks of r rows, X in a row, and its number there."""
    i, count = jnp.int32(i), jnp.int32(X)
    return jax.lax.div(i, count) * r, jax.lax.rem(i, count)  # plain, for i is not negative


def _heads(x: jax.Array) -> jax.Array:
    """[r,J,M,Q,...] as [r,J,MQ,...]."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _cut(x: jax.Array, axis: int, row: Any, place: Any, rows: int, places: int) -> jax.Array:
    """`places` places of `rows` rows from a row and a place on."""
    start, size = [0] * x.ndim, list(x.shape)
    start[0], start[axis], size[0], size[axis] = row, place, rows, places
    return _slice(x, start, size)


def _put(x: jax.Array, piece: jax.Array, axis: int, row: Any, place: Any) -> jax.Array:
    """x with a piece written where `_cut` would read it."""
    start = [0] * x.ndim
    start[0], start[axis] = row, place
    start = [jnp.int32(each) for each in start]
    return jax.lax.dynamic_update_slice(x, piece, start, allow_negative_indices=False)


def _one(x: jax.Array, *place: Any) -> jax.Array:
    """The scalar at a place."""
    return _slice(x, place, [1] * x.ndim).reshape(())


def _slice(x: jax.Array, start: Sequence[Any], size: Sequence[int]) -> jax.Array:
    """No start counts from the end: to look for that would be a kernel of its own for each."""
    start = [jnp.int32(each) for each in start]
    return jax.lax.dynamic_slice(x, start, size, allow_negative_indices=False)


def _everywhere(function: Callable[[Any], Any], arrays: Any) -> Any:
    """function(arrays) on every device of the mesh, with the rows and heads that are its own.

    Under vmap the members are so many more rows: no slice becomes a gather.
    """

    @custom_vmap
    def call(arrays: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(arrays)
        ways_in, ways_out = (
            jax.tree_util.tree_map_with_path(
                lambda path, leaf: partition(mesh, letters(path), leaf.shape), tree
            )
            for tree in (arrays, jax.eval_shape(function, arrays))
        )
        own = jax.shard_map(function, in_specs=(ways_in,), out_specs=ways_out, check_vma=False)
        return own(arrays)

    @call.def_vmap
    def members(size: int, batched: tuple[Any], arrays: Any) -> tuple[Any, Any]:
        def rows(leaf: jax.Array, own: bool) -> jax.Array:
            if leaf.ndim == own:  # the window
                assert not own, "a window is one of all rows"
                return leaf
            leaf = leaf if own else jnp.broadcast_to(leaf, (size, *leaf.shape))
            return leaf.reshape(-1, *leaf.shape[2:])

        found = call(jax.tree.map(rows, arrays, batched[0]))
        found = jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), found)
        return found, jax.tree.map(lambda leaf: True, found)

    return call(arrays)
