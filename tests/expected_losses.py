"""What every public loss should give: one row a loss (or more), its formula in float64 numpy.

A row says which arrays the loss takes, its hyperparameters and its formula over those arrays,
written out from the definition and never from the code under test. `test_losses.py` walks
`losses.__all__` and fails for a loss without a row. To add a loss, add a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from dpo_jax import losses
from dpo_jax.structs import Scored

# Moderate values, no kink of any row within the reach of a central difference.
ARRAYS = {
    "logp_BK": np.array([[-24.6, -37.6], [-31.0, -28.4], [-3.25, -4.5], [-43.7, -29.8]]),
    "ref_logp_BK": np.array([[-26.1, -35.2], [-30.2, -29.9], [-3.0, -4.0], [-38.2, -25.9]]),
    "length_BK": np.array([[12, 17], [9, 8], [1, 2], [21, 15]], np.int32),
    "score_BK": np.array([[1.5, -0.25], [-2.0, 1.75], [0.125, 0.0], [3.5, -4.0]]),
    "margin_B": np.array([0.5, 1.0, 0.0, 2.5]),
    "rank_BK": np.array([[0.3, -0.2, 1.1, 0.9], [2.0, 1.0, -5.0, 4.0], [0.7, 3.0, -2.0, 9.0]]),
    "rank_mask_BK": np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], np.int32),
    "x": np.array([[-2.5, 0.75], [0.3, 4.0], [-0.1, -1.2]]),
    "logp": np.array([[-0.5, -2.25, -0.125], [-7.0, -1.0, -3.5]]),
    "ref_logp": np.array([[-1.25, -0.5, -0.25], [-4.0, -1.5, -3.4]]),
    "logp_V": np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])),
    "ref_logp_V": np.log(np.array([[0.4, 0.4, 0.2], [0.6, 0.3, 0.1]])),
}
SCORED = ("logp_BK", "ref_logp_BK", "length_BK")


@dataclass(frozen=True)
class Row:
    """One expectation: `loss(arrays, **numbers, **flags)` is `formula(x, **numbers)`.

    takes: arrays passed by position; SCORED = the fields of one `Scored`. numbers:
    hyperparameters, which may be traced. flags: functions, words and booleans, which may not.
    fixed: arrays passed by keyword. formula: its x has every array of ARRAYS as an attribute,
    and w, l, rw, rl, a, b, len_w, len_l in the notation of the losses.
    """

    name: str
    formula: Callable[..., Any]
    numbers: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] = SCORED
    fixed: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *self.numbers, *self.flags, *self.fixed])

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The arrays that the loss is differentiated by: all that hold real numbers."""
        return tuple(name for name in self.takes if ARRAYS[name].dtype == np.float64)

    def actual(self, arrays: Mapping[str, Any], numbers: Mapping[str, Any] | None = None) -> Any:
        """The loss itself on `arrays`."""
        numbers = self.numbers if numbers is None else numbers
        keywords = {**numbers, **self.flags, **{key: arrays[v] for key, v in self.fixed.items()}}
        given = {name: arrays[name] for name in self.takes}
        loss = getattr(losses, self.name)
        if self.takes == SCORED:
            return loss(Scored(**given), **keywords)
        return loss(*given.values(), **keywords)

    def expected(
        self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, float] | None = None
    ) -> np.ndarray:
        """The formula on `arrays`, which replace those of the same name in ARRAYS."""
        x = SimpleNamespace(**{**ARRAYS, **arrays})
        x.w, x.l = x.logp_BK.T
        x.rw, x.rl = x.ref_logp_BK.T
        x.a, x.b = x.w - x.rw, x.l - x.rl
        x.len_w, x.len_l = x.length_BK.T
        numbers = self.numbers if numbers is None else numbers
        return np.asarray(self.formula(x, **numbers), np.float64)


def ls(z):
    """log sigmoid."""
    return -np.logaddexp(0, -z)


def exp(z):
    """exp of the exponent clamped at 80."""
    return np.exp(np.minimum(z, 80))


def cdpo(z, e=0.0):
    """The logistic link with label smoothing e."""
    return -(1 - e) * ls(z) - e * ls(-z)


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
)
