"""The linear bandit of launch/bandit.py: its closed forms, its fit, what its rules find, and the table in RESULTS."""

import pathlib

import numpy as np
import pyarrow.parquet
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bandit(script):
    return script("launch/bandit.py")


def test_the_gap_is_a_divergence_both_ways(bandit):
    """J(π*) - J(π) = η·KL(π ‖ π*) for the KL-regularised value, and the theorem adds η·KL(π* ‖ π); policies by hand."""
    rng = np.random.default_rng(0)
    reward, believed = rng.normal(size=(2, 40, bandit.ACTIONS))
    regret, behind = bandit.gap(reward, believed)
    best, own = (np.exp(r / bandit.ETA) / np.exp(r / bandit.ETA).sum(1, keepdims=True) for r in (reward, believed))
    kl = lambda p, q: bandit.ETA * (p * np.log(p / q)).sum(1).mean()
    assert regret == pytest.approx(kl(own, best), rel=1e-9) and behind == pytest.approx(kl(best, own), rel=1e-9)
    assert bandit.gap(reward, reward + 7) == pytest.approx((0, 0), abs=1e-12)


def test_the_fit_is_the_minimum(bandit):
    rng = np.random.default_rng(1)
    truth, dphi = rng.normal(size=5), rng.normal(size=(4000, 5))
    dphi *= np.where(rng.random(4000) < 1 / (1 + np.exp(-dphi @ truth)), 1, -1)[:, None]
    found = bandit.fitted(dphi, np.zeros(5))
    value = lambda t: np.log1p(np.exp(-dphi @ t)).sum() + bandit.LAMBDA / 2 * t @ t
    for axis in np.eye(5):
        assert value(found) < min(value(found + 1e-3 * axis), value(found - 1e-3 * axis))
    assert np.abs(found - truth).max() < 0.2
    far = bandit.fitted(1e3 * dphi[:3], np.full(5, 50.0))  # what a plain Newton step would overshoot
    assert np.isfinite(far).all() and value(found) <= value(far)


def test_rare_directions_are_rare(bandit):
    rng = np.random.default_rng(2)
    of = bandit.bandit("rare", 8, rng)
    phi = bandit.features(of, 2000, rng)
    assert of.rare_D.tolist() == [False] * 4 + [True] * 4 and np.linalg.norm(of.theta_D) == pytest.approx(1.5)
    shown = (phi[..., of.rare_D] != 0).any(axis=-1)
    assert abs(shown.mean() - 0.05) < 0.005 and np.allclose(phi.var(axis=(0, 1)), 1, atol=0.06)


def test_labels_exponents_and_intervals(bandit):
    told = [{"labels": n, "gap": g} for n, g in ((8, 1.0), (16, 0.3), (24, 0.5), (32, 0.1))]
    assert [bandit.labels_to(told, e) for e in (1.0, 0.4, 0.1, 0.01)] == [8, 16, 32, np.inf]
    noise = np.exp(0.1 * np.random.default_rng(3).normal(size=(4, 200)))
    slope, low, high = bandit.exponent(np.array([4, 8, 16, 32])[:, None] ** 1.5 * noise, (4, 8, 16, 32))
    assert low < 1.5 < high and high - low < 0.05 and slope == pytest.approx(1.5, abs=0.03)
    low, high = bandit.interval(np.random.default_rng(4).normal(3, 1, 100), np.mean)
    assert low < 3 < high and 0.25 < high - low < 0.6


def test_exploring_pairs_leave_less_unknown(bandit):
    """From the same start, with as many labels: the direction of rare features of which least is known."""

    def known(rule: str, seed: int) -> list[float]:
        told = bandit.walk("rare", rule, seed, dimension=8, prompts=8, labels=64, weight=1.0)
        assert told[0]["labels"] == 8 and 64 <= told[-1]["labels"] < 72
        assert (np.diff([one["known"] for one in told]) > -1e-4).all()
        return [told[0]["known"], told[-1]["known"]]

    explored, plainly = (np.array([known(rule, seed) for seed in range(4)]) for rule in ("explore", "best_worst"))
    np.testing.assert_array_equal(explored[:, 0], plainly[:, 0])  # seeds share their first pairs
    assert explored[:, 1].mean() > 1.2 * plainly[:, 1].mean(), (explored, plainly)


def test_the_table_in_results_is_that_of_the_data(bandit):
    folder = ROOT / "configs" / "results" / "bandit"
    read = lambda name: pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()
    made = bandit.table(read("curves"), read("dimensions"))
    assert made == (folder / "table.md").read_text(encoding="utf-8")
    results = (ROOT / "configs" / "RESULTS.md").read_text(encoding="utf-8")
    assert all(line in results for line in made.splitlines() if line.startswith("| "))


def test_what_was_named_beforehand_is_told_as_it_came(bandit):
    folder = ROOT / "configs" / "results" / "bandit"
    rows = pyarrow.parquet.read_table(folder / "confirm.parquet").to_pylist()
    assert {row["seed"] for row in rows} == set(bandit.CONFIRMING)
    assert not {row["seed"] for row in rows} & {*range(40), *bandit.TUNING}
    told = " ".join((ROOT / "configs" / "RESULTS.md").read_text(encoding="utf-8").split())
    for world, (times, low, high) in bandit.confirmed(rows).items():
        assert f"**{world}** {times:.2f} [{low:.2f}, {high:.2f}]" in told
    # Where directions are rare, exploring reaches that regret in fewer labels; where none is, that is not certain.
    found = bandit.confirmed(rows)
    assert found["rare"][1] > 1 and found["even"][1] < 1 < found["even"][2]
