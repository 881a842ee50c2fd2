"""The families of Hugging Face that a Config can be: their config.json and the names of tensors.

    config = families.read(json)      families.write(config)      families.rows(config)

A row says which tensor holds which parameters, and how (see layout.py). A family lists the rows of
all that its models may have; those of a Config are the ones whose parameters it has.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from dpo_jax.models.hf_config import FAMILIES
from dpo_jax.models.hf_keys import Keys
from dpo_jax.models.hf_rope import Values
from dpo_jax.models.layout import Row, row
from dpo_jax.models.transformer import Config, check, decoder
from dpo_jax.structs import BadInput

POSITIONS = ("max_position_embeddings", "n_positions")  # what a file calls P
WHOLE_HEADS = ("llama", "gemma2", "gemma3_text")  # transformers wants H to divide D, whatever E is
REFUSED = {  # the reason, behind the name
    "gemma3": ", for it sees pictures; a text model is a gemma3_text",
    "mixtral": ", nor is any mixture of experts",
    "qwen2_moe": ", nor is any mixture of experts",
    "qwen3_moe": ", nor is any mixture of experts",
}


def read(values: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a file. BadInput, by the name of the key, for what is not implemented."""
    keys = Keys(values, where)
    family = keys.take("model_type")
    if family not in FAMILIES:
        why = f"is not implemented{REFUSED.get(str(family), '')} ({', '.join(FAMILIES)} are)"
        raise keys.refused("model_type", why)
    config = Config(**FAMILIES[family].read(keys), family=family)
    keys.only(is_encoder_decoder=False, add_cross_attention=False)
    keys.end(family)
    try:
        check(config)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    return canonical(config)


def write(config: Config) -> Values:
    """The keys of a file. BadInput where the family has no words for what the Config says.

    The ids of special tokens are null, so that nobody takes the defaults of a class for them.
    """
    if config.family not in FAMILIES:
        raise BadInput(f"model.family={config.family!r}: {', '.join(FAMILIES)} are known")
    family = FAMILIES[config.family]
    values: Values = {"architectures": [family.architecture], "model_type": config.family}
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    values |= family.write(config)
    values = {name: x for name, x in values.items() if config.P or name not in POSITIONS}
    if config.family in WHOLE_HEADS and config.D % config.H:
        raise BadInput(
            f"model.H={config.H} does not divide model.D={config.D}, as transformers wants of "
            f"{config.family}: set model.family to one that is free in it, such as mistral"
        )
    meant, said = canonical(config), read(values, f"as {config.family}")
    for each in fields(Config):
        value, other = getattr(meant, each.name), getattr(said, each.name)
        if value != other:
            raise BadInput(
                f"model.{each.name}={value!r} cannot be said in a config.json of {config.family}, "
                f"which is read as {other!r}: set model.family to one that can"
            )
    return values


