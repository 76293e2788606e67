"""Arms × seeds → one table: `python -m sera_jax.arms --config configs/arms.yaml`.

An *arm* is a set of keys that differ from a base config. Arms of one seed share what they have in common: world, start,
evaluation prompts and noise are paired by the base, log-probs and samples by one ledger, the first policy by
loop.first. All runs go through one process, so that each program is compiled once; several processes may work on the
same folder, each run is taken by one of them. Run again, it goes on where it stopped.
What the table is made of stands in out/runs.parquet as well, and counts when the run folders are gone. Runs that were
made of another base or other keys are refused.

Every arm is compared with one baseline arm, on the same prompts and seeds, three ways:

    equal updates   the exported policies
    matched KL      both paths (start, iterate 1, 2, ..) cut where the nearer of the two ends, by KL to the start
    equal FLOPs     the same by FLOPs (training, scoring and sampling; see train.outcome)

Rewards between two iterates are interpolated prompt by prompt. Intervals are 95 %, percentile bootstrap over seeds and,
within a seed, over prompts.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml

from sera_jax import config as configs
from sera_jax import disk, metrics, winrate
from sera_jax import train as trainer
from sera_jax.config import ConfigError, TrainConfig
from sera_jax.run import RunBusy, differences


@dataclasses.dataclass(frozen=True)
class ArmsConfig:
    """`python -m sera_jax.arms`: runs arms of one base config over seeds and writes a table.

    Args:
        out: folder; runs lie in out/SEED/ARM, the table in out/table.md and out/table.json, the rewards and costs of
            every run in out/runs.parquet.
        base: keys of `sera_jax.train`, nested as in its YAML. In its texts, and in those of the arms, {seed} stands for
            the seed, {runs} for out/SEED, and the names of `words` for their texts.
        arms: name → the keys that differ, dotted: {select.rule: all}. They run in this order.
        baseline: the arm that the others are compared with.
        seeds: the runs of each arm; {seed} goes into run.seed too.
        only: names of the arms to run and to show; empty = all.
        words: further placeholders.
        table: only = run nothing, write the table of the runs that are complete.
    """

    out: str
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    baseline: str
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = ()
    words: dict[str, str] = dataclasses.field(default_factory=dict)
    table: str = "after"


def main(args: list[str] | None = None) -> None:
    """The door."""
    try:
        config = configs.parse(ArmsConfig, args)
        check(config)
        if config.table != "only":
            run(config)
        write_table(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


def check(config: ArmsConfig) -> None:
    """Raises ConfigError for names that no arm has, or keys that no run knows."""
    for name in (config.baseline, *config.only):
        if name not in config.arms:
            raise ConfigError(f"arms: got {name!r}, expected one of: {', '.join(config.arms)}.")
    if config.table not in ("after", "only"):
        raise ConfigError(f"arms: table is {config.table!r}, expected 'after' or 'only'.")
    if not config.seeds:
        raise ConfigError("arms: seeds is empty, expected at least one.")
    for name in chosen(config):
        arm_config(config, name, config.seeds[0])


def chosen(config: ArmsConfig) -> list[str]:
    """The arms to run and to show, in order."""
    return [name for name in config.arms if not config.only or name in config.only or name == config.baseline]


def folder(config: ArmsConfig, name: str, seed: int) -> pathlib.Path:
    """The run folder of an arm."""
    return pathlib.Path(config.out) / str(seed) / name


def arm_config(config: ArmsConfig, name: str, seed: int) -> TrainConfig:
    """The complete config of one run."""
    words = {**config.words, "seed": str(seed), "runs": str(pathlib.Path(config.out) / str(seed))}
    tree = json.loads(json.dumps(config.base))
    for key, value in {**config.arms[name], "run.dir": str(folder(config, name, seed)), "run.seed": seed}.items():
        *above, last = key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    flags = [f"--{key}={_flag(_filled(value, words, name))}" for key, value in _leaves(tree)]
    return _parsed(tuple(flags))


@functools.cache
def _parsed(flags: tuple[str, ...]) -> TrainConfig:
    """Parsing costs a fifth of a second, and a table asks for hundreds."""
    return configs.parse(TrainConfig, list(flags))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values; the mapping of a leaf that is one itself (loss.mix) stays whole."""
    found = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" != "loss.mix":
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _filled(value: Any, words: Mapping[str, str], name: str) -> Any:
    if isinstance(value, list):
        return [_filled(v, words, name) for v in value]
    if isinstance(value, str):
        try:
            return value.format_map(words)
        except (KeyError, IndexError) as error:
            raise ConfigError(
                f"arm {name}: {value!r} names {error}, expected one of {', '.join(words)} (see words)."
            ) from None
    return value


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- running ----------------------------------------------------------------------------------------------------------


