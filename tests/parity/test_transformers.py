"""Our decoder, gradients, greedy decoding and exports against transformers: tiny random models and a real Llama."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import attention, hf, model, programs, sample, score
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax.hf import layout, writing
from sera_jax.programs import Compute
from sera_jax.records import Tree
from sera_jax.rows import Plan

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: install the `parity` extra")
transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
rope = lambda theta, **more: {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}
heads = lambda n, kv, size: {"num_attention_heads": n, "num_key_value_heads": kv, "head_dim": size}

# Class of transformers and what its config says: grouped, multi-query and multi-head attention; heads of width / heads
# = 8 and of other sizes; tied, biased, partly turned; windows that are shorter than the texts.
MODELS = {
    "llama gqa": ("Llama", heads(4, 2, 8) | rope(1e4)),
    "llama mqa, tied": ("Llama", heads(4, 1, 8) | rope(5e5) | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama mha, small heads, biases": (
        "Llama",
        heads(4, 4, 6) | rope(5e5) | {"attention_bias": True, "mlp_bias": True},
    ),
    "llama 3.1": ("Llama", heads(4, 2, 16) | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama linear": ("Llama", heads(4, 2, 8) | {"rope_parameters": LINEAR}),
    "llama yarn": ("Llama", heads(4, 2, 16) | {"rope_parameters": YARN}),
    "mistral": ("Mistral", heads(4, 2, 8) | rope(1e4) | {"sliding_window": None}),
    "mistral window": ("Mistral", heads(4, 2, 16) | rope(1e4) | {"sliding_window": 9}),
    "qwen2": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2} | rope(1e6)),
    "qwen2 windows above": (
        "Qwen2",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
        | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", heads(4, 2, 16) | rope(1e6)),
    "gemma mqa": ("Gemma", heads(4, 1, 16) | rope(1e4)),
    "gemma 2": (
        "Gemma2",
        heads(4, 2, 16) | {"sliding_window": 8, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0},
    ),
    "gemma 2, no caps": (
        "Gemma2",
        heads(4, 4, 6) | {"sliding_window": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "phi": ("Phi", {"num_attention_heads": 4, "partial_rotary_factor": 0.5}),
    "phi gqa": ("Phi", {"num_attention_heads": 4, "num_key_value_heads": 2, "partial_rotary_factor": 1.0}),
    "neox": ("GPTNeoX", {"num_attention_heads": 4, "rotary_pct": 0.25}),
    "neox, one after the other, no attention biases": (
        "GPTNeoX",
        {"num_attention_heads": 2, "rotary_pct": 0.5, "use_parallel_residual": False, "attention_bias": False},
    ),
}  # fmt: skip


def random_model(name: str):
    family, keys = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": None,
            "pad_token_id": 0, "tie_word_embeddings": False, "attn_implementation": "eager",
        } | keys
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            # Ones and zeros otherwise, which no transposition or swap would change.
            if "norm" in name and name.endswith("weight"):
                weight.normal_(0.0 if "Gemma" in family else 1.0, 0.3)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.3)
    return theirs


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory, one_device):
    """(transformers' model, our arch, our params, the folder between them), float32."""
    theirs = random_model(request.param)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    arch = hf.read_arch(folder)
    return theirs, arch, hf.load(folder, arch, one_device), folder


@pytest.fixture(scope="module")
def real(shared_data, one_device):
    folder = shared_data / "models" / "stories260K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    arch = hf.read_arch(folder)
    return theirs, arch, hf.load(folder, arch, one_device), folder


def our_logits(arch, params, tokens_BL) -> np.ndarray:
    tokens_BL = jnp.asarray(tokens_BL)
    index = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    mask = attention.tree_mask(jnp.ones_like(index), jnp.zeros_like(index))

    def attend(q, k, v, _, window):
        seen = attention.within(mask, index, index, window)
        return attention.attend(q, k, v, seen, scale=arch.score_scale, cap=arch.score_cap), ()

    @jax.jit
    def run(params):
        hidden, _ = model.hidden(arch, params, tokens_BL, index, attend, longest=1 << 20, dtype=jnp.float32)
        return model.logits(arch, params, hidden, jnp.float32)

    return np.asarray(run(params))


def their_logits(theirs, tokens_BL) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.as_tensor(np.asarray(tokens_BL), dtype=torch.long)).logits.float().numpy()


def difference(got, want) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def random_tokens(vocab, shape, seed=0):
    return np.random.default_rng(seed).integers(3, vocab, shape).astype(np.int32)


