"""Files and functions of preference data to records of one form.

A record is a dict of "prompt" (text), "responses" (texts, best to worst), "where" (file:line) and,
where the data has them, "label", "scores", "criteria", "soft_label", "margin" and "weight"; every
other field is kept as it was. Four forms are read:

    prompt, responses             a list of texts, best to worst, or with scores in any order
    prompt, chosen, rejected      a pair
    prompt, completion            text to imitate, or an unpaired judgement with a label
    prompt                        a prompt to sample on;  text alone is a completion of nothing

Scores are a number per response, a list of numbers per response, or named, and then stand in
"scores" as such lists and in "criteria" as their names. Named ones change no order:

    {"helpfulness": [5, 3], "safety": [1, 2]}
    [{"helpfulness": 5, "safety": 1}, {"helpfulness": 3, "safety": 2}]

Faults of structure (not JSON, a missing field, a wrong type) stop with file, line and field, or
are counted; faults of content (empty, equal, too long) are found in `template`.
"""

import gzip
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import IO, Any

import numpy as np
from etils import epath

from dpo_jax.structs import BadInput

Record = dict[str, Any]
Source = str | os.PathLike[str] | Callable[[], Sequence[Mapping[str, Any]]]

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet")
PAIR = "a pair needs prompt, chosen, rejected"
FORMS = (
    "a record needs prompt, chosen and rejected, or prompt and responses,"
    " or prompt and completion, or prompt alone, or text alone"
)
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {  # field: what it must be, the test
    "label": ("true, false, 0 or 1", lambda x: x in (0, 1)),
    "soft_label": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "margin": ("a finite number", lambda _: True),
    "weight": ("a finite number that is not negative", lambda x: x >= 0),
}


