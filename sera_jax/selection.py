"""score → margins → select, on the given pairs: log-probs in, the pairs that are kept out (SeRA, section 3.2)."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sera_jax import mesh as meshes
from sera_jax import programs, sera
from sera_jax.records import Pair, Text, Tree


@dataclasses.dataclass(frozen=True)
class Selection:
    """The verdict on N pairs, NumPy: mask_N bool, score_N and margin_N float32."""

    mask_N: np.ndarray
    score_N: np.ndarray
    margin_N: np.ndarray


def select(
    pairs: Sequence[Pair],
    trees: Sequence[Tree],
    *,
    logp_EN2: np.ndarray,
    weights_E: np.ndarray,
    reward_reference_N2: np.ndarray,
    loss_reference_N2: np.ndarray,
    selector: Callable[..., dict[str, jax.Array]],
    mesh: Mesh,
    key: jax.Array,
    keep: float,
    stratify: str,
    what: str,
    reward_gap_N: np.ndarray | None = None,
) -> Selection:
    """Runs a selector on numbers of the host.

    Args:
        pairs, trees: one to one. logp_EN2: log-probs under each iterate of the ensemble, of weights weights_E.
        reward_reference_N2, loss_reference_N2: log-probs under the references; zeros for none.
        selector: programs.selector(...). key: of the score "random".
        keep, stratify: as SelectConfig has them. what: is scored, for errors. reward_gap_N: of the score "reward_gap".

    Raises:
        ValueError: a score is not finite.
    """
    n, shards = len(trees), meshes.row_shards(mesh)
    group_N = groups(pairs, trees, stratify)
    arrays = {
        "logp_EN2": logp_EN2,
        "reward_reference_N2": reward_reference_N2,
        "loss_reference_N2": loss_reference_N2,
        "length_N2": np.array([[len(b) for b in tree.branches] for tree in trees], np.float32),
        "target_N2": np.array([tree.told for tree in trees], np.float32),
        "gap_N": gaps([pair.scores for pair in pairs]),
        "reward_gap_N": np.full(n, np.nan, np.float32) if reward_gap_N is None else reward_gap_N,
        "gold_N": gaps([pair.truth.gold for pair in pairs]),
        "valid_N": np.ones(n, bool),
        "group_N": group_N,
        "example_N": np.arange(n, dtype=np.int32),
    }
    arrays = {name: _pad(a, -n % shards, axis=1 if name == "logp_EN2" else 0) for name, a in arrays.items()}
    arrays["keep_G"] = sera.keep_counts(keep, group_N, int(group_N.max()) + 1)
    arrays["weights_E"] = weights_E
    where = programs.selector_shardings(mesh)
    placed = {name: meshes.put(a, where[name]) for name, a in arrays.items()}
    out = selector(**placed, key=meshes.put(key, where["key"]))
    out = {name: np.asarray(a) for name, a in meshes.get(out).items()}
    sera.check_finite(out["bad"], [pair.id for pair in pairs], what)
    return Selection(out["mask_N"][:n], out["score_N"][:n], out["margin_N"][:n])


def gaps(scores_N: Sequence[tuple[float, float] | None]) -> np.ndarray:
    """float32 [N]: chosen minus rejected, NaN where unknown."""
    return np.array([np.nan if scores is None else scores[0] - scores[1] for scores in scores_N], np.float32)


def groups(pairs: Sequence[Pair], trees: Sequence[Tree], stratify: str) -> np.ndarray:
    """int32 [N]: the stratum of each pair, from 0. Of lengths: quarters of the pairs by response tokens."""
    length_N = np.array([tree.targets for tree in trees])
    labels = {
        "none": lambda: np.zeros(len(trees)),
        "source": lambda: np.array([pair.source for pair in pairs]),
        "length": lambda: np.searchsorted(np.quantile(length_N, [0.25, 0.5, 0.75]), length_N),
        "prompt": lambda: np.array([tree.prompt.tobytes() for tree in trees], object),
    }[stratify]()
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)


def columns(pairs: Sequence[Pair], trees: Sequence[Tree], chosen: Selection) -> dict[str, Any]:
    """The verdict as a table, a row for each pair in the given order; rank 0 has the highest score.

    Args:
        trees: of the pairs, matched by id; `chosen` is about these. A pair without a tree was not scored: its margin
            and score are NaN, its rank -1, its lengths 0. What is known behind the labels has columns of its own where
            any pair has it (records.Truth).
    """
    place = {tree.id: i for i, tree in enumerate(trees)}
    index_N = np.array([place.get(pair.id, -1) for pair in pairs])
    rank = np.empty(len(trees), np.int64)
    rank[np.argsort(-chosen.score_N, kind="stable")] = np.arange(len(trees))
    length = np.array([[len(b) for b in tree.branches] for tree in trees], np.int32)

    def spread(values: np.ndarray, missing: Any) -> np.ndarray:
        out = np.full(len(pairs), missing, values.dtype)
        out[index_N >= 0] = values[index_N[index_N >= 0]]
        return out

    return {
        "id": [pair.id for pair in pairs],
        "source": [pair.source for pair in pairs],
        "prompt": [shown(pair.prompt) for pair in pairs],
        "chosen": [shown(pair.chosen) for pair in pairs],
        "rejected": [shown(pair.rejected) for pair in pairs],
        "margin": spread(chosen.margin_N, np.nan),
        "score": spread(chosen.score_N, np.nan),
        "kept": spread(chosen.mask_N, False),
        "rank": spread(rank, -1),
        "length_chosen": spread(length[:, 0], 0),
        "length_rejected": spread(length[:, 1], 0),
        **truths(pairs),
    }


def truths(pairs: Sequence[Pair]) -> dict[str, list]:
    """What is known behind the labels, by column; columns of which nothing is known are left out."""
    side = lambda i: [None if pair.truth.gold is None else pair.truth.gold[i] for pair in pairs]
    told = {"gold_chosen": side(0), "gold_rejected": side(1)}
    told |= {key: [getattr(pair.truth, key) for pair in pairs] for key in ("flipped", "cued", "upset", "author")}
    return {key: values for key, values in told.items() if any(value is not None for value in values)}


def shown(text: Text) -> str:
    """Messages as JSON, text as it is."""
    return text if isinstance(text, str) else json.dumps(list(text), ensure_ascii=False)


def _pad(array: np.ndarray, more: int, axis: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, more)
    return np.pad(array, widths)
