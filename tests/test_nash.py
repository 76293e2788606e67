"""Games with a circle: closed forms, the solver against its own definition, which iterations get there; self-play of
the table's own losses on a policy of three numbers, with exact expectations."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import losses, nash

REFERENCE = np.array([0.6, 0.25, 0.15])
TAU = 0.1


def circle(a: float, b: float, c: float) -> np.ndarray:
    """0 beats 2 by a, 1 beats 0 by b, 2 beats 1 by c: without a reference its Nash policy is (c, a, b)/(a+b+c)."""
    return 0.5 + np.array([[0, -b, a], [b, 0, -c], [-a, c, 0]])


GAME = circle(0.4, 0.2, 0.3)


def walk(step, times: int, policy_N=REFERENCE) -> list[np.ndarray]:
    found = [policy_N]
    for _ in range(times):
        found.append(step(found[-1]))
    return found


def test_the_nash_policy_without_a_reference_is_known():
    """And the regularised one goes there with τ, from the reference itself where τ is large."""
    known = np.array([0.3, 0.4, 0.2]) / 0.9
    np.testing.assert_allclose(nash.win_rates(GAME, known), 0.5, atol=1e-15)
    assert nash.exploitability(GAME, known, REFERENCE, 0.0) < 1e-15
    far = [nash.total_variation(nash.nash(GAME, REFERENCE, tau), known) for tau in (0.2, 0.1, 0.05, 0.02)]
    assert (np.diff(far) < 0).all() and far[-1] < 0.035
    assert nash.total_variation(nash.nash(GAME, REFERENCE, 100.0), REFERENCE) < 1e-3


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5])
def test_nobody_beats_the_nash_policy(tau):
    """No policy out of many, also those close by, does better than ½ against it in the regularised game; it is its own
    best response."""
    found = nash.nash(GAME, REFERENCE, tau)
    np.testing.assert_allclose(nash.best_response(GAME, found, REFERENCE, tau), found, atol=1e-6)

    def value(one, other):
        return one @ GAME @ other - tau * nash.kl(one, REFERENCE) + tau * nash.kl(other, REFERENCE)

    rng = np.random.default_rng(0)
    near = [nash.normalised(np.log(found) + 0.01 * noise) for noise in rng.normal(size=(300, 3))]
    others = [*rng.dirichlet(np.ones(3), 300), *near]
    assert max(value(other, found) for other in others) < 0.5
    for policy in others[:30]:  # the definition of exploitability
        best = nash.best_response(GAME, policy, REFERENCE, tau)
        assert nash.exploitability(GAME, policy, REFERENCE, tau) == pytest.approx(value(best, policy) - 0.5, abs=1e-12)
        assert value(best, policy) >= max(value(other, policy) for other in others)


def test_where_rewards_explain_preferences_nash_is_the_policy_of_the_rewards():
    """Of P = ½ + r_i - r_j, the best response to anybody is μ·exp(r/τ): RLHF's own optimum."""
    reward = np.array([0.1, 0.0, -0.2])
    linear = 0.5 + reward[:, None] - reward[None]
    want = nash.normalised(np.log(REFERENCE) + reward / TAU)
    np.testing.assert_allclose(nash.nash(linear, REFERENCE, TAU), want, atol=1e-7)
    np.testing.assert_allclose(nash.best_response(linear, REFERENCE, REFERENCE, TAU), want, atol=1e-12)


def test_bradley_terry_finds_rewards_where_there_are_some_and_not_where_there_is_a_circle():
    reward = np.array([0.7, -0.2, 0.4])
    reward = reward - reward @ REFERENCE
    prob = 1 / (1 + np.exp(reward[None] - reward[:, None]))
    np.testing.assert_allclose(nash.bradley_terry(prob, REFERENCE), reward, atol=1e-9)
    fitted = nash.bradley_terry(GAME, REFERENCE)
    weight = np.outer(REFERENCE, REFERENCE)

    def likelihood(r):
        return np.sum(weight * GAME * -np.log1p(np.exp(r[None] - r[:, None])))

    rng = np.random.default_rng(1)
    assert all(likelihood(fitted) > likelihood(fitted + 0.01 * rng.normal(size=3)) for _ in range(100))
    policy = nash.normalised(np.log(REFERENCE) + fitted / TAU)  # what DPO goes to with these rewards
    found = nash.nash(GAME, REFERENCE, TAU)
    assert nash.total_variation(policy, found) > 0.4
    assert nash.exploitability(GAME, policy, REFERENCE, TAU) > 0.02


