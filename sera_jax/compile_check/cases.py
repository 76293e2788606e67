"""The programs of a config, each with its abstract arguments: the one place that knows what `train` passes to them.

Nothing of a checkpoint but its config.json is read, and no data: rows are planned for the longest trees that the config
lets through. What the data are in truth, `--data.check` tells; they can only take less.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sera_jax import hf, losses, model, programs, sample, score
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax.compile_check import flops, memory
from sera_jax.compile_check.memory import TooLarge
from sera_jax.config import OptimizerConfig, TrainConfig
from sera_jax.model import Arch
from sera_jax.programs import Compute
from sera_jax.rows import Plan
from sera_jax.train import world as worlds


@dataclasses.dataclass(frozen=True)
class Case:
    """One program and what it is called with.

    what: a line on its shapes. trace: → the traced program (jax.stages.Traced). holds: bytes a chip of its arguments by
    what they are. beside: bytes a chip that `train` keeps alive while it runs, by what they are. gradients: bytes a
    chip of one float32 copy of them. trips: at most, of the loop whose length is known at run time only. useful: model
    FLOPs of a call, at most.
    """

    name: str
    what: str
    trace: Callable[[], Any]
    holds: dict[str, int]
    beside: dict[str, int]
    gradients: int
    trips: int
    useful: float


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the cases are made of. pairs: that the selection ranks."""

    config: TrainConfig
    arch: Arch
    mesh: Mesh
    pairs: int

    @property
    def compute(self) -> Compute:
        of = self.config.model
        return Compute(jnp.dtype(of.compute), of.remat, of.head_chunk, of.attention)


def lengths(config: TrainConfig) -> np.ndarray:
    """int [n, 3], as rows.measure: the longest trees of each kind that the config lets through.

    A pair has a prompt of one token at least, and prompt + response ≤ data.max_length on either side; a fresh pair has
    two responses of bootstrap.max_new_tokens, one of them a given one where those are among the candidates.
    """
    most, new = config.data.max_length, config.bootstrap.max_new_tokens
    given = [2 * most - 1, 2 * (most - 1), 2]
    fresh = [config.data.max_prompt_length + 2 * new, 2 * new, 2]
    if config.bootstrap.with_given:
        fresh = max(fresh, [most + new, most - 1 + new, 2])
    return np.array([given, fresh] if worlds.bootstraps(config) else [given])


def plan(config: TrainConfig, optimizer: OptimizerConfig, arch: Arch, mesh: Mesh) -> Plan:
    """Rows of the updates: each tree of a batch is as long as trees get, so that one shape suits all."""
    every = np.repeat(_longest(lengths(config))[None], optimizer.batch_size, axis=0)
    return worlds.update_plans(every, optimizer, arch, mesh)[0]


def scored(config: TrainConfig) -> np.ndarray:
    """int [3], as rows.measure: the longest tree that is scored, a pair or a prompt with all its candidates."""
    trees = lengths(config)[:1]
    if worlds.bootstraps(config) and not config.bootstrap.candidates_file:
        new, count = config.bootstrap.max_new_tokens, config.bootstrap.candidates
        longest = [config.data.max_prompt_length + count * new, count * new, count]
        if config.bootstrap.with_given:
            longest = [config.data.max_length + count * new, config.data.max_length - 1 + count * new, count + 1]
        trees = np.vstack((trees, longest))
    return _longest(trees)


def score_plan(config: TrainConfig, arch: Arch, mesh: Mesh) -> Plan:
    """Rows of the scorer: each tree of a chunk is as long as scored trees get."""
    return score.plan_of(np.repeat(scored(config)[None], score.CHUNK, axis=0), arch, mesh)


def _longest(lengths_N3: np.ndarray) -> np.ndarray:
    return lengths_N3[int(np.argmax(lengths_N3[:, 0]))]


