"""Scoring as trees beside scoring each response with its own copy of the prompt, both packed: what sharing gives.

    python tests/benchmarks/scoring.py [--branches 8] [--response 128] [--out FILE.jsonl]

Works of equal responses behind prompts as long as one response, and four times as long; a model whose head is small
beside its layers (vocabulary 512). The limit is the ratio of tokens: (p + r)·C / (p + r·C). Both sides' log-probs have
to agree to 1e-3.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from harness import LLAMA, finish, spread, timed

from sera_jax import mesh as meshes
from sera_jax import model, programs, score
from sera_jax.hf import config_json
from sera_jax.programs import Compute
from sera_jax.records import Tree


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--branches", type=int, default=8)
    p.add_argument("--response", type=int, default=128)
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--out")
    a = p.parse_args()
    mesh = meshes.make(1, 1, 1, jax.devices()[:1])
    arch = config_json.arch_of({**LLAMA, "vocab_size": 512}, None)
    params = jax.jit(lambda: model.init(arch, jax.random.key(0)))()
    run = programs.score_rows(programs.scorer(arch, mesh, Compute(jnp.float32)), params, mesh)
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(3, 512, n).astype(np.int32)
    rows = []
    for times in (1, 4):
        prompts = [ids(times * a.response) for _ in range(a.prompts)]
        trees = [Tree(f"{i}", x, tuple(ids(a.response) for _ in range(a.branches))) for i, x in enumerate(prompts)]
        apart = [Tree(t.id, t.prompt, (branch,)) for t in trees for branch in t.branches]
        found, seconds = [], []
        for some in (trees, apart):
            plan = score.plan_for(some, arch, mesh)
            found.append(score.logps(some, run, plan))
            seconds.append(spread(timed(lambda some=some, plan=plan: score.logps(some, run, plan), a.times)))
        if np.abs(found[0] - found[1]).max() > 1e-3:
            raise SystemExit(f"log-probs differ by {np.abs(found[0] - found[1]).max()}: not the same work.")
        limit = sum(t.length for t in apart) / sum(t.length for t in trees)
        gain = seconds[1]["median"] / seconds[0]["median"]
        row = {"prompt": times * a.response, "responses": f"{a.branches} × {a.response}"}
        row |= {"s, trees": seconds[0]["median"], "s, apart": seconds[1]["median"]}
        rows.append(row | {"ratio": gain, "limit": limit, "share of it": gain / limit})
    finish("scoring", a.out, rows)


if __name__ == "__main__":
    main()
