"""Whose feedback? Do annotators, judges, reward models, functions and reward dimensions agree on the same responses?

    python -m sera_jax.agree --files '[responses.jsonl]' [--functions '[sera_jax.rewards:text_length]'] \\
        [--models '[runs/judge/export]'] [--out agreement.json]

Pearson's and Spearman's correlation of every two, pooled over all responses and within the responses to one prompt,
with 95 % intervals over prompts. The files are those of `data.evaluations`: what `sera_jax.generate` wrote with scores
beside it, UltraFeedback with its dimensions, verdicts of several annotators, preference pairs.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from sera_jax import config as configs
from sera_jax import correlation, data, disk, ledger, metrics, policies, processes, programs, rewards, selection
from sera_jax import mesh as meshes
from sera_jax.config import AgreeConfig, ConfigError
from sera_jax.correlation import Agreement
from sera_jax.data import Evaluated
from sera_jax.records import Prompt, Tree


def main(args: list[str] | None = None) -> None:
    """Reads the config and prints the tables; an error of the user's ends with one line."""
    try:
        programs.compilation_cache()
        config = configs.parse(AgreeConfig, args)
        processes.join(config.mesh.distributed)
        agree(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


def agree(config: AgreeConfig) -> dict[str, Any]:
    """Asks the functions and models, and correlates every two evaluators.

    Returns:
        what `config.out` holds: responses, prompts, evaluators (name → mean, std, responses), and pairs: one record for
        every two, with one, other, responses, prompts, and for pearson, spearman, pearson_within and spearman_within
        value, low and high (None where one of the two does not vary).

    Raises:
        ValueError: files that cannot be read; fewer than two evaluators; a function or model that cannot be used.
    """
    if not config.files:
        raise ConfigError("files is empty, expected at least one file of judged responses.")
    rows = processes.agreed(
        lambda: data.load_evaluated(config.files, limit=config.limit, progress=_progress),
        lambda read: configs.dump(config) + repr(read),
        "config and files",
    )
    scores = columns(rows, config.scores)
    for spec in config.functions:
        scores[spec] = _asked(spec, rows)
    for path in config.models:
        scores[path] = _modelled(config, path, rows)
    if len(scores) < 2:
        raise ValueError(
            f"got {len(scores)} evaluators ({', '.join(scores) or 'none'}), expected two or more: scores in the files, "
            "functions or models."
        )
    group_N = np.repeat(np.arange(len(rows)), [len(row.responses) for row in rows])
    place: dict[str, int] = {}
    # Rows without a prompt have nothing in common.
    prompt_R = [place.setdefault(selection.shown(row.prompt) or f"row {i}", len(place)) for i, row in enumerate(rows)]
    found = {
        (one, other): correlation.agreement(
            scores[one],
            scores[other],
            group_N=group_N,
            prompt_N=np.array(prompt_R)[group_N],
            resamples=config.resamples,
            seed=config.seed,
        )
        for one, other in itertools.combinations(scores, 2)
    }
    result = {
        "responses": len(group_N),
        "prompts": len(place),
        "evaluators": {name: _of_scores(values_N) for name, values_N in scores.items()},
        "pairs": [{"one": one, "other": other, **_record(told)} for (one, other), told in found.items()],
    }
    _show(result, found)
    if config.out:
        processes.once(lambda: _write(pathlib.Path(config.out), result))
    return result


def columns(rows: Sequence[Evaluated], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """float64 [N] by name: the scores of the files, NaN where a response has none.

    Args:
        wanted: names, in their order; empty = all, in the order in which they appear.

    Raises:
        ValueError: a name that no row has.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"scores: no row has {missing[0]!r}, expected one of {', '.join(map(repr, names)) or 'none'}.")

    def of(row: Evaluated, name: str) -> list[float]:
        values = row.scores.get(name, (None,) * len(row.responses))
        return [np.nan if value is None else value for value in values]

    return {name: np.array([v for row in rows for v in of(row, name)], np.float64) for name in wanted or names}


def _asked(spec: str, rows: Sequence[Evaluated]) -> np.ndarray:
    """float64 [N]: rewards of a function."""
    if ":" not in spec:
        raise ConfigError(f"functions names {spec!r}, expected 'module:function'.")
    texts = [[selection.shown(text) for text in row.responses] for row in rows]
    rewards_PC = rewards.by_function(rewards.load_function(spec), [row.prompt for row in rows], texts, f"asking {spec}")
    return np.concatenate([rewards_PC[p, : len(row)] for p, row in enumerate(texts)]).astype(np.float64)


def _modelled(config: AgreeConfig, path: str, rows: Sequence[Evaluated]) -> np.ndarray:
    """float64 [N]: rewards of a reward model, NaN for what is too long for config.max_length."""
    with programs.precision(config.compute):
        mesh = meshes.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
        folder = policies.open_reward_model(path, mesh, compute=config.compute)
        prompts = [Prompt(str(i), row.prompt) for i, row in enumerate(rows)]
        cut = {"max_prompt_length": config.max_length, "truncation": "keep_end"}
        trees = {tree.id: tree for tree in data.tokenise_prompts(prompts, folder.tokenizer, **cut)[0]}
        texts = [[selection.shown(text) for text in row.responses] for row in rows]
        ids_PC = data.tokenise_responses([row.prompt for row in rows], texts, folder.tokenizer, folder.eos_ids)
        values, wanted, where = np.full(sum(map(len, texts)), np.nan), [], []
        for p, ids_C in enumerate(ids_PC):
            tree, first = trees.get(str(p)), sum(map(len, texts[:p]))
            fits = [c for c, ids in enumerate(ids_C) if tree and 0 < len(ids) <= config.max_length - len(tree.prompt)]
            if fits:
                wanted.append(Tree(str(p), tree.prompt, tuple(ids_C[c] for c in fits)))
                where += [first + c for c in fits]
        if wanted:
            with ledger.scratch() as once:
                values[where] = policies.folder_rewards(folder, wanted, ledger=once, label=f"asking {path}")
    return values


def _progress(items: Any, total: int | None, label: str) -> Any:
    return metrics.track(items, total=total, label=label, unit="rows")


def _of_scores(values_N: np.ndarray) -> dict[str, Any]:
    there = values_N[np.isfinite(values_N)]
    told = lambda value: float(value) if len(there) else None
    return {"responses": len(there), "mean": told(there.mean() if len(there) else 0), "std": told(np.std(there))}


def _record(found: Agreement) -> dict[str, Any]:
    plain = dataclasses.asdict(found)
    none = lambda value: correlation.told(value) if isinstance(value, float) else value
    return {
        key: {k: none(v) for k, v in value.items()} if isinstance(value, dict) else value
        for key, value in plain.items()
    }


def _show(result: dict[str, Any], found: dict[tuple[str, str], Agreement]) -> None:
    shown = lambda told: f"{told.value:.3f} [{told.low:.3f}, {told.high:.3f}]"
    measures = ("pearson", "spearman", "pearson_within", "spearman_within")
    of = lambda told: [shown(estimate) for estimate in (getattr(told, measure) for measure in measures)]
    metrics.table(
        f"{result['responses']} responses to {result['prompts']} prompts; 95 % intervals over prompts",
        ["one", "other", "responses", "Pearson", "Spearman", "Pearson within", "Spearman within"],
        [[one, other, told.responses, *of(told)] for (one, other), told in found.items()],
    )


def _write(path: pathlib.Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.whole(path) as beside:
        beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
