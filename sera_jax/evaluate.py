"""Who wins? Responses of a policy against those of a baseline to the same prompts, by a reward function.

    python -m sera_jax.evaluate --policy runs/x/export --baseline FOLDER --evaluate.prompts '[prompts.jsonl]' \\
        --evaluate.function my_module:reward [--out result.json]

Each side is a Hugging Face folder, which is sampled from, or a JSONL that `sera_jax.generate` wrote for the same
prompts.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sera_jax import (
    bootstrap,
    data,
    ledger,
    metrics,
    policies,
    processes,
    programs,
    rewards,
    sample,
    score,
    winrate,
)
from sera_jax import config as configs
from sera_jax import mesh as meshes
from sera_jax.config import ConfigError, EvaluateDoorConfig
from sera_jax.policies import Folder
from sera_jax.records import Candidates, Prompt


@dataclasses.dataclass(frozen=True)
class Side:
    """One response to each prompt, [P] each. folder, candidates: where they come from a model, for the KL."""

    texts: list[str]
    lengths: np.ndarray
    finished: np.ndarray
    folder: Folder | None = None
    candidates: Candidates | None = None


def main(args: list[str] | None = None) -> None:
    """Reads the config and prints the result; an error of the user's ends with one line."""
    try:
        programs.compilation_cache()
        config = configs.parse(EvaluateDoorConfig, args)
        processes.join(config.mesh.distributed)
        evaluate(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


def evaluate(config: EvaluateDoorConfig) -> dict[str, Any]:
    """Samples, or reads, both sides and compares them.

    Returns:
        what `config.out` holds: win_rate, low, high (95 %), wins, ties, losses, prompts, kl (mean of
        log π(y|x)/π_baseline(y|x) over the policy's own responses, nats, by the training forward pass; None unless both
        sides are folders with the same tokens), and for each side reward, length, finished, distinct_2.

    Raises:
        ValueError: no prompts or function; a side is neither folder nor file; a file was written for other prompts.
    """
    if not config.evaluate.prompts:
        raise ConfigError("evaluate.prompts is empty, expected at least one file of prompts.")
    if ":" not in config.evaluate.function:
        raise ConfigError(f"evaluate.function is {config.evaluate.function!r}, expected 'module:function'.")
    function = rewards.load_function(config.evaluate.function)
    prompts, report = processes.agreed(
        lambda: data.load_prompts(config.evaluate.prompts, limit=config.evaluate.limit),
        lambda read: configs.dump(config) + repr(read[0]),
        "config and prompts",
    )
    for line in report.lines():
        metrics.say(line)
    with programs.precision(config.compute):
        mesh = meshes.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
        opened = processes.agreed(
            lambda: {name: _opened(config, name, prompts, mesh) for name in ("policy", "baseline")},
            lambda opened: repr([side.texts if isinstance(side, Side) else side.tag for side in opened.values()]),
            "policy and baseline",
        )
        sides = {
            name: side if isinstance(side, Side) else _sampled(config, side, name, prompts)
            for name, side in opened.items()
        }
        kl = _kl(sides["policy"], sides["baseline"])
    texts = [prompt.prompt for prompt in prompts]
    reward = {
        name: rewards.by_function(function, texts, [[t] for t in side.texts], f"judging the {name}")[:, 0]
        for name, side in sides.items()
    }
    wins = winrate.win_rate(reward["policy"], reward["baseline"], seed=config.seed)
    result = {
        "win_rate": wins.rate,
        "low": wins.low,
        "high": wins.high,
        "wins": wins.wins,
        "ties": wins.ties,
        "losses": wins.losses,
        "prompts": len(prompts),
        "kl": kl,
    } | {
        name: {"reward": float(reward[name].mean(dtype=np.float64))}
        | dataclasses.asdict(winrate.texts(side.texts, side.lengths, side.finished))
        for name, side in sides.items()
    }
    _show(config, wins, result)
    if config.out:
        processes.once(lambda: _write(pathlib.Path(config.out), result))
    return result


def _write(path: pathlib.Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _show(config: EvaluateDoorConfig, wins: winrate.WinRate, result: dict[str, Any]) -> None:
    kl = "" if result["kl"] is None else f"; KL to the baseline {result['kl']:.4g} nats a response"
    rows_ = {"reward": "mean reward", "length": "mean tokens", "finished": "finished", "distinct_2": "distinct-2"}
    metrics.say(f"policy {config.policy}, baseline {config.baseline}")
    metrics.table(
        f"{result['prompts']} prompts",
        ["", "policy", "baseline"],
        [[label, result["policy"][key], result["baseline"][key]] for key, label in rows_.items()],
    )
    metrics.say(f"win rate {wins} (95 %): {wins.wins} wins, {wins.ties} ties, {wins.losses} losses{kl}")


# --- the sides --------------------------------------------------------------------------------------------------------


def _opened(config: EvaluateDoorConfig, name: str, prompts: Sequence[Prompt], mesh: Mesh) -> Side | Folder:
    """A file read, or a folder to sample from."""
    path = pathlib.Path(getattr(config, name))
    if path.is_file():
        return read_responses(path, prompts, config.evaluate.limit)
    if not path.is_dir():
        raise ValueError(
            f"{name}: {path} is neither a folder nor a file, expected a Hugging Face folder or a JSONL that "
            "sera_jax.generate wrote."
        )
    return policies.open_folder(str(path), mesh, compute=config.compute)


def _sampled(config: EvaluateDoorConfig, folder: Folder, name: str, prompts: Sequence[Prompt]) -> Side:
    """One response of a model to each prompt: the same that `sera_jax.generate` gives for this seed and these slots."""
    values = config.evaluate
    trees, counts = data.tokenise_prompts(prompts, folder.tokenizer, max_prompt_length=config.max_prompt_length)
    if len(trees) != len(prompts):
        raise ValueError(
            f"{name}: {folder.path} cannot be sampled from with {len(prompts) - len(trees)} of {len(prompts)} prompts, "
            f"expected all of them to be usable: {' '.join(' '.join(counts.lines()).split())}. Leave those prompts out."
        )
    run = policies.folder_sampler(
        folder,
        sample.seeded(config.seed),
        candidates=1,
        max_new_tokens=values.max_new_tokens,
        slots=config.slots,
        temperature=values.temperature,
        top_k=0,
        top_p=values.top_p,
        min_p=0.0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        candidates = bootstrap.sample_candidates(
            run,
            prompts,
            [tree.prompt for tree in trees],
            lambda ids: folder.tokenizer.decode(ids, skip_special_tokens=True),
            candidates=1,
            slots=config.slots,
            refill=config.refill,
            path=pathlib.Path(scratch) / "responses.jsonl",
            label=f"responses of the {name}",
        )
    texts = [texts[0] for texts in candidates.texts_PC]
    return Side(texts, rewards.lengths(candidates)[:, 0], candidates.finished_PC[:, 0], folder, candidates)


def read_responses(path: pathlib.Path, prompts: Sequence[Prompt], limit: int) -> Side:
    """What `sera_jax.generate` wrote, one response a prompt.

    Args:
        prompts: that it must have been written for. limit: lines of the file that count (0 = all).

    Raises:
        ValueError: a line of another form, or ids or prompts that differ.
    """
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if limit and len(found) == limit:
                break
            found.append(_response(line, f"{path}, line {number}"))
    if len(found) != len(prompts):
        raise ValueError(
            f"{path} holds responses to {len(found)} prompts, expected the {len(prompts)} of evaluate.prompts. Write "
            "it with sera_jax.generate from the same files and the same limit."
        )
    for number, (prompt, row) in enumerate(zip(prompts, found), start=1):
        if row["id"] != prompt.id or row["prompt"] != json.loads(json.dumps(prompt.prompt)):
            what = "id" if row["id"] != prompt.id else "prompt"
            raise ValueError(
                f"{path}, line {number}: {what} is {_short(row[what])}, expected {_short(getattr(prompt, what))} of "
                "evaluate.prompts. Write it with sera_jax.generate from the same files in the same order."
            )
    one = lambda key: [row[key][0] for row in found]
    return Side(one("responses"), np.array(one("lengths")), np.array(one("finished"), bool))


def _response(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    keys = ("id", "prompt", "responses", "finished", "lengths")
    if not isinstance(row, dict) or any(key not in row for key in keys):
        raise ValueError(
            f"{where}: {_short(line.strip())} is no object with {', '.join(keys)}, as sera_jax.generate writes."
        )
    counts = {key: len(row[key]) if isinstance(row[key], list) else 0 for key in keys[2:]}
    if set(counts.values()) != {1}:
        raise ValueError(
            f"{where}: got {', '.join(f'{n} {key}' for key, n in counts.items())}, expected one response a prompt: "
            "candidates 1 of sera_jax.generate."
        )
    return row


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kl(policy: Side, baseline: Side) -> float | None:
    """Mean log π(y|x) - log π_baseline(y|x) over the policy's own responses; None where it cannot be told."""
    if policy.folder is None or baseline.folder is None or not policies.same_tokens(policy.folder, baseline.folder):
        return None
    trees = rewards.trees(policy.candidates)
    if not trees:
        return None
    plan = score.plan_for(trees, policy.folder.arch, policy.folder.mesh)
    with ledger.scratch() as once:
        logps = [
            policies.folder_logps(folder, trees, ledger=once, plan=plan, label=f"scoring under the {name}")
            for name, folder in (("policy", policy.folder), ("baseline", baseline.folder))
        ]
    return float(np.mean(logps[0] - logps[1], dtype=np.float64))


if __name__ == "__main__":
    main()
