"""The whole walk on a tiny world: what it leaves, that a stopped run goes on as if it had not, that meshes agree."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from sera_jax import config as configs
from sera_jax import mesh as meshes
from sera_jax import programs
from sera_jax import train as trainer

SFT = ("--sft.epochs=1", "--sft.optimizer.batch_size=8", "--sft.optimizer.learning_rate=1e-2")


class Stopped(Exception):
    pass


def stop_after(monkeypatch, name: str, calls: int) -> None:
    """The program that `programs.<name>` builds raises at its call number `calls`."""
    build = getattr(programs, name)
    made = [0]

    def building(*args, **kwargs):
        program = build(*args, **kwargs)

        def counted(*a, **k):
            made[0] += 1
            if made[0] == calls:
                raise Stopped
            return program(*a, **k)

        return counted

    monkeypatch.setattr(programs, name, building)


def lines(run: pathlib.Path) -> list[dict]:
    """metrics.jsonl without timings."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def left(run: pathlib.Path) -> dict:
    """Everything that two equal runs must leave alike, bit for bit."""
    tables = {
        str(path.relative_to(run)): pyarrow.parquet.read_table(path).to_pylist() for path in run.rglob("*.parquet")
    }
    texts = {str(p.relative_to(run)): p.read_text() for p in run.rglob("*.jsonl") if p.name != "metrics.jsonl"}
    weights = safetensors.numpy.load_file(run / "export" / "model.safetensors")
    return {
        "metrics": lines(run),
        "tables": tables,
        "texts": texts,
        "weights": {name: array.tobytes() for name, array in weights.items()},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """The run that nothing interrupted; made by the first test that needs it, through `uninterrupted`."""
    return {}


@pytest.fixture
def uninterrupted(whole, tiny_config):
    if not whole:
        config = tiny_config(*SFT, "--data.validation=0.1", run="whole")
        trainer.train(config)
        whole["run"] = pathlib.Path(config.run.dir)
    return whole["run"]


def test_a_run_leaves_what_readme_promises(uninterrupted):
    run = uninterrupted
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "iterations/1/summary.json",
        "iterations/2/summary.json",
        "iterations/2/kept.parquet",
        "iterations/2/fresh.parquet",
        "iterations/2/candidates.jsonl",
        "export/config.json",
        "export/model.safetensors",
        "export/tokenizer.json",
        "export/README.md",
    ):
        assert name in names, name
    assert {"0", "1", "2"} == {p.name for p in (run / "iterates").iterdir()}
    stages = [(r["stage"], r["iteration"], r["step"]) for r in lines(run)]
    given = json.loads((run / "iterations/1/summary.json").read_text())["pairs/given"]
    assert 36 <= given < 44  # a tenth is held out, whole prompts at a time
    updates = -(-given // 8)
    want = [("sft", 0, i + 1) for i in range(updates)]
    for t in (1, 2):
        want += [("update", t, i + 1) for i in range(updates)] + [("iteration", t, 0)]
    assert stages == want
    first = lines(run)[updates]
    # The policy starts as its own reference: log σ(0), up to the rounding of scorer and update.
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and abs(first["rewards/margins"]) < 1e-5
    summary = json.loads((run / "iterations/2/summary.json").read_text())
    kept = pyarrow.parquet.read_table(run / "iterations/2/kept.parquet").to_pylist()
    assert summary["pairs/kept"] == sum(row["kept"] for row in kept) == int(0.7 * len(kept))
    least_kept = min(row["margin"] for row in kept if row["kept"])
    assert all(row["margin"] <= least_kept for row in kept if not row["kept"])
    fresh = pyarrow.parquet.read_table(run / "iterations/2/fresh.parquet").to_pylist()
    assert summary["sera/fresh_pairs"] == sum(row["kept"] for row in fresh) <= round(0.3 * len(kept))
    assert all(row["reward_chosen"] > row["reward_rejected"] for row in fresh)
    assert summary["pairs/trained"] == summary["pairs/kept"] + summary["sera/fresh_pairs"]


@pytest.mark.parametrize(
    ("program", "calls"),
    [
        ("sft_update", 4),  # in SFT, between two checkpoints
        ("preference_update", 4),  # in an update of iteration 1
        ("scorer", 3),  # while the given pairs are scored
        ("decoder", 2),  # while sampling, after a batch is on disk
        ("preference_update", 8),  # in an update of iteration 2
    ],
)
def test_stopped_and_resumed_is_not_stopped(uninterrupted, tiny_config, monkeypatch, program, calls):
    """Metrics, masks, samples and weights, bit for bit."""
    config = tiny_config(*SFT, "--data.validation=0.1", run="stopped")
    with monkeypatch.context() as patched:
        stop_after(patched, program, calls)
        with pytest.raises(Stopped):
            trainer.train(config)
    run = pathlib.Path(config.run.dir)
    assert not (run / "export").exists()
    trainer.train(config)
    got, want = left(run), left(uninterrupted)
    assert got["metrics"] == want["metrics"]
    assert got["tables"] == want["tables"]
    assert got["texts"] == want["texts"]
    assert got["weights"] == want["weights"]


def test_a_finished_run_is_only_exported_again(uninterrupted, tiny_config, monkeypatch):
    before = left(uninterrupted)
    for name in ("preference_update", "sft_update", "scorer", "decoder"):
        stop_after(monkeypatch, name, 1)
    config = tiny_config(*SFT, "--data.validation=0.1", f"--run.dir={uninterrupted}")
    trainer.train(config)
    assert left(uninterrupted) == before


def test_eight_devices_make_the_same_run(tiny_config):
    """One iteration of updates, then scores: data 2 × fsdp 2 × tensor 2 against one device."""
    # A batch of one microbatch of eight rows on both, so that only the devices differ.
    flags = ("--bootstrap.temperature=0.7", "--optimizer.learning_rate=1e-3")
    one, eight = (
        tiny_config(*flags, *mesh, run=name)
        for name, mesh in (("one", ()), ("eight", ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2")))
    )
    trainer.train(one)
    trainer.train(eight)
    runs = [pathlib.Path(c.run.dir) for c in (one, eight)]
    losses = [[r["loss"] for r in lines(run) if r["stage"] == "update" and r["iteration"] == 1] for run in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    kept = [pyarrow.parquet.read_table(run / "iterations/2/kept.parquet").to_pydict() for run in runs]
    assert kept[0]["id"] == kept[1]["id"]
    np.testing.assert_allclose(kept[0]["margin"], kept[1]["margin"], atol=1e-5)
    texts = [(run / "iterations/2/candidates.jsonl").read_text().splitlines() for run in runs]
    candidates = [{row["id"]: row["tokens"] for row in map(json.loads, text)} for text in texts]
    same = [a == b for name in candidates[0] for a, b in zip(candidates[0][name], candidates[1][name])]
    assert np.mean(same) > 0.95  # up to near-ties: tests/test_sample.py looks at each of them


def test_each_program_compiles_once_per_shape(tiny_config, monkeypatch):
    built = {}
    for name in ("preference_update", "selector"):
        build = getattr(programs, name)

        def building(*args, build=build, name=name, **kwargs):
            assert name not in built, "built twice"
            built[name] = build(*args, **kwargs)
            return built[name]

        monkeypatch.setattr(programs, name, building)
    trainer.train(tiny_config("--loop.iterations=3", run="three"))
    sizes = {name: program._cache_size() for name, program in built.items()}
    # The ensemble grows from one iterate to two, which is another shape for the selector, and only for it.
    assert sizes == {"preference_update": 1, "selector": 2}


def refused(config_flags: list[str]) -> str:
    """The one line that the door prints."""
    with pytest.raises(SystemExit) as stop:
        trainer.main(config_flags)
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    return str(stop.value)


def test_bad_input_is_one_clear_line_and_a_second_try_works(tiny, tmp_path, monkeypatch):
    """A wrong model, data or key is told before anything is done, and the run folder stays free for the next try."""
    of_devices = meshes.make
    monkeypatch.setattr(meshes, "make", lambda d, f, t: of_devices(d, f, t, jax.devices()[: d * f * t]))
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    base = [f"--run.dir={tmp_path / 'run'}", "--run.compilation_cache=off", f"--model.path={model}"]
    base += [f"--data.pairs=[{tiny / 'pairs.jsonl'}]", "--data.max_length=48", "--data.max_prompt_length=24"]
    base += ["--mesh.fsdp=1", "--loop.iterations=1", "--optimizer.batch_size=8", "--optimizer.row_tokens=128"]
    base += ["--optimizer.microbatch_rows=1"]
    assert "no model.safetensors and no model.safetensors.index.json" in refused(base)
    weights = {"model.norm.weight": np.ones(32, np.float32)}
    safetensors.numpy.save_file(weights, model / "model.safetensors")
    assert "model.embed_tokens.weight" in refused(base)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:40])
    assert "model.safetensors" in refused(base)
    assert "flags: loss.beta is 0.0, expected a number > 0." in refused([*base, "--loss.beta=0"])
    assert "no such config file" in refused(["--config", str(tmp_path / "no.yaml")])
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["BloomForCausalLM"]}))
    assert "BloomForCausalLM" in refused(base) and "LlamaForCausalLM" in refused(base)
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in tokenizer.items() if k != "eos_token"}))
    assert "no EOS token: looked for eos_token_id in" in refused(base)
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\nnot json\n')
    assert "broken" in refused([*base, f"--data.pairs=[{tmp_path / 'broken.jsonl'}]"])
    # Both references at the scoring policy: before any update there is none but itself.
    both = ["--loss.reference=previous", "--reward.reference=previous", "--select.from_iteration=1"]
    assert "selection before any update; the policy is its own reference" in refused([*base, *both])
    # The same folder, once everything is right; then it belongs to this config.
    trainer.main([*base, "--model.weights=random"])
    told = refused([*base, "--model.weights=random", "--loss.beta=0.3"])
    assert "belongs to another config; it differs in loss.beta (0.1 → 0.3)" in told


