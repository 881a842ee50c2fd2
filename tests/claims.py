"""Claims about population minima over free log-ratios, and where theory puts the minima.

The population loss of a group with probability p is p loss(group) + (1 - p) loss(group under the
other label). `test_minimisers.py` holds the claims.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from dpo_jax.structs import Scored

PROBABILITIES = (0.2, 0.5, 0.9)
BETA = 0.5
E = 0.1  # label smoothing, and the rate of flipped labels
FLAT = 1e-12
STEPS = np.array([-0.1, -1e-4, 0.0, 1e-4, 0.1])

Loss = Callable[[Scored], jax.Array]
Place = Callable[[float], tuple[float, ...]]


def logit(p):
    return np.log(p) - np.log1p(-p)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def tilted(p):
    """Off 1/2, where a hinge is least anywhere between its kinks."""
    return p + 0.01


def with_flips(p):
    """The probability of a label that is turned around with probability E."""
    return p + E - 2 * p * E


@dataclass(frozen=True)
class Claim:
    """A loss, its keywords and, as log-ratios of a group, where its population minimum lies.

    at: p -> a, b of a pair, K log-ratios of a list, a of a lone response. fields: further fields
    of Scored for one group (functions of p, or values). fixed: fields that stay with the place
    when the label is the other one. labels: p -> the probability of the label as observed.
    signs: keywords and fields whose sign matters. bare: no reference, `at` are log-probs.
    kink: the loss has no derivative at the minimum.
    """

    name: str
    keywords: Mapping[str, Any]
    at: Place
    fields: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    labels: Callable[[Any], Any] = lambda p: p
    signs: tuple[str, ...] = ()
    bare: bool = False
    kink: bool = False

    def holds(self, loss: Loss) -> bool:
        """Whether the slope is 0 at the place and changes from - to + around it, every way."""
        x_PK = np.array([self.at(p) for p in PROBABILITIES])
        ways_WK = np.eye(x_PK.shape[1])
        if len(ways_WK) == 2:
            ways_WK = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
        found = [slopes(self, loss, x_PK[:, None] + STEPS[None, :, None] * way) for way in ways_WK]
        slope_WPS = np.stack([slope @ way for slope, way in zip(found, ways_WK, strict=True)])
        flat = self.kink or np.all(np.abs(slope_WPS[..., STEPS == 0]) < FLAT)
        rising = np.all(slope_WPS[..., STEPS != 0] * STEPS[STEPS != 0] > 0)
        return bool(flat and rising)


@dataclass(frozen=True)
class Push(Claim):
    """A loss that has no minimum there, and p -> the sign of its slope along `way` at `at`."""

    way: tuple[float, ...] = (1.0, -1.0)
    slope: Callable[[float], float] = lambda p: 0.5 - p

    def holds(self, loss: Loss) -> bool:
        x_PSK = np.array([[self.at(p)] for p in PROBABILITIES])
        slope_P = slopes(self, loss, x_PSK)[:, 0] @ self.way
        wanted_P = np.round([self.slope(p) for p in PROBABILITIES], 9)
        return bool(np.all(np.where(wanted_P == 0, abs(slope_P) < FLAT, slope_P * wanted_P > 1e-6)))


def slopes(claim: Claim, loss: Loss, x_PSK: np.ndarray) -> np.ndarray:
    """d/dx of the population loss of S groups of each probability of PROBABILITIES."""
    P, S, K = x_PSK.shape
    p_B = jnp.repeat(jnp.array(PROBABILITIES), S)
    ref_BK = jnp.tile(jnp.linspace(-3.0, -2.5, K) * (not claim.bare), (P * S, 1))

    def filled(name: str) -> jax.Array:
        value = claim.fields[name]
        if callable(value):
            return jnp.asarray(value(p_B))
        # a scalar of the batch stays one; what ends in B has a row for every group
        value = jnp.asarray(value)
        return jnp.broadcast_to(value, (P * S, *value.shape)) if "_" in name else value

    given = {name: filled(name) for name in claim.fields}

    def total(x_BK: jax.Array) -> jax.Array:
        scored = Scored(logp_BK=ref_BK + x_BK, ref_logp_BK=ref_BK, **given)
        q_B = claim.labels(p_B)
        return jnp.sum(q_B * loss(scored) + (1 - q_B) * loss(other_label(scored, claim.fixed)))

    return np.asarray(jax.grad(total)(jnp.asarray(x_PSK.reshape(-1, K)))).reshape(x_PSK.shape)


def other_label(scored: Scored, fixed: tuple[str, ...] = ()) -> Scored:
    """The responses of a group change places; of a lone response the label changes."""
    if scored.logp_BK.shape[1] == 1:
        assert scored.label_B is not None
        return replace(scored, label_B=1 - scored.label_B)
    turns = {"margin_B": lambda x: -x, "soft_label_B": lambda x: 1 - x}
    for name in ("logp_BK", "ref_logp_BK", "length_BK", "kl_BK", "score_BKC"):
        turns[name] = lambda x: x[:, ::-1]
    there = [name for name in turns if getattr(scored, name) is not None and name not in fixed]
    return replace(scored, **{name: turns[name](getattr(scored, name)) for name in there})


def loss_of(claim: Claim) -> Loss:
    return partial(getattr(losses, claim.name), **claim.keywords)


# ---------------------------------------------------------------- where theory puts the minimum


def apart(gap: Callable[[float], float]) -> Place:
    """a and b whose difference is gap(p), where the difference is all that counts."""
    return lambda p: (gap(p) - 0.7, -0.7)


def each(value: Callable[[float], float]) -> Place:
    """Each response of a pair at value(the probability that it is chosen)."""
    return lambda p: (value(p), value(1 - p))


def helped(p: float, shift: float) -> float:
    """The z of least -p ls(z - shift) - (1-p) ls(-z - shift): a margin for whoever has won.

    p sigmoid(shift - z) = (1-p) sigmoid(shift + z) is c u^2 + (1 - o) u - o c = 0 in u = exp(z),
    c = exp(-shift), o = p / (1-p).
    """
    c, odds = np.exp(-shift), p / (1 - p)
    return np.log((odds - 1 + np.sqrt((odds - 1) ** 2 + 4 * odds * c**2)) / (2 * c))


def root(f: Callable[[Any], Any], low: Any, high: Any) -> Any:
    """Where an increasing f is 0, by bisection; of arrays elementwise."""
    for _ in range(100):
        middle = (low + high) / 2
        below = f(middle) < 0
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def scores_apart(score: Callable[[float], float], beta: float) -> Place:
    """a and b = 0.2 with beta (s(a) - s(b)) = logit p, for an increasing s."""
    return lambda p: (root(lambda a: beta * (score(a) - score(0.2)) - logit(p), -20.0, 20.0), 0.2)


def calibrated(p: float) -> tuple[float, float]:
    """Cal-DPO's sigmoid and squares compromise: a = -b, D + sigmoid(D) = p + (2p - 1) / beta."""
    gap = root(lambda d: d + sigmoid(d) - p - (2 * p - 1) / BETA, -50.0, 50.0)
    return gap / 2, -gap / 2


def odds_apart(p: float) -> tuple[float, float]:
    """Log-probs of 2 and of 3 tokens: the odds of exp(wbar) are p / (1-p) times exp(lbar)'s."""
    odds = p / (1 - p) / (np.exp(0.9) - 1)
    return 2 * np.log(odds / (1 + odds)), 3 * -0.9


def means_apart(gap: Callable[[float], float], inverse: Callable = lambda y: y) -> Place:
    """Log-probs of 2 and of 3 tokens whose means per token, bent by f, differ by gap(p)."""
    return lambda p: (2 * inverse(gap(p) - 1.0), 3 * inverse(-1.0))


def unbent(y: float) -> float:
    """The inverse of AlphaPO's f(y) = (1 - exp(-alpha y)) / alpha at alpha = 0.4."""
    return -np.log1p(-0.4 * y) / 0.4
