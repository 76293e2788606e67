"""sample → reward → pairs: candidates of the policy, ranked, and the fresh pairs made of them."""

import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sera_jax import (
    bootstrap,
    correlation,
    disk,
    judge,
    nash,
    policies,
    preference,
    processes,
    programs,
    rewards,
    sample,
    score,
)
from sera_jax.bootstrap import Fresh
from sera_jax.config import WITH_ARGUMENT, BootstrapConfig, EvaluateConfig
from sera_jax.ledger import branch_key, derived_tag
from sera_jax.policies import Live, Name
from sera_jax.records import Candidates, Prompt
from sera_jax.train import uncertainty
from sera_jax.train import world as worlds
from sera_jax.train.select import ensemble, reward_reference
from sera_jax.train.world import World


@dataclasses.dataclass(frozen=True)
class Ranked:
    """What a source says of candidates.

    rewards_PC: float32, the higher the better, NaN where there is none. kl: mean log π/π_ref of the candidates under
    the policy that sampled them and the reward's reference, None without implicit reward or reference. prob_PCC:
    float32, P[p, i, j] that candidate i is better than j, None where the source compares no two. sources: of a
    combined reward, what each source said, as rewards_PC. told: measures for the log.
    """

    rewards_PC: np.ndarray
    kl: float | None = None
    prob_PCC: np.ndarray | None = None
    sources: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    told: dict[str, float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Made:
    """What an iteration sampled: the prompts it drew, their candidates, the fresh pairs, and how they were ranked.

    sampled: the candidates without the given responses of bootstrap.with_given. rewards_PC: what the pairs were made
    by: the ranked rewards, adjusted for length. opponents: whom the candidates' wins are against, None = each other;
    ranked counts them behind the candidates.
    """

    prompts: tuple[Prompt, ...]
    candidates: Candidates
    fresh: Fresh
    ranked: Ranked
    sampled: Candidates
    rewards_PC: np.ndarray
    opponents: Candidates | None = None


def bootstrap_pairs(world: World, t: int, scored: Live) -> Made | None:
    """Candidates of the iteration's prompts and the fresh pairs made of them; None in an iteration that makes none."""
    config, given, b = world.config, world.given, world.config.bootstrap
    if t < b.from_iteration or not worlds.bootstraps(config):
        return None
    drawn = bootstrap.prompts_of_iteration(
        len(given.prompts),
        b.prompts_per_iteration,
        seed=config.run.seed,
        iteration=t,
        turn=t - b.from_iteration if b.prompts_drawn == "in_turn" else None,
    )
    prompts = tuple(given.prompts[i] for i in drawn)
    tokens, opponents = [given.prompt_tokens[i] for i in drawn], None
    draw = functools.partial(responses, world, scored, prompts, tokens, t=t, candidates=b.candidates, values=b)
    if given.imported is not None:
        sampled = bootstrap.take(given.imported.candidates, drawn)
    else:
        sampled = draw(
            use="sample",
            path=worlds.folder(world, t) / "candidates.jsonl",
            label=f"iteration {t}: sampling {b.candidates} candidates a prompt",
            mixture=b.mixture if b.mixture_of == "candidates" else 0.0,
        )
    if b.mixture and b.mixture_of == "opponents":
        opponents = draw(
            use="opponents",
            path=worlds.folder(world, t) / "opponents.jsonl",
            label=f"iteration {t}: sampling {b.candidates} opponents a prompt",
            mixture=b.mixture,
        )
    candidates = sampled
    if b.with_given:
        of_prompts = [given.chosen[i] for i in drawn]
        candidates = bootstrap.with_given(sampled, of_prompts, decoded(world), world.policies.start.eos_ids)
    everybody = candidates if opponents is None else bootstrap.joined(candidates, opponents)
    ranked, rewards_PC = rewarded(world, t, scored, drawn, everybody)
    said_PC, count = said(world, everybody), candidates.finished_PC.shape[1]
    own_PC = np.broadcast_to(np.arange(said_PC.shape[1]) < count, said_PC.shape)
    valid_PC, also = own_PC & (said_PC > 0), {}
    if b.pair_rule == "explore":
        gamma_PC = uncertainty.against_best(world, t, everybody, rewards_PC, valid_PC, scored)
        also = {"gamma_PC": processes.once(lambda: gamma_PC), "eta": config.loss.beta}
    made = bootstrap.fresh_pairs(
        everybody,
        rewards_PC,
        valid_PC,
        ranked.prob_PCC,
        said_PC if opponents is None else np.where(own_PC, 0, said_PC),
        rule=b.pair_rule,
        keep=round(b.fresh * worlds.size_of_pass(config, given, t)),
        key=worlds.key(world, "pairs", t),
        **also,
    )
    if also:
        uncertainty.learn(world, t, made, scored)
    return Made(prompts, candidates, made, ranked, sampled, rewards_PC[:, :count], opponents)


def said(world: World, candidates: Candidates) -> np.ndarray:
    """int32 [P, C]: how often the policy said what a candidate says, at the first of those that say it; 0 elsewhere.
    Opponents behind the candidates are counted apart."""
    b = world.config.bootstrap
    draws = 0 if world.given.imported else b.candidates + b.with_given
    return bootstrap.copies(candidates, keep_unfinished=b.unfinished == "keep", draws=draws)


def rewarded(
    world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates
) -> tuple[Ranked, np.ndarray]:
    """What the run's source says of candidates, and their rewards [P, C] with the length's part."""
    ranked = SOURCES[world.config.reward.source](world, t, scored, drawn, candidates)
    adjusted_PC, penalty = _adjusted(world, candidates, ranked.rewards_PC)
    # They decide what is trained on.
    rewards_PC, prob_PCC = processes.once(lambda: (adjusted_PC, ranked.prob_PCC))
    told = dict(ranked.told)
    if world.config.reward.length_penalty == "auto":
        told["reward/length_penalty"] = penalty
    if prob_PCC is not None:
        circles, triples = preference.cycles(prob_PCC)
        told["sera/intransitive"] = circles / triples if triples else None
    return dataclasses.replace(ranked, prob_PCC=prob_PCC, told=told), rewards_PC


def _adjusted(world: World, candidates: Candidates, rewards_PC: np.ndarray) -> tuple[np.ndarray, float]:
    """Rewards as reward.length_normalise and reward.length_penalty change them, and the penalty of a unit of length."""
    reward = world.config.reward
    length_PC = rewards.LENGTHS[reward.length_unit](candidates)
    rewards_PC = rewards.adjusted(rewards_PC, length_PC, penalty=0.0, normalise=reward.length_normalise)
    penalty = reward.length_penalty
    if penalty == "auto":
        penalty = rewards.unbiased_penalty(rewards_PC, length_PC, valid(world, candidates))
    return rewards.adjusted(rewards_PC, length_PC, penalty=penalty, normalise=False).astype(np.float32), penalty


def decoded(world: World) -> Callable[[np.ndarray], str]:
    """Token ids → text, specials removed."""
    return lambda ids: world.policies.start.tokenizer.decode(ids, skip_special_tokens=True)


def valid(world: World, candidates: Candidates) -> np.ndarray:
    """bool [P, C]: which candidates may stand in a pair, and which opponents they may win against."""
    return said(world, candidates) > 0


def responses(
    world: World,
    live: Live,
    prompts: Sequence[Prompt],
    tokens: Sequence[np.ndarray],
    *,
    use: str,
    t: int,
    candidates: int,
    values: BootstrapConfig | EvaluateConfig,
    path: pathlib.Path,
    label: str,
    mixture: float = 0.0,
) -> Candidates:
    """Candidates of a model, kept in `path`. What is the same for several runs (model, prompts, noise, sampling) is
    sampled once where they share a ledger: its folder `responses` holds finished files by the hash of all that.

    Args:
        live: samples; its weights are read if they are not in memory. use, t: of the noise (worlds.key).
        values: the sampling parameters. mixture: weight of the initial policy in a geometric mixture with the model; 0
            = the model alone.
    """
    config = world.config
    shared, initial = None, Name("iterate", 0)
    if policies.tag(world.policies, live.name) == policies.tag(world.policies, initial):
        mixture = 0.0  # with itself
    if config.run.ledger:
        sampling = [getattr(values, k, None) for k in ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")]
        noise = (config.run.seed, use, t, candidates, config.bootstrap.slots, config.bootstrap.refill, *sampling)
        own = repr((noise, [prompt.id for prompt in prompts]))
        contents = (branch_key(ids, ()).hex() for ids in tokens)
        beside = (policies.tag(world.policies, initial), str(mixture)) if mixture else ()
        said = derived_tag(policies.tag(world.policies, live.name), own, *contents, *beside)
        shared = pathlib.Path(config.run.ledger) / "responses" / f"{said}.jsonl"
        processes.once(lambda: _copy(shared, path))
    made = bootstrap.sample_candidates(
        sampler(world, live, worlds.key(world, use, t), candidates, values, mixture),
        prompts,
        tokens,
        decoded(world),
        candidates=candidates,
        slots=config.bootstrap.slots,
        refill=config.bootstrap.refill,
        path=path,
        label=label,
    )
    if shared is not None:
        processes.once(lambda: _copy(path, shared))
    return made


def _copy(source: pathlib.Path, to: pathlib.Path) -> None:
    """Copies a file that is there to where none is; it appears when complete, whoever else does the same."""
    if to.exists() or not source.is_file():
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    beside = to.with_name(f"{to.name}.{os.getpid()}.tmp")
    with disk.guarded(to):
        shutil.copyfile(source, beside)
        os.replace(beside, to)


def sampler(
    world: World,
    live: Live,
    key: jax.Array,
    candidates: int,
    values: BootstrapConfig | EvaluateConfig,
    mixture: float = 0.0,
) -> Callable:
    """Prompts on the host → candidates on the host (`bootstrap.sample_candidates`)."""
    where = world.policies
    initial = lambda: policies.params(where, Name("iterate", 0))
    sampling = sample.sampling(
        temperature=sample.temperatures(values.temperature, candidates),
        top_k=getattr(values, "top_k", 0),
        top_p=values.top_p,
        min_p=getattr(values, "min_p", 0.0),
        eos_ids=world.policies.start.eos_ids,
    )
    return programs.sampler(
        where.arch,
        world.mesh,
        where.compute,
        lambda: policies.params(where, live.name) if live.params is None else live.params,
        key,
        sampling,
        candidates=candidates,
        max_new_tokens=values.max_new_tokens,
        slots=world.config.bootstrap.slots,
        beside=(initial, mixture) if mixture else None,
    )


def candidate_logps(world: World, name: Name | None, candidates: Candidates, live: Live) -> np.ndarray:
    """float32 [P, C] log-probs of candidates under a model, NaN for empty ones."""
    trees = rewards.trees(candidates)
    plan = score.plan_for(trees, world.policies.arch, world.mesh)
    flat = policies.logps(world.policies, name, trees, live=live, plan=plan, what="candidates")
    return rewards.on_grid(flat, candidates)


# --- who ranks: (world, t, the policy that scores, which of the run's prompts, their candidates) → Ranked -------------


def _implicit(world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates) -> Ranked:
    """Rewards of the ensemble; the KL is None without a reference, and of samples that are somebody else's."""
    names, weights_E = ensemble(world, scored)
    reference, models = reward_reference(world, scored), []
    for name, following in itertools.pairwise([*names, reference, None]):
        policies.ahead(world.policies, following, scored)
        models.append(candidate_logps(world, name, candidates, scored))
    logp_EPC, reference_PC = np.stack(models[:-1]), models[-1]
    rewards_PC = rewards.implicit(
        logp_EPC,
        reference_PC,
        rewards.lengths(candidates),
        weights_E,
        lambda logp, ref, length: world.loss.reward(logp, ref, length, **world.loss_keys),
    )
    known = reference is not None and world.given.imported is None
    own = slice(1 if world.config.bootstrap.with_given else 0, None)  # of what the policy sampled
    return Ranked(rewards_PC, float(np.nanmean((logp_EPC[-1] - reference_PC)[:, own])) if known else None)


def _model(world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates) -> Ranked:
    """Rewards of a reward model, which is in memory beside the policy while it ranks."""
    trees, label = rewards.trees(candidates), f"iteration {t}: rewards of the reward model"
    flat = policies.folder_rewards(world.ranker, trees, ledger=world.policies.ledger, label=label)
    return Ranked(rewards.on_grid(flat, candidates))


def _preference(world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates) -> Ranked:
    """Probabilities of a preference model, which is in memory beside the policy while it ranks; of what may stand in a
    pair. It reads texts, by its own tokeniser.
    """
    prompts, places = [world.given.prompts[i].prompt for i in drawn], []
    valid_PC, texts_PC = valid(world, candidates), candidates.texts_PC

    def ask(pairs: list[tuple[int, int, int]]) -> np.ndarray:
        asked = [(prompts[p], texts_PC[p][i], texts_PC[p][j]) for p, i, j in pairs]
        label = f"iteration {t}: {len(pairs)} pairs to the preference model"
        prob_Q, place_Q2 = policies.folder_preferences(
            world.ranker, world.form, asked, ledger=world.policies.ledger, label=label
        )
        places.extend([] if place_Q2 is None else [place_Q2])
        return prob_Q

    if world.config.reward.tournament:
        rewards_PC, prob_PCC = preference.tournament(valid_PC, ask).astype(np.float32), None
    else:
        prob_PCC = preference.compared(valid_PC, ask)
        rewards_PC, prob_PCC = nash.win_rewards(prob_PCC), prob_PCC.astype(np.float32)
    told = preference.of_places(np.concatenate(places) if places else None)
    return Ranked(rewards_PC, prob_PCC=prob_PCC, told=told)


def _function(world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates) -> Ranked:
    function = rewards.load_function(world.config.reward.function)
    prompts = [world.given.prompts[i].prompt for i in drawn]
    return Ranked(rewards.by_function(function, prompts, _texts(candidates), f"iteration {t}: reward function"))


def _texts(candidates: Candidates) -> list[list[str | None]]:
    """[P, C]: texts of the candidates, None for empty ones."""
    return [
        [text if len(ids) else None for text, ids in zip(*row)]
        for row in zip(candidates.texts_PC, candidates.tokens_PC)
    ]


def _preference_function(world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates) -> Ranked:
    """Probabilities of a Python function; a candidate's reward is its mean over the others."""
    function = rewards.load_function(world.config.reward.function)
    prompts = [world.given.prompts[i].prompt for i in drawn]
    prob_PCC = rewards.by_preference(function, prompts, _texts(candidates), f"iteration {t}: preference function")
    return Ranked(nash.win_rewards(prob_PCC), prob_PCC=prob_PCC)


def _judge(world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates) -> Ranked:
    """Nothing is asked about candidates that may stand in no pair: it costs."""
    config = world.config.judge
    texts_PC = [
        [text if ok else None for text, ok in zip(*row)] for row in zip(candidates.texts_PC, valid(world, candidates))
    ]
    judged = judge.MODES[config.mode](
        worlds.endpoint(world.config),
        judge.Prices(config.price_in, config.price_out),
        judge.template(config.template, config.mode),
        [world.given.prompts[i].prompt for i in drawn],
        texts_PC,
        cache=pathlib.Path(config.cache or world.run.path / "judge.jsonl"),
        label=f"iteration {t}: judge",
    )
    return Ranked(judged.rewards_PC, prob_PCC=judged.prob_PCC, told=judged.told)


def _file(world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates) -> Ranked:
    return Ranked(world.given.imported.scores_PC[drawn])


def _random(world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates) -> Ranked:
    return Ranked(rewards.random(candidates, worlds.key(world, "reward", t)))


def _given(world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates) -> Ranked:
    """The given response of bootstrap.with_given is better than any sample, and of two samples neither is (SPIN)."""
    rewards_PC = np.zeros(candidates.finished_PC.shape, np.float32)
    rewards_PC[:, 0] = 1
    return Ranked(rewards_PC)


def _combined(world: World, t: int, scored: Live, drawn: np.ndarray, candidates: Candidates) -> Ranked:
    """Several sources, each asked as if it were the only one. They agree as far as `correlation` tells."""
    reward, told = world.config.reward, {}
    ranked = {
        name: SOURCES[name.partition(":")[0]](_alone(world, name), t, scored, drawn, candidates)
        for name in reward.sources
    }
    valid_PC = valid(world, candidates)
    each = {name: np.asarray(one.rewards_PC, np.float32) for name, one in ranked.items()}
    _check_finite(each, valid_PC, candidates)
    total_PC = rewards.combined(
        np.stack(list(each.values())),
        valid_PC,
        np.array(list(reward.sources.values())),
        combine=reward.combine,
        scale=reward.scale,
    )
    for name, one in ranked.items():
        told |= one.told | {f"source/{name}/mean": float(each[name][valid_PC].mean(dtype=np.float64))}
        told |= {f"source/{name}/std": float(each[name][valid_PC].std(dtype=np.float64))}
    prompt_PC = np.broadcast_to(np.arange(len(valid_PC))[:, None], valid_PC.shape)
    for one, other in itertools.combinations(each, 2):
        pair = (each[one][valid_PC], each[other][valid_PC])
        told[f"agree/pearson/{one} {other}"] = correlation.told(correlation.pearson(*pair))
        told[f"agree/spearman/{one} {other}"] = correlation.told(correlation.spearman(*pair))
        within = correlation.within(*pair, prompt_PC[valid_PC])
        told[f"agree/within/{one} {other}"] = correlation.told(within)
    kl = next((one.kl for one in ranked.values() if one.kl is not None), None)
    return Ranked(total_PC, kl, sources=each, told=told)


def _alone(world: World, name: str) -> World:
    """The world in which a key of reward.sources is the only source."""
    kind, _, of = name.partition(":")
    own = {kind: of} if kind in WITH_ARGUMENT else {}
    reward = dataclasses.replace(world.config.reward, source=kind, sources={}, **own)
    config = dataclasses.replace(world.config, reward=reward)
    return dataclasses.replace(world, config=config)


def _check_finite(each: dict[str, np.ndarray], valid_PC: np.ndarray, candidates: Candidates) -> None:
    """Raises ValueError for a valid candidate without a finite reward, naming the source."""
    for name, rewards_PC in each.items():
        bad = np.argwhere(valid_PC & ~np.isfinite(rewards_PC))
        if len(bad):
            p, c = bad[0]
            raise ValueError(
                f"reward.sources: {name!r} gives candidate {c} of prompt {candidates.ids[p]!r} the reward "
                f"{rewards_PC[p, c]}, expected a finite number ({len(bad)} of {int(valid_PC.sum())} candidates)."
            )


def responses_judged(world: World, prompts: Sequence[Prompt], said: Candidates, label: str) -> np.ndarray:
    """float32 [P]: rewards of one response to each evaluation prompt, by evaluate.function, or, without one, by the
    reward model or function that ranks candidates."""
    config = world.config
    if not config.evaluate.function and config.reward.source == "model":
        trees = rewards.trees(said)
        flat = policies.folder_rewards(world.ranker, trees, ledger=world.policies.ledger, label=label)
        return rewards.on_grid(flat, said)[:, 0]
    function = rewards.load_function(config.evaluate.function or config.reward.function)
    return rewards.by_function(function, [p.prompt for p in prompts], said.texts_PC, label)[:, 0]


SOURCES: dict[str, Callable[..., Ranked]] = {
    "implicit": _implicit,
    "model": _model,
    "preference": _preference,
    "function": _function,
    "preference_function": _preference_function,
    "judge": _judge,
    "file": _file,
    "random": _random,
    "given": _given,
    "combined": _combined,
}