PATIENCE = 5.0  # seconds between two looks at what other processes have done


def run(config: ArmsConfig) -> None:
    """Every run that is not complete, seed by seed, with the runs that they start from (loop.first). A run that another
    process holds is left to it; what starts from it waits."""
    wanted = with_parents(config, chosen(config))
    every = [(seed, name) for seed in config.seeds for name in wanted]
    have = stored(config)
    missing = [key for key in every if not made(config, *key)]
    new = [key for key in missing if key not in have]
    # A stored run whose folder is gone has to be made again where a new one starts from its policy.
    again = {(seed, parent) for seed, name in new for parent in with_parents(config, [name])}
    waiting = [key for key in missing if key in new or key in again]
    total, begun = len(waiting), []
    while waiting:
        held = set()
        for seed, name in waiting:
            if made(config, seed, name):  # by another process, meanwhile
                continue
            parent = parent_of(config, name, seed)
            if parent is not None and not made(config, seed, parent):
                held |= {(seed, parent), (seed, name)}
                continue
            if (seed, name) not in begun:
                begun.append((seed, name))
                metrics.say(f"== seed {seed}, arm {name} ({len(begun)} of {total})")
            try:
                trainer.train(arm_config(config, name, seed))
            except RunBusy as busy:
                metrics.say(f"left to another process: {busy}")
            except ValueError as error:
                raise ValueError(f"seed {seed}, arm {name}: {error}") from error
        # What starts from a run that another process holds waits for it, or takes it over if that process is gone.
        waiting = [key for key in waiting if key in held and not made(config, *key)]
        if waiting:
            time.sleep(PATIENCE)


def parent_of(config: ArmsConfig, name: str, seed: int) -> str | None:
    """The arm of the same seed whose export is the arm's loop.first, None if it is none of them."""
    first = arm_config(config, name, seed).loop.first
    return next((arm for arm in config.arms if first and first == str(folder(config, arm, seed) / "export")), None)


def with_parents(config: ArmsConfig, names: Sequence[str]) -> list[str]:
    """Arms and those that they start from, in the order of the config, parents before their children."""
    seed, found = config.seeds[0], []

    def add(name: str) -> None:
        parent = parent_of(config, name, seed)
        if parent is not None and parent != name:
            add(parent)
        if name not in found:
            found.append(name)

    for name in names:
        add(name)
    return found


def complete(path: pathlib.Path) -> bool:
    """Has the run come to its end?"""
    return (path / "result.json").is_file()


def made(config: ArmsConfig, seed: int, name: str) -> bool:
    """Is the run complete?

    Raises:
        ValueError: it is, but of another config; the keys that differ are named.
    """
    path = folder(config, name, seed)
    if not complete(path):
        return False
    before = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    differing = differences(before, yaml.safe_load(configs.dump(arm_config(config, name, seed))))
    if differing:
        raise ValueError(
            f"seed {seed}, arm {name}: {path} is complete, but was made of another config; it differs in "
            f"{', '.join(differing)}. Use another `out`, or remove that folder and {config.out}/runs.parquet."
        )
    return True


def recipe(config: ArmsConfig, name: str) -> str:
    """What a run of the arm is made of, as JSON: base, its keys, and the placeholders that are no paths, which may lie
    elsewhere tomorrow."""
    words = {key: word for key, word in config.words.items() if "/" not in word}
    return json.dumps({"base": config.base, "arm": config.arms[name], "words": words}, sort_keys=True)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Path:
    """What one run's policies say to the evaluation prompts, from the start (t = 0) on.

    The path ends with the point that the run exported. reward_TP, kl_T, length_T; flops_T: spent up to
    there, at its end all that was spent. told: the summary of the iteration that it was exported from.
    """

    reward_TP: np.ndarray
    kl_T: np.ndarray
    length_T: np.ndarray
    flops_T: np.ndarray
    told: dict[str, Any]


def read(config: ArmsConfig, name: str, seed: int) -> Path | None:
    """A complete run, None if it is not."""
    if not made(config, seed, name):
        return None
    path = folder(config, name, seed)
    result = json.loads((path / "result.json").read_text())
    summaries = [_summary(path, t) for t in range(1, result["iterations"] + 1)]
    flops = [_flops(s) for s in summaries]
    parent = parent_of(config, name, seed)
    if parent is not None:  # what the given policy cost is told by its own run
        flops[0] = _first_flops(config, parent, seed)
    points = [*map(str, range(1, result["iteration"])), result["exported"]]
    told = [pyarrow.parquet.read_table(path / "evaluation" / f"{point}.parquet").to_pydict() for point in points]
    kl = [np.nanmean(np.subtract(point["logp"], point["logp_start"])) for point in told]
    return Path(
        reward_TP=np.array([told[0]["reward_start"], *(point["reward"] for point in told)]),
        kl_T=np.array([0.0, *kl]),
        length_T=np.array([np.nan, *(np.mean(point["length"]) for point in told)]),
        flops_T=np.array([*np.cumsum([0.0, *flops])[: len(told)], sum(flops)]),
        told=summaries[result["iteration"] - 1],
    )


