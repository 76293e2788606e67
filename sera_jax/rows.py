"""Ragged prompt trees → packed rows and back, and the planner of shapes. NumPy only.

The only place that shifts by one: a response token at index i of a row is predicted at `parent`, the index before it in
*its own text*, which for a branch's first token is the prompt's last token, wherever the branch lies in the row.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sera_jax.records import Rows, Tree

WORTH = 0.04  # share of an update's cost that a second shape, and its compilation, has to save
QUANTUM = 128  # a row's length and targets are multiples of it: TPU lanes, and few distinct shapes


@dataclasses.dataclass(frozen=True)
class Plan:
    """The one shape of a program's microbatches: rows B × (length L tokens, targets M, slots S).

    cost: of a token in such rows, where the matrix products of the layers cost 1.
    """

    length: int
    targets: int
    slots: int
    rows: int
    cost: float = 1.0


@dataclasses.dataclass(frozen=True)
class Fill:
    """How full packed rows are: useful tokens / tokens in rows, padding rows included."""

    useful: int
    padded: int

    @property
    def share(self) -> float:
        return self.useful / max(self.padded, 1)


def plan(lengths_N3: np.ndarray, **of: int | float) -> Plan:
    """The one best shape: the first of `plans`."""
    return plans(lengths_N3, shapes=1, **of)[0]


def plans(
    lengths_N3: np.ndarray,
    *,
    batch: int,
    per_key: float,
    shards: int,
    row_tokens: int = 0,
    microbatch_rows: int = 0,
    device_tokens: int = 8192,
    shapes: int = 2,
) -> tuple[Plan, ...]:
    """Chooses shapes (L, M, S and B) from measured lengths; each batch then takes the one that suits it (`fitting`).

    L and B: the cheapest of the shapes tried (L from the longest tree to four of them; 1 row a device up to
    `device_tokens` tokens), packed for batches in a fixed random order. A token of the rows costs 1 + L · per_key.
    Within 2 % of the cheapest, shorter rows and then more of them win. M and S: the most that such a row needs; targets
    that are not there cost nothing, the head leaves them out. A further shape is the one that saves most beside those
    before, if it saves WORTH: few long rows suit one batch and not the next, and what a last row leaves empty counts
    where a device has few.

    Args:
        lengths_N3: int [N, 3], for each tree its length, targets and branches. May hold made-up trees for what is not
            known yet (fresh pairs): they only have to bound the real ones.
        batch: trees in a batch.
        per_key: what attention costs a token for each token of its row, where the matrix products of the layers cost it
            1. Longer rows pack better, but dense attention over them costs about L / (6 D) in FLOPs, and three times
            that where memory bounds it: 1 / (2 D). 0 where attention leaves other trees out.
        shards: ways in which rows are split over devices; B is a multiple of it.
        row_tokens, microbatch_rows: L, and B / shards, where the caller has chosen; 0 = planned.
        shapes: at most so many; each is a program to compile.

    Raises:
        ValueError: a tree is longer than `row_tokens`.
    """
    if not len(lengths_N3):
        raise ValueError("plan: got no trees, expected at least one. Is the data set empty?")
    longest = _round_up(int(lengths_N3[:, 0].max()), QUANTUM)
    if row_tokens and row_tokens < lengths_N3[:, 0].max():
        raise ValueError(
            f"row_tokens is {row_tokens}, but the longest prompt tree (prompt + all branches) has "
            f"{lengths_N3[:, 0].max()} tokens. Raise optimizer.row_tokens, or lower data.max_length or "
            "bootstrap.max_new_tokens (a fresh pair may take prompt + 2 of them)."
        )
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(lengths_N3))[: 16 * batch]
    batches = [lengths_N3[order[i : i + batch]] for i in range(0, len(order), batch)]

    choices = []  # (cost of each batch, L, rows a device, row of each tree)
    step = max(QUANTUM, _round_up(longest / 8, QUANTUM))
    for length in [row_tokens] if row_tokens else range(longest, 4 * longest + 1, step):
        packed = [_assign(b, length, length, length) for b in batches]
        counts = np.array([max(r) + 1 for r in packed])
        most = max(1, min(device_tokens // length, math.ceil(counts.max() / shards)))
        for per_device in [microbatch_rows] if microbatch_rows else range(most, 0, -1):
            padded = length * np.array([_round_up(c, per_device * shards) for c in counts])
            choices.append((padded * (1 + length * per_key), length, per_device, packed))
    cheapest = min(c[0].sum() for c in choices)
    chosen = [min((c for c in choices if c[0].sum() <= 1.02 * cheapest), key=lambda c: (c[1], -c[2]))]
    least = chosen[0][0]
    while len(chosen) < shapes:
        more = min(choices, key=lambda c: (np.minimum(least, c[0]).sum(), c[1], -c[2]))
        if np.minimum(least, more[0]).sum() > (1 - WORTH) * least.sum():
            break
        least = np.minimum(least, more[0])
        chosen.append(more)

    def shape(length: int, per_device: int, packed: list[list[int]]) -> Plan:
        targets, slots = (
            int(max(np.bincount(r, weights=b[:, column]).max() for b, r in zip(batches, packed))) for column in (1, 2)
        )
        return Plan(
            length=length,
            targets=min(_round_up(max(targets, lengths_N3[:, 1].max()), QUANTUM), length),
            slots=_round_up(max(slots, lengths_N3[:, 2].max()), 2),
            rows=per_device * shards,
            cost=1 + length * per_key,
        )

    return tuple(shape(*c[1:]) for c in chosen)


def fitting(trees: Sequence[Tree], plans: Sequence[Plan]) -> Plan:
    """The cheapest shape for these trees, the first of equal ones."""
    if len(plans) == 1:
        return plans[0]
    sizes = measure(trees)

    def cost(plan: Plan) -> float:
        count = max(_assign(sizes, plan.length, plan.targets, plan.slots), default=-1) + 1
        return _round_up(count, plan.rows) * plan.length * plan.cost

    return min(plans, key=cost)


def measure(trees: Sequence[Tree]) -> np.ndarray:
    """int64 [N, 3]: length, targets and branches of each tree, as `plan` takes them."""
    return np.array([(t.length, t.targets, len(t.branches)) for t in trees], np.int64).reshape(-1, 3)


def pack(trees: Sequence[Tree], plan: Plan) -> Rows:
    """Trees side by side in as few rows as best-fit-decreasing finds; the row count is a multiple of plan.rows.

    Returns:
        Rows [R, ...] of numpy arrays; `example_BS` numbers the branches of `trees` in order.

    Raises:
        ValueError: a tree that fits in no row, or has an empty branch.
    """
    sizes = measure(trees)
    for tree, (length, targets, branches) in zip(trees, sizes):
        if length > plan.length or targets > plan.targets or branches > plan.slots:
            raise ValueError(
                f"tree {tree.id!r} has {length} tokens, {targets} response tokens and {branches} branches; a row holds "
                f"{plan.length}, {plan.targets} and {plan.slots}. Plan the rows with this tree's lengths included."
            )
        if min((len(b) for b in tree.branches), default=0) == 0:
            raise ValueError(
                f"tree {tree.id!r} has an empty branch; expected at least one response token (EOS) in each."
            )
    row_of = _assign(sizes, plan.length, plan.targets, plan.slots)
    count = _round_up(max(row_of, default=-1) + 1, plan.rows)
    rows = empty(count, plan)
    first_branch = np.concatenate(([0], np.cumsum(sizes[:, 2])))
    at = np.zeros((count, 4), np.int64)  # next free token, target, slot and tree of each row
    for index, (tree, row) in enumerate(zip(trees, row_of)):
        at[row] = _lay(rows, tree, int(first_branch[index]), row, *at[row])
    return rows


def _lay(rows: Rows, tree: Tree, first_branch: int, row: int, token: int, target: int, slot: int, label: int) -> tuple:
    """Writes one tree into a row at the given free places; returns the next free ones."""
    prompt = len(tree.prompt)
    start = token
    rows.tokens_BL[row, start : start + prompt] = tree.prompt
    rows.position_BL[row, start : start + prompt] = np.arange(prompt)
    token += prompt
    for number, branch in enumerate(tree.branches):
        n = len(branch)
        rows.tokens_BL[row, token : token + n] = branch
        rows.branch_BL[row, token : token + n] = number + 1
        rows.position_BL[row, token : token + n] = prompt + np.arange(n)
        # The shift by one. Without a prompt nothing predicts the first token: it stays context and is not scored.
        first = 0 if prompt else 1
        m = n - first
        rows.parent_BM[row, target : target + m] = np.arange(token + first - 1, token + n - 1)
        if prompt:
            rows.parent_BM[row, target] = start + prompt - 1
        rows.target_BM[row, target : target + m] = branch[first:]
        rows.slot_BM[row, target : target + m] = slot
        rows.example_BS[row, slot] = first_branch + number
        token, target, slot = token + n, target + m, slot + 1
    rows.tree_BL[row, start:token] = label + 1
    return token, target, slot, label + 1


def empty(count: int, plan: Plan) -> Rows:
    """Rows of nothing but padding."""
    tokens = [np.zeros((count, plan.length), np.int32) for _ in range(4)]
    targets = [np.zeros((count, plan.targets), np.int32) for _ in range(2)]
    slot = np.full((count, plan.targets), plan.slots, np.int32)
    return Rows(*tokens, *targets, slot, np.full((count, plan.slots), -1, np.int32))


def microbatches(rows: Rows, plan: Plan, most: int) -> tuple[Rows, int]:
    """Rows [R, ...] → Rows [most, B, ...] padded with empty microbatches, and how many of them are filled.

    Raises:
        ValueError: more rows than `most` microbatches hold.
    """
    count = len(rows.tokens_BL) // plan.rows
    if count > most:
        raise ValueError(f"a batch takes {count} microbatches of {plan.rows} rows, expected at most {most}.")
    filler = empty((most - count) * plan.rows, plan)

    def stack(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate((a, b)).reshape(most, plan.rows, *a.shape[1:])

    fields = [f.name for f in dataclasses.fields(Rows)]
    return Rows(*(stack(getattr(rows, f), getattr(filler, f)) for f in fields)), count


def most_microbatches(batch: int, plan: Plan) -> int:
    """Microbatches that any batch of this many trees fits in: at worst each tree takes a row."""
    return math.ceil(batch / plan.rows)


def spread(values_F: np.ndarray, example_BS: np.ndarray, fill: float = 0.0) -> np.ndarray:
    """Values of flat branch numbers → slots of rows, float32; `fill` in empty slots."""
    return np.where(example_BS >= 0, values_F[np.maximum(example_BS, 0)], fill).astype(np.float32)


def unpack(values_BS: np.ndarray, example_BS: np.ndarray, count: int) -> np.ndarray:
    """Slot values → float32 [count] by flat branch number; NaN for a number that is in no slot. A value may be an
    array: axes behind the slot's stay."""
    out = np.full((count, *values_BS.shape[example_BS.ndim :]), np.nan, np.float32)
    filled = example_BS >= 0
    out[example_BS[filled]] = values_BS[filled]
    return out


