"""Offline preference optimisation: any loss of `losses` over the log-probabilities of groups.

What the loss declares with `losses.needs` decides what is computed; what cannot be right is
refused when the algorithm is made or when it meets its data.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import losses
from dpo_jax.algorithms import margins
from dpo_jax.algorithms.batch_statistics import start, updated
from dpo_jax.algorithms.scores import length_normalized
from dpo_jax.algorithms.suitable import check_keywords, suitable, takes
from dpo_jax.logprobs import per_response, response_lengths, token_logps, token_statistics
from dpo_jax.losses.needs import name_of, parts_of
from dpo_jax.parallel import fetched
from dpo_jax.structs import (
    Algorithm,
    Array,
    BadInput,
    Batch,
    Memory,
    Metrics,
    Model,
    Params,
    Scored,
    TrainState,
    join,
)

Loss = Callable[[Scored], Array]
Score = Callable[[Array, Batch], Array]
Reference = Callable[[Array, Params, Params], Params]


class Plan(NamedTuple):
    """The plugs of one algorithm and what its loss needs."""

    model: Model
    loss: Loss
    score: Score
    reference: Reference | None
    needs: losses.Needs

    @property
    def exact(self) -> bool:
        """Whether the loss wants KL(reference, policy), so that both heads run side by side."""
        return "kl_BK" in self.needs.fields

    def anchor(self, frozen: Params, memory: Memory) -> Params:
        """The weights that the policy is compared with."""
        own = fetched(frozen["reference"]) if self.reference is None else memory["reference"]
        return join(own, frozen)


def preference(
    model: Model, *, loss: Loss, score: Score = per_response, reference: Reference | None = None
) -> Algorithm:
    """DPO and its variants (Rafailov et al. 2305.18290): a loss of policy and reference log-probs.

    loss: Scored -> loss_B, from `dpo_jax.losses` or your own. score: (x_RN, batch) -> x_RGK, how
    token log-probs of policy and reference become those of responses (`algorithms.scores`).
    reference: how it moves (`algorithms.reference.soft_update`); None = the policy at step 0.
    Errors: BadInput for keywords that the loss does not have or lacks, for a moving reference
    beside a loss without one, for a score of another number of responses; from `prepare` for data
    that the loss cannot use.
    """
    if takes(loss) == "score_BK":
        raise BadInput(
            f"loss {name_of(loss)} reads scores, which `preference` does not have: train it with "
            "algorithms.reward, or take a loss of log-probs, as losses.plackett_luce_dpo"
        )
    check_keywords(loss)
    needs = losses.needs(loss)
    if reference is not None and not needs.reference:
        raise BadInput(
            f"algorithm.reference={name_of(reference)} has no effect: loss {name_of(loss)} "
            "compares with no reference; leave it out or take a loss that does"
        )
    _check_score(loss, needs, score)
    plan = Plan(model, loss, score, reference, needs)
    return Algorithm(
        init=partial(_init, plan),
        collect=partial(_collect, plan),
        measure=_measured,
        objective=partial(_objective, plan),
        fused=True,
        frozen=("reference",) if needs.reference and reference is None else (),
        cacheable=needs.reference and reference is None and not plan.exact,
        prepare=partial(suitable, loss, needs),
        coupled=needs.coupled,
    )


def _check_score(loss: Loss, needs: losses.Needs, score: Score) -> None:
    if parts_of(score)[0] is length_normalized and "length_BK" in needs.fields:
        raise BadInput(
            f"algorithm.score={name_of(score)} divides by the length, and so does loss "
            f"{name_of(loss)}: take one of them"
        )
    declared = hasattr(parts_of(score)[0], "needs")
    wanted, found = losses.needs(score).responses if declared else None, needs.responses
    if wanted is not None and found is not None and wanted != found:
        raise BadInput(
            f"algorithm.score={name_of(score)} compares {wanted} responses, loss {name_of(loss)} "
            f"reads {found}: take another score, or a loss of {wanted}"
        )


def _init(plan: Plan, key: jax.Array, params: Params, frozen: Params) -> tuple[Params, Memory]:
    memory = start(plan.needs.statistics)
    if plan.reference is not None:  # a copy: the loop gives the policy's arrays away
        memory["reference"] = jax.tree.map(jnp.copy, params)
    return params, memory


def _collect(
    plan: Plan, state: TrainState, frozen: Params, batch: Batch, key: jax.Array
) -> tuple[Batch, Memory]:
    """Reference log-probs, and the scalars that belong to the whole step."""
    model, needs, memory = plan.model, plan.needs, state.memory
    policy = join(state.params, frozen)
    if plan.reference is not None:
        moved = plan.reference(state.step, state.params, memory["reference"])
        memory = {**memory, "reference": moved}
    known = batch.ref_logp_RN is not None
    if needs.reference and not known and (needs.statistics or not plan.exact):
        ref_logp_RN = token_logps(model, plan.anchor(frozen, memory), batch)
        batch = replace(batch, ref_logp_RN=ref_logp_RN)
    if needs.statistics:
        groups = _scored(plan, batch, token_logps(model, policy, batch))
        memory, found = updated(needs.statistics, memory, groups)
        batch = replace(batch, shared={**batch.shared, **found})
    return batch, memory


def _measured(batch: Batch) -> Batch:
    """Groups weigh as the data says, tokens of first responses all the same."""
    first_RN = jnp.where(batch.slot_RN % batch.end_RGK.shape[2] == 0, batch.weight_RN, 0.0)
    weight_RG = losses.measure.token_mean(batch.weight_RG)
    batch = replace(batch, weight_RG=weight_RG, weight_RN=losses.measure.token_mean(first_RN))
    if batch.label_RG is None:
        return batch
    desirable = jnp.sum(jnp.where(batch.label_RG > 0.5, weight_RG, 0.0))
    return replace(batch, shared={**batch.shared, "desirable": desirable})


def _objective(
    plan: Plan, params: Params, frozen: Params, memory: Memory, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The loss of the batch under its measures, and TRL's metrics."""
    found = token_statistics(
        plan.model,
        join(params, frozen),
        batch,
        reference=plan.anchor(frozen, memory) if plan.exact else None,
        aligned="aligned_BK" in plan.needs.fields,
    )
    if found.ref_logp_RN is not None:
        batch = replace(batch, ref_logp_RN=found.ref_logp_RN)
    groups = _scored(plan, batch, found.logp_RN)
    if found.kl_RN is not None:
        groups = replace(groups, kl_BK=margins.flat(plan.score(found.kl_RN, batch)))
    if found.aligned_RN is not None:
        groups = replace(groups, aligned_BK=_mean(found.aligned_RN, batch))
    if plan.needs.partner:
        groups = _first(groups)
    value = _summed(plan.loss, groups, batch)
    return value, {"loss": value, **_metrics(plan, groups, batch)}


