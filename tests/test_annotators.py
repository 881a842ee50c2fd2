"""Annotators: formulas in float64, frequencies inside binomial bounds, limits and invariances."""

import functools
import math

import numpy as np
import pytest

from dpo_jax.structs import BadInput
from dpo_jax.worlds import annotators
from dpo_jax.worlds.annotators import agreement, bradley_terry, flips, length_bias, noiseless

SCORES = np.array([0.3, -1.2, 2.0, 0.3])
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
BOUND = 4.5  # standard errors; one test in 150 000 fails by chance


def p_by_hand(gap, temperature=1.0):
    return 1 / (1 + math.exp(-gap / temperature))


def wins(annotator, draws=5000):
    """How often i won over j, for each of PAIRS, and the labels of the last draw."""
    rng = np.random.default_rng(0)
    count, labels = dict.fromkeys(PAIRS, 0), []
    for _ in range(draws):
        labels = annotator(SCORES, rng)
        for label in labels:
            count[min(label[:2]), max(label[:2])] += label.winner < label.loser
    return count, labels


@pytest.mark.parametrize(
    ("annotator", "law"),
    [
        (bradley_terry, p_by_hand),
        (
            functools.partial(bradley_terry, temperature=0.5),
            functools.partial(p_by_hand, temperature=0.5),
        ),
        (noiseless, lambda gap: 0.5 + 0.5 * np.sign(gap)),
        (
            functools.partial(flips, rate=0.1),
            lambda gap: 0.9 * p_by_hand(gap) + 0.1 * p_by_hand(-gap),
        ),
        (
            functools.partial(flips, rate=0.25, annotator=noiseless),
            lambda gap: 0.5 + 0.25 * np.sign(gap),
        ),
    ],
)
def test_winners_come_with_their_probability(annotator, law):
    draws = 5000
    count, labels = wins(annotator, draws)
    assert [(min(label[:2]), max(label[:2])) for label in labels] == PAIRS
    for (i, j), label in zip(PAIRS, labels, strict=True):
        p = law(SCORES[i] - SCORES[j])
        assert label.p == pytest.approx(p if label.winner == i else 1 - p, abs=1e-12)
        assert abs(count[i, j] - draws * p) <= BOUND * math.sqrt(draws * p * (1 - p))


def test_huge_and_equal_gaps():
    scores = np.array([1e4, -1e4, -1e4])
    first, second, tie = bradley_terry(scores, np.random.default_rng(0), temperature=1e-3)
    assert (first, second) == ((0, 1, 1.0), (0, 2, 1.0))
    assert tie.p == 0.5
    assert bradley_terry(np.array([1.0]), np.random.default_rng(0)) == []


def test_bradley_terry_tends_to_noiseless():
    for seed in range(20):  # the tie of SCORES falls as the shared luck wants
        cold = bradley_terry(SCORES, np.random.default_rng(seed), temperature=1e-6)
        assert cold == noiseless(SCORES, np.random.default_rng(seed))


def test_scores_matter_by_their_differences_and_the_temperature_scales_them():
    for seed in range(20):
        labels = bradley_terry(SCORES, np.random.default_rng(seed), temperature=2.0)
        moved = bradley_terry(4 * SCORES + 8, np.random.default_rng(seed), temperature=8.0)
        assert [label[:2] for label in moved] == [label[:2] for label in labels]
        assert [label.p for label in moved] == pytest.approx([label.p for label in labels])


def test_flips_never_or_always():
    for seed in range(20):
        labels = bradley_terry(SCORES, np.random.default_rng(seed))
        assert flips(SCORES, np.random.default_rng(seed), rate=0) == labels
        turned = flips(SCORES, np.random.default_rng(seed), rate=1)
        assert [label[:2] for label in turned] == [label[1::-1] for label in labels]
        assert [label.p for label in turned] == pytest.approx([label.p for label in labels])


def test_length_bias_prefers_the_longer():
    lengths = np.array([10, 12, 9, 14])
    for seed in range(20):
        draw = functools.partial(length_bias, SCORES, np.random.default_rng(seed))
        biased = draw(lengths_K=lengths, bonus=0.5)
        assert biased == bradley_terry(SCORES + 0.5 * lengths, np.random.default_rng(seed))
        # Of two with equal scores, the one four words longer: sigmoid(0.5 * 4).
        tie = next(label for label in biased if {*label[:2]} == {0, 3})
        assert tie.p == pytest.approx(p_by_hand(2 if tie.winner == 3 else -2), abs=1e-12)
    longest_first = length_bias(
        SCORES, np.random.default_rng(0), lengths_K=lengths, bonus=100, annotator=noiseless
    )
    assert all(lengths[label.winner] > lengths[label.loser] for label in longest_first)


def test_agreement_by_hand():
    pair = np.array([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
    expected = (p_by_hand(1, 0.5) + p_by_hand(3, 0.5) + 0.5) / 3
    assert agreement(pair, temperature=0.5) == pytest.approx(expected, abs=1e-12)
    four = np.stack([SCORES, SCORES[::-1]])
    by_pairs = np.array([[SCORES[i], SCORES[j]] for i, j in PAIRS])
    assert agreement(four) == pytest.approx(agreement(by_pairs), abs=1e-12)
    assert agreement(1e6 * pair[:2]) == 1.0


def test_agreement_is_the_accuracy_of_one_who_knows_the_scores():
    rng = np.random.default_rng(1)
    scores_BK = rng.normal(size=(3000, 4))
    labels = [
        (scores[label.winner], scores[label.loser])
        for scores in scores_BK
        for label in bradley_terry(scores, rng, temperature=0.5)
    ]
    ceiling = agreement(scores_BK, temperature=0.5)
    correct = np.mean([winner > loser for winner, loser in labels])
    # Given the scores, labels are independent coins with variances p (1 - p) <= 1/4.
    assert abs(correct - ceiling) < BOUND * 0.5 / math.sqrt(len(labels))
    assert ceiling == pytest.approx(
        np.mean(
            [
                max(label.p, 1 - label.p)
                for scores in scores_BK
                for label in bradley_terry(scores, rng, temperature=0.5)
            ]
        ),
        abs=1e-12,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functools.partial(bradley_terry, SCORES, temperature=0.0), "temperature is 0.0"),
        (functools.partial(bradley_terry, SCORES, temperature=math.nan), "temperature is nan"),
        (functools.partial(bradley_terry, np.array([0.0, math.nan])), "finite vector"),
        (functools.partial(noiseless, np.zeros((2, 2))), "finite vector"),
        (functools.partial(flips, SCORES, rate=1.5), "rate is a probability, not 1.5"),
        (
            functools.partial(length_bias, SCORES, lengths_K=np.ones(2), bonus=1),
            "one length for each",
        ),
    ],
)
def test_unusable_input(call, message):
    with pytest.raises(BadInput, match=message):
        call(rng=np.random.default_rng(0))


def test_agreement_needs_pairs():
    with pytest.raises(BadInput, match="no pairs"):
        agreement(np.zeros((3, 1)))
    assert annotators.preference(np.array([0.0]))[0] == 0.5
