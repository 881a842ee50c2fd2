"""Online preference optimisation: the preference algorithm on its own samples (2402.04792).

In every step n responses are drawn to each prompt, an annotator of their rewards labels them, and
any loss of `losses` trains on the labels as if they were data: `preference` fills in the reference,
measures and takes the objective. With fresh pairs and Bradley-Terry labels DPO's gradient is zero
in the mean where  pi = pi_ref exp(r / beta) / Z,  as it is offline; what changes is which pairs are
seen on the way.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import losses
from dpo_jax.algorithms.margins import reward_scale
from dpo_jax.algorithms.on_policy import objective_metrics, token_facts
from dpo_jax.algorithms.preference import Loss, Reference, Score, preference
from dpo_jax.algorithms.rollout import Draw, Reward, Rollout, Rows, Sampler, prompts_alone, summary
from dpo_jax.logprobs import ROUNDED, TokenStatistics, per_response
from dpo_jax.losses.needs import Needs, name_of
from dpo_jax.parallel import on_host, shard_batch
from dpo_jax.structs import (
    Algorithm,
    BadInput,
    Batch,
    Context,
    Group,
    Memory,
    Model,
    Params,
    TrainState,
    as_it_is,
    join,
)
from dpo_jax.worlds.annotators import Annotator, Label, best_and_worst, ranked

CRITERIA = ("reward",)  # the name of the score that the groups carry


class Form(NamedTuple):
    """What an annotator says of n responses, all of different scores."""

    example: Label
    labels: int
    responses: int  # of a label


class Plan(NamedTuple):
    """The parts of one algorithm."""

    model: Model
    offline: Algorithm
    loss: Loss
    draw: Draw
    annotator: Annotator
    form: Form


def online_preference(
    model: Model,
    *,
    loss: Loss,
    rewards: tuple[Reward, ...],
    reward_weights: tuple[float, ...] | None = None,
    annotator: Annotator | None = None,
    n: int = 2,
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    missing_eos_penalty: float = 0.0,
    score: Score = per_response,
    reference: Reference | None = None,
) -> Algorithm:
    """Trains on labels of its own samples, drawn anew in every step.

    loss, score, reference: as in `preference`. rewards: functions (records, responses) -> score_B
    of raw records and texts, summed under reward_weights, less missing_eos_penalty where a response
    was cut. annotator: of `worlds.annotators`, a function (score_KC, rng) -> labels: criterion 0 is
    that sum, those behind it the rewards after the first; None = without noise, the best before the
    worst, or the whole ranking for a loss of any number of responses. n, max_tokens, temperature,
    top_k, top_p: n responses to a prompt; what is trained are log-probs at temperature 1, whatever
    that of the samples.
    Equal texts stand in no label together. A prompt without a label, as where all rewards are the
    same, is left out of its step and counted.
    Errors: BadInput as `preference`, for options that cannot be and for labels that the loss does
    not read; from `prepare` for rows that are too short.
    """
    offline = preference(model, loss=loss, score=score, reference=reference)
    draw = Draw(
        rewards, reward_weights, n, max_tokens, temperature, top_k, top_p, missing_eos_penalty
    )
    needs = losses.needs(loss)
    if annotator is None:
        annotator = ranked if needs.responses is None else best_and_worst
    form = _form(annotator, draw)
    _check(loss, needs, annotator, form)
    plan = Plan(model, offline, loss, draw, annotator, form)
    made = offline._replace(
        collect=as_it_is,
        fused=False,
        cacheable=False,
        prepare=partial(prompts_alone, max_tokens=max_tokens, together=form.responses),
    )
    return made._replace(online=partial(_online, plan, made))


online_dpo = partial(online_preference, loss=partial(losses.dpo, beta=0.1), n=2)


def _form(annotator: Annotator, draw: Draw) -> Form:
    scores_KC = np.tile(np.arange(draw.n, dtype=float)[:, None], len(draw.names))
    labels = annotator(scores_KC, np.random.default_rng(0))
    if not labels:
        raise BadInput(
            f"algorithm.n={draw.n}: annotator {name_of(annotator)} says nothing of so many "
            "responses; give 2 or more"
        )
    return Form(labels[0], len(labels), max(len(label.order) for label in labels))


def _check(loss: Loss, needs: Needs, annotator: Annotator, form: Form) -> None:
    """BadInput where the loss cannot read the labels, or the labels say what it does not read."""
    name, whose = name_of(loss), f"annotator {name_of(annotator)}"
    if needs.partner:
        raise BadInput(
            f"loss {name} compares a response with one to another prompt, which rows of samples do "
            "not hold: take losses.bco, or `preference` on data"
        )
    if needs.responses not in (None, form.responses):
        raise BadInput(
            f"loss {name} reads {needs.responses} response(s), a label of {whose} has "
            f"{form.responses}: take another annotator, or a loss of as many"
        )
    if "margin_B" in needs.fields:
        raise BadInput(f"loss {name} reads margin, which labels do not have: take `preference`")
    for field in ("label", "soft_label"):
        wanted, given = f"{field}_B" in needs.fields, getattr(form.example, field) is not None
        if wanted and not given:
            raise BadInput(
                f"loss {name} reads {field}, {whose} gives none: take one that does, as "
                f"worlds.annotators.{'thumbs' if field == 'label' else 'ties'}"
            )
        if given and not wanted:
            raise BadInput(
                f"{whose} gives a {field}, which loss {name} does not read: take a loss that does "
                "(`dpo-jax losses` lists them), or another annotator"
            )


def _online(plan: Plan, made: Algorithm, context: Context) -> Algorithm:
    fullest = [plan.form.responses * plan.draw.max_tokens] * plan.form.labels
    facts = partial(token_facts, plan.model, temperature=plan.draw.temperature)
    collect = partial(
        _collect,
        plan,
        Sampler(plan.model, plan.draw, context, minibatches=1),
        Rows(context, fullest, responses=plan.form.responses),
        jax.jit(plan.offline.collect, compiler_options=ROUNDED),
        jax.jit(facts, compiler_options=ROUNDED),
    )
    return made._replace(collect=collect)


def _collect(
    plan: Plan,
    sampler: Sampler,
    rows: Rows,
    complete: Callable[..., tuple[Batch, Memory]],
    facts: Callable[..., TokenStatistics],
    state: TrainState,
    frozen: Params,
    batch: Batch,
    key: jax.Array,
) -> tuple[Batch, Memory]:
    """Labels of a rollout in rows, with the reference's log-probs and the rollout's metrics."""
    mesh = sampler.context.mesh
    rollout = sampler(join(state.params, frozen), batch, key)
    groups, unlabelled = labelled(plan, rollout, key)
    host, _ = rows(groups)
    done, memory = complete(state, frozen, shard_batch(mesh, host), key)
    moving = {name: memory[name] for name in ("reference",) if name in memory}
    found = on_host(facts(state.params, {**frozen, **moving}, shard_batch(mesh, rollout.batch)))
    values = summary(rollout) | _metrics(plan, rollout, found) | {"frac_unlabelled": unlabelled}
    ref_logp_RN, shared = on_host((done.ref_logp_RN, done.shared))
    shared |= {name: np.float32(value) for name, value in values.items()}
    return shard_batch(mesh, replace(host, ref_logp_RN=ref_logp_RN, shared=shared)), memory


def labelled(plan: Plan, rollout: Rollout, key: jax.Array) -> tuple[list[Group], float]:
    """(groups, share of prompts without a label): each label as a group, best to worst.

    The labels of a record are drawn with numbers that the key and the record fix. Where no prompt
    has a label there is one group, of weight 0.
    """
    seeds = np.asarray(jax.random.key_data(key)).tolist()
    totals, *others = rollout.scores.total_BK, *list(rollout.scores.named.values())[1:]
    met: Counter[int | None] = Counter()
    groups, without = [], 0
    for b, group in enumerate(rollout.groups):
        rng = np.random.default_rng([*seeds, group.record or 0, met[group.record]])
        met[group.record] += 1
        scores_KC = np.stack([totals[b], *(x_BK[b] for x_BK in others)], axis=1)
        own = []
        for label in plan.annotator(scores_KC, rng):
            order = _different(label.order, rollout.texts_BK[b])
            if len(order) >= min(2, len(label.order)):
                own.append(_group(group, label, order, totals[b]))
        groups += own
        without += not own
    if not groups:
        group, example = rollout.groups[0], plan.form.example
        groups = [replace(_group(group, example, list(example.order), totals[0]), weight=0.0)]
    return groups, without / len(rollout.groups)


def _different(order: tuple[int, ...], texts: list[str]) -> list[int]:
    """The order without texts that stand before."""
    first = {}
    for k in order:
        first.setdefault(texts[k], k)
    return list(first.values())


def _group(group: Group, label: Label, order: list[int], total_K: np.ndarray) -> Group:
    return replace(
        group,
        responses=[group.responses[k] for k in order],
        scores=np.asarray(total_K[order], np.float32)[:, None],
        label=None if label.label is None else float(label.label),
        soft_label=label.soft_label,
        criteria=CRITERIA,
    )


def _metrics(plan: Plan, rollout: Rollout, found: TokenStatistics) -> dict[str, Any]:
    """`objective/` of the rollout; the KL is priced at the loss's beta."""
    score_BK, price = rollout.scores.total_BK, 0.0
    if found.policy_kl_RN is not None:
        kl_BK = rollout.by_response(found.policy_kl_RN).sum(axis=-1)
        price = float(reward_scale(plan.loss)) * kl_BK
    return objective_metrics(rollout, found, score_BK, score_BK - price)
