"""Labelled single responses, each beside one of another prompt: what KTO estimates its KL with."""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from sera_jax.data.order import order
from sera_jax.records import Tree


def mismatched(trees: Sequence[Tree], *, max_length: int, seed: int) -> list[Tree]:
    """Trees of one branch → the same with a second one, the mismatch: the completion of an example with another prompt,
    each used once, cut (at its end) where prompt + completion would exceed max_length tokens.

    TRL rotates completions within a batch of the file's order. Here the set is rotated as a whole, so that batches may
    be shuffled and the reference's log-probs of mismatches stay the same.

    Raises:
        ValueError: more than half of the examples have the same prompt.
    """
    other_N = derangement([tree.prompt.tobytes() for tree in trees], seed)
    return [
        dataclasses.replace(tree, branches=(*tree.branches, trees[other].branches[0][: max_length - len(tree.prompt)]))
        for tree, other in zip(trees, other_N)
    ]


def unmatched(trees: Sequence[Tree]) -> list[Tree]:
    """The same for a loss that has no use for a mismatch: the second branch is the first token of the own one, since an
    example has two slots, and next to nothing is computed for it."""
    return [dataclasses.replace(tree, branches=(*tree.branches, tree.branches[0][:1])) for tree in trees]


def derangement(groups: Sequence[Hashable], seed: int) -> np.ndarray:
    """A permutation of the examples that sends none of them into its own group, int64 [N]; a function of the seed.

    The examples, shuffled and then gathered by group, are rotated by the size of the largest group: nothing that is
    gathered within less than that distance can meet itself.
    """
    shuffled_N = order(len(groups), seed=seed + 2, iteration=0, epoch=0)  # seed + 1 draws the prompts of iterations
    rank = {group: i for i, group in enumerate(dict.fromkeys(groups[i] for i in shuffled_N))}
    gathered_N = shuffled_N[np.argsort([rank[groups[i]] for i in shuffled_N], kind="stable")]
    largest = int(np.bincount([rank[group] for group in groups]).max())
    if 2 * largest > len(groups):
        raise ValueError(
            f"{largest} of {len(groups)} examples have the same prompt, expected at most half: loss kto estimates its "
            "KL with completions of other prompts. Give data with more prompts, or take loss apo_zero_unpaired, which "
            "estimates none, or pairs and loss kto_pair."
        )
    other_N = np.empty(len(groups), np.int64)
    other_N[gathered_N] = np.roll(gathered_N, -largest)
    return other_N
