"""How well scores agree with the order of the data: accuracy with its interval, ties, margins, and
whether sigmoid(margin) is how often they do.

Chosen is the first response of a record and rejected its last one, as in the metrics of training.
Responses that stand alone are chosen where their label is 1 and rejected where it is 0.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95
BINS = 10  # of confidence, equal in width, from 1/2 to 1
COLUMNS = ("accuracy", "ties", "chosen", "rejected", "margin", "best", "pairs", "tau", "ece")
WIDTH = 120  # of a table that goes into a file
Row = dict[str, Any]  # a line of the table


@dataclass(frozen=True, eq=False)
class Judged:
    """One record: the scores of its responses, best to worst, and what the data says of them.

    levels: falls from a better response to a worse one, equal where neither is better.
    label: of a response that stands alone.
    """

    scores: np.ndarray
    levels: np.ndarray
    label: float | None = None
    subset: str | None = None

    @property
    def decided(self) -> bool:
        """Whether the first response is better than the last."""
        return bool(self.levels[0] > self.levels[-1])


def rows(judged: Sequence[Judged]) -> list[Row]:
    """A row for every subset, in order of appearance, then "all" over all records and, of several
    subsets, "mean" over their rows."""
    names = list(dict.fromkeys(each.subset for each in judged))
    found = []
    if len(names) > 1:
        parts = ([each for each in judged if each.subset == name] for name in names)
        found = [row(part, name or "none") for name, part in zip(names, parts, strict=True)]
    return [*found, row(judged, "all"), *([mean(found)] if found else [])]


def row(judged: Sequence[Judged], name: str) -> Row:
    """What one line of the table says.

    n: records that count; accuracy: share of them whose chosen response is above the rejected one,
    a tie counting 0, with low and high, its Wilson interval of 95%; ties: share of them where both
    are equal; chosen, rejected, margin: mean scores. Of rankings also best: share whose best
    response is above all others; pairs: share of a ranking's pairs that are in order, a tie
    counting 0; tau: Kendall's, those in order less those that are not, over all pairs. ece: the
    expected calibration error of `reliability`, over all pairs of a record that its data orders.
    Responses that stand alone are compared over all pairs of one with label 1 and one with label
    0, which has no such interval.
    """
    ordered = [each for each in judged if each.decided]
    alone = [each for each in judged if len(each.scores) == 1]
    if alone and not ordered:
        return {"subset": name} | _unpaired(alone)
    found: Row = {"subset": name, "n": len(ordered)}
    if not ordered:
        return found
    first_B = np.array([each.scores[0] for each in ordered], np.float64)
    last_B = np.array([each.scores[-1] for each in ordered], np.float64)
    found |= interval(int((first_B > last_B).sum()), len(ordered))
    found["ties"] = float((first_B == last_B).mean())
    found |= _sides(first_B, last_B)
    if any(len(each.scores) > 2 for each in ordered):
        found |= _ranked(ordered)
    gap_B = gaps(ordered)
    return found | ({"ece": calibration_error(gap_B)} if gap_B.any() else {})


class Bin(NamedTuple):
    """Pairs whose confidence lies in (floor, ceiling]: how many, the mean of their confidence, and
    the share in order with its Wilson interval."""

    floor: float
    ceiling: float
    n: int
    confidence: float
    accuracy: float
    low: float
    high: float


def gaps(judged: Sequence[Judged]) -> np.ndarray:
    """Score of the better less that of the worse for all pairs that the data orders, float64.

    Bradley-Terry and Plackett-Luce both say that such a pair is in order with probability
    sigmoid(gap).
    """
    found = [
        each.scores[i] - each.scores[j]
        for each in judged
        for i, j in combinations(range(len(each.scores)), 2)
        if each.levels[i] > each.levels[j]
    ]
    return np.array(found, np.float64)


def reliability(gap_B: np.ndarray) -> list[Bin]:
    """The bins that are not empty. The confidence of a pair is sigmoid(|gap|); it is in order
    where its gap is positive. Equal scores take no side and are left out; a pair of a ranking
    counts as if it stood alone.
    """
    gap_B = gap_B[gap_B != 0]
    confidence_B = 1 / (1 + np.exp(-np.abs(gap_B)))
    edges = np.linspace(0.5, 1, BINS + 1)
    bin_B = np.clip(np.searchsorted(edges, confidence_B, side="left") - 1, 0, BINS - 1)
    found = []
    for i in np.unique(bin_B).tolist():
        here_B = bin_B == i
        share = interval(int((gap_B[here_B] > 0).sum()), int(here_B.sum()))
        mean = float(confidence_B[here_B].mean())
        floor, ceiling = edges[i : i + 2].tolist()
        found.append(Bin(floor, ceiling, int(here_B.sum()), mean, **share))
    return found


def calibration_error(gap_B: np.ndarray) -> float:
    """Guo et al. 1706.04599 eq. 3: sum_bins n_b / n |accuracy_b - confidence_b|."""
    found = reliability(gap_B)
    misses = [each.n * abs(each.accuracy - each.confidence) for each in found]
    return sum(misses) / sum(each.n for each in found)


def mean(found: Sequence[Row]) -> Row:
    """The mean of the subsets' rows, each counting the same."""
    names = [name for name in found[0] if name not in ("subset", "n", "low", "high")]
    common = [name for name in names if all(name in each for each in found)]
    means = {name: float(np.mean([each[name] for each in found])) for name in common}
    return {"subset": "mean", "n": len(found)} | means


