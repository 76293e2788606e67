"""Log-probs that are computed once: kept by (content of the example's branch, tag of the model), shared between runs.

A ledger is a folder with one append-only file for each model tag, `<tag>.logp`, a sequence of chunks:

    header   20 bytes: magic b"SERALOGP" · count · crc32 of the body · crc32 of these 16 bytes; little-endian uint32
    body     count keys of 16 bytes, then count float32

An append is one write followed by fsync, under an exclusive lock (flock) of the file; a reader holds a shared one. So
several runs of one machine may use a folder at the same time (file systems without flock, such as a mounted bucket,
give no such promise). In a run of several processes all of them make every call here; process 0 works, all know.

The first value wins: a value that is known for a key and tag is never replaced, neither in memory nor on disk, because
margins that were selected on must be found again after a resume. Rounding depends on the layout of a batch, so a second
computation of the same log-prob may differ in its last bits; it is thrown away.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from sera_jax import disk, processes

KEY_BYTES = 16

_MAGIC = b"SERALOGP"
_HEADER = struct.Struct("<8sIII")
_CHECKED = _HEADER.size - 4  # bytes of the header that its own crc covers
_CHUNK = 1 << 16  # values in a chunk: what a broken one costs
_KEY = np.dtype("S16")  # compares byte by byte; NumPy pads with zero bytes, which a fixed width makes harmless
_VALUE = np.dtype("<f4")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_READ = 1 << 24


def branch_key(prompt_ids: np.ndarray | Sequence[int], branch_ids: np.ndarray | Sequence[int]) -> bytes:
    """The content address of log p(branch | prompt): 16 bytes of BLAKE2b over both lengths and all token ids.

    Args:
        prompt_ids: int [p], may be empty.
        branch_ids: int [r].
    """
    prompt, branch = (np.asarray(ids, dtype="<i4").reshape(-1) for ids in (prompt_ids, branch_ids))
    digest = hashlib.blake2b(struct.pack("<QQ", len(prompt), len(branch)), digest_size=KEY_BYTES)
    digest.update(prompt.tobytes())
    digest.update(branch.tobytes())
    return digest.digest()


def file_tag(path: str | os.PathLike[str]) -> str:
    """The tag of a checkpoint: 16 hex digits of BLAKE2b over its content, whatever its folder is called.

    Reads every byte once (about a second a gigabyte).

    Args:
        path: Hugging Face folder (its config.json and *.safetensors count), or one file.

    Raises:
        ValueError: there is no such path, or the folder holds no config.json.
    """
    path = pathlib.Path(path)
    if path.is_file():
        files = [path]
    else:
        files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
        if not files[0].is_file():
            raise ValueError(f"{path} holds no config.json, expected a Hugging Face folder or a file.")
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        name = file.name.encode() if path.is_dir() else b""
        digest.update(struct.pack("<QQ", len(name), file.stat().st_size) + name)
        with open(file, "rb") as stream:
            while block := stream.read(_READ):
                digest.update(block)
    return digest.hexdigest()


def derived_tag(*parts: str | int | float) -> str:
    """The tag of a model that no file has: 16 hex digits over what determines it.

    Args:
        parts: for an iterate of a run: fingerprint of the run's config, tag of the model it started from, stage and
            iteration. Order and types count.
    """
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


class Ledger:
    """A folder of log-probs (the module's docstring); keeps the values of the tags asked for in memory."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens the folder, which is created with the first append.

        Args:
            folder: of the ledger; may be shared with other runs.
        """
        self._folder = pathlib.Path(folder)
        self._tables: dict[str, _Table] = {}

    def look_up(self, tag: str, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """The known log-probs, including what other runs have appended so far.

        Args:
            tag: of the model.
            keys: n keys (`branch_key`).

        Returns:
            float32 [n], nats; NaN where nothing is known.

        Raises:
            ValueError: a chunk of the file is corrupted; a key is not 16 bytes; the tag is no file name.
        """
        table = self._table(tag)
        wanted = _as_keys(keys)

        def found() -> np.ndarray:
            if table.path.exists():
                with _locked(table.path, fcntl.LOCK_SH) as file:
                    table.read(file)
            return table.look_up(wanted)

        return processes.once(found)

    def append(self, tag: str, keys: Sequence[bytes] | np.ndarray, values: np.ndarray | Sequence[float]) -> int:
        """Adds log-probs; returns once they are on disk. Keys that are known already keep their first value.

        Args:
            tag: of the model.
            keys: n keys (`branch_key`).
            values: float32 [n], nats, finite.

        Returns:
            how many keys were new.

        Raises:
            ValueError: a value is not finite, the numbers of keys and values differ, or as `look_up`.
            DiskError: the disk took no more. What a part of the append left there goes with the next one.
        """
        table = self._table(tag)
        new, values = _as_keys(keys), np.asarray(values, dtype=_VALUE).reshape(-1)
        if len(new) != len(values):
            raise ValueError(f"ledger {table.path}: got {len(new)} keys and {len(values)} values, expected as many.")
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken):
            raise ValueError(
                f"ledger {table.path}: log-prob {broken[0]} of {len(values)} is {values[broken[0]]}, expected a finite "
                f"number ({len(broken)} are not). Nothing was written. Look at the model's outputs for that example."
            )
        return processes.once(lambda: self._add(table, new, values)) if len(new) else 0

    def _add(self, table: "_Table", keys: np.ndarray, values: np.ndarray) -> int:
        need = len(keys) * (KEY_BYTES + _VALUE.itemsize)
        self._folder.mkdir(parents=True, exist_ok=True)
        with disk.guarded(table.path, need), _locked(table.path, fcntl.LOCK_EX) as file:
            table.read(file)
            different, first = np.unique(keys, return_index=True)
            unknown = np.isnan(table.look_up(different))
            # In the order they came, so that a file does not depend on hash values.
            first = np.sort(first[unknown])
            if len(first):
                table.write(file, keys[first], values[first])
        return len(first)

    def _table(self, tag: str) -> "_Table":
        if not _TAG.fullmatch(tag):
            raise ValueError(
                f"ledger tag is {tag!r}, expected up to 128 letters, digits, '.', '_' and '-': it names a file. "
                "Use file_tag or derived_tag."
            )
        if tag not in self._tables:
            self._tables[tag] = _Table(self._folder / f"{tag}.logp")
        return self._tables[tag]


class _Table:
    """One file, as far as it has been read: sorted keys and their values."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._end, self._inode = 0, -1  # bytes read, all whole chunks
        self._keys, self._values = np.empty(0, _KEY), np.empty(0, _VALUE)
        self._unsorted: list[tuple[np.ndarray, np.ndarray]] = []

    def read(self, file: BinaryIO) -> None:
        """Takes in what was appended since the last time. `file`: locked."""
        status = os.fstat(file.fileno())
        if status.st_size < self._end or status.st_ino != self._inode:  # somebody deleted or replaced it
            self._forget()
            self._inode = status.st_ino
        if status.st_size == self._end:
            return
        file.seek(self._end)
        tail = file.read()
        used = 0
        while (chunk := self._chunk(tail, used)) is not None:
            keys, values, used = chunk
            self._unsorted.append((keys, values))
        self._end += used

    def _chunk(self, tail: bytes, at: int) -> tuple[np.ndarray, np.ndarray, int] | None:
        """The chunk at `at` of `tail` and where it ends; None where the whole chunks end."""
        header = tail[at : at + _HEADER.size]
        if len(header) < _HEADER.size:
            return None
        # After a power cut, blocks that the file system had reserved but not filled.
        if header == bytes(_HEADER.size) and tail.count(0, at) == len(tail) - at:
            return None
        magic, count, body_crc, header_crc = _HEADER.unpack(header)
        if magic != _MAGIC or zlib.crc32(header[:_CHECKED]) != header_crc:
            raise self._corrupted(at, "header")
        start, end = at + _HEADER.size, at + _HEADER.size + count * (KEY_BYTES + _VALUE.itemsize)
        if end > len(tail):
            return None
        if zlib.crc32(tail[start:end]) != body_crc:
            raise self._corrupted(at, "body")
        keys = np.frombuffer(tail, _KEY, count, start)
        return keys, np.frombuffer(tail, _VALUE, count, start + count * KEY_BYTES), end

    def _corrupted(self, at: int, part: str) -> ValueError:
        byte = self._end + at
        return ValueError(
            f"ledger {self.path}: the chunk at byte {byte} has a {part} that does not match its checksum: the file was "
            f"changed or the disk failed. To keep what stands before it, run truncate -s {byte} {self.path}; or delete "
            "the file. What is missing is computed again."
        )

    def look_up(self, wanted: np.ndarray) -> np.ndarray:
        """float32 [n], NaN where unknown."""
        if self._unsorted:
            keys = np.concatenate([self._keys, *(k for k, _ in self._unsorted)])
            values = np.concatenate([self._values, *(v for _, v in self._unsorted)])
            self._keys, first = np.unique(keys, return_index=True)  # the first occurrence: older values stand in front
            self._values, self._unsorted = values[first], []
        found = np.full(len(wanted), np.nan, np.float32)
        if len(self._keys):
            index = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
            known = self._keys[index] == wanted
            found[known] = self._values[index[known]]
        return found

    def write(self, file: BinaryIO, keys: np.ndarray, values: np.ndarray) -> None:
        """Appends behind the last whole chunk; what a killed append left there goes. `file`: locked exclusively."""
        pieces = []
        for start in range(0, len(keys), _CHUNK):
            part = slice(start, start + _CHUNK)
            body = keys[part].tobytes() + values[part].tobytes()
            head = struct.pack("<8sII", _MAGIC, len(keys[part]), zlib.crc32(body))
            pieces += [head, struct.pack("<I", zlib.crc32(head)), body]
        file.truncate(self._end)
        file.seek(self._end)
        file.write(b"".join(pieces))
        file.flush()
        os.fsync(file.fileno())
        if self._end == 0:
            disk.sync(self.path.parent)  # a new file survives a crash only once its folder is on disk
        self.read(file)


def _as_keys(keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
    """S16 [n]."""
    if isinstance(keys, np.ndarray) and keys.dtype == _KEY:
        return keys.reshape(-1)
    keys = list(keys)
    for number, key in enumerate(keys):
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ValueError(f"ledger key {number} is {key!r}, expected {KEY_BYTES} bytes from branch_key.")
    return np.frombuffer(b"".join(keys), _KEY)


@contextlib.contextmanager
def _locked(path: pathlib.Path, how: int) -> Iterator[BinaryIO]:
    """The file under a lock of the kind `how`, which closing it gives back; created for an exclusive one."""
    exclusive = how == fcntl.LOCK_EX
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT if exclusive else os.O_RDONLY, 0o644)
    with open(descriptor, "r+b" if exclusive else "rb") as file:
        fcntl.flock(file, how)
        yield file


@contextlib.contextmanager
def scratch() -> Iterator[Ledger]:
    """A ledger that goes with the block: of what is scored once and asked for no more."""
    with tempfile.TemporaryDirectory() as folder:
        yield Ledger(folder)
