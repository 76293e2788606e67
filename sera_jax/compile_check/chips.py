"""TPU generations: what a chip has and can do at most, and slices of them by name, without one at hand."""

import dataclasses
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sera_jax.compile_check import memory


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip.

    hbm: bytes. flops: bfloat16 FLOP/s. hbm_rate: bytes/s. ici_rate: bytes/s that a chip takes in over all its links
    (half of what is published as bidirectional). dcn_rate: bytes/s a chip, of its share of the host's network. example:
    of a topology. options: of libtpu, so that a device is a chip.
    """

    hbm: float
    flops: float
    hbm_rate: float
    ici_rate: float
    dcn_rate: float
    example: str
    options: tuple[tuple[str, str], ...] = ()


CHIPS: dict[str, Chip] = {
    # https://docs.cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s, six links of 50 GB/s each way. The
    # network of its hosts is not published: taken as v5p's.
    "v4": Chip(32e9, 275e12, 1200e9, 300e9, 6.25e9, "v4:2x2x2", (("chip_config_name", "megacore"),)),
    # https://docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, ICI 400 GB/s both ways; 2 × 100 Gbit/s a
    # host of 8 chips.
    "v5e": Chip(16e9, 197e12, 819e9, 200e9, 3.125e9, "v5e:4x4"),
    # https://docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GB, 2765 GB/s, ICI 1200 GB/s both ways, DCN 50 Gbit/s.
    "v5p": Chip(95e9, 459e12, 2765e9, 600e9, 6.25e9, "v5p:2x2x2"),
    # https://docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1638 GB/s, ICI 800 GB/s both ways; 4 × 200 Gbit/s
    # a host of 8 chips.
    "v6e": Chip(32e9, 918e12, 1638e9, 400e9, 12.5e9, "v6e:4x4"),
}
"""By the generation that a topology's name begins with."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips to compile for. name: as given, "v5e:4x4"; slices: how many of it, joined by the data center network.
    available: HBM bytes a chip that the compiler lets a program have."""

    name: str
    slices: int
    chip: Chip
    devices: tuple[jax.Device, ...]
    available: int


def quiet() -> None:
    """Settings that libtpu wants on a machine without a TPU; nothing is asked of a metadata server. Before any
    compilation, and only from a door."""
    jax.config.update("jax_platforms", "cpu")
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # no chip is opened, so several checks may run side by side
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),  # these two say nothing here, but keep libtpu from complaining
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(key, value)


def find(name: str, slices: int = 1) -> Slice:
    """A slice by libtpu's name of its topology: generation:shape.

    Raises:
        ValueError: a generation that is not in CHIPS, a shape that libtpu does not take, or no libtpu.
    """
    generation, _, shape = name.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        examples = ", ".join(chip.example for chip in CHIPS.values())
        raise ValueError(
            f"topology is {name!r}, expected a generation out of {', '.join(CHIPS)} and the chips along each axis: "
            f"{examples}, …"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology {name} needs the package libtpu, which compiles for TPUs on a Linux machine without one: "
            "pip install 'sera_jax[tpu]'."
        )
    chip = CHIPS[generation]
    options = dict(chip.options) | ({"num_slices": slices} if slices > 1 else {})
    if set(shape) <= set("1x"):  # a host of its own for one chip
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology {name!r} is none that libtpu knows: {str(error).splitlines()[0]}. Expected chips along each "
            f"axis as they are sold, {chip.example} for example."
        ) from None
    devices = tuple(found.devices)
    return Slice(name, slices, chip, devices, _available(devices[: len(devices) // slices]))


def _available(devices: tuple[jax.Device, ...]) -> int:
    """HBM bytes that the compiler gives a program: read off its refusal of one that is too large."""
    where = NamedSharding(Mesh(np.array(devices), ("x",)), P())
    large = jax.ShapeDtypeStruct((1 << 40,), jnp.int8, sharding=where)
    refused = memory.compile_traced(jax.jit(lambda x: x + 1).trace(large))
    assert isinstance(refused, memory.TooLarge), "a program of a tebibyte was not refused"
    return refused.available
