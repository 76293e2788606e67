"""Hugging Face folders in and out: config.json ↔ `Arch`, tensor names ↔ our paths and layouts, safetensors by slices.

A family of models is a row of FAMILIES (`families`). `config_json` makes an `Arch` of a config.json and back, `layout`
says which of our arrays lie in which tensor, `reading` and `writing` move them. Weights are read through memory maps,
straight into stacked layers on their shardings: a process touches the bytes of its own slices only. They are written
tensor by tensor, so that no process ever holds more than one whole; `adapters` writes those of LoRA as PEFT has them.
Both sides of the safetensors format (8 bytes of header length, a JSON header, raw little-endian tensors:
https://github.com/huggingface/safetensors) are here, some lines each, because its NumPy interface reads bfloat16 in
newer versions only and writes a file from memory at once. Pickled checkpoints are never opened.
"""

from sera_jax.hf.adapters import save_adapter
from sera_jax.hf.config_json import read_any_arch, read_arch, read_config, read_reward_arch, write_config
from sera_jax.hf.families import FAMILIES
from sera_jax.hf.layout import DTYPES
from sera_jax.hf.reading import load
from sera_jax.hf.writing import save

__all__ = [
    "DTYPES",
    "FAMILIES",
    "load",
    "read_any_arch",
    "read_arch",
    "read_config",
    "read_reward_arch",
    "save",
    "save_adapter",
    "write_config",
]
