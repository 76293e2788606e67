"""The programs of a run as they run: any split of a batch gives the same update, state is donated, nothing compiles
twice, and no activations cross devices but the head's."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from sera_jax import config, draw, losses, model, programs, sample, score, sera, step
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax.model import Arch
from sera_jax.programs import Compute
from sera_jax.records import Batch, Rows, Tree
from sera_jax.rows import Plan
from sera_jax.step import TrainState

ARCH = Arch("llama", 48, 16, 2, 4, 2, 4, 24, 1e-5, 1e4, tied=False, init_std=0.3)
COMPUTE = Compute(jnp.float32, "none", 24)  # rematerialisation is tested with the model; the last tests have it
SCHEDULE = {"peak": 0.1, "schedule": "constant", "warmup": 0.0}
# Its state is the gradient itself.
GRADIENT = optax.trace(decay=0.0)

UNPAIRED_KEYS = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
# On the real model; every other loss of the table below, on a smaller one.
LOSSES = {
    "dpo": (losses.LOSSES["dpo"], {"beta": 0.3, "label_smoothing": 0.1}),
    "kto_pair": (losses.LOSSES["kto_pair"], {"beta": 0.3}),
    "simpo": (losses.LOSSES["simpo"], {"beta": 0.3, "gamma": 0.5}),
    "mixture": (
        losses.mixture({"dpo": 1.0, "kto_pair": 0.5, "ipo": 0.1}, sft_weight=0.2),
        {"beta": 0.3, "label_smoothing": 0.1, "normalisation": "sum"},
    ),
    "ld_wpo": (losses.LOSSES["dpo"], {"beta": 0.3}),
    "sppo": (losses.LOSSES["sppo"], {"beta": 3.0}),
    "kto": (losses.LOSSES["kto"], UNPAIRED_KEYS),
    "apo_zero_unpaired": (losses.LOSSES["apo_zero_unpaired"], UNPAIRED_KEYS),
}
OPTIONS = {"ld_wpo": {"ld_alpha": 0.4, "weighting": losses.wpo}}  # of the update, beside the loss
# Layout → (devices, plan of a microbatch, how the trees below lie in it). The first two share their programs.
LAYOUTS = {
    "all in one row": (1, Plan(160, 160, 16, 2), "packed"),  # one microbatch: all trees in a row, and an empty row
    "one tree a row": (1, Plan(160, 160, 16, 2), "apart"),  # four microbatches of two rows, the last row empty
    "eight devices": (8, Plan(96, 96, 10, 4), "packed"),  # rows of several trees, two of four rows empty
}


def trees_of(branches: int = 2, seed: int = 0) -> list[Tree]:
    """Seven trees: one-token branches, unequal branches, a single-token prompt, a branch far longer than the others."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(0, ARCH.vocab, n).astype(np.int32)
    shapes = [(5, 7, 3), (1, 1, 9), (6, 1, 1), (3, 30, 2), (4, 4, 4), (8, 6, 12), (2, 2, 2)]
    branched = [(ids(p), tuple(ids(n) for n in (a, b)[:branches])) for p, a, b in shapes]
    # Labels are read by unpaired losses alone.
    return [Tree(f"t{i}", *both, label=(-1) ** (i % 3)) for i, both in enumerate(branched)]


TREES = trees_of()
# Somewhat below the policy's log-probs, so that the KL estimates of kto_pair are not cut off at 0.
REFERENCE_F = -5.2 * np.array([n for t in TREES for n in map(len, t.branches)], np.float32) + np.arange(14) % 3 - 1
WEIGHT_N = np.array([1, 0.5, 2, 1, 1, 0.25, 1], np.float32)
LABEL_N = np.array([tree.label for tree in TREES])
WIN_N2 = np.random.default_rng(3).uniform(size=(len(TREES), 2)).astype(np.float32)
TOLD = [dataclasses.replace(tree, values=tuple(win.tolist())) for tree, win in zip(TREES, WIN_N2)]  # of wins


def laid(trees, plan: Plan, how: str) -> Rows:
    """Rows of trees: packed, or each tree in a row of its own."""
    if how == "packed":
        return rowlib.pack(trees, plan)
    alone = dataclasses.replace(plan, rows=1)
    rows = [rowlib.pack([tree], alone) for tree in trees]
    first = np.cumsum([0, *(len(tree.branches) for tree in trees)])
    rows = [
        dataclasses.replace(r, example_BS=np.where(r.example_BS >= 0, r.example_BS + first[i], -1).astype(np.int32))
        for i, r in enumerate(rows)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows, rowlib.empty(-len(rows) % plan.rows, plan))


