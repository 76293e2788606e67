"""Candidates on file, resumed wherever a run was killed; which of them may stand in a pair; the pairs of every rule."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import bootstrap, sample, sera
from sera_jax.data import Responses
from sera_jax.disk import DiskError
from sera_jax.records import Candidates, Pair, Prompt, Tree

ids = lambda *tokens: np.array(tokens, np.int32)
C, SLOTS = 3, 6  # two prompts a sampling batch
PROMPTS = tuple(Prompt(f"p{i}", f"prompt {i}") for i in range(7))
TOKENS = [np.arange(1, 3 + 9 * i, dtype=np.int32) for i in range(7)]  # two buckets: 32 and 64
decode = lambda tokens: " ".join(f"w{t}" for t in tokens if t)


def sampler(fail_at: int | None = None):
    """A stand-in for the device: a candidate is a function of its prompt's hash and its number. Fails at a call."""
    calls = []

    def run(tokens_PJ, length_P, hash_P2):
        if len(calls) == fail_at:
            raise RuntimeError("killed")
        calls.append([int(n) for n in length_P])
        out = np.full((len(length_P), C, 4), -1, np.int32)
        for p, c in np.ndindex(len(length_P), C):
            rng = np.random.default_rng([*map(int, hash_P2[p]), c])
            out[p, c, : rng.integers(1, 5)] = rng.integers(0, 50, 4)[: rng.integers(1, 5)].max()
        return out, (out[..., 0] % 3 > 0) & (length_P > 0)[:, None]

    return run, calls


def sampled(path, run, prompts=PROMPTS) -> Candidates:
    return bootstrap.sample_candidates(
        run, prompts, TOKENS[: len(prompts)], decode, candidates=C, slots=SLOTS, path=path, label="sampling"
    )


def same(a: Candidates, b: Candidates) -> None:
    assert (a.ids, a.texts_PC) == (b.ids, b.texts_PC)
    jax.tree.map(np.testing.assert_array_equal, (a.prompts, a.tokens_PC), (b.prompts, b.tokens_PC))
    np.testing.assert_array_equal(a.finished_PC, b.finished_PC)


@pytest.fixture
def whole(tmp_path):
    """An uninterrupted run: its candidates, its file, and the calls of the sampler."""
    run, calls = sampler()
    path = tmp_path / "whole" / "candidates.jsonl"
    return sampled(path, run), path.read_bytes(), calls


# --- candidates on file -----------------------------------------------------------------------------------------------


