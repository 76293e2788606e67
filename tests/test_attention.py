"""The tree-attention rule against Python loops, attention against float64 NumPy, one decoding step against the rest,
the kernels (interpreted) against the dense form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import attention, programs, tree_kernel
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax.model import Arch
from sera_jax.programs import Compute
from sera_jax.records import Tree
from sera_jax.rows import Plan


def packed(seed: int = 0):
    """Two rows: several trees each, one-token branches, an empty prompt, a third branch, padding."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(0, 90, n).astype(np.int32)
    shapes = [(5, 4, 3), (1, 1, 6), (0, 4, 2), (7, 1, 1, 5), (3, 9, 2), (2, 3, 3)]
    trees = [Tree(f"t{i}", ids(p), tuple(map(ids, branches))) for i, (p, *branches) in enumerate(shapes)]
    return rowlib.pack(trees, Plan(40, 40, 10, 2))


def sees(rows, b: int, i: int, j: int, window: int | None) -> bool:
    """The rule of the docstring, word for word."""
    not_later = j <= i
    same_tree = rows.tree_BL[b, i] == rows.tree_BL[b, j]
    prompt_or_own = rows.branch_BL[b, j] == 0 or rows.branch_BL[b, i] == rows.branch_BL[b, j]
    near = window is None or rows.position_BL[b, i] - rows.position_BL[b, j] < window
    return bool(not_later and same_tree and prompt_or_own and near)


@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_the_mask_is_the_rule(window):
    rows = packed()
    assert (rows.tree_BL.max(axis=1) >= 2).all() and (rows.tree_BL == 0).any()
    mask = attention.tree_mask(rows.tree_BL, rows.branch_BL)
    mask = np.asarray(attention.within(mask, rows.position_BL, rows.position_BL, window))
    b, l = rows.tree_BL.shape
    want = [[[sees(rows, r, i, j, window) for j in range(l)] for i in range(l)] for r in range(b)]
    np.testing.assert_array_equal(mask, want)
    assert mask.any(-1).all()  # padding sees padding: no softmax over nothing


def test_a_window_counts_positions_not_indices():
    """Prompt of 2, branches of 3 and 2: the second branch's first token stands 4 indices, but 1 position, behind the
    prompt's last."""
    tree, branch = np.ones((1, 7), int), np.array([[0, 0, 1, 1, 1, 2, 2]])
    position = np.array([[0, 1, 2, 3, 4, 2, 3]])
    mask = np.asarray(attention.within(attention.tree_mask(tree, branch), position, position, 2))[0]
    assert np.flatnonzero(mask[5]).tolist() == [1, 5]
    assert np.flatnonzero(mask[6]).tolist() == [5, 6]
    assert np.flatnonzero(mask[4]).tolist() == [3, 4]


def numpy_attend(q, k, v, mask):
    """float64, head by head: query head n reads key/value head n // G."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(q.shape[:3]):
        score = k[b, :, n // group] @ q[b, i, n] / np.sqrt(q.shape[3])
        weight = np.where(mask[b, i], np.exp(score - score[mask[b, i]].max()), 0)
        out[b, i, n] = weight / weight.sum() @ v[b, :, n // group]
    return out


@pytest.mark.parametrize("heads, kv_heads", [(6, 6), (6, 2), (4, 1)])
def test_attention_with_grouped_heads(heads, kv_heads):
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    q, k, v = draw(2, 5, heads, 8), draw(2, 9, kv_heads, 8), draw(2, 9, kv_heads, 8)
    mask = rng.random((2, 5, 9)) < 0.5
    mask[..., 0] = True
    got = attention.attend(q, jnp.asarray(k), jnp.asarray(v), jnp.asarray(mask))
    assert got.shape == q.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, numpy_attend(q, k, v, mask), atol=2e-6)  # measured: 3e-7


def test_what_is_masked_is_not_read():
    """Not even a huge value of a hidden key or value moves a bit."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 4, 2, 4)), jnp.float32) for _ in range(3))
    mask = jnp.asarray(np.tril(np.ones((1, 4, 4), bool)))
    before = attention.attend(q, k, v, mask)
    after = attention.attend(q, k.at[0, 3].set(1e4), v.at[0, 3].set(1e30), mask)
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    assert not np.array_equal(before[0, 3], after[0, 3])