def batch_of(
    trees, plan: Plan, reference_F, weight_N, mesh, most: int | None = None, how: str = "packed"
) -> tuple[Batch, int]:
    packed = laid(trees, plan, how)
    stacked, count = rowlib.microbatches(packed, plan, most or len(packed.tokens_BL) // plan.rows)
    branches = len(trees[0].branches)
    batch = Batch(
        stacked,
        rowlib.spread(reference_F, stacked.example_BS),
        rowlib.spread(np.repeat(weight_N, branches), stacked.example_BS),
        rowlib.spread(np.concatenate([tree.told for tree in trees]), stacked.example_BS),
        np.int32(count),
    )
    return meshes.put(batch, programs.batch_shardings(mesh)), count


@functools.cache
def mesh_of(devices: int):
    return meshes.make(2, 2, 2) if devices == 8 else meshes.make(1, 1, 1, jax.devices()[:1])


@functools.cache
def host_params() -> dict:
    return jax.device_get(jax.jit(lambda key: model.init(ARCH, key))(jax.random.key(0)))


def new_state(mesh, transform=GRADIENT) -> TrainState:
    params = meshes.put(host_params(), programs.param_shardings(ARCH, mesh))
    return programs.fresh_state(ARCH, mesh, transform)(params)


def small(mesh, total: int = 10, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    whole = meshes.replicated(mesh)
    return meshes.put(np.int32(total), whole), jax.device_put(jax.random.key(seed), whole)


@functools.cache
def update_of(name: str, devices: int):
    loss, keys = LOSSES[name]
    mesh, options = mesh_of(devices), OPTIONS.get(name, {})
    return programs.preference_update(ARCH, mesh, COMPUTE, GRADIENT, loss, keys, SCHEDULE, **options)


@functools.cache
def updated(name: str, layout: str) -> tuple[dict, dict, dict]:
    """(gradient, new weights, metrics) of one update, on the host."""
    devices, plan, how = LAYOUTS[layout]
    mesh, update = mesh_of(devices), update_of(name, devices)
    trees = TOLD if LOSSES[name][0].target == "win" else TREES
    batch, count = batch_of(trees, plan, REFERENCE_F, WEIGHT_N, mesh, most=4 if devices == 1 else 1, how=how)
    assert count == {"all in one row": 1, "one tree a row": 4, "eight devices": 1}[layout]
    state, metrics = update(new_state(mesh), {}, batch, *small(mesh))
    assert int(state.step) == 1
    return meshes.get((state.moments.trace, state.params, metrics))


def test_the_layouts_are_what_they_say():
    trees = {name: laid(TREES, plan, how).tree_BL.max(axis=1) for name, (_, plan, how) in LAYOUTS.items()}
    assert trees["all in one row"].tolist() == [7, 0] and trees["one tree a row"].tolist() == [1] * 7 + [0]
    assert trees["eight devices"].max() >= 3 and (trees["eight devices"] == 0).sum() == 2


@pytest.mark.parametrize("layout", ["one tree a row", "eight devices"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_split_of_a_batch_gives_the_same_update(name, layout):
    """Seven pairs in one row, in four microbatches of a pair a row, and packed on eight devices."""
    grads, params, metrics = updated(name, "all in one row")
    other_grads, other_params, other = updated(name, layout)
    assert set(metrics) == set(other) and float(metrics["loss"]) != 0
    # The mixture holds IPO's square, which doubles relative rounding (jax 0.12: loss 1.1e-6, gradient 5.7e-6).
    scale = 2 if name == "mixture" else 1
    for key in metrics:
        rtol = scale * (1e-5 if key == "grad_norm" else 4e-6)  # a margin cancels: 2.1e-6 on one kind of CPU
        np.testing.assert_allclose(other[key], metrics[key], rtol=rtol, err_msg=key)
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=scale * 1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads)):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(b, a, atol=scale * 5e-6 * np.abs(a).max())
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other_params)):
        np.testing.assert_allclose(b, a, rtol=scale * 1e-6, atol=SCHEDULE["peak"] * scale * 5e-6 * largest)


SCORED = dataclasses.replace(ARCH, scored=True)
BRADLEY_TERRY = {"margin": 0.5, "center": 0.05, "length_alpha": 0.02}
SCORE_F = np.arange(14, dtype=np.float32) % 5 / 4  # the annotator's


@functools.cache
def scored_params() -> dict:
    return jax.device_get(jax.jit(lambda key: model.init(SCORED, key))(jax.random.key(1)))


@functools.cache
def reward_updated(layout: str, remat: str = "none") -> tuple[dict, dict]:
    """(gradient, metrics) of one update of a reward model, on the host."""
    devices, plan, how = LAYOUTS[layout]
    mesh, compute = mesh_of(devices), dataclasses.replace(COMPUTE, remat=remat)
    update = programs.reward_update(SCORED, mesh, compute, GRADIENT, BRADLEY_TERRY, SCHEDULE)
    batch, _ = batch_of(TREES, plan, SCORE_F, WEIGHT_N, mesh, most=4 if devices == 1 else 1, how=how)
    params = meshes.put(scored_params(), programs.param_shardings(SCORED, mesh))
    state, metrics = update(programs.fresh_state(SCORED, mesh, GRADIENT)(params), {}, batch, *small(mesh))
    return meshes.get((state.moments.trace, metrics))


@pytest.mark.parametrize("layout, remat", [("one tree a row", "full"), ("eight devices", "full")])
def test_any_split_of_a_batch_gives_the_same_update_of_a_reward_model(layout, remat):
    grads, metrics = reward_updated("all in one row")
    other_grads, other = reward_updated(layout, remat)
    assert set(metrics) == set(other) >= {"loss", "rewards/margins", "rewards/accuracies", "grad_norm"}
    for key in metrics:
        np.testing.assert_allclose(other[key], metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads)):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(b, a, atol=5e-6 * np.abs(a).max())


def test_the_update_of_a_reward_model_follows_the_gradient_of_the_weighted_mean():
    """Of losses written out here, of each branch in a row of its own."""
    m, center, alpha = BRADLEY_TERRY.values()
    rows = [rowlib.pack([Tree("", t.prompt, (b,))], Plan(48, 48, 1, 1)) for t in TREES for b in t.branches]
    together = jax.tree.map(lambda *a: np.concatenate(a), *rows)
    length_P2 = np.array([[len(b) for b in t.branches] for t in TREES])
    score_P2 = SCORE_F.reshape(-1, 2)

    def whole(params):
        reward_BS, _ = score.row_rewards(SCORED, params, together, mesh=mesh_of(1), dtype=jnp.float32)
        w, l = reward_BS.reshape(-1, 2).T
        z = w - l + alpha * (length_P2[:, 0] - length_P2[:, 1]) - m * (score_P2[:, 0] - score_P2[:, 1])
        return jnp.sum(WEIGHT_N * (jnp.log1p(jnp.exp(-z)) + center * (w + l) ** 2)) / WEIGHT_N.sum(), (w, l)

    (loss, (w, l)), want = jax.jit(jax.value_and_grad(whole, has_aux=True))(scored_params())
    grads, metrics = reward_updated("all in one row")
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], np.average(w - l, weights=WEIGHT_N), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["rewards/accuracies"], np.average(w > l, weights=WEIGHT_N), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(grads)):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


# --- policy gradients: every tree two candidates, of whom the last takes no part -------------------------------------