def test_candidates_stand_beside_their_prompts(whole):
    got, stored, calls = whole
    run, _ = sampler()
    assert len(calls) == 4 and all(len(c) == SLOTS // C for c in calls)  # batches of the two buckets
    assert got.ids == tuple(p.id for p in PROMPTS) and got.finished_PC.shape == (7, C)
    for i, tokens in enumerate(TOKENS):
        out, finished = run(None, np.array([len(tokens)]), sample.prompt_hash(tokens)[None])
        for c in range(C):
            np.testing.assert_array_equal(got.tokens_PC[i][c], out[0, c][out[0, c] >= 0])
            assert got.texts_PC[i][c] == decode(got.tokens_PC[i][c])
        assert got.finished_PC[i].tolist() == finished[0].tolist()
    lines = [json.loads(line) for line in stored.splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(7))
    assert all(line["responses"] == list(got.texts_PC[line["index"]]) for line in lines)


@pytest.mark.parametrize("killed_at", range(4))
@pytest.mark.parametrize("torn", [0, 1, 40])
def test_an_interrupted_run_goes_on(tmp_path, whole, killed_at, torn):
    """Killed in batch n, with the last line torn or not: only what is missing is sampled; the result is the same."""
    want, stored, _ = whole
    path = tmp_path / "candidates.jsonl"
    run, calls = sampler(fail_at=killed_at)
    with pytest.raises(RuntimeError, match="killed"):
        sampled(path, run)
    assert len(calls) == killed_at
    left = path.read_bytes() if killed_at else b""
    assert stored.startswith(left) and left.count(b"\n") == min(2 * killed_at, 7)
    path.write_bytes(left[: len(left) - torn])
    again, more = sampler()
    same(sampled(path, again), want)
    assert len(more) == 4 - killed_at + (torn > 0 and killed_at > 0)  # a torn line costs its batch
    assert path.read_bytes() == stored
    same(sampled(path, sampler(fail_at=0)[0]), want)  # and nothing is left to sample


@pytest.mark.parametrize("room", [0, 1, 150, 400])
def test_a_full_disk_costs_what_it_tore(tmp_path, whole, small_files, room):
    want, stored, _ = whole
    path = tmp_path / "candidates.jsonl"
    with pytest.raises(DiskError, match=f"^{path} could not be written: File too large"), small_files(room):
        sampled(path, sampler()[0])
    assert path.read_bytes() == stored[:room]
    same(sampled(path, sampler()[0]), want)
    assert path.read_bytes() == stored


def test_a_file_of_other_prompts_is_refused(tmp_path, whole):
    path = tmp_path / "candidates.jsonl"
    path.write_bytes(whole[1])
    others = (*PROMPTS[:2], Prompt("q", "another"), *PROMPTS[3:])
    said = r"candidates.jsonl holds candidates of prompt 'p2' at place 2, expected another one: .* Remove the file"
    with pytest.raises(ValueError, match=said):
        sampled(path, sampler()[0], others)
    with pytest.raises(ValueError, match="holds candidates of prompt 'p3' at place 3"):
        sampled(path, sampler()[0], PROMPTS[:3])
    assert path.read_bytes() == whole[1]


def test_slots_fewer_than_candidates_take_a_prompt_at_a_time(tmp_path):
    run, calls = sampler()
    out = bootstrap.sample_candidates(
        run, PROMPTS, TOKENS, decode, candidates=C, slots=1, path=tmp_path / "c", label="sampling"
    )
    assert len(calls) == 7 and len(out.ids) == 7


# --- candidates of somebody else --------------------------------------------------------------------------------------


class Words:
    """A tokeniser of words w<n>, for messages about its texts; ids are numbers, EOS is 0."""

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return decode(tokens)


def imported(rows, monkeypatch, max_length: int = 100, prompts=PROMPTS[:3]):
    """Through a tokeniser that writes a text "w3 w4" as [3, 4, EOS]."""
    numbers = lambda text: np.array([int(w[1:]) for w in text.split()] + [0] * bool(text), np.int32)
    tokenise = lambda prompts, texts_PC, *_, **__: [[numbers(text) for text in texts] for texts in texts_PC]
    monkeypatch.setattr(bootstrap.data, "tokenise_responses", tokenise)
    return bootstrap.imported(
        [Responses(f"c.jsonl:{i}", *row) for i, row in enumerate(rows, 1)],
        prompts,
        TOKENS[: len(prompts)],
        Words(),
        (0,),
        path="c.jsonl",
        max_length=max_length,
    )


def test_imported_candidates_stand_beside_their_prompts(monkeypatch):
    rows = [
        ("prompt 2", ("w1 w2", "w3"), (True, False), (0.5, 1.5)),
        ("another", ("w9",), (True,), (0.0,)),
        ("prompt 0", ("w4", "", "w5"), (True, True, True), (1, 2, 3)),
        ("prompt 2", ("w6",), (True,), (2.5,)),
    ]
    made, told = imported(rows, monkeypatch)
    got = made.candidates
    assert made.used_P.tolist() == [0, 2] and got.ids == ("p0", "p2")
    assert got.prompts[0] is TOKENS[0] and got.prompts[1] is TOKENS[2]
    assert [[t.tolist() for t in row] for row in got.tokens_PC] == [[[4, 0], [], [5, 0]], [[1, 2, 0], [3], [6, 0]]]
    assert got.texts_PC == (("w4", "", "w5"), ("w1 w2", "w3", "w6"))
    assert got.finished_PC.tolist() == [[True, False, True], [True, False, True]]
    np.testing.assert_array_equal(made.scores_PC, np.float32([[1, 2, 3], [0.5, 1.5, 2.5]]))
    assert told == [
        "c.jsonl: 7 candidates in 4 rows",
        "  not used: 1 rows whose prompt is none of the run (c.jsonl:2, …)",
        "  without candidates, and left out: 1 of 3 prompts of the run",
    ]
    valid = bootstrap.valid(got, keep_unfinished=True)
    assert valid.tolist() == [[True, False, True], [True, True, True]]


def test_rows_of_fewer_candidates_are_filled_with_none(monkeypatch):
    rows = [("prompt 0", ("w4",), (True,), (1.0,)), ("prompt 1", ("w5", "w6"), (True, True), (2.0, 3.0))]
    made, told = imported(rows, monkeypatch, prompts=PROMPTS[:2])
    assert [[len(t) for t in row] for row in made.candidates.tokens_PC] == [[2, 0], [2, 2]]
    np.testing.assert_array_equal(made.scores_PC, np.float32([[1, np.nan], [2, 3]]))
    assert not bootstrap.valid(made.candidates, keep_unfinished=True)[0, 1]
    assert told == ["c.jsonl: 3 candidates in 2 rows"]
    unscored, _ = imported([row[:3] + (None,) for row in rows], monkeypatch, prompts=PROMPTS[:2])
    assert unscored.scores_PC is None


def test_imported_candidates_that_are_too_long_are_cut_and_unfinished(monkeypatch):
    """As a given pair's response is: its start stays, without EOS, and its text is what stays."""
    long = ("w1 w2 w3 w4", "w1 w2 w3", "w1 w2 w3 w4 w5")
    rows = [("prompt 0", long, (True, True, False), None)]
    made, told = imported(rows, monkeypatch, max_length=len(TOKENS[0]) + 4)
    assert [t.tolist() for t in made.candidates.tokens_PC[0]] == [[1, 2, 3, 4], [1, 2, 3, 0], [1, 2, 3, 4]]
    assert made.candidates.texts_PC[0] == ("w1 w2 w3 w4", "w1 w2 w3", "w1 w2 w3 w4")
    assert made.candidates.finished_PC.tolist() == [[False, True, False]]
    assert told[1] == "  cut to data.max_length: 2, which count as unfinished"


def test_candidates_of_other_prompts_are_an_error(monkeypatch):
    said = (
        r"c.jsonl: none of its 1 prompts is one of the 3 that the run samples from. Got \"strange\" \(c.jsonl:1\), "
        r"expected \"prompt 0\" or another one. Set data.prompts to the prompts that"
    )
    with pytest.raises(ValueError, match=said):
        imported([("strange", ("w1",), (True,), None)], monkeypatch)


# --- pairs ------------------------------------------------------------------------------------------------------------


def candidates_of(tokens, finished=None, texts=None) -> Candidates:
    texts = texts or tuple(tuple(decode(t) for t in row) for row in tokens)
    finished = np.ones((len(tokens), len(tokens[0])), bool) if finished is None else np.array(finished)
    names = tuple(f"p{i}" for i in range(len(tokens)))
    return Candidates(names, tuple(ids(9, i) for i in range(len(tokens))), texts, tokens, finished)


def test_empty_repeated_and_unfinished_candidates_are_not_valid():
    tokens = (
        (ids(1, 2), ids(1, 2), ids(1), ids(1, 2)),  # repetitions: the first one counts
        (ids(), ids(3), ids(0), ids(4)),  # empty; nothing but special tokens
        (ids(5), ids(6), ids(5), ids(7)),
    )
    made = candidates_of(tokens, [[True] * 4, [True] * 4, [False, True, True, False]])
    kept = bootstrap.valid(made, keep_unfinished=True)
    assert kept.tolist() == [[True, False, True, False], [False, True, False, True], [True, True, False, True]]
    dropped = bootstrap.valid(made, keep_unfinished=False)
    assert dropped.tolist() == [[True, False, True, False], [False, True, False, True], [False, True, False, False]]


GRID = tuple(tuple(ids(10 * p + c + 1) for c in range(4)) for p in range(6))
REWARDS = np.array([[3, 1, 2, 0], [1, 1, 1, 1], [0, 5, 9, 9], [2, 2, 8, 4], [7, 6, 5, 4], [1, 2, 3, 4]], np.float32)
VALID = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]], bool)


