"""The GPU kernels of tree attention compiled for GPUs that are not there: registers a thread, spills, shared memory.

    pip install triton    # brings its own compiler and ptxas; needs no GPU
    python tests/benchmarks/gpu_compile.py [--targets 80 90] [--sizes 64 80 96 128 256] [--out FILE]

The code is what Pallas hands to XLA, which compiles it by a Triton of its own: another version, so other figures.
"""

import argparse
import pathlib
import re
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import triton
import triton.backends.nvidia
from harness import finish
from jax._src.lib.mlir import ir
from jax._src.pallas.triton import lowering
from triton.backends.compiler import GPUTarget

from sera_jax import triton_kernel


def kernels(size: int, dtype: jnp.dtype) -> list[tuple[str, str, int, int]]:
    """(name, Triton's code, warps, stages) of forward and backward of two rows of 2,048 tokens, 32 and 8 heads."""

    def run(q, k, v, ids):
        blocks = triton_kernel.blocks(ids, ids, ids, None)
        out, pull = jax.vjp(lambda *of: triton_kernel.attend(*of, blocks, scale=size**-0.5), q, k, v)
        return out, pull(out)

    q, k = (jax.ShapeDtypeStruct((2, heads, 2048, size), dtype) for heads in (32, 8))
    traced = jax.jit(run).trace(q, k, k, jax.ShapeDtypeStruct((2, 2048), jnp.int32))
    found = []

    def walk(operation: ir.Operation) -> None:
        for one in (op.operation for region in operation.regions for block in region for op in block):
            if one.name == "stablehlo.custom_call" and "triton" in one.attributes["call_target_name"].value:
                told = one.attributes["mhlo.backend_config"]
                with lowering._new_ir_context() as context, ir.Location.unknown(context):
                    code = ir.Module.parse(told["ir"].value_bytes, context).operation.get_asm(enable_debug_info=False)
                found.append((told["name"].value, code, told["num_warps"].value, told["num_stages"].value))
            walk(one)

    walk(traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo").operation)
    return found


def compiled(code: str, target: int, warps: int, stages: int) -> dict[str, object]:
    """What ptxas says of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source, ptx = (pathlib.Path(folder, name) for name in ("kernel.ttir", "kernel.ptx"))
        source.write_text(code, encoding="utf-8")
        options = {"num_warps": warps, "num_stages": stages}
        kernel = triton.compile(str(source), target=GPUTarget("cuda", target, 32), options=options)
        ptx.write_text(kernel.asm["ptx"], encoding="utf-8")
        tool = sorted(pathlib.Path(triton.backends.nvidia.__file__).parent.glob("bin/ptxas*"))[-1]
        name = f"sm_{target}a" if target >= 90 else f"sm_{target}"
        words = [tool, "-v", f"--gpu-name={name}", ptx, "-o", "/dev/null"]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    products = next(name for name in ("wgmma", "mma.sync", "fma") if name in kernel.asm["ptx"])
    return {
        "registers": int(re.search(r"Used (\d+) registers", told)[1]),
        "spilled bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", told)),
        "shared KiB": kernel.metadata.shared / 1024,
        "products": products,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--targets", type=int, nargs="*", default=(80, 90))
    p.add_argument("--sizes", type=int, nargs="*", default=(64, 80, 96, 128, 256))
    p.add_argument("--out")
    a = p.parse_args()
    rows = []
    for dtype in (jnp.bfloat16, jnp.float32):
        for size in a.sizes:
            for name, code, warps, stages in kernels(size, dtype):
                for target in a.targets:
                    of = {"kernel": name, "dtype": jnp.dtype(dtype).name, "head size": size, "target": f"sm_{target}"}
                    rows.append(of | compiled(code, target, warps, stages))
    finish("gpu_compile", a.out, rows, triton=triton.__version__)


if __name__ == "__main__":
    main()
