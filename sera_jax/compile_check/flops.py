"""FLOPs of a program, from a walk of its jaxpr, and those that its work needs, by formula.

The compiler counts a loop body once and knows nothing of kernels. Counted are matrix products and convolutions (2 FLOPs
a multiply-add), what is recomputed or multiplied with padding included: *hardware* FLOPs of all chips together. *Model*
FLOPs are those of the useful tokens in one forward pass, thrice that in training.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sera_jax.model import Arch

PASSES = {jax.lax.Precision.DEFAULT: 1, jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}
"""bfloat16 products that a float32 product is made of, by its precision."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """done: FLOPs. issued: of the bfloat16 products that they are made of, float32 ones being several."""

    done: float
    issued: float


def count(jaxpr: Any, trips: int = 1) -> Flops:
    """FLOPs of a (closed) jaxpr, of all devices together.

    Args:
        trips: of while loops that do not say how often they turn at most; those of `fori_loop` with a known length are
            scans, which say it themselves.
    """
    done = issued = 0.0
    for flops, passes in _walk(jaxpr, trips):
        done, issued = done + flops, issued + flops * passes
    return Flops(done, issued)


def _walk(jaxpr: Any, trips: int) -> Iterator[tuple[float, int]]:
    """(FLOPs, passes) of every product."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, inside = eqn.primitive.name, list(_inside(eqn.params))
        if name == "dot_general":
            yield _dot(eqn), _passes(eqn)
        elif name == "conv_general_dilated":
            yield _convolution(eqn), _passes(eqn)
        elif name == "pallas_call" and _ends_with_the_data(eqn.params["grid_mapping"], inside):
            # The kernel itself tells what it does at most.
            passes = [passes for part in inside for _, passes in _walk(part, trips)]
            yield float(eqn.params["cost_estimate"].flops), max(passes, default=1)
        elif name == "cond":
            every = [list(_walk(branch, trips)) for branch in eqn.params["branches"]]
            yield from max(every, key=lambda products: sum(flops for flops, _ in products))
        else:
            times = _times(eqn, trips)
            for part in inside:
                yield from ((times * flops, passes) for flops, passes in _walk(part, trips))


def _ends_with_the_data(grid: Any, inside: Iterable[Any]) -> bool:
    """Does a kernel's grid, or a loop in it, turn as often as an array says?"""
    loops = (eqn for part in inside for eqn in getattr(part, "jaxpr", part).eqns if eqn.primitive.name == "while")
    return grid.num_dynamic_grid_bounds > 0 or any(_most_turns(eqn.params) == 0 for eqn in loops)


def _inside(params: Mapping[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(one, "eqns") or hasattr(getattr(one, "jaxpr", None), "eqns"):
                yield one


def _times(eqn: Any, trips: int) -> int:
    """How often the jaxprs inside an equation run."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"]
    if name == "while":
        return _most_turns(params) or trips
    if name == "shard_map":  # its shapes are those of one device
        axes = params.get("manual_axes") or params["mesh"].axis_names
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":  # every block of the grid: what a kernel skips by its mask counts
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _most_turns(params: Mapping[str, Any]) -> int:
    """The constant that a loop's counter has to stay below, 0 where its condition has none: the condition is that
    comparison of two numbers, or the comparison and something else."""
    jaxpr = params["cond_jaxpr"].jaxpr
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def limits(var: Any) -> Iterator[int]:
        eqn = None if hasattr(var, "val") else made.get(var)  # literals are made by nothing
        name = eqn.primitive.name if eqn else ""
        if name == "lt" and eqn.invars[0].aval.shape == () and hasattr(eqn.invars[1], "val"):
            yield int(eqn.invars[1].val)
        elif name in ("and", "convert_element_type"):
            for one in eqn.invars:
                yield from limits(one)

    return min(limits(jaxpr.outvars[0]), default=0)


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: Any) -> float:
    out_feature = eqn.params["dimension_numbers"].rhs_spec[0]
    kernel = eqn.invars[1].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[out_feature]


def _passes(eqn: Any) -> int:
    if any(var.aval.dtype != jnp.float32 for var in eqn.invars[:2]):
        return 1
    told = eqn.params["precision"]
    told = told if isinstance(told, (tuple, list)) else (told,)
    return max(PASSES.get(one, 1) for one in told)


# --- by formula -------------------------------------------------------------------------------------------------------


def matrix_parameters(arch: Arch) -> int:
    """Of the matrices of a layer: what every token is multiplied with."""
    d, h = arch.width, arch.head_dim
    return d * h * 2 * (arch.heads + arch.kv_heads) + (3 if arch.gated else 2) * d * arch.mlp


def forward(arch: Arch, *, tokens: float, seen: Sequence[float] | float, predicted: float) -> float:
    """Model FLOPs of a forward pass.

    2 a matrix parameter and token, 4·N·H a layer and (token, key that it sees), 2·V·D a predicted token.

    Args:
        tokens: useful ones. seen: Σ over tokens of the keys that each sees, of every layer or of each. predicted:
            tokens that logits are made for.
    """
    every = [seen] * arch.layers if isinstance(seen, (int, float)) else list(seen)
    products = 2 * matrix_parameters(arch) * arch.layers * tokens
    return products + 4 * arch.heads * arch.head_dim * sum(every) + 2 * arch.vocab * arch.width * predicted


def seen_by(arch: Arch, prompt: int, branches: Iterable[int]) -> list[float]:
    """Σ over the tokens of a prompt tree of the keys that each sees, for every layer: windows count positions."""
    lengths = list(branches)

    def within(window: int | None) -> float:
        total = _causal(0, prompt, window)
        return float(total + sum(_causal(prompt, length, window) for length in lengths))

    windows = arch.windows or (None,) * arch.layers
    known = {window: within(window) for window in set(windows)}
    return [known[window] for window in windows]


def _causal(before: int, length: int, window: int | None) -> int:
    """Σ over positions before .. before + length - 1 of min(position + 1, window)."""
    last = before + length
    full = min(max(window or last, before), last)  # positions below `full` see everything
    return (full * (full + 1) - before * (before + 1)) // 2 + (last - full) * (window or 0)
