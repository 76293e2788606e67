"""The losses against golden numbers, a float64 NumPy transcription, and what must hold of any of them."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import config, losses

# Three pairs whose token log-probs are -(a + b·i): the sums of (chosen, rejected). The expected values below were
# computed by TRL 1.16's own loss code where it has the loss, and by an independent float64 NumPy transcription.
LOGP = np.array([[-2.60, -3.15], [-2.25, -2.50], [-0.75, -4.50]], np.float32)
REF = np.array([[-2.70, -2.40], [-1.80, -2.70], [-1.20, -3.75]], np.float32)
LENGTH = np.array([[4, 3], [2, 5], [3, 3]], np.int32)
GOLDEN = {
    "dpo": ("dpo", dict(beta=0.1), [0.65155003, 0.72617521, 0.6349461]),
    "dpo β=.5": ("dpo", dict(beta=0.5), [0.5030574, 0.8687926, 0.43748795]),
    "cdpo": ("dpo", dict(beta=0.1, label_smoothing=0.1), [0.66005003, 0.71967521, 0.6469461]),
    "ipo mean": ("ipo", dict(beta=0.1, normalisation="mean"), [22.325625, 27.720225, 21.16]),
    "ipo sum": ("ipo", dict(beta=0.1, normalisation="sum"), [17.2225, 31.9225, 14.44]),
    "slic": ("slic", dict(beta=0.1), [0.915, 1.065, 0.88]),
    "kto_pair": (
        "kto_pair",
        dict(beta=0.1),
        [(0.49750002 + 0.48042667) / 2, (0.5112481 + 0.50416657) / 2, (0.4887519 + 0.48042667) / 2],
    ),
    "simpo γ=.5": ("simpo", dict(beta=2.0, gamma=0.5), [0.55435524, 1.91022415, 0.12692801]),
    "simpo γ/β=.55": ("simpo", dict(beta=2.5, gamma=2.5 * 0.55), [0.89812326, 2.98914139, 0.16022415]),
}
PARAMETERS = {
    "dpo": dict(beta=0.1, label_smoothing=0.1),
    "ipo": dict(beta=0.1, normalisation="mean"),
    "slic": dict(beta=0.1),
    "kto_pair": dict(beta=0.1),
    "simpo": dict(beta=2.0, gamma=0.5),
}


def value(name, logp, ref, length, valid=None, **parameters):
    loss = losses.LOSSES[name] if isinstance(name, str) else name
    valid = (jnp.ones(len(logp), bool) if valid is None else jnp.asarray(valid),) if loss.coupled else ()
    return loss.loss(jnp.asarray(logp), jnp.asarray(ref), jnp.asarray(length), *valid, **parameters)


def draw(seed, pairs=7, spread=3.0):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 40, (pairs, 2)).astype(np.int32)
    ref = (-rng.gamma(2.0, 1.0, (pairs, 2)) * length).astype(np.float32)
    return (ref + spread * rng.normal(size=(pairs, 2))).astype(np.float32), ref, length


def log_sigmoid(x):
    return np.where(x < 0, x, 0) - np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def witness(name, logp, ref, length, beta, label_smoothing=0.0, normalisation=None, gamma=None):
    """The equations again, in float64, written from the papers."""
    logp, ref, length = (np.asarray(x, np.float64) for x in (logp, ref, length))
    c, r = (logp - ref).T
    if name == "dpo":
        return -(1 - label_smoothing) * log_sigmoid(beta * (c - r)) - label_smoothing * log_sigmoid(beta * (r - c))
    if name == "ipo":
        c, r = (c / length[:, 0], r / length[:, 1]) if normalisation == "mean" else (c, r)
        return (c - r - 0.5 / beta) ** 2
    if name == "slic":
        return np.clip(1 - beta * (c - r), 0, None)
    if name == "kto_pair":
        kl_w, kl_l = max(c.mean(), 0), max(r.mean(), 0)
        return (1 - sigmoid(beta * (c - kl_l)) + 1 - sigmoid(beta * (kl_w - r))) / 2
    if name == "simpo":
        return -log_sigmoid(beta * (logp[:, 0] / length[:, 0] - logp[:, 1] / length[:, 1] - gamma / beta))
    raise AssertionError(name)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case):
    name, parameters, expected = GOLDEN[case]
    got = value(name, LOGP, REF, LENGTH, **parameters)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_float64_transcription(name, seed):
    logp, ref, length = draw(seed)
    got = value(name, logp, ref, length, **PARAMETERS[name])
    np.testing.assert_allclose(got, witness(name, logp, ref, length, **PARAMETERS[name]), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_equals_finite_differences_in_float64(name, seed):
    logp, ref, length = draw(seed, pairs=4)
    gradient = jax.grad(lambda x: value(name, x, ref, length, **PARAMETERS[name]).sum())(jnp.asarray(logp))
    expected, step = np.zeros(logp.shape), 1e-5
    for index in np.ndindex(*logp.shape):
        moved = np.asarray(logp, np.float64).copy()
        moved[index] += step
        up = witness(name, moved, ref, length, **PARAMETERS[name]).sum()
        moved[index] -= 2 * step
        expected[index] = (up - witness(name, moved, ref, length, **PARAMETERS[name]).sum()) / (2 * step)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, parameters, expected",
    [
        ("dpo", dict(beta=0.1), np.log(2)),
        ("dpo", dict(beta=0.1, label_smoothing=0.2), np.log(2)),
        ("ipo", dict(beta=0.1, normalisation="sum"), 25.0),
        ("ipo", dict(beta=0.1, normalisation="mean"), 25.0),
        ("slic", dict(beta=0.1), 1.0),
        ("kto_pair", dict(beta=0.1), 0.5),
    ],
)
def test_policy_that_equals_its_reference(name, parameters, expected):
    _, ref, length = draw(0)
    np.testing.assert_allclose(value(name, ref, ref, length, **parameters), expected, rtol=1e-6)
    assert not np.asarray(losses.LOSSES[name].reward(ref, ref, length, **parameters)).any()
    # Every pair is pushed apart from the start, the one that stands on the kink of kto_pair's KL included.
    gradient = jax.grad(lambda x: value(name, x, ref, length, **parameters).sum())(jnp.asarray(ref))
    assert (gradient[:, 0] < 0).all() and (gradient[:, 1] > 0).all()


def test_kto_pair_gradient_at_the_kink_passes_through_the_kl():
    # β/4 · ½ a term; KL_w and KL_l collect one of each pair, spread over the batch by their means: twice as much.
    _, ref, length = draw(0)
    gradient = jax.grad(lambda x: value("kto_pair", x, ref, length, beta=0.1).sum())(jnp.asarray(ref))
    np.testing.assert_allclose(gradient, np.broadcast_to([-0.025, 0.025], ref.shape), rtol=1e-6)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("nats", [50.0, 1e3, 1e6])
def test_gradients_stay_finite_far_out(name, nats):
    ref = jnp.full((2, 2), -100.0)
    logp = ref + jnp.asarray([[nats, -nats], [-nats, nats]])
    length = jnp.full((2, 2), 3)
    loss, gradient = jax.value_and_grad(lambda x: value(name, x, ref, length, **PARAMETERS[name]).sum())(logp)
    assert jnp.isfinite(loss) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", PARAMETERS)
def test_jit_is_no_jit(name):
    logp, ref, length = draw(1)
    jitted = jax.jit(lambda *arrays: value(name, *arrays, **PARAMETERS[name]))
    np.testing.assert_allclose(jitted(logp, ref, length), value(name, logp, ref, length, **PARAMETERS[name]), rtol=1e-6)


def test_swapped_pairs():
    logp, ref, length = draw(2)
    swapped = logp[:, ::-1], ref[:, ::-1], length[:, ::-1]
    for name, parameters in PARAMETERS.items():
        reward = losses.LOSSES[name].reward
        forward, backward = reward(logp, ref, length, **parameters), reward(*swapped, **parameters)
        np.testing.assert_array_equal(forward, np.asarray(backward)[:, ::-1])
    margin = 0.1 * np.diff((logp - ref).astype(np.float64))[:, 0] * -1
    one, other = (value("dpo", *arrays, beta=0.1) for arrays in ((logp, ref, length), swapped))
    np.testing.assert_allclose(other - one, margin, rtol=1e-4, atol=1e-5)  # log σ(z) - log σ(-z) = z
    smoothed = [value("dpo", *arrays, beta=0.1, label_smoothing=0.5) for arrays in ((logp, ref, length), swapped)]
    np.testing.assert_allclose(*smoothed, rtol=1e-6)
    one, other = (value("ipo", *arrays, beta=0.1, normalisation="sum") for arrays in ((logp, ref, length), swapped))
    np.testing.assert_allclose(other - one, 4 * margin / 0.1 * 0.5 / 0.1, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", PARAMETERS)
def test_padding_pairs_change_nothing(name):
    logp, ref, length = draw(3)
    pad = lambda x, fill: np.concatenate([x[:3], np.full((2, 2), fill, x.dtype), x[3:]])
    valid = np.array([True] * 3 + [False] * 2 + [True] * 4)
    fills = [(0.0, 0.0)] if name != "kto_pair" else [(0.0, 0.0), (-80.0, 3.0)]

    def total(x, ref, length, valid):
        return (value(name, x, ref, length, valid, **PARAMETERS[name]) * valid).sum()

    expected, wanted = jax.value_and_grad(total)(jnp.asarray(logp), ref, length, np.ones(7, bool))
    for a, b in fills:
        padded = jnp.asarray(pad(logp, a)), pad(ref, b), pad(length, 0), valid
        got, gradient = jax.value_and_grad(total)(*padded)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(gradient)[valid], wanted, rtol=1e-6)
        assert not np.asarray(gradient)[~valid].any()


@pytest.mark.parametrize("name", PARAMETERS)
def test_all_padding_is_finite(name):
    zeros, length = jnp.zeros((2, 2)), jnp.zeros((2, 2), jnp.int32)
    run = lambda x: value(name, x, zeros, length, np.zeros(2, bool), **PARAMETERS[name]).sum()
    assert all(np.isfinite(x).all() for x in jax.value_and_grad(run)(zeros))


def test_rewards_are_their_own():
    logp, ref, length = (x.astype(np.float64) for x in draw(4))
    table = losses.LOSSES
    for name in ("dpo", "slic", "kto_pair"):
        np.testing.assert_allclose(table[name].reward(logp, ref, length, beta=0.1), 0.1 * (logp - ref))
    total = table["ipo"].reward(logp, ref, length, beta=0.1, normalisation="sum")
    np.testing.assert_allclose(total, 0.1 * (logp - ref))
    mean = table["ipo"].reward(logp, ref, length, beta=0.1, normalisation="mean")
    np.testing.assert_allclose(mean, 0.1 * (logp - ref) / length, rtol=1e-6)
    np.testing.assert_allclose(table["simpo"].reward(logp, None, length, beta=2.0), 2 * logp / length, rtol=1e-6)
    one = table["simpo"].reward(jnp.float32(-6.0), None, 3, beta=2.0)  # any shape
    assert one.shape == () and one == -4


def test_ipo_must_be_told_its_normalisation():
    with pytest.raises(TypeError, match="normalisation"):
        value("ipo", LOGP, REF, LENGTH, beta=0.1)
    with pytest.raises(ValueError, match="normalisation is 'token', expected 'sum' .* or 'mean'"):
        value("ipo", LOGP, REF, LENGTH, beta=0.1, normalisation="token")


def test_sft_pieces():
    nll, tokens, mean = losses.sft(jnp.asarray(LOGP[:, 0]), jnp.asarray(LENGTH[:, 0]))
    np.testing.assert_allclose(nll.sum() / tokens.sum(), 0.622222, atol=1e-6)
    np.testing.assert_allclose(mean, [2.60 / 4, 2.25 / 2, 0.75 / 3], rtol=1e-6)
    assert losses.sft(jnp.zeros(1), jnp.zeros(1, jnp.int32))[2] == 0


def test_mixture():
    mixed = losses.mixture({"ipo": 1.0, "dpo": 0.5, "kto_pair": 2.0}, sft_weight=0.3)
    assert mixed.coupled and mixed.reference and mixed.keys == ("normalisation", "label_smoothing")
    keys = dict(normalisation="mean", label_smoothing=0.1)
    got = value(mixed, LOGP, REF, LENGTH, beta=0.1, **keys)
    expected = (
        witness("ipo", LOGP, REF, LENGTH, beta=0.1, normalisation="mean")
        + 0.5 * witness("dpo", LOGP, REF, LENGTH, beta=0.1, label_smoothing=0.1)
        + 2.0 * witness("kto_pair", LOGP, REF, LENGTH, beta=0.1)
        - 0.3 * LOGP[:, 0].astype(np.float64) / LENGTH[:, 0]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    reward = mixed.reward(LOGP, REF, LENGTH, beta=0.1, **keys)
    np.testing.assert_allclose(reward, 0.1 * (LOGP - REF) / LENGTH, rtol=1e-5)


def test_mixture_of_one_is_the_loss():
    for name, parameters in PARAMETERS.items():
        mixed, plain = losses.mixture({name: 1.0}), losses.LOSSES[name]
        assert (mixed.reference, mixed.coupled, mixed.keys) == (plain.reference, plain.coupled, plain.keys)
        np.testing.assert_array_equal(
            value(mixed, LOGP, REF, LENGTH, **parameters), value(name, LOGP, REF, LENGTH, **parameters)
        )


def test_mixture_refuses():
    with pytest.raises(ValueError, match="got the unknown loss 'orpo', expected names from: dpo, ipo, slic"):
        losses.mixture({"dpo": 1.0, "orpo": 1.0})
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


def test_config_names_and_keys_are_the_tables():
    assert set(typing.get_args(config.LossName)) == set(losses.LOSSES)
    owners = {key: {name for name, loss in losses.LOSSES.items() if key in loss.keys} for key, _ in config._LOSS_KEYS}
    assert owners == {key: set(names) for key, names in config._LOSS_KEYS}
    assert {key for loss in losses.LOSSES.values() for key in loss.keys} == set(owners)
    assert set(owners) <= set(config.LossConfig.__dataclass_fields__)
