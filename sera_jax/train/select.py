"""score → margins → select: what the policy says of the given pairs, and which of them an iteration trains on."""

from collections.abc import Sequence

import numpy as np

from sera_jax import losses, policies, selection, sera
from sera_jax.config import MARGIN_SCORES
from sera_jax.policies import Live, Name
from sera_jax.records import Tree
from sera_jax.selection import Selection
from sera_jax.train import world as worlds
from sera_jax.train.world import World


def review(world: World, t: int, scored: Live) -> Selection | None:
    """Scores the given pairs under the policy and selects; None while all pairs are trained on."""
    config, given = world.config.select, world.given
    if t < config.from_iteration:
        return None
    names, weights_E = ensemble(world, scored)
    reference = reward_reference(world, scored)
    # Scores that would be the same for every pair keep the first pairs of the file: errors, told by tags and names.
    if config.score == "loss" and loss_reference(world, t) is not None:
        tags = [policies.tag(world.policies, name) for name in (scored.name, loss_reference(world, t))]
        sera.check_references(*tags, "loss.reference, for select.score 'loss'")
    if config.score == "reference_logp" and reference is None:
        raise ValueError(
            "select.score 'reference_logp' needs a reference, got none (reward.reference 'none', or a loss without "
            "reference). Use another score, or reward.reference 'initial'."
        )
    return selection.select(
        given.pairs,
        given.trees,
        logp_EN2=np.stack([pair_logps(world, name, given.trees, scored) for name in names]),
        weights_E=weights_E,
        reward_reference_N2=pair_logps(world, reference, given.trees, scored),
        loss_reference_N2=pair_logps(world, loss_reference(world, t), given.trees, scored),
        selector=world.select,
        mesh=world.mesh,
        key=worlds.key(world, "select", t),
        keep=config.keep,
        stratify=config.stratify,
        what=f"score {config.score} of iteration {t}",
    )


def pair_logps(world: World, name: Name | None, trees: Sequence[Tree], live: Live) -> np.ndarray:
    """float32 [N, 2]: log-probs of pairs under a model of the run."""
    flat = policies.logps(world.policies, name, trees, live=live, plan=world.score_plan, what="the pairs")
    return flat.reshape(-1, 2)


def ensemble(world: World, scored: Live) -> tuple[list[Name], np.ndarray]:
    """The iterates that the reward is mixed of (those of weight 0 left out), oldest first, and their weights."""
    reward = world.config.reward
    if scored.name.t == 0:
        return [scored.name], np.ones(1, np.float32)  # before any update; only scores that need no margin get here
    weights_E = sera.ensemble_weights(scored.name.t, reward.ensemble, reward.gamma)
    used = np.flatnonzero(weights_E)
    return [Name("iterate", int(e) + 1) for e in used], weights_E[used]


def loss_reference(world: World, t: int) -> Name | None:
    """The reference of the policy that iteration t trains."""
    if not world.loss.reference:
        return None
    names = {"initial": Name("iterate", 0), "previous": Name("iterate", t - 1), "ema": Name("ema", t - 1), "none": None}
    return names[world.config.loss.reference]


def reward_reference(world: World, scored: Live) -> Name | None:
    """The reference of the policy that scores; a policy that is its own reference is an error, told by its tag."""
    t = scored.name.t
    if not losses.LOSSES[world.config.loss.name].reference:
        return None
    before = max(t - 1, 0)
    names = {
        "initial": Name("iterate", 0),
        "previous": Name("iterate", before),
        "ema": Name("ema", before),
        "none": None,
    }
    name = names[world.config.reward.reference]
    if name is not None and (t > 0 or world.config.select.score in MARGIN_SCORES):
        sera.check_references(
            policies.tag(world.policies, scored.name), policies.tag(world.policies, name), "reward.reference"
        )
    return name