POLICY = {
    "ppo": {"ratio": "token", "average": "token", "clip": 0.2, "clip_high": 0.3, "beta": 0.1},
    "rloo": {"ratio": "sequence", "average": "sequence", "clip": 0.2, "clip_high": 0.2, "beta": 0.0},
}
ADVANTAGE_F = np.random.default_rng(5).normal(size=14).astype(np.float32)
ADVANTAGE_F[-1] = np.nan
SAMPLED = [dataclasses.replace(t, values=tuple(a.tolist())) for t, a in zip(TREES, ADVANTAGE_F.reshape(-1, 2))]


@functools.cache
def known_tokens() -> dict[str, list[np.ndarray]]:
    """By flat branch number, of each token: somewhat beside the policy's own log-probs."""
    scorer, mesh, plan = programs.token_scorer(ARCH, mesh_of(1), COMPUTE), mesh_of(1), Plan(160, 160, 16, 2)
    params = meshes.put(host_params(), programs.param_shardings(ARCH, mesh))
    own_F = score.token_logps(TREES, programs.score_rows(scorer, params, mesh), plan)
    rng = np.random.default_rng(6)
    beside = lambda: [(logp + 0.3 * rng.normal(size=len(logp))).astype(np.float32) for logp in own_F]
    return {"old": beside(), "reference": beside()}


@functools.cache
def policy_updated(name: str, layout: str) -> tuple[dict, dict]:
    """(gradient, metrics) of one update, on the host."""
    devices, plan, how = LAYOUTS[layout]
    mesh, names = mesh_of(devices), ("old", "reference") if POLICY[name]["beta"] else ("old",)
    update = programs.policy_update(ARCH, mesh, COMPUTE, GRADIENT, POLICY[name], SCHEDULE, tokens=names)
    batch, _ = batch_of(SAMPLED, plan, np.zeros(14), np.ones(7), mesh, most=4 if devices == 1 else 1, how=how)
    rows = meshes.get(batch.rows)
    tokens = {n: rowlib.spread_tokens(known_tokens()[n], rows.example_BS, rows.slot_BM) for n in names}
    batch = dataclasses.replace(batch, tokens=meshes.put(tokens, programs.batch_shardings(mesh, names).tokens))
    state, metrics = update(new_state(mesh), {}, batch, *small(mesh))
    return meshes.get((state.moments.trace, metrics))


@pytest.mark.parametrize("layout", ["one tree a row", "eight devices"])
@pytest.mark.parametrize("name", POLICY)
def test_any_split_of_a_batch_gives_the_same_policy_update(name, layout):
    grads, metrics = policy_updated(name, "all in one row")
    other_grads, other = policy_updated(name, layout)
    assert set(metrics) == set(other) and float(metrics["clip_ratio/region_mean"]) > 0
    for key in metrics:
        np.testing.assert_allclose(other[key], metrics[key], rtol=2e-5, atol=1e-6, err_msg=key)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads)):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())


@pytest.mark.parametrize("name", POLICY)
def test_a_policy_update_follows_the_gradient_of_the_clipped_loss(name):
    """Written out here, of each candidate in a row of its own, token by token."""
    keys, known = POLICY[name], known_tokens()
    rows = [rowlib.pack([Tree("", t.prompt, (b,))], Plan(48, 48, 1, 1)) for t in TREES for b in t.branches]
    together = jax.tree.map(lambda *a: np.concatenate(a), *rows)

    def whole(params):
        how = {"mesh": mesh_of(1), "dtype": jnp.float32}
        logp_BM = score.row_token_logps(ARCH, params, together, **how)
        total, weight = 0.0, 0.0
        for f, advantage in enumerate(ADVANTAGE_F[:-1]):
            length = len(known["old"][f])
            logp_T = logp_BM[f, :length]
            apart_T = logp_T - known["old"][f]
            ratio_T = jnp.exp(apart_T if name == "ppo" else jnp.sum(apart_T)) * jnp.ones(length)
            cut_T = jnp.clip(ratio_T, 1 - keys["clip"], 1 + keys["clip_high"])
            loss_T = -jnp.minimum(ratio_T * advantage, cut_T * advantage)
            x_T = known["reference"][f] - logp_T
            loss_T += keys["beta"] * (jnp.exp(x_T) - x_T - 1)
            share = 1.0 if keys["average"] == "token" else 1 / length
            total, weight = total + share * jnp.sum(loss_T), weight + share * length
        return total / weight

    loss, want = jax.jit(jax.value_and_grad(whole))(host_params())
    grads, metrics = policy_updated(name, "all in one row")
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(grads)):
        np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())


ALONE = Plan(48, 48, 2, 1)


def direct(params, plan=ALONE, trees=TREES, **options) -> score.SlotSums:
    """What a forward pass says of every branch by flat number, all rows in one."""
    packed = rowlib.pack(trees, plan)
    sums = score.slot_sums(ARCH, params, packed, mesh=mesh_of(1), dtype=jnp.float32, **options)
    flat = np.argsort(packed.example_BS.reshape(-1), kind="stable")[-sum(len(t.branches) for t in trees) :]
    return jax.tree.map(lambda a: a.reshape(-1)[flat], sums)


def told(name, logp_P2, reward_P2) -> dict[str, float]:
    """The metrics of an update, from all examples at once, in float64."""
    logp_P2, reward_P2 = (np.asarray(a, np.float64) for a in (logp_P2, reward_P2))
    unpaired = LOSSES[name][0].unpaired
    side = np.stack([LABEL_N > 0, LABEL_N < 0]) if unpaired else np.ones((2, len(TREES)))
    column = (0, 0) if unpaired else (0, 1)
    mean = lambda value_P2, s: np.average(value_P2[:, column[s]], weights=WEIGHT_N * side[s])
    out = {
        f"{kind}/{which}": mean(value_P2, s)
        for kind, value_P2 in (("rewards", reward_P2), ("logps", logp_P2))
        for s, which in enumerate(("chosen", "rejected"))
    }
    out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
    if name == "kto":
        return out | {"kl": (logp_P2 - REFERENCE_F.reshape(-1, 2))[:, 1].mean()}
    if unpaired:
        return out
    return out | {"rewards/accuracies": np.average(reward_P2[:, 0] > reward_P2[:, 1], weights=WEIGHT_N)}


