"""Where rows come from, and the records they become.

A source is text or a function:

    prefs.jsonl                    a file: .jsonl .json .jsonl.gz .jsonl.zst .parquet, local or
                                   gs:// (which wants `gcsfs`)
    hub:owner/name:split           a data set of the Hugging Face hub, see `hub`
    tfds:name/config:split         a data set prepared by TFDS, see `tfds_preferences`
    a function without arguments   that returns dicts or yields them

`layouts` says which rows are read and `records` what becomes of them. Faults of structure (not
JSON, a missing field, a wrong type) stop with file, line and field, or are counted; faults of
content are counted: here a pair whose prompts differ, in `template` what is empty, equal or too
long.
"""

import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import IO, Any

from etils import epath

from dpo_jax.data import hub, tfds_preferences
from dpo_jax.data.faults import Fault, kind, listed
from dpo_jax.data.layouts import FORMS
from dpo_jax.data.records import Record, canonical, is_tie
from dpo_jax.structs import BadInput

Source = str | os.PathLike[str] | Callable[[], Iterable[Mapping[str, Any]]]
Layout = Callable[[Mapping[str, Any]], Any]  # a row -> a row of a known layout, or several

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet")
LONGEST_LINE = 1 << 26  # bytes


def read(
    source: Source, *, on_bad: str = "stop", layout: Layout | None = None
) -> tuple[list[Record], dict[str, int]]:
    """(records, skipped): all records of a source, and those left out by reason.

    layout: makes a row of another layout one that is known, or a list of such. on_bad: "stop" at
    the first row with a fault of structure, or "skip" and count it.
    Errors: BadInput for a missing, unreadable or empty source and, with "stop", for a faulty
    row; it names file, line and field.
    """
    if on_bad not in ("stop", "skip"):
        raise BadInput(f"data.on_bad={on_bad!r}; it must be stop or skip")
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    ties = False
    for where, raw in _rows(source):
        try:
            for row in _laid_out(raw, where, layout):
                records.append(canonical(row, where))
                ties |= is_tie(row)
        except Fault as fault:
            if on_bad == "stop" and not fault.content:
                raise
            skipped[fault.reason] += 1
    if not records:
        reasons = listed(skipped)
        raise BadInput(f"{_name(source)}: no records" + (f" ({reasons})" if reasons else ""))
    if ties:  # beside pairs that are ties by their label the others are certain
        for record in records:
            if len(record["responses"]) == 2:
                record.setdefault("soft_label", 1.0)
    return records, dict(skipped)


def first(source: Source, *, layout: Layout | None = None) -> Record:
    """The first record of a source without a fault; what follows is not read. Errors as `read`."""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    for where, raw in _rows(source):
        try:
            for row in _laid_out(raw, where, layout):
                return canonical(row, where)
        except Fault:
            continue
    raise BadInput(f"{_name(source)}: no records")


def _laid_out(raw: Any, where: str, layout: Layout | None) -> list[Any]:
    """The rows in known layouts that one row makes; bytes are parsed first."""
    row = _parsed(raw, where) if isinstance(raw, bytes) else raw
    if layout is None:
        return [row]
    if not isinstance(row, Mapping):
        raise Fault("not an object", f"{where}: {kind(row)} instead of an object; {FORMS}")
    try:
        found = layout(row)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        name = getattr(getattr(layout, "func", layout), "__name__", "layout")
        what = error.args[0] if error.args else type(error).__name__
        message = f"{where}: data.layout {name} cannot read the row ({what})"
        raise Fault("another layout", message) from error
    return [found] if isinstance(found, Mapping) else list(found)


def _rows(source: Source) -> Iterator[tuple[str, Any]]:
    """(where, row) of a source; the lines of a .jsonl come as bytes, to be parsed."""
    if callable(source):
        yield from _of_function(source)
        return
    source = str(source)
    if source.startswith(tfds_preferences.PREFIX):
        yield from tfds_preferences.rows(source)
    elif source.startswith(hub.PREFIX):
        for name, path in hub.files(source, SUFFIXES):
            yield from _of_file(path, name)
    else:
        yield from _of_file(source, source)


def _of_function(source: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    returned = source()
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping):
        raise BadInput(
            f"{_name(source)} returned {kind(returned)}; it must return dicts or yield them"
        )
    yield from ((f"{_name(source)}[{i}]", row) for i, row in enumerate(returned))


def _of_file(source: str, name: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, which messages call `name`."""
    if not source.endswith(SUFFIXES):
        raise BadInput(f"{name}: this kind of file is not read; it must be {', '.join(SUFFIXES)}")
    try:
        path = epath.Path(source)
        found = path.exists() and not path.is_dir()
    except ImportError as error:
        raise BadInput(f"{name}: {error} (pip install 'dpo-jax[gcs]' reads gs://)") from None
    except Exception as error:  # whatever the client of a gs:// path raises
        raise BadInput(f"{name}: cannot be reached ({error})") from error
    if not found:
        raise BadInput(f"{name}: no such file; data.source, or one of evaluation, names it")
    readers = {".parquet": _parquet, ".json": _json}
    reader = next((readers[suffix] for suffix in readers if source.endswith(suffix)), _lines)
    try:
        with path.open("rb") as file:
            yield from reader(file, name)
    except (EOFError, zlib.error, OSError) as error:
        raise BadInput(f"{name}: cannot be read to its end ({error}); is it whole?") from error


def _lines(file: IO[bytes], source: str) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, without the byte order mark."""
    opened: Any = gzip.GzipFile(fileobj=file) if source.endswith(".gz") else file
    lines = _unzstd(file) if source.endswith(".zst") else _split(opened)
    for number, line in enumerate(lines, 1):
        if len(line) == LONGEST_LINE:
            raise BadInput(f"{source}:{number}: the line is longer than {LONGEST_LINE} bytes")
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip():
            yield f"{source}:{number}", content


def _split(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, none longer than LONGEST_LINE: one without an end fills no memory."""
    return iter(lambda: file.readline(LONGEST_LINE), b"")


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader:
            yield from _split(io.BufferedReader(reader))
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error


def _json(file: IO[bytes], source: str) -> Iterator[tuple[str, Any]]:
    rows = _parsed(file.read().removeprefix(b"\xef\xbb\xbf"), source)
    if not isinstance(rows, list):
        raise BadInput(f"{source}: {kind(rows)} instead of a list of records; or name it .jsonl")
    yield from ((f"{source}: record {i}", row) for i, row in enumerate(rows, 1))


def _parquet(file: IO[bytes], source: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{source}: record {i}", row) for i, row in enumerate(rows, 1))
    except pyarrow.ArrowException as error:
        raise BadInput(f"{source}: not a whole Parquet file ({error})") from error


def _parsed(line: bytes, where: str) -> Any:
    """The JSON value of a line. Errors: BadInput for other bytes, or a field that stands twice."""
    try:
        return json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        field = _field_with_raw_bytes(line)
        raise Fault(
            "not UTF-8",
            f"{where}: {field}not UTF-8 at byte {error.start}; convert the file to UTF-8",
        ) from None
    except json.JSONDecodeError as error:
        place = f"{error.msg} at character {error.pos}"
        raise Fault("not JSON", f"{where}: not JSON ({place}); is the line whole?") from None
    except RecursionError:
        raise Fault("not JSON", f"{where}: nested too deeply for a record; {FORMS}") from None
    except ValueError as error:
        raise Fault("not JSON", f"{where}: {error}") from None


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
    except (ValueError, RecursionError):
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
