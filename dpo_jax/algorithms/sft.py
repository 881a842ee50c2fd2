"""Supervised fine-tuning: maximise the log-probability of every response."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from dpo_jax.logprobs import token_logps
from dpo_jax.losses.measure import token_mean
from dpo_jax.structs import Algorithm, Array, Batch, Metrics, Model, Params, as_it_is, join


def sft(model: Model, *, measure: Callable[[Array, Array], Array] = token_mean) -> Algorithm:
    """The negative log-likelihood of the scored tokens, in nats, under a measure.

    measure: (weight_RN, slot_RN) -> weight_RN; `losses.measure.token_mean` weighs every token
    alike, `sequence_mean` every response.
    """

    def init(key: jax.Array, params: Params, frozen: Params):
        return params, {}

    def measured(batch: Batch) -> Batch:
        return replace(batch, weight_RN=measure(batch.weight_RN, batch.slot_RN))

    def objective(params, frozen, memory, batch: Batch, key) -> tuple[jax.Array, Metrics]:
        logp_RN = token_logps(model, join(params, frozen), batch)
        loss = -jnp.sum(batch.weight_RN * logp_RN)
        return loss, {"loss": loss}

    return Algorithm(init, as_it_is, measured, objective, fused=True)