@pytest.mark.parametrize("name", ["dpo", "kto_pair", "mixture", "ld_wpo", "sppo", "kto", "apo_zero_unpaired"])
def test_the_update_follows_the_gradient_of_the_global_loss(name):
    """Σ weight·loss / Σ weight over all pairs at once; the coupled losses see the whole batch."""
    loss, keys = LOSSES[name]

    def whole(params):
        sums = direct(params, tail=OPTIONS.get(name, {}).get("ld_alpha", 1.0), alignment=name == "ld_wpo")
        logp_P2, length_P2 = (a.reshape(-1, 2) for a in (sums.logp_BS, sums.length_BS))
        valid = (jnp.ones(len(TREES), bool),) if loss.coupled else ()
        label = (jnp.asarray(LABEL_N),) if loss.unpaired else (jnp.asarray(WIN_N2),) if name == "sppo" else ()
        loss_P = loss.loss(logp_P2, jnp.asarray(REFERENCE_F).reshape(-1, 2), length_P2, *valid, *label, **keys)
        if name == "ld_wpo":
            weight_P = jnp.minimum(jnp.exp((sums.alignment_BS.reshape(-1, 2) / length_P2).sum(1)), 1)
            loss_P *= jax.lax.stop_gradient(weight_P)
        reward_P2 = loss.reward(logp_P2, REFERENCE_F.reshape(-1, 2), length_P2, **keys)
        return jnp.sum(WEIGHT_N * loss_P) / WEIGHT_N.sum(), (logp_P2, reward_P2)

    (value, (logp_P2, reward_P2)), want = jax.jit(jax.value_and_grad(whole, has_aux=True))(host_params())
    grads, params, metrics = updated(name, "one tree a row")
    if name != "ld_wpo":
        assert (np.mean(logp_P2 - REFERENCE_F.reshape(-1, 2), axis=0) > 0.5).all()
    last = {"loss": float(value), "grad_norm": float(optax.tree.norm(want)), "learning_rate": SCHEDULE["peak"]}
    assert metrics == pytest.approx(told(name, logp_P2, reward_P2) | last, rel=1e-5)
    for got, expected, after, before in zip(*map(jax.tree.leaves, (grads, want, params, host_params()))):
        np.testing.assert_allclose(got, expected, atol=5e-6 * np.abs(expected).max())
        np.testing.assert_allclose(after, before - SCHEDULE["peak"] * got, rtol=1e-6, atol=1e-7)


# Every loss of the table that is of pairs (the others are above, on the real model) in the program of an update,
# compiled once for all of them: a number that rides on the lengths tells which, and the language model is the smallest
# there is, where a token hangs on the one before it. Rows, the loop over microbatches, the two passes of coupled
# losses, shardings and update are the real ones.
PAIRED = {name: loss for name, loss in losses.LOSSES.items() if not loss.unpaired}
BIGRAM = Arch("llama", 48, 8, 1, 2, 2, 4, 8, 1e-5, 1e4, tied=False, init_std=0.3)
KEYS = dataclasses.asdict(config.LossConfig(beta=0.3, label_smoothing=0.1, normalisation="mean", gamma=0.5))
BIGRAM_REFERENCE_F = (
    -4.1 * np.array([n for t in TREES for n in map(len, t.branches)], np.float32) + np.arange(14) % 3 - 1
)
PICK = 1000.0


def bigram(params: dict, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """logp_BS, length_BS."""
    before_BMD = params["embed"]["table"][jnp.take_along_axis(rows.tokens_BL, rows.parent_BM, axis=1)]
    logp_BMV = jax.nn.log_softmax(before_BMD @ params["head"]["table"].T)
    by_slot = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=rows.example_BS.shape[1]))
    logp_BM = jnp.take_along_axis(logp_BMV, rows.target_BM[:, :, None], axis=2)[..., 0]
    return by_slot(logp_BM, rows.slot_BM), by_slot(jnp.ones_like(logp_BM), rows.slot_BM)


def picked_slot_sums(arch, params, rows: Rows, **_) -> score.SlotSums:
    """In the place of score.slot_sums: the first scale of the last norm is the number of the loss."""
    logp_BS, length_BS = bigram(params, rows)
    return score.SlotSums(logp_BS, length_BS + PICK * jax.lax.stop_gradient(params["final_norm"]["scale"][0]), None)


