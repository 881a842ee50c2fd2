"""Every public loss against its row in `expected_losses.py`: value, gradient, dtypes, jit."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expected_losses import ROWS
from expected_row import ARRAYS, FAR, Row, cdpo

from dpo_jax import losses

# functions that say or make what a loss is
NO_LOSS = {"needs", "all_pairs", "mix", "terms", "weighted", "entries", "table"}

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
        rise = row.expected({name: up}, still={}) - row.expected({name: down}, still={})
        slope[place] = rise.sum() / (2 * step)
    return slope


def test_every_public_loss_has_a_row():
    public = {
        name
        for name in losses.__all__
        if inspect.isfunction(getattr(losses, name)) and name not in NO_LOSS
    }
    rows = {row.name for row in ROWS}
    assert public - rows == set(), "add a row to tests/expected_losses.py"
    assert rows - public == set(), "a row without a public loss"


def test_the_table_would_notice_a_wrong_formula():
    wrong = Row("dpo", lambda x, beta: cdpo(beta * (x.w - x.l)), {"beta": 0.3})
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


@pytest.mark.parametrize("row", [row for row in ROWS if row.numbers], ids=str)
def test_vmap_over_hyperparameters_is_one_after_the_other(row):
    """As a sweep calls them: the hyperparameters are mapped, the data is not."""
    arrays, factors_M = cast(ARRAYS, jnp.float32), jnp.array([0.5, 1.0, 1.5])

    def scaled(factor):
        return row.actual(arrays, {name: value * factor for name, value in row.numbers.items()})

    together_MB = jax.vmap(scaled)(factors_M)
    close(together_MB, np.stack([scaled(factor) for factor in factors_M]), 1e-6)


@pytest.mark.parametrize("row", [row for row in ROWS if row.scored], ids=str)
def test_a_batch_over_four_devices_is_the_batch_on_one(row):
    """Value and gradient where the groups lie on different devices, coupled losses included."""
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=kinds, devices=jax.devices()[:4])
    whole = cast(ARRAYS, jnp.float32)

    def spread(x):
        axes = ("data",) if x.shape[:1] == (4,) else ()
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))

    parted = {name: spread(x) for name, x in whole.items()}
    both = jax.jit(lambda arrays: (row.actual(arrays), gradients(row, arrays)))
    value, slopes = both(parted)
    close(value, row.actual(whole), 1e-6)
    for name, slope in gradients(row, whole).items():
        close(slopes[name], slope, 1e-6)


@each_row
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_far_margins_and_ties_stay_finite_and_right(row, dtype):
    arrays = cast(FAR, dtype)
    value = row.actual(arrays)
    assert np.all(np.isfinite(value))
    close(value, row.expected(rounded(arrays)), 1e-5)
    for slope in gradients(row, arrays).values():
        assert np.all(np.isfinite(np.asarray(slope, np.float32)))


@pytest.mark.parametrize("row", [row for row in ROWS if row.scored], ids=str)
def test_an_empty_slot_is_finite_in_value_and_gradient(row):
    """Padding reaches the losses as zeros, lengths too; a weight of 0 would not save a NaN."""
    empty = cast({name: np.zeros_like(value) for name, value in ARRAYS.items()}, jnp.float32)
    assert np.all(np.isfinite(row.actual(empty)))
    for slope in gradients(row, empty).values():
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not losses.needs(getattr(losses, row.name)).coupled], ids=str
)
def test_a_value_depends_on_its_own_group_only(row):
    """Reversing the groups reverses the values of all but the losses that compare groups."""
    arrays = cast(ARRAYS, jnp.float32)
    reversed_ = {name: value[::-1] if value.ndim else value for name, value in arrays.items()}
    np.testing.assert_array_equal(row.actual(reversed_), row.actual(arrays)[::-1])
