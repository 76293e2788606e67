"""Hugging Face folders in and out: config.json ↔ `Arch`, tensor names ↔ our paths and layouts, safetensors by slices.

A family of models is a row of FAMILIES. Weights are read through memory maps, straight into stacked layers on their
shardings: a process touches the bytes of its own slices only. They are written tensor by tensor, so that no process
ever holds more than one whole. Both sides of the safetensors format (8 bytes of header length, a JSON header, raw
little-endian tensors: https://github.com/huggingface/safetensors) are here, some lines each, because its NumPy
interface reads bfloat16 in newer versions only and writes a file from memory at once. Pickled checkpoints are never
opened.

Letters of layouts, here only, are those of `model`: D width, N heads, K key/value heads, H head size, F hidden units,
V vocabulary.
"""

import dataclasses
import fnmatch
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sera_jax import mesh as meshes
from sera_jax import model
from sera_jax.model import Arch

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""safetensors' names of the dtypes that weights may have."""

COPIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What an export takes over from the folder it came from, besides config.json."""


# --- families ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weight:
    """One kind of tensor: its name in the file ({} = layer number), our path, and both layouts as letters.

    file: axes of the file's array, joined letters are one axis ("NH,D" = [N·H, D]). ours: axes of ours, without the
    layer axis ("DNH" = [D, N, H]).
    """

    name: str
    path: tuple[str, ...]
    file: str
    ours: str


@dataclasses.dataclass(frozen=True)
class Family:
    """How models of one architecture are written in a Hugging Face folder.

    Args:
        model_type: of config.json.
        weights: the tensors of every layer and around them; `head` is left out where it is tied to the embedding.
        defaults: values of keys that a config.json may leave out (those of transformers).
        fixed: keys that change the computation, with the one value that this program computes; likewise if left out.
        buffers: tensors in files of older versions of transformers that are no weights, as patterns.
    """

    model_type: str
    weights: tuple[Weight, ...]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    buffers: tuple[str, ...] = ("*.rotary_emb.inv_freq",)


KEYS: Mapping[str, str] = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "init_std": "initializer_range",
}
"""Field of `Arch` → key of config.json, for all but family and rope_theta."""

_LLAMA_WEIGHTS = (
    Weight("model.embed_tokens.weight", ("embed", "table"), "V,D", "VD"),
    Weight("model.layers.{}.input_layernorm.weight", ("layers", "attention_norm", "scale"), "D", "D"),
    Weight("model.layers.{}.self_attn.q_proj.weight", ("layers", "attention", "query"), "NH,D", "DNH"),
    Weight("model.layers.{}.self_attn.k_proj.weight", ("layers", "attention", "key"), "KH,D", "DKH"),
    Weight("model.layers.{}.self_attn.v_proj.weight", ("layers", "attention", "value"), "KH,D", "DKH"),
    Weight("model.layers.{}.self_attn.o_proj.weight", ("layers", "attention", "out"), "D,NH", "NHD"),
    Weight("model.layers.{}.post_attention_layernorm.weight", ("layers", "mlp_norm", "scale"), "D", "D"),
    Weight("model.layers.{}.mlp.gate_proj.weight", ("layers", "mlp", "gate"), "F,D", "DF"),
    Weight("model.layers.{}.mlp.up_proj.weight", ("layers", "mlp", "up"), "F,D", "DF"),
    Weight("model.layers.{}.mlp.down_proj.weight", ("layers", "mlp", "down"), "D,F", "FD"),
    Weight("model.norm.weight", ("final_norm", "scale"), "D", "D"),
    Weight("lm_head.weight", ("head", "table"), "V,D", "VD"),
)
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,  # = num_attention_heads
    "head_dim": None,  # = hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "sliding_window": None,
}
_LLAMA_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", _LLAMA_WEIGHTS, _LLAMA_DEFAULTS, _LLAMA_FIXED),
    "MistralForCausalLM": Family(
        "mistral",
        _LLAMA_WEIGHTS,
        {**_LLAMA_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        _LLAMA_FIXED,
    ),
}
"""Architecture, as config.json names it, → how it is written."""


# --- config.json ------------------------------------------------------------------------------------------------------


def read_arch(path: str | os.PathLike[str]) -> Arch:
    """The architecture in `path`/config.json.

    Raises:
        ValueError: no config.json, an architecture that is not in FAMILIES, a key that is missing or has a value that
            this program does not compute (biases, rope scaling, an effective sliding window, ...).
    """
    path = pathlib.Path(path)
    return _arch_of(_read_json(path / "config.json", "the config of a Hugging Face model folder"), path / "config.json")


def write_config(
    path: str | os.PathLike[str],
    arch: Arch,
    *,
    source: str | os.PathLike[str] | None = None,
    dtype: Any = jnp.float32,
    extra: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes config.json alone, which is enough for random weights.

    Args:
        path: folder, created where it is missing.
        source: folder whose config.json gives the keys that `Arch` does not have; without it, they are left out and
            the defaults of transformers hold.
        dtype: of the weights, for those who load them. extra: further keys ({"eos_token_id": 1}, ...); they win.

    Returns:
        The folder.
    """
    path = pathlib.Path(path)
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        partial = path / "config.json.partial"
        partial.write_text(_config_text(arch, source, dtype, extra))
        os.replace(partial, path / "config.json")
    _barrier("config.json")
    return path


