"""log p(y|x) of the branches of packed rows under a policy, float32 whatever the compute dtype; and of a set of trees.
Likewise the rewards of branches under a reward model.

Logits exist only where a response token is predicted, and only for one chunk of them at a time: the head has its own
backward pass, with the vocabulary split over (fsdp, tensor), so no array of [tokens, V] is ever whole or kept.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sera_jax import attention, metrics, model
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax.ledger import Ledger, branch_key
from sera_jax.model import Arch
from sera_jax.records import Rows, Tree
from sera_jax.rows import Plan


def row_logps(
    arch: Arch,
    params: dict,
    rows: Rows,
    *,
    mesh: Mesh,
    dtype: Any,
    remat: str = "none",
    chunk: int = 256,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probs and token counts of every branch slot.

    Args:
        params: weights; rows: one microbatch [B, ...], B a multiple of the mesh's row shards.
        dtype: of the matrix products. remat: key of model.REMAT. chunk: response tokens projected at a time, per row.
        backend: key of attention.ATTENTION, or "auto".

    Returns:
        logp_BS float32, the sum over the slot's response tokens (EOS included); length_BS float32, their number. 0 in
        empty slots.
    """
    sums = slot_sums(arch, params, rows, mesh=mesh, dtype=dtype, remat=remat, chunk=chunk, backend=backend)
    return sums.logp_BS, sums.length_BS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotSums:
    """What a forward pass says of every branch slot, float32, 0 in empty slots.

    logp_BS: Σ of its response tokens' log-probs (EOS included), each times its weight; length_BS: their number.
    alignment_BS: Σ [log π(y_t) - log Σ_v π(v)²], how likely its tokens are beside those that the policy would sample
    (WPO, Zhou et al. 2024, eq. 2), without gradient; None unless asked for.
    """

    logp_BS: jax.Array
    length_BS: jax.Array
    alignment_BS: jax.Array | None


def slot_sums(
    arch: Arch,
    params: dict,
    rows: Rows,
    *,
    mesh: Mesh,
    dtype: Any,
    remat: str = "none",
    chunk: int = 256,
    backend: str = "auto",
    tail: float = 1.0,
    alignment: bool = False,
    key: jax.Array | None = None,
) -> SlotSums:
    """Sums over the response tokens of every branch slot; the other arguments as `row_logps` has them.

    Args:
        tail: weight of a token beyond the length of the other branch of its pair; below 1 the rows hold nothing but
            pairs. LD-DPO (Liu et al. 2024, arXiv 2409.06411): log π̂(y|x) = Σ_{t ≤ m} + α·Σ_{t > m},
            m = min(L_w, L_l).
        alignment: also give `alignment_BS`, which costs a second sum over the vocabulary.
        key: of dropout; None = nothing is dropped.
    """
    logp_BM, log_collision_BM = _of_tokens(
        arch,
        params,
        rows,
        mesh=mesh,
        dtype=dtype,
        remat=remat,
        chunk=chunk,
        backend=backend,
        collision=alignment,
        key=key,
    )
    slots = rows.example_BS.shape[1]
    # Slot S marks "no token"; segment_sum drops what lies outside [0, S).
    by_slot = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=slots))
    length_BS = by_slot(jnp.ones_like(logp_BM), rows.slot_BM)
    weighted_BM = logp_BM if tail == 1 else logp_BM * jnp.where(_shared(rows.slot_BM, length_BS), 1.0, tail)
    alignment_BS = None
    if log_collision_BM is not None:
        alignment_BS = by_slot(jax.lax.stop_gradient(logp_BM) - log_collision_BM, rows.slot_BM)
    return SlotSums(by_slot(weighted_BM, rows.slot_BM), length_BS, alignment_BS)


def _shared(slot_BM: jax.Array, length_BS: jax.Array) -> jax.Array:
    """bool [B, M]: is a response token among the first min(L_w, L_l) of its branch?

    Branches of a pair are slots 2j and 2j + 1, and a row's targets stand branch by branch in the order of their slots.
    """
    least_BS = jnp.repeat(jnp.min(length_BS.reshape(len(length_BS), -1, 2), axis=2), 2, axis=1)
    end_BS = jnp.cumsum(length_BS, axis=1) - length_BS + least_BS
    end_BM = jnp.take_along_axis(end_BS, jnp.minimum(slot_BM, length_BS.shape[1] - 1), axis=1)
    return jnp.arange(slot_BM.shape[1])[None] < end_BM


