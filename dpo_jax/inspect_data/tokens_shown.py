"""Token ids as text that can be read: borders, blanks, control tokens and lone bytes.

A character that would not be seen is written by a mark, so that nothing in the data can move the
cursor of a terminal or turn the order of a page round.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from dpo_jax.data.tokens import controls_of

MARKS = {" ": "·", "\n": "↵\n", "\t": "⇥", "\r": "␍"}
UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what decoders write for part of a character


@dataclass(frozen=True)
class Token:
    """One token. text: what it adds to the text before it; name: its entry in the vocabulary."""

    id: int
    text: str
    name: str
    scored: bool
    control: bool


class Vocabulary:
    """The texts of a tokenizer's tokens, each found once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.controls = frozenset(controls_of(tokenizer).ids.tolist())
        self._known: dict[int, tuple[str, str]] = {}

    def tokens(self, ids: Sequence[int] | np.ndarray, scored: Iterable[bool]) -> tuple[Token, ...]:
        """The tokens of a part, and which of them count."""
        return tuple(
            Token(int(id), *self._of(int(id)), bool(counts), int(id) in self.controls)
            for id, counts in zip(ids, scored, strict=True)
        )

    def _of(self, id: int) -> tuple[str, str]:
        """(text, name) of a token."""
        if id not in self._known:
            name = str(self.tokenizer.convert_ids_to_tokens(id))
            self._known[id] = (name if id in self.controls else self._text(id, name)), name
        return self._known[id]

    def _text(self, id: int, name: str) -> str:
        # behind itself, because decoders strip the blank at the start of a text
        once, twice = (self._decoded([id] * count) for count in (1, 2))
        text = twice[len(once) :] if twice.startswith(once) else once
        if UNKNOWN_CHARACTER in text and UNKNOWN_CHARACTER not in name:
            return _hex(name)
        return text or name

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _hex(name: str) -> str:
    """The bytes of a token of byte-level BPE that are no whole characters; other names stay."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte = {character: value for value, character in bytes_to_unicode().items()}
    if not all(character in byte for character in name):
        return name
    return "".join(f"<0x{byte[character]:02X}>" for character in name)


def visible(text: str) -> list[tuple[str, bool]]:
    """(characters, whether they are a mark) in turn: a blank is ·, a line end ↵ and a new line,
    what is not printable ⟨its code⟩."""
    pieces = ((MARKS.get(c) or _coded(c), c in MARKS or not c.isprintable()) for c in text)
    return [
        ("".join(piece for piece, _ in run), marked)
        for marked, run in groupby(pieces, key=lambda piece: piece[1])
    ]


def _coded(character: str) -> str:
    return character if character.isprintable() else f"⟨{ord(character):X}⟩"


def shortened(tokens: Sequence[Token], first: int, last: int) -> Iterator[Token | int]:
    """The tokens; of many only the first and the last, and how many are left out between them."""
    if len(tokens) <= first + last:
        yield from tokens
        return
    yield from tokens[:first]
    yield len(tokens) - first - last
    yield from tokens[len(tokens) - last :]
