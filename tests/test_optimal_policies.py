"""Which policy the losses find in the enumerable world, where the optimum is known.

A case is a population, a loss and the policy where theory puts its minimum: the slope is 0 there,
every other policy near it does worse, and descent from the reference arrives there. The free
log-ratios of one pair are in `test_minimisers.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from claims import BETA, E, logit, root, sigmoid, with_flips
from tiny import descend

from dpo_jax import losses
from dpo_jax.structs import Scored
from dpo_jax.worlds import enumerable
from dpo_jax.worlds.enumerable import Population, random_world

Loss = Callable[[Scored], jax.Array]
WORLD = random_world(steps=2, seed=1)  # 2 prompts, 7 responses
OTHER_REWARD_BK = np.random.default_rng(5).standard_normal(WORLD.reward_BK.shape)
WEIGHT = 0.7  # of the true reward beside the other one


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------- divergences by definition


@dataclass(frozen=True)
class Divergence:
    """D_f = sum_y ref(y) f(policy(y) / ref(y)), and x -> f'(exp(x)) up to a constant."""

    f: Callable[[Any], Any]
    slope: Callable[[Any], Any]


DIVERGENCES = {
    "reverse-kl": Divergence(lambda u: u * jnp.log(u), lambda x: x),
    "forward-kl": Divergence(lambda u: -jnp.log(u), lambda x: -np.exp(-x)),
    "jensen-shannon": Divergence(
        lambda u: u * jnp.log(u) - (u + 1) * jnp.log((u + 1) / 2), lambda x: np.log(sigmoid(x))
    ),
    # the paper's alpha is 0.7
    "alpha": Divergence(
        lambda u: (u**0.3 - 0.3 * u - 0.7) / (0.7 * -0.3), lambda x: -np.exp(-0.7 * x) / 0.7
    ),
    "chi-squared-and-kl": Divergence(
        lambda u: u**2 / 2 + u * jnp.log(u), lambda x: np.exp(np.minimum(x, 99)) + x
    ),
}


@cache
def best_under(name: str) -> np.ndarray:
    """log-probs (B, K) of the policy with beta f'(policy / ref) = r - c(x), where c is such that it
    sums to one: the stationary point of E[r] - beta D_f."""
    reward_BK, ref_BK = WORLD.reward_BK, WORLD.ref_logp_BK
    slope, far_BK = DIVERGENCES[name].slope, np.full_like(reward_BK, 200.0)

    def logp_BK(c_B):
        target_BK = (reward_BK - c_B[:, None]) / BETA
        return ref_BK + root(lambda x_BK: slope(x_BK) - target_BK, -far_BK, far_BK)

    low_B, high_B = np.full(len(ref_BK), -20.0), np.full(len(ref_BK), 40.0)
    return logp_BK(root(lambda c_B: 1 - np.exp(logp_BK(c_B)).sum(-1), low_B, high_B))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_best_policy_under_a_divergence(name):
    """It is a distribution, stationary, and better than others under E[r] - beta D_f."""
    best_BK, ref_BK = best_under(name), jnp.asarray(WORLD.ref_logp_BK)
    np.testing.assert_allclose(np.exp(best_BK).sum(-1), 1.0, rtol=1e-12)

    def gained(logits_BK):
        logp_BK = jax.nn.log_softmax(logits_BK)
        f_BK = DIVERGENCES[name].f(jnp.exp(logp_BK - ref_BK))
        return jnp.sum(jnp.exp(logp_BK) * WORLD.reward_BK - BETA * jnp.exp(ref_BK) * f_BK)

    np.testing.assert_allclose(jax.grad(gained)(best_BK), 0.0, atol=1e-10)
    for other_BK in (ref_BK, *nearby(best_BK)):
        assert gained(other_BK) < gained(best_BK)
    if name == "reverse-kl":
        np.testing.assert_allclose(best_BK, WORLD.optimal_policy(BETA), rtol=0, atol=1e-10)


# ---------------------------------------------------------------- populations and optima


@dataclass(frozen=True)
class Case:
    """best: the log-probs (B, K) that minimise the mean of loss over the population under weight_B
    (the population's own where None). fields: further fields of Scored."""

    loss: Loss
    best: Callable[[], Any]
    population: Population
    fields: dict[str, Any] | None = None
    weight_B: np.ndarray | None = None

    def total(self, loss: Loss, logits_BK: Any) -> jax.Array:
        scored = WORLD.scored(self.population, jax.nn.log_softmax(logits_BK))
        weight_B = self.population.weight_B if self.weight_B is None else self.weight_B
        return jnp.sum(jnp.asarray(weight_B) * loss(replace(scored, **(self.fields or {}))))

    def holds(self, loss: Loss) -> bool:
        """Whether the slope at the best policy is 0 and all policies near it do worse."""
        total = jax.jit(partial(self.total, loss))
        best_BK = jnp.asarray(self.best())
        flat = np.abs(jax.jit(jax.grad(total))(best_BK)).max() < 1e-10
        return bool(flat and all(total(near_BK) > total(best_BK) for near_BK in nearby(best_BK)))