def _first_flops(config: ArmsConfig, name: str, seed: int) -> float:
    """Of a run's first iteration: from its folder, or from what is stored of it."""
    if complete(folder(config, name, seed)):
        return _flops(_summary(folder(config, name, seed), 1))
    path = stored(config).get((seed, name))
    if path is None:
        raise ValueError(
            f"arms: the run {folder(config, name, seed)}, from which others start, is gone, and "
            f"{config.out}/runs.parquet does not hold it: nobody knows what it cost. Run the arms again, or remove the "
            "runs that start from it."
        )
    return float(path.flops_T[1])


def _summary(run: pathlib.Path, t: int) -> dict[str, Any]:
    return json.loads((run / "iterations" / str(t) / "summary.json").read_text())


def _flops(summary: Mapping[str, Any]) -> float:
    return sum(v for k, v in summary.items() if k.startswith("flops/"))


def stored(config: ArmsConfig) -> dict[tuple[int, str], Path]:
    """What out/runs.parquet holds of the config's arms, by (seed, arm).

    Raises:
        ValueError: a run in it was made of something else.
    """
    file = pathlib.Path(config.out) / "runs.parquet"
    if not file.is_file():
        return {}
    rows = collections.defaultdict(list)
    for row in pyarrow.parquet.read_table(file).to_pylist():
        if row["arm"] in config.arms:
            rows[row["seed"], row["arm"]].append(row)
    for (seed, name), path in rows.items():
        differing = differences(json.loads(path[0].get("recipe") or "{}"), json.loads(recipe(config, name)))
        if differing:
            raise ValueError(
                f"seed {seed}, arm {name}: {file} holds it, but made of something else; it differs in "
                f"{', '.join(differing)}. Use another `out`, or remove the file."
            )
    return {
        key: Path(
            reward_TP=np.array([row["reward"] for row in path]),
            kl_T=np.array([row["kl"] for row in path]),
            length_T=np.array([row["length"] for row in path]),
            flops_T=np.array([row["flops"] for row in path]),
            told=json.loads(path[0]["told"]),
        )
        for key, path in rows.items()
    }


def store(config: ArmsConfig, paths: Mapping[tuple[int, str], Path]) -> None:
    """Writes out/runs.parquet: a row for each point of each path. Rewards in float32, as they were judged."""
    names = ("seed", "arm", "point", "kl", "length", "flops", "reward", "told", "recipe")
    columns: dict[str, list] = {name: [] for name in names}
    for (seed, arm), path in sorted(paths.items()):
        for point, reward_P in enumerate(path.reward_TP):
            values = (seed, arm, point, path.kl_T[point], path.length_T[point], path.flops_T[point])
            row = (*map(lambda v: v.item() if isinstance(v, np.generic) else v, values), reward_P.astype(np.float32))
            for column, value in zip(columns, (*row, json.dumps(path.told), recipe(config, arm))):
                columns[column].append(value)
    file = pathlib.Path(config.out) / "runs.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    with disk.whole(file) as beside:
        pyarrow.parquet.write_table(pyarrow.table(columns), beside, compression="zstd")


def at(reward_TP: np.ndarray, cost_T: np.ndarray, cost: float) -> np.ndarray:
    """Rewards [P] where a path first reaches a cost (KL, FLOPs), linear between iterates; its end if it never does."""
    for t in range(1, len(cost_T)):
        if cost_T[t] >= cost:
            share = (cost - cost_T[t - 1]) / max(cost_T[t] - cost_T[t - 1], 1e-12)
            return (1 - share) * reward_TP[t - 1] + share * reward_TP[t]
    return reward_TP[-1]


# --- the table --------------------------------------------------------------------------------------------------------


def compare(arm: Sequence[Path], base: Sequence[Path]) -> dict[str, Any]:
    """An arm against the baseline over the seeds that both have, paired: interval records by name of the comparison."""
    final = [(a.reward_TP[-1], b.reward_TP[-1]) for a, b in zip(arm, base)]
    kl = [min(a.kl_T[-1], b.kl_T[-1]) for a, b in zip(arm, base)]
    flops = [min(a.flops_T[-1], b.flops_T[-1]) for a, b in zip(arm, base)]
    return {
        "reward": winrate.over_seeds([a - b for a, b in final]),
        "win": winrate.over_seeds([(np.sign(a - b) + 1) / 2 for a, b in final]),
        "reward_at_kl": winrate.over_seeds(
            [at(a.reward_TP, a.kl_T, k) - at(b.reward_TP, b.kl_T, k) for a, b, k in zip(arm, base, kl)]
        ),
        "reward_at_flops": winrate.over_seeds(
            [at(a.reward_TP, a.flops_T, f) - at(b.reward_TP, b.flops_T, f) for a, b, f in zip(arm, base, flops)]
        ),
    }


