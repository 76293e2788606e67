"""Who wins? Rewards of two policies on the same prompts → win rate with its interval; and what a set of texts looks
like.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class WinRate:
    """(wins + ties/2) / n of a policy against a baseline, with a 95 % interval over prompts."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def win_rate(policy_N: np.ndarray, baseline_N: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> WinRate:
    """Compares rewards prompt by prompt.

    Args:
        policy_N, baseline_N: rewards of the two responses to each prompt; the higher wins, equal ones tie.
        seed, resamples: of the percentile bootstrap over prompts.

    Raises:
        ValueError: different numbers of prompts, or none.
    """
    policy_N, baseline_N = np.asarray(policy_N, np.float64), np.asarray(baseline_N, np.float64)
    if policy_N.shape != baseline_N.shape or policy_N.ndim != 1 or not len(policy_N):
        raise ValueError(
            f"win rate: got rewards of shapes {policy_N.shape} and {baseline_N.shape}, expected one for each of the "
            "same prompts, at least one."
        )
    score_N = (np.sign(policy_N - baseline_N) + 1) / 2
    wins, losses = int((score_N == 1).sum()), int((score_N == 0).sum())
    # Resampling prompts with replacement is a multinomial draw over the three outcomes.
    shares = np.array([losses, len(score_N) - wins - losses, wins]) / len(score_N)
    draws = np.random.default_rng(seed).multinomial(len(score_N), shares, size=resamples)
    low, high = np.quantile(draws @ [0, 0.5, 1] / len(score_N), [0.025, 0.975])
    return WinRate(wins, len(score_N) - wins - losses, losses, float(score_N.mean()), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float


def over_seeds(value_SP: Sequence[np.ndarray], *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Mean over seeds of the mean over prompts, with the percentile bootstrap over both: seeds are drawn with
    replacement and, within each one drawn, its prompts. With one seed the interval holds the noise of prompts alone.

    Args:
        value_SP: for each seed a value for each prompt (differences, or 0 / ½ / 1 for lost, tied, won).

    Raises:
        ValueError: no seed, or one without prompts.
    """
    values = [np.asarray(v, np.float64) for v in value_SP]
    if not values or not all(len(v) for v in values):
        raise ValueError(f"over seeds: got {[len(v) for v in values]} values by seed, expected at least one each.")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(resamples, len(values)))
    means = np.zeros(drawn.shape)
    for s, value in enumerate(values):  # each seed's resampled means, as many as it was drawn
        where = drawn == s
        picks = rng.integers(len(value), size=(int(where.sum()), len(value)))
        means[where] = value[picks].mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), [0.025, 0.975])
    return Interval(float(np.mean([v.mean() for v in values])), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Texts:
    """Of a set of responses: mean tokens, share finished by EOS, distinct-2 (different / all word pairs, pooled)."""

    length: float
    finished: float
    distinct_2: float


def texts(responses: Sequence[str], lengths: Sequence[int], finished: Sequence[bool]) -> Texts:
    """Statistics of responses; word pairs are of white-space words, within one response."""
    pairs = [pair for text in responses for words in (text.split(),) for pair in zip(words, words[1:])]
    return Texts(
        length=float(np.mean(lengths)),
        finished=float(np.mean(finished)),
        distinct_2=len(set(pairs)) / max(len(pairs), 1),
    )
