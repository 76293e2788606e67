"""Wins, ties and their interval against cases by hand and simulations; statistics of texts by hand."""

import numpy as np
import pytest

from sera_jax import winrate


def test_wins_ties_and_losses_are_counted():
    got = winrate.win_rate(np.array([2.0, 1.0, 0.5, 3.0, -1.0]), np.array([1.0, 1.0, 0.75, 2.0, -3.0]))
    assert (got.wins, got.ties, got.losses, got.rate) == (3, 1, 1, 0.7)
    assert 0 <= got.low < got.rate < got.high <= 1


def test_the_other_way_round():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, 200))
    one, two = winrate.win_rate(a, b), winrate.win_rate(b, a)
    assert (one.wins, one.ties, one.losses) == (two.losses, two.ties, two.wins)
    assert one.ties > 20 and one.rate == pytest.approx(1 - two.rate)
    assert (one.low, one.high) == pytest.approx((1 - two.high, 1 - two.low), abs=0.01)


@pytest.mark.parametrize("sign, rate", [(1, 1.0), (-1, 0.0), (0, 0.5)])
def test_where_all_are_alike_there_is_no_interval(sign, rate):
    got = winrate.win_rate(np.full(30, float(sign)), np.zeros(30))
    assert (got.rate, got.low, got.high) == (rate, rate, rate)


def test_shown_in_percent():
    assert str(winrate.WinRate(6, 1, 3, 0.65, 0.4, 0.8512)) == "65.0 % [40.0, 85.1]"


def test_the_interval_is_about_two_standard_errors():
    """Of a share p of n wins: p ± 1.96·√(p(1-p)/n); ties shrink it."""
    n = 1000
    for wins, ties in [(500, 0), (700, 0), (200, 600)]:
        policy = np.concatenate((np.ones(wins), np.zeros(ties), -np.ones(n - wins - ties)))
        got = winrate.win_rate(policy, np.zeros(n))
        scores = (policy + 1) / 2
        want = 1.96 * scores.std() / np.sqrt(n)
        assert (got.high - got.rate, got.rate - got.low) == pytest.approx((want, want), rel=0.08)


def test_the_interval_covers():
    """400 evaluations of 80 prompts by a policy that wins 60 %, ties 10 %: the true 0.65 is inside in about 95 %."""
    rng = np.random.default_rng(1)
    outcomes = rng.choice([1.0, 0.0, -1.0], size=(400, 80), p=[0.6, 0.1, 0.3])
    found = [winrate.win_rate(o, np.zeros(80), seed=i, resamples=2000) for i, o in enumerate(outcomes)]
    covered = np.mean([f.low <= 0.65 <= f.high for f in found])
    assert 0.91 <= covered <= 0.98  # measured: 0.94


def test_it_repeats_itself():
    a, b = np.random.default_rng(2).normal(size=(2, 50))
    assert winrate.win_rate(a, b, seed=3) == winrate.win_rate(a, b, seed=3)
    assert winrate.win_rate(a, b, seed=3) == winrate.win_rate(a + 5, b + 5, seed=3)


@pytest.mark.parametrize("a, b", [(np.zeros(3), np.zeros(4)), (np.zeros(0), np.zeros(0)), (np.zeros((2, 2)),) * 2])
def test_other_numbers_of_prompts_or_none(a, b):
    with pytest.raises(ValueError, match=r"win rate: got rewards of shapes \(.*\) and \(.*\), expected one for each"):
        winrate.win_rate(a, b)


def test_what_texts_look_like():
    got = winrate.texts(["a b a b", "a b", "c", ""], [4, 3, 1, 0], [True, True, False, True])
    assert got == winrate.Texts(length=2.0, finished=0.75, distinct_2=2 / 4)  # pairs ab ba ab | ab; none across texts
    assert winrate.texts(["a"], [1], [False]) == winrate.Texts(1.0, 0.0, 0.0)
    assert winrate.texts(["a  b\nc"], [5], [True]).distinct_2 == 1.0
