"""From a config and the name of a topology to a verdict."""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any, Literal

import jax

from sera_jax import config as configs
from sera_jax import mesh as meshes
from sera_jax import metrics, programs
from sera_jax.compile_check import advice, bounds, cases, chips, hlo, memory
from sera_jax.compile_check.advice import Change
from sera_jax.compile_check.bounds import Bound
from sera_jax.compile_check.cases import Case, Setting
from sera_jax.compile_check.chips import Slice
from sera_jax.compile_check.memory import Compiled, Memory, TooLarge
from sera_jax.config import ConfigError, RewardModelConfig, TrainConfig

GIB = 2**30

OTHERS = {"reward_model": RewardModelConfig}
"""By the first word of the command, whose configs they are; without one those of `sera_jax.train`."""


@dataclasses.dataclass(frozen=True)
class CompileCheckConfig:
    """`python -m sera_jax.compile_check`: does a config of `sera_jax.train`, or behind the word reward_model one of
    `sera_jax.reward_model`, fit on a TPU slice?

    Of model.path only config.json is read, of the data nothing: rows are planned for the longest trees that the config
    lets through.

    Args:
        topology: of a slice, as libtpu names it: v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:4x4.
        slices: how many of it; 0 = mesh.slices.
        json: file for all figures; empty = print only.
        pairs: given pairs that the selection ranks.
        only: names of the programs to compile, as they are printed; empty = all that the config runs.
        traffic: where the bytes of the bound come from: unrolled = compiles of 1 and 2 layers written out one by one,
            extrapolated and checked at 3; loops = the program itself, as often as its loops turn; none = no bound.
        search: where something does not fit, look for the nearest change that does.
    """

    topology: str
    slices: int = 0
    json: str = ""
    pairs: int = 61_000
    only: tuple[str, ...] = ()
    traffic: Literal["unrolled", "loops", "none"] = "unrolled"
    search: bool = True


@dataclasses.dataclass(frozen=True)
class Fit:
    """How one program fits. done: the compiler's answer. used: bytes a chip, with what is alive beside it, of the
    `available` ones. breakdown: them by what they are; of a program that is too large extrapolated, or empty."""

    case: Case
    done: Compiled | TooLarge
    used: int
    available: int
    breakdown: dict[str, int]

    @property
    def fits(self) -> bool:
        return isinstance(self.done, Compiled) and self.used <= self.available

    @property
    def spare(self) -> float:
        """Share of the available memory that is left; below 0 where there is none."""
        return 1 - self.used / self.available


@dataclasses.dataclass(frozen=True)
class Found:
    """What a check found, by program. nearest: of those that do not fit, the changes that help, None = none does."""

    setting: Setting
    where: Slice
    fits: dict[str, Fit]
    bounds: dict[str, Bound]
    nearest: dict[str, list[Change] | None]

    @property
    def fit(self) -> bool:
        return all(fit.fits for fit in self.fits.values())


def main(args: list[str] | None = None) -> None:
    """The door: exits with 0 if everything fits, with 1 if something does not, with 2 on errors."""
    args = sys.argv[1:] if args is None else list(args)
    try:
        # Neither data nor a run folder is touched; what the config says of them has to be no error.
        unread = ["--data.pairs=[unread]", "--run.dir=unread"]
        record = OTHERS.get(args[0]) if args else None
        keys = args[1:] if record else args
        config, own = configs.parse_beside(record or TrainConfig, CompileCheckConfig, [*keys, *unread])
        found = check(config, own)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if found.fit else 1)


