"""data.forms: what rows mean, form by form. Witnesses: rows with their pairs written out, texts built from known parts,
rules by brute force."""

import csv
import gzip
import itertools
import json
import re

import numpy as np
import pytest

from sera_jax import data, sera
from sera_jax.records import Pair, Prompt, Unpaired


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


USER, GOOD, BAD = turn("user", "hi"), turn("assistant", "hello"), turn("assistant", "go away")


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(folder, *rows, **options) -> list[Pair]:
    return data.load_pairs([write(folder / "f.jsonl", rows)], **options)[0]


def refused(folder, good: dict, bad: dict[str, dict], **options) -> None:
    """Each bad row is counted under its reason at its line; the good one is used."""
    path = write(folder / "f.jsonl", [good, *bad.values()])
    pairs, report = data.load_pairs([path], **options)
    assert {reason: places for reason, _, places in report.dropped} == {
        reason: (f"f:{line}",) for line, reason in enumerate(bad, 2)
    }
    assert pairs == read(folder, good, **options) and report.rows == 1 + len(bad)


# --- one example of every form ----------------------------------------------------------------------------------------

POST = {"id": "t3_x", "subreddit": "tifu", "title": "a title", "post": "it\nwas", "site": None, "article": None}
TLDR = {
    "info": POST,
    "summaries": [{"text": " it was bad", "policy": "sup4"}, {"text": "it was\n", "policy": "ref"}],
    "choice": 1,
    "worker": "w",
}
ULTRA = {
    "source": "evol",
    "instruction": "sum up",
    "models": ["a", "b", "c"],
    "completions": [
        {"model": "a", "response": "fair", "overall_score": 6.0, "fine-grained_score": 5.0},
        {"model": "b", "response": "best", "overall_score": 8.5, "fine-grained_score": 4.0},
        {"model": "c", "response": "worst", "overall_score": 2.0, "fine-grained_score": 4.5},
    ],
}
ALPACA = {"instruction": "ask", "output_1": "one", "generator_1": "m", "output_2": "two", "generator_2": "n"}
# form → (row, its pairs). ids: the file is f.jsonl.
GOLDEN = {
    "explicit": (
        {"prompt": "p", "chosen": "c", "rejected": "r", "chosen-rating": 4, "rejected-rating": 3.5},
        [Pair("f:1", "p", "c", "r", (4.0, 3.5), source="f")],
    ),
    "conversational": (  # as HuggingFaceH4/ultrafeedback_binarized
        {
            "prompt": "hi",
            "prompt_id": "0a1b",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        },
        [Pair("f:1", (USER,), (GOOD,), (BAD,), (8.5, 6.0), source="f")],
    ),
    "hh": (
        {"chosen": "\n\nHuman: a b\n\nAssistant: yes", "rejected": "\n\nHuman: a b\n\nAssistant: yes, no"},
        [Pair("f:1", "\n\nHuman: a b\n\nAssistant:", " yes", " yes, no", source="f")],
    ),
    "implicit": (
        {"id": 5, "chosen": "Q: why?\nA: because so", "rejected": "Q: why?\nA: beware"},
        [Pair("5", "Q: why?\nA:", " because so", " beware", source="f")],
    ),
    "ultrafeedback": (ULTRA, [Pair("f:1/1>2", "sum up", "best", "worst", (8.5, 2.0), source="evol")]),
    "ranked": (
        {"id": "k", "prompt": "p", "responses": ["x", "y", "z"], "scores": [0, 2, -1], "weight": 0.5},
        [Pair("k/1>2", "p", "y", "z", (2.0, -1.0), 0.5, "f")],
    ),
    "tldr": (
        TLDR,
        [
            Pair(
                "f:1",
                "SUBREDDIT: r/tifu\n\nTITLE: a title\n\nPOST: it\nwas\n\nTL;DR:",
                " it was",
                " it was bad",
                source="f",
            )
        ],
    ),
    "alpaca_eval": (
        ALPACA | {"preference": 2.0},
        [Pair("f:1", "ask", "two", "one", (1.0, 0.0), source="f")],
    ),
}


