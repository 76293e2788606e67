"""Devices as a named mesh, and the one table from logical dimensions to mesh axes.

Rows of a batch are split over (data, fsdp); weights over fsdp, and by heads, hidden units and vocabulary over tensor.
Everything that enters a jitted program passes `put`, which makes it a global array on a named sharding: with several
processes an array left to itself would be taken as replicated although every host holds another one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
    """What the model needs to know of the mesh while it computes: two functions that pin arrays to it, and the look-up
    in a table that is split.

    activations: [rows, ...] → the same, split by rows. weights: (a layer's weights, their logical dimensions) → the
    same, gathered as the layout says. Both are the identity without a mesh. looked_up: (table_VD, ids_BL, dtype) →
    table[ids] in that dtype.
    """

    activations: Callable[[jax.Array], jax.Array] = lambda x: x
    weights: Callable[[Any, Any], Any] = lambda weights, dims: weights
    looked_up: Callable[[jax.Array, jax.Array, Any], jax.Array] = lambda table, ids, dtype: jnp.take(
        table, ids, axis=0
    ).astype(dtype)


def placement(mesh: Mesh, layout: str) -> Placement:
    """Pins of a layout: "gather" in training and scoring, "decode" in sampling."""

    def pin(array: jax.Array, dims: Sequence[str | None]) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec(mesh, layout, dims, array.shape)))

    def looked_up(table_VD: jax.Array, ids_BL: jax.Array, dtype: Any) -> jax.Array:
        axes = axes_that_divide(mesh, LAYOUTS["train"]["vocab"], table_VD.shape[0])
        if layout == "gather" and axes and ids_BL.shape[0] % row_shards(mesh) == 0:
            return _look_up(table_VD, ids_BL, mesh, axes, dtype)
        if not any(spec(mesh, "train", ("vocab", "embed"), table_VD.shape)):
            return Placement.looked_up(table_VD, ids_BL, dtype)
        return jnp.take(pin(table_VD.astype(dtype), ("vocab", "embed")), ids_BL, axis=0)

    return Placement(
        activations=lambda x: pin(x, ("rows", *[None] * (x.ndim - 1))),
        weights=lambda weights, dims: jax.tree.map(pin, weights, dims),
        looked_up=looked_up,
    )


# --- look-up in a table whose rows are split over devices -------------------------------------------------------------

COLUMNS = 128  # of the table at a time, and more of them while they make no more than SLICE numbers
SLICE = 1 << 24


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _look_up(table_VD, ids_BL, mesh, axes, dtype):
    """table[ids] in `dtype`, the ids split by rows, the table's rows over `axes`.

    Weights and their gradients cross devices, activations do not; some columns at a time, so that no device ever holds
    the whole table, nor a gradient of that size. The gradient is summed in float32.
    """

    def body(table_vD, ids_bL):
        def columns(_, part_vd):
            whole_Vd = jax.lax.all_gather(part_vd.astype(dtype), axes, axis=0, tiled=True)
            return None, jnp.take(whole_Vd, ids_bL, axis=0)

        _, parts = jax.lax.scan(columns, None, _columns(table_vD, table_VD.shape[0]))
        return jnp.moveaxis(parts, 0, 2).reshape(*ids_bL.shape, table_vD.shape[1])

    specs = {"in_specs": (PartitionSpec(axes), PartitionSpec(ROW_AXES)), "out_specs": PartitionSpec(ROW_AXES)}
    return jax.shard_map(body, mesh=mesh, **specs, check_vma=False)(table_VD, ids_BL)


def _look_up_forward(table_VD, ids_BL, mesh, axes, dtype):
    # Of the table only its shape and dtype are needed: no residual keeps it.
    return _look_up(table_VD, ids_BL, mesh, axes, dtype), (ids_BL, jnp.zeros((table_VD.shape[0], 0), table_VD.dtype))


def _look_up_backward(mesh, axes, dtype, residuals, d_BLD):
    ids_BL, like = residuals
    vocab = like.shape[0]

    def body(ids_bL, d_bLD):
        def columns(_, d_nd):
            d_Vd = jnp.zeros((vocab, d_nd.shape[1]), jnp.float32).at[ids_bL.reshape(-1)].add(d_nd.astype(jnp.float32))
            # The rows of a batch are split over data and fsdp; devices along tensor have all seen the same.
            d_Vd = jax.lax.psum(d_Vd, tuple(a for a in ROW_AXES if a not in axes))
            if "fsdp" in axes:
                d_Vd = jax.lax.psum_scatter(d_Vd, "fsdp", scatter_dimension=0, tiled=True)
            if "tensor" in axes:
                size = d_Vd.shape[0] // mesh.shape["tensor"]
                d_Vd = jax.lax.dynamic_slice_in_dim(d_Vd, jax.lax.axis_index("tensor") * size, size)
            return None, d_Vd.astype(like.dtype)

        _, parts = jax.lax.scan(columns, None, _columns(d_bLD.reshape(-1, d_bLD.shape[-1]), vocab))
        return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1)

    specs = {"in_specs": (PartitionSpec(ROW_AXES),) * 2, "out_specs": PartitionSpec(axes)}
    return jax.shard_map(body, mesh=mesh, **specs, check_vma=False)(ids_BL, d_BLD), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _columns(array_nD: jax.Array, vocab: int) -> jax.Array:
    """[n, D] → [parts, n, columns], with COLUMNS or more columns each where they divide D, else one part."""
    n, width = array_nD.shape
    fitting = [c for c in range(COLUMNS, width + 1, COLUMNS) if width % c == 0 and c * vocab <= SLICE]
    count = width // max(fitting, default=COLUMNS if width % COLUMNS == 0 else width)
    return jnp.moveaxis(array_nD.reshape(n, count, -1), 1, 0)
