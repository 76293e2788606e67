"""The paper on arrays against NumPy by brute force: ensembles, scores, exact selection on any mesh, pair rules."""

import collections
import inspect
import math
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sera_jax import config, sera

# --- Ensembles and margins --------------------------------------------------------------------------------------------


def recursive(ratios_E, gamma):
    """r_t = (1-γ)·ρ_t + γ·r_{t-1}, r_0 = 0."""
    reward = 0.0
    for ratio in ratios_E:
        reward = (1 - gamma) * ratio + gamma * reward
    return reward


@pytest.mark.parametrize("iterates", [1, 2, 3, 6])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5])
def test_ensembles_equal_their_closed_forms(iterates, gamma):
    ratios_E = np.random.default_rng(iterates).normal(size=iterates)
    previous = ratios_E[-2] if iterates > 1 else 0.0  # ρ_0 = 0
    expected = {
        "current": ratios_E[-1],
        "two_term": (1 - gamma) * ratios_E[-1] + gamma * previous,
        "ema": recursive(ratios_E, gamma),
        "mean": ratios_E.mean(),
    }
    assert set(expected) == set(sera.ENSEMBLES)
    for scheme, value in expected.items():
        weights_E = sera.ensemble_weights(iterates, scheme, gamma)
        assert weights_E.shape == (iterates,) and weights_E.dtype == np.float32
        np.testing.assert_allclose(weights_E @ ratios_E, value, rtol=1e-5, atol=1e-7)


def test_ensembles_known_weights():
    weights = sera.ensemble_weights
    np.testing.assert_allclose(weights(1, "two_term", 0.3), [0.7], rtol=1e-6)
    np.testing.assert_allclose(weights(1, "ema", 0.3), [0.7], rtol=1e-6)
    np.testing.assert_allclose(weights(3, "two_term", 0.3), [0, 0.3, 0.7], rtol=1e-6)
    np.testing.assert_allclose(weights(3, "ema", 0.3), [0.063, 0.21, 0.7], rtol=1e-6)
    np.testing.assert_array_equal(weights(4, "ema", 0.0), [0, 0, 0, 1])
    np.testing.assert_array_equal(weights(4, "two_term", 0.0), weights(4, "current", 0.3))


def test_ensemble_weights_refuse():
    with pytest.raises(
        ValueError, match="ensemble ema: got 0 trained iterates, expected at least 1.*margin would be 0"
    ):
        sera.ensemble_weights(0, "ema", 0.3)
    with pytest.raises(ValueError, match="got gamma 1.0 over 1 iterates.*margin would be 0; expected gamma < 1"):
        sera.ensemble_weights(1, "two_term", 1.0)
    np.testing.assert_array_equal(sera.ensemble_weights(2, "two_term", 1.0), [1, 0])


def test_ensemble_does_not_read_an_iterate_of_weight_0():
    rewards_EN2 = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    rewards_EN2[0] = np.nan
    weights_E = sera.ensemble_weights(3, "two_term", 0.3)
    got = jax.jit(lambda rewards: sera.ensemble(rewards, weights_E))(rewards_EN2)
    np.testing.assert_allclose(got, 0.3 * rewards_EN2[1] + 0.7 * rewards_EN2[2], rtol=1e-5, atol=1e-6)
    assert got.dtype == jnp.float32


def test_margins():
    np.testing.assert_array_equal(sera.margins(jnp.array([[1.0, 3.0], [2.0, -1.0]])), [-2, 3])


def test_a_policy_must_not_be_its_own_reference():
    sera.check_references("iterate-1", "initial", "reward.reference")
    sera.check_references("iterate-1", None, "reward.reference")
    expected = (
        "reward.reference: got the policy 'iterate-1' as its own reference, so that every margin would be 0; expected"
    )
    with pytest.raises(ValueError, match=expected):
        sera.check_references("iterate-1", "iterate-1", "reward.reference")


# --- Scores -----------------------------------------------------------------------------------------------------------


def signals(n=50, seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        reward_N2=rng.normal(size=(n, 2)).astype(np.float32),
        length_N2=rng.integers(1, 60, (n, 2)).astype(np.int32),
        reference_logp_N2=-rng.gamma(3, 10, (n, 2)).astype(np.float32),
        gap_N=rng.integers(-3, 9, n).astype(np.float32),
        reward_gap_N=rng.normal(0, 2, n).astype(np.float32),
        gold_N=rng.normal(0, 1, n).astype(np.float32),
        loss_N=rng.gamma(1, 1, n).astype(np.float32),
        key=jax.random.key(seed),
        example_N=np.arange(n, dtype=np.int32),
        valid_N=rng.random(n) < 0.9,
    )


