"""The attention rule of prompt trees (README, "Rows"): dense on XLA, or block by block, in loops or in kernels for
TPUs and GPUs.

A query sees a key that is not later in the row, is in the same tree, and is in the prompt or in its own branch. A
sliding window counts positions, not indices: the second branch of a tree stands far from its prompt in the row, but not
in the text.

Letters: N query heads, K key/value heads (N = K·G), H head size, Q queries, T keys.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as splash_mask
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sera_jax import decode_kernel, tree_kernel, tree_loops, triton_kernel
from sera_jax import mesh as meshes

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
"""(q_BLNH, k_BLKH, v_BLKH, a layer's window or None) → [B, L, N, H] in q's dtype."""


def tree_mask(tree_BL: jax.Array, branch_BL: jax.Array) -> jax.Array:
    """bool [B, L, L]: may query i (second axis) see key j (third axis)? Padding sees padding, so no row is empty."""
    same_tree = tree_BL[:, :, None] == tree_BL[:, None, :]
    visible = (branch_BL[:, None, :] == 0) | (branch_BL[:, :, None] == branch_BL[:, None, :])
    index = jnp.arange(tree_BL.shape[1])
    return same_tree & visible & (index[:, None] >= index[None, :])[None]


def within(mask_BQT: jax.Array, query_BQ: jax.Array, key_BT: jax.Array, window: jax.Array | None) -> jax.Array:
    """The mask, cut to keys that stand less than `window` positions before the query; None = not cut."""
    if window is None:
        return mask_BQT
    return mask_BQT & (query_BQ[:, :, None] - key_BT[:, None, :] < window)


def attend(
    q_BQNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask_BQT: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """softmax(q·kᵀ·scale) v with grouped heads; scores and softmax in float32; returns [B, Q, N, H] in q's dtype.

    Args:
        scale: None = 1/√H. cap: scores become cap·tanh(score/cap), None = not.
    """
    b, q, n, h = q_BQNH.shape
    grouped = q_BQNH.reshape(b, q, k_BTKH.shape[2], -1, h)
    scores = _scores("bqkgh,btkh->bkgqt", grouped, k_BTKH, mask_BQT[:, None, None], scale, cap)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("bkgqt,btkh->bqkgh", weights, v_BTKH).reshape(b, q, n, h)


# --- rows that attend to themselves: training, scoring, prefill -------------------------------------------------------


def over_rows(
    name: str,
    tree_BL: jax.Array,
    branch_BL: jax.Array,
    position_BL: jax.Array,
    *,
    mesh: Mesh,
    layout: str = "gather",
    scale: float | None = None,
    cap: float | None = None,
) -> Attend:
    """Attention of packed rows to themselves; what all layers share of the masks is made here, once.

    Args:
        name: a key of ATTENTION or "auto" (see `backend`). layout: of mesh.LAYOUTS, where rows and heads lie.
        scale, cap: as in `attend`.

    Raises:
        ValueError: see `backend`.
    """
    run = ATTENTION[backend(name, mesh, tree_BL.shape[1])]
    return run(tree_BL, branch_BL, position_BL, mesh=mesh, layout=layout, scale=scale, cap=cap)


def backend(name: str, mesh: Mesh, length: int) -> str:
    """A key of ATTENTION: `name` itself; for "auto" the best of the platform (AUTO) where the rows' length allows it,
    else xla.

    What counts is the platform of the mesh's devices: a program that is compiled for a TPU on another machine is the
    one that the TPU runs. Elsewhere than on their platform kernels are interpreted: right, and slow.

    Raises:
        ValueError: a kernel, and rows of another length.
    """
    if name == "auto":
        best, least = AUTO[platform(mesh)]
        return best if length % MULTIPLE[best] == 0 and length >= least else "xla"
    if length % MULTIPLE[name]:
        raise ValueError(
            f"model.attention is {name}, which takes rows of a multiple of {MULTIPLE[name]} tokens, but these have "
            f"{length}. Set optimizer.row_tokens to a multiple of {LANES} (0 plans one), or model.attention to auto or "
            "xla."
        )
    return name


def per_key(mesh: Mesh, width: int) -> float:
    """As `rows.plan` takes it, for a model of this width and the best form on the mesh's platform."""
    return 1 / (2 * width) if AUTO[platform(mesh)][0] == "xla" else 0.0


def device_tokens(mesh: Mesh) -> int:
    """As `rows.plan` takes it: tokens that a device computes at once. On a CPU few rows stay in its caches: 1,500 at a
    time take 15 % less than 6,000 (RESULTS, "Scoring")."""
    return 2048 if platform(mesh) == "cpu" else 8192


def platform(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu": of the mesh's devices, which need not be this machine's."""
    return mesh.devices.flat[0].platform


def _xla(
    tree_BL: jax.Array,
    branch_BL: jax.Array,
    position_BL: jax.Array,
    *,
    mesh: Mesh,
    layout: str,
    scale: float | None,
    cap: float | None,
) -> Attend:
    """All scores of a layer at once: L² of them for each row and head."""
    mask_BLL = tree_mask(tree_BL, branch_BL)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array | None) -> jax.Array:
        return attend(q, k, v, within(mask_BLL, position_BL, position_BL, window), scale=scale, cap=cap)

    return run


LANES = 128  # of a TPU's vector registers: blocks are multiples of it
BLOCKS = (512, 384, 256, 128)  # tokens of a block, the first that divides the row


def _splash(
    tree_BL: jax.Array,
    branch_BL: jax.Array,
    position_BL: jax.Array,
    *,
    mesh: Mesh,
    layout: str,
    scale: float | None,
    cap: float | None,
) -> Attend:
    """JAX's splash attention with the rows' own masks; no array of L² scores, forward or backward.

    The mask is an array (L² bytes a row and pass, shared by heads), since no static mask knows where trees and branches
    begin. Blocks in which no query sees a key are not computed, though the grid still steps over them.
    """
    mask_BLL = tree_mask(tree_BL, branch_BL)
    block = next(b for b in BLOCKS if tree_BL.shape[1] % b == 0)
    blocks = _mask_blocks(mask_BLL, block)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array | None) -> jax.Array:
        seen = blocks
        if window is not None:
            seen = _mask_blocks(within(mask_BLL, position_BL, position_BL, window), block)
        scaled = (q.astype(jnp.float32) * _scale(scale, q)).astype(q.dtype)
        rows = functools.partial(_splash_rows, block=block, cap=cap, interpret=platform(mesh) != "tpu")
        return _apart(rows, scaled, k, v, seen, mesh=mesh, layout=layout)

    return run