def pairs_of(rule: str, keep: int = 100, rewards=REWARDS, valid=VALID, seed: int = 0):
    return bootstrap.fresh_pairs(candidates_of(GRID), rewards, valid, rule=rule, keep=keep, key=jax.random.key(seed))


def allowed(rule: str, p: int) -> set[tuple[int, int]]:
    """The pairs of valid candidates of prompt p that a rule may make, by search."""
    live = np.flatnonzero(VALID[p])
    unlike = {(a, b) for a, b in itertools.permutations(live, 2) if REWARDS[p, a] > REWARDS[p, b]}
    best, worst = max(REWARDS[p, live]), min(REWARDS[p, live])
    second = sorted(REWARDS[p, live])[-2:][0]
    return {
        "all_pairs": unlike,
        "random": unlike,
        "best_random": {(a, b) for a, b in unlike if REWARDS[p, a] == best},
        "best_second": {(a, b) for a, b in unlike if REWARDS[p, a] == best and REWARDS[p, b] == second},
        "best_each": {(a, b) for a, b in unlike if REWARDS[p, a] == best},
        "best_worst": {(a, b) for a, b in unlike if REWARDS[p, a] == best and REWARDS[p, b] == worst},
    }[rule]


def mean_wins(probability, valid) -> np.ndarray:
    """[P, C], in float64, one by one; NaN where a candidate meets none."""
    out = np.full(valid.shape, np.nan)
    for p, i in np.ndindex(valid.shape):
        met = [probability(p, i, j) for j in range(valid.shape[1]) if j != i and valid[p, i] and valid[p, j]]
        met = [value for value in met if not np.isnan(value)]
        out[p, i] = np.mean(met) if met else np.nan
    return out


