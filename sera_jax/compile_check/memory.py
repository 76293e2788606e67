"""What a compiled program holds of a chip's memory, and what the compiler says of one that is too large."""

import dataclasses
import math
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"\(?([\d.]+)\s*([KMGT]?)i?B?\)?"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a chip: arguments; outputs, of which `aliased` lie where donated arguments lay; temporaries; code.

    peak: the most that is alive at once, as the compiler tells it.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int

    @property
    def total(self) -> int:
        """What has to be free for the program to run: temporaries are reserved whole."""
        return max(self.arguments + self.outputs - self.aliased + self.temporaries + self.code, self.peak)


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that the compiler refused: bytes that it needs and that a chip has, and the compiler's own words."""

    needed: int
    available: int
    told: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that compiled. text: its HLO, "" unless asked for. seconds: that it took."""

    executable: Any
    memory: Memory
    text: str
    seconds: float


def compile_traced(traced: Any, *, text: bool = False) -> Compiled | TooLarge:
    """Compiles a traced program (`jax.jit(f).trace(...)`) for the devices of its arguments' shardings.

    Args:
        text: also give its HLO. It is what the compiler writes to a folder: JAX's own `as_text` cannot read everything
            that stands in programs for v5p and v6e.

    Raises:
        JaxRuntimeError: the compiler failed for another reason than the size of the program.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if text else {}
        try:
            executable = traced.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            refused = read_refusal(str(error))
            if refused is None:
                raise
            return refused
        seconds = time.monotonic() - began
        return Compiled(executable, of(executable), _written(folder, executable) if text else "", seconds)


def _written(folder: str, executable: Any) -> str:
    found = sorted(pathlib.Path(folder).glob("*after_optimizations.txt"))
    return found[0].read_text(encoding="utf-8") if found else executable.as_text()


def of(executable: Any) -> Memory:
    """The compiler's own account."""
    told = executable.memory_analysis()
    made = {
        "arguments": told.argument_size_in_bytes,
        "outputs": told.output_size_in_bytes,
        "aliased": told.alias_size_in_bytes,
        "temporaries": told.temp_size_in_bytes,
        "code": told.generated_code_size_in_bytes,
    }
    # The compiler's peak counts what lies in the host's memory, too.
    elsewhere = told.host_argument_size_in_bytes + told.host_temp_size_in_bytes
    return Memory(**made, peak=max(0, getattr(told, "peak_memory_in_bytes", 0) - elsewhere))


def read_refusal(message: str) -> TooLarge | None:
    """What a RESOURCE_EXHAUSTED message of the compiler says; None if it is none about HBM.

    The figures stand in it as "the total memory required for … (23.30G) exceeds available HBM (15.75G)" or as "Used
    23.30G of 15.75G hbm".
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for form in (
        rf"total memory required[^()]*{_SIZE}\s*exceeds available HBM\s*{_SIZE}",
        rf"Used {_SIZE} of {_SIZE} hbm",
    ):
        found = re.search(form, message, re.IGNORECASE)
        if found:
            needed, available = (round(float(found[i]) * _UNITS[found[i + 1].upper()]) for i in (1, 3))
            return TooLarge(needed, available, message)
    return None


def held(tree: Any) -> int:
    """Bytes a chip of a tree of arrays, or of ShapeDtypeStructs with shardings. Keys of the random generator count as
    nothing, what lies in the host's memory as nothing."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key) and a.sharding.memory_kind in (None, "device")
    )