def _useful(arch: Arch, tree: np.ndarray) -> float:
    """Model FLOPs of one forward pass over a tree of rows.measure's numbers."""
    length, targets, branches = map(int, tree)
    shares = [targets // branches + (i < targets % branches) for i in range(branches)]
    seen = flops.seen_by(arch, length - targets, shares)
    return flops.forward(arch, tokens=length, seen=seen, predicted=targets)


def names(config: TrainConfig) -> list[str]:
    """Keys of CASES: the programs that the config runs, in the order in which a run comes to them."""
    loops = config.loop.iterations > 0
    selects = loops and config.loop.iterations >= config.select.from_iteration and config.select.rule != "none"
    samples = (worlds.bootstraps(config) and not config.bootstrap.candidates_file) or bool(config.evaluate.prompts)
    asked = {
        "sft update": config.sft.epochs > 0,
        "update": loops,
        "scorer": loops,
        "selection": selects,
        "to decode layout": samples,
        "prefill": samples,
        "decode": samples,
    }
    return [name for name, runs in asked.items() if runs]


def shallow(setting: Setting, layers: int, unrolled: bool = False) -> Setting:
    """The same for a model of so many layers; unrolled: written out one by one in the program."""
    windows = setting.arch.windows[:layers]
    arch = dataclasses.replace(setting.arch, layers=layers, windows=windows, unrolled=unrolled)
    return dataclasses.replace(setting, arch=arch)


# --- one by one -------------------------------------------------------------------------------------------------------


def _case(name: str, what: str, program: Callable, args: tuple, holds: dict[str, Any], **rest: Any) -> Case:
    keywords = rest.get("keywords", {})
    by_kind = {kind: memory.held(tree) for kind, tree in holds.items()}
    return Case(
        name=name,
        what=what,
        trace=lambda: program.trace(*args, **keywords),
        holds=by_kind,
        beside={kind: size for kind, size in rest.get("beside", {}).items() if size},
        gradients=rest.get("gradients", 0),
        trips=rest.get("trips", 1),
        useful=rest.get("useful", 0.0),
    )


def _update(setting: Setting) -> Case:
    config, arch, mesh = setting.config, setting.arch, setting.mesh
    transform = worlds.adam(config.optimizer, arch)
    program = programs.preference_update(
        arch,
        mesh,
        setting.compute,
        transform,
        *worlds.loss_of(config),
        worlds.schedule(config.optimizer),
        ld_alpha=config.loss.ld_alpha,
        weighting=losses.WEIGHTINGS[config.loss.weighting],
        moments=config.optimizer.moments,
    )
    return _stage("update", program, config.optimizer, transform, setting)


def _sft(setting: Setting) -> Case:
    config, arch, mesh = setting.config, setting.arch, setting.mesh
    transform = worlds.adam(config.sft.optimizer, arch)
    schedule = worlds.schedule(config.sft.optimizer)
    program = programs.sft_update(
        arch, mesh, setting.compute, transform, schedule, moments=config.sft.optimizer.moments
    )
    return _stage("sft update", program, config.sft.optimizer, transform, setting)


def _stage(name: str, program: Callable, optimizer: OptimizerConfig, transform: Any, setting: Setting) -> Case:
    config, arch, mesh = setting.config, setting.arch, setting.mesh
    rows = plan(config, optimizer, arch, mesh)
    microbatches = rowlib.most_microbatches(optimizer.batch_size, rows)
    state = programs.abstract_state(arch, mesh, transform, optimizer.moments)
    frozen = programs.abstract_frozen(arch, mesh, setting.compute.dtype)
    batch = programs.abstract_batch(mesh, rows, microbatches)
    total, key = programs.abstract_number(mesh), programs.abstract_key(mesh)
    return _case(
        name,
        f"{optimizer.batch_size} trees in {microbatches} microbatches of {rows.rows} rows × {rows.length} tokens "
        f"({rows.rows // meshes.row_shards(mesh)} rows a device), {rows.targets} targets a row",
        program,
        (state, frozen, batch, total, key),
        {"weights": (state.params, frozen), "optimiser": state.moments, "batch": batch},
        gradients=memory.held(state.params),
        trips=microbatches,
        # Of weights that do not train there is no gradient, only of what they are multiplied with.
        useful=(2 if arch.lora else 3) * optimizer.batch_size * _useful(arch, _longest(lengths(config))),
    )


def _scorer(setting: Setting) -> Case:
    config, arch, mesh = setting.config, setting.arch, setting.mesh
    rows = score_plan(config, arch, mesh)
    params, batch = _policy(setting), programs.abstract_rows(mesh, rows)
    # Reference and past iterates are read while the policy stays: two models, or two sets of adapters.
    policy = programs.abstract_trainable(arch, mesh)
    return _case(
        "scorer",
        f"{rows.rows} rows × {rows.length} tokens ({rows.rows // meshes.row_shards(mesh)} rows a device), "
        f"{rows.targets} targets a row",
        programs.scorer(arch, mesh, setting.compute),
        (params, batch),
        {"weights": params, "batch": batch},
        useful=rows.rows * (rows.length // scored(config)[0]) * _useful(arch, scored(config)),
        beside={"the policy": memory.held(policy), **_moments(setting, validating=True)},
    )


def _move(setting: Setting) -> Case:
    arch, mesh, params = setting.arch, setting.mesh, _policy(setting)
    return _case(
        "to decode layout",
        "weights of the training layout → compute dtype on the decode layout, both alive",
        programs.to_decode(arch, mesh, setting.compute.dtype),
        (params,),
        {"weights": params},
        beside=_moments(setting),
    )


def _sampled(setting: Setting) -> tuple[int, int, int, int]:
    """Prompts of a sampling batch, their padded length, candidates, new tokens: the most of bootstrapping and
    evaluation."""
    config = setting.config
    longest = sample.bucket(config.data.max_prompt_length)
    candidates, new = 1, config.evaluate.max_new_tokens
    if worlds.bootstraps(config) and not config.bootstrap.candidates_file:
        candidates, new = config.bootstrap.candidates, config.bootstrap.max_new_tokens
    return max(1, config.bootstrap.slots // candidates) * config.bootstrap.refill, longest, candidates, new


def _prefill_arguments(setting: Setting) -> tuple[Callable, tuple]:
    arch, mesh = setting.arch, setting.mesh
    prompts, longest, _, _ = _sampled(setting)
    weights = programs.abstract_params(arch, mesh, "decode", setting.compute.dtype)
    tokens, length, _ = programs.abstract_prompts(mesh, prompts, longest)
    return programs.prefiller(arch, mesh, setting.compute), (weights, tokens, length)


def _prefill(setting: Setting) -> Case:
    prompts, longest, _, _ = _sampled(setting)
    program, arguments = _prefill_arguments(setting)
    return _case(
        "prefill",
        f"{prompts} prompts × {longest} tokens",
        program,
        arguments,
        {"weights": arguments[0]},
        useful=prompts
        * flops.forward(setting.arch, tokens=longest, seen=flops.seen_by(setting.arch, longest, ()), predicted=1),
        beside=_training_weights(setting),
    )


def _decode(setting: Setting) -> Case:
    arch, mesh = setting.arch, setting.mesh
    prompts, longest, candidates, new = _sampled(setting)
    many = {"candidates": candidates, "max_new_tokens": new, "slots": setting.config.bootstrap.slots}
    program = programs.decoder(arch, mesh, setting.compute, **many)
    weights = programs.abstract_params(arch, mesh, "decode", setting.compute.dtype)
    start = _prefilled(setting)
    hashes = programs.abstract_prompts(mesh, prompts, longest)[2]
    one, two = (flops.seen_by(arch, longest, (new,) * n) for n in (0, 1))
    behind = [more - less for less, more in zip(one, two)]  # what the tokens of one response see
    made = worlds.bootstraps(setting.config) and not setting.config.bootstrap.candidates_file
    ranked = made or worlds.on_policy(setting.config)
    temperature = sample.temperatures(setting.config.bootstrap.temperature if ranked else 1.0, candidates)
    sampling = programs.abstract_sampling(mesh, temperature)
    arguments = (weights, start, hashes, programs.abstract_key(mesh), sampling)
    parts, models = {"weights": weights, "cache": start.cache, "logits": start.logits_PV}, 1
    if worlds.bootstraps(setting.config) and setting.config.bootstrap.mixture:
        alpha = jax.ShapeDtypeStruct((), jnp.float32, sharding=meshes.replicated(mesh))
        arguments, models = (*arguments, None, sample.Beside(weights, start, alpha)), 2
        parts |= {"weights of the second model": weights, "its cache": start.cache}
    return _case(
        "decode",
        f"{prompts} prompts × {candidates} candidates × {new} tokens behind {longest}",
        program,
        arguments,
        parts,
        useful=models * prompts * candidates * flops.forward(arch, tokens=new, seen=behind, predicted=new),
        beside=_training_weights(setting),
        # Each slot takes as many responses after the other, each of the full length.
        trips=(new - 1) * setting.config.bootstrap.refill,
    )


def _prefilled(setting: Setting) -> Any:
    """What `prefill` gives, lying where its compiled program leaves it; if that does not fit, where one of a single
    layer does."""
    program, arguments = _prefill_arguments(setting)
    prompts, longest, _, _ = _sampled(setting)
    where = _left(setting.arch, setting.mesh, setting.compute, prompts, longest)
    if where is None:
        few = shallow(setting, 1).arch
        where = _left(few, setting.mesh, setting.compute, prompts, longest)
    if where is None:
        raise ValueError("prefill does not fit with a single layer, so that decode has nothing to start from.")
    return programs.placed(jax.eval_shape(program, *arguments), where)


@functools.cache
def _left(arch: Arch, mesh: Mesh, compute: Compute, prompts: int, longest: int) -> Any:
    """Shardings of what `prefill` gives; None where it does not fit."""
    weights = programs.abstract_params(arch, mesh, "decode", compute.dtype)
    tokens, length, _ = programs.abstract_prompts(mesh, prompts, longest)
    done = memory.compile_traced(programs.prefiller(arch, mesh, compute).trace(weights, tokens, length))
    return None if isinstance(done, TooLarge) else done.executable.output_shardings


def _selection(setting: Setting) -> Case:
    config, mesh = setting.config, setting.mesh
    iterates = {"current": 1, "two_term": 2}.get(config.reward.ensemble, max(1, config.loop.iterations - 1))
    iterates = min(iterates, max(1, config.loop.iterations - 1))
    arguments = programs.abstract_selection(mesh, setting.pairs, iterates)
    return _case(
        "selection",
        f"{setting.pairs} pairs, {iterates} iterates, {config.select.score} × {config.select.rule}",
        worlds.selector_of(config, mesh),
        (),
        {"log-probs": arguments},
        keywords=arguments,
        beside=_training_weights(setting),
    )


CASES: dict[str, Callable[[Setting], Case]] = {
    "sft update": _sft,
    "update": _update,
    "scorer": _scorer,
    "selection": _selection,
    "to decode layout": _move,
    "prefill": _prefill,
    "decode": _decode,
}

LAYERED = ("sft update", "update", "scorer", "prefill", "decode")
"""Those that run through the model's layers."""


# --- what else is alive -----------------------------------------------------------------------------------------------


def _policy(setting: Setting) -> dict:
    """A policy's weights on the training layout, those that train float32."""
    trained = programs.abstract_trainable(setting.arch, setting.mesh)
    return model.join(
        setting.arch, trained, programs.abstract_frozen(setting.arch, setting.mesh, setting.compute.dtype)
    )


def _training_weights(setting: Setting) -> dict[str, int]:
    """The policy on the training layout, which stays while it samples and selects."""
    return {"the policy": memory.held(_policy(setting)), **_moments(setting)}


def _moments(setting: Setting, validating: bool = False) -> dict[str, int]:
    """Moments that outlive the updates: carried ones; in the scorer also those of the updates that it interrupts."""
    config = setting.config
    if config.loop.optimizer_state != "carried" and not (validating and config.loop.validate_every):
        return {}
    transform = worlds.adam(config.optimizer, setting.arch)
    state = programs.abstract_state(setting.arch, setting.mesh, transform, config.optimizer.moments)
    return {"moments": memory.held(state.moments)}


def arch_of(config: TrainConfig) -> Arch:
    """The architecture in model.path/config.json, with the adapters of the config.

    Raises:
        ValueError: no such file, or one that this program does not compute; adapters for what it does not have.
    """
    arch, lora = hf.read_arch(config.model.path), worlds.lora_of(config)
    return dataclasses.replace(arch, lora=model.targeted(arch, lora) if lora else None)


def parameters(arch: Arch) -> int:
    """How many numbers the model has."""
    return sum(a.size for a in jax.tree.leaves(model.abstract(arch)))