def _mask_blocks(mask_BLL: jax.Array, block: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The masks as the kernels read them, for (forward and dQ, dK and dV): of each block its index, whether it is
    empty, mixed or full, and its bits; leading axis B."""

    def of(process: Callable) -> tuple[jax.Array, ...]:
        return jax.vmap(lambda mask_LL: process(mask_LL[None], (block, block))[0][:4])(mask_BLL)

    return of(splash_mask.process_dynamic_mask), of(splash_mask.process_dynamic_mask_dkv)


def _splash_rows(
    q_bnLH: jax.Array,
    k_bkLH: jax.Array,
    v_bkLH: jax.Array,
    seen: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]],
    *,
    block: int,
    cap: float | None,
    interpret: bool,
) -> jax.Array:
    """A device's own rows and heads, queries scaled."""
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_kernel.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))

    def one(q: jax.Array, k: jax.Array, v: jax.Array, seen: tuple) -> jax.Array:
        # The flag says how the mask's bits are laid out: it has to be a Python bool, never traced.
        forward, backward = (splash_mask.MaskInfo(*arrays, q_sequence=None, is_dynamic_mask=True) for arrays in seen)
        kernel = splash_kernel.SplashAttentionKernel(
            forward,
            forward,
            backward,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash_kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=cap,
            residual_checkpoint_name=None,
            mask_function=None,
            interpret=interpret,
        )
        return kernel(q, k, v)

    return jax.vmap(one)(q_bnLH, k_bkLH, v_bkLH, seen)


def _ours(
    tree_BL: jax.Array,
    branch_BL: jax.Array,
    position_BL: jax.Array,
    *,
    form: Any,
    mesh: Mesh,
    layout: str,
    scale: float | None,
    cap: float | None,
    **options: Any,
) -> Attend:
    """Block by block: no array of L² elements at all, and nothing done for blocks in which no query sees a key.

    Args:
        form: the room that computes it, `tree_kernel`, `triton_kernel` or `tree_loops`. options: further ones of its
            `attend`.
    """
    ids = tree_BL, branch_BL, position_BL
    blocks = form.blocks(*ids, None)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array | None) -> jax.Array:
        seen = blocks if window is None else form.blocks(*ids, window)
        kernel = functools.partial(form.attend, scale=_scale(scale, q), cap=cap, **options)
        return _apart(kernel, q, k, v, seen, mesh=mesh, layout=layout)

    return run


def _tree(*ids: jax.Array, mesh: Mesh, **keys: Any) -> Attend:
    """In our own kernels for TPUs."""
    return _ours(*ids, form=tree_kernel, mesh=mesh, interpret=platform(mesh) != "tpu", **keys)


