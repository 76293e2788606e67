"""Each knob of the algorithm acts, through the config, in the direction that its line in config/sections.py claims.

One world of the tiny data with two policies that stand for trained ones; a test changes a key and looks at what the
walk makes of it. What a value means to the last digit is the business of the rooms' own tests.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from sera_jax import data, policies
from sera_jax.policies import Live, Name
from sera_jax.records import Prompt
from sera_jax.train import fresh, outcome, select, update, validate
from sera_jax.train import world as worlds
from sera_jax.train.world import World

N = 44
KEEP = 26  # of 0.6


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def base(made, tiny, tiny_config) -> World:
    if not made:
        config = tiny_config(f"--data.pairs=[{tiny}/gold.jsonl]", "--select.keep=0.6", "--loop.iterations=3")
        world = worlds.prepare(config)
        start = world.policies.start.load()
        for t in (1, 2):
            leaves, tree = jax.tree.flatten(start)
            keys = jax.random.split(jax.random.key(t), len(leaves))
            moved = [w + 0.1 * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys)]
            live = Live(Name("iterate", t), jax.tree.unflatten(tree, moved))
            if t == 1:
                policies.save(world.policies, Live(Name("iterate", 0), start), 0.5)
            policies.save(world.policies, live, 0.5)
            made[t] = live
        made["world"] = world
    return made["world"]


def scored(made, t: int) -> Live:
    """Iterate t; copies, because the walk lets go of what it is given."""
    return Live(made[t].name, jax.tree.map(jnp.copy, made[t].params))


def turned(world: World, path=None, **changes) -> World:
    """The world with other values at keys like select__keep; `path`: another run folder, for what is written there."""
    config = world.config
    for key, value in changes.items():
        section, field = key.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    loss, loss_keys = worlds.loss_of(config)
    return dataclasses.replace(
        world,
        config=config,
        loss=loss,
        loss_keys=loss_keys,
        select=worlds.selector_of(config, world.mesh),
        run=dataclasses.replace(world.run, path=path or world.run.path),
    )


def logps(world: World, name: Name, live: Live) -> np.ndarray:
    return select.pair_logps(world, name, world.given.trees, live).astype(np.float64)


@pytest.fixture
def rho(base, made):
    """β·(log π_t - log π_0) margins of both policies."""
    found = {t: logps(base, Name("iterate", t), made[2]) for t in (0, 1, 2)}
    return {t: 0.1 * np.diff(found[0] - found[t])[:, 0] for t in (1, 2)}


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ensemble, gamma, weights",
    [("current", 0.4, (0, 1)), ("two_term", 0.4, (0.4, 0.6)), ("ema", 0.4, (0.24, 0.6)), ("mean", 0.4, (0.5, 0.5))]
    + [("two_term", 0.1, (0.1, 0.9))],
)
def test_ensemble_and_gamma(base, made, rho, ensemble, gamma, weights):
    got = select.review(turned(base, reward__ensemble=ensemble, reward__gamma=gamma), 3, scored(made, 2))
    np.testing.assert_allclose(got.margin_N, weights[0] * rho[1] + weights[1] * rho[2], atol=2e-5)


def test_references_of_reward_and_loss(base, made, rho):
    of = lambda name: logps(base, name, made[2])
    now, flat = of(Name("iterate", 2)), lambda value: value.reshape(-1)
    names = {"initial": Name("iterate", 0), "previous": Name("iterate", 1), "ema": Name("ema", 1)}
    live = scored(made, 2)
    for key, name in names.items():
        world = turned(base, reward__reference=key, reward__ensemble="current")
        want = 0.1 * np.diff(of(name) - now)[:, 0]
        np.testing.assert_allclose(select.review(world, 3, live).margin_N, want, atol=2e-5)
    free = select.review(turned(base, reward__reference="none", reward__ensemble="current"), 3, live)
    np.testing.assert_allclose(free.margin_N, 0.1 * np.diff(-now)[:, 0], atol=2e-5)
    # For the loss, previous is the iterate before the one that trains.
    names = {"initial": Name("iterate", 0), "previous": Name("iterate", 2), "ema": Name("ema", 2)}
    for key, name in names.items():
        stage = update.training_set(turned(base, loss__reference=key), 3, live, None, None)
        np.testing.assert_array_equal(stage.reference_F, flat(of(name)).astype(np.float32))
    assert not update.training_set(turned(base, loss__reference="none"), 3, live, None, None).reference_F.any()
    halves = turned(base, reward__ema_decay=0.25, loss__reference="ema")
    assert update.ema_decay(halves.config) == 0.25 and update.ema_decay(base.config) == 0


def test_references_of_held_out_pairs(base, made):
    """The loss against its own reference; rewards against iterate 0 always, so that iterations compare."""
    live, held = scored(made, 2), base.given.trees[:6]
    base = dataclasses.replace(base, given=dataclasses.replace(base.given, held_out=held))
    of = lambda name: select.pair_logps(base, name, held, live)
    for key, name in {"initial": Name("iterate", 0), "previous": Name("iterate", 2), "ema": Name("ema", 2)}.items():
        got = validate.references(turned(base, loss__reference=key), 3, live)
        np.testing.assert_array_equal(got.loss_N2, of(name))
        np.testing.assert_array_equal(got.start_N2, of(Name("iterate", 0)))
    free = validate.references(turned(base, loss__reference="none"), 3, live)
    assert not free.loss_N2.any() and np.array_equal(free.start_N2, of(Name("iterate", 0)))


@pytest.mark.parametrize(
    "changes, want",
    [
        ({"loss__beta": 0.5}, lambda d, c, n: np.log1p(np.exp(-0.5 * d))),
        (
            {"loss__label_smoothing": 0.2},
            lambda d, c, n: 0.8 * np.log1p(np.exp(-0.1 * d)) + 0.2 * np.log1p(np.exp(0.1 * d)),
        ),
        ({"loss__name": "ipo"}, lambda d, c, n: (d - 5) ** 2),
        ({"loss__name": "ipo", "loss__normalisation": "mean"}, lambda d, c, n: (2 / n[0] + 3 / n[1] - 5) ** 2),
        ({"loss__name": "slic"}, lambda d, c, n: np.maximum(0, 1 - 0.1 * d)),
        (
            {"loss__name": "simpo", "loss__gamma": 0.3},
            lambda d, c, n: np.log1p(np.exp(-(0.1 * (-7 / n[0] + 12 / n[1]) - 0.3))),
        ),
        ({"loss__sft_weight": 0.5}, lambda d, c, n: np.log1p(np.exp(-0.1 * d)) + 0.5 * 7 / n[0]),
        ({"loss__optimism": 0.5}, lambda d, c, n: np.log1p(np.exp(-0.1 * d)) + 0.5 * (-7 - 12) / 2),
        ({"loss__mix": {"slic": 0.25}}, lambda d, c, n: np.log1p(np.exp(-0.1 * d)) + 0.25 * np.maximum(0, 1 - 0.1 * d)),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_keys_of_the_loss(base, changes, want):
    """log π - log π_ref is 2 of the chosen and -3 of the rejected response."""
    world = turned(base, **changes)
    arrays = (jnp.array([[-7.0, -12.0]]), jnp.array([[-9.0, -9.0]]), jnp.array([[4.0, 5.0]]))
    got = world.loss.loss(*arrays, **world.loss_keys)
    np.testing.assert_allclose(got, [want(5.0, 2.0, (4.0, 5.0))], rtol=1e-6)


# --- which given pairs ------------------------------------------------------------------------------------------------


def test_two_prompt_files_share_a_ledger(base, made, tmp_path):
    """The same prompts under other ids are not taken for each other's samples."""
    worlds_ = [turned(base, tmp_path / name, run__ledger=str(tmp_path / "ledger")) for name in ("a", "b")]
    renamed = tuple(dataclasses.replace(p, id=f"other:{i}") for i, p in enumerate(base.given.prompts))
    worlds_[1] = dataclasses.replace(worlds_[1], given=dataclasses.replace(base.given, prompts=renamed))
    one, two = (fresh.bootstrap_pairs(world, 2, scored(made, 1)) for world in worlds_)
    assert one.candidates.texts_PC == two.candidates.texts_PC and one.candidates.ids != two.candidates.ids


