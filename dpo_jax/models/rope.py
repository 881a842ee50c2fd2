"""Rotary positions (Su et al. 2104.09864), and the ways to stretch them beyond what was trained."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.schedule import platform
from dpo_jax.structs import BadInput, precise

Kind = Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
Turn = tuple[jax.Array, jax.Array]  # cos and sin, (R, T, 1, half the turned width)


@dataclass(frozen=True)
class Scaling:
    """How rotary frequencies change for texts longer than those of the training.

    linear    every frequency divided by `factor` (Chen et al. 2306.15595)
    dynamic   a larger base, as far as the text is longer than `original` ("NTK-aware")
    llama3    only wavelengths above original / high, all above original / low (2407.21783)
    yarn      a ramp between the dimensions that turn `fast` and `slow` times (2309.00071)
    longrope  factors found by search, `short` up to `original` positions, else `long` (2402.13753)

    A kind without meaning for one of these leaves it at its default. The text of dynamic and
    longrope is the group, prompt and responses, so that packing changes nothing; with a cache it is
    what has been read so far, and earlier keys stay as they were turned.
    """

    kind: Kind
    factor: float = 1.0
    original: int = 0  # positions the base was trained on
    low: float = 1.0
    high: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True  # the ends of yarn's ramp become whole numbers
    attention: float | None = None  # what queries and keys are multiplied by; None = by the paper
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("short", "long"):  # lists, as JSON has them
            object.__setattr__(self, name, tuple(getattr(self, name)))


USES = {  # beside kind
    "linear": {"factor"},
    "dynamic": {"factor", "original"},
    "llama3": {"factor", "original", "low", "high"},
    "yarn": {"factor", "original", "fast", "slow", "truncate", "attention"},
    "longrope": {"factor", "original", "attention", "short", "long"},
}


def check(scaling: Scaling, width: int) -> None:
    """Raises BadInput for a scaling that cannot be, or an option that its kind does not read."""
    where, kind = "model.rope_scaling", scaling.kind
    if kind not in USES:
        raise BadInput(f"{where}.kind={kind!r}: {', '.join(get_args(Kind))} are known")
    for each in fields(Scaling)[1:]:
        value = getattr(scaling, each.name)
        if each.name not in USES[kind] and value != each.default:
            raise BadInput(
                f"{where}.{each.name}={value} has no effect on kind {kind}: leave it out"
            )
    if scaling.factor < 1 or ("original" in USES[kind] and scaling.original < 1):
        raise BadInput(f"{where}: {kind} wants factor >= 1 and original, the positions trained on")
    if kind == "llama3" and not scaling.low < scaling.high:
        raise BadInput(f"{where}.low={scaling.low} must be less than {where}.high={scaling.high}")
    if kind == "dynamic" and width < 4:
        raise BadInput(f"{where}.kind=dynamic wants heads that turn 4 places or more, not {width}")
    for name in ("short", "long") if kind == "longrope" else ():
        count, pairs = len(getattr(scaling, name)), -(-width // 2)
        if count != pairs:
            raise BadInput(f"{where}.{name} has {count} factors for {pairs} pairs that turn")


def rotary(positions_RT: jax.Array, E: int, base: float, scaling: Scaling | None = None) -> Turn:
    """cos and sin of RoPE (2104.09864, eq. 34), (R, T, 1, E / 2). E: how much of a head turns."""
    power = np.arange(0, E, 2) / E
    if scaling is None:
        return _turned(positions_RT, base**-power)
    if scaling.kind in LENGTHENED:
        length_RT = jnp.maximum(longest(positions_RT) + 1, scaling.original)
        frequency = LENGTHENED[scaling.kind](scaling, E, base, power, length_RT[:, :, None])
    else:
        frequency = STATIC[scaling.kind](scaling, E, base, base**-power)
    return _turned(positions_RT, frequency, _attention(scaling))


def _turned(positions_RT: jax.Array, frequency: Any, factor: float = 1.0) -> Turn:
    axes = "rte" if frequency.ndim == 3 else "e"

    def turn() -> Turn:
        angle = jnp.einsum(
            f"rt,{axes}->rte", positions_RT.astype(float), jnp.asarray(frequency, float)
        )[:, :, None]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    return made_once(turn, jnp.max(positions_RT) >= 0)


def made_once(make: Callable[[], Any], holds: jax.Array) -> Any:
    """make(), which on a CPU every reader would otherwise make again for itself: XLA fuses it into
    each (cos and sin 32 times a step of four layers). holds: what is always true, and XLA cannot
    know it; behind it nothing is fused."""
    if platform() != "cpu":
        return make()
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make))
    return jax.lax.cond(holds, make, lambda: zeros)


def rotate(x_RTHE: jax.Array, turn: Turn) -> jax.Array:
    """Turn the two halves of every head by its position (the layout of Hugging Face's Llama).

    What of a head is wider than the turn stays as it is.
    """
    cos, sin = turn
    half = cos.shape[-1]
    first, second, rest = jnp.split(precise(x_RTHE), (half, 2 * half), axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    turned += [rest] if rest.shape[-1] else []
    return jnp.concatenate(turned, axis=-1).astype(x_RTHE.dtype)


def still(positions_RT: jax.Array, E: int) -> Turn:
    """The turn that leaves everything where it is, for layers without positions."""
    cos = jnp.ones((*positions_RT.shape, 1, -(-E // 2)))
    return cos, jnp.zeros_like(cos)


def longest(positions_RT: jax.Array) -> jax.Array:
    """The largest position of the group that a place belongs to; every group starts at 0."""
    group_RT = jnp.cumsum(positions_RT == 0, axis=1)
    count = positions_RT.shape[1] + 1

    def of_row(position_T, group_T):
        return jax.ops.segment_max(position_T, group_T, num_segments=count)[group_T]

    return jax.vmap(of_row)(positions_RT, group_RT)


# Frequencies, as transformers' modeling_rope_utils has them


def _linear(scaling: Scaling, E: int, base: float, frequency: np.ndarray) -> np.ndarray:
    return frequency / scaling.factor


def _llama3(scaling: Scaling, E: int, base: float, frequency: np.ndarray) -> np.ndarray:
    turns = scaling.original * frequency / (2 * np.pi)  # within the text of the training
    share = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (1 - share) * frequency / scaling.factor + share * frequency


def _yarn(scaling: Scaling, E: int, base: float, frequency: np.ndarray) -> np.ndarray:
    def dimension(turns: float) -> float:
        """The one that turns so often within the text of the training."""
        return E * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(scaling.fast), dimension(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, E - 1)
    last += 0.001 if first == last else 0
    ramp = np.clip((np.arange(E // 2) - first) / (last - first), 0, 1)
    return ramp * frequency / scaling.factor + (1 - ramp) * frequency


def _dynamic(
    scaling: Scaling, E: int, base: float, power: np.ndarray, length: jax.Array
) -> jax.Array:
    factor = scaling.factor
    stretch = factor * length / scaling.original - (factor - 1)
    return (base * stretch ** (E / (E - 2))) ** -power[None, None]


def _longrope(
    scaling: Scaling, E: int, base: float, power: np.ndarray, length: jax.Array
) -> jax.Array:
    short, long = (np.array(factors)[None, None] for factors in (scaling.short, scaling.long))
    return 1 / (jnp.where(length > scaling.original, long, short) * base ** power[None, None])


STATIC: dict[str, Callable[..., np.ndarray]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
LENGTHENED: dict[str, Callable[..., jax.Array]] = {"dynamic": _dynamic, "longrope": _longrope}


def _attention(scaling: Scaling) -> float:
    if scaling.kind not in ("yarn", "longrope") or scaling.factor <= 1:
        return 1.0 if scaling.attention is None else scaling.attention
    if scaling.attention is not None:
        return scaling.attention
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original))
