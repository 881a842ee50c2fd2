"""Meshes, and the one rule that shards everything: the axis letters of a name.

`q_DHE` is (model width, query heads, head width), so D goes to `fsdp` and H to `tensor`; a batch
array leads with R, so its rows go to `data` and `fsdp`. Optimizer moments carry the names of their
parameters and follow them. A dimension that its mesh axes do not divide is replicated.

What lies where between two steps is a tree of shardings too: arrays below some names lie in the
memory of the host, and `fetched` brings them to the devices inside a program.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.structs import BadInput, Batch

AXES = ("data", "fsdp", "tensor")
HOST = "pinned_host"  # the memory of the host that devices read and write by themselves
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
RULES = {
    "R": ("data", "fsdp"),
    "D": "fsdp",
    "H": "tensor",
    "J": "tensor",
    "F": "tensor",
    "V": "tensor",
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """A mesh over all devices (or those given); -1 takes what the other axes leave.

    Raises: BadInput when the axes do not multiply to the number of devices.
    """
    sizes, count = [data, fsdp, tensor], len(devices or jax.devices())
    named = ", ".join(f"run.mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise BadInput(f"{named}: sizes are 1 or more, and one of them at most may be -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if int(np.prod(sizes)) != count:
        raise BadInput(f"{named}: the product must be the number of devices, {count}")
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)


def letters(path: tuple[Any, ...]) -> str:
    """The axis letters of a leaf: what follows the last underscore of the last name on its path."""
    names = [_name(key) for key in path]
    suffix = next((name.rpartition("_")[2] for name in reversed(names) if name), "")
    return suffix if suffix.isupper() else ""


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", "")))


def partition(mesh: AnyMesh, axes: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Where an array with these axis letters lies; a stacked leaf leads with L."""
    axes = axes if len(axes) == len(shape) else "L" + axes
    if len(axes) != len(shape):
        return PartitionSpec()
    return PartitionSpec(
        *(_mesh_axes(mesh, axis, size) for axis, size in zip(axes, shape, strict=True))
    )


def _mesh_axes(mesh: AnyMesh, axis: str, size: int) -> str | tuple[str, ...] | None:
    rule = RULES.get(axis)
    names = (rule,) if isinstance(rule, str) else rule or ()
    return (
        rule if names and size % int(np.prod([mesh.shape[name] for name in names])) == 0 else None
    )


def shardings(mesh: jax.sharding.Mesh, tree: Any, host: Sequence[str] = ()) -> Any:
    """The sharding of every leaf (an array or a ShapeDtypeStruct) by the letters of its name.

    host: names at the top of the tree below which all but scalars lies in the memory of the host.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        away = bool(path and leaf.ndim) and _name(path[0]) in host
        spec = partition(mesh, letters(path), leaf.shape)
        return NamedSharding(mesh, spec, memory_kind=HOST if away else None)

    return jax.tree_util.tree_map_with_path(place, tree)


def away(x: Any) -> bool:
    """Whether an array, traced or not, lies in the memory of the host."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def fetched(tree: Any) -> Any:
    """The tree with what lies in the memory of the host on the devices; inside a program."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if away(x) else x, tree
    )


@jax.jit  # one program for all leaves
def copies(tree: Any) -> Any:
    """The tree in arrays of its own, for one that will be given away."""
    return jax.tree.map(jnp.copy, tree)


def returned(x: Any, like: Any) -> Any:
    """An array in the memory that another lies in; inside a program."""
    return jax.device_put(x, jax.memory.Space.Host) if away(like) else x


def shard_batch(mesh: jax.sharding.Mesh, batch: Batch) -> Batch:
    """A host batch as global arrays; every process passes the whole batch and keeps its rows."""

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, batch, shardings(mesh, batch))


def on_host(tree: Any) -> Any:
    """A tree of arrays in numpy, each whole though several processes hold it; all of them call."""

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Pin an activation to the mesh axes of its letters; nothing happens without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(mesh, axes, x.shape))


def pinned(x: jax.Array, axis: str) -> jax.Array:
    """`constrain` of the last axis alone; where the others lie is left to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if shards(axis, x.shape[-1]) == 1:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    place = PartitionSpec(*others, _mesh_axes(mesh, axis, x.shape[-1]))
    return jax.lax.with_sharding_constraint(x, place)


def shards(axis: str, size: int) -> int:
    """How many parts an axis of this letter and size is cut into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    names = None if mesh.empty else _mesh_axes(mesh, axis, size)
    names = (names,) if isinstance(names, str) else names or ()
    return int(np.prod([mesh.shape[name] for name in names]))


def over_rows(f: Callable[..., Any], whole: Any, *rows: Any, sums: bool = False) -> Any:
    """f(whole, *rows), every device with its own rows; without a mesh, or where its devices do
    not divide the rows, just that.

    whole: arrays that every device gets all of, along the axes that part the rows. rows: trees of
    arrays that lead with R, as what f returns does. sums: f returns (terms, rows), and the terms
    of all devices are added, once.
    """
    if parts_of(jax.tree.leaves(rows)[0].shape[0]) == 1:
        return f(whole, *rows)

    def own(whole: Any, *rows: Any) -> Any:
        if not sums:
            return f(whole, *rows)
        terms, out = f(whole, *rows)
        return jax.lax.psum(terms, RULES["R"]), out

    place = PartitionSpec(RULES["R"])
    spread = jax.shard_map(
        own,
        in_specs=(PartitionSpec(), *[place] * len(rows)),
        out_specs=(PartitionSpec(), place) if sums else place,
        axis_names=set(RULES["R"]),
        check_vma=False,
    )
    return jax.jit(spread)(whole, *rows)


def parts_of(rows: int) -> int:
    """How many parts `over_rows` cuts so many rows into, in their order."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    parts = shards("R", rows)
    return 1 if parts == 1 or any(kinds[x] != AxisType.Auto for x in RULES["R"]) else parts


def row_multiple(mesh: AnyMesh) -> int:
    """Rows of a batch come in multiples of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def own_bytes(tree: Any, *, host: bool = False) -> int:
    """Bytes that one device holds of arrays, or of what `abstract` makes; with `host` those that
    the host holds for it."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if (leaf.sharding.memory_kind == HOST) == host
    )


def abstract(mesh: jax.sharding.Mesh, tree: Any, host: Sequence[str] = ()) -> Any:
    """Shapes and dtypes of a tree with the shardings that its names give it, as `shardings`."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings(mesh, tree, host),
    )
