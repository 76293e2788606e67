"""Every program of a config, compiled for a TPU that is not there: does it fit, and how fast can it be at best?

door     reads the config, compiles, prints, gives the verdict          ← read this first
cases    the programs of a config, each with its abstract arguments
chips    TPU generations, slices by name
memory   what a compiled program holds; what the compiler says of one that is too large
flops    FLOPs, from a walk of the jaxpr and by formula
hlo      bytes to and from HBM and between chips, read off the compiled program
bounds   all of them against the chip's peaks
advice   the nearest change that fits

python -m sera_jax.compile_check --config configs/x.yaml --topology v5e:4x4 [--slices 2] [--json FILE] [keys of train]
python -m sera_jax.compile_check reward_model --config configs/reward_hh.yaml --topology v5e:4x4 [keys of reward_model]
"""

from sera_jax.compile_check.door import main

__all__ = ["main"]
