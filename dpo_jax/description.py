"""What a value is, as JSON can hold it: for the record, for equality and for digests."""

import hashlib
import inspect
import json
import numbers
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from dpo_jax import functions
from dpo_jax.functions import UNSET
from dpo_jax.override import Spot, is_record, spots, untouched
from dpo_jax.structs import BadInput


def describe(value: Any) -> Any:
    """A value as JSON can hold it, every option spelt out but for later ones at their defaults.

    A frozen dataclass is {"class": "module:name", field: value, ...}. A function is {"function":
    "module:name", keyword: value, ...}, its defaults among them, or the bare name where it has no
    options; what it closes over counts as keywords. The name of a function of another package
    carries a digest of the file that defines it, "module:name@0123abcd"; what that file imports
    does not count. BadInput for what has no lasting description.
    """
    return _described(value, Spot(""))


def canonical(description: Any) -> str:
    """A description as one text: sorted, and 1 is 1.0. Equal values have equal texts."""
    return json.dumps(_floats(description), sort_keys=True, separators=(",", ":"))


def sha8(content: bytes) -> str:
    """8 hex digits of the sha256."""
    return hashlib.sha256(content).hexdigest()[:8]


def code_digest() -> str:
    """8 hex digits of the sha256 of this package's source files and their names."""
    folder = Path(__file__).parent
    parts = []
    for file in sorted(folder.rglob("*.py")):
        parts += [file.relative_to(folder).as_posix().encode(), file.read_bytes()]
    return sha8(b"\0".join(parts))


def _described(value: Any, spot: Spot) -> Any:
    if value is UNSET:
        return "(required)"
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _described(item, _inside(spot, key)) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_described(item, _inside(spot, place)) for place, item in enumerate(value)]
    if is_record(value):
        now = {
            name: _described(getattr(value, name), at)
            for name, at in spots(value, spot).items()
            if not untouched(value, name, at)
        }
        return {"class": _identity(type(value))} | now
    if callable(value):
        return _described_function(value, spot)
    raise BadInput(
        f"{spot.path or 'value'}: {type(value).__name__} has no lasting description; "
        "use numbers, text, tuples, functions and frozen dataclasses"
    )


def _inside(spot: Spot, name: Any) -> Spot:
    return Spot(spot.inside(str(name)))


def _described_function(value: Callable[..., Any], spot: Spot) -> Any:
    function, args, bound = functions.unwrap(value)
    described = {"args": _described(args, _inside(spot, "args"))} if args else {}
    for name, cell in _closure(function).items():
        described[name] = _described(cell, _inside(spot, name))
    given, inputs = tuple(spot.extra.get("given", ())), spot.extra.get("inputs")
    places = spots(value, spot)
    for name, now in functions.keywords(value, inputs, given).items():
        try:
            described[name] = _described(now, places[name])
        except BadInput:
            if name in bound:
                raise
            described[name] = type(now).__name__  # a default is part of the code
    identity = _identity(function)
    return {"function": identity} | described if described else identity


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    """What an inner function remembers of the call that made it."""
    plain = _plain(function)
    if not inspect.isfunction(plain) or not plain.__closure__:
        return {}
    names = plain.__code__.co_freevars
    cells = {name: cell.cell_contents for name, cell in zip(names, plain.__closure__, strict=True)}
    return {name: content for name, content in cells.items() if content is not plain}


def _plain(function: Any) -> Any:
    """The Python function behind a cache or a jit; a decorated one as it is, with its closure."""
    return function if inspect.isfunction(function) else inspect.unwrap(function)


def _identity(function: Any) -> str:
    module, called = functions.function_id(function)
    if functions.in_house(module):
        return f"{module}:{called}"
    plain = _plain(function)
    try:
        source = inspect.getsourcefile(plain)
    except TypeError:  # builtins have no file
        source = None
    content = Path(source).read_bytes() if source and Path(source).is_file() else b""
    if inspect.isfunction(plain) and (not content or plain.__name__ == "<lambda>"):
        content += _body(plain.__code__).encode()
    return f"{module}:{called}@{sha8(content)}" if content else f"{module}:{called}"


def _body(code: CodeType) -> str:
    """The instructions of a function without its place in a file."""
    parts = [code.co_code.hex(), repr(code.co_names)]
    for constant in code.co_consts:
        if isinstance(constant, frozenset):  # printed in an order that changes between processes
            constant = sorted(map(repr, constant))
        parts.append(_body(constant) if isinstance(constant, CodeType) else repr(constant))
    return "\n".join(parts)


def _floats(description: Any) -> Any:
    if isinstance(description, dict):
        return {key: _floats(item) for key, item in description.items()}
    if isinstance(description, list):
        return [_floats(item) for item in description]
    whole = isinstance(description, int) and not isinstance(description, bool)
    return float(description) if whole else description
