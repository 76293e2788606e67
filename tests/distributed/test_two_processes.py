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


def flags(tiny: pathlib.Path) -> list[str]:
    """SFT, two iterations with selection and samples, held-out pairs, evaluation by a function. Weights are split over
    the processes (fsdp), heads and vocabulary within each (tensor)."""
    return [
        "--run.log_every=1",
        "--run.save_every=2",
        f"--model.path={tiny / 'model'}",
        "--model.weights=random",
        f"--data.pairs=[{tiny / 'pairs.jsonl'}]",
        f"--data.prompts=[{tiny / 'prompts.jsonl'}]",
        "--data.max_length=48",
        "--data.max_prompt_length=24",
        "--data.validation=0.1",
        "--sft.epochs=1",
        "--sft.optimizer.batch_size=8",
        "--sft.optimizer.learning_rate=1e-2",
        "--optimizer.batch_size=8",
        "--optimizer.learning_rate=1e-3",
        "--loop.iterations=2",
        "--bootstrap.max_new_tokens=10",
        "--bootstrap.slots=16",
        "--bootstrap.unfinished=keep",
        f"--evaluate.prompts=[{tiny / 'prompts.jsonl'}]",
        "--evaluate.function=tiny_reward:count",
        "--evaluate.limit=8",
        "--evaluate.max_new_tokens=10",
        "--mesh.fsdp=2",
        "--mesh.tensor=2",
    ]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A folder for the runs of this file; its reward function leaves a dot for every process that imports it."""
    folder = tmp_path_factory.mktemp("two")
    note = "import os\nopen(f\"asked-{os.environ.get('JAX_PROCESS_ID')}\", 'a').write('.')\n"
    (folder / "tiny_reward.py").write_text((tiny / "tiny_reward.py").read_text() + note)
    return folder


@pytest.fixture(scope="module")
def command(tiny, world):
    """command("run folder", *more flags): `python -m sera_jax.train` of one process."""

    def make(run: str, *more: str) -> list[str]:
        own = [f"--run.dir={world / run}", f"--run.compilation_cache={world / 'cache'}"]
        return ["-m", "sera_jax.train", *own, *flags(tiny), *more]

    return make


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


SEVERAL = "--mesh.distributed=true"


@pytest.fixture(scope="module")
def runs(world, command, joined):
    """The run of two processes, and that of one on as many devices, which nothing interrupted."""
    both = command("together", SEVERAL)
    two, one = joined(both, both, devices=2), joined(command("alone"), devices=4)
    assert two.ended() == [0, 0], two.said()
    assert one.ended() == [0], one.said()
    # Process 0 alone talks.
    talk, silence = two.said()
    assert "iteration 2" in talk and "exported iterate 2" in talk
    said = {line for line in talk.splitlines() if line.strip() and "Gloo" not in line}
    assert not said & set(silence.splitlines()), silence
    return world / "together", world / "alone"


def test_two_processes_make_the_run_of_one(world, runs):
    together, alone = runs
    names = lambda run: sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    kept_names = lambda run: [n for n in names(run) if not n.startswith(("checkpoints/", "iterates/", "ledger/"))]
    assert kept_names(together) == kept_names(alone)  # and nothing half written
    assert [(r["stage"], r["iteration"], r["step"]) for r in lines(together)] == [
        (r["stage"], r["iteration"], r["step"]) for r in lines(alone)
    ]
    # Process 0 alone has the reward function (so has the one that is alone).
    assert {p.name: p.stat().st_size for p in world.glob("asked-*")} == {"asked-0": 2}
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


def test_killed_and_resumed_is_the_run_that_nothing_interrupted(world, runs, command, joined):
    """SIGKILL of both in the updates of iteration 1, behind a checkpoint. Bit for bit."""
    both = command("killed", SEVERAL)
    group = joined(both, both, devices=2)
    written = world / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + group.PATIENCE
    while not (written.is_file() and written.read_text().count("\n") >= 8):  # 5 of SFT, 3 of iteration 1
        assert group.alive(), group.said()
        assert time.monotonic() < deadline, "never got there"
        time.sleep(0.005)
    group.kill()
    assert not (world / "killed" / "iterations" / "2").exists()
    group = joined(both, both, devices=2)
    assert group.ended() == [0, 0], group.said()
    assert left(world / "killed") == left(runs[0])


def test_other_data_on_one_process_is_an_error_on_both(world, tiny, command, joined):
    rows = (tiny / "pairs.jsonl").read_text().splitlines()
    (world / "other.jsonl").write_text("\n".join([*rows[:-1], rows[0].replace('"p0"', '"px"')]) + "\n")
    of_one = f"--data.pairs=[{world / 'other.jsonl'}]"
    group = joined(command("other", SEVERAL), command("other", SEVERAL, of_one), devices=2)
    assert group.ended() == [1, 1], group.said()
    for said in group.said():
        assert "error: config, model and data of process 0 and of 1 differ, expected the same on all 2" in said
    assert not (world / "other").exists()