@functools.cache
def any_of(coupled: bool, devices: int):
    """(names of the losses that are coupled or not, how a state begins, the update by the loss that is picked)."""
    rows = {name: loss for name, loss in PAIRED.items() if loss.coupled == coupled}
    keys = [{key: KEYS[key] for key in ("beta", *loss.keys)} for loss in rows.values()]

    def pick(part):
        def member(loss, keys):
            valid = lambda batch: batch[:1] if coupled else ()
            batch = lambda all_: (*valid(all_), *losses.told(loss, all_[-1])) if all_ else ()
            return lambda logp, reference, length, *all_: getattr(loss, part)(
                logp, reference, length, *batch(all_), **keys
            )

        branches = [member(loss, keys) for loss, keys in zip(rows.values(), keys)]

        def run(logp_P2, reference_P2, length_P2, *batch):
            number = (jnp.max(length_P2) // PICK).astype(jnp.int32)
            return jax.lax.switch(number, branches, logp_P2, reference_P2, length_P2 % PICK, *batch)

        return run

    either = losses.Loss(pick("loss"), pick("reward"), reference=True, coupled=coupled, target="win")
    mesh = mesh_of(devices)
    update = programs.preference_update(BIGRAM, mesh, COMPUTE, GRADIENT, either, {}, SCHEDULE)
    return list(rows), programs.fresh_state(BIGRAM, mesh, GRADIENT), update


@functools.cache
def bigram_params() -> dict:
    return jax.device_get(jax.jit(lambda key: model.init(BIGRAM, key))(jax.random.key(1)))


@pytest.mark.parametrize("name", PAIRED)
def test_any_split_of_a_batch_gives_the_same_update_for_every_loss(name, monkeypatch):
    monkeypatch.setattr(score, "slot_sums", picked_slot_sums)
    loss, seen = PAIRED[name], []
    for devices, plan, how in LAYOUTS.values():
        mesh, (names, begin, update) = mesh_of(devices), any_of(loss.coupled, devices)
        most = 4 if devices == 1 else 1
        batch, _ = batch_of(TOLD, plan, BIGRAM_REFERENCE_F, WEIGHT_N, mesh, most=most, how=how)
        params = bigram_params() | {"final_norm": {"scale": np.full(BIGRAM.width, names.index(name), np.float32)}}
        state = begin(meshes.put(params, programs.param_shardings(BIGRAM, mesh)))
        state, metrics = update(state, {}, batch, *small(mesh))
        seen.append(meshes.get((state.moments.trace, metrics)))
    (grads, metrics), *others = seen
    for other_grads, other in others:
        for key in metrics:
            np.testing.assert_allclose(other[key], metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)
        for part in ("embed", "head"):
            want = grads[part]["table"]
            assert np.abs(want).max() > 0
            np.testing.assert_allclose(other_grads[part]["table"], want, atol=1e-5 * np.abs(want).max())

    # And it is the loss of the whole batch at once.
    packed = rowlib.pack(TREES, ALONE)
    flat = np.argsort(packed.example_BS.reshape(-1), kind="stable")[-14:]
    logp_P2, length_P2 = (a.reshape(-1)[flat].reshape(-1, 2) for a in bigram(bigram_params(), packed))
    valid = (jnp.ones(len(TREES), bool),) if loss.coupled else ()
    keys = {key: KEYS[key] for key in ("beta", *loss.keys)}
    told = losses.told(loss, jnp.asarray(WIN_N2))
    loss_P = loss.loss(logp_P2, BIGRAM_REFERENCE_F.reshape(-1, 2), length_P2, *valid, *told, **keys)
    assert float(metrics["loss"]) == pytest.approx(float(np.average(loss_P, weights=WEIGHT_N)), rel=1e-5)


def test_supervised_updates_are_means_over_tokens():
    trees = trees_of(branches=1)
    plan, mesh = Plan(48, 48, 2, 2), mesh_of(1)
    update = programs.sft_update(ARCH, mesh, COMPUTE, GRADIENT, SCHEDULE)
    batch, count = batch_of(trees, plan, np.zeros(7, np.float32), np.ones(7, np.float32), mesh)
    assert count > 1

    def whole(params):
        return -jnp.sum(direct(params, plan, trees).logp_BS) / sum(len(t.branches[0]) for t in trees)

    value, want = jax.jit(jax.value_and_grad(whole))(host_params())
    state, metrics = update(new_state(mesh), {}, batch, *small(mesh))
    assert set(metrics) == {"loss", "grad_norm", "learning_rate"}
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    for got, expected in zip(jax.tree.leaves(state.moments.trace), jax.tree.leaves(want)):
        np.testing.assert_allclose(got, expected, atol=5e-6 * np.abs(expected).max())


ADAM = step.optimizer(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, clip=1.0, decays=programs.decaying(ARCH))


def test_an_update_compiles_once_and_takes_its_state_over(eight_devices):
    """Batches of other trees, other microbatch counts, other stage lengths, other keys: one program; old buffers go."""
    loss, keys = LOSSES["dpo"]
    schedule = {"peak": 1e-2, "schedule": "cosine", "warmup": 0.1}
    update = programs.preference_update(ARCH, eight_devices, COMPUTE, ADAM, loss, keys, schedule)
    state, seen = new_state(eight_devices, ADAM), []
    for seed, trees, total in [(0, 7, 10), (1, 7, 20), (2, 2, 10), (3, 5, 3)]:
        chosen = trees_of(seed=seed)[:trees]
        batch, count = batch_of(
            chosen, Plan(48, 48, 2, 4), REFERENCE_F[: 2 * trees], WEIGHT_N[:trees], eight_devices, most=3
        )
        before, state_before = jax.tree.leaves(state), state
        state, metrics = update(state, {}, batch, *small(eight_devices, total, seed))
        assert all(a.is_deleted() for a in before)
        shardings = jax.tree.map(lambda a: a.sharding, state)
        where = programs.state_shardings(ARCH, eight_devices, ADAM)
        jax.tree.map(lambda a, s, w: a.is_equivalent_to(w, s.ndim) or pytest.fail(f"{a}"), shardings, state, where)
        seen.append((count, float(metrics["learning_rate"])))
        assert np.isfinite(float(metrics["loss"]))
    del state_before
    assert update._cache_size() == 1 and int(state.step) == 4
    assert len({count for count, _ in seen}) > 1 and len({rate for _, rate in seen}) > 1


# --- weights and state ------------------------------------------------------------------------------------------------


def test_moments_lie_where_their_weights_do(eight_devices):
    where = programs.state_shardings(ARCH, eight_devices, ADAM)
    adam = next(part for part in where.moments if hasattr(part, "mu"))
    assert adam.mu == adam.nu == where.params == programs.param_shardings(ARCH, eight_devices)
    assert where.step.is_fully_replicated and adam.count.is_fully_replicated
    assert not where.params["head"]["table"].is_fully_replicated
    abstract = programs.abstract_state(ARCH, eight_devices, ADAM)
    state = new_state(eight_devices, ADAM)
    assert jax.tree.structure(abstract) == jax.tree.structure(state) == jax.tree.structure(where)
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding) or pytest.fail(f"{a} {b}"),
        abstract,
        state,
    )


