"""Adapters: what they add, what trains and what does not, that a run with them is a run like any other."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sera_jax import config as configs
from sera_jax import hf, losses, model, policies, programs, score, step
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax import train as trainer
from sera_jax.model import Arch, Lora
from sera_jax.programs import Compute
from sera_jax.records import Batch, Tree
from sera_jax.rows import Plan

BASE = Arch("LlamaForCausalLM", 48, 16, 3, 4, 2, 4, 24, 1e-5, 1e4, tied=False, init_std=0.3)
PHI = dataclasses.replace(
    BASE, norm="layer", gated=False, block="parallel_shared", biases=("attention", "out", "mlp", "head"), rotary=2
)
EVERY = Lora(3, 7.0, ("query", "key", "value", "out", "gate", "up", "down", "head"))
PLAN = Plan(128, 128, 8, 2)
GRADIENT = optax.trace(decay=0.0)  # its state is the gradient itself
COMPUTE = Compute(jnp.float32, "full", 24)
SCHEDULE = {"peak": 0.1, "schedule": "constant", "warmup": 0.0}


def trees(seed: int = 0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(0, BASE.vocab, n).astype(np.int32)
    return [Tree(f"t{p}{a}", ids(p), (ids(a), ids(b))) for p, a, b in [(5, 7, 3), (1, 1, 9), (6, 4, 12), (8, 6, 2)]]


def with_lora(arch: Arch, lora: Lora = EVERY) -> Arch:
    lora = dataclasses.replace(lora, targets=tuple(t for t in lora.targets if t != "gate" or arch.gated))
    return dataclasses.replace(arch, lora=model.targeted(arch, lora))


def policy(arch: Arch, seed: int = 0) -> dict:
    """Random weights with random adapters, on the host; B is not zero."""
    params = model.init(dataclasses.replace(arch, lora=None), jax.random.key(seed))
    low = model.init_adapters(arch, jax.random.key(seed + 1))
    noise = jax.random.split(jax.random.key(seed + 2), len(low))
    for one, key in zip(low.values(), noise):
        one["b"] = 0.3 * jax.random.normal(key, one["b"].shape)
    return jax.device_get(model.join(arch, low, params))


def placed(arch: Arch, params: dict, mesh) -> tuple[dict, dict]:
    """(trained, frozen) on the mesh."""
    trained, frozen = model.split(arch, params)
    return (
        meshes.put(trained, programs.trainable_shardings(arch, mesh)),
        meshes.put(frozen, programs.frozen_shardings(arch, mesh)),
    )


def logps(arch: Arch, params: dict, mesh, key=None, dtype=jnp.float32) -> np.ndarray:
    rows = rowlib.pack(trees(), dataclasses.replace(PLAN, rows=4))
    run = jax.jit(lambda p: score.slot_sums(arch, p, rows, mesh=mesh, dtype=dtype, key=key).logp_BS)
    return rowlib.unpack(np.asarray(run(params)), rows.example_BS, 8)


def updated(arch: Arch, params: dict, mesh, seed: int = 0, compute=COMPUTE, transform=GRADIENT, moments="device"):
    """(state, frozen) behind one DPO update."""
    stacked, count = rowlib.microbatches(rowlib.pack(trees(), dataclasses.replace(PLAN, rows=4)), PLAN4, 1)
    reference = np.linspace(-40, -20, 8).astype(np.float32)
    slots = [rowlib.spread(v, stacked.example_BS) for v in (reference, np.ones(8, np.float32), np.zeros(8, np.float32))]
    batch = meshes.put(Batch(stacked, *slots, np.int32(count)), programs.batch_shardings(mesh))
    loss, keys = losses.LOSSES["dpo"], {"beta": 0.1, "label_smoothing": 0.0, "f_divergence": "reverse_kl"}
    keys = {key: value for key, value in keys.items() if key == "beta" or key in loss.keys} | {
        key: configs.LossConfig.__dataclass_fields__[key].default for key in loss.keys
    }
    update = programs.preference_update(arch, mesh, compute, transform, loss, keys, SCHEDULE, moments=moments)
    trained, frozen = placed(arch, params, mesh)
    state = programs.fresh_state(arch, mesh, transform, moments)(trained)
    whole = meshes.replicated(mesh)
    key = jax.device_put(jax.random.key(seed), whole)
    return update(state, frozen, batch, meshes.put(np.int32(5), whole), key)[0], frozen


PLAN4 = dataclasses.replace(PLAN, rows=4)


@pytest.mark.parametrize("arch", [BASE, PHI], ids=["llama", "phi"])
def test_adapters_add_what_their_product_added_to_the_weights_would(arch, one_device):
    """Against the same model whose weights hold W + (α/R)·A·B, made here in float64."""
    arch = with_lora(arch)
    params = policy(arch)
    want = {name: part for name, part in params.items() if name != "adapters"}
    want["layers"] = jax.tree.map(np.copy, want["layers"])
    scale = arch.lora.alpha / arch.lora.rank
    for target, low in params["adapters"].items():
        a, b = (np.asarray(low[name], np.float64) for name in "ab")
        if target == "head":
            want["head"] = {**want["head"], "table": want["head"]["table"] + scale * b @ a.T}
        else:
            part = want["layers"][model.LINEAR[target][0]]
            for layer in range(arch.layers):
                part[target][layer] += scale * np.tensordot(a[layer], b[layer], 1)
    base = dataclasses.replace(arch, lora=None)
    want = jax.tree.map(lambda w: np.asarray(w, np.float32), want)
    got, expected = logps(arch, params, one_device), logps(base, want, one_device)
    # Measured floor: 1.3e-7 of the largest.
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    without = logps(base, {k: v for k, v in params.items() if k != "adapters"}, one_device)
    assert np.abs(got - without).min() > 0.1  # every branch feels them
    merged = jax.tree.map(np.asarray, model.merged(arch, params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, want)


def test_fresh_adapters_add_nothing(one_device):
    arch = with_lora(BASE)
    base = model.init(BASE, jax.random.key(0))
    fresh = model.init_adapters(arch, jax.random.key(1))
    for target, low in fresh.items():
        assert not np.any(low["b"]) and np.any(low["a"])
        read = low["a"].shape[0] if target == "head" else np.prod(low["a"].shape[1:-1])
        assert np.abs(low["a"]).max() <= read**-0.5 and np.std(low["a"]) == pytest.approx((3 * read) ** -0.5, rel=0.2)
    with_them = logps(arch, model.join(arch, fresh, base), one_device)
    # The head's own sum has R more terms, all zero.
    np.testing.assert_allclose(with_them, logps(BASE, base, one_device), rtol=1e-6)
    # Without adapters the same Arch is the base: the reference needs no other program and no other weights.
    assert np.array_equal(logps(arch, base, one_device), logps(BASE, base, one_device))


@pytest.mark.parametrize("devices", [1, 8])
def test_gradients_are_those_of_the_weights_seen_through_the_product(devices, one_device, eight_devices):
    """dA = s·dW·Bᵀ and dB = s·Aᵀ·dW, with dW the gradient of the merged weights by the update without adapters."""
    mesh = one_device if devices == 1 else eight_devices
    arch = with_lora(BASE)
    params = policy(arch)
    state, frozen = updated(arch, params, mesh)
    got = meshes.get(state.moments.trace)
    base_params = jax.device_get(model.merged(arch, params))
    full, _ = updated(BASE, jax.tree.map(lambda w: np.asarray(w, np.float32), base_params), mesh)
    weights = meshes.get(full.moments.trace)
    scale = arch.lora.alpha / arch.lora.rank
    for target, low in params["adapters"].items():
        a, b = low["a"], low["b"]
        if target == "head":
            d = weights["head"]["table"]
            want = {"a": scale * d.T @ b, "b": scale * d @ a}
        else:
            d = weights["layers"][model.LINEAR[target][0]][target]
            wide, rank = d.reshape(arch.layers, int(np.prod(a.shape[1:-1])), -1), arch.lora.rank
            a, b = a.reshape(arch.layers, -1, rank), b.reshape(arch.layers, rank, -1)
            want = {"a": scale * wide @ b.swapaxes(1, 2), "b": scale * a.swapaxes(1, 2) @ wide}
        for name in "ab":
            expected = want[name].reshape(got[target][name].shape)
            # Measured floor: 3.6e-6 of the largest.
            np.testing.assert_allclose(got[target][name], expected, atol=1e-5 * np.abs(expected).max(), err_msg=target)
    # The weights beneath are there as they were, and the state holds adapters and their moments alone.
    jax.tree.map(np.testing.assert_array_equal, meshes.get(frozen), model.split(arch, params)[1])
    held = sum(leaf.size for leaf in jax.tree.leaves((state.params, state.moments)))
    assert held == 2 * sum(leaf.size for leaf in jax.tree.leaves(params["adapters"]))


def test_the_weights_beneath_may_lie_in_the_compute_dtype(one_device):
    """bfloat16 weights give the bits that float32 ones, cast, give; adapters are float32 and train in it."""
    arch = with_lora(BASE)
    params = policy(arch)
    trained, frozen = model.split(arch, params)
    narrow = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), frozen)
    compute = Compute(jnp.bfloat16, "full", 24)
    one, _ = updated(arch, params, one_device, compute=compute)
    other, kept = updated(arch, model.join(arch, trained, narrow), one_device, compute=compute)
    jax.tree.map(np.testing.assert_array_equal, meshes.get(one.params), meshes.get(other.params))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(other.params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {"bfloat16"}


def test_dropout_is_in_updates_alone_and_comes_with_the_key(one_device):
    arch = with_lora(BASE, dataclasses.replace(EVERY, dropout=0.5))
    still = with_lora(BASE)
    params = policy(arch)
    one, two = (logps(arch, params, one_device, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(one - two).max() > 0.05
    assert np.array_equal(one, logps(arch, params, one_device, jax.random.key(0)))
    assert np.array_equal(logps(arch, params, one_device), logps(still, params, one_device))
    gradient = lambda arch, seed: jax.tree.leaves(meshes.get(updated(arch, params, one_device, seed)[0].moments.trace))
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(gradient(arch, 0), gradient(arch, 1)))
    assert all(np.array_equal(a, b) for a, b in zip(gradient(arch, 0), gradient(arch, 0)))
    assert all(np.array_equal(a, b) for a, b in zip(gradient(still, 0), gradient(still, 1)))


def test_dropout_keeps_the_mean():
    """E[x'] = x: half of the entries of what A reads are 0, the others doubled; every layer and target its own."""
    lora = Lora(16, 16.0, ("up", "down"), dropout=0.5)
    x = jnp.ones((1, 4000, 16))
    low = {"a": jnp.eye(16), "b": jnp.eye(16)}
    got = {name: np.asarray(model._adapter(lora, low, name, x, jax.random.key(3))) for name in lora.targets}
    for dropped in got.values():
        assert set(np.unique(dropped)) == {0.0, 2.0} and abs(dropped.mean() - 1) < 0.02  # 64,000 coins: σ = 0.004
    assert np.mean(got["up"] == got["down"]) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_a_target_that_is_not_there_is_named(tied):
    arch = dataclasses.replace(PHI, tied=tied)
    with pytest.raises(ValueError) as error:
        model.targeted(arch, Lora(2, 4.0, ("query", "head" if tied else "gate")))
    missing, head = ("'head'", "") if tied else ("'gate'", ", head")
    assert str(error.value).startswith(f"lora.targets names {missing}, which this LlamaForCausalLM does not have")
    assert str(error.value).endswith(f"expected some of query, key, value, out, up, down{head}.")
    assert model.targeted(arch, Lora(2, 4.0, ())).targets == ("query", "key", "value", "out", "up", "down")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora.alpha=32"], "lora.alpha is 32.0, but lora.rank is 0, so that there are no adapters"),
        (["--lora.rank=2", "--loop.first=x"], "loop.first is 'x' with lora.rank 2, expected no policy with weights of"),
        (["--lora.rank=-1"], "lora.rank is -1, expected 0 or more"),
        (["--lora.rank=2", "--lora.dropout=1"], "lora.dropout is 1.0, expected a share in [0, 1)"),
        (["--lora.rank=2", "--lora.targets=[up,up]"], "lora.targets is ('up', 'up'), expected each linear layer once"),
    ],
)
def test_keys_that_would_do_nothing_or_harm_are_refused(tiny_config, flags, message):
    with pytest.raises(configs.ConfigError) as error:
        tiny_config(*flags)
    assert message in str(error.value).replace("['up', 'up']", "('up', 'up')")


