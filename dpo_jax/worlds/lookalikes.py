"""Made-up rows in the raw form of published data sets: their columns, roles and markers, and the
control tokens and chat templates of the tokenizers that go with them. For runs without a network.

    partial(lookalikes.hh, n=32, seed=0)     a source of 32 rows
    lookalikes.ROWS["Anthropic/hh-rlhf"]     the same function by the name of the set
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Row = dict[str, Any]
Messages = list[dict[str, str]]

WORDS = (
    "a an and answer ask because book boil bread can cold cook day easy evening find first for fresh "
    "garden good guide help how in is it keep know learn light little make map morning music new not "
    "of old on one open paint paper plan please plant question rain read river salt should simple "
    "slowly small some song start story sun sure tea that the then think this to train travel try "
    "two use walk warm water what when why window with write you your"
).split()

# Chat templates that write what those of Qwen 3 and Tulu 3 write, tools and thinking left out.
QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TULU3 = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if message.role != 'assistant' or not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def hh(*, n: int, seed: int) -> Iterator[Row]:
    """Anthropic's HH: two whole dialogues in text, their turns after markers, the last one other."""
    for rng in _each(n, seed):
        talk = "".join(
            f"\n\n{'Assistant' if turn % 2 else 'Human'}: {_said(rng, 12)}"
            for turn in range(2 * rng.integers(1, 4) - 1)
        )
        sides = (f"{talk}\n\nAssistant: {_said(rng, 20)}" for _ in range(2))
        yield dict(zip(("chosen", "rejected"), sides, strict=True))


def tldr(*, n: int, seed: int) -> Iterator[Row]:
    """TRL's form of the TL;DR summaries: posts with headings and what their authors wrote of it."""
    for rng in _each(n, seed):
        yield {"prompt": _post(rng), "completion": f" {_said(rng, 12)}"}


def tldr_pairs(*, n: int, seed: int) -> Iterator[Row]:
    """TRL's form of the TL;DR comparisons: a post and two summaries."""
    for rng in _each(n, seed):
        yield {"prompt": _post(rng), "chosen": f" {_said(rng, 12)}", "rejected": f" {_said(rng, 9)}"}


def ultrafeedback(*, n: int, seed: int) -> Iterator[Row]:
    """TRL's form of UltraFeedback: two whole conversations and their scores."""
    for rng in _each(n, seed):
        chosen, rejected = _pair(rng, [])
        scores = {"score_chosen": 5.0 + rng.integers(5), "score_rejected": float(rng.integers(5))}
        yield {"chosen": chosen, "rejected": rejected, **scores}


def ultrafeedback_h4(*, n: int, seed: int) -> Iterator[Row]:
    """H4's form of UltraFeedback: the prompt in text too, an id, and the chosen side once more."""
    for row, rng in zip(ultrafeedback(n=n, seed=seed), _each(n, seed), strict=True):
        prompt = {"prompt": row["chosen"][0]["content"], "prompt_id": f"{rng.integers(2**32):08x}"}
        yield prompt | row | {"messages": row["chosen"]}


def tulu3(*, n: int, seed: int) -> Iterator[Row]:
    """Tulu 3's preference mixture: where it is from, some with a system turn and some longer."""
    for i, rng in enumerate(_each(n, seed)):
        before = [_turn("system", _said(rng, 8))] if rng.integers(3) == 0 else []
        if rng.integers(3) == 0:
            before += [_turn("user", _said(rng, 12)), _turn("assistant", _said(rng, 12))]
        chosen, rejected = _pair(rng, before)
        prompt = next(each["content"] for each in chosen if each["role"] == "user")
        sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        yield {"id": f"made-up-{i}", **sides, "source": "made up"}


ROWS: dict[str, Callable[..., Iterator[Row]]] = {
    "Anthropic/hh-rlhf": hh,
    "trl-lib/tldr": tldr,
    "trl-lib/tldr-preference": tldr_pairs,
    "trl-lib/ultrafeedback_binarized": ultrafeedback,
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback_h4,
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": tulu3,
}
TOKENIZERS: dict[str, dict[str, Any]] = {  # options of data.bpe.byte_level
    "EleutherAI/pythia-2.8b": {"start": "<|endoftext|>", "end": "<|endoftext|>"},
    "Qwen/Qwen3-0.6B": {
        "start": None,
        "end": "<|im_end|>",
        "others": ("<|im_start|>", "<|endoftext|>"),
        "template": QWEN3,
    },
    "allenai/Llama-3.1-Tulu-3-8B-SFT": {
        "start": "<|begin_of_text|>",
        "end": "<|end_of_text|>",
        "template": TULU3,
    },
}


def sentences(*, n: int, seed: int) -> Iterator[Row]:
    """Rows of plain text, for a tokenizer to learn from."""
    for rng in _each(n, seed):
        yield {"text": _said(rng, 20)}


def _each(n: int, seed: int) -> Iterator[np.random.Generator]:
    """A generator for every row, so that more rows change none."""
    return (np.random.default_rng([seed, i]) for i in range(n))


def _said(rng: np.random.Generator, longest: int) -> str:
    """A sentence of made-up talk; one in eight is three times as long."""
    count = int(rng.integers(2, longest + 1)) * (3 if rng.integers(8) == 0 else 1)
    text = " ".join(rng.choice(WORDS, count))
    return f"{text[0].upper()}{text[1:]}{'.?!'[rng.integers(3)]}"


def _post(rng: np.random.Generator) -> str:
    body = "\n".join(_said(rng, 20) for _ in range(3))
    heading = f"SUBREDDIT: r/{rng.choice(WORDS)}\n\nTITLE: {_said(rng, 8)}"
    return f"{heading}\n\nPOST: {body}\n\nTL;DR:"


def _pair(rng: np.random.Generator, before: Messages) -> tuple[Messages, Messages]:
    """Two conversations that part at their last turn."""
    asked = [*before, _turn("user", _said(rng, 16))]
    chosen, rejected = ([*asked, _turn("assistant", _said(rng, 24))] for _ in range(2))
    return chosen, rejected


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
