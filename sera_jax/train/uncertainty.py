"""Γ in a run: features under iterate 0, the covariance that its labelled pairs have spanned, kept from iteration to
iteration, and how uncertain a linear reward is of candidates and of single responses (sera_jax.explore).

Features are those of iterate 0, the reference `initial`: it stays what it is. Under a policy that moves, pairs of one
iteration would lie elsewhere than those of the next, and their sum would mean nothing. `covariance/t.npz` has Σ_t: Σ_0
of all given pairs, Σ_t with the fresh pairs that iterations up to t trained on.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sera_jax import disk, explore, metrics, policies, processes, programs, rewards, score
from sera_jax import mesh as meshes
from sera_jax.bootstrap import Fresh
from sera_jax.ledger import branch_key, derived_tag
from sera_jax.policies import Live, Name
from sera_jax.records import Candidates, Tree
from sera_jax.train.world import World

BLOCK = 1024  # vectors that enter a program at once


@dataclasses.dataclass(frozen=True)
class Covariance:
    """On the host: sigma_DD, float32 Σ; centre_D, float32, the mean features of the given responses."""

    sigma_DD: np.ndarray
    centre_D: np.ndarray


def against_best(
    world: World, t: int, candidates: Candidates, rewards_PC: np.ndarray, valid_PC: np.ndarray, scored: Live
) -> np.ndarray:
    """float32 [P, C]: Γ of each candidate against the best one of its prompt, by the pairs before iteration t; NaN for
    empty candidates, of no meaning where a prompt has no valid one."""
    trees, present_PC = rewards.trees(candidates), rewards.lengths(candidates) > 0
    best_P = np.asarray(explore.leader(rewards_PC, valid_PC))

    def compute() -> np.ndarray:
        phi_FD = _features(world, trees, scored, f"iteration {t}: features of candidates")
        number_PC = np.zeros(present_PC.shape, np.int64)
        number_PC[present_PC] = np.arange(len(phi_FD))
        row_F = np.nonzero(present_PC)[0]
        sigma_DD = before(world, t, scored).sigma_DD
        return _norms(world, sigma_DD, phi_FD - phi_FD[number_PC[row_F, best_P[row_F]]])

    norm_F = _through_ledger(world, t, "candidates", trees, compute)
    return world.config.explore.weight * rewards.on_grid(norm_F, candidates)


def of_responses(world: World, trees: Sequence[Tree], scored: Live) -> np.ndarray:
    """float32 by flat branch number: Γ(x, a) = β·‖φ(x, a) - ν‖ by the given pairs, ν the mean of the given responses'
    features: what GSHF's offline variant takes off a reward."""

    def compute() -> np.ndarray:
        known = before(world, 1, scored)
        return _norms(world, known.sigma_DD, _features(world, trees, scored, "features of pairs") - known.centre_D)

    return world.config.explore.weight * _through_ledger(world, 1, "responses", trees, compute)


def told(world: World, trees: Sequence[Tree], scored: Live) -> list[Tree]:
    """Trees with Γ of their responses as values, where the loss is told it; else as they are."""
    if world.loss.target != "bonus" or not trees:
        return list(trees)
    branches = len(trees[0].branches)
    gamma_NB = of_responses(world, trees, scored).reshape(-1, branches)
    return [dataclasses.replace(tree, values=tuple(one)) for tree, one in zip(trees, gamma_NB.tolist())]


def informed(world: World, live: Live) -> World:
    """The world whose given pairs, and held-out ones, have what the loss is told of their uncertainty."""
    trees, held_out = (told(world, some, live) for some in (world.given.trees, world.given.held_out))
    given = dataclasses.replace(world.given, trees=tuple(trees), held_out=tuple(held_out))
    return dataclasses.replace(world, given=given)


def before(world: World, t: int, scored: Live) -> Covariance:
    """What the pairs before iteration t say: the given ones, and fresh ones that were trained on."""
    paths = [_path(world, s) for s in range(t - 1, -1, -1)]
    found = processes.once(lambda: next((_read(path) for path in paths if path.is_file()), None))
    if found is not None:
        return Covariance(*found)
    explored, trees = world.config.explore, world.given.trees
    phi_FD = _features(world, trees, scored, "features of the given pairs")
    sigma_DD = np.asarray(explore.prior(explored.regularisation, phi_FD.shape[1]))
    made = Covariance(_grown(world, sigma_DD, phi_FD), phi_FD.mean(axis=0, dtype=np.float64).astype(np.float32))
    return _written(world, 0, made)


