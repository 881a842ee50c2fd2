"""Meshes, and the one rule that shards everything: the axis letters of a name.

`q_DHE` is (model width, query heads, head width), so D goes to `fsdp` and H to `tensor`; a batch
array leads with R, so its rows go to `data` and `fsdp`. Optimizer moments carry the names of their
parameters and follow them. A dimension that its mesh axes do not divide is replicated.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.structs import BadInput, Batch

AXES = ("data", "fsdp", "tensor")
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
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    suffix = next((name.rpartition("_")[2] for name in reversed(names) if name), "")
    return suffix if suffix.isupper() else ""


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


def shardings(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """The sharding of every leaf (an array or a ShapeDtypeStruct) by the letters of its name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(mesh, letters(path), leaf.shape)), tree
    )


def shard_batch(mesh: jax.sharding.Mesh, batch: Batch) -> Batch:
    """A host batch as global arrays; every process passes the whole batch and keeps its rows."""

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, batch, shardings(mesh, batch))


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Pin an activation to the mesh axes of its letters; nothing happens without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(mesh, axes, x.shape))


def row_multiple(mesh: jax.sharding.Mesh) -> int:
    """Rows of a batch come in multiples of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def own_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays, or of what `abstract` makes."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def abstract(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Shapes and dtypes of a tree with the shardings that its names give it."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings(mesh, tree),
    )