def check(config: TrainConfig | RewardModelConfig, own: CompileCheckConfig) -> Found:
    """Compiles, prints and writes.

    Raises:
        ValueError: of config, config.json, topology or mesh.
    """
    chips.quiet()
    for key, least in (("slices", 0), ("pairs", 1)):
        if getattr(own, key) < least:
            raise ConfigError(f"{key} is {getattr(own, key)}, expected at least {least}.")
    arch = cases.arch_of(config)
    if own.slices:
        config = advice.changed(config, [("mesh.slices", own.slices)])
    where = chips.find(own.topology, config.mesh.slices)
    setting = Setting(config, arch, mesh_of(config, where), own.pairs)
    asked = chosen(setting, own)
    describe(setting, where)
    with programs.precision(config.model.compute):
        fits, rates, nearest = {}, {}, {}
        for name in asked:
            fits[name] = fitted(setting, name, where, text=_from_itself(name, own.traffic))
            if own.traffic != "none" and isinstance(fits[name].done, Compiled):
                rates[name] = bounded(setting, name, fits[name], where, own.traffic)
            if own.search and not fits[name].fits:
                nearest[name] = remedy(setting, name, where)
    found = Found(setting, where, fits, rates, nearest)
    show(found)
    if own.json:
        pathlib.Path(own.json).write_text(json.dumps(report(found), indent=1) + "\n", encoding="utf-8")
    return found


def mesh_of(config: TrainConfig | RewardModelConfig, where: Slice) -> jax.sharding.Mesh:
    """The mesh that a run would make on these devices.

    Raises:
        ValueError: the axes do not multiply to their number, or cannot be laid on their wires.
    """
    of = config.mesh
    try:
        return meshes.make(of.data, of.fsdp, of.tensor, where.devices, slices=of.slices)
    except NotImplementedError as error:
        raise ValueError(
            f"mesh data {of.data}, fsdp {of.fsdp}, tensor {of.tensor} cannot be laid on the wires of {where.name}: "
            f"{str(error).splitlines()[0]} Choose sizes that are products of the topology's own."
        ) from None


def chosen(setting: Setting, own: CompileCheckConfig) -> list[str]:
    """Names of the programs to compile.

    Raises:
        ConfigError: `only` names one that the config does not run.
    """
    names = cases.names(setting.config)
    strange = [name for name in own.only if name not in names]
    if strange:
        raise ConfigError(f"only names {strange[0]!r}, expected programs that this config runs: {', '.join(names)}.")
    return [name for name in names if name in own.only or not own.only]


def describe(setting: Setting, where: Slice) -> None:
    """What is compiled, for what."""
    arch, axes = setting.arch, "×".join(f"{axis} {n}" for axis, n in setting.mesh.shape.items())
    metrics.say(
        f"{arch.family}, {cases.parameters(arch) / 1e6:.2f} M parameters, compute {setting.config.model.compute}, "
        f"remat {setting.config.model.remat}, for {where.slices} × {where.name} ({len(where.devices)} chips), "
        f"mesh {axes}; {where.available / GIB:.2f} GiB a chip are to be had, of {where.chip.hbm / 1e9:.0f} GB"
    )


# --- one program ------------------------------------------------------------------------------------------------------


def _from_itself(name: str, traffic: str) -> bool:
    """Are a program's bytes read off itself?"""
    return traffic == "loops" or (traffic == "unrolled" and name not in cases.LAYERED)


def fitted(setting: Setting, name: str, where: Slice, *, told: bool = True, text: bool = False) -> Fit:
    """Compiles one program and says how it fits.

    Args:
        told: print it, and break down what does not fit. text: as memory.compile_traced.
    """
    began = time.monotonic()
    case = cases.CASES[name](setting)
    done = memory.compile_traced(case.trace(), text=text)
    if told:
        metrics.say(f"  {name}: {case.what}; {time.monotonic() - began:.0f} s")
    beside = sum(case.beside.values())
    if isinstance(done, Compiled):
        return Fit(case, done, done.memory.total + beside, where.available, parts(case, done.memory))
    return Fit(case, done, done.needed + beside, where.available, extrapolated(setting, name) if told else {})


