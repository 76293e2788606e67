"""Every jitted program of a run, from plain values: updates, scorer, sampler, selection, with shardings and donation.

Each builder returns a jitted function; its shapes come with its arguments, so one function compiles once per shape, and
builders of plain values give the same function again. All doors take their programs from here, so that what is checked
or benchmarked is what runs.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sera_jax import explore, losses, model, policy_gradient, sample, score, sera, step
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax.losses import Loss
from sera_jax.mesh import ROW_AXES
from sera_jax.model import Arch
from sera_jax.records import Batch, Rows, Sampling
from sera_jax.rows import Plan
from sera_jax.sample import Prefilled
from sera_jax.score import SlotSums
from sera_jax.step import Microbatch, TrainState


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the model is computed. dtype: of matrix products; remat: key of model.REMAT; chunk: of the head, tokens a
    row; attention: key of attention.ATTENTION, or "auto".
    """

    dtype: Any
    remat: str = "full"
    chunk: int = 256
    attention: str = "auto"


def compilation_cache(folder: str = "") -> None:
    """XLA's persistent cache: a program that any run compiled on this machine is not compiled again.

    Args:
        folder: of the cache; empty = ~/.cache/sera_jax/xla, "off" = leave JAX's own setting.
    """
    if folder != "off":
        base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        path = pathlib.Path(folder or os.path.join(base, "sera_jax", "xla")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(path))


def precision(compute: str) -> contextlib.AbstractContextManager:
    """Under it, float32 matrix products are float32: accelerators would otherwise multiply in fewer bits."""
    return jax.default_matmul_precision("highest" if compute == "float32" else "default")


def _by_value(builder: Callable) -> Callable:
    """functools.cache for builders that take dicts of plain values: the same values give the same function again, so
    that several runs of one process compile it once."""
    made: dict = {}

    @functools.wraps(builder)
    def build(*args: Any, **keywords: Any) -> Callable:
        plain = [tuple(v.items()) if isinstance(v, dict) else v for v in (*args, *keywords.values())]
        key = (*plain, *keywords)
        if key not in made:
            made[key] = builder(*args, **keywords)
        return made[key]

    return build


# --- weights and state ------------------------------------------------------------------------------------------------


def param_shardings(arch: Arch, mesh: Mesh, layout: str = "train") -> dict:
    """NamedShardings of the weights on a layout of the mesh, adapters left out."""
    return meshes.shardings(mesh, layout, model.dims(arch), model.abstract(arch))


def trainable_shardings(arch: Arch, mesh: Mesh) -> dict:
    """Of what trains: all weights, or the adapters."""
    shapes, dims = model.trainable(arch)
    return meshes.shardings(mesh, "train", dims, shapes)


def frozen_shardings(arch: Arch, mesh: Mesh) -> dict:
    """Of what does not train: nothing, or the weights beneath the adapters."""
    return {} if arch.lora is None else param_shardings(arch, mesh)


def abstract_params(arch: Arch, mesh: Mesh, layout: str = "train", dtype: Any = jnp.float32) -> dict:
    """Weights as ShapeDtypeStructs with shardings, for restoring and for compiling ahead of time."""
    return placed(_as(model.abstract(arch), dtype), param_shardings(arch, mesh, layout))


