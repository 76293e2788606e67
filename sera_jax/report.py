"""A run folder → one self-contained page: python -m sera_jax.report RUN_DIR writes RUN_DIR/report.html.

Reads what the folder holds so far, also while the run goes on: config.yaml, metrics.jsonl and, for each iteration t,
iterations/t/summary.json, kept.parquet and fresh.parquet. The page fetches nothing and runs nothing: figures are inline
SVG, every text of the data is escaped, and its content security policy forbids scripts and network.
"""

import argparse
import dataclasses
import html
import io
import json
import os
import pathlib
import re
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np
import pyarrow
import pyarrow.parquet
import yaml

PAIRS_SHOWN = 10

_CURVES = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "validation/loss",
    "validation/accuracy",
    "reward",
    "kl",
    "completions/mean_length",
    "clip_ratio/region_mean",
)
_SUMMARY_KEYS = (
    "model.path",
    "data.pairs",
    "data.prompts",
    "loop.iterations",
    "loss.name",
    "loss.beta",
    "reward.source",
    "reward.ensemble",
    "reward.gamma",
    "select.score",
    "select.rule",
    "select.keep",
    "bootstrap.fresh",
    "bootstrap.candidates",
    "on_policy.algorithm",
    "optimizer.learning_rate",
    "optimizer.batch_size",
    "run.seed",
)
_KEPT_COLUMNS = ("id", "margin", "kept", "length_chosen", "length_rejected")
_FRESH_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "reward_chosen",
    "reward_rejected",
    "length_chosen",
    "length_rejected",
)
_TEXTS = ("prompt", "chosen", "rejected")
_TEXT_SHOWN = 2000  # characters of a text
_POINTS_SHOWN = 5000  # of a scatter
_INK = "#010203"  # stands for the page's text colour in figures; no real colour of ours
_COLOURS = ("#4c8bc9", "#ee6677", "#228833", "#b59a1e", "#4aa8c8", "#aa3377", "#888888")  # after Paul Tol, "bright"
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of stages may hold dollar signs
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "axes.prop_cycle": matplotlib.cycler(color=_COLOURS),
}

