"""An exported adapter is one of PEFT: it loads on transformers' model and adds what ours adds."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from sera_jax import hf, model
from sera_jax import train as trainer
from sera_jax.model import Lora

torch = pytest.importorskip("torch", reason="parity with PEFT needs torch: install the `parity` extra")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="parity with PEFT needs peft: install the `parity` extra")

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2}
MODELS = {
    "llama": transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES),
    "phi": transformers.PhiConfig(num_attention_heads=4, **SIZES),
    # One linear layer for queries, keys and values.
    "neox": transformers.GPTNeoXConfig(num_attention_heads=4, **SIZES),
}
TARGETS = {
    "all": ("query", "key", "value", "out", "gate", "up", "down", "head"),
    "some": ("query", "value", "down"),
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_what_we_write(name, targets, tmp_path, one_device):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(tmp_path / "base")
    arch = hf.read_arch(tmp_path / "base")
    lora = Lora(3, 7.0, tuple(t for t in TARGETS[targets] if t != "gate" or arch.gated))
    arch = dataclasses.replace(arch, lora=lora)
    adapters = model.init_adapters(arch, jax.random.key(0))
    for one, key in zip(adapters.values(), jax.random.split(jax.random.key(1), len(adapters))):
        one["b"] = 0.3 * jax.random.normal(key, one["b"].shape)
    written = hf.save_adapter(tmp_path / "adapter", arch, adapters, source=tmp_path / "base", dtype=np.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.tensor(np.random.default_rng(0).integers(0, 96, (2, 12)))
    with torch.no_grad():
        before = base(ids).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(base, written)
        want = theirs(ids).logits.numpy()
    assert np.abs(want - before).max() > 0.1
    held = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    written_as_rows = {"neox": 3}.get(name, 1)  # A's and B's of the three stand beside zeros
    assert held >= sum(a.size for a in jax.tree.leaves(adapters)) and (
        written_as_rows > 1 or held == sum(a.size for a in jax.tree.leaves(adapters))
    )
    # Ours with adapters, merged and read back by transformers (whose parity with our own forward pass is tested apart).
    params = model.merged(arch, model.join(arch, adapters, hf.load(tmp_path / "base", arch, one_device)))
    plain = dataclasses.replace(arch, lora=None)
    merged = hf.save(tmp_path / "merged", plain, params, source=tmp_path / "base", dtype=np.float32)
    with torch.no_grad():
        got = transformers.AutoModelForCausalLM.from_pretrained(merged)(ids).logits.numpy()
    # Measured floor: 8e-7 of the largest logit.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_run_that_exports_its_adapter(tiny, tiny_config):
    """The folder holds no weights of the model; with them it gives what the merged export of the same run gives."""
    flags = ("--loop.iterations=1", "--lora.rank=4", "--optimizer.learning_rate=3e-2", "--model.weights=pretrained")
    start = hf.save(tiny / "drawn", *drawn(tiny), source=tiny / "model", dtype=np.float32)
    flags += (f"--model.path={start}",)
    merged = trainer.train(tiny_config(*flags, run="merged"))
    export = trainer.train(tiny_config(*flags, "--lora.export=adapter", run="adapter"))
    names = {p.name for p in pathlib.Path(export).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "model.safetensors" not in names and "config.json" not in names
    ids = torch.tensor([[1, 5, 9, 13, 4, 7]])
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(merged)(ids).logits.numpy()
        base = transformers.AutoModelForCausalLM.from_pretrained(start)
        before = base(ids).logits.numpy()
        got = peft.PeftModel.from_pretrained(base, export)(ids).logits.numpy()
    assert np.abs(want - before).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def drawn(tiny) -> tuple:
    arch = hf.read_arch(tiny / "model")
    return arch, model.init(arch, jax.random.key(0))