def _triton(*ids: jax.Array, mesh: Mesh, **keys: Any) -> Attend:
    """In our own kernels for GPUs."""
    return _ours(*ids, form=triton_kernel, mesh=mesh, interpret=platform(mesh) != "gpu", **keys)


def _loops(*ids: jax.Array, **keys: Any) -> Attend:
    """On XLA, without a kernel."""
    return _ours(*ids, form=tree_loops, **keys)


def _scale(scale: float | None, q_BLNH: jax.Array) -> float:
    return q_BLNH.shape[-1] ** -0.5 if scale is None else scale


def _apart(
    kernel: Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array],
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    seen: Any,
    *,
    mesh: Mesh,
    layout: str,
) -> jax.Array:
    """A kernel on each device's own rows and heads, [B, L, N, H].

    Args:
        kernel: (q_bnLH, k_bkLH, v_bkLH, seen) → [b, n, L, H].
        seen: arrays that tell it which keys are seen; rows lead.
    """
    row_axes, head_axes = (
        meshes.axes_that_divide(mesh, meshes.LAYOUTS[layout][dim], q_BLNH.shape[axis])
        for dim, axis in (("rows", 0), ("heads", 2))
    )
    # K/V heads lie as their queries do; where they are too few, each device picks those that its queries read.
    split = k_BLKH.shape[2] % math.prod(mesh.shape[a] for a in head_axes) == 0
    group = q_BLNH.shape[2] // k_BLKH.shape[2]

    def own(q: jax.Array, k: jax.Array, v: jax.Array, seen: Any) -> jax.Array:
        if not split:
            heads = q.shape[2]
            same = math.gcd(heads, group)  # so many queries in a row read one key/value head
            reads = (jax.lax.axis_index(head_axes) * heads + jnp.arange(0, heads, same)) // group
            k, v = (jnp.take(x, reads, axis=2) for x in (k, v))
        return kernel(*(x.swapaxes(1, 2) for x in (q, k, v)), seen).swapaxes(1, 2)

    queries, keys = P(row_axes, None, head_axes), P(row_axes, None, head_axes if split else ())
    inputs = (queries, keys, keys, P(row_axes))
    return jax.shard_map(own, mesh=mesh, in_specs=inputs, out_specs=queries, check_vma=False)(
        q_BLNH, k_BLKH, v_BLKH, seen
    )


ATTENTION: dict[str, Callable[..., Attend]] = {
    "xla": _xla, "loops": _loops, "splash": _splash, "tree": _tree, "triton": _triton
}  # fmt: skip
"""Name → (tree_BL, branch_BL, position_BL, where it runs, scale, cap) → the attention of a layer."""

MULTIPLE = {"xla": 1, "loops": tree_loops.SIZE, "splash": LANES, "tree": LANES, "triton": 1}
"""What a row's length has to be a multiple of."""

AUTO = {"cpu": ("loops", 128), "gpu": ("xla", 0), "tpu": ("tree", LANES)}
"""The best form on a platform, and the shortest rows in which it is. GPUs have `xla` although there is `triton`: it
compiles for them, and interpreted it computes the right numbers, but it has run on none, so that nobody knows which is
faster (`tests/benchmarks/attention.py` tells)."""


# --- one step of decoding ---------------------------------------------------------------------------------------------


