"""Files, `datasets` folders and hub names → pairs, prompts and demonstrations, as text.

A row that cannot be used is counted by reason, with the first places where it happened, and costs only itself. Nothing
that a file brings is executed: no remote code, no pickle.
"""

import collections
import dataclasses
import gzip
import io
import itertools
import json
import math
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from sera_jax.records import Pair, Prompt, Text

Progress = Callable[[Iterable, int | None, str], Iterable]
"""progress(iterable, total or None, label) → the same items, shown while they pass."""

Row = tuple[int, dict | str]
"""Line (or row) number from 1, and the row, or the reason why there is none."""

HEAD = 32  # rows that the detection of a format looks at
PLACES = 5  # first places shown of each reason
ASSISTANT = "\n\nAssistant:"


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A response to imitate (SFT). An empty plain-text prompt means: the text stands by itself."""

    id: str
    prompt: Text
    response: Text
    weight: float = 1.0
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was read and what was not.

    files: (path, format, usable rows, rows read) each; dropped: (reason, rows, first places "file:line") each, the most
    frequent first; renamed: rows whose id was taken and got a suffix.
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
    limit: int = 0,
    progress: Progress = silent,
) -> tuple[list[Pair], Report]:
    """Preference pairs of files (.jsonl, .json, .parquet, each also .gz), `datasets` folders and hub names.

    format: a key of FORMATS, or auto: the one most of the first rows of each file have. limit: the first n usable
    pairs over all files (0 = all). Columns carried where they are: id, score_chosen and score_rejected (or chosen_score
    and rejected_score; null, NaN or one alone = none), weight, source or subset (default: the file's name without its
    extension). ids are unique: "<file name>:<line>" where the file has none; an id that is taken gets "#2", "#3", …

    Raises ValueError for a path that cannot be read, a format that cannot be told, and when no pair is usable.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"data.format: got {format!r}; expected auto, {', '.join(FORMATS)}.")
    forced = None if format == "auto" else format
    expected = (
        "expected prompt, chosen and rejected as text (explicit) or as lists of messages (conversational), or chosen "
        'and rejected as "\\n\\nHuman: …\\n\\nAssistant: …" transcripts (hh)'
    )
    return _collect(paths, "pairs", expected, _format, FORMATS, forced, _pair, split, limit, progress)


def load_prompts(
    paths: Sequence[str], *, split: str = "train", limit: int = 0, progress: Progress = silent
) -> tuple[list[Prompt], Report]:
    """Prompts to sample from: rows with prompt (text or messages), text, or instruction (and input, after a blank
    line); or the prompts of a pair file, each once. A prompt file keeps its repetitions: its rows stay countable.
    """
    seen: set[str] = set()

    def make(form: str, row: dict, name: str, stem: str) -> Prompt:
        prompt = PROMPTS[form](row)
        _filled(prompt, "prompt")
        if form in FORMATS:
            key = json.dumps(prompt, sort_keys=True, default=str)
            if key in seen:
                raise Unusable("prompt of an earlier pair")
            seen.add(key)
        return Prompt(_id(row, name), prompt)

    expected = "expected a column prompt (text or messages), text or instruction, or preference pairs"
    return _collect(paths, "prompts", expected, _prompt_form, PROMPTS, None, make, split, limit, progress)


def load_texts(
    paths: Sequence[str], *, split: str = "train", limit: int = 0, progress: Progress = silent
) -> tuple[list[Demonstration], Report]:
    """Demonstrations for SFT: rows with prompt and completion (text or messages), messages (the last assistant turn is
    the response, what follows it is left out), text (empty prompt), or instruction, input and output.
    """
    expected = "expected prompt and completion, messages, text, or instruction and output"
    return _collect(paths, "texts", expected, _text_form, TEXTS, None, _demonstration, split, limit, progress)


def prompts_of(pairs: Sequence[Pair]) -> list[Prompt]:
    """The prompts of pairs, each once, under the id of its first pair."""
    first = {json.dumps(pair.prompt, sort_keys=True, default=str): pair for pair in reversed(pairs)}
    return [Prompt(pair.id, pair.prompt) for pair in reversed(first.values())]


def demonstrations_of(pairs: Sequence[Pair]) -> list[Demonstration]:
    """The chosen responses of pairs, to imitate."""
    return [Demonstration(p.id, p.prompt, p.chosen, p.weight, p.source) for p in pairs]


class Unusable(ValueError):
    """Why one row cannot be used: becomes a line of the report."""


# Formats of pairs: row → (prompt, chosen, rejected)


def explicit(row: dict) -> tuple[Text, Text, Text]:
    """TRL's standard form: three texts, as they are."""
    return _string(row, "prompt"), _string(row, "chosen"), _string(row, "rejected")


