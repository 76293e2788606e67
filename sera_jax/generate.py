"""Prompts in, responses (or C candidates each) out as JSONL: for people, judges, annotation and the toy world.

    python -m sera_jax.generate --model.path FOLDER --prompts '[prompts.jsonl]' --out OUT.jsonl [--candidates 4 ...]

Best of n: --best_by my_module:reward, or the folder of a reward model, keeps each prompt's best candidate alone.

OUT has one line a prompt, in the order of the prompts: {"id", "prompt", "responses", "finished", "lengths"}. It
appears, whole, when the last response is there. Until then OUT.partial/ holds what is sampled so far and what was asked
for, and the same command goes on from it. A response depends on seed, prompt and candidate number alone.
"""

import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sera_jax import (
    bootstrap,
    data,
    disk,
    ledger,
    metrics,
    policies,
    policy_gradient,
    processes,
    programs,
    rewards,
    sample,
)
from sera_jax import config as configs
from sera_jax import mesh as meshes
from sera_jax.config import ConfigError, GenerateConfig
from sera_jax.policies import Folder
from sera_jax.records import Candidates, Prompt

SAMPLING = ("candidates", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "seed")


def main(args: list[str] | None = None) -> None:
    """Reads the config and writes the responses; an error of the user's ends with one line."""
    try:
        programs.compilation_cache()
        config = configs.parse(GenerateConfig, args)
        processes.join(config.mesh.distributed)
        generate(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


def generate(config: GenerateConfig) -> pathlib.Path:
    """Samples what `config.out` or its partial folder does not hold yet.

    Returns:
        the complete file.

    Raises:
        ValueError: the file exists; the partial folder belongs to another request; prompts or model cannot be used.
    """
    out = pathlib.Path(config.out)
    if processes.once(out.exists):
        raise ValueError(f"{out} exists, expected a new file. Remove it, or choose another `out`.")
    if config.slots < config.candidates:
        raise ConfigError(
            f"slots is {config.slots}, expected at least candidates ({config.candidates}): the candidates of a prompt "
            "are decoded side by side."
        )
    if config.best_by and config.candidates < 2:
        raise ConfigError(
            f"best_by is {config.best_by!r} with candidates {config.candidates}, expected at least 2 to choose from."
        )
    with programs.precision(config.model.compute):
        mesh = meshes.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
        folder, prompts, tokens = processes.agreed(
            lambda: _read(config, mesh),
            lambda read: configs.dump(config) + json.dumps(_request(config, read[0], read[2])),
            "config, model and prompts",
        )
        rank = _ranker(config, folder, mesh) if config.best_by else None
        partial = out.with_name(out.name + ".partial")
        processes.once(lambda: _claim(partial, _request(config, folder, tokens)))
        run, spent = _timed(
            policies.folder_sampler(
                folder,
                sample.seeded(config.seed),
                candidates=config.candidates,
                max_new_tokens=config.max_new_tokens,
                slots=config.slots,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
            )
        )
        candidates = bootstrap.sample_candidates(
            run,
            prompts,
            tokens,
            lambda ids: folder.tokenizer.decode(ids, skip_special_tokens=True),
            candidates=config.candidates,
            slots=config.slots,
            refill=config.refill,
            path=partial / "candidates.jsonl",
            label=f"sampling {config.candidates} × {len(prompts)} responses",
        )
        if rank is not None:
            best_P = policy_gradient.best(rank(prompts, candidates))
            candidates = bootstrap.picked(candidates, best_P)
    processes.once(lambda: _finish(out, partial, prompts, candidates))
    rate = f", {spent['tokens'] / spent['seconds']:.0f} tokens/s" if spent["seconds"] else ""
    metrics.say(
        f"{out}: {len(prompts)} prompts, {candidates.finished_PC.size} responses, "
        f"mean length {rewards.lengths(candidates).mean():.1f} tokens, "
        f"{100 * candidates.finished_PC.mean():.1f} % finished{rate}"
    )
    return out


def _read(config: GenerateConfig, mesh: Mesh) -> tuple[Folder, list[Prompt], list[np.ndarray]]:
    folder = policies.open_folder(
        config.model.path,
        mesh,
        compute=config.model.compute,
        attention=config.model.attention,
        seed=config.seed if config.model.weights == "random" else None,
    )
    return folder, *_prompts(config, folder)


def _prompts(config: GenerateConfig, folder: Folder) -> tuple[list[Prompt], list[np.ndarray]]:
    """The prompts that can be sampled from, and their ids; says which cannot."""
    prompts, report = data.load_prompts(config.prompts, limit=config.limit)
    trees, counts = data.tokenise_prompts(prompts, folder.tokenizer, max_prompt_length=config.max_prompt_length)
    for line in (*report.lines(), *counts.lines()):
        metrics.say(line)
    by_id = {prompt.id: prompt for prompt in prompts}
    return [by_id[tree.id] for tree in trees], [tree.prompt for tree in trees]


def _ranker(config: GenerateConfig, folder: Folder, mesh: Mesh) -> Callable[[Sequence[Prompt], Candidates], np.ndarray]:
    """(prompts, candidates) → rewards [P, C] of `best_by`.

    Raises:
        ValueError: neither folder of a reward model nor function; a reward model of other tokens.
    """
    if not pathlib.Path(config.best_by).is_dir():
        function = rewards.load_function(config.best_by)
        texts = lambda prompts: [prompt.prompt for prompt in prompts]
        return lambda prompts, made: rewards.by_function(function, texts(prompts), made.texts_PC, "ranking candidates")
    compute = {"compute": config.model.compute, "attention": config.model.attention}
    model = policies.open_reward_model(config.best_by, mesh, **compute)
    if not policies.same_tokens(model, folder):
        raise ValueError(
            f"best_by: the tokeniser of {config.best_by} differs from that of model.path {config.model.path}, expected "
            "the same vocabulary and EOS ids: it is given the sampled ids."
        )

    def rank(prompts: Sequence[Prompt], made: Candidates) -> np.ndarray:
        with ledger.scratch() as once:
            told = {"ledger": once, "label": "rewards of the reward model"}
            return rewards.on_grid(policies.folder_rewards(model, rewards.trees(made), **told), made)

    return rank


def _request(config: GenerateConfig, folder: Folder, tokens: list[np.ndarray]) -> dict[str, Any]:
    """All that the responses depend on. Not the slots and the mesh: they round otherwise, but ask for the same."""
    content = ledger.derived_tag(*(ledger.branch_key(ids, ()).hex() for ids in tokens))
    return {
        "model": folder.tag,
        "prompts": content,
        "eos_ids": list(folder.eos_ids),
        **{key: getattr(config, key) for key in SAMPLING},
    }


def _claim(partial: pathlib.Path, request: dict[str, Any]) -> None:
    """Opens the partial folder: a new one, or that of the same request."""
    path = partial / "request.json"
    if not path.is_file():
        partial.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(request, indent=1) + "\n")
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    differing = [f"{k} ({stored.get(k)!r} → {v!r})" for k, v in request.items() if stored.get(k) != v]
    if differing:
        raise ValueError(
            f"{partial} was begun by another request, expected the same one; it differs in {', '.join(differing)}. "
            "Remove the folder to begin anew, or choose another `out`."
        )


