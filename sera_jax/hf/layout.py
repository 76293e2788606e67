"""Which of our arrays lie in which tensor of a file, and how: names, shapes, views."""

import fnmatch
import functools
import math
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from sera_jax.hf.families import FAMILIES, SCORE, Weight
from sera_jax.model import Arch

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""safetensors' names of the dtypes that weights may have."""


def weights_of(arch: Arch) -> list[Weight]:
    """The kinds of tensors that a model has."""
    kinds = [
        w
        for w in FAMILIES[arch.family].weights
        if not (arch.tied and w.path == ("head", "table")) and (w.has is None or w.has(arch))
    ]
    return [*(w for w in kinds if w.path[0] != "head"), SCORE] if arch.scored else kinds


def layer_names(weight: Weight, arch: Arch) -> list[str]:
    return [weight.name.format(i) for i in range(arch.layers)] if "{}" in weight.name else [weight.name]


@functools.cache
def names(arch: Arch) -> dict[str, tuple[tuple[Weight, ...], int | None]]:
    """Tensor name → ours that lie in it, in the order of their parts, and its layer; in the order of the file."""
    kinds: dict[str, tuple[Weight, ...]] = {}
    for weight in weights_of(arch):
        kinds[weight.name] = (*kinds.get(weight.name, ()), weight)
    layered = {name: weights for name, weights in kinds.items() if "{}" in name}
    plain = {name: (weights, None) for name, weights in kinds.items() if "{}" not in name}
    first = next(iter(plain))
    return {
        first: plain.pop(first),
        **{name.format(i): (weights, i) for i in range(arch.layers) for name, weights in layered.items()},
        **plain,
    }


def sizes_of(arch: Arch) -> dict[str, int]:
    return dict(V=arch.vocab, D=arch.width, N=arch.heads, K=arch.kv_heads, H=arch.head_dim, F=arch.mlp) | {
        "3": 3,
        "1": 1,
    }


def file_shape(weight: Weight, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in weight.file.split(","))


def file_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    return {name: file_shape(weights[0], sizes_of(arch)) for name, (weights, _) in names(arch).items()}


def view(weight: Weight, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """The file's array, or our part of it, in our layout, without a copy."""
    letters = weight.file.replace(",", "")
    split = array.reshape([sizes[letter] for letter in letters])
    if weight.part is not None:
        split = np.moveaxis(split, letters.index("3"), 0)[weight.part]
        letters = letters.replace("3", "")
    return split.transpose([letters.index(letter) for letter in weight.ours])


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