def _arch_of(config: Mapping[str, Any], where: pathlib.Path) -> Arch:
    name = _architecture(config, where)
    family = FAMILIES[name]
    for key, expected in family.fixed.items():
        if config.get(key, expected) != expected:
            raise ValueError(
                f"{where}: {key} is {config[key]!r}, expected {expected!r}; nothing else is computed here yet."
            )

    def read(key: str, kind: type) -> Any:
        """The value of a key, or its default; a number must be positive."""
        value = config.get(key, family.defaults.get(key))
        if value is None and key not in config:
            raise ValueError(f"{where}: {key} is missing, and {name} has no default for it.")
        fits = {bool: isinstance(value, bool), int: type(value) is int, float: type(value) in (int, float)}[kind]
        if not fits or (kind is not bool and value <= 0):
            raise ValueError(
                f"{where}: {key} is {value!r}, expected a {'' if kind is bool else 'positive '}{kind.__name__}."
            )
        return value

    def given(key: str) -> bool:
        return config.get(key, family.defaults[key]) is not None

    width, heads, positions = (read(k, int) for k in ("hidden_size", "num_attention_heads", "max_position_embeddings"))
    kv_heads = read("num_key_value_heads", int) if given("num_key_value_heads") else heads
    if not given("head_dim") and width % heads:
        raise ValueError(f"{where}: hidden_size is {width}, expected a multiple of num_attention_heads ({heads}).")
    head_dim = read("head_dim", int) if given("head_dim") else width // heads
    if given("sliding_window") and read("sliding_window", int) < positions:
        window = read("sliding_window", int)
        raise ValueError(
            f"{where}: sliding_window is {window}, less than max_position_embeddings ({positions}), expected null: "
            f"sliding windows are not computed here yet. If no text will be longer than {window} tokens, set "
            f"max_position_embeddings to {window}."
        )
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_key_value_heads is {kv_heads}, expected a divisor of num_attention_heads ({heads})."
        )
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim is {head_dim}, expected an even number.")
    return Arch(
        family=name,
        vocab=read("vocab_size", int),
        width=width,
        layers=read("num_hidden_layers", int),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=read("intermediate_size", int),
        norm_eps=float(read("rms_norm_eps", float)),
        rope_theta=_rope_theta(config, family, where),
        tied=read("tie_word_embeddings", bool),
        init_std=float(read("initializer_range", float)),
    )


def _architecture(config: Mapping[str, Any], where: pathlib.Path) -> str:
    by_type = [name for name, family in FAMILIES.items() if family.model_type == config.get("model_type")]
    names = config.get("architectures") or by_type or [config.get("model_type")]
    if names[0] not in FAMILIES:
        raise ValueError(f"{where}: the architecture is {names[0]!r}, expected one of {', '.join(FAMILIES)}.")
    return names[0]


