"""Who ranks: the implicit reward by hand, a Python function and all that can go wrong, lengths, empty candidates."""

import re

import jax
import numpy as np
import pytest

from sera_jax import bootstrap, losses, rewards, sample, sera
from sera_jax.records import Candidates

ids = lambda *tokens: np.array(tokens, np.int32)


@pytest.fixture
def candidates() -> Candidates:
    """Three prompts of three candidates; the first has an empty one, the second nothing but empty ones."""
    tokens = ((ids(1, 2), ids(), ids(3)), (ids(), ids(), ids()), (ids(4), ids(5, 6, 7), ids(8)))
    texts = tuple(tuple(" ".join(map(str, t)) for t in row) for row in tokens)
    return Candidates(("a", "b", "c"), (ids(9), ids(9, 9), ids(9, 8)), texts, tokens, np.ones((3, 3), bool))


def test_the_implicit_reward_by_hand():
    """Two iterates, γ = 0.25: 0.75·β·(current - ref) + 0.25·β·(previous - ref)."""
    logp = np.array([[[-8.0, -4.0]], [[-6.0, -2.0]]], np.float32)  # E = 2, oldest first
    reference, length = np.array([[-10.0, -2.0]], np.float32), np.array([[4, 2]])
    weights = sera.ensemble_weights(2, "two_term", 0.25)
    dpo = lambda logp, ref, length: losses.LOSSES["dpo"].reward(logp, ref, length, beta=0.5)
    got = rewards.implicit(logp, reference, length, weights, dpo)
    assert got.dtype == np.float32 and got.shape == (1, 2)
    np.testing.assert_allclose(got, [[0.75 * 0.5 * 4 + 0.25 * 0.5 * 2, 0.25 * 0.5 * -2]], rtol=1e-6)
    simpo = lambda logp, ref, length: losses.LOSSES["simpo"].reward(logp, ref, length, beta=2.0)
    got = rewards.implicit(logp[1:], reference, length, np.ones(1, np.float32), simpo)
    np.testing.assert_allclose(got, [[2 * -6 / 4, 2 * -2 / 2]], rtol=1e-6)


def test_what_has_no_log_prob_has_no_reward():
    logp = np.array([[[-1.0, np.nan]]], np.float32)
    got = rewards.implicit(logp, logp[0], np.array([[1, 0]]), np.ones(1, np.float32), lambda l, r, n: l - r)
    assert got[0, 0] == 0 and np.isnan(got[0, 1])


def test_a_function_sees_prompt_and_response():
    seen = []

    def function(prompt, response):
        seen.append((prompt, response))
        return len(response) - len(prompt)

    messages = ({"role": "user", "content": "hi"},)
    got = rewards.by_function(function, ["pp", messages], [["a", "bbbb"], ["", "ccc"]], "ranking")
    assert seen == [("pp", "a"), ("pp", "bbbb"), (messages, ""), (messages, "ccc")]
    assert got.dtype == np.float32 and got.tolist() == [[-1, 2], [-1, 2]]
    assert rewards.by_function(lambda p, r: np.float32(1.5), ["p"], [["r"]], "x").tolist() == [[1.5]]


def test_a_function_is_not_asked_where_there_is_no_candidate():
    got = rewards.by_function(lambda p, r: len(r), ["p", "q"], [["a", None], [None, "bbb", "cc"]], "ranking")
    np.testing.assert_array_equal(got, [[1, np.nan, np.nan], [np.nan, 3, 2]])


def test_random_rewards_belong_to_prompt_and_number(candidates):
    """Whatever the order of the prompts, and whatever the candidates say; another iteration draws anew."""
    key = sample.seeded(3)
    got = rewards.random(candidates, key)
    assert got.shape == (3, 3) and got.dtype == np.float32 and len(np.unique(got)) == 9
    assert (0 <= got).all() and (got < 1).all()
    turned = bootstrap.take(candidates, np.array([2, 0]))
    assert turned.ids == ("c", "a") and turned.tokens_PC == (candidates.tokens_PC[2], candidates.tokens_PC[0])
    np.testing.assert_array_equal(rewards.random(turned, key), got[[2, 0]])
    assert not np.isin(rewards.random(candidates, jax.random.fold_in(key, 1)), got).any()
    prompts = tuple(ids(n) for n in range(500))
    many = Candidates(("p",) * 500, prompts, ((),) * 500, ((),) * 500, np.ones((500, 4), bool))
    best = np.bincount(rewards.random(many, key).argmax(axis=1), minlength=4)
    assert (abs(best - 125) < 50).all()  # five standard deviations


