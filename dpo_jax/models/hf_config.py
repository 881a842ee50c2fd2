"""What the config.json of each family says, as the fields of a Config, and back.

Absent keys have the defaults of transformers' classes.
"""

from collections.abc import Callable
from typing import NamedTuple

from dpo_jax.models import hf_rope
from dpo_jax.models.hf_keys import Keys
from dpo_jax.models.hf_rope import FULL, SLIDING, Values
from dpo_jax.models.transformer import Config


class Family(NamedTuple):
    """How one model_type says what it is."""

    architecture: str
    read: Callable[[Keys], Values]  # the fields of a Config
    write: Callable[[Config], Values]  # the keys of a file, beside model_type


# What most families share: the keys of Llama


def _sizes(keys: Keys, *, head: int | None = None, eps: float = 1e-6, tied: bool = False) -> Values:
    D, H = keys.count("hidden_size"), keys.count("num_attention_heads")
    if head is None:
        if H < 1 or (D % H and keys.values.get("head_dim") is None):
            raise keys.refused("num_attention_heads", f"does not divide hidden_size={D}")
        head = D // H
    return {
        "V": keys.count("vocab_size"),
        "D": D,
        "L": keys.count("num_hidden_layers"),
        "H": H,
        "J": keys.count("num_key_value_heads", H),
        "E": keys.count("head_dim", head),
        "F": keys.count("intermediate_size"),
        "P": keys.count("max_position_embeddings", 0),
        "norm_eps": keys.number("rms_norm_eps", eps),
        "tied": keys.flag("tie_word_embeddings", tied),
    }


def _act(keys: Keys) -> Values:
    return {"activation": keys.activation("hidden_act", "silu")}


