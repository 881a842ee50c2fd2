"""Prompts in rows for one reading: several in a row where they are long enough to pay for it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data.packing import Bins, tight

LONG = 4  # prompts of the greatest length that a row has room for


class PromptRows(NamedTuple):
    """R rows that hold B prompts, int32. Part i of the rows holds part i of the prompts, so that
    every device reads its own; a prompt of length 0 stands for none."""

    tokens_RT: np.ndarray
    positions_RT: np.ndarray
    until_RT: np.ndarray  # the attention rule, among the places of the rows
    end_RN: np.ndarray  # the last place of every prompt of a row; 0 = no such prompt
    row_B: np.ndarray  # where a prompt stands: its row, counted within its part,
    nth_B: np.ndarray  # which prompt of that row it is,
    start_B: np.ndarray  # and its first place
    length_B: np.ndarray
    place_B: np.ndarray  # of which prompt of the call, -1 = none


def one_each(prompts: Sequence[np.ndarray], *, count: int, width: int) -> PromptRows:
    """Every prompt in a row of its own of `width` places; `count` rows."""
    return _laid(prompts, [[b] for b in range(count)], np.arange(count), 1, width)


def several(prompts: Sequence[np.ndarray], *, count: int, width: int, parts: int) -> PromptRows:
    """Prompts of at most `width` tokens in a few rows that they fill; `count` of them, of which
    `parts` is a divisor.

    The parts hold nearly as many tokens each. Rows are as long as need be in eighths of `width`,
    so that few shapes compile.
    """
    length_B = np.zeros(count, int)
    length_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    order_B = np.concatenate([np.argsort(-length_B, kind="stable")[i::parts] for i in range(parts)])
    length_PB = length_B[order_B].reshape(parts, -1)
    rows = max(1, -(-int(length_PB.sum(axis=1).max()) // (LONG * width)))
    grain = max(8, width // 8)
    bins: Bins = []
    for part, own_B in enumerate(length_PB):
        there = np.flatnonzero(own_B)
        # whatever the lengths are, rows of that many places have room for what they have on average
        # and a prompt more
        laid = tight(own_B[there].tolist(), rows, (LONG + 1) * width, grain) or []
        bins += [[part * len(own_B) + int(there[b]) for b in row] for row in laid]
        bins += [[] for _ in range(rows - len(laid))]
    tokens = max(int(length_B[order_B[row]].sum()) for row in bins)
    return _laid(prompts, bins, order_B, parts, -(-tokens // grain) * grain)


def _laid(
    prompts: Sequence[np.ndarray], bins: Bins, order_B: np.ndarray, parts: int, T: int
) -> PromptRows:
    """The prompts where `bins` says, which counts them in order_B."""
    R, B = len(bins), len(order_B)
    tokens_RT, positions_RT = np.zeros((R, T), np.int32), np.zeros((R, T), np.int32)
    until_RT = np.tile(np.arange(1, T + 1, dtype=np.int32), (R, 1))  # padding sees itself alone
    # as many as a power of two, so that few shapes compile
    end_RN = np.zeros((R, 1 << (max(map(len, bins)) - 1).bit_length()), np.int32)
    row_B, nth_B, start_B, length_B = np.zeros((4, B), np.int32)
    for row, members in enumerate(bins):
        at = 0
        for nth, b in enumerate(members):
            ids = prompts[order_B[b]] if order_B[b] < len(prompts) else ()
            here = slice(at, at + len(ids))
            tokens_RT[row, here], positions_RT[row, here] = ids, np.arange(len(ids))
            until_RT[row, here] = here.stop
            end_RN[row, nth] = max(here.stop - 1, 0)
            row_B[b], nth_B[b], start_B[b], length_B[b] = row % (R // parts), nth, at, len(ids)
            at = here.stop
    place_B = np.where(order_B < len(prompts), order_B, -1)
    return PromptRows(
        tokens_RT, positions_RT, until_RT, end_RN, row_B, nth_B, start_B, length_B, place_B
    )
