"""Reward models: the decoder with a scalar head, trained on responses ranked best to worst.

A loss of scores (`losses.ranking`, or your own) takes score_BK first and, by the names in its own
signature, what else there is: mask_BK, 1 where there is a response; margin, the margin_B of the
data where it has one; target_BK, the first criterion of the data's scores.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import Parameter, signature
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import losses
from dpo_jax.algorithms import margins
from dpo_jax.algorithms.suitable import check_keywords, suitable, takes
from dpo_jax.losses.needs import name_of, parts_of
from dpo_jax.structs import (
    Algorithm,
    Array,
    BadInput,
    Batch,
    Group,
    Memory,
    Metrics,
    Model,
    Params,
    as_it_is,
    join,
    precise,
)

HEAD = "reward_D"  # the weights of the scalar head, beside the decoder's
# what a loss may ask for, and the field of the data that it comes from
FIELDS = {"mask_BK": (), "margin": ("margin_B",), "target_BK": ("score_BKC",)}
Loss = Callable[..., Array]


class Plan(NamedTuple):
    """One reward model: its loss, which of FIELDS that reads, and what it needs of the data."""

    model: Model
    loss: Loss
    centering: float | Array
    reads: tuple[str, ...]
    needs: losses.Needs


def reward(
    model: Model, *, loss: Loss = losses.plackett_luce, centering: float | Array = 0.0
) -> Algorithm:
    """A reward model of K ranked responses (InstructGPT 2203.02155 eq. 1); no reference.

    loss: (score_BK, ...) -> loss_B, `losses.plackett_luce`, `losses.bradley_terry` or your own.
    centering: times `losses.centering`, which keeps the rewards of a prompt around 0.
    Errors: BadInput for a loss of log-probs, for keywords that the loss does not have or lacks;
    from `prepare` for data that the loss cannot use.
    """
    plan = _planned(model, loss, centering)
    return Algorithm(
        init=partial(_init, plan),
        collect=as_it_is,
        measure=_measured,
        objective=partial(_objective, plan),
        fused=True,
        prepare=partial(_prepared, plan),
        coupled=plan.needs.coupled,
    )


def reward_scores(model: Model, params: Params, batch: Batch) -> jax.Array:
    """The reward of every response by its last token: score_RGK, float32, 0 where there is none.

    params: those of a run whose algorithm is `reward`, joined with what is frozen.
    """
    if HEAD not in params:
        raise BadInput(f"these weights have no {HEAD}: take those of a run that trains a reward")
    rows = batch.tokens_RT, batch.positions_RT, batch.until_RT
    there_RGK = jnp.asarray(batch.end_RGK) >= 0
    end_RN = jnp.where(there_RGK, batch.end_RGK, 0).reshape(len(there_RGK), -1)
    hidden_RND, _ = model.hidden_at(params, end_RN, *rows)
    hidden_RGKD = hidden_RND.reshape(*there_RGK.shape, -1)
    # a product this small is not worth the rounding that accelerators have by default
    score_RGK = jnp.einsum(
        "rgkd,d->rgk", precise(hidden_RGKD), precise(params[HEAD]), precision="highest"
    )
    return jnp.where(there_RGK, score_RGK, 0.0)


def _planned(model: Model, loss: Loss, centering: float | Array) -> Plan:
    """What the loss reads and needs. Raises BadInput for a loss that takes no scores."""
    if takes(loss) == "scored":
        raise BadInput(
            f"loss {name_of(loss)} reads log-probs, which `reward` does not have: train it with "
            "algorithms.preference, or take a loss of scores, as losses.plackett_luce"
        )
    check_keywords(loss, given=tuple(FIELDS))
    parameters, bound = signature(parts_of(loss)[0]).parameters, _bound(loss)
    reads = tuple(name for name in FIELDS if name in parameters and name not in bound)
    required = [name for name in reads if parameters[name].default is Parameter.empty]
    needs = losses.needs(loss)
    fields = (*needs.fields, *(field for name in required for field in FIELDS[name]))
    needs = replace(needs, reference=False, fields=tuple(dict.fromkeys(fields)))
    return Plan(model, loss, centering, reads, needs)


def _bound(loss: Loss) -> set[str]:
    """The keywords that partials have set."""
    return {*loss.keywords, *_bound(loss.func)} if isinstance(loss, partial) else set()


def _prepared(plan: Plan, groups: list[Group], row_tokens: int | None = None) -> list[Group]:
    """The groups, all of which the loss can use."""
    groups, name = suitable(plan.loss, plan.needs, groups, row_tokens), name_of(plan.loss)
    longest = max((len(group.responses) for group in groups), default=2)
    if longest < 2 and "target_BK" not in plan.reads:
        raise BadInput(
            f"loss {name} compares responses, the data has 1 a prompt: give rankings of two or more"
        )
    if "margin" in _bound(plan.loss) and any(group.margin is not None for group in groups):
        raise BadInput(
            f"loss {name} is given a margin, and the data has one on every record: leave one out"
        )
    return groups


def _init(plan: Plan, key: jax.Array, params: Params, frozen: Params) -> tuple[Params, Memory]:
    """The head of a parent goes on; a new one makes rewards of about 1 (2009.01325)."""
    if HEAD in params:
        return params, {}
    one_RT = jnp.zeros((1, 1), jnp.int32)
    hidden = partial(plan.model.hidden, join(params, frozen))
    hidden_RTD, _ = jax.eval_shape(hidden, one_RT, one_RT, one_RT + 1)
    D, kind = hidden_RTD.shape[-1], jnp.promote_types(hidden_RTD.dtype, jnp.float32)
    return {**params, HEAD: jax.random.normal(key, (D,), kind) * (D + 1) ** -0.5}, {}


def _measured(batch: Batch) -> Batch:
    """Groups weigh as the data says."""
    return replace(batch, weight_RG=losses.measure.token_mean(batch.weight_RG))


def _objective(
    plan: Plan, params: Params, frozen: Params, memory: Memory, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The loss of the rewards, and TRL's metrics."""
    score_BK = margins.flat(reward_scores(plan.model, join(params, frozen), batch))
    mask_BK = margins.flat(jnp.where(batch.end_RGK >= 0, 1.0, 0.0))
    there = {"mask_BK": mask_BK}
    if batch.margin_RG is not None:
        there["margin"] = margins.flat(batch.margin_RG)
    if batch.score_RGKC is not None:
        there["target_BK"] = margins.flat(batch.score_RGKC)[:, :, 0]
    loss_B = plan.loss(score_BK, **{name: there[name] for name in plan.reads if name in there})
    loss_B += plan.centering * losses.centering(score_BK)
    value = margins.weighted(margins.flat(batch.weight_RG), loss_B)
    return value, {"loss": value, **_metrics(batch, jax.lax.stop_gradient(score_BK), mask_BK)}


