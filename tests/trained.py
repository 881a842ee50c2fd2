"""Tokenizers of the three kinds in use, trained on the spot, and chat templates of two kinds."""

from collections.abc import Callable
from functools import cache
from typing import Any

TEXTS = (
    "The quick brown fox jumps over the lazy dog. Who wrote it, and why? Nobody knows!",
    "Assistant: I am sorry, I can't help with that. Human: What is two and two? Four (4).",
    "user assistant system tool \n\n numbers 0123456789 and signs <|>/[]{}_-+*=#@:;'\"",
    "Grüße aus Köln, ça va? ñ é ü ß 你好 あい",
)
CONTROLS = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As CHATML, with the assistant's turns marked as far as their content.
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# BOS at the start, EOS behind every answer, a blank before it, as Llama 2 has it.
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    " {{ message.content }} {{ eos_token }}{% else %}[INST] {{ message.content }} [/INST]"
    "{% endif %}{% endfor %}"
)
# Plain words: no control token at all.
WORDS = (
    "{% for message in messages %}\n\n{{ message.role }}: {{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}\n\nassistant:{% endif %}"
)


def wrapped(model: Any, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        **options,
    )


@cache
def byte_level() -> Any:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return wrapped(made)


@cache
def sentence_piece() -> Any:
    """BPE on whole texts with a blank before them and bytes for what is unknown, as Llama 2."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*CONTROLS, *bytes_], show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return wrapped(_without_added(made, bytes_))


def _without_added(made: Any, names: list[str]) -> Any:
    """The tokenizer with these control tokens as plain entries of its vocabulary."""
    import json

    from tokenizers import Tokenizer

    written = json.loads(made.to_str())
    kept = [token for token in written["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(written | {"added_tokens": kept}))


@cache
def unigram() -> Any:
    """Unigram with a blank before the first word only, as T5 and XLM have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    made.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=260,
        special_tokens=CONTROLS,
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=[chr(code) for code in range(32, 127)] + ["\n"],
    )
    made.train_from_iterator(TEXTS, trainer)
    return wrapped(made)


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "sentence piece": sentence_piece,
    "unigram": unigram,
}
