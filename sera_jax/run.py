"""The run folder: opening, refusing what belongs to another config, going on where it stopped; state and cursor.

All state of the loop is a TrainState (weights, moments, step) and a cursor (stage, iteration, update, byte offset of
metrics.jsonl), saved together. Everything else is a function of them, of the config, and of files that are only ever
appended to (ledger, candidates).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from sera_jax import mesh as meshes
from sera_jax import metrics as metriclib
from sera_jax import programs
from sera_jax import rows as rowlib
from sera_jax.checkpoint import Checkpoints
from sera_jax.metrics import Metrics
from sera_jax.records import Batch, Tree
from sera_jax.rows import Fill, Plan
from sera_jax.step import TrainState

# Keys that may differ between a run and its continuation: they change no number of it.
FREE_KEYS = (
    "run.dir run.resume run.save_every run.keep_checkpoints run.ledger run.compilation_cache run.tensorboard run.wandb"
).split()


class RunError(ValueError):
    """A run folder that cannot be used: says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Cursor:
    """How far a run is.

    stage: "sft" or "update"; iteration: 0 in SFT; update: updates done in the stage, of `total`; count: updates of the
    whole run; offset: bytes of metrics.jsonl.
    """

    stage: str
    iteration: int
    update: int
    total: int
    count: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run folder. at: where it stopped, None = from the start."""

    path: pathlib.Path
    metrics: Metrics
    checkpoints: Checkpoints
    at: Cursor | None
    save_every: int
    log_every: int


def open_run(
    config_yaml: str, *, content: str, resume: str, keep: int, save_every: int, log_every: int, **sinks: Any
) -> Run:
    """Opens `run.dir` of a complete config: new, or to go on.

    Args:
        config_yaml: config.dump(...). content: hash of the model and the data behind the config's paths.
        resume: auto, never or must. keep: checkpoints that stay. sinks: keywords of
            Metrics.

    Raises:
        RunError: the folder holds another config (the differing keys are named) or the same one on other content,
            exists under `never`, or holds no run under `must`.
    """
    config = yaml.safe_load(config_yaml)
    path = pathlib.Path(config["run"]["dir"])
    stored = path / "config.yaml"
    if resume == "never" and path.exists() and any(path.iterdir()):
        raise RunError(f"{path} is not empty and run.resume is 'never'. Choose another run.dir, or resume with 'auto'.")
    if resume == "must" and not stored.is_file():
        raise RunError(f"{path} holds no config.yaml and run.resume is 'must'. Check run.dir, or start with 'auto'.")
    # A folder in which nothing was done yet (a wrong path was given, say) belongs to nobody.
    worked = any((path / name).exists() for name in ("ledger", "iterations", "iterates")) or any(
        (path / "checkpoints").glob("*")
    )
    if stored.is_file() and worked:
        differing = _differences(yaml.safe_load(stored.read_text(encoding="utf-8")), config)
        if differing:
            raise RunError(
                f"{path} belongs to another config; it differs in {', '.join(differing)}. "
                "Choose another run.dir, or run with the folder's own config.yaml."
            )
        before = (path / "content").read_text(encoding="utf-8")
        if before != content:
            raise RunError(
                f"{path} belongs to the same config on other data or another model: the files behind it have changed "
                f"(content {before} → {content}). Restore them, or choose another run.dir."
            )
    else:
        path.mkdir(parents=True, exist_ok=True)
        stored.write_text(config_yaml, encoding="utf-8")
        (path / "content").write_text(content, encoding="utf-8")
    checkpoints = Checkpoints(path / "checkpoints", keep)
    latest = checkpoints.latest()
    at = None if latest is None else Cursor(**latest[1])
    sinks = {"tensorboard_dir": path / "tensorboard" if sinks.pop("tensorboard", False) else None, **sinks}
    metrics = Metrics(path / "metrics.jsonl", offset=0 if at is None else at.offset, config=config, **sinks)
    return Run(path, metrics, checkpoints, at, save_every, log_every)


def _differences(stored: dict, asked: dict, prefix: str = "") -> list[str]:
    """Dotted keys in which two configs differ, as "key (stored → asked)", free ones left out."""
    found = []
    for key in dict.fromkeys((*stored, *asked)):
        name, a, b = f"{prefix}{key}", stored.get(key), asked.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{name}.")
        elif a != b and name not in FREE_KEYS:
            found.append(f"{name} ({a!r} → {b!r})")
    return found


def close(run: Run) -> None:
    """Waits for the last save and closes the files."""
    run.checkpoints.close()
    run.metrics.close()


# --- a stage of updates -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage's work: which examples each update takes, and what comes with them.

    batches: int64 [batch] example numbers, one array an update. trees: the examples. reference_F: log-probs under the
    loss's reference by flat branch number; weight_N: of the examples.
    """

    name: str
    iteration: int
    batches: Sequence[np.ndarray]
    trees: Sequence[Tree]
    reference_F: np.ndarray
    weight_N: np.ndarray
    plan: Plan


