"""Files, `datasets` folders and hub names → pairs, prompts and demonstrations, as text.

A row that cannot be used is counted by reason, with the first places where it happened, and costs only itself. Nothing
that a file brings is executed: no remote code, no pickle.
"""

import collections
import csv
import dataclasses
import gzip
import io
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import datasets
import pyarrow
import pyarrow.parquet

from sera_jax.data import forms
from sera_jax.data.forms import FORMATS, RANKED, UNPAIRED, Demonstration, Responses, Unusable
from sera_jax.records import Pair, Prompt, Unpaired

Progress = Callable[[Iterable, int | None, str], Iterable]
"""progress(iterable, total or None, label) → the same items, shown while they pass."""

Row = tuple[int, dict | str]
"""Line (or row) number from 1, and the row, or the reason why there is none."""

HEAD = 32  # rows that the detection of a format looks at
PLACES = 5  # first places shown of each reason
CELL = 2**31 - 1  # characters that a cell of a CSV may have


@dataclasses.dataclass(frozen=True)
class Report:
    """What was read and what was not.

    files: (path, format, items, rows read) each; dropped: (reason, rows, first places "file:line") each, the most
    frequent first; renamed: items whose id was taken and got a suffix. A row of K ranked responses may give several
    pairs, and be named under `dropped` for one of its responses.
    """

    what: str
    files: tuple[tuple[str, str, int, int], ...]
    dropped: tuple[tuple[str, int, tuple[str, ...]], ...] = ()
    renamed: int = 0

    @property
    def usable(self) -> int:
        return sum(usable for _, _, usable, _ in self.files)

    @property
    def rows(self) -> int:
        return sum(rows for _, _, _, rows in self.files)

    def lines(self) -> list[str]:
        """For people, one fact a line."""
        out = [f"{path}: {usable} {self.what} of {rows} rows, format {form}" for path, form, usable, rows in self.files]
        for reason, count, places in self.dropped:
            out.append(f"  not used: {count} × {reason} ({', '.join(places)}{', …' if count > len(places) else ''})")
        if self.renamed:
            out.append(f"  {self.renamed} ids were taken already and got a suffix (#2, #3, …)")
        return out


def silent(iterable: Iterable, total: int | None, label: str) -> Iterable:
    """The default progress: none."""
    return iterable


def load_pairs(
    paths: Sequence[str],
    *,
    format: str = "auto",
    split: str = "train",
    subset: str = "",
    ranked: str = "best_worst",
    seed: int = 0,
    limit: int = 0,
    progress: Progress = silent,
) -> tuple[list[Pair], Report]:
    """Preference pairs of files (see READERS, each also .gz), `datasets` folders and hub names.

    format: a key of FORMATS, or auto: the one most of the first rows of each file have. split, subset: of folders and
    hub names (see `opened`). ranked: a key of RANKED, how K scored responses become pairs; seed: of its random rules.
    limit: the first n usable pairs over all files (0 = all).

    Columns carried where they are: id, score_chosen and score_rejected (see forms.SCORES; null, NaN or one alone =
    none), weight, source or subset (default: the file's name without its extension), and what is known behind the
    label of a pair: gold_chosen and gold_rejected, flipped, cued, upset (true or false), author (text). ids are unique:
    "<file name>:<line>" where the file has none, "<id>/<place of the chosen one>><of the rejected one>" among K
    responses; an id that is taken gets "#2", "#3", …

    Raises ValueError for a path that cannot be read, a format that cannot be told, and when no pair is usable.
    """
    expected = _expected(format, ranked, FORMATS)
    if format == "auto":
        expected += "; prompt, completion and label (unpaired) are for losses kto and apo_zero_unpaired alone"

    def make(form: str, row: dict, name: str, stem: str) -> list[Pair | Unusable]:
        return forms.pairs_of(form, row, name, stem, rule=ranked, seed=seed)

    return _collect(
        paths,
        "pairs",
        expected,
        forms.format_of,
        make,
        forced=None if format == "auto" else format,
        where=(split, subset),
        limit=limit,
        progress=progress,
    )


def load_unpaired(
    paths: Sequence[str],
    *,
    format: str = "auto",
    split: str = "train",
    subset: str = "",
    ranked: str = "best_worst",
    seed: int = 0,
    limit: int = 0,
    progress: Progress = silent,
) -> tuple[list[Unpaired], Report]:
    """Labelled responses: rows with prompt, completion (text or messages) and label (true = desirable), carrying id,
    weight and source as pairs do; or preference pairs of any form, each of which becomes two, "<id>/chosen" (desirable)
    and "<id>/rejected".

    format: a key of UNPAIRED, or auto. limit: the first n responses. Otherwise as `load_pairs`.
    """

    def make(form: str, row: dict, name: str, stem: str) -> list[Unpaired | Unusable]:
        return forms.unpaired_of(form, row, name, stem, rule=ranked, seed=seed)

    return _collect(
        paths,
        "examples",
        _expected(format, ranked, UNPAIRED),
        forms.unpaired_format_of,
        make,
        forced=None if format == "auto" else format,
        where=(split, subset),
        limit=limit,
        progress=progress,
    )


