"""Correlations: against scipy and closed forms; intervals cover what they should."""

import math

import numpy as np
import pytest
import scipy.stats

from sera_jax import correlation


@pytest.fixture
def scores():
    """Two evaluators with ties on 60 responses, four to a prompt; prompts differ more than responses do."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(15), 4)
    quality = rng.normal(size=60) + 3 * rng.normal(size=15)[group]
    one, other = (np.round(2 * (quality + noise * rng.normal(size=60))) for noise in (0.3, 1.0))
    assert len(set(one)) < 40  # ties
    return one, other, group


def test_ranks_are_mid_ranks_also_of_what_is_there_several_times():
    values, times = np.array([3.0, 1.0, 3.0, 2.0, 1.0]), np.array([2, 1, 0, 3, 1])
    np.testing.assert_array_equal(correlation.ranks(values) + 0.5, scipy.stats.rankdata(values))
    got = correlation.ranks(values, times) + 0.5
    whole = scipy.stats.rankdata(np.repeat(values, times))
    np.testing.assert_array_equal(np.repeat(got, times), whole)


def test_pooled_correlations_are_scipys(scores):
    one, other, _ = scores
    assert correlation.pearson(one, other) == pytest.approx(scipy.stats.pearsonr(one, other)[0], abs=1e-12)
    assert correlation.spearman(one, other) == pytest.approx(scipy.stats.spearmanr(one, other)[0], abs=1e-12)


def test_weights_are_how_often_a_response_is_there(scores):
    one, other, _ = scores
    times = np.random.default_rng(1).integers(0, 4, 60)
    again = np.repeat(one, times), np.repeat(other, times)
    assert correlation.pearson(one, other, times) == pytest.approx(scipy.stats.pearsonr(*again)[0], abs=1e-12)
    assert correlation.spearman(one, other, times) == pytest.approx(scipy.stats.spearmanr(*again)[0], abs=1e-12)


def test_within_prompts_prompts_do_not_count(scores):
    """What is added to all responses of a prompt changes the pooled figure alone; loops as the witness."""
    one, other, group = scores
    shift = 100.0 * np.random.default_rng(2).normal(size=15)[group]
    told = correlation.within(one, other, group)
    assert correlation.within(one + shift, other - shift, group) == pytest.approx(told, abs=1e-9)
    assert correlation.pearson(one + shift, other - shift) < -0.9 < told < correlation.pearson(one, other)
    parts = [[values[group == g] - values[group == g].mean() for g in range(15)] for values in (one, other)]
    want = scipy.stats.pearsonr(*(np.concatenate(part) for part in parts))[0]
    assert told == pytest.approx(want, abs=1e-12)
    ranked = [
        np.concatenate([scipy.stats.rankdata(values[group == g]) - 2.5 for g in range(15)]) for values in (one, other)
    ]
    found = correlation.agreement(one, other, group_N=group, prompt_N=group, resamples=1)
    assert found.spearman_within.value == pytest.approx(scipy.stats.pearsonr(*ranked)[0], abs=1e-12)
    assert found.pearson_within.value == pytest.approx(want, abs=1e-12)


def test_what_does_not_vary_correlates_with_nothing():
    same, values = np.full(6, 0.1 + 0.2), np.arange(6.0)
    group = np.array([0, 0, 1, 1, 2, 2])
    assert math.isnan(correlation.pearson(same, values)) and math.isnan(correlation.spearman(values, same))
    assert math.isnan(correlation.within(group * 0.3, values, group)) and correlation.told(math.nan) is None
    assert correlation.told(0.5) == 0.5 and math.isnan(correlation.pearson(values, values, np.zeros(6)))
    assert correlation.pearson(values, 3 * values + 1) == correlation.spearman(values, values**3) == 1


def test_missing_scores_are_left_out_pair_by_pair(scores):
    one, other, group = (values.astype(float).copy() for values in scores)
    one[3], other[[5, 6, 7, 4]] = np.nan, np.nan
    there = np.isfinite(one) & np.isfinite(other)
    found = correlation.agreement(one, other, group_N=group, prompt_N=group, resamples=20)
    assert (found.responses, found.prompts) == (there.sum(), 14)
    assert found.spearman.value == pytest.approx(scipy.stats.spearmanr(one[there], other[there])[0], abs=1e-12)
    nothing = correlation.agreement(one * np.nan, other, group_N=group, prompt_N=group)
    assert (nothing.responses, nothing.prompts) == (0, 0) and math.isnan(nothing.pearson.low)


def test_intervals_cover_the_truth_and_are_wider_where_prompts_are_few():
    """Of 100 worlds with a correlation of 0.6 about 95 intervals hold it; responses of a prompt are not independent."""
    rng, inside, narrow = np.random.default_rng(3), 0, []
    group = np.repeat(np.arange(60), 3)
    for _ in range(100):
        pair = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=60)[group]  # of a prompt all are alike
        found = correlation.agreement(pair[:, 0], pair[:, 1], group_N=group, prompt_N=group, resamples=200)
        inside += found.pearson.low <= 0.6 <= found.pearson.high
        narrow.append(found.pearson.high - found.pearson.low)
    assert 88 <= inside <= 100
    spread = 2 * 1.96 * (1 - 0.36) / math.sqrt(60)  # of 60 independent pairs, not of 180
    assert np.mean(narrow) == pytest.approx(spread, rel=0.2)


def test_seeds(scores):
    one, other, group = scores
    draws = [
        correlation.agreement(one, other, group_N=group, prompt_N=group, resamples=50, seed=seed).pearson.low
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
