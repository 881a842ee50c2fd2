"""What the logits of scored tokens say, walked over in chunks: no rows x tokens x vocabulary array.

A device puts its tokens on a line, those that are used first, and walks over as many chunks as they
fill. A chunk has no more logits than LOGITS_AT_ONCE, so the temporaries do not grow with the
vocabulary. One pass gives every statistic; the backward pass keeps a few numbers a token and makes
the logits once more. With p the policy's distribution over logits z and q the reference's:

    d log p(t) / dz = [t] - p              d KL(q, p) / dz = p - q
    d H(p) / dz = -p (log p + H)           d KL(p, q) / dz = p (log p - log q - KL(p, q))

On a mesh every device walks over its own rows, and gradients are summed over devices once, behind
the walk; the logits of a chunk are parted along the vocabulary over the tensor axis.
The letter C counts the tokens of a chunk here, and P the places of all rows on a line.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from dpo_jax.parallel import over_rows, parts_of, pinned, shards
from dpo_jax.structs import Array, Params, precise

LOGITS_AT_ONCE = 2**25  # elements of the logits that a device holds at a time
LEAST = 1024  # tokens of a chunk that is one of several, where their logits have room


class Statistics(NamedTuple):
    """What the head says of every token; None where it was not asked."""

    logp: Any  # log p(target)
    ref_logp: Any = None  # log q(target)
    kl: Any = None  # KL(q, p) in nats
    policy_kl: Any = None  # KL(p, q) in nats
    entropy: Any = None  # H(p) in nats
    square: Any = None  # log sum_v p(v)^2


class Wanted(NamedTuple):
    """Which statistics of the policy are asked beside its log-probs; those of a reference, where
    there is one, are log q(target) and KL(q, p)."""

    policy_kl: bool = False
    entropy: bool = False
    square: bool = False


class Side(NamedTuple):
    """One model's way from hidden states to logits: the leaves of its weights that it reads."""

    logits: Callable[[Sequence[Array], jax.Array], jax.Array]  # (leaves, hidden_CD) -> logits_CV
    leaves: list[Array]
    hidden_RND: jax.Array
    vocabulary: int


class _Plan(NamedTuple):
    """What is known before anything is traced."""

    logits: Callable[[Sequence[Array], jax.Array], jax.Array]
    ref_logits: Callable[[Sequence[Array], jax.Array], jax.Array] | None
    wanted: Wanted
    vocabulary: int  # of all sides


class _Operands(NamedTuple):
    """What a walk reads: the first four are whole on every device, the rest is rows."""

    leaves: list[Any]
    ref_leaves: list[Any]
    temperature: Any
    most: Any  # tokens that are used on the device that uses most
    hidden_RND: Any
    target_RN: Any
    used_RN: Any
    ref_hidden_RND: Any


class _Kept(NamedTuple):
    """A few numbers a token, for the backward pass."""

    total: Any  # log sum exp of the logits
    ref_total: Any = None
    entropy: Any = None
    policy_kl: Any = None


def side(
    unembed: Callable[[Params, jax.Array], jax.Array], params: Params, hidden_RND: jax.Array
) -> Side:
    """The side of a model: which leaves `unembed` reads is found by tracing it."""
    leaves, tree = jax.tree.flatten(params)
    one_CD = jax.ShapeDtypeStruct((1, hidden_RND.shape[-1]), hidden_RND.dtype)
    traced = jax.make_jaxpr(unembed)(params, one_CD)
    equations, inputs = traced.jaxpr.eqns, traced.jaxpr.invars
    read = {id(x) for equation in equations for x in equation.invars}
    at = [i for i in range(len(leaves)) if id(inputs[i]) in read]
    kinds = [(x.shape, x.dtype) for x in leaves]

    def logits(read: Sequence[Array], hidden_CD: jax.Array) -> jax.Array:
        given: list[Any] = [jnp.zeros(*kind) for kind in kinds]  # what is not read is never made
        for i, leaf in zip(at, read, strict=True):
            given[i] = leaf
        return unembed(jax.tree.unflatten(tree, given), hidden_CD)

    return Side(logits, [leaves[i] for i in at], hidden_RND, traced.out_avals[0].shape[-1])