def test_how_often_a_candidate_wins():
    """Of rewards σ(r_i - r_j); of a source that compares what it said, intransitive or not; among valid ones alone."""
    from_rewards = lambda p, i, j: 1 / (1 + np.exp(REWARDS[p, j] - REWARDS[p, i], dtype=np.float64))
    got = sera.win_rates(jnp.asarray(REWARDS), jnp.asarray(VALID))
    np.testing.assert_allclose(got, mean_wins(from_rewards, VALID), rtol=1e-6)
    prob = np.random.default_rng(0).uniform(size=(6, 4, 4)).astype(np.float32)
    prob[0, 1, 2] = prob[0, 2, 1] = np.nan  # not compared
    prob[5, 0, 1:] = np.nan  # with nobody
    want = mean_wins(lambda p, i, j: prob[p, i, j], VALID)
    np.testing.assert_allclose(sera.win_rates(REWARDS, jnp.asarray(VALID), jnp.asarray(prob)), want, rtol=1e-6)
    assert np.isnan(want[5, 0]) and np.isnan(want[4]).all()
    cycle = np.array([[[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]], np.float32)  # rock, paper, scissors
    assert sera.win_rates(np.zeros((1, 3)), jnp.ones((1, 3), bool), jnp.asarray(cycle)).tolist() == [[0.5] * 3]


@pytest.mark.parametrize("compares", [False, True])
def test_fresh_pairs_know_how_often_each_side_wins(compares):
    prob = np.random.default_rng(1).uniform(size=(6, 4, 4)).astype(np.float32) if compares else None
    how = {"rule": "best_worst", "keep": 9, "key": jax.random.key(0)}
    fresh = bootstrap.fresh_pairs(candidates_of(GRID), REWARDS, VALID, prob, **how)
    want = np.asarray(sera.win_rates(jnp.asarray(REWARDS), jnp.asarray(VALID), prob))
    assert len(fresh.trees) == 4 and fresh.win_F2.dtype == np.float32
    np.testing.assert_array_equal(fresh.win_F2, want[fresh.prompt_F[:, None], fresh.pair_F2])


@pytest.mark.parametrize("rule", sera.PAIR_RULES)
def test_the_pairs_of_every_rule(rule):
    fresh = pairs_of(rule)
    found = {p: [tuple(map(int, pair)) for q, pair in zip(fresh.prompt_F, fresh.pair_F2) if q == p] for p in range(6)}
    for p in range(6):
        assert set(found[p]) <= allowed(rule, p)
        every = rule in ("all_pairs", "best_each")
        assert len(found[p]) == (len(allowed(rule, p)) if every else bool(allowed(rule, p)))
    assert not found[1] and not found[4]  # ties make no pair, nor does one candidate alone
    for tree, p, (a, b), reward, margin in zip(
        fresh.trees, fresh.prompt_F, fresh.pair_F2, fresh.reward_F2, fresh.margin_F, strict=True
    ):
        assert tree.branches[0] is GRID[p][a] and tree.branches[1] is GRID[p][b]
        assert tree.prompt.tolist() == [9, p] and tree.id == f"p{p}/{a}>{b}"
        assert reward.tolist() == [REWARDS[p, a], REWARDS[p, b]] and margin == REWARDS[p, a] - REWARDS[p, b] > 0
    assert len({t.id for t in fresh.trees}) == len(fresh.trees)
    assert fresh.kept_F.all() and fresh.kept_F.dtype == bool


def test_the_rule_that_explores():
    """The most uncertain of the others is taken where a nat costs little; of all pairs, the most uncertain are kept."""
    gamma = np.array([[0, 5, 2, 1], [9] * 4, [3, 4, 9, 9], [7, 9, 9, 8], [9] * 4, [1, 6, 2, 0]], np.float32)
    of = lambda eta, keep=100: bootstrap.fresh_pairs(
        candidates_of(GRID), REWARDS, VALID, rule="explore", keep=keep, key=jax.random.key(0), gamma_PC=gamma, eta=eta
    )
    # Prompt 2: candidates 0 to 2 are valid, 2 is the best; prompt 3: 0 and 3; prompt 5: all.
    cheap, dear = of(1e-3), of(1e3)
    assert [(p, *pair) for p, pair in zip(cheap.prompt_F, cheap.pair_F2.tolist())] == [
        (0, 0, 1), (2, 2, 1), (3, 3, 0), (5, 3, 1)
    ]  # fmt: skip
    assert cheap.gamma_F.tolist() == [5, 4, 7, 6] and cheap.kept_F.all()
    assert dear.pair_F2.tolist() == [[0, 1], [2, 0], [3, 0], [3, 0]]
    assert cheap.margin_F.tolist() == [2, 4, 2, 2] and of(1e-3, keep=2).kept_F.tolist() == [False, False, True, True]
    assert pairs_of("best_worst").gamma_F is None
    assert set(bootstrap.PAIR_RULES) == {*sera.PAIR_RULES, "explore"}


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 50])
def test_the_largest_margins_are_kept(keep):
    fresh = pairs_of("best_worst", keep)
    assert fresh.margin_F.tolist() == [3, 9, 2, 3]
    order = np.argsort(-fresh.margin_F, kind="stable")[:keep]
    assert np.flatnonzero(fresh.kept_F).tolist() == sorted(order)


