"""What a config needs of a TPU that is not there: FLOPs against closed forms and the compiler, bytes and collectives
against programs whose traffic is known, verdicts and advice. All but the last tests need no libtpu.
"""

import dataclasses
import functools
import gc
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sera_jax import config as configs
from sera_jax import hf, model, preference, programs, reward_model, sample, score, train, tree_kernel, triton_kernel
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax.compile_check import advice, bounds, cases, chips, door, flops, hlo, memory
from sera_jax.compile_check.memory import Compiled, Memory, TooLarge
from sera_jax.model import Arch
from sera_jax.records import Tree
from sera_jax.rows import Plan
from sera_jax.train import world as worlds

ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30


def shape(*dims: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def counted(f, *args, trips: int = 1) -> flops.Flops:
    return flops.count(jax.jit(f).trace(*args).jaxpr, trips)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def test_products_and_convolutions_are_counted_as_the_compiler_counts_them():
    """Without loops and element-wise work both count 2 FLOPs a multiply-add."""
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1,), padding="VALID")
    for f, args in (
        (lambda a, b, c: a @ b @ c, (shape(8, 16), shape(16, 32), shape(32, 4))),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (shape(3, 8, 16), shape(3, 16, 4))),
        (conv, (shape(2, 4, 32), shape(6, 4, 5))),
    ):
        told = jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
        assert counted(f, *args).done == told > 0


def test_loops_branches_devices_kernels_and_recomputation(eight_devices):
    a = shape(8, 8)
    one = 2 * 8**3
    scan = lambda x: jax.lax.scan(lambda y, _: (y @ y, None), x, None, length=5)[0]
    assert counted(scan, a).done == 5 * one
    assert counted(lambda x: jax.lax.fori_loop(0, 7, lambda i, y: y @ y, x), a).done == 7 * one
    turning = lambda x, n: jax.lax.fori_loop(0, n, lambda i, y: scan(y), x)
    assert counted(turning, a, shape(dtype=jnp.int32), trips=3).done == 15 * one
    at_most = lambda x, n: jax.lax.while_loop(
        lambda s: (s[0] < n) & (s[0] < 4), lambda s: (s[0] + 1, scan(s[1])), (0, x)
    )
    assert counted(at_most, a, shape(dtype=jnp.int32), trips=3).done == 20 * one
    either = lambda x, n: jax.lax.while_loop(
        lambda s: (s[0] < n) | jnp.any(s[1][0] < 2), lambda s: (s[0] + 1, scan(s[1])), (0, x)
    )
    assert counted(either, a, shape(dtype=jnp.int32), trips=3).done == 15 * one  # 2 bounds no counter
    branching = lambda x, p: jax.lax.cond(p, lambda y: y @ y @ y, lambda y: y @ y, x)
    assert counted(branching, a, shape(dtype=jnp.bool_)).done == 2 * one
    split = jax.shard_map(
        lambda x: x @ x, mesh=eight_devices, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp"))
    )
    assert counted(split, shape(32, 8)).done == 8 * one  # [8, 8] on each of 4, tensor does the same twice
    kernel = pallas.pallas_call(
        lambda x, y, o: o.__setitem__(..., x[...] @ y[...]),
        grid=(4, 2),
        in_specs=[pallas.BlockSpec((8, 16), lambda i, j: (i, 0)), pallas.BlockSpec((16, 8), lambda i, j: (0, j))],
        out_specs=pallas.BlockSpec((8, 8), lambda i, j: (i, j)),
        out_shape=shape(32, 16),
    )
    assert counted(kernel, shape(32, 16), shape(16, 16)).done == 2 * 32 * 16 * 16
    body = lambda x, w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))
    plain, again = (counted(jax.grad(f, argnums=(0, 1)), a, a).done for f in (body, jax.checkpoint(body)))
    assert plain == 6 * one and again == 8 * one  # both products are needed once more