def _expected(format: str, ranked: str, table: dict[str, forms.Form]) -> str:
    """What rows should have, for people. Raises ValueError for names that the tables lack."""
    if format != "auto" and format not in table:
        raise ValueError(f"data.format: got {format!r}; expected auto, {', '.join(table)}.")
    if ranked not in RANKED:
        raise ValueError(f"data.ranked: got {ranked!r}; expected {', '.join(RANKED)}.")
    shown = list(table) if format == "auto" else [format]
    return "expected " + ", or ".join(f"{table[name].columns} ({name})" for name in shown)


def load_prompts(
    paths: Sequence[str], *, split: str = "train", subset: str = "", limit: int = 0, progress: Progress = silent
) -> tuple[list[Prompt], Report]:
    """Prompts to sample from: rows with prompt (text or messages), text, or instruction (and input, after a blank
    line); or the prompts of a pair file, each once. A prompt file keeps its repetitions: its rows stay countable.
    """
    seen: set[str] = set()

    def make(form: str, row: dict, name: str, stem: str) -> list[Prompt]:
        prompt = forms.prompt_of(form, row, name, stem)
        if form in FORMATS:
            key = json.dumps(prompt.prompt, sort_keys=True, default=str)
            if key in seen:
                raise Unusable("prompt of an earlier pair")
            seen.add(key)
        return [prompt]

    expected = "expected a column prompt (text or messages), text or instruction, or preference pairs"
    return _collect(
        paths, "prompts", expected, forms.prompt_form_of, make, where=(split, subset), limit=limit, progress=progress
    )


def load_texts(
    paths: Sequence[str], *, split: str = "train", subset: str = "", limit: int = 0, progress: Progress = silent
) -> tuple[list[Demonstration], Report]:
    """Demonstrations for SFT: rows with prompt and completion (text or messages; a label, if any, must not be false),
    messages (the last assistant turn is the response, what follows it is left out), text (empty prompt), or
    instruction, input and output.
    """

    def make(form: str, row: dict, name: str, stem: str) -> list[Demonstration]:
        return [forms.demonstration_of(form, row, name, stem)]

    expected = "expected prompt and completion, messages, text, or instruction and output"
    return _collect(
        paths, "texts", expected, forms.text_form_of, make, where=(split, subset), limit=limit, progress=progress
    )


def load_rows(path: str) -> Iterable[Row]:
    """Rows of a file as they stand (see READERS, each also .gz), with their line numbers. Raises ValueError for a path
    that cannot be read."""
    return opened(path, "train", "")[2]


def load_responses(path: str, *, scored: bool, progress: Progress = silent) -> list[Responses]:
    """Candidates that somebody sampled: rows of prompt (text or messages), responses (texts) and, for each response,
    finished (default: all), rewards or scores (finite numbers; read where `scored`). Files as `load_pairs` reads them;
    other columns, such as the id and the lengths that `sera_jax.generate` writes, are passed over.

    Raises:
        ValueError: the first line that is anything else, by its number; no row at all.
    """
    stem, total, rows = opened(path, "train", "")
    found = []
    for line, row in progress(rows, total, f"reading {stem}"):
        try:
            if isinstance(row, str):
                raise Unusable(row)
            found.append(forms.responses_of(row, f"{path}:{line}", scored))
        except Unusable as reason:
            raise ValueError(
                f'{path}:{line}: {reason}; expected {{"prompt": text or messages, "responses": [text, ...]}} and, one '
                'for each response, "finished": [true, ...], "rewards" or "scores": [number, ...].'
            ) from None
    if not found:
        raise ValueError(f"{path} has no rows, expected candidates. Check bootstrap.candidates_file.")
    return found


def prompts_of(pairs: Sequence[Pair | Unpaired]) -> list[Prompt]:
    """The prompts of pairs or unpaired responses, each once, under the id of its first pair."""
    first = {json.dumps(pair.prompt, sort_keys=True, default=str): pair for pair in reversed(pairs)}
    return [Prompt(pair.id, pair.prompt) for pair in reversed(first.values())]


def demonstrations_of(given: Sequence[Pair | Unpaired]) -> list[Demonstration]:
    """The chosen responses of pairs, or the desirable ones among unpaired responses, to imitate."""
    good = [
        (g, g.chosen) if isinstance(g, Pair) else (g, g.completion) for g in given if isinstance(g, Pair) or g.label
    ]
    return [Demonstration(g.id, g.prompt, response, g.weight, g.source) for g, response in good]