_PAGE = string.Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5c6672; --line: #d9dee4; --page: #fff; --panel: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa4b0; --line: #363c45; --page: #15181c; --panel: #1e2227; }
}
body { max-width: 64rem; margin: 2rem auto; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
p, figcaption { color: var(--soft); max-width: 48rem; }
.missing { font-style: italic; }
.warning { color: var(--ink); border-left: .2rem solid #ee6677; padding-left: .7rem; }
figure { margin: 1rem 0; }
svg { max-width: 100%; height: auto; color: var(--ink); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; width: 100%; }
.numbers { width: auto; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12rem; overflow-y: auto; min-width: 11rem; }
pre { background: var(--panel); padding: 1rem; overflow-x: auto; font-size: .8rem; }
summary { cursor: pointer; color: var(--soft); margin: .6rem 0; }
</style>
</head>
<body>
$body
</body>
</html>
"""
)


@dataclasses.dataclass(frozen=True)
class _Iteration:
    """What iterations/<number>/ holds; None where a file is missing. Arrays of `kept` are [N] in the file's order."""

    number: int
    summary: dict[str, Any] | None
    kept: dict[str, np.ndarray] | None
    texts: dict[str, list[Any]]
    fresh: dict[str, list[Any]] | None


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run folder as read."""

    name: str
    config_text: str | None
    config: dict[str, Any]
    records: list[dict[str, Any]] | None
    iterations: tuple[_Iteration, ...]


def build(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Writes RUN_DIR/report.html, atomically, and returns its path. What is missing is named in the page.

    Raises:
        ValueError: not a run folder (neither config.yaml nor metrics.jsonl nor iterations/), or a file in it cannot be
            read; names the file.
    """
    run_dir = pathlib.Path(run_dir)
    run = _read_run(run_dir)
    with matplotlib.rc_context(_STYLE):
        sections = [section(run) for section in (_header, _curves, _iterations, _margins, _pairs, _fresh)]
    page = _PAGE.substitute(title=_escape(f"{run.name}: sera_jax"), body="\n".join(sections))
    path, beside = run_dir / "report.html", run_dir / "report.html.tmp"
    beside.write_text(page, encoding="utf-8")
    beside.replace(path)
    return path


def main(args: Sequence[str] | None = None) -> None:
    """The door: one run folder in, the path of the page out; a ValueError becomes one line."""
    parser = argparse.ArgumentParser(prog="python -m sera_jax.report", description="A run folder as one HTML page.")
    parser.add_argument("run_dir", help="folder of a run: config.yaml, metrics.jsonl, iterations/")
    try:
        print(build(parser.parse_args(args).run_dir))
    except ValueError as error:
        sys.exit(str(error))


# Reading


def _read_run(run_dir: pathlib.Path) -> _Run:
    config, metrics, folder = (run_dir / name for name in ("config.yaml", "metrics.jsonl", "iterations"))
    if not (config.is_file() or metrics.is_file() or folder.is_dir()):
        raise ValueError(
            f"{run_dir} is not a run folder: it holds neither config.yaml nor metrics.jsonl nor iterations/. Expected "
            "the folder that run.dir of the training named."
        )
    text = config.read_text(encoding="utf-8") if config.is_file() else None
    try:
        parsed = yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is not YAML: {' '.join(str(error).split())}") from None
    numbers = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    return _Run(
        name=run_dir.resolve().name,
        config_text=text,
        config=parsed if isinstance(parsed, dict) else {},
        records=_read_metrics(metrics) if metrics.is_file() else None,
        iterations=tuple(_read_iteration(folder / str(number), number) for number in numbers),
    )


def _read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")[:-1]  # behind the last end of line: a line that is being written
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is not a JSON object, expected one a line.")
        records.append(record)
    return records


def _read_iteration(folder: pathlib.Path, number: int) -> _Iteration:
    summary, kept, fresh = (folder / name for name in ("summary.json", "kept.parquet", "fresh.parquet"))
    kept_arrays, texts = None, {}
    if kept.is_file():
        table = _read_parquet(kept, _KEPT_COLUMNS)
        kept_arrays = {name: table[name].to_numpy(zero_copy_only=False) for name in _KEPT_COLUMNS}
        kept_arrays["margin"] = kept_arrays["margin"].astype(np.float64)
        shown = [row for end in _extremes(kept_arrays["margin"]) for row in end]
        if set(_TEXTS) <= set(table.column_names):
            # Only what the page shows: the texts of a whole data set are large.
            texts = {
                name: dict(zip(shown, table[name].take(pyarrow.array(shown, pyarrow.int64())).to_pylist()))
                for name in _TEXTS
            }
    return _Iteration(
        number=number,
        summary=_read_summary(summary) if summary.is_file() else None,
        kept=kept_arrays,
        texts=texts,
        fresh=_read_parquet(fresh, _FRESH_COLUMNS).to_pydict() if fresh.is_file() else None,
    )


def _read_summary(path: pathlib.Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return _flat(summary)


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested names joined by "/"."""
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}/") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def _read_parquet(path: pathlib.Path, columns: Iterable[str]) -> pyarrow.Table:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}, got {table.column_names}, expected {list(columns)}.")
    return table


def _extremes(margin_N: np.ndarray) -> tuple[list[int], list[int]]:
    """The rows of the lowest and of the highest margins, the outermost first; a row is in one of them at most."""
    order = np.argsort(margin_N, kind="stable")[: np.isfinite(margin_N).sum()].tolist()  # NaN goes last
    lowest = order[:PAIRS_SHOWN]
    return lowest, order[len(lowest) :][::-1][:PAIRS_SHOWN]


# Sections: each takes the run and gives HTML


def _header(run: _Run) -> str:
    title = f"<h1>{_escape(run.name)}</h1>"
    if run.config_text is None:
        return title + _missing("config.yaml is absent: what the run was asked to do is not known.")
    rows = []
    for key in _SUMMARY_KEYS:
        value: Any = run.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, [], ""):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append(f"<tr><th>{_escape(key)}</th><td>{_escape(shown)}</td></tr>")
    whole = f"<details><summary>The whole config.yaml</summary><pre>{_escape(run.config_text)}</pre></details>"
    return f'{title}<table class="numbers">{"".join(rows)}</table>{whole}'


def _curves(run: _Run) -> str:
    if run.records is None:
        return _section("Training curves", _missing("metrics.jsonl is absent: no curves."))
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in run.records:
        if "step" in record and any(_is_number(record.get(key)) for key in _CURVES):
            stages.setdefault(str(record.get("stage", "")), []).append(record)
    if not stages:
        return _section("Training curves", _missing(f"metrics.jsonl holds none of {', '.join(_CURVES)} so far."))
    figures = []
    for name, records in stages.items():
        keys = [key for key in _CURVES if any(_is_number(record.get(key)) for record in records)]
        figures.append(f"<h3>Stage {_escape(name)}</h3>{_curve_figure(name, records, keys)}")
    return _section("Training curves", "".join(figures))


def _curve_figure(stage: str, records: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """One panel for each key, one line for each iteration."""
    rows = -(-len(keys) // 2)
    figure = matplotlib.figure.Figure(figsize=(4.5 * min(2, len(keys)), 2.4 * rows), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08, wspace=0.06)
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        lines.setdefault(str(record.get("iteration", "")), []).append(record)
    for place, key in enumerate(keys, start=1):
        axes = figure.add_subplot(rows, min(2, len(keys)), place, title=key)
        for colour, (iteration, line) in enumerate(lines.items()):
            points = [(r["step"], r[key]) for r in line if _is_number(r.get(key))]
            mark = "o" if len(points) == 1 else None
            axes.plot(
                *zip(*points or [(np.nan, np.nan)]),
                label=f"iteration {iteration}",
                color=_COLOURS[colour % len(_COLOURS)],
                linewidth=1.2,
                marker=mark,
            )
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator("auto", integer=True))
        if place > len(keys) - 2:
            axes.set_xlabel("update")
        if place == 1 and len(lines) > 1:
            axes.legend(loc="upper right")
    return _svg(figure, f"curves {stage}")


def _iterations(run: _Run) -> str:
    if not run.iterations:
        return _section("Iterations", _missing("iterations/ is absent or empty: no iteration has ended yet."))
    columns = [{**_measured(iteration), **_told(iteration)} for iteration in run.iterations]
    names = dict.fromkeys(name for column in columns for name in column)
    names = [name for name in names if any(column.get(name) is not None for column in columns)]
    rows = [[name, *(column.get(name) for column in columns)] for name in names]
    body = _table(["", *(f"iteration {iteration.number}" for iteration in run.iterations)], rows)
    for iteration in run.iterations:
        if iteration.summary is None:
            body += _missing(f"iterations/{iteration.number}/summary.json is absent.")
        for said in (iteration.summary or {}).get("warnings") or []:
            body += f'<p class="warning">Iteration {iteration.number}: {_escape(said)}</p>'
    return _section("Iterations", body)


def _measured(iteration: _Iteration) -> dict[str, Any]:
    """What follows from the pairs themselves."""
    names = ["given pairs", "kept pairs", "fresh pairs", "margin, 10 %", "margin, 50 %", "margin, 90 %"]
    found: dict[str, Any] = dict.fromkeys([*names, "accuracy (margin > 0)"])  # the order of the table
    used = _fresh_used(iteration.fresh) if iteration.fresh is not None else []
    if iteration.kept is not None:
        kept, margin = iteration.kept["kept"].astype(bool), iteration.kept["margin"]
        found |= {"given pairs": len(kept), "kept pairs": int(kept.sum())}
        finite = margin[np.isfinite(margin)]
        if len(finite):
            found |= {f"margin, {share} %": float(np.quantile(finite, share / 100)) for share in (10, 50, 90)}
            found["accuracy (margin > 0)"] = float(np.mean(finite > 0))
        if kept.any():
            for side in ("chosen", "rejected"):
                found[f"tokens of {side}, kept pairs"] = float(np.mean(iteration.kept[f"length_{side}"][kept]))
    if iteration.fresh is not None:
        found["fresh pairs"] = len(used)
        for side in ("chosen", "rejected"):
            length = [iteration.fresh[f"length_{side}"][row] for row in used]
            found[f"tokens of {side}, fresh pairs"] = float(np.mean(length)) if used else None
    return found


def _told(iteration: _Iteration) -> dict[str, Any]:
    """The numbers of summary.json, but timings."""
    summary = iteration.summary or {}
    return {k: v for k, v in summary.items() if _is_number(v) and k != "iteration" and not k.startswith("perf/")}


def _fresh_used(fresh: Mapping[str, list[Any]]) -> list[int]:
    """Rows of the fresh pairs that were trained on: all where nothing is said."""
    rows = len(fresh["prompt"])
    return [row for row in range(rows) if fresh.get("kept", [True] * rows)[row]]


def _margins(run: _Run) -> str:
    body = ""
    for iteration in run.iterations:
        where = f"iterations/{iteration.number}/kept.parquet"
        if iteration.kept is None:
            body += _missing(f"{where} is absent: no margins of iteration {iteration.number}.")
        elif not np.isfinite(iteration.kept["margin"]).any():
            body += _missing(f"{where} holds no margins: iteration {iteration.number} did not score the given pairs.")
        else:
            body += f"<h3>Iteration {iteration.number}</h3>{_margin_figure(iteration.number, iteration.kept)}"
    return _section("Margins of the given pairs", body or _missing("iterations/ is absent or empty: no margins."))


def _margin_figure(number: int, kept: Mapping[str, np.ndarray]) -> str:
    """Left: histogram of the margins, kept and dropped. Right: margin against the gap of lengths."""
    finite = np.isfinite(kept["margin"])
    margin, is_kept = kept["margin"][finite], kept["kept"].astype(bool)[finite]
    gap = (kept["length_chosen"].astype(np.int64) - kept["length_rejected"].astype(np.int64))[finite]
    figure = matplotlib.figure.Figure(figsize=(9, 3), layout="constrained")
    left = figure.add_subplot(1, 2, 1, title="margins", xlabel="implicit reward margin", ylabel="pairs")
    right = figure.add_subplot(
        1, 2, 2, title="margin and length", xlabel="tokens of chosen − tokens of rejected", ylabel="margin"
    )
    edges = np.histogram_bin_edges(margin, bins=40)
    stride = max(1, -(-len(margin) // _POINTS_SHOWN))
    for name, group, colour in (("kept", is_kept, _COLOURS[0]), ("dropped", ~is_kept, _COLOURS[1])):
        if group.any():
            left.hist(margin[group], edges, label=f"{name} ({group.sum()})", color=colour, alpha=0.65)
            points = np.flatnonzero(group)[::stride]
            right.scatter(gap[points], margin[points], s=6, color=colour, alpha=0.5, linewidths=0, rasterized=True)
    left.axvline(0, color=_INK, linewidth=0.6, linestyle=":")
    right.axhline(0, color=_INK, linewidth=0.6, linestyle=":")
    left.legend(loc="upper right")
    note = "" if stride == 1 else f"The right panel shows every {stride}th pair of {len(margin)}."
    return _svg(figure, f"margins {number}", note)


def _pairs(run: _Run) -> str:
    body = ""
    for iteration in run.iterations:
        if iteration.kept is None or not np.isfinite(iteration.kept["margin"]).any():
            continue
        lowest, highest = _extremes(iteration.kept["margin"])
        tables = "<h3>Lowest margins: mislabelled, or hard</h3>" + _pair_table(iteration, lowest)
        if highest:
            tables += "<h3>Highest margins: sure</h3>" + _pair_table(iteration, highest)
        if not iteration.texts:
            tables += _missing(
                f"iterations/{iteration.number}/kept.parquet carries no texts (columns prompt, chosen, rejected)."
            )
        body += _folded(f"Iteration {iteration.number}", tables, opened=iteration is run.iterations[-1])
    return _section("Given pairs at both ends", body or _missing("No kept.parquet with margins: no pairs to show."))


def _pair_table(iteration: _Iteration, order: Sequence[int]) -> str:
    kept = iteration.kept
    rows = []
    for row in order:
        lengths = f"{kept['length_chosen'][row]} / {kept['length_rejected'][row]}"
        cells = [str(kept["id"][row]), float(kept["margin"][row]), "yes" if kept["kept"][row] else "no", lengths]
        rows.append(cells + [_Text(iteration.texts[name][row]) for name in _TEXTS if iteration.texts])
    columns = ["id", "margin", "kept", "tokens c / r"]
    return _table(columns + ([*_TEXTS] if iteration.texts else []), rows)


def _fresh(run: _Run) -> str:
    body = ""
    for iteration in run.iterations:
        if iteration.fresh is None:
            body += _missing(
                f"iterations/{iteration.number}/fresh.parquet is absent: iteration {iteration.number} made none."
            )
            continue
        fresh, used = iteration.fresh, _fresh_used(iteration.fresh)
        if not used:
            body += _missing(f"iterations/{iteration.number}/fresh.parquet holds no pair that was trained on.")
            continue
        gap = [fresh["reward_chosen"][row] - fresh["reward_rejected"][row] for row in used]
        order = [used[i] for i in np.argsort(gap, kind="stable")[::-1]]
        spread = np.unique(np.linspace(0, len(order) - 1, min(PAIRS_SHOWN, len(order))).round().astype(int))
        rows = []
        for row in (order[i] for i in spread):
            rewards = [float(fresh["reward_chosen"][row]), float(fresh["reward_rejected"][row])]
            lengths = f"{fresh['length_chosen'][row]} / {fresh['length_rejected'][row]}"
            rows.append([*rewards, lengths, *(_Text(fresh[name][row]) for name in _TEXTS)])
        table = _table(["reward chosen", "reward rejected", "tokens c / r", *_TEXTS], rows)
        table = f"<p>{len(rows)} of {len(used)}, evenly over the ranking by reward gap, largest first.</p>" + table
        body += _folded(f"Iteration {iteration.number}", table, opened=iteration is run.iterations[-1])
    return _section("Fresh pairs", body or _missing("iterations/ is absent or empty: no fresh pairs."))


# Building blocks


@dataclasses.dataclass(frozen=True)
class _Text:
    """A cell that holds a text of the data."""

    value: Any


def _escape(text: str) -> str:
    # Lone surrogates and NUL cannot be in the page; everything else is text, whatever it looks like.
    return html.escape(text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}"))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_escape(title)}</h2>{body}</section>"


def _missing(sentence: str) -> str:
    return f'<p class="missing">{_escape(sentence)}</p>'


def _folded(title: str, body: str, *, opened: bool) -> str:
    return f"<details{' open' if opened else ''}><summary>{_escape(title)}</summary>{body}</details>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers stand to the right, None is empty."""
    numeric = [all(row[i] is None or _is_number(row[i]) for row in rows) for i in range(len(columns))]
    classes = [' class="number"' if n else "" for n in numeric]
    head = "".join(f"<th{c}>{_escape(name)}</th>" for c, name in zip(classes, columns))
    lines = ("".join(f"<td{c}>{_cell(value)}</td>" for c, value in zip(classes, row)) for row in rows)
    texts = any(isinstance(value, _Text) for row in rows for value in row)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table{"" if texts else " class=numbers"}><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, _Text):
        text = value.value if isinstance(value.value, str) else json.dumps(value.value, ensure_ascii=False, default=str)
        cut = f"{text[:_TEXT_SHOWN]} … ({len(text)} characters)" if len(text) > _TEXT_SHOWN else text
        return f'<div class="text">{_escape(cut)}</div>'
    if isinstance(value, float):
        return f"{value:.4g}"
    return _escape(str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _svg(figure: matplotlib.figure.Figure, name: str, caption: str = "") -> str:
    """The figure inline, in the page's text colour; `name` makes its element ids its own."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL).replace(
        _INK, "currentColor"
    )
    note = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    return f'<figure role="img" aria-label="{_escape(name)}">{svg}{note}</figure>'


if __name__ == "__main__":
    main()