@pytest.mark.parametrize("dtype, passes", [(jnp.bfloat16, 1), (jnp.float32, 6)])
def test_the_tree_kernels_grid_ends_with_the_data_and_is_counted_to_its_end(dtype, passes):
    """Rows of two blocks have three pairs that are not later. Two products forward; backward, scores and weights'
    gradients again in each of two kernels, then one for queries, two for keys and values."""
    q, k = (shape(2, heads, 1024, 64, dtype=dtype) for heads in (8, 2))
    ids = shape(2, 1024, dtype=jnp.int32)

    def forward(q, k, v, ids):
        return tree_kernel.attend(q, k, v, tree_kernel.blocks(ids, ids, ids, None), scale=1.0)

    def gradients(*args):
        return jax.grad(lambda *x: forward(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(*args)

    product = 2 * 2 * 8 * 3 * 512**2 * 64  # FLOPs, rows, heads, pairs, scores of a pair, head size
    for f, products in ((forward, 2), (gradients, 2 + 3 + 4)):
        got = counted(f, q, k, k, ids)
        assert got.done == products * product and got.issued == passes * got.done


def test_the_loops_of_the_gpu_kernels_are_counted_as_if_every_earlier_key_were_seen():
    q, k = (shape(2, heads, 1024, 64, dtype=jnp.bfloat16) for heads in (8, 2))
    ids = shape(2, 1024, dtype=jnp.int32)

    def forward(q, k, v, ids):
        return triton_kernel.attend(q, k, v, triton_kernel.blocks(ids, ids, ids, None), scale=1.0)

    def gradients(*args):
        return jax.grad(lambda *x: forward(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(*args)

    for f, products in ((forward, 2), (gradients, 2 + 3 + 4)):
        got = counted(f, q, k, k, ids)
        assert got.done == got.issued == products * 2 * 2 * 8 * (1024**2 // 2) * 64


def test_float32_products_cost_several_passes():
    f = lambda p: lambda a, b: jnp.dot(a, b, precision=p)
    a, h = shape(8, 8), shape(8, 8, dtype=jnp.bfloat16)
    issued = lambda p, x: counted(f(p), x, x).issued / counted(f(p), x, x).done
    assert [issued(p, a) for p in ("default", "high", "highest", None)] == [1, 3, 6, 1]
    assert issued("highest", h) == 1
    with programs.precision("float32"):
        assert issued(None, a) == 6


ARCH = Arch("LlamaForCausalLM", 64, 32, 3, 4, 2, 8, 48, 1e-5, 1e4, tied=False)


def tiny_config_of(tiny_config, *flags: str):
    return tiny_config("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--optimizer.row_tokens=0", *flags)


def setting_of(config, mesh, arch: Arch = ARCH, pairs: int = 44) -> cases.Setting:
    return cases.Setting(config, arch, mesh, pairs)


@pytest.mark.parametrize("remat, passes, spared", [("none", 3, 0), ("full", 4, 1)])
@pytest.mark.parametrize("unrolled", [False, True])
def test_an_update_against_the_closed_form(tiny_config, eight_devices, remat, passes, spared, unrolled):
    """Forward, and twice that backward: 6 a parameter and token, with dense attention. The head multiplies four times:
    its backward pass makes the logits again. Recomputation is one more forward pass, but for each layer's last product,
    whose result nobody needs."""
    config = tiny_config_of(tiny_config, f"--model.remat={remat}", "--model.head_chunk=64", "--model.attention=xla")
    setting = setting_of(config, eight_devices, dataclasses.replace(ARCH, unrolled=unrolled))
    case = cases.CASES["update"](setting)
    plan = cases.plan(config, config.optimizer, ARCH, eight_devices)
    assert plan == Plan(length=128, targets=128, slots=2, rows=4, cost=plan.cost) and case.trips == 2
    tokens, layers, heads = plan.rows * plan.length, ARCH.layers, ARCH.heads * ARCH.head_dim
    matrices = flops.matrix_parameters(ARCH)
    assert matrices == 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48
    layer = 2 * matrices * tokens + 4 * heads * plan.length * tokens
    head = 4 * 2 * ARCH.vocab * ARCH.width * plan.rows * plan.targets
    less = spared * layers * 2 * ARCH.mlp * ARCH.width * tokens
    got = flops.count(case.trace().jaxpr, case.trips)
    assert got.done == case.trips * (passes * layers * layer - less + head)


def test_model_flops_are_six_a_parameter_and_token():
    arch = dataclasses.replace(ARCH, layers=2)
    embeddings = 2 * arch.vocab * arch.width
    norms = (2 * arch.layers + 1) * arch.width
    matrices = cases.parameters(arch) - embeddings - norms
    assert flops.matrix_parameters(arch) * arch.layers == matrices
    assert 3 * flops.forward(arch, tokens=100, seen=0, predicted=0) == 6 * matrices * 100
    assert flops.forward(arch, tokens=0, seen=0, predicted=7) == 2 * 7 * arch.vocab * arch.width
    assert flops.forward(arch, tokens=0, seen=[5, 6], predicted=0) == 4 * 4 * 8 * 11


@pytest.mark.parametrize("windows", [(), (3, None), (1, 100)])
def test_keys_that_tokens_see_against_the_mask(windows):
    """Counted off the mask that attention uses."""
    from sera_jax import attention

    tree = Tree("t", np.arange(5), (np.arange(4), np.arange(7)))
    rows = rowlib.pack([tree], Plan(128, 128, 2, 1))
    mask = np.asarray(attention.tree_mask(rows.tree_BL, rows.branch_BL))[0][: tree.length, : tree.length]
    position = rows.position_BL[0][: tree.length]
    arch = dataclasses.replace(ARCH, layers=2, windows=windows)
    expected = [
        int((mask & (position[:, None] - position[None] < (window or 1000))).sum())
        for window in windows or (None, None)
    ]
    assert flops.seen_by(arch, 5, (4, 7)) == expected


# --- bytes and collectives --------------------------------------------------------------------------------------------


def moved(f, *args, trips: int = 1) -> hlo.Moved:
    return hlo.moved(jax.jit(f).lower(*args).compile().as_text(), trips)


@pytest.fixture(scope="module")
def line_of_eight():
    return jax.make_mesh((8,), ("x",))


def test_collectives_of_known_size(line_of_eight):
    """8 devices, 1024 float32 numbers on each: what a device takes in."""
    part = 4096
    spec = {"mesh": line_of_eight, "in_specs": P("x"), "check_vma": False}
    where = jax.ShapeDtypeStruct((8 * 1024,), jnp.float32, sharding=NamedSharding(line_of_eight, P("x")))
    for f, out, expected in (
        (lambda x: jax.lax.all_gather(x, "x", tiled=True), P(), {"all-gather": 7 * part}),
        (lambda x: jax.lax.psum(x, "x"), P(), {"all-reduce": 2 * part * 7 / 8}),
        (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), P("x"), {"reduce-scatter": part * 7 / 8}),
        (lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), P("x"), {"all-to-all": part * 7 / 8}),
        (
            lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
            P("x"),
            {"collective-permute": part},
        ),
    ):
        assert moved(jax.shard_map(f, out_specs=out, **spec), where).links == pytest.approx(expected)

    def looped(x, turns):
        return jax.lax.fori_loop(0, turns, lambda i, y: y + jax.lax.psum(y, "x"), x)

    known = jax.shard_map(lambda x: looped(x, 5), out_specs=P("x"), **spec)
    assert moved(known, where).links["all-reduce"] == pytest.approx(5 * 2 * part * 7 / 8)
    spec["in_specs"] = (P("x"), P())
    unknown = jax.shard_map(looped, out_specs=P("x"), **spec)
    turns = jax.ShapeDtypeStruct((), jnp.int32)
    assert moved(unknown, where, turns, trips=3).links["all-reduce"] == pytest.approx(3 * 2 * part * 7 / 8)


def test_bytes_as_the_compiler_counts_them():
    """Programs without loops: arguments read, result written; slices of a large array count as slices."""
    a = shape(256, 256)
    for f, args in (
        (lambda x: x + 1, (a,)),
        (lambda x, y: x @ y, (a, a)),
        (lambda x: x[3:5] * 2, (shape(1000, 256),)),
        (lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, 2) * 2, (shape(1000, 256), shape(dtype=jnp.int32))),
    ):
        told = jax.jit(f).lower(*args).compile().cost_analysis()["bytes accessed"]
        assert moved(f, *args).hbm == pytest.approx(told, rel=0.01)  # indices count with one, not with the other


def test_what_the_compiler_writes_is_the_program():
    run = lambda x: jax.lax.scan(lambda y, _: (jnp.tanh(y @ y), None), x, None, length=3)[0]
    traced = jax.jit(run).trace(shape(64, 64))
    assert memory.compile_traced(traced).text == ""
    assert hlo.moved(memory.compile_traced(traced, text=True).text) == moved(run, shape(64, 64))


def test_a_loop_moves_what_its_turns_move():
    body = lambda x, _: (jnp.tanh(x @ x), None)
    run = lambda n: moved(lambda x: jax.lax.scan(body, x, None, length=n)[0], shape(64, 64)).hbm
    assert run(9) - run(8) == pytest.approx(run(8) - run(7))
    assert run(9) - run(8) >= 3 * 64 * 64 * 4


def test_a_loop_that_says_how_often_it_turns_at_most():
    def loop(n):
        turn = lambda s: (s[0] + 1, jnp.tanh(s[1] @ s[1]))
        return lambda x, turns: jax.lax.while_loop(lambda s: (s[0] < turns) & (s[0] < n), turn, (0, x))[1]

    run = lambda n: moved(loop(n), shape(64, 64), shape(dtype=jnp.int32), trips=1000).hbm
    assert run(9) - run(8) == pytest.approx(run(8) - run(7))
    assert 3 * 64 * 64 * 4 <= run(9) - run(8) < run(7)


TPU = """\
HloModule jit_update, is_scheduled=true

%elsewhere (e: bf16[16,64]) -> bf16[16,64] {
  ROOT %e = bf16[16,64]{1,0:S(1)} parameter(0)
}, execution_thread="sparsecore"

%condition (p: (s32[], bf16[16,64])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(4), metadata={op_name="x"}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%slices (s: bf16[9,16,64], n: s32[]) -> bf16[16,64] {
  %s = bf16[9,16,64]{2,1,0} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  ROOT %ds = bf16[1,16,64]{2,1,0:S(1)} dynamic-slice(%s, %n, %n, %n), dynamic_slice_sizes={1,16,64}
}

%multiplies (m: bf16[9,16,64], k: s32[]) -> bf16[16,64] {
  %m = bf16[9,16,64]{2,1,0} parameter(0)
  %k = s32[]{:T(128)} parameter(1)
  %layer = bf16[1,16,64]{2,1,0} fusion(%m, %k), kind=kLoop, calls=%slices
  ROOT %product = bf16[16,64]{1,0} convolution(%layer, %layer), dim_labels=bf_io->bf
}

%starts (a: bf16[4,64]) -> (bf16[4,64], bf16[16,64]) {
  %a = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[16,64]{1,0} all-gather(%a), channel_id=6, replica_groups=mesh['d'=2,'f'=4] {'f'}
  ROOT %c = (bf16[4,64]{1,0}, bf16[16,64]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (b: bf16[4,64]) -> bf16[16,64] {
  %b = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,64]{1,0} all-gather(%b), channel_id=6, replica_groups=mesh['d'=2,'f'=4] {'f'}
}

%body (q: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %q = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%q), index=1
  %part = bf16[4,64]{1,0:T(8,128)(2,1)S(1)} slice(%x), slice={[0:4], [0:64]}
  %f1 = (bf16[4,64]{1,0:S(1)}, bf16[16,64]{1,0:S(1)}, s32[2]{0:S(4)}) fusion(%part), kind=kCustom, calls=%starts
  %f2 = bf16[16,64]{1,0:S(1)} fusion(%part), kind=kCustom, calls=%goes_on
  %sum = bf16[16,64]{1,0:S(1)} all-reduce(%f2), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
  %one = (bf16[16,64]{1,0:S(3)}, bf16[16,64]{1,0:S(1)}) collective-permute-start(%sum), channel_id=1
  %two = (bf16[16,64]{1,0:S(3)}, bf16[16,64]{1,0:S(1)}) collective-permute-start(%f2), channel_id=1
  %done = bf16[16,64]{1,0:S(1)} collective-permute-done(%one)
  %kernel = f32[]{:T(128)S(1)} custom-call(%done), custom_call_target="tpu_custom_call", frontend_attributes={kernel={
"block_q = ": 512
}}, metadata={op_name="splash"}, backend_config={"a": 1}
  %out = bf16[16,64]{1,0:T(8,128)(2,1)} add(%done, %x)
  %stacked = bf16[9,16,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%q), index=2
  %weights = bf16[16,64]{1,0:S(1)} fusion(%stacked, %j), kind=kOutput, calls=%multiplies
  %token = token[] after-all()
  %sent = (bf16[16,64]{1,0}, u32[], token[]) send(%out, %token), channel_id=12, is_host_transfer=true
  ROOT %t = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) tuple(%j, %out)
}

ENTRY %main (x0: bf16[16,64]) -> bf16[16,64] {
  %x0 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %first = s32[]{:T(128)} constant(1)
  %state = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) tuple(%first, %x0)
  %while.1 = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) while(%state), condition=%condition, body=%body
  ROOT %r = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""


def test_the_words_of_libtpu():
    """A loop from 1 to 4; an all-gather that goes on in a second fusion under the same channel; groups of 4 written by
    mesh axes and by ranges; two permutes that share a channel; arrays in on-chip memory; a kernel over several lines;
    another thread's computation; layers' weights in one array; a send to the other slice."""
    got = hlo.moved(TPU)
    whole, part = 16 * 64 * 2, 4 * 64 * 2
    assert got.links == {
        "all-gather": 3 * 3 * part,
        "all-reduce": 3 * 2 * whole * 3 / 4,
        "collective-permute": 3 * 2 * whole,
    }
    assert got.network == 3 * whole
    # In HBM are x, which the slice and the sum read, the sum, and stacked weights, of which a fusion in a fusion takes
    # a slice; the rest, and flags, lie on the chip. Counters are scalars.
    assert got.hbm == pytest.approx(3 * (part + 3 * whole), rel=0.02)


@pytest.mark.parametrize(
    "text, count",
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','c'}", 4),
        ("source_target_pairs={{0,1}}", 1),
    ],
)
def test_groups_in_every_spelling(text, count):
    assert hlo.group(f"channel_id=1, {text}, use_global_device_ids=true") == count


def test_a_line_through_two_depths():
    low, high = hlo.Moved(10.0, {"all-gather": 4.0}, 0.0), hlo.Moved(13.0, {"all-gather": 6.0, "all-reduce": 1.0}, 2.0)
    assert hlo.line({1: low, 2: high}, 5) == hlo.Moved(22.0, {"all-gather": 12.0, "all-reduce": 4.0}, 8.0)
    third = hlo.Moved(17.6, {"all-gather": 8.0, "all-reduce": 2.0}, 4.0)
    got, off = bounds.extrapolated({1: low, 2: high, 3: third}.__getitem__, 5)
    assert got.hbm == 22.0 and off == pytest.approx(0.1)
    assert bounds.extrapolated({1: low, 2: high}.__getitem__, 2) == (high, 0.0)


def test_the_bound_is_the_slowest_of_four():
    jaxpr = jax.jit(lambda a: a @ a).trace(shape(8, 8, dtype=jnp.bfloat16)).jaxpr
    chip = chips.Chip(1.0, flops=64.0, hbm_rate=8.0, ici_rate=2.0, dcn_rate=1.0, example="")
    got = bounds.bound(jaxpr, 1, 512.0, hlo.Moved(16.0, {"all-gather": 1.0, "all-reduce": 5.0}, 2.5), None, 4, chip)
    assert got.seconds == {"compute": 4.0, "hbm": 2.0, "links": 3.0, "network": 2.5}
    assert (got.step, got.binds) == (4.0, "compute")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message, needed, available",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (19.94G) exceeds available HBM (15.75G). HLO module: jit_update.",
            19.94,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for arguments (512.00M) exceeds "
            "available HBM (0.25G)",
            0.5,
            0.25,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.30G of 15.75G hbm. Exceeded", 23.3, 15.75),
    ],
)
def test_figures_of_a_refusal(message, needed, available):
    got = memory.read_refusal(message)
    assert (got.needed / GIB, got.available / GIB) == pytest.approx((needed, available)) and got.told == message


def test_other_failures_are_no_refusals():
    assert memory.read_refusal("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem (scoped)") is None
    assert memory.read_refusal("INTERNAL: Used 23.30G of 15.75G hbm") is None


def test_what_arrays_hold_on_a_chip(eight_devices):
    put = lambda spec, *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(
        dims, dtype, sharding=NamedSharding(eight_devices, spec)
    )
    tree = {
        "a": put(P(("data", "fsdp")), 8, 3),
        "b": put(P(), 5, dtype=jnp.bfloat16),
        "key": programs.abstract_key(eight_devices),
    }
    assert memory.held(tree) == 2 * 3 * 4 + 5 * 2


def test_memory_of_a_program_and_its_parts(eight_devices, tiny_config):
    """On CPU devices: donated state is no output; parts add up to what is needed."""
    setting = setting_of(tiny_config_of(tiny_config), eight_devices)
    case = cases.CASES["update"](setting)
    done = memory.compile_traced(case.trace())
    used = done.memory
    assert used.aliased >= case.holds["weights"] + case.holds["optimiser"]
    assert used.arguments >= sum(case.holds.values())
    parts = door.parts(case, used)
    sum_of = used.arguments + used.outputs - used.aliased + used.temporaries + used.code
    assert sum(parts.values()) == sum_of <= used.total
    assert parts["gradients"] == parts["weights"] == case.holds["optimiser"] // 2 - case.holds["optimiser"] % 8 // 2


@pytest.mark.parametrize("slots", [16, 8])
def test_decode_takes_as_many_steps_as_tokens(one_device, tiny_config, slots):
    """Each of them multiplies every slot with every matrix and the head, in all as often as its responses have tokens
    behind the first; what the cache adds is less than the rest."""
    flags = ("--bootstrap.candidates=4", f"--bootstrap.slots={slots}", "--bootstrap.max_new_tokens=10")
    setting = setting_of(tiny_config("--mesh.fsdp=1", *flags), one_device)
    case = cases.CASES["decode"](setting)
    least = 2 * (flops.matrix_parameters(ARCH) * ARCH.layers + ARCH.vocab * ARCH.width) * slots * case.trips
    assert case.trips == 9 and least <= flops.count(case.trace().jaxpr, case.trips).done < 2 * least


def test_a_mixture_decodes_with_two_models(one_device, tiny_config):
    """Both models' weights and caches are counted, and are arguments of the program."""
    holds, taken = {}, {}
    for mixture in ("0", "0.5"):
        setting = setting_of(tiny_config(f"--bootstrap.mixture={mixture}"), one_device)
        case = cases.CASES["decode"](setting)
        holds[mixture] = case.holds
        taken[mixture] = len(case.trace().jaxpr.in_avals)
    assert holds["0.5"] == holds["0"] | {
        "weights of the second model": holds["0"]["weights"],
        "its cache": holds["0"]["cache"],
    }
    # Weights, both caches, lengths and logits of the second model, and α.
    assert taken["0.5"] - taken["0"] == len(jax.tree.leaves(model.abstract(ARCH))) + 2 + 2 + 1


# --- programs of a config ---------------------------------------------------------------------------------------------


def test_the_programs_that_a_config_runs(tiny_config):
    names = lambda *flags: cases.names(tiny_config(*flags))
    every = ["update", "scorer", "selection", "to decode layout", "prefill", "decode"]
    assert names() == every
    assert names("--sft.epochs=1") == ["sft update", *every]
    assert names("--bootstrap.fresh=0") == every[:3]
    assert names("--loop.iterations=1") == every[:2]
    assert set(names("--loop.iterations=1", "--sft.epochs=1")) <= set(cases.CASES) and set(cases.LAYERED) < set(
        cases.CASES
    )


FUNCTION = ("--reward.source=function", "--reward.function=tiny_reward:count")
RLOO = (*FUNCTION, "--on_policy.algorithm=policy_gradient")
PPO = (*RLOO, "--on_policy.kl=loss", "--on_policy.passes=2")
RAFT = (*FUNCTION, "--on_policy.algorithm=raft", "--on_policy.beta=0")


@pytest.fixture
def reward_folder(tiny, tmp_path):
    """config.json of a reward model of five layers."""
    told = json.loads((tiny / "model" / "config.json").read_text())
    told |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}, "num_hidden_layers": 5}
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text(json.dumps(told))
    return tmp_path / "judge"


