"""The programs of a config, each with its abstract arguments: the one place that knows what `train` and `reward_model`
pass to them.

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

from sera_jax import config as configs
from sera_jax import hf, model, preference, programs, reward_model, sample, score
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax.compile_check import flops, memory
from sera_jax.compile_check.memory import TooLarge
from sera_jax.config import OptimizerConfig, RewardModelConfig, TrainConfig
from sera_jax.model import Arch
from sera_jax.programs import Compute
from sera_jax.rows import Plan
from sera_jax.train import uncertainty
from sera_jax.train import world as worlds


@dataclasses.dataclass(frozen=True)
class Case:
    """One program and what it is called with.

    what: a line on its shapes. trace: → the traced program (jax.stages.Traced). holds: bytes a chip of its arguments by
    what they are. beside: bytes a chip that the run keeps alive while it runs, by what they are. gradients: bytes a
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

    config: TrainConfig | RewardModelConfig
    arch: Arch
    mesh: Mesh
    pairs: int

    @property
    def compute(self) -> Compute:
        of = self.config.model
        return Compute(jnp.dtype(of.compute), of.remat, of.head_chunk, of.attention)


def lengths(config: TrainConfig | RewardModelConfig) -> np.ndarray:
    """int [n, 3], as rows.measure: the longest trees of each kind that the config lets through.

    A pair has a prompt of one token at least, and prompt + response ≤ data.max_length on either side; a fresh pair has
    two responses of bootstrap.max_new_tokens, one of them a given one where those are among the candidates. Rounds
    train on a prompt with all its candidates, or with the best of them; preference models, on `preference.longest`.
    """
    most = config.data.max_length
    given = [2 * most - 1, 2 * (most - 1), 2]
    if isinstance(config, RewardModelConfig):
        form = reward_model.form_of(config)
        return np.array([given if form is None else preference.longest(form)[0]])
    new = config.bootstrap.max_new_tokens
    if worlds.on_policy(config):
        count = 1 if config.on_policy.algorithm == "raft" else config.bootstrap.candidates
        return np.array([_candidates(config, count)])
    fresh = [config.data.max_prompt_length + 2 * new, 2 * new, 2]
    if config.bootstrap.with_given:
        fresh = max(fresh, [most + new, most - 1 + new, 2])
    return np.array([given, fresh] if worlds.bootstraps(config) else [given])


def plan(config: TrainConfig | RewardModelConfig, optimizer: OptimizerConfig, arch: Arch, mesh: Mesh) -> Plan:
    """Rows of the updates: each tree of a batch is as long as trees get, so that one shape suits all."""
    every = np.repeat(_longest(lengths(config))[None], optimizer.batch_size, axis=0)
    return worlds.update_plans(every, optimizer, arch, mesh)[0]


def scored(config: TrainConfig) -> np.ndarray:
    """int [3], as rows.measure: the longest tree that is scored, a pair or a prompt with all its candidates."""
    return _longest(np.vstack((lengths(config)[:1], *([ranked(config)] if makes(config) else []))))


def ranked(config: TrainConfig) -> list[int]:
    """The same of a prompt with all its candidates."""
    new, count = config.bootstrap.max_new_tokens, config.bootstrap.candidates
    if config.bootstrap.with_given:
        return [config.data.max_length + count * new, config.data.max_length - 1 + count * new, count + 1]
    return _candidates(config, count)


def _candidates(config: TrainConfig, count: int) -> list[int]:
    new = config.bootstrap.max_new_tokens
    return [config.data.max_prompt_length + count * new, count * new, count]


def makes(config: TrainConfig) -> bool:
    """Does the run sample candidates itself?"""
    return worlds.ranks(config) and not config.bootstrap.candidates_file


def _rows(tree: Any, arch: Arch, mesh: Mesh) -> Plan:
    """Rows of a scorer: each tree of a chunk is as long as this one."""
    return score.plan_of(np.repeat(np.array(tree)[None], score.CHUNK, axis=0), arch, mesh)


def _longest(lengths_N3: np.ndarray) -> np.ndarray:
    return lengths_N3[int(np.argmax(lengths_N3[:, 0]))]