def test_multiplicative_weights_by_hand_and_on_average():
    """One step by hand; the last iterate turns round the Nash policy and outwards, the average approaches it."""
    got = nash.sppo_step(GAME, np.array([0.5, 0.25, 0.25]), 2.0)
    win = np.array([0.25 + 0.075 + 0.225, 0.35 + 0.125 + 0.05, 0.05 + 0.2 + 0.125])
    want = np.array([0.5, 0.25, 0.25]) * np.exp(2 * win)
    np.testing.assert_allclose(got, want / want.sum(), rtol=1e-14)
    known = np.array([3, 4, 2]) / 9
    seen = walk(lambda policy: nash.sppo_step(GAME, policy, 0.5), 2000)
    far = [nash.kl(known, policy) for policy in seen]
    assert far[-1] > 10 * far[0] > 0  # (Bailey & Piliouras 2018)
    assert nash.total_variation(np.mean(seen, axis=0), known) < 0.05 < nash.total_variation(REFERENCE, known)


def test_best_responses_go_round_and_nash_md_arrives():
    """Self-play that takes each round to its end does not converge where τ is small; Nash-MD does, to its fixed point,
    which is near the Nash policy for a small step and whose mixture is the Nash policy of τ/(1-α)."""
    found = nash.nash(GAME, REFERENCE, TAU)
    round_ = walk(lambda policy: nash.best_response(GAME, policy, REFERENCE, TAU), 300)
    assert min(nash.total_variation(policy, found) for policy in round_[200:]) > 0.1
    bias = []
    for alpha in (0.25, 0.125, 0.0625):
        stays = nash.fixed_mixture(GAME, REFERENCE, TAU, alpha)
        last = walk(functools.partial(nash.nash_md_step, GAME, reference_N=REFERENCE, eta=alpha / TAU, tau=TAU), 400)[
            -1
        ]
        np.testing.assert_allclose(last, stays, atol=1e-6)
        mixed = nash.mixture(stays, REFERENCE, alpha)
        np.testing.assert_allclose(mixed, nash.nash(GAME, REFERENCE, TAU / (1 - alpha)), atol=1e-6)
        bias.append(nash.total_variation(stays, found))
    assert bias[0] < 0.05 and (np.diff(bias) < 0).all() and bias[2] < bias[0] / 3


def test_mixtures_are_geometric():
    one, other = np.array([0.2, 0.8]), np.array([0.6, 0.4])
    want = np.array([0.2**0.75 * 0.6**0.25, 0.8**0.75 * 0.4**0.25])
    np.testing.assert_allclose(nash.mixture(one, other, 0.25), want / want.sum(), rtol=1e-14)
    np.testing.assert_allclose(nash.mixture(one, other, 0.0), one, rtol=1e-14)
    np.testing.assert_allclose(nash.mixture(one, other, 1.0), other, rtol=1e-14)


def test_games_that_are_none():
    with pytest.raises(ValueError, match="tau is 0, expected more than 0"):
        nash.nash(GAME, REFERENCE, 0)
    with pytest.raises(ValueError, match=r"P\[i, j\] \+ P\[j, i\] is not 1 everywhere"):
        nash.nash(GAME**2, REFERENCE, TAU)
    with pytest.raises(ValueError, match="3 steps were not enough for tau 0.1; raise most, or tau"):
        nash.nash(GAME, REFERENCE, TAU, most=3)


def test_rewards_of_wins():
    """Over the others alone; a candidate that is not there counts nowhere; alone it has one half."""
    nan = np.nan
    three = [[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]]
    two = [[0.5, nan, 0.3], [nan, nan, nan], [0.7, nan, 0.5]]
    one = [[nan] * 3, [nan, 0.5, nan], [nan] * 3]
    got = nash.win_rewards(np.array([three, two, one]))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [[0.55, 0.35, 0.6], [0.3, nan, 0.7], [nan, 0.5, nan]], rtol=1e-6)


# --- self-play with losses of the table, on a softmax of three logits, all pairs by their probability ---------------