def placed(shapes: Any, where: Any) -> Any:
    """A tree of shapes, with the shardings of another tree."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)


def _as(shapes: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), shapes)


@functools.cache
def random_params(arch: Arch, mesh: Mesh, dtype: Any = jnp.float32) -> Callable[[jax.Array], dict]:
    """key → weights on the training layout, never whole on one device."""
    return jax.jit(
        lambda key: jax.tree.map(lambda w: w.astype(dtype), model.init(arch, key)),
        out_shardings=param_shardings(arch, mesh),
    )


@functools.cache
def random_score(arch: Arch, mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """key → a scalar head, float32 [1, D], from N(0, init_std²) as transformers draws it."""
    return jax.jit(
        lambda key: arch.init_std * jax.random.normal(key, (1, arch.width)), out_shardings=meshes.replicated(mesh)
    )


@functools.cache
def random_adapters(arch: Arch, mesh: Mesh) -> Callable[[jax.Array], dict]:
    """key → float32 adapters that add nothing yet, on the training layout."""
    return jax.jit(lambda key: model.init_adapters(arch, key), out_shardings=trainable_shardings(arch, mesh))


@functools.cache
def to_decode(arch: Arch, mesh: Mesh, dtype: Any) -> Callable[[dict], dict]:
    """Weights on the training layout → `dtype` on the decode layout, adapters merged in. Once a sampling stage."""
    return jax.jit(
        lambda params: jax.tree.map(lambda w: w.astype(dtype), model.merged(arch, params)),
        out_shardings=param_shardings(arch, mesh, "decode"),
    )


@functools.cache
def to_merged(arch: Arch, mesh: Mesh) -> Callable[[dict], dict]:
    """A policy → float32 weights on the training layout, adapters merged in."""
    return jax.jit(
        lambda params: jax.tree.map(lambda w: w.astype(jnp.float32), model.merged(arch, params)),
        out_shardings=param_shardings(arch, mesh),
    )


def decaying(arch: Arch) -> dict:
    """True for matrices, False for the scales of norms: what weight decay applies to."""
    shapes = model.trainable(arch)[0]
    return jax.tree.map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "bias")), shapes)


def state_shardings(
    arch: Arch, mesh: Mesh, transform: optax.GradientTransformation, moments: str = "device"
) -> TrainState:
    """Shardings of a TrainState: moments lie as their weights do, in the memory of `moments` (a key of MEMORY)."""
    where = trainable_shardings(arch, mesh)
    of_moments = optax.tree.map_params(
        transform,
        lambda _, s: s.with_memory_kind(MEMORY[moments]),
        jax.eval_shape(transform.init, model.trainable(arch)[0]),
        where,
        transform_non_params=lambda _: meshes.replicated(mesh),
    )
    return TrainState(where, of_moments, meshes.replicated(mesh))


MEMORY: dict[str, str | None] = {"device": None, "host": "pinned_host"}
"""Where moments lie between updates → JAX's name of that memory (None = the default one)."""


def abstract_state(
    arch: Arch, mesh: Mesh, transform: optax.GradientTransformation, moments: str = "device"
) -> TrainState:
    """ShapeDtypeStructs with shardings, for restoring and for compiling ahead of time."""
    shapes = model.trainable(arch)[0]
    shapes = TrainState(shapes, jax.eval_shape(transform.init, shapes), jax.ShapeDtypeStruct((), jnp.int32))
    return placed(shapes, state_shardings(arch, mesh, transform, moments))


def abstract_trainable(arch: Arch, mesh: Mesh) -> dict:
    """What trains as ShapeDtypeStructs with shardings."""
    return placed(model.trainable(arch)[0], trainable_shardings(arch, mesh))


def abstract_frozen(arch: Arch, mesh: Mesh, dtype: Any) -> dict:
    """The same of what does not train, which is kept in `dtype`: {} without LoRA."""
    return {} if arch.lora is None else abstract_params(arch, mesh, dtype=dtype)


@functools.cache
def fresh_state(
    arch: Arch, mesh: Mesh, transform: optax.GradientTransformation, moments: str = "device"
) -> Callable[[dict], TrainState]:
    """What trains (donated) → TrainState with zero moments at step 0."""
    return jax.jit(
        lambda params: TrainState(params, transform.init(params), jnp.int32(0)),
        out_shardings=state_shardings(arch, mesh, transform, moments),
        donate_argnums=0,
    )


@functools.cache
def blend(arch: Arch, mesh: Mesh, dtype: Any) -> Callable[[dict, dict, jax.Array], dict]:
    """(a, b, share) → share·a + (1-share)·b in `dtype`: the next `ema` reference; of adapters, factor by factor."""

    def mix(a: dict, b: dict, share: jax.Array) -> dict:
        return jax.tree.map(
            lambda x, y: (share * x.astype(jnp.float32) + (1 - share) * y.astype(jnp.float32)).astype(dtype), a, b
        )

    return jax.jit(mix, out_shardings=trainable_shardings(arch, mesh))


# --- scoring ----------------------------------------------------------------------------------------------------------


