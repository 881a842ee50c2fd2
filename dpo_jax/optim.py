"""Optimizers, learning rate schedules and the moving average of the policy, as optax values.

A schedule is `(peak, steps, *, warmup=0, ...) -> (step -> rate)`: the warm-up rises as
peak * (step + 1) / warmup, so that no update is wasted at rate zero, and the decay ends at
`final` * peak where step == steps, one past the last update, for the same reason. Beyond that the
rate stays. Peaks (and learning rates) may be traced; everything else is a host value.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from dpo_jax.structs import BadInput, Params

Schedule = Callable[[Any], Any]


def _check(good: bool, option: str, value: Any, remedy: str) -> None:
    if not good:
        raise BadInput(f"optim: {option}={value} is impossible: {remedy}")


def _check_rate(option: str, rate: Any) -> None:
    # a traced rate has no value yet, a schedule checked its own peak
    if not callable(rate) and not isinstance(rate, Tracer):
        _check(bool(rate >= 0), option, rate, "give a rate of zero or more")


# Schedules


def _warmed(peak: Any, steps: int, warmup: int, share: Schedule) -> Schedule:
    """peak * (step + 1) / warmup before `warmup`, then peak * share(step)."""
    _check_rate("learning_rate", peak)
    _check(steps >= 1, "steps", steps, "train for at least one step")
    _check(0 <= warmup <= steps, "warmup", warmup, f"it lies between 0 and the {steps} steps")

    def rate(step):
        risen = (jnp.asarray(step) + 1) / max(warmup, 1)
        return peak * jnp.where(step < warmup, risen, share(step))

    return rate


def _progress(step: Any, start: int, steps: int) -> jax.Array:
    """0 until `start`, 1 from `steps` on, linear between."""
    return jnp.clip((jnp.asarray(step) - start) / max(steps - start, 1), 0.0, 1.0)


def _check_final(final: float) -> None:
    _check(final >= 0, "final", final, "it is a share of the peak, zero or more")


def constant(peak: Any, steps: int, *, warmup: int = 0) -> Schedule:
    """Warm-up, then the peak for ever."""
    return _warmed(peak, steps, warmup, lambda step: 1.0)


def linear(peak: Any, steps: int, *, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Warm-up, then a straight line from the peak to `final` * peak at step == steps."""
    _check_final(final)

    def share(step):
        done = _progress(step, warmup, steps)
        return (1.0 - done) + done * final

    return _warmed(peak, steps, warmup, share)