def run_stage(
    run: Run,
    stage: Stage,
    state: TrainState,
    update: Callable,
    *,
    done: int,
    count: int,
    key: jax.Array,
    mesh: Mesh,
) -> TrainState:
    """The updates of a stage from number `done` on, logged and saved as the run says; always saved at its end.

    Metrics of an update are read after the next one is dispatched, so that the devices never wait for the log.

    Args:
        state: donated. update: programs.preference_update or sft_update. count: updates of the run before this stage.
        key: of the stage; each update folds its number in.
    """
    total = len(stage.batches)
    whole = meshes.replicated(mesh)
    total_array, key = meshes.put(np.int32(total), whole), jax.device_put(key, whole)
    fold = jax.jit(jax.random.fold_in, out_shardings=whole)
    pending: dict | None = None
    fills: list[Fill] = []

    def log(last: dict | None) -> None:
        if last is not None:
            numbers = {name: float(value) for name, value in meshes.get(last["metrics"]).items()}
            share = sum(f.useful for f in last["fills"]) / max(sum(f.padded for f in last["fills"]), 1)
            run.metrics.write({**last["where"], **numbers, "perf/useful_tokens": share})

    stream = zip(range(done, total), _loaded(stage, mesh, done), strict=True)
    label = "SFT" if stage.name == "sft" else f"iteration {stage.iteration}: updates"
    for index, (batch, fill) in metriclib.track(stream, total=total - done, label=label, unit="updates"):
        state, metrics = update(state, batch, total_array, fold(key, index))
        fills.append(fill)
        log(pending)
        pending = None
        last = index + 1 == total
        if (index + 1) % run.log_every == 0 or last:
            where = {"stage": stage.name, "iteration": stage.iteration, "step": index + 1}
            pending, fills = {"where": where, "metrics": metrics, "fills": fills}, []
        if (index + 1) % run.save_every == 0 or last:
            log(pending)
            pending = None
            cursor = Cursor(stage.name, stage.iteration, index + 1, total, count + index + 1, run.metrics.offset)
            run.checkpoints.save(cursor.count, state, dataclasses.asdict(cursor))
    return state


def _loaded(stage: Stage, mesh: Mesh, done: int) -> Iterator[tuple[Batch, Fill]]:
    """Batches of a stage from number `done` on, packed by grain's threads ahead of the devices."""
    where = programs.batch_shardings(mesh)

    def pack(index: int) -> tuple[Batch, Fill]:
        members = stage.batches[index]
        packed = rowlib.pack([stage.trees[i] for i in members], stage.plan)
        stacked, count = rowlib.microbatches(packed, stage.plan, rowlib.most_microbatches(len(members), stage.plan))
        branches = len(stage.trees[members[0]].branches)
        flat = (members[:, None] * branches + np.arange(branches)).reshape(-1)
        batch = Batch(
            rows=stacked,
            reference_ABS=rowlib.spread(stage.reference_F[flat], stacked.example_BS),
            weight_ABS=rowlib.spread(np.repeat(stage.weight_N[members], branches), stacked.example_BS),
            count=np.int32(count),
        )
        return batch, rowlib.fill(packed)

    if done >= len(stage.batches):
        return
    source = grain.MapDataset.range(done, len(stage.batches)).map(pack)
    for batch, fill in source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)):
        yield meshes.put(batch, where), fill
