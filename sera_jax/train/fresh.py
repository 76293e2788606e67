"""sample → reward → pairs: candidates of the policy, ranked, and the fresh pairs made of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sera_jax import bootstrap, policies, programs, rewards, sample, score
from sera_jax.bootstrap import Fresh
from sera_jax.policies import Live, Name
from sera_jax.records import Candidates, Prompt
from sera_jax.train import world as worlds
from sera_jax.train.select import ensemble, reward_reference
from sera_jax.train.world import World


@dataclasses.dataclass(frozen=True)
class Made:
    """What an iteration sampled: the prompts it drew, their candidates, the fresh pairs; kl: mean log π/π_ref of the
    candidates under the policy that sampled them and the reward's reference, None without implicit reward or reference.
    """

    prompts: tuple[Prompt, ...]
    candidates: Candidates
    fresh: Fresh
    kl: float | None


def bootstrap_pairs(world: World, t: int, scored: Live) -> Made | None:
    """Candidates of the iteration's prompts and the fresh pairs made of them; None in an iteration that makes none."""
    config, given, b = world.config, world.given, world.config.bootstrap
    if t < b.from_iteration or not worlds.bootstraps(config):
        return None
    drawn = bootstrap.prompts_of_iteration(
        len(given.prompts), b.prompts_per_iteration, seed=config.run.seed, iteration=t
    )
    prompts = tuple(given.prompts[i] for i in drawn)
    candidates = bootstrap.sample_candidates(
        sampler(world, scored, worlds.key(world, "sample", t), b.candidates, b),
        prompts,
        [given.prompt_tokens[i] for i in drawn],
        lambda ids: world.policies.start.tokenizer.decode(ids, skip_special_tokens=True),
        candidates=b.candidates,
        slots=b.slots,
        path=worlds.folder(world, t) / "candidates.jsonl",
        label=f"iteration {t}: sampling {b.candidates} candidates a prompt",
    )
    kl = None
    if config.reward.source == "function":
        function = rewards.load_function(config.reward.function)
        label = f"iteration {t}: reward function"
        rewards_PC = rewards.by_function(function, [p.prompt for p in prompts], candidates.texts_PC, label)
    else:
        rewards_PC, kl = _implicit_rewards(world, scored, candidates)
    rewards_PC = rewards.adjusted(
        rewards_PC,
        rewards.lengths(candidates),
        penalty=config.reward.length_penalty,
        normalise=config.reward.length_normalise,
    )
    made = bootstrap.fresh_pairs(
        candidates,
        rewards_PC,
        bootstrap.valid(candidates, keep_unfinished=b.unfinished == "keep"),
        rule=b.pair_rule,
        keep=round(b.fresh * len(given.trees)),
        key=worlds.key(world, "pairs", t),
    )
    return Made(prompts, candidates, made, kl)


def sampler(world: World, live: Live, key: jax.Array, candidates: int, values: Any) -> Callable:
    """Prompts on the host → candidates on the host (`bootstrap.sample_candidates`).

    Args:
        live: samples; its weights are read if they are not in memory. values: BootstrapConfig or EvaluateConfig.
    """
    where = world.policies
    sampling = sample.sampling(
        temperature=values.temperature,
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
    )


def candidate_logps(world: World, name: Name | None, candidates: Candidates, live: Live) -> np.ndarray:
    """float32 [P, C] log-probs of candidates under a model, NaN for empty ones."""
    trees = rewards.trees(candidates)
    plan = score.plan_for(trees, world.policies.arch, world.mesh)
    flat = policies.logps(world.policies, name, trees, live=live, plan=plan, what="candidates")
    return rewards.on_grid(flat, candidates)


def _implicit_rewards(world: World, scored: Live, candidates: Candidates) -> tuple[np.ndarray, float | None]:
    """Rewards of the ensemble, [P, C], and the KL of the policy's samples (None without a reference)."""
    names, weights_E = ensemble(world, scored)
    logp_EPC = np.stack([candidate_logps(world, name, candidates, scored) for name in names])
    reference = reward_reference(world, scored)
    reference_PC = candidate_logps(world, reference, candidates, scored)
    rewards_PC = rewards.implicit(
        logp_EPC,
        reference_PC,
        rewards.lengths(candidates),
        weights_E,
        lambda logp, ref, length: world.loss.reward(logp, ref, length, **world.loss_keys),
    )
    return rewards_PC, None if reference is None else float(np.nanmean(logp_EPC[-1] - reference_PC))
