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
import inspect
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sera_jax import mesh as meshes
from sera_jax import model, rope
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
    layer axis ("DNH" = [D, N, H]). part: where a tensor of the file holds several of ours, along its axis 3, which one.
    has: is it there? None = always.
    """

    name: str
    path: tuple[str, ...]
    file: str
    ours: str
    part: int | None = None
    has: Callable[[Arch], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """How models of one architecture are written in a Hugging Face folder.

    Args:
        model_type: of config.json.
        weights: the tensors of every layer and around them; `head` is left out where it is tied to the embedding.
        defaults: values of keys that a config.json may leave out (those of transformers); None = that of the next rule.
        fixed: keys that change the computation, with the values that this program computes; the first is that of a key
            that is left out.
        form: (config) → fields of `Arch` that no number of config.json gives.
        keys: field of `Arch` → key, where it differs from KEYS; None = the family has no such key.
        caps: those among the optional keys of CAPS that it has.
        biases: (config) → the biases it has, names as in Arch.biases.
        slides: (config, layer) → does the layer look back a window only, where config.json does not list the kinds of
            its layers? None = the family knows no windows.
        rotary: key of the share of a head that turns, and its default; None = the whole head, always.
        theta: key of the base of the rotary embedding.
        buffers: tensors in files of older versions of transformers that are no weights, as patterns.
    """

    model_type: str
    weights: tuple[Weight, ...]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    form: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    keys: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    caps: tuple[str, ...] = ()
    biases: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda config: ()
    slides: Callable[[Mapping[str, Any], int], bool] | None = None
    rotary: tuple[str, float] | None = None
    theta: str = "rope_theta"
    buffers: tuple[str, ...] = ("*.rotary_emb.inv_freq",)

    def key(self, field: str) -> str | None:
        """The key of config.json for a field of `Arch`."""
        return self.keys.get(field, KEYS[field])


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
    "activation": "hidden_act",
}
"""Field of `Arch` → key of config.json, for those that a key gives as it is."""

CAPS: Mapping[str, str] = {"score_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
"""Likewise for those that may be null, which is none."""


def _linear(name: str, path: str, axes: str, bias: str) -> tuple[Weight, Weight]:
    """A matrix, [out, in] in the file, and its bias, which is there if `bias` is among the biases of the `Arch`.

    path: of ours, dotted. axes: "in|out".
    """
    within, out = axes.split("|")
    *above, last = path.split(".")
    return (
        Weight(f"{name}.weight", (*above, last), f"{out},{within}", within + out),
        Weight(f"{name}.bias", (*above, f"{last}_bias"), out, out, has=lambda arch: bias in arch.biases),
    )


def _norm(name: str, path: str, size: str = "D", has: Callable[[Arch], bool] | None = None) -> tuple[Weight, Weight]:
    """Scale and, in a LayerNorm, bias of a norm."""
    here = has or (lambda arch: True)
    place = tuple(path.split("."))
    return (
        Weight(f"{name}.weight", (*place, "scale"), size, size, has=has),
        Weight(f"{name}.bias", (*place, "bias"), size, size, has=lambda arch: here(arch) and arch.norm == "layer"),
    )


_LAYER = "model.layers.{}"
_LLAMA_ATTENTION = (
    *_linear(f"{_LAYER}.self_attn.q_proj", "layers.attention.query", "D|NH", "attention"),
    *_linear(f"{_LAYER}.self_attn.k_proj", "layers.attention.key", "D|KH", "attention"),
    *_linear(f"{_LAYER}.self_attn.v_proj", "layers.attention.value", "D|KH", "attention"),
)
_LLAMA_MLP = (
    *_linear(f"{_LAYER}.mlp.gate_proj", "layers.mlp.gate", "D|F", "mlp"),
    *_linear(f"{_LAYER}.mlp.up_proj", "layers.mlp.up", "D|F", "mlp"),
    *_linear(f"{_LAYER}.mlp.down_proj", "layers.mlp.down", "F|D", "mlp"),
)
_EMBEDDING = Weight("model.embed_tokens.weight", ("embed", "table"), "V,D", "VD")
_HEAD = Weight("lm_head.weight", ("head", "table"), "V,D", "VD")
_LLAMA_WEIGHTS = (
    _EMBEDDING,
    *_norm(f"{_LAYER}.input_layernorm", "layers.attention_norm"),
    *_LLAMA_ATTENTION,
    *_linear(f"{_LAYER}.self_attn.o_proj", "layers.attention.out", "NH|D", "out"),
    *_norm(f"{_LAYER}.self_attn.q_norm", "layers.query_norm", "H", lambda arch: arch.qk_norm),
    *_norm(f"{_LAYER}.self_attn.k_norm", "layers.key_norm", "H", lambda arch: arch.qk_norm),
    *_norm(f"{_LAYER}.post_attention_layernorm", "layers.mlp_norm"),
    *_LLAMA_MLP,
    *_norm("model.norm", "final_norm"),
    _HEAD,
)
_GEMMA2_WEIGHTS = (
    _EMBEDDING,
    *_norm(f"{_LAYER}.input_layernorm", "layers.attention_norm"),
    *_LLAMA_ATTENTION,
    *_linear(f"{_LAYER}.self_attn.o_proj", "layers.attention.out", "NH|D", "out"),
    *_norm(f"{_LAYER}.post_attention_layernorm", "layers.attention_post_norm"),
    *_norm(f"{_LAYER}.pre_feedforward_layernorm", "layers.mlp_norm"),
    *_LLAMA_MLP,
    *_norm(f"{_LAYER}.post_feedforward_layernorm", "layers.mlp_post_norm"),
    *_norm("model.norm", "final_norm"),
    _HEAD,
)
_PHI_WEIGHTS = (
    _EMBEDDING,
    *_norm(f"{_LAYER}.input_layernorm", "layers.attention_norm"),
    *_LLAMA_ATTENTION,
    *_linear(f"{_LAYER}.self_attn.dense", "layers.attention.out", "NH|D", "out"),
    *_linear(f"{_LAYER}.mlp.fc1", "layers.mlp.up", "D|F", "mlp"),
    *_linear(f"{_LAYER}.mlp.fc2", "layers.mlp.down", "F|D", "mlp"),
    *_norm("model.final_layernorm", "final_norm"),
    _HEAD,
    Weight("lm_head.bias", ("head", "bias"), "V", "V", has=lambda arch: "head" in arch.biases),
)
_NEOX_LAYER = "gpt_neox.layers.{}"


def _neox_qkv(name: str, part: int) -> tuple[Weight, Weight]:
    """One of queries, keys and values, which lie together in the file: [N · 3 · H, D], head by head."""
    file = f"{_NEOX_LAYER}.attention.query_key_value"
    has = lambda arch: "attention" in arch.biases
    return (
        Weight(f"{file}.weight", ("layers", "attention", name), "N3H,D", "DNH", part),
        Weight(f"{file}.bias", ("layers", "attention", f"{name}_bias"), "N3H", "NH", part, has),
    )


_NEOX_WEIGHTS = (
    Weight("gpt_neox.embed_in.weight", ("embed", "table"), "V,D", "VD"),
    *_norm(f"{_NEOX_LAYER}.input_layernorm", "layers.attention_norm"),
    *_neox_qkv("query", 0),
    *_neox_qkv("key", 1),
    *_neox_qkv("value", 2),
    *_linear(f"{_NEOX_LAYER}.attention.dense", "layers.attention.out", "NH|D", "out"),
    *_norm(f"{_NEOX_LAYER}.post_attention_layernorm", "layers.mlp_norm"),
    *_linear(f"{_NEOX_LAYER}.mlp.dense_h_to_4h", "layers.mlp.up", "D|F", "mlp"),
    *_linear(f"{_NEOX_LAYER}.mlp.dense_4h_to_h", "layers.mlp.down", "F|D", "mlp"),
    *_norm("gpt_neox.final_layer_norm", "final_norm"),
    Weight("embed_out.weight", ("head", "table"), "V,D", "VD"),
)

_DEFAULTS = {
    "num_key_value_heads": None,  # = num_attention_heads
    "head_dim": None,  # = hidden_size / num_attention_heads
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "sliding_window": None,
}
_GEMMA_DEFAULTS = {
    **_DEFAULTS,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
_QWEN_DEFAULTS = {
    **_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
_FIXED = {"quantization_config": (None,)}
_GEMMA_FIXED = {
    **_FIXED,
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # early files say "gelu" and mean its tanh form
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "use_bidirectional_attention": (None, False),
}


def _attention_biases(config: Mapping[str, Any]) -> tuple[str, ...]:
    return ("attention", "out") if config.get("attention_bias", False) else ()


def _llama_biases(config: Mapping[str, Any]) -> tuple[str, ...]:
    return _attention_biases(config) + (("mlp",) if config.get("mlp_bias", False) else ())


def _gemma_form(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"norm": "rms_plus_one", "scaled_embedding": True, "activation": "gelu_pytorch_tanh"}


def _gemma2_form(config: Mapping[str, Any]) -> Mapping[str, Any]:
    scalar = config.get("query_pre_attn_scalar", 256)
    return {**_gemma_form(config), "block": "sandwich", "score_scale": float(scalar) ** -0.5}


def _neox_form(config: Mapping[str, Any]) -> Mapping[str, Any]:
    parallel = config.get("use_parallel_residual", True)
    return {"norm": "layer", "gated": False, "block": "parallel" if parallel else "sequential"}


def _phi_form(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"norm": "layer", "gated": False, "block": "parallel_shared"}


def _qwen_slides(config: Mapping[str, Any], layer: int) -> bool:
    return layer >= config.get("max_window_layers", _QWEN_DEFAULTS["max_window_layers"])


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", _LLAMA_WEIGHTS, _DEFAULTS, _FIXED, biases=_llama_biases),
    "MistralForCausalLM": Family(
        "mistral",
        _LLAMA_WEIGHTS,
        {**_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        _FIXED,
        slides=lambda config, layer: True,
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2", _LLAMA_WEIGHTS, _QWEN_DEFAULTS, _FIXED, biases=lambda config: ("attention",), slides=_qwen_slides
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        _LLAMA_WEIGHTS,
        {**_QWEN_DEFAULTS, "head_dim": 128},
        _FIXED,
        form=lambda config: {"qk_norm": True},
        biases=_attention_biases,
        slides=_qwen_slides,
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        _LLAMA_WEIGHTS,
        {**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        _GEMMA_FIXED,
        form=_gemma_form,
        keys={"activation": None},
        biases=_attention_biases,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        _GEMMA2_WEIGHTS,
        {
            **_GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        _GEMMA_FIXED,
        form=_gemma2_form,
        keys={"activation": None},
        caps=tuple(CAPS),
        biases=_attention_biases,
        slides=lambda config, layer: layer % 2 == 0,
    ),
    "PhiForCausalLM": Family(
        "phi",
        _PHI_WEIGHTS,
        {**_DEFAULTS, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5},
        {**_FIXED, "qk_layernorm": (False,)},
        form=_phi_form,
        keys={"norm_eps": "layer_norm_eps", "head_dim": None},
        biases=lambda config: ("attention", "out", "mlp", "head"),
        rotary=("partial_rotary_factor", 0.5),
    ),
    "GPTNeoXForCausalLM": Family(
        "gpt_neox",
        _NEOX_WEIGHTS,
        {**_DEFAULTS, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_emb_base": 10000.0},
        _FIXED,
        form=_neox_form,
        keys={"norm_eps": "layer_norm_eps", "head_dim": None, "kv_heads": None},
        biases=lambda config: ("mlp", *(("attention", "out") if config.get("attention_bias", True) else ())),
        rotary=("rotary_pct", 0.25),
        theta="rotary_emb_base",
        buffers=("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias"),
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
    for key, accepted in family.fixed.items():
        if config.get(key, accepted[0]) not in accepted:
            raise ValueError(
                f"{where}: {key} is {config[key]!r}, expected {' or '.join(map(repr, accepted))}; nothing else is "
                "computed here yet."
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

    def given(key: str | None) -> bool:
        return key is not None and config.get(key, family.defaults[key]) is not None

    width, heads = read("hidden_size", int), read("num_attention_heads", int)
    kv_heads = read("num_key_value_heads", int) if given(family.key("kv_heads")) else heads
    if not given(family.key("head_dim")) and width % heads:
        raise ValueError(f"{where}: hidden_size is {width}, expected a multiple of num_attention_heads ({heads}).")
    head_dim = read("head_dim", int) if given(family.key("head_dim")) else width // heads
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_key_value_heads is {kv_heads}, expected a divisor of num_attention_heads ({heads})."
        )
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim is {head_dim}, expected an even number.")
    form = dict(family.form(config))
    if family.key("activation"):
        act = form["activation"] = config.get("hidden_act", family.defaults["hidden_act"])
        if act not in model.ACTIVATIONS:
            raise ValueError(f"{where}: hidden_act is {act!r}, expected one of {', '.join(model.ACTIVATIONS)}.")
    for field in family.caps:
        form[field] = float(read(CAPS[field], float)) if given(CAPS[field]) else None
    layers = read("num_hidden_layers", int)
    return Arch(
        family=name,
        vocab=read("vocab_size", int),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=read("intermediate_size", int),
        norm_eps=float(read(family.key("norm_eps"), float)),
        tied=read("tie_word_embeddings", bool),
        init_std=float(read("initializer_range", float)),
        biases=family.biases(config),
        windows=_windows(config, family, layers, where),
        **_rope(config, family, head_dim, where),
        **form,
    )


def _architecture(config: Mapping[str, Any], where: pathlib.Path) -> str:
    by_type = [name for name, family in FAMILIES.items() if family.model_type == config.get("model_type")]
    names = config.get("architectures") or by_type or [config.get("model_type")]
    if names[0] not in FAMILIES:
        raise ValueError(f"{where}: the architecture is {names[0]!r}, expected one of {', '.join(FAMILIES)}.")
    return names[0]


def _windows(config: Mapping[str, Any], family: Family, layers: int, where: pathlib.Path) -> tuple[int | None, ...]:
    """How far each layer looks back; () where all look back to the start."""
    window = config.get("sliding_window", family.defaults["sliding_window"])
    used = config.get("use_sliding_window", family.defaults.get("use_sliding_window", True))
    if family.slides is None or window is None or not used:
        return ()
    if type(window) is not int or window <= 0:
        raise ValueError(f"{where}: sliding_window is {window!r}, expected a positive int or null.")
    kinds = config.get("layer_types") or [
        "sliding_attention" if family.slides(config, layer) else "full_attention" for layer in range(layers)
    ]
    strange = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if strange or len(kinds) != layers:
        raise ValueError(
            f"{where}: layer_types has {len(kinds)} entries"
            f"{f', one of them {strange[0]!r}' if strange else ''}, expected {layers} (num_hidden_layers), each "
            "'sliding_attention' or 'full_attention'."
        )
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _rope(config: Mapping[str, Any], family: Family, head_dim: int, where: pathlib.Path) -> dict[str, Any]:
    """The fields of `Arch` on rotary embeddings: from `rope_scaling` and keys beside it (transformers 4), or all in
    `rope_parameters` (5)."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    told = dict(config.get(key) or {})
    kinds = (told.pop("rope_type", None), told.pop("type", None))  # "type" is the older word
    kind = kinds[0] or kinds[1] or "default"
    if kind not in rope.ROPES:
        raise ValueError(f"{where}: {key} has the type {kind!r}, expected one of {', '.join(rope.ROPES)}.")
    theta = told.pop("rope_theta", config.get(family.theta, config.get("rope_theta", family.defaults["rope_theta"])))
    if type(theta) not in (int, float) or theta <= 0:
        raise ValueError(f"{where}: {family.theta} is {theta!r}, expected a positive float.")
    share_key, default = family.rotary or ("partial_rotary_factor", 1.0)
    share = told.pop("partial_rotary_factor", config.get(share_key, default))
    rotary = int(head_dim * share) if type(share) in (int, float) else 0
    if not 0 < rotary <= head_dim or rotary % 2 or (family.rotary is None and rotary < head_dim):
        wanted = "1.0" if family.rotary is None else f"a share of head_dim ({head_dim}) that is an even number"
        raise ValueError(f"{where}: {share_key} is {share!r}, expected {wanted}.")
    known = inspect.signature(rope.ROPES[kind]).parameters.values()
    own = {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY}
    if "original_max_position_embeddings" in own:
        told.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    told = {name: value for name, value in told.items() if value is not None}
    strange = [name for name in told if name not in own] if kind != "default" else []
    missing = [name for name, value in own.items() if value is inspect.Parameter.empty and name not in told]
    if strange or missing:
        raise ValueError(
            f"{where}: {key} of type {kind!r} has {', '.join(told) or 'no keys'}, expected {', '.join(own)}"
            f" ({'unknown: ' + ', '.join(strange) if strange else 'missing: ' + ', '.join(missing)})."
        )
    return {
        "rope_theta": float(theta),
        "rotary": None if rotary == head_dim else rotary,
        "rope": kind,
        "rope_keys": tuple(sorted((name, value) for name, value in told.items() if name in own)),
    }