def test_the_programs_of_rounds_of_rankers_and_of_uncertainty(tiny_config, reward_folder):
    names = lambda *flags: cases.names(tiny_config(*flags))
    sampled = ["to decode layout", "prefill", "decode"]
    assert names(*PPO) == names(*RLOO) == ["update", "scorer", *sampled]
    assert names(*RAFT) == ["update", *sampled]
    judged = ("--reward.source=model", f"--reward.model={reward_folder}")
    assert names(*judged) == ["update", "scorer", "ranker", "selection", *sampled]
    assert names(*RLOO, *judged) == ["update", "scorer", "ranker", *sampled]
    assert "ranker" not in names(*judged, "--bootstrap.fresh=0")
    explored = names("--bootstrap.pair_rule=explore")
    gamma = ["features", "covariance", "covariance factor", "covariance norms"]
    assert explored == ["update", "scorer", *gamma, "selection", *sampled]
    assert "features" in names("--loss.name=dpo_pessimistic", "--bootstrap.fresh=0")


@pytest.mark.parametrize("flags, branches", [(RLOO, 4), (PPO, 4), (RAFT, 1)])
def test_rounds_are_traced_with_what_a_round_passes(eight_devices, tiny_config, flags, branches):
    """A batch is prompts with all their candidates, or the best, and what is known of each token."""
    config = tiny_config_of(tiny_config, *flags, "--data.max_prompt_length=32", "--bootstrap.max_new_tokens=20")
    assert cases.lengths(config).tolist() == [[32 + branches * 20, branches * 20, branches]]
    setting = setting_of(config, eight_devices)
    for name in {"update", "scorer"} & set(cases.names(config)):
        case = cases.CASES[name](setting)
        assert isinstance(memory.compile_traced(case.trace()), memory.Compiled) and case.useful > 0
    plan = cases.plan(config, config.optimizer, setting.arch, eight_devices)
    batch = programs.abstract_batch(eight_devices, plan, 2, worlds.token_names(config))
    assert set(batch.tokens) == {RLOO: {"old"}, PPO: {"old", "reference"}, RAFT: set()}[flags]
    assert all(known.shape == batch.rows.slot_BM.shape for known in batch.tokens.values())


