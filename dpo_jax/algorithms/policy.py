"""Policy gradients on responses as a whole: REINFORCE, RLOO, GRPO and what lies between them.

`policy_gradient` has every part as an option; the algorithms are its settings. What differs:

    reinforce   advantage over the mean of the rollout's other responses, k1 in the reward
    rloo        advantage over the mean of the group's other responses, k1 in the reward
    grpo        advantage in standard deviations of the group, clipped ratios, k3 in the loss,
                every response weighs the same
    dapo        grpo with tokens that weigh the same, clip-higher, no reference, and groups of one
                score left out

Dr. GRPO (2503.20783) is grpo with advantage=partial(losses.advantage.group_normalized, std=False),
measure=losses.measure.fixed_length(max_tokens) and beta=0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import losses
from dpo_jax.algorithms.on_policy import (
    Loss,
    completed,
    current,
    held,
    measured,
    priced,
    surrogate,
    token_facts,
)
from dpo_jax.algorithms.penalty import Estimator, Penalty, Place
from dpo_jax.algorithms.rollout import (
    Draw,
    Reward,
    Sampler,
    equal,
    prompts_alone,
)
from dpo_jax.logprobs import ROUNDED, TokenStatistics
from dpo_jax.losses.advantage import batch_leave_one_out, group_normalized, leave_one_out
from dpo_jax.losses.measure import fixed_length, sequence_mean, token_mean
from dpo_jax.losses.needs import name_of, parts_of
from dpo_jax.parallel import on_host, shard_batch
from dpo_jax.structs import (
    Algorithm,
    Array,
    BadInput,
    Batch,
    Context,
    Memory,
    Metrics,
    Model,
    Params,
    TrainState,
    as_it_is,
    join,
)


class Plan(NamedTuple):
    """The parts of one algorithm."""

    model: Model
    draw: Draw
    advantage: Callable[[Array], Array]
    loss: Loss
    measure: Callable[[Array, Array], Array]
    penalty: Penalty
    skip_equal: bool
    passes: int
    minibatches: int


def score_function(logp: Array, old_logp: Array, advantage: Array) -> jax.Array:
    """`losses.reinforce`, which knows no old policy."""
    return losses.reinforce(logp, advantage)


def policy_gradient(
    model: Model,
    *,
    rewards: tuple[Reward, ...],
    reward_weights: tuple[float, ...] | None = None,
    advantage: Callable[..., Any] = leave_one_out,
    loss: Callable[..., Any] = score_function,
    measure: Callable[..., Any] = token_mean,
    beta: float = 0.0,
    kl: Estimator = losses.kl_k1,
    kl_in: Place = "reward",
    kl_target: float | None = None,
    kl_horizon: float = 10_000,
    n: int = 4,
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    missing_eos_penalty: float = 0.0,
    skip_equal: bool = False,
    passes: int = 1,
    minibatches: int = 1,
) -> Algorithm:
    """Trains on its own samples: every token of a response has the response's advantage.

    rewards: functions (records, responses) -> score_B of raw records and texts, summed under
    reward_weights. advantage: reward_BK -> advantage_BK (`losses.advantage`). loss: (logp,
    old_logp, advantage) -> loss of every token, `losses.clipped_surrogate` or `score_function`.
    measure: how tokens weigh (`losses.measure`). beta, kl, kl_in, kl_target, kl_horizon: see
    `penalty`. n, max_tokens, temperature, top_k, top_p: n responses to a prompt; log-probs are at
    the temperature and of the policy before top_k and top_p. missing_eos_penalty: taken off the
    score of a response that was cut. skip_equal: groups whose scores are all the same weigh
    nothing. passes, minibatches: over and of a rollout.
    Errors: BadInput for options that cannot be; from `prepare` for rows that are too short.
    """
    group_of_two = parts_of(advantage)[0] in (leave_one_out, group_normalized)
    if n < 2 and group_of_two:
        raise BadInput(
            f"algorithm.n={n}: {name_of(advantage)} compares the responses to a prompt; give 2 or "
            "more, or advantage=losses.advantage.batch_leave_one_out"
        )
    draw = Draw(
        rewards, reward_weights, n, max_tokens, temperature, top_k, top_p, missing_eos_penalty
    )
    penalty = Penalty(beta, kl, kl_in, kl_target, kl_horizon)
    plan = Plan(model, draw, advantage, loss, measure, penalty, skip_equal, passes, minibatches)
    made = Algorithm(
        init=partial(_init, plan),
        collect=as_it_is,
        measure=partial(measured, measure),
        objective=partial(_objective, plan),
        passes=passes,
        minibatches=minibatches,
        frozen=penalty.frozen,
        prepare=partial(prompts_alone, max_tokens=max_tokens),
    )
    return made._replace(online=partial(_online, plan, made))


reinforce = partial(
    policy_gradient,
    advantage=batch_leave_one_out,
    measure=fixed_length(1),
    beta=0.05,
    n=1,
)
rloo = partial(
    policy_gradient,
    advantage=leave_one_out,
    measure=fixed_length(1),
    beta=0.05,
    n=4,
)
grpo = partial(
    policy_gradient,
    advantage=group_normalized,
    loss=losses.clipped_surrogate,
    measure=sequence_mean,
    beta=0.04,
    kl=losses.kl_k3,
    kl_in="loss",
    n=8,
)
dapo = partial(
    grpo,
    measure=token_mean,
    loss=partial(losses.clipped_surrogate, high=0.28),
    beta=0.0,
    skip_equal=True,
)


def _init(plan: Plan, key: jax.Array, params: Params, frozen: Params) -> tuple[Params, Memory]:
    return params, plan.penalty.start()


def _online(plan: Plan, made: Algorithm, context: Context) -> Algorithm:
    sampler = Sampler(plan.model, plan.draw, context, plan.minibatches)
    facts = partial(token_facts, plan.model, temperature=plan.draw.temperature)
    compiled = jax.jit(facts, compiler_options=ROUNDED)
    return made._replace(collect=partial(_collect, plan, sampler, compiled))


def _collect(
    plan: Plan,
    sampler: Sampler,
    facts: Callable[..., TokenStatistics],
    state: TrainState,
    frozen: Params,
    batch: Batch,
    key: jax.Array,
) -> tuple[Batch, Memory]:
    """A rollout with its log-probs and advantages."""
    rollout = sampler(join(state.params, frozen), batch, key)
    rows = shard_batch(sampler.context.mesh, rollout.batch)
    found = on_host(facts(state.params, frozen, rows))
    score_BK, penalty = rollout.scores.total_BK, plan.penalty
    price_BKM = priced(penalty, state.memory, rollout, found)
    charged_BK = score_BK - price_BKM.sum(axis=-1) if penalty.place == "reward" else score_BK
    columns = {"advantage_RN": rollout.by_token(plan.advantage(np.asarray(charged_BK, np.float32)))}
    if plan.skip_equal:
        counts_BK = np.repeat(~equal(score_BK)[:, None], score_BK.shape[1], axis=1)
        columns["weight_RN"] = rollout.by_token(counts_BK) * np.asarray(rollout.batch.weight_RN)
    return completed(penalty, state.memory, sampler, rollout, found, price_BKM, columns)


def _objective(
    plan: Plan, params: Params, frozen: Params, memory: Memory, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The loss of the tokens under the measure, the price of the KL where it stands in the loss."""
    temperature = plan.draw.temperature
    found = current(plan.model, plan.penalty, params, frozen, batch, temperature=temperature)
    value, metrics = surrogate(plan.loss, found.logp_RN, batch)
    price, held_metrics = held(plan.penalty, memory, found, batch)
    return value + price, {"loss": value + price, **metrics, **held_metrics}
