"""Attention in packed rows, dense and in loops over blocks: forward, and forward + backward.

    python tests/benchmarks/attention.py [--heads 8 --kv-heads 4 --size 32] [--out FILE.jsonl]

Rows of trees of equal length, half prompt, a quarter each branch, or of one tree. Results and gradients of all forms
have to agree to 1e-4 of the largest before they are timed.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from harness import finish, spread, timed

from sera_jax import attention
from sera_jax import mesh as meshes

SHAPES = ((8, 128, 60), (8, 256, 120), (4, 384, 120), (2, 640, 240), (2, 1024, 240), (4, 2048, 2048))
"""Rows, their tokens, and those of a tree."""


def measured(form: str, trees: tuple, mesh, qkv: tuple, d_out: jax.Array, times: int) -> tuple[tuple, dict]:
    """What a form gives forward and backward, and its milliseconds."""

    def forward(*qkv):
        return attention.over_rows(form, *trees, mesh=mesh)(*qkv, None)

    def both(*qkv):
        out, pull = jax.vjp(forward, *qkv)
        return out, *pull(d_out)

    row = {}
    for name, run in (("forward", jax.jit(forward)), ("both", jax.jit(both))):
        seconds = timed(lambda run=run: jax.block_until_ready(run(*qkv)), times)
        row[f"{form} {name}, ms"] = 1e3 * spread(seconds)["median"]
    return jax.jit(both)(*qkv), row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--kv-heads", type=int, default=4)
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--forms", nargs="*", default=["xla", "loops"])
    p.add_argument("--times", type=int, default=9)
    p.add_argument("--out")
    a = p.parse_args()
    mesh = meshes.make(1, 1, 1, jax.devices()[:1])
    rows = []
    for count, length, of_tree in SHAPES:
        at = np.arange(length)[None].repeat(count, 0)
        tree, position = at // of_tree + 1, at % of_tree
        branch = np.where(position < of_tree // 2, 0, np.where(position < 3 * of_tree // 4, 1, 2))
        position = np.where(branch == 2, position - of_tree // 4, position)
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, d_out = (
            jax.random.normal(key, (count, length, heads, a.size))
            for key, heads in zip(keys, (a.heads, a.kv_heads, a.kv_heads, a.heads))
        )
        row, found = {"rows": count, "tokens": length, "a tree": of_tree}, []
        for form in a.forms:
            result, times = measured(form, (tree, branch, position), mesh, (q, k, v), d_out, a.times)
            found, row = [*found, result], row | times
        apart = max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for other in found for x, y in zip(other, found[0]))
        if apart > 1e-4:
            raise SystemExit(f"results or gradients differ by {apart} of the largest: not the same work.")
        rows.append(row | {"apart": apart})
    finish("attention", a.out, rows, heads=a.heads, kv_heads=a.kv_heads, size=a.size)


if __name__ == "__main__":
    main()
