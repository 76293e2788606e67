"""Held-out pairs: what a policy makes of them while an iteration trains and at its end; which point was the best."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sera_jax import losses, policies, programs, score
from sera_jax.policies import Live, Name
from sera_jax.records import Tree
from sera_jax.run import Checks, Validation
from sera_jax.train.select import loss_logps, loss_reference, margins, pair_logps, weighed
from sera_jax.train.world import World

BEST: dict[str, Callable[[dict[str, float]], float]] = {
    "accuracy": lambda found: found["validation/accuracy"],
    "loss": lambda found: -found["validation/loss"],
    "reward": lambda found: found["eval/reward"],
}
"""What loop.best goes by: metrics → a value, the higher the better."""


@dataclasses.dataclass(frozen=True)
class References:
    """Log-probs of the held-out pairs, float32 [N, 2], zeros for no reference: under that of the loss of an iteration,
    as the loss sees them, and under iterate 0, against which rewards are told, so that iterations compare."""

    loss_N2: np.ndarray
    start_N2: np.ndarray


def references(world: World, t: int, live: Live) -> References:
    """Those of iteration t, through the ledger."""
    start = Name("iterate", 0) if world.loss.reference else None
    return References(
        _seen(world, loss_reference(world, t), live), pair_logps(world, start, world.given.held_out, live)
    )


def _seen(world: World, name: Name | None, live: Live) -> np.ndarray:
    """float32 [N, 2]: of the held-out pairs under a model of the run, as the loss sees them."""
    plan, what = world.score_plan, "the held-out pairs"
    return loss_logps(world, name, world.given.held_out, live, plan=plan, what=what).reshape(-1, 2)


def measured(world: World, logp_N2: np.ndarray, seen_N2: np.ndarray, reference: References) -> dict[str, float]:
    """Loss (that of training, by the pairs' weights, all of them one batch), implicit-reward accuracy and margin.

    WPO's weights are left out: with them the loss would fall when the policy finds the held-out pairs less likely.

    Args:
        logp_N2: of the policy; seen_N2: the same as the loss sees them.
    """
    trees = world.given.held_out
    length_N2 = jnp.array([[len(b) for b in tree.branches] for tree in trees], jnp.float32)
    weight_N = np.array([tree.weight for tree in trees], np.float64)
    batch = (jnp.asarray(weight_N > 0),) if world.loss.coupled else ()
    batch += losses.told(world.loss, jnp.array([tree.told for tree in trees], jnp.float32))
    loss_N = world.loss.loss(jnp.asarray(seen_N2), jnp.asarray(reference.loss_N2), length_N2, *batch, **world.loss_keys)
    reward_N2 = world.loss.reward(jnp.asarray(logp_N2), jnp.asarray(reference.start_N2), length_N2, **world.loss_keys)
    margin_N = margins(world, trees, np.asarray(reward_N2))
    return {
        "validation/loss": float(np.sum(weight_N * np.asarray(loss_N, np.float64)) / max(weight_N.sum(), 1e-30)),
        "validation/accuracy": float((margin_N > 0).mean()),
        "validation/margin": float(margin_N.mean()),
    }


def of_stage(world: World, t: int, scored: Live) -> Validation | None:
    """The checks of iteration t. Asks for the references while `scored` is all that is in memory. Rewards are of whole
    iterations: nothing is sampled inside of one."""
    config, trees = world.config.loop, world.given.held_out
    if not trees:
        return None
    reference = references(world, t, scored)
    if not config.validate_every:
        return None
    inside = config.best and config.best_by != "reward"
    scorer = programs.scorer(world.policies.arch, world.mesh, world.policies.compute)

    def keep(trained: Any) -> None:
        policies.save(world.policies, Live(Name("best", t), policies.whole(world.policies, trained)), 0.0)

    def measure(trained: Any) -> dict[str, float]:
        run = programs.score_rows(scorer, policies.whole(world.policies, trained), world.mesh)

        def flat(some: Sequence[Tree]) -> np.ndarray:
            chunks = [some[i : i + score.CHUNK] for i in range(0, len(some), score.CHUNK)]
            return np.concatenate([score.logps(chunk, run, world.score_plan) for chunk in chunks])

        whole_F = flat(trees)
        seen_F = weighed(world, trees, whole_F, flat)
        return measured(world, whole_F.reshape(-1, 2), seen_F.reshape(-1, 2), reference)

    return Validation(
        every=config.validate_every,
        measure=measure,
        patience=config.early_stop,
        best=BEST[config.best_by] if inside else None,
        keep=keep if inside else None,
    )


def at_end(
    world: World, t: int, live: Live, checks: Checks, update: int, evaluated: dict[str, float] | None = None
) -> dict[str, float]:
    """The same of iterate t; with loop.best, value and update of the iteration's best point, the earlier of equal ones.

    Args:
        checks: of the stage before its end, which was at `update`. evaluated: what the evaluation says of iterate t.
    """
    found: dict[str, float] = {}
    if world.given.held_out:
        logp_N2 = pair_logps(world, live.name, world.given.held_out, live)
        found = measured(world, logp_N2, _seen(world, live.name, live), references(world, t, live))
    if not world.config.loop.best:
        return found
    value = BEST[world.config.loop.best_by](found | (evaluated or {}))
    best = (checks.best, checks.best_update) if checks.best is not None and not value > checks.best else (value, update)
    return {**found, "validation/best": best[0], "validation/best_update": best[1]}


def best(world: World, summaries: Sequence[dict[str, Any]]) -> tuple[Name, int]:
    """The best point of the run, the earliest of equal ones: the policy, and behind which update of its iteration."""
    # max keeps the first of equal ones; a value that is not a number loses to every other.
    value = lambda summary: -np.inf if np.isnan(summary["validation/best"]) else summary["validation/best"]
    summary = max(summaries, key=value)
    t, update = summary["iteration"], summary["validation/best_update"]
    return Name("iterate" if update == summary.get("updates", update) else "best", t), update
