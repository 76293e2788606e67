"""A model of preferences, to rank by: preference pairs in, a checkpoint of transformers out.

    python -m sera_jax.reward_model --config configs/reward_hh.yaml --model.path FOLDER --data.pairs '[prefs.jsonl]'

Of one of three kinds (KINDS). bradley_terry: a reward of each response, from a scalar head at its last token.
preference and preference_head: which of two responses is better, read together (`sera_jax.preference`), from a policy's
label token or from a scalar head.

The run folder is that of `sera_jax.train` without iterations: config.yaml, metrics.jsonl, checkpoints/, export/ (with a
scalar head a …ForSequenceClassification with one label, else a policy; `reward.model` takes either), and result.json
with what the held-out pairs say.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sera_jax import (
    calibration,
    data,
    disk,
    hf,
    losses,
    metrics,
    model,
    policies,
    preference,
    processes,
    programs,
    sample,
    score,
)
from sera_jax import config as configs
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax import run as runs
from sera_jax.calibration import Calibration
from sera_jax.config import RewardModelConfig
from sera_jax.ledger import branch_key, derived_tag
from sera_jax.model import Arch
from sera_jax.policies import Folder
from sera_jax.preference import Form
from sera_jax.programs import Compute
from sera_jax.records import Pair, Tree
from sera_jax.rows import Plan
from sera_jax.run import Run, Stage, Validation
from sera_jax.train import world as worlds


@dataclasses.dataclass(frozen=True)
class Examples:
    """What is trained or measured on, float32. trees: of N examples, or of several a pair (`Kind.measured`).
    score_F: by flat branch number, the annotator's, 0 where none are needed; weight_N: of the pairs that are measured
    on, or of the trees that are trained on; length_N2: response tokens of the pairs (chosen, rejected)."""

    trees: tuple[Tree, ...]
    score_F: np.ndarray
    weight_N: np.ndarray
    length_N2: np.ndarray


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a process reads. form: how a preference model is asked, None of bradley_terry. padding: an id for
    transformers, which looks for the last token that is not padding; None without scalar head. content: hash of what is
    behind the config's paths."""

    start: Folder
    form: Form | None
    pairs: Examples
    held_out: Examples
    padding: int | None
    content: str


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a kind of model is made of.

    scored: has it a scalar head? examples: (config, form, start, pairs, are they trained on?) → what is trained, or
    measured, on. update: (config, arch, mesh, compute, transform) → the program of an update. scorer: a builder of
    programs, of what `measured` reads. measured: (config, form, its values by flat branch number, held out) →
    log-odds of each pair, float [N], its loss, and more to tell.
    """

    scored: bool
    examples: Callable[[RewardModelConfig, Form | None, Folder, Sequence[Pair], bool], Examples]
    update: Callable[[RewardModelConfig, Arch, Mesh, Compute, optax.GradientTransformation], Callable]
    scorer: Callable[..., Callable]
    measured: Callable[..., tuple[np.ndarray, np.ndarray, dict[str, float]]]


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
        f"{config.kind}: {start.arch.family.removesuffix('ForCausalLM')}{' with a scalar head' * start.arch.scored}, "
        f"compute {config.model.compute}, mesh {'×'.join(f'{axis} {n}' for axis, n in mesh.shape.items())}; "
        f"{len(pairs.trees)} examples, {len(opened.held_out.weight_N)} pairs held out; run folder {run.path}"
    )
    transform = worlds.adam(optimizer, start.arch)
    frozen = start.load() if start.arch.lora else {}
    if run.at is None:
        key = lambda: meshes.put(jax.random.key(config.run.seed), meshes.replicated(mesh))
        params = programs.random_adapters(start.arch, mesh)(key()) if frozen else start.load()
        state = programs.fresh_state(start.arch, mesh, transform, optimizer.moments)(params)
    else:
        like = programs.abstract_state(start.arch, mesh, transform, optimizer.moments)
        state = run.checkpoints.restore(run.at.count, like)
    of_whole = _measured(config, mesh, opened)
    measure = lambda trained: of_whole(model.join(start.arch, trained, frozen))
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
            reference_F=pairs.score_F,
            weight_N=pairs.weight_N,
            plans=worlds.update_plans(rowlib.measure(pairs.trees), optimizer, start.arch, mesh),
        ),
        state,
        KINDS[config.kind].update(config, start.arch, mesh, start.compute, transform),
        at=run.at,
        count=0,
        key=sample.seeded(config.run.seed),
        mesh=mesh,
        frozen=frozen,
        validation=Validation(every, lambda trained: measure(trained)[0]) if every else None,
    )
    return _finish(config, opened, run, model.join(start.arch, state.params, frozen), of_whole)


# --- files ------------------------------------------------------------------------------------------------------------


def _opened(config: RewardModelConfig, mesh: Mesh) -> Opened:
    asked, kind = config.model, KINDS[config.kind]
    folder = policies.open_folder(
        asked.path,
        mesh,
        compute=asked.compute,
        remat=asked.remat,
        attention=asked.attention,
        chat_template=config.data.chat_template,
        seed=config.run.seed if asked.weights == "random" else None,
        lora=worlds.lora_of(config),
        read=hf.read_any_arch if kind.scored else hf.read_arch,
    )
    start = policies.with_score(folder, config.run.seed) if kind.scored and not folder.arch.scored else folder
    padding = data.padding_id(start.tokenizer, start.eos_ids) if kind.scored else None
    form = form_of(config)
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
    pairs, held_out = (
        kind.examples(config, form, start, side, trains)
        if side
        else Examples((), *[np.zeros(0, np.float32)] * 2, _pairs([]))
        for side, trains in zip(sides, (True, False))
    )
    if not pairs.trees:
        raise ValueError(
            "no pair is left after tokenising; expected at least one. See the counts above for the reasons."
        )
    told = [
        repr((tree.id, branch_key(tree.prompt, branch).hex()))
        for some in (pairs, held_out)
        for tree in some.trees
        for branch in tree.branches
    ]
    told += [repr((some.score_F.tolist(), some.weight_N.tolist())) for some in (pairs, held_out)]
    return Opened(start, form, pairs, held_out, padding, derived_tag(start.tag, *told))


def form_of(config: RewardModelConfig) -> Form | None:
    """How the preference model that trains is asked, None of bradley_terry."""
    if config.kind == "bradley_terry":
        return None
    return Form(
        head=KINDS[config.kind].scored,
        labels=config.preference.labels,
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
        truncation=config.data.truncation,
    )


def _pairs(values: Sequence[tuple[float, float]]) -> np.ndarray:
    """float32 [N, 2]."""
    return np.array(values, np.float32).reshape(-1, 2)


# --- kinds ------------------------------------------------------------------------------------------------------------


def _responses(
    config: RewardModelConfig, form: Form | None, start: Folder, pairs: Sequence[Pair], trains: bool
) -> Examples:
    """Trees of two branches, (chosen, rejected).

    Raises:
        ValueError: the margin needs scores that are missing; names the first pair without.
    """
    lacking = [pair.id for pair in pairs if pair.scores is None]
    if lacking and config.reward_loss.margin:
        raise ValueError(
            f"reward_loss.margin {config.reward_loss.margin:g} needs the annotator's scores, but {len(lacking)} of "
            f"{len(pairs)} pairs have none, the first {lacking[0]!r}. Give score_chosen and score_rejected, or set it "
            "to 0."
        )
    trees, counts = data.tokenise_pairs(pairs, start.tokenizer, start.eos_ids, **worlds.cutting(config))
    for line in counts.lines():
        metrics.say(line)
    scores = {pair.id: pair.scores or (0.0, 0.0) for pair in pairs}
    return Examples(
        trees=tuple(trees),
        score_F=_pairs([scores[tree.id] for tree in trees]).reshape(-1),
        weight_N=np.array([tree.weight for tree in trees], np.float32),
        length_N2=_pairs([[len(branch) for branch in tree.branches] for tree in trees]),
    )


def _questions(config: RewardModelConfig, form: Form, start: Folder, pairs: Sequence[Pair], trains: bool) -> Examples:
    """Trees of questions about (chosen, rejected), as they are trained on or, in both orders, asked."""
    found = preference.questions(form, start.tokenizer, [(p.prompt, p.chosen, p.rejected) for p in pairs])
    names = [pair.id for pair in pairs]
    if trains:
        both = config.preference.orders == "both"
        trees = preference.to_train(form, start.tokenizer, names, found, seed=config.run.seed, both=both)
    else:
        trees = preference.to_ask(form, start.tokenizer, names, found)
    flat = tuple(tree for some in trees for tree in some)
    kept = [(pair, some) for pair, some in zip(pairs, trees) if some]
    texts = [preference.answer(response) for pair, _ in kept for response in (pair.chosen, pair.rejected)]
    metrics.say(
        f"{len(kept)} of {len(pairs)} pairs as questions, the longest tree of "
        f"{max((tree.length for tree in flat), default=0)} tokens; {found.cut} cut to data.max_length, "
        f"{len(pairs) - len(kept)} that do not fit"
    )
    return Examples(
        trees=flat,
        score_F=np.zeros(sum(len(tree.branches) for tree in flat), np.float32),
        weight_N=np.array([pair.weight for pair, some in kept for _ in (some if trains else [0])], np.float32),
        length_N2=_pairs([len(ids) for ids in data.encoded(start.tokenizer, texts)]),
    )


def _scalar_update(
    config: RewardModelConfig, arch: Arch, mesh: Mesh, compute: Compute, transform: optax.GradientTransformation
) -> Callable:
    return programs.reward_update(
        arch,
        mesh,
        compute,
        transform,
        _loss_keys(config),
        worlds.schedule(config.optimizer),
        scale=1.0 if config.kind == "bradley_terry" else 0.5,
        moments=config.optimizer.moments,
    )


def _label_update(
    config: RewardModelConfig, arch: Arch, mesh: Mesh, compute: Compute, transform: optax.GradientTransformation
) -> Callable:
    return programs.sft_update(
        arch,
        mesh,
        compute,
        transform,
        worlds.schedule(config.optimizer),
        weighted=True,
        moments=config.optimizer.moments,
    )


def _loss_keys(config: RewardModelConfig) -> dict[str, float]:
    """Keywords of losses.bradley_terry."""
    loss = config.reward_loss
    return {"margin": loss.margin, "center": loss.center, "length_alpha": loss.length_alpha}


def _of_rewards(
    config: RewardModelConfig, form: Form | None, value_F: np.ndarray, held_out: Examples
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    reward_N2, score_N2 = value_F.reshape(-1, 2), held_out.score_F.reshape(-1, 2)
    arrays = map(jnp.asarray, (reward_N2, held_out.length_N2, score_N2))
    loss_N = np.asarray(losses.bradley_terry(*arrays, **_loss_keys(config)))
    return reward_N2[:, 0] - reward_N2[:, 1], loss_N, {"validation/reward": float(reward_N2.mean())}


def _of_answers(
    config: RewardModelConfig, form: Form, value_F: np.ndarray, held_out: Examples
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    margin_N = preference.log_odds(preference.probabilities(form, value_F))
    places = preference.of_places(preference.first_wins(form, value_F))
    told = {key.replace("preference", "validation"): value for key, value in places.items()}
    return margin_N, np.logaddexp(0, -margin_N), told


KINDS: dict[str, Kind] = {
    "bradley_terry": Kind(True, _responses, _scalar_update, programs.reward_scorer, _of_rewards),
    "preference": Kind(False, _questions, _label_update, programs.scorer, _of_answers),
    "preference_head": Kind(True, _questions, _scalar_update, programs.reward_scorer, _of_answers),
}


# --- what the held-out pairs say --------------------------------------------------------------------------------------


def _measured(
    config: RewardModelConfig, mesh: Mesh, opened: Opened
) -> Callable[[Any], tuple[dict[str, float], Calibration]]:
    """params → (numbers of the held-out pairs, {} without any; their calibration)."""
    arch, held_out, kind = opened.start.arch, opened.held_out, KINDS[config.kind]
    trees = held_out.trees
    scorer = kind.scorer(arch, mesh, opened.start.compute)
    plan: Plan | None = score.plan_for(trees, arch, mesh) if trees else None

    def measure(params: Any) -> tuple[dict[str, float], Calibration]:
        if not trees:
            return {}, calibration.calibration(np.zeros(0))
        run = programs.score_rows(scorer, params, mesh)
        chunks = [trees[i : i + score.CHUNK] for i in range(0, len(trees), score.CHUNK)]
        value_F = np.concatenate([score.logps(chunk, run, plan) for chunk in chunks])
        margin_N, loss_N, more = kind.measured(config, opened.form, value_F, held_out)
        calibrated = calibration.calibration(margin_N)
        weight_N = held_out.weight_N.astype(np.float64)
        longer_N = (np.sign(held_out.length_N2[:, 0] - held_out.length_N2[:, 1]) + 1) / 2
        return {
            "validation/loss": float(np.sum(weight_N * loss_N) / max(weight_N.sum(), 1e-30)),
            "validation/accuracy": float((np.sign(margin_N) + 1).mean() / 2),
            "validation/longer": float(longer_N.mean()),
            "validation/margin": float(margin_N.mean()),
            **more,
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
    extra, beside, facts = _told(config, opened)
    arch = opened.start.arch
    export = hf.save(
        run.path / "export",
        dataclasses.replace(arch, lora=None),
        programs.to_merged(arch, opened.start.mesh)(params) if arch.lora else params,
        source=config.model.path,
        dtype=jnp.float32,
        card=[*facts, *(f"- {key}: {value}" for key, value in found.items())],
        extra=extra,
        tokenizer=beside,
    )
    if config.data.chat_template != "auto":
        template = pathlib.Path(config.data.chat_template).expanduser()
        processes.once(lambda: str(shutil.copyfile(template, export / "chat_template.jinja")))
    text = json.dumps({**found, "calibration": bins}, indent=1) + "\n"
    processes.once(lambda: _write(run.path / "result.json", text))
    metrics.say(f"exported: {export}")
    return export


def _told(config: RewardModelConfig, opened: Opened) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Further keys of the export's config.json and of its tokenizer_config.json, and what its card says."""
    extra, beside = {}, {}
    facts = {
        "bradley_terry": "A reward model: one logit, the reward of the text's last token (EOS).",
        "preference": "A preference model: a question with two responses goes on with the label of the better one.",
        "preference_head": "A preference model: one logit s(a, b) at the end of a question with two responses; P(a is "
        "better than b) = σ(½ [s(a, b) - s(b, a)]).",
    }
    lines = [f"{facts[config.kind]} Trained with sera_jax from `{config.model.path}`."]
    if opened.form is not None:
        extra |= preference.told(opened.form)
        asked = preference.question(opened.form, "{context}", "{first}", "{second}")
        lines.append(
            f"The question, the user's turn where there is a chat template: {json.dumps(asked)}; ask in both orders."
        )
    if opened.padding is not None:
        padding = opened.start.tokenizer.convert_ids_to_tokens(opened.padding)
        extra, beside = {**extra, "pad_token_id": opened.padding}, {"pad_token": padding}
        lines.append(f"Texts of a batch are filled up with `{padding}`.")
    return extra, beside, lines


def _write(path: pathlib.Path, text: str) -> None:
    with disk.whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
