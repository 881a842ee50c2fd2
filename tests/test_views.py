"""Views of groups: which responses stand together, what moves with them, and who is a partner."""

import numpy as np
import pytest

from dpo_jax.data.packing import pack
from dpo_jax.data.views import first, pairs, partnered, select, unpaired
from dpo_jax.structs import BadInput, Group

NAMES = ("helpfulness", "safety")


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def ranking(count: int, *, record: int = 7, **fields) -> Group:
    """Response k: k + 1 tokens 10 + k, of which the last counts, and the scores (-k, 100 + k)."""
    answers = [ids(*[10 + k] * (k + 1)) for k in range(count)]
    return Group(
        prompt=ids(1, 2),
        responses=answers,
        scored=[np.arange(len(answer)) == len(answer) - 1 for answer in answers],
        scores=np.array([[-k, 100 + k] for k in range(count)], np.float32).reshape(count, 2),
        weight=0.5,
        record=record,
        criteria=NAMES,
        **fields,
    )


def places(group: Group) -> list[int]:
    """The k of every response of a `ranking`, once mask and scores have been seen to agree."""
    assert group.scored is not None and group.scores is not None
    found = [int(answer[0]) - 10 for answer in group.responses]
    assert [len(answer) for answer in group.responses] == [k + 1 for k in found]
    for k, mask in zip(found, group.scored, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(mask), [k])
    np.testing.assert_array_equal(group.scores, [[-k, 100 + k] for k in found])
    assert (group.weight, group.record, group.criteria) == (0.5, 7, NAMES)
    np.testing.assert_array_equal(group.prompt, [1, 2])
    return found


def lone(prompt: int, *answer: int, **fields) -> Group:
    return Group(ids(prompt), [ids(*answer)], **fields)


def test_the_first_of_a_ranking_stands_alone():
    (found,) = first([ranking(3, soft_label=0.9, margin=2.0)])
    assert places(found) == [0] and found.soft_label is None and found.margin is None


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (2, [[0, 1]]),
        (3, [[0, 2]]),
        (4, [[0, 3], [1, 2]]),
        (5, [[0, 4], [1, 3]]),
    ],
)
def test_a_ranking_becomes_pairs_from_the_ends_inwards(count: int, expected):
    assert [places(group) for group in pairs([ranking(count)])] == expected


def test_pairs_of_several_groups_come_in_order():
    found = pairs([ranking(4), ranking(2)])
    assert [places(group) for group in found] == [[0, 3], [1, 2], [0, 1]]
    with pytest.raises(BadInput, match="record 7 has 1 response, a pair takes 2"):
        pairs([ranking(1)])


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (2, {0: 1.0, 1: 0.0}),
        (3, {0: 1.0, 2: 0.0}),
        (4, {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}),
    ],
)
def test_responses_alone_are_good_in_the_better_half(count: int, expected):
    found = unpaired([ranking(count, soft_label=0.8, margin=2.0) if count == 2 else ranking(count)])
    assert {places(group)[0]: group.label for group in found} == expected
    assert all(len(group.responses) == 1 for group in found)
    assert all(group.soft_label is None and group.margin is None for group in found)


def test_a_judged_response_stays_as_it_is():
    judged = ranking(1, label=0.0)
    assert unpaired([judged, ranking(2)])[0] is judged
    with pytest.raises(BadInput, match="record 7 has 1 response and no label"):
        unpaired([ranking(1)])
    with pytest.raises(BadInput, match="group 1 has no responses"):
        unpaired([ranking(2), Group(ids(1), [])])


def test_what_compares_two_responses_turns_round_with_them():
    group = ranking(2, soft_label=0.8, margin=2.0)
    kept, turned = select(group, (0, 1)), select(group, (1, 0))
    assert (places(kept), kept.soft_label, kept.margin) == ([0, 1], 0.8, 2.0)
    assert (places(turned), turned.margin) == ([1, 0], -2.0)
    assert turned.soft_label == pytest.approx(0.2)
    (pair,) = pairs([group])
    assert (pair.soft_label, pair.margin) == (0.8, 2.0)
    of_three = select(ranking(3, soft_label=0.8, margin=2.0), (0, 1))
    assert (places(of_three), of_three.soft_label, of_three.margin) == ([0, 1], None, None)


def test_a_partner_is_half_the_data_on_or_the_next_behind_it_that_differs():
    groups = [
        lone(1, 10, label=1.0, weight=0.5, record=3),
        lone(1, 11, label=0.0, record=4),  # the same prompt as the first
        lone(2, 10, label=1.0, record=5),  # the same response as the first
        lone(3, 12, 13, label=0.0, record=6),
    ]
    found = partnered(groups)
    seconds = [group.responses[1].tolist() for group in found]
    assert seconds == [[12, 13], [12, 13], [11], [11]]
    for before, after in zip(groups, found, strict=True):
        assert after.responses[0] is before.responses[0] and after.prompt is before.prompt
        assert (after.label, after.weight, after.record) == (
            before.label,
            before.weight,
            before.record,
        )
    again = [group.responses[1].tolist() for group in partnered(groups)]
    assert again == seconds


def test_a_partner_fits_the_row():
    """Prompt and response of the first take two places: of a row of 4 two are left."""
    groups = [lone(1, 10), lone(2, 11, 11, 11), lone(3, 12, 12), lone(4, 13)]
    assert [len(group.responses[1]) for group in partnered(groups)] == [2, 1, 1, 3]
    groups = [groups[1], groups[0], groups[2], groups[3]]
    assert [len(group.responses[1]) for group in partnered(groups)] == [2, 1, 3, 1]
    assert [len(group.responses[1]) for group in partnered(groups, row_tokens=5)] == [1, 1, 1, 1]
    small = groups[1:]
    assert [len(group.responses[1]) for group in partnered(small, row_tokens=4)] == [2, 1, 1]
    assert [len(group.responses[1]) for group in partnered(small[::2], row_tokens=3)] == [1, 1]
    with pytest.raises(BadInput, match=r"group 0 finds no .*row of 4 tokens.*row_tokens=5 would"):
        partnered(groups, row_tokens=4)
    assert partnered(groups, row_tokens=5)


def test_a_partner_brings_its_mask_and_no_scores():
    first = lone(1, 10, 11, scores=np.array([[3.0, 4.0]]), criteria=NAMES)
    second = lone(
        2, 12, 13, scored=[np.array([False, True])], scores=np.array([[5.0, 6.0]]), criteria=NAMES
    )
    found = partnered([first, second])
    np.testing.assert_array_equal(found[0].scores, [[3, 4], [0, 0]])
    assert found[0].scored is not None and found[0].criteria == NAMES
    np.testing.assert_array_equal(found[0].scored, [[True, True], [False, True]])
    batch = pack(found, row_tokens=12)
    assert batch.score_RGKC is not None and batch.score_RGKC.shape == (1, 2, 2, 2)
    assert batch.criteria == NAMES
    plain = partnered([lone(1, 10), lone(2, 11)])
    assert all(group.scored is None and group.scores is None for group in plain)


def test_without_a_partner_it_is_said():
    for groups in ([lone(1, 10)], [lone(1, 10), lone(1, 11)], [lone(1, 10), lone(2, 10)]):
        with pytest.raises(BadInput, match="group 0 finds no response of another prompt that diff"):
            partnered(groups)
    with pytest.raises(BadInput, match="record 7 has 2 responses, it must be 1"):
        partnered([lone(1, 10), ranking(2)])