def learn(world: World, t: int, fresh: Fresh, scored: Live) -> None:
    """Σ_t: the fresh pairs that iteration t trains on are known from here on. A file that is there stays."""
    if processes.once(lambda: _path(world, t).is_file()):
        return
    known, sigma_DD = before(world, t, scored), None
    trees = [tree for tree, kept in zip(fresh.trees, fresh.kept_F) if kept]
    if trees:
        phi_FD = _features(world, trees, scored, f"iteration {t}: features of fresh pairs")
        sigma_DD = _grown(world, known.sigma_DD, phi_FD)
    _written(world, t, known if sigma_DD is None else dataclasses.replace(known, sigma_DD=sigma_DD))


# --- on the devices ---------------------------------------------------------------------------------------------------


def _features(world: World, trees: Sequence[Tree], scored: Live, label: str) -> np.ndarray:
    """float32 [F, D] by flat branch number, of score.row_features, projected as the config says."""
    where, name = world.policies, Name("iterate", 0)
    same = scored.params is not None and policies.tag(where, scored.name) == policies.tag(where, name)
    params = scored.params if same else policies.params(where, name)
    dimension = 0 if world.config.explore.dimension >= where.arch.width else world.config.explore.dimension
    program = programs.featurer(where.arch, world.mesh, where.compute, dimension, world.config.run.seed)
    run, plan = programs.score_rows(program, params, world.mesh), score.plan_for(trees, where.arch, world.mesh)
    chunks = [trees[i : i + score.CHUNK] for i in range(0, len(trees), score.CHUNK)]
    tracked = metrics.track(chunks, total=len(chunks), label=label, unit="chunks")
    return np.concatenate([score.logps(chunk, run, plan) for chunk in tracked])


def _grown(world: World, sigma_DD: np.ndarray, phi_FD: np.ndarray) -> np.ndarray:
    """Σ with the pairs whose features stand two by two."""
    size = len(sigma_DD)
    add = programs.covariance_update(world.mesh, size)
    sigma = meshes.put(sigma_DD, programs.covariance_sharding(world.mesh, size))
    for block in _blocks(world, phi_FD[0::2] - phi_FD[1::2]):
        sigma = add(sigma, block)
    return meshes.get(sigma)


def _norms(world: World, sigma_DD: np.ndarray, vector_ND: np.ndarray) -> np.ndarray:
    """float32 [N]: ‖v‖_{Σ⁻¹}.

    Raises:
        ValueError: Σ is too flat for float32.
    """
    size = len(sigma_DD)
    where = programs.covariance_sharding(world.mesh, size)
    factor = programs.covariance_factor(world.mesh, size)(meshes.put(sigma_DD, where))
    norm = programs.covariance_norms(world.mesh)
    norm_N = np.concatenate([meshes.get(norm(factor, block)) for block in _blocks(world, vector_ND)])
    if not np.isfinite(norm_N).all():
        raise ValueError(
            f"the covariance of {size} features cannot be factorised in float32: its mean eigenvalue is "
            f"{np.trace(sigma_DD) / size:.3g} with explore.regularisation {world.config.explore.regularisation:g}. "
            "Raise it, or lower explore.dimension."
        )
    return norm_N[: len(vector_ND)]


def block(mesh: Mesh) -> int:
    """Vectors that enter a program of the covariance at once: BLOCK, or the next number that the mesh divides."""
    shards = meshes.row_shards(mesh)
    return -(-BLOCK // shards) * shards


def _blocks(world: World, vector_ND: np.ndarray) -> list[Any]:
    """Rows for a program, BLOCK at a time, the last block filled up with zeros."""
    size = block(world.mesh)
    padded_ND = np.pad(vector_ND, ((0, -len(vector_ND) % size), (0, 0)))
    where = meshes.rows_sharding(world.mesh)
    return [meshes.put(padded_ND[i : i + size], where) for i in range(0, len(padded_ND), size)]


# --- on the disk ------------------------------------------------------------------------------------------------------


def _through_ledger(
    world: World, t: int, what: str, trees: Sequence[Tree], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """float32 by flat branch number; once known they stay, since they decide what is trained on, and how."""
    own, ledger = world.config.explore, world.policies.ledger
    said = ("uncertainty", what, t, own.regularisation, own.dimension)
    tag = derived_tag(policies.fingerprint(world.policies, t), *said)
    keys = [branch_key(tree.prompt, branch) for tree in trees for branch in tree.branches]
    if not np.isfinite(ledger.look_up(tag, keys)).all():
        ledger.append(tag, keys, compute())
    return ledger.look_up(tag, keys)


def _path(world: World, t: int) -> pathlib.Path:
    return world.run.path / "covariance" / f"{t}.npz"


def _read(path: pathlib.Path) -> list[np.ndarray]:
    with np.load(path) as file:
        return [file["sigma"], file["centre"]]


def _written(world: World, t: int, made: Covariance) -> Covariance:
    def write() -> None:
        path = _path(world, t)
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.whole(path) as beside, open(beside, "wb") as file:
            np.savez(file, sigma=made.sigma_DD, centre=made.centre_D)

    processes.once(write)
    return made