def test_a_fresh_state_has_no_moments_and_takes_the_weights_over(eight_devices):
    params = meshes.put(host_params(), programs.param_shardings(ARCH, eight_devices))
    state = programs.fresh_state(ARCH, eight_devices, ADAM)(params)
    assert all(a.is_deleted() for a in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, meshes.get(state.params), host_params())
    assert not any(np.asarray(a).any() for a in jax.tree.leaves(state.moments)) and int(state.step) == 0


def test_decay_is_for_matrices(eight_devices):
    flat = jax.tree.leaves_with_path(programs.decaying(ARCH))
    assert {path[-1].key for path, decays in flat if not decays} == {"scale"}
    assert all(decays is (path[-1].key != "scale") for path, decays in flat)


def test_weights_move_to_the_decode_layout(eight_devices):
    params = meshes.put(host_params(), programs.param_shardings(ARCH, eight_devices))
    got = programs.to_decode(ARCH, eight_devices, jnp.bfloat16)(params)
    where = programs.param_shardings(ARCH, eight_devices, "decode")
    jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim) or pytest.fail(f"{a.sharding} {s}"), got, where)
    assert where["head"]["table"] != programs.param_shardings(ARCH, eight_devices)["layers"]["mlp"]["up"]
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), b.astype(jnp.bfloat16)),
        meshes.get(got),
        host_params(),
    )


def test_a_blend_is_a_weighted_mean(eight_devices):
    where = programs.param_shardings(ARCH, eight_devices)
    a, b = host_params(), jax.tree.map(lambda w: np.flip(w), host_params())
    got = programs.blend(ARCH, eight_devices, jnp.bfloat16)(meshes.put(a, where), meshes.put(b, where), 0.75)
    for x, y, z in zip(*map(jax.tree.leaves, (a, b, meshes.get(got)))):
        assert z.dtype == jnp.bfloat16
        np.testing.assert_allclose(z.astype(np.float32), 0.75 * x + 0.25 * y, rtol=2**-8, atol=1e-6)


def test_the_scorer_is_row_logps_on_every_process(eight_devices):
    packed = rowlib.pack(TREES, Plan(96, 96, 8, 4))
    params = meshes.put(host_params(), programs.param_shardings(ARCH, eight_devices))
    program = programs.scorer(ARCH, eight_devices, COMPUTE)
    got = program(params, meshes.put(packed, meshes.rows_sharding(eight_devices)))
    assert got.dtype == jnp.float32 and got.sharding.is_fully_replicated
    want, _ = jax.jit(
        lambda p, r: score.row_logps(ARCH, p, r, mesh=mesh_of(1), dtype=jnp.float32),
    )(host_params(), packed)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-5)
    bound = programs.score_rows(program, params, eight_devices)
    np.testing.assert_array_equal(bound(packed), got)


# --- selection --------------------------------------------------------------------------------------------------------


def signals(n: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "logp_EN2": rng.normal(size=(2, n, 2), scale=5).astype(np.float32),
        "reward_reference_N2": rng.normal(size=(n, 2), scale=5).astype(np.float32),
        "loss_reference_N2": rng.normal(size=(n, 2), scale=5).astype(np.float32),
        "length_N2": rng.integers(1, 40, (n, 2)).astype(np.float32),
        "target_N2": rng.uniform(size=(n, 2)).astype(np.float32),
        "reward_gap_N": rng.normal(size=n).astype(np.float32),
        "gold_N": rng.normal(size=n).astype(np.float32),
        "gap_N": rng.integers(0, 4, n).astype(np.float32),  # many ties
        "valid_N": np.arange(n) < n - 5,
        "group_N": rng.integers(0, 3, n).astype(np.int32),
        "example_N": np.arange(n, dtype=np.int32),
        "keep_G": np.array([5, 9, 11], np.int32),
        "weights_E": np.array([0.3, 0.7], np.float32),
    }


def placed(mesh, changes: dict | None = None) -> dict[str, jax.Array]:
    where = programs.selector_shardings(mesh)
    arrays = {name: meshes.put(a, where[name]) for name, a in (signals() | (changes or {})).items()}
    return arrays | {"key": jax.device_put(jax.random.key(5), where["key"])}


@functools.cache
def select(devices: int, score_name: str, rule: str):
    loss, keys = LOSSES["dpo"]
    return programs.selector(mesh_of(devices), loss, keys, score_name=score_name, rule=rule, threshold=0.1)


@pytest.mark.parametrize("score_name, rule", [*((s, "top_k") for s in sera.SCORES), ("irm", "middle"), ("irm", "all")])
def test_one_and_eight_devices_select_the_same(score_name, rule):
    """With no transfer on the way: from the arrays on the devices to the mask on the devices."""
    out = {}
    for devices in (1, 8):
        program, arrays = select(devices, score_name, rule), placed(mesh_of(devices))
        text = program.lower(**arrays).as_text()
        assert "callback" not in text
        with jax.transfer_guard("disallow"):
            got = program(**arrays)
        out[devices] = meshes.get(got)
    one, eight = out[1], out[8]
    np.testing.assert_array_equal(one["mask_N"], eight["mask_N"])
    for name in ("score_N", "margin_N", "reward_N2"):
        np.testing.assert_allclose(one[name], eight[name], rtol=1e-5, atol=1e-6)
    given = signals()
    reward = 0.3 * np.tensordot(given["weights_E"], given["logp_EN2"] - given["reward_reference_N2"], axes=1)
    np.testing.assert_allclose(one["reward_N2"], reward, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one["margin_N"], reward[:, 0] - reward[:, 1], rtol=1e-4, atol=1e-4)
    assert one["bad"].tolist() == [0, 64]
    kept = one["mask_N"] & given["valid_N"]
    assert (one["mask_N"] == kept).all()
    counts = np.bincount(given["group_N"][kept], minlength=3)
    assert counts.tolist() == ([5, 9, 11] if rule != "all" else np.bincount(given["group_N"][:59]).tolist())


def test_the_guard_sees_a_transfer():
    arrays = placed(mesh_of(8)) | {"valid_N": signals()["valid_N"]}  # on the host
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="[Dd]isallowed"):
        select(8, "irm", "top_k")(**arrays)


