"""The works of these benchmarks compiled for TPU slices: memory, bound, seconds of compilation. No TPU is needed.

    pip install 'sera_jax[tpu]'   # libtpu
    JAX_PLATFORMS=cpu python tests/benchmarks/tpu.py [--model llama-3-8b] [--out FILE] [-- words of a config]

Every program of a config (update, scorer, prefill, decode, selection) on the slices named, and the update with each
form of attention. Nothing runs: the bound is what the chip's peak rates allow (`sera_jax.compile_check`).
"""

import argparse
import pathlib

from harness import finish

from sera_jax import config as configs
from sera_jax.compile_check import chips, door
from sera_jax.config import TrainConfig

HERE = pathlib.Path(__file__).resolve().parents[2] / "configs"
SLICES = ("v4:2x2x2", "v5e:4x4", "v5p:2x2x1", "v6e:2x4")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="llama-3-8b", help="a name of configs/models and configs/paper")
    p.add_argument("--slices", nargs="*", default=SLICES)
    p.add_argument("--attention", nargs="*", default=("tree", "splash"))
    p.add_argument("--only", nargs="*", default=(), help="some programs, in place of all")
    p.add_argument("--out")
    p.add_argument("own", nargs="*", help="further words for the config")
    a = p.parse_args()
    chips.quiet()
    rows = []
    for where in a.slices:
        for attention in a.attention:
            words = [f"--config={HERE / 'paper' / name}.yaml" for name in ("ultrafeedback", a.model)]
            words += [f"--model.path={HERE / 'models' / a.model}", "--run.dir=unread", "--optimizer.microbatch_rows=1"]
            words += [f"--model.attention={attention}", *a.own]
            config = configs.parse(TrainConfig, words)
            only = tuple(a.only) if attention == a.attention[0] else ("update",)
            found = door.check(config, door.CompileCheckConfig(where, only=only, traffic="loops", search=False))
            for name, fit in found.fits.items():
                bound = found.bounds.get(name)
                rows.append(
                    {
                        "slice": where,
                        "attention": attention,
                        "program": name,
                        "GiB a chip": fit.used / 2**30,
                        "of": fit.available / 2**30,
                        "compiled in, s": getattr(fit.done, "seconds", None),
                        "bound, s": bound.step if bound else None,
                        "binds": bound.binds if bound else None,
                        "useful FLOPs ÷ done": bound.useful / bound.flops.done if bound and bound.flops.done else None,
                    }
                )
    finish("tpu", a.out, rows, model=a.model)


if __name__ == "__main__":
    main()