def test_the_magnitude_does_not_look_at_labels():
    """A pair and its swap get the same score, so what is kept says nothing of which response is called chosen."""
    reward_N2 = signals()["reward_N2"]
    score = lambda r: np.asarray(sera.score("irm_magnitude", reward_N2=r))
    assert np.array_equal(score(reward_N2), score(reward_N2[:, ::-1])) and len(np.unique(score(reward_N2))) > 40


def test_scores_equal_numpy():
    given = signals()
    r, n = given["reward_N2"].astype(np.float64), given["length_N2"]
    per_token = r[:, 0] / n[:, 0] - r[:, 1] / n[:, 1]
    valid = given["valid_N"]

    def z(x):
        return (x - x[valid].mean()) / x[valid].std()

    expected = {
        "irm": r[:, 0] - r[:, 1],
        "irm_per_token": per_token,
        "reference_logp": given["reference_logp_N2"][:, 0] / n[:, 0],
        "irm_magnitude": np.abs(r[:, 0] - r[:, 1]),
        "annotator_gap": given["gap_N"],
        "reward_gap": given["reward_gap_N"],
        "gold_gap": given["gold_N"],
        "loss": -given["loss_N"],
        "alignment_potential": z(given["gap_N"].astype(np.float64)) - z(np.abs(per_token)),
    }
    assert set(expected) | {"random"} == set(sera.SCORES)
    for name, value in expected.items():
        got = np.asarray(jax.jit(lambda **s: sera.score(name, **s))(**given))  # noqa: B023
        np.testing.assert_allclose(got[valid], value[valid], rtol=1e-4, atol=1e-5, err_msg=name)
        assert got.dtype == np.float32


def test_padding_makes_no_nan_score():
    given = signals(4) | dict(length_N2=np.zeros((4, 2), np.int32), reward_N2=np.zeros((4, 2), np.float32))
    for name in sera.SCORES:
        assert np.isfinite(sera.score(name, **given)).all(), name


def test_random_score_belongs_to_the_example():
    given = signals(40)
    whole = np.asarray(sera.score("random", **given))
    order = np.random.default_rng(1).permutation(40)[:13].astype(np.int32)
    np.testing.assert_array_equal(sera.score("random", **given | dict(example_N=order)), whole[order])
    other = sera.score("random", **given | dict(key=jax.random.fold_in(given["key"], 1)))
    assert not np.array_equal(other, whole) and len(set(whole)) == 40 and 0 <= whole.min() < 0.2 < 0.8 < whole.max() < 1


def test_score_names_what_is_missing():
    assert sera.needs("irm_per_token") == ("reward_N2", "length_N2")
    with pytest.raises(ValueError, match="score annotator_gap: got no gap_N, expected gap_N.*another score"):
        sera.score("annotator_gap", **signals() | dict(gap_N=None))
    with pytest.raises(ValueError, match="score irm: got no reward_N2"):
        sera.score("irm")