def statistics(
    policy: Side,
    target_RN: Array,
    used_RN: Array,
    *,
    reference: Side | None = None,
    wanted: Wanted,
    temperature: float | jax.Array = 1.0,
) -> Statistics:
    """The statistics of every token, float32 or better, each x_RN, 0 where used_RN is False.

    Places that are not used cost nothing but the rest of a last chunk. Nothing that stands
    there is read, whatever it is: hidden states, targets, slopes of the statistics.
    temperature divides the logits of both sides. Gradients flow to the policy's weights and hidden
    states, through log p(target), the entropy and the KLs: not to the reference, the temperature
    or log sum p^2. Weights that are not differentiated cost nothing in the backward pass.
    """
    plan = _Plan(
        policy.logits,
        None if reference is None else reference.logits,
        wanted,
        policy.vocabulary + (0 if reference is None else reference.vocabulary),
    )
    walk = jax.custom_vjp(lambda *operands: _forward(plan, _Operands(*operands))[0])
    walk.defvjp(partial(_kept, plan), partial(_backward, plan), symbolic_zeros=True)
    ref_leaves, ref_hidden_RND = (None, None) if reference is None else reference[1:3]
    fixed = jax.lax.stop_gradient((ref_leaves, jnp.asarray(temperature, float), ref_hidden_RND))
    used_RN = jnp.asarray(used_RN, bool)
    tokens = policy.hidden_RND, jnp.asarray(target_RN), used_RN
    return walk(policy.leaves, *fixed[:2], _most(used_RN), *tokens, fixed[2])


def _forward(plan: _Plan, given: _Operands) -> tuple[Statistics, _Kept]:
    def walked(whole: _Operands, rows: _Operands) -> tuple[Statistics, _Kept]:
        def one(carry: None, part: tuple[_Operands, None]):
            tokens, r_CV = part[0], None
            z_CV = _logits(plan.logits, whole.leaves, tokens.hidden_RND, whole.temperature)
            if plan.ref_logits is not None:
                read, hidden_CD = whole.ref_leaves, tokens.ref_hidden_RND
                r_CV = _logits(plan.ref_logits, read, hidden_CD, whole.temperature)
            return carry, _said(plan.wanted, tokens.target_RN, z_CV, r_CV)

        return _walk(one, plan.vocabulary, (rows.used_RN, whole.most), None, rows, None)[1]

    return over_rows(walked, *_parted(given))


def _kept(plan: _Plan, *operands: Any) -> tuple[Statistics, Any]:
    """The statistics, and what the backward pass reads: leaves of the policy that are not
    differentiated stand apart from those that are."""
    values = jax.tree.map(lambda x: x.value, _Operands(*operands))
    out, kept = _forward(plan, values)
    trained = [x.value if x.perturbed else None for x in operands[0]]
    frozen = [None if x.perturbed else x.value for x in operands[0]]
    return out, (trained, frozen, values, kept)


def _backward(plan: _Plan, residuals: Any, slope: Statistics) -> tuple[Any, ...]:
    trained, frozen, given, kept = residuals
    slope = Statistics(*(None if isinstance(x, SymbolicZero) else x for x in slope))
    compared = slope.kl is not None or slope.policy_kl is not None

    def walked(whole: Any, rows: Any, slope: Statistics):
        trained, frozen, given = whole

        def one(summed: list[Any], part: Any):
            (tokens, kept), slope = part
            r_CV = None
            if compared and plan.ref_logits is not None:
                read, hidden_CD = given.ref_leaves, tokens.ref_hidden_RND
                r_CV = _logits(plan.ref_logits, read, hidden_CD, given.temperature)

            def logits(trained: list[Any], hidden_CD: jax.Array) -> jax.Array:
                pairs = zip(trained, frozen, strict=True)
                leaves = [other if leaf is None else leaf for leaf, other in pairs]
                return _logits(plan.logits, leaves, hidden_CD, given.temperature)

            z_CV, back = jax.vjp(logits, trained, tokens.hidden_RND)
            own, slope_CD = back(_slope(slope, kept, tokens.target_RN, z_CV, r_CV))
            return jax.tree.map(lambda total, x: total + x, summed, own), slope_CD

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, precise(x[:0]).dtype), trained)
        line = rows[0].used_RN, given.most
        return _walk(one, plan.vocabulary, line, zeros, rows, slope)

    whole, rows = _parted(given)
    whole = (trained, frozen, whole)
    summed, slope_RND = over_rows(walked, whole, (rows, kept), slope, sums=True)
    summed = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), summed, trained)
    return summed, None, None, None, slope_RND, None, None, None


