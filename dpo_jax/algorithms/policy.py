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
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from dpo_jax.algorithms.margins import weighted
from dpo_jax.algorithms.penalty import Estimator, Penalty, Place
from dpo_jax.algorithms.rollout import (
    Draw,
    Reward,
    Rollout,
    Sampler,
    equal,
    prompts_alone,
    summary,
)
from dpo_jax.logprobs import ROUNDED, TokenStatistics, token_statistics
from dpo_jax.losses.advantage import batch_leave_one_out, group_normalized, leave_one_out
from dpo_jax.losses.divergence import bounded
from dpo_jax.losses.measure import fixed_length, sequence_mean, token_mean, within
from dpo_jax.losses.needs import name_of, parts_of
from dpo_jax.parallel import shard_batch
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

Loss = Callable[[Array, Array, Array], Array]  # (logp, old_logp, advantage) -> loss, elementwise
WEIGHT = "weight"  # in `shared`: what the weights of a whole optimizer step sum to


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
        measure=partial(_measured, plan),
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


def token_facts(
    model: Model,
    params: Params,
    frozen: Params,
    batch: Batch,
    *,
    temperature: float,
    readout_D: Array | None = None,
) -> TokenStatistics:
    """What policy and reference say of the sampled tokens, by the code that trains on them."""
    return token_statistics(
        model,
        join(params, frozen),
        batch,
        reference=anchor(frozen),
        policy_kl=True,
        entropy=True,
        readout_D=readout_D,
        temperature=temperature,
    )


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
    found = facts(state.params, frozen, rollout.batch)
    score_BK, penalty = rollout.scores.total_BK, plan.penalty
    price_BKM = priced(penalty, state.memory, rollout, found)
    reward_BK = score_BK - price_BKM.sum(axis=-1)
    charged_BK = reward_BK if penalty.place == "reward" else score_BK
    columns = {"advantage_RN": rollout.by_token(plan.advantage(np.asarray(charged_BK, np.float32)))}
    if plan.skip_equal:
        counts_BK = np.repeat(~equal(score_BK)[:, None], score_BK.shape[1], axis=1)
        columns["weight_RN"] = rollout.by_token(counts_BK) * np.asarray(rollout.batch.weight_RN)
    values = summary(rollout) | objective_metrics(rollout, found, score_BK, reward_BK)
    memory = penalty.adapted(state.memory, values.get("objective/kl", 0.0), score_BK.size)
    if penalty.target is not None:
        values["objective/kl_coef"] = float(penalty.coefficient(state.memory))
    return completed(sampler, rollout, found, columns, values), memory


def anchor(frozen: Params) -> Params | None:
    """The weights that the policy is held to, as a Model takes them; None where there are none."""
    return join(frozen["reference"], frozen) if "reference" in frozen else None


def priced(
    penalty: Penalty, memory: Memory, rollout: Rollout, found: TokenStatistics
) -> np.ndarray:
    """The coefficient times the KL of every token, price_BKM; 0 without a coefficient."""
    if not penalty.beta:
        return np.zeros(rollout.sampled_BKM.shape)
    kl_BKM = rollout.by_response(penalty.tokens(found, found.ref_logp_RN))
    return float(penalty.coefficient(memory)) * kl_BKM


def objective_metrics(
    rollout: Rollout, found: TokenStatistics, score_BK: np.ndarray, reward_BK: np.ndarray
) -> dict[str, float]:
    """TRL's `objective/`: means over responses. kl, to the reference, and entropy are exact at
    every sampled token and summed over it; rlhf_reward is the score less the price of the KL."""
    gap = rollout.by_response(found.logp_RN)
    gap = np.abs(gap - rollout.sampled_BKM)[rollout.mask_BKM]
    values = {
        "objective/entropy": rollout.by_response(found.entropy_RN).sum(-1).mean(),
        "objective/scores": score_BK.mean(),
        "objective/rlhf_reward": reward_BK.mean(),
        "objective/non_score_reward": (reward_BK - score_BK).mean(),
        "sampling/sampling_logp_difference/mean": gap.mean(),
        "sampling/sampling_logp_difference/max": gap.max(),
    }
    if found.policy_kl_RN is not None:
        values["objective/kl"] = rollout.by_response(found.policy_kl_RN).sum(-1).mean()
    return {name: float(value) for name, value in values.items()}


def completed(
    sampler: Sampler,
    rollout: Rollout,
    found: TokenStatistics,
    columns: dict[str, np.ndarray],
    values: dict[str, float],
) -> Batch:
    """The rows with the columns that training reads, and the metrics as `shared`."""
    known = {"old_logp_RN": found.logp_RN, "ref_logp_RN": found.ref_logp_RN}
    shared = {name: np.float32(value) for name, value in values.items()}
    host = replace(jax.device_get(rollout.batch), **jax.device_get(known), **columns, shared=shared)
    return shard_batch(sampler.context.mesh, host)


def _measured(plan: Plan, batch: Batch) -> Batch:
    weight_RN = plan.measure(batch.weight_RN, batch.slot_RN)
    return replace(batch, weight_RN=weight_RN, shared={WEIGHT: jnp.sum(weight_RN)})


def _objective(
    plan: Plan, params: Params, frozen: Params, memory: Memory, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The loss of the tokens under the measure, the price of the KL where it stands in the loss."""
    penalty = plan.penalty
    exact = penalty.in_loss and penalty.exact
    found = token_statistics(
        plan.model,
        join(params, frozen),
        batch,
        reference=anchor(frozen) if exact else None,
        policy_kl=exact,
        temperature=plan.draw.temperature,
    )
    value, metrics = surrogate(plan.loss, found.logp_RN, batch)
    total = value
    if penalty.in_loss:
        kl = weighted(batch.weight_RN, penalty.tokens(found, batch.ref_logp_RN))
        total = value + penalty.coefficient(memory) * kl
        metrics["loss/kl_avg"] = jax.lax.stop_gradient(kl)
    return total, {"loss": total, **metrics}


def surrogate(loss: Loss, logp_RN: Array, batch: Batch) -> tuple[jax.Array, Metrics]:
    """(value, metrics) of a loss of tokens under the measure.

    policy/clipfrac_avg is the share of the weight of tokens that have an advantage at which the
    loss stands still.
    """
    old_RN, advantage_RN = batch.old_logp_RN, batch.advantage_RN
    assert old_RN is not None and advantage_RN is not None
    fixed_RN = jax.lax.stop_gradient(logp_RN)
    _, back = jax.vjp(lambda x_RN: loss(x_RN, old_RN, advantage_RN), fixed_RN)
    (slope_RN,) = back(jnp.ones_like(fixed_RN))
    still_RN = (slope_RN == 0) & (advantage_RN != 0)
    value = weighted(batch.weight_RN, loss(logp_RN, old_RN, advantage_RN))
    share_RN = within(batch.weight_RN, batch.shared[WEIGHT])
    ratio_RN = jnp.exp(bounded(jnp.asarray(fixed_RN - old_RN)))
    return value, {
        "loss/policy_avg": jax.lax.stop_gradient(value),
        "policy/clipfrac_avg": weighted(share_RN, jnp.where(still_RN, 1.0, 0.0)),
        "policy/approxkl_avg": weighted(share_RN, losses.kl_k2(fixed_RN, old_RN)),
        "val/ratio": weighted(share_RN, ratio_RN),
    }
