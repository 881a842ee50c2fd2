"""Byte-level BPE tokenizers learned from records, of the kind that GPT-2, Llama 3 and Qwen have."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from dpo_jax.data.layouts import Part
from dpo_jax.data.sources import Layout, Source, read

CHATML = (  # the chat template of Qwen's kind
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = ("<|im_start|>", "<|im_end|>")  # its control tokens


@lru_cache(maxsize=16)
def byte_level(
    *,
    source: Source,
    size: int = 2048,
    layout: Layout | None = None,
    start: str | None = "<s>",
    end: str = "</s>",
    others: tuple[str, ...] = (),
    template: str | None = None,
) -> Any:
    """A tokenizer of at most `size` tokens, for `Data.tokenizer`; the same one for the same records.

    source, layout: as in Data; rows with a fault of structure are passed over. start: BOS, None for
    a tokenizer without one. end: EOS, which also pads. others: further control tokens. template:
    the chat template. All 256 bytes are tokens, so that no text is unknown to it.
    Errors: BadInput for a source that cannot be read.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    controls = list(dict.fromkeys(name for name in (start, end, *others) if name))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=controls,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(_texts(source, layout), trainer)
    named = {"eos_token": end, "pad_token": end} | ({"bos_token": start} if start else {})
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=list(others), **named
    )
    found.chat_template = template
    return found


def _texts(source: Source, layout: Callable[..., Any] | None) -> Iterator[str]:
    """Every prompt and response of the records, messages one by one."""
    for record in read(source, on_bad="skip", layout=layout)[0]:
        for part in (record["prompt"], *record["responses"]):
            yield from _of_part(part)


def _of_part(part: Part) -> Iterator[str]:
    if isinstance(part, str):
        yield part
        return
    yield from (message.get("content", "") for message in part)