def own(arm: Sequence[Path]) -> dict[str, Any]:
    """What an arm is by itself: intervals against the start, and means over seeds of what the last iteration tells."""
    told = {
        key: float(np.mean([path.told[key] for path in arm]))
        for key in arm[0].told
        if all(isinstance(path.told.get(key), (int, float)) for path in arm)
    }
    return {
        "win": winrate.over_seeds([(np.sign(a.reward_TP[-1] - a.reward_TP[0]) + 1) / 2 for a in arm]),
        "reward": winrate.over_seeds([a.reward_TP[-1] for a in arm]),
        "kl": float(np.mean([a.kl_T[-1] for a in arm])),
        "length": float(np.mean([a.length_T[-1] for a in arm])),
        "flops": float(np.mean([a.flops_T[-1] for a in arm])),
        "path": {
            "reward": [round(float(np.mean(x)), 4) for x in zip(*(a.reward_TP.mean(axis=1) for a in arm))],
            "kl": [round(float(np.mean(x)), 3) for x in zip(*(a.kl_T for a in arm))],
            "length": [round(float(np.mean(x)), 2) for x in zip(*(a.length_T for a in arm))],
        },
        "told": told,
    }


def write_table(config: ArmsConfig) -> pathlib.Path:
    """out/table.md and out/table.json from the runs that are complete; also printed."""
    before = stored(config)
    every = [(s, name) for s in config.seeds for name in config.arms]
    found = before | {(s, name): path for s, name in every if (path := read(config, name, s))}
    paired(config, found)
    store(config, found)
    paths = {name: {s: found[s, name] for s in config.seeds if (s, name) in found} for name in chosen(config)}
    base = paths[config.baseline]
    told: dict[str, Any] = {}
    for name, by_seed in paths.items():
        if not by_seed:
            continue
        both = [s for s in by_seed if s in base]
        told[name] = {"seeds": list(by_seed), **own(list(by_seed.values()))}
        if name != config.baseline and both:
            told[name]["against"] = compare([by_seed[s] for s in both], [base[s] for s in both])
            told[name]["paired_seeds"] = both
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    plain = json.dumps(told, indent=1, default=dataclasses.asdict)
    (out / "table.json").write_text(plain + "\n", encoding="utf-8")
    text = "\n".join(lines(told, config.baseline)) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "arms.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")
    metrics.say(text)
    return out / "table.md"


def paired(config: ArmsConfig, found: Mapping[tuple[int, str], Path]) -> None:
    """Raises ValueError where the runs of a seed do not have one start: then they share neither world nor noise."""
    for (seed, name), path in found.items():
        base = found.get((seed, config.baseline))
        if base is not None and not np.array_equal(np.float32(path.reward_TP[0]), np.float32(base.reward_TP[0])):
            raise ValueError(
                f"arms: got arm {name} of seed {seed} with mean reward {path.reward_TP[0].mean():.4f} at its start, "
                f"expected that of {config.baseline}, {base.reward_TP[0].mean():.4f}, response by response: the two "
                "were made from other worlds, or on other machines, whose rounding draws other samples. Make both on "
                f"one: remove {config.out}/runs.parquet, or the run folders of the older ones."
            )


def lines(told: Mapping[str, dict], baseline: str) -> list[str]:
    """The table in Markdown; rewards in units of the evaluation's function, win rates in percent."""
    found = [
        f"| arm | seeds | win against the start | reward | KL | tokens | FLOPs | win against {baseline} "
        "| Δ reward, equal updates | Δ at matched KL | Δ at equal FLOPs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    unit = told.get(baseline, next(iter(told.values()), {"flops": 1.0}))["flops"]
    for name, row in told.items():
        against = row.get("against")
        cells = [
            name,
            str(len(row["seeds"])),
            percent(row["win"]),
            number(row["reward"]),
            f"{row['kl']:.2f}",
            f"{row['length']:.1f}",
            f"{row['flops'] / unit:.2f}",
            percent(against["win"]) if against else "",
            *(number(against[k], True) if against else "" for k in ("reward", "reward_at_kl", "reward_at_flops")),
        ]
        found.append("| " + " | ".join(cells) + " |")
    return found


def percent(interval: winrate.Interval) -> str:
    """64.1 [62.0, 66.3]"""
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def number(interval: winrate.Interval, signed: bool = False) -> str:
    """0.228 [0.210, 0.246]"""
    form = "+.3f" if signed else ".3f"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


if __name__ == "__main__":
    main()
