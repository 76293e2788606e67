"""Which block pairs the tree kernels compute, against the mask of the rule; what they compute is held against the dense
form in test_attention.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import tree_kernel


def packed_rows(rng, count: int, length: int):
    """(tree, branch, position) of rows as they are packed, sometimes with padding, the last row empty."""
    tree, branch, position = np.zeros((3, count, length), np.int32)
    for row in range(count - 1):
        at, number = 0, 1
        while at < length and rng.random() < 0.95:
            prompt, *branches = rng.integers(0, rng.choice([3, 60, 400]), rng.integers(2, 5))
            for which, size in enumerate((prompt, *branches)):
                here = slice(at, min(at + size, length))
                tree[row, here], branch[row, here] = number, which
                position[row, here] = np.arange(here.stop - here.start) + (prompt if which else 0)
                at = here.stop
            number += 1
    return tree, branch, position


def any_rows(rng, count: int, length: int):
    """Ids in runs that come back later, positions in no order: no packing makes them."""
    runs = lambda most: rng.integers(0, most, (count, length // 32)).repeat(32, axis=1).astype(np.int32)
    return runs(rng.integers(1, 40)), runs(4), rng.integers(0, 200, (count, length)).astype(np.int32)


def mask_of(tree, branch, position, window: int | None) -> np.ndarray:
    """bool [B, L, L], by the words of the rule."""
    query, key = np.s_[:, :, None], np.s_[:, None, :]
    index = np.arange(tree.shape[1])
    seen = (tree[query] == tree[key]) & ((branch[key] == 0) | (branch[query] == branch[key]))
    seen &= index[None, :, None] >= index[None, None, :]
    return seen if window is None else seen & (position[query] - position[key] < window)


@pytest.mark.parametrize("rows", [packed_rows, any_rows])
@pytest.mark.parametrize("length, size", [(1024, 128), (640, 256)])
def test_the_pairs_are_those_in_which_some_query_sees_some_key(monkeypatch, rows, length, size):
    monkeypatch.setattr(tree_kernel, "BLOCKS", (size,))
    rng = np.random.default_rng(length)
    count = -(-length // size)
    of = {windowed: jax.jit(tree_kernel.blocks) for windowed in (False, True)}
    numbers = []
    for _ in range(12):
        ids = rows(rng, 4, length)
        for window in (None, 1, 5, 90):
            got = of[window is not None](*ids, None if window is None else jnp.int32(window))
            mask = np.pad(mask_of(*ids, window), ((0, 0), *[(0, count * size - length)] * 2))
            seen = mask.reshape(4, count, size, count, size).any((2, 4))
            for row in range(4):
                number, most = seen[row].sum(), count * (count + 1) // 2
                want = {(i, j) for i, j in np.argwhere(seen[row])}
                assert got.count_B[row] == number == len(want)
                for pairs, order in ((got.by_query_B2S, (0, 1)), (got.by_key_B2S, (1, 0))):
                    listed = [tuple(pair) for pair in np.asarray(pairs[row]).T]
                    assert len(listed) == most and set(listed[:number]) == want
                    assert listed[:number] == sorted(want, key=lambda pair: [pair[n] for n in order])
                    assert set(listed[number - 1 :]) == {listed[number - 1]}  # nothing new to load
                numbers.append(number / most)
    assert min(numbers) < 0.7 < max(numbers)  # rows with much to skip and rows with little


def test_two_branches_of_a_tree_do_not_meet(monkeypatch):
    """Prompt, first branch, second branch, a block each: the third block needs the prompt and itself."""
    monkeypatch.setattr(tree_kernel, "BLOCKS", (128,))
    branch = np.repeat([0, 1, 2], 128)[None]
    position = np.concatenate((np.arange(256), np.arange(128, 256)))[None]
    blocks = functools.partial(tree_kernel.blocks, np.ones_like(branch), branch, position)
    pairs = lambda found: np.asarray(found.by_query_B2S[0]).T[: int(found.count_B[0])].tolist()
    assert pairs(blocks(None)) == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 2]]
    assert pairs(blocks(jnp.int32(2))) == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 2]]
    assert pairs(blocks(jnp.int32(1))) == [[0, 0], [1, 1], [2, 2]]  # nobody but the token itself


def test_ids_are_told_apart_up_to_the_limits():
    """The last branch of a tree is not the next tree's prompt, nor is the last tree the end of the row."""
    tree = np.repeat([1, 2, 2**16 - 1, 0], 160)[None]
    branch = np.repeat([2**15 - 1, 0, 2**15 - 1, 0], 160)[None]
    found = tree_kernel.blocks(tree, branch, np.zeros_like(tree), None)
    own, prompt, _ = np.asarray(found.query_B3L[0])
    assert found.query_B3L.shape[-1] > 640 and len(set(own)) == 5 and own[-1] == prompt[-1] == -1
    assert not set(own[branch[0].nonzero()]) & set(prompt)


def test_the_size_of_blocks():
    sizes = {
        128: 128, 256: 256, 384: 384, 512: 512, 640: 384, 896: 512, 1152: 384, 1280: 256, 1408: 512, 2048: 512
    }  # fmt: skip
    assert {length: tree_kernel.block_size(length) for length in sizes} == sizes
    for length in range(128, 8192, 128):
        size = tree_kernel.block_size(length)
        assert size % 128 == 0 and size >= min(256, length) and -length % size <= 128


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"rows of 200 tokens, expected a multiple of 128\. Pad the rows"):
        tree_kernel.blocks(*[np.zeros((1, 200), np.int32)] * 3, None)


def test_a_step_serves_the_heads_that_vector_memory_holds():
    """Of a group of query heads, as many as 1024 bytes a token hold, and a divisor of the group."""
    ids = [np.zeros((1, 256), np.int32)] * 3

    def heads(queries: int, keys: int, width: int, dtype=jnp.bfloat16) -> tuple[int, int]:
        q, k = (jax.ShapeDtypeStruct((1, n, 256, width), dtype) for n in (queries, keys))
        call = tree_kernel._plan(q, k, tree_kernel.blocks(*ids, None), 1.0, None, False)
        return call.heads, call.parts

    assert heads(32, 8, 128) == (4, 1) and heads(32, 32, 128) == (1, 1)
    assert heads(8, 1, 256) == (2, 4) and heads(8, 1, 256, jnp.float32) == (1, 8)
    assert heads(9, 1, 80) == (3, 3) and heads(7, 1, 64) == (1, 7)


def test_the_maximum_starts_above_what_is_hidden():
    """A query that sees nothing in its first blocks: those weigh exactly nothing, whatever their values."""
    hidden, least = (np.float32(x) for x in (tree_kernel.HIDDEN, tree_kernel.LEAST))
    assert np.isfinite(hidden) and np.exp2(hidden - least) == 0 and np.exp2(least - least) == 1