def _parted(given: _Operands) -> tuple[_Operands, _Operands]:
    """What is whole on every device, and what is rows."""
    whole = given._replace(hidden_RND=None, target_RN=None, used_RN=None, ref_hidden_RND=None)
    return whole, given._replace(leaves=None, ref_leaves=None, temperature=None, most=None)


def _logits(
    unembed: Callable, leaves: Sequence[Array], hidden_CD: jax.Array, temperature: jax.Array
) -> jax.Array:
    logits_CV = precise(unembed(leaves, hidden_CD))
    return pinned(logits_CV / temperature.astype(logits_CV.dtype), "V")


def _said(
    wanted: Wanted, target_C: jax.Array, z_CV: jax.Array, r_CV: jax.Array | None
) -> tuple[Statistics, _Kept]:
    """The statistics of a chunk and what is kept of it."""
    total_C = jax.nn.logsumexp(z_CV, axis=-1)
    out = Statistics(_picked(z_CV, target_C) - total_C)
    kept = _Kept(total_C)
    logp_CV = z_CV - total_C[:, None]
    p_CV = jnp.exp(logp_CV)
    if wanted.square:
        out = out._replace(square=jax.nn.logsumexp(2 * z_CV, axis=-1) - 2 * total_C)
    if wanted.entropy:
        out = out._replace(entropy=-jnp.sum(_weighed(p_CV, logp_CV), axis=-1))
        kept = kept._replace(entropy=out.entropy)
    if r_CV is None:
        return out, kept
    ref_total_C = jax.nn.logsumexp(r_CV, axis=-1)
    ref_logp_CV = r_CV - ref_total_C[:, None]
    gap_CV = ref_logp_CV - logp_CV
    out = out._replace(
        ref_logp=_picked(r_CV, target_C) - ref_total_C,
        kl=jnp.sum(_weighed(jnp.exp(ref_logp_CV), gap_CV), axis=-1),
    )
    kept = kept._replace(ref_total=ref_total_C)
    if wanted.policy_kl:
        out = out._replace(policy_kl=-jnp.sum(_weighed(p_CV, gap_CV), axis=-1))
        kept = kept._replace(policy_kl=out.policy_kl)
    return out, kept


def _slope(
    slope: Statistics, kept: _Kept, target_C: jax.Array, z_CV: jax.Array, r_CV: jax.Array | None
) -> jax.Array:
    """The gradient with respect to the logits of a chunk, by the formulas above."""
    logp_CV = z_CV - kept.total[:, None]
    p_CV = jnp.exp(logp_CV)
    found_CV = jnp.zeros_like(z_CV)
    if slope.logp is not None:
        here_CV = jax.nn.one_hot(target_C, z_CV.shape[-1], dtype=z_CV.dtype)
        found_CV = slope.logp[:, None] * (here_CV - p_CV)
    if slope.entropy is not None:
        each_CV = _weighed(p_CV, logp_CV + kept.entropy[:, None])
        found_CV = found_CV - slope.entropy[:, None] * each_CV
    if r_CV is None:
        return found_CV
    ref_logp_CV = r_CV - kept.ref_total[:, None]
    if slope.kl is not None:
        found_CV = found_CV + slope.kl[:, None] * (p_CV - jnp.exp(ref_logp_CV))
    if slope.policy_kl is not None:
        each_CV = _weighed(p_CV, logp_CV - ref_logp_CV - kept.policy_kl[:, None])
        found_CV = found_CV + slope.policy_kl[:, None] * each_CV
    return found_CV


