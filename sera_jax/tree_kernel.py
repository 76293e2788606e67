"""Attention of prompt trees in three TPU kernels (Pallas): forward, backward for queries, backward for keys and values.

The rule (README, "Rows") is computed from each token's ids, block by block; nothing of L² elements lies in memory, and
only pairs of blocks in which some query sees some key are loaded and multiplied: the grid walks a list of them, which
comes with the call, and ends where the list does. A step serves several query heads of one key/value head, which share
its keys, its values and its mask.

Scores stand as [keys, queries]: what belongs to a query (maximum, sum, log-sum-exp, ids) is then a vector along the
lanes, as long as the row and no wider. Softmax has base 2, so that the scale and the change of base are one factor.
The method is that of FlashAttention (Dao et al., 2022): a running maximum and sum forward, recomputed weights backward.

Letters: N query heads, K key/value heads, H head size, L tokens, S block pairs of a row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a TPU's vector registers: rows are multiples of it
BLOCKS = (512, 384, 256)  # tokens of a block; shorter rows are one block
STRIDE = 2**15  # more than the branches of any tree: tree · STRIDE + branch is one number
LEAST = -1e30  # where the running maximum starts: above HIDDEN, so that what is hidden weighs 0 exactly, even if alone
HIDDEN = -2e38
LOG2E = math.log2(math.e)
BYTES = 1024  # of a token's queries, all heads of a step together: bounds what lies in a core's vector memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """What the kernels know of rows, padded to whole blocks; int32.

    Args:
        query_B3L: of each token as a query, its own id, its prompt's id, and its position.
        key_BL2: as a key, its id and its position.
        by_query_B2S: the pairs (query block, key block) in which some query sees some key, in the order of query
            blocks; the last one repeated up to S. by_key_B2S: the same in the order of key blocks.
        count_B: how many pairs there are.
        window_B: the same number for each row, or None.
    """

    query_B3L: jax.Array
    key_BL2: jax.Array
    by_query_B2S: jax.Array
    by_key_B2S: jax.Array
    count_B: jax.Array
    window_B: jax.Array | None


def block_size(length: int) -> int:
    """Tokens of a block in rows of this length: the fewest tokens beyond the row's end, then the largest block."""
    return min((min(size, length) for size in BLOCKS), key=lambda size: (-length % size, -size))


