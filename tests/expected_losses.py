"""What every public loss should give: one row a loss (or more), its formula in float64 numpy.

A row says which arrays the loss takes, its hyperparameters and its formula over those arrays,
written out from the definition and never from the code under test. `test_losses.py` walks
`losses.__all__` and fails for a loss without a row. To add a loss, add a row.
"""

from functools import partial

import expected_lists
import jax.numpy as jnp
import numpy as np
from expected_row import SCORED, Row, cdpo, exp, ls, sigmoid

from dpo_jax import losses


def plackett_luce(score_BK, mask_BK):
    """-log prod_k exp(r_k) / sum_{j >= k} exp(r_j), over the places that hold a response."""
    values = []
    for row, mask in zip(score_BK, mask_BK, strict=True):
        scores = row[mask != 0]
        tails = [np.logaddexp.reduce(scores[k:]) for k in range(len(scores))]
        values.append(np.sum(np.array(tails) - scores))
    return np.array(values)


def alpha_score(x, alpha):
    """exp((alpha-1) x) / (alpha-1), alpha != 1."""
    return exp((alpha - 1) * x) / (alpha - 1)


def dpo_row(margin, *, beta=0.3, e=0.0, **flags):
    """A row of dpo whose z is beta times `margin(x)`."""

    def formula(x, beta, label_smoothing=0.0):
        return cdpo(beta * margin(x), label_smoothing)

    numbers = {"beta": beta, "label_smoothing": e} if e else {"beta": beta}
    return Row("dpo", formula, numbers, flags)


def squares(x, beta):
    """How far a is from 1/(2 beta) and b from its negative."""
    return (x.a - 1 / (2 * beta)) ** 2 + (x.b + 1 / (2 * beta)) ** 2


def calibrated(x, beta):
    return cdpo(x.a - x.b) + squares(x, beta)


def robust(z, e):
    return (-(1 - e) * ls(z) + e * ls(-z)) / (1 - 2 * e)


def exo(z, e):
    """KL of (sigmoid(z), sigmoid(-z)) to (1-e, e)."""
    return sigmoid(z) * (ls(z) - np.log(1 - e)) + sigmoid(-z) * (ls(-z) - np.log(e))


def discopop(x, beta, tau=0.05):
    z = beta * (x.a - x.b)
    return sigmoid(-z / tau) * cdpo(z) + np.exp(ls(z / tau) - z)


def odpo(x, beta, alpha=1.0, f=np.log):
    gap = x.score_BKC[:, 0, 0] - x.score_BKC[:, 1, 0]
    return cdpo(beta * (x.a - x.b) - alpha * f(np.maximum(gap, 1e-6)))


def chi_po(x, beta, clip):
    z = beta * (exp(x.a) + x.a - exp(x.b) - x.b)
    return cdpo(np.clip(z, -2 * clip, 2 * clip))


def tdpo(x, beta, alpha=0.5):
    return cdpo(beta * (x.a - x.b - alpha * (x.kl_BK[:, 1] - x.sg.kl_BK[:, 0])))


def transported(owner, other, used, beta, e=0.0):
    """cDPO of beta (owner - the other value of the same rank), where the owner stands."""
    value = np.zeros(len(owner))
    order = [b for b in np.argsort(owner, kind="stable") if used[b]]
    value[order] = cdpo(beta * (owner[order] - np.sort(other[used])), e)
    return value


def aot(x, beta, label_smoothing=0.0, used=None):
    used = np.ones(len(x.w), bool) if used is None else used(x)
    return transported(x.w - x.l, x.rw - x.rl, used, beta, label_smoothing)


def aot_unpaired(x, beta, label_smoothing=0.0, used=None):
    used = np.ones(len(x.w), bool) if used is None else used(x)
    return transported(x.a, x.b, used, beta, label_smoothing)


def weighted(x):
    return x.weight_B > 0


