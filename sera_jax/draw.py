"""One token of each candidate, from logits and two uniform numbers: filters, temperature, and the draw itself.

Letters: P prompts, C candidates, V vocabulary, in blocks B of W tokens; N of whatever is counted through.
"""

import jax
import jax.numpy as jnp

from sera_jax.records import Sampling


def pick(logits_PCV: jax.Array, uniform_PC2: jax.Array, sampling: Sampling) -> jax.Array:
    """One token each, drawn from softmax(filtered logits / temperature); the likeliest at temperature 0.

    Two uniform numbers a token rather than noise for all of the vocabulary: see `drawn`. Filters as in transformers:
    temperature, then top-k, then top-p on what is left, then min-p.

    Args:
        uniform_PC2: `uniforms` of the candidates and their response positions. sampling: its temperature is one for
            all or [P, C].
    """
    temperature = jnp.asarray(sampling.temperature)
    scaled = logits_PCV / jnp.maximum(temperature[..., None] if temperature.ndim else temperature, 1e-6)
    active = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    kept = jax.lax.cond(active, lambda x: filtered(x, sampling), lambda x: x, scaled)
    greedy = _first(logits_PCV == jnp.max(logits_PCV, axis=-1, keepdims=True))
    return jnp.where(temperature == 0, greedy, drawn(kept, uniform_PC2))


def uniforms(key: jax.Array, t: jax.Array) -> jax.Array:
    """float32 [2] in [0, 1): what decides response position t of the candidate whose key this is."""
    return jax.random.uniform(jax.random.fold_in(key, t), (2,))


def drawn(x_PCV: jax.Array, uniform_PC2: jax.Array) -> jax.Array:
    """int32 [P, C] from softmax(x): the first number chooses a block of the vocabulary, the second a token in it.

    Each is the inverse of a cumulative sum. A number has 23 bits, so that a block's probability is met to 2^-23 of the
    whole and a token's to 2^-23 of its block's, where one number would round most of a large vocabulary's tail away.
    """
    width = block(x_PCV.shape[-1])
    short = -x_PCV.shape[-1] % width
    x_PCV = jnp.pad(x_PCV, ((0, 0), (0, 0), (0, short)), constant_values=-jnp.inf) if short else x_PCV
    mass_PCBW = jnp.exp(x_PCV - jnp.max(x_PCV, axis=-1, keepdims=True)).reshape(*x_PCV.shape[:2], -1, width)
    b_PC = _inverse(jnp.sum(mass_PCBW, axis=-1), uniform_PC2[..., 0])
    # A sum over blocks, of which one counts, moves one block between devices where the vocabulary lies on several.
    here = jnp.arange(mass_PCBW.shape[2])[None, None, :, None] == b_PC[..., None, None]
    mass_PCW = jnp.sum(jnp.where(here, mass_PCBW, 0), axis=2)
    return b_PC * width + _inverse(mass_PCW, uniform_PC2[..., 1])


def block(vocab: int) -> int:
    """Tokens of a block of the vocabulary: a power of two up to 128, of which there is a multiple of eight where that
    can be, so that no block lies on two devices; of the vocabulary alone, so that samples are the same on any mesh."""
    return next((width for width in (128, 64, 32, 16, 8) if vocab % (8 * width) == 0), 128)


def _inverse(mass_PCN: jax.Array, uniform_PC: jax.Array) -> jax.Array:
    """int32 [P, C]: the first n at which the cumulative mass exceeds u times all of it."""
    upto_PCN = jnp.cumsum(mass_PCN, axis=-1)
    some_PCN = mass_PCN > 0  # sums that round must not reach for what cannot be drawn
    last_PC = jnp.max(jnp.where(some_PCN, jnp.arange(mass_PCN.shape[-1])[None, None], 0), axis=-1)
    found = _first(some_PCN & (upto_PCN > uniform_PC[..., None] * upto_PCN[..., -1:]))
    return jnp.minimum(found, last_PC)


def _first(mask_PCN: jax.Array) -> jax.Array:
    """int32 [P, C]: the first that is true, N where none is (XLA's arg-max is slow on CPUs)."""
    n = mask_PCN.shape[-1]
    return jnp.min(jnp.where(mask_PCN, jnp.arange(n, dtype=jnp.int32)[None, None], n), axis=-1)


def filtered(logits_PCV: jax.Array, sampling: Sampling) -> jax.Array:
    """-inf outside of the top-k, of the nucleus, and below min_p × the likeliest. No sort: see `least`."""
    mass_PCV = jnp.exp(logits_PCV - jnp.max(logits_PCV, axis=-1, keepdims=True))

    def top_k(mass: jax.Array) -> jax.Array:
        return jnp.where(mass >= least(mass, jnp.ones_like(mass), sampling.top_k.astype(mass.dtype)), mass, 0)

    def top_p(mass: jax.Array) -> jax.Array:
        wanted_PC = sampling.top_p * jnp.sum(mass, axis=-1)
        return jnp.where(mass >= least(mass, mass, wanted_PC), mass, 0)

    mass_PCV = jax.lax.cond(sampling.top_k > 0, top_k, lambda mass: mass, mass_PCV)
    mass_PCV = jax.lax.cond(sampling.top_p < 1, top_p, lambda mass: mass, mass_PCV)
    # Like transformers, min-p looks at what top-p left, renormalised: the ratio to the likeliest is the same.
    return jnp.where((mass_PCV > 0) & (mass_PCV >= sampling.min_p), logits_PCV, -jnp.inf)


def least(value_PCV: jax.Array, weight_PCV: jax.Array, wanted: jax.Array) -> jax.Array:
    """[P, C, 1]: the largest x such that the values of at least x weigh `wanted` together; values in [0, 1].

    Bit by bit of x, since the bits of floats that are not negative are ordered as they are: 30 sums in place of a sort,
    which takes 20 times as long on a CPU.
    """
    bits_PCV = jax.lax.bitcast_convert_type(value_PCV, jnp.uint32)

    def with_bit(i: jax.Array, least_PC: jax.Array) -> jax.Array:
        more_PC = least_PC | (jnp.uint32(1) << (29 - i).astype(jnp.uint32))
        weight_PC = jnp.sum(jnp.where(bits_PCV >= more_PC[..., None], weight_PCV, 0), axis=-1)
        return jnp.where(weight_PC >= wanted, more_PC, least_PC)

    least_PC = jax.lax.fori_loop(0, 30, with_bit, jnp.zeros(value_PCV.shape[:2], jnp.uint32))
    return jax.lax.bitcast_convert_type(least_PC, jnp.float32)[..., None]
