"""Values as text: what the command line writes for a declared type, and how a value is shown."""

import ast
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from dpo_jax import functions
from dpo_jax.structs import Array, BadInput

_ORDER = (NoneType, bool, int, float)  # the narrowest reading of a text comes first


def members(kind: Any) -> list[Any]:
    """The types of a union, one by one; a type itself otherwise."""
    if get_origin(kind) in (Union, UnionType):
        return [member for part in get_args(kind) for member in members(part)]
    return [kind]


def spelled(kind: Any) -> str:
    """A declared type as an error message names it."""
    names = []
    for member in members(kind):
        origin = get_origin(member) or member
        if origin is Literal:
            names.extend(map(repr, get_args(member)))
        elif member is NoneType:
            names.append("None")
        elif origin is Callable:
            names.append("a function (losses.NAME, module:NAME or path/file.py:NAME)")
        elif origin is tuple and get_args(member)[1:] == (Ellipsis,):
            names.append(f"a tuple of {spelled(get_args(member)[0])}")
        elif isinstance(member, type):
            names.append(member.__name__)
        else:
            names.append(str(member).replace("typing.", ""))
    return " or ".join(dict.fromkeys(names))


def conform(value: Any, kind: Any) -> Any:
    """`value` as its declared type wants it (an int where a float is, a list where a tuple is).

    Raises ValueError where it is of another type.
    """
    options = members(kind)
    if type(value) in options and not (isinstance(value, float) and math.isnan(value)):
        return value
    for member in options:
        try:
            return _conform_one(value, member)
        except ValueError:
            continue
    raise ValueError(f"{show(value)} is no {spelled(kind)}")


def _conform_one(value: Any, member: Any) -> Any:
    origin = get_origin(member) or member
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if member is float and number and not math.isnan(value):
        return float(value)
    if member is int and isinstance(value, numbers.Integral) and number:
        return int(value)
    if origin is tuple and isinstance(value, tuple | list):
        return _tuple(value, get_args(member), conform)
    if origin is Literal and value in get_args(member):
        return value
    if member is Any or not (isinstance(origin, type) or origin is Literal):  # a type variable
        return value
    if isinstance(origin, type) and origin not in (int, float, tuple) and isinstance(value, origin):
        return value
    raise ValueError


def _tuple(
    values: Sequence[Any], kinds: tuple[Any, ...], each: Callable[[Any, Any], Any]
) -> tuple[Any, ...]:
    """each(value, kind) of the values and the types that `tuple[...]` declares for them."""
    if not kinds:
        kinds = (Any, Ellipsis)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    if len(kinds) != len(values):
        raise ValueError
    return tuple(each(value, kind) for value, kind in zip(values, kinds, strict=True))


def parse(text: str, kind: Any, beside: str = "") -> Any:
    """The value of a declared type that `text` writes.

    true, false, None, numbers, tuples in parentheses; text with or without quotes where text is
    declared; a function by `functions.named` (`beside`: the name of the one it replaces). Raises
    ValueError where the text writes no such value, BadInput where it names what is not there.
    """
    failure = ValueError(f"{text!r} is no {spelled(kind)}")
    for member in sorted(members(kind), key=_rank):
        try:
            return _parse_one(text, member, beside)
        except BadInput as error:
            failure = error
        except ValueError:
            continue
    raise failure


def _rank(member: Any) -> int:
    if member is str:
        return len(_ORDER) + 1  # every text is text: the last resort
    return _ORDER.index(member) if member in _ORDER else len(_ORDER)


def _parse_one(text: str, member: Any, beside: str) -> Any:
    origin = get_origin(member) or member
    if member is NoneType and text in ("None", "none"):
        return None
    if member is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if member is int:
        return _integer(text)
    if member is float:
        return conform(float(text), float)
    if member is str and text:
        return _unquoted(text)
    if origin is tuple:
        return _tuple(_pieces(text), get_args(member), parse)
    if origin is Literal:
        return _choice(_unquoted(text), get_args(member))
    if member is Any:
        return _anything(text, beside)
    if member in (NoneType, bool, str, *get_args(Array)):  # an array cannot be written
        raise ValueError
    return conform(functions.named(text, beside), member)


def _pieces(text: str) -> list[str]:
    """What stands in the parentheses of a tuple."""
    if text[:1] + text[-1:] not in ("()", "[]"):
        raise ValueError
    pieces = split(text[1:-1])
    return pieces if pieces[-1] else pieces[:-1]  # the comma of a tuple of one


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 2e3 and 2000.0 are whole
    if not number.is_integer():
        raise ValueError
    return int(number)


def _choice(text: str, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if str(choice) == text:
            return choice
    raise ValueError


def _anything(text: str, beside: str) -> Any:
    try:
        return _literal(text)
    except ValueError:
        return functions.named(text, beside)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError) as error:
        raise ValueError from error


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def split(text: str) -> list[str]:
    """`.03,.1` as its values: cut at commas outside brackets and quotes."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not pieces[-1].strip():  # a quote opens only a piece
            quote = letter
        depth += 0 if quote else (letter in "([{") - (letter in ")]}")
        if letter == "," and not quote and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def show(value: Any) -> str:
    """A value as the command line would write it; functions and values that hold them by name."""
    if value is functions.UNSET:
        return "(required)"
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return f"({', '.join(map(show, value))}{',' * (len(value) == 1)})"
    if isinstance(value, partial):
        bound = [f"{key}={show(item)}" for key, item in value.keywords.items()]
        return f"{functions.name(value)}({', '.join([*map(show, value.args), *bound])})"
    if is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "name", getattr(value, "__name__", None))
        return f"{type(value).__name__}" + (f" {own}" if isinstance(own, str) else "")
    if inspect.isroutine(value) or isinstance(value, type) or hasattr(value, "__wrapped__"):
        return functions.name(value)
    return repr(value)