def beta_dpo(x, beta, alpha=0.6, rho=0.8, used=None, delta=0.0):
    """Only the pairs nearest delta count, under a beta that the mean moves."""
    used = np.ones(len(x.w), bool) if used is None else used(x)
    M = beta * (x.sg.a - x.sg.b)
    scale = beta * (1 + alpha * (np.mean(M[used]) - delta))
    nearest = [b for b in np.argsort(abs(M - delta), kind="stable") if used[b]]
    kept = nearest[: int(np.ceil(np.round(rho * len(nearest), 5)))]
    value = np.zeros(len(M))
    value[kept] = cdpo(scale * (x.a - x.b)[kept])
    return value


def means(x):
    """wbar and lbar."""
    return x.w / x.len_w, x.l / x.len_l


def simpo(x, beta, gamma):
    w, l = means(x)  # noqa: E741
    return cdpo(beta * (w - l) - gamma)


def alpha_po(x, beta, gamma, alpha):
    w, l = ((1 - exp(-alpha * y)) / alpha for y in means(x))  # noqa: E741
    return cdpo(beta * (w - l) - gamma)


def orpo(x, lam=0.1):
    """The log of odds p / (1 - p), p the mean probability of a token."""
    w, l = (np.minimum(y, -1e-7) for y in means(x))  # noqa: E741
    odds = (y - np.log(-np.expm1(y)) for y in (w, l))
    return lam * cdpo(next(odds) - next(odds))


def simper(x):
    w, l = means(x)  # noqa: E741
    return np.exp(l) - np.exp(w)


