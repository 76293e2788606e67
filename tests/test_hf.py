"""Hugging Face folders: every number of config.json, weights bit for bit, every error's wording, and no half export.

Files are read and written by the safetensors library as the witness.
"""

import dataclasses
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from sera_jax import disk, hf, model, programs
from sera_jax.hf import layout, reading, writing
from sera_jax.model import Arch

ARCH = Arch("LlamaForCausalLM", 24, 16, 3, 4, 2, 6, 12, 1e-5, 5e5, tied=False)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
NAMES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] + [
    f"model.layers.{i}.{name}.weight"
    for i in range(3)
    for name in (
        "input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "mlp.gate_proj mlp.up_proj mlp.down_proj"
    ).split()
]


def write(path: pathlib.Path, config: dict = CONFIG, tensors: dict | None = None, **changes) -> pathlib.Path:
    path.mkdir(exist_ok=True)
    config = {key: value for key, value in (config | changes).items() if value != "absent"}
    (path / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def tensors(dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Arbitrary numbers in the file's own names and shapes, written out by hand."""
    rng = np.random.default_rng(seed)
    q, k, d, f, v = 4 * 6, 2 * 6, 16, 12, 24
    shapes = {"q_proj": (q, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, q)}
    shapes |= {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    shapes |= {"embed_tokens": (v, d), "lm_head": (v, d)}
    return {name: rng.normal(size=shapes.get(name.split(".")[-2], (d,))).astype(dtype) for name in NAMES}


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def fails(*words: str):
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, words)))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype), model.abstract(ARCH))


# --- config.json ------------------------------------------------------------------------------------------------------


def test_every_number_is_read(tmp_path):
    assert hf.read_arch(write(tmp_path)) == ARCH
    changed = dict(
        vocab_size=25, hidden_size=20, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=8,
        intermediate_size=13, rms_norm_eps=1e-6, rope_theta=7, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    assert hf.read_arch(write(tmp_path, **changed)) == Arch(
        "LlamaForCausalLM", 25, 20, 4, 8, 4, 8, 13, 1e-6, 7.0, tied=True, init_std=0.1
    )


def test_what_is_left_out_has_the_value_transformers_gives_it(tmp_path):
    optional = "num_key_value_heads head_dim rms_norm_eps rope_theta tie_word_embeddings initializer_range"
    arch = hf.read_arch(write(tmp_path, **dict.fromkeys(optional.split(), "absent")))
    assert arch == Arch("LlamaForCausalLM", 24, 16, 3, 4, 4, 4, 12, 1e-6, 1e4, tied=False)
    assert hf.read_arch(write(tmp_path, architectures="absent")) == ARCH
    mistral = dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)
    arch = hf.read_arch(write(tmp_path, num_attention_heads=16, num_key_value_heads="absent", **mistral))
    assert (arch.family, arch.kv_heads) == ("MistralForCausalLM", 8)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5}},
    ],
)
def test_rope_theta_is_read_in_both_layouts(tmp_path, keys):
    assert hf.read_arch(write(tmp_path, **keys)).rope_theta == 5e5


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"architectures": ["OPTForCausalLM"]},
            ("'OPTForCausalLM'", "expected one of LlamaForCausalLM, MistralForCausalLM, Qwen2", "GPTNeoXForCausalLM"),
        ),
        ({"architectures": "absent", "model_type": "opt"}, ("the architecture is 'opt'",)),
        ({"architectures": ["PhiForCausalLM"], "qk_layernorm": True}, ("qk_layernorm is True, expected False",)),
        (
            {"architectures": ["GemmaForCausalLM"], "use_bidirectional_attention": True},
            ("use_bidirectional_attention is True, expected None or False",),
        ),
        ({"hidden_act": "relu"}, ("hidden_act is 'relu', expected one of silu, gelu, gelu_new",)),
        ({"architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 0.3}, ("rotary_pct is 0.3, expected a share", "(4)")),
        ({"quantization_config": {"bits": 4}}, ("quantization_config is {'bits': 4}, expected None",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor is 0.5, expected 1.0",)),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "max_position_embeddings": 99}},
            (
                "rope_scaling of type 'llama3' has factor",
                "expected factor, low_freq_factor",
                "unknown: max_position_emb",
            ),
        ),
        ({"rope_scaling": {"type": "linear"}}, ("rope_scaling of type 'linear' has no keys", "missing: factor")),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            ("rope_parameters has the type 'dynamic', expected one of default, linear, llama3, yarn",),
        ),
        ({"rope_theta": "10000"}, ("rope_theta is '10000', expected a positive float",)),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 0},
            ("sliding_window is 0, expected a positive int or null",),
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["sliding_attention", "chunked_attention"]},
            ("layer_types has 2 entries, one of them 'chunked_attention', expected 3 (num_hidden_layers)",),
        ),
        ({"num_key_value_heads": 3}, ("num_key_value_heads is 3, expected a divisor", "(4)")),
        ({"head_dim": 5}, ("head_dim is 5, expected an even number",)),
        ({"head_dim": None, "hidden_size": 18}, ("hidden_size is 18, expected a multiple of num_attention_heads (4)",)),
        ({"vocab_size": "absent"}, ("config.json: vocab_size is missing",)),
        ({"vocab_size": "24"}, ("vocab_size is '24', expected a positive int",)),
        ({"num_hidden_layers": 0}, ("num_hidden_layers is 0, expected a positive int",)),
        ({"rms_norm_eps": None}, ("rms_norm_eps is None, expected a positive float",)),
        ({"tie_word_embeddings": None}, ("tie_word_embeddings is None, expected a bool",)),
    ],
)
def test_what_is_not_computed_is_an_error(tmp_path, changes, words):
    with fails(str(tmp_path), *words):
        hf.read_arch(write(tmp_path, **changes))


