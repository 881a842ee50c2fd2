"""Offline preference optimisation: any loss of `losses` over the log-probabilities of groups."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature

import jax
import jax.numpy as jnp

from dpo_jax import losses
from dpo_jax.logprobs import per_response, response_lengths, token_logps
from dpo_jax.structs import Algorithm, Array, BadInput, Batch, Metrics, Model, Params, Scored, join

Loss = Callable[[Scored], Array]


def preference(model: Model, *, loss: Loss) -> Algorithm:
    """DPO and its variants (Rafailov et al. 2305.18290): a loss of policy and reference log-probs.

    loss: Scored -> loss_B, from `dpo_jax.losses` or your own; what it declares with
    `losses.needs` decides what is computed. The reference is the policy at step 0.
    """
    needs = losses.needs(loss)

    def init(key: jax.Array, params: Params, frozen: Params):
        return params, {}

    def collect(state, frozen, batch: Batch, key: jax.Array):
        if needs.reference:
            batch = replace(batch, ref_logp_RN=token_logps(model, frozen["reference"], batch))
        return batch, state.memory

    def measured(batch: Batch) -> Batch:
        first_RN = jnp.where(batch.slot_RN % batch.end_RGK.shape[2] == 0, batch.weight_RN, 0.0)
        return replace(
            batch,
            weight_RG=losses.measure.token_mean(batch.weight_RG),
            weight_RN=losses.measure.token_mean(first_RN),
        )

    def objective(params, frozen, memory, batch: Batch, key) -> tuple[jax.Array, Metrics]:
        logp_RN = token_logps(model, join(params, frozen), batch)
        scored = score(batch, logp_RN)
        _check_responses(loss, needs, scored)
        tokens_RGK = per_response(batch.weight_RN, batch)
        by_group = needs.measure == "groups"
        weight_B = jnp.ravel(batch.weight_RG if by_group else tokens_RGK[:, :, 0])
        value = weighted(weight_B, loss(scored))
        return value, {"loss": value, **margins(scored, jnp.ravel(batch.weight_RG), loss)}

    return Algorithm(
        init, collect, measured, objective, fused=True, frozen=("reference",) * needs.reference
    )


def score(batch: Batch, logp_RN: Array) -> Scored:
    """What a loss may know of a batch whose policy log-probs are given; B = R * G."""
    B = batch.weight_RG.size

    def flat(x: Array) -> jax.Array:
        return jnp.reshape(x, (B, *x.shape[2:]))

    def optional(x: Array | None) -> jax.Array | None:
        return None if x is None else flat(x)

    ref_logp_RN = batch.ref_logp_RN
    return Scored(
        logp_BK=flat(per_response(logp_RN, batch)),
        ref_logp_BK=None if ref_logp_RN is None else flat(per_response(ref_logp_RN, batch)),
        length_BK=flat(response_lengths(batch)),
        mask_BK=flat(jnp.where(batch.end_RGK >= 0, 1.0, 0.0)),
        weight_B=flat(batch.weight_RG),
        score_BKC=optional(batch.score_RGKC),
        label_B=optional(batch.label_RG),
        soft_label_B=optional(batch.soft_label_RG),
        margin_B=optional(batch.margin_RG),
        **batch.shared,
    )


def weighted(weight_B: Array, x_B: Array) -> jax.Array:
    """sum_b weight_b x_b, where what has no weight cannot spoil the sum."""
    return jnp.sum(jnp.where(weight_B > 0, weight_B * x_B, 0.0))


def reward_scale(loss: Loss) -> float | Array:
    """The factor of the reported rewards: the loss's `beta`, or 1 where it has none."""
    keywords = loss.keywords if isinstance(loss, partial) else {}
    parameter = signature(loss).parameters.get("beta")
    default = (
        1.0 if parameter is None or parameter.default is parameter.empty else parameter.default
    )
    return keywords.get("beta", default)


def margins(scored: Scored, weight_B: Array, loss: Loss) -> Metrics:
    """TRL's metrics of chosen (first) and rejected (last) responses, each a weighted sum.

    rewards are beta (log p - log p_ref), or beta log p without a reference (divided by the length
    where the loss does so); a tie counts 0 in `rewards/accuracies` and 1 in `rewards/ties`.
    """
    needs, logp_BK = losses.needs(loss), scored.logp_BK
    if needs.reference and scored.ref_logp_BK is not None:
        logp_BK = logp_BK - scored.ref_logp_BK
    elif "length_BK" in needs.fields and scored.length_BK is not None:
        logp_BK = losses.measure.per_token(logp_BK, scored.length_BK)
    reward_BK = jax.lax.stop_gradient(reward_scale(loss) * logp_BK)
    summed = partial(weighted, weight_B)
    metrics = {
        "rewards/chosen": summed(reward_BK[:, 0]),
        "logps/chosen": summed(scored.logp_BK[:, 0]),
    }
    if reward_BK.shape[1] > 1:
        margin_B = reward_BK[:, 0] - reward_BK[:, -1]
        metrics |= {
            "rewards/rejected": summed(reward_BK[:, -1]),
            "rewards/margins": summed(margin_B),
            "rewards/accuracies": summed(jnp.where(margin_B > 0, 1.0, 0.0)),
            "rewards/ties": summed(jnp.where(margin_B == 0, 1.0, 0.0)),
            "logps/rejected": summed(scored.logp_BK[:, -1]),
        }
    return metrics


def _check_responses(loss: Loss, needs: losses.Needs, scored: Scored) -> None:
    K = scored.logp_BK.shape[1]
    if needs.responses is not None and K != needs.responses:
        name = getattr(loss, "func", loss).__name__
        raise BadInput(
            f"loss {name} compares {needs.responses} responses, the data has {K} a prompt"
        )
