"""The losses against golden numbers, float64 NumPy transcriptions, and what must hold of any of them.

Every row of the table goes through every property: a new loss needs a case in CASES, a line in WITNESS and one in
REWARDS, and is told so. Losses of single responses (`unpaired`) do not: they know no pair to swap, and take labels; a
section of their own has what holds of them.
"""

import dataclasses
import functools
import pathlib
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import config, losses
from sera_jax.losses import implicit, reference_free

# Three pairs whose token log-probs are -(a + b·i): the sums of (chosen, rejected). The expected values below were
# computed by TRL 1.16's own loss code where it has the loss, and by an independent float64 NumPy transcription.
LOGP = np.array([[-2.60, -3.15], [-2.25, -2.50], [-0.75, -4.50]], np.float32)
REF = np.array([[-2.70, -2.40], [-1.80, -2.70], [-1.20, -3.75]], np.float32)
LENGTH = np.array([[4, 3], [2, 5], [3, 3]], np.int32)
NLL = np.array([2.60 / 4, 2.25 / 2, 0.75 / 3])  # per token of the chosen response
GOLDEN = {
    "dpo": ("dpo", dict(beta=0.1), [0.65155003, 0.72617521, 0.6349461]),
    "dpo β=.5": ("dpo", dict(beta=0.5), [0.5030574, 0.8687926, 0.43748795]),
    "cdpo": ("dpo", dict(beta=0.1, label_smoothing=0.1), [0.66005003, 0.71967521, 0.6469461]),
    "dpo forward_kl": ("dpo", dict(beta=0.1, f_divergence="forward_kl"), [0.6343746, 0.73132843, 0.62191177]),
    "dpo js_divergence": ("dpo", dict(beta=0.1, f_divergence="js_divergence"), [0.6688266, 0.71055155, 0.6614838]),
    "dpo alpha_divergence": (
        "dpo",
        dict(beta=0.1, f_divergence="alpha_divergence", f_alpha=0.5),
        [0.64403933, 0.72849932, 0.62965291],
    ),
    "robust_dpo": ("robust_dpo", dict(beta=0.1, label_smoothing=0.1), [0.64092503, 0.73430021, 0.6199461]),
    "exo_pair": ("exo_pair", dict(beta=0.1, label_smoothing=1e-3), [2.61545278, 2.87395382, 2.55607312]),
    "discopop": ("discopop", dict(beta=0.1, discopop_tau=0.05), [0.87727589, 0.79920202, 0.86596305]),
    "slic": ("slic", dict(beta=0.1), [0.915, 1.065, 0.88]),
    "ipo mean": ("ipo", dict(beta=0.1, normalisation="mean"), [22.325625, 27.720225, 21.16]),
    "ipo sum": ("ipo", dict(beta=0.1, normalisation="sum"), [17.2225, 31.9225, 14.44]),
    "sigmoid_norm": ("sigmoid_norm", dict(beta=0.1), [0.67949171, 0.70648496, 0.67334717]),
    "sigmoid_norm β=2": ("sigmoid_norm", dict(beta=2.0), [0.45549248, 0.99285625, 0.37110067]),
    "dpop": ("dpop", dict(beta=0.1, dpop_lambda=50.0), [0.65155003, 2.4091879, 0.6349461]),
    "rdpo": ("rdpo", dict(beta=0.1, rdpo_alpha=0.05), [0.62792358, 0.80641421, 0.6349461]),
    "nca_pair": ("nca_pair", dict(beta=0.1), [1.36541459, 1.40294902, 1.3570255]),
    "bco_pair": ("bco_pair", dict(beta=0.1), [1.34450982, 1.41909746, 1.32725043]),
    "sppo_hard": ("sppo_hard", dict(beta=0.1), [42.0725, 56.7425, 38.765]),
    "apo_zero": ("apo_zero", dict(beta=0.1), [0.9787588, 1.01624794, 0.97001068]),
    "apo_down": ("apo_down", dict(beta=0.1), [0.98126276, 1.00499618, 0.98128405]),
    "simpo γ=.5": ("simpo", dict(beta=2.0, gamma=0.5), [0.55435524, 1.91022415, 0.12692801]),
    "simpo γ/β=.55": ("simpo", dict(beta=2.5, gamma_beta_ratio=0.55), [0.89812326, 2.98914139, 0.16022415]),
    "cpo": ("cpo", dict(beta=0.1), [0.66602526, 0.6807253, 0.52312326]),
    # The odds term was given alone; the NLL is over the response here.
    "orpo": ("orpo", dict(beta=0.1), np.array([0.04006861, 0.14366647, 0.00784201]) + NLL),
    "slic_hf": ("slic_hf", dict(beta=1.0, slic_delta=1.0, slic_lambda=0.0), [0.45, 0.75, 0.0]),
    "slic_hf λ": ("slic_hf", dict(beta=0.1, slic_delta=1.0, slic_lambda=0.1), [0.71, 0.975, 0.075]),
    "kto_pair": (
        "kto_pair",
        dict(beta=0.1),
        [(0.49750002 + 0.48042667) / 2, (0.5112481 + 0.50416657) / 2, (0.4887519 + 0.48042667) / 2],
    ),
    # Given by rank: the second pair has the lowest policy margin (aot) and the lowest c (aot_unpaired).
    "aot": ("aot", dict(beta=0.1), [0.7108003, 0.66602526, 0.6349461]),
    "aot ε=.1": ("aot", dict(beta=0.1, label_smoothing=0.1), [0.7073003, 0.67152526, 0.6469461]),
    "aot_unpaired": ("aot_unpaired", dict(beta=0.1), [0.65155003, 0.67825968, 0.6807253]),
}
# What every property below runs over: name of a loss, and of a variant after a space → its parameters.
CASES = {
    "dpo": dict(beta=0.1, label_smoothing=0.1),
    "dpo forward_kl": dict(beta=0.1, label_smoothing=0.0, f_divergence="forward_kl"),
    "dpo js_divergence": dict(beta=0.5, label_smoothing=0.1, f_divergence="js_divergence"),
    "dpo alpha_divergence": dict(beta=0.1, label_smoothing=0.0, f_divergence="alpha_divergence", f_alpha=0.3),
    "robust_dpo": dict(beta=0.2, label_smoothing=0.1),
    "robust_dpo js_divergence": dict(beta=0.2, label_smoothing=0.2, f_divergence="js_divergence", f_alpha=0.5),
    "exo_pair": dict(beta=0.1, label_smoothing=1e-3),
    "exo_pair alpha_divergence": dict(beta=0.1, label_smoothing=0.1, f_divergence="alpha_divergence", f_alpha=1.2),
    "discopop": dict(beta=0.1, discopop_tau=0.05),
    "discopop alpha_divergence": dict(beta=0.1, discopop_tau=1.0, f_divergence="alpha_divergence", f_alpha=0.7),
    "slic": dict(beta=0.1),
    "slic forward_kl": dict(beta=0.3, f_divergence="forward_kl", f_alpha=0.5),
    "ipo": dict(beta=0.1, normalisation="mean"),
    "ipo sum": dict(beta=0.1, normalisation="sum"),
    "ipo js_divergence": dict(beta=0.1, normalisation="mean", f_divergence="js_divergence", f_alpha=0.5),
    "sigmoid_norm": dict(beta=2.0),
    "sigmoid_norm alpha_divergence": dict(beta=2.0, f_divergence="alpha_divergence", f_alpha=0.5),
    "dpop": dict(beta=0.1, dpop_lambda=5.0),
    "rdpo": dict(beta=0.1, rdpo_alpha=0.05),
    "dpo_pessimistic": dict(beta=0.1, label_smoothing=0.1),
    "nca_pair": dict(beta=0.1),
    "bco_pair": dict(beta=0.1),
    "sppo_hard": dict(beta=0.1),
    "sppo": dict(beta=0.1),
    "ipo_soft": dict(beta=0.1),
    "rpo_bwd_kl": dict(beta=0.1, reward_scale=2.0),
    "rpo_fwd_kl": dict(beta=0.1, reward_scale=2.0),
    "rpo_sq": dict(beta=0.1, reward_scale=0.5),
    "apo_zero": dict(beta=0.1),
    "apo_down": dict(beta=0.1),
    "simpo": dict(beta=2.0, gamma=0.5, label_smoothing=0.1),
    "simpo ratio": dict(beta=2.0, gamma_beta_ratio=0.25, label_smoothing=0.0),
    "alphapo": dict(beta=2.0, alphapo_alpha=0.25, gamma=0.5, label_smoothing=0.0),
    "alphapo ratio": dict(beta=2.0, alphapo_alpha=-0.5, gamma_beta_ratio=0.25, label_smoothing=0.1),
    "cpo": dict(beta=0.1, label_smoothing=0.1),
    "orpo": dict(beta=0.5),
    "slic_hf": dict(beta=0.5, slic_delta=3.0, slic_lambda=0.1),
    "kto_pair": dict(beta=0.1),
    "bco_pair_shift": dict(beta=0.1),
    "aot": dict(beta=0.1, label_smoothing=0.1),
    "aot_unpaired": dict(beta=0.1, label_smoothing=0.1),
}
NAME = {case: case.split()[0] for case in CASES}
PAIRED = {name: loss for name, loss in losses.LOSSES.items() if not loss.unpaired}
COUPLED = {case for case in CASES if losses.LOSSES[NAME[case]].coupled}
REFERENCED = {case for case in CASES if losses.LOSSES[NAME[case]].reference}
every_case = pytest.mark.parametrize("case", CASES)