def test_every_form_has_an_example():
    assert list(GOLDEN) == list(data.FORMATS)


@pytest.mark.parametrize("form", GOLDEN)
def test_a_row_of_every_form(tmp_path, form):
    row, pairs = GOLDEN[form]
    path = write(tmp_path / "f.jsonl", [row])
    told, report = data.load_pairs([path])
    assert told == pairs
    assert report.files == ((path, form, len(pairs), 1),) and not report.dropped
    assert data.load_pairs([path], format=form)[0] == pairs
    prompts, _ = data.load_prompts([path])
    assert [prompt.prompt for prompt in prompts] == [pairs[0].prompt]
    # each form is recognised by one entry of the table, or by that one first
    first = next(name for name, entry in data.FORMATS.items() if entry.recognise(row))
    assert first == form


def test_a_form_that_cannot_be_told_names_them_all(tmp_path):
    path = write(tmp_path / "f.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match=r"f.jsonl: cannot tell the form of the data .* Got columns a; expected") as e:
        data.load_pairs([path])
    assert all(f"({form})" in str(e.value) and entry.columns in str(e.value) for form, entry in data.FORMATS.items())
    # a forced one is alone in the message
    with pytest.raises(ValueError) as e:
        data.load_pairs([path], format="tldr")
    assert "expected info, two summaries and choice (tldr). Give data.format" in str(e.value)
    assert "(ranked)" not in str(e.value)


# --- implicit prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ("Q: why?\nA:", " because", " beware"),  # never inside a word
        ("Q: why?\nA: be", " kind", " nice"),  # what answers share is prompt, as for TRL
        ("Q: why?\nA:", " yes", " yes, maybe"),  # one begins with the other
        ("Q: why?\nA:", " yes, a", " yes b"),
        ("Q: why?\nA:", " yes\n", " yes\nbut"),
        ("Q: why?\nA:", "  two", " one"),  # white space stays whole
        ("a\n", "b", "c"),  # behind line breaks
        ("a\r\n\r\n", "b", "c"),
        ("a:\n\n", "  b", "  c"),  # an indent goes with the response
        ("a:", "\n\nb", "\nc"),  # a run of line breaks is not cut
        ("a:", "\nb", " c"),
        ("a\n", " b", " c"),
        ("<|user|>hi<|assistant|>", "Yes", "Yellow"),  # roles
        ("<|user|>hi<|assistant|>", "(a)", "(b)"),
        ("[INST] hi [/INST]", "Yes", "Yellow"),
        ("hi</s>", "Yes", "Yellow"),
        ("### Instruction: a\n### Response:", "Yes", "Yellow"),
        ("人間：元気ですか\nアシスタント：", "はい", "はあ"),
        ("a\nsee:", " http://x", " http://y"),
        ("a\n", "http://x", "http://y"),  # "http:" is no role of what follows
        ("a\n", "12:30", "12:45"),
        ("a\n", "caf\u0301e", "cafe"),  # nor inside a character of several code points
        ("a\n", "😀😀", "😀😁"),
    ],
)
def test_an_implicit_prompt_ends_where_tokens_do(tmp_path, prompt, chosen, rejected):
    (pair,) = read(tmp_path, {"chosen": prompt + chosen, "rejected": prompt + rejected})
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)


