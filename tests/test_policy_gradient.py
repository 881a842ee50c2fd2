"""Policy gradients where every response can be listed: sampled gradients against exact ones."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import online
import optax
import pytest
from tiny import relative_error

from dpo_jax import losses
from dpo_jax.algorithms.on_policy import token_facts
from dpo_jax.algorithms.penalty import Penalty
from dpo_jax.algorithms.policy import grpo, policy_gradient, reinforce, rloo, score_function
from dpo_jax.algorithms.ppo import ppo
from dpo_jax.data.packing import pack
from dpo_jax.logprobs import naive_token_logps, per_response
from dpo_jax.losses.advantage import group_normalized
from dpo_jax.losses.measure import fixed_length, sequence_mean, token_mean
from dpo_jax.structs import precise
from dpo_jax.train import make_update
from dpo_jax.worlds import enumerable

BETA = 0.3
COMMON: dict[str, Any] = {"rewards": (online.truth,), "max_tokens": online.STEPS, "beta": BETA}
SURE = 4.5  # standard errors; a true mean is further off once in 100 000 tries


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])


def exact_gradient(params, beta: float = BETA) -> np.ndarray:
    """That of minus the RLHF objective, every response listed."""
    world = online.WORLD

    def value(params):
        logp_BK = online.logps(params)
        return -jnp.mean(
            enumerable.objective(
                logp_BK, jnp.float32(world.ref_logp_BK), jnp.float32(world.reward_BK), beta
            )
        )

    return flat(jax.jit(jax.grad(value))(params))


def sampled_gradients(algorithm, params, draws: int, step_groups: int = 64) -> np.ndarray:
    """One gradient a rollout."""
    bound = online.bound(algorithm, step_groups=step_groups)
    state, prompts = online.started(bound, params), online.asked(step_groups)

    @jax.jit
    def gradient(params, batch):
        batch = bound.measure(batch)
        return jax.grad(bound.objective, has_aux=True)(params, online.FROZEN, {}, batch, None)[0]

    found = []
    for draw in range(draws):
        batch, _ = bound.collect(state, online.FROZEN, prompts, jax.random.key(draw))
        found.append(flat(gradient(params, batch)))
    return np.stack(found)


WITHOUT_STD = partial(
    grpo,
    **COMMON,
    advantage=partial(group_normalized, std=False),
    measure=fixed_length(1),
    kl=losses.kl_k1,
    kl_in="reward",
)
ESTIMATES = {
    "reinforce": (partial(reinforce, **COMMON, n=2), 1.0),
    "rloo": (partial(rloo, **COMMON), 1.0),
    "rloo with clipped ratios": (partial(rloo, **COMMON, loss=losses.clipped_surrogate), 1.0),
    # the mean of the group counts the response itself
    "grpo without std": (partial(WITHOUT_STD, n=4), 3 / 4),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_gradient_is_unbiased_for_the_enumerated_one(name):
    """Along the exact gradient and in five random directions."""
    algorithm, share = ESTIMATES[name]
    params = online.away()
    exact = share * exact_gradient(params)
    found = sampled_gradients(algorithm(online.MODEL), params, draws=32)
    random = np.random.default_rng(0).normal(size=(5, len(exact)))
    directions = np.concatenate([exact[None], random])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    along = found @ directions.T
    error = along.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert error[0] < 0.05 * np.linalg.norm(exact)  # so that a term that is missing would show
    np.testing.assert_array_less(np.abs(along.mean(axis=0) - directions @ exact), SURE * error)


def listed_batch():
    """All responses of the world, each weighed by the policy's probability, without gradient."""
    groups = online.WORLD.groups()
    batch = pack(groups, row_tokens=max(group.tokens for group in groups), rows=len(groups))
    zeros = np.zeros_like(batch.weight_RN)
    return replace(batch, advantage_RN=zeros, old_logp_RN=zeros, shared={"weight": 1.0})


def divergences(params, other):
    """(KL(policy, other), KL(other, policy)) at the source of every scored token, x_RN."""
    batch = listed_batch()

    def logp_RNV(weights):
        arrays = (batch.tokens_RT, batch.positions_RT, batch.until_RT)
        hidden_RTD, _ = online.MODEL.hidden(weights, *arrays)
        logp_RTV = jax.nn.log_softmax(precise(online.MODEL.unembed(weights, hidden_RTD)))
        return jax.vmap(lambda x_TV, n_N: x_TV[n_N])(logp_RTV, batch.source_RN)

    p, q = logp_RNV(params), logp_RNV(other)
    return jnp.sum(jnp.exp(p) * (p - q), -1), jnp.sum(jnp.exp(q) * (q - p), -1)


