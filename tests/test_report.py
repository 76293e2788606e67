"""report: everything that is there is shown, what is not is named, hostile text stays text, nothing external."""

import html.parser
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sera_jax import report

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)> $y & \"q\" \ud800\0"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page; refuses elements that do not close in order."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.attributes, self.words, self._open = [], [], [], []
        self.feed(path.read_text())
        self.close()
        assert not self._open, self._open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def write_run(folder, *, texts: bool = True, pairs: int = 300, hostile: str = HOSTILE):
    """A run of two stages and two iterations; iteration 1 does not select."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"run: {{dir: x, seed: 3}}\nmodel: {{path: {json.dumps(hostile[:-2])}}}\n"
        "loss: {name: dpo, beta: 0.1}\ndata: {pairs: [a.jsonl, b.jsonl]}\nselect: {keep: 0.7}\n"
    )
    lines = [{"stage": "sft", "iteration": 0, "step": s, "loss": 3 - s / 50} for s in range(0, 50, 10)]
    for t in (1, 2):
        for s in range(0, 200, 10):
            x = s / 200 + t
            values = {
                "loss": np.exp(-x),
                "rewards/margins": x,
                "rewards/accuracies": 0.5 + x / 6,
                "logps/chosen": -80 - x,
            }
            lines.append({"stage": "train", "iteration": t, "step": 200 * (t - 1) + s, **values, "perf/step_s": 0.1})
    lines.append({"stage": "train", "iteration": 2, "step": 400, "loss": float("nan"), "rewards/margins": 3.0})
    lines.append({"stage": hostile[:-2], "iteration": 1, "step": 0, "loss": 1.0})
    lines.append({"stage": "evaluate", "iteration": 2, "step": 400, "win_rate": 0.6})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "tr')
    for t in (1, 2):
        place = folder / "iterations" / str(t)
        place.mkdir(parents=True)
        margin = rng.normal(0.5, 1, pairs).astype(np.float32)
        order = np.argsort(-margin)
        kept = np.zeros(pairs, bool)
        kept[order[: int(0.7 * pairs)]] = True
        columns = {
            "id": [f"p{i}" for i in range(pairs)],
            "source": ["s"] * pairs,
            "margin": pa.array(margin) if t > 1 else pa.nulls(pairs, pa.float32()),
            "score": margin,
            "kept": kept if t > 1 else np.ones(pairs, bool),
            "rank": np.argsort(order).astype(np.int32),
            "weight": np.ones(pairs, np.float32),
            "length_chosen": rng.integers(1, 60, pairs).astype(np.int32),
            "length_rejected": rng.integers(1, 60, pairs).astype(np.int32),
        }
        if texts:
            safe = hostile.replace("\ud800", "")
            columns |= {name: [f"{name} {i} {safe}" for i in range(pairs)] for name in ("prompt", "chosen", "rejected")}
        pq.write_table(pa.table(columns), place / "kept.parquet")
        summary = {
            "iteration": t,
            "kl": 0.25 * t,
            "win_rate": 0.5 + t / 16,
            "perf/seconds": 9.5,
            "sera": {"fresh_pairs": 30},
        }
        (place / "summary.json").write_text(json.dumps(summary))
    n = 30
    fresh = {
        "prompt_id": [f"q{i}" for i in range(n)],
        **{name: [f"fresh {name} {i} {hostile[:-2]}" for i in range(n)] for name in ("prompt", "chosen", "rejected")},
        "reward_chosen": np.linspace(0, 3, n, dtype=np.float32),
        "reward_rejected": np.zeros(n, np.float32),
        "length_chosen": np.full(n, 12, np.int32),
        "length_rejected": np.full(n, 9, np.int32),
        "finished_chosen": np.ones(n, bool),
        "finished_rejected": np.ones(n, bool),
        "kept": np.arange(n) >= 5,
    }
    pq.write_table(pa.table(fresh), folder / "iterations" / "2" / "fresh.parquet")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(report.build(write_run(tmp_path_factory.mktemp("runs") / "run <b>")))


def test_the_page_is_one_file_that_references_and_runs_nothing(page):
    assert not {"script", "img", "link", "iframe", "object", "b"} & set(page.elements)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name.split(":")[-1] in ("href", "src", "srcset", "data", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
        if name == "style":
            assert "url(" not in value.replace("url(#", "")
    policy = [value for tag, name, value in page.attributes if tag == "meta" and name == "content"]
    assert any(value.startswith("default-src 'none'") for value in policy)
    styles = " ".join(page.words)
    assert "@import" not in styles and not re.search(r"url\((?!#)", styles)


def test_hostile_text_is_shown_as_it_is(page):
    assert "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)> $y & \"q\"" in page.text
    assert "run <b>" in page.text


def test_every_section_is_there(page):
    assert page.elements.count("svg") == 4  # three stages with curves, margins of iteration 2
    for words in (
        "loss.name dpo",
        "data.pairs a.jsonl, b.jsonl",
        "select.keep 0.7",
        "Stage sft",
        "Stage train",
        "rewards/accuracies",
        "iterations/1/kept.parquet holds no margins: iteration 1 did not score the given pairs.",
        "kept (210)",
        "dropped (90)",
        "Lowest margins",
        "Highest margins",
        "iterations/1/fresh.parquet is absent: iteration 1 made none.",
        "10 of 25, evenly over the ranking by reward gap",
    ):
        assert words in page.text, words
    assert "perf/" not in page.text


def test_warnings_are_shown_as_text(tmp_path):
    folder = write_run(tmp_path / "run", pairs=5)
    path = folder / "iterations" / "2" / "summary.json"
    said = ["margins blow up <b>now</b>", "length drifts"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": said, "watch/warnings": 2}))
    page = Page(report.build(folder))
    assert all(f"Iteration 2: {text}" in page.text for text in said) and "Iteration 1:" not in page.text
    assert "watch/warnings 2" in page.text and "b" not in page.elements


def test_curves_of_validation(tmp_path):
    folder = write_run(tmp_path / "run", pairs=5)
    before = report.build(folder).read_text().count("<svg")
    with open(folder / "metrics.jsonl", "w") as file:
        for step in (2, 4):
            line = {"stage": "validation", "iteration": 1, "step": step, "validation/loss": 1 / step}
            file.write(json.dumps(line | {"validation/accuracy": 0.5}) + "\n")
    page = Page(report.build(folder))
    assert "Stage validation" in page.text and "validation/accuracy" in page.text and "Stage sft" not in page.text
    assert page.elements.count("svg") == before - 2


def test_the_iteration_table_agrees_with_numpy(page, tmp_path):
    folder = write_run(tmp_path / "run")
    kept = pq.read_table(folder / "iterations" / "2" / "kept.parquet")
    margin = np.sort(kept["margin"].to_numpy().astype(np.float64))
    length = np.array(kept["length_chosen"])[np.array(kept["kept"])].mean()
    middle = (margin[149] + margin[150]) / 2
    rows = {
        "kept pairs": "300 210",
        "margin, 50 %": f"{middle:.4g}",
        "accuracy (margin > 0)": f"{(margin > 0).sum() / 300:.4g}",
        "tokens of rejected, fresh pairs": "9",
        "fresh pairs": "25",
        "kl": "0.25 0.5",
        "win_rate": "0.5625 0.625",
        "sera/fresh_pairs": "30 30",
    }
    for name, values in rows.items():
        assert f"{name} {values}" in page.text, name
    assert f" {length:.4g} tokens of rejected, kept pairs" in page.text
    assert page.text.index("margin, 10 %") < page.text.index("accuracy (margin > 0)") < page.text.index("win_rate")


def test_pairs_of_both_ends_and_fresh_pairs_are_the_right_ones(page, tmp_path):
    folder = write_run(tmp_path / "run")
    kept = pq.read_table(folder / "iterations" / "2" / "kept.parquet")
    order = np.argsort(kept["margin"].to_numpy())
    shown = [int(i) for i in re.findall(r"\bp(\d+) -?\d", page.text)]
    assert shown == [*order[:10], *order[::-1][:10]]
    fresh = [int(i) for i in re.findall(r"fresh prompt (\d+)", page.text)]
    assert len(fresh) == 10 and fresh[0] == 29 and fresh[-1] == 5 and fresh == sorted(fresh, reverse=True)
    assert [int(i) for i in re.findall(r"(?<!fresh )prompt (\d+)", page.text)] == shown  # each id with its own text


def test_a_row_is_in_one_end_only_and_nan_in_none():
    lowest, highest = report._extremes(np.array([3.0, np.nan, 1.0, 2.0]))
    assert lowest == [2, 3, 0] and highest == []
    lowest, highest = report._extremes(np.arange(13.0))
    assert lowest == list(range(10)) and highest == [12, 11, 10]


def test_without_texts_the_tables_stay(tmp_path):
    page = Page(report.build(write_run(tmp_path / "run", texts=False)))
    assert "iterations/2/kept.parquet carries no texts (columns prompt, chosen, rejected)." in page.text
    assert re.search(r"\bp\d+ -?\d", page.text)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("config.yaml", "config.yaml is absent"),
        ("metrics.jsonl", "metrics.jsonl is absent: no curves."),
        ("iterations/2/summary.json", "iterations/2/summary.json is absent."),
        ("iterations/2/kept.parquet", "iterations/2/kept.parquet is absent: no margins of iteration 2."),
        ("iterations/2/fresh.parquet", "iterations/2/fresh.parquet is absent: iteration 2 made none."),
    ],
)
def test_what_is_missing_is_named(tmp_path, name, sentence):
    folder = write_run(tmp_path / "run", pairs=20)
    (folder / name).unlink()
    assert sentence in Page(report.build(folder)).text


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {dir: x}\n")
    text = Page(report.build(tmp_path)).text
    assert text.count("iterations/ is absent or empty") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "report.html"]


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: it holds neither config\.yaml .*run\.dir"):
        report.build(tmp_path)
    folder = write_run(tmp_path / "run", pairs=5)
    place = folder / "iterations" / "2"
    pq.write_table(pa.table({"id": ["a"], "margin": [1.0]}), place / "kept.parquet")
    with pytest.raises(
        ValueError, match=r"2/kept\.parquet lacks the columns \['kept', 'length_chosen', 'length_rejected'\]"
    ):
        report.build(folder)
    (place / "kept.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"2/kept\.parquet is not a Parquet file"):
        report.build(folder)
    (place / "summary.json").write_text("{")
    (place / "kept.parquet").unlink()
    with pytest.raises(ValueError, match=r"2/summary\.json is not JSON"):
        report.build(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: b'nonsense' is not a JSON object"):
        report.build(folder)


def test_the_door(tmp_path):
    folder = write_run(tmp_path / "run", pairs=5)
    command = [sys.executable, "-m", "sera_jax.report"]
    root = str(report.pathlib.Path(report.__file__).parents[1])
    done = subprocess.run([*command, folder], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(folder / "report.html"), "")
    failed = subprocess.run([*command, tmp_path], cwd=root, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "is not a run folder" in failed.stderr