def parts(case: Case, used: Memory) -> dict[str, int]:
    """Bytes a chip by what they are; they add up to all that is used.

    Gradients are one float32 copy of them; what else the compiler holds for a while is activations. Arguments that the
    program does not read are not kept for it.
    """
    made = {**case.holds, "padding": used.arguments - sum(case.holds.values())}
    made |= {"gradients": case.gradients, "activations": used.temporaries - case.gradients}
    made |= {"outputs": used.outputs - used.aliased, "code": used.code}
    return {kind: size for kind, size in made.items() if size} | case.beside


def extrapolated(setting: Setting, name: str) -> dict[str, int]:
    """`parts` of a program that does not fit, from those of its first two layers; nothing where these do not fit, or it
    has none."""
    if name in cases.UNLAYERED:
        return {}
    metrics.say(f"  {name}: too large; what holds the memory is told by compiles of 1 and 2 layers")
    few = []
    for layers in (1, 2):
        case = cases.CASES[name](cases.shallow(setting, layers))
        done = memory.compile_traced(case.trace())
        if isinstance(done, TooLarge):
            return {}
        few.append(parts(case, done.memory))
    more = setting.arch.layers - 1
    return {kind: few[0].get(kind, 0) + more * (few[1].get(kind, 0) - few[0].get(kind, 0)) for kind in few[0] | few[1]}


def bounded(setting: Setting, name: str, fit: Fit, where: Slice, traffic: str) -> Bound:
    """The bound of a program that compiled."""
    case, began = fit.case, time.monotonic()

    def read(layers: int) -> hlo.Moved:
        few = cases.CASES[name](cases.shallow(setting, layers, unrolled=True))
        done = memory.compile_traced(few.trace(), text=True)
        if isinstance(done, TooLarge):
            raise ValueError(
                f"{name} with {layers} layers written out needs {done.needed / GIB:.2f} GiB a chip, although all fit "
                "in a loop; use --traffic loops."
            )
        return hlo.moved(done.text, few.trips)

    if not _from_itself(name, traffic):
        moved, deviation = bounds.extrapolated(read, setting.arch.layers)
        seconds = time.monotonic() - began
        metrics.say(f"  {name}: bytes of 1 and 2 layers, {100 * deviation:.1f} % off at 3; {seconds:.0f} s")
    else:
        moved, deviation = hlo.moved(fit.done.text, case.trips), None
    return bounds.bound(case.trace().jaxpr, case.trips, case.useful, moved, deviation, len(where.devices), where.chip)


def remedy(setting: Setting, name: str, where: Slice) -> list[Change] | None:
    """The nearest changes with which a program fits, each tried by compiling it; None if none was found."""

    def fits(changes: list[Change]) -> bool:
        config = advice.changed(setting.config, changes)
        began = time.monotonic()
        try:
            mesh = mesh_of(config, where)
        except ValueError:
            return False
        fit = fitted(dataclasses.replace(setting, config=config, mesh=mesh), name, where, told=False)
        metrics.say(
            f"  {name} with {advice.flags(changes)}: {fit.used / GIB:.2f} GiB, "
            f"{'fits' if fit.fits else 'does not fit'}; {time.monotonic() - began:.0f} s"
        )
        return fit.fits

    return advice.nearest(setting, name, fits)


# --- what is told -----------------------------------------------------------------------------------------------------


COLUMNS = ("weights", "optimiser", "gradients", "activations", "cache", "outputs")


