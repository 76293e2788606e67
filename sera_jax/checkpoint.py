"""Saving and resuming: the whole state of a run, and the iterates that the ensemble needs.

The only room that imports orbax (its v1 interface). A tree is stored flat, as {path of the leaf: array}, so that what
is on disk depends neither on container types nor on their order. Everything is written beside its final place and
renamed, so a save that is killed, or finds the disk full, leaves nothing that loads. In a run of several processes all
of them make every call here, on one file system.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from sera_jax import disk, processes
from sera_jax.disk import DiskError


class Checkpoints:
    """The full checkpoints of a run, `<folder>/<step>/`: arrays, and a cursor of plain values."""

    def __init__(self, folder: str | os.PathLike[str], keep: int):
        """Opens the folder, creating it where it is missing; removes what killed saves left.

        Args:
            folder: of the checkpoints.
            keep: how many stay on disk: the latest ones. A new one is complete before an old one goes.
        """
        _quiet()
        self._folder = pathlib.Path(folder).absolute()
        self._manager = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        found = self._manager.latest
        self._saved, self._last = None, -1
        if found is not None:
            self._saved = (found.step, self._manager.metadata(found.step).custom_metadata["cursor"])
            self._last = found.step
        self._pending: tuple[int, dict[str, Any], int] | None = None  # step, cursor and bytes of the save under way

    def save(self, step: int, arrays: Any, cursor: Mapping[str, Any]) -> None:
        """Starts a save, behind one that is still under way; returns once the arrays may be donated.

        Args:
            step: of the run, greater than that of every checkpoint in the folder.
            arrays: pytree of jax.Array, any shardings, no typed PRNG keys.
            cursor: plain values that JSON can hold (tuples come back as lists).

        Raises:
            ValueError: the step is not greater, a leaf is no array, or the cursor is nothing that JSON can hold.
            DiskError: this save, or the one before, could not be written. What goes wrong in the background is raised
                by the next call.
        """
        if step <= self._last:
            raise ValueError(
                f"checkpoint step is {step}, expected more than {self._last}, the latest in {self._folder}: count the "
                "updates of the whole run, and save once at each."
            )
        flat = _flatten(arrays, (jax.Array,), "arrays to save")
        try:
            cursor = json.loads(json.dumps(cursor))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"checkpoint {step}: the cursor holds something that JSON cannot hold: {error}."
            ) from error
        self.wait()
        need = sum(leaf.nbytes for leaf in flat.values())
        with _told(self._folder / str(step), need):
            self._manager.save_async(step, flat, force=True, custom_metadata={"cursor": cursor})
        self._last, self._pending = step, (step, cursor, need)

    @property
    def saved(self) -> tuple[int, dict[str, Any]] | None:
        """Step and cursor of the latest checkpoint that is known to be complete, None where there is none."""
        return self._saved

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The same, once the save under way is complete."""
        self.wait()
        return self._saved

    def restore(self, step: int, like: Any) -> Any:
        """The arrays of a checkpoint, bit for bit, each shard read straight to its device.

        Args:
            step: of an existing checkpoint.
            like: pytree of jax.ShapeDtypeStruct with shardings (of any mesh), in the shapes and dtypes that were saved.

        Raises:
            ValueError: there is no such checkpoint, or `like` differs from it; names the leaf.
        """
        self.wait()
        steps = [found.step for found in self._manager.checkpoints]
        if step not in steps:
            raise ValueError(f"{self._folder} holds no checkpoint {step}, expected one of {steps}.")
        wanted = _abstract(like)
        stored = self._manager.metadata(step).metadata
        _compare(stored, wanted, str(self._folder / str(step)), dtypes=True)
        return _unflatten(like, self._manager.load(step, wanted))

    def wait(self) -> None:
        """Returns when the last save is complete; raises DiskError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            step, cursor, need = pending
            with _told(self._folder / str(step), need):
                self._manager.wait()
            self._saved = (step, cursor)

    def close(self) -> None:
        """Waits, and lets go of threads and files."""
        try:
            self.wait()
        finally:
            # Behind the last save nothing of ours is left to write; on a full disk orbax still fails over its notes.
            with contextlib.suppress(OSError):
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def save_iterate(folder: str | os.PathLike[str], name: str, params: Any) -> None:
    """Writes an iterate to `<folder>/<name>/`, in the dtype it has; returns when it is complete.

    An older one of that name (of a run that was resumed before it) is removed first. Nothing else ever removes one.

    Args:
        folder: of the iterates.
        name: of the iterate, a file name without a dot: "3", "ema-3".
        params: pytree of jax.Array, any shardings.

    Raises:
        DiskError: it could not be written; a part of it stays under another name until the next save of this iterate.
    """
    _quiet()
    place = pathlib.Path(folder).absolute() / name
    flat = _flatten(params, (jax.Array,), "parameters to save")
    processes.once(lambda: _clear(place))
    with _told(place, sum(leaf.nbytes for leaf in flat.values())):
        ocp.save(place, flat)


def _clear(place: pathlib.Path) -> None:
    """Removes an iterate and what killed saves of it left."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():  # renamed first: a kill during the removal must not leave a part under the real name
        removed = place.with_name(f"{place.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        place.rename(removed)
    for leftover in place.parent.glob(f"{place.name}.*"):
        shutil.rmtree(leftover)


def load_iterate(folder: str | os.PathLike[str], name: str, like: Any) -> Any:
    """An iterate, each shard read straight to its device and cast to the dtype asked for.

    Args:
        folder: of the iterates.
        name: of the iterate.
        like: pytree of jax.ShapeDtypeStruct with shardings (of any mesh); float32 gets bfloat16 values exactly.

    Raises:
        ValueError: there is no such iterate, or its leaves or shapes are not those of `like`; names the leaf.
    """
    _quiet()
    place = pathlib.Path(folder).absolute() / name
    if name not in iterates(folder):
        raise ValueError(f"{folder} holds no iterate {name!r}, expected one of {iterates(folder)}.")
    wanted = _abstract(like)
    _compare(ocp.metadata(place).metadata, wanted, str(place), dtypes=False)
    return _unflatten(like, ocp.load(place, wanted))


def iterates(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the iterates that are complete, sorted."""
    folder = pathlib.Path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(place.name for place in found if "." not in place.name and ocp.is_orbax_checkpoint(place))


def _flatten(tree: Any, kinds: tuple[type, ...], what: str) -> dict[str, Any]:
    """{path: leaf}; None is no leaf."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = _name(path)
        if not isinstance(leaf, kinds) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{what}: leaf {name!r} is a {type(leaf).__name__}, expected a jax.{kinds[0].__name__.split('.')[-1]}. "
                "Plain values belong in the cursor, the data of a PRNG key is jax.random.key_data(key)."
            )
        if name in flat:
            raise ValueError(f"{what}: two leaves are called {name!r}, expected different paths. Rename a key.")
        flat[name] = leaf
    if not flat:
        raise ValueError(f"{what}: the tree has no leaves, expected at least one array.")
    return flat


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _abstract(like: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape, dtype and sharding}."""
    flat = _flatten(like, (jax.ShapeDtypeStruct, jax.Array), "arrays to restore")
    for name, leaf in flat.items():
        if leaf.sharding is None:
            raise ValueError(f"arrays to restore: leaf {name!r} has no sharding, expected one in its ShapeDtypeStruct.")
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in flat.items()}


def _unflatten(like: Any, flat: Mapping[str, jax.Array]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[_name(path)], like)


def _compare(
    stored: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], where: str, *, dtypes: bool
) -> None:
    """Raises ValueError for the first leaf that differs; dtypes only where they count."""
    advice = (
        "The checkpoint is of another model, optimiser or configuration: resume with the configuration it was written "
        "with (config.yaml of the run folder), or start a new run."
    )

    def shown(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    for name in sorted({*stored, *wanted}):
        if name not in wanted:
            raise ValueError(f"{where} holds {name!r} ({shown(stored[name])}), expected no such leaf. {advice}")
        if name not in stored:
            raise ValueError(f"{where} lacks {name!r}, expected {shown(wanted[name])}. {advice}")
        got, expected = stored[name], wanted[name]
        if tuple(got.shape) != tuple(expected.shape) or (dtypes and np.dtype(got.dtype) != np.dtype(expected.dtype)):
            raise ValueError(f"{where}: {name!r} is {shown(got)}, expected {shown(expected)}. {advice}")


@contextlib.contextmanager
def _told(place: pathlib.Path, need: int) -> Iterator[None]:
    """A save that failed, whatever orbax and its store raise for it, as a DiskError."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        lines = str(error).splitlines() or [type(error).__name__]
        raise disk.refusal(place, os.strerror(number) if number else lines[0], need) from error


@functools.cache
def _quiet() -> None:
    """Keeps orbax's own log lines out of a program's log; nobody else's. Hundreds for each save are below ERROR, and
    those that show an exception are about one that is raised to us."""
    logging.getLogger("absl").addFilter(_no_orbax_chatter)


def _no_orbax_chatter(record: logging.LogRecord) -> bool:
    ours = f"{os.sep}orbax{os.sep}" not in record.pathname
    return ours or (record.levelno >= logging.ERROR and not record.exc_info)
