"""A whole SeRA iteration beside a DPO epoch of the same loop: does it take longer than its own FLOPs say?

    python tests/benchmarks/iteration.py --data DATA [--pairs 192] [--times 5] [--out FILE.jsonl]

Runs of two iterations on HH helpful pairs: the first is an epoch of DPO, its reference's scoring included; the second
scores, selects, samples four candidates of every prompt (and of 0.3 of them), ranks them and trains on as many pairs.
FLOPs are the model's own, of useful tokens: a forward pass over what is scored, over the prompts and over each sampled
token, three of them over what is trained on. The first run compiles and is not counted.
"""

import argparse
import pathlib
import shutil
import statistics

from harness import finish, model_folder, shared_data, text_pairs

from sera_jax import config as configs
from sera_jax import rewards
from sera_jax.compile_check import flops
from sera_jax.config import TrainConfig
from sera_jax.train import loop, outcome, update


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--work", default="/tmp/sera_jax_benchmarks")
    p.add_argument("--pairs", type=int, default=192)
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--out")
    p.add_argument("own", nargs="*", help="further words for the config")
    a = p.parse_args()
    data, work = shared_data(a.data), pathlib.Path(a.work)
    tokenizer = data / "tokenizers" / "llama2"
    model = model_folder(work / "llama-19m", tokenizer)
    pairs = work / f"texts-{a.pairs}-256.jsonl"
    text_pairs(pairs, data, tokenizer, a.pairs, 256)
    table = []
    for share in (1.0, 0.3):
        words = [
            f"--model.path={model}", f"--data.pairs=[{pairs}]", "--data.max_length=320", "--data.max_prompt_length=256",
            "--loop.iterations=2", "--optimizer.batch_size=32", "--optimizer.learning_rate=1e-6", "--loss.beta=0.1",
            "--model.remat=none", f"--bootstrap.prompts_per_iteration={share}", "--bootstrap.candidates=4",
            f"--bootstrap.max_new_tokens={a.new_tokens}", "--bootstrap.unfinished=keep", "--bootstrap.temperature=1",
            "--bootstrap.top_p=1", "--bootstrap.slots=256", "--run.save_every=100000", "--run.compilation_cache=off",
            *a.own,
        ]  # fmt: skip
        measured = []
        for _ in range(a.times + 1):
            measured.append(_run(words, work / "iteration"))
        ratios = sorted(second / first for (first, second), _ in measured[1:])
        (first, second), (own_first, own_second) = measured[-1]
        counted = own_second / own_first
        table.append(
            {
                "prompts sampled from": share,
                "s, DPO epoch": statistics.median(seconds[0] for seconds, _ in measured[1:]),
                "s, SeRA iteration": statistics.median(seconds[1] for seconds, _ in measured[1:]),
                "ratio": statistics.median(ratios),
                "least": ratios[0],
                "most": ratios[-1],
                "FLOPs say": counted,
                "ratio ÷ that": statistics.median(ratios) / counted,
                "GFLOP/s, epoch": own_first / first / 1e9,
                "GFLOP/s, iteration": own_second / second / 1e9,
            }
        )
    finish("iteration", a.out, table, pairs=a.pairs)


def _run(words: list[str], folder: pathlib.Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds and FLOPs of both iterations."""
    shutil.rmtree(folder, ignore_errors=True)
    seen: list = []
    training_set = update.training_set

    def recording(world, t, scored, chosen, made):
        stage = training_set(world, t, scored, chosen, made)
        seen.append((world, stage, made))
        return stage

    update.training_set = recording
    try:
        loop.train(configs.parse(TrainConfig, [*words, f"--run.dir={folder}"]))
    finally:
        update.training_set = training_set
    world = seen[0][0]
    summaries = outcome.read_summaries(world, 2)
    return tuple(s["perf/seconds"] for s in summaries), tuple(_flops(*one) for one in seen)


def _flops(world, stage, made) -> float:
    """Of an iteration: the given pairs scored once, the candidates sampled and scored twice, the update's pairs."""
    arch = world.policies.arch

    def forward(trees) -> float:
        return sum(
            flops.forward(
                arch,
                tokens=tree.length,
                seen=flops.seen_by(arch, len(tree.prompt), map(len, tree.branches)),
                predicted=tree.targets,
            )
            for tree in trees
        )

    trained = [stage.trees[i] for batch in stage.batches for i in batch]
    total = forward(world.given.trees) + 3 * forward(trained)
    if made is not None:
        trees = rewards.trees(made.candidates)
        total += 3 * forward(trees)  # one of them token by token
    return total


if __name__ == "__main__":
    main()