def show(found: Found) -> None:
    """The tables, and the verdict."""
    rows = []
    for name, fit in found.fits.items():
        left = dict(fit.breakdown)
        own = [left.pop(kind, 0) for kind in COLUMNS]
        beside = sum(left.pop(kind, 0) for kind in fit.case.beside)
        aliased, peak = (fit.done.memory.aliased, fit.done.memory.peak) if isinstance(fit.done, Compiled) else (0, 0)
        cells = [_gib(size) for size in (*own, sum(left.values()), beside, fit.used, aliased, peak)]
        rows.append([name, *cells, f"{100 * fit.spare:.0f} %", "fits" if fit.fits else "DOES NOT FIT"])
    columns = ("program", *COLUMNS, "other", "alive beside", "needed", "donated", "peak", "spare", "")
    metrics.table(f"GiB a chip, of {found.where.available / GIB:.2f}", columns, rows)
    if any(fit.breakdown and isinstance(fit.done, TooLarge) for fit in found.fits.values()):
        metrics.say("parts of what does not fit: extrapolated from compiles of 1 and 2 layers, not the compiler's own")
    if found.bounds:
        metrics.table(
            "a call takes at least (a bound from the chip's peaks, not a forecast)",
            ("program", "hardware PFLOP", "model PFLOP", "HBM GiB", "from chips GiB", "to slices GiB", "compute s",
             "HBM s", "links s", "slices s", "bound s", "it waits for", "model FLOPs at best"),
            [_bound_row(name, bound, found) for name, bound in found.bounds.items()],
        )  # fmt: skip
    for line in verdict(found):
        metrics.say(line)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if abs(size) >= GIB / 200 else ""


def _bound_row(name: str, bound: Bound, found: Found) -> list[Any]:
    peak = bound.useful / (bound.step * len(found.where.devices) * found.where.chip.flops)
    moved = (_gib(size) for size in (bound.moved.hbm, bound.moved.taken_in, bound.moved.network))
    seconds = [f"{bound.seconds[kind]:.3g}" for kind in ("compute", "hbm", "links", "network")]
    share = f"{100 * peak:.0f} %" if bound.useful else ""
    done = [f"{f / 1e15:.3g}" if f else "" for f in (bound.flops.done, bound.useful)]
    return [name, *done, *moved, *seconds, f"{bound.step:.3g}", bound.binds, share]


def verdict(found: Found) -> list[str]:
    """FITS or DOES NOT FIT, by how much, which program decides, and what would help."""
    tightest = min(found.fits, key=lambda name: found.fits[name].spare)
    fit = found.fits[tightest]
    used = f"{tightest} needs {fit.used / GIB:.2f} of {fit.available / GIB:.2f} GiB a chip"
    if found.fit:
        return [f"FITS: {used}, {100 * fit.spare:.0f} % to spare"]
    failed = ", ".join(name for name, fit in found.fits.items() if not fit.fits)
    lines = [f"DOES NOT FIT: {used}, {-100 * fit.spare:.0f} % too much (too large: {failed})"]
    for name, changes in found.nearest.items():
        lines.append(
            f"nearest change with which {name} fits: {advice.flags(changes)}"
            if changes
            else f"no change of rows, recomputation, mesh, moments or slots was found with which {name} fits: "
            "take more chips, or larger ones"
        )
    return lines


def report(found: Found) -> dict[str, Any]:
    """All figures, for JSON; bytes a chip, seconds, FLOPs of all chips."""
    setting, where = found.setting, found.where
    told: dict[str, Any] = {
        "topology": where.name,
        "slices": where.slices,
        "chips": len(where.devices),
        "hbm": where.chip.hbm,
        "available": where.available,
        "mesh": dict(setting.mesh.shape),
        "parameters": cases.parameters(setting.arch),
        "fits": found.fit,
        "verdict": verdict(found),
        "programs": {},
    }
    for name, fit in found.fits.items():
        one = {"what": fit.case.what, "fits": fit.fits, "needed": fit.used, "spare": fit.spare, "parts": fit.breakdown}
        if isinstance(fit.done, Compiled):
            one |= {"memory": dataclasses.asdict(fit.done.memory), "seconds": fit.done.seconds}
        else:
            one |= {"refused": fit.done.told}
        if name in found.bounds:
            bound = found.bounds[name]
            one["bound"] = {**dataclasses.asdict(bound), "step": bound.step, "binds": bound.binds}
        if name in found.nearest:
            changes = found.nearest[name]
            one["nearest"] = None if changes is None else dict(changes)
        told["programs"][name] = one
    return told
