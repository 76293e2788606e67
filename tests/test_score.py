"""log p(y|x) of packed rows: against a float64 NumPy decoder, and packed = unpacked in value and gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import mesh as meshes
from sera_jax import model, score
from sera_jax import rows as rowlib
from sera_jax.model import Arch
from sera_jax.records import Tree
from sera_jax.rows import Plan
from sera_jax.score import Head

ARCH = Arch("llama", 96, 32, 2, 4, 2, 8, 48, 1e-5, 1e4, tied=False, init_std=0.3)


@pytest.fixture(scope="module")
def params():
    return jax.device_get(jax.jit(lambda key: model.init(ARCH, key))(jax.random.key(0)))


def menagerie(seed: int = 0) -> list[Tree]:
    """Three and more trees a row, one-token branches, unequal branches, a long one, an empty prompt."""
    rng = np.random.default_rng(seed)
    shapes = [(5, 7, 3), (1, 1, 9), (12, 1, 1), (3, 30, 2), (20, 4, 4), (8, 6, 25), (2, 2, 2)]
    ids = lambda n: rng.integers(0, ARCH.vocab, n).astype(np.int32)
    return [Tree(f"t{i}", ids(p), (ids(a), ids(b))) for i, (p, a, b) in enumerate(shapes)]


def numpy_hidden(params, ids) -> np.ndarray:
    """The residual stream of a text after the final norm, [tokens, D]; decoder written out in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    norm = lambda x, s: x / np.sqrt((x * x).mean(-1, keepdims=True) + ARCH.norm_eps) * s
    half = ARCH.head_dim // 2
    angle = np.arange(len(ids))[:, None, None] * (ARCH.rope_theta ** (-np.arange(half) / half))

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        return np.concatenate((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1)

    x = p["embed"]["table"][ids]
    for i in range(ARCH.layers):
        w = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        y = norm(x, w["attention_norm"]["scale"])
        q = rotate(np.einsum("ld,dnh->lnh", y, w["attention"]["query"]))
        k = rotate(np.einsum("ld,dkh->lkh", y, w["attention"]["key"])).repeat(2, axis=1)
        v = np.einsum("ld,dkh->lkh", y, w["attention"]["value"]).repeat(2, axis=1)
        s = np.einsum("qnh,tnh->nqt", q, k) / np.sqrt(ARCH.head_dim)
        s = np.where(np.tril(np.ones((len(ids), len(ids)), bool)), s, -np.inf)
        a = np.exp(s - s.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        x = x + np.einsum("nqt,tnh,nhd->qd", a, v, w["attention"]["out"])
        y = norm(x, w["mlp_norm"]["scale"])
        gate = y @ w["mlp"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp"]["up"])) @ w["mlp"]["down"]
    return norm(x, p["final_norm"]["scale"])


def numpy_tokens(params, prompt, response) -> tuple[np.ndarray, np.ndarray]:
    """log p of each token of a response, and log Σ p² where it is predicted."""
    logits = numpy_hidden(params, np.concatenate((prompt, response))) @ np.asarray(params["head"]["table"], float).T
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = len(prompt) - 1 + np.arange(len(response))
    return logp[at, response], np.log(np.exp(2 * logp[at]).sum(-1))


def numpy_logp(params, prompt, response) -> float:
    """Sum of log p(response | prompt)."""
    return numpy_tokens(params, prompt, response)[0].sum()


def logps(params, trees, plan, mesh, **kw) -> tuple[np.ndarray, np.ndarray]:
    packed = rowlib.pack(trees, plan)
    run = jax.jit(lambda p, r: score.row_logps(ARCH, p, r, mesh=mesh, dtype=jnp.float32, **kw))
    logp, length = run(params, meshes.put(packed, meshes.rows_sharding(mesh)))
    count = sum(len(t.branches) for t in trees)
    return tuple(rowlib.unpack(np.asarray(a), packed.example_BS, count) for a in (logp, length))


def test_log_probs_equal_a_float64_decoder(params, one_device):
    trees = menagerie()
    logp, length = logps(params, trees, Plan(128, 128, 8, 1), one_device)
    want = [numpy_logp(params, t.prompt, b) for t in trees for b in t.branches]
    # Measured floor: 3e-6 relative in float32.
    np.testing.assert_allclose(logp, want, rtol=2e-5)
    assert length.tolist() == [len(b) for t in trees for b in t.branches]


@pytest.mark.parametrize("chunk", [16, 256])
def test_slot_sums_equal_a_float64_decoder(params, one_device, chunk):
    """LD-DPO's sums and WPO's, in rows of several pairs; lengths are plain counts."""
    trees, tail = menagerie(5), 0.3
    packed = rowlib.pack(trees, Plan(128, 128, 8, 1))
    run = jax.jit(
        lambda p: score.slot_sums(
            ARCH, p, packed, mesh=one_device, dtype=jnp.float32, chunk=chunk, tail=tail, alignment=True
        )
    )
    sums = run(params)
    got = [
        rowlib.unpack(np.asarray(a), packed.example_BS, 14) for a in (sums.logp_BS, sums.length_BS, sums.alignment_BS)
    ]
    want_logp, want_alignment = [], []
    for tree in trees:
        least = min(map(len, tree.branches))
        for branch in tree.branches:
            logp_T, collision_T = numpy_tokens(params, tree.prompt, branch)
            want_logp.append(logp_T[:least].sum() + tail * logp_T[least:].sum())
            want_alignment.append((logp_T - collision_T).sum())
    # Measured floors: 2e-6 and 3e-6 relative.
    np.testing.assert_allclose(got[0], want_logp, rtol=2e-5)
    np.testing.assert_allclose(got[2], want_alignment, rtol=2e-5, atol=2e-5)
    assert got[1].tolist() == [len(b) for t in trees for b in t.branches]
    assert not any(
        np.asarray(a)[packed.example_BS < 0].any() for a in (sums.logp_BS, sums.length_BS, sums.alignment_BS)
    )
    assert all(a.dtype == jnp.float32 for a in (sums.logp_BS, sums.length_BS, sums.alignment_BS))


def test_a_tail_of_weight_0_has_no_gradient_and_alignment_none_at_all(params, one_device):
    """Of the tokens behind the shared length only the context they are is left: nothing, at the end of a branch."""
    tree = menagerie()[3]  # branches of 30 and 2 tokens
    cut = dataclasses.replace(tree, branches=tuple(branch[:2] for branch in tree.branches))

    @jax.jit
    @jax.grad
    def gradient(p, packed, factor):
        sums = score.slot_sums(ARCH, p, packed, mesh=one_device, dtype=jnp.float32, tail=0.0, alignment=True)
        return sums.logp_BS.sum() + factor * sums.alignment_BS.sum()

    one, other = (gradient(params, rowlib.pack([t], Plan(128, 128, 2, 1)), f) for t, f in ((tree, 7.0), (cut, 0.0)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("chunk", [1, 7, 48, 256])
def test_the_head_gives_the_same_log_probs_and_gradients_at_any_chunk(params, one_device, chunk):
    packed = rowlib.pack(menagerie(), Plan(128, 128, 8, 1))
    packed = meshes.put(packed, meshes.rows_sharding(one_device))
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 48, 32)), jnp.float32)
    target = jnp.asarray(rng.integers(0, 96, (2, 48)))
    weight = jnp.asarray(rng.normal(size=(2, 48)), jnp.float32)

    def ours(h, w):
        logp, collision = score.head_logps_and_collision(h, w, None, target, Head(one_device, chunk))
        # The second output has no gradient, whatever weighs it.
        return (logp * weight).sum() + ((collision - jax.lax.stop_gradient(collision)) * 3 * weight).sum()

    def plain(h, w):
        logits = jax.nn.log_softmax(jnp.einsum("bmd,vd->bmv", h, w))
        return (jnp.take_along_axis(logits, target[..., None], -1)[..., 0] * weight).sum()

    table = jnp.asarray(params["head"]["table"])
    got, want = (jax.value_and_grad(f, argnums=(0, 1))(hidden, table) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)
    logp, collision = score.head_logps_and_collision(hidden, table, None, target, Head(one_device, chunk))
    np.testing.assert_array_equal(logp, score.head_logps(hidden, table, None, target, Head(one_device, chunk)))
    logits = np.einsum("bmd,vd->bmv", *(np.asarray(a, np.float64) for a in (hidden, table)))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(collision, np.log(((p / p.sum(-1, keepdims=True)) ** 2).sum(-1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("where", ["one device", "eight devices"])
def test_the_gradient_of_the_table_is_the_unchunked_one_at_every_chunk_size(one_device, eight_devices, where, dtype):
    """Against float64 on the same inputs. The table stays float32 while products are in bfloat16: its gradient is
    summed over chunks, and returned, in float32."""
    mesh = {"one device": one_device, "eight devices": eight_devices}[where]
    rng = np.random.default_rng(2)
    rows, tokens, vocab, width = 4, 160, 96, 32
    hidden = jnp.asarray(rng.normal(size=(rows, tokens, width)), dtype)
    table = jnp.asarray(rng.normal(size=(vocab, width)), dtype).astype(jnp.float32)
    target = jnp.asarray(rng.integers(0, vocab, (rows, tokens)))
    weight = jnp.asarray(rng.uniform(0.5, 1, (rows, tokens)), jnp.float32)

    h, w, scale = (np.asarray(a, np.float64) for a in (hidden, table, weight))
    logits = np.einsum("bmd,vd->bmv", h, w)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    d_logits = (np.eye(vocab)[np.asarray(target)] - p / p.sum(-1, keepdims=True)) * scale[..., None]
    exact = np.einsum("bmv,bmd->vd", d_logits, h)

    def d_table(chunk):
        loss = lambda w: (score.head_logps(hidden, w, None, target, Head(mesh, chunk)) * weight).sum()
        return jax.jit(jax.grad(loss))(table)

    got = {chunk: d_table(chunk) for chunk in (1, 7, 63, 159, 160, 256)}
    assert all(g.dtype == jnp.float32 for g in got.values())
    # Of the largest entry. Measured: 5e-7 in float32; in bfloat16 each product rounds d_logits to 8 bits, whatever the
    # chunk: 9e-4 beside float64, 7e-7 between chunk sizes. Summed in bfloat16, token by token, it is off by 2e-2.
    size = np.abs(exact).max()
    for g in got.values():
        np.testing.assert_allclose(g, exact, atol=size * (1e-5 if dtype == jnp.float32 else 3e-3))
        np.testing.assert_allclose(g, got[160], atol=1e-5 * size)


@pytest.mark.parametrize("used", [(0, 0, 0, 0), (20, 3, 0, 9), (40, 40, 40, 40)])
@pytest.mark.parametrize("where", ["one device", "eight devices"])
def test_the_head_leaves_out_chunks_without_targets(one_device, eight_devices, where, used):
    """Where any row has a target, value and gradients are those of a head that computes all; elsewhere they are 0."""
    mesh = {"one device": one_device, "eight devices": eight_devices}[where]
    rng = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    hidden, table, bias, weight = draw(4, 40, 32), draw(96, 32), draw(96), draw(4, 40)
    target, counts = jnp.asarray(rng.integers(0, 96, (4, 40))), jnp.asarray(used, jnp.int32)
    here = jnp.arange(40)[None] < counts[:, None]

    def run(used_B):
        def weighed(h, w, b):
            logp = score.head_logps(h, w, b, target, Head(mesh, 8), used_B)
            return (jnp.where(here, logp, 0) * weight).sum(), logp

        return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))(hidden, table, bias)

    ((_, got), gradients), ((_, all_), all_gradients) = run(counts), run(None)
    end = -(-max(used) // 8) * 8
    np.testing.assert_array_equal(got[:, :end], all_[:, :end])
    assert not np.asarray(got[:, end:]).any() and np.isfinite(got).all()
    for a, b in zip(gradients, all_gradients):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(float(np.abs(b).max()), 1e-30))


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("where", ["one device", "eight devices"])
def test_a_head_with_bias_and_cap(one_device, eight_devices, where, cap):
    """Phi's bias and Gemma 2's cap, in value and in all three gradients, with the vocabulary whole or split."""
    mesh = {"one device": one_device, "eight devices": eight_devices}[where]
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    hidden, table, bias, weight = draw(4, 20, 32), draw(96, 32), draw(96), draw(4, 20)
    target = jnp.asarray(rng.integers(0, 96, (4, 20)))

    def ours(h, w, b):
        logp, collision = score.head_logps_and_collision(h, w, b, target, Head(mesh, 7, cap))
        return (logp * weight).sum(), collision

    def plain(h, w, b):
        logits = jnp.einsum("bmd,vd->bmv", h, w) + b[None, None]
        logits = jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap))
        logp = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
        return (logp * weight).sum(), jax.nn.logsumexp(2 * logits, axis=-1)

    (got, got_gradients), (want, want_gradients) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(hidden, table, bias) for f in (ours, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)
    for a, b in zip(got_gradients, want_gradients):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max() * 10)