def _timed(run: Callable) -> tuple[Callable, dict[str, float]]:
    """The sampler, and what it is doing: tokens sampled by this process, and the seconds that it took (compilation
    included)."""
    spent = {"tokens": 0, "seconds": 0.0}

    def timed(*prompts: Any) -> tuple[np.ndarray, np.ndarray]:
        began = time.monotonic()
        tokens_PCT, finished_PC = run(*prompts)
        spent["seconds"] += time.monotonic() - began
        spent["tokens"] += int((tokens_PCT >= 0).sum())
        return tokens_PCT, finished_PC

    return timed, spent


def _finish(out: pathlib.Path, partial: pathlib.Path, prompts: list[Prompt], candidates: Candidates) -> None:
    """The partial folder becomes the file."""
    lines = [
        json.dumps(
            {
                "id": prompt.id,
                "prompt": prompt.prompt,
                "responses": list(texts),
                "finished": finished.tolist(),
                "lengths": lengths.tolist(),
            },
            ensure_ascii=False,
        )
        + "\n"
        for prompt, texts, finished, lengths in zip(
            prompts, candidates.texts_PC, candidates.finished_PC, rewards.lengths(candidates)
        )
    ]
    _write(out, "".join(lines))
    shutil.rmtree(partial)


def _write(path: pathlib.Path, text: str) -> None:
    """Atomically, and on the disk when it returns."""
    with disk.whole(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="surrogatepass")


if __name__ == "__main__":
    main()
