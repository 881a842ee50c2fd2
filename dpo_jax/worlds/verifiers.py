"""Rewards that can be verified: plain functions (records, responses) -> score_B of texts.

A solution ends with its number behind a mark, "#### 72" as GSM8K (2110.14168) writes it, or
"A: 72" as its published model solutions do. `gsm8k` compares that number with the record's.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from dpo_jax.structs import BadInput

MARK = re.compile(r"####|^A:", re.MULTILINE)
NUMBER = re.compile(  # a sign, a currency, digits with commas between threes or none, a unit
    r"(?P<sign>-?)\s*[$€£]?\s*(?P<inner>-?)(?P<digits>\d{1,3}(?:,\d{3})+|\d+)?(?P<part>\.\d+)?"
    r"\s*(?:%|[$€£]|[^\W\d_]+(?:\s+[^\W\d_]+)*)?\s*\.?"
)
SCALES = {"hundred", "thousand", "million", "billion", "trillion", "dozen"}


def final_number(text: str) -> Decimal | None:
    """The number behind the last mark, to the end of its line; None where there is none.

    Commas, a sign, a currency, a unit behind it and a full stop are read: "$-1,200.50 a week."
    is -1200.50. More than one number on the line is none, and so is "2 million".
    """
    marks = list(MARK.finditer(text))
    if not marks:
        return None
    line = text[marks[-1].end() :].strip().partition("\n")[0]
    found = NUMBER.fullmatch(line.strip())
    if found is None or not (found["digits"] or found["part"]):
        return None
    if set(re.findall(r"[^\W\d_]+", line.lower())) & SCALES or (found["sign"] and found["inner"]):
        return None
    sign = found["sign"] or found["inner"]
    return Decimal(sign + (found["digits"] or "0").replace(",", "") + (found["part"] or ""))


def gsm8k(records: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> np.ndarray:
    """Whether the final number of each response is the record's, 0.0 or 1.0 (B,).

    The record's stands in its field "final", or at the end of its "answer" behind ####.
    Errors: BadInput for a record with neither.
    """
    wanted = [_wanted(record) for record in records]
    pairs = zip(wanted, responses, strict=True)
    return np.array([float(final_number(text) == number) for number, text in pairs])


def answered(records: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> np.ndarray:
    """Whether each response has a final number at all, right or wrong, 0.0 or 1.0 (B,): a reward
    of the format."""
    return np.array([float(final_number(text) is not None) for text in responses])


def overlong(
    records: Sequence[Mapping[str, Any]],
    responses: Sequence[str],
    *,
    words: int = 256,
    margin: int = 64,
) -> np.ndarray:
    """DAPO's soft punishment of length (2503.14476 eq. 13), counted in words, (B,).

    0 up to words - margin, then falling in a line to -1 at `words`, and -1 beyond.
    """
    if not 0 < margin <= words:
        raise BadInput(f"overlong: margin={margin} of words={words}: give 1 to {words}")
    over_B = np.array([len(text.split()) for text in responses]) - (words - margin)
    return -np.clip(over_B / margin, 0.0, 1.0)


def _wanted(record: Mapping[str, Any]) -> Decimal:
    said = record.get("final", record.get("answer"))
    text = "" if said is None else str(said)
    number = final_number(text if MARK.search(text) else f"#### {text}")
    if number is None:
        raise BadInput(
            f"{record.get('where', 'a record')}: gsm8k reads a number in the field final, or in "
            f"answer behind ####; this has {said!r}"
        )
    return number