def test_collisions_of_peaked_and_flat_distributions(one_device):
    """Logits up to ±200: log Σ p² lies between -log V and 0, and neither over- nor underflows."""
    hidden = jnp.zeros((2, 48, 32)).at[0, 1, 5].set(200).at[0, 2, 5].set(-200).at[0, 3].set(200)
    target = jnp.zeros((2, 48), jnp.int32)
    _, got = score.head_logps_and_collision(hidden, jnp.eye(96, 32), None, target, Head(one_device, 48))
    np.testing.assert_allclose(got[0, :4], [-np.log(96), 0, -np.log(95), -np.log(32)], rtol=1e-6, atol=1e-6)


def test_packed_equals_unpacked_in_value_and_gradient(params, one_device):
    """One tree a row against all trees in one row, through a nonlinear function of the log-probs."""
    trees = menagerie(1)

    def value_and_grad(plan):
        packed = rowlib.pack(trees, plan)
        sign = rowlib.spread(np.tile([1.0, -1.0], len(trees)), packed.example_BS)

        def loss(p):
            logp, _ = score.row_logps(ARCH, p, packed, mesh=one_device, dtype=jnp.float32)
            margin = (logp * sign).reshape(-1, 2).sum(-1)
            return jax.nn.softplus(-0.1 * margin).sum() - np.log(2) * ((sign.reshape(-1, 2) == 0).all(-1)).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    one = value_and_grad(Plan(128, 128, 2, 1))
    many = value_and_grad(Plan(256, 256, 16, 1))
    padded = value_and_grad(Plan(384, 256, 20, 3))
    np.testing.assert_allclose(one[0], many[0], rtol=1e-6)
    np.testing.assert_allclose(one[0], padded[0], rtol=1e-6)
    for a, b, c in zip(*(jax.tree.leaves(x[1]) for x in (one, many, padded))):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(a).max())
        np.testing.assert_allclose(a, c, atol=2e-6 * np.abs(a).max())