def row_token_logps(
    arch: Arch,
    params: dict,
    rows: Rows,
    *,
    mesh: Mesh,
    dtype: Any,
    remat: str = "none",
    chunk: int = 256,
    backend: str = "auto",
    key: jax.Array | None = None,
) -> jax.Array:
    """float32 [B, M]: the log-prob of each response token of each row, arbitrary where slot_BM = S (no token); the
    arguments are as `slot_sums` has them."""
    how = {"mesh": mesh, "dtype": dtype, "remat": remat, "chunk": chunk, "backend": backend, "key": key}
    return _of_tokens(arch, params, rows, collision=False, **how)[0]


def _of_tokens(
    arch: Arch,
    params: dict,
    rows: Rows,
    *,
    mesh: Mesh,
    dtype: Any,
    remat: str,
    chunk: int,
    backend: str,
    collision: bool,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """float32 [B, M] each: log-prob of each response token of each row, and log Σ_v π(v)² where it was predicted (None
    unless asked for); arbitrary where slot_BM = S (no token).
    """
    hidden_BLD = _hidden(arch, params, rows, mesh=mesh, dtype=dtype, remat=remat, backend=backend, key=key)
    hidden_BMD = jnp.take_along_axis(hidden_BLD, rows.parent_BM[:, :, None], axis=1)
    hidden_BMD, table_VD = model.head(arch, params, hidden_BMD, dtype, key)
    bias_V = model.head_bias(arch, params)
    head = Head(mesh, chunk, arch.logit_cap)
    used_B = jnp.sum(rows.slot_BM < rows.example_BS.shape[1], axis=1, dtype=jnp.int32)
    if collision:
        return head_logps_and_collision(hidden_BMD, table_VD, bias_V, rows.target_BM, head, used_B)
    return head_logps(hidden_BMD, table_VD, bias_V, rows.target_BM, head, used_B), None


def _hidden(
    arch: Arch,
    params: dict,
    rows: Rows,
    *,
    mesh: Mesh,
    dtype: Any,
    remat: str,
    backend: str,
    key: jax.Array | None = None,
) -> jax.Array:
    """hidden_BLD in `dtype` of one microbatch of rows."""
    tree = rows.tree_BL, rows.branch_BL, rows.position_BL
    within_rows = attention.over_rows(backend, *tree, mesh=mesh, scale=arch.score_scale, cap=arch.score_cap)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Any, window: jax.Array | None) -> tuple[jax.Array, tuple]:
        return within_rows(q, k, v, window), ()

    hidden_BLD, _ = model.hidden(
        arch,
        params,
        rows.tokens_BL,
        rows.position_BL,
        attend,
        longest=rows.tokens_BL.shape[1],
        dtype=dtype,
        remat=remat,
        placement=meshes.placement(mesh, "gather"),
        key=key,
    )
    return hidden_BLD


# --- a reward model ---------------------------------------------------------------------------------------------------


