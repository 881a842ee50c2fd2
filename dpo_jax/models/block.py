"""A layer of the decoder, and the norms and products it is made of."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models import lora as low_rank
from dpo_jax.models.asked import Asked, spread, take
from dpo_jax.models.attention import attention, dense
from dpo_jax.models.lora import Lora
from dpo_jax.models.rope import Turn, rotate
from dpo_jax.models.schedule import Schedule
from dpo_jax.parallel import constrain
from dpo_jax.structs import precise

if TYPE_CHECKING:
    from dpo_jax.models.transformer import Config

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Shared(NamedTuple):
    """What all layers read: the turns of `Config.kinds`, and where queries and keys stand.

    plan: of the blocks of whole rows; None where the keys are those of a cache, S places.
    asked: the places whose output is read; None = all.
    """

    turns: list[Turn]
    until_RS: jax.Array
    position_RT: jax.Array
    position_RS: jax.Array
    index: jax.Array | int
    plan: Schedule | None
    asked: Asked | None = None


class Layer(NamedTuple):
    """What is scanned; None where all layers are alike, the index where each has its own cache."""

    index_L: jax.Array | None
    window_L: jax.Array | None
    rope_L: jax.Array | None

    def own(self, kept: jax.Array) -> jax.Array:
        """The keys or values of this layer, RJSE, of a cache of one layer or of all."""
        return kept if self.index_L is None else kept[self.index_L]

    def put(self, kept: jax.Array, new_RJTE: jax.Array, place: jax.Array | int) -> jax.Array:
        """A cache of one layer or of all with T new places from `place` on."""
        start = (0, 0, place, 0) if self.index_L is None else (self.index_L, 0, 0, place, 0)
        new = new_RJTE if self.index_L is None else new_RJTE[None]
        return jax.lax.dynamic_update_slice(kept, new, [jnp.int32(i) for i in start])


def stored(dtype: Any) -> Any:
    """The dtype of parameters and logits of a computation in `dtype`: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32 or better; returns the dtype of x."""
    return norm(x, scale_D, None, eps)


def norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Over the axes of `scale`, the last ones, in float32 or better; returns the dtype of x.

    x / rms(x) * scale (RMSNorm, 1910.07467), or with a bias (x - mean) / std * scale + bias
    (LayerNorm, 1607.06450).
    """
    wide, axes = precise(x), tuple(range(-scale.ndim, 0))
    if bias is not None:
        wide = wide - jnp.mean(wide, axis=axes, keepdims=True)
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + eps)
    normal = normal * jnp.broadcast_to(precise(scale), x.shape)
    if bias is not None:
        normal = normal + jnp.broadcast_to(precise(bias), x.shape)
    return normal.astype(x.dtype)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap); x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@partial(jax.checkpoint, static_argnums=0)
def activated(
    act: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array | None = None
) -> jax.Array:
    """act(gate), times `up` where there is one. What lies in between is as wide as the MLP and
    cheap: it is made again on the way back, not kept."""
    return act(gate) if up is None else act(gate) * up


