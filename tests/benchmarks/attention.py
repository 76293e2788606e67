"""Attention in packed rows, dense, in loops over blocks, in kernels: forward, and forward + backward.

    python tests/benchmarks/attention.py [--heads 8 --kv-heads 4 --size 32] [--out FILE.jsonl]

and on a GPU, at the shapes of Llama 3.2 1B:

    python tests/benchmarks/attention.py --heads 32 --kv-heads 8 --size 64 --dtype bfloat16 \\
        --shapes 8,2048,512 8,2048,2048 --forms xla loops triton cudnn

Rows of trees of equal length, half prompt, a quarter each branch, or of one tree. Results and gradients of all forms
have to agree to 1e-4 of the largest (3e-2 in bfloat16) before they are printed. TFLOP/s are useful ones: 4·N·H of each
(query, key) that the rule lets see, 2.5 times as many backward, whatever a form computes beside them.
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


def cudnn(tree: np.ndarray, branch: np.ndarray, _: np.ndarray) -> attention.Attend:
    """cuDNN's, the mask as an array of L² a row: NVIDIA GPUs alone, 16 bits."""
    mask_B1LL = attention.tree_mask(jnp.asarray(tree), jnp.asarray(branch))[:, None]

    def run(q: jax.Array, k: jax.Array, v: jax.Array, window: None) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask_B1LL, implementation="cudnn")

    return run


def measured(
    form: str, trees: tuple, mesh, qkv: tuple, d_out: jax.Array, times: int, flops: float
) -> tuple[tuple, dict]:
    """What a form gives forward and backward, its milliseconds and, elsewhere than on CPUs, its useful TFLOP/s.

    Args:
        flops: useful ones of the forward pass.
    """

    def forward(*qkv):
        attend = cudnn(*trees) if form == "cudnn" else attention.over_rows(form, *trees, mesh=mesh)
        return attend(*qkv, None)

    def both(*qkv):
        out, pull = jax.vjp(forward, *qkv)
        return out, *pull(d_out)

    row = {}
    for name, run, work in (("forward", jax.jit(forward), flops), ("both", jax.jit(both), 3.5 * flops)):
        seconds = spread(timed(lambda run=run: jax.block_until_ready(run(*qkv)), times))["median"]
        row[f"{form} {name}, ms"] = 1e3 * seconds
        if attention.platform(mesh) != "cpu":
            row[f"{form} {name}, TFLOP/s"] = work / seconds / 1e12
    return jax.jit(both)(*qkv), row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--kv-heads", type=int, default=4)
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--shapes", nargs="*", default=SHAPES, type=lambda x: tuple(map(int, x.split(","))))
    p.add_argument("--forms", nargs="*", default=["xla", "loops"], choices=(*attention.ATTENTION, "cudnn"))
    p.add_argument("--times", type=int, default=9)
    p.add_argument("--out")
    a = p.parse_args()
    mesh = meshes.make(1, 1, 1, jax.devices()[:1])
    rows = []
    for count, length, of_tree in a.shapes:
        at = np.arange(length)[None].repeat(count, 0)
        tree, position = at // of_tree + 1, at % of_tree
        branch = np.where(position < of_tree // 2, 0, np.where(position < 3 * of_tree // 4, 1, 2))
        position = np.where(branch == 2, position - of_tree // 4, position)
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, d_out = (
            jax.random.normal(key, (count, length, heads, a.size), a.dtype)
            for key, heads in zip(keys, (a.heads, a.kv_heads, a.kv_heads, a.heads))
        )
        row, found = {"rows": count, "tokens": length, "a tree": of_tree}, []
        seen = int(attention.tree_mask(jnp.asarray(tree[:1]), jnp.asarray(branch[:1])).sum())
        flops = 4.0 * a.heads * a.size * count * seen
        for form in a.forms:
            result, times = measured(form, (tree, branch, position), mesh, (q, k, v), d_out, a.times, flops)
            found, row = [*found, [x.astype(jnp.float32) for x in result]], row | times
        apart = max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for other in found for x, y in zip(other, found[0]))
        if apart > (1e-4 if a.dtype == "float32" else 3e-2):
            raise SystemExit(f"results or gradients differ by {apart} of the largest: not the same work.")
        rows.append(row | {"apart": apart})
    told = {"heads": a.heads, "kv_heads": a.kv_heads, "size": a.size, "dtype": a.dtype}
    finish("attention", a.out, rows, device=mesh.devices.flat[0].device_kind, **told)


if __name__ == "__main__":
    main()
