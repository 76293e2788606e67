"""The models of a run by name: where their weights are, what they are called in the ledger, what they say of a set.

A run's models are iterate 0 (the start of iteration 1, also the initial reference), iterates 1..T, and the running mean
("ema") of the iterates up to one. Only the one that trains or samples is in memory; the others are read from the
Hugging Face folder or from `iterates/` straight onto their shardings, used, and let go. Iterates are stored in the
compute dtype: the forward pass casts weights to it anyway, so a stored iterate scores with the same bits as the live
one.

With LoRA the folder's weights are read once, in the compute dtype, and stay; iterates are adapters, and another model
of the run is another set of adapters on the same weights, or none.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sera_jax import checkpoint, data, disk, hf, model, preference, programs, sample, score
from sera_jax import mesh as meshes
from sera_jax.ledger import Ledger, derived_tag, file_tag
from sera_jax.model import Arch, Lora
from sera_jax.preference import Asked, Form
from sera_jax.programs import Compute
from sera_jax.records import Rows, Tree
from sera_jax.rows import Plan

# --- one model folder -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder, opened. Its weights are read when they are asked for.

    tag: of its content and the compute dtype. load: → float32 weights on the training layout; with arch.lora in the
    compute dtype.
    """

    path: str
    arch: Arch
    tokenizer: Any
    eos_ids: tuple[int, ...]
    mesh: Mesh
    compute: Compute
    tag: str
    load: Callable[[], Any]


def open_folder(
    path: str,
    mesh: Mesh,
    *,
    compute: str,
    remat: str = "full",
    head_chunk: int = 256,
    attention: str = "auto",
    chat_template: str = "auto",
    seed: int | None = None,
    lora: Lora | None = None,
    read: Callable[[str], Arch] = hf.read_arch,
) -> Folder:
    """Reads all but the weights.

    Args:
        compute: float32 or bfloat16; remat, head_chunk, attention: as programs.Compute. seed: draws the weights; None =
        read.
        lora: of the policies that are to be trained from it. read: folder → its architecture; refuses what it may not
        be (hf.read_arch, read_reward_arch, read_any_arch).

    Raises:
        ValueError: no such folder, or one that cannot be used.
    """
    tokenizer = data.load_tokenizer(path, chat_template)
    arch = read(path)
    dtype = jnp.dtype(compute if lora else "float32")
    if seed is None:
        content, load = file_tag(path), lambda: hf.load(path, arch, mesh, dtype=dtype)
    else:
        key = lambda: meshes.put(jax.random.key(seed), meshes.replicated(mesh))
        content, load = f"random {seed} {arch}", lambda: programs.random_params(arch, mesh, dtype)(key())
    if lora:
        arch = dataclasses.replace(arch, lora=model.targeted(arch, lora))
    return Folder(
        path=path,
        arch=arch,
        tokenizer=tokenizer,
        eos_ids=data.eos_ids(path, tokenizer),
        mesh=mesh,
        compute=Compute(jnp.dtype(compute), remat, head_chunk, attention),
        tag=derived_tag(content, compute),
        load=load,
    )


def with_score(folder: Folder, seed: int) -> Folder:
    """The folder of a policy as that of a reward model whose scalar head is drawn from `seed`."""
    key = lambda: jax.random.fold_in(jax.random.key(seed), 1 << 20)  # none that the weights are drawn from
    arch = dataclasses.replace(folder.arch, scored=True)

    def load() -> Any:
        whole = meshes.put(key(), meshes.replicated(folder.mesh))
        return model.with_score(folder.load(), programs.random_score(arch, folder.mesh)(whole))

    return dataclasses.replace(folder, arch=arch, tag=derived_tag(folder.tag, "score", seed), load=load)


def open_reward_model(path: str, mesh: Mesh, **of: Any) -> Folder:
    """`open_folder` for a reward model to rank with: its weights come in the compute dtype.

    Raises:
        ValueError: a preference model, whose score is that of two responses.
    """
    folder = _to_rank(path, mesh, hf.read_reward_arch, of)
    if preference.KEY in hf.read_config(path):
        raise ValueError(
            f"{path}: config.json has the key {preference.KEY!r}: it is a preference model, which reads two responses "
            "at once; expected a reward model. Use reward.source 'preference'."
        )
    return folder


