"""Devices by name, the table of layouts, and host arrays in and out of every sharding."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sera_jax import mesh as meshes
from sera_jax import model
from sera_jax.model import Arch

ARCH = Arch("llama", 48, 16, 2, 4, 2, 4, 24, 1e-5, 1e4, tied=False)


def test_axes_in_order_and_minus_one_takes_what_is_left():
    assert dict(meshes.make(2, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(meshes.make().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(meshes.make(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(meshes.make(2, 1, -1).shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert dict(meshes.make(devices=jax.devices()[:3]).shape) == {"data": 1, "fsdp": 3, "tensor": 1}
    assert meshes.row_shards(meshes.make(2, 2, 2)) == 4 and meshes.row_shards(meshes.make(1, 1, 8)) == 1


@pytest.mark.parametrize(
    "sizes, told",
    [
        ((2, 2, 1), "mesh data×fsdp×tensor = 2×2×1 needs 4 devices, but 8 are here"),
        ((3, -1, 1), "mesh data×fsdp×tensor = 3×2×1 needs 6 devices, but 8 are here"),
        ((16, -1, 1), "mesh data×fsdp×tensor = 16×1×1 needs 16 devices, but 8 are here"),
    ],
)
def test_axes_that_do_not_multiply_to_the_devices(sizes, told):
    with pytest.raises(ValueError, match=re.escape(told) + r"\. Change mesh\.data, mesh\.fsdp or mesh\.tensor"):
        meshes.make(*sizes)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device of a slice."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "chip"
    process_index: int = 0


def of_slices(*slices: int, platform: str = "cpu") -> list[Device]:
    return [Device(i, s, platform) for i, s in enumerate(slices)]


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, -1, 1), (-1, 2, 2), (8, 1, 1)])
def test_slices_split_the_data_axis_alone(sizes):
    """Whatever the order of the devices: a slice is a block of neighbours along data, whole along the other axes."""
    mesh = meshes.make(*sizes, of_slices(1, 0, 1, 0, 0, 1, 0, 1), slices=2)
    assert mesh.devices.size == 8 and len({d.id for d in mesh.devices.flat}) == 8
    half = mesh.shape["data"] // 2
    for s, block in enumerate((mesh.devices[:half], mesh.devices[half:])):
        assert {d.slice_index for d in block.flat} == {s}
    assert mesh.axis_names == meshes.AXES and set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "sizes, slices, platform, told",
    [
        ((1, 8, 1), 2, "cpu", "mesh.data is 1 with mesh.slices 2, expected a multiple of it"),
        ((8, 1, 1), 4, "cpu", "mesh.slices is 4, but the 8 devices are of 2; expected the number of slices"),
        ((2, 4, 1), 1, "tpu", "mesh.slices is 1, but the 8 devices are of 2; expected the number of slices"),
    ],
)
def test_slices_that_do_not_fit(sizes, slices, platform, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        meshes.make(*sizes, of_slices(0, 0, 0, 0, 1, 1, 1, 1, platform=platform), slices=slices)


def test_devices_without_slices_are_one():
    with pytest.raises(ValueError, match="mesh.slices is 2, but the 8 devices are of 1"):
        meshes.make(2, 4, 1, slices=2)


def test_dimensions_that_do_not_divide_fall_back_to_fewer_axes():
    mesh = meshes.make(1, 2, 4)
    vocab = lambda size: meshes.spec(mesh, "train", ("vocab",), (size,))
    assert vocab(16) == P(("fsdp", "tensor"))
    assert vocab(6) == P(("fsdp",))  # 2 divides it, 8 does not
    assert vocab(7) == P(None)
    assert meshes.spec(meshes.make(1, 4, 2), "train", ("vocab",), (6,)) == P(("tensor",))
    one_each = meshes.make(8, 1, 1)  # fsdp and tensor are axes of one device
    assert meshes.spec(one_each, "train", ("vocab", "embed"), (16, 16)) == P(None, None)


def test_an_axis_is_used_once_in_an_array():
    mesh = meshes.make(1, 2, 4)
    assert meshes.spec(mesh, "train", ("vocab", "embed"), (16, 16)) == P(("fsdp", "tensor"), None)
    assert meshes.spec(mesh, "train", ("embed", "vocab"), (16, 16)) == P(("fsdp",), ("tensor",))
    assert meshes.spec(mesh, "train", ("embed", "heads", None), (16, 4, 8)) == P(("fsdp",), ("tensor",), None)
    with pytest.raises(ValueError):
        meshes.spec(mesh, "train", ("embed",), (16, 4))


def test_the_layouts_of_a_layer():
    """train: embed over fsdp, heads over tensor; gather: fsdp is gathered; decode: heads over both."""
    mesh = meshes.make(2, 2, 2)
    query = lambda layout: meshes.spec(mesh, layout, ("embed", "heads", None), (16, 4, 8))
    assert query("train") == P(("fsdp",), ("tensor",), None)
    assert query("gather") == P(None, ("tensor",), None)
    assert query("decode") == P(None, ("fsdp", "tensor"), None)
    rows = lambda layout: meshes.spec(mesh, layout, ("rows", None), (8, 16))
    assert rows("train") == rows("gather") == P(("data", "fsdp"), None) and rows("decode") == P(("data",), None)


def test_the_layout_table_names_known_axes_and_dimensions():
    named = {d for dims in jax.tree.leaves(model.dims(ARCH), is_leaf=lambda x: isinstance(x, tuple)) for d in dims if d}
    for layout, table in meshes.LAYOUTS.items():
        assert set(table) <= named | {"rows"}, layout
        assert {axis for axes in table.values() for axis in axes} <= set(meshes.AXES), layout
    assert set(meshes.LAYOUTS["train"]) == named | {"rows"}


@pytest.mark.parametrize("layout", meshes.LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 1, 8), (4, 2, 1)])
def test_put_and_get_are_inverse_on_every_sharding(layout, shape):
    mesh = meshes.make(*shape)
    abstract = model.abstract(ARCH)
    rng = np.random.default_rng(0)
    host = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), abstract)
    where = meshes.shardings(mesh, layout, model.dims(ARCH), abstract)
    there = meshes.put(host, where)
    back = meshes.get(there)
    jax.tree.map(np.testing.assert_array_equal, host, back)
    jax.tree.map(lambda a, s: a.sharding == s or pytest.fail(f"{a.sharding} is not {s}"), there, where)
    # What a layout splits is stored once per share of it, not whole on every device.
    table = there["head"]["table"]
    split = int(np.prod([mesh.shape[a] for a in table.sharding.spec[0] or ()]))
    assert table.addressable_shards[0].data.shape[0] == ARCH.vocab // split


def test_put_takes_one_sharding_for_all_and_scalars(eight_devices):
    tree = {"a": np.arange(16).reshape(8, 2), "b": np.arange(8)}
    there = meshes.put(tree, meshes.rows_sharding(eight_devices))
    assert {s.data.shape for s in there["a"].addressable_shards} == {(2, 2)}
    jax.tree.map(np.testing.assert_array_equal, tree, meshes.get(there))
    one = meshes.put(np.int32(7), meshes.replicated(eight_devices))
    assert one.sharding.is_fully_replicated and int(one) == 7
    second = meshes.put(np.zeros((3, 8)), meshes.rows_sharding(eight_devices, axis=1))
    assert second.sharding.spec == P(None, ("data", "fsdp")) and second.addressable_shards[0].data.shape == (3, 2)


def test_put_takes_keys(eight_devices):
    whole = meshes.replicated(eight_devices)
    for key in (jax.random.key(7), jax.random.key(7, impl="rbg")):
        there, beside = meshes.put((key, np.int32(1)), whole)
        assert there.sharding.is_fully_replicated and len(there.sharding.device_set) == 8 and int(beside) == 1
        assert there.dtype == key.dtype and jax.random.bits(there) == jax.random.bits(key)


def test_placement_pins_rows_and_gathered_weights(eight_devices):
    x = np.zeros((8, 4, 16), np.float32)
    w = {"query": np.zeros((16, 4, 8), np.float32), "scale": np.zeros(16, np.float32)}
    dims = {"query": ("embed", "heads", None), "scale": (None,)}
    pins = meshes.placement(eight_devices, "gather")
    got_x, got_w = jax.jit(lambda x, w: (pins.activations(x), pins.weights(w, dims)))(x, w)
    same = lambda a, spec: a.sharding.is_equivalent_to(NamedSharding(eight_devices, spec), a.ndim)
    assert same(got_x, P(("data", "fsdp"), None, None))
    assert same(got_w["query"], P(None, ("tensor",), None)) and same(got_w["scale"], P(None))
    nothing = meshes.Placement()
    assert nothing.activations(x) is x and nothing.weights(w, dims) is w
    table, ids = np.arange(12.0).reshape(4, 3), np.array([[3, 0]])
    np.testing.assert_array_equal(nothing.looked_up(jnp.asarray(table), ids, jnp.float32), table[ids])


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 1, 8)])
@pytest.mark.parametrize("vocab, width", [(96, 384), (90, 40), (97, 256)])
def test_looking_up_in_a_split_table(monkeypatch, shape, vocab, width):
    """Bit for bit table[ids]; the gradient is summed in float32 although 300 copies of an id meet in bfloat16."""
    monkeypatch.setattr(meshes, "SLICE", 128 * vocab)
    mesh = meshes.make(*shape)
    rng = np.random.default_rng(0)
    where = NamedSharding(mesh, meshes.spec(mesh, "train", ("vocab", "embed"), (vocab, width)))
    table = meshes.put(rng.normal(size=(vocab, width)).astype(np.float32), where)
    ids = np.where(rng.random((8, 64)) < 0.6, 3, rng.integers(0, vocab, (8, 64))).astype(np.int32)
    d_out = jnp.asarray(rng.uniform(0.5, 1, (8, 64, width)), jnp.bfloat16)
    by_row = meshes.rows_sharding(mesh)

    @functools.partial(jax.jit, out_shardings=(by_row, where))
    def run(table, ids, d_out):
        out, pull = jax.vjp(lambda t: meshes.placement(mesh, "gather").looked_up(t, ids, jnp.bfloat16), table)
        return out, pull(d_out)[0]

    arguments = table, meshes.put(ids, by_row), meshes.put(d_out, by_row)
    out, d_table = run(*arguments)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(jnp.asarray(table)[ids].astype(jnp.bfloat16)))
    want = np.zeros((vocab, width))
    np.add.at(want, ids, np.asarray(d_out, np.float64))
    by_rows = meshes.axes_that_divide(mesh, ("fsdp", "tensor"), vocab)
    whole = not by_rows and mesh.shape["fsdp"] > 1  # split by columns: gathered whole, and summed in bfloat16
    np.testing.assert_allclose(d_table, want, rtol=3e-2 if whole else 1e-6)
    if by_rows and width % 128 == 0:
        assert f"[{vocab},{width}]" not in run.lower(*arguments).compile().as_text()  # on no device is it whole
