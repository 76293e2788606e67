"""Pairwise preferences: the question word by word, both orders, answers → probabilities against closed forms in
float64, the tournament, cycles by brute force."""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import tokenizers
import transformers

from sera_jax import data, preference, rows
from sera_jax.preference import Form

WIDE = Form(False, ("red", "blue"), max_length=400, max_prompt_length=200)
CHAT = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %} dog{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return data.load_tokenizer(str(tiny / "model"))


def words(tokenizer, ids) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens([int(i) for i in ids]))


# --- the question -----------------------------------------------------------------------------------------------------


def test_the_question_is_that_of_rlhf_workflow():
    turns = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    )
    context = preference.context(turns)
    assert context == "\n\n<turn> user\n Hi\n\n<turn> assistant\n Yes?\n\n<turn> user\n Go"
    assert preference.context("Hi") == "\n\n<turn> user\n Hi"
    asked = preference.question(Form(False), "C", "one {x}", "two")
    assert asked == "[CONTEXT] C [RESPONSE A] one {x} [RESPONSE B] two \n"
    assert preference.answer(({"role": "assistant", "content": "a"},)) == "a" == preference.answer("a")


def test_both_orders_and_bos(tokenizer):
    beginning = copy.deepcopy(tokenizer)
    beginning.init_kwargs["add_bos_token"] = True
    found = preference.questions(WIDE, beginning, [("cat dog", "ball", "box runs")])
    (one, other), unk = found.orders[0], "<unk>"
    # The tokeniser of words knows neither brackets nor labels with a bracket behind them.
    assert words(tokenizer, one) == f"<s> {unk} {unk} {unk} cat dog {unk} {unk} ball {unk} {unk} box runs"
    assert words(tokenizer, other) == f"<s> {unk} {unk} {unk} cat dog {unk} {unk} box runs {unk} {unk} ball"
    assert one.dtype == np.int32 and found.cut == 0
    ((plain, _),) = preference.questions(WIDE, tokenizer, [("cat dog", "ball", "box runs")]).orders
    np.testing.assert_array_equal(plain, one[1:])