LORA = ("--lora.rank=4", "--lora.alpha=8", "--lora.dropout=0.1", "--optimizer.learning_rate=3e-2")


def left(run: pathlib.Path) -> dict:
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in told],
        "candidates": (run / "iterations" / "2" / "candidates.jsonl").read_text(),
        "weights": (run / "export" / "model.safetensors").read_bytes(),
    }


def test_a_run_with_adapters(tiny, tiny_config, monkeypatch, stopped_at):
    """The whole walk, with an SFT stage: weights are loaded once, iterates are adapters, and a stopped run goes on."""
    loads, draw = [], programs.random_params
    monkeypatch.setattr(programs, "random_params", lambda *a: lambda key: loads.append(1) or draw(*a)(key))
    sft = ("--sft.epochs=1", "--sft.optimizer.batch_size=16", "--sft.optimizer.learning_rate=3e-2")
    trainer.train(tiny_config(*LORA, *sft, run="whole"))
    run = pathlib.Path(tiny_config(run="whole").run.dir)
    assert len(loads) == 1
    summary = json.loads((run / "iterations" / "2" / "summary.json").read_text())
    assert abs(summary["sera/margin_q50"]) > 1e-3 and summary["flops/train"] > 0
    sizes = {p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in (run / "iterates").iterdir()}
    assert set(sizes) == {"0", "1", "2"}
    arch = hf.read_arch(tiny / "model")
    exported = hf.load(run / "export", arch, meshes.make(1, 1, 1, jax.devices()[:1]))
    start = model.init(arch, jax.random.key(0))
    np.testing.assert_allclose(exported["embed"]["table"], start["embed"]["table"], rtol=1e-6)  # drawn under jit
    assert all(
        np.abs(exported["layers"]["mlp"][name] - start["layers"]["mlp"][name]).max() > 1e-3 for name in ("up", "down")
    )

    with stopped_at("preference_update", 9):  # in iteration 2, behind a checkpoint
        trainer.train(tiny_config(*LORA, *sft, run="stopped"))
    trainer.train(tiny_config(*LORA, *sft, run="stopped"))
    assert left(pathlib.Path(tiny_config(run="stopped").run.dir)) == left(run)


