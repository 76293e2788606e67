"""Attention of prompt trees without a kernel: a loop over the pairs of blocks in which some query sees some key.

For processors on which no kernel of ours runs. Dense attention multiplies every token of a row with every other and
passes over the L² scores a dozen times; here a pair of blocks stays in the processor's cache, and what lies in other
trees costs nothing. The method is that of `tree_kernel`, and so are the numbers, to float32 rounding.

Letters: N query heads, K key/value heads (N = K·G), H head size, L tokens, S tokens of a block, Q blocks of a row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sera_jax import tree_kernel

SIZE = 64  # tokens of a block
HIDDEN, LEAST = tree_kernel.HIDDEN, tree_kernel.LEAST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """What the loop knows of rows; int32.

    own_BL, prompt_BL: as `tree_kernel.ids` gives them; position_BL. order_BQQ: for each query block the key blocks, the
    seen ones first, in their order; count_BQ: how many those are. window_B: the same number for each row, or None.
    """

    own_BL: jax.Array
    prompt_BL: jax.Array
    position_BL: jax.Array
    order_BQQ: jax.Array
    count_BQ: jax.Array
    window_B: jax.Array | None


def blocks(tree_BL: jax.Array, branch_BL: jax.Array, position_BL: jax.Array, window: jax.Array | None) -> Blocks:
    """The block pairs that attention has to compute.

    Args:
        tree_BL, branch_BL, position_BL: int [B, L], L a multiple of SIZE. window: int scalar, or None.
    """
    own, prompt = tree_kernel.ids(tree_BL, branch_BL)
    own, prompt, position = (jnp.asarray(x, jnp.int32) for x in (own, prompt, position_BL))
    seen = tree_kernel.seen_blocks(own, prompt, position, SIZE, window)
    order = jnp.argsort(~seen, axis=2, stable=True).astype(jnp.int32)
    window_B = None if window is None else jnp.full(len(own), window, jnp.int32)
    return Blocks(own, prompt, position, order, seen.sum(2, dtype=jnp.int32), window_B)


def attend(
    q_BNLH: jax.Array,
    k_BKLH: jax.Array,
    v_BKLH: jax.Array,
    blocks: Blocks,
    *,
    scale: float,
    cap: float | None = None,
) -> jax.Array:
    """As `tree_kernel.attend`: [B, N, L, H] in q's dtype; differentiable in q, k and v."""
    b, n, l, h = q_BNLH.shape
    grouped = q_BNLH.reshape(b, k_BKLH.shape[1], -1, l, h)
    return _attend(grouped, k_BKLH, v_BKLH, blocks, scale, cap).reshape(b, n, l, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, blocks: Blocks, scale: float, cap: float | None) -> jax.Array:
    return _forward(q, k, v, blocks, scale, cap)[0]


def _forward(q_BKGLH, k_BKLH, v_BKLH, blocks: Blocks, scale: float, cap: float | None) -> tuple:
    """What attention gives, and as residuals also the log-sum-exp of every query."""

    def row(arrays: tuple) -> tuple[jax.Array, jax.Array]:
        q, k, v, of = arrays

        def query_block(_: None, i: jax.Array) -> tuple[None, tuple]:
            query = _part(q, i)

            def key_block(t: jax.Array, so_far: tuple) -> tuple:
                top, total, out = so_far
                j = of.order_BQQ[i, t]
                scores, _ = _scores(query, _part(k, j), of, i, j, scale, cap)
                higher = jnp.maximum(top, scores.max(-1))
                weights, shrunk = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
                value = _part(v, j)
                more = _product("kgqt,kth->kgqh", weights.astype(value.dtype), value)
                return higher, total * shrunk + weights.sum(-1), out * shrunk[..., None] + more

            zeros = jnp.zeros(query.shape, jnp.float32)
            start = jnp.full(query.shape[:-1], LEAST, jnp.float32), zeros[..., 0], zeros
            top, total, out = jax.lax.fori_loop(0, of.count_BQ[i], key_block, start)
            return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

        _, (out, lse) = jax.lax.scan(query_block, None, jnp.arange(len(of.count_BQ)))
        return _whole(out), _whole(lse)

    out, lse = jax.lax.map(row, (q_BKGLH, k_BKLH, v_BKLH, blocks))
    return out, (q_BKGLH, k_BKLH, v_BKLH, blocks, out, lse)


