"""Files of safetensors: read like the library reads them, refused where it refuses, and more."""

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from safetensors import SafetensorError, safe_open

from dpo_jax.models import tensor_file
from dpo_jax.structs import BadInput

BF16 = np.dtype(jnp.bfloat16)
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def encode(header: Any, body: int | bytes = 8, length: int | None = None) -> bytes:
    """A file with a header (an object, or text as it shall stand there) and so many zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = (len(text) if length is None else length).to_bytes(8, "little")
    return start + text + (bytes(body) if isinstance(body, int) else body)


def opened(folder: Path, content: bytes) -> dict[str, tensor_file.Tensor]:
    path = folder / "a.safetensors"
    path.write_bytes(content)
    return tensor_file.tensors(epath.Path(path))


def sparse(path: Path, shape: tuple[int, ...]) -> tensor_file.Tensor:
    """A float32 tensor of zeros that takes no room on the disk."""
    size = 4 * int(np.prod(shape))
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    content = encode({"a": entry}, 0)
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + size)
    return tensor_file.tensors(epath.Path(path))["a"]


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "float.32": rng.normal(size=(5, 3, 4)).astype(np.float32),
        "half": rng.normal(size=(7, 6)).astype(np.float16),
        "brain": rng.normal(size=(4, 9)).astype(BF16),
        "scalar": np.array(3.5, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "odd": rng.normal(size=(3,)).astype(BF16),
    }


def test_files_of_the_library_are_read_to_the_bit(tmp_path):
    """The odd bf16 comes before others, so some values lie at no multiple of their size."""
    arrays = values() | {"mask": np.tri(4, dtype=bool)}
    found = opened(tmp_path, safetensors.numpy.save(arrays, {"format": "pt"}))
    assert found.keys() == arrays.keys()
    for name, array in values().items():
        read = found[name].get()
        assert found[name].shape == read.shape == array.shape
        assert found[name].dtype == read.dtype == array.dtype
        assert read.tobytes() == array.tobytes()
        assert read.flags.owndata and read.flags.writeable


def test_values_at_odd_places_are_read(tmp_path):
    entry = {"a": ENTRY, "odd": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}}
    entry["b"] = {"dtype": "F32", "shape": [], "data_offsets": [11, 15]}
    body = np.array([1, 2], np.float32).tobytes() + b"abc" + np.float32(7).tobytes()
    for padding in range(4):
        text = json.dumps(entry).encode() + b" " * padding
        assert opened(tmp_path, encode(text, body))["b"].get() == 7


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = values() | {"turned": values()["half"].T, "jax": jnp.arange(6.0).reshape(2, 3)}
    tensor_file.write(epath.Path(path), arrays, {"format": "pt"})
    found = safetensors.numpy.load_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    mine = tensor_file.tensors(epath.Path(path))
    assert all(tensor.start % tensor.dtype.itemsize == 0 for tensor in mine.values())


INDICES = [
    ...,
    0,
    -1,
    slice(1, 3),
    (slice(None), 2),
    (slice(4, 0, -2), slice(None), slice(1, 2)),
    (..., slice(0, 0)),
    (2, 1, 3),
    (np.newaxis, 1),
]


@pytest.mark.parametrize("remote", [False, True], ids=["mapped", "remote"])
def test_slices_are_those_of_numpy(tmp_path, monkeypatch, remote):
    """A remote file is read through epath alone, as gs:// would be."""
    monkeypatch.setattr(tensor_file, "remote", lambda path: remote)
    found = opened(tmp_path, safetensors.numpy.save(values()))
    for index in INDICES:
        np.testing.assert_array_equal(
            found["float.32"].get(index), values()["float.32"][index], strict=True
        )
    for name, array in values().items():
        assert found[name].get().tobytes() == array.tobytes()