# --- Walking through files --------------------------------------------------------------------------------------------


def _collect(
    paths: Sequence[str],
    what: str,
    expected: str,
    detect: Callable[[dict], str | None],
    make: Callable[[str, dict, str, str], list],
    *,
    forced: str | None = None,
    where: tuple[str, str],
    limit: int,
    progress: Progress,
) -> tuple[list, Report]:
    """The items that `make(form, row, name, source)` makes of every row, and what it did not.

    detect: row → form, asked where none is forced. where: (split, subset).
    """
    if isinstance(paths, str) or not paths:
        raise ValueError(f"{what}: got {paths!r}; expected a list of files, `datasets` folders or hub names.")
    items, ids, files, renamed = [], set(), [], 0
    counts: collections.Counter[str] = collections.Counter()
    places: dict[str, list[str]] = collections.defaultdict(list)
    for path in map(str, paths):
        if limit and len(items) >= limit:
            break
        stem, total, rows = opened(path, *where)
        before, read, form = len(items), 0, forced
        rows = iter(rows)
        head = list(itertools.islice(rows, HEAD))
        if form is None:
            form = _vote(path, [row for _, row in head if isinstance(row, dict)], detect, expected)
        for line, row in progress(itertools.chain(head, rows), total, f"reading {stem}"):
            read += 1
            try:
                if isinstance(row, str):
                    raise Unusable(row)
                made = make(form, row, f"{stem}:{line}", stem)
            except Unusable as reason:
                made = [reason]
            for item in made:
                if isinstance(item, Unusable):
                    counts[str(item)] += 1
                    if len(places[str(item)]) < PLACES:
                        places[str(item)].append(f"{stem}:{line}")
                elif not limit or len(items) < limit:
                    if item.id in ids:
                        free = next(f"{item.id}#{k}" for k in itertools.count(2) if f"{item.id}#{k}" not in ids)
                        item = dataclasses.replace(item, id=free)
                        renamed += 1
                    ids.add(item.id)
                    items.append(item)
            if limit and len(items) >= limit:
                break
        files.append((path, form, len(items) - before, read))
    dropped = tuple((reason, count, tuple(places[reason])) for reason, count in counts.most_common())
    report = Report(what, tuple(files), dropped, renamed)
    if not items:
        got = "; ".join(f"{count} × {reason} ({', '.join(where)})" for reason, count, where in dropped) or "no rows"
        read_as = ", ".join(f"{path} as {form}" for path, form, _, _ in files)
        raise ValueError(
            f"no usable {what} in {read_as}. Got {report.rows} rows: {got}; {expected}. "
            + ("Give data.format the format that the file has, or auto." if forced else "Repair or convert the file.")
        )
    return items, report


def _vote(path: str, rows: list[dict], detect: Callable[[dict], str | None], expected: str) -> str:
    """The form most of the rows have."""
    votes = collections.Counter(form for form in map(detect, rows) if form)
    if not votes:
        columns = "columns " + ", ".join(sorted({str(column) for row in rows for column in row})) if rows else "no row"
        raise ValueError(
            f"{path}: cannot tell the form of the data from its first rows. Got {columns}; {expected}. "
            "Rename the columns or convert the file."
        )
    return votes.most_common(1)[0][0]


def opened(path: str, split: str, subset: str) -> tuple[str, int | None, Iterable[Row]]:
    """(name for ids and sources, rows if known, rows). split, subset: of a folder or a hub name, nothing to a file."""
    local = pathlib.Path(path).expanduser()
    if local.is_dir():
        return (local.name or local.resolve().name, *_folder(local, split, subset))
    name = local.name.removesuffix(".gz")
    suffix = pathlib.Path(name).suffix
    if local.exists():
        if suffix not in READERS:
            raise ValueError(
                f"{path}: got a file with extension {suffix!r}; expected {', '.join(READERS)}, each also .gz, or a "
                "folder of `datasets`. Convert or rename the file."
            )
        return (name.removesuffix(suffix), *_guarded(path, READERS[suffix], local))
    if suffix not in READERS and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        return (path.split("/")[1], *_hub(path, split, subset))
    raise ValueError(
        f"{path}: no such file or folder (looked in {local.resolve().parent}); expected a file ({', '.join(READERS)}, "
        "each also .gz), a `datasets` folder, or a hub name like owner/name. Check data.pairs, data.prompts, sft.data."
    )


def _guarded(path: str, read: Callable, local: pathlib.Path) -> tuple[int | None, Iterator[Row]]:
    """Reading that says which file is damaged."""
    damage = (OSError, EOFError, zlib.error, pyarrow.ArrowException)
    hint = f"{path}: cannot be read to its end, it is damaged or not what its extension says"

    def walk(rows: Iterable[Row]) -> Iterator[Row]:
        try:
            yield from rows
        except damage as error:
            raise ValueError(f"{hint}: {error}. Fetch or write it again.") from error

    try:
        total, rows = read(local)
    except damage as error:
        raise ValueError(f"{hint}: {error}. Fetch or write it again.") from error
    return total, walk(rows)