def interval(right: int, n: int) -> Row:
    """accuracy, low, high: a share and its Wilson interval."""
    from scipy.stats import binomtest

    found = binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
    return {"accuracy": right / n, "low": float(found.low), "high": float(found.high)}


def _sides(chosen: np.ndarray, rejected: np.ndarray) -> Row:
    means = float(chosen.mean()), float(rejected.mean())
    return {"chosen": means[0], "rejected": means[1], "margin": means[0] - means[1]}


def _ranked(ordered: Sequence[Judged]) -> Row:
    best, in_order, less = [], [], []
    for each in ordered:
        top = each.levels == each.levels[0]
        best.append(each.scores[top].max() > each.scores[~top].max())
        signs = [
            np.sign(each.scores[i] - each.scores[j])
            for i, j in combinations(range(len(each.scores)), 2)
            if each.levels[i] > each.levels[j]
        ]
        in_order.append(np.mean(np.array(signs) > 0))
        less.append(np.mean(signs))
    means = {"best": best, "pairs": in_order, "tau": less}
    return {name: float(np.mean(each)) for name, each in means.items()}


def _unpaired(alone: Sequence[Judged]) -> Row:
    """The share of pairs in order is the area under the ROC curve, less half of the ties."""
    chosen, rejected = (
        np.array([each.scores[0] for each in alone if each.label == label], np.float64)
        for label in (1.0, 0.0)
    )
    found: Row = {"n": len(alone)}
    if not len(chosen) or not len(rejected):
        return found | {"chosen": float(np.mean([each.scores[0] for each in alone]))}
    ordered = np.sort(rejected)
    below = np.searchsorted(ordered, chosen, side="left")
    tied = np.searchsorted(ordered, chosen, side="right") - below
    found["accuracy"] = float(below.mean() / len(rejected))
    found["ties"] = float(tied.mean() / len(rejected))
    return found | _sides(chosen, rejected)


def show(found: Sequence[Row], title: str) -> None:
    """The table on the terminal; a column that no row has is left out."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    names = [name for name in COLUMNS if any(name in each for each in found)]
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("subset", overflow="fold")
    for name in ("n", *names):
        table.add_column(name, justify="right")
        if name == "accuracy":
            table.add_column(f"{CONFIDENCE:.0%} interval", justify="right")
    for each in found:
        if each["subset"] == "all":
            table.add_section()
        cells = [each["subset"], str(each["n"])]
        for name in names:
            cells.append(f"{each[name]:.3f}" if name in each else "")
            if name == "accuracy":
                cells.append(f"{each['low']:.3f}..{each['high']:.3f}" if "low" in each else "")
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
