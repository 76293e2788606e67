"""Γ in the walk: against NumPy on features that are scored one response at a time; what a stopped run finds again."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pyarrow.parquet
import pytest

from sera_jax import model, policies, programs, rewards, score
from sera_jax import run as runs
from sera_jax import train as trainer
from sera_jax.policies import Live, Name
from sera_jax.records import Tree
from sera_jax.train import fresh, uncertainty, update
from sera_jax.train import world as worlds
from sera_jax.train.world import World

FLAGS = ("--bootstrap.pair_rule=explore", "--explore.dimension=0", "--explore.weight=0.5", "--explore.regularisation=2")


def alone(world: World, trees) -> np.ndarray:
    """float64 [F, D]: features of every response, each in a row of its own, by the forward pass of a reward model whose
    head is a unit vector: what it reads, coordinate by coordinate, over √D."""
    where, width = world.policies, world.policies.arch.width
    scored = dataclasses.replace(where.arch, scored=True)
    run = programs.reward_scorer(scored, world.mesh, where.compute)
    params = where.start.load()
    single = [Tree("x", tree.prompt, (branch,)) for tree in trees for branch in tree.branches]
    plan = score.plan_for(single, where.arch, world.mesh)
    found = np.zeros((len(single), width))
    for d in range(width):
        head = np.zeros((1, width), np.float32)
        head[0, d] = 1
        of = programs.score_rows(run, model.with_score(params, head), world.mesh)
        found[:, d] = np.concatenate([score.logps(single[i : i + 1], of, plan) for i in range(len(single))])
    return found / np.sqrt(width)


def sigma_of(phi_FD: np.ndarray, lam: float) -> np.ndarray:
    dphi = phi_FD[0::2] - phi_FD[1::2]
    return lam * np.eye(phi_FD.shape[1]) + sum(np.outer(d, d) for d in dphi)


def norm(sigma: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,de,ne->n", vectors, np.linalg.inv(sigma), vectors))


@pytest.fixture
def run(tiny_config):
    """A world, its start, and a policy that has moved from it."""
    world = worlds.prepare(tiny_config(*FLAGS, "--loop.iterations=3", "--bootstrap.fresh=0.3", "--data.limit=12"))
    start = Live(Name("iterate", 0), world.policies.start.load())
    policies.save(world.policies, start, 0.0)
    leaves, tree = jax.tree.flatten(start.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [w + 0.1 * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys)]
    live = Live(Name("iterate", 1), jax.tree.unflatten(tree, moved))
    policies.save(world.policies, live, 0.0)
    return world, start, live


def test_features_are_the_start_s_whoever_scores(run):
    world, start, live = run
    trees = world.given.trees[:2]
    got = uncertainty._features(world, trees, start, "features")
    np.testing.assert_allclose(got, alone(world, trees), atol=2e-6)
    np.testing.assert_array_equal(got, uncertainty._features(world, trees, live, "features"))
    assert 0.5 < np.linalg.norm(got, axis=1).mean() < 2
    few = dataclasses.replace(world.config, explore=dataclasses.replace(world.config.explore, dimension=5))
    projected = uncertainty._features(dataclasses.replace(world, config=few), trees, start, "features")
    from_all = got @ np.asarray(uncertainty.explore.projection(0, world.policies.arch.width, 5))
    np.testing.assert_allclose(projected, from_all, atol=1e-5)


def test_the_walk_explores_as_numpy_says(run):
    """Γ of every candidate, the pairs, which are kept; Σ after them, in the next iteration; and all of it once more
    from the folder, in which the features are not computed again."""
    world, _, live = run
    made = fresh.bootstrap_pairs(world, 2, live)
    trees = rewards.trees(made.candidates)
    phi = uncertainty._features(world, trees, live, "features")
    given = sigma_of(uncertainty._features(world, world.given.trees, live, "features").astype(np.float64), 2.0)
    np.testing.assert_allclose(uncertainty.before(world, 2, live).sigma_DD, given, atol=1e-5)
    valid, reward = fresh.valid(world, made.candidates), made.ranked.rewards_PC
    first, pairs = 0, []
    for p, tree in enumerate(trees):
        at = np.cumsum([len(t) > 0 for t in made.candidates.tokens_PC[p]]) - 1 + first
        first += len(tree.branches)
        live_c = [c for c in range(4) if valid[p, c]]
        if not live_c:
            continue
        best = max(live_c, key=lambda c: (reward[p, c], -c))
        others = [c for c in live_c if reward[p, c] < reward[p, best]]
        gamma = {c: 0.5 * norm(given, (phi[at[c]] - phi[at[best]])[None].astype(np.float64))[0] for c in others}
        found = None
        for n in range(1, len(others) + 1):
            top = max(others[:n], key=gamma.get)
            if 0.1 * (np.log(n) - (n - 1) / n) <= gamma[top]:
                found = (p, best, top, gamma[top])
        pairs += [found] if found else []
    got = list(zip(made.fresh.prompt_F.tolist(), *made.fresh.pair_F2.T.tolist(), made.fresh.gamma_F.tolist()))
    assert [one[:3] for one in got] == [one[:3] for one in pairs] and len(got) > 10
    np.testing.assert_allclose([one[3] for one in got], [one[3] for one in pairs], rtol=1e-4)
    keep = round(0.3 * len(world.given.trees))
    assert set(np.flatnonzero(made.fresh.kept_F)) == set(np.argsort(-made.fresh.gamma_F, kind="stable")[:keep])
    kept = [tree for tree, k in zip(made.fresh.trees, made.fresh.kept_F) if k]
    after = given + sigma_of(uncertainty._features(world, kept, live, "features").astype(np.float64), 0.0)
    np.testing.assert_allclose(uncertainty.before(world, 3, live).sigma_DD, after, atol=1e-5)
    np.testing.assert_allclose(uncertainty.before(world, 2, live).sigma_DD, given, atol=1e-5)  # on resume
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uncertainty, "_features", None)
        again = fresh.bootstrap_pairs(world, 2, live)
    np.testing.assert_array_equal(again.fresh.gamma_F, made.fresh.gamma_F)
    np.testing.assert_array_equal(again.fresh.pair_F2, made.fresh.pair_F2)


def test_a_flat_covariance_is_told(run):
    world, _, live = run
    with pytest.raises(ValueError, match="covariance of 3 features cannot be factorised in float32: its mean eigen"):
        uncertainty._norms(world, np.diag([1.0, 1.0, -1.0]).astype(np.float32), np.ones((2, 3), np.float32))


def left(run: pathlib.Path) -> dict:
    tables = {str(p.relative_to(run)): pyarrow.parquet.read_table(p).to_pylist() for p in run.rglob("*.parquet")}
    sigma = {p.name: np.load(p)["sigma"].tobytes() for p in sorted((run / "covariance").iterdir())}
    return {"tables": tables, "sigma": sigma, "weights": (run / "export" / "model.safetensors").read_bytes()}


def test_a_stopped_run_goes_on_bit_for_bit(tiny_config, stopped_at):
    """Stopped in iteration 2, behind Σ_2: before the first update, and once more in the middle."""
    flags = (*FLAGS, "--loss.name=dpo_pessimistic", "--bootstrap.replay=true", "--bootstrap.fresh=0.2")
    flags += ("--loop.iterations=3", "--data.validation=0.1", "--loss.optimism=0.001")
    whole, stopped = (tiny_config(*flags, run=name) for name in ("whole", "stopped"))
    trainer.train(whole)
    first = json.loads((pathlib.Path(whole.run.dir) / "iterations/1/summary.json").read_text())["updates"]
    for call in (first + 1, 4):
        with stopped_at("preference_update", call):
            trainer.train(stopped)
        assert (pathlib.Path(stopped.run.dir) / "covariance" / "2.npz").is_file()
    trainer.train(stopped)
    one, other = (left(pathlib.Path(config.run.dir)) for config in (whole, stopped))
    assert one == other
    assert set(one["sigma"]) == {"0.npz", "2.npz", "3.npz"} and len(set(one["sigma"].values())) == 3
    gamma = [row["gamma"] for row in one["tables"]["iterations/2/fresh.parquet"]]
    assert min(gamma) > 0 and len(gamma) > 5


def test_what_a_pessimistic_loss_is_told(tiny_config, monkeypatch):
    """Given pairs, held-out ones and fresh ones: Γ(x, y) = β‖φ - ν‖ by the given pairs, also where the fresh are known
    to Σ by then; a pair that is swapped takes its Γ along."""
    flags = (*FLAGS, "--loss.name=dpo_pessimistic", "--data.validation=0.1", "--bootstrap.replay=true")
    seen = {}

    def stage(run, of, state, *args, **keywords):
        seen[of.iteration] = of.trees
        return plain(run, of, state, *args, **keywords)

    plain = runs.run_stage
    monkeypatch.setattr(runs, "run_stage", stage)
    prepared = []
    build = worlds.prepare
    monkeypatch.setattr(worlds, "prepare", lambda config: prepared.append(build(config)) or prepared[-1])
    trainer.train(tiny_config(*flags, "--select.unselected=relabel", "--loop.iterations=3"))
    world, start = prepared[0], Live(Name("iterate", 0), None)
    given = uncertainty._features(world, world.given.trees, start, "features").astype(np.float64)
    sigma, centre = sigma_of(given, 2.0), given.mean(axis=0)
    told = uncertainty.informed(world, start)
    trees = [*seen[1], *seen[3], *told.given.held_out]
    phi = uncertainty._features(world, trees, start, "features").astype(np.float64)
    want = 0.5 * norm(sigma, phi - centre).reshape(-1, 2)
    np.testing.assert_allclose([tree.values for tree in trees], want, rtol=1e-4)
    ids = {tree.id: tree for tree in seen[1]}
    swapped = [t for t in seen[3] if t.id in ids and np.array_equal(t.branches[0], ids[t.id].branches[1])]
    assert swapped and all(tree.values == ids[tree.id].values[::-1] for tree in swapped)
    assert len(seen[3]) > len(seen[1]) and len(told.given.held_out) > 0


def test_other_losses_are_told_nothing(run):
    world, start, _ = run
    assert uncertainty.told(world, world.given.trees, start) == list(world.given.trees)
    assert not (world.run.path / "covariance").exists()
    assert update.training_set(world, 1, start, None, None).trees[0].values == ()
