"""Which block pairs the GPU kernels compute, what is not read, that they lower for CUDA, and what the code that Triton
is given computes. That they are the dense form when interpreted, on any mesh, is held in test_attention.py."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib.mlir import ir
from jax._src.pallas.triton import lowering as triton_lowering

from sera_jax import attention, triton_kernel


def drawn_rows(rng, count: int, length: int):
    """(tree, branch, position): a prompt and two branches a tree, of 1 to 69 tokens each, positions in no order,
    padding at the end."""
    ends = rng.integers(1, 70, (count, length)).cumsum(1)
    part = np.stack([np.searchsorted(end, np.arange(length), side="right") for end in ends])
    tree, branch = np.where(np.arange(length) < 0.9 * length, (1 + part // 3, part % 3), 0).astype(np.int32)
    return tree, branch, rng.integers(0, 200, (count, length)).astype(np.int32)


def mask_of(tree, branch, position, window: int | None) -> jax.Array:
    return attention.within(attention.tree_mask(*map(jnp.asarray, (tree, branch))), position, position, window)


def test_the_lists_are_the_blocks_in_which_some_query_sees_some_key():
    """Of every size, in order, also where the row ends inside a block."""
    rng = np.random.default_rng(0)
    blocks = jax.jit(triton_kernel.blocks)
    shares = []
    for window in (1000, 5, 90):  # no two tokens are 1000 positions apart
        for ids in (drawn_rows(rng, 3, 608), [np.zeros((3, 608), int)] * 3):
            got = blocks(*ids, jnp.int32(window))
            whole = got.ids_B3L.shape[2]
            assert whole == 640
            mask = np.pad(mask_of(*ids, window), ((0, 0), *[(0, whole - 608)] * 2))
            mask[:, 608:, 608:] = np.tri(whole - 608)  # what is beyond sees itself, and is seen by nothing else
            for turned, lists in enumerate((got.by_query, got.by_key)):
                for (queries, keys), (order, count) in lists.items():
                    seen = mask.reshape(3, whole // queries, queries, whole // keys, keys).any((2, 4))
                    seen = seen.swapaxes(1, 2) if turned else seen
                    np.testing.assert_array_equal(count, seen.sum(2))
                    for place in np.ndindex(count.shape):
                        listed = order[place][: count[place]].tolist()
                        assert listed == np.flatnonzero(seen[place]).tolist()
                    shares.append(count.sum() / seen.size)
    assert min(shares) < 0.3 and max(shares) > 0.5  # much to skip, and all that is not later


def gradients(form):
    """(q, k, v, d_out) → (out, dq, dk, dv)."""

    @jax.jit
    def run(*arrays):
        out, pull = jax.vjp(form, *arrays[:3])
        return out, *pull(arrays[3])

    return run


def dense(ids, q, k, v, window: int | None = None, **keys):
    """q, k, v: [B, heads, L, H]."""
    arrays = (x.swapaxes(1, 2) for x in (q, k, v))
    return attention.attend(*arrays, mask_of(*ids, window), **keys).swapaxes(1, 2)


def ours(ids, q, k, v, window: int | None = None, *, interpret: bool = True, scale: float | None = None, **keys):
    blocks = triton_kernel.blocks(*ids, None if window is None else jnp.int32(window))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return triton_kernel.attend(q, k, v, blocks, scale=scale, interpret=interpret, **keys)


def test_what_stands_in_unlisted_blocks_is_read_by_no_program():
    """Two trees and as much padding between them, interpreted, in rows that end inside a tile: the dense form, forward
    and backward; and with NaN in the padding the trees do not change by a bit."""
    length = 371
    tree = np.repeat([1, 0, 2], 128)[None, :length]
    branch = np.tile(np.repeat([0, 1, 2], [60, 40, 28]), 3)[None, :length]
    ids = tree, branch, np.tile(np.arange(128), 3)[None, :length]
    rng = np.random.default_rng(1)
    arrays = [jnp.asarray(rng.normal(size=(1, n, length, 80)), jnp.float32) for n in (2, 1, 1, 2)]
    run, want = (gradients(functools.partial(form, ids)) for form in (ours, dense))
    before, after = run(*arrays), run(*(x.at[:, :, 128:256].set(jnp.nan) for x in arrays))
    for a, b, c in zip(before, after, want(*arrays)):
        np.testing.assert_allclose(a, c, atol=5e-6 * np.abs(c).max())
        assert np.isnan(b[:, :, 128:256]).all()
        for part in (slice(128), slice(256, length)):
            np.testing.assert_array_equal(a[:, :, part], b[:, :, part])


NAMES = "triton_attention", "triton_attention_dq", "triton_attention_dkv"


def lowered(heads: int, kv_heads: int, size: int, dtype, length: int, window: int | None = None, cap=None) -> str:
    """Forward and backward for CUDA, as text."""

    def run(q, k, v, d_out, *ids):
        return gradients(functools.partial(ours, ids, window=window, cap=cap, interpret=False))(q, k, v, d_out)

    q, k = (jax.ShapeDtypeStruct((2, n, length, size), dtype) for n in (heads, kv_heads))
    ids = [jax.ShapeDtypeStruct((2, length), jnp.int32)] * 3
    return jax.jit(run).trace(q, k, k, q, *ids).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_every_head_size_lowers_for_cuda(size, dtype):
    """On a machine without a GPU: Pallas makes Triton's code of the three kernels, and no number is kept of a pair of
    tokens."""
    length, keys = (1000, {"window": 50, "cap": 5.0}) if size in (64, 80) else (1024, {})
    text = lowered(8, 2, size, dtype, length, **keys)
    assert [text.count(f'name = "{name}"') for name in NAMES] == [1, 1, 1]
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3
    floats = re.findall(r"tensor<([0-9x]+)x(?:f32|bf16)>", text)
    assert max(math.prod(map(int, shape.split("x"))) for shape in floats) == 2 * 8 * length * size


def test_tiles_fit_into_the_shared_memory_of_an_a100():
    """By the arithmetic that TILES tells, which is what Triton 3.9 took, to 5 KiB."""
    for (number, width), tiles in triton_kernel.TILES.items():
        for part, tile in enumerate(tiles):
            mine, turn = (tile.queries, tile.keys)[:: -1 if part == 2 else 1]
            held = number * width * ((1 if part == 0 else 2) * mine + (2 if number == 2 else 1) * 2 * turn)
            assert held <= (163 - 5) * 1024 or (part, number, width, held) == (0, 2, 256, 160 * 1024)
            for size in (tile.queries, tile.keys):
                assert size % triton_kernel.UNIT == 0 and size & (size - 1) == 0


def test_heads_that_no_tile_holds_are_refused():
    ids = [np.zeros((1, 64), np.int32)] * 3
    x = jnp.zeros((1, 1, 64, 257))
    with pytest.raises(ValueError, match=r"heads of 257 numbers of float32, expected at most 256, .* model\.attention"):
        ours(ids, x, x, x)


# --- what Triton is given, op by op in NumPy --------------------------------------------------------------------------

TYPES = {"f32": np.float32, "bf16": jnp.bfloat16, "i32": np.int32, "i64": np.int64, "i1": np.bool_}
BINARY = {
    "addi": np.add, "addf": np.add, "subi": np.subtract, "subf": np.subtract, "muli": np.multiply, "mulf": np.multiply,
    "divf": np.divide, "divui": np.floor_divide, "divsi": np.floor_divide, "remui": np.mod, "remsi": np.mod,
    "andi": np.bitwise_and, "ori": np.bitwise_or, "maxnumf": np.fmax,
}  # fmt: skip
COMPARED = (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal)
OUTSIDE = {"__nv_exp2f": np.exp2, "__nv_logf": np.log, "__nv_tanhf": np.tanh}


def kernels_in(module) -> list[tuple[bytes, tuple[int, int, int]]]:
    """Code and grid of every Triton call of a lowered program."""
    found = []
    for op in (op for region in module.regions for block in region for op in block):
        if op.operation.name == "stablehlo.custom_call" and "triton" in str(
            op.operation.attributes["call_target_name"]
        ):
            config = op.operation.attributes["mhlo.backend_config"]
            found.append((config["ir"].value_bytes, tuple(config[f"grid_{axis}"].value for axis in "xyz")))
        found += kernels_in(op.operation)
    return found


def launched(code: bytes, grid: tuple[int, int, int], arrays: list[np.ndarray], outputs: int) -> None:
    """Runs a kernel's programs one after the other on flat arrays, the last ones of which are outputs. Nothing may be
    read or written beyond an array, and no place written twice; what a masked load does not fill in is NaN."""
    written = {id(array): np.zeros(array.size, bool) for array in arrays[-outputs:]}
    with triton_lowering._new_ir_context() as context, ir.Location.unknown(context):
        module = ir.Module.parse(code, context)  # has to outlive what it holds
        block = module.body.operations[0].regions[0].blocks[0]
        for program in np.ndindex(grid):
            values = {argument: (array, np.int64(0)) for argument, array in zip(block.arguments, arrays)}
            _walked(block, values, program, written)
    assert all(places.all() for places in written.values())


def _walked(block, values: dict, program: tuple[int, ...], written: dict[int, np.ndarray]) -> list:
    """The values that a block ends with. values: of each name its array, or (memory, places in it) of pointers."""
    number = lambda attribute: int(str(attribute).split()[0])
    for op in (op.operation for op in block):
        dialect, name = op.name.split(".", 1)
        given, told = [values[x] for x in op.operands], op.attributes
        to = str(op.results[0].type) if len(op.results) else ""
        shape = tuple(map(int, re.findall(r"(\d+)x", to)))
        dtype = TYPES.get(re.split(r"[x<]", to.replace("!tt.ptr", ""))[-1].rstrip(">"))
        if name in ("return", "yield"):
            return given
        elif op.name == "scf.for":
            first, last, _, *carried = given
            inner = op.regions[0].blocks[0]
            for turn in range(first, last):
                values.update(zip(inner.arguments, (np.int32(turn), *carried)))
                carried = _walked(inner, values, program, written)
            values.update(zip(op.results, carried))
            continue
        elif name == "store":
            (memory, at), value, *mask = given
            at, value = (np.broadcast_to(x, at.shape)[mask[0] if mask else ...] for x in (at, value))
            assert (at >= 0).all() and (at < memory.size).all() and not written[id(memory)][at].any()
            memory[at], written[id(memory)][at] = value, True
            continue
        elif name == "load":
            (memory, at), *rest = given
            mask = rest[0] if rest else np.ones(np.shape(at), bool)
            assert ((at >= 0) & (at < memory.size) | ~mask).all()
            result = np.where(mask, memory[np.where(mask, at, 0)], rest[1] if rest[1:] else np.nan).astype(memory.dtype)
        elif name == "constant":
            text = re.match(r"(?:dense<)?([^> ]+)", str(told["value"]))[1]
            result = np.full(shape, {"true": 1, "false": 0}.get(text) or float(text), dtype)
        elif name == "get_program_id":
            result = np.int32(program[number(told["axis"])])
        elif name == "make_range":
            result = np.arange(number(told["start"]), number(told["end"]), dtype=np.int32)
        elif name in ("splat", "broadcast"):
            pointer = isinstance(given[0], tuple)
            result = np.broadcast_to(given[0][1] if pointer else given[0], shape)
            result = (given[0][0], result) if pointer else result
        elif name == "addptr":
            result = given[0][0], given[0][1] + given[1].astype(np.int64)
        elif name == "expand_dims":
            result = np.expand_dims(given[0], number(told["axis"]))
        elif name == "trans":
            result = given[0].T
        elif name == "dot":  # 0 = TF32, which 16 bits do not heed; 2 = float32
            assert (
                given[0].dtype == given[1].dtype
                and number(told["inputPrecision"]) == (given[0].dtype == np.float32) * 2
            )
            result = given[2] + given[0].astype(np.float32) @ given[1].astype(np.float32)
        elif name == "reduce":
            of = op.regions[0].blocks[0].operations[0].operation.name.split(".")[1]
            result = BINARY[of].reduce(given[0], axis=number(told["axis"]))
        elif name == "extern_elementwise":
            result = OUTSIDE[str(told["symbol"]).strip('"')](given[0])
        elif name == "select":
            result = np.where(*given)
        elif name == "cmpi":
            result = COMPARED[number(told["predicate"])](*given)
        elif name in ("truncf", "extf", "uitofp", "sitofp"):
            result = given[0].astype(dtype)
        else:
            result = np.asarray(BINARY[name](*given), dtype)
        values[op.results[0]] = result
    return []


@pytest.mark.parametrize("dtype, size, tolerance", [(jnp.float32, 8, 5e-6), (jnp.bfloat16, 80, 2e-2)])
def test_what_triton_is_given_computes_the_dense_form(dtype, size, tolerance):
    """The code itself, which no interpreted kernel shows: places in memory, masks, loops, precision."""
    length, heads, kv_heads, window, cap = 70, 2, 1, 30, 3.0
    rng = np.random.default_rng(6)
    ids = drawn_rows(rng, 1, length)
    arrays = [jnp.asarray(rng.normal(size=(1, n, length, size)), dtype) for n in (heads, kv_heads, kv_heads, heads)]
    run = gradients(functools.partial(ours, ids, window=window, cap=cap, interpret=False))
    module = run.trace(*arrays).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo").operation
    blocks = triton_kernel.blocks(*ids, jnp.int32(window))
    q, k, v, d_out = (np.array(x).reshape(-1) for x in arrays)
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    lse = np.zeros(heads * length, np.float32)
    lists = lambda pairs, tile: [np.array(x).reshape(-1) for x in pairs[tile.queries, tile.keys]]
    shared = [np.array(blocks.ids_B3L).reshape(-1), np.array(blocks.window_B)]
    tiles = triton_kernel.tiles(size, jnp.dtype(dtype))
    forward, by_query, by_key = kernels_in(module)
    launched(*forward, [q, k, v, *shared, *lists(blocks.by_query, tiles[0]), out, lse], 2)
    mean = (out.astype(np.float32) * d_out.astype(np.float32)).reshape(-1, size).sum(1)
    given = [q, k, v, d_out, lse, mean, *shared]
    launched(*by_query, [*given, *lists(blocks.by_query, tiles[1]), dq], 1)
    launched(*by_key, [*given, *lists(blocks.by_key, tiles[2]), dk, dv], 2)
    exact = (x.astype(jnp.float32) for x in arrays)
    want = gradients(functools.partial(dense, ids, window=window, cap=cap))(*exact)
    for a, b in zip((out, dq, dk, dv), want):
        np.testing.assert_allclose(a.astype(np.float32), b.reshape(-1), atol=tolerance * np.abs(b).max())
