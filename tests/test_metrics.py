"""metrics: bit-exact lines, truncation on resume, null objects, progress and tables with and without a terminal."""

import builtins
import importlib.util
import json
import math
import os
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from sera_jax import metrics


def record(step: int, **values) -> dict:
    return {"stage": "train", "iteration": 1, "step": step, **values}


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def terminal(monkeypatch, width: int = 100) -> rich.console.Console:
    console = rich.console.Console(
        file=open(os.devnull, "w"), record=True, force_terminal=True, width=width, highlight=False
    )
    monkeypatch.setattr(metrics, "_console", lambda: console)
    return console


def test_floats_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    doubles = rng.integers(0, 2**64, 200, dtype=np.uint64).view(np.float64)
    doubles = doubles[np.isfinite(doubles)]
    singles = rng.normal(size=50).astype(np.float32)
    path = tmp_path / "deep" / "metrics.jsonl"
    with metrics.Metrics(path) as out:
        for step, value in enumerate(doubles):
            out.write(record(step, loss=float(value), wide=value))
        scalars = {"scalar": jnp.float32(0.1), "bf16": jnp.bfloat16(0.1), "n": np.int64(3), "ok": np.True_}
        out.write(record(-1, singles=singles, **scalars))
    lines = read(path)
    got = np.array([line["loss"] for line in lines[:-1]])
    assert got.tobytes() == doubles.tobytes()
    assert np.array([line["wide"] for line in lines[:-1]]).tobytes() == doubles.tobytes()
    last = lines[-1]
    assert np.array(last["singles"], np.float32).tobytes() == singles.tobytes()
    assert struct.pack("f", last["scalar"]) == np.float32(0.1).tobytes()
    assert last["bf16"] == float(jnp.bfloat16(0.1)) and last["n"] == 3 and last["ok"] is True
    assert type(last["n"]) is int


def test_diverged_values_are_seen(tmp_path):
    with metrics.Metrics(tmp_path / "m") as out:
        out.write(record(0, loss=float("nan"), grad_norm=np.float32("inf"), low=-math.inf))
    line = read(tmp_path / "m")[0]
    assert math.isnan(line["loss"]) and line["grad_norm"] == math.inf and line["low"] == -math.inf


def test_resume_cuts_to_the_offset_and_repeats_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.Metrics(path) as out:
        for step in range(3):
            out.write(record(step, loss=step / 3))
        offset = out.offset
        assert offset == path.stat().st_size
        for step in range(3, 6):
            out.write(record(step, loss=step / 3, note="später"))
        assert out.offset == path.stat().st_size > offset
    whole = path.read_bytes()
    with metrics.Metrics(path, offset=offset) as out:
        assert out.offset == offset == path.stat().st_size
        for step in range(3, 6):
            out.write(record(step, loss=step / 3, note="später"))
    assert path.read_bytes() == whole
    metrics.Metrics(path, offset=0).close()
    assert path.read_bytes() == b""


def test_without_an_offset_a_half_line_is_cut(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"a": 1}\n{"a": ')
    with metrics.Metrics(path) as out:
        out.write(record(2))
    assert path.read_text().splitlines() == ['{"a": 1}', '{"stage": "train", "iteration": 1, "step": 2}']


def test_a_foreign_offset_is_refused_and_nothing_lost(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"m has 9 bytes, expected at least the 10 of .* Restore the file"):
        metrics.Metrics(path, offset=10)
    with pytest.raises(ValueError, match=r"byte 4, .* is inside a line, expected the end of one"):
        metrics.Metrics(path, offset=4)
    assert path.read_text() == '{"a": 1}\n'


def test_records_are_checked(tmp_path):
    with metrics.Metrics(tmp_path / "m") as out:
        with pytest.raises(
            ValueError, match=r"lacks \['iteration', 'step'\], got keys \['stage'\]; expected \['stage'"
        ):
            out.write({"stage": "train"})
        with pytest.raises(ValueError, match=r"metric 'odd' is a set, expected a number"):
            out.write(record(0, odd={1}))
        assert out.offset == 0


def test_other_processes_are_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.Metrics(tmp_path / "x" / "m", offset=7, tensorboard_dir=tmp_path / "tb", wandb_project="p") as out:
        out.write(record(0, loss=1.0))
        assert out.offset == 0
    assert list(metrics.track(range(4), total=4, label="scoring", unit="rows")) == [0, 1, 2, 3]
    metrics.say("hello")
    metrics.table("t", ["a"], [[1]])
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package, extra", [("tensorboardX", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_names_the_extra_and_costs_no_lines(tmp_path, monkeypatch, package, extra):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    (tmp_path / "m").write_text("{}\n")
    asked = {"tensorboard": {"tensorboard_dir": tmp_path / "tb"}, "wandb": {"wandb_project": "p"}}[extra]
    message = rf"run\.{extra} needs the package {package}: pip install 'sera_jax\[{extra}\]'"
    with pytest.raises(ImportError, match=message):
        metrics.Metrics(tmp_path / "m", offset=0, **asked)
    assert (tmp_path / "m").read_text() == "{}\n"


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="needs the extra tensorboard")
def test_tensorboard_events_hold_the_numbers(tmp_path):
    from tensorboardX.proto import event_pb2

    with metrics.Metrics(tmp_path / "m", tensorboard_dir=tmp_path / "tb") as out:
        out.write(record(5, loss=1.5, note="text"))
        out.write({**record(5, loss=2.5), "stage": "a/b"})
    assert sorted(p.name for p in (tmp_path / "tb").iterdir()) == ["a_b-1", "train-1"]
    (events,) = (tmp_path / "tb" / "train-1").iterdir()
    content, at, found = events.read_bytes(), 0, []
    while at < len(content):  # TFRecord: length, its crc, message, its crc
        (length,) = struct.unpack_from("<Q", content, at)
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += 16 + length
    assert found == [(5, "loss", 1.5)]


