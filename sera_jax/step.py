"""One optimiser update of any loss: microbatches in a loop with a traced trip count, sums and weights divided once.

A loss here is `loss_fn(trainable, frozen, microbatch, key) -> (sum, weight, metrics)`; the update's gradient is that of
Σ sum / Σ weight over the microbatches. Losses that couple the examples of a batch give `outputs_fn` and
`outputs_loss_fn` instead and run in two passes (`coupled_gradients`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sera_jax.records import Batch

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
    "linear": lambda x: 1 - x,
    "constant": lambda x: jnp.ones_like(x),
}
"""Factor of the peak learning rate at share x in [0, 1] of the updates after the warm-up."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update turns into its successor: donated, so never use one again after passing it in.

    params: trainable weights, float32. moments: optax state, float32. step: int32, updates since the moments were
    fresh.
    """

    params: Any
    moments: Any
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Slice a of a Batch: rows [B, ...], its slot values and those of its tokens."""

    rows: Any
    reference_BS: jax.Array
    weight_BS: jax.Array
    target_BS: jax.Array
    tokens: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


def optimizer(
    *, b1: float, b2: float, eps: float, weight_decay: float, clip: float, decays: Any
) -> optax.GradientTransformation:
    """AdamW without its learning rate, which `apply` multiplies in.

    Args:
        decays: tree of bools like the weights: which of them decay.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(weight_decay, mask=decays) if weight_decay else optax.identity(),
    )


def learning_rate(step: jax.Array, total: jax.Array, *, peak: float, schedule: str, warmup: float) -> jax.Array:
    """Linear warm-up over a share of the updates, then SCHEDULES[schedule] down to the last one.

    `step` and `total` are traced, so that stages of different lengths share one program. The first update of a warm-up
    already moves: its rate is peak / warm-up updates.
    """
    total = jnp.maximum(total, 1).astype(jnp.float32)
    rise = jnp.ceil(warmup * total)
    done = step.astype(jnp.float32)
    after = jnp.clip((done - rise) / jnp.maximum(total - rise, 1), 0, 1)
    return peak * jnp.where(done < rise, (done + 1) / jnp.maximum(rise, 1), SCHEDULES[schedule](after))


def microbatch(batch: Batch, index: jax.Array) -> Microbatch:
    """Microbatch `index` of a batch."""
    return Microbatch(
        *jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False),
            (batch.rows, batch.reference_ABS, batch.weight_ABS, batch.target_ABS, batch.tokens),
        )
    )


def gradients(loss_fn: Callable, params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict]:
    """Gradient of Σ sum / Σ weight, and the metrics divided likewise (with "loss" among them)."""

    def one(p: Any, index: jax.Array) -> tuple[jax.Array, Any]:
        total, weight, metrics = loss_fn(p, frozen, microbatch(batch, index), jax.random.fold_in(key, index))
        return total, (weight, {"loss": total, **metrics})

    sums = _zeros_like(params)

    def add(index: jax.Array, before: Any) -> Any:
        total, pull, aux = jax.vjp(lambda p: one(p, index), params, has_aux=True)
        pull.with_refs(sums)(jnp.ones_like(total))
        return jax.tree.map(jnp.add, before, aux)

    zeros = _zeros_like_output(lambda: one(params, jnp.int32(0))[1])
    weight, metrics = jax.lax.fori_loop(0, batch.count, add, zeros)
    scale = 1 / jnp.maximum(weight, 1e-30)
    return jax.tree.map(lambda g: jax.freeze(g) * scale, sums), jax.tree.map(lambda m: m * scale, metrics)


def coupled_gradients(
    outputs_fn: Callable, outputs_loss_fn: Callable, params: Any, frozen: Any, batch: Batch, key: jax.Array
) -> tuple[Any, dict]:
    """Gradient of a loss of the *whole* batch's outputs, with one microbatch in memory at a time.

    Pass 1 runs `outputs_fn(trainable, frozen, microbatch, key) -> outputs` on every microbatch. Then
    `outputs_loss_fn(outputs [A, ...], batch) -> (loss, metrics)` gives dL/d outputs for all of them at once. Pass 2 is
    one vector-Jacobian product per microbatch. Microbatches past `batch.count` have zero outputs.
    """

    def forward(p: Any, index: jax.Array) -> Any:
        return outputs_fn(p, frozen, microbatch(batch, index), jax.random.fold_in(key, index))

    count = batch.reference_ABS.shape[0]
    blank = jax.tree.map(
        lambda a: jnp.zeros((count, *a.shape), a.dtype), jax.eval_shape(lambda: forward(params, jnp.int32(0)))
    )
    outputs = jax.lax.fori_loop(
        0,
        batch.count,
        lambda i, all_: jax.tree.map(lambda a, one: a.at[i].set(one), all_, forward(params, i)),
        blank,
    )
    (loss, metrics), d_outputs = jax.value_and_grad(outputs_loss_fn, has_aux=True)(outputs, batch)

    sums = _zeros_like(params)

    def backward(index: jax.Array, _: None) -> None:
        _, pull = jax.vjp(lambda p: forward(p, index), params)
        pull.with_refs(sums)(jax.tree.map(lambda d: d[index], d_outputs))

    jax.lax.fori_loop(0, batch.count, backward, None)
    return jax.tree.map(jax.freeze, sums), {"loss": loss, **metrics}


def apply(
    transform: optax.GradientTransformation, state: TrainState, grads: Any, metrics: dict, rate: jax.Array
) -> tuple[TrainState, dict]:
    """The next state, and the metrics with `grad_norm` (before clipping) and `learning_rate` added."""
    updates, moments = transform.update(grads, state.moments, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    metrics = {**metrics, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
    return TrainState(params, moments, state.step + 1), metrics


def _zeros_like(params: Any) -> Any:
    """References to zeros. The backward pass adds to them where they lie, layer by layer: a microbatch's own gradient
    would take as much memory again."""
    return jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)


def _zeros_like_output(function: Callable) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function))
