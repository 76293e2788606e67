"""Held-out pairs against float64 NumPy, loss by loss; which point is the best of a run."""

import types

import numpy as np
import pytest

from sera_jax import losses
from sera_jax.policies import Name
from sera_jax.records import Tree
from sera_jax.run import Checks
from sera_jax.train import validate, watch
from sera_jax.train.validate import References

N = 7
RNG = np.random.default_rng(0)
LENGTH = RNG.integers(1, 9, (N, 2))
LOGP, SEEN, LOSS_REF, START = (RNG.normal(-20, 4, (N, 2)).astype(np.float32) for _ in range(4))
WEIGHT = np.array([1, 0.5, 0, 2, 1, 1, 0.25])
# Pair by pair, bounded, by tokens, and of the whole batch: the kinds of loss; tests/test_losses.py has each of them.
KINDS = ("dpo", "ipo", "slic", "simpo", "kto_pair")
OWN_KEYS = {"ipo": {"normalisation": "sum"}, "simpo": {"gamma": 0.5}}


def world_of(name: str, **loop):
    ids = lambda n: np.zeros(n, np.int32)
    trees = [Tree(f"t{i}", ids(2), (ids(a), ids(b)), w) for i, ((a, b), w) in enumerate(zip(LENGTH, WEIGHT))]
    keys = {"beta": 0.1} | OWN_KEYS.get(name, {})
    loop = types.SimpleNamespace(**({"best": False, "best_by": "accuracy"} | loop))
    return types.SimpleNamespace(
        given=types.SimpleNamespace(held_out=trees, trees=tuple(trees)),
        loss=losses.mixture({name: 1.0}),
        loss_keys=keys,
        config=types.SimpleNamespace(loop=loop),
    )


def softplus(x):
    return np.log1p(np.exp(x))