def test_wandb_gets_each_record_without_its_own_step(tmp_path, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, *args, **kwargs):
            calls.append(("define", args, kwargs))

        def log(self, values, **kwargs):
            calls.append(("log", values, kwargs))

        def finish(self):
            calls.append(("finish",))

    class Wandb:
        @staticmethod
        def init(**kwargs):
            calls.append(("init", kwargs))
            return Run()

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    for _ in range(2):
        with metrics.Metrics(tmp_path / "m", wandb_project="proj", config={"a": 1}) as out:
            out.write(record(1, loss=0.5))
    inits = [call[1] for call in calls if call[0] == "init"]
    assert inits[0] == inits[1] and inits[0]["project"] == "proj" and inits[0]["config"] == {"a": 1}
    assert calls[1] == ("define", ("*",), {"step_metric": "step"})
    assert calls[2] == ("log", record(1, loss=0.5), {}) and calls[3] == ("finish",)


def test_track_without_a_terminal_is_one_line_at_the_end(capsys):
    seen = []
    for item in metrics.track(iter("abc"), total=3, label="scoring given pairs", unit="pairs"):
        seen.append(item)
        assert capsys.readouterr().out == ""
    assert seen == ["a", "b", "c"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and re.fullmatch(r"scoring given pairs: 3/3 pairs, \d+\.\d s, \S+ pairs/s", lines[0])


def test_stages_within_a_quiet_one_show_nothing(capsys):
    with metrics.quiet():
        assert list(metrics.track(iter("ab"), total=2, label="inside", unit="pairs")) == ["a", "b"]
    assert list(metrics.track(iter("ab"), total=2, label="outside", unit="pairs")) == ["a", "b"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("outside: 2/2 pairs")


def test_track_without_a_terminal_reports_once_a_minute(monkeypatch, capsys):
    clock = iter(range(0, 100_000, 25))  # each look at the clock is 25 s later
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(clock)))
    for _ in metrics.track(range(8), total=8, label="sampling", unit="prompts"):
        pass
    assert capsys.readouterr().out.splitlines() == [
        "sampling: 3/8 prompts, 75.0 s, 0.04 prompts/s, 125 s left",
        "sampling: 6/8 prompts, 150.0 s, 0.04 prompts/s, 50 s left",
        "sampling: 8/8 prompts, 225.0 s, 0.0356 prompts/s",
    ]


def test_track_says_when_it_was_left_early_and_passes_errors_on(capsys):
    for item in metrics.track(range(5), total=5, label="training", unit="updates"):
        if item == 2:
            break
    assert re.fullmatch(r"training: 2/5 updates, .*, stopped early\n", capsys.readouterr().out)

    def failing():
        yield 1
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        list(metrics.track(failing(), total=None, label="reading", unit="files"))
    assert re.fullmatch(r"reading: 1 files, .*, stopped early\n", capsys.readouterr().out)


def test_track_on_a_terminal_is_a_bar_that_messages_go_above(monkeypatch):
    console = terminal(monkeypatch)
    for item in metrics.track([1, 2], total=2, label="scoring [x]", unit="pairs"):
        metrics.say(f"item {item} [not markup]")
    text = console.export_text()
    assert "item 1 [not markup]" in text and "scoring [x]" in text and "2/2" in text and "pairs/s" in text


def test_table_without_a_terminal_is_plain_and_never_cut(capsys):
    long = "word " * 60
    metrics.table("results [1]", ["name", "margin", "note"], [["a[b]", 0.123456, long], ["c", 10, None]])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "…" not in out and long.strip() in out and "results [1]" in out and "a[b]" in out
    rows = [line for line in out.splitlines() if "0.1235" in line or line.endswith(" 10")]
    assert len(rows) == 2  # one line a row
    assert not any(line.endswith(" ") for line in out.splitlines())


def test_table_on_a_terminal_folds_into_its_width(monkeypatch):
    console = terminal(monkeypatch, width=60)
    metrics.table("t", ["cell"], [["x" * 100]])
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 60 and text.count("x") == 100


def test_table_refuses_a_ragged_row():
    with pytest.raises(ValueError, match=r"table 't': row 1 has 1 cells, expected 2 \(\['a', 'b'\]\)"):
        metrics.table("t", ["a", "b"], [[1, 2], [3]])


def test_messages_are_not_markup_and_not_wrapped(capsys):
    text = "[bold]x[/bold] " + "y" * 300
    metrics.say(text)
    assert capsys.readouterr().out == text + "\n"