def test_implicit_prompts_of_texts_with_known_parts(tmp_path):
    """Texts of words, each behind its white space; the witness compares words, not characters."""
    rng = np.random.default_rng(0)
    spaces, words = (" ", "  ", "\n", "\n\n", "\n  "), ("a", "ab", "abc", "b", "ba", "é", "éa", "a,", "a,b")

    def draw(n: int) -> list[tuple[str, str]]:
        return [(str(rng.choice(spaces)), str(rng.choice(words))) for _ in range(n)]

    rows, want = [], []
    for _ in range(600):
        shared = [("", "Go"), *draw(rng.integers(0, 4))]
        two = [shared + draw(rng.integers(1, 4)) for _ in range(2)]
        same = sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(*two)))
        if two[0] == two[1]:
            continue
        same = min(same, len(two[0]) - 1, len(two[1]) - 1)  # both keep a word
        left, right = two[0][same][0], two[1][same][0]
        end = left[: left.rfind("\n") + 1] if left == right else ""
        # unlike white space may still share its first lines
        if left != right and {left, right} == {"\n", "\n  "}:
            end = "\n"
        want.append("".join(s + w for s, w in two[0][:same]) + end)
        rows.append(dict(zip(("chosen", "rejected"), ("".join(s + w for s, w in text) for text in two))))
    pairs = read(tmp_path, *rows)
    assert [pair.prompt for pair in pairs] == want and len(pairs) > 500
    assert all(p.prompt + p.chosen == r["chosen"] for p, r in zip(pairs, rows))
    assert all(p.prompt + p.rejected == r["rejected"] for p, r in zip(pairs, rows))


def test_texts_without_a_common_prompt(tmp_path):
    none = "chosen and rejected have no common prompt (no white space or role ends their common beginning)"
    good = {"chosen": "Q A", "rejected": "Q B"}
    refused(tmp_path, good, {none: {"chosen": "Apples", "rejected": "Apes"}})
    refused(tmp_path, good, {"chosen and rejected are identical": {"chosen": "same", "rejected": "same"}})
    refused(tmp_path, good, {"empty prompt": {"chosen": "\nA", "rejected": "\nB"}})


def test_answers_beside_a_question_are_no_full_texts(tmp_path):
    """Their common beginning would be a chance one, not the prompt."""
    path = write(tmp_path / "f.jsonl", [{"question": "why?", "chosen": "It is so", "rejected": "It is not"}])
    with pytest.raises(ValueError, match=r"cannot tell the form .* Got columns chosen, question, rejected; expected"):
        data.load_pairs([path])


def test_conversations_that_part_early(tmp_path):
    """The prompt ends where both go on with the assistant, and is never less than what is given as prompt."""
    more, system = turn("user", "more"), turn("system", "be kind")
    cases = [
        ([USER, GOOD], [USER, BAD], 1),
        ([USER, GOOD, more, GOOD], [USER, BAD, more, GOOD], 1),  # several messages are the response
        ([system, USER, GOOD, more, GOOD], [system, USER, GOOD, more, BAD], 4),
        ([USER, GOOD, more, GOOD], [USER, GOOD, USER, BAD], 1),  # they part at the user's turn: back to the one before
        ([USER, GOOD], [USER, GOOD, more, BAD], 1),
        ([USER, GOOD, BAD], [USER, GOOD, GOOD], 2),
    ]
    for chosen, rejected, cut in cases:
        for given in ({}, {"prompt": chosen[0]["content"]}, {"prompt": chosen[:1]}):
            (pair,) = read(tmp_path, {"chosen": chosen, "rejected": rejected, **given})
            assert (pair.prompt, pair.chosen) == (tuple(chosen[:cut]), tuple(chosen[cut:]))
            assert pair.rejected == tuple(rejected[cut:])
    # answers alone, to a prompt
    (pair,) = read(tmp_path, {"prompt": [USER], "chosen": [GOOD, more, BAD], "rejected": [BAD, more, BAD]})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (GOOD, more, BAD), (BAD, more, BAD))
    good = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    different = "chosen and rejected have different prompts"
    refused(tmp_path, good, {different: {"chosen": [USER, GOOD], "rejected": [more, BAD]}})
    # the prompt that is given is not cut back
    long = {"prompt": [USER, GOOD, more], "chosen": [more, GOOD], "rejected": [USER, BAD]}
    refused(tmp_path, good, {different: long})


# --- K ranked responses -----------------------------------------------------------------------------------------------