def test_windows_by_layer(tmp_path):
    def windows(architecture, **keys):
        return hf.read_arch(write(tmp_path, architectures=[architecture + "ForCausalLM"], **keys)).windows

    assert windows("Llama", sliding_window=7) == ()  # as transformers has it: Llama knows no window
    assert windows("Mistral") == (4096,) * 3  # its default
    assert windows("Mistral", sliding_window=None) == ()
    assert windows("Gemma2", sliding_window=5) == (5, None, 5)
    assert windows("Gemma2", sliding_window=5, layer_types=["full_attention"] * 2 + ["sliding_attention"]) == (
        None,
        None,
        5,
    )
    assert windows("Qwen2", sliding_window=5) == windows("Qwen3") == ()
    assert windows("Qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=1) == (None, 5, 5)


def test_no_config_and_no_json(tmp_path):
    with fails("config.json is missing, expected the config of a Hugging Face model folder"):
        hf.read_arch(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with fails("config.json is no JSON"):
        hf.read_arch(tmp_path)


def test_a_reward_model_of_every_family_is_written_and_read(tmp_path, one_device):
    """The scalar head is one more tensor in the place of the head's; the rest lies as in a policy."""
    for family in hf.FAMILIES:
        tied = family == "LlamaForCausalLM"
        keys = {"architectures": [family], "hidden_size": 32, "tie_word_embeddings": tied}
        policy = hf.read_arch(write(tmp_path / family, **keys))
        arch = dataclasses.replace(policy, scored=True)
        params = jax.jit(lambda key, arch=arch: model.init(arch, key))(jax.random.key(0))
        out = hf.save(tmp_path / f"{family}-out", arch, params, dtype=jnp.float32, extra={"pad_token_id": 3})
        text = json.loads((out / "config.json").read_text())
        assert text["architectures"] == [family.replace("CausalLM", "SequenceClassification")]
        assert (text["pad_token_id"], text["id2label"]) == (3, {"0": "reward"})
        assert hf.read_reward_arch(out) == hf.read_any_arch(out) == arch
        stored = safetensors.numpy.load_file(out / "model.safetensors")
        heads = {"lm_head.weight", "lm_head.bias", "embed_out.weight"}
        assert set(stored) == set(layout.names(policy)) - heads | {"score.weight"}
        np.testing.assert_array_equal(stored["score.weight"], params["score"]["head"])
        again = hf.load(out, arch, one_device)
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_written_config_reads_back_and_keeps_what_it_has_no_word_for(tmp_path):
    for family in hf.FAMILIES:
        plain = hf.read_arch(write(tmp_path / "plain", architectures=[family], hidden_size=32))
        arch = dataclasses.replace(plain, tied=True, init_std=0.5, vocab=25)
        out = hf.write_config(tmp_path / family, arch, dtype=jnp.bfloat16, extra={"eos_token_id": [1, 2]})
        assert hf.read_arch(out) == arch
        text = json.loads((out / "config.json").read_text())
        assert (text["eos_token_id"], text["torch_dtype"], text["architectures"]) == ([1, 2], "bfloat16", [family])
    source = write(
        tmp_path / "source", rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 3.0},
        dtype="float16", max_position_embeddings=77, novelty=[1],
    )  # fmt: skip
    text = json.loads((hf.write_config(tmp_path / "b", ARCH, source=source) / "config.json").read_text())
    assert text["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5} and "rope_theta" not in text
    assert (text["dtype"], text["max_position_embeddings"], text["novelty"]) == ("float32", 77, [1])
    assert "torch_dtype" not in text
    with fails("the config to be written reads as", "check `source` and `extra`"):
        hf.write_config(tmp_path / "c", ARCH, extra={"vocab_size": 5})
    assert not (tmp_path / "c" / "config.json").exists()


# What the config.json of published models says, as far as it matters here, in the layout of its time, and how many
# weights the model has, as published.
PUBLISHED = {
    "TinyLlama-1.1B": (
        dict(architectures=["LlamaForCausalLM"], hidden_size=2048, intermediate_size=5632, num_attention_heads=32,
             num_hidden_layers=22, num_key_value_heads=4, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0,
             hidden_act="silu", attention_bias=False, tie_word_embeddings=False, vocab_size=32000),
        1_100_048_384,
        dict(head_dim=64, windows=(), biases=()),
    ),
    "Llama-3.2-1B": (
        dict(architectures=["LlamaForCausalLM"], hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
             num_hidden_layers=16, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=500000.0,
             rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                               original_max_position_embeddings=8192, rope_type="llama3"),
             attention_bias=False, mlp_bias=False, max_position_embeddings=131072, tie_word_embeddings=True,
             vocab_size=128256),
        1_235_814_400,
        dict(rope="llama3", rope_theta=5e5, rope_keys=(("factor", 32.0), ("high_freq_factor", 4.0),
             ("low_freq_factor", 1.0), ("original_max_position_embeddings", 8192))),
    ),
    "Mistral-7B": (
        dict(architectures=["MistralForCausalLM"], hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
             num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
             max_position_embeddings=32768, tie_word_embeddings=False, vocab_size=32000),
        7_241_732_096,
        dict(windows=(4096,) * 32),
    ),
    "pythia-410m": (
        dict(architectures=["GPTNeoXForCausalLM"], hidden_act="gelu", hidden_size=1024, intermediate_size=4096,
             layer_norm_eps=1e-5, max_position_embeddings=2048, num_attention_heads=16, num_hidden_layers=24,
             rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True,
             vocab_size=50304),
        405_334_016,
        dict(rotary=16, block="parallel", norm="layer", activation="gelu", biases=("mlp", "attention", "out")),
    ),
    "pythia-6.9b": (
        dict(architectures=["GPTNeoXForCausalLM"], hidden_act="gelu", hidden_size=4096, intermediate_size=16384,
             layer_norm_eps=1e-5, num_attention_heads=32, num_hidden_layers=32, rotary_emb_base=10000, rotary_pct=0.25,
             tie_word_embeddings=False, use_parallel_residual=True, vocab_size=50432),
        6_857_302_016,
        dict(rotary=32),
    ),
    "phi-2": (
        dict(architectures=["PhiForCausalLM"], hidden_act="gelu_new", hidden_size=2560, intermediate_size=10240,
             layer_norm_eps=1e-5, max_position_embeddings=2048, num_attention_heads=32, num_hidden_layers=32,
             num_key_value_heads=32, partial_rotary_factor=0.4, qk_layernorm=False, rope_scaling=None,
             rope_theta=10000.0, tie_word_embeddings=False, vocab_size=51200),
        2_779_683_840,
        dict(head_dim=80, rotary=32, block="parallel_shared", biases=("attention", "out", "mlp", "head")),
    ),
    "gemma-2b": (
        dict(architectures=["GemmaForCausalLM"], head_dim=256, hidden_act="gelu", hidden_size=2048,
             intermediate_size=16384, max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=18,
             num_key_value_heads=1, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000.0, vocab_size=256000),
        2_506_172_416,
        dict(tied=True, norm="rms_plus_one", activation="gelu_pytorch_tanh", scaled_embedding=True, score_scale=None),
    ),
    "gemma-2-27b": (
        dict(architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
             head_dim=128, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=4608,
             intermediate_size=36864, max_position_embeddings=8192, num_attention_heads=32, num_hidden_layers=46,
             num_key_value_heads=16, query_pre_attn_scalar=144, rms_norm_eps=1e-6, rope_theta=10000.0,
             sliding_window=4096, vocab_size=256000),
        27_227_128_320,
        dict(windows=(4096, None) * 23, score_scale=1 / 12, score_cap=50.0, logit_cap=30.0, block="sandwich"),
    ),
    "Qwen2.5-0.5B": (
        dict(architectures=["Qwen2ForCausalLM"], hidden_act="silu", hidden_size=896, intermediate_size=4864,
             max_position_embeddings=32768, max_window_layers=24, num_attention_heads=14, num_hidden_layers=24,
             num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=32768,
             tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936),
        494_032_768,
        dict(windows=(), biases=("attention",), rope_theta=1e6),
    ),
    "Qwen3-0.6B": (
        dict(architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=128, hidden_act="silu",
             hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28,
             num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None,
             rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, use_sliding_window=False,
             vocab_size=151936),
        596_049_920,
        dict(qk_norm=True, head_dim=128, biases=()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_weights_as_they_say(tmp_path, name):
    config, weights, fields = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch = hf.read_arch(tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.abstract(arch))) == weights
    assert {field: getattr(arch, field) for field in fields} == fields
    assert hf.read_arch(hf.write_config(tmp_path / "again", arch)) == arch


# --- weights in -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[reading.STAGED, 0], ids=["on the host", "by layers"])
def way(request, monkeypatch):
    """Both ways in: stacked on the host, or on the devices layer by layer."""
    monkeypatch.setattr(reading, "STAGED", request.param)


def test_weights_lie_where_the_names_say(tmp_path, one_device, way):
    """Witness: the layouts written out by hand."""
    got = hf.load(write(tmp_path, tensors=(file := tensors())), ARCH, one_device)
    stack = lambda name, to: np.stack([to(file[f"model.layers.{i}.{name}.weight"]) for i in range(3)])
    rows = lambda heads: lambda w: w.reshape(heads, 6, 16).transpose(2, 0, 1)
    want = {
        "embed": {"table": file["model.embed_tokens.weight"]},
        "head": {"table": file["lm_head.weight"]},
        "final_norm": {"scale": file["model.norm.weight"]},
        "layers": {
            "attention_norm": {"scale": stack("input_layernorm", lambda w: w)},
            "attention": {
                "query": stack("self_attn.q_proj", rows(4)),
                "key": stack("self_attn.k_proj", rows(2)),
                "value": stack("self_attn.v_proj", rows(2)),
                "out": stack("self_attn.o_proj", lambda w: w.T.reshape(4, 6, 16)),
            },
            "mlp_norm": {"scale": stack("post_attention_layernorm", lambda w: w)},
            "mlp": {n: stack(f"mlp.{n}_proj", lambda w: w.T) for n in ("gate", "up", "down")},
        },
    }
    jax.tree.map(same_bits, got, want)


@pytest.mark.parametrize("layout", ["train", "decode"])
def test_eight_devices_hold_the_same_values_on_their_shardings(tmp_path, one_device, eight_devices, layout, way):
    path = write(tmp_path, tensors=tensors())
    got = hf.load(path, ARCH, eight_devices, layout=layout)
    jax.tree.map(same_bits, got, hf.load(path, ARCH, one_device))
    where = programs.param_shardings(ARCH, eight_devices, layout)
    assert jax.tree.map(lambda a: a.sharding, got) == where
    # Heads over tensor, width over fsdp: each device holds a quarter of a query weight in training.
    assert got["layers"]["attention"]["query"].addressable_shards[0].data.size * 4 == 3 * 16 * 4 * 6


def pad_header(file: pathlib.Path, length: int) -> None:
    """Rewrites a file with spaces after its header, so that the tensors begin at a multiple of 64, plus `length`."""
    raw = file.read_bytes()
    old = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:old].rstrip()
    header += b" " * ((length - 8 - len(header)) % 64)
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[old:])


def test_only_the_wanted_slices_are_read(tmp_path):
    """The views that loading starts from do not copy: a slice of one touches the bytes of that slice."""
    file = write(tmp_path, tensors=tensors()) / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    array = reading.stored_array(reading.header(file)[name], {file: np.memmap(file, np.uint8, mode="r")})
    view = layout.view(layout.names(ARCH)[name][0][0], array, layout.sizes_of(ARCH))
    assert view.shape == (16, 4, 6) and np.shares_memory(view, array)


def test_a_mesh_reads_each_byte_once(tmp_path, eight_devices, way, monkeypatch):
    """Whatever is split, and on however many devices a slice lies: here every one is on two or more."""
    read = []

    class Told(np.ndarray):
        def __getitem__(self, index):
            got = super().__getitem__(index)
            read.append(got.nbytes)
            return got

    told = lambda weight, array, sizes: layout.view(weight, array, sizes).view(Told)
    monkeypatch.setattr(reading, "view", told)
    file = tensors(ml_dtypes.bfloat16)
    got = hf.load(write(tmp_path, tensors=file), ARCH, eight_devices)
    held = sum(s.data.nbytes for a in jax.tree.leaves(got) for s in a.addressable_shards)
    assert held > 2 * sum(a.nbytes for a in jax.tree.leaves(got))
    assert sum(read) == sum(a.nbytes for a in file.values())


def test_replicas_are_apart(tmp_path, eight_devices, way):
    """Devices that were given one copy of a slice: what is computed in place on one leaves the others alone."""
    held = hf.load(write(tmp_path, tensors=tensors()), ARCH, eight_devices)
    want = jax.tree.map(lambda a: np.array(a) + 1, held)
    got = jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)(held)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        for s in a.addressable_shards:
            same_bits(s.data, b[s.index])


