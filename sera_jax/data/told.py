"""What a loss is told of the responses of given pairs beside their log-probs (`losses.Loss.target`)."""

import dataclasses
from collections.abc import Callable, Sequence

from sera_jax.records import Pair, Tree

TOLD: dict[str, Callable[[Pair], tuple[float, float] | None]] = {
    "win": lambda pair: (1.0, 0.0),  # a label is a comparison that was won
    "preference": lambda pair: (1.0, 0.0),
    "reward": lambda pair: pair.scores,
}
"""What the loss asks for → of (chosen, rejected) of a given pair; None = not known."""


def valued(trees: Sequence[Tree], pairs: Sequence[Pair], target: str) -> list[Tree]:
    """Trees with the values that a loss of this target is told, taken from the pairs of the same ids; trees as they are
    where a loss is told nothing, or labels, which they have.

    Raises:
        ValueError: a pair without scores, where the loss is told rewards.
    """
    if target not in TOLD:
        return list(trees)
    by_id = {pair.id: TOLD[target](pair) for pair in pairs}
    lacking = [tree.id for tree in trees if by_id[tree.id] is None]
    if lacking:
        raise ValueError(
            f"the loss is told the annotator's scores, but {len(lacking)} of {len(trees)} pairs have none, the first "
            f"{lacking[0]!r}. Give score_chosen and score_rejected, or use another loss."
        )
    return [dataclasses.replace(tree, values=by_id[tree.id]) for tree in trees]