def _weighed(p_CV: jax.Array, x_CV: jax.Array) -> jax.Array:
    """p x, 0 where p is 0 and x may be infinite."""
    return jnp.where(p_CV > 0, p_CV * x_CV, 0.0)


def _picked(logits_CV: jax.Array, target_C: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]


def _most(used_RN: jax.Array) -> jax.Array:
    """How many tokens the device uses that uses most of its own; all devices walk as far, so that
    they meet where they send each other something."""
    own = used_RN.reshape(parts_of(used_RN.shape[0]), -1)
    return _of_members(jnp.max(jnp.sum(own, axis=1, dtype=jnp.int32)))


@custom_vmap
def _of_members(count: jax.Array) -> jax.Array:
    """Under vmap the most of all members: a loop whose turns differ between them would select,
    every turn, between the weights' slopes before and after it."""
    return count


@_of_members.def_vmap
def _most_of_members(size: int, batched: list[bool], count: jax.Array) -> tuple[jax.Array, bool]:
    return _of_members(jnp.max(count)), False


def _size(places: int, vocabulary: int) -> int:
    """Tokens of a chunk: few beside all places, so that the last one wastes little, and enough for
    products at full speed. All, where they have room: then XLA keeps the logits for the way back,
    which saves as much as a quarter of the places."""
    room = max(1, LOGITS_AT_ONCE // -(-vocabulary // shards("V", vocabulary)))
    most = places if places <= room else min(room, max(LEAST, places // 16))
    return -(-places // -(-places // most))


def _walk(one: Callable, vocabulary: int, line: Any, carry: Any, rows: Any, slope: Any) -> Any:
    """one(carry, (tokens, slope)) over chunks of the tokens that are used; the carry at the end,
    and what it gave, as arrays that lead with RN, 0 where a token is not used.

    line: (used_RN, most). What stands behind the last token that is used repeats it, with a slope
    of 0.
    """
    (R, N), (used_RN, most) = line[0].shape, line
    size = _size(R * N, vocabulary)
    chunks = -(-R * N // size)
    turns = (most + size - 1) // size
    used_P = used_RN.reshape(-1)
    count = jnp.sum(used_P, dtype=jnp.int32)
    order_P = jnp.argsort(~used_P, stable=True)

    def cut(i: jax.Array) -> Any:
        at_C = i * size + jnp.arange(size, dtype=jnp.int32)
        place_C = jnp.take(order_P, jnp.minimum(at_C, count - 1), mode="clip")

        def taken(x_RN: jax.Array) -> jax.Array:
            x_P = x_RN.reshape(R * N, *x_RN.shape[2:])
            return jnp.take(x_P, place_C, axis=0, mode="clip")

        slopes = jax.tree.map(lambda x_RN: jnp.where(at_C < count, taken(x_RN), 0.0), slope)
        return jax.tree.map(taken, rows), slopes

    def left(state: Any) -> jax.Array:
        return (state[0] < turns) & (state[0] < chunks)  # the second says how many at the most

    def turn(state: Any) -> Any:
        i, before, made = state
        after, out = one(before, cut(i))
        # a device that uses no token keeps step with the others
        after = jax.tree.map(lambda new, old: jnp.where(count > 0, new, old), after, before)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
        return i + 1, after, jax.tree.map(put, made, out)

    rank_P = jnp.cumsum(used_P) - 1

    def laid(x_P: jax.Array) -> jax.Array:
        x_RN = jnp.take(x_P, rank_P, axis=0, mode="clip").reshape(R, N, *x_P.shape[1:])
        return jnp.where(used_RN.reshape(R, N, *[1] * (x_RN.ndim - 2)), x_RN, 0.0)

    kinds = jax.eval_shape(lambda i: one(carry, cut(i))[1], jnp.int32(0))
    made = jax.tree.map(lambda x: jnp.zeros((chunks * size, *x.shape[1:]), x.dtype), kinds)
    state = (jnp.int32(0), carry, made)
    _, carry, made = turn(state) if chunks == 1 else jax.lax.while_loop(left, turn, state)
    return carry, jax.tree.map(laid, made)
