"""Rows: every token once, the attention rule against a slow triple loop, and errors with advice."""

import time

import numpy as np
import pytest

from dpo_jax.data.packing import arrangements, pack, plan, spread
from dpo_jax.structs import BadInput, Batch, Group

ROW_TOKENS = 40


def random_groups(count: int, *, seed: int = 0, most: int = 4) -> list[Group]:
    """Groups of 1 to `most` responses whose tokens differ over all groups, so each can be found."""
    rng = np.random.default_rng(seed)
    fresh = iter(range(1, 10_000))

    def ids() -> np.ndarray:
        return np.array([next(fresh) for _ in range(rng.integers(1, 8))], np.int32)

    weights = rng.uniform(0.5, 2.0, size=count)
    return [
        Group(ids(), [ids() for _ in range(rng.integers(1, most + 1))], weight=float(weight))
        for weight in weights
    ]


def owners(batch: Batch, groups: list[Group]) -> list[list[tuple[int, int] | None]]:
    """Per row and place (group, k), k = -1 for the prompt and None for padding, from lengths."""
    rows: list[list[tuple[int, int] | None]] = []
    for record_G in np.asarray(batch.record_RG):
        row: list[tuple[int, int] | None] = []
        for b in record_G[record_G >= 0].tolist():
            row += [(b, -1)] * len(groups[b].prompt)
            for k, response in enumerate(groups[b].responses):
                row += [(b, k)] * len(response)
        rows.append(row + [None] * (batch.tokens_RT.shape[1] - len(row)))
    return rows


def sees(query: tuple[int, int] | None, key: tuple[int, int] | None) -> bool:
    """Whether an earlier key of one owner is visible to a later query of another."""
    if query is None or key is None or query[0] != key[0]:
        return False
    return key[1] in (-1, query[1])


def test_row_of_the_worked_example():
    """Prompt a b c, responses x y . and z ., one place of padding."""
    a, b, c, x, y, z, stop = range(1, 8)
    batch = pack([([a, b, c], [[x, y, stop], [z, stop]])], row_tokens=9)
    expected = {
        "tokens_RT": [[a, b, c, x, y, stop, z, stop, 0]],
        "positions_RT": [[0, 1, 2, 3, 4, 5, 3, 4, 0]],
        "until_RT": [[8, 8, 8, 6, 6, 6, 8, 8, 9]],
        "target_RN": [[x, y, stop, z, stop]],
        "source_RN": [[2, 3, 4, 2, 6]],
        "slot_RN": [[0, 0, 0, 1, 1]],
        "end_RGK": [[[5, 7]]],
        "weight_RN": [[1, 1, 1, 1, 1]],
        "weight_RG": [[1]],
        "record_RG": [[0]],
    }
    for name, values in expected.items():
        found = getattr(batch, name)
        np.testing.assert_array_equal(found, values, err_msg=name)
        assert found.dtype == (np.float32 if name.startswith("weight") else np.int32), name
    assert batch.label_RG is None and batch.score_RGKC is None


@pytest.mark.parametrize("seed", range(3))
def test_every_token_of_every_group_lands_once(seed: int):
    groups = random_groups(12, seed=seed)
    batch = pack(groups, row_tokens=ROW_TOKENS)
    placed = np.sort(batch.tokens_RT[batch.tokens_RT > 0])
    whole = [ids for group in groups for ids in (group.prompt, *group.responses)]
    np.testing.assert_array_equal(placed, np.sort(np.concatenate(whole)))
    answers = np.concatenate([ids for group in groups for ids in group.responses])
    used = batch.slot_RN >= 0
    np.testing.assert_array_equal(np.sort(batch.target_RN[used]), np.sort(answers))
    assert not batch.target_RN[~used].any() and not batch.weight_RN[~used].any()
    assert np.sort(batch.record_RG[batch.record_RG >= 0]).tolist() == list(range(12))


@pytest.mark.parametrize("seed", range(3))
def test_until_equals_the_rule_by_a_triple_loop(seed: int):
    groups = random_groups(8, seed=seed)
    batch = pack(groups, row_tokens=ROW_TOKENS)
    place = np.arange(ROW_TOKENS)
    until_RT1 = np.asarray(batch.until_RT)[:, None, :]
    mask_RTS = (place[None, None, :] <= place[None, :, None]) & (
        place[None, :, None] < np.broadcast_to(until_RT1, (len(until_RT1), ROW_TOKENS, ROW_TOKENS))
    )
    for r, row in enumerate(owners(batch, groups)):
        for q in place:
            for k in place:
                expected = bool(q == k or (k < q and sees(row[q], row[k])))
                assert mask_RTS[r, q, k] == expected, (r, q, k)


