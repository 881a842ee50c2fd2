"""Weights on devices: every part where it belongs, nothing read or held that need not be."""

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.models import tensor_file, weights
from dpo_jax.parallel import make_mesh
from dpo_jax.structs import BadInput


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "layers.0.q": rng.normal(size=(8, 4)).astype(jnp.bfloat16),
        "layers.1.q": rng.normal(size=(8, 4)).astype(jnp.bfloat16),
        "head": rng.normal(size=(12, 4)).astype(np.float16),
    }


@pytest.fixture
def folder(tmp_path):
    weights.write(tmp_path / "model", arrays(), shard_bytes=100)
    return tmp_path / "model"


@pytest.fixture
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


SPECS = [(), ("fsdp",), (None, "tensor"), ("tensor", "fsdp"), (("data", "fsdp", "tensor"),)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("remote", [False, True], ids=["mapped", "remote"])
def test_a_tensor_lies_where_its_sharding_says(folder, mesh, spec, remote, monkeypatch):
    monkeypatch.setattr(tensor_file, "remote", lambda path: remote)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    placed = weights.place(weights.read(folder)["layers.0.q"], sharding)
    assert placed.sharding == sharding and placed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(placed, arrays()["layers.0.q"])


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transpose": np.transpose,
    "heads": lambda w: w.T.reshape(4, 2, 4),  # q_DHE of the hub's (H E) D
    "slice": lambda w: w[2:6].T,
    "heads apart": lambda w: w.reshape(4, 2, 4)[:, 1],
    "copy": lambda w: w.T.reshape(8, 4),
    "arithmetic": lambda w: 1 + w,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_applied_before_the_cut(folder, mesh, name):
    transform = TRANSFORMS[name]
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    placed = weights.place(weights.read(folder)["layers.0.q"], sharding, transform)
    np.testing.assert_array_equal(placed, transform(arrays()["layers.0.q"]), strict=True)


@pytest.mark.parametrize("spec", [(), (None, "fsdp"), ("tensor", None, "fsdp")], ids=str)
def test_layers_are_stacked(folder, mesh, spec):
    found, expected = weights.read(folder), arrays()
    pair, sharding = ["layers.0.q", "layers.1.q"], NamedSharding(mesh, PartitionSpec(*spec))
    placed = weights.place([found[name] for name in pair], sharding, np.transpose)
    stacked = np.stack([expected[name].T for name in pair])
    np.testing.assert_array_equal(placed, stacked, strict=True)
    nested = [[found[name] for name in pair], [found[name] for name in reversed(pair)]]
    placed = weights.place(nested, sharding, np.transpose, dtype=jnp.float32)
    assert placed.dtype == jnp.float32
    np.testing.assert_array_equal(placed, np.stack([stacked, stacked[::-1]]).astype(np.float32))


def test_what_does_not_stack_is_named(folder, mesh):
    found, sharding = weights.read(folder), NamedSharding(mesh, PartitionSpec())
    message = r"head is F16\[12, 4\] and layers.0.q is BF16\[8, 4\]: a stack is of one kind"
    with pytest.raises(BadInput, match=message):
        weights.place([found["layers.0.q"], found["head"]], sharding)


def test_values_that_do_not_fit_the_dtype_are_refused(tmp_path, mesh):
    large = {"w": np.array([1e5, 1.0], np.float32), "v": np.array([2.0, 1.0], np.float32)}
    weights.write(tmp_path, large)
    found, sharding = weights.read(tmp_path), NamedSharding(mesh, PartitionSpec())
    with pytest.raises(BadInput, match="w: 1 of 2 values are NaN or infinite as float16"):
        weights.place([found["v"], found["w"]], sharding, dtype=np.float16)


def test_only_the_values_of_a_part_are_read(tmp_path):
    """A broken value in a half that no device of ours holds is not seen."""
    values = np.ones((8, 8), np.float32)
    values[5, 5] = np.nan
    safetensors.numpy.save_file({"w": values}, tmp_path / "model.safetensors")
    w = weights.read(tmp_path)["w"]
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert np.all(np.asarray(weights.place(w, alone, lambda w: w[:5])) == 1)
    assert np.all(np.asarray(weights.place(w, alone, lambda w: w.T[:5])) == 1)
    eight = NamedSharding(make_mesh(data=8), PartitionSpec("data"))
    with pytest.raises(BadInput, match="w: 1 of 8 values are NaN"):
        weights.place(w, eight)


MIB = 1 << 20


@pytest.mark.parametrize("spec", [("data",), (None, "data"), (), ("fsdp",)], ids=str)
def test_eight_devices_take_one_copy_on_the_host(tmp_path, spec):
    """Also where all or some of them hold the same part."""
    weights.write(tmp_path, {"w": np.ones((4, 1024, 512), np.float32)})  # 8 MiB
    w = weights.read(tmp_path)["w"]
    sharding = NamedSharding(make_mesh(data=4, fsdp=2), PartitionSpec(*spec))
    tracemalloc.start()
    try:
        placed = weights.place(w, sharding, np.transpose)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert placed.nbytes == 8 * MIB
    assert peak < 16 * MIB  # those that are looked at together take some


RESIDENT = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dpo_jax.models import weights

def peak():  # MiB; the usage that the system reports for a child begins at its parent's
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024

mesh = jax.make_mesh((8,), ("x",))
found = weights.read(sys.argv[1])
for spec in PartitionSpec("x"), PartitionSpec():
    sharding = NamedSharding(mesh, spec)
    weights.place(found["small"], sharding).block_until_ready()
    before = peak()
    large = weights.place(found["large"], sharding).block_until_ready()
    assert len(large.addressable_shards) == 8
    print(peak() - before)
    del large
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's own numbers")
def test_the_process_holds_one_copy_and_a_part(tmp_path, repository):
    """Of 256 MiB on 8 devices: the values, and as much of the file as the largest part."""
    shapes = {"large": (1 << 13, 1 << 13), "small": (8, 8)}
    weights.write(tmp_path, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    command = [sys.executable, "-c", RESIDENT, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    apart, alike = map(int, done.stdout.split())
    assert 50 < apart < 256 + 32 + 32
    assert apart + alike < 256 + 256 + 64  # one copy for all, and the file while it is read
