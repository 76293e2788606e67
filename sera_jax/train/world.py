"""What a config becomes before the first update: files read, trees made, programs built; constant afterwards."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from sera_jax import config as configs
from sera_jax import data, losses, metrics, model, policies, programs, rewards, sample, score, sera, step
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax import run as runs
from sera_jax.config import OptimizerConfig, TrainConfig
from sera_jax.ledger import Ledger, branch_key, derived_tag
from sera_jax.losses import Loss
from sera_jax.model import Arch
from sera_jax.policies import Folder, Policies
from sera_jax.records import Pair, Prompt, Tree
from sera_jax.rows import Plan
from sera_jax.run import Run

KEYS = {"sft": 0, "sample": 1, "select": 2, "update": 3, "pairs": 4, "evaluate": 5}  # folded into run.seed


@dataclasses.dataclass(frozen=True)
class Given:
    """Text and trees, one to one: the given pairs (`held_out` only as trees), the prompts to sample from, those to
    evaluate on; the trees of the SFT stage.
    """

    pairs: tuple[Pair, ...]
    trees: tuple[Tree, ...]
    held_out: tuple[Tree, ...]
    prompts: tuple[Prompt, ...]
    prompt_tokens: tuple[np.ndarray, ...]
    sft: tuple[Tree, ...]
    eval_prompts: tuple[Prompt, ...]
    eval_tokens: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class World:
    """What does not change while a run walks."""

    config: TrainConfig
    run: Run
    mesh: Mesh
    given: Given
    policies: Policies
    loss: Loss
    loss_keys: dict[str, Any]
    transform: optax.GradientTransformation
    update: Callable
    select: Callable
    plan: Plan
    score_plan: Plan


def prepare(config: TrainConfig) -> World:
    """Reads everything that can be wrong before the run folder is touched: tokenizer, data, architecture, mesh."""
    mesh = meshes.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    start = policies.open_folder(
        config.model.path,
        mesh,
        compute=config.model.compute,
        remat=config.model.remat,
        head_chunk=config.model.head_chunk,
        chat_template=config.data.chat_template,
        seed=config.run.seed if config.model.weights == "random" else None,
    )
    arch, compute = start.arch, start.compute
    given = load(config, start)
    _check_early(config, given)
    content = _content(given, start)
    run = runs.open_run(
        configs.dump(config),
        content=content,
        resume=config.run.resume,
        keep=config.run.keep_checkpoints,
        save_every=config.run.save_every,
        log_every=config.run.log_every,
        tensorboard=config.run.tensorboard,
        wandb_project=config.run.wandb,
    )
    where = Policies(
        start=start,
        trained_start=config.sft.epochs > 0,
        fingerprint=_fingerprint(config, content),
        iterates=run.path / "iterates",
        ledger=Ledger(config.run.ledger or run.path / "ledger"),
    )
    loss = losses.mixture({config.loss.name: 1.0, **config.loss.mix}, config.loss.sft_weight)
    loss_keys = {"beta": config.loss.beta, **{key: getattr(config.loss, key) for key in loss.keys}}
    transform = adam(config.optimizer, arch)
    lengths_N3 = np.concatenate((rowlib.measure(given.trees), _largest_fresh(config, given)))
    world = World(
        config=config,
        run=run,
        mesh=mesh,
        given=given,
        policies=where,
        loss=loss,
        loss_keys=loss_keys,
        transform=transform,
        select=programs.selector(
            mesh,
            loss,
            loss_keys,
            score_name=config.select.score,
            rule=config.select.rule,
            threshold=config.select.threshold,
        ),
        update=programs.preference_update(arch, mesh, compute, transform, loss, loss_keys, schedule(config.optimizer)),
        plan=update_plan(lengths_N3, config.optimizer, arch, mesh),
        score_plan=score.plan_for([*given.trees, *given.held_out], arch, mesh),
    )
    _describe(world)
    return world


def _check_early(config: TrainConfig, given: Given) -> None:
    """What would else be found after the first iteration: reward functions, scores in the data, ensemble weights.

    Raises:
        ValueError: as the rooms raise it; for scores, naming the key and the first pair without.
    """
    if config.reward.source == "function" and bootstraps(config):
        rewards.load_function(config.reward.function)
    if config.evaluate.prompts:
        rewards.load_function(config.evaluate.function)
    selects = config.loop.iterations >= config.select.from_iteration
    if selects and "gap_N" in sera.needs(config.select.score):
        lacking = [pair.id for pair in given.pairs if pair.scores is None]
        if lacking:
            raise ValueError(
                f"select.score {config.select.score!r} needs the annotator's scores, but {len(lacking)} of "
                f"{len(given.pairs)} pairs have none, the first {lacking[0]!r}. Give score_chosen and score_rejected, "
                "or use another score."
            )
    for t in range(1, config.loop.iterations):
        sera.ensemble_weights(t, config.reward.ensemble, config.reward.gamma)


def load(config: TrainConfig, start: Folder) -> Given:
    """Files → pairs → trees; says what was read and what could not be used."""
    tokenizer, eos_ids = start.tokenizer, start.eos_ids

    def progress(items: Any, total: int | None, label: str) -> Any:
        return metrics.track(items, total=total, label=label, unit="rows" if label.startswith("reading") else "chunks")

    cut = {
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "truncation": config.data.truncation,
        "progress": progress,
    }

    def told(result: tuple[list, Any]) -> list:
        for line in result[1].lines():
            metrics.say(line)
        return result[0]

    pairs = told(
        data.load_pairs(
            config.data.pairs,
            format=config.data.format,
            split=config.data.split,
            limit=config.data.limit,
            progress=progress,
        )
    )
    pairs, held_out = data.split_validation(pairs, config.data.validation, config.run.seed)
    trees = told(data.tokenise_pairs(pairs, tokenizer, eos_ids, **cut))
    held_out = told(data.tokenise_pairs(held_out, tokenizer, eos_ids, **cut)) if held_out else []
    if not trees:
        raise ValueError(
            "no pair is left after tokenising; expected at least one. See the counts above for the reasons."
        )
    by_id = {pair.id: pair for pair in pairs}
    pairs = [by_id[tree.id] for tree in trees]
    if config.data.prompts:
        prompts = told(data.load_prompts(config.data.prompts, split=config.data.split, progress=progress))
    else:
        prompts = data.prompts_of(pairs)
    prompts, prompt_tokens = sampled_prompts(prompts, tokenizer, config.data.max_prompt_length, config.data.truncation)
    evaluated = told(data.load_prompts(config.evaluate.prompts, progress=progress)) if config.evaluate.prompts else []
    evaluated = evaluated[: config.evaluate.limit or None]
    eval_prompts, eval_tokens = sampled_prompts(
        evaluated, tokenizer, config.data.max_prompt_length, config.data.truncation
    )
    sft = []
    if config.sft.epochs:
        texts = (
            told(data.load_texts(config.sft.data, split=config.data.split, progress=progress))
            if config.sft.data
            else data.demonstrations_of(pairs)
        )
        sft = told(data.tokenise_texts(texts, tokenizer, eos_ids, **cut))
    return Given(
        pairs=tuple(pairs),
        trees=tuple(trees),
        held_out=tuple(held_out),
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        sft=tuple(sft),
        eval_prompts=eval_prompts,
        eval_tokens=eval_tokens,
    )


def sampled_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, longest: int, truncation: str
) -> tuple[tuple[Prompt, ...], tuple[np.ndarray, ...]]:
    """Prompts and their token ids, one to one; those without a token cannot be sampled from and are left out."""
    if not prompts:
        return (), ()
    trees, _ = data.tokenise_prompts(prompts, tokenizer, max_prompt_length=longest, truncation=truncation)
    by_id = {prompt.id: prompt for prompt in prompts}
    trees = [tree for tree in trees if len(tree.prompt)]
    return tuple(by_id[tree.id] for tree in trees), tuple(tree.prompt for tree in trees)


def _largest_fresh(config: TrainConfig, given: Given) -> np.ndarray:
    """int [n, 3], a bound on the lengths of fresh pairs, so that one plan holds given and fresh ones alike."""
    if not bootstraps(config):
        return np.zeros((0, 3), np.int64)
    if not given.prompts:
        raise ValueError("no prompt to sample from has a token; expected at least one. See data.prompts, or fresh: 0.")
    new = config.bootstrap.max_new_tokens
    return np.array([[max(map(len, given.prompt_tokens)) + 2 * new, 2 * new, 2]])


def _content(given: Given, start: Folder) -> str:
    """Hash of what is behind the config's paths: the model, the data that decides the iterates."""
    trees = (*given.trees, *given.held_out, *given.sft)
    branches = [branch_key(tree.prompt, branch).hex() for tree in trees for branch in tree.branches]
    prompts = [branch_key(tokens, ()).hex() for tokens in (*given.prompt_tokens, *given.eval_tokens)]
    told = [repr((pair.id, pair.scores, pair.weight, pair.source)) for pair in given.pairs]
    return derived_tag(start.tag, *branches, *prompts, *told)


