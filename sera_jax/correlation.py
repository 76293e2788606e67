"""Do two who judge the same responses agree? Pearson and Spearman, pooled and within prompts, with intervals over
prompts. NumPy only.

Letters: N judged responses, G groups of them (the responses that are compared with one another), R resamples.
"""

import dataclasses
import math

import numpy as np


def ranks(values_N: np.ndarray, weights_N: np.ndarray | None = None) -> np.ndarray:
    """float64 [N]: ranks from ½ on, equal values share the mean of theirs.

    Args:
        weights_N: how often each value is there, 0 or more; None = once. What is there twice takes up two ranks.
    """
    weights_N = np.ones(len(values_N)) if weights_N is None else np.asarray(weights_N, np.float64)
    return _of_levels(np.unique(values_N, return_inverse=True)[1], weights_N)


def _of_levels(level_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """Ranks of values that are numbered by size already, so that resampling sorts nothing again."""
    count_L = np.bincount(level_N, weights=weights_N)
    return (np.cumsum(count_L) - count_L / 2)[level_N]


def pearson(one_N: np.ndarray, other_N: np.ndarray, weights_N: np.ndarray | None = None) -> float:
    """Pearson's correlation by weights (None = alike); NaN where one of them does not vary."""
    one_N, other_N = np.asarray(one_N, np.float64), np.asarray(other_N, np.float64)
    weights_N = np.ones(len(one_N)) if weights_N is None else np.asarray(weights_N, np.float64)
    total = weights_N.sum()
    if not total > 0:
        return math.nan
    centred = [value_N - weights_N @ value_N / total for value_N in (one_N, other_N)]
    size = [weights_N @ value_N**2 for value_N in centred]
    # Equal values leave a rest of rounding size.
    least = [1e-12 * max(float(weights_N @ value_N**2), 1e-300) for value_N in (one_N, other_N)]
    if size[0] <= least[0] or size[1] <= least[1]:
        return math.nan
    return float(np.clip(weights_N @ (centred[0] * centred[1]) / math.sqrt(size[0] * size[1]), -1, 1))


def spearman(one_N: np.ndarray, other_N: np.ndarray, weights_N: np.ndarray | None = None) -> float:
    """Spearman's: Pearson's of the ranks."""
    return pearson(ranks(one_N, weights_N), ranks(other_N, weights_N), weights_N)


def deviations(values_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """float64 [N]: values less the mean of their group."""
    _, place_N = np.unique(group_N, return_inverse=True)
    sum_G = np.bincount(place_N, weights=np.asarray(values_N, np.float64))
    return values_N - (sum_G / np.bincount(place_N))[place_N]


def group_ranks(values_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """float64 [N]: ranks within each group."""
    out = np.empty(len(values_N))
    order = np.argsort(group_N, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(np.asarray(group_N)[order])) + 1):
        out[members] = ranks(np.asarray(values_N)[members])
    return out


def within(one_N: np.ndarray, other_N: np.ndarray, group_N: np.ndarray) -> float:
    """Pearson's of what is left when each group's mean is taken off: of how the responses to one prompt compare, not of
    which prompts are rewarded."""
    return pearson(deviations(one_N, group_N), deviations(other_N, group_N))


def told(value: float) -> float | None:
    """For JSON: None in the place of NaN."""
    return None if math.isnan(value) else value


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A correlation with its 95 % interval; NaN where one of the two does not vary."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of two evaluators on the responses that both judged: how many, to how many prompts; correlations of all responses
    pooled, and of deviations (of ranks) within the responses to one prompt that were compared."""

    responses: int
    prompts: int
    pearson: Estimate
    spearman: Estimate
    pearson_within: Estimate
    spearman_within: Estimate


def agreement(
    one_N: np.ndarray,
    other_N: np.ndarray,
    *,
    group_N: np.ndarray,
    prompt_N: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Two evaluators on the same responses; intervals by percentile bootstrap over prompts, ranks taken anew each time.

    Args:
        one_N, other_N: their scores, NaN where there is none; a response counts where both have one.
        group_N: which responses were compared with one another. prompt_N: what is resampled, of one group or more.
    """
    there_N = np.isfinite(one_N) & np.isfinite(other_N)
    one_N, other_N = (np.asarray(values_N, np.float64)[there_N] for values_N in (one_N, other_N))
    _, group_N = np.unique(np.asarray(group_N)[there_N], return_inverse=True)
    prompts, prompt_N = np.unique(np.asarray(prompt_N)[there_N], return_inverse=True)
    inside = [deviations(one_N, group_N), deviations(other_N, group_N)]
    placed = [deviations(group_ranks(values_N, group_N), group_N) for values_N in (one_N, other_N)]
    levels = [np.unique(values_N, return_inverse=True)[1] for values_N in (one_N, other_N)]
    measures = (
        lambda weights_N: pearson(one_N, other_N, weights_N),
        lambda weights_N: pearson(*(_of_levels(level_N, weights_N) for level_N in levels), weights_N),
        lambda weights_N: pearson(*inside, weights_N),  # a group is resampled whole: its mean stays
        lambda weights_N: pearson(*placed, weights_N),
    )
    once_N = np.ones(len(one_N))
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples if len(prompts) else 0):
        times = np.bincount(rng.integers(len(prompts), size=len(prompts)), minlength=len(prompts))
        drawn.append([measure(times[prompt_N].astype(np.float64)) for measure in measures])
    estimates = []
    for place, measure in enumerate(measures):
        found = np.array([row[place] for row in drawn])
        found = found[np.isfinite(found)]
        low, high = np.quantile(found, [0.025, 0.975]) if len(found) else (math.nan, math.nan)
        estimates.append(Estimate(measure(once_N), float(low), float(high)))
    return Agreement(len(one_N), len(prompts), *estimates)
