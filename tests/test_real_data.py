"""The intervals that scripts/real_data.py gives."""

import numpy as np
import pytest
from scipy import stats

from scripts.real_data import Judged, accuracy, margin, tau, unpaired_margin


def judged(rewards, *, prompts=None, labels=None) -> list[Judged]:
    count = len(rewards)
    prompts, labels = prompts or [f"p{i}" for i in range(count)], labels or [None] * count
    rows = zip(prompts, labels, rewards, strict=True)
    return [Judged(prompt, label, np.asarray(x, float)) for prompt, label, x in rows]


def test_an_accuracy_has_its_exact_binomial_interval():
    """Clopper and Pearson: each end is where so many or more, or so few or less, have 0.5%."""
    found = accuracy(judged([(1, 0)] * 70 + [(0, 0)] * 10 + [(0, 1)] * 20))
    assert (found.value, found.n) == (0.7, 100)
    assert stats.binom.sf(69, 100, found.low) == pytest.approx(0.005)
    assert stats.binom.cdf(70, 100, found.high) == pytest.approx(0.005)


def test_a_margin_of_independent_pairs_has_the_interval_of_a_mean():
    rng = np.random.default_rng(0)
    gaps = rng.normal(1.0, 2.0, 400)
    found = margin(judged(np.stack([gaps, 0 * gaps], 1)))
    half = 2.576 * gaps.std() / 20
    assert found.value == pytest.approx(gaps.mean())
    assert found.low == pytest.approx(gaps.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gaps.mean() + half, abs=0.1 * half)


def test_what_is_said_to_one_prompt_counts_once():
    """Every pair four times over: four times the pairs, the same interval."""
    rng = np.random.default_rng(1)
    once = judged(rng.normal(0.5, 1.0, (100, 2)))
    assert margin(once * 4)[:3] == pytest.approx(margin(once)[:3])


def test_an_unpaired_margin_is_the_gap_of_two_means():
    rewards = [[1.0], [2.0], [6.0], [-1.0], [0.0]]
    found = unpaired_margin(judged(rewards * 8, labels=[1.0, 1.0, 1.0, 0.0, 0.0] * 8))
    assert found.value == pytest.approx(3.0 - -0.5) and found.low < 3.5 < found.high


def test_tau_is_1_in_the_human_order_and_minus_1_against_it():
    right, wrong = (3.0, 1.0, 0.5), (0.5, 1.0, 3.0)
    assert tau(judged([right] * 6)).value == pytest.approx(1.0)
    assert tau(judged([wrong] * 6)).value == pytest.approx(-1.0)
    # of (1, 2), (1, 3), (2, 3) one is against the order: (2 - 1) / 3
    assert tau(judged([(3.0, 0.5, 1.0)] * 6)).value == pytest.approx(1 / 3)