@pytest.fixture
def watched(monkeypatch):
    """watched(arch, *names) → {name: the most embedding tables that are alive when what `programs.<name>` builds is
    called}, {name: its first arguments as ShapeDtypeStructs}, both filled as a run on one device goes on."""

    def watch(arch: Arch, *names: str) -> tuple[dict, dict]:
        table = model.abstract(arch)["embed"]["table"].shape
        # Buffers, since a save in the background holds further arrays of the same ones.
        alive = lambda: len({a.unsafe_buffer_pointer() for a in jax.live_arrays() if a.shape == table})
        gc.collect()
        before, most, first = alive(), {}, {}
        for name in names:
            one(name, alive, before, most, first)
        return most, first

    def one(name, alive, before, most, first):
        build = getattr(programs, name)

        def building(*args, **keywords):
            program = build(*args, **keywords)

            def counted(*a, **k):
                gc.collect()
                most[name] = max(most.get(name, 0), alive() - before)
                shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                if name not in first:
                    first[name] = jax.tree.map(shape, a)
                return program(*a, **k)

            return counted

        monkeypatch.setattr(programs, name, building)

    return watch


@pytest.mark.parametrize("flags, models", [(("--on_policy.beta=0",), 3), (("--on_policy.beta=0.1",), 4)])
def test_rounds_hold_what_a_run_holds(tiny_config, one_device, watched, flags, models):
    """The policy, its two moments also while it samples, and the reference where there is a KL: embedding tables that
    are alive when a real run calls its programs."""
    config = tiny_config(*RLOO, *flags, "--on_policy.rounds=2", "--on_policy.prompts=8", "--loop.iterations=1")
    setting = setting_of(config, one_device, cases.arch_of(config))
    most, _ = watched(setting.arch, "policy_update", "decoder")
    train.train(config)
    assert most == {"policy_update": models, "decoder": models + 1}  # and the copy in the decode layout
    one = memory.held(programs.abstract_params(setting.arch, one_device))
    for name, program in (("update", "policy_update"), ("decode", "decoder")):
        case = cases.CASES[name](setting)
        told = sum(case.holds.get(kind, 0) for kind in ("weights", "optimiser")) + sum(case.beside.values())
        assert round(told / one, 2) == most[program]


