"""Annotators: simulated people who say which of two responses they prefer.

An annotator is a function (scores_K, rng, *, ...) -> [Label, ...]: one label for each of the
K (K - 1) / 2 pairs i < j of the responses to one prompt, in order of i, then j. Equal scores are a
coin toss. Keywords are fixed by functools.partial:

    partial(flips, rate=0.1, annotator=partial(bradley_terry, temperature=0.5))
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dpo_jax.structs import BadInput


class Label(NamedTuple):
    """`winner` was preferred to `loser` (indices of responses), which had probability `p`."""

    winner: int
    loser: int
    p: float


Annotator = Callable[[np.ndarray, np.random.Generator], list[Label]]


def bradley_terry(
    scores_K: np.ndarray, rng: np.random.Generator, *, temperature: float = 1.0
) -> list[Label]:
    """P(i before j) = sigmoid((s_i - s_j) / temperature)."""
    first, second, gap = _pairs(scores_K)
    return _labels(first, second, preference(gap, temperature=temperature), rng)


def noiseless(scores_K: np.ndarray, rng: np.random.Generator) -> list[Label]:
    """The higher score wins: the limit of bradley_terry at temperature 0."""
    first, second, gap = _pairs(scores_K)
    return _labels(first, second, (1 + np.sign(gap)) / 2, rng)


def flips(
    scores_K: np.ndarray,
    rng: np.random.Generator,
    *,
    rate: float,
    annotator: Annotator = bradley_terry,
) -> list[Label]:
    """Another annotator's labels, each turned round with probability `rate` (a slip of the hand).

    P(i before j) = (1 - rate) p + rate (1 - p), where p is the other annotator's.
    """
    if not 0 <= rate <= 1:
        raise BadInput(f"flips: rate is a probability, not {rate}: give one between 0 and 1")
    labels = annotator(scores_K, rng)
    slips = rng.random(len(labels)) < rate
    turned = [
        Label(label.loser, label.winner, 1 - label.p) if slip else label
        for label, slip in zip(labels, slips, strict=True)
    ]
    return [label._replace(p=(1 - rate) * label.p + rate * (1 - label.p)) for label in turned]


def length_bias(
    scores_K: np.ndarray,
    rng: np.random.Generator,
    *,
    lengths_K: np.ndarray,
    bonus: float,
    annotator: Annotator = bradley_terry,
) -> list[Label]:
    """An annotator who takes length for quality: it sees the scores s + bonus * length."""
    scores_K, lengths_K = np.asarray(scores_K, np.float64), np.asarray(lengths_K)
    if scores_K.shape != lengths_K.shape:
        raise BadInput(
            f"length_bias: {scores_K.shape} scores but {lengths_K.shape} lengths: "
            "give one length for each response"
        )
    return annotator(scores_K + bonus * lengths_K, rng)


def preference(gap: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """Bradley-Terry's P(i before j) of score gaps s_i - s_j, elementwise in float64."""
    if not temperature > 0:
        raise BadInput(
            f"bradley_terry: temperature is {temperature}: give a positive one, or use noiseless"
        )
    # sigmoid(x) = (1 + tanh(x / 2)) / 2 does not overflow.
    return (1 + np.tanh(np.asarray(gap, np.float64) / (2 * temperature))) / 2


def agreement(scores_BK: np.ndarray, *, temperature: float = 1.0) -> float:
    """E[max(p, 1 - p)] of the Bradley-Terry annotator over all pairs of each row's responses.

    The share of its labels that one who knows the scores foretells: no accuracy on labels it drew
    is higher in expectation. For a list of pairs give their scores as rows of two.
    """
    scores_BK = np.asarray(scores_BK, np.float64)
    first, second = np.triu_indices(scores_BK.shape[-1], k=1)
    gap = np.abs(scores_BK[..., first] - scores_BK[..., second])
    if not gap.size:
        raise BadInput(f"agreement: no pairs in scores of shape {scores_BK.shape}")
    return float(preference(gap, temperature=temperature).mean())


def _pairs(scores_K: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair i < j, and its s_i - s_j."""
    scores_K = np.asarray(scores_K, np.float64)
    if scores_K.ndim != 1 or not np.isfinite(scores_K).all():
        raise BadInput(f"annotator: the scores of one prompt are a finite vector, not {scores_K}")
    first, second = np.triu_indices(len(scores_K), k=1)
    return first, second, scores_K[first] - scores_K[second]


def _labels(
    first: np.ndarray, second: np.ndarray, p: np.ndarray, rng: np.random.Generator
) -> list[Label]:
    """Draws one label a pair; p is the probability that `first` is preferred."""
    kept = rng.random(len(p)) < p
    columns = np.where(kept, first, second), np.where(kept, second, first), np.where(kept, p, 1 - p)
    return [Label(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
