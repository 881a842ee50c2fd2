"""One expectation of one loss, and the numbers that every loss is tried on.

`ARRAYS` are ordinary values, `FAR` what must still come out finite: a new array goes into both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
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
    "score_BKC": np.array(
        [
            [[1.5, 4.0], [-0.25, 7.0]],
            [[-2.0, 1.0], [1.75, 0.5]],
            [[0.125, 3.0], [0.0, 2.0]],
            [[3.5, -1.0], [-4.0, 0.0]],
        ]
    ),
    "soft_label_B": np.array([0.5, 0.9, 0.25, 0.7]),
    "margin_B": np.array([0.5, 1.0, 0.0, 2.5]),
    "kl_BK": np.array([[0.5, 1.25], [2.0, 0.75], [0.0, 0.125], [4.0, 6.5]]),
    "aligned_BK": np.array([[-0.5, -0.25], [-1.5, -0.125], [0.0, -2.0], [-0.75, -0.5]]),
    "weight_B": np.array([1.0, 2.0, 0.0, 0.5]),
    "label_B": np.array([1.0, 0.0, 0.0, 1.0]),
    "kl": np.array(0.75),
    "delta": np.array(-0.375),
    "score_BK": np.array([[1.5, -0.25], [-2.0, 1.75], [0.125, 0.0], [3.5, -4.0]]),
    "rank_BK": np.array([[0.3, -0.2, 1.1, 0.9], [2.0, 1.0, -5.0, 4.0], [0.7, 3.0, -2.0, 9.0]]),
    "rank_mask_BK": np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], np.int32),
    "x": np.array([[-2.5, 0.75], [0.3, 4.0], [-0.1, -1.2]]),
    "logp": np.array([[-0.5, -2.25, -0.125], [-7.0, -1.0, -3.5]]),
    "ref_logp": np.array([[-1.25, -0.5, -0.25], [-4.0, -1.5, -3.4]]),
    "logp_V": np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])),
    "ref_logp_V": np.log(np.array([[0.4, 0.4, 0.2], [0.6, 0.3, 0.1]])),
}

# Log-ratios and scores far outside what a float32 exp can hold, and exact ties.
FAR = {
    "logp_BK": np.array([[-10.0, -810.0], [-810.0, -10.0], [-500.0, -500.0], [-0.0, -0.0]]),
    "ref_logp_BK": np.array([[-10.0, -10.0], [-10.0, -10.0], [-100.0, -100.0], [-800.0, -0.0]]),
    "length_BK": np.array([[1, 1], [1, 1], [4, 4], [1, 2]], np.int32),
    "score_BKC": np.array(
        [
            [[800.0, 0.0], [0.0, 0.0]],
            [[0.0, 0.0], [800.0, 0.0]],
            [[3.0, 9.0], [3.0, -9.0]],
            [[-400.0, 0.0], [400.0, 0.0]],
        ]
    ),
    "soft_label_B": np.array([1.0, 0.0, 0.5, 0.5]),
    "margin_B": np.array([0.0, 0.0, 800.0, 0.0]),
    "kl_BK": np.array([[800.0, 0.0], [0.0, 800.0], [0.0, 0.0], [400.0, 400.0]]),
    "aligned_BK": np.array([[-800.0, -0.0], [-0.0, -0.0], [-800.0, -800.0], [-1.0, -0.0]]),
    "weight_B": np.array([1.0, 1.0, 0.0, 1.0]),
    "label_B": np.array([1.0, 0.0, 1.0, 0.0]),
    "kl": np.array(800.0),
    "delta": np.array(-400.0),
    "score_BK": np.array([[800.0, 0.0], [0.0, 800.0], [-400.0, 400.0], [3.0, 3.0]]),
    "rank_BK": np.array([[0.0, 800, -800, 0], [5, 5, 5, 5], [-800, 0, 800, 1], [800, 0, -9, 2]]),
    "rank_mask_BK": np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], np.int32),
    "x": np.array([[800.0, -800.0], [0.0, 81.0], [-81.0, 79.0]]),
    "logp": np.array([[-800.0, -0.0, -3.0], [-81.0, -1.0, -0.0]]),
    "ref_logp": np.array([[-0.0, -800.0, -3.0], [-0.0, -82.0, -0.0]]),
    "logp_V": np.array([[-0.0, -800.0, -800.0], [-800.0, -0.0, -800.0]]),
    "ref_logp_V": np.array([[-800.0, -0.0, -800.0], [-800.0, -0.0, -800.0]]),
}
SCORED = ("logp_BK", "ref_logp_BK", "length_BK")
FIELDS = {each.name for each in fields(Scored)}
STILL = {"weight_B", "label_B"}  # nobody differentiates by what says who counts


@dataclass(frozen=True)
class Row:
    """One expectation: `loss(arrays, **numbers, **flags)` is `formula(x, **numbers)`.

    takes: the arrays of the loss; names of fields of `Scored` make one Scored, others are passed
    by position. A mapping {field: array} gives an array under another name. numbers:
    hyperparameters, which may be traced. flags: functions, words and booleans, which may not.
    fixed: arrays passed by keyword. formula: its x has every array of ARRAYS as an attribute,
    and w, l, rw, rl, a, b, len_w, len_l in the notation of the losses; x.sg is x without
    gradient, for what the loss holds still.
    """

    name: str
    formula: Callable[..., Any]
    numbers: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] | Mapping[str, str] = SCORED
    fixed: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        further = [name for name in self.given if name not in SCORED]
        return "-".join([self.name, *self.numbers, *self.flags, *self.fixed, *further])

    @property
    def given(self) -> dict[str, str]:
        """Fields of `Scored` or parameters -> the arrays they are given."""
        return dict(self.takes) if isinstance(self.takes, Mapping) else {k: k for k in self.takes}

    @property
    def scored(self) -> bool:
        """Whether the loss takes one `Scored`."""
        return FIELDS.issuperset(self.given)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The arrays that the loss is differentiated by: all that hold real numbers."""
        real = [name for name in self.given.values() if ARRAYS[name].dtype == np.float64]
        return tuple(name for name in real if name not in STILL)

    def actual(self, arrays: Mapping[str, Any], numbers: Mapping[str, Any] | None = None) -> Any:
        """The loss itself on `arrays`."""
        numbers = self.numbers if numbers is None else numbers
        keywords = {**numbers, **self.flags, **{key: arrays[v] for key, v in self.fixed.items()}}
        given = {key: arrays[name] for key, name in self.given.items()}
        loss = getattr(losses, self.name)
        if self.scored:
            return loss(Scored(**given), **keywords)
        return loss(*given.values(), **keywords)

    def expected(
        self,
        arrays: Mapping[str, np.ndarray],
        numbers: Mapping[str, float] | None = None,
        still: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """The formula on `arrays`, which replace those of the same name in ARRAYS.

        still: the arrays that x.sg is made of, those of x where None.
        """
        x = named({**ARRAYS, **arrays})
        x.sg = named({**ARRAYS, **(arrays if still is None else still)})
        numbers = self.numbers if numbers is None else numbers
        return np.asarray(self.formula(x, **numbers), np.float64)


def named(arrays: Mapping[str, np.ndarray]) -> SimpleNamespace:
    """The arrays as attributes, with the pairs' in the notation of the losses."""
    x = SimpleNamespace(**arrays)
    x.w, x.l = x.logp_BK.T
    x.rw, x.rl = x.ref_logp_BK.T
    x.a, x.b = x.w - x.rw, x.l - x.rl
    x.len_w, x.len_l = x.length_BK.T
    return x


def ls(z):
    """log sigmoid."""
    return -np.logaddexp(0, -z)


def sigmoid(z):
    return np.exp(ls(z))


def exp(z):
    """exp of the exponent clamped at 80."""
    return np.exp(np.minimum(z, 80))


def cdpo(z, e=0.0):
    """The logistic link with label smoothing e."""
    return -(1 - e) * ls(z) - e * ls(-z)
