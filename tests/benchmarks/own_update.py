"""sera_jax's own side of update.py, in its own process: one JSON object with losses, seconds of each step, peak memory.

    python tests/benchmarks/own_update.py --model DIR --pairs FILE --batch B --steps S --lr LR [switches]

The switches turn off, one at a time, what makes the step fast: --unshared (each response gets a copy of its prompt),
--unpacked (one pair a row), --all-logits (logits at every token), --reference-inside (reference log-probs in the step).
"""

import argparse
import dataclasses
import json
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from harness import read_trees

from sera_jax import attention, hf, losses, programs, score, step
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax import run as runs
from sera_jax.programs import Compute

SWITCHES = ("unshared", "unpacked", "all-logits", "reference-inside")


def unshared(trees: list) -> list:
    """Trees without a prompt, whose branches are prompt + response."""
    whole = lambda tree: tuple(np.concatenate((tree.prompt, branch)) for branch in tree.branches)
    return [dataclasses.replace(tree, prompt=tree.prompt[:0], branches=whole(tree)) for tree in trees]


def responses_alone(batch, trees: list):
    """A batch of `unshared` trees with the targets that lie in prompts taken out."""
    rows = jax.tree.map(np.array, batch.rows)
    prompt_F = np.repeat([len(tree.prompt) for tree in trees], 2)
    names, slots = ("parent_BM", "target_BM", "slot_BM"), rows.example_BS.shape[2]
    example = np.take_along_axis(rows.example_BS, np.minimum(rows.slot_BM, slots - 1), axis=2)
    at = np.take_along_axis(rows.position_BL, rows.parent_BM, axis=2) + 1
    kept = (rows.slot_BM < slots) & (at >= prompt_F[example])
    first = np.argsort(~kept, axis=2, kind="stable")
    out = {name: np.take_along_axis(getattr(rows, name), first, axis=2) for name in names}
    out["slot_BM"] = np.where(np.take_along_axis(kept, first, axis=2), out["slot_BM"], slots)
    return dataclasses.replace(batch, rows=dataclasses.replace(rows, **out))


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--model", required=True)
    p.add_argument("--pairs", required=True)
    p.add_argument("--batch", type=int, required=True)
    p.add_argument("--steps", type=int, required=True)
    p.add_argument("--lr", type=float, required=True)
    p.add_argument("--attention", default="auto")
    p.add_argument("--remat", default="none")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--chunk", type=int, default=256)
    p.add_argument("--row-tokens", type=int, default=0)
    p.add_argument("--microbatch-rows", type=int, default=0)
    p.add_argument("--row-shapes", type=int, default=2)
    p.add_argument("--devices", type=int, default=1, help="rows are split over so many; CPUs are cut into them")
    for name in SWITCHES:
        p.add_argument(f"--{name}", action="store_true")
    a = p.parse_args()
    jax.config.update("jax_num_cpu_devices", a.devices)
    mesh = meshes.make(a.devices, 1, 1, jax.devices()[: a.devices])
    arch = hf.read_arch(a.model)
    compute = Compute(jnp.dtype(a.dtype), a.remat, a.chunk, a.attention)
    trees = read_trees(a.pairs)[: a.batch * a.steps]
    params = hf.load(a.model, arch, mesh)
    order = [np.arange(i * a.batch, (i + 1) * a.batch) for i in range(a.steps)]

    laid = unshared(trees) if a.unshared else trees
    lengths = rowlib.measure(laid)
    if a.unpacked:
        longest, most = (-(-int(n) // 128) * 128 for n in lengths[:, :2].max(axis=0))
        plans = (rowlib.Plan(longest, most, 2, a.microbatch_rows or 1),)
    else:
        plans = rowlib.plans(
            lengths,
            batch=a.batch,
            per_key=attention.per_key(mesh, arch.width),
            device_tokens=attention.device_tokens(mesh),
            shards=a.devices,
            row_tokens=a.row_tokens,
            microbatch_rows=a.microbatch_rows,
            shapes=a.row_shapes,
        )
    if a.all_logits:
        plans = tuple(dataclasses.replace(plan, targets=plan.length) for plan in plans)
        head_logps = score.head_logps
        score.head_logps = lambda *args: head_logps(*args[:-1])  # no chunk is left out

    scorer, by_row = programs.scorer(arch, mesh, compute), meshes.rows_sharding(mesh)
    reference_F = np.zeros(2 * len(trees), np.float32)
    reference = hf.load(a.model, arch, mesh) if a.reference_inside else None
    if not a.reference_inside:
        score_plan = score.plan_for(trees, arch, mesh)
        run = programs.score_rows(scorer, params, mesh)
        for start in range(0, len(trees), 32):
            some = trees[start : start + 32]
            reference_F[2 * start : 2 * (start + len(some))] = score.logps(some, run, score_plan)

    transform = step.optimizer(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0, decays=programs.decaying(arch))
    schedule = {"peak": a.lr, "schedule": "constant", "warmup": 0.0}
    update = programs.preference_update(arch, mesh, compute, transform, losses.LOSSES["dpo"], {"beta": 0.1}, schedule)
    state = programs.fresh_state(arch, mesh, transform)(params)
    whole = meshes.replicated(mesh)
    total, key = meshes.put(np.int32(a.steps), whole), meshes.put(jax.random.key(0), whole)
    stage = runs.Stage(
        name="update", iteration=1, batches=order, trees=laid, reference_F=reference_F,
        weight_N=np.ones(len(trees), np.float32), plans=plans,
    )  # fmt: skip
    batches = runs.loaded(stage, mesh, 0)
    seconds, waited, told, useful, padded, compiled = [], [], [], 0, 0, set()
    for number in range(a.steps):
        began = time.perf_counter()
        batch, fill = next(batches)
        idle = time.perf_counter() - began
        if a.unshared:
            own = responses_alone(batch, [trees[i] for i in order[number]])
            batch = meshes.put(own, programs.batch_shardings(mesh))
            began = time.perf_counter()
        if a.reference_inside:
            rows = jax.tree.map(np.asarray, batch.rows)
            fresh = [
                scorer(reference, meshes.put(jax.tree.map(lambda x, i=i: x[i], rows), by_row))
                for i in range(int(batch.count))
            ]
            filler = [np.zeros_like(fresh[0])] * (len(rows.tokens_BL) - len(fresh))
            logp = meshes.put(np.stack([*map(np.asarray, fresh), *filler]), meshes.rows_sharding(mesh, axis=1))
            batch = dataclasses.replace(batch, reference_ABS=logp)
        state, metrics = update(state, {}, batch, total, key)
        told.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        shape = batch.rows.tokens_BL.shape
        if shape in compiled:  # the first of a shape is compiled
            seconds.append(time.perf_counter() - began)
            waited.append(idle)
        compiled.add(shape)
        useful, padded = useful + fill.useful, padded + fill.padded
    memory = update.lower(state, {}, batch, total, key).compile().memory_analysis()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "losses": told,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "temporaries_mib": memory.temp_size_in_bytes / 2**20,
                "useful": useful / padded,
                "waited": sum(waited) / sum(seconds),
                "plan": [dataclasses.asdict(plan) for plan in plans],
            }
        )
    )


if __name__ == "__main__":
    main()
