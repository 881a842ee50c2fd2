"""From a batch to log-probabilities: the head runs on scored positions only, a chunk at a time.

`naive_token_logps` is the slow obvious version that the tests compare in value and gradient.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, Batch, Model, Params

LOGITS_AT_ONCE = 2**24  # elements of the largest logits array that a chunk may hold


def token_logps(
    model: Model, params: Params, batch: Batch, *, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """log p(target | what its source sees) of every scored token: logp_RN, float32, 0 where unused.

    No rows x tokens x vocabulary array exists: logits are made and dropped chunk by chunk, and
    made again in the backward pass. temperature divides the logits.
    """
    hidden_RND = scored_hidden(model, params, batch)

    def logps(hidden_RCD: jax.Array, target_RC: jax.Array) -> jax.Array:
        logits_RCV = model.unembed(params, hidden_RCD).astype(jnp.float32) / temperature
        return _picked(logits_RCV, target_RC) - jax.nn.logsumexp(logits_RCV, axis=-1)

    vocabulary = _vocabulary(model, params, hidden_RND)
    logp_RN = _chunked(logps, vocabulary, hidden_RND, jnp.asarray(batch.target_RN))
    return jnp.where(batch.slot_RN >= 0, logp_RN, 0.0)


def token_kls(model: Model, params: Params, reference: Params, batch: Batch) -> jax.Array:
    """KL(policy, reference) over the whole vocabulary at every scored token: kl_RN in nats.

    Summed over a response sampled from the policy, it is an unbiased estimate of the sequence KL
    whose variance is far below that of the log-ratio.
    """
    hidden_RND = scored_hidden(model, params, batch)
    anchor_RND = scored_hidden(model, reference, batch)

    def kls(hidden_RCD: jax.Array, anchor_RCD: jax.Array) -> jax.Array:
        logp_RCV = jax.nn.log_softmax(model.unembed(params, hidden_RCD).astype(jnp.float32))
        ref_RCV = jax.nn.log_softmax(model.unembed(reference, anchor_RCD).astype(jnp.float32))
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
    logp_RTV = jax.nn.log_softmax(model.unembed(params, hidden_RTD).astype(jnp.float32))
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


def _picked(logits_RCV: jax.Array, target_RC: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_RCV, target_RC[:, :, None], axis=-1)[:, :, 0]


def _vocabulary(model: Model, params: Params, hidden_RND: jax.Array) -> int:
    return jax.eval_shape(model.unembed, params, hidden_RND[:, :1]).shape[-1]


def _chunked(head: Callable, vocabulary: int, *inputs: jax.Array) -> jax.Array:
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
    return jnp.moveaxis(out, 0, 1).reshape(R, chunks * size)[:, :N]
