"""Annotators: simulated people who say which responses to one prompt they prefer.

An annotator is a function (scores_KC, rng, *, ...) -> [Label, ...] of the scores that K responses
have under C criteria; what it values is criterion 0. It gives a label for each of the K (K - 1) / 2
pairs i < j, in order of i, then j, unless it says otherwise. Equal scores are a coin toss. Keywords
are fixed by functools.partial:

    partial(flips, rate=0.1, annotator=partial(bradley_terry, temperature=0.5))
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dpo_jax.structs import BadInput


class Label(NamedTuple):
    """What an annotator said; it had probability `p`.

    order: indices of responses, best to worst: two are a pair, more a ranking, one is judged alone.
    soft_label: how sure it is of a pair, 1.0 or, of a tie, 0.5. label: whether a lone response is
    good.
    """

    order: tuple[int, ...]
    p: float
    soft_label: float | None = None
    label: bool | None = None


Annotator = Callable[[np.ndarray, np.random.Generator], list[Label]]


def bradley_terry(
    scores_KC: np.ndarray, rng: np.random.Generator, *, temperature: float = 1.0
) -> list[Label]:
    """P(i before j) = sigmoid((s_i - s_j) / temperature)."""
    first, second, gap = _pairs(scores_KC)
    return _labels(first, second, preference(gap, temperature=temperature), rng)


def noiseless(scores_KC: np.ndarray, rng: np.random.Generator) -> list[Label]:
    """The higher score wins: the limit of bradley_terry at temperature 0."""
    first, second, gap = _pairs(scores_KC)
    return _labels(first, second, (1 + np.sign(gap)) / 2, rng)


def best_and_worst(scores_KC: np.ndarray, rng: np.random.Generator) -> list[Label]:
    """One pair, the highest score before the lowest; none where all are equal."""
    score_K = _checked(scores_KC)[:, 0]
    best, worst = int(score_K.argmax()), int(score_K.argmin())
    return [Label((best, worst), 1.0)] if score_K[best] > score_K[worst] else []


def best(scores_KC: np.ndarray, rng: np.random.Generator) -> list[Label]:
    """The response of the highest score alone, the first of several: best-of-n, to imitate."""
    return [Label((int(_checked(scores_KC)[:, 0].argmax()),), 1.0)]


def ranked(scores_KC: np.ndarray, rng: np.random.Generator) -> list[Label]:
    """One ranking of all K by their scores, the limit of plackett_luce at temperature 0; none
    where all are equal."""
    score_K = _checked(scores_KC)[:, 0]
    _, equal = np.unique(score_K, return_counts=True)
    if len(equal) < 2:
        return []
    order = np.lexsort((rng.random(len(score_K)), -score_K))
    return [Label(tuple(order.tolist()), 1 / math.prod(map(math.factorial, equal.tolist())))]


def plackett_luce(
    scores_KC: np.ndarray, rng: np.random.Generator, *, temperature: float = 1.0
) -> list[Label]:
    """One ranking of all K: each place goes to one of those left, by softmax(s / temperature)."""
    score_K = _checked(scores_KC)[:, 0] / _positive(temperature)
    if len(score_K) < 2:
        return []
    # The places of scores with Gumbel noise are those of softmaxes drawn from one after another.
    order = np.argsort(-(score_K + rng.gumbel(size=len(score_K))), kind="stable")
    gap_KK = score_K[order][None, :] - score_K[order][:, None]
    left_KK = np.where(np.triu(np.ones_like(gap_KK)), gap_KK, -np.inf)  # row k: from place k on
    return [Label(tuple(order.tolist()), math.exp(-np.logaddexp.reduce(left_KK, axis=1).sum()))]


def thumbs(
    scores_KC: np.ndarray,
    rng: np.random.Generator,
    *,
    threshold: float = 0.0,
    temperature: float = 1.0,
) -> list[Label]:
    """Every response judged alone: P(good) = sigmoid((s - threshold) / temperature)."""
    p_K = preference(_checked(scores_KC)[:, 0] - threshold, temperature=temperature)
    good_K = rng.random(len(p_K)) < p_K
    return [
        Label((k,), p if good else 1 - p, label=good)
        for k, (good, p) in enumerate(zip(good_K.tolist(), p_K.tolist(), strict=True))
    ]


def flips(
    scores_KC: np.ndarray,
    rng: np.random.Generator,
    *,
    rate: float,
    annotator: Annotator = bradley_terry,
) -> list[Label]:
    """Another annotator's labels, each turned round with probability `rate` (a slip of the hand).

    P(i before j) = (1 - rate) p + rate (1 - p), where p is the other annotator's; a lone response
    that is good becomes bad, and a bad one good.
    """
    if not 0 <= rate <= 1:
        raise BadInput(f"flips: rate is a probability, not {rate}: give one between 0 and 1")
    labels = annotator(scores_KC, rng)
    turned = [_turned(label) for label in labels]
    slips = rng.random(len(labels)) < rate
    chosen = [pair[int(slip)] for *pair, slip in zip(labels, turned, slips, strict=True)]
    return [label._replace(p=(1 - rate) * label.p + rate * (1 - label.p)) for label in chosen]


def ties(
    scores_KC: np.ndarray,
    rng: np.random.Generator,
    *,
    threshold: float,
    annotator: Annotator = bradley_terry,
) -> list[Label]:
    """Another annotator's pairs, those too close to call as ties (Rao & Kupper 1967).

    P(i before j) = p / (p + (1 - p) exp(threshold)), where p is the other annotator's; what is
    left to 1 is a tie. So a tie is a perceived gap below the threshold, in log-odds.
    """
    if not 0 <= threshold <= 700:
        raise BadInput(f"ties: threshold is {threshold}: give log-odds from 0 to 700")
    widened = math.exp(threshold)
    labels = annotator(scores_KC, rng)
    for label in labels:
        if len(label.order) != 2 or label.soft_label is not None:
            raise BadInput(
                "ties: its annotator gives no plain pairs: use one such as bradley_terry"
            )
    luck = rng.random(len(labels)).tolist()
    return [_decided(label, widened, u) for label, u in zip(labels, luck, strict=True)]


def length_bias(
    scores_KC: np.ndarray,
    rng: np.random.Generator,
    *,
    bonus: float,
    criterion: int = 1,
    annotator: Annotator = bradley_terry,
) -> list[Label]:
    """An annotator who takes length for quality: it adds bonus * criterion, which is the length."""
    scores_KC = _checked(scores_KC)
    if not 0 <= criterion < scores_KC.shape[1]:
        raise BadInput(
            f"length_bias: there is no criterion {criterion} among {scores_KC.shape[1]}: "
            "give the length as another reward"
        )
    seen_KC = scores_KC.copy()
    seen_KC[:, 0] += bonus * scores_KC[:, criterion]
    return annotator(seen_KC, rng)


def preference(gap: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """Bradley-Terry's P(i before j) of score gaps s_i - s_j, elementwise in float64."""
    # sigmoid(x) = (1 + tanh(x / 2)) / 2 does not overflow.
    return (1 + np.tanh(np.asarray(gap, np.float64) / (2 * _positive(temperature)))) / 2


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


