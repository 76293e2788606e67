"""From a config and the name of a topology to a verdict."""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from sera_jax import config as configs
from sera_jax import metrics, programs
from sera_jax.compile_check import cases, chips, memory
from sera_jax.compile_check.cases import Case, Setting
from sera_jax.compile_check.chips import Slice
from sera_jax.compile_check.memory import Compiled, Memory, TooLarge
from sera_jax.config import ConfigError, TrainConfig

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class CompileCheckConfig:
    """`python -m sera_jax.compile_check`: does a config of `sera_jax.train` fit on a TPU slice?

    Of model.path only config.json is read, of the data nothing: rows are planned for the longest trees that the config
    lets through.

    Args:
        topology: of a slice, as libtpu names it: v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:4x4.
        slices: how many of it; mesh.data spans them.
        json: file for all figures; empty = print only.
        pairs: given pairs that the selection ranks.
        only: names of the programs to compile, as they are printed; empty = all that the config runs.
    """

    topology: str
    slices: int = 1
    json: str = ""
    pairs: int = 61_000
    only: tuple[str, ...] = ()


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


def main(args: list[str] | None = None) -> None:
    """The door: exits with 0 if everything fits, with 1 if something does not, with 2 on errors."""
    args = sys.argv[1:] if args is None else list(args)
    try:
        # Neither data nor a run folder is touched; what the config says of them has to be no error.
        unread = ["--data.pairs=[unread]", "--run.dir=unread"]
        config, own = configs.parse_beside(TrainConfig, CompileCheckConfig, [*args, *unread])
        fits = check(config, own)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if all(fit.fits for fit in fits) else 1)


def check(config: TrainConfig, own: CompileCheckConfig) -> list[Fit]:
    """Compiles, prints and writes.

    Raises:
        ValueError: of config, config.json, topology or mesh.
    """
    chips.quiet()
    if own.slices < 1 or own.pairs < 1:
        raise ConfigError(f"slices is {own.slices} and pairs is {own.pairs}, expected at least 1 each.")
    arch = cases.arch_of(config)
    where = chips.find(own.topology, own.slices)
    mesh = chips.make_mesh(where, config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    setting = Setting(config, arch, mesh, own.pairs)
    describe(setting, where)
    with programs.precision(config.model.compute):
        fits = [fitted(setting, name, where) for name in chosen(setting, own)]
    show(fits, where)
    if own.json:
        told = report(fits, setting, where)
        pathlib.Path(own.json).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return fits


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


def fitted(setting: Setting, name: str, where: Slice) -> Fit:
    """Compiles one program and says how it fits."""
    case = cases.CASES[name](setting)
    began = time.monotonic()
    done = memory.compile_traced(case.trace())
    metrics.say(f"  {name}: {case.what}; compiled in {time.monotonic() - began:.0f} s")
    beside = sum(case.beside.values())
    if isinstance(done, Compiled):
        return Fit(case, done, done.memory.total + beside, where.available, parts(case, done.memory))
    metrics.say(f"  {name}: too large; what holds the memory is told by compiles of 1 and 2 layers")
    return Fit(case, done, done.needed + beside, where.available, extrapolated(setting, name))


def parts(case: Case, used: Memory) -> dict[str, int]:
    """Bytes a chip by what they are; they add up to all that is used. Arguments that the program does not read are not
    kept for it."""
    made = {**case.holds, "unread or padding": used.arguments - sum(case.holds.values())}
    made |= {"gradients": case.gradients, "activations": used.temporaries - case.gradients}
    made |= {"outputs": used.outputs - used.aliased, "code": used.code}
    return {kind: size for kind, size in made.items() if size} | case.beside


def extrapolated(setting: Setting, name: str) -> dict[str, int]:
    """`parts` of a program that does not fit, from those of its first two layers; nothing where these do not fit."""
    few = []
    for layers in (1, 2):
        case = cases.CASES[name](cases.shallow(setting, layers))
        done = memory.compile_traced(case.trace())
        if isinstance(done, TooLarge):
            return {}
        few.append(parts(case, done.memory))
    more = setting.arch.layers - 1
    return {kind: few[0].get(kind, 0) + more * (few[1].get(kind, 0) - few[0].get(kind, 0)) for kind in few[0] | few[1]}


COLUMNS = ("weights", "optimiser", "gradients", "activations", "cache", "outputs")


def show(fits: list[Fit], where: Slice) -> None:
    """The table, and the verdict."""
    rows = []
    for fit in fits:
        told = dict(fit.breakdown)
        own = [told.pop(kind, 0) for kind in COLUMNS]
        beside = sum(told.pop(kind) for kind in fit.case.beside if kind in told)
        figures = [*own, sum(told.values()), beside, fit.used]
        aliased, peak = (fit.done.memory.aliased, fit.done.memory.peak) if isinstance(fit.done, Compiled) else (0, 0)
        cells = [f"{size / GIB:.2f}" if size else "" for size in (*figures, aliased, peak)]
        rows.append([fit.case.name, *cells, f"{100 * fit.spare:.0f} %", "fits" if fit.fits else "DOES NOT FIT"])
    columns = ("program", *COLUMNS, "other", "alive beside", "needed", "donated", "peak", "spare", "")
    metrics.table(f"GiB a chip, of {where.available / GIB:.2f}", columns, rows)
    if any(fit.breakdown and isinstance(fit.done, TooLarge) for fit in fits):
        metrics.say("parts of what does not fit: extrapolated from compiles of 1 and 2 layers, not the compiler's own")
    metrics.say(verdict(fits))


def verdict(fits: list[Fit]) -> str:
    """FITS or DOES NOT FIT, by how much, and which program decides."""
    tightest = min(fits, key=lambda fit: fit.spare)
    used = f"{tightest.case.name} needs {tightest.used / GIB:.2f} of {tightest.available / GIB:.2f} GiB a chip"
    if tightest.fits:
        return f"FITS: {used}, {100 * tightest.spare:.0f} % to spare"
    failed = [fit.case.name for fit in fits if not fit.fits]
    return f"DOES NOT FIT: {used}, {-100 * tightest.spare:.0f} % too much ({', '.join(failed)})"


def report(fits: list[Fit], setting: Setting, where: Slice) -> dict[str, Any]:
    """All figures, for JSON; bytes a chip."""
    told: dict[str, Any] = {
        "topology": where.name,
        "slices": where.slices,
        "chips": len(where.devices),
        "available": where.available,
        "mesh": dict(setting.mesh.shape),
        "parameters": cases.parameters(setting.arch),
        "fits": all(fit.fits for fit in fits),
        "verdict": verdict(fits),
        "programs": {},
    }
    for fit in fits:
        one = {"what": fit.case.what, "fits": fit.fits, "needed": fit.used, "spare": fit.spare, "parts": fit.breakdown}
        if isinstance(fit.done, Compiled):
            one |= {"memory": dataclasses.asdict(fit.done.memory), "seconds": fit.done.seconds}
        else:
            one |= {"refused": fit.done.told}
        told["programs"][fit.case.name] = one
    return told
