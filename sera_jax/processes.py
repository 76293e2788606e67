"""One run on several processes: how they find each other, who acts for all, and that all know the same.

Every process walks the same code with the same values: each reads the data, and all take part in every jitted program.
What touches the world outside (files, the ledger, reward functions) is done by process 0 alone, through `once`, which
tells the others what came of it, a failure included. What each process finds out by itself goes through `agreed`. With
one process both are plain calls.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

COORDINATOR, PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

_LEAVE_SECONDS = 60  # how long a process that ends waits for the others to end
_MESSAGE = 4096  # bytes of an error that the others hear
_LEAST = 1 << 10  # bytes of a broadcast; sizes are powers of two, so that few programs are compiled


def join(distributed: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Makes this process one of several that are one run; to be called before anything asks for devices.

    Where the environment says who coordinates (host:port of process 0), how many processes there are and which of them
    this is (COORDINATOR, PROCESSES, PROCESS_ID), that counts. Else the cluster is asked, in JAX's way: TPU pods, GKE,
    Slurm and MPI know all three.

    Args:
        distributed: False = this process is the whole run, nothing is done.

    Raises:
        ValueError: only some of the three are given, or none and there is no such cluster; or they are no numbers that
            fit together.
    """
    if not distributed:
        return
    names = (COORDINATOR, PROCESSES, PROCESS_ID)
    given = {name: environment[name] for name in names if environment.get(name)}
    explicit: dict[str, Any] = {}
    # JAX's own variable for the coordinator may stand alone beside what a cluster knows of the rest.
    if PROCESSES in given or PROCESS_ID in given:
        explicit = _explicit(given)
    try:
        jax.distributed.initialize(**explicit, shutdown_timeout_seconds=_LEAVE_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"mesh.distributed is true, but this process cannot join others ({' '.join(str(error).split())}). Expected "
            f"a TPU pod, GKE, Slurm or MPI, or {', '.join(names)} in the environment of each process."
        ) from error


def _explicit(given: Mapping[str, str]) -> dict[str, Any]:
    """Keywords of jax.distributed.initialize."""
    numbers = [given.get(name, "") for name in (PROCESSES, PROCESS_ID)]
    fits = all(n.isdigit() for n in numbers) and int(numbers[1]) < int(numbers[0])
    if COORDINATOR not in given or not fits:
        told = ", ".join(f"{name}={given.get(name, '')!r}" for name in (COORDINATOR, PROCESSES, PROCESS_ID))
        raise ValueError(
            f"mesh.distributed: the environment has {told}; expected host:port of process 0, the number of processes, "
            "and this one's number from 0. Set all three, or none on a cluster that knows them."
        )
    return {
        "coordinator_address": given[COORDINATOR],
        "num_processes": int(numbers[0]),
        "process_id": int(numbers[1]),
    }


def leads() -> bool:
    """Is this the process that acts for all?"""
    return jax.process_index() == 0


def once(work: Callable[[], T]) -> T:
    """`work` is done by process 0 alone; every process returns what it gave. All of them have to come here.

    Args:
        work: gives what JSON can hold, NumPy arrays and scalars in it as well. The others get equal values, with lists
            in the place of tuples. It takes part in no jitted program of the mesh.

    Raises:
        ValueError: process 0 raised one; elsewhere with the same message.
        RuntimeError: elsewhere than on process 0, which raised something else.
    """
    if jax.process_count() == 1:
        return work()
    if not leads():
        heard = _decoded(_broadcast(None))
        if "error" in heard:
            raise (ValueError if heard["user's"] else RuntimeError)(heard["error"])
        return heard["value"]
    try:
        value = work()
        told = _encoded({"value": value})
    except Exception as error:
        _broadcast(_encoded({"error": _said(error, 0), "user's": isinstance(error, ValueError)}))
        raise
    _broadcast(told)
    return value


def held(work: Callable[[], T]) -> T | None:
    """As `once`, of what cannot be told, such as an open file or a function: None elsewhere than on process 0."""
    got: list[T] = []
    once(lambda: got.append(work()))
    return got[0] if got else None


def agreed(work: Callable[[], T], content: Callable[[T], str], what: str) -> T:
    """`work` is done by every process, and all of them must come to the same.

    Args:
        work: local to a process: it takes part in no jitted program of the mesh. content: of what it gave, the text
            that has to be the same. what: it is, for the error.

    Raises:
        ValueError: `work` raised one on some process (the others with its message), or the contents differ.
        RuntimeError: `work` raised something else on another process.
    """
    if jax.process_count() == 1:
        return work()
    failed: Exception | None = None
    try:
        value = work()
        said = b"\0" + hashlib.blake2b(content(value).encode(), digest_size=16).digest()
    except Exception as error:  # told to the others first
        kind = b"\1" if isinstance(error, ValueError) else b"\2"
        failed, said = error, kind + _said(error, jax.process_index()).encode()
    buffer = np.zeros(_MESSAGE, np.uint8)
    buffer[: len(said[:_MESSAGE])] = np.frombuffer(said[:_MESSAGE], np.uint8)
    heard = [bytes(row) for row in multihost_utils.process_allgather(buffer)]
    if failed is not None:
        raise failed
    for row in heard:
        if row[0]:
            raise (ValueError if row[0] == 1 else RuntimeError)(row[1:].rstrip(b"\0").decode(errors="replace"))
    strange = [str(i) for i, row in enumerate(heard) if row != heard[0]]
    if strange:
        raise ValueError(
            f"{what} of process 0 and of {', '.join(strange)} differ, expected the same on all {len(heard)} processes: "
            "give each the same command, files and packages."
        )
    return value


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _said(error: Exception, process: int) -> str:
    """What the others hear of an error: a ValueError's message is complete, of others the type is part of it."""
    return str(error) if isinstance(error, ValueError) else f"process {process}: {type(error).__name__}: {error}"


def _broadcast(payload: bytes | None) -> bytes:
    """Process 0's bytes, on every process; None on the others."""
    size = multihost_utils.broadcast_one_to_all(np.int32(len(payload or b"")))
    buffer = np.zeros(max(_LEAST, 1 << (int(size) - 1).bit_length()), np.uint8)
    if payload is not None:
        buffer[: len(payload)] = np.frombuffer(payload, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer))[: int(size)].tobytes()


_ARRAY = "an array: dtype, shape, bytes"


def _encoded(value: Any) -> bytes:
    def plain(array: Any) -> dict[str, Any]:
        if not isinstance(array, (np.ndarray, np.generic)) or array.dtype.hasobject:
            raise TypeError(f"once: got a {type(array).__name__}, expected what JSON can hold, or NumPy arrays.")
        body = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
        return {_ARRAY: [array.dtype.str, array.shape, body]}

    return json.dumps(value, default=plain).encode()


def _decoded(payload: bytes) -> Any:
    def rich(value: dict[str, Any]) -> Any:
        if _ARRAY not in value:
            return value
        dtype, shape, body = value[_ARRAY]
        array = np.frombuffer(base64.b64decode(body), dtype).reshape(shape).copy()
        return array if shape else array[()]

    return json.loads(payload, object_hook=rich)
