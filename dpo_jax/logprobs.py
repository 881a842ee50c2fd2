"""From a batch to log-probabilities: the head runs on scored positions only, a chunk at a time.

`naive_token_logps` is the slow obvious version that the tests compare in value and gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, Batch, Model, Params, precise

# Compiler options of all that compares policy and reference: bfloat16 is rounded where the program
# says so and not where a fusion happens to end, so that equal weights have equal log-probs in the
# forward pass of a gradient and outside of it.
ROUNDED = {"xla_allow_excess_precision": False}
LOGITS_AT_ONCE = 2**24  # elements of the largest logits array that a chunk may hold


class TokenStatistics(NamedTuple):
    """What one pass of the head says of every scored token, float32, 0 where unused."""

    logp_RN: jax.Array  # log p(target)
    ref_logp_RN: jax.Array | None = None  # the reference's
    kl_RN: jax.Array | None = None  # KL(reference, policy) over the vocabulary, in nats
    policy_kl_RN: jax.Array | None = None  # KL(policy, reference)
    entropy_RN: jax.Array | None = None  # of the policy over the vocabulary, in nats
    readout_RN: jax.Array | None = None  # what a head of one column says of the state before it
    aligned_RN: jax.Array | None = None  # log p(target) - log sum_v p(v)^2, without gradient


def token_logps(
    model: Model, params: Params, batch: Batch, *, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """log p(target | what its source sees) of every scored token: logp_RN, float32, 0 where unused.

    No rows x tokens x vocabulary array exists: logits are made and dropped chunk by chunk, and
    made again in the backward pass. temperature divides the logits.
    """
    return token_statistics(model, params, batch, temperature=temperature).logp_RN


def token_statistics(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    reference: Params | None = None,
    aligned: bool = False,
    policy_kl: bool = False,
    entropy: bool = False,
    readout_D: Array | None = None,
    temperature: float | jax.Array = 1.0,
) -> TokenStatistics:
    """`token_logps` with what else the same hidden states and logits say.

    reference: weights whose log-probs and exact KL are wanted too; gradients stay with `params`.
    aligned: WPO's log-weight of every token (2406.11827 eq. 6). policy_kl: the KL the other way
    round too. readout_D: a vector whose product with every hidden state is wanted.
    """
    parts = [scored_hidden(model, params, batch)]
    if reference is not None:
        reference = jax.lax.stop_gradient(reference)
        parts.append(scored_hidden(model, reference, batch))

    def head(target_RC: jax.Array, hidden_RCD: jax.Array, *ref_RCD: jax.Array) -> TokenStatistics:
        logits_RCV = precise(model.unembed(params, hidden_RCD)) / temperature
        total_RC = jax.nn.logsumexp(logits_RCV, axis=-1)
        found = TokenStatistics(_picked(logits_RCV, target_RC) - total_RC)
        if aligned:
            square_RC = jax.nn.logsumexp(2 * logits_RCV, axis=-1) - 2 * total_RC
            found = found._replace(aligned_RN=jax.lax.stop_gradient(found.logp_RN - square_RC))
        if entropy:
            p_RCV = jnp.exp(logits_RCV - total_RC[..., None])
            found = found._replace(entropy_RN=total_RC - jnp.sum(p_RCV * logits_RCV, axis=-1))
        for ref_hidden_RCD in ref_RCD:
            ref_RCV = precise(model.unembed(reference, ref_hidden_RCD)) / temperature
            ref_RCV = jax.nn.log_softmax(ref_RCV)
            gap_RCV = ref_RCV - (logits_RCV - total_RC[..., None])
            found = found._replace(
                ref_logp_RN=_picked(ref_RCV, target_RC),
                kl_RN=jnp.sum(jnp.exp(ref_RCV) * gap_RCV, axis=-1),
            )
            if policy_kl:
                p_RCV = jnp.exp(logits_RCV - total_RC[..., None])
                found = found._replace(policy_kl_RN=-jnp.sum(p_RCV * gap_RCV, axis=-1))
        return found

    vocabulary = len(parts) * _vocabulary(model, params, parts[0])
    found = _chunked(head, vocabulary, jnp.asarray(batch.target_RN), *parts)
    if readout_D is not None:
        found = found._replace(readout_RN=readout(parts[0], readout_D))
    return jax.tree.map(lambda x_RN: jnp.where(batch.slot_RN >= 0, x_RN, 0.0), found)


def token_kls(model: Model, params: Params, reference: Params, batch: Batch) -> jax.Array:
    """KL(policy, reference) over the whole vocabulary at every scored token: kl_RN in nats.

    Summed over a response sampled from the policy, it is an unbiased estimate of the sequence KL
    whose variance is far below that of the log-ratio.
    """
    hidden_RND = scored_hidden(model, params, batch)
    anchor_RND = scored_hidden(model, reference, batch)

    def kls(hidden_RCD: jax.Array, anchor_RCD: jax.Array) -> jax.Array:
        logp_RCV = jax.nn.log_softmax(precise(model.unembed(params, hidden_RCD)))
        ref_RCV = jax.nn.log_softmax(precise(model.unembed(reference, anchor_RCD)))
        return jnp.sum(jnp.exp(logp_RCV) * (logp_RCV - ref_RCV), axis=-1)

    vocabulary = 2 * _vocabulary(model, params, hidden_RND)
    kl_RN = _chunked(kls, vocabulary, hidden_RND, anchor_RND)
    return jnp.where(batch.slot_RN >= 0, kl_RN, 0.0)


def response_logps(
    model: Model, params: Params, batch: Batch, *, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """Summed log-probability of every response: logp_RGK, float32, 0 where there is none."""
    return per_response(token_logps(model, params, batch, temperature=temperature), batch)


def per_response(x_RN: Array, batch: Batch) -> jax.Array:
    """Sums over the scored tokens of each response, x_RGK: row-local, so no mesh changes it."""
    R, G, K = batch.end_RGK.shape
    chex.assert_equal_shape([x_RN, batch.slot_RN])
    slot_RN = jnp.where(batch.slot_RN >= 0, batch.slot_RN, G * K)  # unused tokens fall off the end
    sums = jax.vmap(lambda x_N, slot_N: jax.ops.segment_sum(x_N, slot_N, G * K + 1))
    return sums(x_RN, slot_RN)[:, : G * K].reshape(R, G, K)


def response_lengths(batch: Batch) -> jax.Array:
    """Scored tokens of every response, length_RGK, float32."""
    return per_response(jnp.where(batch.slot_RN >= 0, 1.0, 0.0), batch)


def naive_token_logps(model: Model, params: Params, batch: Batch) -> jax.Array:
    """token_logps through the full logits of every place of every row."""
    hidden_RTD, _ = model.hidden(params, batch.tokens_RT, batch.positions_RT, batch.until_RT)
    logp_RTV = jax.nn.log_softmax(precise(model.unembed(params, hidden_RTD)))
    rows = jnp.arange(batch.target_RN.shape[0])[:, None]
    logp_RN = logp_RTV[rows, batch.source_RN, batch.target_RN]
    return jnp.where(batch.slot_RN >= 0, logp_RN, 0.0)


def scored_hidden(model: Model, params: Params, batch: Batch) -> jax.Array:
    """Hidden states of the places that predict scored tokens, hidden_RND."""
    R, T = batch.tokens_RT.shape
    chex.assert_shape([batch.positions_RT, batch.until_RT], (R, T))
    chex.assert_equal_shape([batch.target_RN, batch.source_RN, batch.slot_RN])
    hidden_RTD, _ = model.hidden(params, batch.tokens_RT, batch.positions_RT, batch.until_RT)
    return jax.vmap(lambda hidden_TD, source_N: hidden_TD[source_N])(hidden_RTD, batch.source_RN)


def readout(hidden_RND: jax.Array, readout_D: Array) -> jax.Array:
    """What a head of one column says of every hidden state, float32, x_RN."""
    # a product this small is not worth the rounding that accelerators have by default
    return jnp.einsum("rnd,d->rn", precise(hidden_RND), precise(readout_D), precision="highest")


def _picked(logits_RCV: jax.Array, target_RC: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_RCV, target_RC[:, :, None], axis=-1)[:, :, 0]


def _vocabulary(model: Model, params: Params, hidden_RND: jax.Array) -> int:
    return jax.eval_shape(model.unembed, params, hidden_RND[:, :1]).shape[-1]


def _chunked(head: Callable, vocabulary: int, *inputs: jax.Array) -> Any:
    """head over chunks of N, recomputed in the backward pass; rows stay where they are sharded."""
    R, N = inputs[0].shape[:2]
    size = max(1, min(N, LOGITS_AT_ONCE // (R * vocabulary)))
    if size == N:
        return jax.checkpoint(head)(*inputs)
    chunks = -(-N // size)

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, chunks * size - N)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(R, chunks, size, *x.shape[2:]), 1, 0)

    step = jax.checkpoint(lambda _, parts: (None, head(*parts)))
    _, out = jax.lax.scan(step, None, tuple(cut(x) for x in inputs))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(R, chunks * size)[:, :N], out)