def nearby(logp_BK: Any) -> list[Any]:
    """Ten policies at distances of about 0.1 in the logits."""
    rng = np.random.default_rng(0)
    return [logp_BK + 0.1 * rng.standard_normal(np.shape(logp_BK)) for _ in range(10)]


def tilted_by(reward_BK: Any) -> Any:
    """ref exp(reward / beta) / Z."""
    return enumerable.optimal_policy(WORLD.ref_logp_BK, reward_BK, BETA)


def flipped(population: Population) -> Population:
    """Every list in the order of the annotator, and in the other one with probability E."""
    return Population(
        prompt_B=np.tile(population.prompt_B, 2),
        response_BK=np.concatenate([population.response_BK, population.response_BK[:, ::-1]]),
        weight_B=np.concatenate([(1 - E) * population.weight_B, E * population.weight_B]),
    )


def drawn_twice() -> Population:
    """Both responses drawn from the reference, the same one twice among them (p = 1/2)."""
    size = WORLD.reward_BK.shape[1]
    first, second = (at.reshape(-1) for at in np.indices((size, size)))
    q_BK = np.exp(WORLD.ref_logp_BK)
    met_BG = q_BK[:, first] * q_BK[:, second] * preference()[:, first, second]
    return Population(
        prompt_B=np.repeat(np.arange(len(q_BK)), size**2),
        response_BK=np.tile(np.stack([first, second], axis=-1), (len(q_BK), 1)),
        weight_B=met_BG.reshape(-1) / len(q_BK),
    )


def preference() -> np.ndarray:
    """P(i beats j), (B, K, K)."""
    return sigmoid(WORLD.reward_BK[:, :, None] - WORLD.reward_BK[:, None, :])


def win_rate() -> np.ndarray:
    """E of P(y beats y') over y' from the reference, (B, K)."""
    return (preference() * np.exp(WORLD.ref_logp_BK)[:, None, :]).sum(-1)


def winners(share_K: Any = 1.0) -> np.ndarray:
    """log of the distribution (B, K) of the chosen responses of PAIRS, times share, normalised."""
    won_BK = np.zeros_like(WORLD.reward_BK)
    np.add.at(won_BK, (PAIRS.prompt_B, PAIRS.response_BK[:, 0]), PAIRS.weight_B)
    won_BK = won_BK * share_K
    return np.log(won_BK / won_BK.sum(-1, keepdims=True))


PAIRS, TRIPLES = WORLD.lists(2), WORLD.lists(3)
ALL = Population(np.arange(2), np.tile(np.arange(7), (2, 1)), np.full(2, 0.5))
OTHER_BK = OTHER_REWARD_BK[PAIRS.prompt_B[:, None], PAIRS.response_BK]
CHOSEN_B = WORLD.length_K[PAIRS.response_BK[:, 0]]
BT = {"beta": BETA}


def divergence_case(name: str, loss: Loss) -> Case:
    return Case(loss, partial(best_under, name), PAIRS)


