"""From a batch to log-probabilities: the head runs on scored positions only, a chunk at a time.

`naive_token_statistics` is the slow obvious version that the tests compare in value and gradient.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.head import Side, Wanted, side, statistics
from dpo_jax.structs import Array, Batch, Model, Params, precise

# Compiler options of all that compares policy and reference: bfloat16 is rounded where the program
# says so and not where a fusion happens to end, so that equal weights have equal log-probs in the
# forward pass of a gradient and outside of it.
ROUNDED = {"xla_allow_excess_precision": False}


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
    policy = _side(model, params, batch)
    other = None
    if reference is not None:
        other = _side(model, jax.lax.stop_gradient(reference), batch)
    wanted = Wanted(reference is not None and policy_kl, entropy, square=aligned)
    tokens = batch.target_RN, batch.slot_RN >= 0
    out = statistics(policy, *tokens, reference=other, wanted=wanted, temperature=temperature)
    found = TokenStatistics(
        out.logp,
        out.ref_logp,
        out.kl,
        out.policy_kl,
        out.entropy,
        None if readout_D is None else readout(policy.hidden_RND, readout_D),
        jax.lax.stop_gradient(out.logp - out.square) if aligned else None,
    )
    return _used(found, batch)


def token_kls(model: Model, params: Params, reference: Params, batch: Batch) -> jax.Array:
    """KL(policy, reference) over the whole vocabulary at every scored token: kl_RN in nats.

    Summed over a response sampled from the policy, it is an unbiased estimate of the sequence KL
    whose variance is far below that of the log-ratio.
    """
    found = token_statistics(model, params, batch, reference=reference, policy_kl=True)
    assert found.policy_kl_RN is not None
    return found.policy_kl_RN


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
    return naive_token_statistics(model, params, batch).logp_RN


def naive_token_statistics(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    reference: Params | None = None,
    readout_D: Array | None = None,
    temperature: float | jax.Array = 1.0,
) -> TokenStatistics:
    """All of token_statistics through the full logits of every place of every row."""
    rows = jnp.arange(batch.target_RN.shape[0])[:, None]
    places = batch.tokens_RT, batch.positions_RT, batch.until_RT
    hidden_RTD = model.hidden(params, *places)[0]
    logp_RTV = jax.nn.log_softmax(precise(model.unembed(params, hidden_RTD)) / temperature)
    p_RTV = jnp.exp(logp_RTV)
    logp_RN = logp_RTV[rows, batch.source_RN, batch.target_RN]

    def summed(x_RTV: jax.Array) -> jax.Array:
        return jnp.sum(x_RTV, axis=-1)[rows, batch.source_RN]

    found = TokenStatistics(
        logp_RN,
        entropy_RN=-summed(p_RTV * logp_RTV),
        aligned_RN=jax.lax.stop_gradient(logp_RN - jnp.log(summed(p_RTV**2))),
    )
    if readout_D is not None:
        found = found._replace(readout_RN=jnp.dot(hidden_RTD, readout_D)[rows, batch.source_RN])
    if reference is not None:
        ref_hidden_RTD = model.hidden(reference, *places)[0]
        ref_RTV = jax.nn.log_softmax(
            precise(model.unembed(reference, ref_hidden_RTD)) / temperature
        )
        ref_RTV = jax.lax.stop_gradient(ref_RTV)
        found = found._replace(
            ref_logp_RN=ref_RTV[rows, batch.source_RN, batch.target_RN],
            kl_RN=summed(jnp.exp(ref_RTV) * (ref_RTV - logp_RTV)),
            policy_kl_RN=summed(p_RTV * (logp_RTV - ref_RTV)),
        )
    return _used(found, batch)


def scored_hidden(model: Model, params: Params, batch: Batch) -> jax.Array:
    """Hidden states of the places that predict scored tokens, hidden_RND."""
    R, T = batch.tokens_RT.shape
    chex.assert_shape([batch.positions_RT, batch.until_RT], (R, T))
    chex.assert_equal_shape([batch.target_RN, batch.source_RN, batch.slot_RN])
    rows = batch.tokens_RT, batch.positions_RT, batch.until_RT
    return model.hidden_at(params, batch.source_RN, *rows)[0]


def readout(hidden_RND: jax.Array, readout_D: Array) -> jax.Array:
    """What a head of one column says of every hidden state, float32, x_RN."""
    # a product this small is not worth the rounding that accelerators have by default
    return jnp.einsum("rnd,d->rn", precise(hidden_RND), precise(readout_D), precision="highest")


def _side(model: Model, params: Params, batch: Batch) -> Side:
    return side(model.unembed, params, scored_hidden(model, params, batch))


def _used(found: TokenStatistics, batch: Batch) -> TokenStatistics:
    return jax.tree.map(lambda x_RN: jnp.where(batch.slot_RN >= 0, x_RN, 0.0), found)