def test_a_slice_of_a_giant_takes_no_memory(tmp_path):
    """16 GiB on disk, a few values in memory, in a moment."""
    tracemalloc.start()
    try:
        giant = sparse(tmp_path / "a.safetensors", (1 << 16, 1 << 16))
        assert np.all(giant.get((slice(5, 7), slice(100, 200))) == 0)
        assert giant.get((slice(None, None, 1 << 14), -1)).shape == (4,)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=str)
def test_values_that_are_not_finite_are_counted(tmp_path, dtype):
    array = np.ones((2, 3 << 20), dtype)  # more than one look takes in
    array[1, [0, 1, -1]] = np.nan, np.inf, -np.inf
    found = opened(tmp_path, safetensors.numpy.save({"w": array}))["w"]
    with pytest.raises(BadInput, match=r"a\.safetensors: w: 3 of 6,291,456 values are NaN or inf"):
        found.get()
    with pytest.raises(BadInput, match="w: 2 of 5 values"):
        found.get((1, slice(0, 5)))
    largest = jnp.finfo(dtype).max
    assert np.all(found.get((0, slice(0, 9))) == 1)  # the others are not looked at
    path = epath.Path(tmp_path / "b.safetensors")
    with pytest.raises(BadInput, match=": v: 3 of 6,291,456 values"):
        tensor_file.write(path, {"v": array}, {})
    tensor_file.write(path, {"v": np.array([largest, -largest, 0], dtype)}, {})
    assert tensor_file.tensors(path)["v"].get()[0] == largest


def test_only_floats_are_weights(tmp_path):
    arrays = {"mask": np.tri(4, dtype=bool), "wide": np.zeros(3), "ids": np.arange(3)}
    found = opened(tmp_path, safetensors.numpy.save(arrays))
    for name, kind in {"mask": "BOOL", "wide": "F64", "ids": "I64"}.items():
        assert found[name].kind == kind
        with pytest.raises(BadInput, match=f"{name} is {kind}, weights are F32 or F16 or BF16"):
            found[name].get()


def test_a_file_that_changed_is_not_read_on(tmp_path):
    found = opened(tmp_path, encode({"a": ENTRY}))
    opened(tmp_path, encode({"a": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}}, 4))
    with pytest.raises(BadInput, match="has changed since it was opened"):
        found["a"].get()
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        found["a"].get()


def entry(**other: Any) -> dict[str, Any]:
    return {"a": {**ENTRY, **other}}


def two(begin: int, end: int) -> dict[str, Any]:
    return {"a": ENTRY, "b": {**ENTRY, "data_offsets": [begin, end]}}


