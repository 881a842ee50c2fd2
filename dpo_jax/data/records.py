"""Raw rows to records of one form, each fault named by its place and field.

A record is a dict of "prompt" and "responses" (best to worst) as `layouts` finds them, "where"
(file:line) and, where the data has them, "label", "scores", "criteria", "soft_label", "margin" and
"weight"; every other field is kept as it was.

Scores are a number per response (for a pair also score_chosen and score_rejected), a list of
numbers per response, or named, and then stand in "scores" as such lists and in "criteria" as their
names. Named ones change no order:

    {"helpfulness": [5, 3], "safety": [1, 2]}
    [{"helpfulness": 5, "safety": 1}, {"helpfulness": 3, "safety": 2}]

A pair with the label "tie" has soft_label 1/2.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from dpo_jax.data import layouts
from dpo_jax.data.faults import Fault, kind, wrong

Record = dict[str, Any]

TIE = "tie"
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {  # field: what it must be, the test
    "label": ("true, false, 0 or 1", lambda x: x in (0, 1)),
    "soft_label": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "margin": ("a finite number", lambda _: True),
    "weight": ("a finite number that is not negative", lambda x: x >= 0),
}


def canonical(raw: Any, where: str) -> Record:
    """The record of one raw row; `where` opens every message. Errors: Fault."""
    if not isinstance(raw, Mapping):
        message = f"{where}: {kind(raw)} instead of an object; {layouts.FORMS}"
        raise Fault("not an object", message)
    found = layouts.parts(raw, where)
    record = {str(name): value for name, value in raw.items() if name not in found.used}
    record |= {"prompt": found.prompt, "responses": found.responses, "where": where}
    for name in layouts.CONTEXT:
        record.pop(name, None)
    record |= layouts.context(raw, where)
    if is_tie(raw) and len(found.responses) == 2:
        record |= {"label": None, "soft_label": 0.5}
    for name in NUMBERS:
        value = _number(record.pop(name, None), name, where)
        record |= {} if value is None else {name: value}
    record.pop("criteria", None)
    return _with_scores(record, listed="responses" in found.used)


def _with_scores(record: Record, *, listed: bool) -> Record:
    """The record with its scores checked; a list of responses (`listed`) is sorted by them."""
    count, where = len(record["responses"]), record["where"]
    scores = record.pop("scores", None)
    if scores is None and all(record.get(name) is not None for name in layouts.PAIR_SCORES):
        scores = [record.pop(name) for name in layouts.PAIR_SCORES]
    if _is_named(scores):
        criteria, rows = _named_scores(scores, count, where)
        return record | ({"scores": rows, "criteria": criteria} if criteria else {})
    scores = _scores(scores, count, where)
    if scores is None:
        return record
    if listed and not isinstance(scores[0], list):  # such a list may come in any order
        order = np.argsort(np.negative(scores), kind="stable").tolist()
        record["responses"] = [record["responses"][k] for k in order]
        scores = [scores[k] for k in order]
    return record | {"scores": scores}


def is_tie(raw: Any) -> bool:
    """Whether a row says by its label that neither of two responses is better."""
    return isinstance(raw, Mapping) and raw.get("label") == TIE


def _number(value: Any, name: str, where: str) -> float | None:
    """An optional number of a record; null is the same as no field."""
    wanted, allowed = NUMBERS[name]
    if value is None:
        return None
    flag = isinstance(value, (bool, np.bool_))
    number = _finite(value) if not flag else float(value)
    if number is None or (flag and name != "label") or not allowed(number):
        raise wrong(value, name, where, wanted)
    return number


def _scores(value: Any, count: int, where: str) -> list[Any] | None:
    """A number per response, or per response a list of one number per criterion."""
    if value is None:
        return None
    rows = list(value) if isinstance(value, (list, tuple, np.ndarray)) else []
    nested = [list(row) if isinstance(row, (list, tuple, np.ndarray)) else [row] for row in rows]
    flat = [_finite(number) for row in nested for number in row]
    if not count or len(rows) != count or None in flat or len({len(row) for row in nested}) != 1:
        raise wrong(value, "scores", where, f"{count} finite numbers, one per response")
    if not isinstance(rows[0], (list, tuple, np.ndarray)):
        return flat
    width = len(nested[0])
    return [flat[start : start + width] for start in range(0, len(flat), width)]


def _is_named(value: Any) -> bool:
    """Whether scores are an object, or a list with objects."""
    listed = isinstance(value, (list, tuple)) and any(isinstance(each, Mapping) for each in value)
    return listed or isinstance(value, Mapping)


def _named_scores(value: Any, count: int, where: str) -> tuple[list[str], list[list[float]]]:
    """(criteria, per response a list of one number per criterion); null is the same as no field."""
    columns = _columns(value, count, where) if not isinstance(value, Mapping) else value
    columns = {name: column for name, column in columns.items() if column is not None}
    checked = []
    for name, column in columns.items():
        listed = isinstance(column, (list, tuple, np.ndarray))
        numbers = [_finite(number) for number in column] if listed else []
        if not count or len(numbers) != count or None in numbers:
            wanted = f"{count} finite numbers, one per response"
            raise wrong(column, f"scores.{name}", where, wanted)
        checked.append(numbers)
    return [str(name) for name in columns], [list(row) for row in zip(*checked, strict=True)]


def _columns(rows: Sequence[Any], count: int, where: str) -> dict[str, list[float]]:
    """An object of numbers per response as a list of numbers per criterion."""
    if len(rows) != count:
        message = f'{where}: field "scores" holds {len(rows)} objects; it must be {count}'
        raise Fault("wrong type", f"{message}, one per response")
    for k, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise wrong(row, f"scores[{k}]", where, "an object of a number per criterion")
    columns: dict[str, list[float]] = {
        name: [] for row in rows for name, value in row.items() if value is not None
    }
    for name, column in columns.items():
        for k, row in enumerate(rows):
            if row.get(name) is None:
                message = f'{where}: field "scores[{k}].{name}" is missing'
                raise Fault("missing field", f"{message}; another response has it")
            number = _finite(row[name])
            if number is None:
                raise wrong(row[name], f"scores[{k}].{name}", where, "a finite number")
            column.append(number)
    return columns


def _finite(value: Any) -> float | None:
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