def _config_text(arch: Arch, source: Any, dtype: Any, extra: Mapping[str, Any] | None) -> str:
    """config.json of `arch`; what it has no word for comes from the source."""
    family = FAMILIES[arch.family]
    own = _own_keys(arch, family) if source is None else {}
    config = dict(own)
    if source is not None:
        config = _read_json(pathlib.Path(source) / "config.json", "the config of the source folder")
    config["architectures"] = [arch.family]
    config["model_type"] = family.model_type
    keys = {field: family.key(field) for field in KEYS} | {field: CAPS[field] for field in family.caps}
    config.update({key: getattr(arch, field) for field, key in keys.items() if key is not None})
    if config.get("rope_parameters"):
        config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": arch.rope_theta}
        config.pop(family.theta, None)
    else:
        config[family.theta] = arch.rope_theta  # transformers 5 reads it here, too
    # transformers 5 writes "dtype" and reads both; version 4 and others know "torch_dtype" only.
    config["dtype" if "dtype" in config else "torch_dtype"] = np.dtype(dtype).name
    config.update(extra or {})
    where = pathlib.Path("config.json to be written")
    for key in own.keys() - (extra or {}).keys():  # what goes without saying is left out
        rest = {k: v for k, v in config.items() if k != key}
        config = rest if _arch_of(rest, where) == arch else config
    again = _arch_of(config, where)
    if again != arch:
        raise ValueError(f"the config to be written reads as {again}, expected {arch}; check `source` and `extra`.")
    return json.dumps(config, indent=2) + "\n"


