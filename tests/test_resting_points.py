"""Where algorithms come to rest that do not maximise the RLHF objective: derived, and reached.

The policy is a table, so nothing but the objective decides where it ends. It climbs the expected
gradient of the real objective: all responses y of the world stand in the batch, each under the
weight pi(y) with the advantage that it has on average. Where it rests, no choice at any beginning
s of a response can gain. With ref the reference, b the coefficient, A(y) the advantage,

    Q(s, v) = E[A(y) | s, then v]     the policy going on as it does

KL in the loss, a price of the choice at s alone and not of what it leads to, maximises at every s

    k1      sum_v pi Q                          no pull: the best choice, 1
    k2      sum_v pi Q - b KL(pi, ref)          pi = ref exp(Q / b) / Z
    exact   the same
    k3      sum_v pi Q - b KL(ref, pi)          pi = b ref / (l - Q), l > max Q so that the sum is 1
    abs     sum_v pi Q - b sum_v |pi - ref|     what is less than 2 b behind the best stays, the
                                                rest goes to the best

The RLHF objective has the KL of all that follows in Q as well, which its policy is paid for:
pi* = ref exp(r / b) / Z over responses. With responses of one token there is nothing to follow and
k2 rests at pi*.

KL in the reward is held like a score, f(y) = A(y) - b k(y), so that where a choice has a
probability its f has one value c, that of s:

    k1      Q - b d = c, d = log pi / ref       pi = ref exp((Q - c) / b): pi*
    exact   k is the same for every v           the best choice; it costs -log ref, which counts
                                                for the choices before
    k2, k3, abs                                 k(d) = (Q - c) / b with d >= 0, or pi = 0: at d < 0
                                                less probability is more k and less f, down to 0
Which choices die is a matter of the way there and is read off; what the others have is derived.

GRPO divides by the standard deviation of its group. Of n = 2 the advantage is then 1/sqrt(2) for
the better one and the opposite for the other, however far apart they are (eps aside). The
advantage of y is a mean over what the others of the group are, which moves with the policy:
A(y) = E[group_normalized(r(y), r(y_2), ..)_1], y_2, .. from pi, and the rule above holds with it.
With k1 in the reward the scores less the price are equal at pi*, and so no advantage is left
there, divided or not.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import root_scalar

from dpo_jax import losses
from dpo_jax.algorithms.on_policy import WEIGHT, token_facts
from dpo_jax.algorithms.penalty import Penalty
from dpo_jax.algorithms.policy import grpo, policy_gradient
from dpo_jax.data.packing import pack
from dpo_jax.logprobs import per_response
from dpo_jax.losses.advantage import group_normalized
from dpo_jax.structs import Algorithm, Batch, Model
from dpo_jax.worlds import enumerable

BETA = 0.5
NEAR, FAR = 0.005, 0.05  # total variation between two policies, the mean over prompts
LONG = enumerable.random_world(vocabulary=3, steps=3, seed=7)
SHORT = enumerable.random_world(vocabulary=5, steps=1, prompts=2, seed=2)
STEPS = 2000  # of the climb
# (Q_V, ref_V, alive_V) -> (p_V, value): what is chosen, and what it is worth to the choice before
Choice = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, float]]
Advantage = Callable[[jax.Array, jax.Array], jax.Array]  # (logp_BK, score_BK) -> advantage_BK


# The table


def contexts(world: enumerable.World) -> np.ndarray:
    """What a policy may stand behind, as a number each: every prompt with every beginning."""
    path = enumerable.tree(world.vocabulary, world.steps)
    behind = [(*prompt, *prefix) for prompt in world.prompts for prefix in path.prefixes]
    return np.array([sum((v + 1) * 8**i for i, v in enumerate(ids)) for ids in behind])


@cache
def table(world: enumerable.World) -> Model:
    """A Model whose weights are the logits behind every context, in the order of `contexts`."""
    known_D = contexts(world)

    def hidden(params, tokens_RT, positions_RT, until_RT, cache=None):
        query_T1 = np.arange(tokens_RT.shape[1])[None, :, None]
        seen_RTS = (query_T1 >= query_T1.transpose(0, 2, 1)) & (
            query_T1 < jnp.asarray(until_RT)[:, None, :]
        )
        number_RT = (jnp.asarray(tokens_RT) + 1) * 8 ** jnp.asarray(positions_RT)
        context_RT = jnp.sum(jnp.where(seen_RTS, number_RT[:, None, :], 0), axis=-1)
        here_RTD = context_RT[:, :, None] == known_D[None, None, :]
        return here_RTD.astype(params["logit_DV"].dtype), cache

    def init(key):
        return {"logit_DV": jax.random.normal(key, (len(known_D), world.vocabulary))}

    return Model(init, hidden, lambda params, hidden: hidden @ params["logit_DV"])


def start(world: enumerable.World) -> Any:
    """The reference: every choice open."""
    rng = np.random.default_rng(4)
    return {
        "logit_DV": jnp.asarray(0.7 * rng.normal(size=(len(contexts(world)), world.vocabulary)))
    }


def logps(world: enumerable.World, params: Any) -> jax.Array:
    """The table as a policy over whole responses, logp_BK."""
    logits_BTV = params["logit_DV"].reshape(len(world.prompts), -1, world.vocabulary)
    return enumerable.autoregressive(logits_BTV, world.steps)


def climbed(
    world: enumerable.World,
    algorithm: Algorithm,
    advantage: Advantage,
    price: Penalty | None = None,
) -> np.ndarray:
    """Where the policy is, p_BK, after it has climbed the expected gradient from the reference.

    price: of a KL in the reward, None where there is none.
    """
    groups, model, reference = world.groups(), table(world), start(world)
    listed = pack(groups, row_tokens=max(group.tokens for group in groups), rows=len(groups))
    record_R, slot_RN = np.asarray(listed.record_RG)[:, 0], np.asarray(listed.slot_RN)
    assert listed.end_RGK.shape[1] == 1
    frozen, B = {"reference": reference}, len(groups)
    tx = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))

    def by_token(x_BK: jax.Array) -> jax.Array:
        x_RN = x_BK[record_R[:, None], np.maximum(slot_RN, 0)]
        return jnp.where(slot_RN >= 0, x_RN, 0.0)

    def expected(params) -> Batch:
        found = token_facts(model, params, frozen, listed, temperature=1.0)
        logp_BK, score_BK = logps(world, params), jnp.asarray(world.reward_BK)
        if price is not None:
            k_RK = per_response(price.tokens(found, found.ref_logp_RN), listed)[:, 0]
            score_BK = score_BK - price.beta * k_RK[np.argsort(record_R)]
        return replace(
            listed,
            weight_RN=by_token(jnp.exp(logp_BK)) / B,
            advantage_RN=by_token(advantage(logp_BK, score_BK)),
            old_logp_RN=found.logp_RN,
            ref_logp_RN=found.ref_logp_RN,
            shared={WEIGHT: 1.0},
        )

    def step(carry, _):
        params, opt_state = carry
        batch = jax.lax.stop_gradient(expected(params))
        gradient = jax.grad(algorithm.objective, has_aux=True)
        grads, _ = gradient(params, frozen, {}, batch, None)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    begun = (reference, tx.init(reference))
    (params, _), _ = jax.jit(lambda begun: jax.lax.scan(step, begun, None, length=STEPS))(begun)
    return np.exp(np.asarray(logps(world, params)))


# What is expected


def rest(
    world: enumerable.World, score_BK: np.ndarray, choose: Choice, found_BK: np.ndarray
) -> np.ndarray:
    """Where a policy with these advantages rests, p_BK: from the last choices to the first."""
    path = enumerable.tree(world.vocabulary, world.steps)
    there_KN = np.arange(world.steps) < path.length_K[:, None]
    ref_BTV = np.asarray(jax.nn.softmax(start(world)["logit_DV"]))
    ref_BTV = ref_BTV.reshape(len(world.prompts), len(path.prefixes), -1)
    p_BTV = np.zeros_like(ref_BTV)
    for b, score_K in enumerate(score_BK):
        mass_TV, value = (
            np.zeros(ref_BTV.shape[1:]),
            dict(zip(world.responses, score_K, strict=True)),
        )
        at = (path.source_KN[there_KN], path.target_KN[there_KN])
        np.add.at(mass_TV, at, np.repeat(found_BK[b], path.length_K))
        alive_TV = mass_TV >= 1e-3 * mass_TV.max(axis=1, keepdims=True)
        for t, prefix in reversed(list(enumerate(path.prefixes))):
            Q_V = np.array([value[*prefix, v] for v in range(world.vocabulary)])
            p_BTV[b, t], value[prefix] = choose(Q_V, ref_BTV[b, t], alive_TV[t])
    step_BKN = p_BTV[:, path.source_KN, path.target_KN]
    return np.where(there_KN, step_BKN, 1).prod(axis=-1)


def zero(f: Callable[[float], float], low: float, high: float) -> float:
    return float(root_scalar(f, bracket=(low, high)).root)


def best(Q_V: np.ndarray, ref_V: np.ndarray, alive_V: np.ndarray):
    return np.eye(len(Q_V))[Q_V.argmax()], Q_V.max()


def best_and_paid(Q_V: np.ndarray, ref_V: np.ndarray, alive_V: np.ndarray):
    v = Q_V.argmax()
    return np.eye(len(Q_V))[v], Q_V[v] + BETA * np.log(ref_V[v])


def reverse(Q_V: np.ndarray, ref_V: np.ndarray, alive_V: np.ndarray):
    p_V = ref_V * np.exp(Q_V / BETA)
    return p_V / p_V.sum(), p_V @ Q_V / p_V.sum()


def reverse_and_paid(Q_V: np.ndarray, ref_V: np.ndarray, alive_V: np.ndarray):
    p_V = ref_V * np.exp(Q_V / BETA)
    return p_V / p_V.sum(), BETA * np.log(p_V.sum())


def forward(Q_V: np.ndarray, ref_V: np.ndarray, alive_V: np.ndarray):
    top = Q_V.max()
    lagrangian = zero(lambda x: np.sum(BETA * ref_V / (x - Q_V)) - 1, top + 1e-9, top + BETA)
    p_V = BETA * ref_V / (lagrangian - Q_V)
    return p_V, p_V @ Q_V


def variation(Q_V: np.ndarray, ref_V: np.ndarray, alive_V: np.ndarray):
    p_V = np.where(Q_V.max() - Q_V > 2 * BETA, 0, ref_V)
    p_V[Q_V.argmax()] += 1 - p_V.sum()
    return p_V, p_V @ Q_V


def survivors(inverse: Callable[[float], float]) -> Choice:
    """inverse: k -> d, the one that is 0 or more."""

    def choose(Q_V: np.ndarray, ref_V: np.ndarray, alive_V: np.ndarray):
        def policy(c: float) -> np.ndarray:
            d_V = [
                inverse((Q - c) / BETA) if there else -np.inf
                for Q, there in zip(Q_V, alive_V, strict=True)
            ]
            return ref_V * np.exp(d_V)

        least = Q_V[alive_V].min()
        if policy(least).sum() > 1:  # where the policy never comes nothing had to settle
            return ref_V, least
        c = zero(lambda c: policy(c).sum() - 1, least - 20, least)
        return policy(c), c

    return choose


def k3_inverse(k: float) -> float:
    return zero(lambda d: np.expm1(-d) + d - k, 0, k + 1)


IN_LOSS = {
    "k1": (losses.kl_k1, best),
    "k2": (losses.kl_k2, reverse),
    "exact": (losses.kl_exact, reverse),
    "k3": (losses.kl_k3, forward),
    "abs": (losses.kl_abs, variation),
}
IN_REWARD = {
    "k1": (losses.kl_k1, reverse_and_paid),
    "exact": (losses.kl_exact, best_and_paid),
    "k2": (losses.kl_k2, survivors(lambda k: np.sqrt(2 * k))),
    "k3": (losses.kl_k3, survivors(k3_inverse)),
    "abs": (losses.kl_abs, survivors(lambda k: k)),
}


def optimum(world: enumerable.World) -> np.ndarray:
    """pi* of the table's reference, p_BK."""
    reference = logps(world, start(world))
    return np.exp(np.asarray(enumerable.optimal_policy(reference, world.reward_BK, BETA)))


