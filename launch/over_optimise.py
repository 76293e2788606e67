"""Over-optimisation: gold against what was optimised against KL, over the iterations of runs of configs/online.yaml.

    python launch/over_optimise.py --runs runs/online/hard --worlds runs/online/worlds --seeds 0 1 2 --out FOLDER

Of every point of the arms (the start, iterates 1, 2, ...), on the evaluation prompts: mean gold reward, mean reward of
the seed's Bradley-Terry model (the proxy, whoever trained on what), KL to the start, tokens, and emphases a response:
the trap, of which the given pairs hold two at most, each earning a little, while each further one costs. Writes
over.parquet, a row for each seed, arm and point, and over.svg, and prints a table of means over the seeds.
"""

import argparse
import json
import pathlib

import matplotlib.figure
import numpy as np
import pyarrow
import pyarrow.parquet

from sera_jax import data, metrics, policies
from sera_jax import mesh as meshes
from sera_jax.ledger import Ledger
from sera_jax.records import Tree
from sera_jax.toyworld.facts import EMPHASES, EMPHASIS

ARMS = {"over_dpo": "offline", "over_bt": "online, reward model", "over_gold": "online, gold"}
MEASURES = ("kl", "gold", "proxy", "words", "emphases", "overdone")
SHOWN = {"gold": "gold reward", "proxy": "reward model's reward", "emphases": "emphases a response"}


def proxies(ranker: policies.Folder, tokens: dict[str, np.ndarray], file: pathlib.Path, ledger: Ledger) -> np.ndarray:
    """float32 [P]: the reward model's of the responses in a file that a run's evaluation wrote, by the sampled ids."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    trees = [Tree(row["id"], tokens[row["id"]], (np.array(row["tokens"][0], np.int32),)) for row in rows]
    return policies.folder_rewards(ranker, trees, ledger=ledger, label=f"proxy of {file}")


def of_run(run: pathlib.Path, ranker: policies.Folder, tokens: dict, ledger: Ledger) -> list[dict[str, float]]:
    """A row for the start and for each iterate that was evaluated."""
    rows = []
    for t in sorted(int(path.stem) for path in (run / "evaluation").glob("*.jsonl") if path.stem.isdigit()):
        table = pyarrow.parquet.read_table(run / "evaluation" / f"{max(t, 1)}.parquet").to_pydict()
        said = [json.loads(line)["responses"][0].split() for line in open(run / "evaluation" / f"{t}.jsonl")]
        rows.append(
            {
                "point": t,
                "kl": float(np.nanmean(np.subtract(table["logp"], table["logp_start"]))) if t else 0.0,
                "gold": float(np.mean(table["reward" if t else "reward_start"])),
                "proxy": float(np.mean(proxies(ranker, tokens, run / "evaluation" / f"{t}.jsonl", ledger))),
                "words": float(np.mean([len(words) for words in said])),
                "emphases": float(np.mean([words.count(EMPHASIS) for words in said])),
                "overdone": float(np.mean([words.count(EMPHASIS) > EMPHASES for words in said])),
            }
        )
    return rows


def means(rows: list[dict]) -> list[dict]:
    """A row for each arm and point: the mean of every measure over the seeds."""
    told = []
    for arm in ARMS:
        for point in sorted({row["point"] for row in rows if row["arm"] == arm}):
            mine = [row for row in rows if (row["arm"], row["point"]) == (arm, point)]
            values = {key: float(np.mean([row[key] for row in mine])) for key in MEASURES}
            told.append({"arm": arm, "point": point, **values})
    return told


def drawn(rows: list[dict], path: pathlib.Path) -> None:
    """Each measure against KL, a line a seed and arm."""
    figure = matplotlib.figure.Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items()):
        for colour, (arm, name) in zip(("tab:blue", "tab:red", "tab:green"), ARMS.items()):
            for seed in sorted({row["seed"] for row in rows}):
                mine = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
                first = seed == min(row["seed"] for row in rows)
                x, y = ([row[key] for row in mine] for key in ("kl", measure))
                axes.plot(x, y, ".-", color=colour, alpha=0.7, linewidth=1, label=name if first else None)
        axes.set(xlabel="KL to the start, nats", ylabel=label)
    figure.axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=pathlib.Path, required=True)
    p.add_argument("--worlds", type=pathlib.Path, required=True)
    p.add_argument("--seeds", type=int, nargs="+", required=True)
    p.add_argument("--out", type=pathlib.Path, required=True)
    a = p.parse_args()
    mesh, rows = meshes.make(1, 1, 1), []
    for seed in a.seeds:
        ranker = policies.open_reward_model(str(a.worlds / str(seed) / "bt_more" / "export"), mesh, compute="float32")
        prompts, _ = data.load_prompts([str(a.worlds / str(seed) / "world" / "eval_prompts.jsonl")])
        trees, _ = data.tokenise_prompts(prompts, ranker.tokenizer, max_prompt_length=20)
        tokens, ledger = {tree.id: tree.prompt for tree in trees}, Ledger(a.worlds / str(seed) / "ledger")
        for arm in ARMS:
            found = of_run(a.runs / str(seed) / arm, ranker, tokens, ledger)
            rows += [{"seed": seed, "arm": arm, **row} for row in found]
    a.out.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), a.out / "over.parquet", compression="zstd")
    drawn(rows, a.out / "over.svg")
    table = [[row["arm"], row["point"], *(round(row[key], 3) for key in MEASURES)] for row in means(rows)]
    metrics.table("over-optimisation", ["arm", "iterate", *MEASURES], table)


if __name__ == "__main__":
    main()
