"""One safetensors file: 8 bytes (the length of the header), a JSON header, the values.

The header gives every tensor its dtype, shape and place. Nothing in it is trusted: every byte of
the file must belong to exactly one tensor, no name may be given twice or be a path. Values are
looked at when they are read and when they are written: NaN and infinity are refused.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax.structs import BadInput

HEADER_BYTES = 100_000_000  # the format's own limit
CHUNK = 1 << 20  # values that are looked at together
WEIGHTS = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(jnp.bfloat16)}
KINDS = {dtype: kind for kind, dtype in WEIGHTS.items()}
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
METADATA = "__metadata__"  # the entry of a header that is no tensor
DAMAGED = "download or write it again"
HOSTILE = "do not trust this file"

Stamp = tuple[int, int]  # length and time of a file


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, its values unread."""

    path: epath.Path
    name: str
    kind: str  # the format's word for the dtype, such as BF16
    shape: tuple[int, ...]
    start: int  # place of the values in the file, in bytes
    end: int
    stamp: Stamp  # of the file when its header was read

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values. Raises BadInput where they are no weights."""
        if self.kind not in WEIGHTS:
            raise BadInput(
                f"{self} is {self.kind}, weights are {' or '.join(WEIGHTS)}: convert them first"
            )
        return WEIGHTS[self.kind]

    def get(self, index: Any = ...) -> np.ndarray:
        """The values at a numpy index (slices, integers), by default all, in memory of their own.

        Raises: BadInput where one of them is not finite, or the file is not what was opened.
        """
        values = stored(self)[index]
        copy = np.empty(np.shape(values), self.dtype)
        fill(copy, self, values)
        return copy

    def __str__(self) -> str:
        return f"{self.path}: {shown(self.name)}"


def shown(name: str) -> str:
    """A name that a stranger chose, fit for one line."""
    text = name if name and name.isprintable() else ascii(name)
    return text if len(text) <= 100 else f"{text[:100]}..."


# Files


def remote(path: epath.Path) -> bool:
    """Whether a file cannot be mapped into memory, as gs:// cannot."""
    return "://" in os.fspath(path)


def stamp(path: epath.Path) -> Stamp:
    """Length and time of a file. Raises BadInput where there is none."""
    try:
        if remote(path):
            found = path.stat()
            return found.length, found.mtime
        status = os.stat(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{path}: not a file: {DAMAGED}")
    return status.st_size, status.st_mtime_ns


def read_bytes(path: epath.Path, start: int, size: int) -> bytes:
    """So many bytes of a file. Raises BadInput where it has fewer or cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(data) != size:
        raise BadInput(f"{path}: ends early: {DAMAGED}")
    return data


def json_object(path: epath.Path, text: bytes) -> dict[str, Any]:
    """A JSON object in which no object gives a name twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        whole = dict(pairs)
        if len(whole) < len(pairs):
            [(name, count)] = Counter(name for name, _ in pairs).most_common(1)
            raise BadInput(f"{path}: gives {shown(name)} {count} times: {HOSTILE}")
        return whole

    try:
        value = json.loads(text.decode(), object_pairs_hook=once)
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise BadInput(f"{path}: not JSON in UTF-8 ({reason}): {DAMAGED}") from None
    if not isinstance(value, dict) or text[:1] != b"{":
        raise BadInput(f"{path}: not a JSON object: {DAMAGED}")
    return value


# The header


def tensors(path: epath.Path) -> dict[str, Tensor]:
    """The tensors of a file by name, after its header was found to account for every byte.

    Raises: BadInput, naming the file and where it can the tensor.
    """
    size, _ = seen = stamp(path)
    length = int.from_bytes(read_bytes(path, 0, min(size, 8)), "little")
    if size < 8 or length > size - 8:
        _refuse_pickle(path, read_bytes(path, 0, min(size, 4)))
        raise BadInput(f"{path}: its {size:,} bytes do not hold its header: {DAMAGED}")
    if length > HEADER_BYTES:
        raise BadInput(f"{path}: a header of {length:,} bytes, the format allows {HEADER_BYTES:,}")
    header = json_object(path, read_bytes(path, 8, length))
    metadata = header.pop(METADATA, None)
    texts = metadata.values() if isinstance(metadata, dict) else [metadata or ""]
    if not all(isinstance(text, str) for text in texts):
        raise BadInput(f"{path}: {METADATA} must hold texts: {DAMAGED}")
    found = {name: _tensor(path, name, header[name], 8 + length, seen) for name in header}
    _check_places(path, list(found.values()), 8 + length, size)
    return found


def _refuse_pickle(path: epath.Path, first: bytes) -> None:
    if first.startswith((b"\x80", b"PK\x03\x04")):
        raise BadInput(
            f"{path}: a pickle (or a zip of them) under another name; it can run code when it is "
            f"read and is never opened: {HOSTILE}"
        )


def check_name(path: epath.Path, name: str) -> None:
    """Raises BadInput for a name that would do harm as the name of a file or in a line of text."""
    parts = re.split(r"[/\\]", name)
    path_like = not parts[0] or re.match("[A-Za-z]:", name) or ".." in parts
    if path_like or not name.isprintable() or name == METADATA:
        raise BadInput(f"{path}: {shown(name)} is no name for a tensor: {HOSTILE}")


def _tensor(path: epath.Path, name: str, entry: Any, origin: int, seen: Stamp) -> Tensor:
    """One entry of a header: dtype, shape and place, of one size."""
    check_name(path, name)
    where = f"{path}: {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadInput(f"{where} must have dtype, shape and data_offsets alone: {DAMAGED}")
    kind, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in BITS:
        raise BadInput(f"{where} has the unknown dtype {shown(str(kind))}: {DAMAGED}")
    for counts in (shape, place):
        if not isinstance(counts, list) or any(type(n) is not int or n < 0 for n in counts):
            raise BadInput(f"{where}: shape and data_offsets must be counts: {DAMAGED}")
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) * BITS[kind] >= 1 << 63:
        raise BadInput(f"{where} has an impossible shape: {DAMAGED}")
    if len(place) != 2 or 8 * (place[1] - place[0]) != math.prod(shape) * BITS[kind]:
        raise BadInput(
            f"{where}, {kind} of shape {shape}, does not fit its data_offsets"
            f" {shown(str(place))}: {DAMAGED}"
        )
    return Tensor(path, name, kind, tuple(shape), origin + place[0], origin + place[1], seen)