def blocks(tree_BL: jax.Array, branch_BL: jax.Array, position_BL: jax.Array, window: jax.Array | None) -> Blocks:
    """The block pairs that attention has to compute: exactly those in which the rule lets some query see some key.

    Args:
        tree_BL, branch_BL, position_BL: int [B, L], L a multiple of 128; fewer than 2^16 trees a row and 2^15 branches
            a tree, none negative.
        window: int scalar of at least 1, or None.

    Raises:
        ValueError: L is no multiple of 128.
    """
    length = tree_BL.shape[1]
    if length % LANES:
        raise ValueError(
            f"attention in rows of {length} tokens, expected a multiple of {LANES}. Pad the rows with tokens of tree 0."
        )
    size = block_size(length)
    rows, count = tree_BL.shape[0], pl.cdiv(length, size)
    own, prompt = ids(tree_BL, branch_BL)
    # Tokens beyond the end see each other and are seen by no one else.
    own, prompt, position = (
        jnp.pad(jnp.asarray(x, jnp.int32), ((0, 0), (0, count * size - length)), constant_values=fill)
        for x, fill in ((own, -1), (prompt, -1), (position_BL, 0))
    )
    seen_BQK = seen_blocks(own, prompt, position, size, window)

    most = count * (count + 1) // 2
    number_B = seen_BQK.sum((1, 2), dtype=jnp.int32)

    def pairs(seen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both block numbers of what is seen, [B, S] each, in the order of the first one."""
        order = jnp.argsort(~seen.reshape(rows, -1), axis=1, stable=True)
        step = jnp.minimum(jnp.arange(most)[None], number_B[:, None] - 1)
        at = jnp.take_along_axis(order, step, axis=1).astype(jnp.int32)
        return at // count, at % count

    return Blocks(
        query_B3L=jnp.stack((own, prompt, position), axis=1),
        key_BL2=jnp.stack((own, position), axis=2),
        by_query_B2S=jnp.stack(pairs(seen_BQK), axis=1),
        by_key_B2S=jnp.stack(pairs(seen_BQK.swapaxes(1, 2))[::-1], axis=1),
        count_B=number_B,
        window_B=None if window is None else jnp.full(rows, window, jnp.int32),
    )


def ids(tree_BL: jax.Array, branch_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of every token the number of its branch, unlike that of any other in the row, and that of its prompt."""
    return tree_BL * STRIDE + branch_BL, tree_BL * STRIDE


def seen_blocks(
    own_BL: jax.Array, prompt_BL: jax.Array, position_BL: jax.Array, size: int, window: jax.Array | None
) -> jax.Array:
    """bool [B, Q, K]: does some query of block Q see some key of block K? Blocks are `size` tokens, which divides L."""
    rows, count = own_BL.shape[0], own_BL.shape[1] // size
    # The reduction takes the L² comparisons in as they are made: they are stored nowhere. Whether a key is later is a
    # question between blocks here: on the diagonal each token sees itself.
    queries = [x.reshape(rows, count, size, 1, 1) for x in (own_BL, prompt_BL, position_BL)]
    keys = [x.reshape(rows, 1, 1, count, size) for x in (own_BL, position_BL)]
    return related(*queries, *keys, window).any((2, 4)) & np.tri(count, dtype=bool)[None]


def related(
    own: jax.Array,
    prompt: jax.Array,
    position: jax.Array,
    key: jax.Array,
    key_position: jax.Array,
    window: jax.Array | None,
) -> jax.Array:
    """The rule but for the order in the row, on arrays of queries and keys that broadcast."""
    seen = (key == own) | (key == prompt)
    return seen if window is None else seen & (position - key_position < window)


def attend(
    q_BNLH: jax.Array,
    k_BKLH: jax.Array,
    v_BKLH: jax.Array,
    blocks: Blocks,
    *,
    scale: float,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(cap·tanh(q·kᵀ·scale/cap)) v under the rule of `blocks`; [B, N, L, H] in q's dtype; differentiable in
    q, k and v.

    Scores, softmax and sums are float32. float32 inputs are multiplied as float32, others as they are, with weights and
    their gradients in the inputs' dtype, as the XLA path has them.

    Args:
        q_BNLH, k_BKLH, v_BKLH: of one dtype; K divides N.
        cap: None = scores are q·kᵀ·scale. interpret: run without a TPU, slowly.
    """
    return _attend(q_BNLH, k_BKLH, v_BKLH, blocks, scale, cap, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, blocks: Blocks, scale: float, cap: float | None, interpret: bool) -> jax.Array:
    return _forward(q, k, v, blocks, scale, cap, interpret)[0]


def _attend_forward(q, k, v, blocks: Blocks, scale: float, cap: float | None, interpret: bool) -> tuple:
    out, lse = _forward(q, k, v, blocks, scale, cap, interpret)
    return out, (q, k, v, blocks, out, lse)


def _attend_backward(scale: float, cap: float | None, interpret: bool, kept: tuple, d_out: jax.Array) -> tuple:
    q, k, v, blocks, out, lse = kept
    call = _plan(q, k, blocks, scale, cap, interpret)
    # Σ over keys of a weight times its gradient.
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    mean = jnp.pad(mean, ((0, 0), (0, 0), (0, lse.shape[-1] - call.length))).reshape(lse.shape)
    follows = ("queries", "keys", "keys", "queries", "numbers", "numbers")
    inputs = list(zip(follows, (q, k, v, d_out, lse, mean)))
    return _backward_queries(inputs, call, blocks), *_backward_keys(inputs, call, blocks), None


_attend.defvjp(_attend_forward, _attend_backward)


# --- how a call is laid out -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """Plain numbers of a call. heads: query heads that a step serves; parts: such steps for each key/value head; most:
    block pairs of a row at most."""

    rows: int
    queries: int
    keys: int
    length: int
    width: int
    size: int
    heads: int
    scale: float
    cap: float | None
    windowed: bool
    interpret: bool

    @property
    def parts(self) -> int:
        return self.queries // self.keys // self.heads

    @property
    def count(self) -> int:
        return pl.cdiv(self.length, self.size)

    @property
    def most(self) -> int:
        return self.count * (self.count + 1) // 2

    @property
    def per_query(self) -> tuple[int, int, int, int]:
        """Shape of an array with one number for each query and head."""
        return self.rows, self.keys * self.parts, self.heads, self.count * self.size


def _plan(q_BNLH, k_BKLH, blocks: Blocks, scale: float, cap: float | None, interpret: bool) -> _Call:
    rows, queries, length, width = q_BNLH.shape
    keys = k_BKLH.shape[1]
    most = max(1, BYTES // (max(width, LANES) * q_BNLH.dtype.itemsize))
    heads = max(n for n in range(1, most + 1) if queries // keys % n == 0)
    size = block_size(length)
    return _Call(
        rows, queries, keys, length, width, size, heads, scale, cap, blocks.window_B is not None, interpret
    )  # fmt: skip


def _run(
    kernel: Callable,
    call: _Call,
    blocks: Blocks,
    *,
    inputs: Sequence[tuple[str, jax.Array]],
    outputs: Sequence[tuple[str, tuple[int, ...], jnp.dtype]],
    scratch: Sequence[tuple[int, ...]],
    products: int,
    by_key: bool = False,
) -> list[jax.Array]:
    """A kernel over the rows' block pairs.

    Args:
        kernel: (call, step, references to inputs, query ids, key ids, outputs, scratch).
        inputs, outputs: each with what its blocks follow, a key of `follows`. scratch: shapes, float32.
        products: matrix products of a head and pair. by_key: pairs in the order of key blocks, each with all query
            heads, so that what belongs to a key is finished at one go.
    """

    def at(shape: tuple, place: Callable) -> pl.BlockSpec:
        def index(row, head, step, *rest):
            *part, pairs, count, _ = rest
            i, j = (pairs[(2 * row + side) * call.most + step] for side in (0, 1))
            if by_key:  # behind the list's end the last part stays, so that nothing is loaded
                part = head * call.parts + jnp.where(step < count[row], part[0], call.parts - 1)
            else:
                part, head = head, jax.lax.div(head, call.parts)
            return row, *place(part, head, i, j)

        return pl.BlockSpec(shape, index)

    follows = {
        "queries": at((None, call.heads, call.size, call.width), lambda part, head, i, j: (part, i, 0)),
        "keys": at((None, None, call.size, call.width), lambda part, head, i, j: (head, j, 0)),
        "numbers": at((None, None, call.heads, call.size), lambda part, head, i, j: (part, 0, i)),
        "query ids": at((None, 3, call.size), lambda part, head, i, j: (0, i)),
        "key ids": at((None, call.size, 2), lambda part, head, i, j: (j, 0)),
    }
    inputs = [*inputs, ("query ids", blocks.query_B3L), ("key ids", blocks.key_BL2)]
    steps = jnp.max(blocks.count_B)  # the grid ends where the longest list does
    grid = (call.rows, call.keys, steps, call.parts) if by_key else (call.rows, call.keys * call.parts, steps)
    pairs_B2S = blocks.by_key_B2S if by_key else blocks.by_query_B2S
    work = call.rows * call.queries * call.most * call.size**2
    window_B = blocks.count_B if blocks.window_B is None else blocks.window_B
    return pl.pallas_call(
        functools.partial(_step, kernel, call, by_key),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[follows[name] for name, _ in inputs],
            out_specs=[follows[name] for name, _, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", *["arbitrary"] * (len(grid) - 2)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * work * call.width,  # of all pairs that are not later: what the data leaves is unknown
            transcendentals=work * (1 if call.cap is None else 2),
            bytes_accessed=sum(x.size * x.dtype.itemsize for _, x in inputs)
            + sum(math.prod(shape) * jnp.dtype(dtype).itemsize for _, shape, dtype in outputs),
        ),
        interpret=call.interpret,
        name=kernel.__name__.strip("_"),
    )(pairs_B2S.reshape(-1), blocks.count_B, window_B, *(x for _, x in inputs))


# --- kernels ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Step:
    """One block pair (query block i, key block j) of a row. first, last: of those that add to the same result."""

    i: jax.Array
    j: jax.Array
    first: jax.Array
    last: jax.Array
    window: jax.Array | None


def _step(kernel: Callable, call: _Call, by_key: bool, pairs_ref, count_ref, window_ref, *refs) -> None:
    """Runs the kernel where the row has a pair left."""
    row, step, count = pl.program_id(0), pl.program_id(2), count_ref[pl.program_id(0)]

    def pair(at, side: int):
        return pairs_ref[(2 * row + side) * call.most + jnp.clip(at, 0, call.most - 1)]

    result = int(by_key)  # what the result's block follows
    here = pair(step, result)
    first = (step == 0) | (pair(step - 1, result) != here)
    last = (step == count - 1) | (pair(step + 1, result) != here)
    if by_key:
        first, last = first & (pl.program_id(3) == 0), last & (pl.program_id(3) == call.parts - 1)

    @pl.when(step < count)
    def _():
        window = window_ref[row] if call.windowed else None
        kernel(call, _Step(pair(step, 0), pair(step, 1), first, last, window), *refs)


def _mask(call: _Call, step: _Step, query_ids, key_ids) -> jax.Array:
    """bool [keys, queries] of a block pair."""
    square = (call.size, call.size)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
    later = row - column + (step.j - step.i) * call.size
    own, prompt, position = (query_ids[n : n + 1] for n in range(3))
    return related(own, prompt, position, key_ids[:, :1], key_ids[:, 1:], step.window) & (later <= 0)


def _inside(call: _Call, block: jax.Array, x: jax.Array) -> jax.Array:
    """x [size, H] with 0 in the place of what lies beyond the row's end: nothing says what was loaded there."""
    if call.length % call.size == 0:
        return x
    token = block * call.size + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(token < call.length, x.astype(jnp.float32), 0).astype(x.dtype)


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Σ over these axes, float32; float32 inputs are multiplied as float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def scores(
    a: jax.Array, b: jax.Array, mask: jax.Array, scale: float, cap: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Scores of two tiles [a's tokens, b's tokens] in base 2, and the derivative of the cap (None = 1)."""
    raw = product(a, b, (1, 1))
    if cap is None:
        return jnp.where(mask, raw * (scale * LOG2E), HIDDEN), None
    bent = jnp.tanh(raw * (scale / cap))
    return jnp.where(mask, bent * (cap * LOG2E), HIDDEN), 1 - bent * bent


def gradients(
    rows: tuple[jax.Array, jax.Array],
    columns: tuple[jax.Array, jax.Array],
    lse: jax.Array,
    mean: jax.Array,
    mask: jax.Array,
    scale: float,
    cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """(weights, gradient of q·kᵀ without the scale), both [rows' tokens, columns' tokens], float32.

    Args:
        rows, columns: tiles (q, d_out) and (k, v), or the other way round. lse, mean: of each query, so that they
            broadcast.
    """
    raised, slope = scores(rows[0], columns[0], mask, scale, cap)
    weights = jnp.exp2(raised - lse)
    d_scores = weights * (product(rows[1], columns[1], (1, 1)) - mean)
    return weights, d_scores if slope is None else d_scores * slope


def _forward(q, k, v, blocks: Blocks, scale: float, cap: float | None, interpret: bool) -> list[jax.Array]:
    """[out [B, N, L, H] in q's dtype, log2-sum-exp2 of scores, `per_query`]."""
    call = _plan(q, k, blocks, scale, cap, interpret)
    return _run(
        _tree_attention,
        call,
        blocks,
        inputs=[("queries", q), ("keys", k), ("keys", v)],
        outputs=[("queries", q.shape, q.dtype), ("numbers", call.per_query, jnp.float32)],
        scratch=[(call.heads, call.width, call.size), *[(call.heads, call.size)] * 2],
        products=2,
    )


def _tree_attention(
    call: _Call, step: _Step, q_ref, k_ref, v_ref, query_ref, key_ref, out_ref, lse_ref, sum_ref, most_ref, weight_ref
) -> None:
    @pl.when(step.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        most_ref[...] = jnp.full_like(most_ref, LEAST)
        weight_ref[...] = jnp.zeros_like(weight_ref)

    mask = _mask(call, step, query_ref[...], key_ref[...])
    k, v = (_inside(call, step.j, ref[...]) for ref in (k_ref, v_ref))
    for n in range(call.heads):
        one = slice(n, n + 1)
        raised, _ = scores(k, _inside(call, step.i, q_ref[n]), mask, call.scale, call.cap)
        before = most_ref[one]
        most = jnp.maximum(before, raised.max(0, keepdims=True))
        weights, shrink = jnp.exp2(raised - most), jnp.exp2(before - most)
        most_ref[one] = most
        weight_ref[one] = shrink * weight_ref[one] + weights.sum(0, keepdims=True)
        sum_ref[n] = shrink * sum_ref[n] + product(v, weights.astype(v.dtype), (0, 0))

    @pl.when(step.last)
    def _():
        for n in range(call.heads):
            one = slice(n, n + 1)
            out_ref[n] = (sum_ref[n] / weight_ref[one]).T.astype(out_ref.dtype)
            lse_ref[one] = most_ref[one] + LOG2E * jnp.log(weight_ref[one])


def _backward_queries(inputs: Sequence[tuple[str, jax.Array]], call: _Call, blocks: Blocks) -> jax.Array:
    """The gradient of q. inputs: q, k, v, d_out, log-sum-exp, Σ of weights' gradients, as `_run` takes them."""
    q = inputs[0][1]
    return _run(
        _tree_attention_dq,
        call,
        blocks,
        inputs=inputs,
        outputs=[("queries", q.shape, q.dtype)],
        scratch=[(call.heads, call.width, call.size)],
        products=3,
    )[0]


def _tree_attention_dq(
    call: _Call, step: _Step, q_ref, k_ref, v_ref, d_out_ref, lse_ref, mean_ref, query_ref, key_ref, dq_ref, sum_ref
) -> None:
    @pl.when(step.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    mask = _mask(call, step, query_ref[...], key_ref[...])
    k, v = (_inside(call, step.j, ref[...]) for ref in (k_ref, v_ref))
    for n in range(call.heads):
        q, d_out = (_inside(call, step.i, ref[n]) for ref in (q_ref, d_out_ref))
        one = slice(n, n + 1)
        _, d_scores = gradients((k, v), (q, d_out), lse_ref[one], mean_ref[one], mask, call.scale, call.cap)
        sum_ref[n] += product(k, d_scores.astype(k.dtype), (0, 0))

    @pl.when(step.last)
    def _():
        for n in range(call.heads):
            dq_ref[n] = (sum_ref[n] * call.scale).T.astype(dq_ref.dtype)


def _backward_keys(inputs: Sequence[tuple[str, jax.Array]], call: _Call, blocks: Blocks) -> list[jax.Array]:
    """The gradients of k and v, each summed over the query heads that read it; inputs as of `_backward_queries`."""
    k, v = inputs[1][1], inputs[2][1]
    return _run(
        _tree_attention_dkv,
        call,
        blocks,
        inputs=inputs,
        outputs=[("keys", k.shape, k.dtype), ("keys", v.shape, v.dtype)],
        scratch=[(call.size, call.width)] * 2,
        products=4,
        by_key=True,
    )


def _tree_attention_dkv(
    call: _Call, step: _Step, q_ref, k_ref, v_ref, d_out_ref, lse_ref, mean_ref, query_ref, key_ref, dk_ref, dv_ref,
    k_sum_ref, v_sum_ref,
) -> None:  # fmt: skip
    @pl.when(step.first)
    def _():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    mask = _mask(call, step, query_ref[...], key_ref[...])
    k, v = (_inside(call, step.j, ref[...]) for ref in (k_ref, v_ref))
    for n in range(call.heads):
        q, d_out = (_inside(call, step.i, ref[n]) for ref in (q_ref, d_out_ref))
        one = slice(n, n + 1)
        weights, d_scores = gradients((k, v), (q, d_out), lse_ref[one], mean_ref[one], mask, call.scale, call.cap)
        v_sum_ref[...] += product(weights.astype(d_out.dtype), d_out, (1, 0))
        k_sum_ref[...] += product(d_scores.astype(q.dtype), q, (1, 0))

    @pl.when(step.last)
    def _():
        dk_ref[...] = (k_sum_ref[...] * call.scale).astype(dk_ref.dtype)
        dv_ref[...] = v_sum_ref[...].astype(dv_ref.dtype)
