"""Attention of one decoding step in a TPU kernel (Pallas): each slot reads its prompt's cache where that lies.

On XLA a slot's prompt is first copied beside its own cache, for every layer and token. Here the grid walks, slot by
slot, the blocks of its prompt and then those of what it has emitted, as many as there are, and nothing is copied. The
step reads each cached number once, so that memory binds it: a grid step takes all heads that fit.

Letters: R slots, N query heads, K key/value heads (N = K·G), H head size, P prompts, J prompt positions, T response
positions.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCKS = (512, 256, 128)  # tokens of a block, the largest that BYTES allows
BYTES = (
    2**19
)  # of a block of keys: with its values, both caches, and two of each in flight, a fraction of vector memory
HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class _Call:
    """heads: key/value heads of a grid step; prompt, own: tokens of a block of each cache."""

    heads: int
    prompt: int
    own: int
    scale: float
    cap: float | None


def attend(
    q_RNH: jax.Array,
    new: tuple[jax.Array, jax.Array],
    prompts: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    layer: jax.Array,
    prompt_R: jax.Array,
    length_R: jax.Array,
    own_R: jax.Array,
    window: jax.Array | None,
    *,
    scale: float,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """One decoding step of R slots in one layer: softmax over the prompt, the slot's own tokens, and the newest.

    Args:
        q_RNH: queries of the newest token. new: its key and value [R, K, H], which are in no cache yet.
        prompts: keys and values of all layers, [layers, P, K, J, H]. own: likewise [layers, R, K, T, H].
        layer: int32 scalar. prompt_R: each slot's prompt. length_R: tokens of that prompt; own_R: tokens of the slot's
            own cache, the newest not among them.
        window: int32 scalar, how many positions back to look, the newest token included; None = all.
        scale, cap: scores are cap·tanh(q·kᵀ·scale/cap), or q·kᵀ·scale.

    Returns:
        [R, N, H] in q's dtype.
    """
    r, n, h = q_RNH.shape
    k, j, t = new[0].shape[1], prompts[1].shape[3], own[1].shape[3]
    call = _plan(k, h, j, t, q_RNH.dtype, scale, cap)
    last_R = length_R + own_R  # position of the newest token
    low_R = jnp.zeros_like(last_R) if window is None else jnp.maximum(0, last_R - window + 1)
    numbers = jnp.stack((prompt_R, length_R, own_R, low_R, *_blocks(call, length_R, own_R, low_R))).astype(jnp.int32)
    first_p, count_p, first_o, count_o = 4, 5, 6, 7

    def of_prompt(r, head, step, layer, numbers):
        at = numbers[first_p, r] + jnp.clip(step, 0, jnp.maximum(numbers[count_p, r] - 1, 0))
        return layer[0], numbers[0, r], head, at, 0

    def of_own(r, head, step, layer, numbers):
        at = step - numbers[count_p, r]
        at = numbers[first_o, r] + jnp.clip(at, 0, jnp.maximum(numbers[count_o, r] - 1, 0))
        return layer[0], r, head, at, 0

    prompt_block = pl.BlockSpec((None, None, call.heads, call.prompt, h), of_prompt)
    own_block = pl.BlockSpec((None, None, call.heads, call.own, h), of_own)

    def of_slot(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, call.heads, rows, h), lambda r, head, step, layer, numbers: (r, head, 0, 0))

    group = n // k
    steps = jnp.maximum(1, jnp.max(numbers[count_p] + numbers[count_o]))
    grouped = (r, k, group, h)
    out = pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(r, k // call.heads, steps),
            in_specs=[of_slot(group), *[of_slot(1)] * 2, *[prompt_block] * 2, *[own_block] * 2],
            out_specs=of_slot(group),
            scratch_shapes=[
                *(pltpu.VMEM((call.heads, group, 1), jnp.float32) for _ in range(2)),
                pltpu.VMEM((call.heads, group, h), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped, q_RNH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * r * n * h * (j + t),
            transcendentals=r * n * (j + t),
            bytes_accessed=2 * r * k * h * (j + t) * q_RNH.dtype.itemsize,
        ),
        interpret=interpret,
        name="decode_attention",
    )(
        layer.reshape(1).astype(jnp.int32),
        numbers,
        q_RNH.reshape(grouped),
        *(x[:, :, None] for x in new),
        *prompts,
        *own,
    )
    return out.reshape(r, n, h)


def _plan(k: int, h: int, j: int, t: int, dtype: Any, scale: float, cap: float | None) -> _Call:
    """As many tokens a block as BYTES lets all heads have, and fewer heads where the least are too many."""
    size = max(h, LANES) * jnp.dtype(dtype).itemsize  # of a token and head
    heads = max(n for n in range(1, k + 1) if k % n == 0 and (n == 1 or n * size * BLOCKS[-1] <= BYTES))
    tokens = next((b for b in BLOCKS if heads * size * b <= BYTES), BLOCKS[-1])
    return _Call(heads, min(tokens, j), min(tokens, t), scale, cap)


def _blocks(call: _Call, length_R: jax.Array, own_R: jax.Array, low_R: jax.Array) -> list[jax.Array]:
    """First block and how many, of the prompt and of the slot's own tokens: those that hold a position from low on."""
    told = []
    for size, tokens_R, skipped_R in (
        (call.prompt, length_R, low_R),
        (call.own, own_R, jnp.maximum(0, low_R - length_R)),
    ):
        first_R = jnp.minimum(skipped_R, jnp.maximum(tokens_R - 1, 0)) // size  # of a block that exists, whatever count
        told += [first_R, jnp.where(skipped_R < tokens_R, pl.cdiv(tokens_R, size) - first_R, 0)]
    return told