@functools.cache
def scorer(arch: Arch, mesh: Mesh, compute: Compute) -> Callable[[dict, Rows], jax.Array]:
    """(params, rows of one microbatch) → logp_BS float32, on every process."""

    def run(params: dict, rows: Rows) -> jax.Array:
        how = {"dtype": compute.dtype, "chunk": compute.chunk, "backend": compute.attention}
        return score.row_logps(arch, params, rows, mesh=mesh, **how)[0]

    return jax.jit(run, out_shardings=meshes.replicated(mesh))


@functools.cache
def token_scorer(arch: Arch, mesh: Mesh, compute: Compute) -> Callable[[dict, Rows], jax.Array]:
    """(params, rows of one microbatch) → logp_BM float32, of each response token, on every process."""

    def run(params: dict, rows: Rows) -> jax.Array:
        how = {"dtype": compute.dtype, "chunk": compute.chunk, "backend": compute.attention}
        return score.row_token_logps(arch, params, rows, mesh=mesh, **how)

    return jax.jit(run, out_shardings=meshes.replicated(mesh))


@functools.cache
def reward_scorer(arch: Arch, mesh: Mesh, compute: Compute) -> Callable[[dict, Rows], jax.Array]:
    """(params of a reward model, rows of one microbatch) → reward_BS float32, on every process."""

    def run(params: dict, rows: Rows) -> jax.Array:
        return score.row_rewards(arch, params, rows, mesh=mesh, dtype=compute.dtype, backend=compute.attention)[0]

    return jax.jit(run, out_shardings=meshes.replicated(mesh))


@functools.cache
def featurer(arch: Arch, mesh: Mesh, compute: Compute, dimension: int, seed: int) -> Callable[[dict, Rows], jax.Array]:
    """(params, rows of one microbatch) → phi_BSd float32, on every process: score.row_features.

    Args:
        dimension: of a random projection drawn from `seed`; 0 = the width of the model, as they are.
    """

    def run(params: dict, rows: Rows) -> jax.Array:
        how = {"dtype": compute.dtype, "backend": compute.attention}
        phi_BSD = score.row_features(arch, params, rows, mesh=mesh, **how)
        if not dimension:
            return phi_BSD
        onto_Dd = explore.projection(seed, arch.width, dimension)
        return jnp.einsum("bsk,kd->bsd", phi_BSD, onto_Dd, precision=jax.lax.Precision.HIGHEST)

    return jax.jit(run, out_shardings=meshes.replicated(mesh))


def abstract_rows(mesh: Mesh, plan: Plan) -> Rows:
    """The rows that `scorer` takes beside its weights."""
    shapes = jax.eval_shape(lambda: rowlib.empty(plan.rows, plan))
    return placed(shapes, jax.tree.map(lambda _: meshes.rows_sharding(mesh), shapes))


# --- updates ----------------------------------------------------------------------------------------------------------


def batch_shardings(mesh: Mesh, tokens: Sequence[str] = ()) -> Batch:
    """Rows of each microbatch over (data, fsdp). tokens: names of what the batch brings for each token."""
    by_row = meshes.rows_sharding(mesh, axis=1)
    rows = Rows(*[by_row] * len(dataclasses.fields(Rows)))
    by_token = dict.fromkeys(tokens, by_row)
    return Batch(rows, by_row, by_row, target_ABS=by_row, count=meshes.replicated(mesh), tokens=by_token)


