"""The run folder: what it refuses and in which words; a killed stage of updates goes on as if it had not been."""

import dataclasses
import errno
import fcntl
import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from sera_jax import config, programs
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax import run as runs
from sera_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from sera_jax.records import Tree
from sera_jax.rows import Plan
from sera_jax.run import Checks, Cursor, RunError, Stage, Validation
from sera_jax.step import TrainState


def config_of(path, **changes) -> TrainConfig:
    change = dataclasses.replace
    record = TrainConfig(RunConfig(str(path)), ModelConfig("m"), DataConfig(("p.jsonl",)))

    def changed(part, key: str, value):
        section, _, rest = key.partition("__")
        return change(part, **{section: changed(getattr(part, section), rest, value) if rest else value})

    for key, value in changes.items():
        record = changed(record, key, value)
    return record


def opened(path, resume="auto", save_every=3, log_every=2, keep=2, content="c1", fingerprint="f1", **changes):
    return runs.open_run(
        config.dump(config_of(path, **changes)),
        content=content,
        fingerprint=fingerprint,
        resume=resume,
        keep=keep,
        save_every=save_every,
        log_every=log_every,
    )


def test_other_data_behind_the_same_config_is_refused(tmp_path):
    begun(tmp_path / "r")
    runs.close(opened(tmp_path / "r"))
    with pytest.raises(RunError, match=r"same config on other data or another model.*content c1 → c2.*Restore them"):
        opened(tmp_path / "r", content="c2")


def begun(path, **changes):
    """A folder in which something was done already."""
    runs.close(opened(path, **changes))
    (path / "iterations").mkdir()


# --- opening ----------------------------------------------------------------------------------------------------------


def test_a_new_folder_gets_the_config(tmp_path):
    run = opened(tmp_path / "a" / "b", loss__beta=0.25)
    runs.close(run)
    assert run.at is None and (run.save_every, run.log_every) == (3, 2)
    stored = (tmp_path / "a" / "b" / "config.yaml").read_text()
    assert stored == config.dump(config_of(tmp_path / "a" / "b", loss__beta=0.25))
    assert (run.path / "metrics.jsonl").read_bytes() == b""


def test_never_wants_a_new_folder(tmp_path):
    runs.close(opened(tmp_path / "run", "never"))
    with pytest.raises(RunError, match="run is not empty and run.resume is 'never'. Choose another run.dir, or"):
        opened(tmp_path / "run", "never")
    (tmp_path / "empty").mkdir()
    runs.close(opened(tmp_path / "empty", "never"))


