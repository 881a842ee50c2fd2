"""Annotators: formulas in float64, frequencies inside binomial bounds, limits and invariances."""

import functools
import itertools
import math

import numpy as np
import pytest

from dpo_jax.structs import BadInput
from dpo_jax.worlds import annotators
from dpo_jax.worlds.annotators import (
    Label,
    agreement,
    best,
    best_and_worst,
    bradley_terry,
    flips,
    length_bias,
    noiseless,
    plackett_luce,
    ranked,
    thumbs,
    ties,
)

SCORES = np.array([0.3, -1.2, 2.0, 0.3])
LENGTHS = np.array([10.0, 12, 9, 14])
BOTH = np.stack([SCORES, LENGTHS], axis=1)  # the first criterion is what annotators value
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
BOUND = 4.5  # standard errors; one test in 150 000 fails by chance


def p_by_hand(gap, temperature=1.0):
    return 1 / (1 + math.exp(-gap / temperature))


def wins(annotator, draws=5000):
    """How often i won over j, for each of PAIRS, and the labels of the last draw."""
    rng = np.random.default_rng(0)
    count, labels = dict.fromkeys(PAIRS, 0), []
    for _ in range(draws):
        labels = annotator(BOTH, rng)
        for label in labels:
            count[min(label.order), max(label.order)] += label.order[0] < label.order[1]
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
    assert [tuple(sorted(label.order)) for label in labels] == PAIRS
    assert all(label.soft_label is None and label.label is None for label in labels)
    for (i, j), label in zip(PAIRS, labels, strict=True):
        p = law(SCORES[i] - SCORES[j])
        assert label.p == pytest.approx(p if label.order[0] == i else 1 - p, abs=1e-12)
        assert abs(count[i, j] - draws * p) <= BOUND * math.sqrt(draws * p * (1 - p))


def test_huge_and_equal_gaps():
    scores = np.array([[1e4], [-1e4], [-1e4]])
    first, second, tie = bradley_terry(scores, np.random.default_rng(0), temperature=1e-3)
    assert (first, second) == (Label((0, 1), 1.0), Label((0, 2), 1.0))
    assert tie.p == 0.5
    ranking = plackett_luce(scores, np.random.default_rng(0), temperature=1e-3)
    assert [label.p for label in ranking] == [0.5] and ranking[0].order[0] == 0
    for annotator in (bradley_terry, plackett_luce):
        assert annotator(np.array([[1.0]]), np.random.default_rng(0)) == []


def test_bradley_terry_tends_to_noiseless():
    for seed in range(20):  # the tie of SCORES falls as the shared luck wants
        cold = bradley_terry(BOTH, np.random.default_rng(seed), temperature=1e-6)
        assert cold == noiseless(BOTH, np.random.default_rng(seed))


def test_ranked_is_plackett_luce_without_noise_and_equal_scores_are_a_coin_toss():
    """Of SCORES the first and the last are equal, so there are two rankings."""
    found = [ranked(BOTH, np.random.default_rng(seed)) for seed in range(200)]
    assert {label.order for (label,) in found} == {(2, 0, 3, 1), (2, 3, 0, 1)}
    assert all(label.p == 0.5 for (label,) in found)
    cold = plackett_luce(BOTH, np.random.default_rng(0), temperature=1e-6)
    assert cold[0].p == pytest.approx(0.5) and cold[0] in [label for (label,) in found]
    ahead = sum(label.order[1] == 0 for (label,) in found)
    assert abs(ahead - 100) <= BOUND * math.sqrt(200 / 4)
    assert ranked(np.full((3, 1), 0.3), np.random.default_rng(0)) == []


def test_the_best_alone_and_before_the_worst():
    rng = np.random.default_rng(0)
    assert best_and_worst(BOTH, rng) == [Label((2, 1), 1.0)]
    assert best(BOTH, rng) == [Label((2,), 1.0)]
    assert best_and_worst(np.full((3, 1), 0.3), rng) == []
    assert best(np.full((3, 1), 0.3), rng) == [Label((0,), 1.0)]