def spread_tokens(values_F: Sequence[np.ndarray], example_BS: np.ndarray, slot_BM: np.ndarray) -> np.ndarray:
    """Values of each branch's predicted tokens, by flat branch number → targets of rows (any leading axes), float32; 0
    where there is no token."""
    out_BM = np.zeros(slot_BM.shape, np.float32)
    for row in np.ndindex(slot_BM.shape[:-1]):
        values = [values_F[branch] for branch in example_BS[row] if branch >= 0]  # targets stand slot by slot
        out_BM[row][: sum(map(len, values))] = np.concatenate(values) if values else 0
    return out_BM


def unpack_tokens(values_BM: np.ndarray, example_BS: np.ndarray, slot_BM: np.ndarray, count: int) -> list[np.ndarray]:
    """The inverse: float32 [tokens] of each of `count` flat branch numbers."""
    out = [np.zeros(0, np.float32)] * count
    for row in np.ndindex(slot_BM.shape[:-1]):
        for slot in np.flatnonzero(example_BS[row] >= 0):
            out[example_BS[row][slot]] = values_BM[row][slot_BM[row] == slot]
    return out


def fill(rows: Rows) -> Fill:
    """Useful and padded tokens of rows (any leading axes)."""
    return Fill(int((rows.tree_BL > 0).sum()), int(rows.tree_BL.size))


def _assign(sizes_N3: np.ndarray, length: int, targets: int, slots: int) -> list[int]:
    """Best fit, longest first: the row of each tree. Ties go to the tree, then to the row, with the lowest index."""
    free = np.empty((0, 3), np.int64)
    row_of = [0] * len(sizes_N3)
    for index in np.argsort(-sizes_N3[:, 0], kind="stable"):
        size = sizes_N3[index]
        fits = np.flatnonzero((free >= size).all(axis=1))
        if len(fits):
            row = int(fits[np.argmin(free[fits, 0])])
        else:
            row = len(free)
            free = np.vstack((free, (length, targets, slots)))
        free[row] -= size
        row_of[index] = row
    return row_of


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
