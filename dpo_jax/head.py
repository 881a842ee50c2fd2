"""What the logits of scored tokens say, walked over in chunks: no rows x tokens x vocabulary array.

A chunk is as many tokens as LOGITS_AT_ONCE allows of this vocabulary, so the temporaries do not
grow with it. One pass gives every statistic; the backward pass keeps a few numbers a token and
makes the logits once more. With p the policy's distribution over logits z and q the reference's:

    d log p(t) / dz = [t] - p              d KL(q, p) / dz = p - q
    d H(p) / dz = -p (log p + H)           d KL(p, q) / dz = p (log p - log q - KL(p, q))

On a mesh every device walks over its own rows, and gradients are summed over devices once, behind
the walk; the logits of a chunk are parted along the vocabulary over the tensor axis.
The letter C counts the tokens of a chunk here, those of all rows on a line.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dpo_jax.parallel import over_rows, pinned, shards
from dpo_jax.structs import Array, Params, precise

LOGITS_AT_ONCE = 2**24  # elements of the logits that a device holds at a time


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
    """What a walk reads: weights and temperature are whole on every device, the rest is rows."""

    leaves: list[Any]
    ref_leaves: list[Any]
    temperature: Any
    hidden_RND: Any
    target_RN: Any
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
    *,
    reference: Side | None = None,
    wanted: Wanted,
    temperature: float | jax.Array = 1.0,
) -> Statistics:
    """The statistics of every token, float32 or better, each x_RN.

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
    return walk(policy.leaves, *fixed[:2], policy.hidden_RND, jnp.asarray(target_RN), fixed[2])


def _forward(plan: _Plan, given: _Operands) -> tuple[Statistics, _Kept]:
    def walked(whole: _Operands, rows: _Operands) -> tuple[Statistics, _Kept]:
        def one(carry: None, part: tuple[_Operands, None]):
            tokens, r_CV = part[0], None
            z_CV = _logits(plan.logits, whole.leaves, tokens.hidden_RND, whole.temperature)
            if plan.ref_logits is not None:
                read, hidden_CD = whole.ref_leaves, tokens.ref_hidden_RND
                r_CV = _logits(plan.ref_logits, read, hidden_CD, whole.temperature)
            return carry, _said(plan.wanted, tokens.target_RN, z_CV, r_CV)

        return _walk(one, plan.vocabulary, None, rows, None)[1]

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
        return _walk(one, plan.vocabulary, zeros, rows, slope)

    whole, rows = _parted(given)
    whole = (trained, frozen, whole)
    summed, slope_RND = over_rows(walked, whole, (rows, kept), slope, sums=True)
    summed = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), summed, trained)
    return summed, None, None, slope_RND, None, None


def _parted(given: _Operands) -> tuple[_Operands, _Operands]:
    """What is whole on every device, and what is rows."""
    whole = given._replace(hidden_RND=None, target_RN=None, ref_hidden_RND=None)
    return whole, given._replace(leaves=None, ref_leaves=None, temperature=None)


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


def _walk(one: Callable, vocabulary: int, carry: Any, rows: Any, slope: Any) -> Any:
    """one(carry, (tokens, slope)) over chunks of N, the tokens of all rows on a line; the carry at
    the end, and what it gave, as arrays that lead with RN.

    What stands behind the last token repeats it, with a slope of 0.
    """
    R, N = jax.tree.leaves(rows)[0].shape[:2]
    most = max(1, LOGITS_AT_ONCE // (R * -(-vocabulary // shards("V", vocabulary))))
    chunks = -(-N // most)
    size = -(-N // chunks)

    def cut(x_RN: jax.Array, mode: str) -> jax.Array:
        padding = [(0, 0), (0, chunks * size - N)] + [(0, 0)] * (x_RN.ndim - 2)
        padded = jnp.pad(x_RN, padding, mode=mode) if chunks * size > N else x_RN
        parts = jnp.moveaxis(padded.reshape(R, chunks, size, *x_RN.shape[2:]), 1, 0)
        return parts.reshape(chunks, R * size, *x_RN.shape[2:])

    def whole(parts: jax.Array) -> jax.Array:
        x_RN = jnp.moveaxis(parts.reshape(chunks, R, size, *parts.shape[2:]), 0, 1)
        return x_RN.reshape(R, chunks * size, *parts.shape[2:])[:, :N]

    tokens = jax.tree.map(lambda x: cut(x, "edge"), rows)
    slopes = jax.tree.map(lambda x: cut(x, "constant"), slope)
    carry, out = jax.lax.scan(one, carry, (tokens, slopes))
    return carry, jax.tree.map(whole, out)
