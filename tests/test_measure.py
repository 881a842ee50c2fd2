"""Measures against numbers worked out by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import measure

f32 = partial(np.asarray, dtype=np.float32)
i32 = partial(np.asarray, dtype=np.int32)
# Two rows: a response of 3 tokens and one of 1; one of 2 tokens, an unused place, and a response
# without a scored token.
MASK = f32([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
SLOT = i32([[0, 0, 0, 1, -1], [3, 3, -1, 5, 5]])
ALL = pytest.mark.parametrize(
    "weights",
    [measure.token_mean, measure.sequence_mean, measure.fixed_length(8)],
    ids=["token_mean", "sequence_mean", "fixed_length"],
)


def test_token_mean_shares_among_all_tokens():
    np.testing.assert_allclose(measure.token_mean(MASK, SLOT), MASK / 6, rtol=1e-6)


def test_sequence_mean_shares_among_responses_then_among_their_tokens():
    expected = [[1 / 9, 1 / 9, 1 / 9, 1 / 3, 0], [1 / 6, 1 / 6, 0, 0, 0]]
    np.testing.assert_allclose(measure.sequence_mean(MASK, SLOT), expected, rtol=1e-6)


def test_fixed_length_divides_by_responses_and_a_constant():
    np.testing.assert_allclose(measure.fixed_length(8)(MASK, SLOT), MASK / (3 * 8), rtol=1e-6)


def test_fixed_length_counts_the_responses_of_full_rows():
    full = np.array([[0, 0, 1], [2, 2, 2]])
    weight = measure.fixed_length(8)(np.ones((2, 3)), full)
    np.testing.assert_allclose(weight, np.full((2, 3), 1 / 24), rtol=1e-6)


def test_without_slots_a_row_is_a_response():
    expected = [[1 / 8, 1 / 8, 1 / 8, 1 / 8, 0], [1 / 4, 1 / 4, 0, 0, 0]]
    np.testing.assert_allclose(measure.sequence_mean(MASK), expected, rtol=1e-6)
    np.testing.assert_allclose(measure.fixed_length(8)(MASK), MASK / (2 * 8), rtol=1e-6)


def test_example_weights_ride_on_the_mask():
    """The second response weighs 3 where the others weigh 1; tokens inside it stay equal."""
    mask = MASK * f32([[1, 1, 1, 3, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_allclose(measure.token_mean(mask, SLOT), mask / 8, rtol=1e-6)
    expected = [[1 / 15, 1 / 15, 1 / 15, 3 / 5, 0], [1 / 10, 1 / 10, 0, 0, 0]]
    np.testing.assert_allclose(measure.sequence_mean(mask, SLOT), expected, rtol=1e-6)
    np.testing.assert_allclose(measure.fixed_length(8)(mask, SLOT), mask / 24, rtol=1e-6)


def test_the_tokens_of_a_response_need_not_stand_together():
    slot = i32([[4, 0, 4, 0, 4]])
    expected = [[1 / 6, 1 / 4, 1 / 6, 1 / 4, 1 / 6]]
    np.testing.assert_allclose(measure.sequence_mean(np.ones((1, 5)), slot), expected, rtol=1e-6)


@ALL
def test_nothing_scored_weighs_nothing(weights):
    np.testing.assert_array_equal(weights(np.zeros((2, 3)), np.zeros((2, 3), np.int32)), 0)
    np.testing.assert_array_equal(weights(np.ones((2, 3)), np.full((2, 3), -1)), 0)
    np.testing.assert_array_equal(weights(np.zeros((2, 3))), 0)


@ALL
def test_rows_in_any_order_and_any_padding_give_the_same_weights(weights):
    weight = weights(MASK, SLOT)
    np.testing.assert_allclose(weights(MASK[::-1], SLOT[::-1]), weight[::-1], rtol=1e-6)
    pad = ((0, 2), (0, 3))
    padded = weights(np.pad(MASK, pad), np.pad(SLOT, pad, constant_values=-1))
    np.testing.assert_allclose(padded, np.pad(weight, pad), rtol=1e-6)


@ALL
def test_jit_and_half_precision(weights):
    compiled = jax.jit(weights)(jnp.asarray(MASK, jnp.bfloat16), jnp.asarray(SLOT))
    assert compiled.dtype == jnp.float32
    np.testing.assert_allclose(compiled, weights(MASK.astype(bool), SLOT), rtol=1e-6)


def test_the_mean_over_tokens_is_that_of_the_step_not_of_its_microbatches():
    """A published case: 28 / 7 = 4, where a mean of two microbatch means would be 3.25."""
    loss = f32([[1, 2, 0], [3, 4, 5], [6, 7, 0]])
    mask = f32([[1, 1, 0], [1, 1, 1], [1, 1, 0]])
    weighted = np.asarray(measure.token_mean(mask)) * loss
    np.testing.assert_allclose(weighted[:1].sum() + weighted[1:].sum(), 4.0, rtol=1e-6)
    first = np.sum(measure.token_mean(mask[:1]) * loss[:1])
    second = np.sum(measure.token_mean(mask[1:]) * loss[1:])
    np.testing.assert_allclose((first + second) / 2, 3.25, rtol=1e-6)


def test_packing_two_responses_into_a_row_keeps_each_its_weight():
    """A published case: advantages 1.5 on 3 tokens and 3 on 1 token, ratio 1: -(1.5 + 3) / 2."""
    loss = -f32([[1.5, 1.5, 1.5, 3.0]])
    weight = measure.sequence_mean(np.ones((1, 4)), i32([[0, 0, 0, 1]]))
    np.testing.assert_allclose(np.sum(weight * loss), -2.25, rtol=1e-6)
    # A mean per row, blind to the responses in it, would give -1.875.
    np.testing.assert_allclose(np.sum(measure.sequence_mean(np.ones((1, 4))) * loss), -1.875)


def test_a_fully_masked_response_leaves_the_denominator():
    """A published case: the second row counts neither as 0 nor as NaN."""
    loss = f32([[1, 3], [5, 7]])
    weight = measure.sequence_mean(f32([[1, 1], [0, 0]]))
    np.testing.assert_allclose(np.sum(weight * loss), 2.0, rtol=1e-6)


def test_per_token_of_an_empty_response_is_its_sum():
    x, length = f32([[-6.0, 0.0]]), i32([[3, 0]])
    np.testing.assert_array_equal(measure.per_token(x, length), [[-2.0, 0.0]])


def test_a_slot_for_every_place():
    with pytest.raises(AssertionError):
        measure.token_mean(MASK, SLOT[:1])


def test_a_class_is_a_measure_of_its_own():
    weight_B = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    of_class_B = weight_B * np.array([1, 0, 1, 0], np.float32)
    np.testing.assert_allclose(
        measure.within(of_class_B, jnp.float32(0.4)), [0.25, 0, 0.75, 0], rtol=1e-6
    )
    np.testing.assert_array_equal(measure.within(0 * weight_B, jnp.float32(0.0)), np.zeros(4))
