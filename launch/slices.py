"""The smallest TPU slice on which each model of configs/paper trains: slices.py OUT.jsonl [--part I/N] [--write]

Every model, all weights and LoRA, every generation: slices of growing size are tried until the update fits (rows one at
a time, configs/paper/ultrafeedback.yaml). On the v5e and v5p slices so found the scorer, the move to the decode layout,
prefill and decode are compiled, too, with the nearest change (fewer slots, say) where they do not fit. A slice whose
chips could not even hold weights, moments and gradients is passed over without a compile. One JSON line a cell; what
OUT has already is not compiled again. --part: one of N processes that share the work. --write: prints the table, and
writes the lines "slices" of configs/paper.

Needs libtpu: pip install 'sera_jax[tpu]'. A compile takes about a minute on two cores.
"""

import json
import pathlib
import re
import sys

from sera_jax import config as configs
from sera_jax.compile_check import advice, cases, chips, door
from sera_jax.compile_check.cases import Setting
from sera_jax.config import TrainConfig

HERE = pathlib.Path(__file__).resolve().parents[1] / "configs"
MODELS = "pythia-410m pythia-1b tinyllama-1.1b phi-2 pythia-2.8b pythia-6.9b mistral-7b llama-3-8b".split()
LORA = {"full": [], "lora": ["--lora.rank=16", "--lora.alpha=128", "--optimizer.learning_rate=5e-6"]}
SIZES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8"),
}
BESIDE = ("scorer", "to decode layout", "prefill", "decode")
WHOLE = ("v5e", "v5p")  # generations on which all programs are compiled
ROWS = ["--optimizer.microbatch_rows=1", "--sft.optimizer.microbatch_rows=1"]


def config_of(model: str, kind: str) -> TrainConfig:
    files = [f"--config={HERE / 'paper' / name}.yaml" for name in ("ultrafeedback", model)]
    own = [f"--model.path={HERE / 'models' / model}", "--run.dir=unread"]
    return configs.parse(TrainConfig, [*files, *own, *ROWS, *LORA[kind]])


def hopeless(config: TrainConfig, topology: str) -> bool:
    """Would weights, moments and gradients alone be too much?"""
    where = chips.find(topology)
    setting = Setting(config, cases.arch_of(config), door.mesh_of(config, where), 1)
    case = cases.CASES["update"](setting)
    return sum(case.holds.values()) + case.gradients > where.available


def cell(model: str, kind: str, generation: str) -> dict:
    """The smallest slice, what the update holds and takes there at least, and what the other programs hold."""
    config = config_of(model, kind)
    told: dict = {"model": model, "kind": kind, "generation": generation, "topology": "none", "tried": []}
    for size in SIZES[generation]:
        topology = f"{generation}:{size}"
        if hopeless(config, topology):
            continue
        told["tried"].append(size)
        found = compiled(config, topology, "update", search=False)
        if not found.fit:
            continue
        update = found.bounds["update"]
        told |= {
            "topology": size,
            "chips": len(found.where.devices),
            "available": found.where.available,
            "used": {"update": found.fits["update"].used},
            "parts": found.fits["update"].breakdown,
            "seconds": update.seconds,
            "step": update.step,
            "binds": update.binds,
            "changes": {},
        }
        for name in BESIDE if generation in WHOLE else ():
            other = compiled(config, topology, name, search=True)
            told["used"][name] = other.fits[name].used
            if not other.fit:
                told["changes"][name] = other.nearest[name] and advice.flags(other.nearest[name])
        break
    return told


def compiled(config: TrainConfig, topology: str, name: str, *, search: bool) -> door.Found:
    """One program of a config; search: where it does not fit, the nearest change with which it does, too."""
    traffic = "loops" if name == "update" else "none"
    return door.check(config, door.CompileCheckConfig(topology, only=(name,), traffic=traffic, search=search))


def table(cells: list[dict]) -> list[str]:
    """Markdown: a row a model and kind, a column a generation."""
    by = {(c["model"], c["kind"], c["generation"]): c for c in cells}
    lines = [f"| model | | {' | '.join(SIZES)} |", "|---|---|" + "---|" * len(SIZES)]
    for model in MODELS:
        for kind in LORA:
            shown = []
            for generation in SIZES:
                c = by.get((model, kind, generation))
                if c is None or c["topology"] == "none":
                    shown.append("?" if c is None else "none tried")
                    continue
                gib, bound = c["used"]["update"] / 2**30, f"≥ {c['step']:.2g} s ({c['binds']})"
                more = f", {'; '.join(map(str, c['changes'].values()))}" if c["changes"] else ""
                shown.append(f"{c['topology']}: {gib:.1f} of {c['available'] / 2**30:.1f} GiB, {bound}{more}")
            lines.append(f"| {model} | {kind} | {' | '.join(shown)} |")
    return lines


def write(cells: list[dict]) -> None:
    """The lines "slices" of configs/paper."""
    by = {(c["model"], c["kind"], c["generation"]): c["topology"] for c in cells}
    for model in MODELS:
        path = HERE / "paper" / f"{model}.yaml"
        text = path.read_text(encoding="utf-8")
        for kind in LORA:
            line = "  ".join(f"{g} {by.get((model, kind, g), '?')}" for g in SIZES)
            text = re.sub(rf"^#   slices    {kind}  .*$", f"#   slices    {kind}  {line}", text, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")


def main(out: str, *flags: str) -> None:
    path = pathlib.Path(out)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if "--write" in flags:
        print("\n".join(table(known)))
        write(known)
        return
    part, parts = (int(n) for n in flags[flags.index("--part") + 1].split("/")) if "--part" in flags else (0, 1)
    done = {(c["model"], c["kind"], c["generation"]) for c in known}
    asked = [(m, k, g) for g in ("v5e", "v5p", "v6e", "v4") for m in MODELS for k in LORA]
    for one in asked[part::parts]:
        if one not in done:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(cell(*one)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
