"""PPO (Schulman et al. 1707.06347) as RLHF has it (1909.08593, 2203.02155): every token is an
action, its reward the price of its KL, and the score comes with the last one.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from dpo_jax.algorithms.margins import weighted
from dpo_jax.algorithms.on_policy import (
    WEIGHT,
    completed,
    current,
    held,
    measured,
    priced,
    surrogate,
    token_facts,
)
from dpo_jax.algorithms.penalty import Estimator, Penalty, Place
from dpo_jax.algorithms.rollout import Draw, Reward, Rollout, Sampler, prompts_alone
from dpo_jax.logprobs import ROUNDED, TokenStatistics, readout, scored_hidden
from dpo_jax.losses.advantage import gae, whitened
from dpo_jax.losses.measure import token_mean, within
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

VALUE = "value_D"  # the head of the value, beside the weights of its body
CRITIC = "critic"  # a body of its own, as the policy's


class Credit(NamedTuple):
    """How rewards become advantages."""

    gamma: float
    lam: float
    whiten_rewards: bool
    whiten_advantages: bool


class Plan(NamedTuple):
    """The parts of one PPO."""

    model: Model
    draw: Draw
    penalty: Penalty
    loss: Callable[..., Array]
    separate: bool
    value_weight: float
    value_clip: float
    credit: Credit
    minibatches: int


def ppo(
    model: Model,
    *,
    rewards: tuple[Reward, ...],
    reward_weights: tuple[float, ...] | None = None,
    loss: Callable[..., Array] = losses.clipped_surrogate,
    critic: Literal["shared", "separate"] = "shared",
    value_weight: float = 0.1,
    value_clip: float = 0.2,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    beta: float = 0.05,
    kl: Estimator = losses.kl_k1,
    kl_in: Place = "reward",
    kl_target: float | None = None,
    kl_horizon: float = 10_000,
    n: int = 1,
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    missing_eos_penalty: float = 0.0,
    passes: int = 4,
    minibatches: int = 1,
) -> Algorithm:
    """Proximal policy optimisation with generalised advantages; defaults are TRL's.

    loss: (logp, old_logp, advantage) -> loss of every token. critic: the value is a head on the
    policy's own body or on a second one. value_weight, value_clip: of `losses.clipped_value`.
    gamma, lam: of `losses.advantage.gae`. whiten_rewards: the rewards of the tokens are divided by
    their standard deviation. The other options are those of `policy.policy_gradient`.
    Errors: BadInput for options that cannot be; from `prepare` for rows that are too short.
    """
    if critic not in ("shared", "separate"):
        raise BadInput(f"algorithm.critic={critic!r}; it must be shared or separate")
    draw = Draw(
        rewards, reward_weights, n, max_tokens, temperature, top_k, top_p, missing_eos_penalty
    )
    penalty = Penalty(beta, kl, kl_in, kl_target, kl_horizon)
    credit, own = Credit(gamma, lam, whiten_rewards, whiten_advantages), critic == "separate"
    plan = Plan(model, draw, penalty, loss, own, value_weight, value_clip, credit, minibatches)
    made = Algorithm(
        init=partial(_init, plan),
        collect=as_it_is,
        measure=partial(measured, token_mean),
        objective=partial(_objective, plan),
        passes=passes,
        minibatches=minibatches,
        frozen=penalty.frozen,
        prepare=partial(prompts_alone, max_tokens=max_tokens),
    )
    return made._replace(online=partial(_online, plan, made))


def _init(plan: Plan, key: jax.Array, params: Params, frozen: Params) -> tuple[Params, Memory]:
    """A head that says 0, or that of a parent that has one; the second body starts as the first."""
    memory = plan.penalty.start()
    if plan.separate:
        if CRITIC in params:
            return params, memory
        body = jax.tree.map(jnp.copy, {k: v for k, v in params.items() if k != VALUE})
        return {**params, CRITIC: {**body, VALUE: _head(plan, params, frozen)}}, memory
    if VALUE in params:
        return params, memory
    return {**params, VALUE: _head(plan, params, frozen)}, memory


def _head(plan: Plan, params: Params, frozen: Params) -> jax.Array:
    one_RT = jnp.zeros((1, 1), jnp.int32)
    hidden = partial(plan.model.hidden, join(params, frozen))
    hidden_RTD, _ = jax.eval_shape(hidden, one_RT, one_RT, one_RT + 1)
    kind = jnp.promote_types(hidden_RTD.dtype, jnp.float32)
    return jnp.zeros(hidden_RTD.shape[-1], kind)


def _online(plan: Plan, made: Algorithm, context: Context) -> Algorithm:
    sampler = Sampler(plan.model, plan.draw, context, plan.minibatches)
    facts = jax.jit(partial(_facts, plan), compiler_options=ROUNDED)
    return made._replace(collect=partial(_collect, plan, sampler, facts))


def _facts(plan: Plan, params: Params, frozen: Params, batch: Batch) -> TokenStatistics:
    found = token_facts(
        plan.model,
        params,
        frozen,
        batch,
        temperature=plan.draw.temperature,
        readout_D=None if plan.separate else params[VALUE],
    )
    return _valued(plan, params, frozen, batch, found)


def _valued(
    plan: Plan, params: Params, frozen: Params, batch: Batch, found: TokenStatistics
) -> TokenStatistics:
    """The value of every state as readout_RN, 0 where unused."""
    if not plan.separate:
        value_RN = found.readout_RN
    else:
        body = params[CRITIC]
        hidden_RND = scored_hidden(plan.model, join(body, frozen), batch)
        value_RN = readout(hidden_RND, body[VALUE])
    assert value_RN is not None
    return found._replace(readout_RN=jnp.where(batch.slot_RN >= 0, value_RN, 0.0))


def _collect(
    plan: Plan,
    sampler: Sampler,
    facts: Callable[..., TokenStatistics],
    state: TrainState,
    frozen: Params,
    batch: Batch,
    key: jax.Array,
) -> tuple[Batch, Memory]:
    """A rollout with its log-probs, values, advantages and returns."""
    rollout = sampler(join(state.params, frozen), batch, key)
    rows = shard_batch(sampler.context.mesh, rollout.batch)
    found = on_host(facts(state.params, frozen, rows))
    penalty = plan.penalty
    price_BKM = priced(penalty, state.memory, rollout, found)
    value_BKM = rollout.by_response(found.readout_RN)
    charged_BKM = price_BKM if penalty.place == "reward" else np.zeros_like(price_BKM)
    advantage_BKM = _advantages(plan, rollout, charged_BKM, value_BKM)
    return_BKM = advantage_BKM + value_BKM
    if plan.credit.whiten_advantages:
        advantage_BKM = _whitened(advantage_BKM, rollout.mask_BKM)
    columns = {
        "advantage_RN": rollout.by_token(advantage_BKM),
        "return_RN": rollout.by_token(return_BKM),
        "value_RN": rollout.by_token(value_BKM),
    }
    return completed(penalty, state.memory, sampler, rollout, found, price_BKM, columns)


def _advantages(
    plan: Plan, rollout: Rollout, price_BKM: np.ndarray, value_BKM: np.ndarray
) -> np.ndarray:
    """gae of minus the prices and, at the last token, the score."""
    mask_BKM, reward_BKM = rollout.mask_BKM, -price_BKM
    last_BK1 = rollout.length_BK[..., None] - 1
    paid_BK1 = np.take_along_axis(reward_BKM, last_BK1, -1) + rollout.scores.total_BK[..., None]
    np.put_along_axis(reward_BKM, last_BK1, paid_BK1, axis=-1)
    if plan.credit.whiten_rewards:
        reward_BKM = _whitened(reward_BKM, mask_BKM, shift=False)
    M = mask_BKM.shape[-1]
    reward_BT, value_BT, mask_BT = (
        x_BKM.reshape(-1, M).astype(np.float32) for x_BKM in (reward_BKM, value_BKM, mask_BKM)
    )
    found = gae(reward_BT, value_BT, mask_BT, gamma=plan.credit.gamma, lam=plan.credit.lam)
    return np.asarray(found).reshape(mask_BKM.shape)


def _whitened(x_BKM: np.ndarray, mask_BKM: np.ndarray, *, shift: bool = True) -> np.ndarray:
    M = mask_BKM.shape[-1]
    x_BT = x_BKM.reshape(-1, M).astype(np.float32)
    flat = whitened(x_BT, mask_BKM.reshape(-1, M), shift=shift)
    return np.asarray(flat).reshape(x_BKM.shape)


def _objective(
    plan: Plan, params: Params, frozen: Params, memory: Memory, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Surrogate and value loss of the tokens, the price of the KL where it stands in the loss."""
    found = current(
        plan.model,
        plan.penalty,
        params,
        frozen,
        batch,
        temperature=plan.draw.temperature,
        readout_D=None if plan.separate else params[VALUE],
    )
    found = _valued(plan, params, frozen, batch, found)
    value, metrics = surrogate(plan.loss, found.logp_RN, batch)
    miss, value_metrics = _value_loss(plan, found.readout_RN, batch)
    price, held_metrics = held(plan.penalty, memory, found, batch)
    total = value + plan.value_weight * miss + price
    return total, {"loss": total, **metrics, **value_metrics, **held_metrics}


def _value_loss(plan: Plan, value_RN: Array | None, batch: Batch) -> tuple[jax.Array, Metrics]:
    assert value_RN is not None and batch.value_RN is not None and batch.return_RN is not None
    loss_RN = losses.clipped_value(value_RN, batch.value_RN, batch.return_RN, clip=plan.value_clip)
    miss = weighted(batch.weight_RN, loss_RN)
    share_RN = within(batch.weight_RN, batch.shared[WEIGHT])
    # the square that counts is the clipped one where it is the larger
    clipped_RN = 2 * loss_RN > (value_RN - batch.return_RN) ** 2
    return miss, {
        "loss/value_avg": jax.lax.stop_gradient(miss),
        "val/clipfrac_avg": weighted(share_RN, jnp.where(clipped_RN, 1.0, 0.0)),
    }
