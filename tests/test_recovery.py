"""Labels tell the reward: how much a pair and a ranking say of it, and reward models that find it.

At equal scores a ranking of K says I = c (1 - 11'/K) of them, c = sum_m (1 - 1/m) / (K - 1) over
m = 2 .. K: its stages, each a softmax over the m that are left, have the trace 1 - 1/m. That is
23/36 for K = 4, and 1/2 for the pair (K = 2), of which a prompt of four has 1/6 on each of its six.
"""

from collections import Counter
from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_reward import SMALL, WORLD, descended, scores

from dpo_jax import losses
from dpo_jax.algorithms.reward import reward, reward_scores
from dpo_jax.data.packing import pack
from dpo_jax.structs import Group
from dpo_jax.worlds import annotators

FEWER = 23 / 6  # pairs that say as much as one ranking of four, at equal scores


def information(loss, orders, K: int) -> np.ndarray:
    """The mean Hessian over orders of K equal scores."""
    order_BK = jnp.array(list(orders))

    def value(score_K: jax.Array) -> jax.Array:
        return jnp.mean(loss(score_K[order_BK]))

    return np.asarray(jax.hessian(value)(jnp.zeros(K)))


def test_a_ranking_of_four_says_what_23_sixths_of_a_pair_do():
    centred = np.eye(4) - 0.25
    ranking = information(losses.plackett_luce, permutations(range(4)), 4)
    pair = information(losses.bradley_terry, permutations(range(4), 2), 4)
    np.testing.assert_allclose(ranking, 23 / 36 * centred, atol=1e-6)
    np.testing.assert_allclose(pair, 1 / 6 * centred, atol=1e-6)
    assert FEWER == pytest.approx((23 / 36) / (1 / 6))


def drawn(count: int, size: int, seed: int) -> list[Group]:
    """Labels of a Bradley-Terry or Plackett-Luce annotator, each of `size` responses to one of the
    prompts; equal ones are one group that weighs as much."""
    rng, times = np.random.default_rng(seed), Counter()
    for _ in range(count):
        b = int(rng.integers(len(WORLD.prompts)))
        of_K = rng.choice(len(WORLD.responses), size=size, replace=False)
        (label,) = annotators.plackett_luce(WORLD.reward_BK[b, of_K][:, None], rng)
        times[b, *(int(of_K[k]) for k in label.order)] += 1
    return [
        Group(
            np.array(WORLD.prompts[b], np.int32),
            [np.array(WORLD.responses[k], np.int32) for k in ranked],
            weight=float(weight),
        )
        for (b, *ranked), weight in times.items()
    ]


def within(score_BK: np.ndarray) -> float:
    """Correlation with the true reward after each prompt's mean is taken off."""
    found, true = (x - x.mean(axis=1, keepdims=True) for x in (score_BK, WORLD.reward_BK))
    return float(np.corrcoef(found.ravel(), true.ravel())[0, 1])


@pytest.mark.parametrize(
    ("loss", "size", "prompts"),
    [("bradley_terry", 2, 1840), ("plackett_luce", 4, 480)],
    ids=["pairs", "rankings of four"],
)
def test_a_reward_model_recovers_the_reward_from_drawn_labels(loss, size, prompts):
    """A transformer; a prompt has one label, and there are 23/6 as many pairs as rankings."""
    groups = drawn(prompts, size, seed=0)
    algorithm = reward(SMALL, loss=getattr(losses, loss), centering=0.01)
    batch = pack(groups, row_tokens=64)
    params = descended(algorithm, SMALL.init(jax.random.key(0)), batch, steps=150, rate=0.01)
    whole = pack(WORLD.groups(), row_tokens=64)
    found_BK = np.stack(scores(reward_scores(SMALL, params, whole), whole, WORLD.groups()))
    assert within(found_BK) > 0.95, within(found_BK)


@partial(jax.jit, static_argnums=0)
def fitted(loss, feature_BKD: jax.Array) -> jax.Array:
    """Linear scores that make the drawn orders likeliest, by Newton's steps."""

    def value(weight_D: jax.Array) -> jax.Array:
        return jnp.mean(loss(feature_BKD @ weight_D))

    def step(_, weight_D: jax.Array) -> jax.Array:
        slope_D, bend_DD = jax.grad(value)(weight_D), jax.hessian(value)(weight_D)
        return weight_D - jnp.linalg.solve(bend_DD, slope_D)

    return jax.lax.fori_loop(0, 6, step, jnp.zeros(feature_BKD.shape[-1]))


def squared_errors(loss, size: int, prompts: int, seeds: int = 60) -> np.ndarray:
    """Of the weights of linear scores of deviation 0.2, from one label a prompt."""
    D, found = 6, []
    weight_D = 0.2 * np.eye(D)[0]
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        feature_BKD = rng.normal(size=(prompts, size, D))
        noisy_BK = feature_BKD @ weight_D + rng.gumbel(size=(prompts, size))
        order_BK = np.argsort(-noisy_BK, axis=1)  # Plackett-Luce, and for two Bradley-Terry
        ranked_BKD = np.take_along_axis(feature_BKD, order_BK[..., None], axis=1)
        miss_D = np.asarray(fitted(loss, jnp.array(ranked_BKD, jnp.float32))) - weight_D
        found.append((miss_D**2).sum())
    return np.array(found)


def test_rankings_of_four_do_with_fewer_prompts():
    """The squared error is D / (prompts * information), 1/2 a pair and 23/12 a ranking for features
    of deviation 1: within 10% for the curvature away from equal scores, and five standard errors.
    """
    expected = {"pairs": 6 / (2000 * 1 / 2), "rankings": 6 / (2000 * 23 / 12)}
    found = {
        "pairs": squared_errors(losses.bradley_terry, 2, 2000),
        "rankings": squared_errors(losses.plackett_luce, 4, 2000),
    }
    for name, errors in found.items():
        allowed = 5 * errors.std(ddof=1) / np.sqrt(errors.size) + 0.1 * expected[name]
        assert errors.mean() == pytest.approx(expected[name], abs=allowed), name
    assert found["rankings"].mean() < found["pairs"].mean() / 3