def _useful(arch: Arch, tree: Any, predicts: bool) -> float:
    """Model FLOPs of one forward pass over a tree of rows.measure's numbers. predicts: with logits of its targets."""
    length, targets, branches = map(int, tree)
    shares = [targets // branches + (i < targets % branches) for i in range(branches)]
    seen = flops.seen_by(arch, length - targets, shares)
    return flops.forward(arch, tokens=length, seen=seen, predicted=targets if predicts else 0)


def names(config: TrainConfig | RewardModelConfig) -> list[str]:
    """Keys of CASES: the programs that the config runs, in the order in which a run comes to them."""
    if isinstance(config, RewardModelConfig):
        return ["reward update", *["held-out scorer"] * (config.data.validation > 0)]
    loops = config.loop.iterations > 0
    rounds = worlds.on_policy(config)
    selects = loops and config.loop.iterations >= config.select.from_iteration and config.select.rule != "none"
    samples = makes(config) or bool(config.evaluate.prompts)
    scores = not rounds or bool(config.evaluate.prompts) or bool(worlds.scored_under(config))
    asked = {
        "sft update": config.sft.epochs > 0,
        "update": loops,
        "scorer": loops and scores,
        "features": worlds.uncertain(config),
        "covariance": worlds.uncertain(config),
        "covariance factor": worlds.uncertain(config),
        "covariance norms": worlds.uncertain(config),
        "ranker": worlds.ranks(config) and bool(_rankers(config)),
        "selection": selects and not rounds,
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
    program = worlds.update_of(config, arch, mesh, setting.compute, transform)
    return _stage(
        "update", program, config.optimizer, transform, setting, worlds.token_names(config), _held_reference(setting)
    )


def _sft(setting: Setting) -> Case:
    config, arch, mesh = setting.config, setting.arch, setting.mesh
    transform = worlds.adam(config.sft.optimizer, arch)
    schedule = worlds.schedule(config.sft.optimizer)
    program = programs.sft_update(
        arch, mesh, setting.compute, transform, schedule, moments=config.sft.optimizer.moments
    )
    return _stage("sft update", program, config.sft.optimizer, transform, setting)


def _reward_update(setting: Setting) -> Case:
    config, arch, mesh = setting.config, setting.arch, setting.mesh
    transform = worlds.adam(config.optimizer, arch)
    program = reward_model.KINDS[config.kind].update(config, arch, mesh, setting.compute, transform)
    return _stage("reward update", program, config.optimizer, transform, setting)


def _stage(
    name: str,
    program: Callable,
    optimizer: OptimizerConfig,
    transform: Any,
    setting: Setting,
    tokens: tuple[str, ...] = (),
    beside: dict[str, int] | None = None,
) -> Case:
    config, arch, mesh = setting.config, setting.arch, setting.mesh
    rows = plan(config, optimizer, arch, mesh)
    microbatches = rowlib.most_microbatches(optimizer.batch_size, rows)
    state = programs.abstract_state(arch, mesh, transform, optimizer.moments)
    frozen = programs.abstract_frozen(arch, mesh, setting.compute.dtype)
    batch = programs.abstract_batch(mesh, rows, microbatches, tokens)
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
        useful=(2 if arch.lora else 3)
        * optimizer.batch_size
        * _useful(arch, _longest(lengths(config)), not arch.scored),
        beside=beside or {},
    )


def _scorer(setting: Setting) -> Case:
    build = programs.token_scorer if worlds.scored_under(setting.config) else programs.scorer
    # Reference and past iterates are read while the policy stays: two models, or two sets of adapters.
    policy = programs.abstract_trainable(setting.arch, setting.mesh)
    beside = {"the policy": memory.held(policy), **_moments(setting, validating=True)}
    program = build(setting.arch, setting.mesh, setting.compute)
    return _of_rows("scorer", program, _policy(setting), scored(setting.config), setting.arch, setting, beside)


def _held_out(setting: Setting) -> Case:
    """Between the updates of a reward model or preference model, whose moments stay."""
    config, arch, mesh = setting.config, setting.arch, setting.mesh
    kind, form = reward_model.KINDS[config.kind], reward_model.form_of(config)
    tree = _longest(lengths(config)) if form is None else preference.longest(form)[1]
    program = kind.scorer(arch, mesh, setting.compute)
    return _of_rows("held-out scorer", program, _policy(setting), tree, arch, setting, _state_moments(setting))


def _of_rows(
    name: str,
    program: Callable,
    params: Any,
    tree: Any,
    arch: Arch,
    setting: Setting,
    beside: dict[str, int],
    predicts: bool = True,
) -> Case:
    """A program of (weights, rows), whose rows are full of trees like this one. predicts: makes it logits, where the
    model has them?"""
    rows = _rows(tree, arch, setting.mesh)
    batch = programs.abstract_rows(setting.mesh, rows)
    return _case(
        name,
        f"{rows.rows} rows × {rows.length} tokens ({rows.rows // meshes.row_shards(setting.mesh)} rows a device), "
        f"{rows.targets} targets a row",
        program,
        (params, batch),
        {"weights": params, "batch": batch},
        useful=rows.rows * (rows.length // tree[0]) * _useful(arch, tree, predicts and not arch.scored),
        beside=beside,
    )


def _rankers(config: TrainConfig) -> list[str]:
    """Folders of the models that rank."""
    return [of for kind, of in configs.sources(config.reward) if kind in ("model", "preference")]


def _ranker(setting: Setting) -> Case:
    """The largest model that ranks: they are in memory one after the other, in the compute dtype, beside the policy."""
    found = [(hf.read_any_arch(path), path) for path in _rankers(setting.config)]
    arch, path = max(found, key=lambda one: parameters(one[0]))
    tree = ranked(setting.config)
    if setting.config.reward.source == "preference":
        tree = preference.longest(preference.read(hf.read_config(path), arch.scored))[1]
    program = (programs.reward_scorer if arch.scored else programs.scorer)(arch, setting.mesh, setting.compute)
    weights = programs.abstract_params(arch, setting.mesh, dtype=setting.compute.dtype)
    return _of_rows("ranker", program, weights, tree, arch, setting, _training_weights(setting))


def _features(setting: Setting) -> Case:
    """Of iterate 0, which is read while the policy stays; its head is with it, though nothing of the program."""
    arch, size = setting.arch, _dimension(setting)
    onto = size if size < arch.width else 0
    program = programs.featurer(arch, setting.mesh, setting.compute, onto, setting.config.run.seed)
    params, tree = _policy(setting), scored(setting.config)
    read = {name: part for name, part in params.items() if name != "head"}
    beside = {"its head": memory.held(params.get("head", {})), **_training_weights(setting)}
    case = _of_rows("features", program, params, tree, arch, setting, beside, predicts=False)
    return dataclasses.replace(case, holds={**case.holds, "weights": memory.held(read)})


def _covariance(setting: Setting) -> Case:
    mesh, size = setting.mesh, _dimension(setting)
    sigma, block = _sigma(setting), _vectors(setting)
    return _of_covariance(
        "covariance",
        f"{block.shape[0]} pairs more in {size} × {size}, split",
        programs.covariance_update(mesh, size),
        {"covariance": sigma, "batch": block},
        setting,
    )


def _covariance_factor(setting: Setting) -> Case:
    mesh, size = setting.mesh, _dimension(setting)
    what = f"the Cholesky factor of {size} × {size}, whole on every chip"
    program = programs.covariance_factor(mesh, size)
    return _of_covariance("covariance factor", what, program, {"covariance": _sigma(setting)}, setting)


def _covariance_norms(setting: Setting) -> Case:
    mesh, size = setting.mesh, _dimension(setting)
    factor = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=meshes.replicated(mesh))
    return _of_covariance(
        "covariance norms",
        f"{_vectors(setting).shape[0]} vectors against a factor of {size} × {size}",
        programs.covariance_norms(mesh),
        {"covariance": factor, "batch": _vectors(setting)},
        setting,
    )


def _of_covariance(name: str, what: str, program: Callable, holds: dict[str, Any], setting: Setting) -> Case:
    return _case(name, what, program, tuple(holds.values()), holds, beside=_training_weights(setting))


def _sigma(setting: Setting) -> jax.ShapeDtypeStruct:
    size = _dimension(setting)
    where = programs.covariance_sharding(setting.mesh, size)
    return jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=where)