def abstract_batch(mesh: Mesh, plan: Plan, microbatches: int, tokens: Sequence[str] = ()) -> Batch:
    """A batch of so many microbatches, as an update takes it; tokens: as in `batch_shardings`."""
    rows = jax.eval_shape(lambda: rowlib.empty(plan.rows, plan))
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((microbatches, *a.shape), a.dtype), rows)
    by_slot = jax.ShapeDtypeStruct((microbatches, plan.rows, plan.slots), jnp.float32)
    by_token = jax.ShapeDtypeStruct((microbatches, plan.rows, plan.targets), jnp.float32)
    known = dict.fromkeys(tokens, by_token)
    shapes = Batch(rows, by_slot, by_slot, by_slot, jax.ShapeDtypeStruct((), jnp.int32), known)
    return placed(shapes, batch_shardings(mesh, tokens))


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The key of a run, on every device."""
    return placed(jax.eval_shape(lambda: sample.seeded(0)), meshes.replicated(mesh))


def abstract_number(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """int32 scalar on every device: the total updates of a stage."""
    return jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh))


@_by_value
def preference_update(
    arch: Arch,
    mesh: Mesh,
    compute: Compute,
    transform: optax.GradientTransformation,
    loss: Loss,
    loss_keys: dict[str, Any],
    schedule: dict[str, Any],
    *,
    ld_alpha: float = 1.0,
    weighting: Callable | None = None,
    moments: str = "device",
) -> Callable[[TrainState, dict, Batch, jax.Array, jax.Array], tuple[TrainState, dict]]:
    """(state, frozen weights, batch of pairs, total updates of the stage, key) → (next state, metrics); the state is
    donated. Frozen weights are {} unless adapters train (`model.join`).

    Args:
        loss: a row of losses.LOSSES, or a mixture. loss_keys: beta and its own keys. schedule: keywords of
            step.learning_rate (peak, schedule, warmup).
        ld_alpha: weight of tokens beyond the shorter response (LD-DPO): all terms of the loss, and the metrics, see the
            log-probs so weighted, and the batch brings the reference's so weighted.
        weighting: of losses.WEIGHTINGS.
        moments: a key of MEMORY.
    """

    outputs = _outputs(arch, mesh, compute, tail=ld_alpha, alignment=weighting is not None)

    def weighted_loss(sums: SlotSums, reference: jax.Array, weight: jax.Array, target: jax.Array) -> tuple:
        """Weighted sum of the loss over examples, Σ weight and metric sums; inputs [..., S]."""
        by_example = lambda slots: slots.reshape(-1, 2)
        logp_P2, length_P2, reference_P2, target_P2 = map(by_example, (sums.logp_BS, sums.length_BS, reference, target))
        weight_P = by_example(weight)[:, 0]
        coupled = (weight_P > 0,) if loss.coupled else ()
        told = losses.told(loss, target_P2)
        loss_P = loss.loss(logp_P2, reference_P2, length_P2, *coupled, *told, **loss_keys)
        if weighting is not None:
            loss_P *= weighting(by_example(sums.alignment_BS), length_P2)
        logp_P2 = jax.lax.stop_gradient(logp_P2)
        reward_P2 = loss.reward(logp_P2, reference_P2, length_P2, **loss_keys)
        if loss.unpaired:
            metrics = losses.unpaired_metrics(logp_P2, reference_P2, reward_P2, weight_P, *told, mismatch=loss.mismatch)
        else:
            metrics = losses.metrics(logp_P2, reward_P2, weight_P)
        return jnp.sum(jnp.where(weight_P > 0, weight_P * loss_P, 0)), jnp.sum(weight_P), metrics

    def loss_fn(trained: dict, frozen: dict, micro: Microbatch, key: jax.Array) -> tuple:
        sums = outputs(trained, frozen, micro, key)
        return weighted_loss(sums, micro.reference_BS, micro.weight_BS, micro.target_BS)

    def outputs_loss(out: SlotSums, batch: Batch) -> tuple[jax.Array, dict]:
        total, weight, metrics = weighted_loss(out, batch.reference_ABS, batch.weight_ABS, batch.target_ABS)
        weight = jnp.maximum(weight, 1e-30)
        return total / weight, jax.tree.map(lambda m: m / weight, metrics)

    if loss.coupled:
        gradients = functools.partial(step.coupled_gradients, outputs, outputs_loss)
    else:
        gradients = functools.partial(step.gradients, loss_fn)
    return _update(arch, mesh, transform, gradients, schedule, moments)


@_by_value
def sft_update(
    arch: Arch,
    mesh: Mesh,
    compute: Compute,
    transform: optax.GradientTransformation,
    schedule: dict[str, Any],
    *,
    weighted: bool = False,
    moments: str = "device",
) -> Callable[[TrainState, dict, Batch, jax.Array, jax.Array], tuple[TrainState, dict]]:
    """The same for single branches: mean negative log-prob of the batch's response tokens, each of weight 1, or, where
    `weighted`, of its example's."""
    outputs = _outputs(arch, mesh, compute)

    def loss_fn(trained: dict, frozen: dict, micro: Microbatch, key: jax.Array) -> tuple:
        sums = outputs(trained, frozen, micro, key)
        nll_BS, tokens_BS, _ = losses.sft(sums.logp_BS, sums.length_BS)
        if weighted:
            nll_BS, tokens_BS = micro.weight_BS * nll_BS, micro.weight_BS * tokens_BS
        return jnp.sum(nll_BS), jnp.sum(tokens_BS), {}

    return _update(arch, mesh, transform, functools.partial(step.gradients, loss_fn), schedule, moments)