def test_alignment_potential_keeps_what_is_not_finite_visible():
    given = signals(6) | dict(valid_N=np.ones(6, bool))
    given["gap_N"] = np.array([1, np.nan, 3, 2, 5, 4], np.float32)
    got = sera.score("alignment_potential", **given)
    np.testing.assert_array_equal(np.isfinite(got), [True, False, True, True, True, True])
    flat = sera.score("alignment_potential", **given | dict(gap_N=np.full(6, 0.3, np.float32)))
    assert np.isfinite(flat).all()
    implicit = np.abs(np.asarray(sera.score("irm_per_token", **given), np.float64))
    np.testing.assert_allclose(flat, -(implicit - implicit.mean()) / implicit.std(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected fewer than 2\\*\\*21"):
        jax.eval_shape(sera._exact_mean, jnp.zeros(2**21), jnp.ones(2**21, bool))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_exact_mean_ignores_order_and_padding(scale):
    rng = np.random.default_rng(0)
    value, valid = (rng.normal(3, 1, 5000) * scale).astype(np.float32), rng.random(5000) < 0.8
    order = rng.permutation(5000)
    one = sera._exact_mean(value, valid)
    other = sera._exact_mean(np.append(value[order], np.float32(np.nan)), np.append(valid[order], False))
    assert float(one) == float(other)
    np.testing.assert_allclose(one, value[valid].astype(np.float64).mean(), rtol=1e-5)


def test_soft_weight_and_relabel():
    np.testing.assert_allclose(sera.soft_weight(jnp.array([0.0, np.log(3), -np.log(3)])), [0.5, 0.75, 0.25], rtol=1e-6)
    np.testing.assert_array_equal(sera.relabel(jnp.array([[1, 2], [3, 4]]), jnp.array([True, False])), [[1, 2], [4, 3]])


# --- Selection --------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(7)
N = 203
TINY = np.float32(1e-45)  # the least denormal
SCORED = {
    "random": RNG.normal(size=N),
    "tied": RNG.integers(-2, 3, N),
    "all equal": np.full(N, -1.5),
    "zeros of both signs": np.where(RNG.random(N) < 0.5, -0.0, 0.0),
    "zeros among others": RNG.choice([-1.0, -0.0, 0.0, 1.0], N),
    "denormals": RNG.integers(-3, 4, N) * TINY.astype(np.float64),
    "extremes": RNG.choice([-3.4028235e38, -1.1754944e-38, -0.0, 1e-45, 1.1754944e-38, 3.4028235e38], N),
    "near": 1 + RNG.integers(0, 4, N) * 2.0**-23,
}
SCORED = {name: score.astype(np.float32) for name, score in SCORED.items()}


def ranked(score_N, member_N, lowest=False):
    """Members from best to worst, ties by index; in float64, where no denormal is flushed."""
    key = score_N.astype(np.float64) * (1 if lowest else -1)
    index = np.flatnonzero(member_N)
    return index[np.argsort(key[index], kind="stable")]


def expected_mask(rule, score_N, valid_N, group_N, keep_G, threshold=0.0):
    mask_N = np.zeros(len(score_N), bool)
    if rule == "threshold":
        return valid_N & (score_N.astype(np.float64) > threshold)
    if rule == "none":
        return np.zeros_like(valid_N)
    if rule == "all":
        return valid_N
    for group, keep in enumerate(keep_G):
        order = ranked(score_N, valid_N & (group_N == group), lowest=rule == "bottom_k")
        keep = min(int(keep), len(order))
        start = (len(order) - keep) // 2 if rule == "middle" else 0
        mask_N[order[start : start + keep]] = True
    return mask_N


@pytest.mark.parametrize("scored", SCORED)
def test_top_k_is_a_stable_argsort(scored):
    score_N, group_N = SCORED[scored], np.zeros(N, np.int32)
    select = jax.jit(sera.top_k_mask)
    for keep in (0, 1, 2, 70, N - 1, N, N + 5):
        got = np.asarray(select(score_N, group_N, np.array([keep], np.int32)))
        np.testing.assert_array_equal(got, expected_mask("top_k", score_N, group_N == 0, group_N, [keep]))
        assert got.sum() == min(keep, N)


@pytest.mark.parametrize("rule", sera.RULES)
@pytest.mark.parametrize("groups", [1, 5])
def test_rules_equal_numpy(rule, groups):
    rng = np.random.default_rng(groups)
    group_N = rng.integers(0, groups, N).astype(np.int32)
    if groups > 1:
        group_N[group_N == 3] = 4  # group 3 is empty
    valid_N = rng.random(N) < 0.85
    size_G = np.bincount(group_N[valid_N], minlength=groups)
    select = jax.jit(sera.RULES[rule])
    for name, score_N in SCORED.items():
        filled_N = np.where(valid_N, score_N, np.float32(np.nan))  # what is not valid may hold anything
        for keep_G in (size_G * 0, size_G // 3, np.maximum(size_G - 1, 0), size_G, size_G + 1):
            keep_G = keep_G.astype(np.int32)
            for threshold in (0.0, -1.0):
                given = dict(valid_N=valid_N, group_N=group_N, keep_G=keep_G, threshold=threshold)
                got = np.asarray(select(score_N, **given))
                np.testing.assert_array_equal(got, select(filled_N, **given), err_msg=name)
                # Thresholds are float arithmetic, which may flush denormals; selection by rank may not.
                if not (rule == "threshold" and name in ("denormals", "extremes")):
                    expected = expected_mask(rule, score_N, **given)
                    np.testing.assert_array_equal(got, expected, err_msg=f"{name} {keep_G}")


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65])
def test_sizes_around_powers_of_two(size):
    score_N, group_N = np.zeros(size, np.float32), np.zeros(size, np.int32)
    for keep in range(0, size + 1, max(1, size // 8)):
        got = np.asarray(sera.top_k_mask(score_N, group_N, np.array([keep], np.int32)))
        np.testing.assert_array_equal(got, np.arange(size) < keep)


def test_bits_have_the_order_of_the_floats():
    values = np.array(
        [-3.4028235e38, -1, -1.1754944e-38, -1e-45, -0.0, 0.0, 1e-45, 1.1754944e-38, 1, 3.4e38], np.float32
    )
    bits = np.asarray(jax.jit(sera._ordered_bits)(values)).astype(np.int64)
    assert (np.sign(np.diff(bits)) == np.sign(np.diff(values.astype(np.float64)))).all()


def test_keep_counts():
    group_N = np.array([0] * 100 + [2] * 10)
    assert sera.keep_counts(0.29, group_N, 3).tolist() == [29, 0, 2]  # 0.29 * 100 is 28.999999999999996
    assert sera.keep_counts(0.7, group_N, 3).tolist() == [70, 0, 7]
    assert sera.keep_counts(1.0, group_N, 3).tolist() == [100, 0, 10]
    assert sera.keep_counts(0, group_N, 3).tolist() == [0, 0, 0]


def test_scores_that_are_not_finite_are_an_error():
    score_N = np.array([1, np.nan, np.inf, -np.inf, 2], np.float32)
    ids = ("a", "b", "c", "d", "e")
    bad = jax.jit(sera.non_finite)(score_N, np.array([True, False, True, True, True]))
    assert bad.dtype == jnp.int32 and bad.tolist() == [2, 2]
    with pytest.raises(
        ValueError, match=r"^score irm: got 2 scores that are not finite, the first at index 2 \(example 'c'\)"
    ):
        sera.check_finite(bad, ids, "score irm")
    good = sera.non_finite(score_N, np.array([True, False, False, False, True]))
    assert good.tolist() == [0, 5]
    sera.check_finite(good, ids, "score irm")


# --- Selection on many devices ----------------------------------------------------------------------------------------

MESHES = [
    ((8,), ("data",), ("data",)),
    ((2, 2, 2), ("data", "fsdp", "tensor"), ("data", "fsdp")),
    ((4, 2), ("a", "b"), "b"),
]
WEIGHTS = sera.ensemble_weights(2, "two_term", 0.3)


def margins_to_mask(rewards_EN2, valid_N, group_N, keep_G):
    """One jit from rewards to mask: what a selection of a run is."""
    score_N = sera.score("irm", reward_N2=sera.ensemble(rewards_EN2, WEIGHTS))
    masks = {
        rule: select(score_N, valid_N=valid_N, group_N=group_N, keep_G=keep_G, threshold=0.1)
        for rule, select in sera.RULES.items()
    }
    return masks, sera.non_finite(score_N, valid_N)


def placed(mesh_shape, names, axes, rewards_EN2, valid_N, group_N, keep_G):
    mesh = Mesh(np.array(jax.devices()[: math.prod(mesh_shape)]).reshape(mesh_shape), names)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    return put(rewards_EN2, None, axes), put(valid_N, axes), put(group_N, axes), put(keep_G)


def problem(groups, padding=0):
    rng = np.random.default_rng(3)
    rewards_EN2 = np.round(rng.normal(size=(2, N, 2)) * 4).astype(np.float32) / 4  # many ties
    group_N = rng.integers(0, groups, N).astype(np.int32)
    keep_G = sera.keep_counts(0.7, group_N, groups)
    pad = lambda x, axis, fill: np.concatenate([x, np.full_like(np.take(x, range(padding), axis), fill)], axis)
    return pad(rewards_EN2, 1, np.nan), pad(np.ones(N, bool), 0, False), pad(group_N, 0, 0), keep_G


@pytest.mark.parametrize("groups", [1, 7])
def test_the_mask_is_the_same_on_any_mesh(groups):
    select = jax.jit(margins_to_mask)
    expected, bad = select(*problem(groups))
    assert bad.tolist() == [0, N] and expected["top_k"].sum() == problem(groups)[3].sum()
    for mesh in MESHES:
        given = placed(*mesh, *problem(groups, padding=-N % 8))
        select(*given)  # compiles, which moves constants
        with jax.transfer_guard("disallow"):
            masks, bad = select(*given)
        assert not masks["top_k"].sharding.is_fully_replicated and int(bad[0]) == 0
        for rule, mask in masks.items():
            np.testing.assert_array_equal(np.asarray(mask)[:N], expected[rule], err_msg=rule)
            assert not np.asarray(mask)[N:].any()


def collectives(hlo):
    """(operation, element type, elements) of every result of every collective in the text of a compiled program."""
    operations = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    pattern = rf"= *(\(.*?\)|\S+) ({operations})\S*\("
    for types, operation in re.findall(pattern, hlo):
        for dtype, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", types):
            yield operation, dtype, math.prod(int(x) for x in shape.split(",") if x)


@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("mesh", MESHES[:2])
def test_only_integer_counts_cross_devices(groups, mesh):
    given = placed(*mesh, *problem(groups, padding=-N % 8))
    crossing = list(collectives(jax.jit(margins_to_mask).lower(*given).compile().as_text()))
    assert crossing, "a selection over devices must add up counts"
    for operation, dtype, elements in crossing:
        assert operation == "all-reduce" and dtype in ("s32", "u32") and elements <= groups, crossing


def test_the_reader_of_programs_sees_a_float_gather():
    given = placed(*MESHES[0], *problem(1, padding=-N % 8))
    hlo = jax.jit(lambda rewards, *_: jnp.sort(sera.margins(rewards[0]))).lower(*given).compile().as_text()
    assert any(dtype == "f32" and elements > 7 for _, dtype, elements in collectives(hlo))


def test_alignment_potential_is_the_same_on_any_mesh():
    given = signals(64)
    ordered = [given[need] for need in sera.needs("alignment_potential")]
    score = jax.jit(lambda *arrays: sera.alignment_potential(**dict(zip(sera.needs("alignment_potential"), arrays))))
    expected = np.asarray(score(*ordered))
    for shape, names, axes in MESHES:
        mesh = Mesh(np.array(jax.devices()).reshape(shape), names)
        arrays = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(axes))) for x in ordered]
        np.testing.assert_array_equal(np.asarray(score(*arrays)).view(np.int32), expected.view(np.int32))