@pytest.mark.parametrize("seed", range(3))
def test_slots_sources_positions_and_ends_point_at_the_response(seed: int):
    groups = random_groups(9, seed=seed)
    batch = pack(groups, row_tokens=ROW_TOKENS)
    R, G, K = batch.end_RGK.shape
    for r, g in np.ndindex(R, G):
        b = int(batch.record_RG[r, g])
        responses = groups[b].responses if b >= 0 else []
        prompt = len(groups[b].prompt) if b >= 0 else 0
        assert (batch.end_RGK[r, g, len(responses) :] == -1).all()
        for k, response in enumerate(responses):
            end, n = int(batch.end_RGK[r, g, k]), np.flatnonzero(batch.slot_RN[r] == g * K + k)
            places = np.arange(end - len(response) + 1, end + 1)
            np.testing.assert_array_equal(batch.tokens_RT[r, places], response)
            np.testing.assert_array_equal(
                batch.positions_RT[r, places], prompt + np.arange(len(response))
            )
            np.testing.assert_array_equal(n, n[0] + np.arange(len(response)))  # in order, together
            np.testing.assert_array_equal(batch.target_RN[r, n], response)
            source = batch.source_RN[r, n]
            np.testing.assert_array_equal(source[1:], places[:-1])
            assert batch.tokens_RT[r, source[0]] == groups[b].prompt[-1]
            np.testing.assert_array_equal(
                batch.weight_RN[r, n], np.full(len(n), groups[b].weight, np.float32)
            )
        weight = groups[b].weight if b >= 0 else 0.0
        assert batch.weight_RG[r, g] == np.float32(weight)


def test_only_marked_tokens_are_scored():
    group = Group(
        np.array([1, 2]),
        [np.array([3, 4, 5]), np.array([6, 7])],
        scored=[np.array([False, True, True]), np.array([True, False])],
        weight=0.5,
    )
    batch = pack([group], row_tokens=7)
    np.testing.assert_array_equal(batch.target_RN, [[4, 5, 6]])
    np.testing.assert_array_equal(batch.source_RN, [[2, 3, 1]])
    np.testing.assert_array_equal(batch.slot_RN, [[0, 0, 1]])
    np.testing.assert_array_equal(batch.end_RGK, [[[4, 6]]])
    np.testing.assert_array_equal(batch.weight_RN, [[0.5, 0.5, 0.5]])


def test_fields_of_the_data_stand_in_the_group_slots():
    prompt, answer = np.array([1]), np.array([2, 3])
    groups = [
        Group(prompt, [answer, answer], scores=np.array([[2.0, 5], [1, 4]]), label=1.0, margin=3.0),
        Group(prompt, [answer], scores=np.array([[7.0, 8]]), label=0.0, margin=-1.0),
    ]
    batch = pack(groups, row_tokens=8, slots=3, rows=2, scored=9, responses=3)
    assert batch.target_RN.shape == (2, 9) and batch.end_RGK.shape == (2, 3, 3)
    for b, group in enumerate(groups):
        ((r, g),) = np.argwhere(batch.record_RG == b)
        assert group.scores is not None and batch.score_RGKC is not None
        np.testing.assert_array_equal(batch.score_RGKC[r, g, : len(group.scores)], group.scores)
        assert not batch.score_RGKC[r, g, len(group.scores) :].any()
        assert batch.label_RG is not None and batch.label_RG[r, g] == group.label
        assert batch.margin_RG is not None and batch.margin_RG[r, g] == group.margin
    assert batch.soft_label_RG is None
    with pytest.raises(BadInput, match="1 of 2 groups have a label"):
        pack([Group(prompt, [answer], label=1.0), Group(prompt, [answer])], row_tokens=16)
    with pytest.raises(BadInput, match="scores must be given to all groups"):
        pack([groups[0], Group(prompt, [answer], label=1.0, margin=0.0)], row_tokens=16)


def test_names_of_criteria_stand_beside_the_scores():
    prompt, answer = np.array([1]), np.array([2, 3])
    scores, names = np.array([[2.0, 5]]), ("helpfulness", "safety")
    named = Group(prompt, [answer], scores=scores, criteria=names)
    batch = pack([named, named], row_tokens=8)
    assert batch.criteria == names and batch.score_RGKC is not None
    assert batch.score_RGKC.shape == (1, 2, 1, 2)
    assert pack([Group(prompt, [answer], scores=scores)], row_tokens=8).criteria == ()
    assert pack([], row_tokens=8).criteria == ()
    for other in (("safety", "helpfulness"), (), ("helpfulness",)):
        odd = Group(prompt, [answer], scores=scores, criteria=other)
        with pytest.raises(BadInput, match="with the same criteria"):
            pack([named, odd], row_tokens=16)
    with pytest.raises(BadInput, match="with the same criteria"):
        pack([Group(prompt, [answer], scores=scores, criteria=("safety",))], row_tokens=8)


