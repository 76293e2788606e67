"""What a config becomes before the first update: files read, trees made, programs built; constant afterwards."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from sera_jax import (
    attention,
    bootstrap,
    data,
    judge,
    losses,
    metrics,
    model,
    policies,
    processes,
    programs,
    rewards,
    sample,
    score,
    sera,
    step,
)
from sera_jax import config as configs
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax import run as runs
from sera_jax.bootstrap import Imported
from sera_jax.config import OptimizerConfig, RewardModelConfig, TrainConfig
from sera_jax.ledger import Ledger, branch_key, derived_tag
from sera_jax.losses import Loss
from sera_jax.model import Arch, Lora
from sera_jax.policies import Folder, Policies
from sera_jax.preference import Form
from sera_jax.records import Pair, Prompt, Tree, Unpaired
from sera_jax.rows import Plan
from sera_jax.run import Run

# Folded into run.seed.
KEYS = {"sft": 0, "sample": 1, "select": 2, "update": 3, "pairs": 4, "evaluate": 5, "reward": 6, "opponents": 7}
DECIDING = ("model", "mode", "template", "temperature", "max_tokens")  # keys of the judge that change its answers


@dataclasses.dataclass(frozen=True)
class Given:
    """Text and trees, one to one: the given pairs (`held_out` only as trees), the prompts to sample from, those to
    evaluate on; the trees of the SFT stage. imported: candidates of the prompts to sample from, None = none are given.
    parts: the pairs that each iteration sees, by number; None = all in each. chosen: of bootstrap.with_given, the given
    response of each prompt to sample from, empty = it has none.
    Under an unpaired loss the pairs are labelled single responses, their trees (own completion, mismatch).
    """

    pairs: tuple[Pair, ...] | tuple[Unpaired, ...]
    trees: tuple[Tree, ...]
    held_out: tuple[Tree, ...]
    prompts: tuple[Prompt, ...]
    prompt_tokens: tuple[np.ndarray, ...]
    sft: tuple[Tree, ...]
    eval_prompts: tuple[Prompt, ...]
    eval_tokens: tuple[np.ndarray, ...]
    imported: Imported | None
    parts: tuple[np.ndarray, ...] | None = None
    chosen: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class World:
    """What does not change while a run walks. rankers: the reward models or the preference model that rank candidates,
    by folder; form: how the preference model is asked, None = it is none."""

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
    plans: tuple[Plan, ...]
    score_plan: Plan
    rankers: dict[str, Folder]
    form: Form | None

    @property
    def ranker(self) -> Folder | None:
        """The model of reward.model."""
        return self.rankers.get(self.config.reward.model)


@dataclasses.dataclass(frozen=True)
class _Files:
    """What a process reads. rankers: reward models by folder. content: hash of what is behind the config's paths."""

    start: Folder
    given: Given
    first: Folder | None
    rankers: dict[str, Folder]
    form: Form | None
    content: str


def _read(config: TrainConfig, mesh: Mesh) -> _Files:
    start = policies.open_folder(
        config.model.path,
        mesh,
        compute=config.model.compute,
        remat=config.model.remat,
        head_chunk=config.model.head_chunk,
        attention=config.model.attention,
        chat_template=config.data.chat_template,
        seed=config.run.seed if config.model.weights == "random" else None,
        lora=lora_of(config),
    )
    if start.arch.lora:  # what no update changes is in memory once
        start = dataclasses.replace(start, load=functools.cache(start.load))
    given = load(config, start)
    check_scores(config, given.pairs)
    first, (rankers, form) = _first(config, start, mesh), _rankers(config, start, mesh)
    asked = [judge.template(config.judge.template, config.judge.mode)] if judges(config) else []
    return _Files(start, given, first, rankers, form, _content(given, start, first, tuple(rankers.values()), asked))