# --- Pair rules -------------------------------------------------------------------------------------------------------


def candidates(seed, prompts=60, count=5):
    rng = np.random.default_rng(seed)
    rewards_PC = rng.integers(-2, 3, (prompts, count)).astype(np.float32)  # ties
    valid_PC = rng.random((prompts, count)) < 0.6
    valid_PC[:3] = [[False] * count, [True] + [False] * (count - 1), [True] * count]
    rewards_PC[2] = 1.0
    return np.where(valid_PC, rewards_PC, np.float32(np.nan)), valid_PC


def legal(rewards_C, valid_C):
    """Every (chosen, rejected) of valid candidates with a strictly greater reward of the chosen, by brute force."""
    index = [i for i in range(len(valid_C)) if valid_C[i]]
    return {(i, j) for i in index for j in index if rewards_C[i] > rewards_C[j]}


@pytest.mark.parametrize("rule", sera.PAIR_RULES)
@pytest.mark.parametrize("count", [2, 5])
def test_pair_rules_equal_brute_force(rule, count):
    rewards_PC, valid_PC = candidates(count, count=count)
    pair_PQ2, ok_PQ = jax.jit(sera.PAIR_RULES[rule])(rewards_PC, valid_PC, jax.random.key(0))
    pair_PQ2, ok_PQ = np.asarray(pair_PQ2), np.asarray(ok_PQ)
    assert pair_PQ2.dtype == np.int32 and ok_PQ.dtype == bool and pair_PQ2.shape == (*ok_PQ.shape, 2)
    assert ok_PQ.shape[1] == {"all_pairs": count * (count - 1) // 2, "best_each": count}.get(rule, 1)
    assert pair_PQ2.min() >= 0 and pair_PQ2.max() < count
    assert 0 < ok_PQ.any(axis=1).sum() < len(ok_PQ)
    for rewards_C, valid_C, pair_Q2, ok_Q in zip(rewards_PC, valid_PC, pair_PQ2, ok_PQ):
        pairs, got = legal(rewards_C, valid_C), [tuple(pair) for pair, ok in zip(pair_Q2, ok_Q) if ok]
        index = [i for i in range(count) if valid_C[i]]
        if rule == "all_pairs":
            assert sorted(got) == sorted(pairs)
            continue
        best = max(index, key=lambda i: rewards_C[i]) if index else None  # max and min take the first of equals
        if rule == "best_each":
            assert got == sorted(pair for pair in pairs if pair[0] == best)
            continue
        if rule == "best_second":
            others = [i for i in index if i != best]
            second = max(others, key=lambda i: rewards_C[i]) if others else None
            assert got == ([(best, second)] if (best, second) in pairs else [])
            continue
        assert len(got) == bool(pairs) and set(got) <= pairs
        if got and rule in ("best_worst", "best_random"):
            assert got[0][0] == best
        if got and rule == "best_worst":
            assert got[0][1] == min(index, key=lambda i: rewards_C[i])


@pytest.mark.parametrize("rule", ["best_random", "random"])
def test_random_pair_rules_are_uniform_and_depend_on_their_row_alone(rule):
    rewards_PC = np.tile(np.array([[3, 2, 1, 3, np.nan]], np.float32), (4000, 1))
    valid_PC = ~np.isnan(rewards_PC)
    pick = sera.PAIR_RULES[rule]
    pair_PQ2, ok_PQ = pick(rewards_PC, valid_PC, jax.random.key(1))
    assert ok_PQ.all()
    seen, counts = np.unique(np.asarray(pair_PQ2)[:, 0], axis=0, return_counts=True)
    pairs = {(0, 1), (0, 2)} if rule == "best_random" else legal(rewards_PC[0], valid_PC[0])
    assert {tuple(x) for x in seen.tolist()} == pairs
    expected = 4000 / len(pairs)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    np.testing.assert_array_equal(pick(rewards_PC[:9], valid_PC[:9], jax.random.key(1))[0], pair_PQ2[:9])
    assert not np.array_equal(pick(rewards_PC, valid_PC, jax.random.key(2))[0], pair_PQ2)


@pytest.mark.parametrize("rule", sera.PAIR_RULES)
def test_infinite_rewards_of_valid_candidates_choose_no_invalid_one(rule):
    inf = np.float32(np.inf)
    rewards_PC = np.array([[-inf, 5, -inf], [inf, 5, inf], [inf, 5, -inf]], np.float32)
    valid_PC = np.array([[True, False, True], [True, False, True], [True, False, True]])
    pair_PQ2, ok_PQ = sera.PAIR_RULES[rule](rewards_PC, valid_PC, jax.random.key(0))
    assert ok_PQ.sum(axis=1).tolist() == [0, 0, 1]
    assert np.asarray(pair_PQ2)[np.asarray(ok_PQ)].tolist() == [[0, 2]]


# --- Pair rules that read probabilities ------------------------------------------------------------------------------

CIRCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], np.float32)  # 0 beats 1 beats 2 beats 0


