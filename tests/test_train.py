"""The whole walk on a tiny world: what it leaves, that a stopped run goes on as if it had not, that meshes agree."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import datasets
import jax
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from sera_jax import config as configs
from sera_jax import data, losses, programs, score
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax import run as runs
from sera_jax import train as trainer
from sera_jax.policies import Live, Name
from sera_jax.records import Tree
from sera_jax.rows import Plan
from sera_jax.run import Checks
from sera_jax.train import select, update, validate
from sera_jax.train import world as worlds

SFT = ("--sft.epochs=1", "--sft.optimizer.batch_size=8", "--sft.optimizer.learning_rate=1e-2")


def fill_at(monkeypatch, limit, name: str, calls: int) -> None:
    """From the call number `calls` of the program that `programs.<name>` builds, the disk takes no more (`limit`)."""
    build = getattr(programs, name)
    made = [0]

    def building(*args, **kwargs):
        program = build(*args, **kwargs)

        def counted(*a, **k):
            made[0] += 1
            if made[0] == calls:
                limit.__enter__()
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
    said = [json.loads(line) for line in (run / "iterations/2/candidates.jsonl").read_text().splitlines()]
    different = sum(len({text for text in row["responses"]}) for row in said)
    assert 0 < summary["labels"] <= different <= 2 * summary["labels"]  # empty and unfinished ones get no reward
    assert summary["pairs/trained"] == summary["pairs/kept"] + summary["sera/fresh_pairs"]
    # Watched: all of these few pairs. The ensemble has weighed the margins of iterate 1 by 1 - γ.
    first = json.loads((run / "iterations/1/summary.json").read_text())
    margins = np.array([row["margin"] for row in kept]) / 0.7
    assert first["watch/margin_size"] == pytest.approx(np.median(np.abs(margins)), rel=1e-4)
    assert 0 <= summary["sera/margin_noise"] < 1e-4  # float32
    assert first["watch/logp_per_token_start"] == summary["watch/logp_per_token_start"] < 0
    told = [f"iteration {t}, warning: {said}" for t, s in ((1, first), (2, summary)) for said in s["warnings"]]
    assert summary["watch/warnings"] == len(summary["warnings"])
    page = (run / "report.html").read_text()
    assert len(told) == page.count('<p class="warning">')


@pytest.mark.parametrize(
    ("program", "calls"),
    [
        ("sft_update", 4),  # in SFT, between two checkpoints
        ("preference_update", 4),  # in an update of iteration 1
        ("scorer", 3),  # while pairs are scored
        ("decoder", 2),  # while sampling, after a batch is on disk
        ("preference_update", 8),  # in an update of iteration 2
    ],
)
def test_stopped_and_resumed_is_not_stopped(uninterrupted, tiny_config, stopped_at, program, calls):
    """Metrics, masks, samples and weights, bit for bit."""
    config = tiny_config(*SFT, "--data.validation=0.1", run="stopped")
    with stopped_at(program, calls):
        trainer.train(config)
    run = pathlib.Path(config.run.dir)
    assert not (run / "export").exists()
    trainer.train(config)
    got, want = left(run), left(uninterrupted)
    assert got["metrics"] == want["metrics"]
    assert got["tables"] == want["tables"]
    assert got["texts"] == want["texts"]
    assert got["weights"] == want["weights"]


@pytest.mark.parametrize(
    ("program", "calls", "room"),
    [
        ("preference_update", 5, 100_000),  # a checkpoint
        ("scorer", 3, 1),  # the ledger
        ("decoder", 2, 1),  # candidates
    ],
)
def test_a_full_disk_costs_nothing_but_room(uninterrupted, tiny_config, monkeypatch, small_files, program, calls, room):
    """The kernel refuses a write; the run says where and from which update it goes on, and so it does, bit for bit."""
    config = tiny_config(*SFT, "--data.validation=0.1", run="full")
    limit = small_files(room)
    try:
        with monkeypatch.context() as patched:
            fill_at(patched, limit, program, calls)
            with pytest.raises(ValueError) as error:
                trainer.train(config)
    finally:
        limit.__exit__(None, None, None)
    said = str(error.value)
    assert said.startswith(config.run.dir) and " could not be written: File too large (" in said
    assert "What was saved before is whole: the same command goes on behind update " in said
    assert said.endswith("of 5 of iteration 1.") and "\n" not in said
    trainer.train(config)
    got, want = left(pathlib.Path(config.run.dir)), left(uninterrupted)
    assert got == want


def test_a_finished_run_is_only_exported_again(uninterrupted, tiny_config, monkeypatch):
    before = left(uninterrupted)
    for name in ("preference_update", "sft_update", "scorer", "decoder"):
        monkeypatch.setattr(programs, name, lambda *_, **__: lambda *_, **__: pytest.fail("nothing is left to do"))
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


def test_a_run_goes_on_on_other_devices(tiny_config, stopped_at):
    """Stopped in iteration 2 on data 2 × fsdp 2 × tensor 2, resumed on fsdp 4, stopped, ended on one device: the same
    batches and mask; numbers as far as float32 rounds them.
    """
    places = {
        "eight": ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"),
        "four": ("--mesh.fsdp=4", "--model.head_chunk=16", "--optimizer.row_tokens=256"),
        "one": ("--optimizer.microbatch_rows=2", "--model.remat=none"),
    }
    flags = ("--bootstrap.fresh=0", "--optimizer.learning_rate=1e-3")
    whole = tiny_config(*flags, *places["eight"], run="whole")
    trainer.train(whole)
    kept = pathlib.Path("iterations/2/kept.parquet")
    selected = {}
    for place, calls in (("eight", 9), ("four", 3), ("one", 0)):  # 6 updates in iteration 1, 2 and 2 in iteration 2
        config = tiny_config(*flags, *places[place], run="moved")
        with stopped_at("preference_update", calls) if calls else contextlib.nullcontext():
            trainer.train(config)
        run = pathlib.Path(config.run.dir)
        selected[place] = pyarrow.parquet.read_table(run / kept)
    # What was selected on is found again, bit for bit: iterate 1 is the one that eight devices have made.
    assert selected["four"].equals(selected["eight"]) and selected["one"].equals(selected["eight"])
    assert selected["eight"].equals(pyarrow.parquet.read_table(pathlib.Path(whole.run.dir) / kept))
    newest = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name))
    world = worlds.prepare(tiny_config(*flags, *places["one"], run="moved"))
    runs.close(world.run)
    assert newest.name == "12" and [origin[:2] for origin in world.run.at.origins] == [(0, 0), (2, 8), (2, 10)]
    # And no other run mistakes this iterate 2 for its own.
    ledgers = [{p.name for p in (pathlib.Path(c.run.dir) / "ledger").iterdir()} for c in (whole, config)]
    assert ledgers[0] - ledgers[1] and ledgers[1] - ledgers[0] and len(ledgers[0] & ledgers[1]) > 1
    two, one = ([r for r in lines(pathlib.Path(c.run.dir)) if r["stage"] == "update"] for c in (whole, config))
    assert [(r["iteration"], r["step"]) for r in two] == [(r["iteration"], r["step"]) for r in one]
    for key in ("loss", "logps/chosen", "grad_norm"):
        np.testing.assert_allclose([r[key] for r in one], [r[key] for r in two], rtol=1e-5)
    exported = [
        safetensors.numpy.load_file(pathlib.Path(c.run.dir) / "export" / "model.safetensors") for c in (whole, config)
    ]
    for name, array in exported[0].items():
        np.testing.assert_allclose(exported[1][name], array, atol=1e-4, err_msg=name)


def test_each_program_compiles_once_per_shape(tiny_config, monkeypatch):
    built = {}
    for name in ("preference_update", "selector"):
        build = getattr(programs, name).__wrapped__  # past the cache that the runs of a process share

        def building(*args, build=build, name=name, **kwargs):
            assert name not in built, "built twice"
            built[name] = build(*args, **kwargs)
            return built[name]

        monkeypatch.setattr(programs, name, building)
    trainer.train(tiny_config("--loop.iterations=3", run="three"))
    sizes = {name: program._cache_size() for name, program in built.items()}
    # The ensemble grows from one iterate to two, which is another shape for the selector, and only for it.
    assert sizes == {"preference_update": 1, "selector": 2}


def test_runs_of_one_process_share_their_programs(tiny_config):
    """Another seed, other data of the same shapes, another loss mixture of the same values: nothing is built again."""
    one, two, other = (
        worlds.prepare(tiny_config(*flags, run=run))
        for run, flags in (
            ("one", ["--loss.mix={ipo: 0.5}"]),
            ("two", ["--loss.mix={ipo: 0.5}", "--run.seed=1"]),
            ("other", ["--loss.mix={ipo: 0.5}", "--loss.beta=0.2"]),
        )
    )
    for world in (one, two, other):
        runs.close(world.run)
    assert one.update is two.update and one.select is two.select
    assert other.update is not one.update and other.select is not one.select


def test_a_given_first_policy_stands_for_iteration_one(tiny_config, tmp_path):
    """loop.first: what follows is what follows in the run that trained it; a run may stop after it and go on."""
    whole = trainer.train(tiny_config("--loop.iterations=1", run="first"))
    flags = [f"--loop.first={whole}", f"--run.ledger={tmp_path / 'ledger'}", "--loop.iterations=2"]
    export = trainer.train(tiny_config(*flags, run="second"))
    direct = trainer.train(tiny_config("--loop.iterations=2", run="direct"))
    for name in ("kept", "fresh"):
        table = pyarrow.parquet.read_table(tmp_path / "second" / "iterations" / "2" / f"{name}.parquet")
        assert table.equals(pyarrow.parquet.read_table(tmp_path / "direct" / "iterations" / "2" / f"{name}.parquet"))
    read = lambda folder: safetensors.numpy.load_file(folder / "model.safetensors")
    assert all(np.array_equal(a, read(direct)[k]) for k, a in read(export).items())
    # A second arm on the same ledger samples nothing again.
    shared = sorted((tmp_path / "ledger" / "responses").iterdir())
    before = [p.stat().st_mtime_ns for p in shared]
    trainer.train(tiny_config(*flags, "--bootstrap.pair_rule=best_random", run="third"))
    assert shared and [p.stat().st_mtime_ns for p in sorted((tmp_path / "ledger" / "responses").iterdir())] == before
    with pytest.raises(ValueError, match="loop.optimizer_state 'carried', expected an iteration 1 to stand for"):
        tiny_config(*flags, "--loop.optimizer_state=carried")


def refused(config_flags: list[str]) -> str:
    """The one line that the door prints."""
    with pytest.raises(SystemExit) as stop:
        trainer.main(config_flags)
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    return str(stop.value)


def test_bad_input_is_one_clear_line_and_a_second_try_works(tiny, tmp_path, monkeypatch):
    """A wrong model, data or key is told before anything is done, and the run folder stays free for the next try."""
    of_devices = meshes.make
    monkeypatch.setattr(meshes, "make", lambda d, f, t, slices: of_devices(d, f, t, jax.devices()[: d * f * t]))
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
    monkeypatch.setattr(configs.reading, "check", lambda config, where: None)
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


def test_a_lost_ledger_costs_time_and_nothing_else(tiny_config, stopped_at):
    """Stopped in iteration 2 and resumed without the ledger: the policies that scored are read from iterates/."""
    config = tiny_config("--data.validation=0.1", run="lost")
    with stopped_at("preference_update", 8):
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
        (
            ("--reward.source=preference_function", "--reward.function=no_such:thing"),
            "'no_such:thing' cannot be imported",
        ),
        (
            ("--loss.name=rpo_bwd_kl",),
            "data.pairs: the loss is told the annotator's scores, but 44 of 44 pairs have none, the first 'p0'",
        ),
    ],
)
def test_what_would_fail_after_an_iteration_is_told_before_it(tiny_config, flags, message):
    config = tiny_config(*flags, run="early")
    with pytest.raises(ValueError, match=message):
        trainer.train(config)
    assert not pathlib.Path(config.run.dir).exists()


def test_carried_moments_reach_the_next_iteration(tiny_config):
    """Iteration 1 is the same; iteration 2 starts from the same weights and data, with and without its moments."""
    runs_ = {}
    for name in ("fresh", "carried"):
        config = tiny_config("--bootstrap.fresh=0", "--select.rule=all", f"--loop.optimizer_state={name}", run=name)
        trainer.train(config)
        runs_[name] = [r for r in lines(pathlib.Path(config.run.dir)) if r["stage"] == "update"]
    one, two = ([[r["loss"] for r in runs_[name] if r["iteration"] == t] for name in runs_] for t in (1, 2))
    assert one[0] == one[1] and two[0][0] == two[1][0] and two[0][1:] != two[1][1:]


def test_a_score_that_is_alike_for_all_is_an_error(tiny_config):
    with pytest.raises(ValueError, match="for select.score 'loss': got the policy"):
        trainer.train(tiny_config("--bootstrap.fresh=0", "--select.score=loss", "--select.from_iteration=1"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--loop.start=initial", "--loop.optimizer_state=carried", "--bootstrap.replay=true", "--loop.iterations=3"),
        ("--loss.reference=ema", "--reward.reference=ema", "--reward.ensemble=current", "--loop.iterations=3"),
        (
            "--loss.name=simpo",
            "--loss.gamma_beta_ratio=0.3",
            "--select.rule=middle",
            "--select.unselected=relabel",
            "--bootstrap.pair_rule=all_pairs",
        ),
        (
            *("--loss.name=kto_pair", "--loss.mix={ipo: 0.2}", "--loss.sft_weight=0.1"),
            *("--loss.ld_alpha=0.3", "--loss.weighting=wpo", "--select.unselected=soft_weight"),
        ),
        ("--reward.source=function", "--reward.function=tiny_reward:count", "--bootstrap.from_iteration=1"),
        ("--select.stratify=prompt", "--select.score=irm_per_token", "--reward.length_penalty=0.1", "--loop.best=true"),
        (
            "--bootstrap.candidates_file={tiny}/candidates.jsonl",
            "--loop.validate_every=2",
            "--reward.length_normalise=true",
        ),
    ],
    ids=["restart", "ema", "simpo", "kto_ld_wpo", "function", "stratified", "candidates"],
)
def test_settings_of_the_loop_run_and_resume(tiny, tiny_config, stopped_at, flags):
    """Each of them to the end, and stopped in its last iteration and resumed: the same, bit for bit."""
    flags = (*(flag.replace("{tiny}", str(tiny)) for flag in flags), "--data.validation=0.1")
    whole, stopped = tiny_config(*flags, run="whole"), tiny_config(*flags, run="stopped")
    trainer.train(whole)
    with stopped_at("preference_update", 5 * (whole.loop.iterations - 1) + 3):
        trainer.train(stopped)
    trainer.train(stopped)
    assert left(pathlib.Path(stopped.run.dir)) == left(pathlib.Path(whole.run.dir))
    kept = pathlib.Path(whole.run.dir) / "iterations" / "2" / "kept.parquet"
    assert kept.is_file()


# --- losses that need more than the summed log-probs of a pair --------------------------------------------------------


def test_ld_dpo_weighs_the_reference_as_the_policy(tiny_config, monkeypatch):
    """Two pairs share a response but not its partner: the shared length, and so the log-prob, is that of the pair."""
    built = {}
    monkeypatch.setattr(programs, "preference_update", lambda *plain, **options: built.update(options))
    world = worlds.prepare(tiny_config("--loss.ld_alpha=0.25", "--loss.weighting=wpo", "--loop.iterations=1"))
    assert built == {"ld_alpha": 0.25, "weighting": losses.wpo, "moments": "device"}
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(3, 20, n).astype(np.int32)
    prompt, a, b, c = ids(4), ids(9), ids(5), ids(2)
    trees = (Tree("0", prompt, (a, b)), Tree("1", prompt, (a, c)), Tree("2", ids(3), (b, ids(5))))
    world = dataclasses.replace(world, given=dataclasses.replace(world.given, trees=trees))
    params = world.policies.start.load()
    stage = update.training_set(world, 1, Live(Name("iterate", 0), params), None, None)
    runs.close(world.run)
    packed = rowlib.pack(trees, Plan(128, 128, 2, 1))
    run = jax.jit(
        lambda p, tail: (
            score.slot_sums(world.policies.arch, p, packed, mesh=world.mesh, dtype=np.float32, tail=tail).logp_BS
        ),
        static_argnums=1,
    )
    weighted, whole = (rowlib.unpack(np.asarray(run(params, tail)), packed.example_BS, 6) for tail in (0.25, 1.0))
    np.testing.assert_allclose(stage.reference_F, weighted, rtol=2e-6)
    assert np.abs(weighted - whole)[[0, 2]].min() > 1 and abs(weighted[0] - weighted[2]) > 1


def test_held_out_losses_are_those_of_training(tiny_config):
    """LD-DPO's log-probs in the loss, whole ones in the margin, while a stage trains and at its end; no WPO."""
    flags = ("--loss.name=cpo", "--loss.mix={dpo: 1}", "--loss.ld_alpha=0.25", "--loss.weighting=wpo")
    world = worlds.prepare(tiny_config(*flags, "--data.validation=0.3", "--loop.validate_every=2"))
    runs.close(world.run)
    trees, params = world.given.held_out, world.policies.start.load()
    packed = rowlib.pack(trees, dataclasses.replace(world.score_plan, slots=2 * len(trees)))

    def logps(tail):
        run = lambda p: score.slot_sums(world.policies.arch, p, packed, mesh=world.mesh, dtype=np.float32, tail=tail)
        flat_F = rowlib.unpack(np.asarray(jax.jit(run)(params).logp_BS), packed.example_BS, 2 * len(trees))
        return flat_F.reshape(-1, 2).astype(np.float64)

    gap_N, seen_N = (np.subtract(*logps(tail).T) for tail in (1.0, 0.25))
    assert len(trees) > 10 and np.abs(gap_N - seen_N).max() > 5
    want = {
        # The policy is the reference of dpo, whose margin is 0 if both are weighed alike.
        "validation/loss": np.logaddexp(0, -0.1 * seen_N).mean() + np.log(2),
        "validation/accuracy": (gap_N > 0).mean(),
        "validation/margin": 0.1 * gap_N.mean(),
    }
    live = Live(Name("iterate", 0), params)
    assert validate.at_end(world, 1, live, Checks(), 0) == pytest.approx(want, rel=1e-5)
    assert validate.of_stage(world, 1, live).measure(params) == pytest.approx(want, rel=1e-5)


