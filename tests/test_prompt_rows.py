"""Prompts in rows: each stands whole where it is said to, on the device of its part."""

import numpy as np
import pytest

from dpo_jax.data.prompt_rows import LONG, one_each, several

RNG = np.random.default_rng(0)


def prompts(*lengths: int) -> list[np.ndarray]:
    return [RNG.integers(4, 90, size=length).astype(np.int32) for length in lengths]


LAYOUTS = {
    "one each": (one_each, (3, 1, 16), 4, 16, 1),
    "one row": (several, (3, 1, 16), 4, 16, 1),
    "two parts": (several, (130, 40, 7, 90, 12, 128, 55), 8, 136, 2),
    "many rows": (several, tuple(RNG.integers(1, 65, size=100)), 128, 64, 4),
    "nearly empty": (several, (9,), 8, 16, 8),
    "all as long": (several, (32,) * 16, 16, 32, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_prompt_stands_where_it_is_said_to(name):
    layout, lengths, count, width, parts = LAYOUTS[name]
    given = prompts(*lengths)
    options = {} if layout is one_each else {"parts": parts}
    laid = layout(given, count=count, width=width, **options)
    R, T = laid.tokens_RT.shape
    assert R % parts == 0
    taken_RT = np.zeros((R, T), int)
    assert sorted(laid.place_B[laid.place_B >= 0]) == list(range(len(given)))
    for b, place in enumerate(laid.place_B):
        if place < 0:
            assert laid.length_B[b] == 0
            continue
        ids = given[place]
        row = b // (count // parts) * (R // parts) + laid.row_B[b]
        here = slice(laid.start_B[b], laid.start_B[b] + len(ids))
        assert laid.length_B[b] == len(ids) and here.stop <= T
        np.testing.assert_array_equal(laid.tokens_RT[row, here], ids)
        np.testing.assert_array_equal(laid.positions_RT[row, here], np.arange(len(ids)))
        assert (laid.until_RT[row, here] == here.stop).all()
        assert laid.end_RN[row, laid.nth_B[b]] == here.stop - 1
        taken_RT[row, here] += 1
    assert taken_RT.max() == 1, "no two prompts in one place"
    free = taken_RT == 0
    np.testing.assert_array_equal(laid.until_RT[free], np.nonzero(free)[1] + 1)
    assert not laid.tokens_RT[free].any() and not laid.positions_RT[free].any()


def test_rows_are_filled_and_their_shapes_are_few():
    shapes, real, places = set(), 0, 0
    for seed in range(60):
        lengths = np.random.default_rng(seed).lognormal(5.2, 0.4, size=64).clip(24, 256).astype(int)
        laid = several(prompts(*lengths), count=64, width=256, parts=2)
        shapes.add((laid.tokens_RT.shape, laid.end_RN.shape))
        real += lengths.sum()
        places += laid.tokens_RT.size
        assert laid.tokens_RT.shape[1] <= (LONG + 1) * 256
    assert real / places > 0.94, "in rows of their own they fill 74%"
    assert len(shapes) <= 12