def test_where_preferences_go_in_a_circle_only_the_most_certain_pair_is_there():
    """Mean win rates tell nothing apart, or wrongly; a Condorcet winner there is none."""
    even = np.where(CIRCLE > 0.5, 0.9, np.where(CIRCLE < 0.5, 0.1, 0.5)).astype(np.float32)
    prob_PCC, valid_PC, key = np.stack([CIRCLE, even]), np.ones((2, 3), bool), jax.random.key(0)
    means_PC = np.asarray(sera.win_rates(np.zeros((2, 3), np.float32), valid_PC, prob_PCC))
    assert (means_PC[1] == means_PC[1][0]).all()
    assert np.asarray(sera.best_worst(means_PC, valid_PC, key)[1])[:, 0].tolist() == [True, False]
    pair_PQ2, ok_PQ = sera.most_certain(prob_PCC, valid_PC, key)
    assert np.asarray(ok_PQ).tolist() == [[True], [True]] and np.asarray(pair_PQ2)[:, 0].tolist() == [[0, 1], [0, 1]]
    assert not np.asarray(sera.condorcet(prob_PCC, valid_PC, key)[1]).any()


def probabilities(seed, prompts=60, count=4):
    """P of any kind: not transitive, with ties, some not compared."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.choice([0.2, 0.4, 0.5, 0.7, 0.9, np.nan], (prompts, count, count)), 1)
    prob_PCC = upper + np.tril(1 - upper.swapaxes(1, 2), -1) + 0.5 * np.eye(count)
    valid_PC = rng.random((prompts, count)) < 0.7
    valid_PC[:2] = [[False] * count, [True] + [False] * (count - 1)]
    return prob_PCC.astype(np.float32), valid_PC


@pytest.mark.parametrize("count", [2, 3, 4])
def test_rules_of_probabilities_equal_brute_force(count):
    prob_PCC, valid_PC = probabilities(count, count=count)
    found = {rule: jax.jit(pick)(prob_PCC, valid_PC, jax.random.key(0)) for rule, pick in sera.WIN_RULES.items()}
    seen = collections.Counter()
    for p, (prob, valid) in enumerate(zip(prob_PCC, valid_PC)):
        index = np.flatnonzero(valid)
        beats = {(i, j): prob[i, j] for i in index for j in index if i != j and prob[i, j] > 0.5}
        got = {rule: tuple(map(int, pair[p, 0])) if ok[p, 0] else None for rule, (pair, ok) in found.items()}
        assert (got["most_certain"] is not None) == bool(beats)
        if beats:
            assert beats[got["most_certain"]] == max(beats.values())
        ends = [
            [i for i in index if len(index) > 1 and all((i, o)[::way] in beats for o in index if o != i)]
            for way in (1, -1)
        ]
        assert got["condorcet"] == ((ends[0][0], ends[1][0]) if all(ends) else None)
        seen.update(rule for rule, pair in got.items() if pair)
    assert all(0 < seen[rule] < len(prob_PCC) for rule in sera.WIN_RULES)


def test_rules_of_probabilities_out_of_rewards_are_best_against_worst():
    rewards_PC, valid_PC = candidates(7)
    pair_PQ2, ok_PQ = sera.best_worst(rewards_PC, valid_PC, jax.random.key(0))
    prob_PCC = sera.probabilities(rewards_PC)
    r = rewards_PC.astype(np.float64)
    want = 1 / (1 + np.exp(r[:, None, :] - r[:, :, None]))
    np.testing.assert_allclose(prob_PCC, want, rtol=1e-5)
    got_PQ2, got_PQ = sera.most_certain(prob_PCC, valid_PC, jax.random.key(0))
    np.testing.assert_array_equal(got_PQ, ok_PQ)
    gap = lambda pair: np.take_along_axis(rewards_PC, np.asarray(pair)[:, 0], axis=1) @ np.array([1, -1])
    np.testing.assert_array_equal(gap(got_PQ2)[np.asarray(ok_PQ)[:, 0]], gap(pair_PQ2)[np.asarray(ok_PQ)[:, 0]])
    strict_PC = np.random.default_rng(0).normal(size=rewards_PC.shape).astype(np.float32)  # no ties
    one, other = (rule(x, valid_PC, jax.random.key(0)) for rule, x in
                  ((sera.condorcet, sera.probabilities(strict_PC)), (sera.best_worst, strict_PC)))  # fmt: skip
    np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(np.asarray(one[0])[np.asarray(one[1])], np.asarray(other[0])[np.asarray(one[1])])


# --- Names ------------------------------------------------------------------------------------------------------------


def test_config_names_are_the_tables():
    for names, table in (
        (config.EnsembleName, sera.ENSEMBLES),
        (config.ScoreName, sera.SCORES),
        (config.RuleName, sera.RULES),
        (config.RankedRuleName, sera.PAIR_RULES),
        (config.WinRuleName, sera.WIN_RULES),
        (config.PairRuleName, {**sera.PAIR_RULES, **sera.WIN_RULES, "explore": None}),
    ):
        assert set(typing.get_args(names)) == set(table)


def test_tables_have_one_signature():
    for table in (sera.ENSEMBLES, sera.RULES, sera.PAIR_RULES, sera.WIN_RULES):
        assert len({tuple(inspect.signature(function).parameters) for function in table.values()}) == 1


def test_no_stratum_vanishes():
    """One pair a prompt: ⌊0.7 · 1⌋ would keep nothing at all."""
    assert sera.keep_counts(0.7, np.array([0, 1, 1, 3, 3, 3]), 4).tolist() == [1, 1, 0, 2]
    assert sera.keep_counts(0.0, np.array([0, 1, 1]), 2).tolist() == [0, 0]