def _bias(keys: Keys) -> Values:
    bias = keys.flag("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}


def _written_sizes(c: Config) -> Values:
    return {
        "vocab_size": c.V,
        "hidden_size": c.D,
        "num_hidden_layers": c.L,
        "num_attention_heads": c.H,
        "num_key_value_heads": c.J,
        "head_dim": c.E,
        "intermediate_size": c.F,
        "max_position_embeddings": c.P,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
    }


def _written_act(c: Config) -> Values:
    tanh = c.activation == "gelu_tanh"
    return {"hidden_act": "gelu_pytorch_tanh" if tanh else c.activation}


def _llama_like(c: Config) -> Values:
    return _written_sizes(c) | _written_act(c) | hf_rope.written_rope(c)


def _biased(c: Config) -> Values:
    return _llama_like(c) | {"attention_bias": c.qkv_bias}


def _llama(keys: Keys) -> Values:
    said = _sizes(keys) | _act(keys) | _bias(keys) | hf_rope.flat_rope(keys)
    return said | {"mlp_bias": keys.flag("mlp_bias", False)}


def _written_llama(c: Config) -> Values:
    return _biased(c) | {"mlp_bias": c.mlp_bias}


def _mistral(keys: Keys) -> Values:
    said = _sizes(keys) | _act(keys) | hf_rope.flat_rope(keys)
    return said | {"windows": (keys.count("sliding_window", 4096, 0),)}


def _written_mistral(c: Config) -> Values:
    return _llama_like(c) | {"sliding_window": c.windows[0] or None}


def _qwen(keys: Keys, head: int | None) -> Values:
    said: Values = _sizes(keys, head=head) | _act(keys) | hf_rope.flat_rope(keys)
    keys.only(use_mrope=False)
    sliding = keys.flag("use_sliding_window", False)
    window = keys.count("sliding_window", 4096, 0)
    first = keys.count("max_window_layers", 28)
    full = first if sliding and window else said["L"]
    default = [FULL if layer < full else SLIDING for layer in range(said["L"])]
    return said | hf_rope.windows(keys, said["L"], window if sliding else 0, default)


def _qwen2(keys: Keys) -> Values:
    return _qwen(keys, None) | {"qkv_bias": True}


def _qwen3(keys: Keys) -> Values:
    return _qwen(keys, 128) | _bias(keys) | {"qk_norm": "head"}


def _written_qwen2(c: Config) -> Values:
    windows = hf_rope.written_windows(c)
    first = next((i for i, each in enumerate(windows["layer_types"]) if each == SLIDING), c.L)
    used = {"use_sliding_window": first < c.L, "max_window_layers": first}
    return _llama_like(c) | windows | used


def _written_qwen3(c: Config) -> Values:
    return _written_qwen2(c) | _biased(c)


# Gemma


def _gemma_like(keys: Keys, act: str) -> Values:
    keys.only(use_bidirectional_attention=False)
    said = _sizes(keys, head=256, tied=True) | _bias(keys)
    said |= {"norm_offset": 1.0, "scaled_embedding": True}
    return said | {"activation": keys.activation(act, "gelu_pytorch_tanh")}


def _gemma(keys: Keys) -> Values:
    said = _gemma_like(keys, "hidden_act") | hf_rope.flat_rope(keys)
    # "gelu" was written and the tanh form meant; transformers reads it so, for this family alone
    if said["activation"] == "gelu":
        said["activation"] = "gelu_tanh"
    keys.only(hidden_activation="gelu_pytorch_tanh")
    if said["activation"] != "gelu_tanh":
        raise keys.refused("hidden_act", "is not implemented for gemma (gelu_pytorch_tanh is)")
    return said


def _written_gemma(c: Config) -> Values:
    return _biased(c) | {"hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(keys: Keys) -> Values:
    said = _alternating(keys, lambda layer: layer % 2 == 0) | hf_rope.flat_rope(keys)
    keys.only(sliding_window_size=keys.take("sliding_window", 4096))
    said |= {"score_cap": keys.number("attn_logit_softcapping", 50.0, None)}
    return said | {"logit_cap": keys.number("final_logit_softcapping", 30.0, None)}


def _gemma3(keys: Keys) -> Values:
    every = keys.count("sliding_window_pattern", keys.count("_sliding_window_pattern", 6))
    said = _alternating(keys, lambda layer: (layer + 1) % max(every, 1) > 0)
    said |= hf_rope.layered_rope(keys, 1_000_000.0, 10_000.0)
    said["ropes"] = tuple("local" if window else "global" for window in said["windows"])
    keys.only(attn_logit_softcapping=None)  # transformers has the key and does not apply it
    said["logit_cap"] = keys.number("final_logit_softcapping", None)
    return said | {"qk_norm": "head"}


def _alternating(keys: Keys, sliding: Callable[[int], bool]) -> Values:
    """What Gemma 2 and 3 share: four norms a layer, the scale of scores, windows."""
    said: Values = _gemma_like(keys, "hidden_activation") | {"norm_place": "both"}
    keys.only(hidden_act=keys.take("hidden_activation", "gelu_pytorch_tanh"))
    said["score_width"] = keys.number("query_pre_attn_scalar", 256.0)
    types = [SLIDING if sliding(layer) else FULL for layer in range(said["L"])]
    window = keys.count("sliding_window", 4096, 0)
    return said | hf_rope.windows(keys, said["L"], window, types)


def _written_alternating(c: Config) -> Values:
    said = _biased(c) | hf_rope.written_windows(c)
    said["hidden_activation"] = said.pop("hidden_act")
    width = c.E if c.score_width is None else c.score_width
    said["query_pre_attn_scalar"] = int(width) if width == int(width) else width
    return said | {"final_logit_softcapping": c.logit_cap}


def _written_gemma2(c: Config) -> Values:
    return _written_alternating(c) | {"attn_logit_softcapping": c.score_cap}


def _written_gemma3(c: Config) -> Values:
    return _written_alternating(c) | {"rope_local_base_freq": c.local_rope_base}


# OLMo, Phi, SmolLM


def _olmo2(keys: Keys) -> Values:
    said = _sizes(keys, eps=1e-5) | _act(keys) | _bias(keys) | hf_rope.flat_rope(keys)
    return said | {"norm_place": "after", "qk_norm": "whole"}


def _olmo3(keys: Keys) -> Values:
    said = _sizes(keys, eps=1e-5) | _act(keys) | _bias(keys)
    said |= hf_rope.layered_rope(keys, 500_000.0, None)
    types = [FULL if layer % 4 == 3 else SLIDING for layer in range(said["L"])]
    window = keys.count("sliding_window", 4096, 0)
    said |= hf_rope.windows(keys, said["L"], window, types)
    said["ropes"] = tuple("local" if window else "global" for window in said["windows"])
    return said | {"norm_place": "after", "qk_norm": "whole"}


def _written_olmo3(c: Config) -> Values:
    said = _biased(c) | hf_rope.written_windows(c)
    full = {"rope_theta": c.rope_base} | (said["rope_scaling"] or {"rope_type": "default"})
    local = {"rope_theta": c.local_rope_base, "rope_type": "default"}
    return said | {"rope_parameters": {FULL: full, SLIDING: local}}


def _phi3(keys: Keys) -> Values:
    said = _sizes(keys, eps=1e-5) | _act(keys)
    trained = keys.count("original_max_position_embeddings", 4096)
    name, given = hf_rope.table(keys)
    kind = given.pop("type", given.get("rope_type", "default"))
    if kind != "default":  # older files call it su or yarn
        kind = "longrope" if kind in ("su", "yarn") else kind
        given |= {"rope_type": kind, "original_max_position_embeddings": trained}
    given = hf_rope.defaults(keys, 10_000.0) | given
    keys.only(attention_bias=False, mlp_bias=False, lm_head_bias=False)
    keys.only(full_attn_mod=1, interpolate_factor=1)
    said |= hf_rope.turns(keys, name, given, partial=True)
    return said | {"windows": (keys.count("sliding_window", 0, 0),)}


def _written_phi3(c: Config) -> Values:
    said: Values = _llama_like(c) | {"partial_rotary_factor": c.rope_share}
    said["sliding_window"] = c.windows[0] or None
    if c.rope_scaling is None:
        return said
    # transformers 4 takes these three keys and no more, and derives the rest
    scaling = said["rope_scaling"]
    scaling["type"] = scaling.pop("rope_type")
    said["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings", 0)
    if scaling["factor"] * c.rope_scaling.original == c.P:
        del scaling["factor"]
    return said


def _smollm3(keys: Keys) -> Values:
    said = _sizes(keys, tied=True) | _act(keys) | _bias(keys)
    said |= hf_rope.flat_rope(keys, 2_000_000.0) | {"mlp_bias": keys.flag("mlp_bias", False)}
    every = max(keys.count("no_rope_layer_interval", 4), 1)
    turned = [int((layer + 1) % every > 0) for layer in range(said["L"])]
    turned = keys.series("no_rope_layers", turned, said["L"])
    sliding, window = keys.flag("use_sliding_window", False), keys.count("sliding_window", 0, 0)
    keys.take("max_window_layers", None)  # left over from Qwen 2; transformers does not read it
    types = [SLIDING if sliding and window and not turn else FULL for turn in turned]
    said["ropes"] = tuple("global" if turn else "none" for turn in turned)
    return said | hf_rope.windows(keys, said["L"], window if sliding else 0, types)


def _written_smollm3(c: Config) -> Values:
    said = _written_llama(c) | hf_rope.written_windows(c)
    turned = [int(rope != "none") for rope in c.of_layers(c.ropes)]
    return said | {"no_rope_layers": turned, "use_sliding_window": max(c.windows) > 0}


# GPT


def _gpt2(keys: Keys) -> Values:
    D, H = keys.count("n_embd"), keys.count("n_head")
    if H < 1 or D % H:
        raise keys.refused("n_head", f"does not divide n_embd={D}")
    keys.only(scale_attn_by_inverse_layer_idx=False)
    sizes = {"D": D, "H": H, "J": H, "E": D // H, "F": keys.count("n_inner", 4 * D)}
    sizes |= {"V": keys.count("vocab_size"), "L": keys.count("n_layer")}
    biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True)
    said = {"norm": "layer", "positions": "learned", "gated": False, "P": keys.count("n_positions")}
    return (
        sizes
        | biases
        | said
        | {
            "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
            "tied": keys.flag("tie_word_embeddings", True),
            "activation": keys.activation("activation_function", "gelu_new"),
            "score_width": None if keys.flag("scale_attn_weights", True) else 1.0,
        }
    )


def _written_gpt2(c: Config) -> Values:
    return {
        "vocab_size": c.V,
        "n_embd": c.D,
        "n_layer": c.L,
        "n_head": c.H,
        "n_inner": c.F,
        "n_positions": c.P,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new" if c.activation == "gelu_tanh" else c.activation,
        "tie_word_embeddings": c.tied,
        "scale_attn_weights": c.score_width is None or c.score_width == c.E,
    }


def _gpt_neox(keys: Keys) -> Values:
    said = _sizes(keys)
    keys.only(num_key_value_heads=said["H"], head_dim=said["D"] // said["H"])
    name, given = hf_rope.table(keys)
    base, share = keys.number("rotary_emb_base", 10_000.0), keys.number("rotary_pct", 0.25)
    # transformers 4 wrote them twice
    keys.only(rope_theta=base, partial_rotary_factor=share)
    given = {"rope_theta": base, "partial_rotary_factor": share} | given
    said |= hf_rope.turns(keys, name, given, partial=True) | _bias_neox(keys)
    return said | {
        "norm": "layer",
        "norm_eps": keys.number("layer_norm_eps", 1e-5),
        "gated": False,
        "mlp_bias": True,
        "parallel": keys.flag("use_parallel_residual", True),
        "activation": keys.activation("hidden_act", "gelu"),
    }


def _bias_neox(keys: Keys) -> Values:
    bias = keys.flag("attention_bias", True)
    return {"qkv_bias": bias, "o_bias": bias}


def _written_gpt_neox(c: Config) -> Values:
    said = _biased(c) | {"layer_norm_eps": c.norm_eps, "use_parallel_residual": c.parallel}
    said |= {"rotary_emb_base": said.pop("rope_theta"), "rotary_pct": c.rope_share}
    unknown = ("rms_norm_eps", "head_dim", "num_key_value_heads")
    return {name: x for name, x in said.items() if name not in unknown}


FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", _gpt2, _written_gpt2),
    "gpt_neox": Family("GPTNeoXForCausalLM", _gpt_neox, _written_gpt_neox),
    "llama": Family("LlamaForCausalLM", _llama, _written_llama),
    "mistral": Family("MistralForCausalLM", _mistral, _written_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _written_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _written_qwen3),
    "gemma": Family("GemmaForCausalLM", _gemma, _written_gemma),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, _written_gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, _written_gemma3),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, _biased),
    "olmo3": Family("Olmo3ForCausalLM", _olmo3, _written_olmo3),
    "phi3": Family("Phi3ForCausalLM", _phi3, _written_phi3),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3, _written_smollm3),
}
