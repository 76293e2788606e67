"""One update: microbatches against the whole batch, schedules against their formulas, AdamW against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import step
from sera_jax.records import Batch
from sera_jax.step import TrainState

N, D = 12, 5  # examples, width


def batch_of(a: int, padding: int = 0, seed: int = 0, weights=None) -> Batch:
    """The same 12 examples in `a` microbatches of 12 / a, and `padding` microbatches of rubbish behind them."""
    rng = np.random.default_rng(seed)
    rows, reference = rng.normal(size=(N, D)).astype(np.float32), rng.normal(size=N).astype(np.float32)
    weight = np.ones(N, np.float32) if weights is None else np.asarray(weights, np.float32)

    def stack(x):
        filler = np.full((padding, N // a, *x.shape[1:]), 1e3, np.float32)
        return jnp.asarray(np.concatenate((x.reshape(a, N // a, *x.shape[1:]), filler)))

    label = np.zeros(N, np.float32)
    return Batch(*map(stack, (rows, reference, weight, label)), jnp.int32(a))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(rng.normal(size=D), jnp.float32), "b": jnp.float32(0.3)}


def outputs(p, frozen, micro, key):
    return jnp.tanh(micro.rows @ p["w"] * frozen + p["b"])


def loss_fn(p, frozen, micro, key):
    loss = jax.nn.softplus(outputs(p, frozen, micro, key) - micro.reference_BS)
    hits = jnp.sum(micro.weight_BS * (micro.reference_BS > 0))
    return jnp.sum(micro.weight_BS * loss), jnp.sum(micro.weight_BS), {"hits": hits}


def whole(p, frozen, batch):
    """Σ weight·loss / Σ weight of the examples, written without microbatches."""
    rows, reference = np.asarray(batch.rows).reshape(N, D), np.asarray(batch.reference_ABS).reshape(N)
    weight = np.asarray(batch.weight_ABS).reshape(N)
    loss = jax.nn.softplus(jnp.tanh(rows @ p["w"] * frozen + p["b"]) - reference)
    return jnp.sum(weight * loss) / jnp.sum(weight)


FROZEN = jnp.float32(1.7)
gradients = jax.jit(lambda p, batch: step.gradients(loss_fn, p, FROZEN, batch, jax.random.key(0)))


@pytest.mark.parametrize("weights", [None, np.arange(N), np.eye(N)[3]])
def test_gradient_of_the_weighted_mean_over_any_microbatches(params, weights):
    want_loss, want = jax.value_and_grad(whole)(params, FROZEN, batch_of(1, weights=weights))
    for a, padding in [(1, 0), (4, 0), (12, 0), (4, 3)]:
        batch = batch_of(a, padding, weights=weights)
        got, metrics = gradients(params, batch)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), got, want)
        np.testing.assert_allclose(metrics["loss"], want_loss, rtol=1e-6)
        weight, positive = np.ones(N) if weights is None else weights, batch_of(1).reference_ABS[0] > 0
        np.testing.assert_allclose(metrics["hits"], (weight * positive).sum() / weight.sum(), rtol=1e-6)


def test_the_count_is_traced(params):
    """Batches that fill more or fewer microbatches of one shape share a program, and the rest is not read."""
    traces = []

    def traced(p, batch):
        traces.append(1)
        return step.gradients(loss_fn, p, FROZEN, batch, jax.random.key(0))

    run = jax.jit(traced)
    full = batch_of(4)
    parts = []
    for count in (1, 2, 3, 4):
        grads, metrics = run(params, dataclasses.replace(full, count=jnp.int32(count)))
        parts.append((grads, metrics))
        first = jax.tree.map(lambda x, c=count: x[:c], dataclasses.replace(full, count=None))
        want, _ = gradients(params, dataclasses.replace(first, count=jnp.int32(count)))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8), grads, want)
    assert len(traces) == 1 and run._cache_size() == 1
    assert len({float(m["loss"]) for _, m in parts}) == 4


def test_each_microbatch_has_its_own_key(params):
    """The key is folded by the microbatch's number."""

    def noisy(p, frozen, micro, key):
        return jax.random.normal(key) * p["b"], jnp.float32(0.5), {}

    key = jax.random.key(3)
    grads, _ = jax.jit(lambda p, b: step.gradients(noisy, p, None, b, key))(params, batch_of(4))
    want = sum(jax.random.normal(jax.random.fold_in(key, i)) for i in range(4)) / 2
    np.testing.assert_allclose(grads["b"], want, rtol=1e-6)