def test_arch_reads_what_transformers_wrote(pair):
    theirs, arch, _, _ = pair
    config = theirs.config
    assert (arch.vocab, arch.width, arch.layers, arch.mlp) == (96, 32, 3, 48)
    assert (arch.family, arch.init_std) == (type(theirs).__name__, 0.2)
    assert arch.heads == config.num_attention_heads
    assert arch.kv_heads == getattr(config, "num_key_value_heads", arch.heads)
    assert arch.norm_eps == getattr(config, "rms_norm_eps", None) or config.layer_norm_eps
    assert arch.rope_theta == config.rope_parameters["rope_theta"]
    assert arch.tied == config.tie_word_embeddings
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert sum(np.prod(s) for s in shapes.values()) == sum(p.size for p in jax.tree.leaves(model.abstract(arch)))


def test_logits(pair):
    theirs, arch, params, _ = pair
    tokens = random_tokens(96, (3, 100))
    # Measured floor: 2.1e-6.
    assert difference(our_logits(arch, params, tokens), their_logits(theirs, tokens)) <= 1e-5


def test_log_probs_and_their_gradient(pair, one_device):
    """Branches of packed trees, through a nonlinear function of their log-probs; autograd on single sequences."""
    theirs, arch, params, _ = pair
    rng = np.random.default_rng(1)
    shapes = [(5, 7, 3), (1, 1, 9), (12, 4, 1)]
    ids = lambda n: rng.integers(3, 96, n).astype(np.int32)
    trees = [Tree(f"{i}", ids(p), (ids(a), ids(b))) for i, (p, a, b) in enumerate(shapes)]
    packed = rowlib.pack(trees, Plan(64, 64, 6, 1))

    @jax.jit
    def ours(params):
        def loss(params):
            logp, _ = score.row_logps(arch, params, packed, mesh=one_device, dtype=jnp.float32, chunk=16)
            return jax.nn.softplus(-0.05 * (logp[:, 0::2] - logp[:, 1::2])).sum(), logp

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logp), grads = ours(params)
    got = rowlib.unpack(np.asarray(logp), packed.example_BS, 6)

    want = []
    for tree in trees:
        for branch in tree.branches:
            tokens = torch.as_tensor(np.concatenate((tree.prompt, branch)), dtype=torch.long)[None]
            logps = torch.log_softmax(theirs(tokens).logits[0, :-1], -1)
            logps = logps.gather(1, tokens[0, 1:, None])[:, 0]
            want.append(logps[len(tree.prompt) - 1 :].sum())
    want = torch.stack(want)
    their_loss = torch.nn.functional.softplus(-0.05 * (want[0::2] - want[1::2])).sum()
    theirs.zero_grad()
    their_loss.backward()
    # Measured floors: log-probs 2.4e-7, loss 9e-8, gradients 2.0e-6 of the largest entry of their tensor.
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=3e-6)
    np.testing.assert_allclose(loss, their_loss.item(), rtol=2e-6)

    # Our gradients in the file's names and layouts: written as if they were weights.
    by_name = {name: writing.fetch(arch, grads, name, np.dtype(np.float32)) for name in layout.names(arch)}
    expected = {in_file(name, arch): weight.grad.numpy() for name, weight in theirs.named_parameters()}
    assert by_name.keys() == expected.keys()
    assert max(difference(by_name[name], expected[name]) for name in expected) <= 1e-5


def greedy(arch, params, mesh, tokens):
    """(prompts, EOS ids) → our greedy responses, through the programs that a run uses."""
    weights = programs.to_decode(arch, mesh, jnp.float32)(params)
    prefill = programs.prefiller(arch, mesh, Compute(jnp.float32))
    decode = programs.decoder(arch, mesh, Compute(jnp.float32), candidates=1, max_new_tokens=tokens)

    def respond(prompts, eos_ids) -> list[list[int]]:
        values = sample.sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, eos_ids=eos_ids)

        def run(tokens_PJ, length_P, hash_P2):
            out = decode(weights, prefill(weights, tokens_PJ, length_P), hash_P2, jax.random.key(0), values)
            return tuple(np.asarray(a) for a in out)

        out = {}
        for members, responses, _ in sample.run_batches(
            run, prompts, sample.sampling_batches([*map(len, prompts)], 4), 4
        ):
            out |= {int(i): r[0].tolist() for i, r in zip(members, responses)}
        return [out[i] for i in range(len(prompts))]

    return respond