def test_random_rules_draw_by_key():
    draws = {tuple(map(tuple, pairs_of("random", seed=seed).pair_F2.tolist())) for seed in range(8)}
    assert len(draws) > 3
    again = pairs_of("random", seed=3)
    np.testing.assert_array_equal(again.pair_F2, pairs_of("random", seed=3).pair_F2)


def test_rules_that_read_probabilities_and_their_margins():
    """The source's own P where it has one, whatever the mean rewards say; the margin is P(c > r) - P(r > c)."""
    circle = np.array([[0.5, 0.9, 0.1, 0.5], [0.1, 0.5, 0.7, 0.5], [0.9, 0.3, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    prob = np.tile(circle.astype(np.float32), (6, 1, 1))
    prob[4, 2] = prob[4, :, 2] = 0.5
    how = {"rule": "most_certain", "keep": 2, "key": jax.random.key(0)}
    even = np.full_like(REWARDS, 0.5)
    fresh = bootstrap.fresh_pairs(candidates_of(GRID), even, VALID, prob, **how)
    assert list(zip(fresh.prompt_F.tolist(), map(tuple, fresh.pair_F2.tolist()))) == [(p, (0, 1)) for p in (0, 1, 2, 5)]
    np.testing.assert_allclose(fresh.margin_F, 0.8, rtol=1e-6)
    assert fresh.kept_F.tolist() == [True, True, False, False]
    assert not len(bootstrap.fresh_pairs(candidates_of(GRID), even, VALID, prob, **how | {"rule": "best_worst"}).trees)
    # Without P, σ of the rewards' differences.
    fresh = bootstrap.fresh_pairs(candidates_of(GRID), REWARDS, VALID, **how)
    odds = fresh.reward_F2[:, 0] - fresh.reward_F2[:, 1]
    np.testing.assert_allclose(fresh.margin_F, np.tanh(odds / 2), rtol=1e-5)
    assert odds.tolist() == [3, 9, 2, 3]


def test_no_pairs_at_all():
    fresh = pairs_of("best_worst", valid=np.zeros_like(VALID))
    assert fresh.trees == () and fresh.pair_F2.shape == fresh.reward_F2.shape == (0, 2)
    assert fresh.kept_F.shape == fresh.margin_F.shape == (0,)


def test_a_reward_that_is_not_finite():
    broken = REWARDS.copy()
    broken[2, 3] = np.nan  # not valid: nobody asks
    assert len(pairs_of("best_worst", rewards=broken).trees) == 4
    broken[3, 3] = np.inf
    said = r"candidate 3 of prompt 'p3' has reward inf, expected a finite number \(1 of 18 candidates\)"
    with pytest.raises(ValueError, match=said):
        pairs_of("best_worst", rewards=broken)


def test_prompts_of_an_iteration():
    draw = lambda share=0.25, seed=0, iteration=2: bootstrap.prompts_of_iteration(
        200, share, seed=seed, iteration=iteration
    )
    first = draw()
    assert len(first) == 50 and (np.diff(first) > 0).all() and first.min() >= 0 and first.max() < 200
    np.testing.assert_array_equal(first, draw())
    for other in (draw(iteration=3), draw(seed=1)):
        assert len(set(first) & set(other)) < 30  # a quarter of a quarter is expected
    np.testing.assert_array_equal(draw(share=1.0), np.arange(200))
    assert len(bootstrap.prompts_of_iteration(3, 0.01, seed=0, iteration=1)) == 1
    seen = set().union(*(draw(iteration=t).tolist() for t in range(1, 20)))
    assert len(seen) > 190


def test_repeated_candidates_stand_in_one_pair_and_win_as_often_as_they_were_said():
    """Of a, a, b, a, (unfinished) c: a met itself twice and b once; b met a three times."""
    tokens = [ids(1), ids(1), ids(2), ids(1), ids(3)]
    said = Candidates(("p",), (ids(9),), (tuple("aabac"),), (tuple(tokens),), np.array([[True] * 4 + [False]]))
    counts = bootstrap.copies(said, keep_unfinished=False)
    assert counts.tolist() == [[3, 0, 1, 0, 0]]
    assert bootstrap.copies(said, keep_unfinished=True).tolist() == [[3, 0, 1, 0, 1]]
    assert bootstrap.copies(said, keep_unfinished=True, draws=3).tolist() == [[2, 0, 1, 1, 1]]
    prob = np.full((1, 5, 5), np.nan, np.float32)
    prob[0, 0, 0] = prob[0, 2, 2] = 0.5
    prob[0, 0, 2], prob[0, 2, 0] = 0.9, 0.1
    how = {"rule": "best_worst", "keep": 9, "key": jax.random.key(0)}
    rewards_PC = np.array([[2.0, 2, 1, 2, np.nan]], np.float32)
    fresh = bootstrap.fresh_pairs(said, rewards_PC, counts > 0, prob, counts, **how)
    np.testing.assert_allclose(fresh.win_F2, [[(2 * 0.5 + 0.9) / 3, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(fresh.preference_F2, [[0.9, 0.1]], rtol=1e-6)
    # Against others than the candidates: b is said twice by them, and nothing else.
    fresh = bootstrap.fresh_pairs(said, rewards_PC, counts > 0, prob, np.array([[0, 0, 2, 0, 0]]), **how)
    np.testing.assert_allclose(fresh.win_F2, [[0.9, 0.5]], rtol=1e-6)
    of_rewards = bootstrap.fresh_pairs(said, rewards_PC, counts > 0, **how)
    np.testing.assert_allclose(of_rewards.preference_F2, [[1 / (1 + np.exp(-1)), 1 / (1 + np.e)]], rtol=1e-6)


def test_prompts_in_turn_come_once_before_any_comes_twice():
    draw = lambda turn, seed=0: bootstrap.prompts_of_iteration(9, 1 / 3, seed=seed, iteration=turn + 1, turn=turn)
    three = [draw(turn).tolist() for turn in range(3)]
    assert sorted(sum(three, [])) == list(range(9)) and all(part == sorted(part) for part in three)
    assert draw(3).tolist() == three[0] and draw(0, seed=1).tolist() != three[0]
    over = [bootstrap.prompts_of_iteration(10, 0.3, seed=0, iteration=t, turn=t) for t in range(4)]
    assert [len(part) for part in over] == [3, 3, 3, 3] and len(set(np.concatenate(over[:3]))) == 9
    assert len(set(np.concatenate(over))) == 10  # the fourth takes the last one, and goes on from the start


def test_a_given_response_is_candidate_0_and_its_repetition_is_the_sample():
    made = candidates_of(((ids(5, 2), ids(6, 2)), (ids(7, 2), ids(8, 2)), (ids(7, 2), ids(8, 2))))
    given = (ids(6, 2), ids(9), ids())
    both = bootstrap.with_given(made, given, decode, (2,))
    assert [row[0] is own for row, own in zip(both.tokens_PC, given)] == [True] * 3
    assert both.tokens_PC[0][1:] == made.tokens_PC[0] and both.texts_PC[1][1:] == made.texts_PC[1]
    assert both.finished_PC.tolist() == [[True, True, True], [False, True, True], [False, True, True]]
    assert both.texts_PC[0][0] == decode(ids(6, 2))
    kept = bootstrap.valid(both, keep_unfinished=True)
    assert kept.tolist() == [[True, True, False], [True, True, True], [False, True, True]]


def test_the_chosen_response_of_a_prompt_is_that_of_its_first_pair():
    pairs = [Pair(str(i), prompt, "c", "r") for i, prompt in enumerate(["a", "b", "a"])]
    trees = [Tree(str(i), ids(1), (ids(10 + i, 2), ids(20, 2))) for i in range(3)]
    prompts = [Prompt("x", "b"), Prompt("y", "a"), Prompt("z", "c")]
    found = bootstrap.chosen_of(prompts, pairs, trees)
    assert [ids_.tolist() for ids_ in found] == [[11, 2], [10, 2], []]
