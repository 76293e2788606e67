"""Rotary position embeddings: how fast each pair of a head's dimensions turns, plain and stretched to longer texts.

Stretchings are rows of ROPES, by the names that config.json gives them. What depends on the length of the text at hand
(dynamic NTK, LongRoPE) is not here: a token's score must not depend on its neighbours in a batch.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

Frequencies = tuple[np.ndarray, float]
"""Radians a position, float32 [size / 2]; and what cos and sin are multiplied by."""


def default(frequency: np.ndarray, theta: float) -> Frequencies:
    """Su et al. 2021 (arXiv 2104.09864): θ^(-2i/size)."""
    return frequency, 1.0


def linear(frequency: np.ndarray, theta: float, *, factor: float) -> Frequencies:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): positions divided by `factor`."""
    return frequency / np.float32(factor), 1.0


def llama3(
    frequency: np.ndarray,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Frequencies:
    """Llama 3.1: waves longer than original/low are slowed by `factor`, those shorter than original/high stay."""
    turns = np.float32(original_max_position_embeddings) * frequency / np.float32(2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1).astype(np.float32)
    return ((1 - kept) / np.float32(factor) + kept) * frequency, 1.0


def yarn(
    frequency: np.ndarray,
    theta: float,
    *,
    factor: float,
    original_max_position_embeddings: float,
    attention_factor: float | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: float = True,
) -> Frequencies:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): dimensions that turn more than beta_fast times in the original length
    stay, those that turn less than beta_slow times are slowed by `factor`; a ramp between."""
    size = 2 * len(frequency)

    def dimension(turns: float) -> float:
        return size * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(size // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - np.clip(ramp, 0, 1).astype(np.float32)
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return ((1 - kept) / np.float32(factor) + kept) * frequency, attention_factor


ROPES: Mapping[str, Callable[..., Frequencies]] = {"default": default, "linear": linear, "llama3": llama3, "yarn": yarn}
"""rope_type of config.json → (plain frequencies, θ, its own keys) → frequencies and factor."""


def turns(
    position_BL: jax.Array, size: int, theta: float, kind: str, keys: Mapping[str, float]
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position, float32 [B, L, 1, size / 2].

    Args:
        size: dimensions of a head that turn, even. kind: of ROPES; keys: its own.
    """
    plain = 1 / np.float32(theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    frequency, factor = ROPES[kind](plain, theta, **keys)
    angle = position_BL[:, :, None, None].astype(jnp.float32) * frequency.astype(np.float32)[None, None, None]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x_BLNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the first dimensions of each head, as halves (the Hugging Face layout), in float32; the rest passes."""
    turned, rest = jnp.split(x_BLNH, (2 * cos.shape[-1],), axis=-1)
    a, b = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x_BLNH.dtype)
    return jnp.concatenate((turned, rest), axis=-1) if rest.shape[-1] else turned