def test_a_branch_changes_no_other_log_prob(params, one_device):
    trees = menagerie(2)
    plan = Plan(256, 256, 16, 1)
    before, _ = logps(params, trees, plan, one_device)
    changed = dataclasses.replace(trees[3], branches=((trees[3].branches[0] + 1) % ARCH.vocab, trees[3].branches[1]))
    after, _ = logps(params, [*trees[:3], changed, *trees[4:]], plan, one_device)
    assert before[6] != after[6]
    np.testing.assert_array_equal(np.delete(before, 6), np.delete(after, 6))


def test_a_plain_text_scores_all_but_its_first_token(params, one_device):
    text = np.arange(1, 12, dtype=np.int32)
    logp, length = logps(params, [Tree("a", text[:0], (text,))], Plan(128, 128, 2, 1), one_device)
    np.testing.assert_allclose(logp[0], numpy_logp(params, text[:1], text[1:]), rtol=2e-5)
    assert length[0] == 10


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 1, 8), (1, 4, 2)])
def test_any_mesh_gives_the_same_log_probs_and_gradients(params, one_device, shape):
    trees = menagerie(3)

    def value_and_grad(mesh):
        packed = rowlib.pack(trees, Plan(128, 128, 4, 8))
        packed = meshes.put(packed, meshes.rows_sharding(mesh))
        where = meshes.shardings(mesh, "train", model.dims(ARCH), params)
        placed = meshes.put(params, where)

        def loss(p):
            sums = score.slot_sums(ARCH, p, packed, mesh=mesh, dtype=jnp.float32, chunk=40, tail=0.5, alignment=True)
            return jnp.tanh(sums.logp_BS / 50).sum(), (sums.logp_BS, sums.alignment_BS)

        return jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=((None, None), where))(placed)

    (_, want), want_grads = value_and_grad(one_device)
    (_, got), got_grads = value_and_grad(meshes.make(*shape))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5), got, want)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads)):
        np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max())