@pytest.mark.parametrize("score", ["irm", "irm_per_token", "reference_logp", "gold_gap", "loss"])
def test_scores(base, made, rho, score):
    world = turned(base, select__score=score, reward__ensemble="current")
    got = select.review(world, 3, scored(made, 2))
    length = np.array([[len(b) for b in tree.branches] for tree in world.given.trees])
    of = {t: logps(base, Name("iterate", t), made[2]) for t in (0, 2)}
    gold = [pair.truth.gold for pair in world.given.pairs]
    want = {
        "irm": rho[2],
        "irm_per_token": 0.1 * -np.diff((of[2] - of[0]) / length)[:, 0],
        "reference_logp": of[0][:, 0] / length[:, 0],
        "gold_gap": np.array([a - b for a, b in gold]),
        "loss": -np.log1p(np.exp(-rho[2])),
    }[score]
    np.testing.assert_allclose(got.score_N, want, atol=2e-5)
    assert want[got.mask_N].min() >= want[~got.mask_N].max() - 1e-6 and got.mask_N.sum() == KEEP


def test_the_gap_of_a_reward_function(base, made):
    """Of the texts as they stand, whatever the labels say."""
    world = turned(base, select__score="reward_gap", reward__function="tiny_reward:count")
    got = select.review(world, 3, scored(made, 2))
    count = lambda text: len(set(text.split()))
    want = [count(pair.chosen) - count(pair.rejected) for pair in base.given.pairs]
    assert got.score_N.tolist() == want and len(set(want)) > 2