def attend_decode(
    q_PCNH: jax.Array,
    new_PCKH: tuple[jax.Array, jax.Array] | None,
    prompt: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    prompt_mask_PCT: jax.Array,
    own_mask_PCT: jax.Array,
    *,
    turned: tuple[bool, bool] = (False, False),
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """One decoding step of C candidates of each prompt: blocks of scores under one softmax, each where it lies.

    Args:
        q_PCNH: queries of the newest token.
        new_PCKH: its own key and value, which are in no cache yet; None = they are in `own`.
        prompt: key and value cache of the prompt, [P, K, T, H] each, one for all its candidates; or one for each of
            them, as in `own`.
        own: key and value cache of what each candidate has emitted so far, [P, C, K, T, H].
        prompt_mask_PCT, own_mask_PCT: bool, which cached positions count.
        turned: whether keys, and whether values, are [..., H, T] in the caches.
        scale, cap: as in `attend`.

    Returns:
        [P, C, N, H] in q's dtype.
    """
    p, c, n, h = q_PCNH.shape
    grouped = q_PCNH.reshape(p, c, own[0].shape[2], -1, h)
    keys, values = ("ht" if its else "th" for its in turned)
    # All candidates of one prompt are rows of one product with its cache: scores "pkcg" in the place of "pckg".
    of_prompt = ("pkcg", "pk") if prompt[0].ndim == 4 else ("pckg", "pck")
    blocks = [(*of_prompt, prompt, prompt_mask_PCT), ("pckg", "pck", own, own_mask_PCT)]
    if new_PCKH is not None:
        one = tuple(jnp.expand_dims(a, -1 if its else -2) for a, its in zip(new_PCKH, turned))
        blocks.append(("pckg", "pck", one, jnp.ones((1, 1, 1), bool)))

    def other(a: jax.Array, rows: str) -> jax.Array:  # from the one order to the other
        return a.swapaxes(1, 2) if rows == "pkcg" else a

    def scored(rows: str, of: str, cache: tuple[jax.Array, jax.Array], mask_PCT: jax.Array) -> jax.Array:
        mask = other(mask_PCT[:, :, None, None], rows)
        return _scores(f"{rows}h,{of}{keys}->{rows}t", other(grouped, rows), cache[0], mask, scale, cap)

    scores = [scored(*block) for block in blocks]
    most = functools.reduce(jnp.maximum, (other(jnp.max(s, axis=-1), rows) for s, (rows, *_) in zip(scores, blocks)))
    weights = [jnp.exp(s - other(most, rows)[..., None]) for s, (rows, *_) in zip(scores, blocks)]
    whole = sum(other(jnp.sum(w, axis=-1), rows) for w, (rows, *_) in zip(weights, blocks))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    out = sum(
        other(product(f"{rows}t,{of}{values}->{rows}h", w.astype(cache[1].dtype), cache[1]), rows)
        for w, (rows, of, cache, _) in zip(weights, blocks)
    )
    return (out / whole[..., None]).astype(q_PCNH.dtype).reshape(p, c, n, h)


def reads_in_place(name: str, mesh: Mesh) -> bool:
    """Whether slots read their prompts' caches by our kernel (`attend_slots`): where `tree`, and on TPUs `auto`, is
    asked for."""
    return name == "tree" or (name == "auto" and AUTO[platform(mesh)][0] == "tree")


def attend_slots(
    q_GSNH: jax.Array,
    new_GSKH: tuple[jax.Array, jax.Array],
    prompts: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    layer: jax.Array,
    prompt_GS: jax.Array,
    length_GS: jax.Array,
    own_GS: jax.Array,
    window: jax.Array | None,
    *,
    mesh: Mesh,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """One decoding step of G groups of S slots, each with a prompt of its group: decode_kernel, group by group.

    Args:
        new_GSKH: key and value of the newest token. prompts: caches of all layers and of each group's prompts,
            [layers, G, P, K, J, H]; own: likewise [layers, G, S, K, T, H].
        layer: int32 scalar. prompt_GS: number of the prompt in its group; length_GS: its tokens. own_GS: tokens of the
            slot's own cache. window: as in `within`. scale, cap: as in `attend`.

    Returns:
        [G, S, N, H] in q's dtype.
    """
    groups, heads = q_GSNH.shape[0], new_GSKH[0].shape[2]
    axes = lambda dim, size: meshes.axes_that_divide(mesh, meshes.LAYOUTS["decode"][dim], size) or None
    rows, split = axes("rows", groups), axes("heads", heads)

    def here(q, new, prompts, own, layer, prompt, length, emitted, window):
        flat = lambda a, axis=0: a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])
        # Groups that are not split over devices lie side by side: their prompts are numbered through.
        prompt = prompt + jnp.arange(prompt.shape[0])[:, None] * prompts[0].shape[2]
        out = decode_kernel.attend(
            flat(q),
            jax.tree.map(flat, new),
            jax.tree.map(lambda a: flat(a, 1), prompts),
            jax.tree.map(lambda a: flat(a, 1), own),
            layer,
            flat(prompt),
            flat(length),
            flat(emitted),
            window,
            scale=_scale(scale, q),
            cap=cap,
            interpret=platform(mesh) != "tpu",
        )
        return out.reshape(q.shape)

    slots, caches, numbers = P(rows, None, split), P(None, rows, None, split), P(rows)
    inputs = (slots, (slots,) * 2, (caches,) * 2, (caches,) * 2, P(), numbers, numbers, numbers, P())
    return jax.shard_map(here, mesh=mesh, in_specs=inputs, out_specs=slots, check_vma=False)(
        q_GSNH, new_GSKH, prompts, own, layer, prompt_GS, length_GS, own_GS, window
    )


def _scores(
    equation: str, q: jax.Array, k: jax.Array, mask: jax.Array | bool, scale: float | None, cap: float | None
) -> jax.Array:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32) * scale
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