def _fingerprint(config: TrainConfig, content: str) -> str:
    """Of everything that decides what the iterates become: config, content, devices, versions of the numerics."""
    plain = dataclasses.asdict(config)
    del plain["run"], plain["evaluate"]
    devices = [str(d.device_kind) for d in jax.devices()]
    config_json = json.dumps(plain, sort_keys=True, default=list)
    return derived_tag(config_json, config.run.seed, content, *devices, jax.__version__)


def _describe(world: World) -> None:
    """What will run, in a few lines."""
    config, arch, plan = world.config, world.policies.arch, world.plan
    size = sum(a.size for a in jax.tree.leaves(model.abstract(arch)))
    metrics.say(
        f"{arch.family}, {size / 1e6:.2f} M parameters, compute {config.model.compute}, "
        f"mesh {'×'.join(f'{axis} {n}' for axis, n in world.mesh.shape.items())} ({jax.devices()[0].device_kind})"
    )
    metrics.say(
        f"rows of {plan.length} tokens, {plan.rows} a microbatch; {len(world.given.trees)} pairs, "
        f"{len(world.given.prompts)} prompts, {len(world.given.held_out)} held out; run folder {world.run.path}"
    )


def bootstraps(config: TrainConfig) -> bool:
    """Does any iteration make fresh pairs?"""
    return config.bootstrap.fresh > 0 and config.loop.iterations >= config.bootstrap.from_iteration


