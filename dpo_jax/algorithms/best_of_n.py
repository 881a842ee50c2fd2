"""Best-of-n: of n independent responses of a policy the one of the highest score.

As a policy on a finite list, with F(y) the probability of a score of at most that of y, F-(y) of a
lower one, and p = F - F- (the first of several equal scores is taken, or any, at random):

    pi_n(y) = pi(y) (F^n - F-^n) / p
    KL(pi_n, pi) = sum_y pi_n(y) log((F^n - F-^n) / p) <= log n - (n - 1) / n

The bound (Beirami et al. 2401.01879) is reached where no two samples have the same score.
"""

import numpy as np

from dpo_jax.structs import Array, BadInput


def policy(logp_BK: Array, score_BK: Array, n: int) -> np.ndarray:
    """log pi_n of all K responses to B prompts, float64, under the policy logp_BK.

    Raises BadInput for n below 1.
    """
    _check(n)
    logp_BK = np.asarray(logp_BK, np.float64)
    rows = zip(logp_BK, np.asarray(score_BK), strict=True)
    return logp_BK + np.stack([_log_ratio(np.exp(logp_K), score_K, n) for logp_K, score_K in rows])


def _log_ratio(p_K: np.ndarray, score_K: np.ndarray, n: int) -> np.ndarray:
    """log (F^n - F-^n) / p of each response; 0 where its score has no probability."""
    _, level_K = np.unique(score_K, return_inverse=True)
    p_L = np.bincount(level_K, weights=p_K)
    most_L = np.cumsum(p_L)
    met_L = p_L > 0
    share_L = np.divide(p_L, most_L, out=np.ones_like(p_L), where=met_L)
    with np.errstate(divide="ignore"):  # log 0 where nothing is below
        missed_L = n * np.log1p(-share_L)  # F-^n / F^n
    log_L = np.log(-np.expm1(missed_L)) - np.log(share_L)
    log_L += (n - 1) * np.log(np.where(met_L, most_L, 1))
    return np.where(met_L, log_L, 0)[level_K]


def kl(logp_BK: Array, score_BK: Array, n: int) -> np.ndarray:
    """KL(pi_n, pi) in nats, per prompt (B,), float64."""
    best_BK = policy(logp_BK, score_BK, n)
    gap_BK = np.zeros_like(best_BK)
    np.subtract(best_BK, logp_BK, out=gap_BK, where=np.isfinite(best_BK))
    return np.sum(np.exp(best_BK) * gap_BK, axis=1)


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n, which no KL(pi_n, pi) exceeds."""
    _check(n)
    return float(np.log(n) - (n - 1) / n)


def expected_score(score_BK: Array, n: int) -> np.ndarray:
    """The mean of the highest of n scores over all choices of n from K, per prompt (B,), float64.

    Without bias for the score of best-of-n where the K are independent. From the lowest, the j-th
    of K is the highest in C(j - 1, n - 1) of the C(K, n) choices. Raises BadInput for n above K.
    """
    score_BK = np.sort(np.asarray(score_BK, np.float64), axis=1)
    K = score_BK.shape[1]
    _check(n)
    if n > K:
        raise BadInput(f"best of {n}: there are {K} scores a prompt; give {n} or more")
    j_K = np.arange(n, K)  # C(j - 1, n - 1) / C(j, n - 1) = (j - n + 1) / j
    falling = np.cumprod(((j_K - n + 1) / j_K)[::-1])[::-1]
    weight_K = n / K * np.concatenate([np.zeros(n - 1), falling, [1.0]])
    return score_BK @ weight_K


def _check(n: int) -> None:
    if n < 1:
        raise BadInput(f"best of {n}: give n of 1 or more")