def row_rewards(
    arch: Arch,
    params: dict,
    rows: Rows,
    *,
    mesh: Mesh,
    dtype: Any,
    remat: str = "none",
    backend: str = "auto",
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Reward and token count of every branch slot under a reward model (arch.scored).

    The reward is read where the branch's last token stands (EOS, unless the response was cut), which has seen the
    prompt and all of the branch; the arguments are as `row_logps` has them.

    Returns:
        reward_BS float32; length_BS float32, response tokens that a policy would predict. 0 in empty slots.
    """
    hidden_BLD = _hidden(arch, params, rows, mesh=mesh, dtype=dtype, remat=remat, backend=backend, key=key)
    hidden_BSD = jnp.take_along_axis(hidden_BLD, last_tokens(rows)[:, :, None], axis=1)
    reward_BS = jnp.where(rows.example_BS >= 0, model.reward(params, hidden_BSD), 0.0)
    by_slot = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=rows.example_BS.shape[1]))
    return reward_BS, by_slot(jnp.ones(rows.slot_BM.shape, jnp.float32), rows.slot_BM)


def row_features(arch: Arch, params: dict, rows: Rows, *, mesh: Mesh, dtype: Any, backend: str = "auto") -> jax.Array:
    """phi_BSD float32: the last hidden state of every branch slot's last token, divided by √D; 0 in empty slots.

    It is what a reward model of these weights reads (`row_rewards`); divided so that its length is about 1 at any
    width. The arguments are as `row_logps` has them.
    """
    hidden_BLD = _hidden(arch, params, rows, mesh=mesh, dtype=dtype, remat="none", backend=backend)
    hidden_BSD = jnp.take_along_axis(hidden_BLD, last_tokens(rows)[:, :, None], axis=1).astype(jnp.float32)
    return jnp.where(rows.example_BS[:, :, None] >= 0, hidden_BSD / math.sqrt(arch.width), 0.0)


def last_tokens(rows: Rows) -> jax.Array:
    """int32 [B, S]: index in its row of the last token of each slot's branch, 0 in empty slots.

    Not by the targets: a branch of one token is predicted by the prompt, wherever the branch lies, and without a prompt
    by nothing. Branches lie in a row in the order of their slots, each in one piece.
    """
    slots = rows.example_BS.shape[1]
    differs = lambda a: a != jnp.pad(a[:, :-1], ((0, 0), (1, 0)))
    begins_BL = (rows.branch_BL > 0) & (differs(rows.tree_BL) | differs(rows.branch_BL))
    slot_BL = jnp.where(rows.branch_BL > 0, jnp.cumsum(begins_BL, axis=1) - 1, slots)
    index_BL = jnp.broadcast_to(jnp.arange(slot_BL.shape[1], dtype=jnp.int32)[None], slot_BL.shape)
    last_BS = jax.vmap(functools.partial(jax.ops.segment_max, num_segments=slots))(index_BL, slot_BL)
    return jnp.where(rows.example_BS >= 0, last_BS, 0)


# --- the head ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Head:
    """How the head computes. chunk: response tokens projected at a time, per row, at most; fewer where the rows of many
    devices come together (`_chunk_of`). cap: c of c·tanh(logit/c), which Gemma 2 puts behind its logits; None = not."""

    mesh: Mesh
    chunk: int
    cap: float | None = None


def head_logps(
    hidden_BMD: jax.Array,
    table_VD: jax.Array,
    bias_V: jax.Array | None,
    target_BM: jax.Array,
    head: Head,
    used_B: jax.Array | None = None,
) -> jax.Array:
    """log softmax(hidden · tableᵀ + bias)[target], float32 [B, M]; products in the dtype of `hidden`.

    used_B: int32, how many targets of each row count, from its first on; None = all. Chunks in which no row has any are
    not computed: there the result is 0, and so are gradients.

    The vocabulary is split over the mesh axes that `mesh.LAYOUTS` gives it; hidden states are gathered over fsdp one
    chunk at a time where fsdp splits the vocabulary, and (max, sum-exp, target) are what crosses devices. The backward
    pass recomputes each chunk's logits and accumulates the gradients of table and bias in float32.
    """
    return _head(hidden_BMD, table_VD, bias_V, target_BM, _used(used_B, target_BM), head, False)[0]


def head_logps_and_collision(
    hidden_BMD: jax.Array,
    table_VD: jax.Array,
    bias_V: jax.Array | None,
    target_BM: jax.Array,
    head: Head,
    used_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`head_logps`, and log Σ_v π(v)², float32 [B, M], of the distribution that predicts each target.

    The second, the log-probability that two draws agree, has no gradient; it costs one more sum over the vocabulary in
    the forward pass, and a second number for each token that crosses devices.
    """
    return _head(hidden_BMD, table_VD, bias_V, target_BM, _used(used_B, target_BM), head, True)


def _used(used_B: jax.Array | None, target_BM: jax.Array) -> jax.Array:
    return jnp.full(target_BM.shape[:1], target_BM.shape[1], jnp.int32) if used_B is None else used_B


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _head(hidden_BMD, table_VD, bias_V, target_BM, used_B, head, collision):
    """(logp_BM,), or (logp_BM, log_collision_BM) if asked for."""
    return _head_forward(hidden_BMD, table_VD, bias_V, target_BM, used_B, head, collision)[0]


def _head_forward(hidden_BMD, table_VD, bias_V, target_BM, used_B, head, collision):
    rows, table = _specs(head.mesh, table_VD.shape)
    body = functools.partial(_forward_chunks, collision=collision)
    forward = _sharded(body, head, table_VD.shape, (rows, table, table, rows, rows), (rows,) * (2 + collision))
    logp_BM, lse_BM, *rest = forward(hidden_BMD, table_VD, bias_V, target_BM, used_B)
    return (logp_BM, *rest), (hidden_BMD, table_VD, bias_V, target_BM, used_B, lse_BM)


def _head_backward(head, collision, residuals, cotangents):
    hidden_BMD, table_VD, bias_V, target_BM, used_B, lse_BM = residuals
    rows, table = _specs(head.mesh, table_VD.shape)
    inputs, results = (rows, table, table, rows, rows, rows, rows), (rows, table, table)
    backward = _sharded(_backward_chunks, head, table_VD.shape, inputs, results)
    d_hidden, d_table, d_bias = backward(hidden_BMD, table_VD, bias_V, target_BM, used_B, lse_BM, cotangents[0])
    d_bias = None if bias_V is None else d_bias.astype(bias_V.dtype)
    return d_hidden.astype(hidden_BMD.dtype), d_table.astype(table_VD.dtype), d_bias, None, None


_head.defvjp(_head_forward, _head_backward)


def _vocab_axes(mesh: Mesh, table_shape: tuple[int, int]) -> tuple[str, ...]:
    """The mesh axes that split the vocabulary, as the layout table gives them."""
    return meshes.spec(mesh, "train", ("vocab",), table_shape[:1])[0] or ()


def _specs(mesh: Mesh, table_shape: tuple[int, int]) -> tuple[P, P]:
    """Of what lies by rows, over (data, fsdp), and of the table."""
    return P(meshes.ROW_AXES), P(_vocab_axes(mesh, table_shape) or None)


def _sharded(body, head: Head, table_shape: tuple[int, int], inputs: tuple[P, ...], results: tuple[P, ...]):
    """`body` under shard_map."""
    vocab_axes = _vocab_axes(head.mesh, table_shape)
    bound = functools.partial(body, vocab_axes=vocab_axes, chunk=head.chunk, cap=head.cap)
    return jax.shard_map(bound, mesh=head.mesh, in_specs=inputs, out_specs=results, check_vma=False)


TOKENS = 2048  # of all gathered rows together: more make the head's matrix products no faster, but its logits larger


def _chunk_of(chunk: int, target_bM: jax.Array, vocab_axes: tuple[str, ...]) -> int:
    """Response tokens of a row that are projected at a time: `chunk`, but no more than make TOKENS with the rows that
    are gathered (64 at least), and no more than a row has."""
    rows, length = target_bM.shape
    gathered = rows * (jax.lax.axis_size("fsdp") if "fsdp" in vocab_axes else 1)
    return min(chunk, max(64, TOKENS // gathered), length)


def _over_chunks(body: Callable, carry: Any, out: Any, used_b: jax.Array, chunk: int) -> tuple[Any, Any]:
    """`body(carry, i) → (carry, what comes out of chunk i)` over the chunks in which any row has a target.

    out: zeros of everything's outputs, chunks first. All devices turn as often, for they work on chunks together.
    """
    count, turns = len(jax.tree.leaves(out)[0]), -(-jax.lax.pmax(jnp.max(used_b), meshes.AXES) // chunk)

    def turn(state: tuple) -> tuple:
        i, carry, out = state
        carry, one = body(carry, i)
        return i + 1, carry, jax.tree.map(lambda all_, part: all_.at[i].set(part.astype(all_.dtype)), out, one)

    # The second condition never holds alone; it tells readers of the program how often it turns at most.
    state = jax.lax.while_loop(lambda s: (s[0] < turns) & (s[0] < count), turn, (jnp.int32(0), carry, out))
    return state[1:]


def _chunks(array: jax.Array, chunk: int) -> jax.Array:
    """[b, M, ...] → [M / chunk, b, chunk, ...], padded with zeros."""
    b, m = array.shape[:2]
    count = -(-m // chunk)
    padded = jnp.pad(array, ((0, 0), (0, count * chunk - m), *[(0, 0)] * (array.ndim - 2)))
    return jnp.moveaxis(padded.reshape(b, count, chunk, *array.shape[2:]), 1, 0)


def _joined(chunks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunks`."""
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _gathered(array: jax.Array, vocab_axes: tuple[str, ...]) -> jax.Array:
    """All rows of the devices that share a vocabulary split: fsdp splits rows too, tensor does not."""
    return jax.lax.all_gather(array, "fsdp", axis=0, tiled=True) if "fsdp" in vocab_axes else array


def _own(array: jax.Array, vocab_axes: tuple[str, ...], rows: int) -> jax.Array:
    """This device's rows of a gathered array."""
    if "fsdp" not in vocab_axes:
        return array
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index("fsdp") * rows, rows, axis=0)


def _local_target(target: jax.Array, vocab_axes: tuple[str, ...], size: int) -> tuple[jax.Array, jax.Array]:
    """Target ids within this device's slice of the vocabulary, and whether they lie in it."""
    start = jax.lax.axis_index(vocab_axes) * size if vocab_axes else 0
    local = target - start
    return jnp.clip(local, 0, size - 1), (local >= 0) & (local < size)


def _logits(hidden: jax.Array, table: jax.Array, bias: jax.Array | None, cap: float | None) -> jax.Array:
    logits = jnp.einsum("bmd,vd->bmv", hidden, table, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)[None, None]
    return model.capped(logits, cap)


def _forward_chunks(hidden_bMD, table_vD, bias_v, target_bM, used_b, *, vocab_axes, chunk, cap, collision):
    rows, length = target_bM.shape
    chunk, table_vD = _chunk_of(chunk, target_bM, vocab_axes), table_vD.astype(hidden_bMD.dtype)
    across = (lambda x: jax.lax.psum(x, vocab_axes)) if vocab_axes else (lambda x: x)
    inputs = _chunks(hidden_bMD, chunk), _chunks(target_bM, chunk)

    def body(_, i):
        hidden, target = (_gathered(x[i], vocab_axes) for x in inputs)
        logits = _logits(hidden, table_vD, bias_v, cap)
        top = jnp.max(logits, axis=-1)
        top = jax.lax.pmax(top, vocab_axes) if vocab_axes else top
        above = jnp.exp(logits - top[..., None])
        log_sum = jnp.log(across(jnp.sum(above, axis=-1)))
        lse = top + log_sum
        local, here = _local_target(target, vocab_axes, table_vD.shape[0])
        chosen = jnp.take_along_axis(logits, local[..., None], axis=-1)[..., 0]
        chosen = across(jnp.where(here, chosen, 0.0))
        out = (chosen - lse, lse)
        if collision:
            out += (jnp.log(across(jnp.sum(above**2, axis=-1))) - 2 * log_sum,)
        return None, tuple(_own(x, vocab_axes, rows) for x in out)

    zeros = (jnp.zeros(inputs[1].shape, jnp.float32),) * (2 + collision)
    _, out = _over_chunks(body, None, zeros, used_b, chunk)
    return tuple(_joined(x, length) for x in out)


def _backward_chunks(hidden_bMD, table_vD, bias_v, target_bM, used_b, lse_bM, cotangent_bM, *, vocab_axes, chunk, cap):
    rows, length = target_bM.shape
    chunk, table_vD = _chunk_of(chunk, target_bM, vocab_axes), table_vD.astype(hidden_bMD.dtype)
    inputs = tuple(_chunks(x, chunk) for x in (hidden_bMD, target_bM, lse_bM, cotangent_bM))

    def body(sums, i):
        d_table, d_bias = sums
        hidden, target, lse, cotangent = (_gathered(x[i], vocab_axes) for x in inputs)
        local, here = _local_target(target, vocab_axes, table_vD.shape[0])
        # d logp / d logits = onehot(target) - softmax
        logits = _logits(hidden, table_vD, bias_v, cap)
        probability = jnp.exp(logits - lse[..., None])
        onehot = (jnp.arange(table_vD.shape[0])[None, None] == local[..., None]) & here[..., None]
        d_logits = (onehot - probability) * cotangent[..., None]
        if cap is not None:
            d_logits *= 1 - (logits / cap) ** 2  # of cap·tanh(x/cap)
        if bias_v is not None:
            d_bias += jnp.sum(d_logits, axis=(0, 1))
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("bmv,vd->bmd", d_logits, table_vD, preferred_element_type=jnp.float32)
        if "fsdp" in vocab_axes:
            d_hidden = jax.lax.psum_scatter(d_hidden, "fsdp", scatter_dimension=0, tiled=True)
        if "tensor" in vocab_axes:
            d_hidden = jax.lax.psum(d_hidden, "tensor")
        d_table += jnp.einsum("bmv,bmd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return (d_table, d_bias), d_hidden

    zeros = jnp.zeros(table_vD.shape, jnp.float32), None if bias_v is None else jnp.zeros(bias_v.shape, jnp.float32)
    out = jnp.zeros(inputs[0].shape, hidden_bMD.dtype)
    sums, d_hidden = _over_chunks(body, zeros, out, used_b, chunk)
    # Row groups that this slice of the vocabulary has not seen yet.
    other_rows = tuple(a for a in meshes.ROW_AXES if a not in vocab_axes)
    return _joined(d_hidden, length), *jax.lax.psum(sums, other_rows)


# --- a set of trees: the host's part ----------------------------------------------------------------------------------


CHUNK = 256  # trees packed, scored, written to the ledger and, after a stop, possibly scored again at a time


def plan_for(trees: Sequence[Tree], arch: Arch, mesh: Mesh) -> Plan:
    """Rows for scoring a set in chunks."""
    return plan_of(rowlib.measure(trees), arch, mesh)


def plan_of(lengths_N3: np.ndarray, arch: Arch, mesh: Mesh) -> Plan:
    """The same for lengths as rows.measure gives them."""
    batch = min(CHUNK, len(lengths_N3))
    return rowlib.plan(
        lengths_N3,
        batch=batch,
        per_key=attention.per_key(mesh, arch.width),
        device_tokens=attention.device_tokens(mesh),
        shards=meshes.row_shards(mesh),
    )


def set_logps(
    trees: Sequence[Tree],
    *,
    tag: str,
    ledger: Ledger,
    load: Callable[[], Callable[[Rows], jax.Array]],
    plan: Plan,
    label: str,
    chunk: int = CHUNK,
) -> np.ndarray:
    """Log-probs of every branch of a set under one model, looked up in the ledger and computed where it has none.

    The set is scored in fixed chunks of `chunk` trees, each packed on its own: a run that stops here goes on with the
    first chunk that the ledger has not and packs it as an uninterrupted run would have. While the devices compute a
    chunk, the host packs the next one and writes the one before.

    Args:
        tag: of the model. load: gives the scorer (rows of one microbatch → logp_BS); called only if something is
        missing.
        plan: holds every tree. label: for the progress line.

    Returns:
        float32 [F], by flat branch number (tree 0's branches, tree 1's, ..).

    Raises:
        ValueError: a log-prob is not finite.
    """
    keys = [branch_key(tree.prompt, branch) for tree in trees for branch in tree.branches]
    first = np.concatenate(([0], np.cumsum([len(tree.branches) for tree in trees], dtype=np.int64)))
    known = np.isfinite(ledger.look_up(tag, keys))
    starts = [s for s in range(0, len(trees), chunk) if not known[first[s] : first[min(s + chunk, len(trees))]].all()]
    if starts:
        run, last = load(), None

        def store(start: int, stop: int, found: Callable[[], np.ndarray]) -> None:
            ledger.append(tag, keys[first[start] : first[stop]], found())

        for start in metrics.track(starts, total=len(starts), label=label, unit="chunks"):
            stop = min(start + chunk, len(trees))
            begun = start, stop, _begun(trees[start:stop], run, plan)
            if last is not None:
                store(*last)
            last = begun
        store(*last)
    return ledger.look_up(tag, keys)


def logps(trees: Sequence[Tree], run: Callable[[Rows], jax.Array], plan: Plan) -> np.ndarray:
    """Log-probs of every branch of trees that are packed together, without a ledger.

    Args:
        run: rows of one microbatch → logp_BS. plan: holds every tree.

    Returns:
        float32 [F], by flat branch number.
    """
    return _begun(trees, run, plan)()


def token_logps(trees: Sequence[Tree], run: Callable[[Rows], jax.Array], plan: Plan) -> list[np.ndarray]:
    """The same of each token that is predicted: float32 [tokens] of each branch, by flat branch number.

    Args:
        run: rows of one microbatch → logp_BM.
    """
    logp_A, stacked, branches = _dispatched(trees, run, plan)
    return rowlib.unpack_tokens(np.stack(meshes.get(logp_A)), stacked.example_BS, stacked.slot_BM, branches)


def _begun(trees: Sequence[Tree], run: Callable[[Rows], jax.Array], plan: Plan) -> Callable[[], np.ndarray]:
    """`logps`, dispatched; to be waited for by calling what comes back."""
    logp_A, stacked, branches = _dispatched(trees, run, plan)
    return lambda: rowlib.unpack(np.stack(meshes.get(logp_A)), stacked.example_BS, branches)


def _dispatched(trees: Sequence[Tree], run: Callable, plan: Plan) -> tuple[list[jax.Array], Rows, int]:
    """What `run` gives of each microbatch, the rows [A, B, ...] on the host, the number of branches."""
    rows = rowlib.pack(trees, plan)
    stacked, count = rowlib.microbatches(rows, plan, len(rows.tokens_BL) // plan.rows)
    logp_A = [run(jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(count)]
    return logp_A, stacked, sum(len(tree.branches) for tree in trees)
