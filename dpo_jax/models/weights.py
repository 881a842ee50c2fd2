"""Folders of safetensors: read by the slice, placed on devices, written whole or not at all.

    model.safetensors                     one file, or
    model.safetensors.index.json          {"weight_map": {tensor: file}} beside its shards
    model-00001-of-00002.safetensors ...

    found = weights.read("folder")                    # headers alone
    found["lm_head.weight"].get((slice(0, 10),))      # ten rows, as numpy
    weights.place(found["lm_head.weight"], sharding, np.transpose)

The index and its shards must agree on every tensor, and nothing leads out of the folder.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from etils import epath

from dpo_jax.models import tensor_file
from dpo_jax.models.tensor_file import DAMAGED, HOSTILE, KINDS, Tensor, shown
from dpo_jax.structs import BadInput

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05}-of-{:05}.safetensors"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
BESIDE = ".tmp"  # what is being written
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
PYTORCH = MappingProxyType({"format": "pt"})  # transformers wants to be told

Source = Tensor | Sequence["Source"]
Transform = Callable[[np.ndarray], np.ndarray]


# Reading


def read(path: epath.PathLike) -> dict[str, Tensor]:
    """The tensors of a folder, or of one .safetensors file, by name; only headers are read.

    Raises: BadInput, naming the file and the tensor, for whatever is not whole and unambiguous.
    """
    path = epath.Path(path).expanduser()
    if path.suffix == ".safetensors" and not path.is_dir():
        return tensor_file.tensors(path)
    if not path.is_dir():
        raise BadInput(f"{path}: no such folder: give one that holds {SINGLE}")
    names = {entry.name for entry in path.iterdir()}
    if INDEX in names:
        return _sharded(path, names)
    if SINGLE in names:
        return tensor_file.tensors(_inside(path, SINGLE))
    raise BadInput(f"{path}: holds no {SINGLE} and no {INDEX}{_instead(names)}")


def _instead(names: set[str]) -> str:
    """What stands in a folder without weights to read, and what to do about it."""
    pickles = sorted(name for name in names if os.path.splitext(name)[1].lower() in PICKLES)
    if pickles:
        return (
            f"; {shown(pickles[0])} is a pickle, which can run code when it is read, and is never "
            "opened: take a revision that has safetensors, or convert it where you trust it "
            "(from_pretrained and save_pretrained of transformers)"
        )
    if any(OURS.fullmatch(name.removesuffix(BESIDE)) for name in names):
        return ": a download or a write was cut short, download or write the folder again"
    return ": give a folder with a model in safetensors"


def _sharded(folder: epath.Path, names: set[str]) -> dict[str, Tensor]:
    """The tensors of all shards, on which the index and the shards agree."""
    index = _inside(folder, INDEX)
    files = _weight_map(index)
    shards = sorted(set(files.values()))
    if SINGLE in names and SINGLE not in shards:
        raise BadInput(f"{folder}: {SINGLE} and {INDEX} are two models: remove one of them")
    absent = [shard for shard in shards if shard not in names]
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise BadInput(f"{index}: {absent[0]}{more} is missing: download the whole folder")
    found: dict[str, Tensor] = {}
    for shard in shards:
        held = tensor_file.tensors(_inside(folder, shard))
        listed = {name for name, file in files.items() if file == shard}
        for name in sorted(listed - held.keys()):
            raise BadInput(f"{index}: {shown(name)} is not in {shard} as it says: {DAMAGED}")
        for name in sorted(held.keys() - listed):
            where = f"says is in {files[name]}" if name in files else "does not list"
            raise BadInput(f"{held[name]} is a tensor that {INDEX} {where}: {DAMAGED}")
        found |= held
    return found


def _weight_map(index: epath.Path) -> dict[str, str]:
    """The file of every tensor. The total_size beside it is not read: writers differ about it."""
    size, _ = tensor_file.stamp(index)
    if size > tensor_file.HEADER_BYTES:
        raise BadInput(f"{index}: {size:,} bytes are too many for an index: {DAMAGED}")
    content = tensor_file.json_object(index, tensor_file.read_bytes(index, 0, size))
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise BadInput(f"{index}: weight_map must give the file of every tensor: {DAMAGED}")
    for name, shard in files.items():
        tensor_file.check_name(index, name)
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.+-]*\.safetensors", shard):
            raise BadInput(
                f"{index}: {shown(name)} is said to be in {shown(str(shard))}, which does not name "
                f"a safetensors file beside the index: {HOSTILE}"
            )
    return files


def _inside(folder: epath.Path, name: str) -> epath.Path:
    """A file of a folder; a link may lead to its neighbours or to the blobs of the hub's cache."""
    path = folder / name
    if tensor_file.remote(path) or not os.path.islink(path):
        return path
    home = epath.Path(os.path.realpath(folder))
    snapshots = [above for above in (home, *home.parents) if above.name == "snapshots"]
    homes = [home, *(above.parent / "blobs" for above in snapshots)]
    target = epath.Path(os.path.realpath(path))
    if target.parent not in homes:
        raise BadInput(f"{path}: a link out of the folder, to {target}: put the file itself there")
    return path


# Placing


