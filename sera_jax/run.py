"""The run folder: opening, refusing what belongs to another config, going on where it stopped; state and cursor.

All state of the loop is a TrainState (weights, moments, step) and a cursor (stage, iteration, update, what validation
has found, byte offset of metrics.jsonl, on what the run has been computed), saved together. Everything else is a
function of them, of the config, and of files that are only ever appended to (ledger, candidates).
"""

import contextlib
import dataclasses
import errno
import fcntl
import math
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import grain
import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from sera_jax import disk, processes, programs
from sera_jax import mesh as meshes
from sera_jax import metrics as metriclib
from sera_jax import rows as rowlib
from sera_jax.checkpoint import Checkpoints
from sera_jax.disk import DiskError
from sera_jax.ledger import derived_tag
from sera_jax.metrics import Metrics
from sera_jax.records import Batch, Tree
from sera_jax.rows import Fill, Plan
from sera_jax.step import TrainState

# Keys that may differ between a run and its continuation: they change no number of it ...
FREE_KEYS = (
    "run.dir run.resume run.save_every run.keep_checkpoints run.ledger run.compilation_cache run.tensorboard run.wandb "
    "judge.base_url judge.concurrent judge.per_minute judge.retries judge.timeout judge.price_in judge.price_out "
    "judge.key_env judge.cache"
).split()
# ... or only how its numbers are rounded, because they say where and in which portions they are computed.
LAYOUT_KEYS = (
    "mesh.distributed mesh.slices mesh.data mesh.fsdp mesh.tensor model.remat model.head_chunk bootstrap.slots "
    "bootstrap.refill optimizer.moments sft.optimizer.moments model.attention "
    "optimizer.row_tokens optimizer.microbatch_rows optimizer.row_shapes "
    "sft.optimizer.row_tokens sft.optimizer.microbatch_rows sft.optimizer.row_shapes"
).split()


class RunError(ValueError):
    """A run folder that cannot be used: says why and what to do."""


class RunBusy(RunError):
    """Somebody else holds the run folder."""


@dataclasses.dataclass(frozen=True)
class Checks:
    """What the validation of a stage has found so far.

    lowest: validation loss, None before the first check; waited: checks since it was found. best, best_update: value
    and update of the best point, None before the first. stopped: the stage has ended before its last update.
    """

    lowest: float | None = None
    waited: int = 0
    best: float | None = None
    best_update: int = 0
    stopped: bool = False


