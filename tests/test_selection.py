"""selection: strata, the table of the verdict, the same verdict on any mesh."""

import jax
import numpy as np
import pytest

from sera_jax import losses, programs, selection
from sera_jax.records import Pair, Tree, Truth
from sera_jax.selection import Selection

DPO = losses.LOSSES["dpo"]


def tree(name: str, prompt: list[int], chosen: int, rejected: int) -> Tree:
    return Tree(name, np.array(prompt, np.int32), (np.zeros(chosen, np.int32), np.ones(rejected, np.int32)))


def given(n: int):
    pairs = [Pair(f"p{i}", "x", "a", "b", (i / n, 0.0), source="uv"[i % 2]) for i in range(n)]
    return pairs, [tree(f"p{i}", [i % 3], 1 + i, 2) for i in range(n)]


def choose(mesh, pairs, trees, logp_N2, *, score="irm", rule="top_k", keep=0.5, stratify="none"):
    keys = {"beta": 0.1}
    selector = programs.selector(mesh, DPO, keys, score_name=score, rule=rule, threshold=0.0)
    zeros = np.zeros_like(logp_N2)
    return selection.select(
        pairs,
        trees,
        logp_EN2=logp_N2[None],
        weights_E=np.ones(1, np.float32),
        reward_reference_N2=zeros,
        loss_reference_N2=zeros,
        selector=selector,
        mesh=mesh,
        key=jax.random.key(0),
        keep=keep,
        stratify=stratify,
        what=f"score {score}",
    )


def test_groups():
    pairs, trees = given(8)
    assert selection.groups(pairs, trees, "none").tolist() == [0] * 8
    assert selection.groups(pairs, trees, "source").tolist() == [0, 1] * 4
    assert selection.groups(pairs, trees, "prompt").tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert selection.groups(pairs, trees, "length").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_verdict_does_not_depend_on_the_mesh(one_device, eight_devices):
    pairs, trees = given(13)  # not a multiple of the row shards: padded
    logp_N2 = np.random.default_rng(0).normal(size=(13, 2)).astype(np.float32)
    for stratify in ("none", "source"):
        one, eight = (choose(mesh, pairs, trees, logp_N2, stratify=stratify) for mesh in (one_device, eight_devices))
        margin_N = 0.1 * (logp_N2[:, 0] - logp_N2[:, 1])
        np.testing.assert_allclose(one.margin_N, margin_N, atol=1e-6)
        for a, b in zip((one.mask_N, one.score_N, one.margin_N), (eight.mask_N, eight.score_N, eight.margin_N)):
            assert np.array_equal(a, b)
        groups = selection.groups(pairs, trees, stratify)
        for group in np.unique(groups):
            inside = groups == group
            assert one.mask_N[inside].sum() == int(0.5 * inside.sum())
            assert margin_N[inside & one.mask_N].min() > margin_N[inside & ~one.mask_N].max()


def test_a_score_that_is_not_finite_names_its_pair(one_device):
    pairs, trees = given(5)
    logp_N2 = np.zeros((5, 2), np.float32)
    logp_N2[3, 1] = np.nan
    with pytest.raises(
        ValueError, match=r"score irm: got 1 scores that are not finite, the first at index 3 \(example 'p3'\)"
    ):
        choose(one_device, pairs, trees, logp_N2)


def test_gold_selects_by_what_is_true_and_by_nothing_else(one_device):
    """Where annotator and policy are wrong, too."""
    _, trees = given(6)
    gold = [(1, 0), (0, 2), (5, 1), (0, 0.5), (3, 0), (1, 1)]
    pairs = [Pair(f"p{i}", "x", "a", "b", (0.0, i), truth=Truth(gold=g)) for i, g in enumerate(gold)]
    logp_N2 = np.array([[-b, b] for _, b in gold], np.float32)
    got = choose(one_device, pairs, trees, logp_N2, score="gold_gap")
    assert got.score_N.tolist() == [1, -2, 4, -0.5, 3, 0] and np.flatnonzero(got.mask_N).tolist() == [0, 2, 4]
    unknown = [*pairs[:5], Pair("p5", "x", "a", "b")]
    with pytest.raises(ValueError, match=r"got 1 scores that are not finite, the first at index 5 \(example 'p5'\)"):
        choose(one_device, unknown, trees, logp_N2, score="gold_gap")


def test_columns_of_what_is_known():
    pairs, trees = given(3)
    chosen = Selection(np.array([True, False, True]), np.float32([1, 3, 2]), np.float32([5, 6, 7]))
    plain = set(selection.columns(pairs, trees, chosen))
    assert not plain & {"gold_chosen", "flipped", "author"}
    pairs[1] = Pair("p1", "x", "a", "b", truth=Truth((0.5, 1.0), True, False, None, "model"))
    table = selection.columns(pairs, trees, chosen)
    assert set(table) - plain == {"gold_chosen", "gold_rejected", "flipped", "cued", "author"}  # of upset nothing
    assert table["gold_chosen"] == [None, 0.5, None] and table["gold_rejected"] == [None, 1.0, None]
    assert table["flipped"] == [None, True, None] and table["author"] == [None, "model", None]


def test_columns_have_a_row_for_every_pair():
    pairs, trees = given(4)
    chosen = Selection(np.array([True, False, True]), np.float32([1, 3, 2]), np.float32([5, 6, 7]))
    messages = ({"role": "user", "content": "hé"},)
    pairs[1] = Pair("p1", messages, "a", "b")
    table = selection.columns(pairs, [trees[0], trees[2], trees[3]], chosen)
    assert table["id"] == ["p0", "p1", "p2", "p3"]
    np.testing.assert_array_equal(table["margin"], np.float32([5, np.nan, 6, 7]))
    np.testing.assert_array_equal(table["score"], np.float32([1, np.nan, 3, 2]))
    assert table["kept"].tolist() == [True, False, False, True]
    assert table["rank"].tolist() == [2, -1, 0, 1]
    assert table["length_chosen"].tolist() == [1, 0, 3, 4]
    assert table["prompt"] == ["x", '[{"role": "user", "content": "hé"}]', "x", "x"]