class _Fault(BadInput):
    """A fault of structure: `reason` is what on_bad="skip" counts it by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read(source: Source, *, on_bad: str = "stop") -> tuple[list[Record], dict[str, int]]:
    """(records, skipped): all records of a source, and the faulty ones by reason.

    source: a path (.jsonl .json .jsonl.gz .jsonl.zst .parquet; local or gs://), or a function
    without arguments that returns a sequence of dicts. on_bad: "stop" at the first faulty record,
    or "skip" and count it.
    Errors: BadInput for a missing, unreadable or empty source and, with "stop", for a faulty
    record; it names file, line and field.
    """
    if on_bad not in ("stop", "skip"):
        raise BadInput(f"data.on_bad={on_bad!r}; it must be stop or skip")
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    for where, raw in _raw(source):
        try:
            parsed = _parsed(raw, where) if isinstance(raw, bytes) else raw
            records.append(canonical(parsed, where))
        except _Fault as fault:
            if on_bad == "stop":
                raise
            skipped[fault.reason] += 1
    if not records:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        raise BadInput(f"{_name(source)}: no records" + (f" ({reasons})" if reasons else ""))
    return records, dict(skipped)


def canonical(raw: Any, where: str) -> Record:
    """The record of one raw dict; `where` opens every message. Errors: BadInput for a fault."""
    if not isinstance(raw, Mapping):
        raise _Fault("not an object", f"{where}: {_kind(raw)} instead of an object; {FORMS}")
    prompt, responses, used = _texts(raw, where)
    record = {str(name): value for name, value in raw.items() if name not in used}
    record |= {"prompt": prompt, "responses": responses, "where": where}
    for name in NUMBERS:
        value = _number(record.pop(name, None), name, where)
        record |= {} if value is None else {name: value}
    scores = record.pop("scores", None)
    record.pop("criteria", None)
    if _is_named(scores):
        criteria, rows = _named_scores(scores, len(responses), where)
        return record | ({"scores": rows, "criteria": criteria} if criteria else {})
    scores = _scores(scores, len(responses), where)
    if scores is None:
        return record
    if "responses" in used and not isinstance(scores[0], list):  # a list may come in any order
        order = np.argsort(np.negative(scores), kind="stable").tolist()
        record["responses"] = [responses[k] for k in order]
        scores = [scores[k] for k in order]
    return record | {"scores": scores}


def _texts(raw: Mapping[str, Any], where: str) -> tuple[str, list[str], tuple[str, ...]]:
    """(prompt, responses, the fields they came from), by the first form that fits."""
    if "responses" in raw:
        texts = raw["responses"]
        if not isinstance(texts, (list, tuple)) or not texts:
            raise _wrong(texts, "responses", where, "a list of texts, best to worst")
        checked = [_checked(text, f"responses[{k}]", where) for k, text in enumerate(texts)]
        return _text(raw, "prompt", where, FORMS), checked, ("responses",)
    if "chosen" in raw or "rejected" in raw:
        prompt, *pair = (_text(raw, name, where, PAIR) for name in ("prompt", "chosen", "rejected"))
        return prompt, pair, ("chosen", "rejected")
    if "completion" in raw:
        completion = _text(raw, "completion", where, FORMS)
        return _text(raw, "prompt", where, FORMS), [completion], ("completion",)
    if "text" in raw and "prompt" not in raw:
        return "", [_text(raw, "text", where, FORMS)], ("text",)
    if "messages" in raw and "prompt" not in raw:
        raise _wrong(raw["messages"], "messages", where, "text in prompt and completion")
    return _text(raw, "prompt", where, FORMS), [], ()


def _text(raw: Mapping[str, Any], name: str, where: str, form: str) -> str:
    if name not in raw:
        raise _Fault("missing field", f'{where}: field "{name}" is missing; {form}')
    return _checked(raw[name], name, where)


def _checked(text: Any, name: str, where: str) -> str:
    """The text, if it is one that UTF-8 can write."""
    if not isinstance(text, str):
        raise _wrong(text, name, where, "text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        message = f'{where}: field "{name}" holds {found}; write the character itself'
        raise _Fault("not UTF-8", message) from None
    return text


def _wrong(value: Any, name: str, where: str, wanted: str) -> _Fault:
    """The fault of a value of another type, or of messages where text is read."""
    messages = isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping)
    if messages and not name.startswith("scores"):
        found = "is a list of messages; conversations are not read yet"
        return _Fault("conversation", f'{where}: field "{name}" {found}, give {wanted}')
    message = f'{where}: field "{name}" is {_kind(value)}; it must be {wanted}'
    return _Fault("wrong type", message)


def _number(value: Any, name: str, where: str) -> float | None:
    """An optional number of a record; null is the same as no field."""
    wanted, allowed = NUMBERS[name]
    if value is None:
        return None
    flag = isinstance(value, (bool, np.bool_))
    number = _finite(value) if not flag else float(value)
    if number is None or (flag and name != "label") or not allowed(number):
        raise _wrong(value, name, where, wanted)
    return number


def _scores(value: Any, count: int, where: str) -> list[Any] | None:
    """A number per response, or per response a list of one number per criterion."""
    if value is None:
        return None
    rows = list(value) if isinstance(value, (list, tuple, np.ndarray)) else []
    nested = [list(row) if isinstance(row, (list, tuple, np.ndarray)) else [row] for row in rows]
    flat = [_finite(number) for row in nested for number in row]
    if not count or len(rows) != count or None in flat or len({len(row) for row in nested}) != 1:
        raise _wrong(value, "scores", where, f"{count} finite numbers, one per response")
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
            raise _wrong(column, f"scores.{name}", where, wanted)
        checked.append(numbers)
    return [str(name) for name in columns], [list(row) for row in zip(*checked, strict=True)]


def _columns(rows: Sequence[Any], count: int, where: str) -> dict[str, list[float]]:
    """An object of numbers per response as a list of numbers per criterion."""
    if len(rows) != count:
        message = f'{where}: field "scores" holds {len(rows)} objects; it must be {count}'
        raise _Fault("wrong type", f"{message}, one per response")
    for k, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise _wrong(row, f"scores[{k}]", where, "an object of a number per criterion")
    columns: dict[str, list[float]] = {
        name: [] for row in rows for name, value in row.items() if value is not None
    }
    for name, column in columns.items():
        for k, row in enumerate(rows):
            if row.get(name) is None:
                message = f'{where}: field "scores[{k}].{name}" is missing'
                raise _Fault("missing field", f"{message}; another response has it")
            number = _finite(row[name])
            if number is None:
                raise _wrong(row[name], f"scores[{k}].{name}", where, "a finite number")
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


def _kind(value: Any) -> str:
    """What a value is, in words, with its start."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "text", list: "a list", tuple: "a list"}
    names |= {int: "a number", float: "a number", bytes: "bytes"}
    kind = "an object" if isinstance(value, Mapping) else names.get(type(value))
    shown = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "very large"
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    return f"{kind or type(value).__name__} ({shown})"


def _raw(source: Source) -> Iterator[tuple[str, Any]]:
    """(where, raw record) of a source; the lines of a .jsonl come as bytes, to be parsed."""
    if callable(source):
        returned = source()
        if not isinstance(returned, Sequence) or isinstance(returned, (str, bytes)):
            raise BadInput(f"{_name(source)} returned {_kind(returned)}; it must return dicts")
        yield from ((f"{_name(source)}[{i}]", raw) for i, raw in enumerate(returned))
        return
    source = str(source)
    if not source.endswith(SUFFIXES):
        raise BadInput(f"{source}: this kind of file is not read; it must be {', '.join(SUFFIXES)}")
    path = epath.Path(source)
    if not path.exists() or path.is_dir():
        raise BadInput(f"{source}: no such file; data.source names it")
    readers = {".parquet": _parquet, ".json": _json}
    reader = next((readers[suffix] for suffix in readers if source.endswith(suffix)), _lines)
    try:
        with path.open("rb") as file:
            yield from reader(file, source)
    except (EOFError, zlib.error, OSError) as error:
        raise BadInput(f"{source}: cannot be read to its end ({error}); is it whole?") from error


def _lines(file: IO[bytes], source: str) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, without the byte order mark."""
    opened: Any = file
    if source.endswith(".gz"):
        opened = gzip.GzipFile(fileobj=file)
    elif source.endswith(".zst"):
        opened = _unzstd(file)
    for number, line in enumerate(opened, 1):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip():
            yield f"{source}:{number}", content


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader:
            rest = b""
            while block := reader.read(1 << 20):
                *lines, rest = (rest + block).split(b"\n")
                yield from lines
            yield rest
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error


def _json(file: IO[bytes], source: str) -> Iterator[tuple[str, Any]]:
    rows = _parsed(file.read().removeprefix(b"\xef\xbb\xbf"), source)
    if not isinstance(rows, list):
        raise BadInput(f"{source}: {_kind(rows)} instead of a list of records; or name it .jsonl")
    yield from ((f"{source}: record {i}", row) for i, row in enumerate(rows, 1))


def _parquet(file: IO[bytes], source: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise BadInput(f"{source}: not a whole Parquet file ({error})") from error
    yield from ((f"{source}: record {i}", row) for i, row in enumerate(rows, 1))


def _parsed(line: bytes, where: str) -> Any:
    """The JSON value of a line. Errors: BadInput for other bytes, or a field that stands twice."""
    try:
        return json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        field = _field_with_raw_bytes(line)
        raise _Fault(
            "not UTF-8",
            f"{where}: {field}not UTF-8 at byte {error.start}; convert the file to UTF-8",
        ) from None
    except json.JSONDecodeError as error:
        place = f"{error.msg} at character {error.pos}"
        raise _Fault("not JSON", f"{where}: not JSON ({place}); is the line whole?") from None
    except RecursionError:
        raise _Fault("not JSON", f"{where}: nested too deeply for a record; {FORMS}") from None
    except ValueError as error:
        raise _Fault("not JSON", f"{where}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'field "{twice}" stands twice; keep one')
    return fields


def _field_with_raw_bytes(line: bytes) -> str:
    """'field "x" is ' for the field of a JSON line that holds bytes which are not UTF-8."""
    try:
        fields = json.loads(line.decode(errors="surrogateescape"))
    except ValueError:
        return ""
    texts = fields.items() if isinstance(fields, dict) else ()
    odd = [name for name, text in texts if any("\udc80" <= c <= "\udcff" for c in str(text))]
    return f'field "{odd[0]}" is ' if odd else ""


def _name(source: Source) -> str:
    """A source in messages: its path, or the name of the function."""
    if not callable(source):
        return str(source)
    function = getattr(source, "func", source)
    return getattr(function, "__qualname__", type(function).__name__) + "()"
