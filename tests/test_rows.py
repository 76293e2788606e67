"""Packing is only layout: every token, target and slot can be read back, and the shift by one is right."""

import numpy as np
import pytest

from sera_jax import rows as rowlib
from sera_jax.records import Tree
from sera_jax.rows import Plan


def trees_of(seed: int, count: int, prompt=(0, 40), branch=(1, 30), branches=2) -> list[Tree]:
    rng = np.random.default_rng(seed)
    ids = lambda bounds: rng.integers(1, 100, rng.integers(*bounds)).astype(np.int32)
    return [Tree(f"t{i}", ids(prompt), tuple(ids(branch) for _ in range(branches))) for i in range(count)]


def read_back(rows) -> dict[int, tuple[list, list]]:
    """Flat branch number → (prompt, branch), rebuilt from the arrays alone."""
    found = {}
    for r in range(len(rows.tokens_BL)):
        for slot in np.flatnonzero(rows.example_BS[r] >= 0):
            mine = rows.slot_BM[r] == slot
            targets = list(rows.target_BM[r][mine])
            last = rows.parent_BM[r][mine][-1]
            tree = rows.tree_BL[r] == rows.tree_BL[r][last]
            prompt = list(rows.tokens_BL[r][tree & (rows.branch_BL[r] == 0)])
            found[int(rows.example_BS[r, slot])] = (prompt, targets)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_every_branch_can_be_read_back(seed):
    trees = trees_of(seed, 23, prompt=(1, 40))
    plan = Plan(length=128, targets=128, slots=8, rows=2)
    rows = rowlib.pack(trees, plan)
    found = read_back(rows)
    for i, tree in enumerate(trees):
        for b, branch in enumerate(tree.branches):
            assert found[2 * i + b] == (list(tree.prompt), list(branch))
    assert len(found) == 2 * len(trees)
    assert len(rows.tokens_BL) % plan.rows == 0


def test_parent_predicts_target():
    """Row by hand: prompt 7 8, branches 1 2 3 and 4: the first token of each branch is predicted by 8."""
    tree = Tree("a", np.array([7, 8]), (np.array([1, 2, 3]), np.array([4])))
    rows = rowlib.pack([tree], Plan(length=128, targets=128, slots=2, rows=1))
    assert rows.tokens_BL[0, :6].tolist() == [7, 8, 1, 2, 3, 4]
    assert rows.parent_BM[0, :4].tolist() == [1, 2, 3, 1]
    assert rows.target_BM[0, :4].tolist() == [1, 2, 3, 4]
    assert rows.slot_BM[0, :5].tolist() == [0, 0, 0, 1, 2]
    assert rows.position_BL[0, :6].tolist() == [0, 1, 2, 3, 4, 2]
    assert rows.branch_BL[0, :6].tolist() == [0, 0, 1, 1, 1, 2]
    assert rows.tree_BL[0, :7].tolist() == [1, 1, 1, 1, 1, 1, 0]
    assert rows.example_BS[0].tolist() == [0, 1]


def test_without_a_prompt_the_first_token_is_context():
    rows = rowlib.pack([Tree("a", np.array([], np.int32), (np.array([5, 6, 7]),))], Plan(128, 128, 2, 1))
    assert rows.parent_BM[0, :2].tolist() == [0, 1]
    assert rows.target_BM[0, :2].tolist() == [6, 7]
    assert (rows.slot_BM[0] == 0).sum() == 2


def test_pairs_start_at_even_slots():
    rows = rowlib.pack(trees_of(0, 40, prompt=(1, 10), branch=(1, 5)), Plan(256, 256, 16, 1))
    flat = rows.example_BS.reshape(len(rows.example_BS), -1, 2)
    filled = flat[..., 0] >= 0
    assert (flat[filled][:, 0] % 2 == 0).all() and (flat[filled][:, 1] == flat[filled][:, 0] + 1).all()


def test_plan_holds_every_tree_and_fills_rows():
    trees = trees_of(1, 400, prompt=(5, 60), branch=(2, 60))
    plan = rowlib.plan(rowlib.measure(trees), batch=64, per_key=1 / 1024, shards=4)
    assert plan.length % 128 == 0 and plan.targets % 128 == 0 and plan.rows % 4 == 0
    packed = [rowlib.pack(trees[i : i + 64], plan) for i in range(0, 320, 64)]
    useful = sum(rowlib.fill(p).useful for p in packed)
    assert useful == sum(t.length for t in trees[:320])
    assert useful / sum(rowlib.fill(p).padded for p in packed) > 0.85


@pytest.mark.parametrize(
    "batch, shards, hh, ultrafeedback",
    # Measured: 0.883, 0.844; 0.925, 0.925; 0.964, 0.960; 0.937, 0.930; 0.913, 0.937 (with one shape 0.815, 0.745 and
    # 0.852, 0.899 in the first and last: where one row of the longest tree is much of a batch, or of a device's part).
    [(8, 1, 0.8, 0.8), (32, 1, 0.9, 0.9), (128, 1, 0.9, 0.9), (128, 4, 0.9, 0.9), (128, 16, 0.9, 0.9)],
)
def test_rows_are_full(batch, shards, hh, ultrafeedback):
    """Lengths like those of HH-RLHF (prompt 130 ± 100, responses 55 ± 50 tokens) and longer ones like UltraFeedback's;
    the batches are others than the planner saw."""
    rng = np.random.default_rng(3)
    for prompt, response, least in ((130, 55, hh), (180, 320, ultrafeedback)):
        draw = lambda mean, count: np.clip(rng.gamma(1.5, mean / 1.5, count), 2, 4 * mean).astype(int)
        targets = draw(response, 4096) + draw(response, 4096)
        lengths = np.stack((draw(prompt, 4096) + targets, targets, np.full(4096, 2)), axis=1)
        plans = rowlib.plans(lengths[:2048], batch=batch, per_key=0.0, shards=shards)
        rest, useful, padded = lengths[2048:], 0, 0
        for i in range(0, min(len(rest), 12 * batch), batch):
            fitting = rest[i : i + batch][rest[i : i + batch, 0] <= plans[0].length]
            trees = [
                Tree("t", np.zeros(n - m, np.int32), (np.ones(m - 1, np.int32), np.ones(1, np.int32)))
                for n, m, _ in fitting
            ]
            fill = rowlib.fill(rowlib.pack(trees, rowlib.fitting(trees, plans)))
            useful, padded = useful + fill.useful, padded + fill.padded
        assert useful / padded >= least, (prompt, plans, useful / padded)