def test_scores_matter_by_their_differences_and_the_temperature_scales_them():
    for seed in range(20):
        for annotator in (bradley_terry, plackett_luce):
            labels = annotator(BOTH, np.random.default_rng(seed), temperature=2.0)
            moved = annotator(4 * BOTH + 8, np.random.default_rng(seed), temperature=8.0)
            assert [label.order for label in moved] == [label.order for label in labels]
            assert [label.p for label in moved] == pytest.approx([label.p for label in labels])


def test_flips_never_or_always():
    for seed in range(20):
        for annotator in (bradley_terry, thumbs):
            labels = annotator(BOTH, np.random.default_rng(seed))
            turn = functools.partial(flips, BOTH, annotator=annotator)
            assert turn(np.random.default_rng(seed), rate=0) == labels
            turned = turn(np.random.default_rng(seed), rate=1)
            assert [label.p for label in turned] == pytest.approx([label.p for label in labels])
            if annotator is thumbs:
                assert [label.label for label in turned] == [not label.label for label in labels]
                assert [label.order for label in turned] == [label.order for label in labels]
            else:
                assert [label.order for label in turned] == [label.order[::-1] for label in labels]


def test_length_bias_prefers_the_longer():
    for seed in range(20):
        biased = length_bias(BOTH, np.random.default_rng(seed), bonus=0.5)
        longer = (SCORES + 0.5 * LENGTHS)[:, None]
        assert biased == bradley_terry(longer, np.random.default_rng(seed))
        # Of two with equal scores, the one four words longer: sigmoid(0.5 * 4).
        tie = next(label for label in biased if {*label.order} == {0, 3})
        assert tie.p == pytest.approx(p_by_hand(2 if tie.order[0] == 3 else -2), abs=1e-12)
    swapped, rng = BOTH[:, [0, 0, 1]], np.random.default_rng(0)
    longest_first = length_bias(swapped, rng, bonus=100, criterion=2, annotator=noiseless)
    assert len(longest_first) == 6 and (swapped == BOTH[:, [0, 0, 1]]).all()
    assert all(LENGTHS[label.order[0]] > LENGTHS[label.order[1]] for label in longest_first)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rankings_follow_plackett_and_luce(temperature):
    """All 24 rankings against the product of softmaxes over those left, and marginal pairs."""
    draws, rng = 8000, np.random.default_rng(2)
    found: dict[tuple[int, ...], list[float]] = {}
    for _ in range(draws):
        (label,) = plackett_luce(BOTH, rng, temperature=temperature)
        found.setdefault(label.order, []).append(label.p)
    strength = np.exp(SCORES / temperature)
    total = 0.0
    for order in itertools.permutations(range(4)):
        p = math.prod(strength[k] / strength[[*order[i:]]].sum() for i, k in enumerate(order))
        total += p
        assert found.get(order, [p]) == pytest.approx([p] * len(found.get(order, [p])), rel=1e-12)
        deviation = math.sqrt(draws * p * (1 - p))
        assert abs(len(found.get(order, [])) - draws * p) <= BOUND * deviation, order
    assert total == pytest.approx(1.0)


def test_ties_follow_rao_and_kupper():
    """P(i before j) = pi_i / (pi_i + theta pi_j) with pi = exp(s), whatever the draw came from."""
    draws, rng, theta = 8000, np.random.default_rng(3), math.exp(0.7)
    scores = np.array([[0.8], [0.0]])
    p, q = (math.exp(a) / (math.exp(a) + theta * math.exp(b)) for a, b in ((0.8, 0), (0, 0.8)))
    count = dict.fromkeys(["first", "second", "tie"], 0)
    wanted = {"first": p, "second": q, "tie": 1 - p - q}
    for _ in range(draws):
        (label,) = ties(scores, rng, threshold=0.7)
        assert label.soft_label in (0.5, 1.0) and label.label is None
        name = "tie" if label.soft_label == 0.5 else ("first", "second")[label.order[0]]
        count[name] += 1
        assert label.p == pytest.approx(wanted[name], abs=1e-12)
    for name, p in wanted.items():
        assert abs(count[name] - draws * p) <= BOUND * math.sqrt(draws * p * (1 - p)), name