def _checked(scores_KC: np.ndarray) -> np.ndarray:
    """The scores in float64."""
    scores_KC = np.asarray(scores_KC, np.float64)
    if scores_KC.ndim != 2 or not scores_KC.shape[1] or not np.isfinite(scores_KC).all():
        raise BadInput(
            f"annotator: the scores of one prompt are a finite matrix of responses x criteria, "
            f"not {scores_KC.tolist()}"
        )
    return scores_KC


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise BadInput(
            f"annotator: its temperature is {temperature}: give a positive one, however small"
        )
    return temperature


def _pairs(scores_KC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair i < j, and its s_i - s_j."""
    score_K = _checked(scores_KC)[:, 0]
    first, second = np.triu_indices(len(score_K), k=1)
    return first, second, score_K[first] - score_K[second]


def _labels(
    first: np.ndarray, second: np.ndarray, p: np.ndarray, rng: np.random.Generator
) -> list[Label]:
    """Draws one label a pair; p is the probability that `first` is preferred."""
    kept = rng.random(len(p)) < p
    columns = np.where(kept, first, second), np.where(kept, second, first), np.where(kept, p, 1 - p)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [Label((winner, loser), likely) for winner, loser, likely in rows]


def _turned(label: Label) -> Label:
    """The opposite label. Errors: BadInput where a label has none or several."""
    if label.label is not None:
        return label._replace(label=not label.label, p=1 - label.p)
    if len(label.order) == 2 and label.soft_label is None:
        return label._replace(order=label.order[::-1], p=1 - label.p)
    kind = "ranking" if len(label.order) > 2 else "pair that may be a tie"
    raise BadInput(f"flips: a {kind} has no opposite: turn pairs, and let ties come after flips")


def _decided(label: Label, widened: float, luck: float) -> Label:
    """The pair as it is, or as a tie; luck is uniform and widened exp(threshold)."""
    p = label.p / (label.p + (1 - label.p) * widened)
    if luck < p / label.p:
        return label._replace(p=p, soft_label=1.0)
    other = (1 - label.p) / (1 - label.p + label.p * widened)
    return label._replace(p=1 - p - other, soft_label=0.5)
