"""Models by name: tags, where weights come from, and that a stored iterate says what the live one said, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import checkpoint, hf, policies, programs
from sera_jax import mesh as meshes
from sera_jax.ledger import Ledger
from sera_jax.model import Arch
from sera_jax.policies import Folder, Live, Name, Policies
from sera_jax.programs import Compute
from sera_jax.records import Tree
from sera_jax.rows import Plan

ARCH = Arch("LlamaForCausalLM", 40, 16, 2, 4, 2, 4, 24, 1e-5, 1e4, tied=False, init_std=0.3)
BF16 = Compute(jnp.bfloat16, "none", 16)
PLAN = Plan(64, 64, 8, 4)
START, FIRST, SECOND = Name("iterate", 0), Name("iterate", 1), Name("iterate", 2)


@pytest.fixture(scope="module")
def scorer(eight_devices):
    return programs.scorer(ARCH, eight_devices, BF16)


@pytest.fixture
def where(tmp_path, eight_devices, scorer) -> Policies:
    load = lambda: programs.random_params(ARCH, eight_devices)(jax.random.key(3))
    start = Folder("start", ARCH, None, (2,), eight_devices, BF16, "a" * 16, load)
    return Policies(start, False, None, ((0, "config and data"),), tmp_path / "iterates", Ledger(tmp_path / "l"))


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    rng = np.random.default_rng(0)
    ids = lambda: rng.integers(0, ARCH.vocab, rng.integers(1, 12)).astype(np.int32)
    return [Tree(f"t{i}", ids(), (ids(), ids())) for i in range(9)]


def drawn(where: Policies, seed: int) -> dict:
    return programs.random_params(where.arch, where.mesh)(jax.random.key(seed))


def logps(where, name, trees, live):
    return policies.logps(where, name, trees, live=live, plan=PLAN, chunk=4, what="the pairs")


def same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# --- tags -------------------------------------------------------------------------------------------------------------


def test_without_sft_iterate_0_is_the_start(where):
    assert policies.tag(where, START) == where.start.tag == policies.tag(where, Name("ema", 0))
    # Of the start's content alone: another run on the same checkpoint finds its log-probs.
    other = dataclasses.replace(where, fingerprints=((0, "another config"),))
    assert policies.tag(other, START) == where.start.tag


def test_after_sft_iterate_0_is_a_model_of_its_own(where):
    trained = dataclasses.replace(where, trained_start=True)
    assert policies.tag(trained, START) == policies.tag(trained, Name("ema", 0)) != where.start.tag
    other = dataclasses.replace(trained, fingerprints=((0, "another config"),))
    assert policies.tag(other, START) != policies.tag(trained, START)


def test_tags_are_distinct_and_repeat(where):
    def tags(p: Policies) -> dict:
        names = [Name(kind, t) for kind in ("iterate", "ema") for t in (1, 2, 3)]
        return {(p.fingerprints, p.start.tag, p.trained_start, n): policies.tag(p, n) for n in names}

    runs = [
        where,
        dataclasses.replace(where, fingerprints=((0, "b"),)),
        dataclasses.replace(where, start=dataclasses.replace(where.start, tag="b" * 16)),
    ]
    found = {k: v for p in runs for k, v in tags(p).items()}
    assert len(set(found.values()) | {where.start.tag}) == len(found) + 1 == 19
    assert tags(where) == tags(dataclasses.replace(where))


def test_iterates_keep_the_tag_that_they_were_made_under(where):
    """A run that went on elsewhere from iterate 2 on: the ledger still knows iterate 1, and nothing of 2."""
    moved = dataclasses.replace(where, fingerprints=(*where.fingerprints, (2, "elsewhere")))
    for kind in ("iterate", "ema"):
        same = [policies.tag(where, Name(kind, t)) == policies.tag(moved, Name(kind, t)) for t in range(4)]
        assert same == [True, True, False, False]


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_start_is_drawn_or_read(where, tmp_path):
    random = policies.params(where, START)
    same_bits(random, drawn(where, 3))
    assert not np.array_equal(random["embed"]["table"], drawn(where, 4)["embed"]["table"])
    hf.save(tmp_path / "start", ARCH, drawn(where, 5), dtype=jnp.float32)
    load = lambda: hf.load(tmp_path / "start", ARCH, where.mesh)
    read = dataclasses.replace(where, start=dataclasses.replace(where.start, load=load))
    same_bits(policies.params(read, START), drawn(where, 5))
    same_bits(policies.params(read, Name("ema", 0)), drawn(where, 5))
    expected = programs.param_shardings(ARCH, where.mesh)
    jax.tree.map(lambda w, s: w.sharding == s or pytest.fail(f"{w.sharding}"), policies.params(read, START), expected)


def test_iterates_are_stored_in_the_compute_dtype(where):
    params = drawn(where, 1)
    policies.save(where, Live(FIRST, params), 0.0)
    assert checkpoint.iterates(where.iterates) == ["1"]
    back = policies.params(where, FIRST)
    same_bits(back, jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), params))
    wide = dataclasses.replace(where.start, compute=Compute(jnp.float32))
    exact = dataclasses.replace(where, start=wide, iterates=where.iterates / "wide")
    policies.save(exact, Live(FIRST, params), 0.0)
    same_bits(policies.params(exact, FIRST), params)


def test_after_sft_iterate_0_is_read_from_the_iterates(where):
    trained = dataclasses.replace(where, trained_start=True)
    policies.save(trained, Live(START, drawn(where, 6)), 0.5)
    assert checkpoint.iterates(where.iterates) == ["0"]
    same_bits(policies.params(trained, Name("ema", 0)), policies.params(trained, START))
    assert not np.array_equal(policies.params(trained, START)["embed"]["table"], drawn(where, 3)["embed"]["table"])


def test_the_running_mean(where):
    """ema_0 = iterate 0, ema_t = decay·ema_{t-1} + (1-decay)·iterate_t; stored values, so rounding to bfloat16 each."""
    decay = 0.75
    mean = jax.tree.map(np.asarray, drawn(where, 3))
    for t in (1, 2, 3):
        live = Live(Name("iterate", t), drawn(where, 10 + t))
        policies.save(where, live, decay)
        narrow = jax.tree.map(lambda w: np.asarray(w.astype(jnp.bfloat16), np.float32), live.params)
        mean = jax.tree.map(lambda m, w: decay * m + (1 - decay) * w, mean, narrow)
        mean = jax.tree.map(lambda m: m.astype(jnp.bfloat16).astype(np.float32), mean)
        got = policies.params(where, Name("ema", t))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(mean)):
            # A product fused with the sum may fall on the other side of a rounding boundary.
            np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-6)
            assert (np.asarray(a) == b).mean() > 0.99
    assert checkpoint.iterates(where.iterates) == ["1", "2", "3", "ema-1", "ema-2", "ema-3"]


# --- log-probs --------------------------------------------------------------------------------------------------------


def test_a_stored_iterate_says_the_same_bits_as_the_live_one(where, trees, tmp_path):
    live = Live(FIRST, drawn(where, 1))
    said = logps(where, FIRST, trees, live)
    assert said.shape == (18,) and said.dtype == np.float32 and (said < 0).all()
    policies.save(where, live, 0.0)
    elsewhere = dataclasses.replace(where, ledger=Ledger(tmp_path / "another"))
    again = logps(elsewhere, FIRST, trees, Live(SECOND, None))  # not in memory: read from the iterates
    np.testing.assert_array_equal(said, again)


def test_the_live_policy_is_used_where_it_is_asked_for(where, trees, monkeypatch):
    monkeypatch.setattr(policies, "params", lambda *_: pytest.fail("loaded what is in memory"))
    live = Live(FIRST, drawn(where, 1))
    said = logps(where, FIRST, trees, live)
    assert said.tobytes() != logps(where, SECOND, trees, Live(SECOND, drawn(where, 2))).tobytes()
    # By tag, not by name: the mean before the first iteration is iterate 0.
    start = Live(START, drawn(where, 9))
    logps(where, Name("ema", 0), trees, start)
    # From the ledger nothing has to be in memory at all.
    np.testing.assert_array_equal(logps(where, FIRST, trees, Live(SECOND, None)), said)


def test_any_other_model_is_loaded(where, trees):
    live = Live(FIRST, drawn(where, 1))
    asked = logps(where, START, trees, live)
    elsewhere = dataclasses.replace(where, ledger=Ledger(where.iterates / "b"))
    want = logps(elsewhere, START, trees, Live(START, drawn(where, 3)))
    np.testing.assert_array_equal(asked, want)
    with pytest.raises(ValueError, match="holds no iterate '2'"):
        logps(where, SECOND, trees, live)


def test_no_model_says_zero(where, trees):
    np.testing.assert_array_equal(logps(where, None, trees, Live(FIRST, None)), np.zeros(18, np.float32))
    assert meshes.row_shards(where.mesh) == PLAN.rows


def test_a_model_that_is_scored_next_is_read_ahead(where, monkeypatch):
    """Only files that will be opened: not those of the policy in memory, nor for no model."""
    live = Live(FIRST, drawn(where, 1))
    policies.save(where, live, 0.0)
    policies.save(where, Live(SECOND, drawn(where, 2)), 0.0)
    asked = []
    monkeypatch.setattr(policies.disk, "read_ahead", lambda folder: asked.append(str(folder)) or 7)
    assert policies.ahead(where, SECOND, live) == 7 and policies.ahead(where, START, live) == 7
    assert asked == [str(where.iterates / "2"), "start"]
    assert policies.ahead(where, FIRST, live) == policies.ahead(where, None, live) == 0 and len(asked) == 2
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert policies.ahead(where, SECOND, live) == 0 and len(asked) == 2
