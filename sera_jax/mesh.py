"""Devices as a named mesh, and the one table from logical dimensions to mesh axes.

Rows of a batch are split over (data, fsdp); weights over fsdp, and by heads, hidden units and vocabulary over tensor.
Everything that enters a jitted program passes `put`, which makes it a global array on a named sharding: with several
processes an array left to itself would be taken as replicated although every host holds another one.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")

# Logical dimension → mesh axes, per layout. A dimension that its axes do not divide falls back to fewer axes, and an
# axis is used once per array, in the order of the array's dimensions.
#   train   how weights, moments and gradients lie between and during updates
#   gather  how a layer's weights lie while that layer computes in training: fsdp gathered, tensor kept
#   decode  how (compute-dtype) weights lie while sampling: gathering them for every token would cost more than it holds
LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "train": {
        "vocab": ("fsdp", "tensor"),
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "mlp": ("tensor",),
        "rows": ROW_AXES,
    },
    "gather": {"heads": ("tensor",), "mlp": ("tensor",), "rows": ROW_AXES},
    "decode": {"vocab": ("fsdp", "tensor"), "heads": ("fsdp", "tensor"), "mlp": ("fsdp", "tensor"), "rows": ("data",)},
}


def make(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, *, slices: int = 1
) -> Mesh:
    """A mesh (data, fsdp, tensor) over the given devices (default: all of them, of all processes).

    Several slices (TPU pods joined by a data-centre network) split the data axis and no other: what crosses the slow
    network is gradients, never weights or activations.

    Args:
        data, fsdp, tensor: devices along each axis; at most one may be -1, which takes those that are left.
        slices: of the devices; data is a multiple of it, and lies slice by slice.

    Raises:
        ValueError: the axes do not multiply to the number of devices, or the slices are not those of the devices, or do
            not divide data.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh data×fsdp×tensor = {'×'.join(map(str, sizes))} needs {math.prod(sizes)} devices, but {len(devices)} "
            "are here. Change mesh.data, mesh.fsdp or mesh.tensor (-1 on one of them takes what is left)."
        )
    found = len({getattr(device, "slice_index", 0) for device in devices})
    # Other platforms number by slice what is joined well enough for one mesh.
    if found != slices and (slices > 1 or devices[0].platform == "tpu"):
        raise ValueError(
            f"mesh.slices is {slices}, but the {len(devices)} devices are of {found}; expected the number of slices "
            "that they are of."
        )
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data is {sizes[0]} with mesh.slices {slices}, expected a multiple of it: slices hold copies of the "
            "weights, and split rows."
        )
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    within = (sizes[0] // slices, *sizes[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def row_shards(mesh: Mesh) -> int:
    """How many ways the rows of a batch are split: their number must be a multiple of it."""
    return math.prod(mesh.shape[a] for a in ROW_AXES)


def axes_that_divide(mesh: Mesh, axes: Sequence[str], size: int) -> tuple[str, ...]:
    """The axes (longest first, then the leading one, then the others) whose device count divides `size`."""
    for choice in (tuple(axes), *((a,) for a in axes)):
        count = math.prod(mesh.shape[a] for a in choice)
        if count > 1 and size % count == 0:
            return choice
    return ()


def spec(mesh: Mesh, layout: str, dims: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Where an array with these logical dimensions lies.

    Args:
        layout: a column of LAYOUTS.
        dims: a logical dimension (or None = not split) for each axis of the array.
        shape: of the array.
    """
    used: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for dim, size in zip(dims, shape, strict=True):
        wanted = [a for a in LAYOUTS[layout].get(dim, ()) if a not in used] if dim else []
        axes = axes_that_divide(mesh, wanted, size) if wanted else ()
        used.update(axes)
        parts.append(axes or None)
    return PartitionSpec(*parts)


def shardings(mesh: Mesh, layout: str, dims: Any, shapes: Any) -> Any:
    """NamedShardings of a tree of arrays.

    Args:
        dims: tree whose leaves are tuples of logical dimensions.
        shapes: the same tree with leaves that have `.shape`.
    """
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, spec(mesh, layout, names, leaf.shape)), shapes, dims)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split over (data, fsdp) along `axis`, whole otherwise."""
    return NamedSharding(mesh, PartitionSpec(*([None] * axis), ROW_AXES))


def put(tree: Any, sharding: Any) -> Any:
    """Host arrays, equal on every process, as global arrays; each process copies only its own shards.

    Args:
        tree: tree of numpy arrays (or scalars), or PRNG keys.
        sharding: one NamedSharding for all leaves, or a tree of them.
    """

    def one(array: Any, where: NamedSharding) -> jax.Array:
        if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            bits = one(jax.random.key_data(array), where)
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(array))
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda a: one(a, sharding), tree)
    return jax.tree.map(one, tree, sharding)


def get(tree: Any) -> Any:
    """Global arrays as numpy arrays, whole, on every process."""

    def one(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(one, tree)


@dataclasses.dataclass(frozen=True)
class Placement:
    """What the model needs to know of the mesh while it computes: two functions that pin arrays to it.

    activations: [rows, ...] → the same, split by rows. weights: (a layer's weights, their logical dimensions) → the
    same, gathered as the layout says. Both are the identity without a mesh.
    """

    activations: Callable[[jax.Array], jax.Array] = lambda x: x
    weights: Callable[[Any, Any], Any] = lambda weights, dims: weights


def placement(mesh: Mesh, layout: str) -> Placement:
    """Pins of a layout: "gather" in training and scoring, "decode" in sampling."""

    def pin(array: jax.Array, dims: Sequence[str | None]) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec(mesh, layout, dims, array.shape)))

    return Placement(
        activations=lambda x: pin(x, ("rows", *[None] * (x.ndim - 1))),
        weights=lambda weights, dims: jax.tree.map(pin, weights, dims),
    )