def place(
    source: Source,
    sharding: jax.sharding.Sharding,
    transform: Transform | None = None,
    *,
    dtype: Any = None,
) -> jax.Array:
    """A global array; every process reads the parts of its own devices, one after the other.

    source: a tensor, or a list of tensors of one kind to stack along a new leading axis (or lists
        of lists: the layers of a model, the experts of its layers).
    transform: what to make of each single tensor, a function of numpy arrays. Where numpy can give
        a view (transpose, slices, splitting an axis, one after the other), a part reads its own
        values alone; where it has to copy, each part reads whole tensors, one at a time.
    dtype: what the values become once they are cut; by default they stay as they are.
    A part that several devices hold is read once, and the host lets go of it once it is placed
    (make_array_from_callback reads it for each of them and holds the parts of all).
    Raises: BadInput as `Tensor.get` does, and where the tensors of a stack differ.
    """
    first, *others = _leaves(source)
    for other in others:
        if (other.shape, other.kind) != (first.shape, first.kind):
            raise BadInput(
                f"{other} is {other.kind}{list(other.shape)} and {shown(first.name)} is "
                f"{first.kind}{list(first.shape)}: a stack is of one kind"
            )
    # What is remote is kept while its parts are cut, so that it travels once.
    stored = tensor_file.stored
    stored = functools.cache(stored) if tensor_file.remote(first.path) else stored
    change = transform or np.asarray
    kind = np.dtype(dtype or first.dtype)
    shape = _stacked(source) + change(stored(first)).shape
    where: dict[tuple[range, ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        part = tuple(range(*at.indices(n)) for at, n in zip(index or (), shape, strict=True))
        where.setdefault(part, []).append(device)

    def cut(source: Source, part: tuple[range, ...], out: np.ndarray) -> None:
        if isinstance(source, Tensor):
            index = tuple(slice(along.start, along.stop) for along in part)
            return tensor_file.fill(out, source, change(stored(source))[index])
        for i, k in enumerate(part[0]):
            cut(source[k], part[1:], out[i, ...])

    arrays = []
    for part, devices in where.items():
        values = _aligned([len(along) for along in part], kind)
        cut(source, part, values)
        arrays += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays, dtype=kind)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory that the devices of a CPU take over as it is, all the same; numpy's they copy each."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _leaves(source: Source) -> Iterator[Tensor]:
    if isinstance(source, Tensor):
        yield source
    else:
        for part in source:
            yield from _leaves(part)


def _stacked(source: Source) -> tuple[int, ...]:
    """The axes that stacking adds."""
    return () if isinstance(source, Tensor) else (len(source), *_stacked(source[0]))


# Writing


def write(
    folder: epath.PathLike,
    tensors: Mapping[str, Any],
    *,
    shard_bytes: float = 5e9,
    metadata: Mapping[str, str] = PYTORCH,
) -> None:
    """Write arrays (numpy, or jax arrays that this process can see whole) as a folder to read.

    A file is filled up to `shard_bytes`, one tensor at least; more than one get an index. The model
    that the folder held before is replaced when all is on disk: whoever stops this, the folder
    holds the old model, the new one, or what `read` refuses. Other files of the folder stay.
    Raises: BadInput for a name, dtype or value that `read` would refuse, and where the disk is
    full or read-only.
    """
    folder = epath.Path(folder).expanduser()
    groups = _groups(folder, tensors, shard_bytes)
    many = len(groups) > 1
    names = [SHARD.format(i, len(groups)) for i in range(1, len(groups) + 1)] if many else [SINGLE]
    final = [*names, INDEX] if many else names
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, group in zip(names, groups, strict=True):
            values = {key: tensors[key] for key in group}
            tensor_file.write(folder / (name + BESIDE), values, metadata)
        if many:
            text = _index(dict(zip(names, groups, strict=True)), tensors)
            (folder / (INDEX + BESIDE)).write_text(text)
        _replace(folder, final)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(
            f"{folder}: the weights cannot be written ({reason}): make room or give another folder"
        ) from None
    finally:
        for beside in (folder / (name + BESIDE) for name in final):
            if beside.exists():
                beside.unlink()


def _groups(folder: epath.Path, tensors: Mapping[str, Any], shard_bytes: float) -> list[list[str]]:
    """The names of each file's tensors, in the order given."""
    if not tensors or shard_bytes < 1:
        raise BadInput(f"{folder}: there must be a tensor to write, and shard_bytes be 1 or more")
    groups: list[list[str]] = []
    filled = 0
    for name, array in tensors.items():
        tensor_file.check_name(folder, name)
        if np.dtype(array.dtype) not in KINDS:
            kinds = " or ".join(KINDS.values())
            raise BadInput(f"{folder}: {shown(name)} is {array.dtype}, weights are {kinds}")
        size = tensor_file.bytes_of(array)
        if not groups or filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _index(files: dict[str, list[str]], tensors: Mapping[str, Any]) -> str:
    index = {
        "metadata": {"total_size": sum(tensor_file.bytes_of(array) for array in tensors.values())},
        "weight_map": {name: file for file, group in files.items() for name in group},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _replace(folder: epath.Path, final: list[str]) -> None:
    """Put the files written beside in their places, what makes them a model last."""
    *shards, entrance = final
    if any((folder / shard).exists() for shard in shards):
        (folder / INDEX).unlink(missing_ok=True)  # it would describe a mixture
    for name in (*shards, entrance):
        (folder / (name + BESIDE)).replace(folder / name)
    (folder / (SINGLE if shards else INDEX)).unlink(missing_ok=True)
    for path in folder.iterdir():  # shards of the model before, and what a kill left behind
        if OURS.fullmatch(path.name.removesuffix(BESIDE)) and path.name not in final:
            path.unlink()