@_by_value
def reward_update(
    arch: Arch,
    mesh: Mesh,
    compute: Compute,
    transform: optax.GradientTransformation,
    loss_keys: dict[str, Any],
    schedule: dict[str, Any],
    *,
    scale: float = 1.0,
    moments: str = "device",
) -> Callable[[TrainState, dict, Batch, jax.Array, jax.Array], tuple[TrainState, dict]]:
    """The same for a reward model (arch.scored): losses.bradley_terry with these keys, by the pairs' weights. What a
    batch brings as reference_ABS are the annotator's scores.

    Args:
        scale: of the scalar head's value. ½ where the branches of a tree are the two orders of a preference model's
            question: then the margin of a pair is the log-odds of σ(½ [s(a, b) - s(b, a)]).
    """

    def loss_fn(trained: dict, frozen: dict, micro: Microbatch, key: jax.Array) -> tuple:
        reward_BS, length_BS = score.row_rewards(
            arch,
            model.join(arch, trained, frozen),
            micro.rows,
            mesh=mesh,
            dtype=compute.dtype,
            remat=compute.remat,
            backend=compute.attention,
            key=key,
        )
        by_example = lambda slots: slots.reshape(-1, 2)
        reward_P2, length_P2, score_P2 = map(by_example, (scale * reward_BS, length_BS, micro.reference_BS))
        weight_P = by_example(micro.weight_BS)[:, 0]
        loss_P = losses.bradley_terry(reward_P2, length_P2, score_P2, **loss_keys)
        told = losses.reward_metrics(jax.lax.stop_gradient(reward_P2), weight_P)
        return jnp.sum(jnp.where(weight_P > 0, weight_P * loss_P, 0)), jnp.sum(weight_P), told

    return _update(arch, mesh, transform, functools.partial(step.gradients, loss_fn), schedule, moments)


@_by_value
def policy_update(
    arch: Arch,
    mesh: Mesh,
    compute: Compute,
    transform: optax.GradientTransformation,
    loss_keys: dict[str, Any],
    schedule: dict[str, Any],
    *,
    tokens: tuple[str, ...],
    moments: str = "device",
) -> Callable[[TrainState, dict, Batch, jax.Array, jax.Array], tuple[TrainState, dict]]:
    """The same for sampled candidates: policy_gradient.loss with these keys. What a batch brings as target_ABS are
    their advantages, NaN for one that takes no part.

    Args:
        tokens: what it brings for each token: log-probs of "old", "reference", both or neither.
    """

    def loss_fn(trained: dict, frozen: dict, micro: Microbatch, key: jax.Array) -> tuple:
        how = _training(mesh, compute)
        logp_BM = score.row_token_logps(arch, model.join(arch, trained, frozen), micro.rows, **how, key=key)
        known = (micro.tokens.get(name) for name in ("old", "reference"))
        return policy_gradient.loss(logp_BM, *known, micro.rows.slot_BM, micro.target_BS, **loss_keys)

    return _update(arch, mesh, transform, functools.partial(step.gradients, loss_fn), schedule, moments, tokens)


def _outputs(arch: Arch, mesh: Mesh, compute: Compute, **of: Any) -> Callable[..., SlotSums]:
    """(what trains, frozen weights, microbatch, key) → SlotSums. of: further keywords of score.slot_sums."""

    def run(trained: dict, frozen: dict, micro: Microbatch, key: jax.Array) -> SlotSums:
        how = _training(mesh, compute)
        return score.slot_sums(arch, model.join(arch, trained, frozen), micro.rows, **how, key=key, **of)

    return run


