"""The arithmetic world: sums without end, an exact checker, and a dial for their difficulty.

A question is a line of whole numbers, "17+25-8=", and its answer the result, "34". The harder, the
more terms, the more digits, and the more operations there are; a product binds before a sum.
`questions` is a data source for SFT and for prompts, `correct` the reward of both.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_jax.structs import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["VOCABULARY", "correct", "endless", "questions", "tokenizer"]

OPERATIONS = "+-*"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCABULARY = (PAD, BOS, EOS, *"0123456789", *OPERATIONS, "=")


def questions(
    *,
    n: int,
    seed: int,
    terms: int = 2,
    digits: int = 2,
    operations: str = "+-",
    slips: float = 0.0,
) -> list[dict[str, Any]]:
    """n records {"prompt": "17+25=", "responses": ["42"], "answer": "42"}.

    terms: numbers in a line, 2 or more. digits: of the longest number. slips: the share of
    responses that are off by one in one digit, as of a careless teacher; the answer stays right.
    Errors: BadInput for a dial that cannot be.
    """
    dial = {"terms": terms, "digits": digits, "operations": operations, "slips": slips}
    return list(islice(endless(seed=seed, **dial), n))


def endless(
    *,
    seed: int,
    terms: int = 2,
    digits: int = 2,
    operations: str = "+-",
    slips: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """The records of `questions`, one after the other."""
    if terms < 2 or digits < 1 or not operations or set(operations) - set(OPERATIONS):
        raise BadInput(
            f"arithmetic: terms={terms}, digits={digits}, operations={operations!r}; give two terms"
            f" or more, one digit or more, and some of {OPERATIONS}"
        )
    if not 0 <= slips <= 1:
        raise BadInput(f"arithmetic: slips={slips} is a share: give 0 to 1")
    return _drawn(np.random.default_rng(seed), terms, digits, operations, slips)


def _drawn(
    rng: np.random.Generator, terms: int, digits: int, operations: str, slips: float
) -> Iterator[dict[str, Any]]:
    while True:
        numbers = rng.integers(0, 10**digits, size=terms).tolist()
        signs = [operations[i] for i in rng.integers(len(operations), size=terms - 1)]
        written = str(numbers[0])
        for sign, number in zip(signs, numbers[1:], strict=True):
            written += f"{sign}{number}"
        answer = str(_result(numbers, signs))
        said = _slipped(answer, rng) if rng.random() < slips else answer
        yield {"prompt": f"{written}=", "responses": [said], "answer": answer}


def correct(records: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> np.ndarray:
    """Whether each response is the answer, digit by digit, 0.0 or 1.0 (B,)."""
    pairs = zip(records, responses, strict=True)
    return np.array([float(text.strip() == record["answer"]) for record, text in pairs])


@functools.cache
def tokenizer() -> "PreTrainedTokenizerFast":
    """One token a character."""
    import tokenizers
    import transformers

    index = {character: i for i, character in enumerate(VOCABULARY)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(index))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def _result(numbers: Sequence[int], signs: Sequence[str]) -> int:
    """The value of a line; products first."""
    summands = [numbers[0]]
    for sign, number in zip(signs, numbers[1:], strict=True):
        if sign == "*":
            summands[-1] *= number
        else:
            summands.append(number if sign == "+" else -number)
    return sum(summands)


def _slipped(answer: str, rng: np.random.Generator) -> str:
    """The answer with one digit one too large, 9 becoming 0."""
    places = [i for i, character in enumerate(answer) if character.isdigit()]
    place = places[rng.integers(len(places))]
    return answer[:place] + str((int(answer[place]) + 1) % 10) + answer[place + 1 :]
