"""Checkpoints that are whole or not there: Orbax writes the arrays, a manifest of hashes seals it.

    <directory>/<step>/state/          what Orbax wrote
    <directory>/<step>/manifest.json   written last: step, leaves, sha256 of every file, and its own

A directory is a checkpoint only if its manifest says so, for this step. Orbax alone would take an
empty `3/` or a copied `99/` for the newest step and restore a flipped bit without a word.
The only file that imports Orbax.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from dpo_jax.structs import BadInput

MANIFEST = "manifest.json"


class Damaged(Exception):
    """A directory is not the checkpoint that it should be; the message says why."""


# Leaves


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by their path: what is stored depends on no Python class."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _described(named: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in named.items()}


def _differences(stored: dict[str, str], wanted: dict[str, str]) -> Iterator[str]:
    for name in sorted(stored.keys() | wanted.keys()):
        if name not in stored:
            yield f"it lacks {name} {wanted[name]}"
        elif name not in wanted:
            yield f"it holds {name} {stored[name]}, unknown here"
        elif stored[name] != wanted[name]:
            yield f"{name} is {stored[name]} in it and {wanted[name]} here"


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Where a leaf goes: to its own sharding, to the first device where it names none."""
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or alone)


# The manifest


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """Every file below, but no manifest."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        elif path.name != MANIFEST:
            yield path


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _seal(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: epath.Path, step: int, leaves: dict[str, str]) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().length, "sha256": _sha256(path)}
        for path in _files(folder)
    }
    body = {"step": step, "leaves": leaves, "files": files}
    beside = folder / (MANIFEST + ".tmp")
    beside.write_text(
        json.dumps({"sha256": _seal(body), "manifest": body}, indent=1, sort_keys=True)
    )
    beside.rename(folder / MANIFEST)


def _manifest(folder: epath.Path, step: int) -> dict:
    """The manifest, true to itself, of this step, its files all there in their lengths."""
    path = folder / MANIFEST
    if not path.exists():
        raise Damaged("no manifest: a save that was cut short, or not ours")
    try:
        text = json.loads(path.read_text())
        body, seal = text["manifest"], text["sha256"]
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{MANIFEST} is damaged") from None
    if seal != _seal(body):
        raise Damaged(f"{MANIFEST} is damaged")
    if body["step"] != step:
        raise Damaged(f"a copy of step {body['step']}")
    for name, stored in body["files"].items():
        file = folder / name
        if not file.exists():
            raise Damaged(f"{name} is missing")
        if file.stat().length != stored["bytes"]:
            raise Damaged(f"{name} has {file.stat().length} bytes instead of {stored['bytes']}")
    return body


def _verified(folder: epath.Path, step: int) -> dict:
    """The manifest after every file was read and hashed."""
    body = _manifest(folder, step)
    for name, stored in body["files"].items():
        if _sha256(folder / name) != stored["sha256"]:
            raise Damaged(f"the hash of {name} differs, its content was changed")
    return body


def _is_whole(folder: epath.Path, step: int) -> bool:
    try:
        _manifest(folder, step)
    except Damaged:
        return False
    return True


class Checkpoints:
    """The newest `keep` states of a run, by step, in `directory`.

    Saves run in the background; what was there stays until the new one is sealed. Killed anywhere,
    the directory holds the checkpoints it held, or those and the new one.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        if keep < 1:
            raise BadInput(f"checkpoints: keep={keep} would keep none; give 1 or more")
        self.directory = epath.Path(directory).expanduser().absolute()  # Orbax wants no relative
        self.keep = keep
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None

    def save(self, step: int, state: Any) -> None:
        """Save a pytree of jax arrays in the background, after the save in flight has finished.

        The arrays are copied before this returns: the state may be donated at once. A checkpoint
        of the same step is replaced. Errors surface here or in `wait`, those of the save before.
        """
        from orbax.checkpoint import v1 as orbax

        self.wait()
        named = _named(state)
        foreign = [name for name, leaf in named.items() if not isinstance(leaf, jax.Array)]
        if foreign:
            raise TypeError(f"checkpoint: {foreign[0]} is not a jax.Array")
        if jax.process_index() == 0:
            self._make_room(step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step}")
        written = orbax.save_async(self._folder(step) / "state", named)
        self._saving = self._worker.submit(self._commit, step, written, _described(named))

    def wait(self) -> None:
        """Until the save in flight is sealed; raises what went wrong in it."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def steps(self) -> list[int]:
        """Steps with a manifest that names them and whose files are all there, ascending."""
        return sorted(step for step, folder in self._found() if _is_whole(folder, step))

    def leaves(self) -> dict[str, str]:
        """What the newest whole checkpoint holds, `float32[2,3]` by the path of the leaf."""
        whole = [(step, folder) for step, folder in self._found() if _is_whole(folder, step)]
        return _manifest(whole[-1][1], whole[-1][0])["leaves"] if whole else {}

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, int]:
        """The state of `step`, or of the newest step whose every hash holds, and the step.

        `abstract_state`: the tree with shapes, dtypes and shardings (of any mesh). Checkpoints
        that are passed over are named on stderr. BadInput where none is left, where `step` is
        damaged, or where a leaf is missing, unknown or of another shape or dtype.
        """
        self.wait()
        left_out = []
        for found, folder in reversed(self._found()):
            if step is not None and found != step:
                continue
            try:
                body = _verified(folder, found)
            except Damaged as reason:
                left_out.append(f"{folder}: {reason}")
                continue
            state = _load(folder, body, abstract_state)
            for line in left_out:
                print(f"warning: left out checkpoint {line}", file=sys.stderr)
            return state, found
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        reasons = "; ".join(left_out) or f"steps that are there: {self.steps()}"
        raise BadInput(f"{self.directory}: no usable {wanted}, start anew elsewhere ({reasons})")

    def _folder(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _aside(self, step: int) -> epath.Path:
        """Where a checkpoint waits while another of the same step is written."""
        return self.directory / f"{step}.old"

    def _found(self) -> list[tuple[int, epath.Path]]:
        """Every step with the directory that may be its checkpoint, ascending."""
        if not self.directory.exists():
            return []
        names = {path.name.removesuffix(".old") for path in self.directory.iterdir()}
        steps = sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
        pairs = []
        for step in steps:
            folder, aside = self._folder(step), self._aside(step)
            use_aside = aside.exists() and not _is_whole(folder, step)
            pairs.append((step, aside if use_aside else folder))
        return pairs

    def _make_room(self, step: int) -> None:
        folder, aside = self._folder(step), self._aside(step)
        if _is_whole(folder, step):
            _remove(aside)
            folder.rename(aside)
        else:
            _remove(folder)

    def _commit(self, step: int, written: Any, leaves: dict[str, str]) -> None:
        """In the background: wait for Orbax, seal, and only then remove what is too old."""
        written.result()
        if jax.process_index() != 0:
            return
        _write_manifest(self._folder(step), step, leaves)
        _remove(self._aside(step))
        self._remove_old(step)

    def _remove_old(self, step: int) -> None:
        """Of the steps up to this one keep the newest whole; what a kill left behind goes too.

        Later steps, of a run that went back, do not count: they may be what it went back from.
        Directories with a manifest that does not hold are not ours to remove.
        """
        earlier = [(found, folder) for found, folder in self._found() if found <= step]
        whole = [found for found, folder in earlier if _is_whole(folder, found)]
        for found, folder in earlier:
            if found not in whole[-self.keep :]:
                if found in whole or not (folder / MANIFEST).exists():
                    _remove(self._folder(found))
                    _remove(self._aside(found))


def _remove(folder: epath.Path) -> None:
    """The manifest first, so that what a kill leaves behind is no checkpoint."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmtree()


def _load(folder: epath.Path, body: dict, abstract_state: Any) -> Any:
    from orbax.checkpoint import v1 as orbax

    named = _named(abstract_state)
    differences = list(_differences(body["leaves"], _described(named)))
    if differences:
        others = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise BadInput(
            f"{folder}: checkpoint of another model: {differences[0]}{others}; "
            "restore it with the model and optimizer it was saved from"
        )
    targets = {name: _target(leaf) for name, leaf in named.items()}
    loaded = orbax.load(folder / "state", targets)
    return jax.tree.structure(abstract_state).unflatten([loaded[name] for name in named])
