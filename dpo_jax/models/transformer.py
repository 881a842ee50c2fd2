"""One decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU, layers under one scan."""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax.models.attention import attention
from dpo_jax.parallel import constrain
from dpo_jax.structs import BadInput, Model, Params, precise

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


UNROLLED = 4  # layers; a loop this short costs more than its compilation saves


@dataclass(frozen=True)
class Config:
    """A decoder's architecture; the letters are those of the axis glossary."""

    V: int  # vocabulary
    D: int  # model width
    L: int  # layers
    H: int  # query heads
    J: int  # key/value heads
    E: int  # head width
    F: int  # mlp width
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True  # the head is the embedding


@struct.dataclass
class Cache:
    """Keys and values of S places; `index` is the first free one."""

    k_LRSJE: jax.Array
    v_LRSJE: jax.Array
    until_RS: jax.Array
    index: jax.Array


def stored(dtype: Any) -> Any:
    """The dtype of parameters and logits of a computation in `dtype`: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32 or better; returns the dtype of x."""
    wide = precise(x)
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normal * jnp.broadcast_to(precise(scale_D), x.shape)).astype(x.dtype)


def rotary(positions_RT: jax.Array, E: int, base: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of RoPE (Su et al. 2104.09864, eq. 34), (R, T, 1, E / 2)."""
    frequency = base ** (-jnp.arange(0.0, E, 2) / E)
    angle = jnp.einsum("rt,e->rte", positions_RT.astype(float), frequency)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_RTHE: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the two halves of every head by its position (the layout of Hugging Face's Llama)."""
    cos, sin = turn
    first, second = jnp.split(precise(x_RTHE), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_RTHE.dtype)


class Block(nn.Module):
    """One layer of the scan; the cache of all layers is carried, so that it is written in place."""

    config: Config
    dtype: Any

    def weight(self, name: str, scale: float = 1.0) -> jax.Array:
        shape = tuple(getattr(self.config, axis) for axis in name.rpartition("_")[2])
        init = nn.initializers.ones
        if len(shape) > 1:  # what is summed over: D, or H and E, or F
            fan_in = shape[0] if name[-1] != "D" else math.prod(shape[:-1])
            init = nn.initializers.normal(scale * fan_in**-0.5)
        return self.param(name, init, shape, stored(self.dtype)).astype(self.dtype)

    @nn.compact
    def __call__(self, carry, layer, turn, until_RS, index):
        c, residual = self.config, (2 * self.config.L) ** -0.5
        x_RTD, cache = carry
        normal = rms_norm(x_RTD, self.weight("attention_norm_D"), c.norm_eps)
        q = rotate(jnp.einsum("rtd,dhe->rthe", normal, self.weight("q_DHE")), turn)
        k = rotate(jnp.einsum("rtd,dje->rtje", normal, self.weight("k_DJE")), turn)
        v = jnp.einsum("rtd,dje->rtje", normal, self.weight("v_DJE"))
        if cache is not None:
            start = [jnp.int32(i) for i in (layer, 0, index, 0, 0)]
            cache = tuple(
                jax.lax.dynamic_update_slice(all_LRSJE, new[None], start)
                for all_LRSJE, new in zip(cache, (k, v), strict=True)
            )
            k, v = (all_LRSJE[layer] for all_LRSJE in cache)
        seen = attention(q, k, v, until_RS, offset=index)
        x_RTD = x_RTD + jnp.einsum("rthe,hed->rtd", seen, self.weight("o_HED", residual))
        normal = rms_norm(x_RTD, self.weight("mlp_norm_D"), c.norm_eps)
        gate = jax.nn.silu(jnp.einsum("rtd,df->rtf", normal, self.weight("gate_DF")))
        up = jnp.einsum("rtd,df->rtf", normal, self.weight("up_DF"))
        x_RTD = x_RTD + jnp.einsum("rtf,fd->rtd", gate * up, self.weight("down_FD", residual))
        return (constrain(x_RTD, "R--"), cache), None


class Decoder(nn.Module):
    """Embedding, the scanned layers, final norm."""

    config: Config
    dtype: Any
    remat: str

    def setup(self):
        c, init = self.config, nn.initializers.normal(self.config.D**-0.5)
        kind = stored(self.dtype)
        self.embed_VD = self.param("embed_VD", init, (c.V, c.D), kind)
        self.final_norm_D = self.param("final_norm_D", nn.initializers.ones, (c.D,), kind)
        if not c.tied:
            self.unembed_DV = self.param("unembed_DV", init, (c.D, c.V), kind)
        policy = REMAT[self.remat]
        block = nn.remat(Block, policy=policy, prevent_cse=False) if policy else Block
        scanned: Any = nn.scan
        self.layers = scanned(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.L,
            unroll=c.L if c.L <= UNROLLED else 1,
        )(c, self.dtype)

    def __call__(self, tokens_RT, positions_RT, until_RT, cache=None):
        c = self.config
        # the gather wants the table whole along D: fsdp shards are fetched, not the activations
        table_VD = constrain(self.embed_VD, "V-").astype(self.dtype)
        x_RTD = constrain(jnp.take(table_VD, tokens_RT, axis=0), "R--")
        turn, layers_L = rotary(positions_RT, c.E, c.rope_base), jnp.arange(c.L)
        if cache is None:
            (x_RTD, _), _ = self.layers((x_RTD, None), layers_L, turn, until_RT, 0)
        else:
            if isinstance(cache, int):
                cache = self.empty_cache(tokens_RT.shape[0], cache)
            seen_RS = jax.lax.dynamic_update_slice_in_dim(
                cache.until_RS, until_RT, cache.index, axis=1
            )
            carry = (x_RTD, (cache.k_LRSJE, cache.v_LRSJE))
            (x_RTD, (k_LRSJE, v_LRSJE)), _ = self.layers(
                carry, layers_L, turn, seen_RS, cache.index
            )
            cache = Cache(k_LRSJE, v_LRSJE, seen_RS, cache.index + tokens_RT.shape[1])
        return rms_norm(x_RTD, self.final_norm_D, c.norm_eps), cache

    def empty_cache(self, rows: int, places: int) -> Cache:
        c = self.config
        k_LRSJE = jnp.zeros((c.L, rows, places, c.J, c.E), self.dtype)
        until_RS = jnp.zeros((rows, places), jnp.int32)
        return Cache(k_LRSJE, k_LRSJE, until_RS, jnp.int32(0))

    def unembed(self, hidden):
        wide = stored(self.dtype)
        if self.config.tied:
            table_VD = self.embed_VD.astype(self.dtype)
            return jnp.einsum("...d,vd->...v", hidden, table_VD, preferred_element_type=wide)
        table_DV = self.unembed_DV.astype(self.dtype)
        return jnp.einsum("...d,dv->...v", hidden, table_DV, preferred_element_type=wide)


def decoder(config: Config, *, dtype: str = "float32", remat: str = "none") -> Model:
    """The decoder as a Model over a plain dict of float32 parameters named by their axes.

    dtype: of the computation, "float32", "bfloat16" or, where JAX_ENABLE_X64 is set, "float64",
    parameters included; softmax, norms and logits are float32 or better.
    remat: "none", "dots" (keep matrix products) or "full" (recompute every layer).
    `hidden(params, tokens_RT, positions_RT, until_RT, cache=None) -> (hidden_RTD, cache)`; an
    integer cache opens one of that many places, a returned cache continues it.
    Raises: BadInput for heads that do not divide, an odd head width, unknown dtype or remat.
    """
    if config.H % config.J:
        raise BadInput(f"model.H={config.H} must be a multiple of model.J={config.J}")
    if config.E % 2:
        raise BadInput(f"model.E={config.E} must be even: RoPE turns pairs")
    if dtype not in ("float32", "bfloat16", "float64"):
        raise BadInput(f"run.dtype={dtype!r}: float32, bfloat16 and float64 are known")
    if dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise BadInput("run.dtype=float64 wants JAX_ENABLE_X64=1 in the environment")
    if remat not in REMAT:
        raise BadInput(f"run.remat={remat!r}: {', '.join(REMAT)} are known")
    module = Decoder(config, jnp.dtype(dtype), remat)

    def init(key: jax.Array) -> Params:
        one_RT = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, one_RT, one_RT, one_RT + 1)["params"]

    def hidden(params, tokens_RT, positions_RT, until_RT, cache=None):
        return module.apply({"params": params}, tokens_RT, positions_RT, until_RT, cache)

    def unembed(params, hidden) -> Any:
        return module.apply({"params": params}, hidden, method=Decoder.unembed)

    return Model(init, hidden, unembed)
