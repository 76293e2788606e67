"""The table of families: how models of each architecture are written in a Hugging Face folder.

Letters of layouts are those of `model`: D width, N heads, K key/value heads, H head size, F hidden units, V
vocabulary; 3 is the axis along which NeoX keeps queries, keys and values; 1 is that of a scalar head.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sera_jax.model import Arch


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


SCORE = Weight("score.weight", ("score", "head"), "1,D", "1D")
"""What a reward model has in the place of a head, in every family."""

POLICY, REWARD_MODEL = "ForCausalLM", "ForSequenceClassification"
"""What the names of their architectures end with; the rows of FAMILIES have that of the policy."""

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
