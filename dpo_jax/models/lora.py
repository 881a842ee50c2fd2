"""Adapters of low rank (LoRA, Hu et al. 2106.09685): a second, small tree beside frozen weights.

    y = x W + (alpha / rank) (x A) B        W frozen; A (in, Z) and B (Z, out) are trained

W + A B is never made in a step. The weights of an adapted model are {"base": the decoder's,
"lora": {"layers": {"q_a_DZ": ..., "q_b_ZHE": ...}}}, stacked over the layers as the decoder's are,
and what heads stand beside them. B starts at zero, so that the first step sees the base alone.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from dpo_jax.structs import BadInput, Key, Params, precise

if TYPE_CHECKING:
    from dpo_jax.models.transformer import Config

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
WEIGHTS = {  # of a layer, by target
    "q": "q_DHE",
    "k": "k_DJE",
    "v": "v_DJE",
    "o": "o_HED",
    "gate": "gate_DF",
    "up": "up_DF",
    "down": "down_FD",
}


@dataclass(frozen=True)
class Lora:
    """Which matrices get an adapter, of what rank; it is scaled by alpha / rank. No dropout.

    targets: of q, k, v, o, gate, up and down; None = all that the model has, which is what it
    takes to keep up with training all weights (Dettmers et al. 2305.14314, section 4).
    Raises: BadInput for a rank below 1, an alpha that is not above 0, an unknown target.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[Target, ...] | None = None

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise BadInput(f"lora.rank={self.rank}: give a whole number, 1 or more")
        if isinstance(self.alpha, bool) or not 0 < self.alpha < math.inf:
            raise BadInput(f"lora.alpha={self.alpha}: give a number above 0")
        object.__setattr__(self, "alpha", float(self.alpha))
        if self.targets is None:
            return
        known = get_args(Target)
        if not self.targets or not set(self.targets) <= set(known):
            raise BadInput(f"lora.targets={self.targets}: give some of {', '.join(known)}, or None")
        # one order of them, whatever JSON or a user made
        object.__setattr__(self, "targets", tuple(x for x in known if x in self.targets))

    @property
    def scale(self) -> float:
        """What the product x A B is multiplied by."""
        return self.alpha / self.rank


class Adapter(NamedTuple):
    """The two factors of one target: names as they are stored, and the axes they map between."""

    target: str
    a: str
    b: str
    into: str  # axes that are summed over
    out: str


def factors(weight: str) -> Adapter:
    """The adapter of a matrix of the decoder, by the name of its weight, as q_DHE."""
    target, _, axes = weight.rpartition("_")
    into, out = (axes[:-1], "D") if axes[-1] == "D" else (axes[:1], axes[1:])
    return Adapter(target, f"{target}_a_{into}Z", f"{target}_b_Z{out}", into, out)


def adapters(lora: Lora, config: "Config") -> list[Adapter]:
    """The adapters of a model. Raises: BadInput for a target that the model does not have."""
    there = [target for target in WEIGHTS if config.gated or target != "gate"]
    for target in lora.targets or ():
        if target not in there:
            raise BadInput(f"lora.targets: this model has no {target}, it has {', '.join(there)}")
    chosen = there if lora.targets is None else [each for each in there if each in lora.targets]
    return [factors(WEIGHTS[target]) for target in chosen]


def alike(one: Lora, other: Lora, config: "Config") -> bool:
    """Whether two are the same adapters to a model, however their targets are said."""
    same = (one.rank, one.alpha) == (other.rank, other.alpha)
    return same and adapters(one, config) == adapters(other, config)


def start(lora: Lora, config: "Config", key: Key, dtype: Any = jnp.float32) -> Params:
    """Adapters that change nothing yet: A uniform within 1 / sqrt(fan in), as PEFT's, B zero."""
    chosen, layers = adapters(lora, config), {}
    for each, own in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        wide = [getattr(config, axis) for axis in each.into]
        narrow = [getattr(config, axis) for axis in each.out]
        bound, shape = math.prod(wide) ** -0.5, (config.L, *wide, lora.rank)
        layers[each.a] = jax.random.uniform(own, shape, dtype, -bound, bound)
        layers[each.b] = jnp.zeros((config.L, lora.rank, *narrow), dtype)
    return {"layers": layers}


def delta(equation: str, x: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """scale (x A) B, where `equation` is that of the product with the whole weight."""
    terms, out = equation.split("->")
    given, whole = terms.split(",")
    into = "".join(axis for axis in whole if axis in given)
    made = "".join(axis for axis in whole if axis not in given)
    kept = "".join(axis for axis in given if axis not in into)
    narrow = jnp.einsum(f"{given},{into}z->{kept}z", x, a) * scale
    return jnp.einsum(f"{kept}z,z{made}->{out}", narrow, b)


def merged(params: Params, lora: Lora) -> Params:
    """The plain weights that compute what base and adapters do: W + (alpha / rank) A B.

    params: {"base", "lora"} and heads, which stay as they are. The sum is made in float32 or
    better and comes back in the dtype of the base.
    """
    base, own = params["base"], params["lora"]["layers"]
    layers = dict(base["layers"])
    for weight in WEIGHTS.values():
        each = factors(weight)
        if each.a in own:
            layers[weight] = _sum(layers[weight], own[each.a], own[each.b], each, lora.scale)
    heads = {name: leaf for name, leaf in params.items() if name not in ("base", "lora")}
    return {**base, "layers": layers, **heads}


def _sum(weight: Any, a: Any, b: Any, each: Adapter, scale: float) -> jax.Array:
    wide, made = precise(weight), f"L{each.into}Z,LZ{each.out}->L{each.into}{each.out}"
    product = jnp.einsum(made, precise(a), precise(b), precision="highest")
    return (wide + scale * product).astype(weight.dtype)