FIRST, SECOND = map(np.ravel, np.meshgrid(np.arange(3), np.arange(3), indexing="ij"))
PAIRS = np.stack([FIRST, SECOND], axis=1)  # [9, 2]
REWARD = nash.bradley_terry(GAME, REFERENCE)


def against(policy_N, alpha=0.0):
    """P(y, π) of both sides of every pair; alpha: of the mixture with the reference instead."""
    other = jax.nn.softmax((1 - alpha) * jnp.log(policy_N) + alpha * jnp.log(jnp.asarray(REFERENCE, jnp.float32)))
    return (jnp.asarray(GAME, jnp.float32) @ other)[PAIRS]


PREFERRED = np.stack([GAME[FIRST, SECOND], GAME[SECOND, FIRST]], axis=1).astype(np.float32)
BETTER = np.where((REWARD[FIRST] >= REWARD[SECOND])[:, None], PAIRS, PAIRS[:, ::-1])
# Method → (loss, pairs, what it is told when π_t plays itself).
SELF_PLAY = {
    "sppo": (losses.sppo, PAIRS, lambda policy_N: (against(policy_N),)),
    "ipo": (losses.ipo_soft, PAIRS, lambda policy_N: (jnp.asarray(PREFERRED),)),
    "nash_md": (losses.sppo, PAIRS, lambda policy_N: (against(policy_N, 0.25),)),
    "dpo": (losses.dpo, BETTER, lambda policy_N: ()),
}


def slope(method, logits_N, played_N):
    """Gradient by the logits of the expected loss on pairs of samples of `played`, at β = TAU."""
    loss, pairs, told = SELF_PLAY[method]

    def expected(logits_N):
        logp_P2 = jax.nn.log_softmax(logits_N)[pairs]
        ref_P2 = jnp.asarray(np.log(REFERENCE), jnp.float32)[pairs]
        loss_P = loss(logp_P2, ref_P2, jnp.ones_like(ref_P2), *told(played_N), beta=TAU)
        return jnp.sum(played_N[FIRST] * played_N[SECOND] * loss_P)

    return jax.grad(expected)(logits_N)


def transcription(method, logits_N, played_N):
    """The same in float64, from the papers: Σ over pairs of 2·(residual)·(gradient of what it is the residual of)."""
    policy = nash.normalised(logits_N)
    ratio = np.log(policy / REFERENCE)
    of_log = np.eye(3) - policy  # row y: ∂ log π(y) / ∂ logits
    total = np.zeros(3)
    for i in range(3):
        for j in range(3):
            weight = played_N[i] * played_N[j]
            if method == "ipo":
                for label, chance in ((1, GAME[i, j]), (-1, GAME[j, i])):  # IPO, the label drawn
                    residual = label * (ratio[i] - ratio[j]) - 1 / (2 * TAU)
                    total += weight * chance * 2 * residual * label * (of_log[i] - of_log[j])
                continue
            opponent = nash.mixture(played_N, REFERENCE, 0.25) if method == "nash_md" else played_N
            for y in (i, j):
                total += weight * 2 * (ratio[y] - (GAME[y] @ opponent - 0.5) / TAU) * of_log[y]
    return total


@pytest.mark.parametrize("method", ["sppo", "ipo", "nash_md"])
def test_self_play_updates_equal_their_transcription(method):
    """Ten updates of one round by each, from the same logits."""
    rng = np.random.default_rng(3)
    played = rng.dirichlet(np.ones(3) * 3)
    mine, want = jnp.asarray(np.log(played), jnp.float32), np.log(played)
    for _ in range(10):
        mine = mine - 0.01 * slope(method, mine, jnp.asarray(played, jnp.float32))
        want = want - 0.01 * transcription(method, want, played)
        np.testing.assert_allclose(mine, want, rtol=2e-5, atol=2e-5)
    assert np.abs(want - np.log(played)).max() > 0.05


def self_play(method, rounds, updates, rate):
    """Policies after each round of `updates` gradient steps, [rounds + 1, 3]."""

    def of_round(logits_N, _):
        played_N = jax.nn.softmax(logits_N)
        step = lambda _, logits_N: logits_N - rate * slope(method, logits_N, played_N)
        return jax.lax.fori_loop(0, updates, step, logits_N), played_N

    begin = jnp.asarray(np.log(REFERENCE), jnp.float32)
    return np.asarray(jax.jit(lambda: jax.lax.scan(of_round, begin, length=rounds + 1))()[1], np.float64)