def _bytes(path: pathlib.Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _json_lines(path: pathlib.Path) -> tuple[None, Iterator[Row]]:
    def walk() -> Iterator[Row]:
        with _bytes(path) as file:
            yield from _lines(file)

    return None, walk()


def _lines(file: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, _object(line)


def _object(line: bytes) -> dict | str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "broken JSON"
    return row if isinstance(row, dict) else "not a JSON object"


def _json(path: pathlib.Path) -> tuple[int | None, Iterator[Row]]:
    """A list of objects, or JSON lines under another name."""
    with _bytes(path) as file:
        content = file.read()
    try:
        whole = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        whole = None
    if isinstance(whole, list):
        return len(whole), (
            (n, row if isinstance(row, dict) else "not a JSON object") for n, row in enumerate(whole, 1)
        )
    if isinstance(whole, dict):
        return 1, iter([(1, whole)])
    return None, _lines(content.splitlines(keepends=True))


def _parquet(path: pathlib.Path) -> tuple[int, Iterator[Row]]:
    with _bytes(path) as file:  # .parquet.gz has no random access
        source = pyarrow.BufferReader(file.read()) if path.suffix == ".gz" else path
    table = pyarrow.parquet.ParquetFile(source)
    return table.metadata.num_rows, enumerate((row for b in table.iter_batches(1024) for row in b.to_pylist()), 1)


def _csv(path: pathlib.Path) -> tuple[None, Iterator[Row]]:
    """A first line of column names, then rows; cells become values as forms.from_cells says."""
    csv.field_size_limit(CELL)

    def walk() -> Iterator[Row]:
        with _bytes(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
            reader, columns = csv.reader(text, strict=True), None
            while True:
                line = reader.line_num + 1  # of the row's start: cells may hold line breaks
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    yield line, "broken CSV (a quote that is not closed, or text behind one that is)"
                    continue
                if cells and columns is None:
                    columns = cells
                elif cells:
                    yield line, _cells(columns, cells)

    return None, walk()


def _cells(columns: list[str], cells: list[str]) -> dict | str:
    if len(cells) != len(columns):
        return "not as many cells as columns"
    if any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):  # what surrogateescape makes of other bytes
        return "not UTF-8"
    return forms.from_cells(dict(zip(columns, cells)))


READERS: dict[str, Callable[[pathlib.Path], tuple[int | None, Iterator[Row]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}


def _folder(folder: pathlib.Path, split: str, subset: str) -> tuple[int | None, Iterable[Row]]:
    """What `save_to_disk` wrote, or a folder of parquet files as the hub has them; a subset is a folder in it."""
    if subset:
        inner = sorted(part.name for part in folder.iterdir() if part.is_dir())
        if subset not in inner:
            raise ValueError(
                f"{folder}: got data.subset={subset!r}; expected one of its folders ({', '.join(inner) or 'none'})."
            )
        folder = folder / subset
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        try:
            loaded = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(f"{folder}: `datasets` cannot load this folder: {error}") from error
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{folder}: got data.split={split!r}; expected one of {', '.join(map(str, loaded))}.")
            loaded = loaded[split]
        return len(loaded), enumerate(loaded.with_format(None), 1)
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise ValueError(
            f"{folder}: got a folder without dataset_dict.json, state.json or .parquet files; expected what `datasets` "
            "saves (save_to_disk) or parquet files. To read other files, name them one by one."
        )
    splits = {file: re.sub(r"-\d{5}-of-\d{5}.*$", "", file.stem) for file in files}
    if any(file.stem != name for file, name in splits.items()) and split not in splits.values():
        raise ValueError(
            f"{folder}: got data.split={split!r}; expected one of {', '.join(sorted(set(splits.values())))}."
        )
    chosen = [file for file in files if splits[file] == split] or files
    parts = [_guarded(str(file), _parquet, file) for file in chosen]
    return sum(total for total, _ in parts), enumerate((row for _, rows in parts for _, row in rows), 1)


def _hub(name: str, split: str, subset: str) -> tuple[int, Iterable[Row]]:
    """A data set of the hub. Only data is fetched: `datasets` runs a repository's code only when told to, it is not."""
    try:
        loaded = datasets.load_dataset(name, *([subset] if subset else []), split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name}: no such local file or folder, and the hub gave: {type(error).__name__}: {error}. Check the name, "
            f"data.split={split!r}, data.subset={subset!r} and the network, or give local files."
        ) from error
    return len(loaded), enumerate(loaded, 1)