def test_scores_and_softmax_are_float32_in_bfloat16():
    """Two keys whose scores differ by less than bfloat16 can hold at that size still get different weights."""
    q = jnp.full((1, 1, 1, 256), 1, jnp.bfloat16)
    k = jnp.ones((1, 2, 1, 256), jnp.bfloat16).at[0, 1, 0, 0].set(1.5)
    v = jnp.asarray([[[[1.0] + [0] * 255], [[0.0] * 256]]], jnp.bfloat16).reshape(1, 2, 1, 256)
    out = attention.attend(q, k, v, jnp.ones((1, 1, 2), bool))
    assert out.dtype == jnp.bfloat16
    # Scores 16 and 16.03125; bfloat16 keeps 16 and 16: the weight would be 0.5 exactly.
    np.testing.assert_allclose(float(out[0, 0, 0, 0]), 1 / (1 + np.exp(1 / 32)), atol=2e-3)
    assert float(out[0, 0, 0, 0]) != 0.5


@pytest.mark.parametrize("turned", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_decoding_step_is_attention_over_all_blocks_laid_side_by_side(dtype, shared, turned):
    """shared: one prompt for all candidates of a row, or one for each. turned: keys, values are [H, T]."""
    rng = np.random.default_rng(3)
    p, c, n, k, h, j, t = 2, 3, 6, 2, 4, 5, 7
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    q, new = draw(p, c, n, h), (draw(p, c, k, h), draw(p, c, k, h))
    of = (p,) if shared else (p, c)
    prompt, own = (draw(*of, k, j, h), draw(*of, k, j, h)), (draw(p, c, k, t, h), draw(p, c, k, t, h))
    prompt_mask = jnp.asarray(rng.random((p, c, j)) < 0.7)
    own_mask = jnp.asarray(rng.random((p, c, t)) < 0.5).at[0, 0].set(False)  # a first step: no token of its own yet
    turn = lambda cache: tuple(a.swapaxes(-1, -2) if its else a for a, its in zip(cache, turned))
    got = attention.attend_decode(q, new, turn(prompt), turn(own), prompt_mask, own_mask, turned=turned)
    cached = tuple(jnp.concatenate((cache, n[:, :, :, None]), axis=3) for cache, n in zip(own, new))
    with_newest = jnp.pad(own_mask, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    same = attention.attend_decode(q, None, turn(prompt), turn(cached), prompt_mask, with_newest, turned=turned)

    def laid_out(which: int) -> jax.Array:
        """[P·C, J+T+1, K, H]: the prompt's keys, then the candidate's own, then the newest."""
        given = jnp.broadcast_to(prompt[which][:, None] if shared else prompt[which], (p, c, k, j, h))
        blocks = (given.swapaxes(2, 3), own[which].swapaxes(2, 3), new[which][:, :, None])
        return jnp.concatenate(blocks, axis=2).reshape(p * c, j + t + 1, k, h)

    mask = jnp.concatenate((prompt_mask, own_mask, jnp.ones((p, c, 1), bool)), axis=-1).reshape(p * c, 1, -1)
    want = attention.attend(q.reshape(p * c, 1, n, h), laid_out(0), laid_out(1), mask).reshape(p, c, n, h)
    assert got.dtype == dtype
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
    for out in (got, same):
        np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(want, np.float32), atol=tolerance)


# --- kernels ----------------------------------------------------------------------------------------------------------


KERNELS = ("splash", "tree", "loops", "triton")


@pytest.fixture
def small_blocks(monkeypatch):
    """Of 128 tokens, so that short rows have several."""
    monkeypatch.setattr(attention, "BLOCKS", (128,))
    monkeypatch.setattr(tree_kernel, "BLOCKS", (128,))


def long_rows(count: int = 2):
    """Two rows of 256 tokens: three trees or more, branches of one token and of 90, an empty prompt, padding; further
    rows are empty."""
    rng = np.random.default_rng(4)
    ids = lambda n: rng.integers(0, 90, n).astype(np.int32)
    shapes = [(40, 30, 20), (1, 50, 3), (60, 1, 10), (10, 90, 30), (0, 10, 12), (5, 20, 6, 9), (20, 8)]
    trees = [Tree(f"t{i}", ids(p), tuple(map(ids, branches))) for i, (p, *branches) in enumerate(shapes)]
    rows = rowlib.pack(trees, Plan(256, 256, 12, count))
    assert rows.tree_BL.shape == (count, 256) and (rows.tree_BL.max(axis=1)[:2] >= 3).all()
    assert (rows.tree_BL[1] == 0).any() and (rows.tree_BL[2:] == 0).all()
    return rows


def forward_and_gradients(name: str, rows, qkv: tuple, d_out: jax.Array, mesh, *, window=None, **keys):
    """(out, dq, dk, dv)."""

    @jax.jit
    def run(*qkv):
        attend = attention.over_rows(name, rows.tree_BL, rows.branch_BL, rows.position_BL, mesh=mesh, **keys)
        out, pull = jax.vjp(lambda *x: attend(*x, None if window is None else jnp.int32(window)), *qkv)
        return out, *pull(d_out)

    return run(*qkv)


def drawn(rows, heads: int, kv_heads: int, size: int, dtype=jnp.float32):
    rng = np.random.default_rng(5)
    draw = lambda n: jnp.asarray(rng.normal(size=(*rows.tree_BL.shape, n, size)), dtype)
    return (draw(heads), draw(kv_heads), draw(kv_heads)), draw(heads)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "heads, kv_heads, size, keys",
    [
        (4, 2, 64, {}),
        (2, 1, 80, {"window": 7}),
        (2, 2, 96, {"scale": 0.3}),
        (2, 1, 128, {"window": 25}),  # shorter than prompts and branches: it crosses from second branches into prompts
        (2, 2, 256, {"window": 40, "cap": 5.0, "scale": 0.08}),
    ],
)
def test_kernels_are_the_dense_form_forward_and_backward(small_blocks, one_device, name, heads, kv_heads, size, keys):
    rows = long_rows(3)
    qkv, d_out = drawn(rows, heads, kv_heads, size)
    got, want = (forward_and_gradients(form, rows, qkv, d_out, one_device, **keys) for form in (name, "xla"))
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max())  # measured: 1.1e-6 at most