def _scored(plan: Plan, batch: Batch, logp_RN: Array) -> Scored:
    """What the loss may know of the groups; B = R * G."""

    def optional(x_RG: Array | None) -> jax.Array | None:
        return None if x_RG is None else margins.flat(x_RG)

    def response(x_RN: Array | None) -> jax.Array | None:
        return None if x_RN is None else margins.flat(plan.score(x_RN, batch))

    scalars = {statistic.field for statistic in plan.needs.statistics} & batch.shared.keys()
    return Scored(
        logp_BK=margins.flat(plan.score(logp_RN, batch)),
        ref_logp_BK=response(batch.ref_logp_RN),
        length_BK=margins.flat(response_lengths(batch)),
        mask_BK=margins.flat(jnp.where(batch.end_RGK >= 0, 1.0, 0.0)),
        weight_B=margins.flat(batch.weight_RG),
        score_BKC=optional(batch.score_RGKC),
        label_B=optional(batch.label_RG),
        soft_label_B=optional(batch.soft_label_RG),
        margin_B=optional(batch.margin_RG),
        **{field: batch.shared[field] for field in scalars},
    )


def _mean(x_RN: Array, batch: Batch) -> jax.Array:
    """The mean over the tokens of each response, x_BK, whatever the score is."""
    return margins.flat(
        losses.measure.per_token(per_response(x_RN, batch), response_lengths(batch))
    )


def _first(groups: Scored) -> Scored:
    """The groups without the partners of their responses."""
    names = ("logp_BK", "ref_logp_BK", "length_BK", "mask_BK", "score_BKC", "kl_BK", "aligned_BK")
    arrays = {name: getattr(groups, name) for name in names}
    return replace(groups, **{k: None if x is None else x[:, :1] for k, x in arrays.items()})


def _summed(loss: Loss, groups: Scored, batch: Batch) -> jax.Array:
    """Every term of the loss under its own measure."""
    first_RG = per_response(batch.weight_RN, batch)[:, :, 0]
    weight_B = {"groups": margins.flat(batch.weight_RG), "tokens": margins.flat(first_RG)}
    total = jnp.zeros(())
    everyone = {statistic.field for statistic in losses.needs(loss).statistics}
    for coefficient, term in losses.terms(loss):
        needs = losses.needs(term)
        others = everyone - {statistic.field for statistic in needs.statistics}
        loss_B = term(replace(groups, **dict.fromkeys(others)))  # one's delta is not another's
        total += coefficient * margins.weighted(weight_B[needs.measure], loss_B)
    return total


def _metrics(plan: Plan, groups: Scored, batch: Batch) -> Metrics:
    needs, weight_B = plan.needs, margins.flat(batch.weight_RG)
    reward_BK = margins.implicit_rewards(groups, plan.loss)
    # a part of a split batch adds its share of what belongs to the whole step
    share = jnp.sum(weight_B)
    found = {
        statistic.field: share * batch.shared[statistic.field] for statistic in needs.statistics
    }
    if "label_B" in needs.fields:
        desirable = batch.shared["desirable"]
        return found | margins.unpaired_metrics(groups, weight_B, reward_BK, desirable)
    return found | margins.metrics(groups, weight_B, reward_BK, batch.criteria)