def prepare(config: TrainConfig) -> World:
    """Reads everything that can be wrong before the run folder is touched: tokenizer, data, architecture, mesh."""
    mesh = meshes.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
    files = processes.agreed(
        lambda: _read(config, mesh), lambda files: configs.dump(config) + files.content, "config, model and data"
    )
    start, given, first, content = files.start, files.given, files.first, files.content
    arch, compute = start.arch, start.compute
    _check_early(config)
    loss, loss_keys = loss_of(config)
    transform = adam(config.optimizer, arch)
    # An SFT stage alone has no pairs; its trees then stand for them in plans that nothing runs by.
    trees = given.trees or given.sft
    if on_policy(config):
        lengths_N3 = sampled_lengths(config, given, 1 if config.on_policy.algorithm == "raft" else None)
    else:
        lengths_N3 = np.concatenate((rowlib.measure(trees), _largest_fresh(config, given)))
    plans = update_plans(lengths_N3, config.optimizer, arch, mesh)
    _check_stops(config, given)
    watched = [*trees, *given.held_out]
    score_plan = score.plan_of(rowlib.measure(watched) if watched else lengths_N3, arch, mesh)
    run = runs.open_run(
        configs.dump(config),
        content=content,
        fingerprint=fingerprint(config, content),
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
        fingerprints=runs.fingerprints(run.origins),
        first=first,
        iterates=run.path / "iterates",
        ledger=Ledger(config.run.ledger or run.path / "ledger"),
        seed=config.run.seed,
    )
    world = World(
        config=config,
        run=run,
        mesh=mesh,
        given=given,
        policies=where,
        loss=loss,
        loss_keys=loss_keys,
        transform=transform,
        select=selector_of(config, mesh),
        update=update_of(config, arch, mesh, compute, transform),
        plans=plans,
        score_plan=score_plan,
        rankers=files.rankers,
        form=files.form,
    )
    _describe(world)
    return world


def lora_of(config: TrainConfig | RewardModelConfig) -> Lora | None:
    """The adapters that train, None = all weights do."""
    lora = config.lora
    return Lora(lora.rank, lora.alpha, lora.targets, lora.dropout) if lora.rank else None


def loss_of(config: TrainConfig) -> tuple[Loss, dict[str, Any]]:
    """The loss that trains and whose implicit reward ranks, and its keys."""
    given = config.loss
    loss = _mixture((given.name, *given.mix), (1.0, *given.mix.values()), given.sft_weight, given.optimism)
    return loss, {"beta": config.loss.beta, **{key: getattr(config.loss, key) for key in loss.keys}}


def update_of(
    config: TrainConfig, arch: Arch, mesh: Mesh, compute: programs.Compute, transform: optax.GradientTransformation
) -> Callable:
    """The program of the iterations' updates (programs)."""
    where, rate = (arch, mesh, compute, transform), schedule(config.optimizer)
    asked, moments = config.on_policy, {"moments": config.optimizer.moments}
    if asked.algorithm == "raft":
        return programs.sft_update(*where, rate, **moments)
    if asked.algorithm == "policy_gradient":
        keys = {
            "ratio": asked.ratio,
            "average": asked.average,
            "clip": asked.clip,
            "clip_high": asked.clip if asked.clip_high is None else asked.clip_high,
            "beta": asked.beta if asked.kl == "loss" else 0.0,
        }
        return programs.policy_update(*where, keys, rate, tokens=token_names(config), **moments)
    return programs.preference_update(
        *where,
        *loss_of(config),
        rate,
        ld_alpha=config.loss.ld_alpha,
        weighting=losses.WEIGHTINGS[config.loss.weighting],
        **moments,
    )


def token_names(config: TrainConfig) -> tuple[str, ...]:
    """What policy gradients have to know of each token before an update: log-probs under the policy that sampled, where
    it is not the one that is updated, and under the reference, where its KL is in the loss."""
    asked = config.on_policy
    if asked.algorithm != "policy_gradient":
        return ()
    names = (("old", updates_of_round(config) > 1), ("reference", asked.beta > 0 and asked.kl == "loss"))
    return tuple(name for name, needed in names if needed)


def scored_under(config: TrainConfig) -> tuple[str, ...]:
    """The models whose log-probs of its candidates a round needs: for the KL in the reward, and for the updates."""
    asked = config.on_policy
    return ("old", "reference") if asked.beta and asked.kl == "reward" else token_names(config)


