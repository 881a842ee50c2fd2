"""Every public loss against its row in `expected_losses.py`: value, gradient, dtypes, jit."""

import inspect

import expected_losses
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expected_losses import ARRAYS, ROWS, Row

from dpo_jax import losses

# Log-ratios and scores far outside what a float32 exp can hold, and exact ties.
FAR = {
    "logp_BK": np.array([[-10.0, -810.0], [-810.0, -10.0], [-500.0, -500.0], [-0.0, -0.0]]),
    "ref_logp_BK": np.array([[-10.0, -10.0], [-10.0, -10.0], [-100.0, -100.0], [-800.0, -0.0]]),
    "length_BK": np.array([[1, 1], [1, 1], [4, 4], [1, 2]], np.int32),
    "score_BK": np.array([[800.0, 0.0], [0.0, 800.0], [-400.0, 400.0], [3.0, 3.0]]),
    "margin_B": np.array([0.0, 0.0, 800.0, 0.0]),
    "rank_BK": np.array([[0.0, 800, -800, 0], [5, 5, 5, 5], [-800, 0, 800, 1], [800, 0, -9, 2]]),
    "rank_mask_BK": np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], np.int32),
    "x": np.array([[800.0, -800.0], [0.0, 81.0], [-81.0, 79.0]]),
    "logp": np.array([[-800.0, -0.0, -3.0], [-81.0, -1.0, -0.0]]),
    "ref_logp": np.array([[-0.0, -800.0, -3.0], [-0.0, -82.0, -0.0]]),
    "logp_V": np.array([[-0.0, -800.0, -800.0], [-800.0, -0.0, -800.0]]),
    "ref_logp_V": np.array([[-800.0, -0.0, -800.0], [-800.0, -0.0, -800.0]]),
}

each_row = pytest.mark.parametrize("row", ROWS, ids=str)


def cast(arrays, dtype):
    """Real numbers to `dtype`; masks and lengths stay integers."""
    return {
        name: jnp.asarray(value, dtype if value.dtype == np.float64 else None)
        for name, value in arrays.items()
    }


def rounded(arrays):
    """The numbers that a loss was really given, in float64."""
    return {name: np.asarray(value).astype(np.float64) for name, value in arrays.items()}


def close(actual, expected, tolerance):
    """|x - y| <= tolerance (1 + |y|)."""
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def gradients(row: Row, arrays):
    """d sum(loss) / d each array of real numbers that the loss takes by position."""
    names = row.differentiable

    def total(real):
        return jnp.sum(row.actual({**arrays, **real}))

    return jax.grad(total)({name: arrays[name] for name in names})


def central_difference(row: Row, name, step=1e-6):
    """d sum(formula) / d ARRAYS[name], one entry after the other, in float64."""
    slope = np.zeros_like(ARRAYS[name])
    for place in np.ndindex(slope.shape):
        up, down = ARRAYS[name].copy(), ARRAYS[name].copy()
        up[place] += step
        down[place] -= step
        rise = row.expected({name: up}) - row.expected({name: down})
        slope[place] = rise.sum() / (2 * step)
    return slope


def test_every_public_loss_has_a_row():
    public = {
        name
        for name in losses.__all__
        if inspect.isfunction(getattr(losses, name)) and name != "needs"
    }
    rows = {row.name for row in ROWS}
    assert public - rows == set(), "add a row to tests/expected_losses.py"
    assert rows - public == set(), "a row without a public loss"


def test_the_table_would_notice_a_wrong_formula():
    wrong = Row("dpo", lambda x, beta: expected_losses.cdpo(beta * (x.w - x.l)), {"beta": 0.3})
    with pytest.raises(AssertionError):
        close(wrong.actual(cast(ARRAYS, jnp.float32)), wrong.expected({}), 1e-5)


@each_row
def test_value_in_float32(row):
    arrays = cast(ARRAYS, jnp.float32)
    value = row.actual(arrays)
    assert value.dtype == jnp.float32
    close(value, row.expected(rounded(arrays)), 1e-5)


@each_row
def test_value_in_float64(row):
    with jax.enable_x64(True):
        value = row.actual(cast(ARRAYS, jnp.float64))
    assert value.dtype == jnp.float64
    close(value, row.expected({}), 1e-9)


@each_row
def test_gradient_is_that_of_the_formula(row):
    with jax.enable_x64(True):
        slopes = gradients(row, cast(ARRAYS, jnp.float64))
    for name, slope in slopes.items():
        # A central difference of step 1e-6 is good to about 1e-9 of the largest value.
        close(slope, central_difference(row, name), 1e-6)


@each_row
def test_half_precision_inputs_are_computed_in_float32(row):
    arrays = cast(ARRAYS, jnp.bfloat16)
    numbers = {name: jnp.bfloat16(value) for name, value in row.numbers.items()}
    value = row.actual(arrays, numbers)
    assert value.dtype == jnp.float32
    close(value, row.expected(rounded(arrays), rounded(numbers)), 1e-5)


@each_row
def test_jit_with_traced_hyperparameters_changes_nothing(row):
    arrays = cast(ARRAYS, jnp.float32)
    numbers = {name: jnp.float32(value) for name, value in row.numbers.items()}
    compiled = jax.jit(row.actual)(arrays, numbers)
    close(compiled, row.actual(arrays), 1e-6)


@each_row
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_far_margins_and_ties_stay_finite_and_right(row, dtype):
    arrays = cast(FAR, dtype)
    value = row.actual(arrays)
    assert np.all(np.isfinite(value))
    close(value, row.expected(rounded(arrays)), 1e-5)
    for slope in gradients(row, arrays).values():
        assert np.all(np.isfinite(np.asarray(slope, np.float32)))


@each_row
def test_a_value_depends_on_its_own_group_only(row):
    """Reversing the groups reverses the values: nothing here couples the batch."""
    arrays = cast(ARRAYS, jnp.float32)
    reversed_ = {name: value[::-1] for name, value in arrays.items()}
    np.testing.assert_array_equal(row.actual(reversed_), row.actual(arrays)[::-1])
