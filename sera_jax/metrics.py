"""What a run tells: metrics.jsonl, TensorBoard and W&B, progress with time left, messages and tables.

Only process 0 writes and prints; on the others everything here is a null object, so callers ask nothing.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

T = TypeVar("T")

_WHERE = ("stage", "iteration", "step")
_LOG_WIDTH = 10_000  # columns where there is no terminal: a log is never cut or wrapped
_LINE_SECONDS = 60.0  # without a terminal, a long stage reports this often at most


@dataclasses.dataclass(frozen=True)
class _Sink:
    """Where records go besides metrics.jsonl."""

    write: Callable[[dict[str, Any]], None]
    close: Callable[[], None]


class Metrics:
    """Append-only metrics.jsonl: one JSON object a line, flushed line by line.

    Floats are written as their shortest exact decimal (Python's repr), so that reading gives the same bits; float32
    values are written as the float64 of the same value. NaN and infinities are written as `NaN`, `Infinity`,
    `-Infinity` (what Python's json reads): a diverging run has to be seen. Timings belong in keys that start with
    "perf/", which no comparison of two runs looks at.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offset: int | None = None,
        tensorboard_dir: str | os.PathLike[str] | None = None,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the file, creating it and its folder where they are missing.

        Args:
            path: metrics.jsonl.
            offset: bytes to keep (`offset` of the run state that is resumed); the rest is cut off. None = keep every
                whole line and append. 0 = start afresh.
            tensorboard_dir: folder for event files, one run "<stage>-<iteration>" in it for each stage; None = off.
            wandb_project: W&B project; empty = off.
            config: the run's config, shown by W&B.

        Raises:
            ValueError: the file is shorter than `offset` or `offset` is inside a line.
            ImportError: TensorBoard or W&B asked for and not installed; names the extra.
        """
        self._file: io.BufferedRandom | None = None
        self._sinks: tuple[_Sink, ...] = ()
        if jax.process_index() != 0:
            return
        # The sinks first: a missing package must not cost lines of an existing file.
        sinks = [_tensorboard(pathlib.Path(tensorboard_dir))] if tensorboard_dir is not None else []
        sinks += [_wandb(wandb_project, pathlib.Path(path), config)] if wandb_project else []
        self._sinks = tuple(sinks)
        self._file = _open_at(pathlib.Path(path), offset)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line.

        Args:
            record: "stage" (str), "iteration" and "step" (int, updates), then metrics: numbers, strings, bools, None,
                lists of them, NumPy and JAX scalars and vectors (fetched from the device here).

        Raises:
            ValueError: one of the three keys is missing, or a value is nothing that JSON can hold.
            OSError: a full disk; a part of the line may be in the file, behind what `offset` told before.
        """
        if self._file is None:
            return
        missing = [key for key in _WHERE if key not in record]
        if missing:
            raise ValueError(
                f"metrics record lacks {missing}, got keys {list(record)}; expected {list(_WHERE)} and metrics."
            )
        plain = {key: _plain(key, value) for key, value in record.items()}
        self._file.write(json.dumps(plain, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(plain)

    @property
    def offset(self) -> int:
        """Bytes written so far, all of them on disk (fsync): part of the run state. 0 on other processes than 0."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the file and the sinks; may be called twice."""
        for sink in self._sinks:
            sink.close()
        self._sinks = ()
        if self._file is not None:
            # What is still unwritten is what a write that failed has told of already.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _open_at(path: pathlib.Path, offset: int | None) -> io.BufferedRandom:
    """The file, cut off at `offset` (None: behind its last whole line) and positioned there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
    size = os.fstat(file.fileno()).st_size
    if offset is None:
        offset = file.read().rfind(b"\n") + 1
    elif offset < 0 or offset > size:
        file.close()
        raise ValueError(
            f"{path} has {size} bytes, expected at least the {offset} of the run state that is resumed: lines were "
            "lost or the file is another run's. Restore the file, or start the run in a new folder."
        )
    file.seek(max(offset - 1, 0))
    if offset > 0 and file.read(1) != b"\n":
        file.close()
        raise ValueError(
            f"{path}: byte {offset}, where the run state resumes, is inside a line, expected the end of one: the file "
            "was edited or is another run's. Restore the file, or start the run in a new folder."
        )
    file.truncate(offset)
    file.seek(offset)
    return file


def _plain(key: str, value: Any) -> Any:
    """`value` as JSON can hold it."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):  # also np.float64
        return float(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(value)
        if jax.numpy.issubdtype(array.dtype, np.floating):
            array = array.astype(np.float64)  # what json can write, bfloat16 included
        return _plain(key, array.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(key, item) for item in value]
    raise ValueError(
        f"metric {key!r} is a {type(value).__name__}, expected a number, a string, a bool, None or a list."
    )


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record that a curve can show."""
    return {
        key: float(value)
        for key, value in record.items()
        if key not in _WHERE and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _tensorboard(folder: pathlib.Path) -> _Sink:
    """Event files; a run of its own for each stage, because steps may start again with a stage."""
    try:
        import tensorboardX
    except ImportError as error:
        raise ImportError(
            "run.tensorboard needs the package tensorboardX: pip install 'sera_jax[tensorboard]'."
        ) from error
    writers: dict[str, Any] = {}

    def write(record: dict[str, Any]) -> None:
        name = re.sub(r"[^\w.-]", "_", f"{record['stage']}-{record['iteration']}")
        if name not in writers:
            writers[name] = tensorboardX.SummaryWriter(str(folder / name))
        for key, value in _numbers(record).items():
            writers[name].add_scalar(key, value, int(record["step"]))
        writers[name].flush()

    def close() -> None:
        for writer in writers.values():
            writer.close()

    return _Sink(write, close)


def _wandb(project: str, path: pathlib.Path, config: Mapping[str, Any] | None) -> _Sink:
    """A W&B run that keeps its identity over resumes: it is named after the run folder."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError("run.wandb needs the package wandb: pip install 'sera_jax[wandb]'.") from error
    folder = path.resolve().parent
    identity = hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()
    run = wandb.init(
        project=project, name=folder.name, id=identity, resume="allow", config=dict(config or {}), dir=str(folder)
    )
    # Its own step counter may not go back, which a resume does.
    run.define_metric("*", step_metric="step")
    return _Sink(lambda record: run.log(dict(record)), run.finish)


@functools.cache
def _console() -> rich.console.Console:
    """The one console: messages printed while a progress bar is shown go above the bar."""
    return rich.console.Console(highlight=False)


def _emit(content: Any) -> None:
    console = _console()
    if console.is_terminal:
        console.print(content, markup=False)
    else:
        with io.StringIO() as text:
            plain = rich.console.Console(file=text, width=_LOG_WIDTH, highlight=False, color_system=None)
            plain.print(content, markup=False, soft_wrap=isinstance(content, str))
            lines = "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))
        print(lines, flush=True)


def say(text: str) -> None:
    """Prints a one-line message, on process 0 only; markup in it is not interpreted."""
    if jax.process_index() == 0:
        _emit(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table, on process 0 only; without a terminal as plain text of full width.

    Args:
        title: line above it.
        columns: headings.
        rows: cells; numbers stand to the right, floats with four significant digits, None is empty.

    Raises:
        ValueError: a row has not one cell for each column.
    """
    rows = [list(row) for row in rows]
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(
                f"table {title!r}: row {number} has {len(row)} cells, expected {len(columns)} ({list(columns)})."
            )
    if jax.process_index() != 0:
        return
    shown = rich.table.Table(title=rich.text.Text(title), title_justify="left", box=rich.box.SIMPLE)
    for index, column in enumerate(columns):
        numeric = all(row[index] is None or isinstance(row[index], (int, float, np.number)) for row in rows)
        shown.add_column(rich.text.Text(str(column)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(rich.text.Text(_cell(value)) for value in row))
    _emit(shown)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def track(iterable: Iterable[T], *, total: int | None, label: str, unit: str) -> Iterator[T]:
    """Yields the items of `iterable` and shows how far the stage is.

    On a terminal a bar with rate and time left. Elsewhere exactly one line at the end (label, count, seconds, rate),
    and before it at most a line a minute. On other processes than 0, and where it is `quiet`, nothing is shown.

    Args:
        iterable: of the items.
        total: how many there will be; None = unknown.
        label: of the stage.
        unit: plural noun of an item ("pairs", "updates").
    """
    if jax.process_index() != 0 or _QUIET.get():
        yield from iterable
    elif _console().is_terminal:
        yield from _track_bar(iterable, total, label, unit)
    else:
        yield from _track_lines(iterable, total, label, unit)


_QUIET: contextvars.ContextVar[bool] = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it `track` shows nothing: for stages within a stage, which shows how far it is itself."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


def _track_bar(iterable: Iterable[T], total: int | None, label: str, unit: str) -> Iterator[T]:
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[rate]}", markup=False),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    started = time.monotonic()
    with rich.progress.Progress(*columns, console=_console()) as progress:
        task = progress.add_task(label, total=total, rate="")
        for count, item in enumerate(iterable, start=1):
            yield item
            progress.update(task, completed=count, rate=_rate(count, time.monotonic() - started, unit))


def _track_lines(iterable: Iterable[T], total: int | None, label: str, unit: str) -> Iterator[T]:
    started = shown = time.monotonic()
    count, of = 0, "" if total is None else f"/{total}"

    def line(seconds: float, end: str) -> str:
        return f"{label}: {count}{of} {unit}, {seconds:.1f} s, {_rate(count, seconds, unit)}{end}"

    ended = False
    try:
        for item in iterable:
            yield item
            count += 1
            now = time.monotonic()
            if now - shown >= _LINE_SECONDS and count != total:
                shown = now
                left = f", {(total - count) * (now - started) / count:.0f} s left" if total else ""
                _emit(line(now - started, left))
        ended = True
    finally:
        _emit(line(time.monotonic() - started, "" if ended else ", stopped early"))


def _rate(count: int, seconds: float, unit: str) -> str:
    rate = count / seconds if seconds > 0 else math.inf
    return f"{rate:.3g} {unit}/s" if rate < 1000 else f"{rate:.0f} {unit}/s"
