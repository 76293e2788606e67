"""safetensors out, tensor by tensor, and the folder around them."""

import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from sera_jax import disk, model, processes
from sera_jax import mesh as meshes
from sera_jax.hf.config_json import config_text, read_json
from sera_jax.hf.layout import DTYPES, file_shape, file_shapes, matches, names, sizes_of
from sera_jax.model import Arch

COPIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What an export takes over from the folder it came from, besides config.json."""


def save(
    path: str | os.PathLike[str],
    arch: Arch,
    params: dict,
    *,
    source: str | os.PathLike[str] | None = None,
    dtype: Any,
    max_shard_bytes: float = 5e9,
    card: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a folder that transformers, vLLM and `load` take as it is; an earlier one is replaced.

    All processes call it; process 0 writes. Everything is written to `path`.partial, config.json as the last, which
    then changes places with `path`: a killed export leaves there an earlier one as it was, or the new one, whole; or
    nothing, if there was none. (Where a file system cannot swap two folders, an earlier one is called `path`.old
    between two renames; the next export brings it back.) The host's memory holds a tensor or two.

    Args:
        params: weights on any layout. dtype: of the files: float32, float16 or bfloat16.
        source: folder that gives tokenizer, generation config, chat template, licence and the other keys of
            config.json.
        max_shard_bytes: tensors of a file; a larger model gets several and an index.
        card: lines of README.md, the model card; none = no card.
        extra: further keys of config.json, tokenizer: of the source's tokenizer_config.json; they win.

    Returns:
        The folder.

    Raises:
        ValueError: a dtype that weights cannot have; weights of other shapes than `arch` says.
    """
    path, dtype = pathlib.Path(path).resolve(), np.dtype(dtype)
    code = next((name for name, known in DTYPES.items() if known == dtype), None)
    if code is None:
        raise ValueError(f"export dtype is {dtype.name}, expected one of {', '.join(d.name for d in DTYPES.values())}.")
    for want, leaf in zip(jax.tree.leaves(model.abstract(arch)), jax.tree.leaves(params), strict=True):
        if want.shape != leaf.shape:
            raise ValueError(f"a weight has shape {leaf.shape}, expected {want.shape} from {arch}.")
    _restored(path)
    config, shapes = config_text(arch, source, dtype, extra), file_shapes(arch)
    files = _shards(arch, dtype.itemsize, max_shard_bytes)
    with appearing(path) as partial:
        for file, held in files.items():
            get = lambda name: fetch(arch, params, name, dtype)
            if partial is not None:
                write_tensors(partial / file, code, {name: shapes[name] for name in held}, get)
            else:
                for name in held:
                    get(name)  # a collective: every process takes part
        if partial is not None:
            if len(files) > 1:
                index = {
                    "metadata": {"total_size": sum(map(math.prod, shapes.values())) * dtype.itemsize},
                    "weight_map": {n: f for f, held in files.items() for n in held},
                }
                (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
            copy_source(source, partial)
            if tokenizer:
                told = partial / "tokenizer_config.json"
                before = read_json(told, "that of the source's tokenizer") if told.is_file() else {}
                told.write_text(json.dumps({**before, **tokenizer}, indent=2) + "\n")
            if card:
                (partial / "README.md").write_text("\n".join(card) + "\n")
            _synced(partial)
            (partial / "config.json").write_text(config)
    return path


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """A folder beside `path` for process 0 to write into, None on the others; at the end it becomes `path`."""
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    writes = jax.process_index() == 0
    if writes:
        _remove(partial)
        partial.mkdir(parents=True)
    yield partial if writes else None
    if writes:
        _synced(partial)
        _replace(partial, path, old)
    processes.barrier("export")


def _restored(path: pathlib.Path) -> None:
    """Puts an earlier folder back that a killed export had moved aside."""
    old = path.with_name(path.name + ".old")
    if jax.process_index() == 0 and (old / "config.json").exists() and not path.exists():
        os.rename(old, path)


def _synced(folder: pathlib.Path) -> None:
    for place in (*folder.rglob("*"), folder):
        disk.sync(place)


def write_tensors(
    file: pathlib.Path, code: str, shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], np.ndarray]
) -> None:
    """A safetensors file, tensor by tensor. code: a key of DTYPES. get: name → the tensor, in that dtype."""
    with open(file, "wb") as stream:
        _write_header(stream, shapes, code)
        for name in shapes:
            stream.write(np.ascontiguousarray(get(name)).view(np.uint8).data)  # no copy


def _shards(arch: Arch, itemsize: int, max_shard_bytes: float) -> dict[str, list[str]]:
    """File name → its tensors' names, in order; a tensor is never split."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in file_shapes(arch).items():
        size = math.prod(shape) * itemsize
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards)}


def _write_header(stream: BinaryIO, shapes: Mapping[str, tuple[int, ...]], code: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    stream.write(len(text).to_bytes(8, "little") + text)


@functools.partial(jax.jit, static_argnames="dtype")
def _one_layer(stack: jax.Array, layer: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False).astype(dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    # A copy even in the same dtype: jit would give back the argument, which would keep what the host reads of it.
    return jnp.copy(array).astype(dtype)


@functools.partial(jax.jit, static_argnames="axes")
def _turn(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return array.transpose(axes)  # a program of its own: fused with the cast it takes four times as long on CPU


def fetch(arch: Arch, params: dict, name: str, dtype: np.dtype) -> np.ndarray:
    """One tensor, whole, in the file's layout."""
    weights, layer = names(arch)[name]
    parts = []
    for weight in weights:
        leaf = functools.reduce(dict.__getitem__, weight.path, params)
        array = _cast(leaf, dtype) if layer is None else _one_layer(leaf, np.int32(layer), dtype)
        letters = weight.file.replace(",", "").replace("3", "")
        parts.append(meshes.get(_turn(array, tuple(weight.ours.index(letter) for letter in letters))))
    # Several of ours lie along axis 3 of the file's.
    whole = parts[0] if len(parts) == 1 else np.stack(parts, weights[0].file.replace(",", "").index("3"))
    return np.ascontiguousarray(whole.reshape(file_shape(weights[0], sizes_of(arch))))


def copy_source(source: Any, target: pathlib.Path) -> None:
    """What an export takes over from the folder that it came from (COPIED)."""
    if source is None:
        return
    for entry in sorted(pathlib.Path(source).iterdir()):
        if not matches(entry.name, COPIED):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(entry, target / entry.name)


def _replace(partial: pathlib.Path, path: pathlib.Path, old: pathlib.Path) -> None:
    """partial → path, on the disk, before an earlier one is removed."""
    _remove(old)
    if not path.exists():
        os.rename(partial, path)
        earlier = None
    elif disk.exchange(partial, path):
        earlier = partial
    else:
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except BaseException:
            os.rename(old, path)
            raise
        earlier = old
    disk.sync(path.parent)
    if earlier:
        _remove(earlier)


def _remove(folder: pathlib.Path) -> None:
    """The config as the first: what is left when this is killed does not load."""
    for name in ("config.json", "adapter_config.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
