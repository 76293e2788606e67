"""What programs hold in memory on TPUs: compiled for them on this machine by libtpu, run nowhere.

Needs `pip install 'sera_jax[tpu]'`; no TPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from sera_jax import attention, losses, programs, score, step
from sera_jax import mesh as meshes
from sera_jax.model import Arch
from sera_jax.programs import Compute
from sera_jax.records import Batch, Rows
from sera_jax.score import Head

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu (pip install 'sera_jax[tpu]')")
pytestmark = pytest.mark.slow

BF16 = jnp.bfloat16


@pytest.fixture(autouse=True)
def compile_only(monkeypatch):
    """libtpu looks for no machine, and what was compiled for one is not kept for another."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def slice_of(topology: str, fsdp: int, tensor: int = 1):
    """A mesh over the chips of a slice."""
    chips = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **chips)
    return meshes.make(1, fsdp, tensor, devices=list(found.devices))


def temporaries(run, *arguments) -> int:
    """Bytes a chip, beside arguments and results."""
    return run.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def array(shape, dtype, where) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


# --- attention --------------------------------------------------------------------------------------------------------


def attention_temporaries(
    topology: str,
    name: str,
    *,
    rows=1,
    length=2048,
    heads=32,
    kv_heads=8,
    size=128,
    window=False,
    cap=None,
    dtype=BF16,
) -> int:
    """Forward and backward of one layer, `rows` rows a chip."""
    mesh = slice_of(topology, 4)
    by_row = meshes.rows_sharding(mesh)
    table = array((4 * rows, length), jnp.int32, by_row)
    q, k = (array((4 * rows, length, n, size), dtype, by_row) for n in (heads, kv_heads))

    @functools.partial(jax.jit, out_shardings=by_row)
    def run(tree, branch, position, q, k, v, d_out, width):
        attend = attention.over_rows(name, tree, branch, position, mesh=mesh, cap=cap)
        out, pull = jax.vjp(lambda *x: attend(*x, width if window else None), q, k, v)
        return out, pull(d_out)

    return temporaries(run, table, table, table, q, k, k, q, jax.ShapeDtypeStruct((), jnp.int32))


CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@pytest.mark.parametrize("topology", CHIPS)
@pytest.mark.parametrize("name", ["splash", "auto"])
def test_kernels_compile_with_windows_and_caps_and_keep_no_scores(topology, name):
    """Of the scores of 32 heads (512 MiB in float32) not even a quarter. Measured, MiB: splash 10 to 120, tree 0.2 to
    41, dense 776 to 1044."""
    assert attention.backend("auto", slice_of(topology, 4), 2048) == "tree"
    assert attention_temporaries(topology, name, window=True, cap=50.0) < 128 * 2**20


def test_dense_attention_keeps_the_scores():
    """The other side of the comparison. Measured: 776 MiB, splash 26 MiB."""
    assert attention_temporaries("v5e:2x2", "xla") > 8 * attention_temporaries("v5e:2x2", "splash")


@pytest.mark.parametrize("size", [64, 80, 96, 256])
def test_splash_compiles_for_every_head_size(size):
    for topology in ("v4:2x2x1", "v5e:2x2"):
        assert attention_temporaries(topology, "splash", heads=8, kv_heads=4, size=size) < 64 * 2**20


@pytest.mark.parametrize("topology", CHIPS)
def test_tree_compiles_for_every_head_size(topology):
    for size in (64, 80, 96, 256):  # and 128, above
        assert attention_temporaries(topology, "tree", heads=8, kv_heads=4, size=size, window=True, cap=50.0) < 2**26


def test_tree_compiles_for_other_shapes():
    """Rows that end inside a block; float32, which takes twice the vector memory; nine query heads of one key/value
    head, three to a step; no window, no cap."""
    assert attention_temporaries("v4:2x2x1", "tree", heads=8, kv_heads=4, size=96, length=640) < 2**26
    assert attention_temporaries("v5e:2x2", "tree", heads=8, kv_heads=4, size=256, dtype=jnp.float32) < 2**26
    assert attention_temporaries("v5p:2x2x1", "tree", heads=9, kv_heads=1, size=80) < 2**26


def test_no_comparison_of_all_queries_and_keys_is_stored():
    """Rows of 32,768 tokens: a bit of each pair, in bytes, is 1 GiB."""
    assert attention_temporaries("v4:2x2x1", "tree", length=2**15, heads=2, kv_heads=1, window=True) < 2**27


# --- one step of decoding ---------------------------------------------------------------------------------------------


def decoding_temporaries(
    topology: str, name: str, *, heads=32, kv_heads=8, size=128, window=None, cap=None, slots=64, prompts=128
) -> int:
    """Refilled slots of a two-layer decoder whose heads lie on four chips: 512 tokens a prompt, 256 new ones."""
    mesh = slice_of(topology, 4)
    arch = Arch(
        "llama", 1024, 256, 2, heads, kv_heads, size, 512, 1e-5, 1e4, tied=True,
        windows=() if window is None else (None, window), score_cap=cap,
    )  # fmt: skip
    compute = Compute(BF16, attention=name)
    weights = programs.abstract_params(arch, mesh, "decode", BF16)
    tokens, length, hashes = programs.abstract_prompts(mesh, prompts, 512)
    prefill = programs.prefiller(arch, mesh, compute)
    start = jax.eval_shape(prefill, weights, tokens, length)
    heads_apart = NamedSharding(
        mesh, meshes.spec(mesh, "decode", (None, "rows", "heads", None, None), start.cache[0].shape)
    )
    where = dataclasses.replace(
        jax.tree.map(lambda _: meshes.replicated(mesh), start), cache=(heads_apart, heads_apart)
    )  # fmt: skip
    decode = programs.decoder(arch, mesh, compute, candidates=4, max_new_tokens=256, slots=slots)
    others = hashes, programs.abstract_key(mesh), programs.abstract_sampling(mesh)
    return temporaries(decode, weights, programs.placed(start, where), *others)