def test_bfloat16_compute_keeps_float32_log_probs(params, one_device):
    trees = menagerie(4)
    exact, _ = logps(params, trees, Plan(128, 128, 8, 1), one_device)
    packed = rowlib.pack(trees, Plan(128, 128, 8, 1))
    logp, _ = score.row_logps(ARCH, params, packed, mesh=one_device, dtype=jnp.bfloat16)
    assert logp.dtype == jnp.float32
    got = rowlib.unpack(np.asarray(logp), packed.example_BS, len(exact))
    np.testing.assert_allclose(got, exact, rtol=0.05)
    assert np.unique(np.asarray(logp)[packed.example_BS >= 0].view(np.uint32) & 0xFFFF).size > 1


# --- a reward model ---------------------------------------------------------------------------------------------------

SCORED = dataclasses.replace(ARCH, scored=True)


@pytest.fixture(scope="module")
def scored_params():
    return jax.device_get(jax.jit(lambda key: model.init(SCORED, key))(jax.random.key(3)))


def without_prompts(seed: int = 0) -> list[Tree]:
    """Trees of which some have no prompt; then a branch of one token is predicted by nothing."""
    trees = menagerie(seed)
    trees[2] = dataclasses.replace(trees[2], prompt=trees[2].prompt[:0])
    trees[4] = dataclasses.replace(trees[4], prompt=trees[4].prompt[:0])
    return trees