def _own_keys(arch: Arch, family: Family) -> dict[str, Any]:
    """The keys that say what KEYS and CAPS do not, of any family."""
    windows = [window for window in arch.windows if window]
    config: dict[str, Any] = {
        "sliding_window": windows[0] if windows else None,
        "use_sliding_window": bool(windows),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in arch.windows] or None,
        "attention_bias": "attention" in arch.biases,
        "mlp_bias": "mlp" in arch.biases,
        "use_parallel_residual": arch.block == "parallel",
    }
    if family.rotary is not None:
        config[family.rotary[0]] = (arch.rotary or arch.head_dim) / arch.head_dim
    if arch.score_scale is not None:
        config["query_pre_attn_scalar"] = round(arch.score_scale**-2)
    if arch.rope != "default":
        config["rope_scaling"] = {"rope_type": arch.rope, **dict(arch.rope_keys)}
    return config


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
    head = {w.name for w in family.weights if w.path == ("head", "table")} if arch.tied else set()
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
    for name, (weights, _) in names.items():
        _check(name, stored[name], _file_shape(weights[0], sizes))
    maps = {file: np.memmap(file, np.uint8, mode="r") for file in {s.file for s in stored.values()}}
    for name in head & stored.keys():
        table = next(n for n, (w, _) in names.items() if w[0].path == ("embed", "table"))
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
    weights, layer = _names(arch)[name]
    parts = []
    for weight in weights:
        leaf = functools.reduce(dict.__getitem__, weight.path, params)
        array = _cast(leaf, dtype) if layer is None else _one_layer(leaf, np.int32(layer), dtype)
        letters = weight.file.replace(",", "").replace("3", "")
        parts.append(meshes.get(array).transpose([weight.ours.index(letter) for letter in letters]))
    # Several of ours lie along axis 3 of the file's.
    whole = parts[0] if len(parts) == 1 else np.stack(parts, weights[0].file.replace(",", "").index("3"))
    return np.ascontiguousarray(whole.reshape(_file_shape(weights[0], _sizes(arch))))


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
    """The kinds of tensors that a model has."""
    return [
        w
        for w in FAMILIES[arch.family].weights
        if not (arch.tied and w.path == ("head", "table")) and (w.has is None or w.has(arch))
    ]


