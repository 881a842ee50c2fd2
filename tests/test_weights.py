"""Folders of weights: refused where they are in doubt, written whole or not at all."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.models import tensor_file, weights
from dpo_jax.parallel import make_mesh
from dpo_jax.structs import BadInput

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """336 bytes."""
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.normal(size=(6, 4)).astype(np.float32),
        "layers.0.q": rng.normal(size=(8, 4)).astype(jnp.bfloat16),
        "layers.1.q": rng.normal(size=(8, 4)).astype(jnp.bfloat16),
        "norm": rng.normal(size=(4,)).astype(np.float32),
        "head": rng.normal(size=(12, 4)).astype(np.float16),
    }


def same(folder: Path, expected: dict[str, Any]) -> bool:
    found = weights.read(folder)
    return found.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and np.array_equal(tensor.get(), expected[name])
        for name, tensor in found.items()
    )


# Folders


@pytest.mark.parametrize(("shard_bytes", "files"), [(5e9, 1), (200, 2), (1, 5)])
def test_a_folder_is_read_back_by_us_and_by_the_library(tmp_path, shard_bytes, files):
    weights.write(tmp_path / "new" / "model", arrays(), shard_bytes=shard_bytes)
    folder = tmp_path / "new" / "model"
    assert same(folder, arrays())
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == files and len(list(folder.iterdir())) == files + (files > 1)
    theirs = [safetensors.numpy.load_file(path) for path in shards]
    for name, array in arrays().items():
        [found] = [file[name] for file in theirs if name in file]
        assert found.dtype == array.dtype and np.array_equal(found, array)
    for path in shards:
        with safetensors.safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}
    if files == 1:
        assert shards[0].name == "model.safetensors"
        return
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"] == {"total_size": 336}
    held = {name: path.name for path, file in zip(shards, theirs, strict=True) for name in file}
    assert index["weight_map"] == held
    assert shards[0].name == f"model-00001-of-{files:05}.safetensors"
    assert all(sum(a.nbytes for a in file.values()) <= max(shard_bytes, 128) for file in theirs)


def test_one_file_is_read_by_its_own_name(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "adapter_model.safetensors")
    assert same(tmp_path / "adapter_model.safetensors", arrays())
    with pytest.raises(BadInput, match=r"holds no model\.safetensors and no model\.safe.*: give a"):
        weights.read(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A folder of two shards: embed, layers.0.q and layers.1.q; norm and head."""
    weights.write(tmp_path / "model", arrays(), shard_bytes=230)
    assert json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"]["norm"] == SECOND
    return tmp_path / "model"


