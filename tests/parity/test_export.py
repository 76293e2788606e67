"""What a run exports is a checkpoint of transformers: no key missing or unexpected, equal logits, `generate()` works.

By hand, on the export of a real run:  python tests/parity/test_export.py runs/stories/sera/export "Once upon a time"
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import attention, data, hf, model
from sera_jax import mesh as meshes
from sera_jax import train as trainer

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers")


def check(folder: str, prompt: str) -> tuple[float, str]:
    """max|Δlogit| between transformers on torch and ours, and what `generate()` says."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tokenizer = data.load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = theirs(ids).logits[0].numpy()
        answer = theirs.generate(ids, max_new_tokens=20, do_sample=False)
    arch = hf.read_arch(folder)
    params = hf.load(folder, arch, meshes.make(1, 1, 1, jax.devices()[:1]))
    tokens = jnp.asarray(ids.numpy())
    position = jnp.arange(tokens.shape[1])[None]
    mask = attention.tree_mask(jnp.ones_like(tokens), jnp.zeros_like(tokens))

    def attend(q, k, v, _, window):
        seen = attention.within(mask, position, position, window)
        return attention.attend(q, k, v, seen, scale=arch.score_scale, cap=arch.score_cap), ()

    hidden, _ = model.hidden(arch, params, tokens, position, attend, longest=tokens.shape[1], dtype=jnp.float32)
    got = model.logits(arch, params, hidden[0], jnp.float32)
    return float(np.abs(np.asarray(got) - want).max()), tokenizer.decode(answer[0])


def test_the_export_of_a_run_loads_in_transformers(tiny_config):
    export = trainer.train(tiny_config("--loop.iterations=1", run="exported"))
    difference, text = check(str(export), "red cat runs")
    assert difference <= 1e-4
    assert text.split()[-1] and len(text.split()) > 3


if __name__ == "__main__":
    difference, text = check(*sys.argv[1:3])
    print(f"max |Δlogit| {difference:.2e}\ngenerate(): {text}")
