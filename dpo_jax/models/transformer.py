"""One decoder, configured into GPT-2, NeoX, Llama, Mistral, Qwen, Gemma, OLMo, Phi and SmolLM.

By default: RMSNorm, RoPE, grouped-query attention, SwiGLU. The parameters of all layers lie along
L; where layers differ (windows, rotary bases) the difference is an array along L as well. A few
layers run one after another, many under one scan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models import lora as low_rank
from dpo_jax.models import rope
from dpo_jax.models.asked import distinct, take
from dpo_jax.models.block import Block, Layer, Shared, capped, norm, rms_norm, stored
from dpo_jax.models.cache import Cache, dealt
from dpo_jax.models.lora import Lora
from dpo_jax.models.rope import Scaling, rotary, rotate
from dpo_jax.models.schedule import schedule
from dpo_jax.models.walk import SAVED
from dpo_jax.parallel import constrain
from dpo_jax.structs import BadInput, Model, Params, at_places

__all__ = ["Cache", "Config", "Scaling", "decoder", "rms_norm", "rotary", "rotate"]

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
UNROLLED = 8  # layers; a loop this short costs more than its compilation saves
FAR = 2**30  # the window of a layer without one, where others have one

T_ = TypeVar("T_")
Later = Annotated[T_, {"later": True}]  # an option added later: its default leaves digests alone
Rope = Literal["global", "local", "none"]


@dataclass(frozen=True)
class Config:
    """A decoder's architecture; the letters are those of the axis glossary.

    windows and ropes say something of every layer and begin anew when they are used up: Gemma 3 is
    windows=(512, 512, 512, 512, 512, 0), ropes=("local",) * 5 + ("global",).
    """

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
    P: Later[int] = 0  # positions it was made for, the rows of a learned table; 0 = not known
    family: Later[str] = "llama"  # the model_type that it is exported as
    positions: Later[Literal["rope", "learned"]] = "rope"
    rope_share: Later[float] = 1.0  # how much of a head turns
    rope_scaling: Later[Scaling | None] = None  # of the global rope
    local_rope_base: Later[float] = 10_000.0
    ropes: Later[tuple[Rope, ...]] = ("global",)
    windows: Later[tuple[int, ...]] = (0,)  # positions a layer sees, its own among them; 0 = all
    norm: Later[Literal["rms", "layer"]] = "rms"  # layer: mean taken off, scale and bias
    norm_offset: Later[float] = 0.0  # added to the scales of the norms (Gemma: 1)
    norm_place: Later[Literal["before", "after", "both"]] = "before"  # of attention and mlp
    qk_norm: Later[Literal["none", "head", "whole"]] = "none"  # of queries and keys
    parallel: Later[bool] = False  # attention and mlp read the same x
    gated: Later[bool] = True  # down(act(gate) * up), else down(act(up))
    activation: Later[Literal["silu", "gelu", "gelu_tanh", "relu"]] = "silu"
    qkv_bias: Later[bool] = False
    o_bias: Later[bool] = False
    mlp_bias: Later[bool] = False
    scaled_embedding: Later[bool] = False  # embeddings times sqrt(D)
    score_width: Later[float | None] = None  # scores are divided by its root; None = E
    score_cap: Later[float | None] = None  # cap * tanh(score / cap)
    logit_cap: Later[float | None] = None

    def __post_init__(self) -> None:
        for name in ("ropes", "windows"):  # what JSON made of tuples and of a Scaling
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", Scaling(**self.rope_scaling))

    @property
    def turned(self) -> int:
        """How many places of a head RoPE turns."""
        return int(self.E * self.rope_share)

    def of_layers(self, values: Sequence[Any]) -> list[Any]:
        """One value a layer."""
        return [values[layer % len(values)] for layer in range(self.L)]

    @property
    def kinds(self) -> list[str]:
        """The ropes that are used; a layer's is known by its place here."""
        return sorted(set(self.of_layers(self.ropes))) if self.positions == "rope" else []