def uncertain(config: TrainConfig) -> bool:
    """Does a run ask how uncertain rewards are (Γ)?"""
    told = loss_of(config)[0].target == "bonus" and config.loop.iterations > 0
    return told or (bootstraps(config) and config.bootstrap.pair_rule == "explore")


def on_policy(config: TrainConfig) -> bool:
    """Do the iterations learn from samples at once?"""
    return config.on_policy.algorithm != "none"


def updates_of_round(config: TrainConfig) -> int:
    """Updates of a round of samples."""
    return config.on_policy.passes * -(-config.on_policy.prompts // config.optimizer.batch_size)


def updates_of_iteration(config: TrainConfig, given: Given, t: int) -> int:
    """Updates of iteration t, whose number of fresh pairs does not matter (loop.passes given)."""
    if on_policy(config):
        return config.on_policy.rounds * updates_of_round(config)
    return config.loop.epochs * -(-size_of_pass(config, given, t) // config.optimizer.batch_size)


def selector_of(config: TrainConfig, mesh: Mesh) -> Callable:
    """The program that selects (programs.selector)."""
    select = config.select
    return programs.selector(
        mesh, *loss_of(config), score_name=select.score, rule=select.rule, threshold=select.threshold
    )


def _check_early(config: TrainConfig) -> None:
    """What would else be found after the first iteration: reward functions, the judge, ensemble weights.

    Raises:
        ValueError: as the rooms raise it.
    """
    selects = config.loop.iterations >= config.select.from_iteration and not on_policy(config)
    if config.select.score == "reward_gap" and selects:
        rewards.load_function(config.reward.function)
    for kind, function in configs.sources(config.reward):
        if kind in configs.FUNCTION_SOURCES and (ranks(config) or config.evaluate.prompts):
            rewards.load_function(function)
    if config.evaluate.function:
        rewards.load_function(config.evaluate.function)
    if judges(config):
        judge.ready(endpoint(config), config.judge.template, config.judge.mode)
    for t in range(1, config.loop.iterations):
        sera.ensemble_weights(t, config.reward.ensemble, config.reward.gamma)


def _check_stops(config: TrainConfig, given: Given) -> None:
    """Raises ValueError where loop.early_stop could never stop anything."""
    least = (updates_of_iteration(config, given, t) for t in range(1, config.loop.iterations + 1))
    updates = min(least, default=0)
    if config.loop.early_stop and config.loop.iterations and config.loop.validate_every >= updates:
        raise ValueError(
            f"loop.validate_every is {config.loop.validate_every} with loop.early_stop {config.loop.early_stop}, "
            f"expected less than the {updates} updates of an iteration: there would be no check inside it."
        )


def check_scores(config: TrainConfig, pairs: Sequence[Pair]) -> None:
    """Raises ValueError, naming the key and the first pair without, where a selection needs scores that are missing."""
    if config.loop.iterations < config.select.from_iteration or on_policy(config):
        return
    for signal, whose, columns, scores in (
        ("gap_N", "the annotator's", "score_chosen and score_rejected", lambda pair: pair.scores),
        ("gold_N", "gold", "gold_chosen and gold_rejected", lambda pair: pair.truth.gold),
    ):
        lacking = [pair.id for pair in pairs if scores(pair) is None]
        if lacking and signal in sera.needs(config.select.score):
            raise ValueError(
                f"select.score {config.select.score!r} needs {whose} scores, but {len(lacking)} of "
                f"{len(pairs)} pairs have none, the first {lacking[0]!r}. Give {columns}, or use another score."
            )


def load(config: TrainConfig, start: Folder) -> Given:
    """Files → pairs → trees; says what was read and what could not be used."""
    tokenizer, eos_ids = start.tokenizer, start.eos_ids

    def told(result: tuple[Any, Any]) -> Any:
        for line in result[1] if isinstance(result[1], list) else result[1].lines():
            metrics.say(line)
        return result[0]

    pairs = told(read_pairs(config)) if config.data.pairs else []
    pairs, held_out = data.split_validation(pairs, config.data.validation, config.run.seed)
    trees, held_out = (
        trees_of(config, some, told(tokenise(config, some, tokenizer, eos_ids)), key) if some else []
        for some, key in ((pairs, "data.pairs"), (held_out, "data.validation"))
    )
    if not trees and config.data.pairs:
        raise ValueError(
            "no pair is left after tokenising; expected at least one. See the counts above for the reasons."
        )
    by_id = {pair.id: pair for pair in pairs}
    pairs = [by_id[tree.id] for tree in trees]
    parts, loop = None, config.loop
    if loop.parts != "all" and loop.iterations:
        parts = data.parts(pairs, loop.iterations, loop.parts, seed=config.run.seed)
        metrics.say(f"loop.parts {loop.parts}: {', '.join(str(len(part)) for part in parts)} pairs by iteration")
    prompts = told(read_prompts(config)) if config.data.prompts else data.prompts_of(pairs)
    prompts, prompt_tokens = sampled_prompts(prompts, tokenizer, config.data.max_prompt_length, config.data.truncation)
    imported = None
    if config.bootstrap.candidates_file and bootstraps(config) and prompts:
        imported = told(read_candidates(config, prompts, prompt_tokens, tokenizer, eos_ids))
        prompts = tuple(prompts[i] for i in imported.used_P)
        prompt_tokens = imported.candidates.prompts
    evaluated = told(read_evaluated(config)) if config.evaluate.prompts else []
    eval_prompts, eval_tokens = sampled_prompts(
        evaluated, tokenizer, config.data.max_prompt_length, config.data.truncation
    )
    sft = []
    if config.sft.epochs:
        texts = told(read_texts(config)) if config.sft.data else data.demonstrations_of(pairs)
        sft = told(data.tokenise_texts(texts, tokenizer, eos_ids, **cutting(config)))
    return Given(
        pairs=tuple(pairs),
        trees=tuple(trees),
        held_out=tuple(held_out),
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        sft=tuple(sft),
        eval_prompts=eval_prompts,
        eval_tokens=eval_tokens,
        imported=imported,
        parts=parts,
        chosen=bootstrap.chosen_of(prompts, pairs, trees) if config.bootstrap.with_given else (),
    )


def given_at(given: Given, t: int) -> Given:
    """What iteration t sees: the pairs of its part alone."""
    if given.parts is None:
        return given
    of = lambda values: tuple(values[i] for i in given.parts[t - 1])
    return dataclasses.replace(given, pairs=of(given.pairs), trees=of(given.trees), parts=None)


def size_of_pass(config: TrainConfig, given: Given, t: int) -> int:
    """Examples of a pass of iteration t: the given pairs that it sees, or, of a run without, the prompts it samples
    from."""
    if given.trees:
        return len(given.trees) if given.parts is None else len(given.parts[t - 1])
    return bootstrap.count_of_prompts(len(given.prompts), config.bootstrap.prompts_per_iteration)


def read_candidates(
    config: TrainConfig,
    prompts: Sequence[Prompt],
    prompt_tokens: Sequence[np.ndarray],
    tokenizer: data.Tokenizer,
    eos_ids: Sequence[int],
) -> tuple[bootstrap.Imported, list[str]]:
    """The candidates of bootstrap.candidates_file, and what to tell of them."""
    path = config.bootstrap.candidates_file
    return bootstrap.imported(
        data.load_responses(path, scored=("file", "") in configs.sources(config.reward), progress=progress),
        prompts,
        prompt_tokens,
        tokenizer,
        eos_ids,
        path=path,
        max_length=config.data.max_length,
        progress=progress,
    )


def unpaired(config: TrainConfig) -> bool:
    """Does the loss learn from labelled single responses?"""
    return losses.LOSSES[config.loss.name].unpaired


def mismatches(config: TrainConfig) -> bool:
    """Does it read responses of other examples beside them?"""
    return losses.LOSSES[config.loss.name].mismatch


def read_pairs(config: TrainConfig) -> tuple[list[Pair] | list[Unpaired], data.Report]:
    """All given pairs, held out or not; the examples of an unpaired loss."""
    given, read = config.data, data.load_unpaired if unpaired(config) else data.load_pairs
    return read(
        given.pairs,
        format=given.format,
        split=given.split,
        subset=given.subset,
        ranked=given.ranked,
        seed=config.run.seed,
        limit=given.limit,
        progress=progress,
    )


def tokenise(
    config: TrainConfig, pairs: Sequence[Pair] | Sequence[Unpaired], tokenizer: Any, eos_ids: Sequence[int]
) -> tuple[list[Tree], data.Counts]:
    """Trees of what `read_pairs` reads; those of an unpaired loss have their own branch alone."""
    make = data.tokenise_unpaired if unpaired(config) else data.tokenise_pairs
    return make(pairs, tokenizer, eos_ids, **cutting(config))


def trees_of(
    config: TrainConfig, pairs: Sequence[Pair] | Sequence[Unpaired], trees: list[Tree], key: str
) -> list[Tree]:
    """Trees of what `tokenise` made of the pairs, with all that the loss takes: mismatches out of the same trees, or
    the values that it is told. key: where they come from.

    Raises:
        ValueError: more than half of them have the same prompt, or pairs that lack scores.
    """
    try:
        if mismatches(config):
            return data.mismatched(trees, max_length=config.data.max_length, seed=config.run.seed)
        if unpaired(config):
            return data.unmatched(trees)
        return data.valued(trees, pairs, loss_of(config)[0].target)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def read_prompts(config: TrainConfig) -> tuple[list[Prompt], data.Report]:
    """The prompts to sample from, where they have files of their own."""
    given = config.data
    return data.load_prompts(given.prompts, split=given.split, subset=given.subset, progress=progress)


def read_evaluated(config: TrainConfig) -> tuple[list[Prompt], data.Report]:
    """The prompts to evaluate on."""
    return data.load_prompts(config.evaluate.prompts, limit=config.evaluate.limit, progress=progress)


def read_texts(config: TrainConfig) -> tuple[list[data.Demonstration], data.Report]:
    """The demonstrations of the SFT stage, where they have files of their own."""
    given = config.data
    return data.load_texts(
        config.sft.data, split=config.sft.split or given.split, subset=given.subset, progress=progress
    )


def cutting(config: TrainConfig | RewardModelConfig) -> dict[str, Any]:
    """Keywords of data.tokenise_pairs, data.tokenise_unpaired and data.tokenise_texts."""
    given = config.data
    return {
        "max_length": given.max_length,
        "max_prompt_length": given.max_prompt_length,
        "truncation": given.truncation,
        "progress": progress,
    }


def progress(items: Any, total: int | None, label: str) -> Any:
    """As data.Progress, shown."""
    return metrics.track(items, total=total, label=label, unit="rows" if label.startswith("reading") else "chunks")


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
    sampled = [[new, new]] * len(given.prompts)
    if given.imported is not None:
        sampled = [list(map(len, tokens)) for tokens in given.imported.candidates.tokens_PC]
    beside = [[len(ids)] for ids in given.chosen] or [[]] * len(given.prompts)
    # The two longest candidates of each prompt.
    pairs = [
        (len(prompt), *sorted(lengths + also)[-2:])
        for prompt, lengths, also in zip(given.prompt_tokens, sampled, beside, strict=True)
    ]
    return np.array([[max(map(sum, pairs)), max(sum(lengths[1:]) for lengths in pairs), 2]])


def sampled_lengths(config: TrainConfig, given: Given, branches: int | None = None) -> np.ndarray:
    """int [n, 3], for plans: trees as the rounds may sample them, responses of all lengths alike, and the longest one.

    Args:
        branches: of a tree, None = all candidates.

    Raises:
        ValueError: fewer prompts than a round takes.
    """
    if len(given.prompts) < config.on_policy.prompts:
        raise ValueError(
            f"on_policy.prompts is {config.on_policy.prompts}, expected at most the {len(given.prompts)} prompts that "
            "have a token: a round takes each once. Lower it, or see data.prompts."
        )
    new = config.bootstrap.max_new_tokens
    count = branches or config.bootstrap.candidates
    length_P = np.array([len(tokens) for tokens in given.prompt_tokens])
    targets_P = count * (1 + (7919 * np.arange(len(length_P))) % new)  # 7919 is prime: in no order
    known = np.stack((length_P + targets_P, targets_P, np.full_like(length_P, count)), axis=1)
    return np.vstack((known, [length_P.max() + count * new, count * new, count]))


def _first(config: TrainConfig, start: Folder, mesh: Mesh) -> Folder | None:
    """The folder that is iterate 1, if one is.

    Raises:
        ValueError: another architecture or other tokens than those of model.path.
    """
    if not config.loop.first:
        return None
    folder = policies.open_folder(config.loop.first, mesh, compute=config.model.compute)
    if folder.arch != start.arch or not policies.same_tokens(folder, start):
        raise ValueError(
            f"loop.first: {config.loop.first} is no policy trained from model.path {config.model.path}: "
            f"{'its tokens' if folder.arch == start.arch else 'its architecture'} differ. Give a folder that a run "
            "from the same start exported."
        )
    return folder


def _rankers(config: TrainConfig, start: Folder, mesh: Mesh) -> tuple[dict[str, Folder], Form | None]:
    """The reward models that rank candidates, by folder; or the preference model, and how it is asked."""
    how = {"compute": config.model.compute, "attention": config.model.attention}
    if config.reward.source == "preference":
        folder, form = policies.open_preference_model(config.reward.model, mesh, **how)
        return {config.reward.model: folder}, form
    of_models = [folder for kind, folder in configs.sources(config.reward) if kind == "model"]
    return {folder: _ranker(config, folder, start, mesh) for folder in of_models}, None


def _ranker(config: TrainConfig, path: str, start: Folder, mesh: Mesh) -> Folder:
    """A reward model that ranks candidates.

    Raises:
        ValueError: a folder of something else, or a reward model of other tokens than those of model.path.
    """
    how = {"compute": config.model.compute, "attention": config.model.attention}
    folder = policies.open_reward_model(path, mesh, **how)
    if not policies.same_tokens(folder, start):
        raise ValueError(
            f"reward.model: the tokeniser of {path} differs from that of model.path "
            f"{config.model.path}, expected the same vocabulary and EOS ids: it is given the sampled ids. Give a "
            "reward model that was trained from a checkpoint with these tokens."
        )
    return folder


def _content(given: Given, start: Folder, first: Folder | None, rankers: Sequence[Folder], asked: Sequence[str]) -> str:
    """Hash of what is behind the config's paths: the models, the data that decides the iterates, `asked`: the judge's
    template.
    """
    trees = (*given.trees, *given.held_out, *given.sft)
    branches = [branch_key(tree.prompt, branch).hex() for tree in trees for branch in tree.branches]
    prompts = [branch_key(tokens, ()).hex() for tokens in (*given.prompt_tokens, *given.eval_tokens)]
    told = [
        repr((said.id, said.scores, said.weight, said.source, said.truth))
        if isinstance(said, Pair)
        else repr((said.id, said.label, said.weight, said.source))
        for said in given.pairs
    ]
    if given.imported is not None:
        made, scores_PC = given.imported.candidates, given.imported.scores_PC
        told += [branch_key(prompt, ids).hex() for prompt, row in zip(made.prompts, made.tokens_PC) for ids in row]
        told += [repr(made.texts_PC), made.finished_PC.tobytes().hex()]
        told += [] if scores_PC is None else [scores_PC.tobytes().hex()]
    models = [folder.tag for folder in (start, first, *rankers) if folder]
    return derived_tag(*models, *branches, *prompts, *told, *asked)


def fingerprint(config: TrainConfig | RewardModelConfig, content: str) -> str:
    """Of everything that decides what the iterates become: config, content, devices, versions of the numerics."""
    plain = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("run", "evaluate")}
    judged = plain.pop("judge", None)
    plain |= {"judge": {key: judged[key] for key in DECIDING}} if judged and judges(config) else {}
    devices = [str(d.device_kind) for d in jax.devices()]
    config_json = json.dumps(plain, sort_keys=True, default=list)
    several = [jax.process_count()] if jax.process_count() > 1 else []
    return derived_tag(config_json, config.run.seed, content, *devices, *several, jax.__version__)


def _describe(world: World) -> None:
    """What will run, in a few lines."""
    config, arch = world.config, world.policies.arch
    size, trained = (sum(a.size for a in jax.tree.leaves(t)) for t in (model.abstract(arch), model.trainable(arch)[0]))
    adapters = f" and {trained / 1e6:.2f} M in adapters, which train," if arch.lora else ""
    metrics.say(
        f"{arch.family}, {size / 1e6:.2f} M parameters{adapters or ','} compute {config.model.compute}, "
        f"mesh {'×'.join(f'{axis} {n}' for axis, n in world.mesh.shape.items())} ({jax.devices()[0].device_kind})"
    )
    kind = "examples" if world.loss.unpaired else "pairs"
    shapes = " or ".join(f"{plan.length} tokens, {plan.rows} a microbatch" for plan in world.plans)
    metrics.say(
        f"rows of {shapes}; {len(world.given.trees)} {kind}, "
        f"{len(world.given.prompts)} prompts, {len(world.given.held_out)} held out; run folder {world.run.path}"
    )
    if world.loss.unpaired:
        metrics.say(balance(config, world.given.trees))


def balance(config: TrainConfig, trees: Sequence[Tree]) -> str:
    """Desirable and undesirable examples, and what their weights make of the two numbers (Ethayarajh et al., eq. 8)."""
    loss = config.loss
    desirable = sum(tree.label > 0 for tree in trees)
    other = len(trees) - desirable
    balance = loss.desirable_weight * desirable / max(loss.undesirable_weight * other, 1e-9)
    return (
        f"{desirable} desirable and {other} undesirable examples, weights {loss.desirable_weight:g} and "
        f"{loss.undesirable_weight:g}: {balance:.3g} : 1 by weight (between 1 and 4/3 is advised)"
    )


def judges(config: TrainConfig) -> bool:
    """Will a judge be asked?"""
    return ("judge", "") in configs.sources(config.reward) and ranks(config)


def endpoint(config: TrainConfig) -> judge.Endpoint:
    """Whom to ask, and how patiently."""
    asked = config.judge
    return judge.Endpoint(
        model=asked.model,
        base_url=asked.base_url,
        key_env=asked.key_env,
        temperature=asked.temperature,
        max_tokens=asked.max_tokens,
        timeout=asked.timeout,
        retries=asked.retries,
        concurrent=asked.concurrent,
        per_minute=asked.per_minute,
    )


def bootstraps(config: TrainConfig) -> bool:
    """Does any iteration make fresh pairs?"""
    makes = config.bootstrap.fresh > 0 and config.loop.iterations >= config.bootstrap.from_iteration
    return makes and not on_policy(config)


def ranks(config: TrainConfig) -> bool:
    """Will candidates be ranked?"""
    return bootstraps(config) or (on_policy(config) and config.loop.iterations > 0)


@functools.cache
def _mixture(names: tuple[str, ...], weights: tuple[float, ...], sft_weight: float, optimistic: float) -> Loss:
    """One record for the same plain values, so that the runs of a process share their programs."""
    return losses.mixture(dict(zip(names, weights)), sft_weight, optimistic)


@functools.cache
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


def update_plans(lengths_N3: np.ndarray, optimizer: OptimizerConfig, arch: Arch, mesh: Mesh) -> tuple[Plan, ...]:
    """Rows for the updates of a stage; lengths as rows.measure gives them."""
    return rowlib.plans(
        lengths_N3,
        batch=optimizer.batch_size,
        per_key=attention.per_key(mesh, arch.width),
        device_tokens=attention.device_tokens(mesh),
        shards=meshes.row_shards(mesh),
        row_tokens=optimizer.row_tokens,
        microbatch_rows=optimizer.microbatch_rows,
        shapes=optimizer.row_shapes,
    )


def key(world: World, use: str, t: int) -> jax.Array:
    """The run's key folded by what it is for (KEYS) and by the iteration."""
    return jax.random.fold_in(jax.random.fold_in(sample.seeded(world.config.run.seed), KEYS[use]), t)


def folder(world: World, t: int) -> pathlib.Path:
    """iterations/t of the run folder."""
    return world.run.path / "iterations" / str(t)