@pytest.mark.parametrize("value", [None, "0.5", float("nan"), float("inf"), [1.0]])
def test_a_function_that_returns_no_number(value):
    with pytest.raises(ValueError) as error:
        rewards.by_function(lambda p, r: value if r == "bad" else 1, ["a", "b"], [["x", "y"], ["x", "bad"]], "r")
    assert str(error.value) == (
        f"the reward function returned {value!r} for prompt 1 and response 'bad', expected a finite number."
    )


def test_functions_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/usr/lib"])  # not even the folder python started in
    (tmp_path / "judge_of_mine.py").write_text("def score(prompt, response):\n    return 2.0\nnumber = 3\n")
    assert rewards.load_function("judge_of_mine:score")("p", "r") == 2.0
    assert rewards.load_function("os.path:basename")("a/b") == "b"
    with pytest.raises(ValueError, match="reward function 'judge_of_mine:number' is a int, expected a function"):
        rewards.load_function("judge_of_mine:number")


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("nowhere_to_be_found:f", "No module named 'nowhere_to_be_found'"),
        ("json:nothing", "no attribute 'nothing'"),
        ("json", "no attribute ''"),
        (":f", "Empty module name"),
        ("", "Empty module name"),
    ],
)
def test_functions_that_are_not_there(spec, reason):
    said = f"reward function {spec!r} cannot be imported ("
    with pytest.raises(ValueError, match=re.escape(said) + ".*" + re.escape(reason) + ".*expected 'module:function'"):
        rewards.load_function(spec)


def test_rewards_by_length():
    value, length = np.array([[6.0, 6.0, np.nan]], np.float32), np.array([[2, 3, 0]])
    adjusted = lambda penalty, normalise: rewards.adjusted(value, length, penalty=penalty, normalise=normalise)
    np.testing.assert_array_equal(adjusted(0.0, False), value)
    np.testing.assert_allclose(adjusted(0.5, False), [[5.0, 4.5, np.nan]])
    np.testing.assert_allclose(adjusted(0.0, True), [[3.0, 2.0, np.nan]])
    np.testing.assert_allclose(adjusted(0.5, True), [[2.0, 0.5, np.nan]])  # first per token, then the penalty
    assert rewards.adjusted(np.ones((1, 1)), np.zeros((1, 1), int), penalty=1.0, normalise=True) == 1


def test_empty_candidates_are_neither_scored_nor_shifted(candidates):
    assert rewards.lengths(candidates).tolist() == [[2, 0, 1], [0, 0, 0], [1, 3, 1]]
    trees = rewards.trees(candidates)
    assert [t.id for t in trees] == ["a", "c"]
    assert [[b.tolist() for b in t.branches] for t in trees] == [[[1, 2], [3]], [[4], [5, 6, 7], [8]]]
    assert trees[1].prompt is candidates.prompts[2]
    values = np.array([b.sum() for t in trees for b in t.branches], np.float32)
    grid = rewards.on_grid(values, candidates)
    nan = np.nan
    assert grid.dtype == np.float32
    np.testing.assert_array_equal(grid, [[3, nan, 3], [nan, nan, nan], [4, 18, 8]])


def test_a_preference_function_is_asked_once_for_every_two():
    """In the order of the candidates; the rest follows. Nothing is asked of equal texts and of none."""
    seen = []

    def prefer(prompt, first, second):
        seen.append((prompt, first, second))
        return 0.25 if first < second else 1

    got = rewards.by_preference(prefer, ["p", "q"], [["a", "b", "a"], ["d", None, "c"]], "ranking")
    assert seen == [("p", "a", "b"), ("p", "b", "a"), ("q", "d", "c")]
    nan = np.nan
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[0], [[0.5, 0.25, 0.5], [0.75, 0.5, 1], [0.5, 0, 0.5]])
    np.testing.assert_array_equal(got[1], [[0.5, nan, 1], [nan, nan, nan], [0, nan, 0.5]])


@pytest.mark.parametrize("value", [None, "0.5", float("nan"), -0.1, 1.5])
def test_a_preference_function_that_returns_no_probability(value):
    with pytest.raises(ValueError) as error:
        rewards.by_preference(lambda p, a, b: value if b == "bad" else 1, ["a", "b"], [["x"], ["x", "bad"]], "r")
    assert str(error.value) == (
        f"the preference function returned {value!r} for prompt 1 and responses 'x' and 'bad', expected a "
        "probability, that the first is better than the second."
    )