def _training(mesh: Mesh, compute: Compute) -> dict[str, Any]:
    """Keywords of the forward passes of score that updates differentiate."""
    return {
        "mesh": mesh,
        "dtype": compute.dtype,
        "remat": compute.remat,
        "chunk": compute.chunk,
        "backend": compute.attention,
    }


def _update(
    arch: Arch,
    mesh: Mesh,
    transform: Any,
    gradients: Callable,
    schedule: dict[str, Any],
    moments: str,
    tokens: Sequence[str] = (),
) -> Callable:
    where, here = (state_shardings(arch, mesh, transform, memory) for memory in (moments, "device"))

    def update(
        state: TrainState, frozen: dict, batch: Batch, total: jax.Array, key: jax.Array
    ) -> tuple[TrainState, dict]:
        grads, metrics = gradients(state.params, frozen, batch, key)
        grads = jax.lax.with_sharding_constraint(grads, where.params)
        rate = step.learning_rate(state.step, total, **schedule)
        if moments != "device":
            state = dataclasses.replace(state, moments=jax.device_put(state.moments, here.moments))
        return step.apply(transform, state, grads, metrics, rate)

    whole = meshes.replicated(mesh)
    return jax.jit(
        update,
        in_shardings=(where, frozen_shardings(arch, mesh), batch_shardings(mesh, tokens), whole, whole),
        out_shardings=(where, whole),
        donate_argnums=0,
    )


# --- sampling ---------------------------------------------------------------------------------------------------------


@functools.cache
def prefiller(arch: Arch, mesh: Mesh, compute: Compute) -> Callable[[dict, jax.Array, jax.Array], Prefilled]:
    """(decode weights, tokens_PJ, length_P) → Prefilled."""
    return jax.jit(functools.partial(sample.prefill, arch, mesh=mesh, dtype=compute.dtype, backend=compute.attention))


@functools.cache
def decoder(
    arch: Arch, mesh: Mesh, compute: Compute, *, candidates: int, max_new_tokens: int, slots: int | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(decode weights, Prefilled, hash_P2, key, Sampling[, limit_PC[, Beside]]) → (tokens_PCT, finished_PC) on every
    process; keywords as in sample.decode."""
    how = {"candidates": candidates, "max_new_tokens": max_new_tokens, "slots": slots}
    run = functools.partial(sample.decode, arch, **how, mesh=mesh, dtype=compute.dtype, backend=compute.attention)
    return jax.jit(run, out_shardings=(meshes.replicated(mesh),) * 2)


def abstract_prompts(mesh: Mesh, prompts: int, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """tokens_PJ and length_P of `prefiller`, hash_P2 of `decoder`, where `sample_prompts` puts them."""

    def one(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_prompt(mesh, shape))

    return one((prompts, length), jnp.int32), one((prompts,), jnp.int32), one((prompts, 2), jnp.uint32)


def abstract_sampling(mesh: Mesh, temperature: Any = 1.0) -> Sampling:
    """The Sampling of `decoder`. temperature: one, or an array of each candidate's."""
    values = sample.sampling(temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, eos_ids=(0,))
    whole = meshes.replicated(mesh)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), values)


# --- exploration ------------------------------------------------------------------------------------------------------


def covariance_sharding(mesh: Mesh, dimension: int) -> NamedSharding:
    """Where Σ [D, D] lies between updates: rows over fsdp, columns over tensor."""
    return NamedSharding(mesh, meshes.spec(mesh, "train", ("embed", "mlp"), (dimension, dimension)))