def rewards(params, trees, plan, mesh, backend="auto") -> np.ndarray:
    packed = rowlib.pack(trees, plan)
    run = jax.jit(lambda p, r: score.row_rewards(SCORED, p, r, mesh=mesh, dtype=jnp.float32, backend=backend))
    reward_BS, length_BS = run(params, meshes.put(packed, meshes.rows_sharding(mesh)))
    assert reward_BS.dtype == length_BS.dtype == jnp.float32
    empty = packed.example_BS < 0
    assert empty.any() and not np.asarray(reward_BS)[empty].any() and not np.asarray(length_BS)[empty].any()
    return rowlib.unpack(np.asarray(reward_BS), packed.example_BS, sum(len(t.branches) for t in trees))


def test_rewards_equal_a_float64_decoder_at_the_last_token(scored_params, one_device):
    """Packed, of unequal and one-token branches, with prompts and without, beside more than two branches."""
    trees = [
        *without_prompts(),
        Tree("c", np.arange(4, dtype=np.int32), tuple(menagerie(1)[i].branches[0] for i in (0, 1, 3, 4))),
    ]
    got = rewards(scored_params, trees, Plan(128, 128, 8, 1), one_device)
    head = np.asarray(scored_params["score"]["head"][0], np.float64)
    want = [numpy_hidden(scored_params, np.concatenate((t.prompt, b)))[-1] @ head for t in trees for b in t.branches]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    assert np.std(want) > 0.1


def test_last_tokens_are_counted_by_hand():
    trees = without_prompts()
    packed = rowlib.pack(trees, Plan(128, 128, 16, 1))
    last_BS = np.asarray(score.last_tokens(packed))
    flat = [branch for tree in trees for branch in tree.branches]
    seen = set()
    for row, slot in np.argwhere(packed.example_BS >= 0):
        branch, end = flat[packed.example_BS[row, slot]], last_BS[row, slot]
        np.testing.assert_array_equal(packed.tokens_BL[row, end + 1 - len(branch) : end + 1], branch)
        assert packed.branch_BL[row, end] == 1 + packed.example_BS[row, slot] % 2
        seen.add((row, end))
    assert len(seen) == len(flat) and not last_BS[packed.example_BS < 0].any()


def test_rewards_of_packed_rows_are_those_of_single_rows_on_any_mesh(scored_params, one_device, eight_devices):
    trees = without_prompts(2)
    alone = np.concatenate([rewards(scored_params, [t], Plan(128, 128, 4, 1), one_device) for t in trees])
    for plan, mesh in ((Plan(128, 128, 16, 1), one_device), (Plan(128, 128, 8, 4), eight_devices)):
        np.testing.assert_allclose(rewards(scored_params, trees, plan, mesh), alone, rtol=1e-5, atol=2e-6)