def test_a_chat_template_gives_the_users_turn(tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = CHAT
    ((one, _),) = preference.questions(WIDE, chatting, [("cat", "ball", "box")]).orders
    assert words(chatting, one).startswith("<s> <unk> <unk> <unk> cat") and words(chatting, one).endswith("</s> dog")
    assert list(one).count(1) == 1  # a BOS is there once


def test_labels_are_one_token_each(tokenizer):
    assert preference.label_ids(WIDE, tokenizer) == tuple(tokenizer.convert_tokens_to_ids(["red", "blue"]))
    for labels, shown in ((("A", "B"), "'A' → [0], 'B' → [0]"), (("red", "red"), "'red' → [3], 'red' → [3]")):
        with pytest.raises(ValueError) as error:
            preference.label_ids(Form(False, labels), tokenizer)
        assert str(error.value) == (
            f"preference.labels: this tokeniser makes {shown} of the labels, expected one known token each, and two "
            "different ones: the answer is read off that token. Set preference.labels to two words of its vocabulary, "
            "or use kind 'preference_head', which needs no labels."
        )
    with pytest.raises(ValueError, match=re.escape("'red blue' → [3, 4], 'cat' → [8]")):
        preference.label_ids(Form(False, ("red blue", "cat")), tokenizer)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("most", [24, 25, 30, 40])
def test_long_questions_are_cut_alike_in_both_orders(tokenizer, head, most):
    """The prompt keeps its end, responses their start, of the same length; what a short one leaves is the other's."""
    form = Form(head, ("red", "blue"), max_length=most, max_prompt_length=5)
    asked = [
        ("the " * 20 + "cat dog", "ball " * 30, "box " * 30),
        ("cat", "ball", "box " * 60),
        ("cat", "ball", "box"),
        ("the " * 20, "ball", "box"),
    ]
    found = preference.questions(form, tokenizer, asked)
    room = most - (not head)
    assert found.cut == (3 if most < 30 else 2)
    shares = []
    for (one, other), n in zip(found.orders, (3, 2, 1, 1)):  # more than 1: cut to all the room there is
        count = lambda ids, word: list(ids).count(tokenizer.convert_tokens_to_ids(word))
        assert len(one) == len(other) <= room and (n == 1 or len(one) >= room - 1)
        assert all(count(one, word) == count(other, word) for word in ("ball", "box", "the", "cat"))
        shares.append((count(one, "ball"), count(one, "box")))
    assert abs(shares[0][0] - shares[0][1]) <= 1 and shares[1][0] == 1 and shares[1][1] > shares[0][1]
    assert words(tokenizer, found.orders[0][0]).count("the the the cat dog") == 1
    low = Form(head, ("red", "blue"), max_length=9, max_prompt_length=5)
    assert preference.questions(low, tokenizer, asked).orders == (None,) * 4


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_a_cut_leaves_no_half_character(truncation):
    """Tokens of a byte each, as small vocabularies write most alphabets; three bytes to each of these characters."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    of_bytes = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    turn = preference.context("") if truncation == "keep_start" else ""  # the other cut takes it away
    template = len(preference.question(Form(True), turn, "", ""))
    for room in range(40, 52):
        form = Form(True, max_length=template + room, max_prompt_length=20, truncation=truncation)
        asked = [("អ" * 30, "私" * 60, "た" * 60), ("អ" * 30, "�" * 60, "b" * 90)]
        for (one, _), said in zip(preference.questions(form, of_bytes, asked).orders, asked, strict=True):
            text = of_bytes.decode(one)
            prompt, *both = [len(said[i][0].encode()) * text.count(said[i][0]) for i in range(3)]
            assert template + prompt + sum(both) == len(one) > template + room - 9  # all that was left is readable
            assert prompt in ((18,) if truncation == "keep_end" else (3,)) and max(both) - min(both) <= 3


# --- trees ------------------------------------------------------------------------------------------------------------


def test_one_order_by_a_fair_coin_and_the_label_of_its_place(tokenizer):
    names = [f"p{i}" for i in range(400)]
    found = preference.questions(WIDE, tokenizer, [("cat", "ball", "box")] * 400)
    make = lambda seed, both=False: preference.to_train(WIDE, tokenizer, names, found, seed=seed, both=both)
    first = make(0)
    red, blue = preference.label_ids(WIDE, tokenizer)
    better_first = []
    for (tree,), (one, other) in zip(first, found.orders):
        (branch,) = tree.branches
        assert len(branch) == 1 and int(branch[0]) in (red, blue)
        better_first.append(int(branch[0]) == red)
        np.testing.assert_array_equal(tree.prompt, one if better_first[-1] else other)  # "ball" is the better one
    assert abs(np.mean(better_first) - 0.5) < 4 * 0.5 / math.sqrt(400)
    assert [t[0].id for t in make(0)] == [t[0].id for t in first] != [t[0].id for t in make(1)]
    for trees, (one, other) in zip(make(0, both=True), found.orders):
        assert [int(tree.branches[0][0]) for tree in trees] == [red, blue]
        np.testing.assert_array_equal(trees[0].prompt, one)
        np.testing.assert_array_equal(trees[1].prompt, other)


def test_a_head_reads_both_orders_behind_what_they_share(tokenizer):
    form = Form(True, max_length=400, max_prompt_length=200)
    found = preference.questions(form, tokenizer, [("cat dog", "ball", "box runs"), ("cat", "ball", "ball")])
    for (tree,), (one, other) in zip(preference.to_ask(form, tokenizer, ["a", "b"], found), found.orders):
        np.testing.assert_array_equal(np.concatenate((tree.prompt, tree.branches[0])), one)
        np.testing.assert_array_equal(np.concatenate((tree.prompt, tree.branches[1])), other)
        assert min(map(len, tree.branches)) >= 1
    assert len(preference.to_ask(form, tokenizer, ["a", "b"], found)[0][0].prompt) == 7  # up to "ball" or "box"
    taught = preference.to_train(form, tokenizer, ["a", "b"], found, seed=0, both=False)
    assert [len(trees) for trees in taught] == [1, 1]


# --- answers → probabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
def test_no_tree_is_longer_than_the_longest(tokenizer, head):
    """Of texts that fit, and of ones that are cut; an empty prompt leaves a head's orders least to share."""
    form = Form(head, ("red", "blue"), max_length=40, max_prompt_length=10)
    texts = [" ".join(["cat", "dog", "ball"] * n) for n in (0, 1, 4, 40)]
    asked = [(prompt, f"red {one}", f"blue {other}") for prompt, one, other in itertools.product(texts, repeat=3)]
    found, names = preference.questions(form, tokenizer, asked), [str(n) for n in range(len(asked))]
    assert found.cut and None not in found.orders
    train = preference.to_train(form, tokenizer, names, found, seed=0, both=True)
    for trees, longest in zip((train, preference.to_ask(form, tokenizer, names, found)), preference.longest(form)):
        sizes = rows.measure([tree for some in trees for tree in some])
        assert (sizes <= longest).all() and (sizes[:, 2] == longest[2]).all()
        assert sizes[:, 0].max() >= longest[0] - (6 if head else 0)  # what stands before the first response is shared


def test_both_orders_averaged():
    """Against the softmax over the two labels, in float64."""
    rng = np.random.default_rng(0)
    logp_Q22 = rng.normal(-3, 4, (200, 2, 2))
    logp_Q22[0] = [[-800.0, -1.0], [-1.0, -800.0]]  # no overflow
    p_A = np.exp(logp_Q22[:, :, 0] - np.logaddexp(logp_Q22[:, :, 0], logp_Q22[:, :, 1]))
    want = (p_A[:, 0] + (1 - p_A[:, 1])) / 2
    got = preference.probabilities(WIDE, logp_Q22.reshape(-1).astype(np.float32))
    np.testing.assert_allclose(got, want, atol=1e-6)
    swapped = preference.probabilities(WIDE, logp_Q22[:, ::-1].reshape(-1).astype(np.float32))
    np.testing.assert_allclose(got + swapped, 1, atol=1e-12)
    place = preference.first_wins(WIDE, logp_Q22.reshape(-1))
    told = preference.of_places(place)
    agree = [(a > 0.5) == (b < 0.5) for a, b in p_A]
    np.testing.assert_allclose(told["preference/consistency"], np.mean(agree))
    np.testing.assert_allclose(told["preference/first"], p_A.mean())


def test_a_place_that_always_wins_is_a_tie_at_exactly_half():
    always_first = np.tile([-0.1, -4.0], 2)
    assert preference.probabilities(WIDE, always_first).tolist() == [0.5]
    assert preference.of_places(preference.first_wins(WIDE, always_first))["preference/consistency"] == 0
    assert preference.probabilities(Form(True), np.array([1.5, 1.5])).tolist() == [0.5]


def test_the_head_is_antisymmetric():
    score_Q2 = np.random.default_rng(1).normal(0, 5, (100, 2))
    want = 1 / (1 + np.exp(-(score_Q2[:, 0] - score_Q2[:, 1]) / 2))
    form = Form(True)
    np.testing.assert_allclose(preference.probabilities(form, score_Q2.reshape(-1)), want, rtol=1e-12)
    np.testing.assert_allclose(preference.probabilities(form, score_Q2[:, ::-1].reshape(-1)), 1 - want, atol=1e-12)
    assert preference.first_wins(form, score_Q2.reshape(-1)) is None and preference.of_places(None) == {}


def test_log_odds():
    p = np.array([0.0, 1e-6, 0.25, 0.5, 0.9, 1.0])
    got = preference.log_odds(p)
    np.testing.assert_allclose(got[1:5], np.log(p[1:5] / (1 - p[1:5])), rtol=1e-9)
    assert np.isfinite(got).all() and got[0] == got[1] == pytest.approx(-got[5]) and got[3] == 0


# --- config.json ------------------------------------------------------------------------------------------------------


def test_a_form_is_written_and_read():
    for head in (False, True):
        form = Form(head, ("yes", "no"), 300, 100, "keep_start")
        assert preference.read({"hidden_size": 8, **preference.told(form)}, head) == form


def test_a_policy_that_says_nothing_is_asked_as_rlhf_workflow_asks():
    assert preference.read({"max_position_embeddings": 8192}, False) == Form(False, ("A", "B"), 8192, 4096)
    assert preference.read({}, False) == Form(False)
    with pytest.raises(
        ValueError, match="has no key 'preference': it is a reward model, which scores single responses;"
    ):
        preference.read({}, True)


# --- more than two responses ------------------------------------------------------------------------------------------


class Asked:
    """Answers out of a table P[p, i, j], and what was asked, round by round."""

    def __init__(self, prob_PCC):
        self.prob_PCC, self.rounds = prob_PCC, []

    def __call__(self, pairs):
        self.rounds.append(pairs)
        return np.array([self.prob_PCC[one] for one in pairs], np.float64)


CIRCLE = np.array([[[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]])


def test_every_two_are_asked_once_and_stay_as_they_are():
    valid = np.array([[True, True, True], [True, False, True], [False, True, False]])
    ask = Asked(np.concatenate([CIRCLE] * 3))
    got = preference.compared(valid, ask)
    assert ask.rounds == [[(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 2)]]
    np.testing.assert_allclose(got[0], CIRCLE[0])  # no projection onto rewards
    assert np.isnan(got[1][1]).all() and np.isnan(got[1][:, 1]).all() and got[1][0, 2] == 0.1 and got[1][2, 0] == 0.9
    assert np.isnan(got[2]).sum() == 8 and got[2][1, 1] == 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_a_tournament_takes_one_question_less_than_responses(count):
    """Where rewards explain all preferences it finds the best one, and the rewards of whom it asked."""
    rng = np.random.default_rng(count)
    rewards = rng.normal(0, 1, (7, count))
    valid = rng.random((7, count)) < 0.8
    valid[0] = True
    valid[1] = False
    prob = 1 / (1 + np.exp(rewards[:, None, :] - rewards[:, :, None]))
    ask = Asked(prob)
    got = preference.tournament(valid, ask)
    asked = [pair for round_ in ask.rounds for pair in round_]
    counts = np.bincount([p for p, _, _ in asked], minlength=7)
    assert counts.tolist() == [max(0, n - 1) for n in valid.sum(axis=1)]
    assert len(ask.rounds) == max(0, math.ceil(math.log2(max(1, valid.sum(axis=1).max()))))
    for p in range(7):
        assert np.isnan(got[p][~valid[p]]).all()
        if valid[p].any():
            best = np.nanmax(np.where(valid[p], rewards[p], np.nan))
            np.testing.assert_allclose(got[p][valid[p]], (rewards[p] - best)[valid[p]], atol=1e-9)


def test_a_tournament_of_preferences_that_go_in_a_circle():
    """0 beats 1, then loses to 2: the loser's chain is 1 behind 0 behind 2. A tie goes to the earlier one."""
    odds = math.log(9)
    np.testing.assert_allclose(preference.tournament(np.ones((1, 3), bool), Asked(CIRCLE)), [[-odds, -2 * odds, 0]])
    ties = preference.tournament(np.ones((1, 4), bool), Asked(np.full((1, 4, 4), 0.5)))
    assert ties.tolist() == [[0, 0, 0, 0]]


def test_cycles_equal_brute_force():
    rng = np.random.default_rng(0)
    upper = np.triu(rng.choice([0.1, 0.3, 0.5, 0.8, np.nan], (30, 6, 6), p=[0.3, 0.2, 0.1, 0.3, 0.1]), 1)
    prob = upper + np.tril(1 - upper.swapaxes(1, 2), -1) + 0.5 * np.eye(6)
    circles = triples = 0
    for p, (i, j, k) in itertools.product(range(30), itertools.combinations(range(6), 3)):
        met = [prob[p, a, b] for a, b in ((i, j), (j, k), (k, i))]
        if all(np.isfinite(x) and x != 0.5 for x in met):
            triples += 1
            circles += len({x > 0.5 for x in met}) == 1
    assert preference.cycles(prob) == (circles, triples) and 0 < circles < triples
    assert preference.cycles(CIRCLE) == (1, 1) and preference.cycles(np.full((2, 3, 3), 0.5)) == (0, 0)
