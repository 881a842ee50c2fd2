"""What the losses converge to when an annotator prefers the first response with probability p.

The log-ratios of one group are free: the population loss has its minimum, or where there is none
its slope, as theory says. The last tests feed every check losses with a flipped sign.
`test_optimal_policies.py` does it for whole policies.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from claims import (
    BETA,
    FLAT,
    Claim,
    E,
    Loss,
    Push,
    apart,
    calibrated,
    each,
    helped,
    logit,
    loss_of,
    means_apart,
    odds_apart,
    root,
    scores_apart,
    sigmoid,
    tilted,
    unbent,
    with_flips,
)

from dpo_jax import losses
from dpo_jax.structs import Scored


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


SCORES = np.array([1.5, -0.25, 0.5])
SHARES = np.exp(SCORES / 2) / np.exp(SCORES / 2).sum()  # at alpha = 2
HALF = 1 / (2 * BETA)
BT = {"beta": BETA}
RAISED = {"beta": 5.0}  # the scores of a and b = 0.2 can be as far apart as logit(0.9) / beta
LENGTHS = {"length_BK": np.array([2, 3])}
GOOD = {"label_B": 1.0}
SCORED = {"score_BKC": SCORES[:, None]}
dpo_gap = apart(lambda p: logit(p) / BETA)
cdpo_gap = apart(lambda p: logit(with_flips(p)) / BETA)

DIFFERENCES = {
    "dpo": Claim("dpo", BT, dpo_gap),
    "cdpo": Claim("dpo", BT | {"label_smoothing": E}, cdpo_gap, signs=("label_smoothing",)),
    "dpo-length-norm": Claim(
        "dpo", BT | {"length_norm": True}, means_apart(lambda p: logit(p) / BETA), LENGTHS
    ),
    "dpo-forward-kl": Claim(
        "dpo", RAISED | {"divergence": losses.forward_kl}, scores_apart(lambda x: -np.exp(-x), 5.0)
    ),
    "dpo-jensen-shannon": Claim(
        "dpo",
        RAISED | {"divergence": losses.jensen_shannon},
        scores_apart(lambda x: np.log(sigmoid(x)), 5.0),
    ),
    "dpo-alpha": Claim(
        "dpo",
        RAISED | {"divergence": losses.alpha_divergence(alpha=0.3)},
        scores_apart(lambda x: -np.exp(-0.7 * x) / 0.7, 5.0),
    ),
    "robust": Claim(
        "robust_dpo",
        BT | {"label_smoothing": E},
        dpo_gap,  # p is the probability of the label before it is flipped
        labels=with_flips,
        signs=("label_smoothing",),
    ),
    "hinge": Claim(
        "hinge", BT, apart(lambda p: np.sign(tilted(p) - 0.5) / BETA), labels=tilted, kink=True
    ),
    "ipo": Claim("ipo", BT | {"length_norm": False}, apart(lambda p: (2 * p - 1) * HALF)),
    "ipo-length-norm": Claim("ipo", BT, means_apart(lambda p: (2 * p - 1) * HALF), LENGTHS),
    # a reverse KL averages the logits of the two labels: not logit p
    "exo": Claim(
        "exo", BT | {"label_smoothing": E}, apart(lambda p: (2 * p - 1) * logit(1 - E) / BETA)
    ),
    "dpop": Claim("dpop", BT | {"lam": 50.0}, lambda p: (5 + logit(p) / BETA, 5.0)),
    "r-dpo": Claim(
        "r_dpo",
        BT | {"alpha": 0.3},
        apart(lambda p: (logit(p) + 0.3) / BETA),  # the reward is r - alpha |y|, 2 tokens to 3
        LENGTHS,
        signs=("alpha",),
    ),
    "odpo": Claim(
        "odpo",
        BT | {"alpha": 0.5},
        apart(lambda p: helped(p, 0.5 * np.log(3.0)) / BETA),
        {"score_BKC": np.array([[2.0], [-1.0]])},
        fixed=("score_BKC",),  # whoever wins has the higher score
        signs=("alpha",),
    ),
    "modpo": Claim(
        "modpo",
        BT | {"weight": 0.7},
        apart(lambda p: (0.7 * logit(p) + 0.3 * 1.25) / BETA),
        {"margin_B": 1.25},
        signs=("margin_B",),
    ),
    "chi-po": Claim("chi_po", BT | {"clip": 5.0}, scores_apart(lambda x: np.exp(x) + x, BETA)),
    "tdpo": Claim(
        "tdpo",
        BT | {"alpha": 0.5},
        apart(lambda p: logit(p) / BETA + 0.5 * (1.1 - 0.4)),
        {"kl_BK": np.array([0.4, 1.1])},
        signs=("alpha",),
    ),
    "soft-dpo": Claim("soft_dpo", BT, dpo_gap, {"soft_label_B": lambda p: p}),
}
WITHOUT_REFERENCE = {
    "cpo": Claim("cpo", BT | {"label_smoothing": E}, cdpo_gap, bare=True),
    "simpo": Claim(
        "simpo",
        {"beta": 2.0, "gamma": 0.8},
        means_apart(lambda p: helped(p, 0.8) / 2.0),
        LENGTHS,
        signs=("gamma",),
        bare=True,
    ),
    "alpha-po": Claim(
        "alpha_po",
        {"beta": 2.0, "gamma": 0.8, "alpha": 0.4},
        means_apart(lambda p: helped(p, 0.8) / 2.0, unbent),
        LENGTHS,
        signs=("gamma", "alpha"),
        bare=True,
    ),
    "orpo": Claim("orpo", {"lam": 0.1}, odds_apart, LENGTHS, signs=("lam",), bare=True),
    "slic": Claim(
        "slic",
        {"delta": 1.5},
        apart(lambda p: 1.5 * np.sign(tilted(p) - 0.5)),
        labels=tilted,
        signs=("delta",),
        bare=True,
        kink=True,
    ),
    "simper": Push("simper", {}, lambda p: (-2.0, -3.0), LENGTHS, bare=True, way=(1.0, 0.0)),
    "unlikelihood": Push(
        "unlikelihood",
        {"alpha": 0.25},
        lambda p: (-2.0, -2.5),
        signs=("alpha",),
        bare=True,
        way=(1.0, 0.0),
        slope=lambda p: 0.2 - p,  # alpha / (1 + alpha)
    ),
}
ABSOLUTE = {
    "nca": Claim("nca", BT, each(lambda p: np.log(2 * p) / BETA)),
    "bco-pair": Claim(
        "bco_pair", BT, each(lambda p: (0.3 + logit(p)) / BETA), {"delta": 0.3}, signs=("delta",)
    ),
    "sppo": Claim("sppo_hard", BT, each(lambda p: (2 * p - 1) * HALF)),
    "cal-dpo": Claim("cal_dpo", BT, calibrated),
    "bco": Claim(
        "bco",
        BT,
        lambda p: ((0.3 + logit(p)) / BETA,),
        GOOD | {"delta": 0.3},
        signs=("delta",),
    ),
    "info-nca": Claim(
        "info_nca",
        BT | {"alpha": 2.0},
        lambda p: tuple(SCORES / 2.0 / BETA + 0.4),
        SCORED,
        signs=("score_BKC",),
    ),
    "nca-list": Claim(
        "nca_list",
        BT | {"alpha": 2.0},
        lambda p: tuple(np.log(3 * SHARES) / BETA),
        SCORED,
        signs=("score_BKC",),
    ),
}
# No minimum: which way the slope points, and for which p it is 0.
PUSHES = {
    "apo-zero": Push("apo_zero", BT, lambda p: (0.4, 0.4)),
    "apo-down-apart": Push("apo_down", BT, lambda p: (0.0, 0.0)),
    "apo-down-down": Push(
        "apo_down", BT, lambda p: (0.0, 0.0), way=(1.0, 1.0), slope=lambda p: 1.0
    ),
    "apo-zero-unpaired": Push("apo_zero_unpaired", BT, lambda p: (0.4,), GOOD, way=(1.0,)),
    "npo": Push("npo", BT, lambda p: (-4.0,), GOOD, way=(1.0,), slope=lambda p: 1.0),
    "kto": Push("kto", BT, lambda p: (0.0,), GOOD, way=(1.0,)),
    "kto-weights": Push(
        "kto",
        BT | {"desirable": 4.0},
        lambda p: (0.7,),
        GOOD | {"kl": 0.3},
        signs=("desirable",),
        way=(1.0,),
        slope=lambda p: 0.2 - p,  # undesirable / (desirable + undesirable)
    ),
    # below the reference even a response that mostly loses is pulled up
    "dpop-below": Push(
        "dpop",
        BT | {"lam": 50.0},
        lambda p: (-1.0, -1.0),
        signs=("lam",),
        way=(1.0, 1.0),
        slope=lambda p: -1.0,
    ),
    "lipo": Push(
        "lipo", BT, lambda p: (0.3, 0.2, 0.1), SCORED, way=(1, -1, 0), slope=lambda p: -1.0
    ),
    "discopop-wrong": Push(
        "discopop", BT, lambda p: (-2.0, 2.0), labels=lambda p: 1.0, slope=lambda p: -1.0
    ),
    "discopop-right": Push(
        "discopop", BT, lambda p: (2.0, -2.0), labels=lambda p: 1.0, slope=lambda p: -1.0
    ),
    # slope 5 (1 - log 2) - 3/4 in beta D at tau = 1/20: near the reference it pushes the wrong way
    "discopop-hump": Push("discopop", BT, lambda p: (0.0, 0.0), slope=lambda p: p - 0.5),
}
CLAIMS = DIFFERENCES | WITHOUT_REFERENCE | ABSOLUTE | PUSHES
OF_POLICIES = {"nll", "plackett_luce_dpo", "all_pairs"}  # test_optimal_policies.py
OF_BATCHES = {"aot", "aot_unpaired", "beta_dpo"}  # below
FAMILIES = {"pairs", "absolute", "coupled", "likelihood", "unpaired", "lists"}


def test_every_preference_loss_has_a_claim():
    public = {entry.name for entry in losses.entries() if entry.family in FAMILIES}
    assert public == {claim.name for claim in CLAIMS.values()} | OF_POLICIES | OF_BATCHES


@pytest.mark.parametrize("name", CLAIMS)
def test_population_minimiser(name):
    assert CLAIMS[name].holds(loss_of(CLAIMS[name]))


# ---------------------------------------------------------------- losses that see the batch


def total_slopes(loss: Loss, x_BK: np.ndarray, **fields: Any) -> np.ndarray:
    """d/dx (B, K) of the summed loss of one batch at log-ratios x."""
    ref_BK = jnp.asarray(np.random.default_rng(1).standard_normal(x_BK.shape))

    def total(x_BK):
        return jnp.sum(loss(Scored(logp_BK=ref_BK + x_BK, ref_logp_BK=ref_BK, **fields)))

    return np.asarray(jax.grad(total)(jnp.asarray(x_BK)))


@pytest.mark.parametrize("gap", [logit(1 - E) / BETA, logit(E) / BETA])
def test_optimal_transport_shifts_the_whole_distribution(gap):
    """Least where one sorted sample is the other one, moved by logit(1 - e) / beta."""
    right = gap > 0
    b_B = np.array([0.3, -1.0, 2.5, 0.9, -0.2])
    x_BK = np.stack([b_B[::-1] + gap, b_B], axis=-1)
    loss = partial(losses.aot_unpaired, beta=BETA, label_smoothing=E)
    assert (np.abs(total_slopes(loss, x_BK)).max() < FLAT) == right
    for step in (-0.1, 0.1) if right else ():
        moved_BK = x_BK + np.array([[step, 0.0]])
        assert np.all(step * total_slopes(loss, moved_BK)[:, 0] > 0)

    ref_BK = np.random.default_rng(1).standard_normal(x_BK.shape)
    margin_B = ref_BK[:, 0] - ref_BK[:, 1]
    wanted_B = margin_B[::-1] + gap - margin_B  # log-ratios that turn the margins around
    loss = partial(losses.aot, beta=BETA, label_smoothing=E)
    slope_BK = total_slopes(loss, np.stack([wanted_B, np.zeros(5)], axis=-1))
    assert (np.abs(slope_BK).max() < FLAT) == right


@pytest.mark.parametrize("steady", [True, False])
def test_beta_dpo_is_dpo_with_the_beta_of_the_batch(steady):
    """Of ten pairs eight are won: beta_b D = logit 0.8; in the steady state beta_b is beta."""
    won_B = np.repeat([1.0, -1.0], [8, 2])

    def mean(gap):
        return BETA * 0.6 * gap

    def beta_b(gap):
        return BETA * (1 + 0.6 * mean(gap) * (not steady))

    gap = root(lambda d: beta_b(d) * d - logit(0.8), 0.0, 20.0)
    loss = partial(losses.beta_dpo, beta=BETA, alpha=0.6, rho=1.0)
    for step in (-0.1, 0.0, 0.1):
        x_BK = np.stack([won_B * (gap + step), np.zeros(10)], axis=-1)
        delta = jnp.asarray(mean(gap + step) if steady else 0.0)
        slope = total_slopes(loss, x_BK, delta=delta)[:, 0] @ won_B
        assert abs(slope) < FLAT if step == 0 else slope * step > 1e-3


def test_kto_values_a_response_by_its_distance_from_the_kl():
    """The slope is largest at a = kl, where it is beta / 4, and alike on both sides of it."""
    loss = partial(losses.kto, beta=BETA)
    x_BK = np.array([[0.8], [0.8 - 1.3], [0.8 + 1.3]])
    fields = {"label_B": jnp.ones(3), "kl": jnp.asarray(0.8)}
    at, below, above = total_slopes(loss, x_BK, **fields)[:, 0]
    assert at == pytest.approx(-BETA / 4)
    assert below == pytest.approx(above) and abs(below) < abs(at) * 0.95


# ---------------------------------------------------------------- the checks can fail


def ratios_exchanged(claim: Claim) -> Loss:
    """D -> -D with everything else in place; a lone response a -> -a."""

    def wrong(scored: Scored) -> jax.Array:
        assert scored.ref_logp_BK is not None
        ratio_BK = scored.logp_BK - scored.ref_logp_BK
        turned_BK = ratio_BK[:, ::-1] if ratio_BK.shape[1] > 1 else -ratio_BK
        return loss_of(claim)(replace(scored, logp_BK=scored.ref_logp_BK + turned_BK))

    return wrong


def negated(claim: Claim) -> Loss:
    return lambda scored: -loss_of(claim)(scored)


def turned(claim: Claim, name: str) -> Loss:
    """The loss with one keyword, or one field, of the other sign."""
    if name in claim.keywords:
        keywords = {**claim.keywords, name: -claim.keywords[name]}
        return partial(getattr(losses, claim.name), **keywords)
    return lambda scored: loss_of(claim)(replace(scored, **{name: -getattr(scored, name)}))


@pytest.mark.parametrize("name", CLAIMS)
def test_flipped_signs_are_rejected(name):
    claim = CLAIMS[name]
    wrong = {"negated": negated(claim)} | {sign: turned(claim, sign) for sign in claim.signs}
    # what treats both responses alike does not see them change places
    if not (isinstance(claim, Push) and claim.way == (1.0, 1.0)):
        wrong["exchanged"] = ratios_exchanged(claim)
    assert [kind for kind, loss in wrong.items() if claim.holds(loss)] == []