def test_empty_rows_hold_padding_only():
    batch = pack([([1], [[2]])], row_tokens=3, rows=2)
    empty = int(np.flatnonzero(batch.record_RG[:, 0] < 0)[0])
    np.testing.assert_array_equal(batch.until_RT[empty], [1, 2, 3])
    assert not batch.tokens_RT[empty].any() and not batch.weight_RG[empty].any()
    assert (pack([], row_tokens=3).record_RG == -1).all()


def test_prompts_without_responses_can_be_packed():
    batch = pack([([1, 2], [])], row_tokens=4)
    np.testing.assert_array_equal(batch.until_RT, [[2, 2, 3, 4]])
    assert (batch.slot_RN == -1).all() and (batch.end_RGK == -1).all()


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([([1] * 4, [[2] * 3, [3] * 2])], {"row_tokens": 8}, r"prompt 4, responses 3 \+ 2.*=9 wou"),
        ([([1], [[2]]), ([1], [[]])], {"row_tokens": 8}, "group 1: response 0 is empty"),
        ([([], [[2]])], {"row_tokens": 8}, "group 0: the prompt is empty"),
        ([([1], [[2.5]])], {"row_tokens": 8}, "integers"),
        ([([1], [[-1]])], {"row_tokens": 8}, "not negative"),
        ([([1], [[2, 3]])], {"row_tokens": 8, "scored": 1}, "scored=2 would do"),
        ([([1], [[2], [3]])], {"row_tokens": 8, "responses": 1}, "responses=2 would do"),
        ([([1], [[2]])] * 2, {"row_tokens": 8, "slots": 1}, "slots=2 would do"),
        ([([1], [[2]])], {"row_tokens": 0}, "at least 1"),
        ([([1], [[2]])], {"row_tokens": 2, "rows": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_packed_is_said_with_advice(groups, options, message: str):
    with pytest.raises(BadInput, match=message):
        pack(groups, **options)


def test_too_few_rows_name_a_length_that_does():
    groups = [([1] * 5, [[2] * 4])] * 7
    with pytest.raises(BadInput, match="do not fit 2 rows of 9 tokens") as caught:
        pack(groups, row_tokens=9, rows=2)
    advice = int(str(caught.value).split("row_tokens=")[1].split()[0])
    assert pack(groups, row_tokens=advice, rows=2).tokens_RT.shape == (2, advice)
    assert advice >= 4 * 9  # one of the two rows holds four groups of nine tokens


def test_masks_and_scores_must_agree_with_the_responses():
    answers = [np.array([2, 3])]
    with pytest.raises(BadInput, match="one mask as long as each response"):
        pack([Group(np.array([1]), answers, scored=[np.array([True])])], row_tokens=8)
    with pytest.raises(BadInput, match=r"scores of shape \(2,\)"):
        pack([Group(np.array([1]), answers, scores=np.array([1.0, 2.0]))], row_tokens=8)


def test_plan_is_best_fit_decreasing():
    """6 and 5 open two rows of 10; 4 closes the first, 3 and 2 the second. Next-fit needs three."""
    assert plan([2, 3, 4, 5, 6], 10) == [[0, 1, 3], [2, 4]]
    lengths = np.random.default_rng(0).integers(1, 100, size=200).tolist()
    bins = plan(lengths, 100)
    assert sorted(b for row in bins for b in row) == list(range(200))
    assert all(sum(lengths[b] for b in row) <= 100 for row in bins)
    assert len(bins) <= 11 / 9 * np.ceil(sum(lengths) / 100) + 6 / 9  # the known bound


def test_arrangements_keep_their_rows_and_spread_evens_the_scored_tokens():
    rng = np.random.default_rng(1)
    scored = rng.integers(1, 60, size=48)
    lengths = (scored + rng.integers(1, 60, size=48)).tolist()
    whole = sum(lengths)
    for bins in arrangements(lengths, scored.tolist(), 6, whole // 6 + 8):
        assert sorted(b for row in bins for b in row) == list(range(48)) and len(bins) <= 6
        assert max(sum(lengths[b] for b in row) for row in bins) <= whole // 6 + 8
    even = spread(lengths, scored.tolist(), 6)
    assert max(sum(scored[b] for b in row) for row in even) <= 1.1 * scored.sum() / 6
    assert list(arrangements(lengths, scored.tolist(), 6, whole // 6 - 1)) == []


@pytest.mark.parametrize("row_tokens", [768, 2048])
def test_packing_a_step_takes_less_than_five_milliseconds(row_tokens: int):
    """64 pairs of about 450 tokens; processor time, best of 10, so that neighbours do not count."""
    rng = np.random.default_rng(0)

    def ids(most: int) -> np.ndarray:
        return rng.integers(1, 100, size=rng.integers(most // 2, most + 1)).astype(np.int32)

    groups = [Group(ids(256), [ids(170), ids(170)]) for _ in range(64)]
    seconds = []
    for _ in range(10):
        start = time.process_time()
        pack(groups, row_tokens=row_tokens)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 5e-3