def test_must_wants_a_run(tmp_path):
    with pytest.raises(RunError, match=r"run holds no config.yaml and run.resume is 'must'. Check run.dir, or start"):
        opened(tmp_path / "run", "must")
    assert not (tmp_path / "run").exists()
    runs.close(opened(tmp_path / "run"))
    runs.close(opened(tmp_path / "run", "must"))


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_another_config_is_refused_with_the_keys_that_differ(tmp_path, resume):
    begun(tmp_path, loss__beta=0.1)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(RunError) as error:
        opened(tmp_path, resume, loss__beta=0.2, loss__mix={"ipo": 0.5}, data__pairs=("q", "r"), run__seed=3)
    assert str(error.value) == (
        f"{tmp_path} belongs to another config; it differs in run.seed (0 → 3), data.pairs (['p.jsonl'] → ['q', 'r']), "
        "loss.beta (0.1 → 0.2), loss.mix.ipo (absent → 0.5). Choose another run.dir, or run with the folder's own "
        "config.yaml."
    )
    assert (tmp_path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("name", ["ledger", "iterations", "iterates", "checkpoints/3"])
def test_a_folder_in_which_nothing_was_done_belongs_to_nobody(tmp_path, name):
    runs.close(opened(tmp_path, loss__beta=0.1))
    runs.close(opened(tmp_path, loss__beta=0.2))
    assert config.parse(TrainConfig, ["--config", str(tmp_path / "config.yaml")]).loss.beta == 0.2
    (tmp_path / name).mkdir()
    with pytest.raises(RunError, match="belongs to another config; it differs in loss.beta"):
        opened(tmp_path, loss__beta=0.1)


def test_keys_that_change_no_number_are_free(tmp_path):
    begun(tmp_path)
    free = dict(
        run__resume="must", run__save_every=7, run__keep_checkpoints=9, run__ledger="x", run__compilation_cache="off",
        run__tensorboard=True, run__wandb="w", judge__base_url="http://a", judge__concurrent=1, judge__per_minute=5,
        judge__retries=1, judge__timeout=1.5, judge__price_in=2.5, judge__price_out=3.5, judge__key_env="K",
        judge__cache="c",
    )  # fmt: skip
    runs.close(opened(tmp_path, **free))
    assert {key.replace("__", ".") for key in free} | {"run.dir"} == set(runs.FREE_KEYS)
    known = {f"run.{f.name}" for f in dataclasses.fields(RunConfig)}
    assert known - set(runs.FREE_KEYS) == {"run.seed", "run.log_every"}
    for key, value in {"run__seed": 1, "run__log_every": 3}.items():
        with pytest.raises(RunError, match=f"it differs in {key.replace('__', '.')} "):
            opened(tmp_path, **{key: value})


def test_keys_of_the_layout_are_free(tmp_path):
    """On other devices, in other portions: the same run. Everything else of model, bootstrap and optimiser is not."""
    begun(tmp_path)
    layout = dict(
        mesh__data=2, mesh__fsdp=4, mesh__tensor=2, mesh__slices=2, mesh__distributed=True, model__remat="none",
        model__head_chunk=64, bootstrap__slots=8, bootstrap__refill=4, optimizer__row_tokens=256,
        optimizer__microbatch_rows=2,
        sft__optimizer__row_tokens=128, sft__optimizer__microbatch_rows=4, optimizer__moments="host",
        sft__optimizer__moments="host", model__attention="xla", optimizer__row_shapes=1, sft__optimizer__row_shapes=3,
    )  # fmt: skip
    runs.close(opened(tmp_path, **layout))
    assert {key.replace("__", ".") for key in layout} == set(runs.LAYOUT_KEYS)
    assert {f"mesh.{f.name}" for f in dataclasses.fields(MeshConfig)} <= set(runs.LAYOUT_KEYS)
    for key, value in {"optimizer__batch_size": 4, "model__compute": "bfloat16", "bootstrap__candidates": 7}.items():
        with pytest.raises(RunError, match=f"it differs in {key.replace('__', '.')} "):
            opened(tmp_path, **layout | {key: value})


def test_where_a_run_has_been_computed_is_part_of_its_iterates():
    """Iterates that were made before it went elsewhere keep their fingerprint, all later ones get another."""
    start = runs.origins(None, "a")
    assert start == ((0, 0, "a"),)
    inside = Cursor("update", 2, 3, 10, 13, 0, origins=start)
    assert runs.origins(inside, "a") == start
    moved = runs.origins(inside, "b")
    assert moved == ((0, 0, "a"), (2, 13, "b"))
    ends = [dataclasses.replace(inside, update=10), dataclasses.replace(inside, checks=Checks(stopped=True))]
    assert [runs.origins(at, "b")[-1][0] for at in ends] == [3, 3]
    back = runs.origins(Cursor("update", 2, 5, 10, 15, 0, origins=moved), "a")
    assert back == (*moved, (2, 15, "a"))
    assert runs.origins(dataclasses.replace(inside, origins=()), "b") == ((0, 0, "b"),)  # of an older version

    def prints(origins):
        return runs.fingerprints(origins)

    assert prints(start) == ((0, "a"),)
    (first, a), (second, ab) = prints(moved)
    assert (first, a, second) == (0, "a", 2) and ab not in ("a", "b")
    assert prints(back)[:2] == prints(moved)
    elsewhen = runs.origins(dataclasses.replace(inside, count=14), "b")
    assert len({ab, prints(elsewhen)[1][1], prints(back)[2][1], "a", "b"}) == 5


def test_a_moved_folder_is_the_same_run(tmp_path):
    begun(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    runs.close(opened(tmp_path / "new", "must"))
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["run"]["dir"] == str(tmp_path / "old")


@pytest.mark.parametrize("name, text", [("config.yaml", "loss: ["), ("config.yaml", ""), ("content", None)])
def test_a_damaged_folder_is_refused_and_left_as_it_is(tmp_path, name, text):
    begun(tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=f"{name} is missing or damaged, so that nobody can tell .* Restore it, or"):
        opened(tmp_path)
    assert (tmp_path / name).exists() == (text is not None) and (text is None or (tmp_path / name).read_text() == text)


def test_a_key_that_only_one_side_knows_is_named(tmp_path):
    """A folder of another version of the program."""
    begun(tmp_path)
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del stored["loop"]["early_stop"]
    stored["loss"]["old_key"] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(RunError, match=re.escape("loop.early_stop (absent → 0), loss.old_key (None → absent).")):
        opened(tmp_path)


# --- one run a folder -------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_and_free_again_when_it_is_closed(tmp_path):
    run = opened(tmp_path)
    (tmp_path / "iterations").mkdir()
    told = rf"{tmp_path} is in use by another run \(process {os.getpid()} on {re.escape(socket.gethostname())}, since "
    for resume in ("auto", "must", "never"):
        with pytest.raises(RunError, match=told + r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\)\. Wait for it, stop it"):
            opened(tmp_path, resume)
        with pytest.raises(RunError, match="is in use"):  # also before another config is told
            opened(tmp_path, loss__beta=0.7)
    assert run.metrics.offset == 0  # and nothing was cut off under the one that runs
    runs.close(run)
    runs.close(opened(tmp_path))


def test_a_refused_folder_is_not_held(tmp_path):
    begun(tmp_path)
    for _ in range(2):
        with pytest.raises(RunError, match="belongs to another config"):
            opened(tmp_path, loss__beta=0.7)
    runs.close(opened(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("{}\n" * 3)
    (tmp_path / "checkpoints" / "bad").mkdir()
    runs.close(opened(tmp_path))


def test_the_lock_file_alone_makes_no_run(tmp_path):
    (tmp_path / runs.LOCK).write_text("process 1 on moon, since long ago\n" * 9)
    runs.close(opened(tmp_path, "never"))
    assert (tmp_path / runs.LOCK).read_text().count("\n") == 1


HOLDER = """
import sys, time
from tests.test_run import opened
import pathlib
run = opened(pathlib.Path(sys.argv[1]))
print("open", flush=True)
time.sleep(600)
"""


def test_a_killed_process_lets_the_folder_go(tmp_path):
    """SIGKILL: no handler, no clean-up, no lock that stays."""
    root = pathlib.Path(runs.__file__).parents[1]
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(RunError, match=f"is in use by another run .process {process.pid} on "):
            opened(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert f"process {process.pid}" in (tmp_path / runs.LOCK).read_text()
    runs.close(opened(tmp_path))


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    runs.close(opened(tmp_path))
    assert f"{tmp_path} cannot be locked (No locks available): see to it that no second run" in capsys.readouterr().out


# --- a stage of updates -----------------------------------------------------------------------------------------------

UPDATES, BATCH = 10, 4
TRACES: list[int] = []
PLAN = Plan(32, 32, 4, 4)


@pytest.fixture(scope="module")
def stage() -> Stage:
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, 50, n).astype(np.int32)
    trees = [Tree(f"t{i}", ids(rng.integers(1, 6)), (ids(rng.integers(1, 8)), ids(3))) for i in range(20)]
    return Stage(
        name="update",
        iteration=2,
        batches=[rng.permutation(20)[:BATCH] for _ in range(UPDATES)],
        trees=trees,
        reference_F=rng.normal(size=40).astype(np.float32),
        weight_N=rng.uniform(0.5, 1, 20).astype(np.float32),
        plans=(PLAN,),
    )


@pytest.fixture(scope="module")
def update(eight_devices):
    """Stands in for an update, and tells TRACES when it is traced. State and metrics depend on every part of the batch,
    the stage's length, the key, and on all updates before."""

    def run(state, frozen, batch, total, key):
        TRACES.append(1)
        tokens = jnp.sum(jnp.where(batch.rows.tree_BL > 0, batch.rows.tokens_BL, 0))
        reference, weight = jnp.sum(batch.reference_ABS), jnp.sum(batch.weight_ABS)
        w = jnp.sin(state.params["w"] * 3 + reference + weight) + jax.random.normal(key, (8,)) / total
        metrics = {"tokens": tokens, "reference": reference, "weight": weight, "total": total, "w": w[0]}
        moments = {"m": state.moments["m"] * 0.5 + batch.count}
        return TrainState({"w": w}, moments, state.step + 1), metrics

    whole = meshes.replicated(eight_devices)
    return jax.jit(
        run,
        in_shardings=(whole, {}, programs.batch_shardings(eight_devices), whole, whole),
        out_shardings=whole,
        donate_argnums=0,
    )


def first_state(mesh) -> TrainState:
    host = TrainState({"w": np.linspace(0, 1, 8, dtype=np.float32)}, {"m": np.float32(0)}, np.int32(0))
    return meshes.put(host, meshes.replicated(mesh))


def staged(path, stage, update, mesh, count: int = 0, validation=None, **settings):
    """Opens the run and goes on from where it stands; returns the state, and what the run resumed from."""
    run = opened(path, **settings)
    try:
        state = first_state(mesh)
        if run.at is not None:
            like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
            state = run.checkpoints.restore(run.at.count, like)
        key = jax.random.key(11)
        state, _ = runs.run_stage(
            run, stage, state, update, at=run.at, count=count, key=key, mesh=mesh, frozen={}, validation=validation
        )
        return meshes.get(state), run.at
    finally:
        runs.close(run)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def without_timings(path) -> bytes:
    kept = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines(path)]
    return "\n".join(json.dumps(line) for line in kept).encode()


def expected_numbers(stage, index: int) -> dict:
    """What an update sees, from the stage alone."""
    members = stage.batches[index]
    trees = [stage.trees[i] for i in members]
    tokens = sum(int(t.prompt.sum()) + sum(int(b.sum()) for b in t.branches) for t in trees)
    reference = sum(float(stage.reference_F[2 * i + b]) for i in members for b in (0, 1))
    return {"tokens": tokens, "reference": reference, "weight": 2 * float(stage.weight_N[members].sum())}


@pytest.mark.parametrize("log_every, steps", [(1, range(1, 11)), (3, [3, 6, 9, 10]), (4, [4, 8, 10]), (50, [10])])
def test_metrics_come_every_so_often_in_the_order_of_the_batches(
    tmp_path, stage, update, eight_devices, log_every, steps
):
    staged(tmp_path, stage, update, eight_devices, log_every=log_every, save_every=100)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(steps)
    for line in found:
        assert (line["stage"], line["iteration"], line["total"]) == ("update", 2, UPDATES)
        want = expected_numbers(stage, line["step"] - 1)
        assert {k: line[k] for k in want} == pytest.approx(want, rel=1e-5)
    # Useful tokens: of all the updates since the line before.
    spans = zip([0, *steps], steps)
    for line, (start, stop) in zip(found, spans):
        packed = [rowlib.pack([stage.trees[i] for i in stage.batches[u]], PLAN) for u in range(start, stop)]
        useful, padded = (sum(getattr(rowlib.fill(p), f) for p in packed) for f in ("useful", "padded"))
        assert line["perf/useful_tokens"] == pytest.approx(useful / padded)


def test_checkpoints_come_every_so_often_and_at_the_end(tmp_path, stage, update, eight_devices):
    state, at = staged(tmp_path, stage, update, eight_devices, count=100, save_every=4, log_every=3, keep=5)
    assert at is None and int(state.step) == UPDATES
    run = opened(tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [104, 108, 110]
    size = (tmp_path / "metrics.jsonl").stat().st_size
    origins = ((0, 0, "f1"),)
    assert run.at == Cursor("update", 2, update=10, total=10, count=110, offset=size, origins=origins)
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), first_state(eight_devices)
    )
    jax.tree.map(np.testing.assert_array_equal, meshes.get(run.checkpoints.restore(110, like)), state)
    runs.close(run)


def killed(update, at: int):
    """The update, until the process dies in number `at` (from 1)."""
    calls = []

    def run(*args):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("killed")
        return update(*args)

    return run


@pytest.mark.parametrize(
    "save_every, log_every, dies, resumed",
    [
        (3, 2, [8], [6]),
        (3, 2, [7], [6]),
        (4, 4, [9], [8]),
        (2, 3, [4, 4], [2, 4]),
        (1, 1, [2, 9], [1, 9]),
        (4, 1, [8], [4]),  # lines behind the checkpoint are cut off
        (9, 1, [5], [0]),  # also where there is none yet
    ],
)
def test_a_killed_stage_goes_on_as_if_it_had_not_been(
    tmp_path, stage, update, eight_devices, save_every, log_every, dies, resumed
):
    """metrics.jsonl byte for byte but for timings, and every bit of the state; also if it dies twice."""
    every = {"save_every": save_every, "log_every": log_every}
    want, _ = staged(tmp_path / "whole", stage, update, eight_devices, **every)
    path = tmp_path / "killed"
    for at in dies:
        with pytest.raises(RuntimeError, match="killed"):
            staged(path, stage, killed(update, at), eight_devices, **every)
    got, cursor = staged(path, stage, update, eight_devices, **every)
    assert (cursor.update if cursor else 0) == resumed[-1]
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert without_timings(path) == without_timings(tmp_path / "whole")


def test_a_finished_stage_is_not_run_again(tmp_path, stage, update, eight_devices):
    want, _ = staged(tmp_path, stage, update, eight_devices)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    got, cursor = staged(tmp_path, stage, killed(update, 1), eight_devices)
    assert cursor.update == cursor.total == UPDATES
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


# --- a disk that takes no more ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's threads, on their way out
def test_a_stage_whose_save_fails_goes_on_from_the_one_before(tmp_path, stage, update, eight_devices, small_files):
    """The kernel refuses the checkpoint behind update 6 (of 3, 6, 9, 10); with room again, nothing tells of it."""
    want, _ = staged(tmp_path / "whole", stage, update, eight_devices, log_every=99)
    path, calls = tmp_path / "full", []

    def filling(*args):
        calls.append(1)
        if len(calls) == 5:
            run.checkpoints.wait()
            limit.__enter__()
        return update(*args)

    limit = small_files(1)
    run = opened(path, log_every=99)
    try:
        with pytest.raises(RunError) as error, runs.closing(run):
            runs.run_stage(
                run, stage, first_state(eight_devices), filling, at=None, count=0, key=jax.random.key(11),
                mesh=eight_devices, frozen={},
            )  # fmt: skip
    finally:
        limit.__exit__(None, None, None)
    said = str(error.value)
    assert said.startswith(f"{path}/checkpoints/6 could not be written: File too large (40 bytes to write, ")
    assert " free there). Make room, or raise the quota. What was saved before is whole: " in said
    assert said.endswith("the same command goes on behind update 3 of 10 of iteration 2.") and "\n" not in said
    got, at = staged(path, stage, update, eight_devices, log_every=99)
    assert at.update == 3
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert without_timings(path) == without_timings(tmp_path / "whole")


def test_before_the_first_save_the_run_begins_again(tmp_path, small_files):
    run = opened(tmp_path)
    with pytest.raises(RunError, match="No checkpoint was saved yet: the same command begins again.$"):
        with small_files(10), runs.closing(run):
            run.metrics.write({"stage": "update", "iteration": 1, "step": 1, "loss": 0.5})
    assert (tmp_path / "metrics.jsonl").stat().st_size == 10  # a torn line
    run = opened(tmp_path)
    run.metrics.write({"stage": "update", "iteration": 1, "step": 1})
    runs.close(run)
    assert len(lines(tmp_path)) == 1


def test_what_is_no_fault_of_the_disk_stays_what_it_was(tmp_path):
    with pytest.raises(ConnectionError), runs.closing(opened(tmp_path)):
        raise ConnectionError("the judge is away")
    runs.close(opened(tmp_path))


# --- checks on held-out pairs -----------------------------------------------------------------------------------------


def stops_at(losses: list[float], patience: int) -> int | None:
    """The first check (from 1) of which the last `patience` bring nothing below all before them."""
    for n in range(1, len(losses) + 1):
        early, late = losses[: n - patience], losses[max(n - patience, 0) : n]
        least = min([x for x in early if math.isfinite(x)], default=math.inf)
        if patience and n >= patience and not any(x < least for x in late):
            return n
    return None


@pytest.mark.parametrize("patience", [0, 1, 2, 3])
def test_patience_is_checks_without_a_new_lowest_loss(patience):
    rng = np.random.default_rng(patience)
    stopped = 0
    for case in range(200):
        values = rng.integers(0, 6, 8).astype(float).tolist()
        if case % 4 == 0:
            values[rng.integers(8)] = math.nan
        checks, found = Checks(), None
        for n, loss in enumerate(values, 1):
            checks = runs.checked(checks, n, {"validation/loss": loss}, Validation(1, dict, patience))
            if checks.stopped:
                found = n
                break
        assert found == stops_at(values, patience), values
        seen = [x for x in values[: found or 8] if math.isfinite(x)]
        assert checks.lowest == min(seen, default=None)
        stopped += found is not None
    assert (stopped > 100) == bool(patience)


def test_the_best_point_is_the_first_of_the_highest_values():
    validation = Validation(1, dict, 0, best=lambda found: found["v"], keep=lambda params: None)
    checks, bests = Checks(), []
    for n, value in enumerate([math.nan, 0.2, 0.5, 0.5, math.nan, 0.4, 0.6], 1):
        checks = runs.checked(checks, n, {"validation/loss": 1.0, "v": value}, validation)
        bests.append((checks.best, checks.best_update))
    assert bests == [(None, 0), (0.2, 2), (0.5, 3), (0.5, 3), (0.5, 3), (0.5, 3), (0.6, 7)]


def measure(params) -> dict[str, float]:
    """Depends on every bit of the weights."""
    w = np.asarray(params["w"], np.float64)
    return {"validation/loss": -float(w[1]), "validation/mean": float(w.mean()), "all": w.tolist()}


def checks_of(path) -> list[dict]:
    return [line for line in lines(path) if line["stage"] == "validation"]


def test_checks_are_made_every_so_often_and_change_nothing(tmp_path, stage, update, eight_devices):
    kept = []
    keep = lambda params: kept.append(np.array(params["w"]))
    validation = Validation(3, measure, 0, best=lambda found: -found["validation/mean"], keep=keep)
    plain, _ = staged(tmp_path / "plain", stage, update, eight_devices, log_every=3)
    got, _ = staged(tmp_path / "checked", stage, update, eight_devices, validation=validation, log_every=3)
    jax.tree.map(np.testing.assert_array_equal, got, plain)
    found = checks_of(tmp_path / "checked")
    assert [line["step"] for line in found] == [3, 6, 9]  # the end of the stage is the summary's
    order = [(line["stage"], line["step"]) for line in lines(tmp_path / "checked")]
    assert order == [(s, n) for n in (3, 6, 9) for s in ("update", "validation")] + [("update", 10)]
    value = [-line["validation/mean"] for line in found]
    best = [n for n in range(3) if n == 0 or value[n] > max(value[:n])]
    np.testing.assert_array_equal([float(w.astype(np.float64).mean()) for w in kept], [-value[n] for n in best])
    run = opened(tmp_path / "checked")
    assert run.at.checks.best == max(value) and run.at.checks.best_update == 3 * (value.index(max(value)) + 1)
    runs.close(run)


@pytest.mark.parametrize("save_every, dies", [(3, []), (3, [5]), (5, [6]), (2, [3, 4]), (1, [6]), (9, [6])])
def test_an_early_stop_is_the_same_however_often_the_run_died(tmp_path, stage, update, eight_devices, save_every, dies):
    every = {"save_every": save_every, "log_every": 4}
    _, _ = staged(tmp_path / "all", stage, update, eight_devices, validation=Validation(1, measure), **every)
    seen = [line["validation/loss"] for line in checks_of(tmp_path / "all")]
    patience = 2
    end = stops_at(seen, patience)
    assert end == 6, "the kills below are made for it"
    validation = Validation(1, measure, patience, lambda found: -found["validation/loss"], lambda params: None)
    for at in dies:
        with pytest.raises(RuntimeError, match="killed"):
            staged(tmp_path / "r", stage, killed(update, at), eight_devices, validation=validation, **every)
    staged(tmp_path / "r", stage, update, eight_devices, validation=validation, **every)
    assert [line["validation/loss"] for line in checks_of(tmp_path / "r")] == seen[:end]
    assert [line["step"] for line in lines(tmp_path / "r") if line["stage"] == "update"] == [4, end]
    # Nothing is left to do, and the state that is found again is that of the stop.
    got, at = staged(tmp_path / "r", stage, killed(update, 1), eight_devices, validation=validation, **every)
    least = min(seen[:end])
    assert at.checks == Checks(least, patience, -least, seen.index(least) + 1, stopped=True)
    assert (at.update, at.total, at.count, int(got.step)) == (end, UPDATES, end, end)
    assert measure(got.params)["validation/loss"] == seen[end - 1]


def test_stages_share_one_program(tmp_path, stage, update, eight_devices):
    """From the start, after a restore, and for a stage of another length."""
    staged(tmp_path / "a", stage, update, eight_devices)
    with pytest.raises(RuntimeError, match="killed"):
        staged(tmp_path / "b", stage, killed(update, 5), eight_devices)
    staged(tmp_path / "b", stage, update, eight_devices)
    staged(tmp_path / "c", dataclasses.replace(stage, batches=stage.batches[:2]), update, eight_devices)
    assert len(TRACES) == 1