class Block(nn.Module):
    """One layer of the scan; the cache of all layers is carried, so that it is written in place.

    Parameters are made from their names: the letters at the end are the shape. Adapters, which
    `lora` scales, stand in a collection of that name; without it there are none.
    """

    config: "Config"
    dtype: Any
    lora: Lora | None = None

    def leaf(self, name: str, init: Callable[..., jax.Array]) -> jax.Array:
        shape = tuple(getattr(self.config, axis) for axis in name.rpartition("_")[2])
        return self.param(name, init, shape, stored(self.dtype)).astype(self.dtype)

    def weight(self, name: str, scale: float = 1.0) -> jax.Array:
        axes = name.rpartition("_")[2]  # what is summed over: D, or H and E, or F
        summed = axes[:1] if axes[-1] != "D" else axes[:-1]
        fan_in = math.prod(getattr(self.config, axis) for axis in summed)
        return self.leaf(name, nn.initializers.normal(scale * fan_in**-0.5))

    def norm(self, x: jax.Array, name: str, axes: str = "D") -> jax.Array:
        c = self.config
        scale = self.leaf(f"{name}_{axes}", nn.initializers.constant(1 - c.norm_offset))
        bias = None
        if c.norm == "layer":
            bias = self.leaf(f"{name}_bias_{axes}", nn.initializers.zeros)
        scale = precise(scale) + c.norm_offset if c.norm_offset else scale
        return norm(x, scale, bias, c.norm_eps)

    def product(self, equation: str, x: jax.Array, name: str, bias: bool) -> jax.Array:
        """x_RT... times a weight; what writes to the residual stream starts small.

        The tokens of all rows stand on one line: summed over two axes, the product that gives the
        weight's gradient would first transpose all that flows back.
        """
        tokens, equation = x.shape[:2], equation.replace("rt", "n")
        x = x.reshape(-1, *x.shape[2:])
        small = (2 * self.config.L) ** -0.5 if name[-1] == "D" else 1.0
        y = jnp.einsum(equation, x, self.weight(name, small))
        each = low_rank.factors(name)
        if self.lora is not None and self.has_variable("lora", each.a):
            a, b = (self.get_variable("lora", leaf).astype(self.dtype) for leaf in (each.a, each.b))
            y = y + low_rank.delta(equation, x, a, b, self.lora.scale)
        if bias:
            stem, _, axes = name.rpartition("_")
            axes = axes[1:] if axes[-1] != "D" else "D"
            own = self.leaf(f"{stem}_bias_{axes}", nn.initializers.zeros)
            y = y + jnp.broadcast_to(own, y.shape)
        return y.reshape(*tokens, *y.shape[1:])

    def attend(self, x_RTD, cache, layer: Layer, shared: Shared):
        c = self.config
        q = self.product("rtd,dhe->rthe", take(x_RTD, shared.asked), "q_DHE", c.qkv_bias)
        q = spread(q, shared.asked)
        k = self.product("rtd,dje->rtje", x_RTD, "k_DJE", c.qkv_bias)
        v = self.product("rtd,dje->rtje", x_RTD, "v_DJE", c.qkv_bias)
        if c.qk_norm != "none":
            whole = c.qk_norm == "whole"
            q = self.norm(q, "q_norm", "HE" if whole else "E")
            k = self.norm(k, "k_norm", "JE" if whole else "E")
        if shared.turns:
            turn = shared.turns[0]
            if layer.rope_L is not None:
                turn = jax.tree.map(lambda *kinds: jnp.stack(kinds)[layer.rope_L], *shared.turns)
            q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            cache = tuple(
                layer.put(kept, jnp.moveaxis(new, 1, 2), shared.index)
                for kept, new in zip(cache, (k, v), strict=True)
            )
        options: dict[str, Any] = {
            "window": layer.window_L,
            "positions": (shared.position_RT, shared.position_RS),
            "softcap": c.score_cap,
            "scale": (c.score_width or c.E) ** -0.5,
        }
        if cache is None or shared.plan is not None:  # a cache that is only now opened is empty
            seen = attention(q, k, v, shared.until_RS, plan=shared.plan, **options)
        else:
            k, v = (jnp.moveaxis(layer.own(kept), 1, 2) for kept in cache)
            seen = dense(q, k, v, shared.until_RS, offset=shared.index, **options)
        seen = take(seen, shared.asked)
        return self.product("rthe,hed->rtd", seen, "o_HED", c.o_bias), cache

    def mlp(self, x_RTD):
        c = self.config
        names = ("gate_DF", "up_DF") if c.gated else ("up_DF",)
        made = [self.product("rtd,df->rtf", x_RTD, name, c.mlp_bias) for name in names]
        wide_RTF = activated(ACTIVATIONS[c.activation], *made)
        return self.product("rtf,fd->rtd", wide_RTF, "down_FD", c.mlp_bias)

    @nn.compact
    def __call__(self, carry, layer: Layer, shared: Shared):
        c = self.config
        x_RTD, cache = carry

        def before(x, name):
            return self.norm(x, f"{name}_norm") if c.norm_place != "after" else x

        def after(y, name):
            return self.norm(y, f"after_{name}_norm") if c.norm_place != "before" else y

        seen, cache = self.attend(before(x_RTD, "attention"), cache, layer, shared)
        x_RTD = take(x_RTD, shared.asked)
        seen_RTD = x_RTD + after(seen, "attention")
        made = self.mlp(before(x_RTD if c.parallel else seen_RTD, "mlp"))
        return (constrain(seen_RTD + after(made, "mlp"), "R--"), cache), None