class Decoder(nn.Module):
    """Embedding, the layers, final norm."""

    config: Config
    dtype: Any
    remat: str
    lora: Lora | None = None

    def setup(self):
        c, kind = self.config, stored(self.dtype)
        draw, zeros = nn.initializers.normal(c.D**-0.5), nn.initializers.zeros
        ones = nn.initializers.constant(1 - c.norm_offset)
        self.embed_VD = self.param("embed_VD", draw, (c.V, c.D), kind)
        self.final_norm_D = self.param("final_norm_D", ones, (c.D,), kind)
        if c.norm == "layer":
            self.final_norm_bias_D = self.param("final_norm_bias_D", zeros, (c.D,), kind)
        if c.positions == "learned":
            self.position_PD = self.param("position_PD", draw, (c.P, c.D), kind)
        if not c.tied:
            self.unembed_DV = self.param("unembed_DV", draw, (c.D, c.V), kind)
        scanned: Any = nn.scan
        self.layers = scanned(
            Block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.L,
        )(c, self.dtype, self.lora)

    def __call__(self, tokens_RT, positions_RT, until_RT, cache=None, at_RN=None):
        turns = [self.turn(kind, positions_RT) for kind in self.config.kinds]
        x_RTD = self.embed(tokens_RT, positions_RT)
        shared = Shared(turns, until_RT, positions_RT, positions_RT, 0, None)
        if cache is None or isinstance(cache, int):  # these places are all that they see
            shared = shared._replace(plan=schedule(until_RT))
        if cache is None:
            return self.through(x_RTD, None, shared, at_RN)[0], None
        if isinstance(cache, int):
            cache = self.empty_cache(tokens_RT.shape[0], cache)
        until_RS, position_RS = (
            jax.lax.dynamic_update_slice_in_dim(all_RS, new_RT, cache.index, axis=1)
            for all_RS, new_RT in ((cache.until_RS, until_RT), (cache.position_RS, positions_RT))
        )
        if shared.plan is None:
            shared = Shared(turns, until_RS, positions_RT, position_RS, cache.index, None)
        parts = list(zip(cache.k_RJSE, cache.v_RJSE, strict=True))
        hidden, parts = self.through(x_RTD, parts, shared, at_RN)
        k_RJSE, v_RJSE = zip(*parts, strict=True)
        index = cache.index + tokens_RT.shape[1]
        return hidden, Cache(k_RJSE, v_RJSE, until_RS, position_RS, index)

    @property
    def looped(self) -> bool:
        """Whether the layers run under one scan, as many do. On a CPU, XLA undoes rematerialisation
        outside of a loop."""
        return self.config.L > UNROLLED or REMAT[self.remat] is not None

    def through(self, x_RTD, parts, shared: Shared, at_RN: jax.Array | None):
        """All layers and the final norm: (hidden_RTD or hidden_RND, the parts of the cache)."""
        L, each_layer = self.config.L, self.each_layer()
        if self.is_initializing():  # the scan draws the parameters of every layer
            return self.layers((x_RTD, None), each_layer, shared)[0]
        these, index_RN = (None, None) if at_RN is None else distinct(at_RN, x_RTD.shape[1])
        leaves = {kind: tree["layers"] for kind, tree in self.variables.items()}
        parts, run = parts or [None] * (1 if self.looped else L), self.layer()
        if self.looped:
            carry, each = (x_RTD, parts[0]), (leaves, each_layer)
            (x_RTD, parts[0]), _ = jax.lax.scan(partial(run, shared), carry, each)
            x_RTD = take(x_RTD, these)
        else:
            ones = {kind: one_by_one(tree, L) for kind, tree in leaves.items()}
            run = jax.jit(run)  # layers alike are traced once
            for layer, which in enumerate(one_by_one(each_layer, L)):
                own = shared._replace(asked=these) if layer == L - 1 else shared
                one = {kind: ones[kind][layer] for kind in ones}, which
                (x_RTD, parts[layer]), _ = run(own, (x_RTD, parts[layer]), one)
        x_RTD = self.final_norm(x_RTD)
        return (x_RTD if index_RN is None else at_places(x_RTD, index_RN)), parts

    def layer(self) -> Callable[..., Any]:
        """A layer as a function: (shared, carry, (parameters, Layer)) -> (carry, None)."""
        block = Block(self.config, self.dtype, self.lora, parent=None)

        def layer(shared, carry, each):
            return block.apply(each[0], carry, each[1], shared)

        policy = REMAT[self.remat]
        return jax.checkpoint(layer, policy=policy, prevent_cse=False) if policy else layer

    def turn(self, kind: str, positions_RT: jax.Array) -> rope.Turn:
        c = self.config
        if kind == "none":
            return rope.still(positions_RT, c.turned)
        if kind == "local":
            return rotary(positions_RT, c.turned, c.local_rope_base)
        return rotary(positions_RT, c.turned, c.rope_base, c.rope_scaling)

    def each_layer(self) -> Layer:
        c = self.config
        ropes = [c.kinds.index(kind) for kind in c.of_layers(c.ropes)] if c.kinds else []
        windows = [window or FAR for window in c.of_layers(c.windows)]
        return Layer(
            jnp.arange(c.L) if self.looped else None,
            jnp.array(windows, jnp.int32) if min(windows) < FAR else None,
            jnp.array(ropes, jnp.int32) if len(c.kinds) > 1 else None,
        )

    def embed(self, tokens_RT: jax.Array, positions_RT: jax.Array) -> jax.Array:
        # the gather wants the table whole along D: fsdp shards are fetched, not the activations
        table_VD = constrain(self.embed_VD, "V-").astype(self.dtype)
        x_RTD = jnp.take(table_VD, tokens_RT, axis=0)
        if self.config.scaled_embedding:
            x_RTD = x_RTD * jnp.asarray(self.config.D**0.5, x_RTD.dtype)
        if self.config.positions == "learned":
            table_PD = constrain(self.position_PD, "--").astype(self.dtype)
            x_RTD = x_RTD + jnp.take(table_PD, positions_RT, axis=0)  # NaN behind the last one
        return constrain(x_RTD, "R--")

    def final_norm(self, x_RTD: jax.Array) -> jax.Array:
        scale, bias = self.final_norm_D, None
        if self.config.norm == "layer":
            bias = self.final_norm_bias_D
        if self.config.norm_offset:
            scale = scale + self.config.norm_offset
        return norm(x_RTD, scale, bias, self.config.norm_eps)

    def empty_cache(self, rows: int, places: int) -> Cache:
        c = self.config
        one = jnp.zeros((rows, c.J, places, c.E), self.dtype)
        k_RJSE = (jnp.zeros((c.L, *one.shape), self.dtype),) if self.looped else (one,) * c.L
        none_RS = jnp.zeros((rows, places), jnp.int32)
        return Cache(k_RJSE, k_RJSE, none_RS, none_RS, jnp.int32(0))

    def unembed(self, hidden):
        wide = stored(self.dtype)
        if self.config.tied:
            table_VD = self.embed_VD.astype(self.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden, table_VD, preferred_element_type=wide)
        else:
            table_DV = self.unembed_DV.astype(self.dtype)
            logits = jnp.einsum("...d,dv->...v", hidden, table_DV, preferred_element_type=wide)
        return capped(logits, self.config.logit_cap)