def test_the_reference_is_the_base(tiny_config):
    """Without an SFT stage iterate 0 is the folder itself: no adapters, no iterate on disk, its tag that of a run
    without LoRA, so that both share a ledger."""
    config = tiny_config(*LORA, "--loop.iterations=1", "--loss.reference=ema", run="base")
    trainer.train(config)
    folder = pathlib.Path(config.run.dir)
    assert {p.name for p in (folder / "iterates").iterdir()} == {"1", "ema-1"}
    other = tiny_config("--loop.iterations=1", f"--run.ledger={folder / 'ledger'}", run="full")
    mesh = meshes.make(1, 1, 1)
    start = policies.open_folder(config.model.path, mesh, compute="float32", seed=config.run.seed)
    known = folder / "ledger" / f"{start.tag}.logp"
    before = known.read_bytes()
    trainer.train(other)
    assert known.read_bytes() == before  # every log-prob under the start was there
    for run in (folder, pathlib.Path(other.run.dir)):
        first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)  # both begin as the start


def test_moments_in_host_memory_are_the_same_numbers(eight_devices):
    """Bit for bit; between updates they lie in the machine's memory, on the shardings of their weights."""
    adam = step.optimizer(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0, decays=programs.decaying(BASE))
    params = jax.device_get(model.init(BASE, jax.random.key(0)))
    here, there = (
        updated(BASE, jax.tree.map(np.copy, params), eight_devices, transform=adam, moments=memory)[0]
        for memory in ("device", "host")
    )
    jax.tree.map(np.testing.assert_array_equal, meshes.get(here), meshes.get(there))
    kinds = lambda state: {
        leaf.sharding.memory_kind for leaf in jax.tree.leaves((state.moments[1].mu, state.moments[1].nu))
    }
    assert kinds(there) == {"pinned_host"} and kinds(here) == {"device"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(there.params)} == {"device"}
    jax.tree.map(
        lambda m, w: m.sharding.spec == w.sharding.spec or pytest.fail(f"{m.sharding}"),
        there.moments[1].mu,
        there.params,
    )


def test_a_run_with_moments_in_host_memory_stops_and_goes_on(tiny_config, monkeypatch):
    """What the checkpoint holds comes back to the memory it was in; the key may change between (`run.FREE_KEYS`)."""
    flags = ("--loop.iterations=1", "--sft.epochs=1", "--sft.optimizer.batch_size=8", "--run.save_every=1")
    host = ("--optimizer.moments=host", "--sft.optimizer.moments=host")
    whole = trainer.train(tiny_config(*flags, run="device"))
    build, calls = programs.preference_update, []

    def stopping(*args, **keywords):
        update = build(*args, **keywords)

        def run(*a):
            calls.append({leaf.sharding.memory_kind for leaf in jax.tree.leaves(a[0].moments)})
            if len(calls) == 4:
                raise KeyError("stopped")
            return update(*a)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(programs, "preference_update", stopping)
        with pytest.raises(KeyError):
            trainer.train(tiny_config(*flags, *host, run="host"))
        export = trainer.train(tiny_config(*flags, *host, run="host"))
    assert all("pinned_host" in kinds for kinds in calls) and len(calls) == 7
    assert (export / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