def test_rules_share_and_threshold(base, made, rho):
    live, order = scored(made, 2), None
    kept = {}
    for rule in ("top_k", "bottom_k", "middle", "threshold", "all"):
        world = turned(base, select__rule=rule, select__threshold=0.05, reward__ensemble="current")
        chosen = select.review(world, 3, live)
        kept[rule], order = set(np.flatnonzero(chosen.mask_N)), np.argsort(-chosen.score_N)
    over = (N - KEEP) // 2
    assert kept["top_k"] == set(order[:KEEP]) and kept["bottom_k"] == set(order[-KEEP:])
    assert kept["middle"] == set(order[over : over + KEEP]) and kept["all"] == set(range(N))
    assert kept["threshold"] == set(np.flatnonzero(rho[2] > 0.05)) and 0 < len(kept["threshold"]) < N
    for share, count in ((0.25, 11), (1.0, N)):
        assert select.review(turned(base, select__keep=share), 3, live).mask_N.sum() == count
    assert select.review(turned(base, select__from_iteration=3), 2, scored(made, 1)) is None
    draws = [select.review(turned(base, select__score="random", run__seed=s), 3, live).mask_N for s in (0, 0, 1)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()


def test_stratify(base, made):
    live = scored(made, 2)
    length = np.array([tree.targets for tree in base.given.trees])
    quarter = np.searchsorted(np.quantile(length, [0.25, 0.5, 0.75]), length)
    plain = select.review(base, 3, live).mask_N
    even = select.review(turned(base, select__stratify="length"), 3, live).mask_N
    share = lambda mask: [int(mask[quarter == g].sum()) for g in range(4)]
    assert share(even) == [int(0.6 * (quarter == g).sum()) for g in range(4)] != share(plain)
    each = select.review(turned(base, select__stratify="prompt"), 3, live).mask_N
    assert each.all()  # every pair has a prompt of its own, and a group keeps one at least


def test_what_becomes_of_the_others(base, made):
    """drop leaves out, relabel turns round, soft_weight weighs by sigmoid(score); as many updates whatever remains."""
    live = scored(made, 2)
    chosen = select.review(base, 3, live)
    trees, kept = base.given.trees, [tree for tree, k in zip(base.given.trees, chosen.mask_N) if k]
    made_of = lambda **changes: update.training_set(turned(base, **changes), 3, live, chosen, None)
    drop = made_of(select__unselected="drop")
    assert drop.trees == kept and (drop.weight_N == 1).all()
    relabel = made_of(select__unselected="relabel")
    for tree, new, k in zip(trees, relabel.trees, chosen.mask_N):
        assert new.branches == (tree.branches if k else tree.branches[::-1])
    given = update.training_set(base, 3, live, None, None)
    turned_round = given.reference_F.reshape(-1, 2)
    turned_round = np.where(chosen.mask_N[:, None], turned_round, turned_round[:, ::-1])
    np.testing.assert_array_equal(relabel.reference_F.reshape(-1, 2), turned_round)
    soft = made_of(select__unselected="soft_weight")
    assert soft.trees == list(trees)
    np.testing.assert_allclose(soft.weight_N, 1 / (1 + np.exp(-chosen.score_N.astype(np.float64))), rtol=1e-6)
    assert len(drop.batches) == len(soft.batches) == len(given.batches) == 6
    assert len(made_of(loop__epochs=3).batches) == 18 and len(made_of(optimizer__batch_size=4).batches) == 11


def test_soft_weights_are_told_as_shares(base, made):
    """What the summary says was kept is what trains: every pair, by its weight."""
    live = scored(made, 2)
    chosen = select.review(base, 3, live)
    weight = 1 / (1 + np.exp(-chosen.score_N.astype(np.float64)))
    world = turned(base, select__unselected="soft_weight")
    told, hard = (outcome._of_selection(w, w.given, chosen) for w in (world, base))
    flipped = np.array([bool(pair.truth.flipped) for pair in base.given.pairs])
    gap = np.array([a - b for a, b in (pair.truth.gold for pair in base.given.pairs)])
    assert (told["pairs/kept"], hard["pairs/kept"]) == (N, KEEP)
    assert told["sera/kept_fraction"] == pytest.approx(weight.mean(), rel=1e-6)
    assert told["sera/flips_kept"] == pytest.approx(weight[flipped].mean(), rel=1e-6)
    assert told["sera/gold_gap_kept"] == pytest.approx((gap * weight).sum() / weight.sum(), rel=1e-5)
    assert hard["sera/gold_gap_kept"] == pytest.approx(gap[chosen.mask_N].mean(), rel=1e-6)


def test_flops_count_every_log_prob_once(base):
    """Forward passes over the given set, iteration by iteration, in units of the set: what is new to each."""

    def passes(**changes):
        world = turned(base, **changes)
        seen: set = set()
        told = []
        for t in (1, 2, 3):
            new = outcome._scores_of(world, t) - seen
            seen |= new
            told.append(len(new))
        return told

    rest = {"select__rule": "all"}
    assert passes(**rest) == [1, 0, 0]  # the reference, once
    assert passes() == [1, 1, 1]  # and the newest iterate, where its margins select
    assert passes(select__from_iteration=3) == [1, 0, 2]  # two_term looks back at one that was not scored in its time
    assert passes(select__score="random") == [1, 0, 0] and passes(select__score="reference_logp") == [1, 0, 0]
    assert passes(**rest, loss__reference="previous") == passes(**rest, loss__reference="ema") == [1, 1, 1]
    assert passes(reward__ensemble="current", loss__reference="previous") == [1, 1, 1]  # one pass serves both
    assert passes(loss__ld_alpha=0.5, **rest) == [2, 0, 0]  # and once more, cut to shared lengths
    assert passes(loss__name="orpo") == [0, 1, 1] and passes(loss__name="orpo", **rest) == [0, 0, 0]
    cut = sum(len(t.prompt) + 2 * min(map(len, t.branches)) for t in base.given.trees)
    assert outcome._tokens(base.given.trees, True) == cut < outcome._tokens(base.given.trees, False)


# --- fresh pairs ------------------------------------------------------------------------------------------------------


def sampled(base, made, path, **changes) -> fresh.Made:
    return fresh.bootstrap_pairs(turned(base, path, bootstrap__unfinished="keep", **changes), 2, scored(made, 1))


def different(made_: fresh.Made) -> float:
    """Different candidates of a prompt, on average."""
    return float(np.mean([len({t.tobytes() for t in row}) for row in made_.candidates.tokens_PC]))


def test_sampling(base, made, tmp_path):
    greedy = sampled(base, made, tmp_path / "greedy", bootstrap__temperature=0.0)
    assert different(greedy) == 1 and len(greedy.fresh.trees) == 0
    for key, value in (("top_k", 1), ("top_p", 1e-6), ("min_p", 0.999)):
        made_ = sampled(base, made, tmp_path / key, **{f"bootstrap__{key}": value})
        for row, one in zip(made_.candidates.tokens_PC, greedy.candidates.tokens_PC):
            assert all(np.array_equal(t, one[0]) for t in row), key
    cold, hot = (
        sampled(base, made, tmp_path / str(t), bootstrap__temperature=t, bootstrap__top_p=1.0) for t in (0.3, 3.0)
    )
    assert 1 < different(cold) < different(hot)
    assert sampled(base, made, tmp_path / "seed", run__seed=1).candidates.texts_PC != cold.candidates.texts_PC
    mixed = sampled(base, made, tmp_path / "mixed", bootstrap__temperature=(3.0, 0.0), bootstrap__top_p=1.0)
    for row, one, other in zip(*(m.candidates.tokens_PC for m in (mixed, hot, greedy))):
        halves = [*one[:2], *other[2:]]  # the first half of the candidates at 3, the second greedy
        assert [t.tolist() for t in row] == [t.tolist() for t in halves]


def test_counts_of_candidates_prompts_and_pairs(base, made, tmp_path):
    plain = sampled(base, made, tmp_path / "plain")
    assert plain.candidates.finished_PC.shape == (20, 4) and plain.fresh.kept_F.sum() == min(13, len(plain.fresh.trees))
    few = sampled(base, made, tmp_path / "few", bootstrap__prompts_per_iteration=0.25)
    assert len(few.prompts) == 5 and {p.id for p in few.prompts} < {p.id for p in plain.prompts}
    share = {"bootstrap__prompts_per_iteration": 0.25, "bootstrap__prompts_drawn": "in_turn"}
    four = [fresh.bootstrap_pairs(turned(base, tmp_path / "turn", **share), t, scored(made, 1)) for t in (2, 3, 4, 5)]
    assert {p.id for one in four for p in one.prompts} == {p.id for p in plain.prompts}  # five each, none twice
    small = sampled(base, made, tmp_path / "plain", bootstrap__fresh=0.1)
    margin = plain.fresh.margin_F
    assert set(np.flatnonzero(small.fresh.kept_F)) == set(np.argsort(-margin, kind="stable")[:4])
    shape = sampled(
        base, made, tmp_path / "shape", bootstrap__candidates=2, bootstrap__max_new_tokens=3, bootstrap__slots=8
    )
    assert shape.candidates.finished_PC.shape == (20, 2)
    assert max(len(t) for row in shape.candidates.tokens_PC for t in row) == 3
    world = turned(base, tmp_path / "shape", bootstrap__candidates=2, bootstrap__unfinished="drop")
    whole = fresh.bootstrap_pairs(world, 2, scored(made, 1))
    assert len(whole.fresh.trees) < len(shape.fresh.trees)
    assert all(whole.candidates.finished_PC[p, list(pair)].all() for p, pair in zip(*whole_pairs(whole)))
    assert fresh.bootstrap_pairs(turned(base, bootstrap__from_iteration=3), 2, scored(made, 1)) is None
    assert fresh.bootstrap_pairs(turned(base, bootstrap__fresh=0.0), 2, scored(made, 1)) is None


def whole_pairs(made_: fresh.Made) -> tuple[np.ndarray, np.ndarray]:
    return made_.fresh.prompt_F, made_.fresh.pair_F2


def test_pair_rules_and_length(base, made, tmp_path):
    """All from the same candidates."""
    of = lambda **changes: sampled(base, made, tmp_path, bootstrap__fresh=9.0, **changes).fresh
    best, every = of(), of(bootstrap__pair_rule="all_pairs")
    assert len(every.trees) > len(best.trees) > 10
    for p, margin in zip(best.prompt_F, best.margin_F):
        assert margin == every.margin_F[every.prompt_F == p].max()
    assert (of(bootstrap__pair_rule="best_random").margin_F <= best.margin_F).all()
    assert of(bootstrap__pair_rule="random").margin_F.mean() < best.margin_F.mean()
    second, each = of(bootstrap__pair_rule="best_second"), of(bootstrap__pair_rule="best_each")
    first = dict(zip(best.prompt_F, best.pair_F2[:, 0]))
    for pairs in (second, each):
        assert all(chosen == first[p] for p, chosen in zip(pairs.prompt_F, pairs.pair_F2[:, 0]))
    least = {p: each.margin_F[each.prompt_F == p].min() for p in each.prompt_F}
    assert all(margin == least[p] for p, margin in zip(second.prompt_F, second.margin_F)) and len(second.trees) > 10
    gap = lambda made_: np.array([len(t.branches[0]) - len(t.branches[1]) for t in made_.trees])
    short, long = of(reward__length_penalty=100.0), of(reward__length_penalty=-100.0)
    assert gap(short).max() <= 0 < gap(long).max() and gap(long).min() >= 0
    assert gap(short).mean() < gap(best).mean() < gap(long).mean()
    unbiased = sampled(base, made, tmp_path, bootstrap__fresh=9.0, reward__length_penalty="auto")
    alpha = unbiased.ranked.told["reward/length_penalty"]
    assert alpha >= 0 and abs(gap(unbiased.fresh).mean()) <= max(abs(gap(best).mean()), 0.5)
    by_hand = of(reward__length_penalty=alpha)
    assert [t.id for t in by_hand.trees] == [t.id for t in unbiased.fresh.trees]
    letters = lambda pairs, made_: [
        len(made_.candidates.texts_PC[p][a]) - len(made_.candidates.texts_PC[p][b])
        for p, (a, b) in zip(pairs.prompt_F, pairs.pair_F2)
    ]
    by_letter = sampled(
        base, made, tmp_path, bootstrap__fresh=9.0, reward__length_penalty=100.0, reward__length_unit="characters"
    )
    assert max(letters(by_letter.fresh, by_letter)) <= 0 < max(letters(short, by_letter))
    tokens = of(bootstrap__pair_rule="all_pairs", reward__length_normalise=True)
    per_token = {tree.id: reward for tree, reward in zip(tokens.trees, tokens.reward_F2)}
    compared = 0
    for tree, reward in zip(every.trees, every.reward_F2):
        if tree.id in per_token:
            np.testing.assert_allclose(per_token[tree.id], reward / [len(b) for b in tree.branches], rtol=1e-5)
            compared += 1
    assert 0 < compared < len(every.trees)  # some pairs changed their order


def test_exploring_pairs(base, made, tmp_path):
    """Where Γ counts for much, the most uncertain candidate is taken; where for nothing, the first other one. λ bounds
    Γ, and the projection decides in how many directions it is looked for."""
    of = lambda name, **changes: sampled(
        base, made, tmp_path / name, bootstrap__pair_rule="explore", bootstrap__fresh=9.0, **changes
    )
    much, nothing = of("much", explore__weight=1e3).fresh, of("nothing", explore__weight=1e-6).fresh
    assert [len(f.trees) for f in (much, nothing)] == [len(much.trees)] * 2 and len(much.trees) > 10
    gamma = {tuple(pair): g for *pair, g in zip(nothing.prompt_F, nothing.pair_F2[:, 1], nothing.gamma_F)}
    assert (much.pair_F2[:, 0] == nothing.pair_F2[:, 0]).all()
    assert (much.gamma_F / 1e3 >= nothing.gamma_F / 1e-6 * (1 - 1e-5)).all() and len(gamma) == len(nothing.trees)
    assert (much.pair_F2[:, 1] != nothing.pair_F2[:, 1]).sum() > 3
    stiff = of("stiff", explore__weight=1e3, explore__regularisation=1e4).fresh
    assert (stiff.gamma_F < 0.1 * much.gamma_F).all()
    flat = of("flat", explore__weight=1e3, explore__dimension=1).fresh
    assert (flat.pair_F2 != much.pair_F2).any() and np.isfinite(flat.gamma_F).all()


def test_sources_of_rewards(base, made, tmp_path):
    """Each ranks the same candidates by its own."""
    own = sampled(base, made, tmp_path, bootstrap__fresh=9.0)
    words = sampled(
        base, made, tmp_path, bootstrap__fresh=9.0, reward__source="function", reward__function="tiny_reward:count"
    )
    noise = sampled(base, made, tmp_path, bootstrap__fresh=9.0, reward__source="random")
    for p, pair, reward in zip(words.fresh.prompt_F, words.fresh.pair_F2, words.fresh.reward_F2):
        texts = words.candidates.texts_PC[p]
        assert reward.tolist() == [len(set(texts[c].split())) for c in pair]
    assert len({tuple(map(tuple, f.fresh.pair_F2)) for f in (own, words, noise)}) == 3
    assert own.ranked.kl is not None and words.ranked.kl is None and noise.ranked.kl is None
    assert 0 < noise.fresh.reward_F2.min() < noise.fresh.reward_F2.max() < 1


def test_a_source_that_compares(base, made, tmp_path):
    """Every two candidates once; a reward is the mean probability over the others, whichever circle they go in."""
    keys = {"reward__source": "preference_function", "reward__function": "tiny_reward:longer"}
    got = sampled(base, made, tmp_path, bootstrap__fresh=9.0, **keys)
    length = np.array([[len(text.split()) for text in row] for row in got.candidates.texts_PC], np.float64)
    want = 0.5 + np.sign(length[:, :, None] - length[:, None]) / 4
    np.testing.assert_allclose(got.ranked.prob_PCC, want, atol=1e-7)
    mean = (want.sum(2) - 0.5) / (length.shape[1] - 1)
    for p, pair, reward in zip(got.fresh.prompt_F, got.fresh.pair_F2, got.fresh.reward_F2):
        np.testing.assert_allclose(reward, mean[p, pair], atol=1e-6)
    assert len(got.fresh.trees) > 10


@pytest.mark.parametrize("loss, column", [("sppo", "win"), ("ipo_soft", "preference"), ("rpo_sq", "reward")])
def test_what_losses_are_told_of_fresh_pairs(base, made, tmp_path, loss, column):
    """In the iteration that makes them, and from its file in a later one."""
    keys = {"bootstrap__unfinished": "keep", "bootstrap__replay": True, "loss__name": loss}
    world = turned(base, tmp_path, **keys)
    made_ = fresh.bootstrap_pairs(world, 2, scored(made, 1))
    outcome.write_pairs(world, 2, None, made_)
    want = getattr(made_.fresh, f"{column}_F2")[made_.fresh.kept_F]
    now = update.training_set(world, 2, scored(made, 1), None, made_).trees[N:]
    later = update.training_set(world, 3, scored(made, 2), None, None).trees[N:]
    assert len(want) > 5 and len(now) == len(later) == len(want)
    for trees in (now, later):
        np.testing.assert_allclose([tree.values for tree in trees], want, rtol=1e-6)


def test_a_mixture_with_the_initial_policy(base, made, tmp_path):
    """As opponents: they stand in no pair, and wins are against them alone. As candidates: they are of the mixture."""
    keys = {"bootstrap__fresh": 9.0, "bootstrap__candidates": 3}
    keys |= {"reward__source": "preference_function", "reward__function": "tiny_reward:longer"}
    plain = sampled(base, made, tmp_path / "plain", **keys)
    got = sampled(base, made, tmp_path / "against", **keys, bootstrap__mixture=0.5)
    assert got.candidates.texts_PC == plain.candidates.texts_PC and plain.opponents is None
    assert got.opponents.finished_PC.shape == (20, 3) and got.ranked.prob_PCC.shape == (20, 6, 6)
    words = lambda texts: np.array([[len(text.split()) for text in row] for row in texts], np.float64)
    own, other = words(got.candidates.texts_PC), words(got.opponents.texts_PC)
    there = np.array([[text.strip() != "" for text in row] for row in got.opponents.texts_PC])
    win = 0.5 + np.sign(own[:, :, None] - other[:, None]) / 4
    win = (win * there[:, None]).sum(2) / np.maximum(there.sum(1, keepdims=True), 1)
    assert len(got.fresh.trees) > 5
    for p, pair, told in zip(got.fresh.prompt_F, got.fresh.pair_F2, got.fresh.win_F2):
        assert max(pair) < 3
        np.testing.assert_allclose(told, win[p, pair], atol=1e-6)
    mixed = sampled(base, made, tmp_path / "of", **keys, bootstrap__mixture=0.5, bootstrap__mixture_of="candidates")
    assert mixed.opponents is None and mixed.candidates.texts_PC != plain.candidates.texts_PC
    live = scored(made, 1)
    under = {t: fresh.candidate_logps(base, Name("iterate", t), mixed.candidates, live) for t in (0, 1)}
    of_plain = {t: fresh.candidate_logps(base, Name("iterate", t), plain.candidates, live) for t in (0, 1)}
    drift = lambda logps: np.nanmean(logps[1] - logps[0])  # KL to the initial policy, of the policy's own samples
    assert drift(under) < drift(of_plain)
    whole = sampled(base, made, tmp_path / "start", **keys, bootstrap__mixture=1.0, bootstrap__mixture_of="candidates")
    initial = Live(Name("iterate", 0), policies.params(base.policies, Name("iterate", 0)))
    world = turned(base, tmp_path / "initial", **keys)
    assert fresh.bootstrap_pairs(world, 2, initial).candidates.texts_PC == whole.candidates.texts_PC


def test_sources_are_combined_and_told_apart(base, made, tmp_path):
    """Each source says what it says alone; the worst of them, standardised, ranks; how far they agree is logged."""
    alone = {
        "function:tiny_reward:count": {"reward__source": "function", "reward__function": "tiny_reward:count"},
        "implicit": {"reward__source": "implicit"},
        "random": {"reward__source": "random"},
    }
    ones = {name: sampled(base, made, tmp_path, bootstrap__fresh=9.0, **how) for name, how in alone.items()}
    how = {"reward__source": "combined", "reward__sources": dict.fromkeys(alone, 1.0), "reward__combine": "worst"}
    both = sampled(base, made, tmp_path, bootstrap__fresh=9.0, **how)
    valid_PC = fresh.valid(turned(base, bootstrap__unfinished="keep"), both.candidates)
    z = []
    for name, one in ones.items():
        np.testing.assert_allclose(both.ranked.sources[name][valid_PC], one.ranked.rewards_PC[valid_PC], atol=1e-6)
        value = one.ranked.rewards_PC[valid_PC].astype(np.float64)
        z.append((value - value.mean()) / value.std())
        assert both.ranked.told[f"source/{name}/mean"] == pytest.approx(value.mean(), rel=1e-5, abs=1e-6)
        assert both.ranked.told[f"source/{name}/std"] == pytest.approx(value.std(), rel=1e-5)
    np.testing.assert_allclose(both.rewards_PC[valid_PC], np.min(z, axis=0), atol=1e-5)
    assert both.ranked.kl == ones["implicit"].ranked.kl
    key = "function:tiny_reward:count implicit"
    assert both.ranked.told[f"agree/pearson/{key}"] == pytest.approx(np.corrcoef(z[0], z[1])[0, 1], abs=1e-5)
    assert {k.split("/")[1] for k in both.ranked.told if k.startswith("agree/")} == {"pearson", "spearman", "within"}
    weights = dict(zip(alone, (2.0, 1.0, 0.5)))
    mixed = sampled(base, made, tmp_path, **how | {"reward__sources": weights, "reward__combine": "weighted"})
    np.testing.assert_allclose(mixed.rewards_PC[valid_PC], np.array([2, 1, 0.5]) @ np.array(z), atol=1e-4)
    raw = sampled(base, made, tmp_path, **how | {"reward__scale": "none"})
    least = np.min([one.ranked.rewards_PC[valid_PC] for one in ones.values()], axis=0)
    np.testing.assert_allclose(raw.rewards_PC[valid_PC], least, atol=1e-6)
    world = turned(base, tmp_path, bootstrap__unfinished="keep", **how)
    outcome.write_pairs(world, 2, None, both)
    table = pyarrow.parquet.read_table(tmp_path / "iterations" / "2" / "rewards.parquet").to_pydict()
    assert list(table) == ["prompt_id", "candidate", *alone, "reward"] and len(table["reward"]) == 80
    assert table["candidate"][:5] == [0, 1, 2, 3, 0] and table["random"][5] == both.ranked.sources["random"][1, 1]


def test_a_source_without_a_number_is_named(base, made, tmp_path, monkeypatch):
    monkeypatch.setitem(
        fresh.SOURCES, "random", lambda w, t, s, d, c: fresh.Ranked(np.full(c.finished_PC.shape, np.nan))
    )
    how = {"reward__source": "combined", "reward__sources": {"implicit": 1.0, "random": 1.0}}
    with pytest.raises(
        ValueError, match=r"reward.sources: 'random' gives candidate \d of prompt 'q\d+' the reward nan"
    ):
        sampled(base, made, tmp_path, **how)


def test_given_responses_stand_against_samples(base, made, tmp_path):
    """SPIN: prompts of the pairs; the given chosen response is candidate 0 and always the better one."""
    given = base.given
    prompts = tuple(Prompt(pair.id, pair.prompt) for pair in given.pairs[:6])
    own = dataclasses.replace(
        given,
        prompts=(*prompts, given.prompts[0]),  # one of whose prompts no pair is
        prompt_tokens=(*(tree.prompt for tree in given.trees[:6]), given.prompt_tokens[0]),
        chosen=(*(tree.branches[0] for tree in given.trees[:6]), np.zeros(0, np.int32)),
    )
    how = {"bootstrap__with_given": True, "bootstrap__candidates": 1, "reward__source": "given"}
    made_ = sampled(dataclasses.replace(base, given=own), made, tmp_path, bootstrap__fresh=1.0, **how)
    assert made_.candidates.finished_PC.shape == (7, 2) and made_.sampled.finished_PC.shape == (7, 1)
    found = dict(zip(made_.fresh.prompt_F.tolist(), made_.fresh.trees))
    assert len(found) >= 5 and 6 not in found and (made_.fresh.pair_F2 == [0, 1]).all() and made_.fresh.kept_F.all()
    for p, tree in found.items():
        assert tree.branches[0] is given.trees[p].branches[0] and tree.branches[1] is made_.sampled.tokens_PC[p][0]
    # Rows are planned for two samples, or for one and the given response: 4 tokens, or 10.
    for new in (4, 10):
        bound = worlds._largest_fresh(turned(base, bootstrap__max_new_tokens=new, **how).config, own)
        given_ = [(len(p), len(ids)) for p, ids in zip(own.prompt_tokens, own.chosen)]
        assert bound.tolist() == [
            [max(n + new + max(new, c) for n, c in given_), new + max(new, max(c for _, c in given_)), 2]
        ]


def test_replay(base, made, tmp_path):
    """Fresh pairs of iteration 2 that were kept train again in iteration 3, and only with replay."""
    world = turned(base, tmp_path, bootstrap__unfinished="keep")
    made_ = fresh.bootstrap_pairs(world, 2, scored(made, 1))
    outcome.write_pairs(world, 2, None, made_)
    kept = [tree.id for tree, k in zip(made_.fresh.trees, made_.fresh.kept_F) if k]
    live = scored(made, 2)
    assert kept and len(update.training_set(world, 3, live, None, None).trees) == N
    stage = update.training_set(turned(world, tmp_path, bootstrap__replay=True), 3, live, None, None)
    assert [tree.id for tree in stage.trees[N:]] == kept
    last = turned(world, tmp_path, bootstrap__replay=True, bootstrap__replay_last=1)
    assert len(update.training_set(last, 3, live, None, None).trees) == N + len(kept)
    assert len(update.training_set(last, 4, live, None, None).trees) == N  # iteration 3 made none
    assert len(update.training_set(turned(last, bootstrap__replay_last=2), 4, live, None, None).trees) == N + len(kept)
    again = dict(zip((t.id for t in made_.fresh.trees), made_.fresh.trees))
    for tree in stage.trees[N:]:
        assert all(np.array_equal(a, b) for a, b in zip(tree.branches, again[tree.id].branches))


def test_parts_and_passes(base, made, tmp_path):
    """An iteration sees its part alone: it selects from it, trains on it, and takes as many updates as it does."""
    parts = data.parts(base.given.pairs, 3, "random", seed=0)
    world = dataclasses.replace(turned(base), given=dataclasses.replace(base.given, parts=parts))
    live, trees = scored(made, 2), base.given.trees
    for t in (1, 2, 3):
        mine = [trees[i] for i in parts[t - 1]]
        stage = update.training_set(world, t, live, None, None)
        assert stage.trees == mine and len(stage.batches) == 2 and update.updates_before(world, t, []) == 2 * (t - 1)
    chosen = select.review(world, 3, live)
    assert len(chosen.mask_N) == len(parts[2]) and chosen.mask_N.sum() == int(0.6 * len(parts[2]))
    assert update.training_set(world, 3, live, chosen, None).trees == [t for t, k in zip(mine, chosen.mask_N) if k]
    kept = sampled(world, made, tmp_path, bootstrap__fresh=0.2).fresh.kept_F
    assert kept.sum() == round(0.2 * len(parts[1]))
    # passes: over the training set itself, whatever its size
    every = turned(base, loop__passes="all", loop__epochs=2)
    few = select.review(base, 3, live)
    assert len(update.training_set(every, 3, live, few, None).batches) == 2 * -(-KEEP // 8)
    assert update.updates_before(every, 3, [{"updates": 5}, {"updates": 8}]) == 13


def test_no_given_pair(base, made, tmp_path):
    """select.rule none: fresh pairs alone, nothing is scored of the given ones; without fresh pairs an error."""
    world = turned(base, tmp_path, select__rule="none", bootstrap__unfinished="keep")
    live = scored(made, 2)
    assert select.review(world, 3, live) is None
    made_ = fresh.bootstrap_pairs(world, 2, scored(made, 1))
    stage = update.training_set(world, 2, scored(made, 1), None, made_)
    assert stage.trees == [t for t, k in zip(made_.fresh.trees, made_.fresh.kept_F) if k] and len(stage.batches) == 6
    assert update.training_set(world, 1, live, None, None).trees == list(base.given.trees)  # from iteration 2 on
    with pytest.raises(ValueError, match="iteration 3 has nothing to train on"):
        update.training_set(world, 3, live, None, None)
    assert outcome._scores_of(world, 3) == set()


# --- iterations -------------------------------------------------------------------------------------------------------


def test_start_and_moments_of_an_iteration(base, made):
    """previous goes on from the policy, initial from iterate 0; carried keeps moments, and the schedule restarts."""
    first = policies.params(base.policies, Name("iterate", 0))
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    fresh_ = update.starting_state(base, scored(made, 1), None)
    assert same(fresh_.params, made[1].params) and int(fresh_.step) == 0
    assert not any(np.any(m) for m in jax.tree.leaves(fresh_.moments))
    again = update.starting_state(turned(base, loop__start="initial"), scored(made, 1), None)
    assert same(again.params, first) and not same(again.params, made[1].params)
    moments = jax.tree.map(lambda m: m + 1, fresh_.moments)
    carried = update.starting_state(base, scored(made, 1), moments)
    assert same(carried.moments, jax.tree.map(lambda m: m + 1, again.moments)) and int(carried.step) == 0