@dataclasses.dataclass(frozen=True)
class Cursor:
    """How far a run is.

    stage: "sft", "update" or "reward"; iteration: 0 but in "update"; update: updates done in the stage, of `total`;
    count: updates of the whole run, those that were left out by an early stop included; offset: bytes of metrics.jsonl.
    origins: of the run.
    """

    stage: str
    iteration: int
    update: int
    total: int
    count: int
    offset: int
    checks: Checks = Checks()
    origins: tuple[tuple[int, int, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run folder. at: where it stopped, None = from the start. lock: held by process 0 while the run is open.

    origins: how its iterates came to be: (iterate, updates of the run, fingerprint) of its beginning, and of every
    resume under another fingerprint (on other devices, say): from that iterate on, behind so many updates.
    """

    path: pathlib.Path
    metrics: Metrics
    checkpoints: Checkpoints
    at: Cursor | None
    save_every: int
    log_every: int
    lock: TextIO | None
    origins: tuple[tuple[int, int, str], ...]


def open_run(
    config_yaml: str,
    *,
    content: str,
    fingerprint: str,
    resume: str,
    keep: int,
    save_every: int,
    log_every: int,
    **sinks: Any,
) -> Run:
    """Opens `run.dir` of a complete config: new, or to go on.

    Args:
        config_yaml: config.dump(...). content: hash of the model and the data behind the config's paths. fingerprint:
            of all that decides the bits of the iterates.
        resume: auto, never or must. keep: checkpoints that stay. sinks: keywords of Metrics.

    Raises:
        RunError: another run has the folder open; it holds another config (the differing keys are named) or the same
            one on other content, exists under `never`, or holds no run under `must`.
    """
    config = yaml.safe_load(config_yaml)
    path = pathlib.Path(config["run"]["dir"])
    with disk.guarded(path), contextlib.ExitStack() as undone:

        def claimed() -> TextIO:
            if resume == "must" and not (path / "config.yaml").is_file():
                raise RunError(
                    f"{path} holds no config.yaml and run.resume is 'must'. Check run.dir, or start with 'auto'."
                )
            with disk.guarded(path):
                path.mkdir(parents=True, exist_ok=True)
                lock = undone.enter_context(_claimed(path))
                if resume == "never" and any(found.name != LOCK for found in path.iterdir()):
                    raise RunError(
                        f"{path} is not empty and run.resume is 'never'. Choose another run.dir, or resume with 'auto'."
                    )
                _belongs(path, config_yaml, content)
            return lock

        lock = processes.held(claimed)
        checkpoints = Checkpoints(path / "checkpoints", keep)
        undone.callback(checkpoints.close)
        at = _cursor(processes.once(checkpoints.latest))
        sinks = {"tensorboard_dir": path / "tensorboard" if sinks.pop("tensorboard", False) else None, **sinks}
        log = lambda: Metrics(path / "metrics.jsonl", offset=0 if at is None else at.offset, config=config, **sinks)
        metrics = processes.held(log) or log()
        undone.pop_all()
    return Run(path, metrics, checkpoints, at, save_every, log_every, lock, origins(at, fingerprint))


def _cursor(latest: Sequence[Any] | None) -> Cursor | None:
    """Of the (step, plain values) of a checkpoint."""
    if latest is None:
        return None
    plain = latest[1]
    return Cursor(
        **{
            **plain,
            "checks": Checks(**plain.get("checks", {})),
            "origins": tuple(map(tuple, plain.get("origins", ()))),
        }
    )


def origins(at: Cursor | None, fingerprint: str) -> tuple[tuple[int, int, str], ...]:
    """Those of a run that goes on from `at` (None: begins) under a fingerprint."""
    if at is None or not at.origins:
        return ((0, 0, fingerprint),)
    if at.origins[-1][2] == fingerprint:
        return at.origins
    ended = at.update == at.total or at.checks.stopped
    return (*at.origins, (at.iteration + ended, at.count, fingerprint))


def fingerprints(origins: Sequence[tuple[int, int, str]]) -> tuple[tuple[int, str], ...]:
    """(t, fingerprint) of the iterates from t on, until the next one: of everything that their bits come from."""
    told = [origins[0][2]]
    for n in range(2, len(origins) + 1):
        told.append(derived_tag(*(value for origin in origins[:n] for value in origin)))
    return tuple((origin[0], fingerprint) for origin, fingerprint in zip(origins, told))


LOCK = "run.lock"


def _claimed(path: pathlib.Path) -> TextIO:
    """The folder's lock file, locked. The system lets the lock go when the file is closed or its process dies, however
    that happens; what the file says only tells others who has it.

    Raises:
        RunBusy: somebody else has it, in this process or another.
    """
    file = open(os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            told = file.read()
            file.close()
            raise RunBusy(
                f"{path} is in use by another run ({told.strip() or 'it has not said which'}). Wait for it, stop it, "
                "or choose another run.dir."
            ) from None
        # Some network file systems have no locks.
        metriclib.say(f"{path} cannot be locked ({error.strerror}): see to it that no second run opens it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
    file.flush()
    return file


def _belongs(path: pathlib.Path, config_yaml: str, content: str) -> None:
    """Writes config and content into a folder in which nothing was done; raises RunError if it is another run's."""
    stored = path / "config.yaml"
    # A folder in which nothing was done yet (a wrong path was given, say) belongs to nobody.
    worked = any((path / name).exists() for name in ("ledger", "iterations", "iterates")) or any(
        (path / "checkpoints").glob("*")
    )
    if not (stored.is_file() and worked):
        for name, text in (("config.yaml", config_yaml), ("content", content)):
            with disk.whole(path / name) as beside:
                beside.write_text(text, encoding="utf-8")
        return
    try:
        before = yaml.safe_load(stored.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        before = None
    if not isinstance(before, dict) or not (path / "content").is_file():
        damaged = stored.name if not isinstance(before, dict) else "content"
        raise RunError(
            f"{path}/{damaged} is missing or damaged, so that nobody can tell whose run this is; expected the file "
            "that the run began with. Restore it, or choose another run.dir."
        )
    differing = differences(before, yaml.safe_load(config_yaml))
    if differing:
        raise RunError(
            f"{path} belongs to another config; it differs in {', '.join(differing)}. "
            "Choose another run.dir, or run with the folder's own config.yaml."
        )
    known = (path / "content").read_text(encoding="utf-8")
    if known != content:
        raise RunError(
            f"{path} belongs to the same config on other data or another model: the files behind it have changed "
            f"(content {known} → {content}). Restore them, or choose another run.dir."
        )


def differences(stored: dict, asked: dict, prefix: str = "") -> list[str]:
    """Dotted keys in which two configs differ, as "key (stored → asked)", free ones left out."""
    found = []
    shown = lambda config, key: repr(config[key]) if key in config else "absent"
    for key in dict.fromkeys((*stored, *asked)):
        name, a, b = f"{prefix}{key}", stored.get(key), asked.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.")
        elif (a != b or (key in stored) != (key in asked)) and name not in (*FREE_KEYS, *LAYOUT_KEYS):
            found.append(f"{name} ({shown(stored, key)} → {shown(asked, key)})")
    return found


def close(run: Run) -> None:
    """Waits for the last save, closes the files and lets the folder go.

    Raises:
        DiskError: the last save could not be written.
    """
    with contextlib.ExitStack() as closing:
        if run.lock is not None:
            closing.enter_context(run.lock)
        closing.callback(run.metrics.close)
        closing.callback(run.checkpoints.close)


@contextlib.contextmanager
def closing(run: Run) -> Iterator[None]:
    """Closes the run behind what is done with it.

    Raises:
        RunError: the disk took no more; says where, and from which update the run goes on.
    """
    try:
        with disk.guarded(run.path), contextlib.ExitStack() as last:
            last.callback(close, run)
            yield
    except DiskError as error:
        raise RunError(f"{error} {_goes_on(run.checkpoints.saved)}") from error


def _goes_on(saved: tuple[int, dict[str, Any]] | None) -> str:
    if saved is None:
        return "No checkpoint was saved yet: the same command begins again."
    cursor = saved[1]
    where = {"sft": "the SFT stage", "reward": "the reward model"}.get(
        cursor["stage"], f"iteration {cursor['iteration']}"
    )
    return (
        f"What was saved before is whole: the same command goes on behind update {cursor['update']} of "
        f"{cursor['total']} of {where}."
    )


# --- a stage of updates -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage's work: which examples each update takes, and what comes with them.

    batches: int64 [batch] example numbers, one array an update. trees: the examples. reference_F: by flat branch
    number, log-probs under the loss's reference, or, for a reward model, the annotator's scores; weight_N: of the
    examples. plans: shapes of rows, of which each batch takes one. tokens_F: by name and flat branch number, what is
    known of each response token (records.Batch).
    """

    name: str
    iteration: int
    batches: Sequence[np.ndarray]
    trees: Sequence[Tree]
    reference_F: np.ndarray
    weight_N: np.ndarray
    plans: tuple[Plan, ...]
    tokens_F: Mapping[str, Sequence[np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Updates."""
        return len(self.batches)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """A stage that makes its own work, round by round, of what trains.

    count: rounds; updates: of each. make: (number of the round, what trains as it begins) → the Stage of its updates;
    a function of both alone, so that a resume makes the same again.
    """

    name: str
    iteration: int
    count: int
    updates: int
    make: Callable[[int, Any], Stage]

    @property
    def total(self) -> int:
        """Updates of all rounds."""
        return self.count * self.updates


@dataclasses.dataclass(frozen=True)
class Validation:
    """How the policy of a stage is checked on held-out pairs while it trains.

    every: updates between two checks; the end of the stage is none, the iteration's summary measures there. measure:
    what trains → metrics, "validation/loss" among them. patience: so many checks in a row without a loss below the
    lowest so far end the stage (early_stopping_patience of HF's EarlyStoppingCallback, threshold 0); 0 = never. best:
    metrics → a value, the higher the better; keep: stores what trains at the best point so far. Both None = none is
    stored.
    """

    every: int
    measure: Callable[[Any], dict[str, float]]
    patience: int = 0
    best: Callable[[dict[str, float]], float] | None = None
    keep: Callable[[Any], None] | None = None


def checked(checks: Checks, update: int, found: dict[str, float], validation: Validation) -> Checks:
    """What is known after the check at an update. A loss that is not a number is no improvement."""
    loss = found["validation/loss"]
    lower = math.isfinite(loss) and (checks.lowest is None or loss < checks.lowest)
    waited = 0 if lower else checks.waited + 1
    after = dataclasses.replace(
        checks,
        lowest=loss if lower else checks.lowest,
        waited=waited,
        stopped=bool(validation.patience) and waited >= validation.patience,
    )
    value = math.nan if validation.best is None else validation.best(found)
    if math.isfinite(value) and (checks.best is None or value > checks.best):
        return dataclasses.replace(after, best=value, best_update=update)
    return after


def run_stage(
    run: Run,
    stage: Stage | Rounds,
    state: TrainState,
    update: Callable,
    *,
    at: Cursor | None,
    count: int,
    key: jax.Array,
    mesh: Mesh,
    frozen: Any,
    validation: Validation | None = None,
) -> tuple[TrainState, Cursor]:
    """The updates of a stage from where it stands on, logged, checked and saved as the run says; always saved at its
    end.

    Metrics of an update are read after the next one is dispatched, so that the devices never wait for the log. Within a
    round nothing is saved: what it trains on was made by the policy at its beginning.

    Args:
        state: donated. frozen: weights that no update changes ({} = none). update: of programs, for what the stage
            brings. at: where the stage stands, None = at its beginning. count: updates of the run before this stage.
            key: of the stage; each update folds its number in.

    Returns:
        the state and the cursor at the end.
    """
    total = stage.total
    logged = lambda: processes.once(lambda: run.metrics.offset)
    at = at or Cursor(stage.name, stage.iteration, 0, total, count, logged(), origins=run.origins)
    if at.checks.stopped:
        return state, at
    whole = meshes.replicated(mesh)
    total_array, key = meshes.put(np.int32(total), whole), meshes.put(key, whole)
    fold = jax.jit(jax.random.fold_in, out_shardings=whole)
    pending: dict | None = None
    fills: list[Fill] = []

    def log(last: dict | None) -> None:
        if last is not None:
            numbers = {name: float(value) for name, value in meshes.get(last["metrics"]).items()}
            share = sum(f.useful for f in last["fills"]) / max(sum(f.padded for f in last["fills"]), 1)
            run.metrics.write({**last["where"], **numbers, "perf/useful_tokens": share})

    def work() -> Iterator[tuple[Batch, Fill]]:
        nonlocal pending
        if isinstance(stage, Stage):
            yield from loaded(stage, mesh, done)
            return
        for number in range(done // stage.updates, stage.count):
            log(pending)
            pending = None
            yield from loaded(stage.make(number, state.params), mesh, 0)

    done, checks = at.update, at.checks
    saved, step = done, 1 if isinstance(stage, Stage) else stage.updates
    stream = zip(range(done, total), work(), strict=True)
    label = {"sft": "SFT", "reward": "reward model"}.get(stage.name, f"iteration {stage.iteration}: updates")
    for index, (batch, fill) in metriclib.track(stream, total=total - done, label=label, unit="updates"):
        state, metrics = update(state, frozen, batch, total_array, fold(key, index))
        fills.append(fill)
        log(pending)
        pending, found = None, None
        where = {"stage": stage.name, "iteration": stage.iteration, "step": index + 1}
        last = index + 1 == total
        if validation is not None and (index + 1) % validation.every == 0 and not last:
            found = validation.measure(state.params)
            found = processes.once(lambda found=found: found)  # it decides where the stage ends
            checks = checked(checks, index + 1, found, validation)
            if checks.best_update == index + 1 and validation.keep is not None:
                validation.keep(state.params)
            last = checks.stopped
        if (index + 1) % run.log_every == 0 or last:
            pending, fills = {"where": where, "metrics": metrics, "fills": fills}, []
        if found is not None:
            log(pending)
            pending = None
            run.metrics.write({**where, "stage": "validation", **found})
        due = (index + 1) // run.save_every > saved // run.save_every and (index + 1) % step == 0
        if due or last:
            log(pending)
            pending, saved = None, index + 1
            at = Cursor(stage.name, stage.iteration, index + 1, total, count + index + 1, logged(), checks, run.origins)
            run.checkpoints.save(at.count, state, dataclasses.asdict(at))
        if checks.stopped:
            break
    return state, at


def loaded(stage: Stage, mesh: Mesh, done: int) -> Iterator[tuple[Batch, Fill]]:
    """Batches of a stage from number `done` on, packed by grain's threads ahead of the devices."""
    where = programs.batch_shardings(mesh, tuple(stage.tokens_F))

    def pack(index: int) -> tuple[Batch, Fill]:
        members = stage.batches[index]
        trees = [stage.trees[i] for i in members]
        plan = rowlib.fitting(trees, stage.plans)
        packed = rowlib.pack(trees, plan)
        stacked, count = rowlib.microbatches(packed, plan, rowlib.most_microbatches(len(members), plan))
        branches = len(stage.trees[members[0]].branches)
        flat = (members[:, None] * branches + np.arange(branches)).reshape(-1)
        told_F = np.concatenate([tree.told for tree in trees]).astype(np.float32)
        batch = Batch(
            rows=stacked,
            reference_ABS=rowlib.spread(stage.reference_F[flat], stacked.example_BS),
            weight_ABS=rowlib.spread(np.repeat(stage.weight_N[members], branches), stacked.example_BS),
            target_ABS=rowlib.spread(told_F, stacked.example_BS),
            count=np.int32(count),
            tokens={
                name: rowlib.spread_tokens([known[i] for i in flat], stacked.example_BS, stacked.slot_BM)
                for name, known in stage.tokens_F.items()
            },
        )
        return batch, rowlib.fill(packed)

    if done >= len(stage.batches):
        return
    source = grain.MapDataset.range(done, len(stage.batches)).map(pack)
    for batch, fill in source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)):
        yield meshes.put(batch, where), fill