def their_greedy(theirs, prompt, eos_ids, tokens) -> tuple[list[int], float]:
    """Response, and the smallest gap between its two best logits."""
    with torch.no_grad():
        out = theirs.generate(
            torch.as_tensor(prompt, dtype=torch.long)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=tokens, eos_token_id=list(eos_ids), pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    gaps = [float(-np.diff(torch.topk(x[0], 2).values.numpy())[0]) for x in out.logits]
    return out.sequences[0, len(prompt) :].tolist(), min(gaps)


def test_greedy_decoding(pair, one_device):
    theirs, arch, params, _ = pair
    prompts = [random_tokens(96, n, seed=n) for n in (1, 6, 20, 32)]
    free = [their_greedy(theirs, p, [96], 24)[0] for p in prompts]
    eos_ids = [free[1][10], free[2][5]]
    respond = greedy(arch, params, one_device, 24)
    for ids in ([96], eos_ids):
        want = [their_greedy(theirs, p, ids, 24) for p in prompts]
        assert min(gap for _, gap in want) > 1e-4  # no near-tie
        assert respond(prompts, ids) == [response for response, _ in want]
    assert len(want[1][0]) <= 11 and len(want[2][0]) <= 6  # the ends do end


def in_file(name: str, arch) -> str:
    """transformers' name of a parameter → that in files, which kept NeoX's older one."""
    return name.replace("lm_head", "embed_out") if arch.family == "GPTNeoXForCausalLM" else name


def reload(folder):
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return theirs.eval()


@pytest.mark.parametrize("with_source", [True, False], ids=["source", "arch alone"])
def test_an_export_loads_in_transformers_with_the_same_keys_and_weights(pair, tmp_path, with_source):
    theirs, arch, params, folder = pair
    out = hf.save(
        tmp_path / "out", arch, params, source=folder if with_source else None, dtype=jnp.float32, max_shard_bytes=2e4
    )
    assert len(list(out.glob("*.safetensors"))) > 1
    again = reload(out)
    assert type(again) is type(theirs)
    want = theirs.state_dict()
    assert again.state_dict().keys() == want.keys()
    for name, weight in again.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, want[name]), name
    tokens = random_tokens(96, (2, 50), seed=3)
    np.testing.assert_array_equal(their_logits(again, tokens), their_logits(theirs, tokens))


def test_bfloat16_survives_transformers_and_us_bit_for_bit(pair, tmp_path, eight_devices):
    theirs, arch, _, _ = pair
    narrow = random_model(next(m for m in MODELS if MODELS[m][0] + "ForCausalLM" == arch.family)).to(torch.bfloat16)
    narrow.save_pretrained(tmp_path / "in")
    arch = hf.read_arch(tmp_path / "in")
    held = hf.load(tmp_path / "in", arch, eight_devices)
    again = reload(hf.save(tmp_path / "out", arch, held, source=tmp_path / "in", dtype=jnp.bfloat16))
    for name, weight in narrow.state_dict().items():
        got = again.state_dict()[name]
        assert got.dtype == torch.bfloat16 and torch.equal(got.view(torch.int16), weight.view(torch.int16)), name


# --- a real model -----------------------------------------------------------------------------------------------------

OPENINGS = [
    "Once upon a time, there was",
    "Lily and Tim",
    "The big dog ran to",
    "One day, a little girl named Lily found a",
]


def test_a_real_llama_has_the_same_logits(real, shared_data):
    theirs, arch, params, folder = real
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with gzip.open(shared_data / "text" / "tinystories_valid.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read(5000)
    tokens = np.asarray(tokenizer(text)["input_ids"][:1600], np.int32).reshape(4, 400)
    ours, want = our_logits(arch, params, tokens), their_logits(theirs, tokens)
    # Measured floor: 1.9e-6.
    assert difference(ours, want) <= 1e-5
    logp = jax.nn.log_softmax(ours[:, :-1])
    nll = -np.take_along_axis(np.asarray(logp), tokens[:, 1:, None], -1).mean()
    assert nll < 2.0  # the model knows such stories (1.68; guessing would be 6.24)


def test_a_real_llama_tells_the_same_stories(real, one_device):
    theirs, arch, params, folder = real
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [np.asarray(tokenizer(text)["input_ids"], np.int32) for text in OPENINGS]
    got = greedy(arch, params, one_device, 100)(prompts, [1])
    for prompt, ours in zip(prompts, got):
        want, gap = their_greedy(theirs, prompt, [1], 100)
        assert gap > 1e-4
        assert ours == want
    text = tokenizer.decode(got[0])
    assert "little" in text and "named" in text, text


def test_a_real_llama_survives_an_export(real, tmp_path, eight_devices):
    theirs, arch, _, folder = real
    out = hf.save(tmp_path / "out", arch, hf.load(folder, arch, eight_devices), source=folder, dtype=jnp.float32)
    again = reload(out)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    tokenizers = [transformers.AutoTokenizer.from_pretrained(f) for f in (folder, out)]
    assert tokenizers[0](OPENINGS)["input_ids"] == tokenizers[1](OPENINGS)["input_ids"]
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 1
    params = hf.load(out, arch, meshes.make(1, 1, 1, jax.devices()[:1]))
    tokens = random_tokens(arch.vocab, (1, 40))
    np.testing.assert_allclose(our_logits(arch, params, tokens), their_logits(again, tokens), atol=1e-4)
