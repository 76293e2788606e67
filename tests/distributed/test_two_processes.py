"""One run on two processes of two devices each: the same as on one process of four; stopped and resumed as if it had
not been; and what two processes that do not fit together say.
"""

import json
import pathlib
import time

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from sera_jax import train as trainer

# Weights split over the processes (fsdp), heads and vocabulary within each (tensor).
MESH = ("--mesh.fsdp=2", "--mesh.tensor=2")


def flags(tiny: pathlib.Path) -> list[str]:
    """SFT, two iterations with selection and samples, held-out pairs, evaluation by a function."""
    return [
        "--sft.epochs=1",
        "--sft.optimizer.batch_size=8",
        "--sft.optimizer.learning_rate=1e-2",
        "--data.validation=0.1",
        "--optimizer.learning_rate=1e-3",
        f"--evaluate.prompts=[{tiny / 'prompts.jsonl'}]",
        "--evaluate.function=tiny_reward:count",
        "--evaluate.max_new_tokens=10",
        *MESH,
    ]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A folder for the runs of this file; two processes import the reward function from it."""
    folder = tmp_path_factory.mktemp("two")
    source = (tiny / "tiny_reward.py").read_text()
    # Says which process asked, so that a test sees it was one of them.
    note = "import os\nopen(f\"asked-{os.environ.get('JAX_PROCESS_ID', 'alone')}\", 'a').write('.')\n"
    (folder / "tiny_reward.py").write_text(source + note)
    return folder


def command(config_flags: list[str], world: pathlib.Path, run: str, *more: str) -> list[str]:
    """`python -m sera_jax.train` of the flags that a config was made of."""
    own = [f for f in config_flags if not f.startswith(("--run.dir", "--run.compilation_cache", "--mesh.fsdp=1"))]
    return [
        *("-m", "sera_jax.train", f"--run.dir={world / run}", f"--run.compilation_cache={world / 'cache'}"),
        *("--mesh.distributed=true", *own, *more),
    ]


@pytest.fixture
def run_flags(tiny, tiny_config, monkeypatch):
    """The flags of a tiny run."""
    seen = {}
    monkeypatch.setattr("sera_jax.config.parse", lambda record, args: seen.update(args=args))
    tiny_config(*flags(tiny))
    return seen["args"]


def lines(run: pathlib.Path) -> list[dict]:
    """metrics.jsonl without timings."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def left(run: pathlib.Path) -> dict:
    """Everything that two equal runs must leave alike, bit for bit."""
    return {
        "metrics": lines(run),
        "tables": {str(p.relative_to(run)): pyarrow.parquet.read_table(p).to_pylist() for p in run.rglob("*.parquet")},
        "texts": {str(p.relative_to(run)): p.read_text() for p in run.rglob("*.jsonl") if p.name != "metrics.jsonl"},
        "weights": weights(run),
    }


def weights(run: pathlib.Path) -> dict:
    return {k: a.tolist() for k, a in safetensors.numpy.load_file(run / "export" / "model.safetensors").items()}


def table(run: pathlib.Path, name: str) -> dict:
    return pyarrow.parquet.read_table(run / name).to_pydict()


@pytest.fixture
def together(world, run_flags, joined):
    """The run of two processes that nothing interrupted."""
    run = world / "together"
    if not run.exists():
        both = command(run_flags, world, "together")
        group = joined(both, both, folder=world)
        assert group.ended() == [0, 0], group.said()
        # Process 0 alone talks; the other has nothing to tell.
        talk, silence = group.said()
        assert "iteration 2" in talk and "exported iterate 2" in talk
        assert not [line for line in silence.splitlines() if line.strip() and "Gloo" not in line], silence
    return run


def test_two_processes_make_the_run_of_one(world, together, tiny, tiny_config, monkeypatch):
    monkeypatch.chdir(world)
    config = tiny_config(*flags(tiny), run="alone")
    trainer.train(config)
    alone = pathlib.Path(config.run.dir)
    names = lambda run: sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    kept_names = lambda run: [n for n in names(run) if not n.startswith(("checkpoints/", "iterates/", "ledger/"))]
    assert kept_names(together) == kept_names(alone)  # and nothing half written
    assert [(r["stage"], r["iteration"], r["step"]) for r in lines(together)] == [
        (r["stage"], r["iteration"], r["step"]) for r in lines(alone)
    ]
    # Each number was asked for once, by process 0.
    asked = {p.name: p.stat().st_size for p in world.glob("asked-*")}
    assert asked["asked-0"] == 1 and "asked-1" not in asked
    for t in (1, 2):
        texts = [(run / "evaluation" / f"{t}.jsonl").read_text() for run in (together, alone)]
        assert texts[0] == texts[1]
        two, one = (table(run, f"evaluation/{t}.parquet") for run in (together, alone))
        assert two["reward"] == one["reward"]
        for column in ("logp", "logp_start"):
            np.testing.assert_allclose(two[column], one[column], atol=1e-5)
    two, one = (table(run, "iterations/2/kept.parquet") for run in (together, alone))
    assert two["kept"] == one["kept"] and two["id"] == one["id"]
    np.testing.assert_allclose(two["margin"], one["margin"], atol=1e-5)
    candidates = "iterations/2/candidates.jsonl"
    assert (together / candidates).read_text() == (alone / candidates).read_text()
    two, one = (table(run, "iterations/2/fresh.parquet") for run in (together, alone))
    assert two["id"] == one["id"] and two["kept"] == one["kept"]
    for key, least in (("loss", 1e-5), ("grad_norm", 1e-4)):
        two, one = ([r[key] for r in lines(run) if key in r] for run in (together, alone))
        np.testing.assert_allclose(two, one, rtol=least)
    two, one = weights(together), weights(alone)
    assert two.keys() == one.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=2e-5, err_msg=name)


def test_killed_and_resumed_is_the_run_that_nothing_interrupted(world, together, run_flags, joined):
    """SIGKILL of both in the updates of iteration 1, behind a checkpoint. Bit for bit."""
    both = command(run_flags, world, "killed")
    group = joined(both, both, folder=world)
    written = world / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (written.is_file() and written.read_text().count("\n") >= 9):  # 5 of SFT, 4 of iteration 1
        assert group.alive(), group.said()
        assert time.monotonic() < deadline, "never got there"
        time.sleep(0.005)
    group.kill()
    assert not (world / "killed" / "iterations" / "2").exists()
    group = joined(both, both, folder=world)
    assert group.ended() == [0, 0], group.said()
    assert left(world / "killed") == left(together)


def test_other_data_on_one_process_is_an_error_on_both(world, tiny, run_flags, joined):
    rows = (tiny / "pairs.jsonl").read_text().splitlines()
    (world / "other.jsonl").write_text("\n".join([*rows[:-1], rows[0].replace('"p0"', '"px"')]) + "\n")
    group = joined(
        command(run_flags, world, "other"),
        command(run_flags, world, "other", f"--data.pairs=[{world / 'other.jsonl'}]"),
        folder=world,
    )
    assert group.ended() == [1, 1], group.said()
    for said in group.said():
        assert "error: config, model and data of process 0 and of 1 differ, expected the same on all 2" in said
    assert not (world / "other").exists()
