"""What is wrong with a record, in words."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.structs import BadInput


class Fault(BadInput):
    """One record that cannot be used: `reason` is what it is counted by.

    A fault of structure stops the run unless it may skip such records; one of content (the data
    is what it should be, this record says nothing) is always counted.
    """

    def __init__(self, reason: str, message: str, *, content: bool = False):
        super().__init__(message)
        self.reason = reason
        self.content = content


def kind(value: Any) -> str:
    """What a value is, in words, with its start."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "text", list: "a list", tuple: "a list"}
    names |= {int: "a number", float: "a number", bytes: "bytes"}
    name = "an object" if isinstance(value, Mapping) else names.get(type(value))
    shown = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "very large"
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    return f"{name or type(value).__name__} ({shown})"


def wrong(value: Any, name: str, where: str, wanted: str) -> Fault:
    """The fault of a field that holds another type of value."""
    return Fault("wrong type", f'{where}: field "{name}" is {kind(value)}; it must be {wanted}')


def missing(name: str, where: str, form: str) -> Fault:
    """The fault of a field that is not there."""
    return Fault("missing field", f'{where}: field "{name}" is missing; {form}')


def text(value: Any, name: str, where: str, wanted: str = "text") -> str:
    """The value, if it is text that UTF-8 can write. Errors: Fault."""
    if not isinstance(value, str):
        raise wrong(value, name, where, wanted)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate U+{ord(value[error.start]):04X} at character {error.start}"
        message = f'{where}: field "{name}" holds {found}; write the character itself'
        raise Fault("not UTF-8", message) from None
    return value


def listed(counts: Mapping[str, int]) -> str:
    """Reasons with their counts, the most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ranked)
