"""Shares, intervals and rank correlations against formulas and loops."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dpo_jax.agreement import (
    Judged,
    calibration_error,
    gaps,
    interval,
    reliability,
    row,
    rows,
    show,
)


def pair(chosen: float, rejected: float, subset: str | None = None) -> Judged:
    return Judged(np.array([chosen, rejected]), np.array([2.0, 1.0]), subset=subset)


def ranking(*scores: float, levels: list[float] | None = None) -> Judged:
    falling = np.arange(len(scores), 0, -1.0) if levels is None else np.array(levels)
    return Judged(np.array(scores), falling)


def alone(score: float, label: float | None) -> Judged:
    return Judged(np.array([score]), np.array([1.0]), label)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (60, 100), (1, 1)])
def test_the_interval_is_wilsons(right, n):
    """(p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, z = right / n, 1.959963984540054
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = interval(right, n)
    assert found["accuracy"] == p
    assert found["low"] == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-12)
    assert found["high"] == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-12)


def test_a_tie_counts_nothing_and_stands_beside():
    found = row([pair(3, 1), pair(0, 2), pair(1, 1), pair(5, 4)], "x")
    assert (found["n"], found["accuracy"], found["ties"]) == (4, 0.5, 0.25)
    assert (found["chosen"], found["rejected"]) == (9 / 4, 2)
    assert found["margin"] == pytest.approx(0.25)
    assert "tau" not in found


def test_what_the_data_calls_a_tie_is_not_counted():
    tie = ranking(1, 0, levels=[0, 0])
    assert row([tie], "x") == {"subset": "x", "n": 0}
    assert row([tie, pair(0, 1)], "x")["n"] == 1


def test_rankings():
    """Accuracy is first above last, as in training; tau is Kendall's where nothing is tied."""
    rng = np.random.default_rng(0)
    several = [ranking(*rng.normal(size=size)) for size in (3, 4, 5, 5)]
    found = row(several, "x")
    scores = [each.scores for each in several]
    assert found["accuracy"] == np.mean([x[0] > x[-1] for x in scores])
    assert found["best"] == np.mean([x.argmax() == 0 for x in scores])
    found_by_scipy: list[Any] = [stats.kendalltau(each.scores, each.levels) for each in several]
    expected = [each.statistic for each in found_by_scipy]
    assert found["tau"] == pytest.approx(np.mean(expected))
    assert found["pairs"] == pytest.approx((1 + np.mean(expected)) / 2)


def test_pairs_of_equal_levels_are_not_compared():
    found = row([ranking(1, 2, 0, 0, levels=[2, 2, 1, 0])], "x")
    # of the five pairs four are in order and one is tied
    assert (found["best"], found["pairs"], found["tau"]) == (1, 4 / 5, 4 / 5)
    assert row([ranking(0, 2, 1, -1, levels=[2, 2, 1, 0])], "x")["best"] == 1  # one of the two is
    worse = row([ranking(1, 2, 3, 0, levels=[2, 2, 1, 0])], "x")
    assert (worse["best"], worse["pairs"], worse["tau"]) == (0, 3 / 5, pytest.approx(1 / 5))


def test_lone_responses_are_compared_with_all_of_the_other_label():
    rng = np.random.default_rng(1)
    good, bad = rng.integers(0, 6, 9).astype(float), rng.integers(0, 5, 7).astype(float)
    several = [alone(x, 1.0) for x in good] + [alone(x, 0.0) for x in bad]
    found = row(several, "x")
    pairs = [*product(good, bad)]
    assert found["accuracy"] == pytest.approx(np.mean([a > b for a, b in pairs]))
    assert found["ties"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    assert found["margin"] == pytest.approx(good.mean() - bad.mean())
    assert found["n"] == 16 and "low" not in found
    assert row([alone(1, None), alone(3, None)], "x") == {"subset": "x", "n": 2, "chosen": 2}


def test_subsets_then_all_then_their_mean(capsys):
    several = [pair(1, 0, "a"), pair(1, 0, "b"), pair(1, 0, "a"), pair(0, 1, "b"), pair(1, 0, "a")]
    found = rows(several)
    assert [each["subset"] for each in found] == ["a", "b", "all", "mean"]
    assert [each["accuracy"] for each in found] == [1, 0.5, 0.8, 0.75]
    assert [each["n"] for each in found] == [3, 2, 5, 2]
    assert "low" in found[2] and "low" not in found[3]
    show(found, "who")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    line = ["b", "2", "0.500", "0.095..0.905", "0.000", "0.500", "0.500", "0.000"]
    assert [*line, f"{1 / (1 + np.exp(-1)) - 0.5:.3f}"] in lines
    assert [each["subset"] for each in rows([pair(1, 0), pair(2, 1)])] == ["all"]


def test_gaps_are_those_of_all_pairs_that_are_ordered():
    several = [pair(3, 1), ranking(1, 2, 0, 0, levels=[2, 2, 1, 0]), pair(0, 2), alone(1, 1.0)]
    assert gaps(several).tolist() == [2, 1, 1, 2, 2, 0, -2]


def test_the_calibration_error_by_hand():
    """Confidences .61, .62, .62 and .93: two bins, |1/3 - .6167| of three and |1 - .93| of one; a
    tie takes no side."""
    confidence = np.array([0.61, 0.62, 0.62, 0.93])
    gap = np.log(confidence / (1 - confidence)) * np.array([1, -1, -1, 1])
    expected = (3 * abs(1 / 3 - confidence[:3].mean()) + abs(1 - 0.93)) / 4
    assert calibration_error(np.append(gap, 0.0)) == pytest.approx(expected, abs=1e-12)
    low, high = reliability(np.append(gap, 0.0))
    assert (low.floor, low.ceiling, low.n) == (pytest.approx(0.6), pytest.approx(0.65), 3)
    assert high.accuracy == 1


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_error_is_that_of_the_scale(scale):
    """Outcomes of probability sigmoid(g), scored as if it were sigmoid(scale g): the error is the
    mean of |sigmoid(g) - sigmoid(scale g)|, to a standard error of 0.5 / sqrt(200,000 / 10) a bin;
    inside a bin all miss in one direction."""
    rng = np.random.default_rng(0)
    true = np.abs(rng.normal(size=200_000))
    right = rng.random(true.size) < 1 / (1 + np.exp(-true))
    stated = scale * np.where(right, true, -true)
    sure = 1 / (1 + np.exp(-scale * true))
    expected = np.abs(1 / (1 + np.exp(-true)) - sure).mean()
    assert calibration_error(stated) == pytest.approx(expected, abs=0.005)
    for each in reliability(stated):
        inside = (sure > each.floor) & (sure <= each.ceiling)
        assert each.n == inside.sum() and each.low < each.accuracy <= each.high
        assert each.confidence == pytest.approx(sure[inside].mean(), abs=1e-9)


def test_the_table_has_the_error_of_pairs_and_rankings():
    several = [pair(3, 1, "a"), pair(0, 2, "a"), ranking(1, 2, 0)]
    assert row(several, "x")["ece"] == calibration_error(gaps(several))
    assert "ece" not in row([alone(1, 1.0), alone(0, 0.0)], "x")
    assert "ece" not in row([pair(1, 1)], "x")
