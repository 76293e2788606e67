"""How fast a program can be at best: its work against the peaks of the chip. A bound, never a forecast."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sera_jax.compile_check import flops, hlo
from sera_jax.compile_check.chips import Chip
from sera_jax.compile_check.flops import Flops
from sera_jax.compile_check.hlo import Moved


@dataclasses.dataclass(frozen=True)
class Bound:
    """What one call of a program must take.

    flops: of all chips together, padding and recomputation included. useful: model FLOPs at most. moved: bytes of a
    chip. seconds: at the chip's peak, by what it waits for: compute, hbm, links (between the chips of a slice), network
    (between slices). deviation: of the extrapolated bytes from those of a compile at 3 layers, the largest share; None
    = the bytes were read off the program itself.
    """

    flops: Flops
    useful: float
    moved: Moved
    seconds: dict[str, float]
    deviation: float | None

    @property
    def step(self) -> float:
        """Seconds, at least, even if all that is done at once overlaps."""
        return max(self.seconds.values())

    @property
    def binds(self) -> str:
        """What the program waits for."""
        return max(self.seconds, key=self.seconds.get)


def bound(
    jaxpr: Any, trips: int, useful: float, moved: Moved, deviation: float | None, chips: int, chip: Chip
) -> Bound:
    """The bound of a program of so many chips.

    Args:
        jaxpr, trips: as flops.count takes them.
    """
    counted = flops.count(jaxpr, trips)
    seconds = {
        "compute": counted.issued / (chips * chip.flops),
        "hbm": moved.hbm / chip.hbm_rate,
        "links": moved.taken_in / chip.ici_rate,
        "network": moved.network / chip.dcn_rate,
    }
    return Bound(counted, useful, moved, seconds, deviation)


def extrapolated(read: Callable[[int], Moved], layers: int) -> tuple[Moved, float]:
    """Bytes of a program of so many layers from those of 1 and of 2, and by how much those of 3 are off that line.

    Args:
        read: layers → bytes of a program whose layers are written out one by one.
    """
    points = {n: read(n) for n in (1, 2)}
    if layers < 3:
        return read(layers) if layers not in points else points[layers], 0.0
    third, expected = read(3), hlo.line(points, 3)
    off = [
        abs(got - want) / want
        for got, want in (
            (third.hbm, expected.hbm),
            (third.taken_in, expected.taken_in),
            (third.network, expected.network),
        )
        if want
    ]
    return hlo.line(points, layers), max(off, default=0.0)