def _layer_names(weight: Weight, arch: Arch) -> list[str]:
    return [weight.name.format(i) for i in range(arch.layers)] if "{}" in weight.name else [weight.name]


@functools.cache
def _names(arch: Arch) -> dict[str, tuple[tuple[Weight, ...], int | None]]:
    """Tensor name → ours that lie in it, in the order of their parts, and its layer; in the order of the file."""
    kinds: dict[str, tuple[Weight, ...]] = {}
    for weight in _weights(arch):
        kinds[weight.name] = (*kinds.get(weight.name, ()), weight)
    layered = {name: weights for name, weights in kinds.items() if "{}" in name}
    plain = {name: (weights, None) for name, weights in kinds.items() if "{}" not in name}
    first = next(iter(plain))
    return {
        first: plain.pop(first),
        **{name.format(i): (weights, i) for i in range(arch.layers) for name, weights in layered.items()},
        **plain,
    }


def _sizes(arch: Arch) -> dict[str, int]:
    return dict(V=arch.vocab, D=arch.width, N=arch.heads, K=arch.kv_heads, H=arch.head_dim, F=arch.mlp) | {"3": 3}


def _file_shape(weight: Weight, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in weight.file.split(","))


def _file_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    return {name: _file_shape(weights[0], _sizes(arch)) for name, (weights, _) in _names(arch).items()}


def _view(weight: Weight, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """The file's array, or our part of it, in our layout, without a copy."""
    letters = weight.file.replace(",", "")
    split = array.reshape([sizes[letter] for letter in letters])
    if weight.part is not None:
        split = np.moveaxis(split, letters.index("3"), 0)[weight.part]
        letters = letters.replace("3", "")
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
