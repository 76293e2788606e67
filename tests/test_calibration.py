"""Calibration of a reward model: against a loop over pairs, by hand, and on labels that are drawn as predicted."""

import math

import numpy as np
import pytest

from sera_jax.calibration import calibration, of_orders


def by_loop(margins: list[float], bins: int) -> tuple[list[list[tuple[float, float]]], float]:
    """(confidence, right) of the pairs of each bin, and Σ n/N · |mean right - mean confidence|."""
    held: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        right = 0.5 if margin == 0 else float(margin > 0)
        number = max(0, math.ceil((confidence - 0.5) / (0.5 / bins) - 1e-9) - 1)
        held[min(number, bins - 1)].append((confidence, right))
    error = 0.0
    for pairs in held:
        if pairs:
            c, r = (sum(column) / len(pairs) for column in zip(*pairs))
            error += len(pairs) / len(margins) * abs(r - c)
    return held, error


@pytest.mark.parametrize("bins", [10, 3])
def test_bins_and_error_equal_a_loop(bins):
    margins = [*np.random.default_rng(0).normal(0.5, 1.5, 200), 0.0, 800.0, -800.0]
    got, (held, error) = calibration(np.array(margins), bins), by_loop(margins, bins)
    assert got.count_K.tolist() == [len(pairs) for pairs in held]
    np.testing.assert_allclose(got.error, error, rtol=1e-12)
    for k, pairs in enumerate(held):
        np.testing.assert_allclose((got.confidence_K[k], got.accuracy_K[k]), np.mean(pairs, axis=0), rtol=1e-12)
    np.testing.assert_allclose(got.edges_K1, 0.5 + np.arange(bins + 1) * 0.5 / bins)


def test_three_pairs_by_hand():
    """σ(1.0) = 0.731 twice, once right; σ(3.0) = 0.953, right: 2/3·(0.731 - 0.5) + 1/3·(1 - 0.953)."""
    got = calibration(np.array([1.0, -1.0, 3.0]))
    np.testing.assert_allclose(got.error, 2 / 3 * (0.7310586 - 0.5) + 1 / 3 * (1 - 0.9525741), rtol=1e-6)
    assert got.count_K.tolist() == [0, 0, 0, 0, 2, 0, 0, 0, 0, 1]
    assert got.accuracy_K[[4, 9]].tolist() == [0.5, 1.0] and np.isnan(got.accuracy_K[0])


def test_labels_drawn_as_predicted_are_calibrated_and_overconfidence_shows():
    rng = np.random.default_rng(1)
    margin = rng.normal(0, 2, 200_000)
    signed = np.where(rng.random(len(margin)) < 1 / (1 + np.exp(-margin)), margin, -margin)  # chosen less rejected
    assert calibration(signed).error < 0.01 < 0.1 < calibration(4 * signed).error


def test_no_pairs():
    got = calibration(np.zeros(0))
    assert math.isnan(got.error) and not got.count_K.any()


def test_both_orders_by_hand():
    """Who is preferred has to agree: 0.9 here and 0.2 there do, and two ties; 0.9 and 0.6 do not, nor 0.9 and a tie."""
    place_Q2 = np.array([[0.9, 0.2], [0.5, 0.5], [0.9, 0.6], [0.9, 0.5]])
    agree, first = of_orders(place_Q2)
    assert agree == 0.5 and first == pytest.approx(5.0 / 8)