def test_rules_are_those_of_fresh_pairs():
    assert set(data.RANKED) == set(sera.PAIR_RULES)  # those that read scores


@pytest.mark.parametrize("rule", data.RANKED)
def test_rules_by_brute_force(tmp_path, rule):
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"p{n}", "responses": [f"r{i}" for i in range(k)], "scores": rng.integers(0, 4, k).tolist()}
        for n, k in enumerate(rng.integers(2, 6, 120))
    ]
    pairs, report = data.load_pairs([write(tmp_path / "f.jsonl", rows)], ranked=rule)
    got = {f"f:{n}": set() for n in range(1, len(rows) + 1)}
    for pair in pairs:
        name, places = pair.id.split("/")
        chosen, rejected = map(int, places.split(">"))
        row = rows[int(name.split(":")[1]) - 1]
        assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], f"r{chosen}", f"r{rejected}")
        assert pair.scores == (row["scores"][chosen], row["scores"][rejected]) and pair.scores[0] > pair.scores[1]
        assert (chosen, rejected) not in got[name]
        got[name].add((chosen, rejected))
    ties, tops = 0, 0
    for n, row in enumerate(rows, 1):
        s = row["scores"]
        every = {(i, j) for i, j in itertools.permutations(range(len(s)), 2) if s[i] > s[j]}
        if not every:
            ties += 1
            assert got[f"f:{n}"] == set()
            continue
        best, worst = s.index(max(s)), s.index(min(s))
        top = sorted(s, reverse=True)
        if rule == "best_second" and top[0] == top[1]:
            tops += 1
            assert got[f"f:{n}"] == set()
            continue
        allowed = {
            "best_worst": {(best, worst)},
            "best_random": {(i, j) for i, j in every if i == best},
            "best_second": {(best, s.index(top[1]))},
            "best_each": {(i, j) for i, j in every if i == best},
            "random": every,
            "all_pairs": every,
        }[rule]
        assert got[f"f:{n}"] <= allowed
        assert len(got[f"f:{n}"]) == (len(allowed) if rule in ("all_pairs", "best_each") else 1)
    dropped = {reason: count for reason, count, *_ in report.dropped}
    assert ties > 3 and dropped.pop("all scores are equal") == ties
    assert dropped == ({"the highest scores are equal": tops} if rule == "best_second" else {})
    assert (tops > 3) == (rule == "best_second")
    assert report.usable == len(pairs) and report.rows == len(rows)
    assert len({pair.id for pair in pairs}) == len(pairs)


def test_random_rules_are_seeded_by_content(tmp_path):
    rows = [{"prompt": f"p{n}", "responses": list("abcdef"), "scores": [5, 0, 1, 2, 3, 4]} for n in range(300)]
    by = lambda seed, rows=rows: {
        (p.prompt, p.chosen, p.rejected) for p in read(tmp_path, *rows, ranked="best_random", seed=seed)
    }
    one = by(1)
    assert one == by(1) == by(1, rows[::-1]) != by(2)
    counts = [sum(rejected == letter for _, _, rejected in one) for letter in "bcdef"]
    assert sum(counts) == 300 and min(counts) > 35  # about 60 each


def test_ids_do_not_depend_on_the_rule(tmp_path):
    """So a review, or a run of another rule, speaks of the same pairs."""
    rows = [
        {"prompt": "p", "responses": ["x", "y", "z"], "scores": [1, 2, 0], **more}
        for more in ({}, {"id": "k"}, {"id": "k"})
    ]
    every = read(tmp_path, *rows, ranked="all_pairs")
    assert [p.id for p in every][:6] == ["f:1/1>0", "f:1/0>2", "f:1/1>2", "k/1>0", "k/0>2", "k/1>2"]
    assert [p.id for p in every][6:] == ["k/1>0#2", "k/0>2#2", "k/1>2#2"]
    best = read(tmp_path, *rows[:2])
    assert [p.id for p in best] == ["f:1/1>2", "k/1>2"] and set(best) <= set(every)
    assert [p.id for p in read(tmp_path, *rows, ranked="all_pairs", limit=4)] == [p.id for p in every][:4]