def _rope_theta(config: Mapping[str, Any], family: Family, where: pathlib.Path) -> float:
    """The base of the rotary embedding: beside `rope_scaling` (transformers 4), or in `rope_parameters` (5)."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"{where}: {key} has the type {kind!r}, expected 'default'; no rope scaling is computed here yet."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: {key}.partial_rotary_factor is {rope['partial_rotary_factor']!r}, expected 1.0.")
    theta = rope.get("rope_theta", config.get("rope_theta", family.defaults["rope_theta"]))
    if not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"{where}: rope_theta is {theta!r}, expected a positive float.")
    return float(theta)


def _config_text(arch: Arch, source: Any, dtype: Any, extra: Mapping[str, Any] | None) -> str:
    """config.json of `arch`; what it has no word for comes from the source."""
    config: dict[str, Any] = {}
    if source is not None:
        config = _read_json(pathlib.Path(source) / "config.json", "the config of the source folder")
    else:
        # Only a family that looks back a window by default needs to be told that there is none.
        family = FAMILIES[arch.family]
        config = {key: None for key in ("sliding_window",) if family.defaults[key] is not None}
    config["architectures"] = [arch.family]
    config["model_type"] = FAMILIES[arch.family].model_type
    config.update({key: getattr(arch, field) for field, key in KEYS.items()})
    if config.get("rope_parameters"):
        config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": arch.rope_theta}
        config.pop("rope_theta", None)
    else:
        config["rope_theta"] = arch.rope_theta  # transformers 5 reads it here, too
    # transformers 5 writes "dtype" and reads both; version 4 and others know "torch_dtype" only.
    config["dtype" if "dtype" in config else "torch_dtype"] = np.dtype(dtype).name
    config.update(extra or {})
    again = _arch_of(config, pathlib.Path("config.json to be written"))
    if again != arch:
        raise ValueError(f"the config to be written reads as {again}, expected {arch}; check `source` and `extra`.")
    return json.dumps(config, indent=2) + "\n"


def _read_json(path: pathlib.Path, what: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, expected {what}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}), expected {what}.") from None


# --- safetensors in ---------------------------------------------------------------------------------------------------


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
    names = _names(arch)
    head = {w.name for w in family.weights if w.path[0] == "head"} if arch.tied else set()
    missing = [name for name in names if name not in stored]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(names)} tensors are missing: {_some(missing)}. "
            f"Expected the weights of {arch.family} with {arch.layers} layers and "
            f"{'a tied' if arch.tied else 'its own'} head, as its config.json says."
        )
    unexpected = [
        name for name in stored if name not in names and name not in head and not _matches(name, family.buffers)
    ]
    if unexpected:
        raise ValueError(
            f"{path}: {len(unexpected)} tensors are unexpected: {_some(unexpected)}. {arch.family} with {arch.layers} "
            "layers, as its config.json says, has no such weights."
        )
    sizes = _sizes(arch)
    for name, (weight, _) in names.items():
        _check(name, stored[name], _file_shape(weight, sizes))
    maps = {file: np.memmap(file, np.uint8, mode="r") for file in {s.file for s in stored.values()}}
    for name in head & stored.keys():
        table = next(n for n, (w, _) in names.items() if w.path == ("embed", "table"))
        if not _same(_array(stored[name], maps), _array(stored[table], maps)):
            raise ValueError(
                f"{path}: {name} differs from {table}, expected the same: config.json says tie_word_embeddings is "
                "true. Set it to false if the head has its own weights."
            )

    where = meshes.shardings(mesh, layout, model.dims(arch), model.abstract(arch))
    params: dict = {}
    for weight in _weights(arch):
        arrays = [_view(weight, _array(stored[name], maps), sizes) for name in _layer_names(weight, arch)]
        sharding = functools.reduce(dict.__getitem__, weight.path, where)
        _insert(params, weight.path, _placed(arrays, "{}" in weight.name, sharding, np.dtype(dtype)))
    return params


def _placed(arrays: list[np.ndarray], stacked: bool, sharding: Any, dtype: np.dtype) -> jax.Array:
    """Views into files as one global array, stacked along a leading axis; only the asked-for slices are read."""
    shape = (len(arrays), *arrays[0].shape) if stacked else arrays[0].shape

    def read(index: tuple[slice, ...]) -> np.ndarray:
        # Always a copy: an array that aliased the file would change when the file does.
        if not stacked:
            return arrays[0][index].astype(dtype, order="C")
        slices = [array[index[1:]] for array in arrays[index[0]]]
        out = np.empty((len(slices), *slices[0].shape), dtype)
        for i, one in enumerate(slices):
            out[i] = one
        return out

    return jax.make_array_from_callback(shape, sharding, read)


def _stored(path: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of the folder, from the headers of its files."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return _header(path / "model.safetensors")
    if not index.is_file():
        pickles = sorted(f.name for f in path.glob("*.bin")) if path.is_dir() else []
        found = ", ".join(sorted(f.name for f in path.iterdir())) if path.is_dir() else "no such folder"
        hint = (
            f" {_some(pickles)}: pickles are never loaded, they can run any code. Convert them where you trust them: "
            "transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder) writes safetensors."
            if pickles
            else ""
        )
        raise ValueError(f"{path}: no model.safetensors and no model.safetensors.index.json (found: {found}).{hint}")
    files = _read_json(index, "the index of a sharded checkpoint").get("weight_map", {})
    headers: dict[str, dict[str, Stored]] = {}
    for file in sorted(set(files.values())):
        if not (path / file).is_file():
            raise ValueError(f"{path / file} is missing; {index.name} names it. Is the download complete?")
        headers[file] = _header(path / file)
    lost = [name for name, file in files.items() if name not in headers[file]]
    if lost:
        raise ValueError(f"{path}: {index.name} names tensors that are not in their files: {_some(lost)}.")
    in_files = {name: tensor for header in headers.values() for name, tensor in header.items()}
    return in_files | {name: headers[file][name] for name, file in files.items()}


def _header(file: pathlib.Path) -> dict[str, Stored]:
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


def _array(tensor: Stored, maps: Mapping[pathlib.Path, np.ndarray]) -> np.ndarray:
    """The tensor as a view of its file: nothing is read yet."""
    return maps[tensor.file][tensor.begin : tensor.end].view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def _same(a: np.ndarray, b: np.ndarray, rows: int = 4096) -> bool:
    return a.shape == b.shape and all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


# --- safetensors out --------------------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    arch: Arch,
    params: dict,
    *,
    source: str | os.PathLike[str] | None = None,
    dtype: Any,
    max_shard_bytes: float = 5e9,
    card: Sequence[str] = (),
) -> pathlib.Path:
    """Writes a folder that transformers, vLLM and `load` take as it is; an earlier one is replaced.

    All processes call it; process 0 writes. Everything is written to `path`.partial and renamed, so a killed export
    leaves an earlier one as it was, or nothing.

    Args:
        params: weights on any layout. dtype: of the files: float32, float16 or bfloat16.
        source: folder that gives tokenizer, generation config, chat template, licence and the other keys of
            config.json.
        max_shard_bytes: tensors of a file; a larger model gets several and an index.
        card: lines of README.md, the model card; none = no card.

    Returns:
        The folder.

    Raises:
        ValueError: a dtype that weights cannot have; weights of other shapes than `arch` says.
    """
    path, dtype = pathlib.Path(path).absolute(), np.dtype(dtype)
    code = next((name for name, known in DTYPES.items() if known == dtype), None)
    if code is None:
        raise ValueError(f"export dtype is {dtype.name}, expected one of {', '.join(d.name for d in DTYPES.values())}.")
    for want, leaf in zip(jax.tree.leaves(model.abstract(arch)), jax.tree.leaves(params), strict=True):
        if want.shape != leaf.shape:
            raise ValueError(f"a weight has shape {leaf.shape}, expected {want.shape} from {arch}.")
    config = _config_text(arch, source, dtype, None)
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    writes = jax.process_index() == 0
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    files = _shards(arch, dtype.itemsize, max_shard_bytes)
    for file, names in files.items():
        if writes:
            with open(partial / file, "wb") as stream:
                _write_header(stream, arch, names, code)
                for name in names:
                    stream.write(_fetch(arch, params, name, dtype).tobytes())
                stream.flush()
                os.fsync(stream.fileno())
        else:
            for name in names:
                _fetch(arch, params, name, dtype)  # a collective: every process takes part

    if writes:
        if len(files) > 1:
            total = sum(math.prod(shape) for shape in _file_shapes(arch).values()) * dtype.itemsize
            index = {
                "metadata": {"total_size": total},
                "weight_map": {n: f for f, names in files.items() for n in names},
            }
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        _copy(source, partial)
        if card:
            (partial / "README.md").write_text("\n".join(card) + "\n")
        (partial / "config.json").write_text(config)
        _replace(partial, path, old)
    _barrier("export")
    return path


def _shards(arch: Arch, itemsize: int, max_shard_bytes: float) -> dict[str, list[str]]:
    """File name → its tensors' names, in order; a tensor is never split."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in _file_shapes(arch).items():
        size = math.prod(shape) * itemsize
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards)}