def test_every_loss_and_every_key_of_it_has_a_case():
    assert set(NAME.values()) == set(PAIRED) == set(WITNESS) == set(REWARDS)
    without = {"alphapo", "bco_pair_shift", "dpo_pessimistic", *TOLD}  # nobody has published numbers
    assert {name for name, _, _ in GOLDEN.values()} == set(PAIRED) - without
    for name, loss in PAIRED.items():
        used = {key for case in CASES if NAME[case] == name for key in CASES[case]}
        assert used == {"beta", *loss.keys}, name


# --- running a case: one compiled program each, eight pairs at a time -------------------------------------------------

PAIRS = 8
TOLD = ("sppo", "ipo_soft", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")  # golden numbers of these stand in a test of theirs
TARGET = np.random.default_rng(7).uniform(0.02, 0.98, (PAIRS, 2)).astype(np.float32)  # of losses that are told more


@functools.cache
def program(case):
    """(logp, ref, length, valid, target) → (loss_P, reward_P2, gradient of Σ loss over the valid pairs, by logp)."""
    loss, parameters = losses.LOSSES[NAME[case]], CASES[case]

    def total(logp_P2, ref_P2, length_P2, valid_P, target_P2):
        batch = (*((valid_P,) if loss.coupled else ()), *losses.told(loss, target_P2))
        loss_P = loss.loss(logp_P2, ref_P2, length_P2, *batch, **parameters)
        return jnp.sum(jnp.where(valid_P, loss_P, 0)), loss_P

    @jax.jit
    def run(logp_P2, ref_P2, length_P2, *of):
        (_, loss_P), gradient_P2 = jax.value_and_grad(total, has_aux=True)(logp_P2, ref_P2, length_P2, *of)
        return loss_P, loss.reward(logp_P2, ref_P2, length_P2, **parameters), gradient_P2

    return run


def run(case, logp, ref, length, valid=None, target=TARGET):
    valid = np.ones(PAIRS, bool) if valid is None else valid
    arrays = np.float32(logp), np.float32(ref), np.int32(length), valid, target
    loss, reward, gradient = map(np.asarray, program(case)(*arrays))
    assert loss.dtype == reward.dtype == gradient.dtype == np.float32
    assert loss.shape == (PAIRS,) and reward.shape == gradient.shape == (PAIRS, 2)
    return loss, reward, gradient


def value(name, logp, ref, length, valid=None, **parameters):
    """A loss outside of jit, by name or as a `Loss`."""
    loss = losses.LOSSES[name] if isinstance(name, str) else name
    valid = (jnp.ones(len(logp), bool) if valid is None else jnp.asarray(valid),) if loss.coupled else ()
    told = losses.told(loss, jnp.asarray(TARGET[: len(logp)]))
    return loss.loss(jnp.asarray(logp), jnp.asarray(ref), jnp.asarray(length), *valid, *told, **parameters)


def draw(seed, pairs=PAIRS, spread=3.0):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 40, (pairs, 2)).astype(np.int32)
    ref = (-rng.gamma(2.0, 1.0, (pairs, 2)) * length - 0.05).astype(np.float32)
    return np.minimum(ref + spread * rng.normal(size=(pairs, 2)), -0.02).astype(np.float32), ref, length


# --- the equations again, in float64, written from the papers ---------------------------------------------------------


def log_sigmoid(x):
    return np.where(x < 0, x, 0) - np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def exp_minus_1(x):
    """With the straight line that ours has beyond 30."""
    return np.where(x < 30, np.expm1(np.minimum(x, 30)), np.exp(30) * (1 + x - 30) - 1)


def bernoulli(z, eps):
    return -(1 - eps) * log_sigmoid(z) - eps * log_sigmoid(-z)


def slope(u, f_divergence="reverse_kl", f_alpha=0.5):
    """f'(π/π_ref) of the log-ratio u, without constants."""
    if f_divergence == "reverse_kl":
        return u
    if f_divergence == "js_divergence":
        return np.log(2) + log_sigmoid(u)
    power = (0 if f_divergence == "forward_kl" else f_alpha) - 1
    return exp_minus_1(power * u) / power


class Pairs:
    """c, r, L_w, L_l and log π(y_w), log π(y_l), float64; at: log-probs where quantities without gradient are taken."""

    def __init__(self, logp, ref, length, at=None, target=TARGET):
        logp, ref, length = (np.asarray(x, np.float64) for x in (logp, ref, length))
        at = logp if at is None else np.asarray(at, np.float64)
        (self.c, self.r), (self.w, self.l), (self.lw, self.ll) = (logp - ref).T, logp.T, np.maximum(length, 1).T
        self.ref = ref[:, 0] - ref[:, 1]
        self.told = np.asarray(target[: len(logp)], np.float64)
        self.gap = self.told[:, 0] - self.told[:, 1]
        self.mean_at = (at - ref).mean()

    def d(self, **divergence):
        return slope(self.c, **divergence) - slope(self.r, **divergence)

    def per_token(self, **divergence):
        return slope(self.c, **divergence) / self.lw - slope(self.r, **divergence) / self.ll


def aot_witness(p, beta, label_smoothing=0.0):
    policy, out = p.w - p.l, np.empty(len(p.c))
    out[np.argsort(policy)] = bernoulli(beta * (np.sort(policy) - np.sort(p.ref)), label_smoothing)
    return out


def aot_unpaired_witness(p, beta, label_smoothing=0.0):
    out = np.empty(len(p.c))
    out[np.argsort(p.c)] = bernoulli(beta * (np.sort(p.c) - np.sort(p.r)), label_smoothing)
    return out


def kto_witness(p, beta):
    kl_w, kl_l = max(p.c.mean(), 0), max(p.r.mean(), 0)
    return (1 - sigmoid(beta * (p.c - kl_l)) + 1 - sigmoid(beta * (kl_w - p.r))) / 2


def exo_witness(p, beta, label_smoothing, **divergence):
    z = beta * p.d(**divergence)
    log_q, log_p = np.stack([log_sigmoid(z), log_sigmoid(-z)]), np.log([[1 - label_smoothing], [label_smoothing]])
    return (np.exp(log_q) * (log_q - log_p)).sum(0)


def discopop_witness(p, beta, discopop_tau, **divergence):
    z = beta * p.d(**divergence)
    with np.errstate(over="ignore"):  # m·exp(-z) = 1 / (exp(z) + exp(z - z/τ))
        exponential = 1 / (np.exp(z) + np.exp(z - z / discopop_tau))
    return sigmoid(-z / discopop_tau) * -log_sigmoid(z) + exponential


def gamma_of(beta, gamma=None, gamma_beta_ratio=None):
    return gamma if gamma is not None else beta * gamma_beta_ratio


def shaped(mean, alpha):
    return -exp_minus_1(-alpha * mean) / alpha


def logit(mean):
    return mean - np.log(-np.expm1(mean))


def coins_kl(one, other):
    """KL of two coins, from their logits."""
    p, q = sigmoid(one), sigmoid(other)
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


WITNESS = {
    "dpo": lambda p, beta, label_smoothing=0.0, **f: bernoulli(beta * p.d(**f), label_smoothing),
    "robust_dpo": lambda p, beta, label_smoothing, **f: (
        (-(1 - label_smoothing) * log_sigmoid(beta * p.d(**f)) + label_smoothing * log_sigmoid(-beta * p.d(**f)))
        / (1 - 2 * label_smoothing)
    ),
    "exo_pair": exo_witness,
    "discopop": discopop_witness,
    "slic": lambda p, beta, **f: np.clip(1 - beta * p.d(**f), 0, None),
    "ipo": lambda p, beta, normalisation, **f: (
        ((p.per_token(**f) if normalisation == "mean" else p.d(**f)) - 0.5 / beta) ** 2
    ),
    "sigmoid_norm": lambda p, beta, **f: -log_sigmoid(beta * p.per_token(**f)),
    "dpop": lambda p, beta, dpop_lambda: -log_sigmoid(beta * (p.c - p.r - dpop_lambda * np.maximum(0, -p.c))),
    "rdpo": lambda p, beta, rdpo_alpha: -log_sigmoid(beta * (p.c - p.r) + rdpo_alpha * (p.lw - p.ll)),
    "dpo_pessimistic": lambda p, beta, label_smoothing=0.0: bernoulli(
        beta * (p.c - p.r) + p.told[:, 0] - p.told[:, 1], label_smoothing
    ),
    "nca_pair": lambda p, beta: (
        -log_sigmoid(beta * p.c) - 0.5 * log_sigmoid(-beta * p.c) - 0.5 * log_sigmoid(-beta * p.r)
    ),
    "bco_pair": lambda p, beta: -log_sigmoid(beta * p.c) - log_sigmoid(-beta * p.r),
    "sppo_hard": lambda p, beta: (p.c - 0.5 / beta) ** 2 + (p.r + 0.5 / beta) ** 2,
    "sppo": lambda p, beta: (p.c - (p.told[:, 0] - 0.5) / beta) ** 2 + (p.r - (p.told[:, 1] - 0.5) / beta) ** 2,
    "ipo_soft": lambda p, beta: (p.c - p.r - (2 * (0.5 + (p.told[:, 0] - p.told[:, 1]) / 2) - 1) / (2 * beta)) ** 2,
    "rpo_bwd_kl": lambda p, beta, reward_scale: coins_kl(reward_scale * p.gap, beta * (p.c - p.r)),
    "rpo_fwd_kl": lambda p, beta, reward_scale: coins_kl(beta * (p.c - p.r), reward_scale * p.gap),
    "rpo_sq": lambda p, beta, reward_scale: (beta * (p.c - p.r) - reward_scale * p.gap) ** 2,
    "apo_zero": lambda p, beta: 1 - sigmoid(beta * p.c) + sigmoid(beta * p.r),
    "apo_down": lambda p, beta: sigmoid(beta * p.c) + 1 - sigmoid(beta * (p.c - p.r)),
    "simpo": lambda p, beta, label_smoothing=0.0, **g: bernoulli(
        beta * (p.w / p.lw - p.l / p.ll) - gamma_of(beta, **g), label_smoothing
    ),
    "alphapo": lambda p, beta, alphapo_alpha, label_smoothing=0.0, **g: bernoulli(
        beta * (shaped(p.w / p.lw, alphapo_alpha) - shaped(p.l / p.ll, alphapo_alpha)) - gamma_of(beta, **g),
        label_smoothing,
    ),
    "cpo": lambda p, beta, label_smoothing=0.0: bernoulli(beta * (p.w - p.l), label_smoothing),
    "orpo": lambda p, beta: -p.w / p.lw - beta * log_sigmoid(logit(p.w / p.lw) - logit(p.l / p.ll)),
    "slic_hf": lambda p, beta, slic_delta, slic_lambda: np.maximum(0, slic_delta - p.w + p.l) - slic_lambda * p.w,
    "kto_pair": kto_witness,
    "bco_pair_shift": lambda p, beta: -log_sigmoid(beta * (p.c - p.mean_at)) - log_sigmoid(-beta * (p.r - p.mean_at)),
    "aot": aot_witness,
    "aot_unpaired": aot_unpaired_witness,
}