def cosine(peak: Any, steps: int, *, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Warm-up, then half a cosine from the peak to `final` * peak at step == steps."""
    _check_final(final)

    def share(step):
        left = 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(step, warmup, steps)))
        return left + (1.0 - left) * final

    return _warmed(peak, steps, warmup, share)


def wsd(
    peak: Any, steps: int, *, warmup: int = 0, final: float = 0.0, decay: float = 0.2
) -> Schedule:
    """Warm-up, stable, decay: the peak, then a line to `final` * peak over the last share `decay`.

    `decay` is a share of all steps, rounded to whole steps (at least one); it may not reach back
    into the warm-up.
    """
    _check_final(final)
    _check(0 < decay <= 1, "decay", decay, "it is a share of the steps, above 0 and at most 1")
    start = steps - max(round(decay * steps), 1)
    _check(
        start >= warmup or warmup > steps,  # too long a warm-up has its own message
        "decay",
        decay,
        f"the decay starts at step {start}, inside the warm-up of {warmup}; shorten one of them",
    )

    def share(step):
        done = _progress(step, start, steps)
        return (1.0 - done) + done * final

    return _warmed(peak, steps, warmup, share)


# Optimizers


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)


def _is_matrix(path: tuple, leaf: Any) -> bool:
    """Whether a parameter maps between axes, by its name: two axis letters or more, no bias.

    `L` does not count, it only stacks layers. A name without axis letters (a foreign module's) is
    judged by its number of dimensions.
    """
    words = _name(path).split("_")
    if "bias" in words:
        return False
    if len(words) > 1 and words[-1].isalpha() and words[-1].isupper():
        return len(words[-1].replace("L", "")) >= 2
    return leaf.ndim >= 2


def matrices(params: Params) -> Params:
    """True for every parameter that weight decay pulls on: matrices, not norms and biases."""
    return jax.tree_util.tree_map_with_path(_is_matrix, params)


def adamw(
    learning_rate: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (1711.05101): p <- p - rate * (mhat / (sqrt(vhat) + eps) + weight_decay * p).

    The decay is outside the moments and only on `matrices`. `learning_rate`: number or schedule.
    """
    _check_rate("learning_rate", learning_rate)
    _check(0 <= b1 < 1, "b1", b1, "it lies in [0, 1)")
    _check(0 <= b2 < 1, "b2", b2, "it lies in [0, 1)")
    _check(weight_decay >= 0, "weight_decay", weight_decay, "give zero or more")
    return optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices
    )


def rmsprop(
    learning_rate: Any, *, decay: float = 0.99, eps: float = 1e-8
) -> optax.GradientTransformation:
    """torch's RMSprop: v <- decay * v + (1 - decay) * g^2; p <- p - rate * g / (sqrt(v) + eps).

    The optimizer of the DPO paper; optax's own defaults differ in `decay` and put eps in the root.
    """
    _check_rate("learning_rate", learning_rate)
    _check(0 <= decay < 1, "decay", decay, "it lies in [0, 1)")
    return optax.rmsprop(learning_rate, decay=decay, eps=eps, eps_in_sqrt=False)


def sgd(learning_rate: Any, *, momentum: float = 0.0) -> optax.GradientTransformation:
    """Gradient descent: u <- g + momentum * u; p <- p - rate * u."""
    _check_rate("learning_rate", learning_rate)
    _check(0 <= momentum < 1, "momentum", momentum, "it lies in [0, 1)")
    return optax.sgd(learning_rate, momentum=momentum or None)


def only(
    learning_rate: Any,
    *,
    names: tuple[str, ...],
    optimizer: Callable[..., optax.GradientTransformation] = adamw,
) -> optax.GradientTransformation:
    """`optimizer` on the parameters of these names, as ("embed_VD",); the others stay.

    Raises: BadInput for a name that no parameter has.
    """

    def chosen(params: Params) -> Params:
        known = {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        unknown = set(names) - known
        _check(not unknown, "names", sorted(unknown), f"there are {', '.join(sorted(known))}")
        return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in names, params)

    def others(params: Params) -> Params:
        return jax.tree.map(lambda is_chosen: not is_chosen, chosen(params))

    return optax.chain(
        optax.masked(optimizer(learning_rate), chosen), optax.masked(optax.set_to_zero(), others)
    )


# The whole transformation


class Average(NamedTuple):
    """The moving average of the parameters, as the state of `moving_average`."""

    params: Params


def moving_average(decay: float) -> optax.GradientTransformation:
    """average <- decay * average + (1 - decay) * (params + updates), updates unchanged.

    It starts at the initial parameters, so there is no bias towards zero to undo. It has to be
    the last of a chain, where the updates are what is added to the parameters.
    """
    _check(0 < decay < 1, "ema", decay, "it lies between 0 and 1, for instance 0.999")

    def init(params):
        # a copy: the state is donated, and one buffer cannot be donated twice
        return Average(jax.tree.map(jnp.copy, params))

    def update(updates, state, params: Any = None):
        new = optax.apply_updates(params, updates)
        # this form leaves an average that equals the parameters bit for bit where it is
        average = jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), state.params, new)
        return updates, Average(average)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any) -> Params | None:
    """The averaged policy inside the state of `transformation`, None where none is kept."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, Average))
    return next((node.params for node in nodes if isinstance(node, Average)), None)


def rate(optim: Any, steps: int) -> Schedule:
    """The learning rate of every step, as `transformation` uses it."""
    return optim.schedule(optim.learning_rate, steps, warmup=optim.warmup)


def transformation(optim: Any, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, optimizer under its schedule, moving average of the policy.

    `optim` has the attributes optimizer, learning_rate, schedule, warmup, clip (None = off) and
    ema (None = off). BadInput for values no training can mean.
    """
    parts = [optim.optimizer(rate(optim, steps))]
    if optim.clip is not None:
        _check(
            optim.clip > 0, "clip", optim.clip, "give a norm above zero, or None for no clipping"
        )
        parts.insert(0, optax.clip_by_global_norm(optim.clip))
    if optim.ema is not None:
        parts.append(moving_average(optim.ema))
    return optax.chain(*parts)