def _vectors(setting: Setting) -> jax.ShapeDtypeStruct:
    shape = (uncertainty.block(setting.mesh), _dimension(setting))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=meshes.rows_sharding(setting.mesh))


def _dimension(setting: Setting) -> int:
    """Of the features by which rewards are uncertain; 0 in the config stands for the model's width."""
    asked, width = setting.config.explore.dimension, setting.arch.width
    return width if not asked else min(asked, width)


def _move(setting: Setting) -> Case:
    arch, mesh, params = setting.arch, setting.mesh, _policy(setting)
    return _case(
        "to decode layout",
        "weights of the training layout → compute dtype on the decode layout, both alive",
        programs.to_decode(arch, mesh, setting.compute.dtype),
        (params,),
        {"weights": params},
        beside={kind: size for kind, size in _training_weights(setting).items() if kind != "the policy"},
    )


def _sampled(setting: Setting) -> tuple[int, int, int, int]:
    """Prompts of a sampling batch, their padded length, candidates, new tokens: the most of bootstrapping and
    evaluation."""
    config = setting.config
    longest = sample.bucket(config.data.max_prompt_length)
    candidates, new = 1, config.evaluate.max_new_tokens
    if makes(config):
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
    made = makes(setting.config)
    temperature = sample.temperatures(setting.config.bootstrap.temperature if made else 1.0, candidates)
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
    "features": _features,
    "covariance": _covariance,
    "covariance factor": _covariance_factor,
    "covariance norms": _covariance_norms,
    "ranker": _ranker,
    "selection": _selection,
    "to decode layout": _move,
    "prefill": _prefill,
    "decode": _decode,
    "reward update": _reward_update,
    "held-out scorer": _held_out,
}

