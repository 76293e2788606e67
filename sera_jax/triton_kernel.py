"""Attention of prompt trees in three GPU kernels (Pallas, by way of Triton): forward, backward for queries, backward
for keys and values.

The rule and the method are those of `tree_kernel`, cut as GPUs want them (FlashAttention-2, Dao, 2023): a program has a
block of queries and loops over the key blocks in which they see some key, or has a block of keys and loops over the
query blocks that see it, and over the query heads of its group, so that nothing is added by two programs at once. The
mask is computed from ids and positions in registers; nothing of L² elements lies in memory.

Triton's tiles are powers of two: what they have beyond the head size or the row's end is neither loaded nor stored. So
rows of any length are taken, and no copy is padded in memory.

Letters: N query heads, K key/value heads (N = K·G), H head size, L tokens, Q query blocks, T key blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sera_jax import tree_kernel

LEAST, LOG2E = tree_kernel.LEAST, tree_kernel.LOG2E
UNIT = 32  # tokens: every tile is a multiple of it
SMALLEST = 16  # of a matrix product's sides


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tokens of a program's blocks, its warps (32 threads each), and how many turns of its loop are loaded at once."""

    queries: int
    keys: int
    warps: int
    stages: int


TILES: dict[tuple[int, int], tuple[Tile, Tile, Tile]] = {
    (2, 64): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    (2, 128): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 64, 8, 3)),
    (2, 256): (Tile(64, 64, 8, 3), Tile(64, 32, 8, 3), Tile(32, 64, 8, 3)),
    (4, 64): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (4, 128): (Tile(32, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    (4, 256): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
}
"""(Bytes of a number, head size at most) → tiles of the forward, the query and the key kernel.

What a program holds in shared memory: its own tiles (q; q, d_out; k, v) once, and those of a turn (k, v; k, v; q,
d_out) twice, as the next ones are being loaded; float32 once. So 16 bits at 256 take 160, 128 and 128 KiB, of 227 on an
H100; on an A100, of 163, its own tiles move on to registers. There are 255 of these a thread: larger tiles spill.
"""


def tiles(width: int, dtype: jnp.dtype) -> tuple[Tile, Tile, Tile]:
    """Of TILES, for heads of this size.

    Raises:
        ValueError: heads of more than 256 numbers, or of another dtype.
    """
    fits = [size for number, size in TILES if number == dtype.itemsize and size >= width]
    if not fits:
        raise ValueError(
            f"attention `triton` with heads of {width} numbers of {dtype}, expected at most 256, of 32 or 16 bits. Set "
            "model.attention to xla."
        )
    return TILES[dtype.itemsize, min(fits)]


Pair = tuple[int, int]
List = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """What the kernels know of rows; int32, ids padded to whole tiles.

    Args:
        ids_B3L: of each token its own id and its prompt's, as `tree_kernel.ids` gives them, and its position.
        by_query: sizes of a query and a key block → (order_BQT, count_BQ): for each query block the key blocks in which
            some query sees some key, in their order; and how many those are (what comes after them is no block).
        by_key: the same sizes → (order_BTQ, count_BT): for each key block its query blocks.
        window_B: the same number for each row, or None.
    """

    ids_B3L: jax.Array
    by_query: dict[Pair, List]
    by_key: dict[Pair, List]
    window_B: jax.Array | None


def blocks(tree_BL: jax.Array, branch_BL: jax.Array, position_BL: jax.Array, window: jax.Array | None) -> Blocks:
    """The block pairs that attention has to compute, for every size that TILES has: XLA drops those that go unused.

    Args:
        tree_BL, branch_BL, position_BL: int [B, L]; as in `tree_kernel.blocks`, but L is any number.
        window: int scalar of at least 1, or None.
    """
    sizes = {side: {(t.queries, t.keys) for tiles in TILES.values() for t in tiles[part]}
             for side, part in (("query", slice(2)), ("key", slice(2, 3)))}  # fmt: skip
    whole = max(size for pairs in sizes.values() for pair in pairs for size in pair)
    # Tokens beyond the end see each other and are seen by no one else.
    own, prompt, position = (
        jnp.pad(jnp.asarray(x, jnp.int32), ((0, 0), (0, -x.shape[1] % whole)), constant_values=fill)
        for x, fill in zip((*tree_kernel.ids(tree_BL, branch_BL), position_BL), (-1, -1, 0))
    )
    seen = tree_kernel.seen_blocks(own, prompt, position, UNIT, window)

    def listed(pair: Pair, turned: bool) -> List:
        rows, units = seen.shape[:2]
        queries, keys = (size // UNIT for size in pair)
        of = seen.reshape(rows, units // queries, queries, units // keys, keys).any((2, 4))
        so_far = jnp.cumsum(of.swapaxes(1, 2) if turned else of, axis=2, dtype=jnp.int32)
        # The n-th seen block comes after all those up to which n at most are seen, n from 0: no sort, one fused pass.
        number = jnp.arange(so_far.shape[2])[None, None, :, None]
        order = (so_far[:, :, None] <= number).sum(3, dtype=jnp.int32)
        return order, so_far[:, :, -1]

    return Blocks(
        ids_B3L=jnp.stack((own, prompt, position), axis=1),
        by_query={pair: listed(pair, False) for pair in sizes["query"]},
        by_key={pair: listed(pair, True) for pair in sizes["key"]},
        window_B=None if window is None else jnp.full(len(own), window, jnp.int32),
    )


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
    """As `tree_kernel.attend`: [B, N, L, H] in q's dtype; differentiable in q, k and v.

    float32 inputs are multiplied as float32, on no tensor core.

    Args:
        q_BNLH, k_BKLH, v_BKLH: of one dtype; K divides N; H of at most 256.
        interpret: run without a GPU, slowly.
    """
    b, n, l, h = q_BNLH.shape
    grouped = q_BNLH.reshape(b, k_BKLH.shape[1], -1, l, h)
    return _attend(grouped, k_BKLH, v_BKLH, blocks, scale, cap, interpret).reshape(b, n, l, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, blocks: Blocks, scale: float, cap: float | None, interpret: bool) -> jax.Array:
    return _attend_forward(q, k, v, blocks, scale, cap, interpret)[0]


def _attend_forward(q, k, v, blocks: Blocks, scale: float, cap: float | None, interpret: bool) -> tuple:
    run, (tile, _, _) = _plan(q, scale, cap, blocks, interpret)
    outputs = [("queries", q), ("numbers", jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32))]
    out, lse = run(_triton_attention, tile, [("queries", q), ("keys", k), ("keys", v)], outputs, products=2)
    return out, (q, k, v, blocks, out, lse)


def _attend_backward(scale: float, cap: float | None, interpret: bool, kept: tuple, d_out: jax.Array) -> tuple:
    q, k, v, blocks, out, lse = kept
    run, (_, by_query, by_key) = _plan(q, scale, cap, blocks, interpret)
    # Σ over keys of a weight times its gradient.
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    follows = ("queries", "keys", "keys", "queries", "numbers", "numbers")
    inputs = list(zip(follows, (q, k, v, d_out, lse, mean)))
    [dq] = run(_triton_attention_dq, by_query, inputs, [("queries", q)], products=3)
    dk, dv = run(_triton_attention_dkv, by_key, inputs, [("keys", k), ("keys", v)], products=4, by_key=True)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


# --- how a call is laid out -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """Plain numbers of a call. group: query heads of a key/value head; padded: tokens of the ids; width: the head size,
    and wide the power of two that holds it."""

    rows: int
    keys: int
    group: int
    length: int
    padded: int
    width: int
    scale: float
    cap: float | None
    windowed: bool
    interpret: bool

    @property
    def wide(self) -> int:
        return max(SMALLEST, pl.next_power_of_2(self.width))


def _plan(q_BKGLH, scale: float, cap: float | None, blocks: Blocks, interpret: bool) -> tuple[Callable, Sequence[Tile]]:
    """`_run` of this call, and its tiles."""
    *shape, width = q_BKGLH.shape
    windowed = blocks.window_B is not None
    call = _Call(*shape, blocks.ids_B3L.shape[2], width, scale, cap, windowed, interpret)
    return functools.partial(_run, call, blocks), tiles(width, q_BKGLH.dtype)


def _run(
    call: _Call,
    blocks: Blocks,
    kernel: Callable,
    tile: Tile,
    inputs: Sequence[tuple[str, jax.Array]],
    outputs: Sequence[tuple[str, jax.Array | jax.ShapeDtypeStruct]],
    *,
    products: int,
    by_key: bool = False,
) -> list[jax.Array]:
    """A kernel over all blocks of queries, or of keys.

    Args:
        kernel: (call, tile, references to inputs, ids, window, order, count, outputs).
        inputs, outputs: each with what its places follow, a key of `follows`.
        products: matrix products of a head and pair. by_key: a program has a block of keys, for all heads of a group.
    """

    def whole(*shape: int, head: bool = True) -> pl.BlockSpec:
        """All of a row and key/value head, or of a row: a program picks its tiles, nothing is loaded before."""

        def index(block, which, row):
            of = which if by_key else jax.lax.div(which, call.group)
            return (row, of, *[0] * len(shape)) if head else (row, *[0] * len(shape))

        return pl.BlockSpec((None, None, *shape) if head else (None, *shape), index)

    follows = {
        "queries": whole(call.group, call.padded, call.wide),
        "keys": whole(call.padded, call.wide),
        "numbers": whole(call.group, call.padded),
    }
    order, count = (blocks.by_key if by_key else blocks.by_query)[tile.queries, tile.keys]
    window_B1 = jnp.zeros((call.rows, 1), jnp.int32) if blocks.window_B is None else blocks.window_B[:, None]
    lists = [blocks.ids_B3L, window_B1, order, count]
    most, heads = pl.cdiv(call.length, tile.keys if by_key else tile.queries), call.keys * call.group
    work = call.rows * heads * call.length**2 // 2
    return pl.pallas_call(
        functools.partial(kernel, call, tile),
        grid=(most, call.keys if by_key else heads, call.rows),
        in_specs=[*(follows[name] for name, _ in inputs), *(whole(*x.shape[1:], head=False) for x in lists)],
        out_specs=[follows[name] for name, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * work * call.width,  # of all pairs that are not later: what the data leaves is unknown
            transcendentals=work * (1 if call.cap is None else 2),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for _, x in (*inputs, *outputs)),
        ),
        interpret=call.interpret,
        name=kernel.__name__.strip("_"),
    )(*(x for _, x in inputs), *lists)


# --- what kernels read and write --------------------------------------------------------------------------------------


def _inside(call: _Call, block: jax.Array, size: int, columns: bool) -> jax.Array | None:
    """bool [size, wide] or [size]: which places of a tile are there? None = all."""
    token = block * size + jnp.arange(size) < call.length if call.length < call.padded else None
    if not columns:
        return token
    column = jnp.arange(call.wide)[None] < call.width if call.width < call.wide else None
    parts = [part for part in (None if token is None else token[:, None], column) if part is not None]
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, parts), (size, call.wide)) if parts else None


def _load(call: _Call, ref, block: jax.Array, size: int, head: tuple = (), columns: bool = True) -> jax.Array:
    """Tile number `block` of a row's tokens, 0 in the places that are not there."""
    mask = _inside(call, block, size, columns)
    rest = (slice(None),) if columns else ()
    return plgpu.load(ref.at[(*head, pl.ds(block * size, size), *rest)], mask=mask, other=None if mask is None else 0)


def _store(call: _Call, ref, block: jax.Array, x: jax.Array, head: tuple = ()) -> None:
    rest = (slice(None),) * (x.ndim - 1)
    place = ref.at[(*head, pl.ds(block * len(x), len(x)), *rest)]
    plgpu.store(place, x.astype(ref.dtype), mask=_inside(call, block, len(x), x.ndim == 2))


def _tokens(ids_ref, block: jax.Array, size: int, axis: int) -> tuple[jax.Array, ...]:
    """Own id, prompt's id, position and place in the row of a tile's tokens, which lie along the other axis."""
    of = *(ids_ref[n, pl.ds(block * size, size)] for n in range(3)), block * size + jnp.arange(size)
    return tuple(jnp.expand_dims(x, axis) for x in of)


def _mask(call: _Call, query: tuple[jax.Array, ...], key: tuple[jax.Array, ...], window_ref) -> jax.Array:
    """bool, as `_tokens` of queries and keys broadcast."""
    own, prompt, position, place = query
    window = window_ref[0] if call.windowed else None
    return tree_kernel.related(own, prompt, position, key[0], key[2], window) & (key[3] <= place)


# --- kernels ----------------------------------------------------------------------------------------------------------


def _triton_attention(
    call: _Call, tile: Tile, q_ref, k_ref, v_ref, ids_ref, window_ref, order_ref, count_ref, out_ref, lse_ref
) -> None:
    i = pl.num_programs(0) - 1 - pl.program_id(0)  # late queries see most: they begin first
    head = (jax.lax.rem(pl.program_id(1), call.group),)
    query, q = _tokens(ids_ref, i, tile.queries, 1), _load(call, q_ref, i, tile.queries, head)

    def turn(t: jax.Array, so_far: tuple) -> tuple:
        top, total, out = so_far
        j = order_ref[i, t]
        k, v = (_load(call, ref, j, tile.keys) for ref in (k_ref, v_ref))
        mask = _mask(call, query, _tokens(ids_ref, j, tile.keys, 0), window_ref)
        raised, _ = tree_kernel.scores(q, k, mask, call.scale, call.cap)
        higher = jnp.maximum(top, raised.max(1))
        weights, shrink = jnp.exp2(raised - higher[:, None]), jnp.exp2(top - higher)
        more = tree_kernel.product(weights.astype(v.dtype), v, (1, 0))
        return higher, total * shrink + weights.sum(1), out * shrink[:, None] + more

    zeros = jnp.zeros((tile.queries, call.wide), jnp.float32)
    start = jnp.full(tile.queries, LEAST, jnp.float32), jnp.zeros(tile.queries, jnp.float32), zeros
    top, total, out = jax.lax.fori_loop(0, count_ref[i], turn, start)
    _store(call, out_ref, i, out / total[:, None], head)
    _store(call, lse_ref, i, top + LOG2E * jnp.log(total), head)


def _triton_attention_dq(
    call: _Call, tile: Tile, q_ref, k_ref, v_ref, d_out_ref, lse_ref, mean_ref, ids_ref, window_ref, order_ref,
    count_ref, dq_ref,
) -> None:  # fmt: skip
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    head = (jax.lax.rem(pl.program_id(1), call.group),)
    query = _tokens(ids_ref, i, tile.queries, 1)
    mine = tuple(_load(call, ref, i, tile.queries, head) for ref in (q_ref, d_out_ref))
    lse, mean = (_load(call, ref, i, tile.queries, head, columns=False)[:, None] for ref in (lse_ref, mean_ref))

    def turn(t: jax.Array, dq: jax.Array) -> jax.Array:
        j = order_ref[i, t]
        mask = _mask(call, query, _tokens(ids_ref, j, tile.keys, 0), window_ref)
        k, v = (_load(call, ref, j, tile.keys) for ref in (k_ref, v_ref))
        _, d_scores = tree_kernel.gradients(mine, (k, v), lse, mean, mask, call.scale, call.cap)
        return dq + tree_kernel.product(d_scores.astype(k.dtype), k, (1, 0))

    dq = jax.lax.fori_loop(0, count_ref[i], turn, jnp.zeros((tile.queries, call.wide), jnp.float32))
    _store(call, dq_ref, i, dq * call.scale, head)


def _triton_attention_dkv(
    call: _Call, tile: Tile, q_ref, k_ref, v_ref, d_out_ref, lse_ref, mean_ref, ids_ref, window_ref, order_ref,
    count_ref, dk_ref, dv_ref,
) -> None:  # fmt: skip
    """Scores stand as [keys, queries]: they are the left side of both products that follow."""
    j = pl.program_id(0)
    key = _tokens(ids_ref, j, tile.keys, 1)
    mine = tuple(_load(call, ref, j, tile.keys) for ref in (k_ref, v_ref))

    def turn(t: jax.Array, so_far: tuple) -> tuple:
        dk, dv = so_far
        i, head = order_ref[j, jax.lax.div(t, call.group)], (jax.lax.rem(t, call.group),)
        mask = _mask(call, _tokens(ids_ref, i, tile.queries, 0), key, window_ref)
        q, d_out = (_load(call, ref, i, tile.queries, head) for ref in (q_ref, d_out_ref))
        lse, mean = (_load(call, ref, i, tile.queries, head, columns=False)[None] for ref in (lse_ref, mean_ref))
        weights, d_scores = tree_kernel.gradients(mine, (q, d_out), lse, mean, mask, call.scale, call.cap)
        dv += tree_kernel.product(weights.astype(d_out.dtype), d_out, (1, 0))
        return dk + tree_kernel.product(d_scores.astype(q.dtype), q, (1, 0)), dv

    zeros = jnp.zeros((tile.keys, call.wide), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, count_ref[j] * call.group, turn, (zeros, zeros))
    _store(call, dk_ref, j, dk * call.scale)
    _store(call, dv_ref, j, dv)
