"""Which block pairs the GPU kernels compute, rows of any length, what is not read, and that they lower for CUDA. That
they compute what the dense form does, on any mesh, is held in test_attention.py."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import attention, triton_kernel


def drawn_rows(rng, count: int, length: int):
    """(tree, branch, position): a prompt and two branches a tree, of 1 to 69 tokens each, positions in no order,
    padding at the end."""
    ends = rng.integers(1, 70, (count, length)).cumsum(1)
    part = np.stack([np.searchsorted(end, np.arange(length), side="right") for end in ends])
    tree, branch = np.where(np.arange(length) < 0.9 * length, (1 + part // 3, part % 3), 0).astype(np.int32)
    return tree, branch, rng.integers(0, 200, (count, length)).astype(np.int32)


def mask_of(tree, branch, position, window: int | None) -> jax.Array:
    return attention.within(attention.tree_mask(*map(jnp.asarray, (tree, branch))), position, position, window)


def test_the_lists_are_the_blocks_in_which_some_query_sees_some_key():
    """Of every size, in order, also where the row ends inside a block."""
    rng = np.random.default_rng(0)
    of = {windowed: jax.jit(triton_kernel.blocks) for windowed in (False, True)}
    shares = []
    for window in (None, 5, 90):
        for ids in (drawn_rows(rng, 3, 608), [np.zeros((3, 608), int)] * 3):
            got = of[window is not None](*ids, None if window is None else jnp.int32(window))
            whole = got.ids_B3L.shape[2]
            assert whole == 640
            mask = np.pad(mask_of(*ids, window), ((0, 0), *[(0, whole - 608)] * 2))
            mask[:, 608:, 608:] = np.tri(whole - 608)  # what is beyond sees itself, and is seen by nothing else
            for turned, lists in enumerate((got.by_query, got.by_key)):
                for (queries, keys), (order, count) in lists.items():
                    seen = mask.reshape(3, whole // queries, queries, whole // keys, keys).any((2, 4))
                    seen = seen.swapaxes(1, 2) if turned else seen
                    np.testing.assert_array_equal(count, seen.sum(2))
                    for place in np.ndindex(count.shape):
                        listed = order[place][: count[place]].tolist()
                        assert listed == np.flatnonzero(seen[place]).tolist()
                    shares.append(count.sum() / seen.size)
    assert min(shares) < 0.3 and max(shares) > 0.5  # much to skip, and all that is not later


def gradients(form):
    """(q, k, v, d_out) → (out, dq, dk, dv)."""

    @jax.jit
    def run(*arrays):
        out, pull = jax.vjp(form, *arrays[:3])
        return out, *pull(arrays[3])

    return run


def dense(ids, q, k, v, window: int | None = None, **keys):
    """q, k, v: [B, heads, L, H]."""
    arrays = (x.swapaxes(1, 2) for x in (q, k, v))
    return attention.attend(*arrays, mask_of(*ids, window), **keys).swapaxes(1, 2)


def ours(ids, q, k, v, window: int | None = None, *, interpret: bool = True, scale: float | None = None, **keys):
    blocks = triton_kernel.blocks(*ids, None if window is None else jnp.int32(window))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return triton_kernel.attend(q, k, v, blocks, scale=scale, interpret=interpret, **keys)


def test_rows_that_end_inside_a_tile_and_heads_smaller_than_one():
    """Of eight numbers, where the side of a product is 16 at least."""
    length, heads, kv_heads, size, keys = 161, 3, 1, 8, {"window": 30, "cap": 3.0}
    rng = np.random.default_rng(length)
    ids = tuple(x[:, :length] for x in drawn_rows(rng, 2, 192))
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(2, n, length, size)), jnp.float32) for n in (heads, kv_heads, kv_heads, heads)
    )
    got, want = (gradients(functools.partial(form, ids, **keys))(q, k, v, d_out) for form in (ours, dense))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=5e-6 * max(1, np.abs(b).max()))


def test_what_stands_in_unlisted_blocks_is_read_by_no_program():
    """Two trees of 128 tokens and as much padding between them: with NaN there, forward and backward, the trees do not
    change by a bit."""
    tree = np.repeat([1, 0, 2], 128)[None]
    branch = np.tile(np.repeat([0, 1, 2], [60, 40, 28]), 3)[None]
    ids = tree, branch, np.tile(np.arange(128), 3)[None]
    rng = np.random.default_rng(1)
    arrays = [jnp.asarray(rng.normal(size=(1, n, 384, 64)), jnp.float32) for n in (2, 1, 1, 2)]
    poisoned = [x.at[:, :, 128:256].set(jnp.nan) for x in arrays]
    run = gradients(functools.partial(ours, ids))
    before, after = run(*arrays), run(*poisoned)
    for a, b in zip(before, after):
        assert np.isnan(b[:, :, 128:256]).all()
        for part in (slice(128), slice(256, 384)):
            np.testing.assert_array_equal(a[:, :, part], b[:, :, part])


NAMES = "triton_attention", "triton_attention_dq", "triton_attention_dkv"


def lowered(heads: int, kv_heads: int, size: int, dtype, length: int, window: int | None = None, cap=None) -> str:
    """Forward and backward for CUDA, as text."""

    def run(q, k, v, d_out, *ids):
        return gradients(functools.partial(ours, ids, window=window, cap=cap, interpret=False))(q, k, v, d_out)

    q, k = (jax.ShapeDtypeStruct((2, n, length, size), dtype) for n in (heads, kv_heads))
    ids = [jax.ShapeDtypeStruct((2, length), jnp.int32)] * 3
    return jax.jit(run).trace(q, k, k, q, *ids).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_every_head_size_lowers_for_cuda(size, dtype):
    """On a machine without a GPU: Pallas makes Triton's code of the three kernels, and no number is kept of a pair of
    tokens."""
    length, keys = (1000, {"window": 50, "cap": 5.0}) if size in (64, 80) else (1024, {})
    text = lowered(8, 2, size, dtype, length, **keys)
    assert [text.count(f'name = "{name}"') for name in NAMES] == [1, 1, 1]
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3
    floats = re.findall(r"tensor<([0-9x]+)x(?:f32|bf16)>", text)
    assert max(math.prod(map(int, shape.split("x"))) for shape in floats) == 2 * 8 * length * size


def test_tiles_fit_into_the_shared_memory_of_an_a100():
    """By the arithmetic that TILES tells, which is what Triton 3.9 took, to 5 KiB."""
    for (number, width), tiles in triton_kernel.TILES.items():
        for part, tile in enumerate(tiles):
            mine, turn = (tile.queries, tile.keys)[:: -1 if part == 2 else 1]
            held = number * width * ((1 if part == 0 else 2) * mine + (2 if number == 2 else 1) * 2 * turn)
            assert held <= (163 - 5) * 1024 or (part, number, width, held) == (0, 2, 256, 160 * 1024)
            for size in (tile.queries, tile.keys):
                assert size % triton_kernel.UNIT == 0 and size & (size - 1) == 0


def test_heads_that_no_tile_holds_are_refused():
    ids = [np.zeros((1, 64), np.int32)] * 3
    x = jnp.zeros((1, 1, 64, 257))
    with pytest.raises(ValueError, match=r"heads of 257 numbers of float32, expected at most 256, .* model\.attention"):
        ours(ids, x, x, x)