def test_ranks_messages_and_responses_that_take_no_part(tmp_path):
    (pair,) = read(tmp_path, {"prompt": "p", "responses": ["x", "y", "z"], "ranks": [2, 1, 3]})
    assert (pair.chosen, pair.rejected, pair.scores) == ("y", "z", (-1.0, -3.0))
    for prompt, responses in (([USER], ["hello", "go away"]), ("hi", [[GOOD], [BAD]]), ([USER], [[GOOD], "go away"])):
        (pair,) = read(tmp_path, {"prompt": prompt, "responses": responses, "scores": [1, 0]})
        assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (GOOD,), (BAD,))
    part = {"prompt": "p", "responses": ["x", " ", "y", None, "x", "z"], "scores": [1, 9, 2, 9, -9, None]}
    (pair,), report = data.load_pairs([write(tmp_path / "f.jsonl", [part])])
    assert (pair.id, pair.chosen, pair.rejected) == ("f:1/2>0", "y", "x")
    assert {reason: (n, places) for reason, n, places in report.dropped} == {
        "a response is empty": (2, ("f:1", "f:1")),
        "a response is repeated": (1, ("f:1",)),
        "a response has no score": (1, ("f:1",)),
    }
    good = {"prompt": "p", "responses": ["x", "y"], "scores": [1, 0]}
    bad = {
        "responses and scores differ in number": good | {"scores": [1, 0, 2]},
        "responses and ranks differ in number": {"prompt": "p", "responses": ["x", "y"], "ranks": [1]},
        "responses is str, expected a list": good | {"responses": "x"},
        "scores is int, expected a list": good | {"scores": 1},
        "scores is str, expected a number": good | {"scores": ["1", "2"]},
        "response is int, expected text": good | {"responses": ["x", 3]},
        "fewer than two responses to rank": good | {"responses": ["x"], "scores": [1]},
        "all scores are equal": good | {"scores": [1, 1]},
        "empty prompt": good | {"prompt": " "},
        "the last message of a response is not the assistant's": good | {"responses": [[USER], [BAD]]},
    }
    refused(tmp_path, good, bad)
    with pytest.raises(ValueError, match=r"data.ranked: got 'best'; expected best_worst, best_random, best_second, b"):
        read(tmp_path, good, ranked="best")


def test_what_generate_writes_stays_a_prompt_file(tmp_path):
    line = {"id": "q", "prompt": "p", "responses": ["x", "y"], "finished": [True, True], "lengths": [1, 1]}
    path = write(tmp_path / "f.jsonl", [line, line])
    prompts, report = data.load_prompts([path])
    assert report.files[0][1] == "prompt" and prompts == [Prompt("q", "p"), Prompt("q#2", "p")]


# --- published sets ---------------------------------------------------------------------------------------------------