def by_token(x_RGK, batch):
    """A value of every response at each of its tokens, x_RN."""
    assert batch.end_RGK.shape[1] == 1
    x_RN = jnp.take_along_axis(x_RGK[:, 0], jnp.maximum(batch.slot_RN, 0), axis=1)
    return np.where(batch.slot_RN >= 0, x_RN, 0)


def met(params):
    """All responses, each as often as the policy says it."""
    batch = listed_batch()
    logp_RN = naive_token_logps(online.MODEL, params, batch)
    ref_RN = naive_token_logps(online.MODEL, online.REFERENCE, batch)
    weight_RN = by_token(jnp.exp(per_response(logp_RN, batch)), batch)
    return replace(batch, weight_RN=weight_RN, ref_logp_RN=np.asarray(ref_RN))


def pulled(params, batch, kl, kl_in) -> np.ndarray:
    """The gradient of an objective with this KL."""
    algorithm = policy_gradient(
        online.MODEL, rewards=(online.truth,), beta=1.0, kl=kl, kl_in=kl_in, loss=score_function
    )
    gradient = jax.jit(jax.grad(algorithm.objective, has_aux=True))
    return flat(gradient(params, online.FROZEN, {}, batch, None)[0])


@pytest.mark.parametrize(
    ("kl", "alone", "with_loss"),
    [
        (losses.kl_k1, True, True),
        (losses.kl_k2, False, False),
        (losses.kl_k3, False, True),
        (losses.kl_abs, False, False),
        (losses.kl_exact, False, True),
    ],
)
def test_what_a_kl_in_the_reward_pulls_to(kl, alone, with_loss):
    """Its gradient, every response listed, is that of KL(policy, reference) for k1 and no other;
    of an unbiased estimate it is once that of the loss is added, which is what it lacks."""
    params = online.away()
    batch, penalty = met(params), Penalty(1.0, kl, "reward")
    found = token_facts(online.MODEL, params, online.FROZEN, batch, temperature=1.0)
    price_RGK = per_response(penalty.tokens(found, found.ref_logp_RN), batch)
    charged = replace(batch, advantage_RN=-by_token(price_RGK, batch))
    reward, loss = pulled(params, charged, kl, "reward"), pulled(params, batch, kl, "loss")
    ref_BK = jnp.float32(online.WORLD.ref_logp_BK)
    wanted = flat(jax.grad(lambda x: jnp.sum(enumerable.kl(online.logps(x), ref_BK)))(params))

    def off(gradient: np.ndarray) -> float:
        return float(np.linalg.norm(gradient - wanted) / np.linalg.norm(wanted))

    for gradient, right in ((reward, alone), (reward + loss, with_loss)):
        assert off(gradient) < 1e-3 if right else off(gradient) > 0.1


@pytest.mark.parametrize(
    ("kl", "pull"),
    [
        (losses.kl_k1, None),
        (losses.kl_k2, 0),
        (losses.kl_exact, 0),
        (losses.kl_k3, 1),
    ],
)
def test_what_a_kl_in_the_loss_pulls_to(kl, pull):
    """Its gradient, every response listed, is that of a KL at every token that the policy meets,
    however it came there: KL(policy, reference) for k2 and exact, the other way round for k3,
    none for k1."""
    params, batch = online.away(), met(online.away())
    found, weight_RN = pulled(params, batch, kl, "loss"), batch.weight_RN
    if pull is None:
        np.testing.assert_allclose(found, 0, atol=1e-5)
        return

    def expected(params):
        return jnp.sum(weight_RN * divergences(params, online.REFERENCE)[pull])

    wanted = flat(jax.grad(expected)(params))
    assert np.linalg.norm(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, atol=float(1e-4 * np.linalg.norm(wanted)))