def one_by_one(layers: Any, L: int) -> Sequence[Any]:
    """The layers of a tree whose leaves lead with L; of layers that lie apart, what they are."""
    if type(layers) is tuple:
        return layers
    leaves, tree = jax.tree.flatten(layers)
    if not leaves:  # nothing that is said of one layer
        return (layers,) * L
    ones = zip(*(jax.lax.split(leaf, [1] * L) for leaf in leaves), strict=True)
    return tuple(tree.unflatten([x.squeeze(0) for x in one]) for one in ones)


def check(c: Config) -> None:
    """Raises BadInput for an architecture that cannot be, by the name of the option."""
    if c.H % c.J:
        raise BadInput(f"model.H={c.H} must be a multiple of model.J={c.J}")
    hints = get_type_hints(Config)
    named = {name: get_args(kind) for name, kind in hints.items() if get_origin(kind) is Literal}
    for name, known in (named | {"ropes": get_args(Rope)}).items():
        value = getattr(c, name)
        for each in value if isinstance(value, tuple) else (value,):
            if each not in known:
                raise BadInput(f"model.{name}={each!r}: {', '.join(known)} are known")
    if c.positions == "learned":
        if c.P < 1:
            raise BadInput("model.positions=learned wants model.P, the rows of the table")
    elif not 1 <= c.turned <= c.E:
        raise BadInput(f"model.rope_share={c.rope_share} of model.E={c.E}: turn a part of a head")
    elif c.turned + c.turned % 2 > c.E:
        raise BadInput(f"model.E={c.E} must be even: RoPE turns pairs")
    if c.rope_scaling is not None:
        rope.check(c.rope_scaling, c.turned)
    if not c.ropes or min(c.windows, default=-1) < 0:
        raise BadInput(f"model.ropes={c.ropes}, model.windows={c.windows}: one value or more each")
    for name in ("score_width", "score_cap", "logit_cap"):
        value = getattr(c, name)
        if value is not None and value <= 0:
            raise BadInput(f"model.{name}={value} must be more than 0")


