"""The run folder: what it refuses and in which words; a killed stage of updates goes on as if it had not been."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from sera_jax import config, programs
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax import run as runs
from sera_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from sera_jax.records import Tree
from sera_jax.rows import Plan
from sera_jax.run import Cursor, RunError, Stage
from sera_jax.step import TrainState


def config_of(path, **changes) -> TrainConfig:
    change = dataclasses.replace
    record = TrainConfig(RunConfig(str(path)), ModelConfig("m"), DataConfig(("p.jsonl",)))
    for key, value in changes.items():
        section, _, field = key.partition("__")
        record = change(record, **{section: change(getattr(record, section), **{field: value})})
    return record


def opened(path, resume="auto", save_every=3, log_every=2, keep=2, content="c1", **changes):
    return runs.open_run(
        config.dump(config_of(path, **changes)),
        content=content,
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
        "loss.beta (0.1 → 0.2), loss.mix.ipo (None → 0.5). Choose another run.dir, or run with the folder's own "
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
        run__tensorboard=True, run__wandb="w",
    )  # fmt: skip
    runs.close(opened(tmp_path, **free))
    assert {key.replace("__", ".") for key in free} | {"run.dir"} == set(runs.FREE_KEYS)
    known = {f"run.{f.name}" for f in dataclasses.fields(RunConfig)}
    assert known - set(runs.FREE_KEYS) == {"run.seed", "run.log_every"}
    for key, value in {"run__seed": 1, "run__log_every": 3}.items():
        with pytest.raises(RunError, match=f"it differs in {key.replace('__', '.')} "):
            opened(tmp_path, **{key: value})


def test_a_moved_folder_is_the_same_run(tmp_path):
    begun(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    runs.close(opened(tmp_path / "new", "must"))
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["run"]["dir"] == str(tmp_path / "old")


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
        plan=PLAN,
    )


@pytest.fixture(scope="module")
def update(eight_devices):
    """Stands in for an update, and tells TRACES when it is traced. State and metrics depend on every part of the batch,
    the stage's length, the key, and on all updates before."""

    def run(state, batch, total, key):
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
        in_shardings=(whole, programs.batch_shardings(eight_devices), whole, whole),
        out_shardings=whole,
        donate_argnums=0,
    )


def first_state(mesh) -> TrainState:
    host = TrainState({"w": np.linspace(0, 1, 8, dtype=np.float32)}, {"m": np.float32(0)}, np.int32(0))
    return meshes.put(host, meshes.replicated(mesh))


def staged(path, stage, update, mesh, count: int = 0, **settings):
    """Opens the run and goes on from where it stands; returns the state, and what the run resumed from."""
    run = opened(path, **settings)
    try:
        state, done = first_state(mesh), 0
        if run.at is not None:
            like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
            state, done = run.checkpoints.restore(run.at.count, like), run.at.update
        key = jax.random.key(11)
        state = runs.run_stage(run, stage, state, update, done=done, count=count, key=key, mesh=mesh)
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
    assert run.at == Cursor("update", 2, update=10, total=10, count=110, offset=size)
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


def test_stages_share_one_program(tmp_path, stage, update, eight_devices):
    """From the start, after a restore, and for a stage of another length."""
    staged(tmp_path / "a", stage, update, eight_devices)
    with pytest.raises(RuntimeError, match="killed"):
        staged(tmp_path / "b", stage, killed(update, 5), eight_devices)
    staged(tmp_path / "b", stage, update, eight_devices)
    staged(tmp_path / "c", dataclasses.replace(stage, batches=stage.batches[:2]), update, eight_devices)
    assert len(TRACES) == 1
