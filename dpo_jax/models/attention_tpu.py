"""The walk as Pallas kernels for TPUs: forwards, and backwards once for queries and once for keys.

A step of the grid is a pair of blocks that see each other, of one row and one key/value head; the M
query heads of it stand side by side in the tile. Scores are held transposed, [W, MQ]: what belongs
to a query, its maximum, sum and mean, is then a row of lanes. Letters as in walk.py, and P pairs of
blocks; blocks are multiples of 128 places.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dpo_jax.models.walk import NEVER, Inputs, Kept, Rule, Seen, Slopes
from dpo_jax.structs import precise

QUERY_AT, KEY_AT, BLOCKS = 18, 4, 2**14  # where the blocks of a pair stand in its bits
FIRST, LAST, LIVE = 1, 2, 4  # of its block of queries, or of keys; not there to fill the list

Ref = Any  # memory of the chip


def forwards(rule: Rule, arrays: Inputs, *, interpret: bool = False) -> Seen:
    """`walk.forwards` on a TPU; interpret: on anything, slowly."""
    (R, J, M, T, E), (Q, _) = arrays.q_RJMTE.shape, rule.blocks
    made = (
        jax.ShapeDtypeStruct((R, J, M, T, E), arrays.q_RJMTE.dtype),
        jax.ShapeDtypeStruct((R, J, M, T), jnp.float32),
    )
    scratch = [(1, M * Q), (1, M * Q), (E, M * Q)]
    return Seen(*_call(_forwards, rule, arrays, (), made, scratch, False, interpret))


def backwards(rule: Rule, kept: Kept, *, interpret: bool = False) -> Slopes:
    """`walk.backwards` on a TPU; interpret: on anything, slowly."""
    arrays, (out_RJMTE, lse_RJMT), slope_RJMTE = kept
    (_, _, M, _, E), (Q, W) = arrays.q_RJMTE.shape, rule.blocks
    mean_RJMT = jnp.sum(precise(slope_RJMTE) * precise(out_RJMTE), axis=-1)
    more = (slope_RJMTE, lse_RJMT, mean_RJMT)
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:3])
    queries = _call(_of_queries, rule, arrays, more, (q,), [(E, M * Q)], False, interpret)
    keys = _call(_of_keys, rule, arrays, more, (k, v), [(W, E)] * 2, True, interpret)
    return Slopes(*queries, *keys)


def pairs(arrays: Inputs, blocks: tuple[int, int], by_key: bool) -> tuple[jax.Array, jax.Array]:
    """The pairs of every row, code_RP, those of one block of queries (by_key: of keys) together,
    and how many the longest row has. Behind a row's end its last pair stands again without flags.
    """
    (R, X, Y), (Q, W) = arrays.keys_RXY.shape, blocks
    P = sum(min(Y, -(-(x + 1) * Q // W)) for x in range(X))  # those that are causal
    live = jnp.argsort(arrays.keys_RXY, axis=-1) < arrays.count_RX[..., None]
    flat = (live.swapaxes(1, 2) if by_key else live).reshape(R, X * Y)
    place_RP = jnp.argsort(~flat, axis=-1, stable=True)[:, :P].astype(jnp.int32)
    total_R1 = jnp.sum(flat, axis=-1, keepdims=True, dtype=jnp.int32)
    step_RP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None, :], (R, P))
    there_RP = step_RP < total_R1
    place_RP = jnp.where(there_RP, place_RP, jnp.take_along_axis(place_RP, total_R1 - 1, axis=1))
    major_RP, minor_RP = jnp.divmod(place_RP, X if by_key else Y)
    edge = major_RP[:, 1:] != major_RP[:, :-1]
    ends = jnp.ones((R, 1), bool)
    first_RP = jnp.concatenate([ends, edge], axis=1)
    last_RP = jnp.concatenate([edge, ends], axis=1) | (step_RP == total_R1 - 1)
    flags_RP = jnp.where(there_RP, LIVE + FIRST * first_RP + LAST * last_RP, 0)
    x_RP, y_RP = (minor_RP, major_RP) if by_key else (major_RP, minor_RP)
    code_RP = (x_RP << QUERY_AT) | (y_RP << KEY_AT) | flags_RP
    return code_RP.astype(jnp.int32), jnp.max(total_R1)


def _call(kernel, rule: Rule, arrays: Inputs, more, made, scratch, by_key: bool, interpret: bool):
    """A kernel over the grid of rows, key/value heads and pairs; `more`: what it reads beside."""
    (R, J, M, T, E), (Q, W) = arrays.q_RJMTE.shape, rule.blocks
    code_RP, steps = pairs(arrays, rule.blocks, by_key)
    P, windowed = code_RP.shape[1], arrays.window is not None

    def x(r, n, code):
        return code[r * P + n] >> QUERY_AT

    def y(r, n, code):
        return (code[r * P + n] >> KEY_AT) % BLOCKS

    q_spec = pl.BlockSpec((None, None, M, Q, E), lambda r, j, n, c, w: (r, j, 0, x(r, n, c), 0))
    row_spec = pl.BlockSpec((None, None, M, Q), lambda r, j, n, c, w: (r, j, 0, x(r, n, c)))
    k_spec = pl.BlockSpec((None, None, W, E), lambda r, j, n, c, w: (r, j, y(r, n, c), 0))
    of_query = pl.BlockSpec((None, 1, Q), lambda r, j, n, c, w: (r, 0, x(r, n, c)))
    of_key = pl.BlockSpec((None, 1, W), lambda r, j, n, c, w: (r, 0, y(r, n, c)))
    by_shape = {(R, J, M, T, E): q_spec, (R, J, M, T): row_spec, (R, J, T, E): k_spec}
    seen, seen_specs = [arrays.until_RT[:, None]], [of_key]
    if arrays.position_RT is not None:
        seen += [arrays.position_RT[:, None]] * 2
        seen_specs += [of_query, of_key]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(R, J, steps),
        in_specs=[q_spec, k_spec, k_spec, *seen_specs, *(by_shape[each.shape] for each in more)],
        out_specs=[by_shape[each.shape] for each in made],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    window_1 = jnp.zeros(1, jnp.int32) if arrays.window is None else arrays.window[None]
    order = ("parallel", "parallel", "arbitrary")
    return pl.pallas_call(
        partial(kernel, _Tile(rule, P, windowed)),
        grid_spec=grid,
        out_shape=made,
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        interpret=interpret,
        name=f"attention{kernel.__name__}",
    )(code_RP.reshape(-1), window_1, *arrays[:3], *seen, *more)


class _Tile:
    """One step of the grid: what the list says of it, and its scores."""

    def __init__(self, rule: Rule, P: int, windowed: bool):
        self.rule, self.P, self.windowed = rule, P, windowed

    def read(self, code: Ref, *refs: Ref):
        """(pair, refs of q, k, v and of what says who sees whom, the others)."""
        pair = code[pl.program_id(0) * self.P + pl.program_id(2)]
        split = 6 if self.windowed else 4
        return pair, refs[:split], refs[split:]

    def scores(self, pair, window: Ref, q, refs) -> tuple[jax.Array, jax.Array | float]:
        """Scores [W,MQ] of queries [MQ,E], and what the cap bends them by."""
        (Q, W), M = self.rule.blocks, q.shape[0] // self.rule.blocks[0]
        score, bend = _product(refs[1][...], q, 1, 1) * self.rule.scale, 1.0
        if self.rule.softcap is not None:
            flat = jnp.tanh(score / self.rule.softcap)
            score, bend = self.rule.softcap * flat, 1 - flat * flat
        lane = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
        query = (pair >> QUERY_AT) * Q + jax.lax.rem(lane, jnp.full_like(lane, Q))
        key = jax.lax.broadcasted_iota(jnp.int32, score.shape, 0)
        key = key + ((pair >> KEY_AT) % BLOCKS) * W
        visible = (key <= query) & (query < _column(refs[3]))
        if self.windowed:
            place = jnp.concatenate([refs[4][...]] * M, axis=1)
            visible = visible & (place - _column(refs[5]) < window[0])
        return jnp.where(visible, score, NEVER), bend


def _forwards(tile: _Tile, code: Ref, window: Ref, *refs: Ref) -> None:
    pair, inputs, (out, lse, top, total, sum_EL) = tile.read(code, *refs)
    M, Q, E = inputs[0].shape

    @pl.when(pair & FIRST != 0)
    def _():
        top[...] = jnp.full_like(top, NEVER)
        total[...] = jnp.zeros_like(total)
        sum_EL[...] = jnp.zeros_like(sum_EL)

    @pl.when(pair & LIVE != 0)
    def _():
        v = inputs[2][...]
        score, _ = tile.scores(pair, window, inputs[0][...].reshape(M * Q, E), inputs)
        higher = jnp.maximum(top[...], jnp.max(score, axis=0, keepdims=True))
        weight, shrink = jnp.exp(score - higher), jnp.exp(top[...] - higher)
        total[...] = total[...] * shrink + jnp.sum(weight, axis=0, keepdims=True)
        sum_EL[...] = sum_EL[...] * shrink + _product(v, weight.astype(v.dtype), 0, 0)
        top[...] = higher

    @pl.when(pair & LAST != 0)
    def _():
        out[...] = (sum_EL[...] / total[...]).T.reshape(M, Q, E).astype(out.dtype)
        row = top[...] + jnp.log(total[...])
        for m in range(M):
            lse[m : m + 1, :] = row[:, m * Q : (m + 1) * Q]


def _slopes(tile: _Tile, pair, window: Ref, inputs, more):
    """Weights [W,MQ], the slopes of their scores, queries and the slopes of what came out."""
    (M, Q, E), (slope, lse, mean) = inputs[0].shape, more
    q, v = inputs[0][...].reshape(M * Q, E), inputs[2][...]
    slope = slope[...].reshape(M * Q, E)
    score, bend = tile.scores(pair, window, q, inputs)
    weight = jnp.exp(score - _lanes(lse))
    of_score = weight * (_product(v, slope, 1, 1) - _lanes(mean)) * (bend * tile.rule.scale)
    return weight.astype(q.dtype), of_score.astype(q.dtype), q, slope


def _of_queries(tile: _Tile, code: Ref, window: Ref, *refs: Ref) -> None:
    pair, inputs, (*more, dq, sum_EL) = tile.read(code, *refs)

    @pl.when(pair & FIRST != 0)
    def _():
        sum_EL[...] = jnp.zeros_like(sum_EL)

    @pl.when(pair & LIVE != 0)
    def _():
        _, of_score, _, _ = _slopes(tile, pair, window, inputs, more)
        sum_EL[...] += _product(inputs[1][...], of_score, 0, 0)

    @pl.when(pair & LAST != 0)
    def _():
        dq[...] = sum_EL[...].T.reshape(dq.shape).astype(dq.dtype)


def _of_keys(tile: _Tile, code: Ref, window: Ref, *refs: Ref) -> None:
    pair, inputs, (*more, dk, dv, of_k, of_v) = tile.read(code, *refs)

    @pl.when(pair & FIRST != 0)
    def _():
        of_k[...] = jnp.zeros_like(of_k)
        of_v[...] = jnp.zeros_like(of_v)

    @pl.when(pair & LIVE != 0)
    def _():
        weight, of_score, q, slope = _slopes(tile, pair, window, inputs, more)
        of_v[...] += _product(weight, slope, 1, 0)
        of_k[...] += _product(of_score, q, 1, 0)

    @pl.when(pair & LAST != 0)
    def _():
        dk[...] = of_k[...].astype(dk.dtype)
        dv[...] = of_v[...].astype(dv.dtype)


def _product(x: jax.Array, y: jax.Array, over_x: int, over_y: int) -> jax.Array:
    """A product of two matrices summed over an axis of each, in float32."""
    axes = (((over_x,), (over_y,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _column(ref: Ref) -> jax.Array:
    """A row of lanes [1,W] as a column [W,1]."""
    return jnp.broadcast_to(ref[...], (8, ref.shape[-1])).T[:, :1]


def _lanes(ref: Ref) -> jax.Array:
    """[M,Q] as a row of lanes [1,MQ]."""
    return jnp.concatenate([ref[m : m + 1, :] for m in range(ref.shape[0])], axis=1)
