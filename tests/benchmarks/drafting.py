"""Would drafts from n-grams pay? How many of the tokens that a model samples were to be had from its own text.

    python tests/benchmarks/drafting.py --data DATA [--out FILE.jsonl]

stories260K goes on with its own stories. At each place the last n tokens are looked for earlier in the same text; the
three that followed there are the draft, and those that the model goes on to sample are accepted. A pass that checks a
draft of three multiplies four tokens where one was; what it gives is the tokens of a pass.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from harness import finish, shared_data

from sera_jax import hf, programs, sample
from sera_jax import mesh as meshes
from sera_jax.programs import Compute

DRAFT = 3


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--stories", type=int, default=64)
    p.add_argument("--new-tokens", type=int, default=256)
    p.add_argument("--out")
    a = p.parse_args()
    model = shared_data(a.data) / "models" / "stories260K"
    mesh = meshes.make(1, 1, 1, jax.devices()[:1])
    arch, compute = hf.read_arch(model), Compute(jnp.float32)
    weights = programs.to_decode(arch, mesh, jnp.float32)(hf.load(model, arch, mesh))
    rows = []
    for temperature in (0.0, 0.7, 1.0):
        values = sample.sampling(temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, eos_ids=(1,))
        run = programs.sampler(
            arch, mesh, compute, lambda: weights, sample.seeded(0), values,
            candidates=a.stories, max_new_tokens=a.new_tokens, slots=a.stories,
        )  # fmt: skip
        prompt = np.array([1], np.int32)
        texts = [ids for _, out, _ in sample.run_batches(run, [prompt], [(32, np.array([0]))], 1) for ids in out[0]]
        for n in (1, 2, 3):
            passes, tokens = zip(*(passes_of(text.tolist(), n) for text in texts))
            rows.append(
                {
                    "temperature": temperature,
                    "n": n,
                    "tokens a pass": sum(tokens) / sum(passes),
                    "multiplied a token": (1 + DRAFT) * sum(passes) / sum(tokens),
                }
            )
    finish("drafting", a.out, rows, stories=a.stories)


def passes_of(text: list[int], n: int) -> tuple[int, int]:
    """How many passes write a text with drafts, and its tokens."""
    at, passes = 1, 0
    while at < len(text):
        passes += 1
        draft = drafted(text[:at], n)
        accepted = next(
            (i for i, (x, y) in enumerate(zip(draft, text[at:])) if x != y), min(len(draft), len(text) - at)
        )
        at += accepted + 1
    return passes, len(text) - 1


def drafted(text: list[int], n: int) -> list[int]:
    """What followed the last n tokens where they stood before, the last such place; [] if nowhere."""
    last = text[-n:]
    for i in range(len(text) - n - 1, -1, -1):
        if text[i : i + n] == last:
            return text[i + n : i + n + DRAFT]
    return []


if __name__ == "__main__":
    main()
