"""score → margins → select: what the policy says of the given pairs, and which of them an iteration trains on."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sera_jax import losses, policies, rewards, selection, sera
from sera_jax.config import MARGIN_SCORES
from sera_jax.policies import Live, Name
from sera_jax.records import Tree
from sera_jax.rows import Plan
from sera_jax.selection import Selection
from sera_jax.train import world as worlds
from sera_jax.train.world import Given, World


def review(world: World, t: int, scored: Live) -> Selection | None:
    """Scores the given pairs under the policy and selects; None while all pairs are trained on, or none is."""
    config, given = world.config.select, worlds.given_at(world.given, t)
    if t < config.from_iteration or config.rule == "none" or not given.trees:
        return None
    names, weights_E = ensemble(world, scored)
    reference = reward_reference(world, scored)
    # Scores that would be the same for every pair keep the first pairs of the file: errors, told by tags and names.
    if config.score == "loss" and loss_reference(world, t) is not None:
        tags = [policies.tag(world.policies, name) for name in (scored.name, loss_reference(world, t))]
        sera.check_references(*tags, "loss.reference, for select.score 'loss'")
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
        reward_gap_N=_reward_gaps(world, given) if "reward_gap_N" in sera.needs(config.score) else None,
    )


def _reward_gaps(world: World, given: Given) -> np.ndarray:
    """float32 [N]: reward.function of the chosen response less that of the rejected one, of the given pairs."""
    function = rewards.load_function(world.config.reward.function)
    texts_N2 = [[selection.shown(pair.chosen), selection.shown(pair.rejected)] for pair in given.pairs]
    prompts = [pair.prompt for pair in given.pairs]
    reward_N2 = rewards.by_function(function, prompts, texts_N2, "reward of the given pairs")
    return reward_N2[:, 0] - reward_N2[:, 1]


def pair_logps(world: World, name: Name | None, trees: Sequence[Tree], live: Live) -> np.ndarray:
    """float32 [N, 2]: log-probs of pairs, or of (response, mismatch), under a model of the run."""
    what = "the examples" if world.loss.unpaired else "the pairs"
    flat = policies.logps(world.policies, name, trees, live=live, plan=world.score_plan, what=what)
    return flat.reshape(-1, 2)


def loss_logps(
    world: World, name: Name | None, trees: Sequence[Tree], live: Live, *, plan: Plan, what: str
) -> np.ndarray:
    """float32 by flat branch number: log-probs under a model of the run as the loss sees them (`weighed`).

    Whole sets are scored, as the ledger knows them.
    """

    def run(some: Sequence[Tree], said: str = "the shared part of " + what) -> np.ndarray:
        return policies.logps(world.policies, name, some, live=live, plan=plan, what=said)

    return weighed(world, trees, run(trees, what), run)


def weighed(
    world: World, trees: Sequence[Tree], whole_F: np.ndarray, score: Callable[[Sequence[Tree]], np.ndarray]
) -> np.ndarray:
    """float32 by flat branch number: LD-DPO's log-probs where loss.ld_alpha is below 1, else those of all tokens alike.

    The trees are scored once more, cut to the lengths that the branches of a pair share: Σ_{t ≤ m} + α·Σ_{t > m} =
    α·whole + (1 - α)·shared. TRL 1.16 weighs policy and reference alike, as here; TRL up to 0.28, LLaMA-Factory and
    ms-swift the policy alone.

    Args:
        whole_F: log-probs of all tokens. score: trees → theirs.
    """
    alpha = world.config.loss.ld_alpha
    return whole_F if alpha == 1 else alpha * whole_F + (1 - alpha) * score([_shared(tree) for tree in trees])


def _shared(tree: Tree) -> Tree:
    """A tree whose branches are cut to the length of the shortest."""
    shortest = min(map(len, tree.branches))
    return dataclasses.replace(tree, branches=tuple(branch[:shortest] for branch in tree.branches))


def margins(world: World, trees: Sequence[Tree], reward_N2: np.ndarray) -> np.ndarray:
    """float32 [N]: implicit reward of the chosen response less that of the rejected one; of an unpaired example, its
    label times its reward. Above 0: the policy agrees with the data.
    """
    if world.loss.unpaired:
        return reward_N2[:, 0] * np.array([tree.label for tree in trees], np.float32)
    return reward_N2[:, 0] - reward_N2[:, 1]


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
