"""checkpoint: bit for bit, onto other meshes, pruned, and never half after a kill."""

import collections
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sera_jax import checkpoint
from sera_jax.disk import DiskError

State = collections.namedtuple("State", "params moments count nothing")


def mesh(*shape: int) -> jax.sharding.Mesh:
    n = int(np.prod(shape))
    if len(jax.devices()) < n:
        pytest.skip(f"needs {n} devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=auto, devices=jax.devices()[:n])


def sharding(m, *spec) -> NamedSharding:
    return NamedSharding(m, PartitionSpec(*spec))


def bits(x) -> bytes:
    return np.asarray(x).tobytes()


def state(m, seed: int = 0) -> State:
    """Arbitrary bits (NaN payloads, denormals, negative zeros), several dtypes, nested containers, None."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 2**32, (16, 8), np.uint32)
    put = lambda x, *spec: jax.device_put(x, sharding(m, *spec))
    params = {
        "layers": {"w": put(raw.view(np.float32), "data", "fsdp"), "b.c": put(raw[0].view(np.float32))},
        "head": put(rng.integers(0, 2**16, (8, 6), np.uint16).view(jnp.bfloat16), "fsdp"),
    }
    moments = (put(rng.normal(size=(16, 8)).astype(np.float32), None, "fsdp"), {})
    return State(params, moments, put(np.int32(7)), None)


def like(tree, m, *spec):
    """The same shapes, on mesh m, split where they divide."""

    def one(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(m, *spec[: x.ndim]))

    return jax.tree.map(one, tree)


def same(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    equal = all(x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y) for x, y in leaves)
    return equal and jax.tree.structure(a) == jax.tree.structure(b)


def test_state_comes_back_bit_for_bit_on_its_shardings(tmp_path):
    m = mesh(2, 4)
    saved = state(m)
    cursor = {"stage": "train", "iteration": 2, "offset": 123456789012, "seeds": [1, 2], "share": 0.1, "none": None}
    with checkpoint.Checkpoints(tmp_path / "deep" / "c", keep=2) as c:
        assert c.latest() is None
        c.save(10, saved, cursor)
        assert c.latest() == (10, cursor)
    with checkpoint.Checkpoints(tmp_path / "deep" / "c", keep=2) as c:
        step, found = c.latest()
        assert (step, found) == (10, cursor)
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
        got = c.restore(step, target)
    assert same(saved, got) and isinstance(got, State) and got.nothing is None
    assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(saved), jax.tree.leaves(got)))


@pytest.mark.parametrize("shape, spec", [((1, 1), ()), ((4, 2), ("fsdp",)), ((1, 2), ("fsdp",)), ((8, 1), (None,))])
def test_state_comes_back_onto_another_mesh(tmp_path, shape, spec):
    saved = state(mesh(2, 4))
    with checkpoint.Checkpoints(tmp_path, keep=1) as c:
        c.save(1, saved, {})
        target = like(saved, mesh(*shape), *spec)
        got = c.restore(1, target)
    assert same(saved, got)
    assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(target), jax.tree.leaves(got)))


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    m = mesh(2, 4)
    rng = np.random.default_rng(0)
    w = jax.device_put(rng.normal(size=(64, 100_000)).astype(np.float32), sharding(m, "data", "fsdp"))
    v = jnp.asarray(rng.normal(size=(1_000_000,)).astype(np.float32)) * 1
    before = {"w": np.array(w), "v": np.array(v)}
    update = jax.jit(lambda w, v: (w + 1, v + 1), donate_argnums=(0, 1))
    with checkpoint.Checkpoints(tmp_path, keep=1) as c:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {"w": w, "v": v})
        c.save(1, {"w": w, "v": v}, {})
        for _ in range(5):
            w, v = update(w, v)
        jax.block_until_ready((w, v))
        got = c.restore(1, target)
    assert bits(got["w"]) == bits(before["w"]) and bits(got["v"]) == bits(before["v"])


def test_only_the_latest_are_kept(tmp_path):
    m = mesh(1, 1)
    with checkpoint.Checkpoints(tmp_path, keep=2) as c:
        for step in (1, 5, 7, 20):
            c.save(step, {"x": jnp.full((4,), step)}, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "7"]
    with checkpoint.Checkpoints(tmp_path, keep=2) as c:
        target = like({"x": jnp.zeros((4,), jnp.int32)}, m)
        assert c.latest() == (20, {"step": 20})
        assert c.restore(7, target)["x"].tolist() == [7] * 4
        with pytest.raises(ValueError, match=r"holds no checkpoint 5, expected one of \[7, 20\]"):
            c.restore(5, target)
        with pytest.raises(ValueError, match=r"step is 20, expected more than 20, the latest in .*count the updates"):
            c.save(20, {"x": jnp.zeros(4)}, {})
        c.save(21, {"x": jnp.zeros(4)}, {})


def test_what_differs_is_named(tmp_path):
    m = mesh(1, 2)
    saved = {"a": {"w": jnp.zeros((4, 2))}, "n": jnp.int32(1)}
    with checkpoint.Checkpoints(tmp_path, keep=1) as c:
        c.save(3, saved, {})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for other, message in (
                (
                    {"a": {"w": jnp.zeros((2, 4))}, "n": saved["n"]},
                    r"/3: 'a/w' is float32\[4, 2\], expected float32\[2, 4\]",
                ),
                ({**saved, "n": jnp.float32(1)}, r"'n' is int32\[\], expected float32\[\]\. .*config\.yaml"),
                ({**saved, "m": jnp.zeros(1)}, r"/3 lacks 'm', expected float32\[1\]\. .*start a new run"),
                ({"n": saved["n"]}, r"/3 holds 'a/w' \(float32\[4, 2\]\), expected no such leaf"),
            ):
                with pytest.raises(ValueError, match=message):
                    c.restore(3, like(other, m))
            with pytest.raises(ValueError, match=r"leaf 'a/w' has no sharding, expected one in its"):
                c.restore(3, jax.eval_shape(lambda: saved))


def test_what_cannot_be_saved_is_refused(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=1) as c:
        for arrays, message in (
            ({"x": 3}, r"leaf 'x' is a int, expected a jax\.Array\. Plain values belong in the cursor"),
            ({"k": jax.random.key(0)}, r"leaf 'k' .*jax\.random\.key_data"),
            ({"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)}, r"two leaves are called 'a/b'"),
            ({}, r"no leaves"),
        ):
            with pytest.raises(ValueError, match=message):
                c.save(1, arrays, {})
        with pytest.raises(ValueError, match=r"checkpoint 1: the cursor holds something that JSON cannot"):
            c.save(1, {"x": jnp.zeros(1)}, {"bad": {1, 2}})
        assert c.latest() is None
        c.save(1, {"x": jnp.zeros(1)}, {})
        assert c.latest() == (1, {})


def test_iterates_keep_their_dtype_and_come_back_in_the_one_asked_for(tmp_path):
    m, other = mesh(2, 4), mesh(4, 2)
    w = jax.device_put(np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32), sharding(m, "data", "fsdp"))
    params = {"w": w, "n": jnp.int32(2**24 + 1)}
    folder = tmp_path / "iterates"
    assert checkpoint.iterates(folder) == []
    for name, scale in (("2", 2), ("ema-2", 3)):
        checkpoint.save_iterate(folder, name, jax.tree.map(lambda x, scale=scale: x * scale, params))
    checkpoint.save_iterate(folder, "half", {**params, "w": w.astype(jnp.bfloat16)})
    assert checkpoint.iterates(folder) == ["2", "ema-2", "half"]
    target = like(params, other, "fsdp")
    whole = checkpoint.load_iterate(folder, "2", target)
    assert (np.asarray(whole["w"]) == np.asarray(w * 2)).all() and int(whole["n"]) == 2 * (2**24 + 1)
    assert whole["w"].sharding == target["w"].sharding
    # Round to nearest even on the upper half of the float32 bits.
    raw = np.asarray(w).view(np.uint32)
    rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
    wide = checkpoint.load_iterate(folder, "half", target)
    assert wide["w"].dtype == jnp.float32 and (np.asarray(wide["w"]).view(np.uint32) == rounded << 16).all()
    target["w"] = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=target["w"].sharding)
    half = checkpoint.load_iterate(folder, "half", target)["w"]
    assert half.dtype == jnp.bfloat16 and (np.asarray(half).view(np.uint16) == rounded).all()
    with pytest.raises(ValueError, match=r"holds no iterate '3', expected one of \['2', 'ema-2', 'half'\]"):
        checkpoint.load_iterate(folder, "3", target)
    with pytest.raises(ValueError, match=r"iterates/2: 'w' is float32\[16, 8\], expected float32\[8, 8\]"):
        checkpoint.load_iterate(folder, "2", like({**params, "w": jnp.zeros((8, 8))}, m))


def test_an_iterate_is_replaced_whole(tmp_path):
    m = mesh(1, 1)
    checkpoint.save_iterate(tmp_path, "1", {"x": jnp.zeros(3), "old": jnp.zeros(2)})
    shutil.copytree(tmp_path / "1", tmp_path / "1.removed")  # what a kill may have left
    shutil.copytree(tmp_path / "1", tmp_path / "1.orbax-checkpoint-tmp")
    assert checkpoint.iterates(tmp_path) == ["1"]
    checkpoint.save_iterate(tmp_path, "1", {"x": jnp.ones(3)})
    assert checkpoint.load_iterate(tmp_path, "1", like({"x": jnp.zeros(3)}, m))["x"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


BIG = 300_000


def noise(seed: int):
    return {"x": jnp.asarray(np.random.default_rng(seed).normal(size=BIG).astype(np.float32)), "n": jnp.int32(seed)}


@pytest.mark.parametrize("then", ["wait", "latest", "save", "close"])
def test_a_save_that_finds_the_disk_full_costs_only_itself(tmp_path, small_files, caplog, then):
    """The next call tells it, once and without orbax's pages of traces; the checkpoint before stays whole, even if only
    one is kept."""
    c = checkpoint.Checkpoints(tmp_path, keep=1)
    assert c.saved is None
    c.save(3, noise(3), {"at": 3})
    assert c.latest() == c.saved == (3, {"at": 3})
    told = (
        rf"^{tmp_path}/5 could not be written: File too large .1,200,004 bytes to write, [\d,]+ free there.\. Make room"
    )
    with small_files(200_000), pytest.raises(DiskError, match=told) as error:
        c.save(5, noise(5), {"at": 5})
        {"wait": c.wait, "latest": c.latest, "save": lambda: c.save(6, noise(6), {}), "close": c.close}[then]()
    assert "\n" not in str(error.value) and not caplog.records
    assert c.saved == (3, {"at": 3})
    c.close()
    with checkpoint.Checkpoints(tmp_path, keep=1) as c:
        assert c.latest() == (3, {"at": 3})
        got = c.restore(3, like(noise(3), mesh(1, 1)))
        assert same(got, noise(3))
        c.save(5, noise(5), {"at": 5})
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


def test_an_iterate_that_finds_the_disk_full_is_none(tmp_path, small_files):
    checkpoint.save_iterate(tmp_path, "1", noise(1))
    told = rf"^{tmp_path}/2 could not be written: File too large \(1,200,004 bytes to write, "
    with small_files(200_000), pytest.raises(DiskError, match=told):
        checkpoint.save_iterate(tmp_path, "2", noise(2))
    assert checkpoint.iterates(tmp_path) == ["1"]
    checkpoint.save_iterate(tmp_path, "2", noise(2))
    for name in ("1", "2"):
        assert same(checkpoint.load_iterate(tmp_path, name, like(noise(1), mesh(1, 1))), noise(int(name)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


SAVER = """
import sys, numpy as np, jax.numpy as jnp
from sera_jax import checkpoint
folder, kind = sys.argv[1:]
noise = np.random.default_rng(0).normal(size=(8_000_000,)).astype(np.float32)
c = checkpoint.Checkpoints(folder, keep=1) if kind == "state" else None
for step in range(1, 1000):
    arrays = {"x": jnp.asarray(noise), "step": jnp.full((3,), step)}
    if c is None:
        checkpoint.save_iterate(folder, str(step), arrays)
    else:
        c.save(step, arrays, {"step": step})
        c.wait()
"""


@pytest.mark.parametrize("kind", ["state", "iterate"])
def test_a_kill_during_a_save_leaves_the_previous_one(tmp_path, kind):
    root = pathlib.Path(checkpoint.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path), kind], cwd=root)
    try:
        deadline = time.monotonic() + 120
        while not (list(tmp_path.glob("[3-9]*tmp*")) and list(tmp_path.glob("[0-9]"))):
            assert process.poll() is None and time.monotonic() < deadline, "never seen in the middle of a save"
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = [p.name for p in tmp_path.iterdir()]
    assert any("tmp" in name for name in left), f"killed too late: {left}"
    target = like({"x": jnp.zeros((8_000_000,)), "step": jnp.zeros((3,), jnp.int32)}, mesh(1, 1))
    if kind == "state":
        with checkpoint.Checkpoints(tmp_path, keep=1) as c:
            step, cursor = c.latest()
            got = c.restore(step, target)
            assert cursor == {"step": step} and got["step"].tolist() == [step] * 3
            c.save(step + 5, got, {"step": step + 5})
        assert [p.name for p in tmp_path.iterdir()] == [str(step + 5)]
    else:
        whole = checkpoint.iterates(tmp_path)
        assert whole == [str(t) for t in range(1, len(whole) + 1)] and len(whole) >= 2
        for t in whole:
            assert checkpoint.load_iterate(tmp_path, t, target)["step"].tolist() == [int(t)] * 3
        checkpoint.save_iterate(tmp_path, str(len(whole) + 1), {"x": jnp.zeros(2)})
        assert sorted(p.name for p in tmp_path.iterdir()) == [str(t) for t in range(1, len(whole) + 2)]


def test_orbax_is_quiet_and_others_are_heard(tmp_path, caplog):
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("error")
        with checkpoint.Checkpoints(tmp_path / "c", keep=1) as c:
            c.save(1, {"x": jnp.zeros(2)}, {})
            c.save(2, {"x": jnp.zeros(2)}, {})
            c.restore(2, like({"x": jnp.zeros(2)}, mesh(1, 1)))
        checkpoint.save_iterate(tmp_path / "i", "1", {"x": jnp.zeros(2)})
        assert not caplog.records
        logging.getLogger("absl").warning("somebody else")
    assert [r.message for r in caplog.records] == ["somebody else"]
