"""A Bradley-Terry reward model: preference pairs in, a checkpoint of transformers with a scalar head out.

    python -m sera_jax.reward_model --config configs/reward_hh.yaml --model.path FOLDER --data.pairs '[prefs.jsonl]'

The run folder is that of `sera_jax.train` without iterations: config.yaml, metrics.jsonl, checkpoints/, export/ (a
…ForSequenceClassification with one label, which `reward.model` takes, too), and result.json with what the held-out
pairs say. The reward of a response is read at its last token.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sera_jax import calibration, data, disk, hf, losses, metrics, policies, processes, programs, sample, score
from sera_jax import config as configs
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax import run as runs
from sera_jax.calibration import Calibration
from sera_jax.config import RewardModelConfig
from sera_jax.ledger import branch_key, derived_tag
from sera_jax.policies import Folder
from sera_jax.records import Pair, Tree
from sera_jax.rows import Plan
from sera_jax.run import Run, Stage, Validation
from sera_jax.train import world as worlds


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs as they are trained or measured on: trees of two branches; score_N2 float32, the annotator's, 0 where none
    are needed; weight_N float32."""

    trees: tuple[Tree, ...]
    score_N2: np.ndarray
    weight_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a process reads. padding: an id for transformers, which looks for the last token that is not padding.
    content: hash of what is behind the config's paths."""

    start: Folder
    pairs: Pairs
    held_out: Pairs
    padding: int
    content: str


