"""Optimizers against float64 formulas, schedules at their corners, the average's recursion."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import optim
from dpo_jax.structs import BadInput

STEPS = 100


@dataclass(frozen=True)
class Options:
    optimizer: Any = optim.adamw
    learning_rate: Any = 0.1
    schedule: Any = optim.constant
    warmup: int = 0
    clip: float | None = None
    ema: float | None = None


def weights(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {"layers": {"q_DHE": draw(3, 2, 2), "norm_D": draw(3)}, "embed_VD": draw(5, 3)}


def trained(transform, count=6):
    """Parameters after each of `count` updates along fixed random gradients, and the state."""
    params = weights()
    state = transform.init(params)
    path: list[Any] = [params]
    for step in range(count):
        updates, state = jax.jit(transform.update)(weights(10 + step), state, path[-1])
        path.append(optax.apply_updates(path[-1], updates))
    return path, state


def by_hand(rule, count=6):
    """The same path of one leaf after another in float64; rule(leaf name) -> update function."""

    def leaf(path, first, *gradients):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        value = np.asarray(first, np.float64)
        memory: dict[str, Any] = {}
        for step, gradient in enumerate(gradients):
            value = rule(name, step + 1, value, np.asarray(gradient, np.float64), memory)
        return value

    gradients = [weights(10 + step) for step in range(count)]
    return jax.tree_util.tree_map_with_path(leaf, weights(), *gradients)


def assert_close(tree, expected, rtol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol=2e-6), tree, expected)


def test_adamw_is_the_textbook_update_and_decays_matrices_only():
    def rule(name, t, p, g, memory):
        m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
        v = memory["v"] = 0.99 * memory.get("v", 0.0) + 0.01 * g**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        return p - 0.05 * (step + (0.0 if name == "norm_D" else 0.3) * p)

    path, _ = trained(optim.adamw(0.05, b2=0.99, weight_decay=0.3))
    assert_close(path[-1], by_hand(rule))


def test_rmsprop_is_torchs():
    # torch.optim.RMSprop: v starts at 0, no bias correction, eps outside of the root
    def rule(name, t, p, g, memory):
        v = memory["v"] = 0.99 * memory.get("v", 0.0) + 0.01 * g**2
        return p - 0.01 * g / (np.sqrt(v) + 1e-8)

    assert_close(trained(optim.rmsprop(0.01))[0][-1], by_hand(rule))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd_with_and_without_momentum(momentum):
    def rule(name, t, p, g, memory):
        u = memory["u"] = g + momentum * memory.get("u", 0.0)
        return p - 0.1 * u

    assert_close(trained(optim.sgd(0.1, momentum=momentum))[0][-1], by_hand(rule))


def test_matrices_are_told_by_the_letters_of_their_names():
    names = {
        "q_DHE": (4, 2, 2),
        "q_bias_HE": (2, 2),  # a bias has two axes where heads do
        "norm_D": (3, 4),  # stacked over layers, still a norm
        "norm_LD": (3, 4),
        "up_LDF": (3, 4, 5),
        "kernel": (4, 5),  # a foreign module's names have no letters
        "scale": (4,),
    }
    decayed = optim.matrices({name: jnp.zeros(shape) for name, shape in names.items()})
    assert {name for name, yes in decayed.items() if yes} == {"q_DHE", "up_LDF", "kernel"}


CORNERS = {
    # schedule: rates at step 0, end of warm-up, half-way of the decay, last step, beyond
    "constant": (optim.constant, {1: 0.4, 9: 2.0, 10: 2.0, 55: 2.0, 99: 2.0, 100: 2.0, 500: 2.0}),
    "linear": (
        partial(optim.linear, final=0.1),
        {0: 0.2, 9: 2.0, 10: 2.0, 55: 1.1, 99: 0.2 + 1.8 / 90, 100: 0.2, 500: 0.2},
    ),
    "cosine": (
        partial(optim.cosine, final=0.1),
        {
            0: 0.2,
            9: 2.0,
            10: 2.0,
            55: 1.1,
            99: 0.2 + 0.9 * (1 + np.cos(np.pi * 89 / 90)),
            100: 0.2,
            500: 0.2,
        },
    ),
    "wsd": (
        partial(optim.wsd, final=0.1, decay=0.2),
        {
            0: 0.2,
            9: 2.0,
            10: 2.0,
            79: 2.0,
            80: 2.0,
            90: 1.1,
            99: 0.2 + 1.8 / 20,
            100: 0.2,
            500: 0.2,
        },
    ),
}


@pytest.mark.parametrize("name", CORNERS)
def test_schedules_at_their_corners(name):
    schedule, expected = CORNERS[name]
    rate = jax.jit(schedule(2.0, STEPS, warmup=10))
    for step, value in expected.items():
        assert rate(step) == pytest.approx(value, rel=1e-6), step


@pytest.mark.parametrize("schedule", [optim.constant, optim.linear, optim.cosine, optim.wsd])
def test_no_update_is_wasted_and_the_peak_is_exact(schedule):
    steps = jnp.arange(STEPS)
    assert float(schedule(3e-4, STEPS)(0)) == np.float32(3e-4)
    assert float(schedule(3e-4, STEPS, warmup=7)(6)) == np.float32(3e-4)
    assert np.all(jax.vmap(schedule(3e-4, STEPS, warmup=7))(steps) > 0)
    longest = 80 if schedule is optim.wsd else STEPS
    assert np.all(jax.vmap(schedule(3e-4, STEPS, warmup=longest))(steps) > 0)


def test_decaying_schedules_end_at_exactly_zero():
    for schedule in (optim.linear, optim.cosine, optim.wsd):
        assert schedule(3e-4, STEPS, warmup=3)(STEPS) == 0.0


def test_the_average_follows_its_recursion_from_the_initial_parameters():
    options = Options(optimizer=optim.sgd, ema=0.75)
    path, state = trained(optim.transformation(options, STEPS))
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), path[0])
    for params in path[1:]:
        expected = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * np.asarray(p), expected, params)
    assert_close(optim.averaged(state), expected)


def test_the_average_of_resting_parameters_rests_bit_for_bit():
    transform = optim.transformation(Options(optimizer=optim.sgd, ema=0.9), STEPS)
    params = weights()
    state = transform.init(params)
    still = jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        _, state = transform.update(still, state, params)
    jax.tree.map(np.testing.assert_array_equal, optim.averaged(state), params)


def test_without_ema_there_is_no_average():
    transform = optim.transformation(Options(), STEPS)
    assert optim.averaged(transform.init(weights())) is None


def test_clipping_is_by_the_global_norm():
    gradient = weights(3)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    assert norm > 0.5
    sgd = Options(optimizer=optim.sgd, learning_rate=3.0)
    for clip, factor in ((0.5, 0.5 / norm), (2 * norm, 1.0), (None, 1.0)):
        transform = optim.transformation(Options(**{**vars(sgd), "clip": clip}), STEPS)
        updates, _ = transform.update(gradient, transform.init(gradient), gradient)
        assert_close(updates, jax.tree.map(lambda g, f=factor: -3 * f * np.asarray(g), gradient))


def test_transformation_takes_the_rate_of_the_schedule():
    options = Options(optimizer=optim.sgd, schedule=optim.linear, learning_rate=2.0, warmup=2)
    transform = optim.transformation(options, 4)
    gradient: Any = {"x_D": jnp.ones(1)}
    state = transform.init(gradient)
    for step, expected in enumerate([1.0, 2.0, 2.0, 1.0, 0.0]):
        updates, state = transform.update(gradient, state, gradient)
        assert -jax.tree.leaves(updates)[0][0] == expected == optim.rate(options, 4)(step)


def test_state_is_safe_to_donate():
    transform = optim.transformation(Options(ema=0.9), STEPS)
    params = weights()
    for init in (transform.init, jax.jit(transform.init)):
        state = init(params)
        held = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
        assert len(set(held)) == len(held)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, gradient):
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(3):
        params, state = update(params, state, weights(seed))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, state)))


def test_learning_rates_may_be_traced():
    def stepped(rate, options):
        transform = optim.transformation(Options(**{**vars(options), "learning_rate": rate}), STEPS)
        params = weights()
        updates, _ = transform.update(weights(1), transform.init(params), params)
        return updates

    for schedule in (optim.constant, optim.wsd):
        options = Options(schedule=schedule, warmup=2, clip=1.0, ema=0.5)
        rates = jnp.asarray([1e-3, 1e-2])
        swept = jax.jit(jax.vmap(partial(stepped, options=options)))(rates)
        for index, rate in enumerate(rates):
            alone = stepped(float(rate), options)
            assert_close(jax.tree.map(lambda u, i=index: u[i], swept), alone)
    direct = jax.jit(
        lambda rate: optim.sgd(rate).update({"x": jnp.ones(1)}, optim.sgd(rate).init({}))
    )
    assert direct(0.5)[0]["x"][0] == -0.5


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"warmup": 101}, "warmup=101"),
        ({"warmup": -1}, "warmup=-1"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"ema": 0.0}, "ema=0.0"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"schedule": partial(optim.wsd, decay=1.5)}, "decay=1.5"),
        ({"schedule": partial(optim.wsd, decay=0.5), "warmup": 60}, "inside the warm-up of 60"),
        ({"schedule": partial(optim.wsd), "warmup": 101}, "warmup=101"),
        ({"schedule": partial(optim.cosine, final=-0.1)}, "final=-0.1"),
        ({"optimizer": partial(optim.adamw, weight_decay=-0.1)}, "weight_decay=-0.1"),
        ({"optimizer": partial(optim.rmsprop, decay=1.0)}, "decay=1.0"),
        ({"optimizer": partial(optim.sgd, momentum=-0.5)}, "momentum=-0.5"),
    ],
)
def test_impossible_values_are_refused_by_name(values, says):
    with pytest.raises(BadInput, match=says.replace(".", r"\.")):
        optim.transformation(Options(**values), STEPS)


def test_a_negative_rate_is_refused_without_a_schedule_too():
    for optimizer in (optim.adamw, optim.rmsprop, optim.sgd):
        with pytest.raises(BadInput, match="learning_rate=-1"):
            optimizer(-1)


def test_only_moves_the_named_parameters_as_the_optimizer_alone_would():
    rate = 0.1
    whole, _ = trained(optim.adamw(rate, weight_decay=0.5))
    path, _ = trained(
        optim.only(rate, names=("embed_VD",), optimizer=partial(optim.adamw, weight_decay=0.5))
    )
    # two programs, fused differently: float32 rounding
    np.testing.assert_allclose(path[-1]["embed_VD"], whole[-1]["embed_VD"], rtol=5e-6)
    for name in ("q_DHE", "norm_D"):
        np.testing.assert_array_equal(path[-1]["layers"][name], weights()["layers"][name])


def test_only_refuses_names_that_no_parameter_has():
    with pytest.raises(BadInput, match=r"embed_VT.*there are embed_VD, norm_D, q_DHE"):
        optim.only(0.1, names=("embed_VT",)).init(weights())
