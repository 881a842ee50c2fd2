"""Texts to token ids, and the control tokens of a tokenizer.

A text makes no control tokens: what reads like one is parted behind its first character, and the
parts are tokenised side by side.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.structs import BadInput

Ids = np.ndarray  # int32, one text

PAUSES = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # code points that are no characters


class Controls(NamedTuple):
    """The control tokens of a tokenizer: their ids, and what reads like one of them."""

    ids: np.ndarray
    reads_like: re.Pattern[str]


def controls_of(tokenizer: Any) -> Controls:
    """BOS, EOS and all that is marked special; not what stands for unknown text alone."""
    added = tokenizer.added_tokens_decoder.items()
    special = {id: token.content for id, token in added if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        special.pop(tokenizer.unk_token_id, None)
    names = sorted({name for name in special.values() if len(name) > 1}, key=len, reverse=True)
    pattern = "|".join(map(re.escape, names))
    return Controls(np.array(sorted(special), np.int64), re.compile(pattern or r"(?!)"))


def parted(text: str, tokenizer: Any) -> list[str]:
    """The text cut behind the first character of all that reads like a control token."""
    found = controls_of(tokenizer).reads_like.finditer(text)
    cuts = [0, *(match.start() + 1 for match in found), len(text)]
    return [text[i:j] for i, j in pairwise(cuts)]


def encoded(texts: Sequence[str], tokenizer: Any, *, controls: bool = False) -> list[Ids]:
    """The ids of the texts alone: no BOS or EOS is added.

    controls: what reads like a control token is one, as in what a template writes.
    Errors: BadInput for a text that the tokenizer cannot read.
    """
    if not texts:
        return []
    try:
        found = _called(list(texts), tokenizer, controls)["input_ids"]
    except Exception as error:  # tokenizers raises no narrower one
        if len(texts) > 1:  # find the text
            return [encoded([text], tokenizer, controls=controls)[0] for text in texts]
        raise BadInput(f"the tokenizer cannot read the text {texts[0][:60]!r} ({error})") from error
    rows = [np.array(ids, np.int32) for ids in found]
    if not controls:  # a vocabulary may hold the name of a control token as a word
        marked = controls_of(tokenizer).ids
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            if np.isin(row, marked).any():
                rows[i] = _spelt(text, row, tokenizer)
    return rows


def _spelt(text: str, ids: Ids, tokenizer: Any) -> Ids:
    """The ids of a text with no control tokens; as they are where the tokenizer cannot spell it."""
    pieces = parted(text, tokenizer)
    if len(pieces) == 1:
        return ids
    try:
        return np.concatenate(side_by_side(pieces, tokenizer))
    except Exception:  # a vocabulary of whole words, without one for the unknown
        return ids


def side_by_side(pieces: Sequence[str], tokenizer: Any, *, controls: bool = False) -> list[Ids]:
    """The ids of the pieces of one text: no token crosses their borders, and each is read as what
    stands behind the others, not as the beginning of a text.

    Between them stands a character that no text holds, whose own tokens are left out. Where it
    will not be parted from its neighbours every piece is tokenised as a text.
    """
    pause = next(mark for mark in PAUSES if not any(mark in piece for piece in pieces))
    try:
        found = _called(pause.join(pieces), tokenizer, controls, return_offsets_mapping=True)
    except NotImplementedError:  # a tokenizer that does not say where its tokens stand
        return encoded(pieces, tokenizer, controls=controls)
    pauses = np.cumsum([len(piece) + 1 for piece in pieces[:-1]], dtype=int) - 1
    rows: list[list[int]] = [[] for _ in pieces]
    for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        inside = pauses[(start <= pauses) & (pauses < end)]
        if len(inside) and end - start > 1:
            return encoded(pieces, tokenizer, controls=controls)
        if not len(inside):
            rows[int(np.searchsorted(pauses, start))].append(token)
    return [np.array(row, np.int32) for row in rows]


def _called(text: Any, tokenizer: Any, controls: bool, **options: Any) -> Any:
    return tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=not controls,
        return_attention_mask=False,
        verbose=False,
        **options,
    )


def vocabulary(tokenizer: Any) -> int:
    """One more than the largest id: what an embedding holds from here on has no text."""
    return max(tokenizer.get_vocab().values()) + 1


def start_id(tokenizer: Any) -> int:
    """What a prompt starts with: BOS, or EOS where there is no BOS."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return _present(first, "BOS and no EOS token to start a prompt with; set tokenizer.bos_token")


def end_id(tokenizer: Any) -> int:
    """EOS."""
    return _present(tokenizer.eos_token_id, "EOS token; set tokenizer.eos_token")


def _present(token: int | None, missing: str) -> int:
    if token is None:
        raise BadInput(f"the tokenizer has no {missing}")
    return token