def test_the_score_called_loss_is_that_of_the_current_policy():
    got = meshes.get(select(1, "loss", "top_k")(**placed(mesh_of(1))))
    loss, keys = LOSSES["dpo"]
    given = signals()
    want = -loss.loss(given["logp_EN2"][-1], given["loss_reference_N2"], given["length_N2"], **keys)
    np.testing.assert_allclose(got["score_N"], want, rtol=1e-6)


def test_scores_that_are_not_finite_are_reported():
    gap = signals()["gap_N"].copy()
    gap[[11, 30, 62]] = np.nan  # 62 is padding
    for devices in (1, 8):
        got = meshes.get(select(devices, "annotator_gap", "top_k")(**placed(mesh_of(devices), {"gap_N": gap})))
        assert got["bad"].tolist() == [2, 11]
        # Where all are kept nobody ranks: only the margins have to be finite.
        got = meshes.get(select(devices, "annotator_gap", "all")(**placed(mesh_of(devices), {"gap_N": gap})))
        assert got["bad"].tolist() == [0, 64] and got["mask_N"].sum() == 59
    logp = signals()["logp_EN2"].copy()
    logp[0, 7, 1] = np.inf
    assert meshes.get(select(1, "irm", "all")(**placed(mesh_of(1), {"logp_EN2": logp})))["bad"].tolist() == [1, 7]


def test_other_ensemble_weights_compile_nothing():
    program = select(1, "irm", "middle")
    for weights in ([1.0, 0.0], [0.5, 0.5]):
        program(**placed(mesh_of(1), {"weights_E": np.array(weights, np.float32)}))
    assert program._cache_size() == 1


# --- what crosses devices ---------------------------------------------------------------------------------------------

# Sizes that tell from a shape alone what an array is. Per device 13 rows; nothing below is run, only compiled.
WIDE = Arch("llama", 88, 40, 7, 9, 3, 6, 56, 1e-5, 1e4, tied=False)
LOCAL, LENGTH, TARGETS, CHUNK, SLOTS, MICROBATCHES = 13, 67, 61, 17, 14, 3
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)


def collectives(program: str) -> list[tuple[str, tuple[int, ...]]]:
    """(operation, shape) of every array that crosses devices in a compiled program; of an asynchronous or combined one
    each."""
    found = []
    for line in program.splitlines():
        match = COLLECTIVE.search(line)
        if match:
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                found.append((match[2], tuple(int(n) for n in shape.split(",") if n)))
    return found