def test_ultrafeedback_rates_by_what_most_completions_have(tmp_path):
    def rated(*ratings: dict) -> dict:
        return ULTRA | {"completions": [{"response": f"r{i}", **rating} for i, rating in enumerate(ratings)]}

    def scores(row: dict) -> tuple:
        (pair,) = read(tmp_path, row)
        return pair.chosen, pair.rejected, pair.scores

    aspects = lambda *ratings: {
        "annotations": {f"a{i}": {"Rating": r, "Rationale": "x"} for i, r in enumerate(ratings)}
    }
    listed = lambda *ratings: {"annotations": {f"a{i}": [{"Rating": r}] for i, r in enumerate(ratings)}}
    assert scores(
        rated({"overall_score": 1, "fine-grained_score": 5}, {"overall_score": 2, "fine-grained_score": 1})
    ) == (("r1", "r0", (2.0, 1.0)))
    assert scores(rated({"fine-grained_score": 5}, {"fine-grained_score": 1.25})) == ("r0", "r1", (5.0, 1.25))
    assert scores(rated({"overall_score": 9, "fine-grained_score": 3}, {"fine-grained_score": 4})) == (
        ("r1", "r0", (4.0, 3.0))
    )
    assert scores(rated(aspects("5", "2", "N/A"), aspects("3", "3", "3"))) == ("r0", "r1", (3.5, 3.0))
    assert scores(rated(listed("1"), listed("4", "5"))) == ("r1", "r0", (4.5, 1.0))
    assert scores(rated({"overall_score": "7.5"}, {"overall_score": "8"})) == ("r1", "r0", (8.0, 7.5))
    refused(
        tmp_path,
        ULTRA,
        {
            "fewer than two responses to rank": ULTRA | {"completions": []},
            "completions is str, expected a list": ULTRA | {"completions": "x"},
            "a completion is not an object with a response": ULTRA | {"completions": ["x", "y"]},
            "empty prompt": ULTRA | {"instruction": ""},
            "response is int, expected text": ULTRA | {"completions": [{"response": 1, "overall_score": 1}]},
        },
    )
    _, report = data.load_pairs(
        [write(tmp_path / "f.jsonl", [ULTRA, rated({}, {}), rated({"overall_score": True}, {})])]
    )
    assert dict((reason, n) for reason, n, _ in report.dropped) == {
        "a response has no score": 4,
        "fewer than two responses to rank": 2,
    }


def test_summaries(tmp_path):
    article = {"id": "c", "article": "It rained.", "post": None, "title": None, "subreddit": None}
    (pair,) = read(tmp_path, TLDR | {"info": article, "choice": 0})
    assert (pair.prompt, pair.chosen) == ("Article:\nIt rained.\n\nTL;DR:", " it was bad")
    refused(
        tmp_path,
        TLDR,
        {
            "choice is not 0 or 1": TLDR | {"choice": 2},
            "choice is str, expected a number": TLDR | {"choice": "1"},
            "summaries has not two entries": TLDR | {"summaries": TLDR["summaries"] * 2},
            "summaries is dict, expected a list": TLDR | {"summaries": {"text": ["a", "b"]}},
            "missing column 'text'": TLDR | {"summaries": ["a", "b"]},
            "missing column 'title'": TLDR | {"info": POST | {"title": None}},
            "missing column 'subreddit'": TLDR | {"info": "x"},
            "empty rejected": TLDR | {"summaries": [{"text": " "}, {"text": "a"}]},
            "chosen and rejected are identical": TLDR | {"summaries": [{"text": "a"}, {"text": " a "}]},
        },
    )


def test_alpaca_eval_preferences(tmp_path):
    for preference, chosen, scores in ((1, "one", (1, 0)), (1.25, "one", (0.75, 0.25)), (1.75, "two", (0.75, 0.25))):
        (pair,) = read(tmp_path, ALPACA | {"preference": preference})
        assert (pair.chosen, pair.scores) == (chosen, scores)
    other = {"prompt": "p", "response_a": "one", "response_b": "two", "preference": 2}
    (pair,) = read(tmp_path, other)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("p", "two", "one")
    (pair,) = read(tmp_path, ALPACA | {"input": "that", "preference": 1})
    assert pair.prompt == "ask\n\nthat"
    good = ALPACA | {"preference": 1}
    refused(
        tmp_path,
        good,
        {
            "the preference is a tie": ALPACA | {"preference": 1.5},
            "no preference": ALPACA | {"preference": None},
            "preference is not from 1 to 2": ALPACA | {"preference": 2.5},
            "preference is str, expected a number": ALPACA | {"preference": "a"},
            "chosen and rejected are identical": good | {"output_2": "one"},
            "empty rejected": good | {"output_2": ""},
            "output_1 is int, expected text": good | {"output_1": 3},
        },
    )
    _, report = data.load_pairs([write(tmp_path / "f.jsonl", [good, ALPACA | {"preference": 0}])])
    assert report.dropped == (("the preference is a tie", 1, ("f:2",)),)
    # a tie is a prompt nevertheless
    path = write(tmp_path / "f.jsonl", [ALPACA | {"preference": 1.5}, ALPACA | {"preference": 1}])
    prompts, report = data.load_prompts([path])
    assert prompts == [Prompt("f:1", "ask")] and report.dropped[0][0] == "prompt of an earlier pair"