TEXT = json.dumps(ENTRY).encode()
BAD = {
    "empty": (b"", "0 bytes do not hold its header"),
    "seven bytes": (bytes(7), "7 bytes do not hold its header"),
    "header past the end": (encode({}, 8, 100), "do not hold its header"),
    "header of 2^63": (encode({}, 8, (1 << 63) - 1), "do not hold its header"),
    "no header": (encode(b""), "not JSON"),
    "not JSON": (encode(b"{not json"), "not JSON"),
    "not UTF-8": (encode(b'{"\xff\xfe":{}}'), "not JSON in UTF-8"),
    "byte order mark": (encode(b"\xef\xbb\xbf" + json.dumps(entry()).encode()), "not JSON"),
    "a list": (encode([]), "not a JSON object"),
    "blank before": (encode(b" " + json.dumps(entry()).encode()), "not a JSON object"),
    "nested": (encode(b'{"a":' * 200_000), "nested too deep"),
    "long number": (encode(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "name twice": (encode(b'{"a":' + TEXT + b',"a":' + TEXT + b"}"), "gives a 2 times"),
    "name twice, escaped": (encode(b'{"a":' + TEXT + b',"\\u0061":' + TEXT + b"}"), "gives a 2"),
    "field twice": (encode(b'{"a":{"dtype":"F32",' + TEXT[1:] + b"}"), "gives dtype 2 times"),
    "metadata no text": (encode({"__metadata__": {"a": 1}, **entry()}), "must hold texts"),
    "metadata no object": (encode({"__metadata__": 3, **entry()}), "must hold texts"),
    "no entry": (encode({"a": None}), "a must have dtype, shape and data_offsets"),
    "no shape": (encode({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "a must have dtype"),
    "more": (encode(entry(order="F")), "dtype, shape and data_offsets alone"),
    "dtype": (encode(entry(dtype="F99")), "a has the unknown dtype F99"),
    "dtype no text": (encode(entry(dtype=["F32"])), "a has the unknown dtype"),
    "shape negative": (encode(entry(shape=[-1, -2])), "must be counts"),
    "shape true": (encode(entry(shape=[True, 2])), "must be counts"),
    "shape float": (encode(entry(shape=[2.0])), "must be counts"),
    "shape text": (encode(entry(shape="2")), "must be counts"),
    "shape too large": (encode(entry(shape=[1 << 40, 1 << 40])), "impossible shape"),
    "shape large, empty": (encode(entry(shape=[1 << 40, 1 << 40, 0])), "impossible shape"),
    "axes": (encode(entry(shape=[2] + [1] * 64)), "impossible shape"),
    "shape and bytes": (encode(entry(shape=[3])), r"F32 of shape \[3\], does not fit its data"),
    "half bytes": (encode(entry(dtype="F4", shape=[15])), "does not fit"),
    "offsets negative": (encode(entry(data_offsets=[-8, 0])), "must be counts"),
    "offsets turned": (encode(entry(data_offsets=[8, 0])), "does not fit"),
    "offsets of three": (encode(entry(data_offsets=[0, 8, 8])), "does not fit"),
    "offsets huge": (encode(entry(data_offsets=[10**4000, 10**4000 + 8])), "leaves a hole"),
    "cut": (encode(entry(), 5), "ends 3 bytes early, "),
    "more bytes": (encode(entry(), 11), "goes on after its tensors"),
    "overlap": (encode(two(4, 12), 12), "b overlaps the tensor before it"),
    "same place": (encode(two(0, 8)), "b overlaps the tensor before it"),
    "hole": (encode(two(12, 20), 20), "b leaves a hole before it"),
    "hole at the start": (encode(entry(data_offsets=[4, 12]), 12), "a leaves a hole"),
    "pickle": (b"\x80\x04\x95\x05" + bytes(10), "a pickle .* never opened"),
    "zip of pickles": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(10), "a pickle .* never opened"),
}
NAMES = ["", "../../etc/x", "a/../b", "/etc/x", "\\\\host\\x", "C:\\x", "a\\..\\b", "a\nb", "\x00"]
NAMES += ["\ud800", "\u202egnp", "a\x1b[2J"]
BAD |= {f"name {name!a}": (encode({name: ENTRY}), "is no name for a tensor") for name in NAMES}
BAD["long name"] = (encode({"../" * 10**5: ENTRY}), r"\.\./\.\.\.\. is no name for a tensor")


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_in_one_line(tmp_path, case):
    content, message = BAD[case]
    with pytest.raises(BadInput, match=message) as refusal:
        opened(tmp_path, content)
    line = str(refusal.value)
    assert line.startswith(str(tmp_path / "a.safetensors")) and ": " in line
    assert line.isprintable() and len(line) < 400 + len(str(tmp_path))
    (tmp_path / "sound").mkdir()
    assert opened(tmp_path / "sound", encode(entry()))["a"].get().tolist() == [0, 0]


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(encode(b"{", 0, 100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(BadInput, match="a header of 100,000,001 bytes"):
        tensor_file.tensors(epath.Path(path))


@pytest.mark.parametrize("kind", ["folder", "absent", "loop"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    if kind == "folder":
        path.mkdir()
    if kind == "loop":
        path.symlink_to(path)
    with pytest.raises(BadInput, match=r"a\.safetensors: (not a file|cannot be read)"):
        tensor_file.tensors(epath.Path(path))


def broken(rng: random.Random, sound: bytes) -> bytes:
    """A file with up to three bytes of its header changed, added or removed."""
    content = bytearray(sound)
    for _ in range(rng.choice([1, 1, 2, 3])):
        place, byte = rng.randrange(len(content)), rng.choice(b'0123456789{}[],:" ABF-.e\x00\xff')
        match rng.randrange(4):
            case 0:
                content[place] = rng.randrange(256)
            case 1:
                content[place] = byte
            case 2:
                content.insert(place, byte)
            case _:
                del content[place]
    if rng.random() < 0.5:  # the length of the header fits again
        content[:8] = max(len(content) - 8 - 32, 0).to_bytes(8, "little")
    return bytes(content)


def test_what_the_library_refuses_is_refused(tmp_path):
    """And what both accept is the same: a thousand damaged files."""
    arrays = {"a": np.ones((2, 3), np.float32), "b.c": np.ones(4, BF16), "z": np.ones((0, 2), BF16)}
    sound = safetensors.numpy.save(arrays, {"format": "pt"})
    assert len(sound) == 8 + int.from_bytes(sound[:8], "little") + 32
    rng, path = random.Random(0), tmp_path / "a.safetensors"
    both = refused = 0
    for _ in range(1000):
        content = broken(rng, sound)
        path.write_bytes(content)
        try:
            mine = {k: (t.kind, t.shape) for k, t in tensor_file.tensors(epath.Path(path)).items()}
        except BadInput:
            refused += 1
            continue
        try:
            with safe_open(path, "np") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}
                theirs = {k: (p.get_dtype(), tuple(p.get_shape())) for k, p in parts.items()}
        except SafetensorError as error:
            if b"-0" in content:
                continue  # 0 to us
            pytest.fail(f"the library refuses it ({error}): {content!r}")
        assert mine == theirs
        both += 1
    assert both > 50 and refused > 500


LOADED = {  # of what the library loads, what we make of it
    "00_good": [0.0, 0.0],
    "15_duplicate_key": "gives a 2 times",
    "18_nan_inf_payload": "a: 2 of 2 values are NaN or infinite",
    "19_bit_flip_in_body": [1.4693679385278594e-39, 0.0],  # no hash in the format, so no trace
    "20_name_path_traversal": "etc/x is no name for a tensor",
    "22_zero_size": [],
    "23_scalar": 0.0,
}


def test_recorded_bad_files(shared):
    """Every recorded file: refused where the library refuses it, else as LOADED says."""
    folder = shared / "golden" / "bad_safetensors"
    rows = json.loads((folder / "EXPECTED.json").read_text())["rows"]
    assert {row["file"] for row in rows} == {path.name for path in folder.glob("*.safetensors")}
    for row in rows:
        path, expected = (
            epath.Path(folder / row["file"]),
            LOADED.get(row["file"].split(".")[0], ":"),
        )
        assert (row["library"] == "REFUSED") == (expected == ":")
        if not isinstance(expected, str):
            assert tensor_file.tensors(path)["a"].get().tolist() == expected
            continue
        with pytest.raises(BadInput, match=expected) as refusal:
            for tensor in tensor_file.tensors(path).values():
                tensor.get()
        assert str(refusal.value).startswith(f"{path}: ") and str(refusal.value).isprintable()


def test_recorded_weights_are_read_as_the_library_reads_them(shared):
    paths = sorted((shared / "golden" / "trl_traj").glob("*.safetensors"))
    assert paths
    for path in paths:
        theirs, mine = safetensors.numpy.load_file(path), tensor_file.tensors(epath.Path(path))
        assert theirs.keys() == mine.keys()
        assert all(np.array_equal(mine[name].get(), theirs[name]) for name in theirs)
