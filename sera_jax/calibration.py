"""Does a predicted probability hold, in either order too? Margins of rewards → bins, and the expected calibration
error; answers about two responses → do both orders agree. NumPy only."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What pairs say of the probabilities that a reward model gives them, bin by bin of its confidence.

    edges_K1: of K equal bins over [½, 1]. count_K: int, pairs in each. confidence_K: mean predicted probability of the
    preferred response; accuracy_K: share of pairs in which it is the annotator's, ties half; NaN in an empty bin.
    error: Σ count/N · |accuracy − confidence| (Guo et al. 2017, eq. 3), NaN without pairs.
    """

    edges_K1: np.ndarray
    count_K: np.ndarray
    confidence_K: np.ndarray
    accuracy_K: np.ndarray
    error: float


def calibration(margin_N: np.ndarray, bins: int = 10) -> Calibration:
    """Of r_chosen − r_rejected, float [N]: Bradley-Terry predicts the annotator's choice with probability σ(margin).

    Which response is called chosen is known beforehand, so a pair counts by the response that the model prefers: its
    confidence is σ(|margin|), and it is right where the margin is above 0. A bin holds its upper edge, the first its
    lower one too.
    """
    margin_N = np.asarray(margin_N, np.float64)
    confidence_N = 1 / (1 + np.exp(-np.abs(margin_N)))
    right_N = (np.sign(margin_N) + 1) / 2
    edges_K1 = np.linspace(0.5, 1.0, bins + 1)
    bin_N = np.clip(np.searchsorted(edges_K1, confidence_N, side="left") - 1, 0, bins - 1)
    count_K = np.bincount(bin_N, minlength=bins)
    mean = lambda values_N: np.bincount(bin_N, weights=values_N, minlength=bins) / np.where(count_K, count_K, np.nan)
    confidence_K, accuracy_K = mean(confidence_N), mean(right_N)
    gap_K = np.nan_to_num(np.abs(accuracy_K - confidence_K))
    error = float(np.sum(count_K * gap_K) / len(margin_N)) if len(margin_N) else float("nan")
    return Calibration(edges_K1, count_K, confidence_K, accuracy_K, error)


def of_orders(place_Q2: np.ndarray) -> tuple[float, float]:
    """Of Q > 0 pairs of responses: the share on which both orders agree, and the mean probability that the response in
    the first place is the better one, 0.5 where places do not count.

    Args:
        place_Q2: float, that probability in either order.
    """
    agree_Q = np.sign(place_Q2[:, 0] - 0.5) == np.sign(0.5 - place_Q2[:, 1])
    return float(agree_Q.mean()), float(place_Q2.mean())
