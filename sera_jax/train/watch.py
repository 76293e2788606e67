"""What may go wrong with a policy without an error: measured after each iteration, told, and no more than told.

Measured on the *watched* pairs, the first score.CHUNK given ones, before training and after each iteration, so that
changes are those of the policy and not of the batches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sera_jax import metrics, policies, programs, rewards, score, winrate
from sera_jax.ledger import derived_tag
from sera_jax.policies import Live, Name
from sera_jax.records import Candidates, Tree
from sera_jax.train.select import margins, pair_logps
from sera_jax.train.world import World

# When to speak. Starting points from what runs of DPO look like, not truths.
FALL = 0.1  # nats a token that the chosen responses have lost since the start
STEP = 0.05  # the same within an iteration
DRIFT = 1.5  # samples longer, or shorter, than the given chosen responses by this factor
MARGIN = 10.0  # median |margin|: beyond it Bradley-Terry says 0.99995, and σ no longer moves
DISTINCT = 0.7  # distinct-2 of the samples, as a share of what it was when first sampled
IDENTICAL = 0.5  # share of candidates that repeat another one of their prompt
UNFINISHED = 0.25  # share of candidates without EOS


def watched(world: World) -> tuple[Tree, ...]:
    """A whole chunk of the given set: what the ledger knows of it was computed in the same packing."""
    return world.given.trees[: score.CHUNK]


def begin(world: World, t: int, scored: Live) -> None:
    """Keeps in the ledger what iterate 0 says of the watched pairs, while it is in memory."""
    if t == 1 and watched(world):
        pair_logps(world, Name("iterate", 0), watched(world), scored)


def of_policy(world: World, live: Live) -> dict[str, float]:
    """The policy on the watched pairs, rewards against iterate 0, and how much of a margin is the packing's.

    sera/margin_noise: the largest difference that another packing (each half of the pairs by itself) makes to a margin.
    logp_per_token: of the chosen responses, the desirable ones of unpaired examples; missing where none is. Nothing
    without given pairs.
    """
    trees = watched(world)
    if not trees:
        return {}
    length_N2 = np.array([[len(b) for b in tree.branches] for tree in trees], np.float32)
    start_N2 = pair_logps(world, Name("iterate", 0), trees, live)
    logp_N2 = pair_logps(world, live.name, trees, live)
    again_N2 = np.empty_like(logp_N2)
    again_N2[0::2], again_N2[1::2] = _repacked(world, live, [trees[0::2], trees[1::2]])

    def margin_N(value_N2: np.ndarray) -> np.ndarray:
        arrays = (jnp.asarray(a) for a in (value_N2, start_N2, length_N2))
        return margins(world, trees, np.asarray(world.loss.reward(*arrays, **world.loss_keys)))

    first_N = margin_N(logp_N2)
    good_N = np.array([tree.label >= 0 for tree in trees])  # 0: a pair
    total = lambda value_N2: float(value_N2[good_N, 0].sum(dtype=np.float64))
    likely = {"watch/logp_per_token": logp_N2, "watch/logp_per_token_start": start_N2} if good_N.any() else {}
    return {
        "sera/margin_noise": float(np.abs(margin_N(again_N2) - first_N).max()),
        **{name: total(value_N2) / total(length_N2) for name, value_N2 in likely.items()},
        "watch/margin_size": float(np.median(np.abs(first_N))),
    }


def _repacked(world: World, live: Live, parts: Sequence[Sequence[Tree]]) -> list[np.ndarray]:
    """float32 [n, 2] of each part, scored by itself; kept in the ledger, under a tag of their own."""
    where = world.policies

    def load() -> Callable:
        scorer = programs.scorer(where.arch, where.mesh, where.compute)
        return programs.score_rows(scorer, live.params, where.mesh)

    return [
        score.set_logps(
            part,
            tag=derived_tag(policies.tag(where, live.name), "packed otherwise"),
            ledger=where.ledger,
            load=load,
            plan=world.score_plan,
            label="measuring what packing does to margins",
        ).reshape(-1, 2)
        for part in parts
    ]


def of_samples(world: World, candidates: Candidates | None) -> dict[str, float]:
    """What the candidates of an iteration look like, beside the given chosen responses, where there are any."""
    if candidates is None:
        return {}
    length_PC = rewards.lengths(candidates)
    real_PC = length_PC > 0
    chosen = [len(tree.branches[0]) for tree in world.given.trees]
    texts = [text for row, real in zip(candidates.texts_PC, real_PC) for text, r in zip(row, real) if r]
    different = sum(len({ids.tobytes() for ids in row if len(ids)}) for row in candidates.tokens_PC)
    looks = winrate.texts(texts, length_PC[real_PC], candidates.finished_PC[real_PC])
    return {
        "gen/length": looks.length,
        **({"gen/length_ratio": looks.length / float(np.mean(chosen))} if chosen else {}),
        "gen/finished": looks.finished,
        "gen/distinct_2": looks.distinct_2,
        "gen/identical": 1 - different / len(texts),
    }


# --- warnings: (this iteration's summary, those before) → a sentence, or nothing to say -------------------------------


def likelihood(summary: dict[str, Any], before: Sequence[dict[str, Any]]) -> str | None:
    """logps/chosen: a preference loss is content if both responses become less likely, the rejected one more so."""
    if "watch/logp_per_token" not in summary:
        return None
    now, start = summary["watch/logp_per_token"], summary["watch/logp_per_token_start"]
    last = before[-1]["watch/logp_per_token"] if before else start
    if not (start - now > FALL or last - now > STEP):
        return None
    return (
        f"logps/chosen falls: the given chosen responses have {now - start:+.3f} nats a token since the start, "
        f"{now - last:+.3f} in this iteration. loss.sft_weight, a larger loss.beta or a lower learning rate hold them."
    )


def length(summary: dict[str, Any], before: Sequence[dict[str, Any]]) -> str | None:
    ratio = summary.get("gen/length_ratio")
    if ratio is None or 1 / DRIFT <= ratio <= DRIFT:
        return None
    return (
        f"length drifts: samples have {ratio:.2f} times the tokens of the given chosen responses. "
        "reward.length_penalty, reward.length_normalise or loss simpo act on it."
    )


def diversity(summary: dict[str, Any], before: Sequence[dict[str, Any]]) -> str | None:
    if "gen/distinct_2" not in summary:
        return None
    first = next((s["gen/distinct_2"] for s in before if "gen/distinct_2" in s), summary["gen/distinct_2"])
    said = []
    if summary["gen/distinct_2"] < DISTINCT * first:
        said.append(f"distinct-2 is {summary['gen/distinct_2']:.3f}, it was {first:.3f}")
    if summary["gen/identical"] > IDENTICAL:
        said.append(f"{100 * summary['gen/identical']:.0f} % of the candidates repeat another one of their prompt")
    return f"samples collapse: {', '.join(said)}. Raise bootstrap.temperature or loss.beta." if said else None


def margin(summary: dict[str, Any], before: Sequence[dict[str, Any]]) -> str | None:
    size = summary.get("watch/margin_size", 0.0)
    if not size > MARGIN:
        return None
    return (
        f"margins blow up: their median size is {size:.1f} on the given pairs, where the loss no longer tells them "
        "apart. Fewer updates, a lower learning rate or loss ipo keep them small."
    )


def unfinished(summary: dict[str, Any], before: Sequence[dict[str, Any]]) -> str | None:
    share = 1 - summary.get("gen/finished", 1.0)
    if share <= UNFINISHED:
        return None
    return (
        f"{100 * share:.0f} % of the candidates are unfinished. Raise bootstrap.max_new_tokens, or look at the EOS ids."
    )


WARNINGS: tuple[Callable[[dict[str, Any], Sequence[dict[str, Any]]], str | None], ...] = (
    likelihood,
    length,
    diversity,
    margin,
    unfinished,
)


def warnings(summary: dict[str, Any], before: Sequence[dict[str, Any]]) -> list[str]:
    """What there is to say of an iteration; said, too."""
    told = [said for said in (warning(summary, before) for warning in WARNINGS) if said]
    for said in told:
        metrics.say(f"iteration {summary['iteration']}, warning: {said}")
    return told