def test_a_round_of_ipo_to_its_end_is_a_best_response():
    got = self_play("ipo", 1, 4000, 0.05)[-1]
    np.testing.assert_allclose(got, nash.best_response(GAME, REFERENCE, REFERENCE, TAU), atol=1e-4)


@pytest.mark.parametrize("method", ["sppo", "ipo", "nash_md"])
def test_self_play_in_small_rounds_approaches_the_nash_policy(method):
    """SPPO and IPO that of β, Nash-MD its fixed point beside it."""
    known = nash.nash(GAME, REFERENCE, TAU)
    there = nash.fixed_mixture(GAME, REFERENCE, TAU, 0.25) if method == "nash_md" else known
    seen = self_play(method, 3000, 2, 0.02)
    assert nash.total_variation(seen[0], there) > 0.15
    assert nash.total_variation(seen[-1], there) < 2e-3
    assert nash.total_variation(seen[-1], known) < 0.05
    assert (
        nash.exploitability(GAME, seen[-1], REFERENCE, TAU) < 0.004 < nash.exploitability(GAME, seen[0], REFERENCE, TAU)
    )


def test_dpo_on_bradley_terry_rewards_does_not():
    """It goes to the move of the highest reward, further the longer it trains."""
    known = nash.nash(GAME, REFERENCE, TAU)
    far = [nash.total_variation(policy, known) for policy in self_play("dpo", 3000, 2, 0.5)]
    assert min(far[-1000:]) > 0.3 and far[-1] > far[0] + 0.1


# --- the game of launch/nash.py ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(script):
    return script("launch/nash.py")


def test_the_game_of_words_is_this_one(driver, tmp_path):
    game = driver.nash_game
    np.testing.assert_allclose(game.PROB[:3, :3], GAME, atol=1e-15)
    said = ["rock w0 w1", "paper w1", "scissors", "w3 rock", ""]
    assert [game.move(text) for text in said] == [0, 1, 2, 3, 3]
    for one in said:
        assert [game.prefer("p", one, other) + game.prefer("p", other, one) for other in said] == [1.0] * 5
    assert game.prefer("p", said[0], said[2]) == 0.9 and game.prefer("p", said[1], said[4]) == 0.9
    fitted = [game.fitted("p", text) for text in said]
    assert np.argsort(fitted[:4]).tolist() == [3, 2, 0, 1] and fitted[3] == fitted[4]  # paper is highest
    game.write(tmp_path, 0)
    rows = {f.stem: [json.loads(x) for x in f.read_text().splitlines()] for f in tmp_path.glob("*.jsonl")}
    moves = [game.move(row["completion"]) for row in rows["demonstrations"]]
    np.testing.assert_allclose(np.bincount(moves) / len(moves), REFERENCE, atol=0.04)
    assert len({row["prompt"] for row in rows["pairs"]}) == len(rows["pairs"]) == 128
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows["scored"])
    assert all(game.SCORES[row["chosen"].split()[0]] == row["score_chosen"] for row in rows["scored"])


def test_what_the_driver_measures(driver, tmp_path):
    """Nothing at the Nash policy and at the optimum of the scores, of each prompt's own game; something elsewhere."""
    rng = np.random.default_rng(0)
    start = rng.dirichlet([30, 12, 7, 1], size=5)
    best = np.array([nash.nash(driver.nash_game.PROB, first, 0.1) for first in start])
    got = driver.measured(np.array([start, best]), 0.1)
    assert got["tv"][0] > 0.1 and got["tv"][1] < 1e-9 and got["exploitability"][1] < 1e-9 < got["exploitability"][0]
    np.testing.assert_allclose(got["nash"], best.mean(0))
    assert got["mean_tv"] == pytest.approx(got["tv"][0] / 2)
    optimum = start * np.exp(np.array([0.0, 1.0, -1.0, 5.0]))  # what else is said has no score
    scored = driver.of_scores(np.array([start, optimum / optimum.sum(1, keepdims=True)]), 0.1)
    assert scored["tv"][0] > 0.1 and scored["tv"][1] < 1e-9
    told = driver.table({"one": [got, got]}) + driver.table_of_scores({"two": [scored]})
    assert "| start | " in told and f"| one | {0:.3f} ± {0:.3f} |" in told and "| two | " in told
    driver.figure({"one": [got, got]}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