def unexplained(program: str, mesh, coupled: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    """Collectives that are neither of weights, gradients and scalars nor the head's chunks; a coupled loss may also see
    one number of every branch slot of the batch."""
    fsdp, shards = mesh.shape["fsdp"], meshes.row_shards(mesh)
    a = WIDE
    weight_dims = {a.layers, a.vocab, a.width, a.heads, a.kv_heads, a.head_dim, a.mlp}
    weight_dims |= {a.heads * a.head_dim, a.kv_heads * a.head_dim}
    weight_dims |= {n // k for n in (a.vocab, a.width) for k in (2, 4, 8) if n % k == 0}
    padded = math.ceil(TARGETS / CHUNK) * CHUNK
    activation_dims = {LOCAL, fsdp * LOCAL, shards * LOCAL, LENGTH, TARGETS, CHUNK, SLOTS, padded}
    activation_dims |= {LOCAL * LENGTH, LOCAL * TARGETS, shards * LOCAL * LENGTH, shards * LOCAL * TARGETS}
    assert not weight_dims & activation_dims

    def head(shape: tuple[int, ...]) -> bool:
        return shape in {(n * LOCAL, CHUNK, *rest) for n in (1, fsdp) for rest in ((), (a.width,), (1,))}

    def weights(shape: tuple[int, ...]) -> bool:
        return set(shape) <= weight_dims | {1}

    def slots(shape: tuple[int, ...]) -> bool:
        return coupled and shape == (MICROBATCHES, shards * LOCAL, SLOTS)

    return [(op, s) for op, s in collectives(program) if not (weights(s) or head(s) or slots(s))]


def abstract_batch(mesh) -> Batch:
    rows = meshes.row_shards(mesh) * LOCAL
    shape = {k: (MICROBATCHES, rows, n) for k, n in {"L": LENGTH, "M": TARGETS, "S": SLOTS}.items()}
    fields = [f.name for f in dataclasses.fields(Rows)]
    where = programs.batch_shardings(mesh)
    array = lambda letter, dtype: jax.ShapeDtypeStruct(shape[letter], dtype, sharding=where.reference_ABS)
    return Batch(
        Rows(*(array(name[-1], jnp.int32) for name in fields)),
        *[array("S", jnp.float32)] * 3,
        jax.ShapeDtypeStruct((), jnp.int32, sharding=where.count),
    )


@pytest.mark.parametrize("name, shape", [("dpo", (4, 2, 1)), ("dpo", (1, 8, 1)), ("kto_pair", (4, 2, 1))])
def test_no_activations_cross_devices_but_the_head_s(name, shape):
    mesh = meshes.make(*shape)
    loss, keys = LOSSES[name]
    compute = Compute(jnp.float32, "full", CHUNK)
    options = OPTIONS["ld_wpo"] if loss.coupled else {}  # what they add to the rest must stay at home as well
    update = programs.preference_update(WIDE, mesh, compute, GRADIENT, loss, keys, SCHEDULE, **options)
    state = programs.abstract_state(WIDE, mesh, GRADIENT)
    text = update.lower(state, {}, abstract_batch(mesh), *small(mesh)).compile().as_text()
    assert unexplained(text, mesh, loss.coupled) == []
    # The reader sees what is known to cross: weights of a layer, the head's hidden chunk, its max and its sum.
    seen = collectives(text)
    fsdp = mesh.shape["fsdp"]
    assert any(op == "all-gather" and shape == (fsdp * LOCAL, CHUNK, WIDE.width) for op, shape in seen)
    assert any(op == "all-reduce" and shape == (fsdp * LOCAL, CHUNK) for op, shape in seen)
    assert any(op == "all-gather" and shape[-2:] == (WIDE.width, WIDE.mlp) for op, shape in seen)


def test_the_reader_flags_a_flat_gather_over_the_batch():
    """Hidden states looked up by one flat index instead of row by row: the partitioner gathers all of them."""
    mesh = meshes.make(4, 2, 1)
    rows = meshes.row_shards(mesh) * LOCAL
    by_row = meshes.rows_sharding(mesh)
    hidden = jax.ShapeDtypeStruct((rows, LENGTH, WIDE.width), jnp.float32, sharding=by_row)
    parent = jax.ShapeDtypeStruct((rows, TARGETS), jnp.int32, sharding=by_row)

    def flat(hidden_BLD, parent_BM):
        index = (parent_BM + LENGTH * jnp.arange(rows)[:, None]).reshape(-1)
        return jnp.take(hidden_BLD.reshape(-1, WIDE.width), index, axis=0).reshape(rows, TARGETS, WIDE.width)

    def by_rows(hidden_BLD, parent_BM):
        return jnp.take_along_axis(hidden_BLD, parent_BM[:, :, None], axis=1)

    text = lambda f: jax.jit(f, out_shardings=by_row).lower(hidden, parent).compile().as_text()
    assert unexplained(text(flat), mesh) != []
    assert collectives(text(by_rows)) == []


# --- what crosses devices for every token that is sampled -------------------------------------------------------------

TALL = Arch("llama", 96, 40, 3, 8, 4, 6, 56, 1e-5, 1e4, tied=False)
PROMPTS, PADDED = 26, 32  # 13 prompts a copy of the weights: no dimension of a weight


def in_loops(program: str) -> str:
    """The lines of a compiled program that run in a loop: bodies of loops and all that they call."""
    lines: dict[str, list[str]] = {}
    for line in program.splitlines():
        head = re.match(r"(?:ENTRY )?%(\S+) .*\{$", line)
        if head:
            lines[head[1]] = block = []
        elif lines:
            block.append(line)
    called = {
        name: {other for line in block for other in re.findall(r"%([\w.\-]+)", line) if other in lines}
        for name, block in lines.items()
    }
    found, todo = set(), re.findall(r"body=%([\w.\-]+)", program)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += called[name]
    return "\n".join(line for name in sorted(found) for line in lines[name])


def decode_program(mesh, layout: str, slots: int | None = None, apart: int = 0) -> str:
    """The compiled decode program, of weights on a layout, with a slot for every candidate or with fewer.

    apart: sample.LAYERS_APART; 0 = a loop over layers, as on TPUs, whose weights move, if at all, in it.
    """
    shaped = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
    params = jax.tree.map(shaped, model.abstract(TALL), programs.param_shardings(TALL, mesh, layout))

    def by_prompt(dtype, *shape: int) -> jax.ShapeDtypeStruct:
        spec = meshes.spec(mesh, "decode", ("rows", *[None] * (len(shape) - 1)), shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    prompts = by_prompt(jnp.int32, PROMPTS, PADDED), by_prompt(jnp.int32, PROMPTS)
    compute = Compute(jnp.float32)
    prefill = programs.prefiller.__wrapped__(TALL, mesh, compute)
    where = prefill.lower(params, *prompts).compile().output_shardings
    start = jax.tree.map(shaped, jax.eval_shape(prefill, params, *prompts), where)
    sampling = sample.sampling(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0, eos_ids=(2,))
    small = meshes.put((jax.random.key(0), sampling), meshes.replicated(mesh))
    decode = programs.decoder.__wrapped__(TALL, mesh, compute, candidates=3, max_new_tokens=11, slots=slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "LAYERS_APART", apart)
        return decode.lower(params, start, by_prompt(jnp.uint32, PROMPTS, 2), *small).compile().as_text()


def weights_that_cross(program: str) -> list[tuple[str, tuple[int, ...]]]:
    """Collectives in loops of what has no prompts: weights."""
    assert "while(" in program
    rows = PROMPTS // 2
    return [(op, shape) for op, shape in collectives(in_loops(program)) if rows not in shape and shape]


@pytest.mark.parametrize("apart", [0, TALL.layers], ids=["loop", "written out"])
def test_no_weight_crosses_devices_for_a_token(apart):
    mesh = meshes.make(2, 2, 2)
    text = decode_program(mesh, "decode", apart=apart)
    assert weights_that_cross(text) == []
    # The reader sees the loop: sums of what each device's heads and hidden units have made.
    assert ("all-reduce", (PROMPTS // 2, 3, TALL.width)) in collectives(in_loops(text))


def test_neither_weights_nor_caches_cross_devices_for_a_token_where_slots_are_refilled():
    """A slot takes prompts that lie on its own devices. What crosses: sums over heads and hidden units, a block of
    logits, what is chosen."""
    mesh, slots = meshes.make(2, 2, 2), PROMPTS
    text = decode_program(mesh, "decode", slots)
    crossing = collectives(in_loops(text))
    assert ("all-reduce", (1, slots // 2, TALL.width)) in crossing
    assert not [shape for _, shape in crossing if {PADDED, 11} & {*shape}]  # positions of prompts and of responses
    assert max(math.prod(shape) for _, shape in crossing) <= slots // 2 * draw.block(TALL.vocab)


def test_the_reader_sees_weights_cross(monkeypatch):
    """On the layout of training they move to that of sampling in the loop; and are gathered, where it splits less."""
    mesh = meshes.make(2, 2, 2)
    moved = weights_that_cross(decode_program(mesh, "train"))
    assert moved and sum(math.prod(shape) for _, shape in moved) > TALL.width * TALL.mlp
    monkeypatch.setitem(meshes.LAYOUTS, "decode", {**meshes.LAYOUTS["gather"], "rows": ("data",)})
    gathered = weights_that_cross(decode_program(mesh, "train"))
    assert any(op == "all-gather" and shape[-2:] == (TALL.width, TALL.mlp // 2) for op, shape in gathered), gathered