@functools.cache
def covariance_update(mesh: Mesh, dimension: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(Σ, donated, dphi_ND split by rows) → Σ + ΔφᵀΔφ."""
    where = covariance_sharding(mesh, dimension)
    own = (where, meshes.rows_sharding(mesh))
    return jax.jit(explore.observed, in_shardings=own, out_shardings=where, donate_argnums=0)


@functools.cache
def covariance_factor(mesh: Mesh, dimension: int) -> Callable[[jax.Array], jax.Array]:
    """Σ → its Cholesky factor, whole on every device: XLA splits neither the factorisation nor the solves behind it."""
    whole = meshes.replicated(mesh)
    run = lambda sigma_DD: explore.factor(jax.lax.with_sharding_constraint(sigma_DD, whole))
    return jax.jit(run, in_shardings=covariance_sharding(mesh, dimension), out_shardings=whole)


@functools.cache
def covariance_norms(mesh: Mesh) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(factor, vector_ND split by rows) → ‖v‖_{Σ⁻¹} float32 [N], on every process."""
    whole = meshes.replicated(mesh)
    return jax.jit(explore.norms, in_shardings=(whole, meshes.rows_sharding(mesh)), out_shardings=whole)


# --- selection --------------------------------------------------------------------------------------------------------


@_by_value
def selector(
    mesh: Mesh,
    loss: Loss,
    loss_keys: dict[str, Any],
    *,
    score_name: str,
    rule: str,
    threshold: float,
) -> Callable[..., dict[str, jax.Array]]:
    """From sharded log-probs to a mask, in one program with no transfer in between.

    The returned function takes keyword arrays, each split over (data, fsdp) along its example axis N (padded by the
    caller, `valid_N` tells), except the small ones:
        logp_EN2 float32 log-probs under each iterate of the ensemble · reward_reference_N2 · loss_reference_N2 ·
        length_N2 · target_N2 · gap_N, reward_gap_N, gold_N (NaN where unknown) · valid_N bool · group_N int32 ·
        example_N int32 · keep_G int32 · weights_E float32 · key
    and returns {"mask_N", "score_N", "margin_N", "reward_N2", "bad"}; bad as in sera.non_finite, of the scores, or of
    the margins where the rule keeps all.

    Args:
        loss, loss_keys: whose implicit reward ranks, and the score "loss".
        score_name, rule: names of sera.SCORES and sera.RULES. threshold: of that rule.
    """

    def run(
        *,
        logp_EN2,
        reward_reference_N2,
        loss_reference_N2,
        length_N2,
        target_N2,
        gap_N,
        reward_gap_N,
        gold_N,
        valid_N,
        group_N,
        example_N,
        keep_G,
        weights_E,
        key,
    ):
        # Weights are traced here (their zeros were left out by the caller), so that γ compiles nothing again.
        rewards_EN2 = loss.reward(logp_EN2, reward_reference_N2[None], length_N2[None], **loss_keys)
        reward_N2 = jnp.sum(rewards_EN2 * weights_E[:, None, None], axis=0)
        margin_N = sera.margins(reward_N2)
        batch = (*((valid_N,) if loss.coupled else ()), *losses.told(loss, target_N2))
        loss_N = loss.loss(logp_EN2[-1], loss_reference_N2, length_N2, *batch, **loss_keys)
        score_N = sera.score(
            score_name,
            reward_N2=reward_N2,
            length_N2=length_N2,
            reference_logp_N2=reward_reference_N2,
            gap_N=gap_N,
            reward_gap_N=reward_gap_N,
            gold_N=gold_N,
            loss_N=loss_N,
            key=key,
            example_N=example_N,
            valid_N=valid_N,
        )
        mask_N = sera.RULES[rule](score_N, valid_N=valid_N, group_N=group_N, keep_G=keep_G, threshold=threshold)
        bad = sera.non_finite(margin_N if rule == "all" else score_N, valid_N)
        return {"mask_N": mask_N, "score_N": score_N, "margin_N": margin_N, "reward_N2": reward_N2, "bad": bad}

    return jax.jit(run, out_shardings=meshes.replicated(mesh))


def selector_shardings(mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each argument of the selector lies."""
    by_example, whole = NamedSharding(mesh, P(ROW_AXES)), meshes.replicated(mesh)
    small = {"keep_G", "weights_E", "key"}
    names = (
        "reward_reference_N2 loss_reference_N2 length_N2 target_N2 gap_N reward_gap_N gold_N valid_N group_N "
        "example_N keep_G weights_E key"
    ).split()
    where = {name: whole if name in small else by_example for name in names}
    return {"logp_EN2": NamedSharding(mesh, P(None, ROW_AXES)), **where}


def abstract_selection(mesh: Mesh, pairs: int, iterates: int, groups: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """The keyword arguments of `selector` for so many pairs, iterates of the ensemble, and strata."""
    n = -(-pairs // meshes.row_shards(mesh)) * meshes.row_shards(mesh)
    by_pair = {name: ((n,), jnp.float32) for name in ("gap_N", "reward_gap_N", "gold_N")}
    by_pair |= {
        name: ((n, 2), jnp.float32) for name in ("reward_reference_N2", "loss_reference_N2", "length_N2", "target_N2")
    }
    by_pair |= {"valid_N": ((n,), jnp.bool_), "group_N": ((n,), jnp.int32), "example_N": ((n,), jnp.int32)}
    by_pair |= {"logp_EN2": ((iterates, n, 2), jnp.float32)}
    small = {"keep_G": ((groups,), jnp.int32), "weights_E": ((iterates,), jnp.float32)}
    where = selector_shardings(mesh)
    shapes = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where[name])
        for name, (shape, dtype) in (by_pair | small).items()
    }
    return {**shapes, "key": abstract_key(mesh)}


# --- from the host ----------------------------------------------------------------------------------------------------


def score_rows(score_program: Callable, params: dict, mesh: Mesh) -> Callable[[Rows], Any]:
    """A scorer bound to weights: rows of one microbatch on the host → logp_BS on the devices (`score.set_logps`)."""
    by_row = meshes.rows_sharding(mesh)
    return lambda rows: score_program(params, meshes.put(rows, by_row))


def sample_prompts(
    prefill: Callable,
    decode: Callable,
    weights: dict,
    key: jax.Array,
    sampling: Sampling,
    mesh: Mesh,
    limit_PC: Any = None,
    beside: tuple[dict, float] | None = None,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """A sampler bound to (decode-layout) weights: padded prompts on the host → tokens_PCT, finished_PC on the host
    (`sample.run_batches`). limit_PC: of every batch, as in sample.decode. beside: weights and α of a mixture's
    second model, None = no mixture."""
    whole = meshes.replicated(mesh)
    values, key = meshes.put(sampling, whole), meshes.put(key, whole)
    limit = None if limit_PC is None else meshes.put(limit_PC, by_prompt(mesh, limit_PC.shape))
    alpha = None if beside is None else meshes.put(np.float32(beside[1]), whole)

    def run(*prompts: Any) -> tuple[Any, Any]:
        tokens_PJ, length_P, hash_P2 = (meshes.put(array, by_prompt(mesh, array.shape)) for array in prompts)
        start, other = prefill(weights, tokens_PJ, length_P), None
        if beside is not None:
            other = sample.Beside(beside[0], prefill(beside[0], tokens_PJ, length_P), alpha)
        return meshes.get(decode(weights, start, hash_P2, key, values, limit, other))

    return run


def by_prompt(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array over the prompts of a sampling batch lies."""
    return NamedSharding(mesh, meshes.spec(mesh, "decode", ("rows", *[None] * (len(shape) - 1)), shape))


def sampler(
    arch: Arch,
    mesh: Mesh,
    compute: Compute,
    load: Callable[[], dict],
    key: jax.Array,
    sampling: Sampling,
    *,
    candidates: int,
    max_new_tokens: int,
    slots: int,
    beside: tuple[Callable[[], dict], float] | None = None,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """`sample_prompts` with weights that nobody needs before the first prompt: `load` (→ weights on the training
    layout) is called then, once, and they move to the decode layout; those of `beside` after them."""
    bound: list[Callable] = []

    def run(*prompts: Any) -> tuple[Any, Any]:
        if not bound:
            moved = to_decode(arch, mesh, compute.dtype)
            weights = moved(load())
            other = None if beside is None else (moved(beside[0]()), beside[1])
            prefill = prefiller(arch, mesh, compute)
            many = {"candidates": candidates, "max_new_tokens": max_new_tokens, "slots": slots}
            decode = decoder(arch, mesh, compute, **many)
            bound.append(sample_prompts(prefill, decode, weights, key, sampling, mesh, None, other))
        return bound[0](*prompts)

    return run