def test_characters_and_tokens_are_units_of_length(candidates):
    assert rewards.LENGTHS["tokens"] is rewards.lengths
    want = [[len(text) for text in row] for row in candidates.texts_PC]
    assert rewards.LENGTHS["characters"](candidates).tolist() == want
    assert rewards.text_length("a prompt", "äb c") == 4


@pytest.mark.parametrize("seed", range(4))
def test_the_unbiased_penalty_is_where_the_length_gap_vanishes(seed):
    """Against DICE's search: the first minimum of |mean gap| on a grid of 0.001."""
    rng = np.random.default_rng(seed)
    length = rng.integers(5, 400, (300, 8))
    value = (0.02 + 0.01 * seed) * length + rng.normal(size=(300, 8)) * 2
    valid = rng.random((300, 8)) < 0.9

    def gap(alpha):
        gaps = []
        for v, n, ok in zip(value - alpha * length, length, valid):
            live = np.flatnonzero(ok)
            gaps.append(n[live[np.argmax(v[live])]] - n[live[np.argmin(v[live])]])
        return np.mean(gaps)

    grid = [abs(gap(k / 1000)) for k in range(200)]
    first = next(k for k in range(200) if grid[k] <= min(grid[k - 1 : k + 2] if k else grid[:2]))
    alpha = rewards.unbiased_penalty(value, length, valid)
    assert abs(alpha - first / 1000) <= 0.002 and abs(gap(alpha)) <= grid[first] + 1e-9
    assert gap(0.0) > 50
    assert rewards.unbiased_penalty(-value, length, valid) == 0  # the best ones are the shorter ones as it is
    assert rewards.unbiased_penalty(np.ones((2, 3)), length[:2, :3], valid[:2, :3]) == 0  # nobody is better


def test_standardised_over_the_iteration_or_each_prompt():
    rng = np.random.default_rng(0)
    value, valid = rng.normal(3, 2, (6, 5)).astype(np.float32), rng.random((6, 5)) < 0.8
    value[~valid] = np.nan
    z = lambda v: (v - v.mean()) / v.std()
    whole = rewards.standardised(value, valid, "iteration")
    np.testing.assert_allclose(whole[valid], z(value[valid].astype(float)), atol=1e-12)
    each = rewards.standardised(value, valid, "prompt")
    for p in range(6):
        np.testing.assert_allclose(each[p][valid[p]], z(value[p][valid[p]].astype(float)), atol=1e-12)
    assert np.isnan(whole[~valid]).all() and np.isnan(each[~valid]).all()
    np.testing.assert_array_equal(rewards.standardised(value, valid, "none")[valid], value[valid].astype(float))
    same = np.full((2, 3), 0.1, np.float32)
    assert not rewards.standardised(same, np.ones((2, 3), bool), "iteration").any()
    assert not rewards.standardised(same, np.ones((2, 3), bool), "prompt").any()


def test_sources_are_combined_by_weight_or_by_the_worst():
    one, other = np.array([[1.0, 2, 9], [3, 4, 5]]), np.array([[10.0, -10, 99], [0, 5, -5]])
    valid = np.array([[True, True, False], [True, True, True]])
    both = np.stack([one, other])
    made = lambda **how: rewards.combined(both, valid, np.array([1.0, 0.5]), **how)
    want = one + 0.5 * other
    np.testing.assert_allclose(made(combine="weighted", scale="none")[valid], want[valid])
    np.testing.assert_allclose(made(combine="worst", scale="none")[valid], np.minimum(one, other)[valid])
    z = lambda v: (v - v[valid].mean()) / v[valid].std()
    got = made(combine="worst", scale="iteration")
    np.testing.assert_allclose(got[valid], np.minimum(z(one), z(other))[valid], rtol=1e-6)
    assert got.dtype == np.float32 and np.isnan(got[~valid]).all()
    np.testing.assert_allclose(
        made(combine="weighted", scale="iteration")[valid], (z(one) + 0.5 * z(other))[valid], rtol=1e-5, atol=1e-6
    )
    # A source that shouts does not decide by that.
    loud = rewards.combined(np.stack([one, 1000 * other]), valid, np.ones(2), combine="weighted", scale="iteration")
    np.testing.assert_allclose(loud[valid], (z(one) + z(other))[valid], rtol=1e-5, atol=1e-6)