DELTA = (*SCORED, "delta")
WEIGHTED = (*SCORED, "weight_B")
NO_REFERENCE = ("logp_BK", "length_BK")
KL = ("logp", "ref_logp")
ROWS = (
    dpo_row(lambda x: x.a - x.b),
    dpo_row(lambda x: x.a - x.b, beta=0.05, e=0.2),
    dpo_row(lambda x: x.w - x.l, reference_free=True),
    dpo_row(lambda x: x.a / x.len_w - x.b / x.len_l, beta=5.0, length_norm=True),
    dpo_row(lambda x: x.w / x.len_w - x.l / x.len_l, e=0.1, reference_free=True, length_norm=True),
    dpo_row(lambda x: x.a - x.b, e=0.1, divergence=losses.reverse_kl),
    dpo_row(lambda x: exp(-x.b) - exp(-x.a), beta=0.02, divergence=losses.forward_kl),
    dpo_row(lambda x: ls(x.a) - ls(x.b), divergence=losses.jensen_shannon),
    dpo_row(
        lambda x: alpha_score(x.a, 0.5) - alpha_score(x.b, 0.5), divergence=losses.alpha_divergence
    ),
    dpo_row(
        lambda x: alpha_score(x.a, 1.7) - alpha_score(x.b, 1.7),
        beta=0.02,
        divergence=losses.alpha_divergence(alpha=1.7),
    ),
    Row(
        "ipo",
        lambda x, beta: (x.a / x.len_w - x.b / x.len_l - 1 / (2 * beta)) ** 2,
        {"beta": 0.1},
    ),
    Row(
        "ipo",
        lambda x, beta: (x.a - x.b - 1 / (2 * beta)) ** 2,
        {"beta": 0.1},
        {"length_norm": False},
    ),
    Row("hinge", lambda x, beta: np.maximum(0, 1 - beta * (x.a - x.b)), {"beta": 0.3}),
    Row(
        "hinge",
        lambda x, beta: np.maximum(0, 1 - beta * (ls(x.a) - ls(x.b))),
        {"beta": 0.7},
        {"divergence": losses.jensen_shannon},
    ),
    Row(
        "robust_dpo",
        lambda x, beta, label_smoothing: robust(beta * (x.a - x.b), label_smoothing),
        {"beta": 0.3, "label_smoothing": 0.1},
    ),
    Row(
        "robust_dpo",
        lambda x, beta, label_smoothing: robust(beta * (ls(x.a) - ls(x.b)), label_smoothing),
        {"beta": 0.3, "label_smoothing": 0.3},
        {"divergence": losses.jensen_shannon},
    ),
    Row("exo", lambda x, beta: exo(beta * (x.a - x.b), 1e-3), {"beta": 0.3}),
    Row(
        "exo",
        lambda x, beta, label_smoothing: exo(beta * (exp(-x.b) - exp(-x.a)), label_smoothing),
        {"beta": 0.02, "label_smoothing": 0.1},
        {"divergence": losses.forward_kl},
    ),
    Row("discopop", discopop, {"beta": 0.1}),
    Row("discopop", discopop, {"beta": 0.3, "tau": 1.0}),
    Row(
        "dpop",
        lambda x, beta: cdpo(beta * (x.a - x.b - 50 * np.maximum(0, x.rw - x.w))),
        {"beta": 0.3},
    ),
    Row(
        "dpop",
        lambda x, beta, lam: cdpo(beta * (x.a - x.b - lam * np.maximum(0, -x.a))),
        {"beta": 0.3, "lam": 5.0},
    ),
    Row(
        "r_dpo",
        lambda x, beta, alpha: cdpo(beta * (x.a - x.b) + alpha * (1.0 * x.len_w - x.len_l)),
        {"beta": 0.3, "alpha": 0.05},
    ),
    Row("odpo", odpo, {"beta": 0.3}, takes=(*SCORED, "score_BKC")),
    Row(
        "odpo",
        lambda x, beta, alpha: odpo(x, beta, alpha, np.sqrt),
        {"beta": 0.3, "alpha": 0.5},
        {"f": jnp.sqrt},
        takes=(*SCORED, "score_BKC"),
    ),
    Row(
        "modpo",
        lambda x, beta, weight: cdpo((beta * (x.a - x.b) - (1 - weight) * x.margin_B) / weight),
        {"beta": 0.3, "weight": 0.4},
        takes=(*SCORED, "margin_B"),
    ),
    Row(
        "soft_dpo",
        lambda x, beta: cdpo(beta * (x.a - x.b), 1 - x.soft_label_B),
        {"beta": 0.3},
        takes=(*SCORED, "soft_label_B"),
    ),
    Row("chi_po", chi_po, {"beta": 0.3, "clip": 5.0}),
    Row("chi_po", chi_po, {"beta": 0.3, "clip": 0.6}),
    Row("tdpo", tdpo, {"beta": 0.3}, takes=(*SCORED, "kl_BK")),
    Row("tdpo", tdpo, {"beta": 0.3, "alpha": 1.5}, takes=(*SCORED, "kl_BK")),
    Row(
        "nca",
        lambda x, beta: -ls(beta * x.a) - ls(-beta * x.a) / 2 - ls(-beta * x.b) / 2,
        {"beta": 0.3},
    ),
    Row("bco_pair", lambda x, beta: -ls(beta * x.a) - ls(-beta * x.b), {"beta": 0.3}),
    Row(
        "bco_pair",
        lambda x, beta: -ls(beta * x.a - x.sg.delta) - ls(x.sg.delta - beta * x.b),
        {"beta": 0.3},
        takes=DELTA,
    ),
    Row("sppo_hard", squares, {"beta": 0.1}),
    Row("apo_zero", lambda x, beta: 1 - sigmoid(beta * x.a) + sigmoid(beta * x.b), {"beta": 0.3}),
    Row(
        "apo_down",
        lambda x, beta: sigmoid(beta * x.a) + 1 - sigmoid(beta * (x.a - x.b)),
        {"beta": 0.3},
    ),
    Row("cal_dpo", calibrated, {"beta": 0.1}),
    Row("aot", aot, {"beta": 0.3}),
    Row("aot", aot, {"beta": 0.3, "label_smoothing": 0.1}),
    Row("aot", partial(aot, used=weighted), {"beta": 0.3}, takes=WEIGHTED),
    Row("aot_unpaired", aot_unpaired, {"beta": 0.3}),
    Row("aot_unpaired", aot_unpaired, {"beta": 0.3, "label_smoothing": 0.1}),
    Row("aot_unpaired", partial(aot_unpaired, used=weighted), {"beta": 0.3}, takes=WEIGHTED),
    Row("beta_dpo", beta_dpo, {"beta": 0.1}),
    Row(
        "beta_dpo",
        lambda x, **numbers: beta_dpo(x, used=weighted, delta=x.sg.delta, **numbers),
        {"beta": 0.1, "alpha": 0.4, "rho": 0.5},
        takes=(*WEIGHTED, "delta"),
    ),
    Row("cpo", lambda x, beta: cdpo(beta * (x.w - x.l)), {"beta": 0.1}, takes=("logp_BK",)),
    Row(
        "cpo",
        lambda x, beta, label_smoothing: cdpo(beta * (x.w - x.l), label_smoothing),
        {"beta": 0.1, "label_smoothing": 0.2},
        takes=("logp_BK",),
    ),
    Row("simpo", simpo, {"beta": 2.0, "gamma": 0.7}, takes=NO_REFERENCE),
    Row("alpha_po", alpha_po, {"beta": 2.0, "gamma": 0.7, "alpha": 0.25}, takes=NO_REFERENCE),
    Row("alpha_po", alpha_po, {"beta": 2.0, "gamma": 0.7, "alpha": -0.5}, takes=NO_REFERENCE),
    Row(
        "alpha_po",
        lambda x, beta, gamma, alpha: simpo(x, beta, gamma),
        {"beta": 2.0, "gamma": 0.7, "alpha": 0.0},
        takes=NO_REFERENCE,
    ),
    Row("orpo", orpo, takes=NO_REFERENCE),
    Row("orpo", orpo, {"lam": 0.5}, takes=NO_REFERENCE),
    Row("slic", lambda x: np.maximum(0, 1 - (x.w - x.l)), takes=("logp_BK",)),
    Row(
        "slic",
        lambda x, delta: np.maximum(0, delta - (x.w - x.l)),
        {"delta": 2.5},
        takes=("logp_BK",),
    ),
    Row("simper", simper, takes=NO_REFERENCE),
    Row("unlikelihood", lambda x, alpha: alpha * x.l - x.w, {"alpha": 0.2}, takes=("logp_BK",)),
    Row("nll", lambda x: -x.w / x.len_w),
    Row("nll", lambda x: -x.w / x.len_w, flags={"per": "sequence"}),
    Row("bradley_terry", lambda x: cdpo(x.score_BK[:, 0] - x.score_BK[:, 1]), takes=("score_BK",)),
    Row(
        "bradley_terry",
        lambda x, margin, label_smoothing: cdpo(
            x.score_BK[:, 0] - x.score_BK[:, 1] - margin, label_smoothing
        ),
        {"margin": 0.75, "label_smoothing": 0.1},
        takes=("score_BK",),
    ),
    Row(
        "bradley_terry",
        lambda x: cdpo(x.score_BK[:, 0] - x.score_BK[:, 1] - x.margin_B),
        takes=("score_BK",),
        fixed={"margin": "margin_B"},
    ),
    Row(
        "plackett_luce",
        lambda x: plackett_luce(x.rank_BK, np.ones_like(x.rank_BK)),
        takes=("rank_BK",),
    ),
    Row(
        "plackett_luce",
        lambda x: plackett_luce(x.rank_BK, x.rank_mask_BK),
        takes=("rank_BK", "rank_mask_BK"),
    ),
    Row("reverse_kl", lambda x: x.x, takes=("x",)),
    Row("forward_kl", lambda x: -exp(-x.x), takes=("x",)),
    Row("jensen_shannon", lambda x: ls(x.x), takes=("x",)),
    Row("alpha_divergence", lambda x: alpha_score(x.x, 0.5), takes=("x",)),
    Row("alpha_divergence", lambda x, alpha: alpha_score(x.x, alpha), {"alpha": 0.2}, takes=("x",)),
    Row("alpha_divergence", lambda x, alpha: x.x, {"alpha": 1.0}, takes=("x",)),
    Row("kl_k1", lambda x: x.logp - x.ref_logp, takes=KL),
    Row("kl_abs", lambda x: np.abs(x.logp - x.ref_logp), takes=KL),
    Row("kl_k2", lambda x: (x.logp - x.ref_logp) ** 2 / 2, takes=KL),
    Row("kl_k3", lambda x: exp(x.ref_logp - x.logp) - 1 + x.logp - x.ref_logp, takes=KL),
    Row(
        "kl_exact",
        lambda x: np.sum(np.exp(x.logp_V) * (x.logp_V - x.ref_logp_V), axis=-1),
        takes=("logp_V", "ref_logp_V"),
    ),
    # lists, single responses, rewards and policy gradients
    *expected_lists.ROWS,
)
