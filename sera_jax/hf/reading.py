"""safetensors in: every tensor as a view of its file, put straight on its sharding."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sera_jax import mesh as meshes
from sera_jax import model
from sera_jax.hf.config_json import read_json
from sera_jax.hf.families import FAMILIES
from sera_jax.hf.layout import DTYPES, file_shape, layer_names, matches, names, sizes_of, some, view, weights_of
from sera_jax.model import Arch

STAGED = 2**26
"""Bytes of a weight, of all layers, that are put together on the host; a larger one goes to the devices by layers."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: the file, safetensors' dtype name, shape, first and last byte."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def load(
    path: str | os.PathLike[str], arch: Arch, mesh: Mesh, *, layout: str = "train", dtype: Any = jnp.float32
) -> dict:
    """The weights of a Hugging Face folder, on their shardings.

    Beside what the devices hold, the host's memory holds one tensor, or 64 MiB. A process reads the slices of its own
    devices, each once.

    Args:
        path: folder with model.safetensors, or with several files and model.safetensors.index.json.
        arch: from `read_arch`.
        layout: column of mesh.LAYOUTS. dtype: of the result; files may hold float32, float16 or bfloat16.

    Returns:
        params as `model.init` gives them.

    Raises:
        ValueError: no safetensors; a file that is missing, truncated or of another format; a tensor that is missing,
            unexpected, or of another shape or dtype than `arch` says.
    """
    path = pathlib.Path(path)
    family = FAMILIES[arch.family]
    stored = _stored(path)
    wanted = names(arch)
    head = {w.name for w in family.weights if w.path == ("head", "table")} if arch.tied else set()
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(wanted)} tensors are missing: {some(missing)}. "
            f"Expected the weights of {arch.family} with {arch.layers} layers and "
            f"{'a tied' if arch.tied else 'its own'} head, as its config.json says."
        )
    unexpected = [
        name for name in stored if name not in wanted and name not in head and not matches(name, family.buffers)
    ]
    if unexpected:
        raise ValueError(
            f"{path}: {len(unexpected)} tensors are unexpected: {some(unexpected)}. {arch.family} with {arch.layers} "
            "layers, as its config.json says, has no such weights."
        )
    sizes = sizes_of(arch)
    for name, (weights, _) in wanted.items():
        _check(name, stored[name], file_shape(weights[0], sizes))
    maps = {file: np.memmap(file, np.uint8, mode="r") for file in {s.file for s in stored.values()}}
    for name in head & stored.keys():
        table = next(n for n, (w, _) in wanted.items() if w[0].path == ("embed", "table"))
        if not _same(stored_array(stored[name], maps), stored_array(stored[table], maps)):
            raise ValueError(
                f"{path}: {name} differs from {table}, expected the same: config.json says tie_word_embeddings is "
                "true. Set it to false if the head has its own weights."
            )

    where = meshes.shardings(mesh, layout, model.dims(arch), model.abstract(arch))
    params: dict = {}
    for weight in weights_of(arch):
        arrays = [view(weight, stored_array(stored[name], maps), sizes) for name in layer_names(weight, arch)]
        sharding = functools.reduce(dict.__getitem__, weight.path, where)
        _insert(params, weight.path, _placed(arrays, "{}" in weight.name, sharding, np.dtype(dtype)))
    return params


