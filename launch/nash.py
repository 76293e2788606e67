"""Self-play in a game of preferences that go in a circle (configs/nash_game.py): who gets to the Nash policy?

    python launch/nash.py [--out runs/nash] [--seeds 5] [--iterations 24] [--only sppo nash_md]

Each seed draws a model and has it learn from demonstrations; from there every method runs by its own config and the
game's. Each iterate's policy over the moves is read off its log-probs, prompt by prompt, and held against the prompt's
Nash policy, regularised by β against the initial policy as it is. It goes on where it stopped. OUT/table.md,
OUT/nash.json and OUT/nash.png have the result.
"""

import argparse
import json
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import nash_game
from sera_jax import config as configs
from sera_jax import nash, policies, score
from sera_jax import run as runs
from sera_jax.config import TrainConfig
from sera_jax.policies import Live, Name
from sera_jax.records import Tree
from sera_jax.train import train
from sera_jax.train import world as worlds

MANY = ["--bootstrap.candidates=8", "--bootstrap.pair_rule=all_pairs", "--bootstrap.fresh=28"]
OF_REWARDS = ["--reward.source=function", "--reward.function=configs.nash_game:fitted", "--loss.name=dpo"]
# Name → its config and what it sets to the game's, or to what makes it another method.
METHODS = {
    "sppo": ("sppo", [*MANY, "--loss.reference=initial"]),
    "sppo, previous": ("sppo", [*MANY, "--loss.beta=1"]),
    "self-play IPO": ("self_play_ipo", []),
    "Nash-MD": ("nash_md", MANY),
    "DPO on Bradley-Terry": ("sppo", [*OF_REWARDS, "--loss.reference=initial", "--bootstrap.fresh=1"]),
}
# On given pairs with scores, whose optimum is known, too: π_0·exp(score/β).
SCORED = ["--data.pairs=[{folder}/scored.jsonl]", "--bootstrap.fresh=0", "--select.keep=1", "--reward.source=implicit"]
SCORED += ["--loop.iterations=8", "--optimizer.learning_rate=5e-4"]
GAPS = {
    loss: ("rpo", [*SCORED, "--reward.function=", f"--loss.name={loss}"])
    for loss in ("dpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
}


def started(folder: pathlib.Path, seed: int) -> None:
    """The initial policy of a seed: FOLDER/start/export."""
    nash_game.write(folder, seed)
    flags = [f"--model.path={folder}/model", "--model.weights=random", f"--sft.data=[{folder}/demonstrations.jsonl]"]
    flags += ["--sft.epochs=10", "--sft.optimizer.learning_rate=3e-3", "--sft.optimizer.batch_size=64"]
    flags += ["--loop.iterations=0", "--data.max_length=16", "--data.max_prompt_length=8"]
    train(configs.parse(TrainConfig, [f"--run.dir={folder}/start", f"--run.seed={seed}", *flags]))


def played(config: TrainConfig) -> None:
    """Trains; a policy whose samples are all the same move makes no pair any more, and stays what it is."""
    try:
        train(config)
    except ValueError as error:
        if "has nothing to train on" not in str(error):
            raise
        print(f"{config.run.dir}: {error}")


def iterates(config: TrainConfig) -> np.ndarray:
    """[iterates, prompts, moves + 1]: how probably each iterate, the initial policy first, plays each move; the rest
    is last. A policy that could not go on stays."""
    world = worlds.prepare(config)
    try:
        tokenizer, where = world.policies.start.tokenizer, world.policies
        branches = tuple(np.array([tokenizer.convert_tokens_to_ids(m)], np.int32) for m in nash_game.MOVES)
        trees = [Tree(p.id, ids, branches) for p, ids in zip(world.given.prompts, world.given.prompt_tokens)]
        how = {"live": Live(Name("iterate", -1), None), "plan": score.plan_for(trees, where.arch, world.mesh)}
        found = []
        for t in range(config.loop.iterations + 1):
            if t and not (where.iterates / str(t)).exists():
                found.append(found[-1])
                continue
            flat = policies.logps(where, Name("iterate", t), trees, what="moves", **how)
            moves = np.exp(flat.reshape(len(trees), -1).astype(np.float64))
            found.append(np.concatenate([moves, np.maximum(1 - moves.sum(1, keepdims=True), 1e-9)], axis=1))
        return np.array(found)
    finally:
        runs.close(world.run)


def of_scores(policy_TPN: np.ndarray, beta: float) -> dict[str, list[float]]:
    """By iterate, means over prompts: total variation to π_0·exp(score/β), the moves alone; shares."""
    moves_TPN = policy_TPN[..., :-1] / policy_TPN[..., :-1].sum(-1, keepdims=True)
    score_N = np.array(list(nash_game.SCORES.values()))
    best = [nash.normalised(np.log(first) + score_N / beta) for first in moves_TPN[0]]
    far = lambda row: float(np.mean([nash.total_variation(p, goal) for p, goal in zip(row, best)]))
    shares = [*moves_TPN.mean(1).tolist(), np.mean(best, axis=0).tolist()]
    return {"tv": [far(row) for row in moves_TPN], "shares": shares}


def measured(policy_TPN: np.ndarray, beta: float) -> dict[str, list[float]]:
    """By iterate, means over prompts: total variation to the Nash policy, exploitability with and without β; shares."""
    games = [(nash.nash(nash_game.PROB, first, beta), first) for first in policy_TPN[0]]
    mean = lambda of: [float(np.mean([of(p, *game) for p, game in zip(row, games)])) for row in policy_TPN]
    return {
        "tv": mean(lambda p, found, first: nash.total_variation(p, found)),
        "exploitability": mean(lambda p, found, first: nash.exploitability(nash_game.PROB, p, first, beta)),
        "plain": mean(lambda p, found, first: nash.exploitability(nash_game.PROB, p, first, 0.0)),
        "mean_tv": float(np.mean([nash.total_variation(p, found) for p, (found, _) in zip(policy_TPN.mean(0), games)])),
        "shares": policy_TPN.mean(1).tolist(),
        "nash": np.mean([found for found, _ in games], axis=0).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/nash"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="number of the first seed: several commands may share OUT")
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=[*METHODS, *GAPS])
    arguments = parser.parse_args()
    found: dict[str, list] = {name: [] for name in arguments.only}
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        folder = arguments.out / str(seed)
        if not (folder / "start" / "result.json").is_file():
            started(folder, seed)
        for name in arguments.only:
            file, flags = (METHODS | GAPS)[name]
            short = "".join(c if c.isalnum() else "_" for c in name)
            own = [flag.format(folder=folder) for flag in flags]
            flags = [f"--config=configs/{file}.yaml", "--config=configs/nash_game.yaml"]
            flags += [f"--run.dir={folder}/{short}", f"--run.seed={seed}", f"--model.path={folder}/start/export"]
            flags += [f"--data.pairs=[{folder}/pairs.jsonl]", f"--loop.iterations={arguments.iterations}"]
            config = configs.parse(TrainConfig, [*flags, *own])
            kept = folder / f"{short}.json"
            if not kept.is_file():
                played(config)
                kept.write_text(json.dumps(iterates(config).tolist()))
            # All are held against the game of the same β, also those whose own is another.
            measure = measured if name in METHODS else of_scores
            policy_TPN = np.array(json.loads(kept.read_text()))[: config.loop.iterations + 1]
            found[name].append(measure(policy_TPN, beta=0.1))
    (arguments.out / "nash.json").write_text(json.dumps(found))
    by_play, by_score = ({n: s for n, s in found.items() if n in some} for some in (METHODS, GAPS))
    told = (table(by_play) if by_play else "") + (table_of_scores(by_score) if by_score else "")
    (arguments.out / "table.md").write_text(told)
    print(told)
    if by_play:
        figure(by_play, arguments.out / "nash.png")


def cell(values: list[float]) -> str:
    """Mean over seeds ± 1.96 standard errors."""
    spread = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):.3f} ± {spread:.3f}"