@pytest.mark.parametrize(
    ("measure", "value", "clipped"),
    [
        (token_mean, (-1.2 - 1 - 1 + 1.6) / 4, 2 / 4),  # DAPO; BNPO where a step is one batch
        (sequence_mean, ((-1.2 - 1 - 1) / 3 + 1.6) / 2, (1 / 3 + 1) / 2),  # GRPO
        (fixed_length(5), (-1.2 - 1 - 1 + 1.6) / (2 * 5), 2 / 4),  # Dr. GRPO
    ],
    ids=["token mean", "sequence mean", "fixed length"],
)
def test_clips_and_aggregations_by_hand(measure, value, clipped):
    """Three tokens of advantage 1 under ratios 1.5, 1, 1: the first stops at 1.2. One token of
    advantage -2 under 0.5: its loss is 2 * 0.8, not 2 * 0.5, and stands still."""
    free: dict[str, Any] = {**COMMON, "beta": 0.0}
    algorithm = grpo(online.MODEL, **free, measure=measure)
    batch = pack([(np.array([0]), [np.array([1, 2, 1]), np.array([0])])], row_tokens=6)
    logp_RN = naive_token_logps(online.MODEL, online.REFERENCE, batch)
    first_RN, second_RN = (np.asarray(batch.slot_RN) == k for k in (0, 1))
    ratio_RN = np.where(second_RN, 0.5, 1.0)
    ratio_RN[0, np.flatnonzero(first_RN)[0]] = 1.5
    batch = replace(
        batch,
        advantage_RN=np.where(first_RN, 1.0, -2.0).astype(np.float32),
        old_logp_RN=np.asarray(logp_RN - np.log(ratio_RN), np.float32),
    )
    batch = algorithm.measure(batch)
    found, metrics = algorithm.objective(online.REFERENCE, {}, {}, batch, None)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"], clipped, rtol=1e-5)


def test_equal_groups_weigh_nothing_where_they_are_skipped():
    """A reward that only one prompt varies: the rest of the step is as if it were not there."""

    def half(records, responses):
        return online.truth(records, responses) * [record["prompt"] == "a" for record in records]

    def gradients(**changes):
        algorithm = partial(grpo, **COMMON | {"beta": 0.0, "rewards": (half,)}, n=4)
        bound = online.bound(algorithm(online.MODEL, **changes))
        state = online.started(bound)
        batch, _ = bound.collect(state, {}, online.asked(8), jax.random.key(0))
        whole = bound.measure(batch)
        gradient = jax.jit(jax.grad(bound.objective, has_aux=True))
        return gradient(state.params, {}, {}, whole, None)[0], batch.shared

    plain, values = gradients()
    skipped, _ = gradients(skip_equal=True)
    share = 1 - float(values["frac_reward_zero_std"])
    assert 0 < share <= 0.5
    assert relative_error(jax.tree.map(lambda x: x * share, skipped), plain) < 1e-4


TRAINED = {
    "reinforce": partial(reinforce, **COMMON, n=4),
    "rloo": partial(rloo, **COMMON, n=4),
    "grpo without std": partial(WITHOUT_STD, n=8),
    # lam < 1 lets errors of the value into the gradient: at 0.5 1.9% are left
    "ppo": partial(ppo, **COMMON, n=4, passes=2, value_weight=0.5, lam=1.0),
}


@pytest.mark.parametrize("name", TRAINED)
def test_the_rlhf_objective_is_reached(name):
    """In 300 steps of 16 prompts: (J* - J) / (J* - J(reference)) is 2% at most.

    What is left is the way through the weights, not the samples: as many steps along the exact
    gradient leave 0.7%.
    """
    algorithm, steps = TRAINED[name](online.MODEL), 300
    bound, prompts = (
        online.bound(algorithm, step_groups=16),
        online.asking(16, steps=steps),
    )
    rate = optax.cosine_decay_schedule(0.006, steps * bound.passes)
    tx = optax.chain(optax.clip_by_global_norm(0.3), optax.adam(rate))
    state = online.started(bound)
    state = replace(state, opt_state=tx.init(state.params))
    update, measure = jax.jit(make_update(bound, tx)), jax.jit(bound.measure)
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(0), step)
        batch, memory = bound.collect(state, online.FROZEN, prompts.batch(step), key)
        state = replace(state, memory=memory)
        part = measure(replace(batch, shared={}))
        for _ in range(bound.passes):
            state, _ = update(state, online.FROZEN, part, key)
    world = online.WORLD

    def value(logp_BK):
        return float(enumerable.objective(logp_BK, world.ref_logp_BK, world.reward_BK, BETA).mean())

    best, first = value(world.optimal_policy(BETA)), value(world.ref_logp_BK)
    gap = (best - value(np.asarray(online.logps(state.params)))) / (best - first)
    assert 0 <= gap <= 0.02