def decoder(
    config: Config, *, dtype: str = "float32", remat: str = "none", lora: Lora | None = None
) -> Model:
    """The decoder as a Model over a plain dict of float32 parameters named by their axes.

    dtype: of the computation, "float32", "bfloat16" or, where JAX_ENABLE_X64 is set, "float64",
    parameters included; softmax, norms and logits are float32 or better.
    remat: "none", "dots" (keep matrix products and what attention makes of them) or "full"
    (recompute every layer).
    lora: what the adapters are; parameters are then {"base": the plain dict, "lora": adapters}, or
    {"base"} alone, which is the model without them.
    `hidden(params, tokens_RT, positions_RT, until_RT, cache=None) -> (hidden_RTD, cache)`; an
    integer cache opens one of that many places, a returned cache continues it. `hidden_at` of the
    Model asks for some places, and the last of up to 8 layers is computed for these alone, where
    nothing is recomputed.
    Raises: BadInput for heads that do not divide, an odd head width, unknown dtype or remat, an
    adapter to a matrix that is not there, and adapters where `lora` does not say what they are.
    """
    check(config)
    if dtype not in ("float32", "bfloat16", "float64"):
        raise BadInput(f"run.dtype={dtype!r}: float32, bfloat16 and float64 are known")
    if dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise BadInput("run.dtype=float64 wants JAX_ENABLE_X64=1 in the environment")
    if remat not in REMAT:
        raise BadInput(f"run.remat={remat!r}: {', '.join(REMAT)} are known")
    kind = jnp.dtype(dtype)
    module = Decoder(config, kind, remat, lora)
    if lora is not None:
        low_rank.adapters(lora, config)

    def hidden(params, tokens_RT, positions_RT, until_RT, cache=None):
        return module.apply(_collections(params, lora), tokens_RT, positions_RT, until_RT, cache)

    def hidden_only(params, at_RN, *places):
        return module.apply(_collections(params, lora), *places, at_RN=at_RN)

    def apart(params):
        if module.looped:
            return params
        parted = {name: apart(params[name]) for name in ("base", "lora") if name in params}
        if "layers" in params:
            parted["layers"] = one_by_one(params["layers"], config.L)
        return {**params, **parted}

    def unembed(params, hidden) -> Any:
        return module.apply(_collections(params, lora), hidden, method=Decoder.unembed)

    init = _drawn(config, dtype, lora)
    positions = config.P if config.positions == "learned" else None
    return Model(init, hidden, unembed, positions, hidden_only, apart, dealt)


@lru_cache(maxsize=16)  # the same function for the same architecture, so that jax traces it once
def _drawn(config: Config, dtype: str, lora: Lora | None) -> Callable[[jax.Array], Params]:
    kind = jnp.dtype(dtype)
    module = Decoder(config, kind, "none", lora)

    def init(key: jax.Array) -> Params:
        one_RT = jnp.zeros((1, 1), jnp.int32)
        base = module.init(key, one_RT, one_RT, one_RT + 1)["params"]
        if lora is None:
            return base
        own = jax.random.fold_in(key, 1)
        return {"base": base, "lora": low_rank.start(lora, config, own, stored(kind))}

    return init


def _collections(params: Params, lora: Lora | None) -> dict[str, Params]:
    """Linen's collections, of a plain tree or of {"base"} with adapters or without."""
    if "base" not in params:
        return {"params": params}
    if "lora" in params and lora is None:
        raise BadInput("weights with adapters: give decoder(..., lora=Lora(...)), or merge them")
    adapters = {"lora": params["lora"]} if "lora" in params else {}
    return {"params": params["base"], **adapters}
