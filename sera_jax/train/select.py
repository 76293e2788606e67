"""score → margins → select: what the policy says of the given pairs, and which of them an iteration trains on."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from sera_jax import losses, policies, programs, sera
from sera_jax import mesh as meshes
from sera_jax.policies import Live, Name
from sera_jax.records import Pair, Tree
from sera_jax.train import world as worlds
from sera_jax.train.world import SCORE_CHUNK, Given, World

MARGIN_SCORES = ("irm", "irm_per_token", "alignment_potential")  # built on the implicit reward of the policy


@dataclasses.dataclass(frozen=True)
class Selection:
    """Iteration t's verdict on the given pairs: numbers by pair, NumPy."""

    mask_N: np.ndarray
    score_N: np.ndarray
    margin_N: np.ndarray
    logp_N2: np.ndarray


def review(world: World, t: int, scored: Live) -> Selection | None:
    """Scores the given pairs under the policy and selects; None while all pairs are trained on."""
    config = world.config
    if t < config.select.from_iteration:
        return None
    trees, n = world.given.trees, len(world.given.trees)
    reference = reward_reference(world, scored)
    names, weights_E = ensemble(world, scored)
    logp_EN2 = np.stack([pair_logps(world, name, trees, scored) for name in names])
    padded = -(-n // meshes.row_shards(world.mesh)) * meshes.row_shards(world.mesh)
    groups = _groups(world.given, config.select.stratify)
    arrays = {
        "logp_EN2": logp_EN2,
        "reward_reference_N2": pair_logps(world, reference, trees, scored),
        "loss_reference_N2": pair_logps(world, loss_reference(world, t), trees, scored),
        "length_N2": np.array([[len(b) for b in tree.branches] for tree in trees], np.float32),
        "gap_N": np.array([_gap(pair) for pair in world.given.pairs], np.float32),
        "valid_N": np.ones(n, bool),
        "group_N": groups,
        "example_N": np.arange(n, dtype=np.int32),
    }
    arrays = {name: _pad(a, padded, axis=1 if name == "logp_EN2" else 0) for name, a in arrays.items()}
    arrays["keep_G"] = sera.keep_counts(config.select.keep, groups, int(groups.max()) + 1)
    arrays["weights_E"] = weights_E
    where = programs.selector_shardings(world.mesh)
    key = jax.device_put(worlds.key(world, "select", t), where["key"])
    select = programs.selector(
        world.mesh,
        lambda logp, ref, length: world.loss.reward(logp, ref, length, **world.loss_keys),
        world.loss,
        world.loss_keys,
        score_name=config.select.score,
        rule=config.select.rule,
        threshold=config.select.threshold,
    )
    out = select(**{name: meshes.put(a, where[name]) for name, a in arrays.items()}, key=key)
    out = {name: np.asarray(a) for name, a in meshes.get(out).items()}
    sera.check_finite(out["bad"], [p.id for p in world.given.pairs], f"score {config.select.score} of iteration {t}")
    return Selection(out["mask_N"][:n], out["score_N"][:n], out["margin_N"][:n], logp_EN2[-1])


def pair_logps(world: World, name: Name | None, trees: Sequence[Tree], live: Live) -> np.ndarray:
    flat = policies.logps(
        world.policies, name, trees, live=live, plan=world.score_plan, chunk=SCORE_CHUNK, what="the pairs"
    )
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


def _groups(given: Given, stratify: str) -> np.ndarray:
    """int32 [N]: the stratum of each pair."""
    lengths = np.array([tree.targets for tree in given.trees])
    labels = {
        "none": lambda: np.zeros(len(lengths)),
        "source": lambda: np.array([pair.source for pair in given.pairs]),
        "length": lambda: np.searchsorted(np.quantile(lengths, [0.25, 0.5, 0.75]), lengths),
        "prompt": lambda: np.array([tree.prompt.tobytes() for tree in given.trees], object),
    }[stratify]()
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)


def _gap(pair: Pair) -> float:
    return np.nan if pair.scores is None else pair.scores[0] - pair.scores[1]


def _pad(array: np.ndarray, size: int, axis: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)