def witness(name, logp, ref, length, at=None, target=TARGET, **parameters):
    return WITNESS[name](Pairs(logp, ref, length, at, target), **parameters)


log_ratio = lambda x, ref, n, beta, f_divergence="reverse_kl", f_alpha=0.5, **_: (
    beta * slope(x - ref, f_divergence, f_alpha)
)
log_ratio_per_token = lambda x, ref, n, **parameters: log_ratio(x, ref, n, **parameters) / n
REWARDS = dict.fromkeys(PAIRED, log_ratio) | {
    "ipo": lambda x, ref, n, normalisation, **rest: (
        log_ratio(x, ref, n, **rest) / (n if normalisation == "mean" else 1)
    ),
    "sigmoid_norm": log_ratio_per_token,
    "simpo": lambda x, ref, n, beta, **_: beta * x / n,
    "alphapo": lambda x, ref, n, beta, alphapo_alpha, **_: beta * shaped(x / n, alphapo_alpha),
    "cpo": lambda x, ref, n, beta, **_: beta * x,
    "orpo": lambda x, ref, n, beta: beta * x / n,
    "slic_hf": lambda x, ref, n, beta, **_: beta * x,
}


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case):
    name, parameters, expected = GOLDEN[case]
    got = value(name, LOGP, REF, LENGTH, **parameters)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(witness(name, LOGP, REF, LENGTH, **parameters), expected, rtol=2e-6, atol=2e-7)


@every_case
def test_equals_float64_transcription(case):
    """A little off the reference, as in training, and far off it."""
    for seed, spread in enumerate([0.1, 3.0, 3.0, 30.0]):
        arrays = draw(seed, spread=spread)
        want = witness(NAME[case], *arrays, **CASES[case])
        got, reward, _ = run(case, *arrays)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6, err_msg=f"spread {spread}")
        want = REWARDS[NAME[case]](*(x.astype(np.float64) for x in arrays), **CASES[case])
        np.testing.assert_allclose(reward, want, rtol=2e-5, atol=2e-6, err_msg=f"spread {spread}")


@every_case
def test_gradient_equals_finite_differences_in_float64(case):
    for seed, spread in enumerate([1.0, 3.0, 3.0]):
        logp, ref, length = draw(seed, spread=spread)
        expected, step = np.zeros(logp.shape), 1e-5
        for index in np.ndindex(*logp.shape):
            at = [np.asarray(logp, np.float64).copy() for _ in range(2)]
            at[0][index] += step
            at[1][index] -= step
            up, down = (witness(NAME[case], x, ref, length, at=logp, **CASES[case]).sum() for x in at)
            expected[index] = (up - down) / (2 * step)
        gradient = run(case, logp, ref, length)[2]
        np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=1e-5)


@every_case
def test_jit_is_no_jit(case):
    arrays = draw(1)
    np.testing.assert_allclose(run(case, *arrays)[0], value(NAME[case], *arrays, **CASES[case]), rtol=2e-6, atol=1e-6)


@every_case
@pytest.mark.parametrize("nats", [50.0, 1e3, 1e6])
def test_finite_far_out(case, nats):
    """Log-ratios of ±nats in every combination, answers of one token and of several, log-probs at and near 0."""
    corners = np.array([[1, -1], [-1, 1], [1, 1], [-1, -1]] * 2) * nats
    for length in (1, 7):
        logp, ref = np.full((PAIRS, 2), -nats) + corners, np.full((PAIRS, 2), -nats)
        logp[4:] = [[0, -nats], [-nats, 0], [0, 0], [-1e-9, -1e-5]]
        for array in run(case, logp, ref, np.full((PAIRS, 2), length)):
            assert np.isfinite(array).all(), array


# --- at the reference -------------------------------------------------------------------------------------------------

# Where a loss stands while the policy equals its reference, from its equation at c = r = 0.
GAP = (TARGET[:, 0] - TARGET[:, 1]).astype(np.float64)
AT_REFERENCE = {
    "dpo": np.log(2),
    "robust_dpo": np.log(2),
    "exo_pair": -np.log(2) - 0.5 * np.log(1e-3 * 0.999),
    "discopop": 0.5 * np.log(2) + 0.5,
    "slic": 1.0,
    "ipo": 25.0,
    "sigmoid_norm": np.log(2),
    "dpop": np.log(2),
    "dpo_pessimistic": bernoulli(TARGET[:, 0].astype(np.float64) - TARGET[:, 1], 0.1),
    "nca_pair": 2 * np.log(2),
    "bco_pair": 2 * np.log(2),
    "sppo_hard": 50.0,
    "sppo": (((TARGET - 0.5) / 0.1) ** 2).sum(1),
    "ipo_soft": (GAP / 0.2) ** 2,
    "rpo_bwd_kl": np.log(2) + sigmoid(2 * GAP) * log_sigmoid(2 * GAP) + sigmoid(-2 * GAP) * log_sigmoid(-2 * GAP),
    "rpo_fwd_kl": -np.log(2) - (log_sigmoid(2 * GAP) + log_sigmoid(-2 * GAP)) / 2,
    "rpo_sq": (0.5 * GAP) ** 2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "kto_pair": 0.5,
    "bco_pair_shift": 2 * np.log(2),
    "aot": np.log(2),
    "aot_unpaired": np.log(2),
}
# Cases that raising log π(y_w) does not lower there, with the signs of their gradient. discopop is not monotone: at the
# paper's τ it falls only beyond a margin. apo_down wants both responses lower: its two terms cancel on y_w.
# sppo raises what wins more often than not.
# The others that are told more go the way of what they are told.
NOT_LOWERED = {"discopop": (1, -1), "apo_down": (0, 1), "sppo": -np.sign(TARGET - 0.5).T}
NOT_LOWERED |= {name: (-np.sign(GAP), np.sign(GAP)) for name in TOLD[1:]}


@pytest.mark.parametrize("case", sorted(REFERENCED))
def test_policy_that_equals_its_reference(case):
    _, ref, length = draw(0)
    loss, reward, gradient = run(case, ref, ref, length)
    if case in AT_REFERENCE:
        np.testing.assert_allclose(loss, AT_REFERENCE[case], rtol=1e-6, atol=1e-7)
    assert not reward.any()
    # Every pair is pushed apart from the start, also where a term has a kink there (KL of kto_pair, dpop).
    chosen, rejected = NOT_LOWERED.get(case, (-1, 1))
    assert (np.sign(gradient) == np.transpose([chosen, rejected])).all()