def test_what_was_loaded_does_not_change_with_the_file(tmp_path, one_device):
    """JAX may take over aligned memory as it is."""
    file = write(tmp_path, tensors=tensors()) / "model.safetensors"
    pad_header(file, 0)
    begin = reading.header(file)["model.embed_tokens.weight"].begin
    assert begin % 64 == 0
    got = hf.load(tmp_path, ARCH, one_device)["embed"]["table"]
    before = np.array(got)
    with open(file, "r+b") as stream:
        stream.seek(begin)
        stream.write(bytes(24 * 16 * 4))
    assert before.any()
    same_bits(got + 0, before)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [np.float32, ml_dtypes.bfloat16])
def test_dtypes(tmp_path, one_device, stored, wanted, way):
    file = tensors(stored)
    got = hf.load(write(tmp_path, tensors=file), ARCH, one_device, dtype=wanted)
    same_bits(got["embed"]["table"], file["model.embed_tokens.weight"].astype(wanted))
    same_bits(got["layers"]["mlp"]["up"][1], file["model.layers.1.mlp.up_proj.weight"].T.astype(wanted))


def test_a_header_of_odd_length(tmp_path, one_device):
    """Other writers do not align their tensors."""
    for dtype in (np.float32, ml_dtypes.bfloat16):
        file = tensors(dtype)
        pad_header(write(tmp_path, tensors=file) / "model.safetensors", 1)
        got = hf.load(tmp_path, ARCH, one_device, dtype=dtype)
        assert reading.header(tmp_path / "model.safetensors")["model.norm.weight"].begin % 2 == 1
        same_bits(got["embed"]["table"], file["model.embed_tokens.weight"])