def test_a_policy_that_scores_against_itself_is_an_error_by_its_tag(tiny_config, monkeypatch):
    """What the config check cannot see (here: it is switched off) the tags do, whatever the values are."""
    monkeypatch.setattr(configs, "check", lambda config, where: None)
    config = tiny_config("--select.from_iteration=1", "--loop.iterations=1", "--bootstrap.fresh=0", run="self")
    with pytest.raises(ValueError, match="reward.reference: got the policy '.*' as its own reference, so that"):
        trainer.train(config)


def test_a_killed_process_goes_on_as_if_it_had_not_been(tiny, tmp_path):
    """SIGKILL, twice: in the updates of iteration 1 and while iteration 2 samples. No handler, no clean-up."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    flags = [
        "--run.save_every=2",
        "--run.log_every=1",
        f"--model.path={tiny / 'model'}",
        "--model.weights=random",
        f"--data.pairs=[{tiny / 'pairs.jsonl'}]",
        "--data.max_length=48",
        "--data.max_prompt_length=24",
        "--optimizer.batch_size=4",
        "--optimizer.row_tokens=128",
        "--loop.iterations=2",
        "--bootstrap.max_new_tokens=10",
        "--bootstrap.slots=16",
        "--bootstrap.unfinished=keep",
    ]

    def start(run: pathlib.Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "sera_jax.train", f"--run.dir={run}", *flags]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def kill_when(run: pathlib.Path, happened) -> None:
        process = start(run)
        deadline = time.monotonic() + 180
        while not happened():
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < deadline, "never got there"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    assert process.wait(timeout=300) == 0, process.stderr.read().decode()[-2000:]
    written = killed / "metrics.jsonl"
    kill_when(killed, lambda: written.is_file() and written.read_text().count("\n") >= 5)
    assert not (killed / "iterations" / "2").exists()
    kill_when(killed, (killed / "iterations" / "2" / "candidates.jsonl").is_file)
    assert not (killed / "export").exists()
    process = start(killed)
    assert process.wait(timeout=300) == 0, process.stderr.read().decode()[-2000:]
    assert left(killed) == left(whole)


def test_a_lost_ledger_costs_time_and_nothing_else(tiny_config, monkeypatch):
    """Stopped in iteration 2 and resumed without the ledger: the policies that scored are read from iterates/."""
    config = tiny_config("--data.validation=0.1", run="lost")
    with monkeypatch.context() as patched:
        stop_after(patched, "preference_update", 8)
        with pytest.raises(Stopped):
            trainer.train(config)
    shutil.rmtree(pathlib.Path(config.run.dir) / "ledger")
    trainer.train(config)
    whole_config = tiny_config("--data.validation=0.1", run="kept")
    trainer.train(whole_config)
    assert left(pathlib.Path(config.run.dir)) == left(pathlib.Path(whole_config.run.dir))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reward.source=function", "--reward.function=no_such:thing"), "'no_such:thing' cannot be imported"),
        (
            ("--select.score=annotator_gap",),
            "annotator's scores, but 44 of 44 pairs have none, the first 'p0'",
        ),
        (("--reward.gamma=1",), "expected gamma < 1"),
    ],
)
def test_what_would_fail_after_an_iteration_is_told_before_it(tiny_config, flags, message):
    config = tiny_config(*flags, run="early")
    with pytest.raises(ValueError, match=message):
        trainer.train(config)
    assert not pathlib.Path(config.run.dir).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--select.score=loss", "--loss.reference=previous"),
            "for select.score 'loss': got the policy",
        ),
        (("--select.score=reference_logp", "--loss.name=simpo"), "'reference_logp' needs a reference, got none"),
    ],
)
def test_a_score_that_is_alike_for_all_is_an_error(tiny_config, flags, message):
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_config("--bootstrap.fresh=0", *flags, run="alike"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--loop.start=initial", "--loop.optimizer_state=carried", "--bootstrap.replay=true", "--loop.iterations=3"),
        ("--loss.reference=ema", "--reward.reference=ema", "--reward.ensemble=current", "--loop.iterations=3"),
        ("--loss.name=simpo", "--select.rule=middle", "--select.unselected=relabel", "--bootstrap.pair_rule=all_pairs"),
        ("--loss.name=kto_pair", "--loss.mix={ipo: 0.2}", "--loss.sft_weight=0.1", "--select.unselected=soft_weight"),
        ("--reward.source=function", "--reward.function=tiny_reward:count", "--bootstrap.from_iteration=1"),
        ("--select.stratify=prompt", "--select.score=irm_per_token", "--reward.length_penalty=0.1", "--loop.best=true"),
    ],
    ids=["restart", "ema", "simpo", "kto", "function", "stratified"],
)
def test_settings_of_the_loop_run_and_resume(tiny_config, monkeypatch, flags):
    """Each of them to the end, and stopped in its last iteration and resumed: the same, bit for bit."""
    flags = (*flags, "--data.validation=0.1")
    whole, stopped = tiny_config(*flags, run="whole"), tiny_config(*flags, run="stopped")
    trainer.train(whole)
    with monkeypatch.context() as patched:
        stop_after(patched, "preference_update", 5 * (whole.loop.iterations - 1) + 3)
        with pytest.raises(Stopped):
            trainer.train(stopped)
    trainer.train(stopped)
    assert left(pathlib.Path(stopped.run.dir)) == left(pathlib.Path(whole.run.dir))
    kept = pathlib.Path(whole.run.dir) / "iterations" / "2" / "kept.parquet"
    assert kept.is_file()