@pytest.mark.parametrize(
    "name, heads, kv_heads, tensor",
    [
        *((name, *heads) for name in ("splash", "tree", "loops") for heads in ((4, 2, 2), (4, 2, 4), (3, 1, 2))),
        ("triton", 4, 2, 4),
        ("tree", 12, 6, 4),
        ("tree", 12, 2, 4),
    ],
)
def test_kernels_with_split_rows_and_heads(small_blocks, one_device, name, heads, kv_heads, tensor):
    """K/V heads that tensor divides; fewer K/V heads than that; query heads that it does not divide; a device whose
    three query heads read two K/V heads, or the same one."""
    rows, mesh = long_rows(), meshes.make(1, 2, tensor, jax.devices()[: 2 * tensor])
    qkv, d_out = drawn(rows, heads, kv_heads, 64)
    got = forward_and_gradients(name, rows, qkv, d_out, mesh, window=20)
    want = forward_and_gradients("xla", rows, qkv, d_out, one_device, window=20)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max())  # measured: 1.1e-6 at most


@pytest.mark.parametrize("name", ["splash", "tree", "loops"])  # triton: test_triton_kernel.py
def test_kernels_skip_blocks_that_no_query_of_a_block_sees(small_blocks, one_device, name):
    """A NaN anywhere in a block that is computed spreads over the block's queries, masked or not."""
    tree = np.repeat([1, 2, 3], 128)[None]  # three trees of a block each
    rows = {"branch_BL": np.zeros((1, 384), int), "position_BL": np.tile(np.arange(128), 3)[None]}
    q, k, v = (jnp.ones((1, 384, 1, 64)) for _ in range(3))
    v = v.at[0, 200].set(jnp.nan)
    out = attention.over_rows(name, tree, **rows, mesh=one_device)(q, k, v, None)
    assert np.isfinite(out[0, :128]).all() and np.isfinite(out[0, 256:]).all()
    first = 192 if name == "loops" else 128  # its blocks are of 64 tokens
    assert np.isnan(out[0, first:256]).all()


@pytest.mark.parametrize("keys", [{}, {"window": 30, "cap": 3.0}])
def test_tree_with_a_block_beyond_the_rows_end_and_more_heads_than_a_step_serves(monkeypatch, one_device, keys):
    """Blocks of 256 tokens in rows of 384; eight query heads of one key/value head, two at a time."""
    monkeypatch.setattr(tree_kernel, "BLOCKS", (256,))
    rows = long_rows()
    rows = jax.tree.map(lambda x: np.concatenate((x[:, 128:], x), axis=1) if x.shape == (2, 256) else x, rows)
    assert rows.tree_BL.shape == (2, 384)
    qkv, d_out = drawn(rows, 8, 1, 64)
    got, want = (forward_and_gradients(form, rows, qkv, d_out, one_device, **keys) for form in ("tree", "xla"))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max())  # measured: 1.1e-6 at most