def listed(folder: Path, **files: Any) -> None:
    """List tensors in other files; None takes them out."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= files
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file}
    (folder / INDEX).write_text(json.dumps(index))


def rewritten(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / INDEX).write_text(text)


def link(name: str, target: str) -> Callable[[Path], Any]:
    """A file of the folder that leads to `target` beside the folder, where it is moved."""

    def act(folder: Path) -> None:
        (folder.parent / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(folder.parent / target)
        (folder / name).symlink_to(folder.parent / target)

    return act


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing: download"),
    "both missing": (
        lambda f: [(f / name).unlink() for name in (FIRST, SECOND)],
        r"00001-of-00002.safetensors \(and 1 more\) is missing",
    ),
    "index missing": (lambda f: (f / INDEX).unlink(), "was cut short"),
    "shard cut": (lambda f: os.truncate(f / SECOND, 260), f"{SECOND}: ends .* bytes early"),
    "shard a folder": (lambda f: [(f / SECOND).unlink(), (f / SECOND).mkdir()], "not a file"),
    "two models": (
        lambda f: weights.tensor_file.write(epath.Path(f / "model.safetensors"), arrays(), {}),
        "are two models: remove one",
    ),
    "not listed": (partial(listed, norm=None), f"{SECOND}: norm is a tensor that .* does not list"),
    "elsewhere": (partial(listed, norm=FIRST), f"norm is not in {FIRST} as it says"),
    "listed, not there": (partial(listed, more=SECOND), f"more is not in {SECOND} as it says"),
    "in both": (
        lambda f: tensor_file.write(
            epath.Path(f / SECOND), {k: arrays()[k] for k in ("embed", "norm", "head")}, {}
        ),
        f"{SECOND}: embed is a tensor that {INDEX} says is in {FIRST}",
    ),
    "twice": (rewritten(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'), "gives a 2 ti"),
    "no JSON": (rewritten("{"), "not JSON"),
    "a list": (rewritten("[]"), "not a JSON object"),
    "no map": (rewritten("{}"), "weight_map must give"),
    "empty map": (rewritten('{"weight_map": {}}'), "weight_map must give"),
    "map a list": (rewritten('{"weight_map": ["embed"]}'), "weight_map must give"),
    "huge": (lambda f: os.truncate(f / INDEX, 100_000_001), "100,000,001 bytes are too many"),
    "tensor name": (partial(listed, **{"../x": FIRST}), r"\.\./x is no name for a tensor"),
    "pickle listed": (partial(listed, norm="pytorch_model.bin"), "norm is said to be in pytorch_"),
    "number listed": (partial(listed, norm=7), "norm is said to be in 7, which does not name"),
    "link out": (link(SECOND, "elsewhere.safetensors"), "a link out of the folder, to .*elsewhere"),
    "index a link out": (link(INDEX, "elsewhere.json"), "a link out of the folder, to .*elsewhere"),
    "link to a child": (link(SECOND, f"model/sub/{SECOND}"), "a link out of the folder"),
    "blobs elsewhere": (link(SECOND, "blobs/abc"), "a link out of the folder"),
}
PATHS = ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors"]
PATHS += [
    "C:\\x.safetensors",
    ".safetensors",
    "..safetensors",
    "x\n.safetensors",
    "a\x00.safetensors",
]
BAD |= {
    f"path {path!a}": (partial(listed, norm=path), "norm is said to be in .* does not name a safe")
    for path in PATHS
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folder_is_refused_in_one_line(folder, case):
    break_it, message = BAD[case]
    assert same(folder, arrays())
    break_it(folder)
    with pytest.raises(BadInput, match=message) as refusal:
        weights.read(folder)
    line = str(refusal.value)
    assert (
        line.startswith(str(folder)) and line.isprintable() and len(line) < 400 + len(str(folder))
    )


def test_links_to_neighbours_and_to_the_blobs_of_the_hub_are_followed(folder, tmp_path):
    (folder / SECOND).rename(folder / "blob")
    (folder / SECOND).symlink_to("blob")
    assert same(folder, arrays())
    home = tmp_path / "models--a--b"  # as huggingface_hub lays out its cache
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    folder.rename(home / "snapshots" / "c0ffee")
    for name in (FIRST, INDEX):
        path = home / "snapshots" / "c0ffee" / name
        path.rename(home / "blobs" / name[:9])
        path.symlink_to(f"../../blobs/{name[:9]}")
    assert same(home / "snapshots" / "c0ffee", arrays())


def test_an_index_of_one_file_and_a_wrong_total_are_read(tmp_path):
    """As some of the hub's folders have them."""
    weights.write(tmp_path, arrays())
    files = dict.fromkeys(arrays(), "model.safetensors")
    (tmp_path / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 1.5}, "weight_map": files})
    )
    assert same(tmp_path, arrays())


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.PTH", "last.ckpt", "a.pkl", "a.pickle"]
)
def test_pickles_are_not_opened(tmp_path, name, monkeypatch):
    """Alone they are refused by name, with the way out; beside safetensors they do not matter."""
    monkeypatch.chdir(tmp_path)
    canary = b"cos\nsystem\n(S'touch canary'\ntR."  # makes a file where it is unpickled
    (tmp_path / name).write_bytes(canary)
    with pytest.raises(BadInput, match=f"{name} is a pickle, .* never opened: take a revision"):
        weights.read(tmp_path)
    weights.write(tmp_path, arrays())
    assert same(tmp_path, arrays())
    (tmp_path / "model.safetensors").write_bytes(canary)
    with pytest.raises(BadInput, match=r"model\.safetensors: its 31 bytes do not hold its header"):
        weights.read(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match=r"hub/name: no such folder"):
        weights.read(tmp_path / "hub" / "name")
    with pytest.raises(BadInput, match=r"no\.safetensors: cannot be read \(No such file"):
        weights.read(tmp_path / "no.safetensors")


# Writing


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("after", [5e9, 230, 150], ids=lambda n: f"to {n:g}")
@pytest.mark.parametrize("before", [5e9, 230, 150], ids=lambda n: f"from {n:g}")
def test_another_model_takes_the_place_of_the_first(tmp_path, before, after):
    (tmp_path / "config.json").write_text("{}")
    weights.write(tmp_path, arrays(1), shard_bytes=before)
    weights.write(tmp_path, arrays(2), shard_bytes=after)
    assert same(tmp_path, arrays(2))
    weights.write(tmp_path / "fresh", arrays(2), shard_bytes=after)
    assert names(tmp_path) == names(tmp_path / "fresh") | {"config.json", "fresh"}


class Trap:
    """An array that cannot be fetched."""

    dtype, shape = np.dtype(np.float32), (2,)

    def __init__(self, error: BaseException):
        self.error = error

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise self.error


