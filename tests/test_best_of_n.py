"""Best-of-n against every draw listed, its bound, and the estimate from samples."""

from itertools import combinations, product

import numpy as np
import online
import pytest

from dpo_jax.algorithms.best_of_n import expected_score, kl, kl_bound, policy
from dpo_jax.structs import BadInput
from dpo_jax.worlds import enumerable

LOGP_BK, REWARD_BK = online.WORLD.ref_logp_BK, online.WORLD.reward_BK
TIED_BK = np.round(REWARD_BK)


def listed(logp_K, score_K, n: int) -> np.ndarray:
    """The distribution of the best of n, all K^n draws listed, each tie shared out evenly."""
    p_K, best_K = np.exp(logp_K), np.zeros(len(logp_K))
    for draw in product(range(len(logp_K)), repeat=n):
        at = [k for k in draw if score_K[k] == max(score_K[list(draw)])]
        for k in at:
            best_K[k] += p_K[list(draw)].prod() / len(at)
    return best_K


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("score_BK", [REWARD_BK, TIED_BK], ids=["apart", "tied"])
def test_the_policy_is_that_of_all_draws(n, score_BK):
    assert len(np.unique(TIED_BK[0])) < TIED_BK.shape[1] // 2
    expected = np.stack([listed(*row, n) for row in zip(LOGP_BK, score_BK, strict=True)])
    found = policy(LOGP_BK, score_BK, n)
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-6)
    gap = np.sum(expected * (np.log(expected) - LOGP_BK), axis=1)
    np.testing.assert_allclose(kl(LOGP_BK, score_BK, n), gap, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 64, 4096])
def test_the_kl_stays_below_its_bound_and_reaches_it_where_nothing_is_equal(n):
    """Exact on the world; of ever more responses of ever less probability the limit."""
    for score_BK in (REWARD_BK, TIED_BK):
        found = kl(LOGP_BK, score_BK, n)
        assert np.all(found <= kl_bound(n) + 1e-9)
        assert n < 64 or np.all(found < 0.9 * kl_bound(n))
    gaps = []
    for K in (10**4, 10**6):
        even = np.full((1, K), -np.log(K))
        gaps.append(kl_bound(n) - kl(even, np.arange(K)[None], n)[0])
    assert -1e-8 < gaps[1] < 1e-4 and gaps[1] <= 0.1 * gaps[0] + 1e-8  # sums of 10^6


def test_no_policy_of_that_kl_has_a_higher_reward():
    """Best-of-n lies below the frontier of pi exp(r / beta) / Z, and not far."""
    for n in (2, 8):
        reward = enumerable.expectation(policy(LOGP_BK, REWARD_BK, n), REWARD_BK)
        for b, (value, spent) in enumerate(zip(reward, kl(LOGP_BK, REWARD_BK, n), strict=True)):
            betas = np.geomspace(1e-2, 1e2, 4001)
            best = enumerable.optimal_policy(
                LOGP_BK[b][None], REWARD_BK[b][None], betas[:, None].astype(np.float32)
            )
            spends = np.asarray(enumerable.kl(best, LOGP_BK[b][None]))
            rewards = np.asarray(enumerable.expectation(best, REWARD_BK[b][None]))
            top = np.interp(spent, spends[::-1], rewards[::-1])
            start = np.exp(LOGP_BK[b]) @ REWARD_BK[b]
            assert 0.8 * (top - start) < value - start <= top - start + 1e-4


def test_responses_without_probability_stay_without():
    logp_BK = np.log([[0.5, 0.5, 1e-300]]) + np.array([[0, 0, -np.inf]])
    found = policy(logp_BK, np.array([[0.0, 1.0, 2.0]]), 3)
    np.testing.assert_allclose(np.exp(found), [[1 / 8, 7 / 8, 0]])
    expected = (np.log(1 / 4) + 7 * np.log(7 / 4)) / 8
    np.testing.assert_allclose(kl(logp_BK, np.array([[0.0, 1.0, 2.0]]), 3), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_estimate_is_the_mean_over_all_choices(n):
    score_BK = np.array([[0.3, -1.0, 2.0, 2.0, 5.0, -3.0], [1, 1, 1, 1, 1, 1]])
    expected = [np.mean([max(x) for x in combinations(row, n)]) for row in score_BK.tolist()]
    np.testing.assert_allclose(expected_score(score_BK, n), expected)


def test_the_estimate_is_unbiased_for_the_exact_reward():
    """20,000 tries of 8 samples, at 4.5 standard errors: a true mean is beyond in 1 of 100,000."""
    p_K = np.exp(LOGP_BK[0])
    drawn = np.random.default_rng(0).choice(len(p_K), size=(20_000, 8), p=p_K / p_K.sum())
    for n in (2, 4, 8):
        exact = np.exp(policy(LOGP_BK, TIED_BK, n))[0] @ TIED_BK[0]
        found = expected_score(TIED_BK[0][drawn], n)
        error = found.std(ddof=1) / np.sqrt(len(found))
        assert error < 0.02 and abs(found.mean() - exact) < 4.5 * error


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="best of 3: there are 2 scores"):
        expected_score(np.zeros((1, 2)), 3)
    with pytest.raises(BadInput, match="best of 0: give n of 1 or more"):
        policy(LOGP_BK, REWARD_BK, 0)
