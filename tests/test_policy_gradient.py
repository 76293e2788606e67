"""Advantages, PPO's clip, RLOO and KL against float64 transcriptions, and against closed forms on a small bandit."""

import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import policy_gradient
from sera_jax.policy_gradient import ADVANTAGES, RATIOS

NAN = float("nan")
REWARDS = [[1.0, 4.0, 2.5, -3.0], [2.0, 2.0, 2.0, 2.0], [NAN, 1.0, NAN, 5.0], [NAN, NAN, 7.0, NAN], [NAN] * 4]


def advantages(name: str, rewards: list[float]) -> list[float]:
    """One prompt, candidate by candidate, by the definitions of TRL 1.16 (RLOOTrainer, GRPOTrainer)."""
    known = [r for r in rewards if r == r]
    out = []
    for i, r in enumerate(rewards):
        others = [x for j, x in enumerate(rewards) if j != i and x == x]
        if r != r:
            out.append(NAN)
        elif len(known) < 2:
            out.append(0.0)
        elif name == "leave_one_out":
            out.append(r - statistics.fmean(others))
        else:
            out.append((r - statistics.fmean(known)) / (statistics.stdev(known) + 1e-4 if name == "group" else 1))
    return out


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name):
    want = [advantages(name, rewards) for rewards in REWARDS]
    np.testing.assert_allclose(ADVANTAGES[name](np.array(REWARDS)), want, rtol=1e-12, atol=1e-12)


def test_the_best_is_the_first_of_equal_ones_and_none_of_unknown_ones():
    assert policy_gradient.best(np.array(REWARDS)).tolist() == [1, 0, 3, 2, -1]


# --- the loss ---------------------------------------------------------------------------------------------------------

LENGTHS = ((5, 1, 4, 0), (3, 7, 0, 0))  # of the responses in the slots of two rows
SLOTS, TOKENS = 4, 13


def arrays(seed: int, spread: float = 0.3) -> dict[str, np.ndarray]:
    """Two rows; behind the tokens stands rubbish."""
    rng = np.random.default_rng(seed)
    slot = np.full((2, TOKENS), SLOTS, np.int32)
    for row, lengths in enumerate(LENGTHS):
        slot[row, : sum(lengths)] = np.repeat(np.arange(SLOTS), lengths)
    logp = rng.normal(-2, 1, slot.shape)
    out = {"logp": logp, "old": logp + spread * rng.normal(size=slot.shape)}
    out["reference"] = logp + rng.normal(size=slot.shape)
    for name in out:
        out[name] = np.where(slot < SLOTS, out[name], [NAN, 1e30][seed % 2])
    advantage = rng.normal(size=(2, SLOTS))
    advantage[0, 1] = NAN
    return out | {"slot": slot, "advantage": advantage}


def transcribed(a: dict, *, ratio: str, average: str, clip: float, clip_high: float, beta: float) -> tuple:
    """Loss, d loss / d logp by hand, clip shares and KL: response by response, token by token, float64."""
    total, weights, gradient = 0.0, 0.0, np.zeros(a["logp"].shape)
    low = high = kl = 0.0
    for row, lengths in enumerate(LENGTHS):
        for slot, length in enumerate(lengths):
            advantage = a["advantage"][row, slot]
            if length == 0 or np.isnan(advantage):
                continue
            at = np.flatnonzero(a["slot"][row] == slot)
            apart = a["logp"][row, at] - a["old"][row, at]
            rho = np.exp(apart) if ratio == "token" else np.full(length, np.exp(apart.sum()))
            weight = 1.0 if average == "token" else 1.0 / length
            for t, place in enumerate(at):
                weights += weight
                plain, cut = rho[t] * advantage, min(max(rho[t], 1 - clip), 1 + clip_high) * advantage
                total += weight * -min(plain, cut)
                if plain <= cut:  # the minimum moves with the ratio
                    of = [place] if ratio == "token" else at
                    gradient[row, of] -= weight * plain
                low += weight * (rho[t] < 1 - clip and advantage < 0)
                high += weight * (rho[t] > 1 + clip_high and advantage > 0)
                if beta:
                    x = a["reference"][row, place] - a["logp"][row, place]
                    total += weight * beta * (np.exp(x) - x - 1)
                    kl += weight * (np.exp(x) - x - 1)
                    gradient[row, place] += weight * beta * (1 - np.exp(x))
    return total / weights, gradient / weights, low / weights, high / weights, kl / weights


CASES = {
    "ppo": {"ratio": "token", "average": "token", "clip": 0.2, "clip_high": 0.2, "beta": 0.0},
    "grpo": {"ratio": "token", "average": "sequence", "clip": 0.2, "clip_high": 0.28, "beta": 0.04},
    "rloo": {"ratio": "sequence", "average": "sequence", "clip": 0.2, "clip_high": 0.2, "beta": 0.0},
    "rloo in the loss": {"ratio": "sequence", "average": "token", "clip": 0.3, "clip_high": 0.2, "beta": 0.1},
    "unclipped": {"ratio": "token", "average": "token", "clip": np.inf, "clip_high": np.inf, "beta": 0.1},
}