CASES = {
    "dpo": Case(partial(losses.dpo, **BT), lambda: tilted_by(WORLD.reward_BK), PAIRS),
    "robust": Case(
        partial(losses.robust_dpo, **BT, label_smoothing=E),
        lambda: tilted_by(WORLD.reward_BK),
        flipped(PAIRS),
    ),
    # the reward of IPO is the win rate against the reference itself
    "ipo": Case(partial(losses.ipo, **BT, length_norm=False), lambda: tilted_by(win_rate()), PAIRS),
    "forward-kl": divergence_case(
        "forward-kl", partial(losses.dpo, **BT, divergence=losses.forward_kl)
    ),
    "jensen-shannon": divergence_case(
        "jensen-shannon", partial(losses.dpo, **BT, divergence=losses.jensen_shannon)
    ),
    "alpha": divergence_case(
        "alpha", partial(losses.dpo, **BT, divergence=losses.alpha_divergence(alpha=0.3))
    ),
    "chi-po": divergence_case("chi-squared-and-kl", partial(losses.chi_po, **BT, clip=20.0)),
    "r-dpo": Case(
        partial(losses.r_dpo, **BT, alpha=0.4),
        lambda: tilted_by(WORLD.reward_BK - 0.4 * WORLD.length_K[None]),
        PAIRS,
    ),
    "modpo": Case(
        partial(losses.modpo, **BT, weight=WEIGHT),
        lambda: tilted_by(WEIGHT * WORLD.reward_BK + (1 - WEIGHT) * OTHER_REWARD_BK),
        PAIRS,
        {"margin_B": OTHER_BK[:, 0] - OTHER_BK[:, 1]},
    ),
    "soft-dpo": Case(
        partial(losses.soft_dpo, **BT), lambda: tilted_by(WORLD.reward_BK), WORLD.pairs()
    ),
    "plackett-luce": Case(
        partial(losses.plackett_luce_dpo, **BT), lambda: tilted_by(WORLD.reward_BK), TRIPLES
    ),
    "all-pairs": Case(
        losses.all_pairs(partial(losses.dpo, **BT)), lambda: tilted_by(WORLD.reward_BK), TRIPLES
    ),
    "info-nca": Case(
        partial(losses.info_nca, **BT, alpha=2.0),
        lambda: tilted_by(WORLD.reward_BK / 2.0),
        ALL,
        {"score_BKC": WORLD.reward_BK[:, :, None]},
    ),
    # with beta = 1 what the pairs say of the responses adds up to a distribution
    "nca": Case(
        partial(losses.nca, beta=1.0),
        lambda: WORLD.ref_logp_BK + np.log(2 * win_rate()),
        drawn_twice(),
    ),
    "nll-token": Case(
        losses.nll, winners, PAIRS, weight_B=PAIRS.weight_B * CHOSEN_B / CHOSEN_B.mean()
    ),
    # each token of a long response counts less, so that short ones gain
    "nll-sequence": Case(
        partial(losses.nll, per="sequence"), lambda: winners(1 / WORLD.length_K[None]), PAIRS
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_minimum(name):
    assert CASES[name].holds(CASES[name].loss)


@pytest.mark.parametrize("name", CASES)
def test_descent_from_the_reference_finds_it(name):
    case, ref_BK = CASES[name], jnp.asarray(WORLD.ref_logp_BK)
    best_BK = jnp.asarray(case.best())
    assert np.all(enumerable.kl(ref_BK, best_BK) > 0.01)  # there is a way to go
    found_BK = descend(partial(case.total, case.loss), ref_BK, steps=1000, rate=0.1)
    assert np.all(enumerable.kl(jax.nn.log_softmax(found_BK), best_BK) < 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_flipped_signs_are_rejected(name):
    case = CASES[name]

    def exchanged(scored):
        """D -> -D with everything else in place."""
        ratio_BK = scored.logp_BK - scored.ref_logp_BK
        return case.loss(replace(scored, logp_BK=scored.ref_logp_BK + ratio_BK[:, ::-1]))

    assert not case.holds(exchanged)
    assert not case.holds(lambda scored: -case.loss(scored))


# ---------------------------------------------------------------- conservative DPO


def test_conservative_dpo_meets_the_flipped_preferences_on_the_average():
    """Smoothed preferences are those of no reward: of every response only the mean rate of winning
    against those it meets comes out as sum_j met_ij (sigmoid(beta D_ij) - q_ij) = 0."""
    loss, ref_BK = partial(losses.dpo, **BT, label_smoothing=E), jnp.asarray(WORLD.ref_logp_BK)

    def total(logits_BK):
        return WORLD.expected_loss(loss, PAIRS, jax.nn.log_softmax(logits_BK))

    ratio_BK = np.asarray(descend(total, ref_BK, steps=1000, rate=0.1) - ref_BK)
    margin_BKK = BETA * (ratio_BK[:, :, None] - ratio_BK[:, None, :])
    q_BKK = with_flips(preference())
    reference_BK = np.exp(WORLD.ref_logp_BK)
    met_BKK = reference_BK[:, :, None] * reference_BK[:, None, :]
    off_BKK = sigmoid(margin_BKK) - q_BKK
    np.testing.assert_allclose((met_BKK * off_BKK).sum(-1), 0.0, atol=1e-10)
    assert np.abs(off_BKK).max() > 1e-3
    wrong_BK = (met_BKK * (sigmoid(margin_BKK) - preference())).sum(-1)
    assert np.abs(wrong_BK).max() > 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_conservative_dpo_of_two_responses(seed):
    """With a single pair there is a policy for beta D = logit(p + e - 2 p e)."""
    world = random_world(vocabulary=2, steps=1, prompts=1, seed=seed)
    loss, pair = partial(losses.dpo, **BT, label_smoothing=E), world.lists(2)
    p = sigmoid(world.reward_BK[0, 0] - world.reward_BK[0, 1])
    gap = logit(with_flips(p)) / BETA + world.ref_logp_BK[0, 0] - world.ref_logp_BK[0, 1]

    def total(logits_BK):
        return world.expected_loss(loss, pair, jax.nn.log_softmax(logits_BK))

    found_BK = descend(total, jnp.asarray(world.ref_logp_BK), steps=1000, rate=0.1)
    np.testing.assert_allclose(found_BK[0, 0] - found_BK[0, 1], gap, rtol=0, atol=1e-9)