def test_a_ranker_is_held_beside_the_policy(eight_devices, tiny_config, reward_folder):
    """Its own architecture, in the compute dtype."""
    flags = ("--reward.source=model", f"--reward.model={reward_folder}", "--model.compute=bfloat16")
    setting = setting_of(tiny_config_of(tiny_config, *flags), eight_devices)
    case = cases.CASES["ranker"](setting)
    judge = hf.read_reward_arch(reward_folder)
    assert judge.layers == 5 != setting.arch.layers
    assert door.extrapolated(setting, "ranker") == {}  # its layers are not those of the policy
    half = memory.held(programs.abstract_params(judge, eight_devices, dtype=jnp.bfloat16))
    assert case.holds["weights"] == half
    assert case.beside["the policy"] == memory.held(programs.abstract_params(setting.arch, eight_devices))
    assert isinstance(memory.compile_traced(case.trace()), memory.Compiled)


@pytest.mark.parametrize("kind, longest", [("preference", [97, 2, 2]), ("preference_head", [191, 190, 2])])
def test_preference_models_rank_by_their_own_questions(eight_devices, tiny, tiny_config, reward_folder, kind, longest):
    """Of the length in their config.json, and without logits where they have a scalar head."""
    head = kind == "preference_head"
    folder = reward_folder if head else reward_folder.parent / "label"
    folder.mkdir(exist_ok=True)
    told = json.loads(((reward_folder if head else tiny / "model") / "config.json").read_text())
    form = preference.Form(head, ("red", "blue"), max_length=96, max_prompt_length=48)
    (folder / "config.json").write_text(json.dumps(told | preference.told(form)))
    setting = setting_of(
        tiny_config_of(tiny_config, "--reward.source=preference", f"--reward.model={folder}"), eight_devices
    )
    case, arch = cases.CASES["ranker"](setting), hf.read_any_arch(folder)
    assert preference.longest(form)[1] == longest
    plan = score.plan_of(np.repeat([longest], score.CHUNK, axis=0), arch, eight_devices)
    assert f"{plan.rows} rows × {plan.length} tokens" in case.what
    length, targets, _ = longest
    seen = flops.seen_by(arch, length - targets, (targets // 2,) * 2)
    one = flops.forward(arch, tokens=length, seen=seen, predicted=0 if head else targets)
    assert case.useful == plan.rows * (plan.length // length) * one
    assert isinstance(memory.compile_traced(case.trace()), memory.Compiled)


def test_uncertainty_holds_its_covariance(eight_devices, tiny_config):
    """Split over fsdp × tensor while it grows, whole where it is a factor; 1024 vectors at once over data × fsdp."""
    flags = ("--bootstrap.pair_rule=explore", "--explore.dimension=8")
    setting = setting_of(tiny_config_of(tiny_config, *flags), eight_devices)
    made = {name: cases.CASES[name](setting) for name in cases.names(setting.config) if "covariance" in name}
    done = {name: memory.compile_traced(case.trace()) for name, case in made.items()}
    whole, block = 4 * 8 * 8, 4 * 1024 * 8 // 4
    assert {name: case.holds for name, case in made.items()} == {
        "covariance": {"covariance": whole // 4, "batch": block},
        "covariance factor": {"covariance": whole // 4},
        "covariance norms": {"covariance": whole, "batch": block},
    }
    assert done["covariance"].memory.aliased == whole // 4 and done["covariance factor"].memory.outputs >= whole
    assert all(case.beside["the policy"] for case in made.values())
    features = cases.CASES["features"](setting)
    assert isinstance(memory.compile_traced(features.trace()), memory.Compiled)
    scorer = cases.CASES["scorer"](setting)
    logits = scorer.useful - features.useful  # which features need not
    assert features.what == scorer.what and logits % (2 * setting.arch.vocab * setting.arch.width) == 0 < logits
    assert not setting.arch.tied  # so that iterate 0 has a head, alive but unread
    assert features.holds["weights"] + features.beside["its head"] == scorer.holds["weights"]
    wide = dataclasses.replace(setting, arch=dataclasses.replace(setting.arch, vocab=4 * setting.arch.vocab))
    more = cases.CASES["features"](wide)
    read = [memory.compile_traced(case.trace()).memory.arguments for case in (features, more)]
    assert read[1] - read[0] == more.holds["weights"] - features.holds["weights"] > 0  # of the embedding alone


REWARD_KINDS = {
    "bradley_terry": (),
    "bradley_terry, adapters": ("--lora.rank=2",),
    "preference": ("--kind=preference", "--preference.labels=[red,blue]"),
    "preference_head": ("--kind=preference_head",),
}


@pytest.fixture
def rewarding(tiny, tiny_config, tmp_path):
    """flags → RewardModelConfig of a small run (tiny_config: meshes of the devices that are asked for)."""

    def make(*flags: str):
        base = [f"--run.dir={tmp_path}/rewarding", "--run.compilation_cache=off", f"--model.path={tiny}/model"]
        base += ["--model.weights=random", f"--data.pairs=[{tiny}/pairs.jsonl]", "--data.max_length=64"]
        base += ["--data.max_prompt_length=40", "--optimizer.batch_size=8", "--mesh.fsdp=1"]
        return configs.parse(configs.RewardModelConfig, [*base, *flags])

    return make


@pytest.mark.parametrize("kind", REWARD_KINDS)
def test_the_training_of_a_reward_model(eight_devices, rewarding, kind):
    """An update, and what measures on held-out pairs: each compiles, and no scalar head makes logits."""
    split = ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--optimizer.row_tokens=0")
    config = rewarding(*REWARD_KINDS[kind], *split, "--data.validation=0.2")
    assert cases.names(rewarding(*REWARD_KINDS[kind])) == ["reward update"]
    assert cases.names(config) == ["reward update", "held-out scorer"]
    setting = setting_of(config, eight_devices, cases.arch_of(config))
    assert setting.arch.scored == (kind != "preference")
    made = {name: cases.CASES[name](setting) for name in cases.names(config)}
    for case in made.values():
        assert isinstance(memory.compile_traced(case.trace()), memory.Compiled)
    trained = [[64, 1, 1]] if kind == "preference" else [[127, 126, 2]]
    assert cases.lengths(config).tolist() == trained
    ((length, targets, count),) = trained
    seen = flops.seen_by(setting.arch, length - targets, (targets // count,) * count)
    one = flops.forward(setting.arch, tokens=length, seen=seen, predicted=kind == "preference")
    assert made["reward update"].useful == (2 if setting.arch.lora else 3) * 8 * one
    state = programs.abstract_state(setting.arch, eight_devices, worlds.adam(config.optimizer, setting.arch), "device")
    assert made["held-out scorer"].beside == {"moments": memory.held(state.moments)}


@pytest.mark.parametrize("kind, update, scorer", [
    ("bradley_terry", "reward_update", "reward_scorer"),
    ("bradley_terry, adapters", "reward_update", "reward_scorer"),
    ("preference", "sft_update", "scorer"),
])  # fmt: skip
def test_a_reward_models_training_holds_what_is_told(rewarding, one_device, monkeypatch, watched, kind, update, scorer):
    """Its programs are called with the abstract arguments, and nothing of a model's size is alive beside what the cases
    tell; with adapters one table is, the frozen one."""
    config = rewarding(*REWARD_KINDS[kind], "--data.validation=0.2", "--validate_every=2", "--run.save_every=99")
    setting = setting_of(config, one_device, cases.arch_of(config))
    if scorer == "reward_scorer":
        for name in ("bradley_terry", "preference_head"):
            of = dataclasses.replace(reward_model.KINDS[name], scorer=lambda *a: programs.reward_scorer(*a))
            monkeypatch.setitem(reward_model.KINDS, name, of)
    else:
        of = dataclasses.replace(reward_model.KINDS[kind], scorer=lambda *a: programs.scorer(*a))
        monkeypatch.setitem(reward_model.KINDS, kind, of)
    told = {name: cases.CASES[name](setting) for name in cases.names(config)}
    transform = worlds.adam(config.optimizer, setting.arch)
    state = programs.abstract_state(setting.arch, one_device, transform, "device")
    frozen = programs.abstract_frozen(setting.arch, one_device, setting.compute.dtype)
    most, first = watched(setting.arch, update, scorer)
    reward_model.train(config)
    same((state, frozen), first[update][:2])
    same(cases._policy(setting), first[scorer][0])
    plan = cases.plan(config, config.optimizer, setting.arch, one_device)
    batch = programs.abstract_batch(one_device, plan, 1)
    kinds = lambda tree: jax.tree.map(lambda a: (a.dtype, len(a.shape)), tree)
    assert kinds(batch) == kinds(first[update][2])
    one = memory.held(programs.abstract_params(setting.arch, one_device))
    for name, program in (("reward update", update), ("held-out scorer", scorer)):
        case = told[name]
        held = sum(case.holds.get(part, 0) for part in ("weights", "optimiser")) + sum(case.beside.values())
        assert most[program] == (1 if setting.arch.lora else 3) == (1 if setting.arch.lora else round(held / one, 2))


def test_the_longest_trees(tiny_config):
    """prompt + response ≤ max_length on both sides; fresh pairs may be longer."""
    config = tiny_config("--data.max_length=64", "--data.max_prompt_length=32", "--bootstrap.max_new_tokens=60")
    assert cases.lengths(config).tolist() == [[127, 126, 2], [152, 120, 2]]
    assert cases.scored(config).tolist() == [32 + 4 * 60, 240, 4]
    without = tiny_config("--bootstrap.fresh=0", "--data.max_length=64", "--data.max_prompt_length=32")
    assert cases.lengths(without).tolist() == [[127, 126, 2]] and cases.scored(without).tolist() == [127, 126, 2]


def same(abstract, concrete) -> None:
    """Shape, dtype and sharding, leaf by leaf."""
    told, got = jax.tree.flatten(abstract), jax.tree.flatten(concrete)
    assert told[1] == got[1]
    for a, c in zip(told[0], got[0]):
        assert (a.shape, a.dtype) == (c.shape, c.dtype)
        assert a.sharding.is_equivalent_to(c.sharding, len(a.shape)), (a, c.sharding)


def test_abstract_arguments_are_what_a_run_passes(eight_devices):
    """Made from a batch, prompts and numbers as the walk makes them."""
    mesh, plan = eight_devices, Plan(128, 128, 2, 4)
    trees = [Tree(str(i), np.arange(3), (np.arange(2), np.arange(4))) for i in range(4)]
    rows, _ = rowlib.microbatches(rowlib.pack(trees, plan), plan, 2)
    first = jax.tree.map(lambda a: a[0], rows)
    same(programs.abstract_rows(mesh, plan), meshes.put(first, meshes.rows_sharding(mesh)))
    batch = programs.abstract_batch(mesh, plan, 2)
    same(batch.rows, meshes.put(rows, programs.batch_shardings(mesh).rows))
    tokens, length, hashes = np.zeros((2, 32), np.int32), np.ones(2, np.int32), np.zeros((2, 2), np.uint32)
    placed = tuple(meshes.put(a, programs.by_prompt(mesh, a.shape)) for a in (tokens, length, hashes))
    same(programs.abstract_prompts(mesh, 2, 32), placed)
    values = sample.sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, eos_ids=(2,))
    same(programs.abstract_sampling(mesh), meshes.put(values, meshes.replicated(mesh)))
    same(programs.abstract_key(mesh), jax.device_put(sample.seeded(0), meshes.replicated(mesh)))
    params = programs.random_params(ARCH, mesh)(jax.random.key(0))
    same(programs.abstract_params(ARCH, mesh), params)
    same(
        programs.abstract_params(ARCH, mesh, "decode", jnp.bfloat16),
        programs.to_decode(ARCH, mesh, jnp.dtype("bfloat16"))(params),
    )


def test_a_written_out_model_says_the_same():
    """And recomputes as the loop does; without the guard the compiler would merge both passes over a layer."""
    key, rows = (
        jax.random.key(0),
        rowlib.pack([Tree("t", np.arange(5), (np.arange(4), np.arange(7)))], Plan(128, 128, 2, 1)),
    )
    params, mesh = model.init(ARCH, key), meshes.make(1, 1, 1, jax.devices()[:1])
    products = {}
    for unrolled in (False, True):
        arch = dataclasses.replace(ARCH, unrolled=unrolled)

        def loss(p, arch=arch):
            logps, _ = score.row_logps(arch, p, rows, mesh=mesh, dtype=jnp.float32, remat="full")
            return jnp.sum(logps)

        run = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        products[unrolled] = run(params), len(re.findall(r" dot\(|\bdot_general|custom-call", run.as_text()))
    (value, grads), (other, others) = products[False][0], products[True][0]
    np.testing.assert_allclose(value, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, others)
    assert products[True][1] > 2 * products[False][1]


MODELS = {
    "tinyllama-1.1b": 1_100_048_384,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "phi-2": 2_779_683_840,
    "mistral-7b": 7_241_732_096,
    "llama-3-8b": 8_030_261_248,
}


def test_published_models_have_the_published_number_of_parameters():
    """As their model cards and checkpoints have it."""
    folder = ROOT / "configs" / "models"
    assert {path.name for path in folder.iterdir()} == set(MODELS)
    for name, size in MODELS.items():
        assert cases.parameters(hf.read_arch(folder / name)) == size, name


# --- the verdict ------------------------------------------------------------------------------------------------------


def fit(name: str, needed: float, *, compiled: bool = True, beside: float = 0.0) -> door.Fit:
    """Of a chip with 10 GiB."""
    case = cases.Case(name, "", lambda: None, {}, {"the policy": round(beside * GIB)} if beside else {}, 0, 1, 0.0)
    used = Memory(round(needed * GIB), 0, 0, 0, 0, 0)
    done = Compiled(None, used, "", 1.0) if compiled else TooLarge(round(needed * GIB), 10 * GIB, "RESOURCE_EXHAUSTED")
    parts = {"weights": round(needed * GIB), **case.beside}
    return door.Fit(case, done, round((needed + beside) * GIB), 10 * GIB, parts)


def found(setting, fits: dict, nearest: dict | None = None) -> door.Found:
    where = chips.Slice("v5e:2x2", 1, chips.CHIPS["v5e"], tuple(setting.mesh.devices.flat), 10 * GIB)
    return door.Found(setting, where, fits, {}, nearest or {})


@pytest.fixture
def setting(eight_devices, tiny_config):
    return setting_of(tiny_config_of(tiny_config), eight_devices)


def test_verdict(setting, capsys):
    fits = {"update": fit("update", 8.0), "scorer": fit("scorer", 5.0, beside=3.5)}
    got = found(setting, fits)
    assert got.fit and door.verdict(got) == ["FITS: scorer needs 8.50 of 10.00 GiB a chip, 15 % to spare"]
    fits |= {"decode": fit("decode", 7.0, beside=4.0), "update": fit("update", 12.0, compiled=False)}
    got = found(
        setting, fits, {"update": [("optimizer.microbatch_rows", 2), ("optimizer.microbatch_rows", 1)], "decode": None}
    )
    assert not got.fit and not got.fits["decode"].fits
    assert door.verdict(got) == [
        "DOES NOT FIT: update needs 12.00 of 10.00 GiB a chip, 20 % too much (too large: update, decode)",
        "nearest change with which update fits: --optimizer.microbatch_rows 1",
        "no change of rows, recomputation, mesh, moments or slots was found with which decode fits: "
        "take more chips, or larger ones",
    ]
    door.show(got)
    told = json.loads(json.dumps(door.report(got)))
    assert told["fits"] is False and told["programs"]["update"]["refused"] == "RESOURCE_EXHAUSTED"
    assert told["programs"]["update"]["nearest"] == {"optimizer.microbatch_rows": 1}
    assert told["programs"]["scorer"]["memory"]["arguments"] == 5 * GIB
    lines = capsys.readouterr().out.splitlines()
    assert any(re.search(r"decode .*4\.00 .*11\.00 .*-10 %.*DOES NOT FIT", line) for line in lines)


def test_changes_are_tried_from_the_cheapest_on(eight_devices, tiny_config):
    config = tiny_config_of(
        tiny_config, "--optimizer.microbatch_rows=4", "--model.remat=dots", "--model.head_chunk=256"
    )
    setting = setting_of(config, eight_devices)
    told = [step for step in advice.steps(setting, "update")]
    one_copy = [("mesh.data", 1), ("mesh.fsdp", -1), ("mesh.tensor", 1)]
    assert told == [
        [("optimizer.microbatch_rows", 2)],
        [("optimizer.microbatch_rows", 1)],
        [("model.remat", "full")],
        one_copy,
        [("optimizer.moments", "host")],
        [("model.remat", "host")],
        [("model.head_chunk", 128)],
        [("model.head_chunk", 64)],
        [*one_copy[:2], ("mesh.tensor", 2)],
    ]
    tried = []

    def third(changes):
        tried.append(advice.flags(changes))
        return len(tried) == 3

    assert advice.nearest(setting, "update", third) == sum(told[:3], [])
    assert tried == [
        "--optimizer.microbatch_rows 2",
        "--optimizer.microbatch_rows 1",
        "--optimizer.microbatch_rows 1 --model.remat full",
    ]
    assert advice.nearest(setting, "selection", third) is None
    assert list(advice.steps(setting, "ranker")) == [one_copy]
    assert list(advice.steps(setting, "features")) == [one_copy, told[-1]]
    assert list(advice.steps(setting, "held-out scorer")) == [one_copy, *told[-3:]]
    assert list(advice.steps(setting, "reward update")) == told
    slots = [value for step in advice.steps(setting, "decode") for key, value in step if key == "bootstrap.slots"]
    assert slots == [8, 4]  # of 16, and C = 4
    changed = advice.changed(config, told[2] + told[3])
    assert (changed.model.remat, changed.mesh.data, changed.loss) == ("full", 1, config.loss)


def test_a_program_is_tried_again_with_the_changes(eight_devices, tiny_config):
    """On CPU devices, where 4 rows a device need a byte more than there is."""
    config = tiny_config_of(tiny_config, "--optimizer.microbatch_rows=4", "--model.head_chunk=16")
    setting = setting_of(config, eight_devices)
    where = chips.Slice("v5e:2x4", 1, chips.CHIPS["v5e"], tuple(eight_devices.devices.flat), 10 * GIB)
    fit = door.fitted(setting, "update", where)
    assert fit.fits
    where = dataclasses.replace(where, available=fit.used - 1)
    assert door.remedy(setting, "update", where) == [("optimizer.microbatch_rows", 2)]


# --- the door ---------------------------------------------------------------------------------------------------------


def error_of(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        door.main(list(args))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_errors(tiny, capsys, monkeypatch):
    model_path = f"--model.path={tiny}/model"
    told = error_of(capsys, model_path, "--topology=v9:2x2")
    assert "topology is 'v9:2x2', expected a generation out of v4, v5e, v5p, v6e and the chips along each axis" in told
    assert "v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:4x4" in told
    assert "topology is 'v5e:4', expected" in error_of(capsys, model_path, "--topology=v5e:4")
    assert "topology" in error_of(capsys, model_path)
    assert "pairs is 0, expected at least 1" in error_of(capsys, model_path, "--topology=v5e:2x2", "--pairs=0")
    assert "config.json is missing" in error_of(capsys, "--model.path=nowhere", "--topology=v5e:2x2")
    assert "loss.beta is 0.0, expected" in error_of(capsys, model_path, "--topology=v5e:2x2", "--loss.beta=0")
    told = error_of(capsys, "reward_model", model_path, "--topology=v5e:2x2", "--reward_loss.center=-1")
    assert "reward_loss.center is -1.0, expected" in told
    assert "reward_loss" in error_of(capsys, model_path, "--topology=v5e:2x2", "--reward_loss.center=0.01")
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    told = error_of(capsys, model_path, "--topology=v5e:2x2")
    assert "topology v5e:2x2 needs the package libtpu" in told and "pip install 'sera_jax[tpu]'" in told


def test_a_program_that_is_not_run_cannot_be_asked_for(setting):
    own = door.CompileCheckConfig("v5e:2x2", only=("updates",))
    with pytest.raises(
        ValueError, match=r"only names 'updates', expected programs that this config runs: update, scorer,"
    ):
        door.chosen(setting, own)
    assert door.chosen(setting, dataclasses.replace(own, only=("decode", "update"))) == ["update", "decode"]


needs_libtpu = pytest.mark.skipif(
    chips.importlib.util.find_spec("libtpu") is None,
    reason="compiles for TPUs: needs libtpu (pip install 'sera_jax[tpu]')",
)


@needs_libtpu
def test_shapes_that_libtpu_does_not_take():
    chips.quiet()
    with pytest.raises(ValueError, match=r"topology 'v5e:3x3' is none that libtpu knows: .*Expected chips along each"):
        chips.find("v5e:3x3")


@needs_libtpu
def test_what_lies_in_the_hosts_memory_is_none_of_the_chips():
    """16 MiB there are brought over and added to 16 MiB here: 32 MiB are held, not the 48 of the compiler's peak."""
    chips.quiet()
    here = NamedSharding(Mesh(np.array(chips.find("v5e:2x2").devices), ("x",)), P())
    one, other = (
        jax.ShapeDtypeStruct((1 << 22,), jnp.float32, sharding=here.with_memory_kind(kind))
        for kind in ("pinned_host", "device")
    )
    done = memory.compile_traced(jax.jit(lambda m, g: jnp.sum(jax.device_put(m, here) * g)).trace(one, other))
    assert done.executable.memory_analysis().peak_memory_in_bytes >= 48 * 2**20
    assert memory.held(one) == 0 and 32 * 2**20 <= done.memory.total < 34 * 2**20


@needs_libtpu
def test_what_a_chip_lets_a_program_have():
    """Of what is sold as 32, 16, 95 and 32 GB; a device is a chip."""
    chips.quiet()
    found = {name: chips.find(name) for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")}
    assert {len(one.devices) for one in found.values()} == {4}
    for one in found.values():
        assert 0.93 * one.chip.hbm < one.available < 1.1 * one.chip.hbm


@needs_libtpu
@pytest.mark.slow
def test_a_config_for_a_tpu(tiny, tmp_path, capsys):
    """From the command line to JSON: fits; and with rows that no chip holds it does not."""
    flags = [f"--model.path={tiny}/model", "--topology=v5e:2x2", f"--json={tmp_path}/told.json"]
    small = ["--data.max_length=64", "--data.max_prompt_length=32", "--optimizer.batch_size=8", "--traffic=loops"]
    small += ["--bootstrap.max_new_tokens=16", "--bootstrap.slots=8", "--pairs=100", "--model.attention=xla"]
    with pytest.raises(SystemExit) as stopped:
        door.main([*flags, *small])
    assert stopped.value.code == 0 and "FITS: " in capsys.readouterr().out
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["fits"] and told["chips"] == 4 and told["available"] / GIB == pytest.approx(15.75, abs=0.1)
    assert list(told["programs"]) == ["update", "scorer", "selection", "to decode layout", "prefill", "decode"]
    update = told["programs"]["update"]
    assert update["memory"]["aliased"] > 0 and update["bound"]["moved"]["hbm"] > 0 and update["bound"]["step"] > 0
    wide = ["--data.max_length=16384", "--optimizer.batch_size=4", "--optimizer.microbatch_rows=2", "--only=[update]"]
    with pytest.raises(SystemExit) as stopped:
        door.main([*flags, *wide, "--traffic=none", "--search=false", "--model.attention=xla", "--bootstrap.fresh=0"])
    assert stopped.value.code == 1 and "DOES NOT FIT: update needs" in capsys.readouterr().out
    refused = json.loads((tmp_path / "told.json").read_text())["programs"]["update"]
    assert refused["needed"] > told["available"] and "RESOURCE_EXHAUSTED" in refused["refused"]


@needs_libtpu
@pytest.mark.slow
def test_a_reward_models_config_for_a_tpu(tiny, tmp_path):
    flags = [f"--model.path={tiny}/model", "--topology=v5e:2x2", f"--json={tmp_path}/told.json", "--traffic=loops"]
    small = ["--data.max_length=64", "--data.max_prompt_length=32", "--optimizer.batch_size=8", "--model.attention=xla"]
    with pytest.raises(SystemExit) as stopped:
        door.main(["reward_model", "--config", str(ROOT / "configs/reward_hh.yaml"), *flags, *small])
    told = json.loads((tmp_path / "told.json").read_text())
    assert stopped.value.code == 0 and list(told["programs"]) == ["reward update", "held-out scorer"]
    assert all(one["fits"] and one["bound"]["step"] > 0 for one in told["programs"].values())