def test_ties_never_and_always():
    for seed in range(20):
        plain = bradley_terry(BOTH, np.random.default_rng(seed))
        never = ties(BOTH, np.random.default_rng(seed), threshold=0)
        assert [label.order for label in never] == [label.order for label in plain]
        assert [label.p for label in never] == pytest.approx([label.p for label in plain])
        assert {label.soft_label for label in never} == {1.0}
        always = ties(BOTH, np.random.default_rng(seed), threshold=700)
        assert {label.soft_label for label in always} == {0.5}
        assert [label.p for label in always] == pytest.approx([1.0] * 6)
    sure = ties(1e6 * BOTH[:3], np.random.default_rng(0), threshold=1, annotator=noiseless)
    assert [(label.p, label.soft_label) for label in sure] == [(1.0, 1.0)] * 3


def test_thumbs_judge_every_response_alone():
    draws, rng = 5000, np.random.default_rng(4)
    good_K = np.zeros(4)
    for _ in range(draws):
        labels = thumbs(BOTH, rng, threshold=0.5, temperature=2.0)
        assert [label.order for label in labels] == [(0,), (1,), (2,), (3,)]
        good_K += [bool(label.label) for label in labels]
        for score, label in zip(SCORES, labels, strict=True):
            p = p_by_hand(score - 0.5, 2.0)
            assert label.p == pytest.approx(p if label.label else 1 - p, abs=1e-12)
            assert type(label.label) is bool and label.soft_label is None
    for score, good in zip(SCORES, good_K, strict=True):
        p = p_by_hand(score - 0.5, 2.0)
        assert abs(good - draws * p) <= BOUND * math.sqrt(draws * p * (1 - p))


def test_turned_thumbs_keep_their_probability():
    draws, rng, good = 5000, np.random.default_rng(5), 0
    p = 0.8 * p_by_hand(2.0) + 0.2 * p_by_hand(-2.0)
    for _ in range(draws):
        labels = flips(BOTH, rng, rate=0.2, annotator=thumbs)
        good += bool(labels[2].label)
        assert labels[2].p == pytest.approx(p if labels[2].label else 1 - p, abs=1e-12)
    assert abs(good - draws * p) <= BOUND * math.sqrt(draws * p * (1 - p))


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
        scores[list(label.order)]
        for scores in scores_BK
        for label in bradley_terry(scores[:, None], rng, temperature=0.5)
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
                for label in bradley_terry(scores[:, None], rng, temperature=0.5)
            ]
        ),
        abs=1e-12,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functools.partial(bradley_terry, BOTH, temperature=0.0), "temperature is 0.0"),
        (functools.partial(bradley_terry, BOTH, temperature=math.nan), "temperature is nan"),
        (functools.partial(plackett_luce, BOTH, temperature=-1.0), "temperature is -1.0"),
        (functools.partial(thumbs, BOTH, temperature=0), "temperature is 0"),
        (functools.partial(bradley_terry, np.array([[0.0], [math.nan]])), "finite matrix"),
        (functools.partial(noiseless, np.zeros(2)), "finite matrix"),
        (functools.partial(thumbs, np.zeros((2, 0))), "finite matrix"),
        (functools.partial(flips, BOTH, rate=1.5), "rate is a probability, not 1.5"),
        (functools.partial(flips, BOTH, rate=0.0, annotator=plackett_luce), "a ranking has no"),
        (
            functools.partial(
                flips, BOTH, rate=0.0, annotator=functools.partial(ties, threshold=1)
            ),
            "may be a tie has no opposite",
        ),
        (functools.partial(ties, BOTH, threshold=-0.1), "threshold is -0.1"),
        (functools.partial(ties, BOTH, threshold=math.inf), "threshold is inf"),
        (functools.partial(ties, BOTH, threshold=1, annotator=plackett_luce), "no plain pairs"),
        (functools.partial(ties, BOTH, threshold=1, annotator=thumbs), "no plain pairs"),
        (functools.partial(length_bias, BOTH[:, :1], bonus=1), "no criterion 1 among 1"),
        (functools.partial(length_bias, BOTH, bonus=1, criterion=-1), "no criterion -1"),
    ],
)
def test_unusable_input(call, message):
    with pytest.raises(BadInput, match=message):
        call(rng=np.random.default_rng(0))


def test_agreement_needs_pairs():
    with pytest.raises(BadInput, match="no pairs"):
        agreement(np.zeros((3, 1)))
    assert annotators.preference(np.array([0.0]))[0] == 0.5