def expected(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(loss of each pair, of the log-probs the loss sees; margin against the start, of the plain ones), float64."""
    logp, seen, ref, start = (a.astype(np.float64) for a in (LOGP, SEEN, LOSS_REF, START))
    gap = lambda x: x[:, 0] - x[:, 1]
    real = WEIGHT > 0
    ratio = seen - ref
    mean = np.maximum(0, ratio[real].mean(axis=0))  # of kto_pair: over the pairs that count
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    loss = {
        "dpo": lambda: softplus(-0.1 * gap(ratio)),
        "ipo": lambda: (gap(ratio) - 5) ** 2,
        "slic": lambda: np.maximum(0, 1 - 0.1 * gap(ratio)),
        "simpo": lambda: softplus(-(gap(0.1 * seen / LENGTH) - 0.5)),
        "kto_pair": lambda: (sigmoid(-0.1 * (ratio[:, 0] - mean[1])) + sigmoid(-0.1 * (mean[0] - ratio[:, 1]))) / 2,
    }[name]()
    return loss, gap(0.1 * logp / LENGTH) if name == "simpo" else 0.1 * gap(logp - start)


@pytest.mark.parametrize("name", KINDS)
def test_measured(name):
    got = validate.measured(world_of(name), LOGP, SEEN, References(LOSS_REF, START))
    loss, margin = expected(name)
    want = {
        "validation/loss": (WEIGHT * loss).sum() / WEIGHT.sum(),
        "validation/accuracy": (margin > 0).mean(),
        "validation/margin": margin.mean(),
    }
    assert got == pytest.approx(want, rel=1e-5)


def at_end(monkeypatch, value: float, checks: Checks, update: int, **loop) -> dict:
    """The end of an iteration whose accuracy is `value` and whose loss is -value."""
    monkeypatch.setattr(validate, "pair_logps", lambda *_: LOGP)
    monkeypatch.setattr(validate, "_seen", lambda *_: SEEN)
    monkeypatch.setattr(validate, "references", lambda *_: None)
    found = {"validation/loss": -value, "validation/accuracy": value, "eval/reward": value}
    monkeypatch.setattr(validate, "measured", lambda *_: dict(found))
    live = types.SimpleNamespace(name=Name("iterate", 1))
    evaluated = {"eval/reward": found.pop("eval/reward")}
    got = validate.at_end(world_of("dpo", **loop), 1, live, checks, update, evaluated)
    assert {k: got[k] for k in found} == found and "eval/reward" not in got
    return {k: v for k, v in got.items() if k not in found}


@pytest.mark.parametrize("by", validate.BEST)
def test_the_end_of_an_iteration_is_a_point_like_the_others(monkeypatch, by):
    end = lambda value, checks: at_end(monkeypatch, value, checks, 9, best=True, best_by=by)
    best = lambda value, update: {"validation/best": value, "validation/best_update": update}
    before = Checks(best=0.5, best_update=4)
    assert end(0.6, before) == best(0.6, 9) and end(0.4, before) == best(0.5, 4)
    assert end(0.5, before) == best(0.5, 4)  # the earlier of equal ones
    assert end(0.3, Checks()) == best(0.3, 9)
    assert at_end(monkeypatch, 0.6, before, 9) == {}  # nobody asked


def test_the_best_by_reward_needs_no_held_out_pairs(monkeypatch):
    world = world_of("dpo", best=True, best_by="reward")
    world.given.held_out = ()
    live = types.SimpleNamespace(name=Name("iterate", 2))
    got = validate.at_end(world, 2, live, Checks(), 7, {"eval/reward": 0.25, "eval/win_rate": 1.0})
    assert got == {"validation/best": 0.25, "validation/best_update": 7}


def test_the_best_point_of_a_run():
    summary = lambda t, best, at, updates: {
        "iteration": t,
        "validation/best": best,
        "validation/best_update": at,
        "updates": updates,
    }
    one, two, three = summary(1, 0.5, 6, 6), summary(2, 0.7, 2, 6), summary(3, 0.7, 6, 6)
    assert validate.best(None, [one]) == (Name("iterate", 1), 6)
    assert validate.best(None, [one, two, three]) == (Name("best", 2), 2)
    assert validate.best(None, [summary(1, float("nan"), 1, 6), one]) == (Name("iterate", 1), 6)
    adopted = {k: v for k, v in summary(1, 0.9, 0, 0).items() if k != "updates"}  # an iterate that was not trained here
    assert validate.best(None, [adopted, two]) == (Name("iterate", 1), 0)


def test_margin_noise_is_the_largest_difference_of_another_packing(monkeypatch):
    """Even pairs and odd pairs are packed apart; what that does to them is not mixed up."""
    shift = np.zeros((N, 2), np.float32)
    shift[3], shift[4] = (0.5, -0.25), (0.25, 0.0)
    tables = {"iterate 0": START, "iterate 1": LOGP}
    monkeypatch.setattr(watch, "pair_logps", lambda world, name, trees, live: tables[f"{name.kind} {name.t}"])
    other = LOGP + shift
    monkeypatch.setattr(watch, "_repacked", lambda world, live, parts: [other[: 2 * len(parts[0]) : 2], other[1::2]])
    world = world_of("dpo")
    got = watch.of_policy(world, types.SimpleNamespace(name=Name("iterate", 1)))
    margin = 0.1 * (LOGP - START).astype(np.float64)
    assert got["sera/margin_noise"] == pytest.approx(0.1 * 0.75, rel=1e-4)
    assert got["watch/margin_size"] == pytest.approx(np.median(np.abs(margin[:, 0] - margin[:, 1])), rel=1e-5)
    assert got["watch/logp_per_token"] == pytest.approx(LOGP[:, 0].astype(float).sum() / LENGTH[:, 0].sum(), rel=1e-6)
    assert got["watch/logp_per_token_start"] == pytest.approx(START[:, 0].astype(float).sum() / LENGTH[:, 0].sum())
