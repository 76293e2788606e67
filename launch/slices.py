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
from sera_jax import metrics, programs
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
OTHERS = ("scorer", "to decode layout", "prefill", "decode")
WHOLE = ("v5e", "v5p")  # generations on which all programs are compiled
ROWS = ["--optimizer.microbatch_rows=1", "--sft.optimizer.microbatch_rows=1"]


def config_of(model: str, kind: str) -> TrainConfig:
    files = [f"--config={HERE / 'paper' / name}.yaml" for name in ("ultrafeedback", model)]
    own = [f"--model.path={HERE / 'models' / model}", "--run.dir=unread"]
    return configs.parse(TrainConfig, [*files, *own, *ROWS, *LORA[kind]])


def smallest(model: str, kind: str, generation: str) -> dict:
    """The smallest slice for the update, what it holds and takes there at least."""
    config = config_of(model, kind)
    told: dict = {"model": model, "kind": kind, "generation": generation, "topology": "none", "tried": []}
    for size in SIZES[generation]:
        where = chips.find(f"{generation}:{size}")
        setting = Setting(config, cases.arch_of(config), door.mesh_of(config, where), 1)
        case = cases.CASES["update"](setting)
        if sum(case.holds.values()) + case.gradients > where.available:
            continue
        told["tried"].append(size)
        metrics.say(f"{model}, {kind}, {where.name}")
        with programs.precision(config.model.compute):
            fit = door.fitted(setting, "update", where, told=False, text=True)
            if not fit.fits:
                continue
            bound = door.bounded(setting, "update", fit, where, "loops")
        return told | {
            "topology": size,
            "chips": len(where.devices),
            "available": where.available,
            "used": fit.used,
            "parts": fit.breakdown,
            "seconds": bound.seconds,
            "step": bound.step,
            "binds": bound.binds,
        }
    return told


def beside(model: str, kind: str, generation: str, size: str) -> dict:
    """What the other programs hold on that slice; the change with which one fits, where it does not."""
    config, topology = config_of(model, kind), f"{generation}:{size}"
    told: dict = {"model": model, "kind": kind, "generation": generation, "others": {}, "changes": {}}
    for name in OTHERS:
        found = door.check(config, door.CompileCheckConfig(topology, only=(name,), traffic="none"))
        told["others"][name] = found.fits[name].used
        if not found.fit:
            told["changes"][name] = found.nearest[name] and advice.flags(found.nearest[name])
    return told


def joined(lines: list[dict]) -> dict[tuple[str, str, str], dict]:
    """What is known of every cell."""
    known: dict = {}
    for line in lines:
        known.setdefault((line["model"], line["kind"], line["generation"]), {}).update(line)
    return known


def table(known: dict) -> list[str]:
    """Markdown: a row a model and kind, a column a generation."""
    lines = [f"| model | | {' | '.join(SIZES)} |", "|---|---|" + "---|" * len(SIZES)]
    for model in MODELS:
        for kind in LORA:
            shown = [_shown(known.get((model, kind, generation)), generation in WHOLE) for generation in SIZES]
            lines.append(f"| {model} | {kind} | {' | '.join(shown)} |")
    return lines


def _shown(c: dict | None, whole: bool) -> str:
    if c is None:
        return "?"
    if c["topology"] == "none":
        return f"none up to {c['tried'][-1]}" if c["tried"] else "none tried"
    told = f"{c['topology']}: {c['used'] / 2**30:.1f} GiB, ≥ {c['step']:.2g} s ({c['binds']})"
    for name, change in c.get("changes", {}).items():
        told += f"; {name} with {change}" if change else f"; {name} does not fit"
    return told if "others" in c or not whole else told + " (update alone)"


def write(known: dict) -> None:
    """The lines "slices" of configs/paper."""
    for model in MODELS:
        path = HERE / "paper" / f"{model}.yaml"
        text = path.read_text(encoding="utf-8")
        for kind in LORA:
            line = "  ".join(f"{g} {known.get((model, kind, g), {}).get('topology', '?')}" for g in SIZES)
            text = re.sub(rf"^#   slices    {kind}  .*$", f"#   slices    {kind}  {line}", text, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main(out: str, *flags: str) -> None:
    chips.quiet()
    path = pathlib.Path(out)
    if "--write" in flags:
        print("\n".join(table(joined(read(path)))))
        write(joined(read(path)))
        return
    part, parts = (int(n) for n in flags[flags.index("--part") + 1].split("/")) if "--part" in flags else (0, 1)
    asked = [(m, k, g) for g in ("v5e", "v5p", "v6e", "v4") for m in MODELS for k in LORA][part::parts]

    def tell(line: dict) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    for one in asked:
        if "topology" not in joined(read(path)).get(one, {}):
            tell(smallest(*one))
    for one in asked:
        known = joined(read(path))[one]
        if one[2] in WHOLE and "others" not in known and known["topology"] != "none":
            tell(beside(*one, known["topology"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
