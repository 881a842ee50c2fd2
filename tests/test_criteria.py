"""Weighted criteria: orders, margins and soft labels by hand, and what moves with an order."""

import math
from functools import partial
from typing import Any, cast

import numpy as np
import pytest

from dpo_jax.data.criteria import margins, order, soft_labels, soft_ties, votes, without_ties
from dpo_jax.data.packing import pack
from dpo_jax.structs import BadInput, Group

SCORES = [[1.0, 4.0], [3.0, 0.0], [2.0, 4.0]]  # helpfulness, safety


def group(scores, *, criteria=("helpfulness", "safety"), **fields) -> Group:
    """Response k is k + 1 tokens 10 + k, of which the last counts."""
    answers = [np.full(k + 1, 10 + k, np.int32) for k in range(len(scores))]
    masks = [np.arange(len(answer)) == len(answer) - 1 for answer in answers]
    return Group(
        prompt=np.array([1], np.int32),
        responses=answers,
        scored=masks,
        scores=np.array(scores, np.float32),
        criteria=criteria,
        weight=0.5,
        record=3,
        **fields,
    )


def places(found: Group) -> list[int]:
    """The k of every response, once its mask has been seen to agree."""
    assert found.scored is not None and (found.weight, found.record) == (0.5, 3)
    ks = [int(answer[0]) - 10 for answer in found.responses]
    assert [len(answer) for answer in found.responses] == [k + 1 for k in ks]
    assert [np.flatnonzero(mask).tolist() for mask in found.scored] == [[k] for k in ks]
    return ks


@pytest.mark.parametrize(
    ("weights", "expected", "total"),
    [
        ({"helpfulness": 1.0}, [1, 2, 0], [3, 2, 1]),
        ({"safety": 1.0}, [0, 2, 1], [4, 4, 0]),  # equal sums keep their order
        ({"helpfulness": -1}, [0, 2, 1], [-1, -2, -3]),
        ({"helpfulness": 0.5, "safety": 0.25}, [2, 0, 1], [2, 1.5, 1.5]),
    ],
)
def test_order_is_by_the_weighted_sum(weights, expected, total):
    (found,) = order([group(SCORES)], **weights)
    assert places(found) == expected
    assert found.criteria == ("total", "helpfulness", "safety") and found.scores is not None
    np.testing.assert_allclose(found.scores[:, 0], total, rtol=1e-6)
    np.testing.assert_array_equal(found.scores[:, 1:], np.array(SCORES)[expected])
    assert pack([found], row_tokens=8).criteria == found.criteria


def test_sums_that_differ_by_rounding_alone_are_equal():
    """0.1 * 3 + 0.2 * 0 and 0.1 * 1 + 0.2 * 1 are 0.30000000000000004 and 0.3 or so."""
    (found,) = order([group([[1, 1], [3, 0]])], helpfulness=0.1, safety=0.2)
    assert places(found) == [0, 1] and found.scores is not None
    assert found.scores[0, 0] == found.scores[1, 0]


def test_an_order_again_replaces_the_total():
    once = order([group(SCORES)], helpfulness=1)
    (twice,) = order(once, total=-1.0)
    assert places(twice) == [0, 2, 1] and twice.criteria == ("total", "helpfulness", "safety")
    assert twice.scores is not None
    np.testing.assert_array_equal(twice.scores[:, 0], [-1, -2, -3])


def test_an_order_turns_the_labels_of_a_pair_round():
    two = group(SCORES[:2], soft_label=0.75, margin=2.0, label=1.0)
    kept, turned = (order([two], helpfulness=w)[0] for w in (-1.0, 1.0))
    assert (places(kept), kept.soft_label, kept.margin) == ([0, 1], 0.75, 2.0)
    assert (places(turned), turned.soft_label, turned.margin) == ([1, 0], 0.25, -2.0)
    assert kept.label == turned.label == 1.0


