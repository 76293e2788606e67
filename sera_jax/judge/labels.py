"""Labels that a judge gave, on disk: what was answered once is asked never again."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from sera_jax import disk


@dataclasses.dataclass(frozen=True)
class Label:
    """An answer. value: probability that the first response is the better one, or a grade. reply: where it was read.
    tokens_in, tokens_out: of all tries that it took.
    """

    value: float
    reply: str
    tokens_in: int
    tokens_out: int


def key(**asked: Any) -> str:
    """Name of a question by its content: everything that decides the answer."""
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[tuple[dict[str, Label], Callable[[str, Label], None]]]:
    """Key → label of what the file holds, and a function that adds one: it is on disk when that returns. Threads may
    share the function. A line that was torn by a crash is passed over.

    Raises:
        DiskError: the disk took no more.
    """
    known = _read(path)
    lock = threading.Lock()
    with contextlib.ExitStack() as files:
        with disk.guarded(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = files.enter_context(open(path, "a+b", buffering=0))
            if _torn(file):
                file.write(b"\n")

        def keep(name: str, label: Label) -> None:
            line = json.dumps({"key": name, **dataclasses.asdict(label)}).encode() + b"\n"
            with lock, disk.guarded(path, len(line)):
                if file.write(line) != len(line):
                    raise disk.refusal(path, "the disk took a part of a line", len(line))
                os.fsync(file.fileno())
                known[name] = label

        yield known, keep


def _torn(file: Any) -> bool:
    """Does the file end within a line?"""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return False
    file.seek(size - 1)
    return file.read(1) != b"\n"


def _read(path: pathlib.Path) -> dict[str, Label]:
    found: dict[str, Label] = {}
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                stored = json.loads(line)
                name = stored.pop("key")
                found[name] = Label(**stored)
    return found