def conversational(row: dict) -> tuple[Text, Text, Text]:
    """Messages. chosen and rejected may be the answers alone (the prompt is then messages, or a text = one user turn),
    or whole conversations, with or without a prompt beside them. Whichever: the last message of each, which must be the
    assistant's, is the response, and all before it the prompt, which must be the same for both.
    """
    prompt = row.get("prompt")
    given = () if prompt is None else _messages(row, "prompt", "user")
    whole = []
    for column in ("chosen", "rejected"):
        turns = _messages(row, column, "assistant")
        if not turns:
            raise Unusable(f"empty {column}")
        # A text beside conversations only repeats their first user turn (HuggingFaceH4/ultrafeedback_binarized).
        repeated = len(turns) > 1 if isinstance(prompt, str) else turns[: len(given)] == given
        whole.append(turns if repeated else given + turns)
        if turns[-1]["role"] != "assistant":
            raise Unusable(f"the last message of {column} is not the assistant's")
    chosen, rejected = whole
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("chosen and rejected have different prompts")
    return chosen[:-1], chosen[-1:], rejected[-1:]


def hh(row: dict) -> tuple[Text, Text, Text]:
    """Anthropic's transcripts, cut after the last "\\n\\nAssistant:": prompt + reply is the transcript, the reply keeps
    its leading space.
    """
    cut = {}
    for column in ("chosen", "rejected"):
        transcript = _string(row, column)
        head, mark, reply = transcript.rpartition(ASSISTANT)
        if not mark:
            raise Unusable(f'no "\\n\\nAssistant:" in {column}')
        cut[column] = head + mark, reply
    if cut["chosen"][0] != cut["rejected"][0]:
        raise Unusable("chosen and rejected have different prompts")
    return cut["chosen"][0], cut["chosen"][1], cut["rejected"][1]


FORMATS: dict[str, Callable[[dict], tuple[Text, Text, Text]]] = {
    "explicit": explicit,
    "conversational": conversational,
    "hh": hh,
}