# --- labelled responses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", GOLDEN)
def test_every_form_of_pairs_gives_labelled_responses(tmp_path, form):
    row, _ = GOLDEN[form]
    rule = {"ranked": "all_pairs"} if data.FORMATS[form].convert(row).pair is None else {}
    path = write(tmp_path / "f.jsonl", [{**row, "id": "x"}])
    pairs, _ = data.load_pairs([path], **rule)
    examples, report = data.load_unpaired([path], **rule)
    want = []
    for p in pairs:
        want.append(Unpaired(f"{p.id}/chosen", p.prompt, p.chosen, True, p.weight, p.source))
        want.append(Unpaired(f"{p.id}/rejected", p.prompt, p.rejected, False, p.weight, p.source))
    assert examples == want and report.files[0][1:] == (form, len(want), 1) and (len(pairs) > 1) == bool(rule)


def test_a_csv_of_labelled_responses(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": word} for word in ("True", "false", "1", "")]
    rows.append({"prompt": [USER], "completion": [GOOD], "label": " TRUE "})
    path = write_csv(tmp_path / "f.csv", rows)
    examples, report = data.load_unpaired([path])
    assert [(e.prompt, e.label) for e in examples] == [("a", True), ("a", False), ((USER,), True)]
    assert {reason for reason, _, _ in report.dropped} == {
        "label is str, expected true or false",
        "label is NoneType, expected true or false",
    }
    assert [t.response for t in data.load_texts([path])[0]] == [
        "b",
        "b",
        "b",
        (GOOD,),
    ]  # all but those of a false label


# --- CSV --------------------------------------------------------------------------------------------------------------


def write_csv(path, rows: list[dict]) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        nested = lambda value: json.dumps(value) if isinstance(value, list | dict) else value
        table.writerows([{key: nested(value) for key, value in row.items()} for row in rows])
    return str(path)


@pytest.mark.parametrize("form", GOLDEN)
@pytest.mark.parametrize("name", ["f.csv", "f.csv.gz"])
def test_a_csv_says_what_its_rows_say_as_json(tmp_path, form, name):
    row, _ = GOLDEN[form]
    filled = [{**row, "note": 'a "quoted", word'}, {**row, "id": "x", "note": ""}]
    rows = [{key: r.get(key, "") for key in {**filled[0], **filled[1]}} for r in filled]
    pairs, report = data.load_pairs([write_csv(tmp_path / name, rows)])
    assert report.files[0][1] == form and not report.dropped
    want = [pair for r in filled for pair in read(tmp_path, r)]
    said = lambda pair: (pair.prompt, pair.chosen, pair.rejected, pair.scores, pair.weight, pair.source)
    assert [said(pair) for pair in pairs] == [said(pair) for pair in want]
    assert pairs[-1].id == want[-1].id and want[-1].id.split("/")[0] == "x"


def test_rows_of_a_csv(tmp_path):
    """Lines are those of the file, where cells hold line breaks too."""
    lines = [
        "\ufeffid,prompt,chosen,rejected,score_chosen,score_rejected,weight",  # 1
        'a,"two\nlines","say ""yes""",no,1e0,-2,',  # 2
        "",  # 4
        "b,p,c,r,,,0.5",  # 5
        ",p,c",  # 6
        ",p,,r,,,",  # 7
        ',p,"c"x,r,,,',  # 8
        ",p,c,r,x,1,",  # 9
        ',p,"[1]",r,nan,1,',  # 10
        '"e","p","c","r',  # 11, to the end
    ]
    path = tmp_path / "f.csv"
    path.write_bytes("\r\n".join(lines).encode() + b"\r\n\xff,p,c,r,,,\r\n")
    pairs, report = data.load_pairs([path])
    assert pairs == [
        Pair("a", "two\nlines", 'say "yes"', "no", (1.0, -2.0), source="f"),
        Pair("b", "p", "c", "r", weight=0.5, source="f"),
        Pair("f:10", "p", "[1]", "r", source="f"),
    ]
    broken = "broken CSV (a quote that is not closed, or text behind one that is)"
    assert {reason: (n, places) for reason, n, places in report.dropped} == {
        broken: (2, ("f:8", "f:11")),
        "not as many cells as columns": (1, ("f:6",)),
        "empty chosen": (1, ("f:7",)),
        "score_chosen is str, expected a number": (1, ("f:9",)),
    }
    path.write_bytes(b"prompt,chosen,rejected\np,c,r\np,\xff,r\n" + b"p," + b"c" * 200_000 + b",r\n")
    pairs, report = data.load_pairs([path])
    assert len(pairs[1].chosen) == 200_000 and report.dropped == (("not UTF-8", 1, ("f:3",)),)
    path.write_text("question,answer\na,b\n")
    with pytest.raises(ValueError, match=r"f.csv: cannot tell the form .* Got columns answer, question; expected prom"):
        data.load_pairs([path])


def test_prompts_and_texts_of_a_csv(tmp_path):
    path = write_csv(tmp_path / "p.csv", [{"prompt": "a"}, {"prompt": [USER]}, {"prompt": "[] is empty"}])
    assert [p.prompt for p in data.load_prompts([path])[0]] == ["a", (USER,), "[] is empty"]
    path = write_csv(tmp_path / "t.csv", [{"messages": [USER, GOOD]}])
    assert data.load_texts([path])[0] == [data.Demonstration("t:2", (USER,), (GOOD,), source="t")]


# --- real files -------------------------------------------------------------------------------------------------------


def real(path) -> list[dict]:
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


@pytest.mark.parametrize("name", ["llmbar_human", "pandalm_human", "webgpt_test"])
def test_real_verdicts(shared_data, name):
    path = shared_data / "preferences" / f"{name}.jsonl.gz"
    pairs, report = data.load_pairs([path])
    assert report.files[0][1] == "alpaca_eval"
    rows = [r for r in real(path) if r["preference"] != 1.5 and r["response_a"].strip() and r["response_b"].strip()]
    rows = [r for r in rows if r["response_a"] != r["response_b"] and r["prompt"].strip()]
    better = ["response_a" if r["preference"] < 1.5 else "response_b" for r in rows]
    assert [(p.prompt, p.chosen) for p in pairs] == [(r["prompt"], r[b]) for r, b in zip(rows, better)]
    np.testing.assert_allclose(
        [p.scores[0] - p.scores[1] for p in pairs], [abs(2 * r["preference"] - 3) for r in rows], atol=1e-12
    )


def test_real_transcripts_as_full_texts(shared_data, tmp_path):
    """What the replies of a transcript share goes to the prompt; nothing is lost, nothing cut inside a word."""
    rows = real(shared_data / "hh_rlhf" / "helpful_train.jsonl.gz")[:300]
    full = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in rows]
    pairs, report = data.load_pairs([write(tmp_path / "f.jsonl", full)], format="implicit")
    by_line = {int(p.id.split(":")[1]) - 1: p for p in pairs}
    assert len(pairs) > 290, report.lines()
    exact = 0
    for i, pair in by_line.items():
        assert pair.prompt + pair.chosen == full[i]["chosen"] and pair.prompt + pair.rejected == full[i]["rejected"]
        exact += pair.prompt == rows[i]["prompt"]
        assert pair.prompt.startswith(rows[i]["prompt"])
        assert re.search(r"\S$|\n$", pair.prompt) and pair.chosen[0].isspace() or pair.prompt.endswith("\n")
    assert exact > 200
