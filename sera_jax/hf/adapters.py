"""LoRA adapters out, in the form of PEFT: adapter_config.json and adapter_model.safetensors."""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sera_jax import mesh as meshes
from sera_jax.hf.layout import DTYPES, names, sizes_of
from sera_jax.hf.writing import appearing, copy_source, write_tensors
from sera_jax.model import Arch


def save_adapter(
    path: str | os.PathLike[str],
    arch: Arch,
    adapters: dict,
    *,
    source: str | os.PathLike[str],
    dtype: Any,
    card: Sequence[str] = (),
) -> pathlib.Path:
    """Writes a folder that `peft.PeftModel.from_pretrained(model, folder)` takes; an earlier one is replaced.

    All processes call it; process 0 writes, as `save` does.

    Args:
        arch: with lora. adapters: as `model.init_adapters` gives them, on any layout. dtype: of the file.
        source: folder of the weights beneath, which the adapter names; also gives the tokenizer.
        card: lines of README.md, the model card; none = no card.

    Returns:
        The folder.
    """
    path, dtype = pathlib.Path(path).absolute(), np.dtype(dtype)
    code = next(name for name, known in DTYPES.items() if known == dtype)
    host = meshes.get(adapters)
    with appearing(path) as partial:
        if partial is not None:
            tensors = {name: array.astype(dtype) for name, array in _tensors(arch, host).items()}
            shapes = {name: array.shape for name, array in tensors.items()}
            write_tensors(partial / "adapter_model.safetensors", code, shapes, lambda name: tensors[name])
            copy_source(source, partial)
            if card:
                (partial / "README.md").write_text("\n".join(card) + "\n")
            (partial / "adapter_config.json").write_text(json.dumps(_config(arch, source), indent=2) + "\n")
    return path


def _modules(arch: Arch) -> dict[str, tuple[tuple, int | None]]:
    """Linear layers that have an adapter, by their name in the file: our weights in them, and the layer."""
    targets = set(arch.lora.targets)
    found = {}
    for name, (weights, layer) in names(arch).items():
        if any(_target(weight.path) in targets for weight in weights):
            # transformers 5 calls the head of every model lm_head, whatever its tensor is called (NeoX: embed_out).
            head = _target(weights[0].path) == "head"
            found["lm_head" if head else name.removesuffix(".weight")] = weights, layer
    return found


def _target(path: tuple[str, ...]) -> str:
    return "head" if path == ("head", "table") else path[-1]


def _tensors(arch: Arch, adapters: dict) -> dict[str, np.ndarray]:
    """PEFT's tensors. Where one linear layer of the file holds several of ours (GPT-NeoX), its A holds theirs one below
    the other, and its B has blocks: the rank is their number times R."""
    sizes, rank, out = sizes_of(arch), arch.lora.rank, {}
    for module, (weights, layer) in _modules(arch).items():
        axes_out, axes_in = weights[0].file.split(",")
        parts = len(weights)
        a = np.zeros((parts, rank, math.prod(sizes[x] for x in axes_in)), np.float32)
        b = np.zeros((*(sizes[x] for x in axes_out), parts, rank), np.float32)
        for part, weight in enumerate(weights):
            low = adapters.get(_target(weight.path))
            if low is None:
                continue
            low = {name: np.asarray(array, np.float32) for name, array in low.items()}
            if layer is not None:
                low = {name: array[layer] for name, array in low.items()}
            if _target(weight.path) == "head":
                a[part], b[..., part, :] = low["a"].T, low["b"]
                continue
            split = low["a"].ndim - 1
            ours_in, ours_out = weight.ours[:split], weight.ours[split:]
            order = [ours_in.index(letter) for letter in axes_in]
            a[part] = low["a"].transpose(*order, split).reshape(-1, rank).T
            order = [1 + ours_out.index(letter) for letter in axes_out.replace("3", "")]
            moved = low["b"].transpose(*order, 0)
            if weight.part is None:
                b[..., part, :] = moved
            else:
                np.moveaxis(b, axes_out.index("3"), 0)[weight.part][..., part, :] = moved
        name = f"base_model.model.{module}"
        out[f"{name}.lora_A.weight"] = a.reshape(parts * rank, -1)
        out[f"{name}.lora_B.weight"] = b.reshape(-1, parts * rank)
    return out


def _config(arch: Arch, source: Any) -> dict[str, Any]:
    """adapter_config.json."""
    lora, modules = arch.lora, _modules(arch)
    several = {module.split(".")[-1]: len(weights) for module, (weights, _) in modules.items() if len(weights) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        # α/rank stays what it was where ranks add up.
        "rank_pattern": {name: count * lora.rank for name, count in several.items()},
        "alpha_pattern": {name: count * lora.alpha for name, count in several.items()},
        "target_modules": sorted({module.split(".")[-1] for module in modules}),
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