def _format(row: dict) -> str | None:
    """The format of a row of pairs, None if it has none of them."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        return None
    if any(isinstance(row.get(column), list) for column in ("prompt", "chosen", "rejected")):
        return "conversational"
    if row.get("prompt") is not None:
        return "explicit"
    return "hh" if ASSISTANT in str(chosen) else None


def _pair(form: str, row: dict, name: str, stem: str) -> Pair:
    prompt, chosen, rejected = FORMATS[form](row)
    for column, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        _filled(text, column)
    if chosen == rejected:
        raise Unusable("chosen and rejected are identical")
    scores = next((s for s in (_scores(row, "score_{}"), _scores(row, "{}_score")) if s), None)
    return Pair(_id(row, name), prompt, chosen, rejected, scores, _weight(row), _source(row, stem))


# Forms of prompts and of demonstrations


def _instruction(row: dict) -> Text:
    extra = _string(row, "input") if row.get("input") else ""
    return _string(row, "instruction") + (f"\n\n{extra}" if extra else "")


def _text_or_messages(row: dict, column: str, role: str) -> Text:
    return _messages(row, column, role) if isinstance(row.get(column), list) else _string(row, column)


def _completion(row: dict) -> tuple[Text, Text]:
    prompt, response = _text_or_messages(row, "prompt", "user"), _text_or_messages(row, "completion", "assistant")
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt, response
    turns = _messages(row, "prompt", "user") + _messages(row, "completion", "assistant")
    return _last_turn(turns)


def _last_turn(turns: tuple[dict, ...]) -> tuple[Text, Text]:
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise Unusable("no assistant turn")
    _filled(turns[:last], "prompt")
    return turns[:last], turns[last : last + 1]


PROMPTS: dict[str, Callable[[dict], Text]] = {
    **{name: (lambda row, parse=parse: parse(row)[0]) for name, parse in FORMATS.items() if name != "explicit"},
    "explicit": lambda row: _string(row, "prompt"),  # its answers need not be usable
    "prompt": lambda row: _text_or_messages(row, "prompt", "user"),
    "text": lambda row: _string(row, "text"),
    "instruction": _instruction,
}

TEXTS: dict[str, Callable[[dict], tuple[Text, Text]]] = {
    "completion": _completion,
    "messages": lambda row: _last_turn(_messages(row, "messages", "user")),
    "instruction": lambda row: (_instruction(row), _string(row, "output")),
    "text": lambda row: ("", _string(row, "text")),
}

COLUMNS = {"completion": ("prompt", "completion"), "instruction": ("instruction", "output")}
"""What tells the forms that are not told by the column of their name."""


def _prompt_form(row: dict) -> str | None:
    return _format(row) or next((c for c in ("prompt", "text", "instruction") if row.get(c) is not None), None)


def _text_form(row: dict) -> str | None:
    return next((f for f in TEXTS if all(row.get(c) is not None for c in COLUMNS.get(f, (f,)))), None)


def _demonstration(form: str, row: dict, name: str, stem: str) -> Demonstration:
    prompt, response = TEXTS[form](row)
    _filled(response, "response")
    return Demonstration(_id(row, name), prompt, response, _weight(row), _source(row, stem))


# Columns


def _string(row: dict, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise Unusable(f"missing column {column!r}")
    if not isinstance(value, str):
        raise Unusable(f"{column} is {type(value).__name__}, expected text")
    return _unicode(value, column)


def _unicode(text: str, column: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable(f"{column} is not valid Unicode (a lone surrogate)") from None
    return text


def _messages(row: dict, column: str, role: str) -> tuple[dict, ...]:
    value = row.get(column)
    if value is None or isinstance(value, str):
        return ({"role": role, "content": _string(row, column)},)
    if not isinstance(value, list):
        raise Unusable(f"{column} is {type(value).__name__}, expected messages")
    for turn in value:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
            raise Unusable(f'a message of {column} is not {{"role": text, "content": text}}')
        _unicode(turn["content"], column)
    # Columns of structs give every message the keys of all of them, as nulls.
    return tuple({key: item for key, item in turn.items() if item is not None} for turn in value)


def _filled(text: Text, column: str) -> None:
    contents = [text] if isinstance(text, str) else [turn["content"] for turn in text]
    if not any(content.strip() for content in contents):
        raise Unusable(f"empty {column}")


def _number(row: dict, column: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable(f"{column} is {type(value).__name__}, expected a number")
    return float(value) if math.isfinite(value) else None


def _scores(row: dict, form: str) -> tuple[float, float] | None:
    chosen, rejected = _number(row, form.format("chosen")), _number(row, form.format("rejected"))
    return None if chosen is None or rejected is None else (chosen, rejected)


def _weight(row: dict) -> float:
    if row.get("weight") is None:
        return 1.0
    weight = _number(row, "weight")
    if weight is None or weight < 0:
        raise Unusable("weight is not a finite number of 0 or more")
    return weight


def _id(row: dict, name: str) -> str:
    value = row.get("id")
    if value is None or value == "":
        return name
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Unusable(f"id is {type(value).__name__}, expected text or an integer")
    return _unicode(str(value), "id")


def _source(row: dict, stem: str) -> str:
    named = (row.get(column) for column in ("source", "subset"))
    return next((value for value in named if isinstance(value, str) and value), stem)


# Walking through files


def _collect(
    paths: Sequence[str],
    what: str,
    expected: str,
    detect: Callable[[dict], str | None],
    table: dict[str, Callable],
    forced: str | None,
    make: Callable[[str, dict, str, str], Any],
    split: str,
    limit: int,
    progress: Progress,
) -> tuple[list, Report]:
    if isinstance(paths, str) or not paths:
        raise ValueError(f"{what}: got {paths!r}; expected a list of files, `datasets` folders or hub names.")
    items, ids, files, renamed = [], set(), [], 0
    counts: collections.Counter[str] = collections.Counter()
    places: dict[str, list[str]] = collections.defaultdict(list)
    for path in map(str, paths):
        if limit and len(items) >= limit:
            break
        stem, total, rows = _open(path, split)
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
                item = make(form, row, f"{stem}:{line}", stem)
            except Unusable as reason:
                counts[str(reason)] += 1
                if len(places[str(reason)]) < PLACES:
                    places[str(reason)].append(f"{stem}:{line}")
                continue
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
        forms = ", ".join(f"{path} as {form}" for path, form, _, _ in files)
        raise ValueError(
            f"no usable {what} in {forms}. Got {report.rows} rows: {got}; {expected}. "
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


def _open(path: str, split: str) -> tuple[str, int | None, Iterable[Row]]:
    """(name for ids and sources, rows if known, rows)."""
    local = pathlib.Path(path).expanduser()
    if local.is_dir():
        return (local.name or local.resolve().name, *_folder(local, split))
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
        return (path.split("/")[1], *_hub(path, split))
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


READERS: dict[str, Callable[[pathlib.Path], tuple[int | None, Iterator[Row]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}


def _folder(folder: pathlib.Path, split: str) -> tuple[int | None, Iterable[Row]]:
    """What `save_to_disk` wrote, or a folder of parquet files as the hub has them."""
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


def _hub(name: str, split: str) -> tuple[int, Iterable[Row]]:
    """A data set of the hub. Only data is fetched: `datasets` runs a repository's code only when told to, it is not."""
    try:
        loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name}: no such local file or folder, and the hub gave: {type(error).__name__}: {error}. Check the name, "
            f"data.split={split!r} and the network, or give local files."
        ) from error
    return len(loaded), enumerate(loaded, 1)
