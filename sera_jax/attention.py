"""The attention rule of prompt trees (README, "Rows"), dense on XLA.

A query sees a key that is not later in the row, is in the same tree, and is in the prompt or in its own branch. A
sliding window counts positions, not indices: the second branch of a tree stands far from its prompt in the row, but not
in the text.

Letters: N query heads, K key/value heads (N = K·G), H head size, Q queries, T keys.
"""

import jax
import jax.numpy as jnp


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


def attend_decode(
    q_PCNH: jax.Array,
    new_PCKH: tuple[jax.Array, jax.Array],
    prompt_PKTH: tuple[jax.Array, jax.Array],
    own_PCKTH: tuple[jax.Array, jax.Array],
    prompt_mask_PCT: jax.Array,
    own_mask_PCT: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """One decoding step of C candidates of each prompt: three score blocks under one softmax.

    Args:
        q_PCNH: queries of the newest token.
        new_PCKH: its own key and value, which are in no cache yet.
        prompt_PKTH: key and value cache of the prompt, one for all its candidates.
        own_PCKTH: key and value cache of what each candidate has emitted so far.
        prompt_mask_PCT, own_mask_PCT: bool, which cached positions count.
        scale, cap: as in `attend`.

    Returns:
        [P, C, N, H] in q's dtype.
    """
    p, c, n, h = q_PCNH.shape
    grouped = q_PCNH.reshape(p, c, new_PCKH[0].shape[2], -1, h)
    blocks = (
        _scores("pckgh,pkth->pckgt", grouped, prompt_PKTH[0], prompt_mask_PCT[:, :, None, None], scale, cap),
        _scores("pckgh,pckth->pckgt", grouped, own_PCKTH[0], own_mask_PCT[:, :, None, None], scale, cap),
        _scores("pckgh,pckh->pckg", grouped, new_PCKH[0], True, scale, cap)[..., None],
    )
    weights = jax.nn.softmax(jnp.concatenate(blocks, axis=-1), axis=-1).astype(new_PCKH[1].dtype)
    prompt, own, new = jnp.split(weights, (blocks[0].shape[-1], weights.shape[-1] - 1), axis=-1)
    out = (
        jnp.einsum("pckgt,pkth->pckgh", prompt, prompt_PKTH[1])
        + jnp.einsum("pckgt,pckth->pckgh", own, own_PCKTH[1])
        + new * new_PCKH[1][:, :, :, None, :]
    )
    return out.reshape(p, c, n, h)


def _scores(
    equation: str, q: jax.Array, k: jax.Array, mask: jax.Array | bool, scale: float | None, cap: float | None
) -> jax.Array:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32) * scale
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