def _write_header(stream: BinaryIO, arch: Arch, names: list[str], code: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    shapes, offset = _file_shapes(arch), 0
    for name in names:
        end = offset + math.prod(shapes[name]) * DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    stream.write(len(text).to_bytes(8, "little") + text)


@functools.partial(jax.jit, static_argnames="dtype")
def _one_layer(stack: jax.Array, layer: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False).astype(dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    return array.astype(dtype)


def _fetch(arch: Arch, params: dict, name: str, dtype: np.dtype) -> np.ndarray:
    """One tensor, whole, in the file's layout."""
    weight, layer = _names(arch)[name]
    leaf = functools.reduce(dict.__getitem__, weight.path, params)
    array = _cast(leaf, dtype) if layer is None else _one_layer(leaf, np.int32(layer), dtype)
    letters = weight.file.replace(",", "")
    ours = meshes.get(array).transpose([weight.ours.index(letter) for letter in letters])
    return np.ascontiguousarray(ours.reshape(_file_shape(weight, _sizes(arch))))


def _copy(source: Any, target: pathlib.Path) -> None:
    if source is None:
        return
    for entry in sorted(pathlib.Path(source).iterdir()):
        if not _matches(entry.name, COPIED):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(entry, target / entry.name)


def _replace(partial: pathlib.Path, path: pathlib.Path, old: pathlib.Path) -> None:
    """partial → path. A folder cannot be renamed onto another, so an earlier one first steps aside."""
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(partial, path)
    except BaseException:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


# --- names and layouts ------------------------------------------------------------------------------------------------


def _weights(arch: Arch) -> list[Weight]:
    return [w for w in FAMILIES[arch.family].weights if not (arch.tied and w.path[0] == "head")]


def _layer_names(weight: Weight, arch: Arch) -> list[str]:
    return [weight.name.format(i) for i in range(arch.layers)] if "{}" in weight.name else [weight.name]


@functools.cache
def _names(arch: Arch) -> dict[str, tuple[Weight, int | None]]:
    """Tensor name → its kind and its layer, in the order of the file."""
    kinds = _weights(arch)
    layered = [w for w in kinds if "{}" in w.name]
    plain = {w.name: (w, None) for w in kinds if "{}" not in w.name}
    first = kinds[0].name
    return {
        first: plain.pop(first),
        **{w.name.format(i): (w, i) for i in range(arch.layers) for w in layered},
        **plain,
    }


def _sizes(arch: Arch) -> dict[str, int]:
    return dict(V=arch.vocab, D=arch.width, N=arch.heads, K=arch.kv_heads, H=arch.head_dim, F=arch.mlp)


def _file_shape(weight: Weight, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in weight.file.split(","))


def _file_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    return {name: _file_shape(weight, _sizes(arch)) for name, (weight, _) in _names(arch).items()}


def _view(weight: Weight, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """The file's array in our layout, without a copy."""
    letters = weight.file.replace(",", "")
    split = array.reshape([sizes[letter] for letter in letters])
    return split.transpose([letters.index(letter) for letter in weight.ours])


def _insert(tree: dict, path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