def _check_places(path: epath.Path, found: list[Tensor], start: int, size: int) -> None:
    """Every byte from `start` to the end of the file belongs to one tensor."""
    for tensor in sorted(found, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != start:
            what = "overlaps the tensor" if tensor.start < start else "leaves a hole"
            raise BadInput(f"{tensor} {what} before it: {DAMAGED}")
        start = tensor.end
    if start != size:
        what = f"ends {start - size:,} bytes early" if start > size else "goes on after its tensors"
        raise BadInput(f"{path}: {what}, {size:,} bytes instead of {start:,}: {DAMAGED}")


# Values


def stored(tensor: Tensor) -> np.ndarray:
    """The values as they lie in the file: mapped and not yet read, or read where it is remote.

    A mapping that outlives this call would show what becomes of the file: see `fill`.
    """
    path, size, dtype = tensor.path, tensor.end - tensor.start, tensor.dtype
    if stamp(path) != tensor.stamp:
        raise BadInput(f"{path}: has changed since it was opened: open it again")
    if not size:
        return np.empty(tensor.shape, dtype)
    if remote(path):
        flat = np.frombuffer(read_bytes(path, tensor.start, size), np.uint8)
    else:
        flat = np.memmap(path, np.uint8, "r", tensor.start, (size,)).view(np.ndarray)
    return flat.view(dtype).reshape(tensor.shape)


def fill(out: np.ndarray, tensor: Tensor, values: np.ndarray) -> None:
    """Copy `values`, which are of `tensor`, into contiguous memory; BadInput where not finite."""
    with np.errstate(over="ignore", invalid="ignore"):  # told with the name, not by a warning
        out[...] = values
    check_finite(str(tensor), out)


def check_finite(where: str, values: np.ndarray) -> None:
    """Raises BadInput with the count of NaN and infinity; `values` are contiguous floats."""
    unsigned = np.dtype(f"u{values.itemsize}")
    exponent = np.array(np.inf, values.dtype).view(unsigned)  # all its bits and no other
    bits = values.reshape(-1).view(unsigned)
    chunks = (bits[i : i + CHUNK] for i in range(0, bits.size, CHUNK))
    count = sum(int(np.count_nonzero((chunk & exponent) == exponent)) for chunk in chunks)
    if count:
        raise BadInput(
            f"{where}: {count:,} of {bits.size:,} values are NaN or infinite as {values.dtype}: "
            "use other weights"
        )


def write(path: epath.Path, values: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write arrays of WEIGHTS to a file; one at a time is fetched to the host.

    Raises: BadInput for values that are not finite; what was written is then left behind.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    names = sorted(values, key=lambda name: -values[name].dtype.itemsize)  # keeps them aligned
    start = 0
    for name in names:
        kind, end = KINDS[np.dtype(values[name].dtype)], start + bytes_of(values[name])
        shape = [int(n) for n in values[name].shape]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.ascontiguousarray(values[name])
            check_finite(f"{path.parent}: {shown(name)}", array)
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        if not remote(path):
            os.fsync(file.fileno())


def bytes_of(array: Any) -> int:
    """Bytes of the values of an array."""
    return math.prod(array.shape) * array.dtype.itemsize