def shard(path: pathlib.Path, tensors: dict, files: int = 3) -> dict[str, str]:
    """Writes a sharded checkpoint by the library; returns its weight map."""
    path.mkdir(exist_ok=True)
    weight_map = {name: f"part-{i % files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        safetensors.numpy.save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_several_files_with_an_index(tmp_path, one_device):
    file = tensors()
    shard(tmp_path / "many", file)
    one = hf.load(write(tmp_path / "one", tensors=file), ARCH, one_device)
    jax.tree.map(same_bits, hf.load(tmp_path / "many", ARCH, one_device), one)
    (tmp_path / "many" / "part-1.safetensors").unlink()
    with fails("part-1.safetensors is missing; model.safetensors.index.json names it"):
        hf.load(tmp_path / "many", ARCH, one_device)
    weight_map = shard(tmp_path / "many", file)
    index = {"weight_map": weight_map | {"lm_head.weight": weight_map["model.embed_tokens.weight"]}}
    (tmp_path / "many" / "model.safetensors.index.json").write_text(json.dumps(index))
    with fails("index.json names tensors that are not in their files: lm_head.weight."):
        hf.load(tmp_path / "many", ARCH, one_device)


def test_a_tied_head_may_be_left_out_or_repeated(tmp_path, one_device):
    tied = dataclasses.replace(ARCH, tied=True)
    file = tensors()
    del file["lm_head.weight"]
    path = write(tmp_path, tensors=file)
    without = hf.load(path, tied, one_device)
    assert set(without) == {"embed", "layers", "final_norm"}
    path = write(tmp_path, tensors=file | {"lm_head.weight": file["model.embed_tokens.weight"]})
    jax.tree.map(same_bits, hf.load(path, tied, one_device), without)
    path = write(tmp_path, tensors=tensors())
    with fails(
        "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings is true", "Set it to false"
    ):
        hf.load(path, tied, one_device)


def test_old_rotary_buffers_are_passed_over(tmp_path, one_device):
    file = tensors() | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(3)}
    hf.load(write(tmp_path, tensors=file), ARCH, one_device)