def _metrics(batch: Batch, score_BK: jax.Array, mask_BK: jax.Array) -> Metrics:
    """The mean and the mean square are those of a group's responses, averaged over the groups;
    variances and covariances are within groups. Evaluations make std and correlations of them."""
    weight_B, count_B = margins.flat(batch.weight_RG), jnp.sum(mask_BK, axis=1)
    criteria_BKC = None if batch.score_RGKC is None else margins.flat(batch.score_RGKC)

    def each(x_BK: jax.Array) -> jax.Array:
        return losses.measure.per_token(jnp.sum(x_BK, axis=1), count_B)

    def mean(x_BK: jax.Array) -> jax.Array:
        return margins.weighted(weight_B, each(x_BK))

    def centred(x_BK: jax.Array) -> jax.Array:
        return mask_BK * (x_BK - each(x_BK)[:, None])

    found = margins.reward_metrics(weight_B, score_BK, mask_BK, criteria_BKC, batch.criteria)
    found |= {"rewards/mean": mean(score_BK), "rewards/square": mean(score_BK**2)}
    found["rewards/variance"] = mean(centred(score_BK) ** 2)
    for c, name in enumerate(batch.criteria):
        assert criteria_BKC is not None
        true_BK = centred(criteria_BKC[:, :, c])
        found[f"criteria/{name}/covariance"] = mean(true_BK * centred(score_BK))
        found[f"criteria/{name}/variance"] = mean(true_BK**2)
    return found