@pytest.mark.parametrize("case", sorted(set(CASES) - REFERENCED))
def test_reference_free_losses_push_apart_and_read_no_reference(case):
    """While the margin is small: SLiC's hinge is content with a large one, label smoothing turns around beyond it."""
    logp, ref, length = draw(0)
    length = np.repeat(length[:, :1], 2, 1)
    logp = -length + np.clip(logp - ref, -0.5, 0.5)
    loss, reward, gradient = run(case, logp, ref, length)
    assert (gradient[:, 0] < 0).all() and (gradient[:, 1] > 0).all()
    for got, want in zip(run(case, logp, np.full_like(ref, np.nan), length), (loss, reward, gradient)):
        np.testing.assert_array_equal(got, want)
    row = losses.LOSSES[NAME[case]]
    np.testing.assert_allclose(row.loss(jnp.float32(logp), None, length, **CASES[case]), loss, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(row.reward(jnp.float32(logp), None, length, **CASES[case]), reward, rtol=2e-6)


def test_at_reference_is_complete():
    assert {NAME[case] for case in REFERENCED} == {*AT_REFERENCE, "rdpo"}  # rdpo: depends on lengths


def test_kto_pair_gradient_at_the_kink_passes_through_the_kl():
    # β/4 · ½ a term; KL_w and KL_l collect one of each pair, spread over the batch by their means: twice as much.
    _, ref, length = draw(0)
    gradient = run("kto_pair", ref, ref, length)[2]
    np.testing.assert_allclose(gradient, np.broadcast_to([-0.025, 0.025], ref.shape), rtol=1e-6)


# --- rewards and swapped pairs ----------------------------------------------------------------------------------------


@every_case
def test_the_margin_is_that_of_the_labels(case):
    """Antisymmetric in the pair; it grows with log π(y_w), falls with log π(y_l)."""
    logp, ref, length = draw(2)
    reward = run(case, logp, ref, length)[1]
    swapped = run(case, logp[:, ::-1], ref[:, ::-1], length[:, ::-1])[1]
    np.testing.assert_array_equal(reward, swapped[:, ::-1])
    more = run(case, logp * 0.99, ref, length)[1]
    assert (more > reward).all()


@every_case
def test_equal_lengths_and_references_rank_by_log_prob(case):
    logp, ref, length = draw(3)
    ref, length = np.repeat(ref[:, :1], 2, 1), np.repeat(length[:, :1], 2, 1)
    reward = run(case, ref + np.clip(logp - ref, -5, 5), ref, length)[1]
    assert (np.sign(reward[:, 0] - reward[:, 1]) == np.sign(np.clip(logp - ref, -5, 5) @ [1, -1])).all()


def modulated(z, tau):
    """DiscoPOP of a margin: logistic and exponential, mixed by σ(z/τ)."""
    with np.errstate(over="ignore"):
        return sigmoid(-z / tau) * -log_sigmoid(z) + 1 / (np.exp(z) + np.exp(z - z / tau))


def beyond(z, k):
    """The logistic loss of a margin beyond the target γ."""
    gamma = gamma_of(k["beta"], k.get("gamma"), k.get("gamma_beta_ratio"))
    return bernoulli(z - gamma, k["label_smoothing"])


# loss(swapped) - loss where it has a closed form: of z (margin of the reward), a, b (the rewards) and the parameters.
SWAPPED = {
    "dpo": lambda z, a, b, p, k: (1 - 2 * k["label_smoothing"]) * z,
    "robust_dpo": lambda z, a, b, p, k: z / (1 - 2 * k["label_smoothing"]),
    "exo_pair": lambda z, a, b, p, k: np.tanh(z / 2) * np.log((1 - k["label_smoothing"]) / k["label_smoothing"]),
    "slic": lambda z, a, b, p, k: np.maximum(1 + z, 0) - np.maximum(1 - z, 0),
    "ipo": lambda z, a, b, p, k: 2 * z / k["beta"] ** 2,
    "sigmoid_norm": lambda z, a, b, p, k: z,
    "rdpo": lambda z, a, b, p, k: z + k["rdpo_alpha"] * (p.lw - p.ll),
    "dpo_pessimistic": lambda z, a, b, p, k: (
        bernoulli(-z + p.told[:, 0] - p.told[:, 1], k["label_smoothing"])
        - bernoulli(z + p.told[:, 0] - p.told[:, 1], k["label_smoothing"])
    ),
    "nca_pair": lambda z, a, b, p, k: log_sigmoid(a) - log_sigmoid(b),
    "bco_pair": lambda z, a, b, p, k: z,
    "bco_pair_shift": lambda z, a, b, p, k: z,
    "sppo_hard": lambda z, a, b, p, k: 2 * z / k["beta"] ** 2,
    "sppo": lambda z, a, b, p, k: 2 * z * (p.told[:, 0] - p.told[:, 1]) / k["beta"] ** 2,  # what is told stays
    "ipo_soft": lambda z, a, b, p, k: 2 * z * p.gap / k["beta"] ** 2,
    "rpo_bwd_kl": lambda z, a, b, p, k: z * np.tanh(k["reward_scale"] * p.gap / 2),
    "rpo_fwd_kl": lambda z, a, b, p, k: k["reward_scale"] * p.gap * np.tanh(z / 2),
    "rpo_sq": lambda z, a, b, p, k: 4 * z * k["reward_scale"] * p.gap,
    "apo_zero": lambda z, a, b, p, k: 2 * (sigmoid(a) - sigmoid(b)),
    "apo_down": lambda z, a, b, p, k: sigmoid(b) - sigmoid(a) + np.tanh(z / 2),
    "cpo": lambda z, a, b, p, k: (1 - 2 * k["label_smoothing"]) * z,
    "discopop": lambda z, a, b, p, k: modulated(-z, k["discopop_tau"]) - modulated(z, k["discopop_tau"]),
    "dpop": lambda z, a, b, p, k: (
        log_sigmoid(z - k["beta"] * k["dpop_lambda"] * np.maximum(0, -p.c))
        - log_sigmoid(-z - k["beta"] * k["dpop_lambda"] * np.maximum(0, -p.r))
    ),
    "simpo": lambda z, a, b, p, k: beyond(-z, k) - beyond(z, k),
    "alphapo": lambda z, a, b, p, k: beyond(-z, k) - beyond(z, k),
    "slic_hf": lambda z, a, b, p, k: (
        np.maximum(0, k["slic_delta"] + z / k["beta"])
        - np.maximum(0, k["slic_delta"] - z / k["beta"])
        + k["slic_lambda"] * z / k["beta"]
    ),
    "orpo": lambda z, a, b, p, k: z / k["beta"] + k["beta"] * (logit(p.w / p.lw) - logit(p.l / p.ll)),
}
# The sorted ones only over the batch: swapping turns ranks around.
SWAPPED_SUM = {"aot", "aot_unpaired"}


@pytest.mark.parametrize("case", CASES)
def test_swapped_pairs(case):
    arrays = logp, ref, length = draw(4)
    loss, reward, _ = (x.astype(np.float64) for x in run(case, *arrays))
    swapped = run(case, logp[:, ::-1], ref[:, ::-1], length[:, ::-1])[0].astype(np.float64)
    (a, b), z = reward.T, reward[:, 0] - reward[:, 1]
    if case == "kto_pair":
        np.testing.assert_allclose(swapped, 1 - loss, rtol=1e-6)  # both KL terms change places
    elif NAME[case] in SWAPPED_SUM:
        smoothing = CASES[case]["label_smoothing"]
        np.testing.assert_allclose((swapped - loss).sum(), (1 - 2 * smoothing) * z.sum(), rtol=1e-5)
    else:
        want = SWAPPED[NAME[case]](z, a, b, Pairs(*arrays), CASES[case])
        np.testing.assert_allclose(swapped - loss, want, rtol=2e-4, atol=2e-5)


def test_smoothing_of_one_half_knows_no_label():
    logp, ref, length = draw(2)
    for name, parameters in [("dpo", {}), ("cpo", {}), ("simpo", {"gamma": 0.0})]:
        parameters = dict(beta=0.1, label_smoothing=0.5, **parameters)
        swapped = value(name, logp[:, ::-1], ref[:, ::-1], length[:, ::-1], **parameters)
        np.testing.assert_allclose(value(name, logp, ref, length, **parameters), swapped, rtol=1e-6)


# --- batches ----------------------------------------------------------------------------------------------------------


@every_case
def test_the_order_of_pairs_is_of_no_matter(case):
    arrays = draw(5)
    order = np.random.default_rng(0).permutation(PAIRS)
    for got, want in zip(run(case, *(x[order] for x in arrays), target=TARGET[order]), run(case, *arrays)):
        np.testing.assert_allclose(got, want[order], rtol=1e-5, atol=1e-7)


@every_case
def test_only_coupled_losses_see_other_pairs(case):
    logp, ref, length = draw(6)
    other = logp.copy()
    other[0] -= [20, 1]
    (loss, _, gradient), (moved, _, moved_gradient) = run(case, logp, ref, length), run(case, other, ref, length)
    alike = np.array_equal(loss[1:], moved[1:]) and np.array_equal(gradient[1:], moved_gradient[1:])
    assert alike == (case not in COUPLED)


@every_case
def test_padding_pairs_change_nothing(case):
    valid = np.array([True, True, False, True, True, False, False, True])
    logp, ref, length = draw(7)
    want = witness(NAME[case], logp[valid], ref[valid], length[valid], target=TARGET[valid], **CASES[case])
    seen = []
    for fill in [(0.0, 0.0), (-80.0, 3.0), (900.0, -2.0)]:
        for array, padding in zip((logp, ref, length), (*fill, 0)):
            array[~valid] = padding
        loss, _, gradient = run(case, logp, ref, length, valid)
        assert np.isfinite(loss).all() and not gradient[~valid].any()
        assert case not in COUPLED or not loss[~valid].any()
        np.testing.assert_allclose(loss[valid], want, rtol=2e-5, atol=2e-6)
        seen.append((loss[valid], gradient[valid]))
    for loss, gradient in seen[1:]:
        np.testing.assert_array_equal(loss, seen[0][0])
        np.testing.assert_array_equal(gradient, seen[0][1])


@every_case
def test_all_padding_is_finite(case):
    zeros = np.zeros((PAIRS, 2))
    assert all(np.isfinite(x).all() for x in run(case, zeros, zeros, zeros, np.zeros(PAIRS, bool)))


# --- single losses ----------------------------------------------------------------------------------------------------


def test_rewards_take_any_shape():
    for name, loss in PAIRED.items():
        parameters = CASES[name]
        one = loss.reward(jnp.float32(-6.0), jnp.float32(-7.0), 3, **parameters)
        assert one.shape == () and one == pytest.approx(REWARDS[name](-6.0, -7.0, 3, **parameters), rel=1e-6)
    grid = losses.LOSSES["simpo"].reward(jnp.full((2, 3, 4), -6.0), None, 3, beta=2.0)
    assert grid.shape == (2, 3, 4) and (grid == -4).all()


def test_ipo_must_be_told_its_normalisation():
    with pytest.raises(TypeError, match="normalisation"):
        value("ipo", LOGP, REF, LENGTH, beta=0.1)
    with pytest.raises(ValueError, match="normalisation is 'token', expected 'sum' .* or 'mean'"):
        value("ipo", LOGP, REF, LENGTH, beta=0.1, normalisation="token")


def test_simpo_must_be_told_which_gamma():
    for gammas in ({}, dict(gamma=0.5, gamma_beta_ratio=0.5)):
        for name in ("simpo", "alphapo"):
            rest = dict(alphapo_alpha=0.1) if name == "alphapo" else {}
            with pytest.raises(
                ValueError, match="target margin: got gamma .* expected exactly one of them: gamma is γ"
            ):
                value(name, LOGP, REF, LENGTH, beta=2.0, **gammas, **rest)
    one = value("simpo", LOGP, REF, LENGTH, beta=2.0, gamma=0.5)
    np.testing.assert_array_equal(one, value("simpo", LOGP, REF, LENGTH, beta=2.0, gamma_beta_ratio=0.25))


def test_alphapo_at_0_is_simpo():
    for alpha in (0.0, 1e-7, 1e-5):
        got = value("alphapo", LOGP, REF, LENGTH, beta=2.0, gamma=0.5, alphapo_alpha=alpha)
        np.testing.assert_allclose(got, value("simpo", LOGP, REF, LENGTH, beta=2.0, gamma=0.5), rtol=1e-4)


def test_exo_pair_needs_smoothing():
    with pytest.raises(ValueError, match="exo_pair: label_smoothing is 0.0, expected more than 0"):
        value("exo_pair", LOGP, REF, LENGTH, beta=0.1, label_smoothing=0.0)


def test_divergences():
    u = jnp.asarray([-1e6, -1e3, -50, -20, -1, -1e-6, 0, 1e-6, 1, 20, 50, 1e3, 1e6], jnp.float32)
    for name, f in implicit.DIVERGENCES.items():
        for alpha in (0.0, 0.5, 1.0, 1.5):
            got = f(u, alpha)
            assert jnp.isfinite(got).all() and got[6] == 0
            assert (jnp.diff(got) >= 0).all() and (jnp.diff(got)[2:7] > 0).all(), name
            slopes = jax.vmap(jax.grad(f), (0, None))(u, alpha)
            assert jnp.isfinite(slopes).all() and slopes[6] == (0.5 if name == "js_divergence" else 1)
    np.testing.assert_array_equal(implicit.alpha_divergence(u, 1.0), u)
    np.testing.assert_array_equal(implicit.alpha_divergence(u, 0.0), implicit.forward_kl(u, 0.5))
    near = u[(u > -30) & (u < 30)]
    np.testing.assert_allclose(implicit.alpha_divergence(near, 1 + 1e-5), near, rtol=1e-3)
    with pytest.raises(ValueError, match="f_divergence is 'kl', expected one of: reverse_kl, forward_kl"):
        value("dpo", LOGP, REF, LENGTH, beta=0.1, f_divergence="kl")


def test_the_log_odds_of_certain_and_of_hopeless_answers():
    mean = np.float32([-50, -20, -5, -0.7, -0.69, -0.1, -1e-3, -1e-5, -2e-6])
    got = reference_free.log_odds(jnp.asarray(mean), jnp.ones(len(mean)))
    np.testing.assert_allclose(got, logit(mean.astype(np.float64)), rtol=1e-6, atol=1e-6)
    top = reference_free.log_odds(jnp.asarray([-1e-7, 0.0]), jnp.ones(2))
    np.testing.assert_allclose(top, logit(-1e-6), rtol=1e-5)

    def odds(logit):  # of a word against one other: of p = σ(logit) they are the logit
        return reference_free.log_odds(jax.nn.log_softmax(jnp.stack([logit, 0.0]))[0], 1)

    for x in (-50.0, -3.0, 0.0, 3.0, 9.0):
        at, slope = jax.value_and_grad(odds)(x)
        assert float(at) == pytest.approx(x, abs=1e-2) and float(slope) == pytest.approx(1, abs=1e-2)
    # Beyond certainty a wrong answer is still pushed down, and by no more than that.
    assert 0.1 < float(jax.grad(odds)(15.0)) < 1


def test_aot_by_hand():
    """Policy margins 3, 1, 2 against reference margins 10, 30, 20: ranks, not pairs, meet; padding has no rank."""
    logp = np.array([[3, 0], [500, -500], [1, 0], [2, 0]], np.float32)
    ref = np.array([[10, 0], [-500, 500], [30, 0], [20, 0]], np.float32)
    valid = np.array([True, False, True, True])
    got = value("aot", logp, ref, np.ones((4, 2)), valid, beta=1.0)
    np.testing.assert_allclose(got, [np.logaddexp(0, 27), 0, np.logaddexp(0, 9), np.logaddexp(0, 18)], rtol=1e-6)
    # c = 3, 1, 2 and r = -10, -30, -20, of rank 3, 1, 2 and 3, 1, 2: then r of rank turned around.
    logp, ref = np.array([[3, -30], [7, 7], [1, -10], [2, -20]], np.float32), np.zeros((4, 2), np.float32)
    got = value("aot_unpaired", logp, ref, np.ones((4, 2)), valid, beta=1.0)
    want = [np.logaddexp(0, -13), 0, np.logaddexp(0, -31), np.logaddexp(0, -22)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


# --- SFT, mixtures, metrics -------------------------------------------------------------------------------------------


def test_sft_pieces():
    nll, tokens, mean = losses.sft(jnp.asarray(LOGP[:, 0]), jnp.asarray(LENGTH[:, 0]))
    np.testing.assert_allclose(nll.sum() / tokens.sum(), 0.622222, atol=1e-6)
    np.testing.assert_allclose(mean, NLL, rtol=1e-6)
    assert losses.sft(jnp.zeros(1), jnp.zeros(1, jnp.int32))[2] == 0


def test_mixture():
    mixed = losses.mixture({"ipo": 1.0, "dpo": 0.5, "kto_pair": 2.0}, sft_weight=0.3)
    assert mixed.coupled and mixed.reference
    assert mixed.keys == ("normalisation", "f_divergence", "f_alpha", "label_smoothing")
    keys = dict(normalisation="mean", label_smoothing=0.1)
    got = value(mixed, LOGP, REF, LENGTH, beta=0.1, **keys)
    expected = (
        witness("ipo", LOGP, REF, LENGTH, beta=0.1, normalisation="mean")
        + 0.5 * witness("dpo", LOGP, REF, LENGTH, beta=0.1, label_smoothing=0.1)
        + 2.0 * witness("kto_pair", LOGP, REF, LENGTH, beta=0.1)
        + 0.3 * NLL
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    reward = mixed.reward(LOGP, REF, LENGTH, beta=0.1, **keys)
    np.testing.assert_allclose(reward, 0.1 * (LOGP - REF) / LENGTH, rtol=1e-5)


def test_recipes_of_mixtures():
    """CPO with its behaviour cloning (per pair; TRL's is per token of the batch), RPO, and MPO's mixture."""
    cpo = value(losses.mixture({"cpo": 1.0}, sft_weight=1.0), LOGP, REF, LENGTH, beta=0.1)
    np.testing.assert_allclose(cpo, GOLDEN["cpo"][2] + NLL, rtol=1e-6)
    per_token = np.mean(cpo - NLL) + 5.6 / 9
    assert per_token == pytest.approx(1.245513497414027, rel=1e-6)
    rpo = value(losses.mixture({"dpo": 1.0}, sft_weight=0.5), LOGP, REF, LENGTH, beta=0.1)
    np.testing.assert_allclose(rpo, GOLDEN["dpo"][2] + 0.5 * NLL, rtol=1e-6)
    mpo = value(losses.mixture({"dpo": 0.8, "bco_pair": 0.2}, sft_weight=1.0), LOGP, REF, LENGTH, beta=0.1)
    assert float(np.mean(mpo - NLL) + 5.6 / 9) == pytest.approx(1.431659, abs=1e-6)


def test_optimism_is_the_term_of_xpo_and_selm():
    """Written anew from TRL's XPOTrainer (until 2026-09) and SELM's own trainer. Theirs have one sample ỹ of the
    reference; with two, the pair, it is the mean of their losses with either for ỹ."""
    arrays = (jnp.asarray(LOGP), jnp.asarray(REF), jnp.asarray(LENGTH))
    got = losses.mixture({"dpo": 1.0}, optimistic=0.02).loss(*arrays, beta=0.1)
    dpo = np.log1p(np.exp(-0.1 * ((LOGP - REF)[:, 0] - (LOGP - REF)[:, 1])))
    xpo = [dpo + 0.02 * LOGP[:, sampled] for sampled in (0, 1)]
    np.testing.assert_allclose(got, np.mean(xpo, axis=0), rtol=1e-6)
    # SELM's α·β·(log π - log π_ref) differs by a constant: the same gradient, with α·β for α.
    slope = lambda of: jax.grad(lambda logp: of(logp).sum())(arrays[0])
    selm = lambda logp: losses.dpo(logp, *arrays[1:], beta=0.1) + 0.2 * 0.1 * (logp - arrays[1]).mean(axis=1)
    mixed = lambda logp: losses.mixture({"dpo": 1.0}, optimistic=0.02).loss(logp, *arrays[1:], beta=0.1)
    np.testing.assert_allclose(slope(mixed), slope(selm), rtol=1e-6)
    plain = slope(lambda logp: losses.dpo(logp, *arrays[1:], beta=0.1))
    np.testing.assert_allclose(slope(mixed) - plain, 0.01, rtol=1e-5)  # down with both, whichever is chosen
    swapped = losses.mixture({"slic_hf": 1.0}, optimistic=1.0)
    assert not swapped.reference and swapped.keys == losses.LOSSES["slic_hf"].keys
    np.testing.assert_allclose(losses.optimism(LOGP), losses.optimism(LOGP[:, ::-1]))


def test_pessimism_in_closed_form():
    """The best policy of r - Γ over responses, at a price of β for a nat, explains the labels by r: its dpo_pessimistic
    is the logistic loss of the rewards themselves, and no other policy has less on labels that follow r."""
    rng = np.random.default_rng(0)
    reference, reward, gamma = rng.dirichlet(np.ones(6)), rng.normal(size=6), rng.exponential(size=6)
    policy = reference * np.exp((reward - gamma) / 0.3)
    policy /= policy.sum()
    one, other = map(np.array, zip(*[(a, b) for a in range(6) for b in range(6) if a != b]))
    pair = lambda value: jnp.float32(np.stack([value[one], value[other]], axis=1))
    length = jnp.ones((30, 2))
    loss = lambda p: losses.dpo_pessimistic(pair(np.log(p)), pair(np.log(reference)), length, pair(gamma), beta=0.3)
    np.testing.assert_allclose(loss(policy), np.log1p(np.exp(reward[other] - reward[one])), rtol=2e-4)
    prefers = 1 / (1 + np.exp(reward[other] - reward[one]))
    best = float(np.sum(prefers * loss(policy)))
    for _ in range(20):
        tried = policy * np.exp(0.3 * rng.normal(size=6))
        assert np.sum(prefers * loss(tried / tried.sum())) > best


def test_mixture_of_one_is_the_loss():
    for name, plain in PAIRED.items():
        mixed = losses.mixture({name: 1.0})
        assert (mixed.reference, mixed.coupled, mixed.keys) == (plain.reference, plain.coupled, plain.keys)
        np.testing.assert_array_equal(
            value(mixed, LOGP, REF, LENGTH, **CASES[name]), value(name, LOGP, REF, LENGTH, **CASES[name])
        )


def test_mixture_refuses():
    with pytest.raises(ValueError, match="got the unknown loss 'ppo', expected names from: dpo, robust_dpo, exo_pair"):
        losses.mixture({"dpo": 1.0, "ppo": 1.0})
    with pytest.raises(ValueError, match="got no loss"):
        losses.mixture({})
    with pytest.raises(TypeError, match="loss dpo: got the unknown key 'gamma'"):
        value(losses.mixture({"dpo": 1.0}), LOGP, REF, LENGTH, beta=0.1, gamma=0.5)


def test_metrics_are_sums_that_microbatches_add():
    reward = losses.LOSSES["dpo"].reward(LOGP, REF, LENGTH, beta=0.1)
    ones = np.ones(3, np.float32)
    whole = losses.metrics(LOGP, reward, ones)
    expected = {
        "rewards/chosen": 0.003333,
        "rewards/rejected": -0.043333,
        "rewards/margins": 0.046667,
        "rewards/accuracies": 0.666667,
        "logps/chosen": -1.866667,
        "logps/rejected": -3.383333,
    }
    assert {k: float(v) / 3 for k, v in whole.items()} == pytest.approx(expected, abs=1e-6)
    padded = np.concatenate([LOGP[1:], np.full((1, 2), np.nan, np.float32)])
    parts = [
        losses.metrics(LOGP[:1], reward[:1], ones[:1]),
        losses.metrics(padded, np.concatenate([reward[1:], padded[2:]]), np.array([1, 1, 0], np.float32)),
    ]
    for key, total in whole.items():
        assert float(parts[0][key] + parts[1][key]) == pytest.approx(float(total)), key


def test_accuracy_is_strict_and_weights_weigh():
    reward = np.array([[1, 1], [2, 1], [1, 2]], np.float32)
    sums = losses.metrics(reward, reward, np.array([1, 2.5, 1], np.float32))
    assert float(sums["rewards/accuracies"]) == 2.5
    assert float(sums["rewards/margins"]) == 2.5 * 1 - 1


# --- one place per fact -----------------------------------------------------------------------------------------------


def test_config_names_and_keys_are_the_tables():
    assert typing.get_args(config.LossName) == tuple(losses.LOSSES)
    assert set(typing.get_args(config.DivergenceName)) == set(losses.DIVERGENCES)
    assert [config.UNCERTAIN_LOSS] == [name for name, loss in losses.LOSSES.items() if loss.target == "bonus"]
    assert set(config.REFERENCE_FREE) == {name for name, loss in losses.LOSSES.items() if not loss.reference}
    of_losses = lambda key: {name for name, loss in losses.LOSSES.items() if key in loss.keys}
    owners = {key: of_losses(key) for key, _ in config.ranges.LOSS_KEYS}
    assert owners == {key: set(names) for key, names in config.ranges.LOSS_KEYS}
    assert {key for loss in losses.LOSSES.values() for key in loss.keys} == set(owners)
    assert set(owners) <= set(config.LossConfig.__dataclass_fields__)


@pytest.mark.parametrize("name", PAIRED)
def test_what_a_config_says_reaches_its_loss(name):
    """As the doors do it, with defaults where a loss has them."""
    needed = {"exo_pair": dict(label_smoothing=1e-3), "simpo": dict(gamma=0.5), "alphapo": dict(gamma_beta_ratio=0.5)}
    given = config.LossConfig(name=name, sft_weight=0.1, **needed.get(name, {}))
    if name != config.UNCERTAIN_LOSS:
        config.check(config.ReviewConfig("a", "b", config.DataConfig(("p.jsonl",)), "o", loss=given), "x.yaml")
    loss = losses.mixture({given.name: 1.0, **given.mix}, given.sft_weight)
    keys = {"beta": given.beta, **{key: getattr(given, key) for key in loss.keys}}
    assert np.isfinite(value(loss, LOGP, REF, LENGTH, **keys)).all()
    assert np.isfinite(loss.reward(LOGP, REF, LENGTH, **keys)).all()


def test_readme_has_the_table():
    """| `name` | equation | needs | keys | TRL |, row by row."""
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = text[text.index("### Losses") :]
    table = table[: table.index("`loss.sft_weight`")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    told = {row[0].strip("`"): row[2:4] for row in rows[1:]}
    assert list(told) == list(losses.LOSSES)
    for name, loss in losses.LOSSES.items():
        needs, keys = told[name]
        words = ("reference", "batch", "labels", "wins", "probabilities", "rewards", "Γ")
        told_needs = tuple(word in needs for word in words)
        is_told = tuple(loss.target == kind for kind in ("label", "win", "preference", "reward", "bonus"))
        assert told_needs == (loss.reference, loss.coupled, *is_told), name
        assert re.findall(r"`(\w+)`", keys) == [key for key in loss.keys if key != "f_alpha"], name


# --- unpaired: labelled single responses ------------------------------------------------------------------------------


def draw_unpaired(seed, examples=9):
    """logp, ref [P, 2] of (response, mismatch), length, label; the mismatches' mean log-ratio is above 0."""
    logp, ref, length = draw(seed, examples)
    logp[:, 1] += 2
    label = np.random.default_rng(seed).choice([-1.0, 1.0], examples).astype(np.float32)
    label[:2] = 1, -1
    return logp, ref, length, label


def kto(logp, ref, length, label, valid=None, name="kto", **keys):
    valid = jnp.ones(len(logp), bool) if valid is None else jnp.asarray(valid)
    arrays = (jnp.asarray(a) for a in (logp, ref, length))
    return losses.LOSSES[name].loss(*arrays, valid, jnp.asarray(label), **keys)


def unpaired_witness(logp, ref, label, beta, desirable_weight=1.0, undesirable_weight=1.0, z=None):
    """λ_y - v(x, y) of the paper, in float64; z = None: max(0, mean of the mismatches' log-ratios)."""
    u, mismatch = (np.asarray(logp, np.float64) - ref).T
    z = max(mismatch.mean(), 0) if z is None else z
    weight = np.where(label > 0, desirable_weight, undesirable_weight)
    return weight - weight * np.where(label > 0, sigmoid(beta * (u - z)), sigmoid(beta * (z - u)))


@pytest.mark.parametrize("seed", range(3))
def test_kto_equals_float64_and_its_reference_point_is_detached(seed):
    logp, ref, length, label = draw_unpaired(seed)
    keys = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    assert (logp - ref)[:, 1].mean() > 0
    got = kto(logp, ref, length, label, **keys)
    np.testing.assert_allclose(got, unpaired_witness(logp, ref, label, **keys), rtol=2e-5)
    gradient = jax.grad(lambda x: kto(x, ref, length, label, **keys).sum())(jnp.asarray(logp))
    assert not np.asarray(gradient)[:, 1].any()
    z, step, moved = (logp - ref)[:, 1].astype(np.float64).mean(), 1e-5, logp.astype(np.float64)
    up, down = (unpaired_witness(moved + [s, 0], ref, label, **keys, z=z) for s in (step, -step))
    np.testing.assert_allclose(gradient[:, 0], (up - down) / (2 * step), rtol=1e-4, atol=1e-6)
    # What is desirable rises, the other falls.
    assert (np.sign(gradient[:, 0]) == -label).all()


def test_kto_reference_point_is_no_less_than_zero_and_is_the_batch_s():
    logp, ref, length, label = draw_unpaired(0)
    low = logp - np.array([0, 30], np.float32)
    np.testing.assert_allclose(
        kto(low, ref, length, label, beta=0.3), unpaired_witness(logp, ref, label, 0.3, z=0), rtol=2e-5
    )
    other = logp.copy()
    other[3, 1] += 9
    assert (kto(other, ref, length, label, beta=0.3) != kto(logp, ref, length, label, beta=0.3)).all()
    np.testing.assert_allclose(kto(ref, ref, length, label, beta=0.3), 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_apo_zero_unpaired_equals_float64_and_reads_no_mismatch(seed):
    """APO-zero's two terms, apart: 1 - σ(βc) of what is desirable, σ(βr) of what is not; KTO with z₀ = 0."""
    logp, ref, length, label = draw_unpaired(seed)
    keys = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    u = (logp - ref)[:, 0].astype(np.float64)
    want = np.where(label > 0, 1.5 * (1 - sigmoid(0.3 * u)), 0.7 * sigmoid(0.3 * u))
    got = kto(logp, ref, length, label, name="apo_zero_unpaired", **keys)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    np.testing.assert_allclose(got, unpaired_witness(logp, ref, label, **keys, z=0), rtol=2e-5)
    other = logp + np.array([0, 1e6], np.float32)
    np.testing.assert_array_equal(kto(other, ref, length, label, name="apo_zero_unpaired", **keys), got)
    one = kto(logp[3:4], ref[3:4], length[3:4], label[3:4], name="apo_zero_unpaired", **keys)
    np.testing.assert_allclose(one, got[3:4], rtol=1e-6)  # each on its own
    total = lambda x: kto(x, ref, length, label, name="apo_zero_unpaired", **keys).sum()
    gradient = np.asarray(jax.grad(total)(jnp.asarray(logp)))
    slope = 0.3 * sigmoid(0.3 * u) * (1 - sigmoid(0.3 * u)) * np.where(label > 0, -1.5, 0.7)
    np.testing.assert_allclose(gradient[:, 0], slope, rtol=1e-4)
    assert not gradient[:, 1].any() and not losses.LOSSES["apo_zero_unpaired"].mismatch
    pairs = draw(seed, 5)  # of a desirable and an undesirable response together it is apo_zero
    both = [kto(*(x[:, ::way] for x in pairs), np.full(5, way), name="apo_zero_unpaired", beta=0.3) for way in (1, -1)]
    np.testing.assert_allclose(both[0] + both[1], losses.apo_zero(*pairs, beta=0.3), rtol=2e-5)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_padding_changes_nothing(name):
    logp, ref, length, label = draw_unpaired(1)
    valid = np.array([True] * 9 + [False] * 2)
    pad = lambda x, fill: np.concatenate([x, np.full((2, *x.shape[1:]), fill, x.dtype)])
    whole = kto(logp, ref, length, label, beta=0.3, name=name)
    for fill in (0.0, -80.0):
        total = lambda x, fill=fill: kto(
            x, pad(ref, 0), pad(length, 0), pad(label, 0), valid, beta=0.3, name=name
        ).sum()
        got, gradient = jax.value_and_grad(total)(jnp.asarray(pad(logp, fill)))
        np.testing.assert_allclose(got, whole.sum(), rtol=1e-6)
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[9:].any()
    nothing = kto(
        np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2)), np.zeros(2), np.zeros(2, bool), beta=0.3, name=name
    )
    assert not np.asarray(nothing).any()


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_far_out_and_in_any_order(name):
    logp, ref, length, label = draw_unpaired(4)
    order = np.random.default_rng(0).permutation(9)
    got = kto(*(x[order] for x in (logp, ref, length, label)), beta=0.3, name=name)
    np.testing.assert_allclose(got, kto(logp, ref, length, label, beta=0.3, name=name)[order], rtol=1e-5)
    for nats in (50.0, 1e3, 1e6):
        corners = np.float32([[1, -1], [-1, 1], [1, 1], [-1, -1]] * 2) * nats
        signs = np.float32([1, -1, -1, 1, -1, 1, 1, -1])
        far = lambda x, signs=signs: kto(x, np.zeros((8, 2)), np.ones((8, 2)), signs, beta=0.3, name=name).sum()
        assert all(np.isfinite(a).all() for a in jax.value_and_grad(far)(jnp.asarray(corners)))


def test_unpaired_metrics_are_means_of_their_own_side():
    logp, ref, length, label = draw_unpaired(2)
    weight = np.linspace(0.5, 2, 9).astype(np.float32)
    weight[4] = 0  # padding: not read
    logp[4], ref[4] = np.nan, 0
    reward = losses.LOSSES["kto"].reward(logp, ref, length, beta=0.3)
    got = losses.unpaired_metrics(logp, ref, reward, weight, label, mismatch=True)
    side = {"chosen": (label > 0) & (weight > 0), "rejected": (label < 0) & (weight > 0)}
    mean = lambda value, name: np.average(value[side[name], 0].astype(np.float64), weights=weight[side[name]])
    want = {f"logps/{name}": mean(logp, name) for name in side}
    want |= {f"rewards/{name}": mean(0.3 * (logp - ref), name) for name in side}
    want["rewards/margins"] = want["rewards/chosen"] - want["rewards/rejected"]
    want["kl"] = np.delete(logp - ref, 4, axis=0)[:, 1].astype(np.float64).mean()
    assert {name: float(value) / weight.sum() for name, value in got.items()} == pytest.approx(want, rel=1e-5)
    without = losses.unpaired_metrics(logp, ref, reward, weight, label, mismatch=False)
    assert without == {name: value for name, value in got.items() if name != "kl"}
    got = losses.unpaired_metrics(logp, ref, reward, weight, np.ones(9, np.float32), mismatch=False)
    assert np.isnan(got["rewards/rejected"]) and np.isnan(got["rewards/margins"]) and np.isfinite(got["rewards/chosen"])


def test_a_mixture_is_of_pairs_or_of_single_responses():
    alone = losses.mixture({"kto": 2.0})
    assert alone.unpaired and alone.coupled and alone.keys == ("desirable_weight", "undesirable_weight")
    logp, ref, length, label = draw_unpaired(3)
    got = alone.loss(logp, ref, length, np.ones(9, bool), label, beta=0.3, desirable_weight=1.5)
    want = unpaired_witness(logp, ref, label, 0.3, desirable_weight=1.5)
    np.testing.assert_allclose(got, 2 * want, rtol=2e-5)
    assert not losses.mixture({"kto_pair": 1.0}).unpaired
    assert alone.mismatch and not losses.mixture({"apo_zero_unpaired": 1.0}).mismatch
    for weights, *terms in (({"kto": 1.0, "dpo": 0.5}, 0.0), ({"kto": 1.0}, 0.1), ({"kto": 1.0}, 0.0, 0.1)):
        with pytest.raises(ValueError, match="expected 'kto' alone: it learns from single responses"):
            losses.mixture(weights, *terms)
    assert all(loss.coupled for loss in losses.LOSSES.values() if loss.unpaired)
    assert tuple(config.UNPAIRED_LOSSES) == tuple(name for name, loss in losses.LOSSES.items() if loss.unpaired)


# --- golden values of weighted tokens ---------------------------------------------------------------------------------

# (a, b) of the token log-probs -(a + b·i) whose sums are LOGP and REF above: policy and reference, chosen and rejected.
TOKENS = {
    "policy": [[(0.5, 0.10), (0.9, 0.15)], [(1.0, 0.25), (0.4, 0.05)], [(0.2, 0.05), (1.2, 0.30)]],
    "reference": [[(0.6, 0.05), (0.7, 0.10)], [(0.8, 0.20), (0.5, 0.02)], [(0.3, 0.10), (1.0, 0.25)]],
}


def weighted_sums(who: str, tail: float) -> np.ndarray:
    """[3, 2]: Σ over the first min(L_w, L_l) tokens + tail·Σ over the others."""
    out = np.zeros((3, 2), np.float32)
    for p, c in np.ndindex(3, 2):
        a, b = TOKENS[who][p][c]
        weight = np.where(np.arange(LENGTH[p, c]) < LENGTH[p].min(), 1, tail)
        out[p, c] = -(weight * (a + b * np.arange(LENGTH[p, c]))).sum()
    return out


@pytest.mark.parametrize("alpha, expected", [(1.0, 0.670891), (0.5, 0.670234), (0.0, 0.669578)])
def test_golden_ld_dpo(alpha, expected):
    """TRL 1.16's value: policy and reference are weighted alike."""
    logp, ref = (weighted_sums(who, alpha) for who in ("policy", "reference"))
    np.testing.assert_allclose(value("dpo", logp, ref, LENGTH, beta=0.1).mean(), expected, atol=1e-6)


def test_sppo_of_wins_and_losses_is_sppo_hard():
    loss = lambda win: losses.sppo(jnp.asarray(LOGP), jnp.asarray(REF), LENGTH, jnp.asarray(win), beta=0.1)
    np.testing.assert_allclose(loss(np.array([[1.0, 0.0]] * 3)), GOLDEN["sppo_hard"][2], rtol=2e-6)
    assert (np.abs(np.asarray(loss(np.array([[0.7, 0.4]] * 3))) - GOLDEN["sppo_hard"][2]) > 1).all()


def test_golden_values_of_losses_that_are_told_more():
    """Means of an independent transcription: SPPO (which has half of ours) of P = (.8, .3); NeMo's of gaps 1, .5, 2."""
    win, reward = np.array([[0.8, 0.3]] * 3), np.array([[1.0, 0.0], [0.0, -0.5], [3.0, 1.0]])
    arrays = jnp.asarray(LOGP), jnp.asarray(REF), LENGTH
    mean = lambda loss, told: float(losses.LOSSES[loss].loss(*arrays, jnp.asarray(told), beta=0.1).mean())
    np.testing.assert_allclose(mean("sppo", win) / 2, 5.796667, rtol=1e-6)
    np.testing.assert_allclose(mean("rpo_bwd_kl", reward), 0.138304, rtol=1e-5)
    np.testing.assert_allclose(mean("rpo_fwd_kl", reward), 0.171670, rtol=1e-5)
    np.testing.assert_allclose(mean("rpo_sq", reward), 1.563617, rtol=1e-6)


def test_soft_ipo_is_the_mean_of_ipo_over_drawn_labels():
    """In its gradient; of a certain label it is IPO itself, and which response is called chosen is of no matter."""
    probability = np.array([0.9, 0.5, 0.2])
    told = jnp.asarray(np.stack([probability, 1 - probability], 1))
    swap = lambda x: jnp.asarray(np.asarray(x)[:, ::-1])
    ipo = lambda logp, ref, n: losses.ipo(logp, ref, n, beta=0.1, normalisation="sum")

    def drawn(logp):
        turned = ipo(logp[:, ::-1], swap(REF), swap(LENGTH))
        return jnp.sum(probability * ipo(logp, jnp.asarray(REF), LENGTH) + (1 - probability) * turned)

    soft = lambda logp: jnp.sum(losses.ipo_soft(logp, jnp.asarray(REF), LENGTH, told, beta=0.1))
    np.testing.assert_allclose(jax.grad(soft)(jnp.asarray(LOGP)), jax.grad(drawn)(jnp.asarray(LOGP)), rtol=1e-4)
    certain = losses.ipo_soft(LOGP, REF, LENGTH, np.array([[1.0, 0.0]] * 3), beta=0.1)
    np.testing.assert_allclose(certain, GOLDEN["ipo sum"][2], rtol=1e-6)
    turned = losses.ipo_soft(swap(LOGP), swap(REF), swap(LENGTH), swap(told), beta=0.1)
    np.testing.assert_allclose(turned, losses.ipo_soft(LOGP, REF, LENGTH, told, beta=0.1), rtol=1e-6)


def test_a_mixture_tells_each_member_what_it_asks_for():
    """And no two different things."""
    arrays, win = (jnp.asarray(LOGP), jnp.asarray(REF), jnp.asarray(LENGTH)), jnp.asarray(TARGET[:3])
    mixed = losses.mixture({"dpo": 1.0, "sppo": 0.25, "kto_pair": 0.5})
    assert mixed.target == "win" and mixed.coupled and not mixed.unpaired
    valid = jnp.ones(3, bool)
    want = losses.dpo(*arrays, beta=0.1) + 0.25 * losses.sppo(*arrays, win, beta=0.1)
    want += 0.5 * losses.kto_pair(*arrays, valid, beta=0.1)
    np.testing.assert_allclose(mixed.loss(*arrays, valid, win, beta=0.1), want, rtol=1e-6)
    other = dataclasses.replace(losses.LOSSES["sppo"], target="reward")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"told different things .*win, reward"):
        patch.setitem(losses.LOSSES, "other", other)
        losses.mixture({"sppo": 1.0, "other": 1.0})


def test_golden_wpo():
    """TRL 1.16's value, with log Σ p² = -0.7 at every token, before anything is cut at 1: no product gets there."""
    alignment = LOGP + 0.7 * LENGTH
    weight = losses.wpo(alignment, LENGTH)
    uncut = np.exp((alignment / LENGTH).sum(1))
    np.testing.assert_allclose(weight, np.minimum(uncut, 1), rtol=1e-6)
    np.testing.assert_allclose((uncut * value("dpo", LOGP, REF, LENGTH, beta=0.1)).mean(), 0.503327, atol=1e-6)


def test_wpo_is_cut_at_one_detached_and_finite_on_padding():
    alignment = np.array([[6.0, -1.0], [-2.0, -1.0], [0.0, 0.0]], np.float32)
    length = np.array([[3, 1], [4, 2], [0, 0]])
    np.testing.assert_allclose(losses.wpo(alignment, length), [1, np.exp(-1), 1], rtol=1e-6)
    gradient = jax.grad(lambda x: losses.wpo(x, length).sum())(jnp.asarray(alignment))
    assert not np.asarray(gradient).any()


# --- a reward model ---------------------------------------------------------------------------------------------------

REWARD = np.array([[0.7, -0.4], [-1.3, 0.2], [2.5, 2.5], [-30.0, 40.0], [40.0, -30.0]])
SCORES = np.array([[4.0, 1.0], [3.0, 2.5], [2.0, 2.0], [5.0, 4.0], [1.0, 0.0]])
REWARD_TOKENS = np.array([[5, 9], [7, 7], [3, 1], [2, 8], [4, 4]])
BRADLEY_TERRY = [
    {},
    {"margin": 0.3},
    {"center": 0.01},
    {"length_alpha": 0.05},
    {"margin": 0.2, "center": 0.02, "length_alpha": 0.1},
]


def bradley_terry_64(reward_P2, margin=0.0, center=0.0, length_alpha=0.0) -> tuple[np.ndarray, np.ndarray]:
    """Loss [P] and its gradient by the rewards [P, 2], in float64."""
    w, l = np.asarray(reward_P2, np.float64).T
    z = w - l + length_alpha * (REWARD_TOKENS[:, 0] - REWARD_TOKENS[:, 1]) - margin * (SCORES[:, 0] - SCORES[:, 1])
    by_z, by_sum = -1 / (1 + np.exp(z)), 2 * center * (w + l)
    return np.logaddexp(0, -z) + center * (w + l) ** 2, np.stack((by_z + by_sum, -by_z + by_sum), axis=1)


@pytest.mark.parametrize("keys", BRADLEY_TERRY, ids=lambda keys: "+".join(keys) or "plain")
def test_bradley_terry_and_its_gradient_equal_float64(keys):
    arrays = (jnp.asarray(REWARD_TOKENS, jnp.float32), jnp.asarray(SCORES, jnp.float32))
    loss = lambda reward_P2: losses.bradley_terry(reward_P2, *arrays, **keys)
    reward_P2 = jnp.asarray(REWARD, jnp.float32)
    want, gradient = bradley_terry_64(REWARD, **keys)
    np.testing.assert_allclose(loss(reward_P2), want, rtol=2e-6, atol=1e-7)
    got = jax.grad(lambda r: loss(r).sum())(reward_P2)
    np.testing.assert_allclose(got, gradient, rtol=2e-6, atol=1e-7)
    assert loss(reward_P2).dtype == jnp.float32


def test_bradley_terry_of_two_numbers_by_hand():
    """TRL's RewardTrainer: -log σ(1.5 - 0.5 - 0.25) + 0.01·(1.5 + 0.5)²."""
    got = losses.bradley_terry(
        jnp.array([[1.5, 0.5]]), jnp.zeros((1, 2)), jnp.array([[0.5, 0.0]]), margin=0.5, center=0.01
    )
    np.testing.assert_allclose(got, [np.log1p(np.exp(-0.75)) + 0.04], rtol=1e-6)


def test_what_length_explains_teaches_the_reward_less():
    """Of two pairs that the rewards see alike, the one whose longer response won has the smaller gradient."""
    one = lambda length: jax.grad(lambda r: losses.bradley_terry(r, jnp.array([length]), None, length_alpha=0.1).sum())(
        jnp.zeros((1, 2))
    )
    longer, shorter = -one([9.0, 2.0])[0, 0], -one([2.0, 9.0])[0, 0]
    assert 0 < longer < 0.5 < shorter