def _kernel(call: _Call, layer_ref, numbers_ref, q_ref, new_k, new_v, prompt_k, prompt_v, own_k, own_v, out, *scratch):
    del layer_ref
    slot, step = pl.program_id(0), pl.program_id(2)
    _, length, own, low, first_p, count_p, first_o, count_o = (numbers_ref[i, slot] for i in range(8))
    most, total, sums = scratch

    @pl.when(step == 0)
    def _():  # the newest token sees itself
        for head in range(call.heads):
            q, k = (x[head].astype(jnp.float32) for x in (q_ref, new_k))
            most[head] = _bent(call, jnp.sum(q * k, axis=1, keepdims=True))
            total[head] = jnp.ones_like(total[head])
            sums[head] = jnp.broadcast_to(new_v[head].astype(jnp.float32), sums[head].shape)

    def take(keys, values, first, tokens) -> None:
        """first: of the block, in the cache; tokens: that the cache holds, from `first` on; low: counted alike."""
        size = keys.shape[1]
        column = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        row = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        seen = (column >= first) & (column < tokens)
        held = row < tokens  # beyond the end nothing says what was loaded
        for head in range(call.heads):
            scores = _bent(call, _product(q_ref[head], keys[head], 1))
            scores = jnp.where(seen, scores, HIDDEN)
            above = jnp.maximum(most[head], jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp(scores - above)
            fade = jnp.exp(most[head] - above)
            value = jnp.where(held, values[head].astype(jnp.float32), 0).astype(values.dtype)
            most[head] = above
            total[head] = total[head] * fade + jnp.sum(weights, axis=1, keepdims=True)
            sums[head] = sums[head] * fade + _product(weights.astype(value.dtype), value, 0)

    @pl.when(step < count_p)
    def _():
        begin = (first_p + step) * call.prompt
        take(prompt_k, prompt_v, low - begin, length - begin)

    @pl.when((step >= count_p) & (step < count_p + count_o))
    def _():
        begin = (first_o + step - count_p) * call.own
        take(own_k, own_v, low - length - begin, own - begin)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out[...] = (sums[...] / total[...]).astype(out.dtype)


def _bent(call: _Call, raw: jax.Array) -> jax.Array:
    """Scores of products."""
    return raw * call.scale if call.cap is None else call.cap * jnp.tanh(raw * (call.scale / call.cap))


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Σ over the last axis of a and this one of b, float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