def of_room(a: dict, keys: dict, old=True) -> tuple:
    """The room's loss and its gradient, divided once."""
    f32 = {name: jnp.asarray(value, jnp.float32) for name, value in a.items() if name != "slot"}
    reference = f32["reference"] if keys["beta"] else None

    def mean(logp):
        total, weight, told = policy_gradient.loss(
            logp, f32["old"] if old else None, reference, jnp.asarray(a["slot"]), f32["advantage"], **keys
        )
        return total / weight, (weight, jax.tree.map(lambda m: m / weight, told))

    (value, (_, told)), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(f32["logp"])
    return value, np.asarray(gradient), told


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_against_the_transcription(case, seed):
    keys, a = CASES[case], arrays(seed)
    want, gradient, low, high, kl = transcribed(a, **keys)
    value, got, told = of_room(a, keys)
    np.testing.assert_allclose(value, want, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(got, gradient, rtol=2e-5, atol=1e-6)
    assert not got[a["slot"] == SLOTS].any() and not got[0, 5].any()  # padding, and the response without an advantage
    np.testing.assert_allclose(
        [told["clip_ratio/low_mean"], told["clip_ratio/high_mean"], told["clip_ratio/region_mean"]],
        [low, high, low + high],
        rtol=1e-6,
        atol=1e-7,
    )
    assert ("kl" in told) == bool(keys["beta"])
    if keys["beta"]:
        np.testing.assert_allclose(told["kl"], kl, rtol=2e-5)


def test_some_ratios_are_clipped_on_either_side():
    """Else the cases above would hold no clip."""
    told = [of_room(arrays(seed), CASES["ppo"])[2] for seed in range(4)]
    assert all(sum(float(t[f"clip_ratio/{side}_mean"]) for t in told) > 0 for side in ("low", "high"))


@pytest.mark.parametrize("ratio", RATIOS)
def test_before_any_update_it_is_reinforce(ratio):
    """Without old log-probs ρ = 1, and the gradient is -A at each token by its weight, clipped or not."""
    a = arrays(0)
    value, got, told = of_room(a, CASES["grpo"] | {"ratio": ratio, "beta": 0.0}, old=False)
    want, sequences = np.zeros(got.shape), 4
    for row, lengths in enumerate(LENGTHS):
        for slot, length in enumerate(lengths):
            if length and (row, slot) != (0, 1):
                want[row, a["slot"][row] == slot] = -a["advantage"][row, slot] / (length if ratio == "token" else 1)
    np.testing.assert_allclose(got, want / sequences, rtol=1e-5, atol=1e-7)
    assert float(told["clip_ratio/region_mean"]) == 0
    used = [a["advantage"][row, slot] for row, slot in ((0, 0), (0, 2), (1, 0), (1, 1))]
    np.testing.assert_allclose(value, -np.mean(used), rtol=1e-5)


# --- in expectation ---------------------------------------------------------------------------------------------------


def log_softmax(theta):
    return theta - np.log(np.exp(theta).sum())


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("name, scale", [("leave_one_out", 1.0), ("centred", 2 / 3)])
def test_rloo_is_the_policy_gradient_in_expectation(name, scale, beta):
    """A bandit of four arms, three candidates: the mean over all 64 draws by their probability is the gradient of
    E[r] - β·KL(π ‖ π_ref), which is written down in closed form. A response is one token.
    """
    rng = np.random.default_rng(0)
    theta, reference, reward = rng.normal(size=4), log_softmax(rng.normal(size=4)), np.array([1.0, -2.0, 0.5, 3.0])
    logp = log_softmax(theta)
    pi = np.exp(logp)
    regularised = reward - beta * (logp - reference)
    closed = pi * (regularised - pi @ regularised)  # the -β·∇KL of the score itself has mean 0
    keys = {"ratio": "sequence", "average": "sequence", "clip": 0.2, "clip_high": 0.2, "beta": 0.0}

    @jax.jit
    def gradient(draw, advantage):
        def loss(theta):
            logp = jax.nn.log_softmax(theta)[draw][None]
            total, weight, _ = policy_gradient.loss(logp, None, None, jnp.arange(3)[None], advantage[None], **keys)
            return total / weight

        return jax.grad(loss)(jnp.asarray(theta, jnp.float32))

    mean = np.zeros(4)
    for draw in itertools.product(range(4), repeat=3):
        advantage = ADVANTAGES[name](regularised[list(draw)][None])[0]
        mean += pi[list(draw)].prod() * -np.asarray(gradient(jnp.array(draw), jnp.asarray(advantage, jnp.float32)))
    np.testing.assert_allclose(mean, scale * closed, rtol=1e-5, atol=1e-6)


def test_k3_estimates_the_kl():
    """Its mean under π is KL(π ‖ π_ref); it is never negative."""
    rng = np.random.default_rng(1)
    logp, reference = log_softmax(rng.normal(size=6)), log_softmax(rng.normal(size=6))
    k3 = np.asarray(policy_gradient.k3(jnp.asarray(logp), jnp.asarray(reference)))
    assert (k3 >= 0).all()
    np.testing.assert_allclose(np.exp(logp) @ k3, np.exp(logp) @ (logp - reference), rtol=1e-5)