def adam(optimizer: OptimizerConfig, arch: Arch) -> optax.GradientTransformation:
    """The optimiser of a stage."""
    return step.optimizer(
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip=optimizer.clip,
        decays=programs.decaying(arch),
    )


def schedule(optimizer: OptimizerConfig) -> dict[str, Any]:
    """Keywords of step.learning_rate."""
    return {"peak": optimizer.learning_rate, "schedule": optimizer.schedule, "warmup": optimizer.warmup}


def update_plan(lengths_N3: np.ndarray, optimizer: OptimizerConfig, arch: Arch, mesh: Mesh) -> Plan:
    """Rows for the updates of a stage; lengths as rows.measure gives them."""
    return rowlib.plan(
        lengths_N3,
        batch=optimizer.batch_size,
        width=arch.width,
        shards=meshes.row_shards(mesh),
        row_tokens=optimizer.row_tokens,
        microbatch_rows=optimizer.microbatch_rows,
    )


def key(world: World, use: str, t: int) -> jax.Array:
    """The run's key folded by what it is for (KEYS) and by the iteration."""
    return jax.random.fold_in(jax.random.fold_in(sample.seeded(world.config.run.seed), KEYS[use]), t)


def folder(world: World, t: int) -> pathlib.Path:
    """iterations/t of the run folder."""
    return world.run.path / "iterations" / str(t)