def classifier(config: Config) -> Values:
    """The keys that make a scalar head of the family, its name `score`, in place of the head."""
    name = FAMILIES[config.family].architecture
    stem = (
        "Gemma3Text"
        if config.family == "gemma3_text"
        else re.sub(r"(ForCausalLM|LMHeadModel)$", "", name)
    )
    return {
        "architectures": [f"{stem}ForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
    }


def canonical(config: Config) -> Config:
    """The one way, of several that mean the same, to write a Config."""
    windows, ropes = (cycle(config.of_layers(each)) for each in (config.windows, config.ropes))
    same: dict[str, Any] = {"windows": windows, "ropes": ropes}
    if config.score_width == config.E:
        same["score_width"] = None
    if "local" not in ropes:
        same["local_rope_base"] = Config.local_rope_base
    return replace(config, **same)


def cycle(values: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest beginning that repeats into all values."""
    return next(
        tuple(values[:n])
        for n in range(1, len(values) + 1)
        if all(value == values[i % n] for i, value in enumerate(values))
    )


# Tensors: attention and mlp, then the norms, which are the names that families disagree about


def _linear(name: str, layout: str, *leaves: str) -> tuple[Row, Row]:
    """A matrix (out, in), and the bias along its first axis where the model has one."""
    out, _, into = layout.partition(" ")
    biases = (f"{stem}_bias_{_without(axes, into)}" for stem, _, axes in _parted(leaves))
    return row(f"{name}.weight", layout, *leaves), row(f"{name}.bias", out, *biases)


def _parted(leaves: Sequence[str]) -> list[tuple[str, str, str]]:
    return [leaf.rpartition("_") for leaf in leaves]


def _without(axes: str, into: str) -> str:
    return "".join(letter for letter in axes if letter not in into)


def _norm(name: str, stem: str, axes: str = "D") -> tuple[Row, Row]:
    bias = row(f"{name}.bias", axes, f"{stem}_bias_{axes}")
    return row(f"{name}.weight", axes, f"{stem}_{axes}"), bias


def _norms(**names: str) -> tuple[Row, ...]:
    return sum((_norm(f"model.layers.{{}}.{name}", stem) for stem, name in names.items()), ())


ATTENTION, MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
OUTSIDE = (
    row("model.embed_tokens.weight", "V D", "embed_VD"),
    row("lm_head.weight", "V D", "unembed_DV"),
    *_norm("model.norm", "final_norm"),
)
INSIDE = (
    *_linear(f"{ATTENTION}.o_proj", "D HE", "o_HED"),
    *_linear(f"{MLP}.down_proj", "D F", "down_FD"),
)
SPLIT = (
    *_linear(f"{ATTENTION}.q_proj", "HE D", "q_DHE"),
    *_linear(f"{ATTENTION}.k_proj", "JE D", "k_DJE"),
    *_linear(f"{ATTENTION}.v_proj", "JE D", "v_DJE"),
    *_linear(f"{MLP}.gate_proj", "F D", "gate_DF"),
    *_linear(f"{MLP}.up_proj", "F D", "up_DF"),
)
FUSED = (
    *_linear(f"{ATTENTION}.qkv_proj", "HE+JE+JE D", "q_DHE", "k_DJE", "v_DJE"),
    *_linear(f"{MLP}.gate_up_proj", "F+F D", "gate_DF", "up_DF"),
)
BEFORE = _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
AFTER = _norms(
    after_attention_norm="post_attention_layernorm", after_mlp_norm="post_feedforward_layernorm"
)
BOTH = _norms(attention_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm") + AFTER
PER_HEAD = (
    *_norm(f"{ATTENTION}.q_norm", "q_norm", "E"),
    *_norm(f"{ATTENTION}.k_norm", "k_norm", "E"),
)
WHOLE = (
    *_norm(f"{ATTENTION}.q_norm", "q_norm", "HE"),
    *_norm(f"{ATTENTION}.k_norm", "k_norm", "JE"),
)
NEOX_ATTENTION = "gpt_neox.layers.{}.attention"
LLAMA = OUTSIDE + INSIDE + SPLIT + BEFORE
OLMO = OUTSIDE + INSIDE + SPLIT + AFTER + WHOLE
GPT2 = (
    row("transformer.wte.weight", "V D", "embed_VD"),
    row("transformer.wpe.weight", "P D", "position_PD"),
    row("lm_head.weight", "V D", "unembed_DV"),
    *_norm("transformer.ln_f", "final_norm"),
    *_norm("transformer.h.{}.ln_1", "attention_norm"),
    *_norm("transformer.h.{}.ln_2", "mlp_norm"),
    # its matrices are (in, out)
    row("transformer.h.{}.attn.c_attn.weight", "D HE+JE+JE", "q_DHE", "k_DJE", "v_DJE"),
    row("transformer.h.{}.attn.c_attn.bias", "HE+JE+JE", "q_bias_HE", "k_bias_JE", "v_bias_JE"),
    row("transformer.h.{}.attn.c_proj.weight", "HE D", "o_HED"),
    row("transformer.h.{}.attn.c_proj.bias", "D", "o_bias_D"),
    row("transformer.h.{}.mlp.c_fc.weight", "D F", "up_DF"),
    row("transformer.h.{}.mlp.c_fc.bias", "F", "up_bias_F"),
    row("transformer.h.{}.mlp.c_proj.weight", "F D", "down_FD"),
    row("transformer.h.{}.mlp.c_proj.bias", "D", "down_bias_D"),
)
NEOX = (
    row("gpt_neox.embed_in.weight", "V D", "embed_VD"),
    row("embed_out.weight", "V D", "unembed_DV"),
    *_norm("gpt_neox.final_layer_norm", "final_norm"),
    *_norm("gpt_neox.layers.{}.input_layernorm", "attention_norm"),
    *_norm("gpt_neox.layers.{}.post_attention_layernorm", "mlp_norm"),
    *_linear(f"{NEOX_ATTENTION}.query_key_value", "H3E D", "q_DHE", "k_DJE", "v_DJE"),
    *_linear(f"{NEOX_ATTENTION}.dense", "D HE", "o_HED"),
    *_linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "F D", "up_DF"),
    *_linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "D F", "down_FD"),
)


class Names(NamedTuple):
    """The tensors of a family's files.

    prefix: what all names but the head's begin with; a file may leave it out everywhere.
    ignored: buffers that files carry and no model needs, behind the prefix.
    others: further names of tensors.
    """

    prefix: str
    rows: tuple[Row, ...]
    ignored: str = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    others: Mapping[str, str] = MappingProxyType({})


NAMES = {
    "gpt2": Names("transformer.", GPT2, r"h\.\d+\.attn\.(bias|masked_bias)"),
    "gpt_neox": Names(
        "gpt_neox.",
        NEOX,
        r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|rotary_emb\.inv_freq",
        MappingProxyType({"lm_head.weight": "embed_out.weight"}),
    ),
    "llama": Names("model.", LLAMA),
    "mistral": Names("model.", LLAMA),
    "qwen2": Names("model.", LLAMA),
    "qwen3": Names("model.", LLAMA + PER_HEAD),
    "gemma": Names("model.", LLAMA),
    "gemma2": Names("model.", OUTSIDE + INSIDE + SPLIT + BOTH),
    "gemma3_text": Names("model.", OUTSIDE + INSIDE + SPLIT + BOTH + PER_HEAD),
    "olmo2": Names("model.", OLMO),
    "olmo3": Names("model.", OLMO),
    "phi3": Names("model.", OUTSIDE + INSIDE + FUSED + BEFORE),
    "smollm3": Names("model.", LLAMA),
}


@lru_cache(maxsize=64)
def rows(config: Config) -> tuple[Row, ...]:
    """The rows of all parameters that a model of this Config has, each in one of them."""
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    inside = set(shapes["layers"])
    outside = set(shapes) - {"layers"}
    every = NAMES[config.family].rows
    found = [at for at in every if set(at.leaves) <= (inside if at.layered else outside)]
    held = [leaf for at in found for leaf in at.leaves]
    if sorted(held) != sorted(inside | outside):
        rest = ", ".join(sorted((inside | outside).symmetric_difference(held)))
        raise BadInput(f"model.family={config.family} has no tensors for {rest}")
    return tuple(found)


def holder(config: Config, leaf: str) -> str:
    """The tensor of the family that holds a parameter outside the layers."""
    return next(at.name for at in NAMES[config.family].rows if leaf in at.leaves)