def test_a_batch_takes_the_shape_that_suits_it():
    """Trees of 120 tokens: three fit a row of 384 tokens, four one of 512."""
    plans = Plan(384, 384, 12, 1), Plan(512, 512, 12, 1)
    trees = trees_of(0, 8, prompt=(100, 101), branch=(10, 11))
    assert trees[0].length == 120
    assert [rowlib.fitting(trees[:n], plans).length for n in (1, 3, 4, 6, 7, 8)] == [384, 384, 512, 384, 512, 512]
    dear = plans[0], Plan(512, 512, 12, 1, cost=1.6)
    assert [rowlib.fitting(trees[:n], dear).length for n in (4, 8)] == [384, 384]
    for n in (3, 4, 8):
        for plan in plans:
            assert rowlib.fill(rowlib.pack(trees[:n], plan)).useful == 120 * n


def test_a_second_shape_has_to_be_worth_its_compilation():
    even = np.tile([128, 100, 2], (256, 1))  # full rows of any length
    of = {"batch": 8, "per_key": 0.0, "shards": 1}
    assert len(rowlib.plans(even, **of)) == 1
    lengths = np.stack((np.random.default_rng(0).integers(40, 400, 512), np.full(512, 30), np.full(512, 2)), axis=1)
    two = rowlib.plans(lengths, **of)
    assert len(two) == 2 and two[0] == rowlib.plan(lengths, **of) == rowlib.plans(lengths, **of, shapes=1)[0]
    assert len({p.length for p in rowlib.plans(lengths, **of, row_tokens=512)}) == 1


def test_narrow_models_get_short_rows():
    """Trees of 400 tokens: four fit 1664 almost without padding, but attention over 2048 costs a narrow model more."""
    lengths = np.tile([400, 380, 4], (256, 1))
    plans = {width: rowlib.plan(lengths, batch=64, per_key=1 / (2 * width), shards=1) for width in (64, 8192)}
    assert plans[64].length == 512 and plans[8192].length == 1664


def test_microbatches_pad_only_the_last():
    trees = trees_of(2, 9, prompt=(30, 60), branch=(20, 30))
    plan = Plan(128, 128, 2, 2)
    rows = rowlib.pack(trees, plan)
    stacked, count = rowlib.microbatches(rows, plan, rowlib.most_microbatches(9, plan))
    assert stacked.tokens_BL.shape == (5, 2, 128) and count == 5
    assert (stacked.example_BS >= 0).sum() == 18
    with pytest.raises(ValueError, match="takes 5 microbatches of 2 rows, expected at most 3"):
        rowlib.microbatches(rows, plan, 3)


def test_spread_and_unpack_are_inverse():
    trees = trees_of(3, 17, prompt=(1, 20))
    rows = rowlib.pack(trees, Plan(128, 128, 6, 1))
    values = np.arange(34, dtype=np.float32)
    assert (rowlib.unpack(rowlib.spread(values, rows.example_BS), rows.example_BS, 34) == values).all()


def test_errors_say_what_was_got_and_expected():
    with pytest.raises(ValueError, match="tree 't0' has .* tokens, .* a row holds 128, 128 and 2. Plan the rows"):
        rowlib.pack(trees_of(0, 1, prompt=(200, 201)), Plan(128, 128, 2, 1))
    with pytest.raises(ValueError, match="tree 'x' has an empty branch"):
        rowlib.pack([Tree("x", np.array([1]), (np.array([2]), np.array([], np.int32)))], Plan(128, 128, 2, 1))
    with pytest.raises(ValueError, match="longest prompt tree .* has 90 tokens. Raise optimizer.row_tokens"):
        rowlib.plan(np.array([[90, 4, 2]]), batch=4, per_key=0.0, shards=1, row_tokens=64)
    with pytest.raises(ValueError, match="got no trees"):
        rowlib.plan(np.zeros((0, 3), int), batch=4, per_key=0.0, shards=1)


def test_values_of_tokens_go_into_rows_and_back():
    """Each at the place of its token; the first token of a branch without a prompt is predicted by nothing."""
    trees = [*trees_of(7, 9, prompt=(1, 20), branch=(1, 20), branches=3), *trees_of(8, 4, prompt=(0, 1), branch=(2, 9))]
    plan = Plan(length=128, targets=128, slots=12, rows=2)
    packed = rowlib.pack(trees, plan)
    rows, _ = rowlib.microbatches(packed, plan, len(packed.tokens_BL) // 2 + 1)
    values = [b[len(t.prompt) == 0 :].astype(np.float32) for t in trees for b in t.branches]
    spread = rowlib.spread_tokens(values, rows.example_BS, rows.slot_BM)
    np.testing.assert_array_equal(spread, np.where(rows.slot_BM < plan.slots, rows.target_BM, 0))
    back = rowlib.unpack_tokens(spread, rows.example_BS, rows.slot_BM, len(values))
    assert len(back) == len(values) and all(np.array_equal(a, b) for a, b in zip(back, values))
