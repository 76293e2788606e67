"""The decoder: who sees whom, by gradients; the same numbers however it is run; weights, dimensions, first values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import attention, model, programs
from sera_jax import mesh as meshes
from sera_jax.model import Arch

ARCH = Arch("LlamaForCausalLM", 40, 24, 3, 4, 2, 8, 32, 1e-5, 1e4, tied=False, init_std=0.3)

# One row: tree 1 = prompt of 3, branches of 3 and 2; tree 2 = prompt of 2, branch of 2; two of padding.
TREE = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]])
BRANCH = np.array([[0, 0, 0, 1, 1, 1, 2, 2, 0, 0, 1, 1, 0, 0]])
POSITION = np.array([[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 3, 0, 1]])
TOKENS = np.random.default_rng(0).permutation(ARCH.vocab)[None, : TREE.shape[1]]  # every token once


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: model.init(ARCH, key))(jax.random.key(0))


def run(params, arch=ARCH, dtype=jnp.float32, remat="none", **kw):
    mask = attention.tree_mask(jnp.asarray(TREE), jnp.asarray(BRANCH))
    attend = lambda q, k, v, *_: (attention.attend(q, k, v, mask), ())
    return model.hidden(
        arch,
        params,
        jnp.asarray(TOKENS),
        jnp.asarray(POSITION),
        attend,
        longest=1 << 20,
        dtype=dtype,
        remat=remat,
        **kw,
    )[0]


def same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32)), a, b)


def test_a_token_sees_its_prompt_and_its_own_branch_and_nothing_else(params):
    """d hidden at i / d embedding of j is zero outside of the rule, nonzero inside. Every token stands once, so the
    gradient of a table row is that of one position."""
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(1, TREE.shape[1], ARCH.width)), jnp.float32)
    rows = jax.jit(jax.jacrev(lambda table: (run(params | {"embed": {"table": table}}) * weight).sum(-1)[0]))
    depends_LL = np.abs(np.asarray(rows(params["embed"]["table"]))).max(-1)[:, TOKENS[0]] > 0
    tree, branch = TREE[0], BRANCH[0]
    want = [
        [j <= i and tree[i] == tree[j] and (branch[j] == 0 or branch[i] == branch[j]) for j in range(len(tree))]
        for i in range(len(tree))
    ]
    np.testing.assert_array_equal(depends_LL, want)


def test_what_a_token_does_not_see_changes_no_bit(params):
    before = run(params)
    table = params["embed"]["table"].at[TOKENS[0, 6]].add(1.0)  # the second branch's first token
    after = run(params | {"embed": {"table": table}})
    same = (np.asarray(before) == np.asarray(after)).all(-1)[0]
    assert np.flatnonzero(~same).tolist() == [6, 7]


def test_jit_changes_rounding_only(params):
    plain, jitted = run(params), jax.jit(run)(params)
    np.testing.assert_allclose(plain, jitted, atol=1e-5)  # measured: 2e-7, values up to 3


def test_remat_changes_no_gradient(params):
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(1, TREE.shape[1], ARCH.width)), jnp.float32)

    def gradient(remat):
        return jax.jit(jax.grad(lambda p: (run(p, remat=remat) * weight).sum()))(params)

    none, *others = (gradient(remat) for remat in ("none", "dots", "attention", "full", "host"))
    assert set(model.REMAT) == {"none", "dots", "attention", "full", "host"}
    for other in others:
        for a, b in zip(jax.tree.leaves(none), jax.tree.leaves(other)):
            np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max())  # measured: equal bits


def test_remat_keeps_what_it_says(params):
    """What the backward pass is handed over from the forward pass, in numbers, and in which memory."""

    def kept(remat):
        _, backward = jax.jit(lambda p: jax.vjp(lambda p: run(p, remat=remat), p))(params)
        by_kind = {"device": 0, "pinned_host": 0}
        for leaf in jax.tree.leaves(backward):
            by_kind[leaf.sharding.memory_kind] += leaf.size
        return by_kind

    found = {remat: kept(remat) for remat in model.REMAT}
    device = {remat: kinds["device"] for remat, kinds in found.items()}
    assert device["host"] < device["full"] < device["attention"] < device["dots"] < device["none"]
    inputs = ARCH.layers * TREE.shape[1] * ARCH.width
    heads = ARCH.layers * TREE.shape[1] * ARCH.heads * ARCH.head_dim
    assert device["attention"] - device["full"] == heads and device["full"] - device["host"] == inputs
    assert found["host"]["pinned_host"] == inputs and not any(found[r]["pinned_host"] for r in found if r != "host")


def test_weights_stored_in_the_compute_dtype_give_the_same_bits(params):
    compute = jax.jit(lambda p: run(p, dtype=jnp.bfloat16))
    stored = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    wide, narrow = compute(params), compute(stored)
    assert wide.dtype == narrow.dtype == jnp.bfloat16
    same_bits(wide, narrow)


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_has_dimensions_and_the_shape_its_docstring_says(tied):
    arch = dataclasses.replace(ARCH, tied=tied)
    shapes, dims = model.abstract(arch), model.dims(arch)
    d, n, k, h, f = arch.width, arch.heads, arch.kv_heads, arch.head_dim, arch.mlp
    layer = {
        "attention_norm": {"scale": (d,)},
        "attention": {"query": (d, n, h), "key": (d, k, h), "value": (d, k, h), "out": (n, h, d)},
        "mlp_norm": {"scale": (d,)},
        "mlp": {"gate": (d, f), "up": (d, f), "down": (f, d)},
    }
    is_shape = lambda x: isinstance(x, tuple)
    want = {
        "embed": {"table": (arch.vocab, d)},
        "layers": jax.tree.map(lambda s: (arch.layers, *s), layer, is_leaf=is_shape),
        "final_norm": {"scale": (d,)},
    } | ({} if tied else {"head": {"table": (arch.vocab, d)}})
    assert jax.tree.map(lambda a: a.shape, shapes) == want
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(shapes))
    assert jax.tree.structure(dims, is_leaf=is_shape) == jax.tree.structure(shapes)
    jax.tree.map(lambda a, names: len(names) == a.ndim or pytest.fail(f"{names} of {a}"), shapes, dims)
    known = {dim for table in meshes.LAYOUTS.values() for dim in table}
    named = {name for names in jax.tree.leaves(dims, is_leaf=is_shape) for name in names if name}
    assert named == known - {"rows"}
    flat = dict(jax.tree.leaves_with_path(dims, is_leaf=is_shape))
    unnamed = [path[-1].key for path, names in flat.items() if not any(names)]
    assert set(unnamed) == {"scale"}  # small: kept whole everywhere


ALL_PARTS = {
    "llama, biases": dict(biases=("attention", "out", "mlp")),
    "qwen3": dict(qk_norm=True),
    "gemma 2": dict(
        norm="rms_plus_one", block="sandwich", scaled_embedding=True, activation="gelu_new", tied=True,
        windows=(3, None, 3), score_cap=2.0, logit_cap=3.0, score_scale=0.2,
    ),
    "phi": dict(
        norm="layer", block="parallel_shared", gated=False, rotary=4, biases=("attention", "out", "mlp", "head"),
    ),
    "tied head with a bias": dict(tied=True, biases=("head",)),
    "neox": dict(norm="layer", block="parallel", gated=False, biases=("mlp",), rotary=2, activation="gelu"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_PARTS)
def test_parts_of_other_architectures(name):
    """Dimensions, first values that change nothing by themselves, decay of matrices only, and a gradient everywhere."""
    arch = dataclasses.replace(ARCH, **ALL_PARTS[name])
    params, dims = model.init(arch, jax.random.key(0)), model.dims(arch)
    jax.tree.map(lambda a, names: len(names) == a.ndim or pytest.fail(f"{names} of {a.shape}"), params, dims)
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for path, decays in jax.tree.leaves_with_path(programs.decaying(arch)):
        leaf = flat[jax.tree_util.keystr(path)]
        vector = path[-1].key.endswith(("scale", "bias"))
        assert decays != vector
        if vector:
            first = 1.0 if path[-1].key == "scale" and arch.norm != "rms_plus_one" else 0.0
            np.testing.assert_array_equal(leaf, first)
    # With every vector off its first value, each weight matters.
    params = jax.tree.map(lambda w: w + 0.1, params)
    mask = attention.tree_mask(jnp.asarray(TREE), jnp.asarray(BRANCH))
    position = jnp.asarray(POSITION)

    def total(params, longest=6):
        def attend(q, k, v, _, window):
            seen = attention.within(mask, position, position, window)
            return attention.attend(q, k, v, seen, scale=arch.score_scale, cap=arch.score_cap), ()

        hidden, _ = model.hidden(
            arch, params, jnp.asarray(TOKENS), position, attend, longest=longest, dtype=jnp.float32, remat="full"
        )
        return jnp.sin(model.logits(arch, params, hidden, jnp.float32)).sum()

    gradients = jax.jit(jax.grad(total))(params)
    # softmax does not see a constant added to all keys of a query
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert "key_bias" in str(path) or np.abs(gradient).max() > 1e-3, path
    if arch.windows:  # what is no shorter than the text is left out of the program, and changes nothing where it is in
        wide = dataclasses.replace(arch, windows=(6, None, 7))
        same = [model.hidden(a, params, jnp.asarray(TOKENS), position, lambda q, k, v, _, w: (q, w), longest=6,
                             dtype=jnp.float32)[1] for a in (wide, arch)]  # fmt: skip
        assert same[0] is None and same[1].tolist() == [3, 6, 3]


def test_initial_weights(params):
    """N(0, init_std²), norms 1, no two arrays and no two layers alike."""
    matrices = {
        jax.tree_util.keystr(p): np.asarray(w) for p, w in jax.tree.leaves_with_path(params) if "scale" not in str(p)
    }
    for name, w in matrices.items():
        n = w.size
        assert abs(w.mean()) < 4 * ARCH.init_std / np.sqrt(n), name
        assert abs(w.std() / ARCH.init_std - 1) < 4 / np.sqrt(2 * n), name
        assert np.unique(w).size > 0.99 * n, name
    for path, w in jax.tree.leaves_with_path(params):
        if "scale" in str(path):
            np.testing.assert_array_equal(w, 1.0)
    first = [w.ravel()[:8].tobytes() for w in matrices.values()]
    assert len(set(first)) == len(first)
    assert len({w.tobytes() for w in np.asarray(params["layers"]["mlp"]["up"])}) == ARCH.layers


def test_initial_weights_do_not_depend_on_the_mesh(params, eight_devices):
    there = programs.random_params(ARCH, eight_devices)(jax.random.key(0))
    same_bits(there, params)
    other = programs.random_params(ARCH, eight_devices)(jax.random.key(1))
    assert not np.array_equal(other["embed"]["table"], params["embed"]["table"])


def test_the_head_is_the_embedding_where_it_is_tied(params):
    assert model.head_table(ARCH, params) is params["head"]["table"]
    tied = {name: weights for name, weights in params.items() if name != "head"}
    assert model.head_table(dataclasses.replace(ARCH, tied=True), tied) is params["embed"]["table"]


def test_positions_are_relative(params):
    """Rotary embeddings: shifting every position of a row moves nothing but rounding."""
    shifted = jnp.asarray(POSITION + 100)
    mask = attention.tree_mask(jnp.asarray(TREE), jnp.asarray(BRANCH))
    attend = lambda q, k, v, *_: (attention.attend(q, k, v, mask), ())
    far = model.hidden(ARCH, params, jnp.asarray(TOKENS), shifted, attend, longest=1 << 20, dtype=jnp.float32)[0]
    np.testing.assert_allclose(far, run(params), atol=2e-5)  # measured: 1e-6
    assert np.abs(np.asarray(far) - np.asarray(run(params))).max() > 0


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_sliding_window_counts_positions(window):
    mask = np.asarray(attention.within(attention.tree_mask(TREE, BRANCH), POSITION, POSITION, window))[0]
    tree, branch, position = TREE[0], BRANCH[0], POSITION[0]
    for i, j in np.ndindex(*mask.shape):
        see = j <= i and tree[i] == tree[j] and (branch[j] == 0 or branch[i] == branch[j])
        assert mask[i, j] == (see and position[i] - position[j] < window), (i, j)