def open_preference_model(path: str, mesh: Mesh, **of: Any) -> tuple[Folder, Form]:
    """The same for a pairwise preference model of either kind, and how it is asked.

    Raises:
        ValueError: a reward model of single responses; a policy whose tokeniser has no label tokens.
    """
    folder = _to_rank(path, mesh, hf.read_any_arch, of)
    try:
        form = preference.read(hf.read_config(path), folder.arch.scored)
        if not form.head:
            preference.label_ids(form, folder.tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return folder, form


def _to_rank(path: str, mesh: Mesh, read: Callable[[str], Arch], of: dict[str, Any]) -> Folder:
    folder = open_folder(path, mesh, read=read, **of)
    load = lambda: hf.load(path, folder.arch, mesh, dtype=folder.compute.dtype)
    return dataclasses.replace(folder, load=load)


def same_tokens(one: Folder, other: Folder) -> bool:
    """Do their token ids mean the same?"""
    return one.tokenizer.get_vocab() == other.tokenizer.get_vocab() and one.eos_ids == other.eos_ids


def folder_logps(folder: Folder, trees: Sequence[Tree], *, ledger: Ledger, plan: Plan, label: str) -> np.ndarray:
    """As `logps`, of one folder: float32 [F], by flat branch number."""

    def load() -> Callable[[Rows], np.ndarray]:
        scorer = programs.scorer(folder.arch, folder.mesh, folder.compute)
        return programs.score_rows(scorer, folder.load(), folder.mesh)

    return score.set_logps(trees, tag=folder.tag, ledger=ledger, load=load, plan=plan, label=label)


def folder_rewards(folder: Folder, trees: Sequence[Tree], *, ledger: Ledger, label: str) -> np.ndarray:
    """float32 [F], by flat branch number: what a reward model says of every branch, through the ledger."""

    def load() -> Callable[[Rows], np.ndarray]:
        scorer = programs.reward_scorer(folder.arch, folder.mesh, folder.compute)
        return programs.score_rows(scorer, folder.load(), folder.mesh)

    plan = score.plan_for(trees, folder.arch, folder.mesh)
    return score.set_logps(trees, tag=folder.tag, ledger=ledger, load=load, plan=plan, label=label)


def folder_preferences(
    folder: Folder, form: Form, asked: Sequence[Asked], *, ledger: Ledger, label: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """What a preference model says of pairs of responses, through the ledger.

    Returns:
        P(one > other) of each pair, float64 [Q]; and preference.first_wins of them.

    Raises:
        ValueError: a pair's question does not fit into the form's max_length, however short its texts are cut.
    """
    if not asked:
        return np.zeros(0), None
    found = preference.questions(form, folder.tokenizer, asked)
    if None in found.orders:
        raise ValueError(
            f"{folder.path}: {found.orders.count(None)} of {len(asked)} questions do not fit into max_length "
            f"{form.max_length}, not even with their responses cut away. Raise max_length, or lower max_prompt_length "
            f"({form.max_prompt_length}), in the key {preference.KEY!r} of its config.json."
        )
    names = [str(n) for n in range(len(asked))]
    trees = [tree for some in preference.to_ask(form, folder.tokenizer, names, found) for tree in some]
    ask = folder_rewards if form.head else _label_logps
    value_F = ask(folder, trees, ledger=ledger, label=label)
    return preference.probabilities(form, value_F), preference.first_wins(form, value_F)


def _label_logps(folder: Folder, trees: Sequence[Tree], *, ledger: Ledger, label: str) -> np.ndarray:
    plan = score.plan_for(trees, folder.arch, folder.mesh)
    return folder_logps(folder, trees, ledger=ledger, plan=plan, label=label)


def folder_sampler(
    folder: Folder, key: jax.Array, *, candidates: int, max_new_tokens: int, slots: int, **values: Any
) -> Callable:
    """Prompts on the host → candidates on the host, as `bootstrap.sample_candidates` takes it.

    Args:
        slots: responses decoded side by side. values: temperature, top_k, top_p, min_p (`sample.sampling`).
    """
    return programs.sampler(
        folder.arch,
        folder.mesh,
        folder.compute,
        folder.load,
        key,
        sample.sampling(eos_ids=folder.eos_ids, **values),
        candidates=candidates,
        max_new_tokens=max_new_tokens,
        slots=slots,
    )


# --- the models of a run ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Name:
    """kind: "iterate" or "ema"; t: the iteration after which it stands (0 = before the first)."""

    kind: str
    t: int


@dataclasses.dataclass(frozen=True)
class Live:
    """The policy in memory: its name and weights on the training layout, None = not in memory after all."""

    name: Name
    params: Any


@dataclasses.dataclass(frozen=True)
class Policies:
    """What is needed to find any model of a run.

    start: the folder that training started from; trained_start: an SFT stage lies between it and iterate 0. first: the
    folder that is iterate 1, None = trained here.
    fingerprints: of everything that decides what the iterates become, as run.fingerprints gives them. iterates: where
    they are stored. seed: of fresh adapters.
    """

    start: Folder
    trained_start: bool
    first: Folder | None
    fingerprints: tuple[tuple[int, str], ...]
    iterates: pathlib.Path
    ledger: Ledger
    seed: int = 0

    @property
    def arch(self) -> Arch:
        return self.start.arch

    @property
    def mesh(self) -> Mesh:
        return self.start.mesh

    @property
    def compute(self) -> Compute:
        return self.start.compute


def tag(policies: Policies, name: Name) -> str:
    """The model's tag in the ledger: of its content for the start, of what determines it for the rest."""
    if name.t == 0 and not policies.trained_start:
        return policies.start.tag
    if name == Name("iterate", 1) and policies.first:
        return policies.first.tag
    kind = "iterate" if name.t == 0 else name.kind  # before the first iteration the mean is iterate 0 itself
    return derived_tag(fingerprint(policies, name.t), policies.start.tag, kind, name.t)


def fingerprint(policies: Policies, t: int) -> str:
    return [fingerprint for first, fingerprint in policies.fingerprints if first <= t][-1]


def params(policies: Policies, name: Name) -> Any:
    """The weights of a model that is not in memory, on the training layout; those that train float32."""
    if name.t == 0 and not policies.trained_start:
        return policies.start.load()
    like = programs.abstract_trainable(policies.arch, policies.mesh)
    return whole(policies, checkpoint.load_iterate(policies.iterates, folder_name(name), like))


def ahead(policies: Policies, name: Name | None, live: Live) -> int:
    """Has the system read a model that is scored next while another one is scored; returns how many bytes. With several
    processes each reads a part of the files alone: none of them knows which, ahead."""
    if name is None or jax.process_count() > 1 or tag(policies, name) == tag(policies, live.name):
        return 0
    stored = name.t > 0 or policies.trained_start
    return disk.read_ahead(policies.iterates / folder_name(name) if stored else policies.start.path)


def frozen(policies: Policies) -> Any:
    """What no update changes: with LoRA the folder's weights, else nothing."""
    return policies.start.load() if policies.arch.lora else {}


def whole(policies: Policies, trained: Any) -> Any:
    """A policy's weights, of what trains."""
    return model.join(policies.arch, trained, frozen(policies))


def trained(policies: Policies, params: Any) -> Any:
    """What trains of a policy's weights: with LoRA its adapters, fresh ones where it has none."""
    if policies.arch.lora and "adapters" not in params:
        key = meshes.put(jax.random.key(policies.seed), meshes.replicated(policies.mesh))
        return programs.random_adapters(policies.arch, policies.mesh)(key)
    return model.split(policies.arch, params)[0]


def save(policies: Policies, live: Live, ema_decay: float) -> None:
    """Stores an iterate, and the running mean up to it: ema_t = decay·ema_{t-1} + (1-decay)·iterate_t."""
    t, dtype = live.name.t, policies.compute.dtype
    cast = jax.jit(lambda p: jax.tree.map(lambda w: w.astype(dtype), p))
    stored = cast(trained(policies, live.params))
    checkpoint.save_iterate(policies.iterates, folder_name(live.name), stored)
    if ema_decay and t > 0:
        before = trained(policies, params(policies, Name("ema", t - 1)))
        mean = programs.blend(policies.arch, policies.mesh, dtype)(before, stored, ema_decay)
        checkpoint.save_iterate(policies.iterates, folder_name(Name("ema", t)), mean)


def logps(
    policies: Policies,
    name: Name | None,
    trees: Sequence[Tree],
    *,
    live: Live,
    plan: Plan,
    what: str,
    chunk: int = score.CHUNK,
) -> np.ndarray:
    """Log-probs of every branch of a set under a model, through the ledger; zeros for no model (reference-free).

    Args:
        live: the policy in memory, used if it is the one that is asked for.
        plan, chunk: as score.set_logps. what: is scored, for the progress line.
    """
    if name is None:
        return np.zeros(sum(len(t.branches) for t in trees), np.float32)

    def load() -> Callable[[Rows], np.ndarray]:
        # After a resume the policy that scored is known by name only.
        same = live.params is not None and tag(policies, name) == tag(policies, live.name)
        weights = live.params if same else params(policies, name)
        scorer = programs.scorer(policies.arch, policies.mesh, policies.compute)
        return programs.score_rows(scorer, weights, policies.mesh)

    label = f"scoring {what} under {name.kind} {name.t}"
    return score.set_logps(
        trees, tag=tag(policies, name), ledger=policies.ledger, load=load, plan=plan, chunk=chunk, label=label
    )


def folder_name(name: Name) -> str:
    """What files of a model are called: 3, ema-3, best-3."""
    return str(name.t) if name.kind == "iterate" or name.t == 0 else f"{name.kind}-{name.t}"