def shares_of(rows: list[list[float]]) -> str:
    return " / ".join(f"{x:.2f}" for x in np.mean(rows, axis=0)[:3])


def table_of_scores(found: dict[str, list]) -> str:
    """Total variation to the optimum at a quarter of the iterations and at the end."""
    lines = ["\n| | TV, a quarter of the way | at the end | rock / paper / scissors |", "|---|---|---|---|"]
    for name, seeds in found.items():
        early, late = (cell([s["tv"][at] for s in seeds]) for at in (len(seeds[0]["tv"]) // 4, -1))
        lines.append(f"| {name} | {early} | {late} | {shares_of([s['shares'][-2] for s in seeds])} |")
    lines.append(f"| π_0·exp(score/β) | 0 | 0 | {shares_of([s['shares'][-1] for s in next(iter(found.values()))])} |")
    return "\n".join(lines) + "\n"


def table(found: dict[str, list]) -> str:
    """Of the initial policy and of each method's last iterate."""
    columns = ("", "TV to Nash", "mean of the last five", "TV of the mean iterate", "exploitability, β", "without")
    lines = [f"| {' | '.join(columns)} | rock / paper / scissors |", "|" + "---|" * 7]
    rows = [("start", next(iter(found.values())), 0), *((name, seeds, -1) for name, seeds in found.items())]
    for label, seeds, at in rows:
        shares = shares_of([s["shares"][at] for s in seeds])
        late = [[np.mean(s["tv"][-5:]) for s in seeds], [s["mean_tv"] for s in seeds]]
        late = " | ".join(map(cell, late)) if at else " | "
        cells = [cell([s[key][at] for s in seeds]) for key in ("tv", "exploitability", "plain")]
        lines.append(f"| {label} | {cells[0]} | {late} | {cells[1]} | {cells[2]} | {shares} |")
    shares = shares_of([s["nash"] for s in next(iter(found.values()))])
    lines.append(f"| Nash, β 0.1 | 0 | | | 0 | | {shares} |")
    return "\n".join(lines) + "\n"


def figure(found: dict[str, list], path: pathlib.Path) -> None:
    """Total variation and exploitability by iteration, each seed thin, their mean thick."""
    drawn, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, key, label in zip(axes, ("tv", "exploitability"), ("total variation to Nash", "exploitability, β 0.1")):
        for i, (name, seeds) in enumerate(found.items()):
            for seed in seeds:
                axis.plot(seed[key], color=f"C{i}", alpha=0.25, linewidth=0.8)
            axis.plot(np.mean([seed[key] for seed in seeds], axis=0), color=f"C{i}", label=name)
        axis.set_xlabel("iteration")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