@pytest.mark.parametrize("name", ["tree", "loops", "triton"])
def test_bfloat16_is_as_near_to_float32_as_in_the_dense_form(small_blocks, one_device, name):
    rows = long_rows()
    qkv, d_out = drawn(rows, 4, 2, 64, jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, d_out))
    want = forward_and_gradients("xla", rows, *exact, one_device)
    got, dense = (forward_and_gradients(form, rows, qkv, d_out, one_device) for form in (name, "xla"))
    for a, b, c in zip(got, dense, want):
        assert a.dtype == jnp.bfloat16
        ours, theirs = (float(np.abs(np.asarray(x, np.float32) - c).max() / np.abs(c).max()) for x in (a, b))
        # Measured, of the largest: out, dq, dk, dv 1.9e-3, 4.1e-3, 4.0e-3, 2.6e-3; dense 2.6e-3, 3.2e-3, 3.1e-3, 2.6e-3
        assert ours < 1.6 * theirs


@pytest.mark.parametrize("name", ["tree", "loops"])
def test_padding_moves_no_bit_of_what_is_not(small_blocks, one_device, name):
    """Whatever stands there: outputs and gradients of the trees' tokens are the same, and all are finite."""
    rows = long_rows(3)
    qkv, d_out = drawn(rows, 2, 1, 64)
    padding = (rows.tree_BL == 0)[..., None, None]
    other = [jnp.where(padding, 100 * x + 7, x) for x in (*qkv, d_out)]
    before = forward_and_gradients(name, rows, qkv, d_out, one_device)
    after = forward_and_gradients(name, rows, tuple(other[:3]), other[3], one_device)
    for a, b in zip(before, after):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(jnp.where(padding, 0, a), jnp.where(padding, 0, b))
        assert not np.array_equal(a, b)


def test_the_backend_is_chosen_by_the_devices_of_the_mesh_and_the_length_of_rows(one_device):
    class Devices:  # of a TPU that is not here
        devices = np.array([type("Device", (), {"platform": "tpu"})()])

    assert attention.backend("auto", one_device, 256) == "loops"
    assert attention.backend("auto", one_device, 64) == attention.backend("auto", one_device, 300) == "xla"
    assert attention.backend("auto", Devices, 256) == "tree" and attention.backend("auto", Devices, 200) == "xla"
    assert attention.backend("xla", Devices, 256) == "xla" and attention.backend("splash", one_device, 128) == "splash"
    assert attention.backend("triton", Devices, 203) == "triton"
    for name in set(KERNELS) - {"triton"}:
        multiple = 64 if name == "loops" else 128
        told = (
            rf"{name}, which takes rows of a multiple of {multiple} tokens, but these have 200\. Set optimizer\.row_tok"
        )
        with pytest.raises(ValueError, match=told):
            attention.backend(name, Devices, 200)


def test_scorer_and_prefill_compute_with_the_chosen_backend(monkeypatch, one_device):
    """Log-probs, first logits and caches of a model with a window and soft caps are the dense form's; prompts that the
    kernel does not take are computed too."""
    arch = Arch(
        "gemma2", 91, 32, 2, 4, 2, 64, 16, 1e-6, 1e4, True, windows=(20, None), score_cap=8.0, logit_cap=5.0,
        init_std=0.3,
    )  # fmt: skip
    params = programs.random_params(arch, one_device)(jax.random.key(0))
    names = []
    for name, build in attention.ATTENTION.items():
        monkeypatch.setitem(attention.ATTENTION, name, lambda *a, n=name, b=build, **k: names.append(n) or b(*a, **k))
    rows = long_rows()
    compute = {name: Compute(jnp.float32, attention=name) for name in ("xla", *KERNELS)}
    want, *got = (programs.scorer(arch, one_device, compute[name])(params, rows) for name in compute)
    for scored in got:
        np.testing.assert_allclose(scored, want, rtol=2e-6)
    assert names == list(compute)
    for length, used in ((128, list(compute)), (32, ["xla"] * len(compute))):
        names.clear()
        prompts = jnp.asarray(rows.tokens_BL[:, :length]), jnp.array([length, length - 9])
        want, *got = (programs.prefiller(arch, one_device, compute[name])(params, *prompts) for name in compute)
        for prefilled in got:
            for a, b in zip(jax.tree.leaves(prefilled), jax.tree.leaves(want)):
                np.testing.assert_allclose(a, b, atol=2e-5)  # of logits and caches of size 4 to 32; measured: 2.4e-6
        assert names == used
