"""Seconds from the start of a process to the end of its first update, with an empty compilation cache and a filled one.

    python tests/benchmarks/first_step.py [--layers 4 32] [--out FILE.jsonl]

A Llama of the update's width with so many layers, 8 pairs in rows of 512 tokens. The loop over layers is one body,
whatever their number; the persistent cache is the one that `sera_jax.train` switches on.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import sys
import time

BEGAN = time.perf_counter()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="/tmp/sera_jax_benchmarks")
    p.add_argument("--layers", type=int, nargs="*", default=[4, 32])
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--out")
    p.add_argument("--own", type=int, help="internal: one process, with so many layers")
    a = p.parse_args()
    cache = pathlib.Path(a.work) / "first-step-cache"
    if a.own:
        print(json.dumps(one(a.own, str(cache))))
        return
    from harness import child, finish

    rows = []
    for layers in a.layers:
        for state in ("empty", "filled"):
            told = []
            for _ in range(a.times):
                if state == "empty":
                    shutil.rmtree(cache, ignore_errors=True)
                told.append(child(sys.executable, "first_step.py", "--work", a.work, "--own", layers))
            row = {"layers": layers, "cache": state}
            rows.append(row | {key: statistics.median(t[key] for t in told) for key in told[0]})
    finish("first step", a.out, rows)


def one(layers: int, cache: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from harness import LLAMA

    from sera_jax import losses, programs, step
    from sera_jax import mesh as meshes
    from sera_jax import rows as rowlib
    from sera_jax import run as runs
    from sera_jax.hf import config_json
    from sera_jax.programs import Compute
    from sera_jax.records import Tree

    imported = time.perf_counter()
    programs.compilation_cache(cache)
    mesh = meshes.make(1, 1, 1, jax.devices()[:1])
    arch = config_json.arch_of({**LLAMA, "num_hidden_layers": layers}, None)
    transform = step.optimizer(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0, decays=programs.decaying(arch))
    schedule = {"peak": 1e-5, "schedule": "constant", "warmup": 0.0}
    compute = Compute(jnp.dtype("float32"))
    update = programs.preference_update(arch, mesh, compute, transform, losses.LOSSES["dpo"], {"beta": 0.1}, schedule)
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(3, 32000, n).astype(np.int32)
    trees = [Tree(f"{i}", ids(60), (ids(34), ids(34))) for i in range(8)]
    stage = runs.Stage(
        name="update", iteration=1, batches=[np.arange(8)], trees=trees, reference_F=np.zeros(16, np.float32),
        weight_N=np.ones(8, np.float32), plans=(rowlib.Plan(512, 512, 8, 2),),
    )  # fmt: skip
    whole = meshes.replicated(mesh)
    state = programs.fresh_state(arch, mesh, transform)(programs.random_params(arch, mesh)(jax.random.key(0)))
    total, key = meshes.put(np.int32(1), whole), meshes.put(jax.random.key(0), whole)
    jax.block_until_ready(state)
    ready = time.perf_counter()
    for batch, _ in runs.loaded(stage, mesh, 0):
        state, metrics = update(state, {}, batch, total, key)
        float(metrics["loss"])
    done = time.perf_counter()
    return {
        "s, imports": imported - BEGAN,
        "s, weights": ready - imported,
        "s, first update": done - ready,
        "s, in all": done - BEGAN,
    }


if __name__ == "__main__":
    main()