def _placed(arrays: list[np.ndarray], stacked: bool, sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    """Views into files as one global array, stacked along a leading axis; only the asked-for slices are read."""
    shape = (len(arrays), *arrays[0].shape) if stacked else arrays[0].shape
    if math.prod(shape) * dtype.itemsize <= STAGED:
        read = (lambda index: _copy(arrays, index, dtype)) if stacked else arrays[0].__getitem__
        return _global(shape, sharding, read, dtype)
    if not stacked:
        return _cast(sharding, dtype)(_as_it_lies(arrays[0], sharding))
    # One layer at a time, in the file's dtype.
    layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    for i, array in enumerate(arrays):
        stack = jax.block_until_ready(_set_layer(sharding)(stack, _as_it_lies(array, layer), np.int32(i)))
    return stack


def _as_it_lies(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The same, but the host copies in the order of the file, and the devices transpose."""
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    where = NamedSharding(sharding.mesh, PartitionSpec(*(sharding.spec[axis] for axis in order)))
    lying = array.transpose(order)
    return _turn(sharding, tuple(map(order.index, range(array.ndim))))(
        _global(lying.shape, where, lying.__getitem__, array.dtype)
    )


def _copy(arrays: list[np.ndarray], index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """A slice of the stack of arrays."""
    slices = [array[index[1:]] for array in arrays[index[0]]]
    out = np.empty((len(slices), *slices[0].shape), dtype)
    for i, one in enumerate(slices):
        out[i] = one
    return out


def _global(
    shape: tuple[int, ...], sharding: NamedSharding, read: Callable[[tuple[slice, ...]], np.ndarray], dtype: np.dtype
) -> jax.Array:
    """The array whose slices `read` gives, each read once, however many devices hold it."""
    held: dict[tuple, np.ndarray] = {}

    def once(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in held:
            # Always a copy: an array that aliased the file would change when the file does.
            held[key] = np.array(read(index), dtype, order="C")
        return held[key]

    return jax.make_array_from_callback(shape, sharding, once)


@functools.cache
def _set_layer(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, np.int32], jax.Array]:
    """(stack, a layer of any dtype, which) → the stack with it, in place."""

    def run(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), i, 0)

    return jax.jit(run, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _turn(sharding: NamedSharding, axes: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array.transpose(axes), out_shardings=sharding)


@functools.cache
def _cast(sharding: NamedSharding, dtype: np.dtype) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)


def _stored(path: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of the folder, from the headers of its files."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return header(path / "model.safetensors")
    if not index.is_file():
        pickles = sorted(f.name for f in path.glob("*.bin")) if path.is_dir() else []
        found = ", ".join(sorted(f.name for f in path.iterdir())) if path.is_dir() else "no such folder"
        hint = (
            f" {some(pickles)}: pickles are never loaded, they can run any code. Convert them where you trust them: "
            "transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder) writes safetensors."
            if pickles
            else ""
        )
        raise ValueError(f"{path}: no model.safetensors and no model.safetensors.index.json (found: {found}).{hint}")
    files = read_json(index, "the index of a sharded checkpoint").get("weight_map", {})
    headers: dict[str, dict[str, Stored]] = {}
    for file in sorted(set(files.values())):
        if not (path / file).is_file():
            raise ValueError(f"{path / file} is missing; {index.name} names it. Is the download complete?")
        headers[file] = header(path / file)
    lost = [name for name, file in files.items() if name not in headers[file]]
    if lost:
        raise ValueError(f"{path}: {index.name} names tensors that are not in their files: {some(lost)}.")
    in_files = {name: tensor for header in headers.values() for name, tensor in header.items()}
    return in_files | {name: headers[file][name] for name, file in files.items()}


def header(file: pathlib.Path) -> dict[str, Stored]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = 8 + length
        text = stream.read(length) if start <= size else b""
    try:
        tensors = json.loads(text) if text else None
    except ValueError:
        tensors = None
    if not isinstance(tensors, dict):
        raise ValueError(
            f"{file} has no complete safetensors header ({size} bytes): it is truncated, or another kind of file, a "
            "Git LFS pointer, say. Fetch it again."
        )
    tensors.pop("__metadata__", None)
    stored = {
        name: Stored(file, t["dtype"], tuple(t["shape"]), *(start + o for o in t["data_offsets"]))
        for name, t in tensors.items()
    }
    end = max((s.end for s in stored.values()), default=start)
    if size < end:
        raise ValueError(f"{file} is truncated: it has {size} bytes, its header speaks of {end}. Fetch it again.")
    return stored


def _check(name: str, tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.file}: {name} has shape {list(tensor.shape)}, expected {list(shape)} from config.json."
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{tensor.file}: {name} has dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}.")
    size = math.prod(shape) * DTYPES[tensor.dtype].itemsize
    if tensor.end - tensor.begin != size:
        raise ValueError(f"{tensor.file}: {name} has {tensor.end - tensor.begin} bytes, expected {size}.")


def stored_array(tensor: Stored, maps: Mapping[pathlib.Path, np.ndarray]) -> np.ndarray:
    """The tensor as a view of its file: nothing is read yet."""
    return maps[tensor.file][tensor.begin : tensor.end].view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def _same(a: np.ndarray, b: np.ndarray, rows: int = 4096) -> bool:
    return a.shape == b.shape and all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def _insert(tree: dict, path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
