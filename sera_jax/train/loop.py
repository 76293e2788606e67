"""The walk: [SFT] → T × (score → select → sample → reward → pairs → update → save) → export."""

import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from sera_jax import config as configs
from sera_jax import policies, processes, programs
from sera_jax import run as runs
from sera_jax.config import TrainConfig
from sera_jax.policies import Live, Name
from sera_jax.train import check, fresh, outcome, rounds, select, uncertainty, update, validate, watch
from sera_jax.train import world as worlds
from sera_jax.train.world import World


def main(args: list[str] | None = None) -> None:
    """Reads the config and runs, or only checks the data; an error of the user's ends with one line."""
    try:
        config = configs.parse(TrainConfig, args)
        if config.data.check:
            check.check(config)
            return
        processes.join(config.mesh.distributed)
        train(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


def train(config: TrainConfig) -> pathlib.Path:
    """One run, from wherever its folder stands to the export.

    Returns:
        the exported Hugging Face folder.

    Raises:
        ValueError: of config, files, data or run folder, before any update; of scores, where they are found; of a disk
            that takes no more, with the update from which the run goes on.
    """
    programs.compilation_cache(config.run.compilation_cache)
    with programs.precision(config.model.compute):
        world = worlds.prepare(config)
        with runs.closing(world.run):
            return walk(world)


def walk(world: World) -> pathlib.Path:
    """Start, iterations, export; what an earlier process has done is not done again."""
    live, moments = update.start(world), None
    world = uncertainty.informed(world, live)
    first = max(1, live.name.t)  # on resume the policy in memory is iterate `first`, as far as it was trained
    summaries = outcome.read_summaries(world, first - 1)
    for t in range(first, world.config.loop.iterations + 1):
        if t == 1 and world.policies.first:
            live, summary = adopt(world, live)
        else:
            live, moments, summary = iterate(world, t, live, moments, summaries)
        summaries.append(summary)
    return outcome.finish(world, live, summaries)


def adopt(world: World, live: Live) -> tuple[Live, dict]:
    """Iteration 1 of a run whose iterate 1 is given (loop.first); the weights of `live` are let go."""
    began = time.monotonic()
    watch.begin(world, 1, live)
    jax.tree.map(lambda a: a.delete(), live.params)
    live = Live(Name("iterate", 1), world.policies.first.load())
    policies.save(world.policies, live, update.ema_decay(world.config))
    summary = outcome.summarise(world, 1, live, None, None, None)
    summary["perf/seconds"] = time.monotonic() - began
    outcome.write_summary(world, 1, summary)
    return live, summary


def iterate(world: World, t: int, live: Live, moments: Any, before: Sequence[dict[str, Any]]) -> tuple[Live, Any, dict]:
    """Iteration t: score → select → sample → reward → pairs → update → save; or rounds of sample → reward → update.

    Args:
        live: iterate t-1, or, on resume, the TrainState of iterate t as far as it was trained.
        moments: of the optimiser, carried from iteration t-1; None = fresh. before: the summaries so far.

    Returns:
        iterate t, its moments (None where they are not carried), and the iteration's summary.
    """
    config, began = world.config, time.monotonic()
    resumed = live.name.t == t
    # On resume, what the policy before said is in the ledger and in the files of the iteration.
    scored = Live(Name("iterate", t - 1), None) if resumed else live
    if worlds.on_policy(config):
        chosen, made, stage = None, None, rounds.of_iteration(world, t)
    else:
        chosen = select.review(world, t, scored)
        made = fresh.bootstrap_pairs(world, t, scored)
        stage = update.training_set(world, t, scored, chosen, made)
    watch.begin(world, t, scored)
    validation = validate.of_stage(world, t, scored)
    gold_F2 = outcome.judged(world, t, made)
    outcome.write_pairs(world, t, chosen, made, gold_F2)
    state = live.params if resumed else update.starting_state(world, live, moments)
    del live, scored, moments  # the state's buffers are donated from here on
    state, at = runs.run_stage(
        world.run,
        stage,
        state,
        world.update,
        at=world.run.at if resumed else None,
        count=update.updates_before(world, t, before),
        key=worlds.key(world, "update", t),
        mesh=world.mesh,
        frozen=policies.frozen(world.policies),
        validation=validation,
    )
    live = Live(Name("iterate", t), policies.whole(world.policies, state.params))
    policies.save(world.policies, live, update.ema_decay(config))
    summary = outcome.summarise(world, t, live, chosen, made, stage, at=at, gold_F2=gold_F2, before=before)
    summary["perf/seconds"] = time.monotonic() - began
    outcome.write_summary(world, t, summary)
    return live, state.moments if config.loop.optimizer_state == "carried" else None, summary
