"""Two or more tiny models of every family, whose logits transformers has recorded.

Weights are not stored: `weights` draws them again, each from its name, so that any order will do.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SEED = 20
LENGTHS = (13, 9)  # of the two texts that each reads, one at a time

_SMALL = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 32}
_SMALL |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_NEOX = {name: x for name, x in _SMALL.items() if name != "num_key_value_heads"}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_FIVE = {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 6}
_GPT = {"vocab_size": 31, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
_GPT |= {"bos_token_id": None, "eos_token_id": None}
_WAVES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_FOUR = {"num_hidden_layers": 4}


def _rope(kind: str = "default", theta: float = 100.0, **more: Any) -> dict[str, Any]:
    """A small base, so that thirteen positions tell all frequencies apart."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


CASES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt2 untied, gelu, unscaled": _GPT
    | _UNTIED
    | {"n_inner": 36, "n_head": 1, "activation_function": "gelu", "scale_attn_weights": False},
    "gpt_neox": _NEOX | _UNTIED | _rope(partial_rotary_factor=0.25),
    "gpt_neox tied, sequential": _NEOX
    | _TIED
    | _rope(partial_rotary_factor=0.75)
    | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "relu"},
    "llama": _SMALL | _UNTIED | _rope(),
    "llama tied, biases, linear": _SMALL
    | _TIED
    | {"attention_bias": True, "mlp_bias": True}
    | _rope("linear", factor=2.5),
    "llama llama3": _SMALL | _UNTIED | _rope("llama3", factor=8.0, **_WAVES),
    "llama dynamic, longer than trained": _SMALL
    | _UNTIED
    | {"max_position_embeddings": 8}
    | _rope("dynamic", factor=4.0),
    "llama yarn": _SMALL
    | _TIED
    | _rope("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=4.0),
    "mistral": _SMALL | _UNTIED | _rope() | {"sliding_window": 4},
    "mistral tied, no window": _SMALL | _TIED | _rope() | _FIVE | {"sliding_window": None},
    "qwen2": _SMALL | _TIED | _rope(),
    "qwen2 untied, window of later layers, yarn": _SMALL
    | _UNTIED
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    | _rope("yarn", factor=2.0, original_max_position_embeddings=16, attention_factor=1.25),
    "qwen3": _SMALL | _TIED | _rope() | _FIVE,
    "qwen3 untied, biases, window": _SMALL
    | _UNTIED
    | _rope()
    | {"head_dim": 10, "attention_bias": True, "use_sliding_window": True, "sliding_window": 3}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma": _SMALL | _rope() | {"head_dim": 8},
    "gemma untied, biases": _SMALL | _UNTIED | _rope() | _FIVE | {"attention_bias": True},
    "gemma2": _SMALL
    | _rope()
    | {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 4}
    | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    "gemma2 untied, no caps": _SMALL
    | _UNTIED
    | _rope()
    | {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 6, "num_hidden_layers": 3}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3_text": _SMALL
    | _FOUR
    | {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 4}
    | {"sliding_window_pattern": 2, "rope_theta": 1000.0, "rope_local_base_freq": 50.0},
    "gemma3_text untied, linear, cap": _SMALL
    | _UNTIED
    | {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 3, "num_hidden_layers": 3}
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 2.0}
    | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "olmo2": _SMALL | _UNTIED | _rope(),
    "olmo2 tied, biases": _SMALL | _TIED | _rope() | _FIVE | {"attention_bias": True},
    "olmo3": _SMALL | _UNTIED | _FOUR | {"rope_theta": 500_000.0, "sliding_window": 5},
    "olmo3 tied, yarn": _SMALL
    | _TIED
    | {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}
    | {"rope_theta": 100.0}
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
    "phi3": _SMALL | _UNTIED | {"sliding_window": 5} | _rope(partial_rotary_factor=0.5),
    "phi3 tied, longrope": _SMALL
    | _TIED
    | {"original_max_position_embeddings": 10}
    | _rope("longrope", short_factor=[1.0, 1.25, 1.5, 2.0], long_factor=[1.0, 2.0, 3.0, 4.0]),
    "smollm3": _SMALL | _rope() | {"no_rope_layer_interval": 2},
    "smollm3 untied, window without rope": _SMALL
    | _UNTIED
    | _rope()
    | {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 4}
    | {"num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True},
}


def config(case: str) -> dict[str, Any]:
    """The keys that make a case; the first word of its name is the model_type."""
    return {"model_type": case.split()[0]} | CASES[case]


def tokens(case: str) -> np.ndarray:
    """Two rows of ids; what is behind the shorter text is padding, ids like others."""
    rng = np.random.default_rng([SEED, zlib.crc32(case.encode())])
    return rng.integers(0, 31, (len(LENGTHS), max(LENGTHS)))


def weights(case: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Random tensors; scales of norms and biases are such that each shows in the logits."""
    return {name: _drawn(f"{case}: {name}", tuple(shape)) for name, shape in shapes.items()}


def _drawn(key: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng([SEED, zlib.crc32(key.encode())])
    if len(shape) == 1:
        return (rng.normal(0, 0.3, shape) + ("bias" not in key.split(": ")[1])).astype(np.float32)
    return rng.normal(0, 1.5 * min(shape) ** -0.5, shape).astype(np.float32)