@pytest.mark.parametrize("shard_bytes", [5e9, 150])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, shard_bytes, error):
    weights.write(tmp_path, arrays(1), shard_bytes=shard_bytes)
    before = names(tmp_path)
    expected = BadInput if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as raised:
        weights.write(tmp_path, arrays(2) | {"trap": Trap(error)}, shard_bytes=shard_bytes)
    if expected is BadInput:
        assert str(raised.value).startswith(f"{tmp_path}: the weights cannot be written (No space")
    assert names(tmp_path) == before and same(tmp_path, arrays(1))


def test_a_disk_that_takes_no_more(tmp_path):
    weights.write(tmp_path, arrays(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(BadInput, match=r"cannot be written \(File too large\): make room"):
            weights.write(tmp_path, {"w": np.zeros(4096, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == {"model.safetensors"} and same(tmp_path, arrays(1))
    with pytest.raises(BadInput, match=r"cannot be written \((File exists|Not a directory)\)"):
        weights.write(tmp_path / "model.safetensors", arrays())


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing": ({}, {}, "there must be a tensor to write"),
    "no room": (arrays(), {"shard_bytes": 0}, "shard_bytes be 1 or more"),
    "float64": ({"w": np.zeros(2)}, {}, "w is float64, weights are F32 or F16 or BF16"),
    "int": ({"w": np.zeros(2, np.int32)}, {}, "w is int32, weights are"),
    "path": ({"../w": np.zeros(2, np.float32)}, {}, r"\.\./w is no name for a tensor"),
    "metadata": ({"__metadata__": np.zeros(2, np.float32)}, {}, "__metadata__ is no name"),
    "NaN": (
        arrays() | {"w": np.array([1, np.nan], np.float32)},
        {},
        "w: 1 of 2 values are NaN or inf",
    ),
    "NaN, late": (
        arrays() | {"w": np.array([1, np.nan], np.float32)},
        {"shard_bytes": 1},
        "w: 1 of 2 values are NaN",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_read_is_not_written(tmp_path, case):
    tensors, options, message = REFUSED[case]
    with pytest.raises(BadInput, match=message) as refusal:
        weights.write(tmp_path / "model", tensors, **options)
    assert str(refusal.value).startswith(f"{tmp_path / 'model'}: ")
    assert not (tmp_path / "model").exists() or not names(tmp_path / "model")


def test_arrays_on_devices_and_turned_ones_are_written(tmp_path):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    spread = jax.device_put(jnp.arange(32.0).reshape(8, 4), sharding)
    values = {"spread": spread, "turned": arrays()["head"].T, "half": arrays()["head"][::2]}
    weights.write(tmp_path, values | {"scalar": np.array(2, np.float16)})
    assert same(tmp_path, values | {"scalar": np.array(2, np.float16)})


KILLED = """
import os, signal, sys
import numpy as np
from dpo_jax.models import weights

def run(folder, before, after, point):
    weights.write(folder, {name: np.full(4, 1, "f4") for name in "abc"}, shard_bytes=before)
    seen = []
    def die(event, arguments):
        if event in ("open", "os.rename", "os.remove") and folder in str(arguments[0]):
            seen.append(event)
            if len(seen) == point:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(die)
    weights.write(folder, {name: np.full(4, 2, "f4") for name in "abcd"}, shard_bytes=after)

root, before, after = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
point, status = 0, 9
while status:
    point += 1
    child = os.fork()
    if child == 0:
        run(f"{root}/{point:03}", before, after, point)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, 9), status
"""


@pytest.mark.parametrize(
    ("before", "after", "gap"),
    [
        (99, 99, False),  # one file, then one file
        (99, 16, True),  # then four
        (32, 32, True),  # two, then two of the same names
        (16, 99, True),  # three, then one
    ],
)
def test_killed_in_any_file_operation_no_mixture_stands(tmp_path, repository, before, after, gap):
    """The old model, perhaps a refusal while the files change places, then the new model."""
    environment = os.environ | {"PYTHONPATH": str(repository), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(before), str(after)]
    subprocess.run(command, env=environment, check=True)
    found = []
    for folder in sorted(tmp_path.iterdir()):
        try:
            values = {name: float(t.get(0)) for name, t in weights.read(folder).items()}
        except BadInput as refusal:
            assert "two models" in str(refusal) or "cut short" in str(refusal)
            found.append(1.5)
        else:
            [value] = set(values.values())
            assert len(values) == (3 if value == 1 else 4)
            found.append(value)
        weights.write(folder, arrays())
        assert names(folder) == {"model.safetensors"} and same(folder, arrays())
    assert found == sorted(found) and found[0] == 1 and found[-1] == 2
    assert (1.5 in found) == gap
