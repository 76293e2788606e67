"""Top-k of margins over devices: exact against a stable argsort, the bytes that cross devices, and seconds.

    python tests/benchmarks/selection.py [--margins 10000000] [--devices 8] [--out FILE.jsonl]

On a CPU the devices are simulated: there exactness and bytes count, not speed. One margin in ten is a tie.
"""

import argparse
import os


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--margins", type=int, default=10_000_000)
    p.add_argument("--devices", type=int, default=8)
    p.add_argument("--share", type=float, default=0.7)
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--out")
    a = p.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={a.devices}"
    import jax
    import numpy as np
    from harness import finish, spread, timed

    from sera_jax import mesh as meshes
    from sera_jax import sera
    from sera_jax.compile_check import hlo

    mesh = meshes.make(1, a.devices, 1, jax.devices()[: a.devices])
    n, keep = a.margins // a.devices * a.devices, int(a.share * a.margins)
    rng = np.random.default_rng(0)
    margin_N = rng.normal(size=n).astype(np.float32)
    tied = rng.random(n) < 0.1
    margin_N[tied] = np.round(margin_N[tied], 1)
    by_row = meshes.rows_sharding(mesh)
    given = (*meshes.put((margin_N, np.zeros(n, np.int32)), by_row), np.array([keep], np.int32))
    select = jax.jit(sera.top_k_mask, out_shardings=by_row)
    program = select.lower(*given).compile()
    mask = np.asarray(select(*given))
    wanted = np.zeros(n, bool)
    wanted[np.argsort(-margin_N, kind="stable")[:keep]] = True
    if not (mask == wanted).all():
        raise SystemExit(f"{(mask != wanted).sum()} of {n} differ from the stable argsort.")
    crossing = sum(hlo.moved(program.as_text()).links.values())
    seconds = spread(timed(lambda: jax.block_until_ready(select(*given)), a.times))
    row = {"margins": n, "devices": a.devices, "kept": keep, "equal to argsort": "all", "bytes in a device": crossing}
    finish("selection", a.out, [row | {"s": seconds["median"], "least": seconds["least"], "most": seconds["most"]}])


if __name__ == "__main__":
    main()