def _backward(scale: float, cap: float | None, kept: tuple, d_out_BKGLH: jax.Array) -> tuple:
    """Gradients of q, k and v; weights are computed again, block by block."""

    def row(arrays: tuple) -> tuple:
        q, k, v, of, out, lse, d_out = arrays
        # Σ over keys of a weight times its gradient.
        mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

        def query_block(sums: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
            query, d_query_out, lse_i, mean_i = (_part(x, i, axis=2) for x in (q, d_out, lse, mean))

            def key_block(t: jax.Array, so_far: tuple) -> tuple:
                d_query, d_k, d_v = so_far
                j = of.order_BQQ[i, t]
                key, value = _part(k, j), _part(v, j)
                scores, slope = _scores(query, key, of, i, j, scale, cap)
                weights = jnp.exp(scores - lse_i[..., None])
                d_weights = _product("kgqh,kth->kgqt", d_query_out, value)
                d_scores = (weights * (d_weights - mean_i[..., None]) * slope).astype(q.dtype)
                d_query += _product("kgqt,kth->kgqh", d_scores, key)
                d_k = _added(d_k, _product("kgqt,kgqh->kth", d_scores, query), j)
                return d_query, d_k, _added(d_v, _product("kgqt,kgqh->kth", weights.astype(v.dtype), d_query_out), j)

            start = jnp.zeros(query.shape, jnp.float32), *sums
            d_query, *sums = jax.lax.fori_loop(0, of.count_BQ[i], key_block, start)
            return tuple(sums), d_query.astype(q.dtype)

        zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        (d_k, d_v), d_q = jax.lax.scan(query_block, zeros, jnp.arange(len(of.count_BQ)))
        return _whole(d_q), d_k.astype(k.dtype), d_v.astype(v.dtype)

    return *jax.lax.map(row, (*kept, d_out_BKGLH)), None


_attend.defvjp(_forward, _backward)


def _scores(
    query_KGSH: jax.Array, key_KSH: jax.Array, of: Blocks, i: jax.Array, j: jax.Array, scale: float, cap: float | None
) -> tuple[jax.Array, jax.Array | float]:
    """Scores [K, G, S, S] of query block i and key block j under the rule, and their slope in q·k."""
    own, prompt, position = (_part(x, i, axis=0)[:, None] for x in (of.own_BL, of.prompt_BL, of.position_BL))
    key, key_position = (_part(x, j, axis=0)[None] for x in (of.own_BL, of.position_BL))
    index = jnp.arange(SIZE)
    not_later = (i * SIZE + index)[:, None] >= (j * SIZE + index)[None]
    seen = tree_kernel.related(own, prompt, position, key, key_position, of.window_B) & not_later
    scores, slope = _product("kgqh,kth->kgqt", query_KGSH, key_KSH) * scale, scale
    if cap is not None:
        bent = jnp.tanh(scores / cap)
        scores, slope = cap * bent, scale * (1 - bent**2)
    return jnp.where(seen[None, None], scores, HIDDEN), slope


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _part(array: jax.Array, block: jax.Array, axis: int = -2) -> jax.Array:
    """Block number `block` along the axis of tokens."""
    return jax.lax.dynamic_slice_in_dim(array, block * SIZE, SIZE, axis % array.ndim)


def _added(array_KLH: jax.Array, part_KSH: jax.Array, block: jax.Array) -> jax.Array:
    """The array with something added to one of its blocks."""
    before = _part(array_KLH, block)
    return jax.lax.dynamic_update_slice_in_dim(array_KLH, before + part_KSH, block * SIZE, 1)


def _whole(blocks: jax.Array) -> jax.Array:
    """[Q, K, G, S, ...] → [K, G, L, ...]."""
    joined = jnp.moveaxis(blocks, 0, 2)
    return joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])
