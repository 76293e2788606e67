"""The order in which an update meets the examples, and the pairs held out.

An order is a pure function of (seed, iteration, epoch): nothing has to be saved to resume, the number of the update
is enough. The permutation is the stable argsort of raw Philox words, because NumPy promises the stream of its bit
generators for good, but not that of `Generator.permutation`; a run therefore resumes on another NumPy. A permutation of
a million indices takes about 0.1 s once an epoch, so a lazily computed one (grain's index shuffle) would buy nothing.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from sera_jax.records import Pair, Text, Unpaired

WORD = 2**64


def order(n: int, *, seed: int, iteration: int, epoch: int) -> np.ndarray:
    """A permutation of range(n), int64 [n], equal on every machine for equal arguments.

    Philox is counter-based (Salmon et al., 2011): seed is its key, iteration and epoch the high words of its counter,
    so no two epochs share a stretch of the stream.
    """
    if n < 0 or iteration < 0 or epoch < 0:
        raise ValueError(f"order: got n={n}, iteration={iteration}, epoch={epoch}; expected none below 0.")
    counter, key = (np.array(words, np.uint64) for words in ([0, 0, iteration, epoch], [seed % WORD, 0]))
    words = np.random.Philox(counter=counter, key=key).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


def batches(
    n: int, batch_size: int, *, seed: int, iteration: int, epoch: int, updates: int | None = None
) -> list[np.ndarray]:
    """The examples of each update of an epoch: int64 [batch_size] each.

    Every batch has exactly batch_size examples, so that the recipe's batch is what an update averages over: the last
    one is filled from the start of the same permutation (up to batch_size - 1 examples come twice in the epoch; with
    n < batch_size all of them come as often as needed). `updates` asks for another number of batches than
    ceil(n / batch_size): fewer are a prefix, for more the same permutation is cycled.
    """
    if n < 1 or batch_size < 1 or (updates is not None and updates < 1):
        raise ValueError(
            f"batches: got n={n}, batch_size={batch_size}, updates={updates}; expected at least 1 of each. "
            "With n=0 nothing is left to train on: see the counts of reading, tokenising and selection."
        )
    updates = -(-n // batch_size) if updates is None else updates
    indices = np.resize(order(n, seed=seed, iteration=iteration, epoch=epoch), updates * batch_size)
    return list(indices.reshape(updates, batch_size))


Given = TypeVar("Given", Pair, Unpaired)


def _random(pairs: Sequence[Given], count: int, seed: int) -> list[np.ndarray]:
    """By chance."""
    return np.array_split(order(len(pairs), seed=seed + 2, iteration=0, epoch=0), count)


def _sources(pairs: Sequence[Given], count: int, seed: int) -> list[np.ndarray]:
    """A source (a file) each, in the order in which they appear."""
    names = [pair.source for pair in pairs]
    each = list(dict.fromkeys(names))
    if len(each) != count:
        raise ValueError(
            f"loop.parts is 'sources': got pairs of {len(each)} sources ({', '.join(map(repr, each[:5]))}), expected "
            f"one for each of {count} iterations. Set loop.iterations to {len(each)}, or give other files."
        )
    return [np.flatnonzero([name == one for name in names]) for one in each]


def _easy_first(pairs: Sequence[Given], count: int, seed: int) -> list[np.ndarray]:
    """The largest gaps of the annotator first: the first pair of every prompt before the second of any."""
    lacking = next((pair.id for pair in pairs if getattr(pair, "scores", None) is None), None)
    if lacking is not None:
        raise ValueError(
            f"loop.parts is 'easy_first': pair {lacking!r} has no scores, expected score_chosen and score_rejected of "
            "every pair. Give them, or use loop.parts 'random'."
        )
    gap_N = np.array([pair.scores[0] - pair.scores[1] for pair in pairs])
    place_N, seen = np.zeros(len(pairs), np.int64), Counter()
    for i in np.argsort(-gap_N, kind="stable"):
        prompt = _digest(pairs[i].prompt, seed)
        place_N[i] = seen[prompt]
        seen[prompt] += 1
    return np.array_split(np.lexsort((-gap_N, place_N)), count)


PARTS = {"random": _random, "sources": _sources, "easy_first": _easy_first}
"""rule(pairs, count, seed) → the numbers of the pairs of each part; every pair is in one."""


def parts(pairs: Sequence[Given], count: int, rule: str, *, seed: int) -> tuple[np.ndarray, ...]:
    """The given pairs in as many parts as there are iterations, by a rule of PARTS: int64 each, ascending. Parts are
    equal up to one pair, but those of sources.

    Raises:
        ValueError: fewer pairs than parts; as the rules do.
    """
    if len(pairs) < count:
        raise ValueError(
            f"loop.parts is {rule!r}: got {len(pairs)} pairs, expected at least one for each of {count} parts."
        )
    return tuple(np.sort(part) for part in PARTS[rule](pairs, count, seed))


def split_validation(pairs: Sequence[Given], share: float, seed: int) -> tuple[list[Given], list[Given]]:
    """(training pairs, validation pairs), both in the given order; no prompt stands on both sides.

    Prompts are ranked by a keyed hash of their content and held out until `share` of the pairs is reached (the last one
    may overshoot), so the choice depends on neither the order of the files nor the ids. share=0 holds out nothing.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"data.validation: got {share}; expected a share in [0, 1).")
    if share == 0.0:
        return list(pairs), []
    groups: dict[bytes, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(_digest(pair.prompt, seed), []).append(index)
    if len(groups) < 2:
        raise ValueError(
            f"data.validation={share}: got {len(groups)} different prompt(s) among {len(pairs)} pairs; expected 2 or "
            "more, since pairs of one prompt stay together. Set data.validation to 0 or give more data."
        )
    held: set[int] = set()
    for digest in sorted(groups)[:-1]:  # at least one prompt stays to train on
        if len(held) >= share * len(pairs):
            break
        held.update(groups[digest])
    return [p for i, p in enumerate(pairs) if i not in held], [pairs[i] for i in sorted(held)]


def _digest(prompt: Text, seed: int) -> bytes:
    text = json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8"), key=str(seed).encode(), digest_size=16).digest()