def test_no_safetensors(tmp_path, one_device):
    write(tmp_path)
    with fails(f"{tmp_path}: no model.safetensors and no model.safetensors.index.json (found: config.json)."):
        hf.load(tmp_path, ARCH, one_device)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with fails("pytorch_model.bin: pickles are never loaded", "Convert them", "save_pretrained"):
        hf.load(tmp_path, ARCH, one_device)
    with fails("nowhere: no model.safetensors", "(found: no such folder)"):
        hf.load(tmp_path / "nowhere", ARCH, one_device)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(tmp_path, one_device, keep):
    file = write(tmp_path, tensors=tensors()) / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:keep])
    if keep == -1:
        words = ("model.safetensors is truncated: it has", f"{len(raw) - 1} bytes, its header speaks of {len(raw)}.")
    else:
        words = ("model.safetensors has no complete safetensors header", f"({keep} bytes): it is truncated")
    with fails(*words):
        hf.load(tmp_path, ARCH, one_device)


def test_another_kind_of_file(tmp_path, one_device):
    (write(tmp_path) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with fails("no complete safetensors header", "Git LFS pointer"):
        hf.load(tmp_path, ARCH, one_device)


def test_missing_unexpected_and_misshapen_tensors(tmp_path, one_device):
    file = tensors()
    without = {n: t for n, t in file.items() if not n.startswith("model.layers.2")}
    with fails(
        str(tmp_path), "9 of 30 tensors are missing: model.layers.2.", " and 1 more.", "with 3 layers and its own head"
    ):
        hf.load(write(tmp_path, tensors=without), ARCH, one_device)
    more = file | {"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)}
    with fails("1 tensors are unexpected: model.layers.0.self_attn.q_proj.bias. LlamaForCausalLM with 3 layers"):
        hf.load(write(tmp_path, tensors=more), ARCH, one_device)
    name = "model.layers.1.self_attn.k_proj.weight"
    with fails(f"model.safetensors: {name} has shape [24, 16], expected [12, 16] from config.json."):
        hf.load(write(tmp_path, tensors=file | {name: np.ones((24, 16), np.float32)}), ARCH, one_device)
    with fails(f"model.safetensors: {name} has dtype I32, expected one of F32, F16, BF16."):
        hf.load(write(tmp_path, tensors=file | {name: np.ones((12, 16), np.int32)}), ARCH, one_device)


# --- weights out ------------------------------------------------------------------------------------------------------


def bf16_bits(seed: int = 0) -> dict[str, np.ndarray]:
    """Any bfloat16 but NaN: denormals, infinities, negative zeros."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        raw = rng.integers(0, 2**16, shape, np.uint16)
        return np.where((raw & 0x7FFF) > 0x7F80, np.uint16(0x8000), raw).view(ml_dtypes.bfloat16)

    return {name: draw(tensor.shape) for name, tensor in tensors().items()}


def test_bfloat16_survives_bit_for_bit_on_eight_devices(tmp_path, eight_devices):
    """Stored in bfloat16, or held in float32 in between. (XLA on CPU flushes denormals in arithmetic, not in casts.)"""
    file = bf16_bits()
    source = write(tmp_path / "in", tensors=file)
    for dtype in (jnp.bfloat16, jnp.float32):
        held = hf.load(source, ARCH, eight_devices, dtype=dtype)
        out = hf.save(tmp_path / "out", ARCH, held, source=source, dtype=jnp.bfloat16)
        again = safetensors.numpy.load_file(out / "model.safetensors")
        assert again.keys() == file.keys()
        for name in file:
            same_bits(again[name], file[name])


def test_the_file_is_one_the_library_would_have_written(tmp_path, params):
    out = hf.save(tmp_path / "a", ARCH, params, dtype=jnp.float32)
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors"]
    with safetensors.safe_open(out / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(NAMES)
    raw = (out / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    assert hf.read_arch(out) == ARCH


def test_shards_and_their_index(tmp_path, params, one_device):
    out = hf.save(tmp_path / "many", ARCH, params, dtype=jnp.float32, max_shard_bytes=4000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    held = {f: safetensors.numpy.load_file(out / f) for f in files}
    assert {name: file for file, part in held.items() for name in part} == index["weight_map"]
    sizes = [sum(t.nbytes for t in part.values()) for part in held.values()]
    assert max(sizes) <= 4000 and index["metadata"]["total_size"] == sum(sizes)
    jax.tree.map(same_bits, hf.load(out, ARCH, one_device), params)


def test_what_an_export_takes_from_its_source(tmp_path, params):
    source = write(tmp_path / "source", max_position_embeddings=99, rope_theta=1.0)
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "other.txt",
    ):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (source / "pytorch_model.bin").write_text("pickle")
    out = hf.save(tmp_path / "out", ARCH, params, source=source, dtype=jnp.float32, card=["# Model", "", "Two words."])
    assert sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()) == [
        "LICENSE", "README.md", "additional_chat_templates/tool.jinja", "chat_template.jinja", "config.json",
        "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert (out / "README.md").read_text() == "# Model\n\nTwo words.\n"
    config = json.loads((out / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (99, 5e5)


def test_export_errors(tmp_path, params):
    with fails("export dtype is int8, expected one of float32, float16, bfloat16"):
        hf.save(tmp_path / "a", ARCH, params, dtype=np.int8)
    with fails("a weight has shape (24, 16), expected (25, 16) from Arch("):
        hf.save(tmp_path / "a", dataclasses.replace(ARCH, vocab=25), params, dtype=np.float32)
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_is_replaced_whole(tmp_path, params, one_device):
    out = hf.save(tmp_path / "a", ARCH, params, dtype=jnp.float32, max_shard_bytes=4000)
    again = jax.tree.map(lambda w: w + 1, params)
    hf.save(out, ARCH, again, source=out, dtype=jnp.float32)  # its own source
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors"]
    jax.tree.map(same_bits, hf.load(out, ARCH, one_device), again)
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "moment, earlier",
    [(m, e) for m in ("tensors", "copy") for e in (False, True)]
    + [("last rename", False), ("swap", True), ("first rename", True), ("last rename", True)],
)
def test_a_killed_export_leaves_the_earlier_one_or_nothing(tmp_path, params, one_device, monkeypatch, moment, earlier):
    path = tmp_path / "export"
    if earlier:
        hf.save(path, ARCH, params, dtype=jnp.float32)
    calls = {"tensors": 5, "copy": 1, "swap": 1, "first rename": 1, "last rename": 2 if earlier else 1}

    def kills(original):
        def killer(*args):
            calls[moment] -= 1
            if calls[moment] == 0:
                raise KeyboardInterrupt
            return original(*args)

        return killer

    name = {"tensors": "fetch", "copy": "copy_source", "swap": "exchange"}.get(moment, "rename")
    owner = {"rename": os, "exchange": disk}.get(name, writing)
    with monkeypatch.context() as patch:
        if "rename" in moment:  # a file system that cannot swap
            patch.setattr(disk, "exchange", lambda one, other: False)
        patch.setattr(owner, name, kills(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            hf.save(path, ARCH, jax.tree.map(lambda w: w + 1, params), dtype=jnp.float32)
    assert path.exists() == earlier
    if earlier:
        jax.tree.map(same_bits, hf.load(path, ARCH, one_device), params)
    if moment in ("tensors", "copy"):
        with fails("config.json is missing"):  # what lies beside it does not load either
            hf.read_arch(tmp_path / "export.partial")
    hf.save(path, ARCH, params, dtype=jnp.float32)  # and the next one succeeds
    assert [f.name for f in tmp_path.iterdir()] == ["export"]
