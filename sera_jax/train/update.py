"""What the updates of an iteration take: kept ∪ fresh pairs, reference log-probs, the state; and the SFT stage."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import pyarrow.parquet

from sera_jax import data, policies, processes, programs, sera, step
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax import run as runs
from sera_jax.bootstrap import Fresh
from sera_jax.config import TrainConfig
from sera_jax.ledger import branch_key
from sera_jax.policies import Live, Name
from sera_jax.records import Tree
from sera_jax.run import Cursor, Stage
from sera_jax.selection import Selection
from sera_jax.train import uncertainty
from sera_jax.train import world as worlds
from sera_jax.train.fresh import Made
from sera_jax.train.select import loss_logps, loss_reference
from sera_jax.train.world import Given, World

FRESH = ("win", "preference", "reward")  # what fresh pairs are known by, of what a loss may be told


def start(world: World) -> Live:
    """Iterate 0, or the policy at the latest checkpoint of an interrupted iteration."""
    config, at = world.config, world.run.at
    if at is not None and at.stage == "update":
        like = _abstract_state(world, world.transform, config.optimizer.moments)
        state = world.run.checkpoints.restore(at.count, like)
        return Live(Name("iterate", at.iteration), state)
    if not config.sft.epochs:
        return Live(Name("iterate", 0), world.policies.start.load())
    transform = worlds.adam(config.sft.optimizer, world.policies.arch)
    memory = config.sft.optimizer.moments
    if at is None:
        params = policies.trained(world.policies, world.policies.start.load())
        state = programs.fresh_state(world.policies.arch, world.mesh, transform, memory)(params)
    else:
        state = world.run.checkpoints.restore(at.count, _abstract_state(world, transform, memory))
    state = _sft(world, transform, state, at)
    live = Live(Name("iterate", 0), policies.whole(world.policies, state.params))
    policies.save(world.policies, live, 0.0)
    return live


def _sft(
    world: World, transform: optax.GradientTransformation, state: step.TrainState, at: Cursor | None
) -> step.TrainState:
    """The supervised stage: iterate 0 is its result."""
    config, optimizer = world.config, world.config.sft.optimizer
    trees = world.given.sft
    update = programs.sft_update(
        world.policies.arch,
        world.mesh,
        world.policies.compute,
        transform,
        worlds.schedule(optimizer),
        moments=optimizer.moments,
    )
    stage = Stage(
        name="sft",
        iteration=0,
        batches=_batches(len(trees), optimizer.batch_size, config, 0, config.sft.epochs, len(trees)),
        trees=trees,
        reference_F=np.zeros(len(trees), np.float32),
        weight_N=np.ones(len(trees), np.float32),
        plans=worlds.update_plans(rowlib.measure(trees), optimizer, world.policies.arch, world.mesh),
    )
    state, _ = runs.run_stage(
        world.run,
        stage,
        state,
        update,
        at=at,
        count=0,
        key=worlds.key(world, "sft", 0),
        mesh=world.mesh,
        frozen=policies.frozen(world.policies),
    )
    return state


def _abstract_state(world: World, transform: optax.GradientTransformation, moments: str) -> step.TrainState:
    return programs.abstract_state(world.policies.arch, world.mesh, transform, moments)


def starting_state(world: World, live: Live, moments: Any) -> step.TrainState:
    """The state that iteration t starts from."""
    config = world.config
    params = policies.trained(world.policies, live.params)
    if config.loop.start == "initial" and live.name.t > 0:
        jax.tree.map(lambda a: a.delete(), params)  # its iterate is on disk; two policies need not fit
        params = policies.trained(world.policies, policies.params(world.policies, Name("iterate", 0)))
    if moments is None:
        begin = programs.fresh_state(world.policies.arch, world.mesh, world.transform, world.config.optimizer.moments)
        return begin(params)
    # The schedule restarts, the moments do not.
    return step.TrainState(params, moments, meshes.put(np.int32(0), meshes.replicated(world.mesh)))


def training_set(world: World, t: int, scored: Live, chosen: Selection | None, made: Made | None) -> Stage:
    """Kept ∪ fresh pairs, their reference log-probs and weights; as many updates as loop.passes says."""
    config, given = world.config, worlds.given_at(world.given, t)
    trees, weight_N = _kept(world, given, t, chosen)
    whole = given.trees if trees else ()
    extra = _fresh(world, made.fresh) if made else []
    if config.bootstrap.replay:
        since = max(1, t - config.bootstrap.replay_last) if config.bootstrap.replay_last else 1
        extra += [tree for earlier in range(since, t) for tree in _earlier_fresh(world, earlier)]
    extra = uncertainty.told(world, extra, scored)
    trees = [*trees, *extra]
    if not trees:
        raise ValueError(f"iteration {t} has nothing to train on: no given pair was kept and no fresh pair was made.")
    weight_N = np.concatenate((weight_N, np.ones(len(extra), np.float32)))
    full = len(trees) if config.loop.passes == "all" else worlds.size_of_pass(config, world.given, t)
    return Stage(
        name="update",
        iteration=t,
        batches=_batches(len(trees), config.optimizer.batch_size, config, t, config.loop.epochs, full),
        trees=trees,
        reference_F=_reference_logps(world, t, scored, trees, whole, extra),
        weight_N=weight_N,
        plans=world.plans,
    )


def _reference_logps(
    world: World, t: int, scored: Live, trees: Sequence[Tree], whole: Sequence[Tree], extra: Sequence[Tree]
) -> np.ndarray:
    """float32 by flat branch number of `trees`: log-probs under the loss's reference, as the loss sees them.

    Whole sets are scored: the given one (`whole`), and `extra`.
    """
    reference, known = loss_reference(world, t), {}
    for what, some, plan in (
        ("the given set", whole, world.score_plan),
        ("fresh pairs", extra, world.plans[0]),
    ):
        if not some:
            continue
        known |= dict(zip(_keys(some), loss_logps(world, reference, some, scored, plan=plan, what=what)))
    return np.array([known[key] for key in _keys(trees)], np.float32)


def _keys(trees: Sequence[Tree]) -> list[tuple[bytes, int]]:
    """Of every branch: its content, and the length that its pair shares, on which its weights depend (LD-DPO)."""
    return [
        (branch_key(tree.prompt, branch), min(map(len, tree.branches))) for tree in trees for branch in tree.branches
    ]


def _kept(world: World, given: Given, t: int, chosen: Selection | None) -> tuple[list[Tree], np.ndarray]:
    """The given pairs an iteration trains on, and their weights."""
    config = world.config
    if config.select.rule == "none" and t >= config.select.from_iteration:
        return [], np.zeros(0, np.float32)
    own_N = np.array([tree.weight for tree in given.trees], np.float32)
    if chosen is None:
        return list(given.trees), own_N
    if config.select.unselected == "drop":
        return [tree for tree, kept in zip(given.trees, chosen.mask_N) if kept], own_N[chosen.mask_N]
    if config.select.unselected == "soft_weight":
        return list(given.trees), own_N * np.asarray(sera.soft_weight(chosen.score_N), np.float32)
    # A pair that is swapped takes its scores along; whoever is chosen then has won.
    compared = world.loss.target in ("win", "preference")
    values = lambda tree: tree.values if compared else tree.values[::-1]
    swapped = [
        tree if kept else dataclasses.replace(tree, branches=tree.branches[::-1], values=values(tree))
        for tree, kept in zip(given.trees, chosen.mask_N)
    ]
    return swapped, own_N


def _fresh(world: World, fresh: Fresh) -> list[Tree]:
    """The fresh pairs an iteration trains on, with what the loss is told of them."""
    told = world.loss.target
    values = map(tuple, getattr(fresh, f"{told}_F2").tolist()) if told in FRESH else [()] * len(fresh.trees)
    return [
        dataclasses.replace(tree, values=value) for tree, value, kept in zip(fresh.trees, values, fresh.kept_F) if kept
    ]


def _batches(n: int, size: int, config: TrainConfig, iteration: int, epochs: int, full: int) -> list[np.ndarray]:
    """Example numbers of every update: `epochs` passes of as many updates as `full` examples take."""
    updates = -(-full // size)
    return [
        batch
        for epoch in range(epochs)
        for batch in data.batches(n, size, seed=config.run.seed, iteration=iteration, epoch=epoch, updates=updates)
    ]


def updates_before(world: World, t: int, before: Sequence[dict[str, Any]]) -> int:
    """Updates of the run before iteration t, those that an early stop left out too where their number was known.

    Args:
        before: the summaries of the iterations before.
    """
    config = world.config
    sft = config.sft.epochs * -(-len(world.given.sft) // config.sft.optimizer.batch_size)
    if config.loop.passes == "all" and not worlds.on_policy(config):
        return sft + sum(summary.get("updates", 0) for summary in before)
    return sft + sum(worlds.updates_of_iteration(config, world.given, earlier) for earlier in range(1, t))


def _earlier_fresh(world: World, t: int) -> list[Tree]:
    """The fresh pairs that iteration t trained on, with the ids that were sampled."""
    path = worlds.folder(world, t) / "fresh.parquet"
    told = world.loss.target
    values = [f"{told}_chosen", f"{told}_rejected"] if told in FRESH else []
    columns = ["id", "prompt_tokens", "chosen_tokens", "rejected_tokens", "kept", *values]
    read = lambda: pyarrow.parquet.read_table(path, columns=columns).to_pylist() if path.is_file() else []
    return [
        Tree(
            row["id"],
            np.array(row["prompt_tokens"], np.int32),
            (np.array(row["chosen_tokens"], np.int32), np.array(row["rejected_tokens"], np.int32)),
            values=tuple(row[column] for column in values),
        )
        for row in processes.once(read)
        if row["kept"]
    ]


def ema_decay(config: TrainConfig) -> float:
    """Decay of the running mean of iterates, 0 where no reference asks for it."""
    return config.reward.ema_decay if "ema" in (config.loss.reference, config.reward.reference) else 0.0