def apart(p_BK: np.ndarray, q_BK: np.ndarray) -> float:
    return float(np.abs(p_BK - q_BK).sum(axis=-1).mean() / 2)


def plain(logp_BK: jax.Array, score_BK: jax.Array) -> jax.Array:
    """Baselines are left out: over all responses they add nothing."""
    return score_BK


def of_groups(n: int) -> Advantage:
    """The mean advantage of a response over all groups of n that it is the first of."""

    def advantage(logp_BK: jax.Array, score_BK: jax.Array) -> jax.Array:
        B, K = score_BK.shape
        members = np.array(list(product(range(K), repeat=n)))
        scores = jnp.asarray(score_BK)[:, members].reshape(-1, n)
        mean = group_normalized(scores)[:, 0].reshape(B, *n * (K,))
        for _ in range(n - 1):
            mean = jnp.einsum("b...k,bk->b...", mean, jnp.exp(logp_BK))
        return mean

    return advantage


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def gradient(world: enumerable.World, kl: Any, kl_in: Any) -> Algorithm:
    """A policy gradient with one KL in one place."""
    options: dict[str, Any] = {"beta": BETA, "kl": kl, "kl_in": kl_in}
    return policy_gradient(table(world), rewards=(len,), max_tokens=world.steps, **options)