def test_a_batch_without_weight_moves_nothing(params):
    grads, metrics = gradients(params, batch_of(4, weights=np.zeros(N)))
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads)) and metrics["loss"] == 0


def coupled_loss(out, weight):
    """Every output meets the mean of all: no sum over microbatches gives it."""
    mean = jnp.sum(out * weight) / jnp.sum(weight)
    return jnp.sum(weight * jax.nn.sigmoid(3 * (out - mean)) ** 2) / jnp.sum(weight)


@pytest.mark.parametrize("a, padding", [(1, 0), (4, 0), (12, 0), (3, 2)])
def test_coupled_gradients_are_those_of_the_whole_batch(params, a, padding):
    def outputs_loss(out, batch):
        # Microbatches past the count have weight 0, as the packer leaves them; their outputs are 0.
        weight = jnp.where((jnp.arange(a + padding) < batch.count)[:, None], batch.weight_ABS, 0)
        return coupled_loss(out, weight), {"mean": jnp.sum(out * weight) / jnp.sum(weight), "rest": out[batch.count :]}

    batch = batch_of(a, padding, weights=np.arange(1, N + 1))
    batch_static = dataclasses.replace(batch, count=a)
    run = jax.jit(lambda p: step.coupled_gradients(outputs, outputs_loss, p, FROZEN, batch_static, jax.random.key(0)))
    grads, metrics = run(params)

    rows, weight = np.asarray(batch_of(1).rows)[0], np.arange(1, N + 1, dtype=np.float32)

    def direct(p):
        return coupled_loss(jnp.tanh(rows @ p["w"] * FROZEN + p["b"]), weight)

    want_loss, want = jax.value_and_grad(direct)(params)
    np.testing.assert_allclose(metrics["loss"], want_loss, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7), grads, want)
    assert not np.asarray(metrics["rest"]).any()
    # The sum of what each microbatch says alone is something else: the test would see a loss that is not coupled.
    if a > 1:
        parts = [
            jax.grad(lambda p, s=s: coupled_loss(jnp.tanh(rows[s] @ p["w"] * FROZEN + p["b"]), weight[s]))(params)["b"]
            for s in (slice(i * N // a, (i + 1) * N // a) for i in range(a))
        ]
        assert abs(sum(parts) / a - want["b"]) > 1e-3 * abs(want["b"])


# --- the schedule -----------------------------------------------------------------------------------------------------

rate_of = jax.jit(step.learning_rate, static_argnames=("peak", "schedule", "warmup"))


def closed_form(done: int, total: int, schedule: str, warmup: float) -> float:
    rise = int(np.ceil(np.float32(warmup) * np.float32(total)))
    if done < rise:
        return (done + 1) / rise
    x = min((done - rise) / max(total - rise, 1), 1)
    return {"cosine": (1 + np.cos(np.pi * x)) / 2, "linear": 1 - x, "constant": 1.0}[schedule]


@pytest.mark.parametrize("schedule", step.SCHEDULES)
@pytest.mark.parametrize("warmup, total", [(0.0, 7), (0.1, 40), (0.25, 10), (1.0, 5), (0.1, 1)])
def test_learning_rates_are_the_closed_forms(schedule, warmup, total):
    rates = [
        float(rate_of(jnp.int32(i), jnp.int32(total), peak=2e-3, schedule=schedule, warmup=warmup))
        for i in range(total + 2)
    ]
    want = [2e-3 * closed_form(i, total, schedule, warmup) for i in range(total + 2)]
    np.testing.assert_allclose(rates, want, rtol=2e-6, atol=1e-10)
    assert max(rates) <= 2e-3 * (1 + 1e-6) and rates[0] > 0  # the first update already moves


def test_warm_up_reaches_the_peak_and_the_end_is_near_zero():
    rate = lambda i, schedule: float(rate_of(jnp.int32(i), jnp.int32(100), peak=1.0, schedule=schedule, warmup=0.1))
    assert [rate(i, "cosine") for i in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rate(55, "cosine") == pytest.approx(0.5) and rate(55, "linear") == pytest.approx(0.5)
    assert rate(99, "linear") == pytest.approx(1 / 90, rel=1e-5) and rate(99, "constant") == 1


def test_stages_of_other_lengths_share_a_program():
    run = jax.jit(lambda s, t: step.learning_rate(s, t, peak=1.0, schedule="linear", warmup=0.0))
    assert [float(run(jnp.int32(2), jnp.int32(t))) for t in (4, 8, 5)] == pytest.approx([0.5, 0.75, 0.6])
    assert run._cache_size() == 1


# --- AdamW ------------------------------------------------------------------------------------------------------------

HYPER = dict(b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1, clip=1.5)


def numpy_adamw(params, grads_of_step, rates, *, b1, b2, eps, weight_decay, clip):
    """Loshchilov & Hutter (2019), decay decoupled, on "matrix" only, after clipping by the global norm; float64."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    for t, (grads, rate) in enumerate(zip(grads_of_step, rates), start=1):
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads.values()))
        factor = min(1, clip / norm) if clip else 1
        for k, p in params.items():
            g = np.asarray(grads[k], np.float64) * factor
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g * g
            direction = m[k] / (1 - b1**t) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            params[k] = p - rate * (direction + (weight_decay * p if k == "matrix" else 0))
    return params


@pytest.mark.parametrize("changes", [{}, {"clip": 0.0}, {"weight_decay": 0.0}])
def test_updates_are_adamw(changes):
    hyper = HYPER | changes
    rng = np.random.default_rng(5)
    shapes = {"matrix": (4, 3), "scale": (3,)}
    draw = lambda size: {k: rng.normal(size=s, scale=size).astype(np.float32) for k, s in shapes.items()}
    start, rates = draw(1.0), [0.1, 0.05, 0.2, 0.01, 0.1, 0.1]
    grads = [draw(size) for size in (0.1, 3.0, 0.2, 5.0, 0.01, 1.0)]  # some are clipped, some are not
    norms = [float(np.sqrt(sum((g**2).sum() for g in gs.values()))) for gs in grads]
    assert min(norms) < HYPER["clip"] < max(norms)

    transform = step.optimizer(**hyper, decays={"matrix": True, "scale": False})
    state = TrainState(jax.tree.map(jnp.asarray, start), transform.init(start), jnp.int32(0))
    apply = jax.jit(lambda s, g, r: step.apply(transform, s, g, {"loss": jnp.float32(2.5)}, r))
    for i, (g, rate) in enumerate(zip(grads, rates)):
        state, metrics = apply(state, g, jnp.float32(rate))
        assert int(state.step) == i + 1
        np.testing.assert_allclose(metrics["grad_norm"], norms[i], rtol=1e-6)  # before clipping
        assert metrics["learning_rate"] == np.float32(rate) and metrics["loss"] == 2.5
    want = numpy_adamw(start, grads, rates, **hyper)
    for k in shapes:
        np.testing.assert_allclose(state.params[k], want[k], rtol=1e-5, atol=1e-6)


def test_moments_are_float32_also_under_bfloat16_weights():
    transform = step.optimizer(**HYPER, decays={"w": True})
    params = {"w": jnp.ones((2, 2), jnp.float32)}
    moments = transform.init(params)
    _, moments = transform.update({"w": jnp.ones((2, 2), jnp.float32)}, moments, params)
    floats = [a for a in jax.tree.leaves(moments) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert len(floats) == 2 and all(a.dtype == jnp.float32 for a in floats)
    low = transform.init({"w": jnp.ones((2, 2), jnp.bfloat16)})
    first = [a.dtype for a in jax.tree.leaves(low) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert first[0] == jnp.float32


@pytest.mark.parametrize("coupled", [False, True])
def test_gradients_are_summed_where_they_lie(coupled):
    """Over many layers under rematerialisation, beside the sum itself there is room for a layer's gradient, but not for
    a whole microbatch's. Measured, in shares of the weights: 0.08 and 0.08; 1.05 where one is added to the other."""
    layers, width = 32, 128
    params = {"w": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)}
    rows, slots = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 2, width), (4, 2)))
    batch = Batch(rows, slots, slots, slots, jax.ShapeDtypeStruct((), jnp.int32))

    def outputs(p, frozen, micro, key):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, micro.rows, p["w"])[0], axis=-1)

    def loss(p, frozen, micro, key):
        return jnp.sum(outputs(p, frozen, micro, key) ** 2), jnp.float32(2), {}

    def run(p, b):
        if coupled:
            return step.coupled_gradients(outputs, lambda o, _: (jnp.sum(o**2), {}), p, None, b, jax.random.key(0))
        return step.gradients(loss, p, None, b, jax.random.key(0))

    memory = jax.jit(run).lower(params, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * 4 * layers * width * width