def test_margins_are_what_the_others_say_of_the_order_of_one():
    three = [[1.0, 4.0, 10.0], [3.0, 0.0, 30.0]]
    names = ("helpfulness", "safety", "style")
    weighed = partial(margins, [group(three, criteria=names)], safety=1.0, style=0.5)
    (found,) = weighed(by="helpfulness")
    assert places(found) == [1, 0]
    assert found.margin == pytest.approx((0 - 4) + 0.5 * (30 - 10))
    assert found.criteria == names and found.scores is not None
    np.testing.assert_array_equal(found.scores, [three[1], three[0]])
    (other,) = margins([group(three, criteria=names)], by="safety", helpfulness=2.0)
    assert places(other) == [0, 1] and other.margin == pytest.approx(2 * (1 - 3))
    with pytest.raises(BadInput, match="by=safety is the order"):
        weighed(by="safety")


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_soft_labels_are_sigmoids_of_the_gap(temperature: float):
    two = group(SCORES[:2])
    (found,) = soft_labels([two], temperature=temperature, helpfulness=1.0, safety=0.1)
    assert places(found) == [1, 0] and found.criteria[0] == "total"
    assert found.soft_label == pytest.approx(1 / (1 + math.exp(-(3.0 - 1.4) / temperature)))
    (even,) = soft_labels([two], helpfulness=2.0, safety=1.0)
    assert places(even) == [0, 1] and even.soft_label == 0.5
    (sure,) = soft_labels([two], helpfulness=1e9)
    assert sure.soft_label == 1.0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (partial(order, saefty=1.0), "no criterion saefty; the data has helpfulness, safety"),
        (partial(order), "data.arrange.NAME=WEIGHT for criteria among helpfulness, safety"),
        (partial(order, safety=math.nan), "safety=nan; a weight is a finite number"),
        (partial(order, **{"safety": cast(Any, "1")}), "safety='1'; a weight is"),
        (partial(margins, by="honesty", safety=1), "margins: there is no criterion honesty"),
        (partial(margins, by="safety", honesty=1), "margins: there is no criterion honesty"),
        (partial(margins, by="safety"), "margins: give data.arrange.NAME=WEIGHT"),
        (partial(soft_labels, honesty=1), "soft_labels: there is no criterion honesty"),
        (partial(soft_labels, safety=1, temperature=0), "temperature is 0: give a positive"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(call, said: str):
    with pytest.raises(BadInput) as caught:
        call([group(SCORES[:2])])
    assert said in str(caught.value)


def test_data_that_cannot_be_weighed_is_refused():
    for call in (partial(margins, by="safety", helpfulness=1), partial(soft_labels, safety=1)):
        with pytest.raises(BadInput, match="a group of 3 responses is no pair"):
            call([group(SCORES)])
    bare = Group(np.array([1]), [np.array([2]), np.array([3])])
    for plain in (bare, group(SCORES, criteria=())):
        with pytest.raises(BadInput, match="order: the data has no named criteria"):
            order([plain], safety=1)


JUDGES = ("ann", "bob", "cyd")


@pytest.mark.parametrize(
    ("scores", "expected", "share"),
    [
        ([[1, 1, 1], [0, 0, 0]], [0, 1], 1.0),
        ([[1, 0, 1], [0, 1, 0]], [0, 1], 2 / 3),
        ([[0, 0, 1], [1, 1, 0]], [1, 0], 2 / 3),
        ([[0.5, 0, 0], [0.5, 1, 1]], [1, 0], 5 / 6),
        ([[0.5, 1, 0], [0.5, 0, 1]], [0, 1], 0.5),
        ([[9, 2, 0], [8, 1, 5]], [0, 1], 2 / 3),  # a vote is a vote, however clear
    ],
)
def test_votes_are_shares_of_annotators(scores, expected, share: float):
    (found,) = votes([group(scores, criteria=JUDGES)])
    assert places(found) == expected and found.soft_label == pytest.approx(share)


@pytest.mark.parametrize(
    ("fields", "tie"),
    [
        ({"scores": [[1, 1], [1, 1]]}, True),
        ({"scores": [[1, 1], [1, 0]]}, False),
        ({"scores": [[3, 1], [3, 0]], "criteria": ("total", "safety")}, True),
        ({"scores": [[1], [0]], "criteria": (), "soft_label": 0.5}, True),
        ({"scores": [[1], [1]], "criteria": ()}, True),
    ],
)
def test_ties_are_soft_or_left_out(fields, tie: bool):
    pair, sure = group(**fields), group([[1, 1], [0, 0]])
    soft = soft_ties([pair, sure])
    assert [each.soft_label for each in soft] == [0.5 if tie else 1.0, 1.0]
    kept = without_ties([pair, sure])
    assert len(kept) == 2 - tie and all(each.soft_label is None for each in kept)
    if tie:
        with pytest.raises(BadInput, match="without_ties: all of 1 pairs are ties"):
            without_ties([pair])


def test_without_ties_orders_by_what_is_more_likely():
    unsure = group([[1, 1], [0, 0]], soft_label=0.25)
    (found,) = without_ties([unsure])
    assert places(found) == [1, 0] and found.soft_label is None
    assert soft_ties([unsure])[0].soft_label == 0.25
    for call in (votes, soft_ties, without_ties):
        with pytest.raises(BadInput, match="a group of 3 responses is no pair"):
            call([group(SCORES)])
    with pytest.raises(BadInput, match='votes: the data has no "scores"'):
        votes([Group(np.array([1]), [np.array([2]), np.array([3])])])