@pytest.mark.parametrize("name", IN_LOSS)
def test_a_kl_in_the_loss(name):
    kl, choose = IN_LOSS[name]
    found = climbed(LONG, gradient(LONG, kl, "loss"), plain)
    assert apart(found, rest(LONG, LONG.reward_BK, choose, found)) < NEAR
    assert apart(found, optimum(LONG)) > FAR


@pytest.mark.parametrize("name", IN_REWARD)
def test_a_kl_in_the_reward(name):
    kl, choose = IN_REWARD[name]
    algorithm = gradient(LONG, kl, "reward")
    found = climbed(LONG, algorithm, plain, Penalty(BETA, kl, "reward"))
    assert apart(found, rest(LONG, LONG.reward_BK, choose, found)) < NEAR
    if name == "k1":
        assert apart(found, optimum(LONG)) < NEAR
    else:
        assert apart(found, optimum(LONG)) > FAR
        assert (found < 1e-4).any()  # some response is given up, though b > 0


def test_k2_in_the_loss_is_the_rlhf_objective_of_one_token():
    for kl in (losses.kl_k2, losses.kl_exact):
        found = climbed(SHORT, gradient(SHORT, kl, "loss"), plain)
        assert apart(found, optimum(SHORT)) < NEAR


@pytest.mark.parametrize(
    ("world", "n", "name"),
    [(LONG, 2, "k2"), (LONG, 2, "k3"), (LONG, 3, "k3"), (SHORT, 4, "k3")],
    ids=["2 and k2", "2 and k3", "3 and k3", "4, one token, and k3"],
)
def test_grpo_divided_by_the_standard_deviation(world, n, name):
    """Responses weigh alike here; under `sequence_mean` the tokens of short ones weigh more."""
    (kl, choose), advantage = IN_LOSS[name], of_groups(n)
    algorithm = grpo(table(world), rewards=(len,), max_tokens=world.steps, n=n, beta=BETA, kl=kl)
    found = climbed(world, algorithm, advantage)
    logp_BK = np.asarray(logps(world, start(world)))
    for _ in range(100):
        score_BK = np.asarray(advantage(jnp.asarray(logp_BK), jnp.asarray(world.reward_BK)))
        logp_BK = (logp_BK + np.log(rest(world, score_BK, choose, found))) / 2
    assert apart(found, np.exp(logp_BK)) < NEAR
    assert apart(found, optimum(world)) > FAR
    undivided = rest(world, world.reward_BK, choose, found)
    assert apart(found, undivided) > FAR


def test_two_of_a_group_are_a_contest():
    """By how much a response wins does not count."""
    score_BK = jnp.asarray([[0.0, 1.0, 5.0]])
    even_BK = jnp.log(jnp.full((1, 3), 1 / 3))
    found = of_groups(2)(even_BK, score_BK)
    np.testing.assert_allclose(found, [[-2 / 3 / np.sqrt(2), 0, 2 / 3 / np.sqrt(2)]], atol=1e-3)


def test_grpo_with_k1_in_the_reward_rests_at_the_optimum_divided_or_not():
    algorithm = grpo(
        table(LONG), rewards=(len,), max_tokens=LONG.steps, n=2, beta=BETA, kl_in="reward"
    )
    price = Penalty(BETA, losses.kl_k1, "reward")
    found = climbed(LONG, algorithm, of_groups(2), price)
    assert apart(found, optimum(LONG)) < NEAR