LAYERED = ("sft update", "update", "scorer", "features", "prefill", "decode", "reward update", "held-out scorer")
"""Those that run through the layers of the model that trains."""

UNLAYERED = ("covariance", "covariance factor", "covariance norms", "ranker", "selection")
"""Those that its layers make no larger."""


# --- what else is alive -----------------------------------------------------------------------------------------------


def _policy(setting: Setting) -> dict:
    """A policy's weights on the training layout, those that train float32."""
    trained = programs.abstract_trainable(setting.arch, setting.mesh)
    return model.join(
        setting.arch, trained, programs.abstract_frozen(setting.arch, setting.mesh, setting.compute.dtype)
    )


def _training_weights(setting: Setting) -> dict[str, int]:
    """The policy on the training layout, which stays while it samples and selects; from the second round of samples on
    the reference, too."""
    known = _held_reference(setting) if setting.config.on_policy.rounds > 1 else {}
    return {"the policy": memory.held(_policy(setting)), **_moments(setting), **known}


def _held_reference(setting: Setting) -> dict[str, int]:
    """The reference of rounds with a KL, in memory from the first round's scores on; with adapters these alone."""
    if not (worlds.on_policy(setting.config) and setting.config.on_policy.beta):
        return {}
    return {"the reference": memory.held(programs.abstract_trainable(setting.arch, setting.mesh))}


def _moments(setting: Setting, validating: bool = False) -> dict[str, int]:
    """Moments that outlive the updates: carried ones; in the scorer also those of the updates that it interrupts; those
    of rounds, which sample and score between their updates."""
    config = setting.config
    carried = config.loop.optimizer_state == "carried" or worlds.on_policy(config)
    if not carried and not (validating and config.loop.validate_every):
        return {}
    return _state_moments(setting)


def _state_moments(setting: Setting) -> dict[str, int]:
    config = setting.config
    transform = worlds.adam(config.optimizer, setting.arch)
    state = programs.abstract_state(setting.arch, setting.mesh, transform, config.optimizer.moments)
    return {"moments": memory.held(state.moments)}


def arch_of(config: TrainConfig | RewardModelConfig) -> Arch:
    """The architecture in model.path/config.json, with the adapters of the config, and with the scalar head that the
    kind of a reward model has.

    Raises:
        ValueError: no such file, or one that this program does not compute; adapters for what it does not have.
    """
    scored = isinstance(config, RewardModelConfig) and reward_model.KINDS[config.kind].scored
    arch, lora = (hf.read_any_arch if scored else hf.read_arch)(config.model.path), worlds.lora_of(config)
    return dataclasses.replace(arch, lora=model.targeted(arch, lora) if lora else None, scored=scored)


def parameters(arch: Arch) -> int:
    """How many numbers the model has."""
    return sum(a.size for a in jax.tree.leaves(model.abstract(arch)))
