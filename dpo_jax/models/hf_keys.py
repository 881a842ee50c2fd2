"""The keys of a config.json: every one is asked for, or known to change no logit, or refused."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.structs import BadInput

REQUIRED: Any = object()
AS_ABSENT: Any = object()
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
# Where files come from, initialisation, dropout (never applied), generation, classification.
INERT = re.compile(
    r"""_name_or_path|_commit_hash|_?attn_implementation\w*|architectures|auto_map|model_type
    |transformers(_js)?_(version|config)|torch_dtype|dtype|torchscript|use_bfloat16
    |use_cache|cache_implementation|output_(attentions|hidden_states|scores|logits)
    |return_dict(_in_generate)?|use_return_dict|initializer_range|gradient_checkpointing
    |\w*dropout|\w+_pdrop|pretraining_tp|tokenizer_class|prefix|language|n_ctx|pruned_heads
    |(bos|eos|pad|sep|unk|decoder_start|forced_bos|forced_eos)_token_id|task_specific_params
    |problem_type|num_labels|id2label|label2id|finetuning_task|summary_\w+|tf_legacy_loss
    |(max|min)_(new_)?(length|tokens)|do_sample|early_stopping|num_beams|num_beam_groups
    |temperature|top_[kp]|typical_p|diversity_penalty|(encoder_)?repetition_penalty|length_penalty
    |(encoder_)?no_repeat_ngram_size|bad_words_ids|num_return_sequences|remove_invalid_values
    |exponential_decay_length_penalty|(begin_)?suppress_tokens|reorder_and_upcast_attn
    |chunk_size_feed_forward|is_decoder|tie_encoder_decoder""",
    re.VERBOSE,
)


class Keys:
    """What a file says, and which of its keys somebody has read."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self.seen: set[str] = set()

    def refused(self, name: str, why: str) -> BadInput:
        return BadInput(f"{self.where}: {name}={self.values.get(name)!r} {why}")

    def take(self, name: str, default: Any = REQUIRED, null: Any = AS_ABSENT) -> Any:
        """The value of a key; `default` where it is absent, `null` where it is null."""
        self.seen.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if name in self.values and null is not AS_ABSENT:
            return null
        if default is REQUIRED:
            raise BadInput(f"{self.where}: {name} is missing")
        return default

    def count(self, name: str, default: Any = REQUIRED, null: Any = AS_ABSENT) -> int:
        value = self.take(name, default, null)
        if type(value) is not int or value < 0:
            raise self.refused(name, "must be a whole number")
        return value

    def number(self, name: str, default: Any = REQUIRED, null: Any = AS_ABSENT) -> Any:
        value = self.take(name, default, null)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise self.refused(name, "must be a number")
        return value if value is None else float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, "must be true or false")
        return value

    def series(self, name: str, default: Sequence[Any], length: int) -> list[Any]:
        """The first `length` values of a list."""
        value = self.take(name, list(default))
        if not isinstance(value, list) or len(value) < length:
            raise self.refused(name, f"must list {length} values")
        return value[:length]

    def table(self, name: str) -> dict[str, Any]:
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self.refused(name, "must be an object")
        return dict(value)

    def only(self, **known: Any) -> None:
        """Keys that are implemented for one value alone."""
        for name, value in known.items():
            if self.take(name, value) != value:
                raise self.refused(name, f"is not implemented ({value!r} is)")

    def activation(self, name: str, default: str) -> str:
        value = self.take(name, default)
        if value not in ACTIVATIONS:
            raise self.refused(name, f"is not implemented ({', '.join(ACTIVATIONS)} are)")
        return ACTIVATIONS[value]

    def end(self, what: str) -> None:
        """Raises BadInput for a key that nobody has read."""
        for name, value in self.values.items():
            if value is not None and name not in self.seen and not INERT.fullmatch(name):
                raise self.refused(name, f"is not implemented for {what}")