@pytest.mark.parametrize("topology", CHIPS)
def test_slots_read_their_prompts_in_place(topology):
    """Nothing beside what 512 slots have emitted (256 MiB a chip): no copy of a prompt, nor of a cache on another
    layout. Measured, MiB: 261 by the kernel, 520 on XLA (v4, which keeps a part elsewhere: 140, 403)."""
    many = {"slots": 512, "prompts": 512}
    by_kernel, by_copy = (decoding_temporaries(topology, name, **many) / 2**20 for name in ("auto", "xla"))
    assert by_kernel < 272 and by_copy > by_kernel + 200, (by_kernel, by_copy)


@pytest.mark.parametrize("size", [64, 80, 96, 256])
def test_decoding_compiles_for_every_head_size(size):
    for topology in ("v4:2x2x1", "v5e:2x2"):
        decoding_temporaries(
            topology, "tree", heads=8, kv_heads=4, size=size, window=300, cap=50.0, slots=16, prompts=16
        )


# --- the head ---------------------------------------------------------------------------------------------------------

MESHES = [(16, 1), (8, 2)]  # fsdp, tensor


def whole_logits(hidden, table, bias, target, head, _=None):
    """In the place of score.head_logps: all logits at once, placed by the partitioner."""
    logits = jnp.einsum("bmd,vd->bmv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("fsdp, tensor", MESHES)
def test_the_head_keeps_an_eighth_of_the_logits(fsdp, tensor):
    """128,256 words, 24,576 response tokens, v5e-16. Measured, MiB: 63 against 1807, and 87 against 1696."""
    vocab, width, rows, tokens = 128_256, 4096, 16, 1536
    mesh = slice_of("v5e:4x4", fsdp, tensor)
    by_row = meshes.rows_sharding(mesh)
    by_word = NamedSharding(mesh, meshes.spec(mesh, "train", ("vocab", "embed"), (vocab, width)))
    arguments = (
        array((rows, tokens, width), BF16, by_row),
        array((vocab, width), jnp.float32, by_word),
        array((rows, tokens), jnp.int32, by_row),
        array((rows, tokens), jnp.float32, by_row),
    )

    def keeps(head_logps) -> int:
        @functools.partial(jax.jit, out_shardings=(by_row, (by_row, by_word)))
        def run(hidden, table, target, d_logp):
            logp, pull = jax.vjp(lambda h, w: head_logps(h, w, None, target, Head(mesh, 256)), hidden, table)
            return logp, pull(d_logp)

        return temporaries(run, *arguments)

    assert keeps(score.head_logps) <= keeps(whole_logits) / 8


@pytest.mark.parametrize("fsdp, tensor", MESHES)
def test_the_update_keeps_no_more_than_with_whole_logits(monkeypatch, fsdp, tensor):
    """Llama-3-8B's shape with two layers, v5e-16, 16 rows of 2048 tokens."""
    arch = Arch("llama", 128_256, 4096, 2, 32, 8, 128, 14336, 1e-5, 5e5, tied=False)
    ours = update_temporaries(arch, slice_of("v5e:4x4", fsdp, tensor))
    monkeypatch.setattr(score, "head_logps", whole_logits)
    assert ours <= update_temporaries(arch, slice_of("v5e:4x4", fsdp, tensor))


def test_a_layer_more_keeps_its_gradient_and_its_input():
    """No second gradient and no bfloat16 copy of its weights. Mistral-7B's shape, v5e-16; 1 is one float32 copy of a
    layer's weights and the layer's input. Both kept, it would be 2.3."""
    mesh = slice_of("v5e:4x4", 16)
    arch = Arch("mistral", 32_000, 4096, 2, 32, 8, 128, 14336, 1e-5, 1e4, tied=False)
    two, four = (update_temporaries(dataclasses.replace(arch, layers=n), mesh) for n in (2, 4))
    weights = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert four - two < 1.2 * 2 * (4 * weights / 16 + 2 * 2048 * 4096)


def update_temporaries(arch: Arch, mesh) -> int:
    """Of a DPO update with 16 rows of 2048 tokens."""
    transform = step.optimizer(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0, decays=programs.decaying(arch))
    schedule = {"peak": 1e-6, "schedule": "linear", "warmup": 0.1}
    shape = {"L": 2048, "M": 1536, "S": 4}
    ints = lambda letter: jax.ShapeDtypeStruct((2, 16, shape[letter]), jnp.int32)
    rows = Rows(**{f.name: ints(f.name[-1]) for f in dataclasses.fields(Rows)})
    slots = jax.ShapeDtypeStruct((2, 16, 4), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    batch = Batch(rows, slots, slots, slots, number)

    update = programs.preference_update.__wrapped__(
        arch, mesh, Compute(BF16), transform, losses.LOSSES["dpo"], {"beta": 0.1}, schedule
    )
    state, frozen = programs.abstract_state(arch, mesh, transform), programs.abstract_frozen(arch, mesh, BF16)
    return temporaries(update, state, frozen, batch, number, jax.eval_shape(lambda: jax.random.key(0)))