@pytest.fixture
def labelled(tiny, tmp_path):
    """The chosen responses of the tiny pairs, those of every third pair called undesirable."""
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    lines = [
        {"id": r["id"], "prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0}
        for i, r in enumerate(rows)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


KTO = ("--loss.name=kto", "--loop.iterations=1", "--data.validation=0.1")
CHECKED = ("--loop.validate_every=2", "--loop.best=true", "--loop.best_by=loss")


def test_kto_trains_on_labelled_responses_and_resumes(tiny_config, labelled, stopped_at):
    keys = ("--loss.desirable_weight=1.5", "--loss.undesirable_weight=0.8")
    flags = (*KTO, *CHECKED, *keys, f"--data.pairs=[{labelled}]")
    whole, stopped = tiny_config(*flags, run="whole"), tiny_config(*flags, run="stopped")
    trainer.train(whole)
    with stopped_at("preference_update", 3):
        trainer.train(stopped)
    trainer.train(stopped)
    run = pathlib.Path(whole.run.dir)
    assert left(pathlib.Path(stopped.run.dir)) == left(run)
    summary = json.loads((run / "iterations/1/summary.json").read_text())
    records = [r for r in lines(run) if r["stage"] == "update"]
    given = summary["pairs/given"]
    assert 36 <= given < 44 and len(records) == -(-given // 8) and 0 <= summary["validation/accuracy"] <= 1
    told = {f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")}
    assert set(records[0]) == told | {
        "stage", "iteration", "step", "loss", "rewards/margins", "kl", "grad_norm", "learning_rate",
    }  # fmt: skip
    # The policy starts as its own reference: every response at σ(0), weighed by what it is.
    world = worlds.prepare(tiny_config(*flags, run="looked_at"))
    runs.close(world.run)
    first = data.batches(given, 8, seed=0, iteration=1, epoch=0)[0]
    desirable = np.mean([world.given.trees[i].label > 0 for i in first])
    assert 0 < desirable < 1
    assert records[0]["loss"] == pytest.approx(0.5 * (1.5 * desirable + 0.8 * (1 - desirable)), abs=1e-5)
    assert 0 <= records[0]["kl"] < 1e-5 and abs(records[0]["rewards/margins"]) < 1e-5
    assert records[-1]["rewards/margins"] > 0
    # What is told of the held-out examples and of the watched ones, in float64 from the log-probs in the ledger.
    world = worlds.prepare(whole)
    runs.close(world.run)
    live = Live(Name("iterate", 1), None)
    of = lambda trees: [select.pair_logps(world, Name("iterate", t), trees, live).astype(np.float64) for t in (1, 0)]
    trees = world.given.held_out
    u_N, mismatch_N = np.subtract(*of(trees)).T
    label_N = np.array([tree.label for tree in trees])
    assert len(trees) >= 4 and set(label_N) == {-1, 1}
    kept_N = 1 / (1 + np.exp(-0.1 * label_N * (u_N - max(mismatch_N.mean(), 0))))
    want = {"loss": np.mean(np.where(label_N > 0, 1.5, 0.8) * (1 - kept_N)), "margin": 0.1 * (label_N * u_N).mean()}
    want["accuracy"] = (label_N * u_N > 0).mean()
    assert {key: summary[f"validation/{key}"] for key in want} == pytest.approx(want, rel=1e-5)
    checked = [r for r in lines(run) if r["stage"] == "validation"]
    assert [r["step"] for r in checked] == [2, 4] and all(0 < r["validation/loss"] < 1.5 for r in checked)
    assert summary["validation/best"] == -min(r["validation/loss"] for r in (summary, *checked))
    watched = world.given.trees
    good_N = np.array([tree.label > 0 for tree in watched])
    tokens = sum(len(tree.branches[0]) for tree in watched if tree.label > 0)
    now_N, start_N = (logp_N2[:, 0] for logp_N2 in of(watched))
    assert summary["watch/logp_per_token"] == pytest.approx(now_N[good_N].sum() / tokens, rel=1e-6)
    assert summary["watch/logp_per_token_start"] == pytest.approx(start_N[good_N].sum() / tokens, rel=1e-6)
    assert summary["watch/margin_size"] == pytest.approx(0.1 * np.median(np.abs(now_N - start_N)), rel=1e-4)
    assert 0 <= summary["sera/margin_noise"] < 1e-4


def test_sft_texts_may_be_of_another_split(tiny_config, tmp_path):
    parts = {name: datasets.Dataset.from_list([{"prompt": "the dog", "completion": name}]) for name in ("train", "red")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "texts")
    for flags, want in (((), "train"), (("--sft.split=red",), "red")):
        (text,), _ = worlds.read_texts(tiny_config(*SFT, f"--sft.data=[{tmp_path / 'texts'}]", *flags))
        assert text.response == want


def test_kto_takes_pairs_apart(tiny_config, capsys):
    """Each pair is two examples with mismatches; those desirable are what an SFT stage imitates."""
    world = worlds.prepare(tiny_config(*KTO, *SFT, run="pairs"))
    runs.close(world.run)
    given = world.given
    assert 72 <= len(given.trees) < 88 and sum(tree.label for tree in given.trees) == 0
    assert [tree.id for tree in given.trees] == [example.id for example in given.pairs]
    assert all((tree.label > 0) == tree.id.endswith("/chosen") for tree in given.trees)
    assert all(len(tree.branches) == 2 for tree in (*given.trees, *given.held_out)) and len(given.held_out) >= 8
    assert len(given.sft) == len(given.trees) // 2 and {t.id for t in given.sft} == {
        tree.id for tree in given.trees if tree.label > 0
    }
    half = len(given.trees) // 2
    assert f"{half} desirable and {half} undesirable examples, weights 1 and 1: 1 : 1 by" in capsys.readouterr().out


def test_kto_needs_other_prompts_on_both_sides(tiny_config, tmp_path):
    rows = [{"prompt": prompt, "chosen": "red", "rejected": "blue ball"} for prompt in ("the dog", "the cat", "a box")]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = (
        r"^data.{}: 2 of 2 examples have the same prompt, expected at most half: loss kto estimates its KL with compl"
    )
    with pytest.raises(ValueError, match=said.format("validation")):
        trainer.train(tiny_config(*KTO, f"--data.pairs=[{path}]", "--data.validation=0.3", run="held"))
    with pytest.raises(ValueError, match=said.format("pairs")):
        trainer.train(tiny_config(*KTO, f"--data.pairs=[{path}]", "--data.limit=2", "--data.validation=0", run="one"))


def test_a_pair_loss_refuses_labelled_responses(tiny_config, labelled):
    with pytest.raises(ValueError, match=r"prompt, completion and label \(unpaired\) are for loss kto alone"):
        trainer.train(tiny_config(f"--data.pairs=[{labelled}]", run="refused"))


# --- held-out pairs, candidates of others, gold -----------------------------------------------------------------------


def test_early_stop_ends_an_iteration_and_the_best_point_is_exported(tiny, tiny_config, stopped_at):
    """Losses and stop by the lines of the log; killed around both and resumed, the same; the weights of the export are
    those that training had behind that update."""
    flags = ["--data.validation=0.2", "--loop.validate_every=1", "--loop.early_stop=2", "--loop.best=true"]
    flags += ["--loop.best_by=loss", "--loop.epochs=3", "--run.save_every=1", "--bootstrap.fresh=0"]
    flags += ["--optimizer.learning_rate=1e-2", "--optimizer.schedule=constant"]
    flags += [f"--evaluate.prompts=[{tiny}/prompts.jsonl]", "--evaluate.function=tiny_reward:count"]
    whole = tiny_config(*flags, run="whole")
    trainer.train(whole)
    run = pathlib.Path(whole.run.dir)
    ended = {}
    for t in (1, 2):
        summary = json.loads((run / f"iterations/{t}/summary.json").read_text())
        checks = [r for r in lines(run) if (r["stage"], r["iteration"]) == ("validation", t)]
        found = [r["validation/loss"] for r in checks]
        assert [r["step"] for r in checks] == list(range(1, len(found) + 1))
        assert summary["updates"] == len(found) < 15, "the run has to stop early to test anything"
        assert min(found[:-2]) <= min(found[-2:]) and found[-3] == min(found)  # two checks behind the lowest, no more
        # The end measures once more what the last check saw, packed and summed alike.
        assert summary["validation/loss"] == found[-1]
        assert summary["validation/best"] == -min(found) and summary["validation/best_update"] == len(found) - 2
        ended[t] = summary
    t = max((1, 2), key=lambda t: ended[t]["validation/best"])
    card = (run / "export" / "README.md").read_text()
    update = ended[t]["validation/best_update"]
    assert f"iterate {t} of 2 behind update {update}, loss dpo" in card
    # What the card says of the policy is said of the best point, not of the end of its iteration.
    best = f"best-{t}"
    evaluated = pyarrow.parquet.read_table(run / "evaluation" / f"{best}.parquet").to_pydict()
    assert f"- eval/reward: {float(np.mean(np.float32(evaluated['reward'])))}" in card and "- watch/" not in card
    assert f"- validation/best: {ended[t]['validation/best']}" in card and "- validation/loss" not in card
    exported = safetensors.numpy.load_file(run / "export" / "model.safetensors")

    stopped = tiny_config(*flags, run="stopped")
    done = ended[1]["updates"] if t == 2 else 0
    for calls in (done + update + 1, 1):  # right behind the best point, and one update later
        with stopped_at("preference_update", calls):
            trainer.train(stopped)
        if calls > 1:
            newest = max((pathlib.Path(stopped.run.dir) / "checkpoints").iterdir(), key=lambda p: int(p.name))
            from_checkpoint = weights_of(newest)
    embedding = exported["model.embed_tokens.weight"]
    assert any(a.shape == embedding.shape and np.array_equal(a, embedding) for a in from_checkpoint)
    trainer.train(stopped)
    assert left(pathlib.Path(stopped.run.dir)) == left(run)


def test_an_early_stop_that_no_check_could_make(tiny_config):
    with pytest.raises(
        ValueError, match="loop.validate_every is 9 with loop.early_stop 1, expected less than the 5 up"
    ):
        trainer.train(tiny_config("--data.validation=0.2", "--loop.validate_every=9", "--loop.early_stop=1"))


def test_a_loss_without_reference_may_bootstrap_at_once(tiny_config):
    """Iteration 1 ranks samples of the start by log-probs alone; what that cost is counted."""
    config = tiny_config("--loss.name=orpo", "--bootstrap.from_iteration=1", "--loop.iterations=1")
    trainer.train(config)
    told = json.loads((pathlib.Path(config.run.dir) / "iterations" / "1" / "summary.json").read_text())
    assert told["flops/score"] == told["flops/sample"] > 0 and told["sera/fresh_pairs"] > 0


@pytest.mark.parametrize("loss", ["sppo", "dpo"])
def test_what_a_loss_is_told_of_each_response(tiny_config, monkeypatch, loss):
    """sppo: of fresh pairs, earlier ones among them, how often each side won; of given ones, also where a selection has
    swapped them, that the chosen response won. dpo: nothing."""
    trained = {}
    build = runs.run_stage

    def stage(run, of, *args, **keywords):
        trained[of.iteration] = of.trees
        return build(run, of, *args, **keywords)

    monkeypatch.setattr(runs, "run_stage", stage)
    flags = ("--bootstrap.replay=true", "--loop.iterations=3", "--select.unselected=relabel", "--bootstrap.fresh=0.5")
    config = tiny_config(f"--loss.name={loss}", *flags, "--loss.beta=1")
    trainer.train(config)
    told, folder = {}, pathlib.Path(config.run.dir) / "iterations"
    for t in (2, 3):
        table = pyarrow.parquet.read_table(folder / str(t) / "fresh.parquet").to_pylist()
        told |= {(t, row["id"]): (row["win_chosen"], row["win_rejected"]) for row in table if row["kept"]}
    assert len(told) > 10 and all(0 < w < 1 and 0 < l < 1 for w, l in told.values())
    given = {tree.id for tree in trained[1]}
    swapped = {tree.id for tree in trained[3] if tree.id in given} - {
        row["id"] for row in pyarrow.parquet.read_table(folder / "3" / "kept.parquet").to_pylist() if row["kept"]
    }
    assert len(swapped) > 5
    fresh = [tree for tree in trained[3] if tree.id not in given]
    assert len(fresh) == len(told)  # of iterations 2 and 3
    if loss == "dpo":
        assert all(tree.values == () for tree in trained[3])
        return
    assert {tree.values for tree in trained[3] if tree.id in given} == {(1.0, 0.0)}
    assert sorted(tree.values for tree in fresh) == sorted(told.values())


def weights_of(folder: pathlib.Path) -> list[np.ndarray]:
    """Every array of a checkpoint, by orbax alone."""
    from orbax.checkpoint import v1 as ocp

    return [np.asarray(a) for a in jax.tree.leaves(ocp.load(folder)) if hasattr(a, "shape")]


def test_candidates_of_a_file_are_ranked_by_its_scores_and_nothing_is_sampled(tiny, tiny_config, monkeypatch):
    monkeypatch.setattr(programs, "sampler", lambda *_, **__: pytest.fail("sampled"))
    config = tiny_config(
        f"--bootstrap.candidates_file={tiny}/candidates.jsonl",
        "--bootstrap.from_iteration=1",
        "--bootstrap.fresh=2",
        "--bootstrap.prompts_per_iteration=0.7",
        "--bootstrap.unfinished=drop",
        "--reward.source=file",
        "--loop.iterations=1",
    )
    trainer.train(config)
    run = pathlib.Path(config.run.dir)
    fresh = pyarrow.parquet.read_table(run / "iterations/1/fresh.parquet").to_pylist()
    vocabulary = json.loads((tiny / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    rows = [json.loads(line) for line in (tiny / "candidates.jsonl").read_text().splitlines()]
    found = {pair["prompt"]: pair for pair in fresh}
    for row in rows:
        usable = [i for i, done in enumerate(row["finished"]) if done]
        usable = [i for i in usable if row["responses"][i] not in row["responses"][:i]]
        if row["prompt"] in found:
            assert len(usable) > 1
            pair = found.pop(row["prompt"])
            best, worst = max(usable, key=row["scores"].__getitem__), min(usable, key=row["scores"].__getitem__)
            for side, i in (("chosen", best), ("rejected", worst)):
                assert pair[side] == row["responses"][i]
                assert pair[f"reward_{side}"] == np.float32(row["scores"][i])
                assert pair[f"{side}_tokens"] == [*(vocabulary[w] for w in pair[side].split()), 2]  # EOS
    assert not found and 4 < len(fresh) < 9  # nine prompts have two finished candidates, not all of them are drawn
    assert json.loads((run / "iterations/1/summary.json").read_text())["pairs/trained"] > 44
    # Another file behind the same name is another run.
    moved = (tiny / "candidates.jsonl").read_text()
    try:
        (tiny / "candidates.jsonl").write_text(moved.replace('"responses": ["', '"responses": ["red ', 1))
        with pytest.raises(ValueError, match="same config on other data or another model"):
            trainer.train(config)
    finally:
        (tiny / "candidates.jsonl").write_text(moved)


def test_gold_is_logged_and_trains_nothing(tiny, tiny_config):
    """Gold k and random ranking, once watched by a gold function and once not: the same policy. The numbers by hand."""
    flags = [f"--data.pairs=[{tiny}/gold.jsonl]", "--select.score=gold_gap", "--select.from_iteration=1"]
    flags += ["--reward.source=random", "--bootstrap.from_iteration=1", "--loop.iterations=1", "--select.keep=0.6"]
    watched, blind = tiny_config(*flags, "--evaluate.function=tiny_reward:count", run="w"), tiny_config(*flags, run="b")
    trainer.train(watched)
    trainer.train(blind)
    run, other = pathlib.Path(watched.run.dir), pathlib.Path(blind.run.dir)
    assert left(run)["weights"] == left(other)["weights"]
    pairs = [json.loads(line) for line in (tiny / "gold.jsonl").read_text().splitlines()]
    kept = pyarrow.parquet.read_table(run / "iterations/1/kept.parquet").to_pylist()
    gaps = np.array([row["gold_chosen"] - row["gold_rejected"] for row in pairs])
    flipped = np.array([row["flipped"] for row in pairs])
    mask = np.array([row["kept"] for row in kept])
    assert mask.sum() == 26 and gaps[mask].min() >= gaps[~mask].max()
    assert [row["score"] for row in kept] == gaps.tolist() and [row["flipped"] for row in kept] == flipped.tolist()
    length = np.array([[row["length_chosen"], row["length_rejected"]] for row in kept])
    accuracy = lambda gap: np.mean(np.where(gap == 0, 0.5, gap > 0))
    told = json.loads((run / "iterations/1/summary.json").read_text())
    fresh = pyarrow.parquet.read_table(run / "iterations/1/fresh.parquet").to_pylist()
    used = [row for row in fresh if row["kept"]]
    count = lambda text: len(set(text.split()))
    assert all(row[f"gold_{side}"] == count(row[side]) for row in fresh for side in ("chosen", "rejected"))
    fresh_gap = np.array([row["gold_chosen"] - row["gold_rejected"] for row in used])
    want = {
        "sera/flips_kept": mask[flipped].mean(),
        "sera/gold_accuracy_kept": accuracy(gaps[mask]),
        "sera/gold_accuracy_dropped": accuracy(gaps[~mask]),
        "sera/gold_gap_kept": gaps[mask].mean(),
        "sera/gold_gap_dropped": gaps[~mask].mean(),
        "sera/kept_length_gap": (length[:, 0] - length[:, 1])[mask].mean(),
        "sera/gold_length_gap": (np.sign(gaps) * (length[:, 0] - length[:, 1]))[mask].mean(),
        "sera/fresh_gold_accuracy": accuracy(fresh_gap),
        "sera/fresh_gold_gap": fresh_gap.mean(),
    }
    assert {key: told[key] for key in want} == pytest.approx(want)
    assert want["sera/flips_kept"] < 0.1 < 0.8 < want["sera/gold_accuracy_kept"]
    plain = json.loads((other / "iterations/1/summary.json").read_text())
    assert set(told) - set(plain) == {"sera/fresh_gold_accuracy", "sera/fresh_gold_gap"}
    # Random ranking: rewards are noise in [0, 1), the same for the same seed.
    assert all(0 <= row["reward_rejected"] < row["reward_chosen"] < 1 for row in fresh)
    strip = lambda rows: [{k: v for k, v in row.items() if not k.startswith("gold_")} for row in rows]
    assert strip(fresh) == pyarrow.parquet.read_table(other / "iterations/1/fresh.parquet").to_pylist()
