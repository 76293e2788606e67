"""Annotators: what they perceive, and the pairs that they make of responses."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax.toyworld.facts import RESPONSE_WORDS, gold


@dataclasses.dataclass(frozen=True)
class Annotator:
    """Who labels. It perceives  gold, changed by the cue,  + temperature · Gumbel noise  and prefers the higher.

    The difference of two Gumbel variables is logistic, so a temperature τ > 0 is Bradley-Terry with gap / τ; 0 = hard
    labels. cue: how length enters (CUES), cue_strength: how much. The label is then exchanged, together with the
    reported scores, with probability `flip`, and with probability gap_flip · exp(-|gold gap| / GAP).
    """

    flip: float = 0.0
    gap_flip: float = 0.0
    temperature: float = 0.0
    cue: str = "additive"
    cue_strength: float = 0.0


GAP = 0.25  # gold; the gap at which gap-dependent flips are e times rarer than at none


def additive(gold_C: np.ndarray, words_C: np.ndarray, strength: float, luck: float) -> np.ndarray:
    """Ten words are worth `strength` of gold."""
    return gold_C + strength * words_C / 10


def near_tie(gold_C: np.ndarray, words_C: np.ndarray, strength: float, luck: float) -> np.ndarray:
    """Gold is seen in steps of `strength`; among those on one step the longer wins."""
    if not strength:
        return gold_C
    return strength * (np.floor(gold_C / strength) + words_C / (10 * RESPONSE_WORDS[1]))


def lazy(gold_C: np.ndarray, words_C: np.ndarray, strength: float, luck: float) -> np.ndarray:
    """A share `strength` of the annotators looks at the length alone."""
    return words_C / 10 if luck < strength else gold_C


CUES: dict[str, Callable[..., np.ndarray]] = {"additive": additive, "near_tie": near_tie, "lazy": lazy}
"""(gold, words, strength, uniform draw of the annotator) → what is perceived before the noise."""


def best_worst(perceived_C: np.ndarray, order_C: np.ndarray) -> tuple[int, int]:
    """The best and the worst of the candidates; ties by `order_C`, a random permutation."""
    ranked = order_C[np.argsort(-perceived_C[order_C], kind="stable")]
    return int(ranked[0]), int(ranked[-1])


def random_two(perceived_C: np.ndarray, order_C: np.ndarray) -> tuple[int, int]:
    """Two candidates at random, the better first."""
    return best_worst(perceived_C, order_C[:2])


PAIR_RULES: dict[str, Callable[[np.ndarray, np.ndarray], tuple[int, int]]] = {
    "best_worst": best_worst,
    "random": random_two,
}
"""(perceived scores, random permutation) → indices of (preferred, dispreferred)."""


def annotate(
    rng: np.random.Generator, prompt: str, responses: Sequence[str], annotator: Annotator, rule: str = "best_worst"
) -> dict[str, Any]:
    """A row of a pair file without id and author.

    score_*: what the annotator reports, so score_chosen is never the lower one; gold_*: the gold reward; flipped:
    exchanged by `flip` or `gap_flip`; cued: the cue alone turned the order of gold; upset: the noise turned the order
    of gold + cue. The same draws are made whatever the dials say, so worlds that differ in a dial differ in nothing
    else.
    """
    noise_C, order_C = rng.gumbel(size=len(responses)), rng.permutation(len(responses))
    flip_luck, gap_luck, cue_luck = rng.random(3)
    gold_C = np.array([gold(prompt, r) for r in responses])
    words_C = np.array([len(r.split()) for r in responses])
    cued_C = CUES[annotator.cue](gold_C, words_C, annotator.cue_strength, cue_luck)
    score_C = cued_C + annotator.temperature * noise_C
    a, b = PAIR_RULES[rule](score_C, order_C)
    unsure = annotator.gap_flip * np.exp(-abs(gold_C[a] - gold_C[b]) / GAP)
    flipped = flip_luck < annotator.flip or gap_luck < unsure
    chosen, rejected = (b, a) if flipped else (a, b)
    return {
        "prompt": prompt,
        "chosen": responses[chosen],
        "rejected": responses[rejected],
        "score_chosen": round(float(score_C[a]), 6),
        "score_rejected": round(float(score_C[b]), 6),
        "gold_chosen": float(gold_C[chosen]),
        "gold_rejected": float(gold_C[rejected]),
        "flipped": bool(flipped),
        "cued": bool((gold_C[a] - gold_C[b]) * (cued_C[a] - cued_C[b]) < 0),
        "upset": bool(cued_C[a] < cued_C[b]),
    }