def main(args: list[str] | None = None) -> None:
    """Reads the config and trains; an error of the user's ends with one line."""
    try:
        config = configs.parse(RewardModelConfig, args)
        processes.join(config.mesh.distributed)
        train(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


def train(config: RewardModelConfig) -> pathlib.Path:
    """One run, from wherever its folder stands to the export.

    Returns:
        the exported Hugging Face folder.

    Raises:
        ValueError: of config, files, data or run folder, before any update; of a disk that takes no more.
    """
    programs.compilation_cache(config.run.compilation_cache)
    with programs.precision(config.model.compute):
        mesh = meshes.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
        opened = processes.agreed(
            lambda: _opened(config, mesh),
            lambda opened: configs.dump(config) + opened.content,
            "config, model and data",
        )
        run = runs.open_run(
            configs.dump(config),
            content=opened.content,
            fingerprint=worlds.fingerprint(config, opened.content),
            resume=config.run.resume,
            keep=config.run.keep_checkpoints,
            save_every=config.run.save_every,
            log_every=config.run.log_every,
            tensorboard=config.run.tensorboard,
            wandb_project=config.run.wandb,
        )
        with runs.closing(run):
            return _trained(config, mesh, opened, run)


def _trained(config: RewardModelConfig, mesh: Mesh, opened: Opened, run: Run) -> pathlib.Path:
    start, pairs, optimizer = opened.start, opened.pairs, config.optimizer
    metrics.say(
        f"{start.arch.family.removesuffix('ForCausalLM')} with a scalar head, compute {config.model.compute}, mesh "
        f"{'×'.join(f'{axis} {n}' for axis, n in mesh.shape.items())}; {len(pairs.trees)} pairs, "
        f"{len(opened.held_out.trees)} held out; run folder {run.path}"
    )
    transform, keys = worlds.adam(optimizer, start.arch), _loss_keys(config)
    if run.at is None:
        state = programs.fresh_state(start.arch, mesh, transform, optimizer.moments)(start.load())
    else:
        like = programs.abstract_state(start.arch, mesh, transform, optimizer.moments)
        state = run.checkpoints.restore(run.at.count, like)
    measure = _measured(config, mesh, opened)
    every = config.validate_every
    state, _ = runs.run_stage(
        run,
        Stage(
            name="reward",
            iteration=0,
            batches=[
                batch
                for epoch in range(config.epochs)
                for batch in data.batches(
                    len(pairs.trees), optimizer.batch_size, seed=config.run.seed, iteration=0, epoch=epoch
                )
            ],
            trees=pairs.trees,
            reference_F=pairs.score_N2.reshape(-1),
            weight_N=pairs.weight_N,
            plans=worlds.update_plans(rowlib.measure(pairs.trees), optimizer, start.arch, mesh),
        ),
        state,
        programs.reward_update(
            start.arch,
            mesh,
            start.compute,
            transform,
            keys,
            worlds.schedule(optimizer),
            moments=optimizer.moments,
        ),
        at=run.at,
        count=0,
        key=sample.seeded(config.run.seed),
        mesh=mesh,
        frozen={},
        validation=Validation(every, lambda params: measure(params)[0]) if every else None,
    )
    return _finish(config, opened, run, state.params, measure)


def _loss_keys(config: RewardModelConfig) -> dict[str, float]:
    """Keywords of losses.bradley_terry."""
    loss = config.reward_loss
    return {"margin": loss.margin, "center": loss.center, "length_alpha": loss.length_alpha}


# --- files ------------------------------------------------------------------------------------------------------------


def _opened(config: RewardModelConfig, mesh: Mesh) -> Opened:
    model = config.model
    folder = policies.open_folder(
        model.path,
        mesh,
        compute=model.compute,
        remat=model.remat,
        attention=model.attention,
        chat_template=config.data.chat_template,
        seed=config.run.seed if model.weights == "random" else None,
        read=hf.read_any_arch,
    )
    start = folder if folder.arch.scored else policies.with_score(folder, config.run.seed)
    padding = data.padding_id(start.tokenizer, start.eos_ids)
    given, report = data.load_pairs(
        config.data.pairs,
        format=config.data.format,
        split=config.data.split,
        subset=config.data.subset,
        ranked=config.data.ranked,
        seed=config.run.seed,
        limit=config.data.limit,
        progress=worlds.progress,
    )
    for line in report.lines():
        metrics.say(line)
    sides = data.split_validation(given, config.data.validation, config.run.seed)
    pairs, held_out = (_tokenised(config, side, start) for side in sides)
    if not pairs.trees:
        raise ValueError(
            "no pair is left after tokenising; expected at least one. See the counts above for the reasons."
        )
    told = [
        repr((tree.id, branch_key(tree.prompt, branch).hex(), float(value), float(weight)))
        for some in (pairs, held_out)
        for tree, score_2, weight in zip(some.trees, some.score_N2, some.weight_N)
        for branch, value in zip(tree.branches, score_2)
    ]
    return Opened(start, pairs, held_out, padding, derived_tag(start.tag, *told))


def _tokenised(config: RewardModelConfig, pairs: Sequence[Pair], start: Folder) -> Pairs:
    """Raises ValueError, naming the first pair without, where the margin needs scores that are missing."""
    lacking = [pair.id for pair in pairs if pair.scores is None]
    if lacking and config.reward_loss.margin:
        raise ValueError(
            f"reward_loss.margin {config.reward_loss.margin:g} needs the annotator's scores, but {len(lacking)} of "
            f"{len(pairs)} pairs have none, the first {lacking[0]!r}. Give score_chosen and score_rejected, or set it "
            "to 0."
        )
    trees: Sequence[Tree] = ()
    if pairs:
        trees, counts = data.tokenise_pairs(pairs, start.tokenizer, start.eos_ids, **worlds.cutting(config))
        for line in counts.lines():
            metrics.say(line)
    scores = {pair.id: pair.scores or (0.0, 0.0) for pair in pairs}
    return Pairs(
        trees=tuple(trees),
        score_N2=np.array([scores[tree.id] for tree in trees], np.float32).reshape(-1, 2),
        weight_N=np.array([tree.weight for tree in trees], np.float32),
    )


# --- what the held-out pairs say --------------------------------------------------------------------------------------


def _measured(
    config: RewardModelConfig, mesh: Mesh, opened: Opened
) -> Callable[[Any], tuple[dict[str, float], Calibration]]:
    """params → (numbers of the held-out pairs, {} without any; their calibration)."""
    arch, held_out = opened.start.arch, opened.held_out
    trees, keys = held_out.trees, _loss_keys(config)
    scorer = programs.reward_scorer(arch, mesh, opened.start.compute)
    length_N2 = np.array([[len(b) for b in tree.branches] for tree in trees], np.float32).reshape(-1, 2)
    plan: Plan | None = score.plan_for(trees, arch, mesh) if trees else None

    def measure(params: Any) -> tuple[dict[str, float], Calibration]:
        run = programs.score_rows(scorer, params, mesh)
        chunks = [trees[i : i + score.CHUNK] for i in range(0, len(trees), score.CHUNK)]
        flat = [score.logps(chunk, run, plan) for chunk in chunks] or [np.zeros(0, np.float32)]
        reward_N2 = np.concatenate(flat).reshape(-1, 2)
        margin_N = reward_N2[:, 0] - reward_N2[:, 1]
        calibrated = calibration.calibration(margin_N)
        if not trees:
            return {}, calibrated
        loss_N = losses.bradley_terry(*map(jnp.asarray, (reward_N2, length_N2, held_out.score_N2)), **keys)
        weight_N = held_out.weight_N.astype(np.float64)
        longer_N = (np.sign(length_N2[:, 0] - length_N2[:, 1]) + 1) / 2
        return {
            "validation/loss": float(np.sum(weight_N * np.asarray(loss_N)) / max(weight_N.sum(), 1e-30)),
            "validation/accuracy": float((margin_N > 0).mean()),
            "validation/longer": float(longer_N.mean()),
            "validation/margin": float(margin_N.mean()),
            "validation/reward": float(reward_N2.mean()),
            "validation/calibration_error": calibrated.error,
        }, calibrated

    return measure


def _finish(
    config: RewardModelConfig, opened: Opened, run: Run, params: Any, measure: Callable[[Any], tuple[Any, Calibration]]
) -> pathlib.Path:
    """Measures, exports, says what came out."""
    found, calibrated = measure(params)
    found = processes.once(lambda: found)
    bins = [
        {"from": low, "to": high, "pairs": int(count), "confidence": confidence, "accuracy": accuracy}
        for low, high, count, confidence, accuracy in zip(
            calibrated.edges_K1[:-1].tolist(),
            calibrated.edges_K1[1:].tolist(),
            calibrated.count_K,
            calibrated.confidence_K.tolist(),
            calibrated.accuracy_K.tolist(),
        )
        if count
    ]
    if found:
        run.metrics.write({"stage": "validation", "iteration": 0, "step": 0, **found})
        metrics.table("held-out pairs", ["measure", "value"], [[key, value] for key, value in found.items()])
        metrics.table(
            "calibration: how sure of the response that it prefers, and how often that is the annotator's",
            ["from", "to", "pairs", "confidence", "accuracy"],
            [list(one.values()) for one in bins],
        )
    tokenizer, padding = opened.start.tokenizer, opened.padding
    facts = [
        f"A reward model, trained with sera_jax from `{config.model.path}`: one logit, the reward of the text's last "
        f"token (EOS). Texts of a batch are filled up with `{tokenizer.convert_ids_to_tokens(padding)}`.",
        *(f"- {key}: {value}" for key, value in found.items()),
    ]
    export = hf.save(
        run.path / "export",
        opened.start.arch,
        params,
        source=config.model.path,
        dtype=jnp.float32,
        card=facts,
        extra={"pad_token_id": padding},
        tokenizer={"pad_token": tokenizer.convert_ids_to_tokens(padding)},
    )
    if config.data.chat_template != "auto":
        template = pathlib.Path(config.data.chat_template).expanduser()
        processes.once(lambda: str(shutil.copyfile(template, export / "chat_template.jinja")))
    text = json.dumps({**found, "calibration": bins}, indent=1) + "\n"
    processes.once(lambda: _write(run.path / "result.json", text))
    metrics.say(f"exported: {export}")
    return export


def _write(path: pathlib.Path, text: str) -> None:
    with disk.whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
