"""Annotation by people: what they are shown, what becomes of their labels, and the round trip from candidates to a
trained model."""

import collections
import json
import pathlib

import numpy as np
import pytest

from sera_jax import annotate, data, reward_model
from sera_jax import config as configs
from sera_jax.config import RewardModelConfig


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path):
    """run("export", flag, ...) in a folder of its own."""

    def call(what: str, *flags: str) -> None:
        annotate.main([what, f"--questions={tmp_path / 'ask.jsonl'}", *flags])

    return call


def candidates(path: pathlib.Path, prompts: int = 60, count: int = 4) -> pathlib.Path:
    """As `sera_jax.generate` writes them; texts of different words."""
    rng = np.random.default_rng(0)
    words = "red blue green ball box cat dog sits runs sees".split()
    rows = []
    for i in range(prompts):
        texts = [" ".join(rng.choice(words, rng.integers(1, 8))) for _ in range(count)]
        rows.append({"id": f"q{i}", "prompt": f"the {i}", "responses": texts, "finished": [True] * count})
    return write(path, rows)


def judged(question: dict) -> str:
    """A simulated annotator: more different words are better."""
    left, right = (len(set(question[side].split())) for side in ("left", "right"))
    return "tie" if left == right else "left" if left > right else "right"


# --- out --------------------------------------------------------------------------------------------------------------


def test_questions_are_blind_and_seeded(run, tmp_path):
    """The side says nothing about the order in the file, the id is by content, and nothing else is told."""
    said = candidates(tmp_path / "said.jsonl", prompts=300, count=2)
    run("export", f"--responses=[{said}]")
    asked = lines(tmp_path / "ask.jsonl")
    responses = {row["prompt"]: row["responses"] for row in lines(said)}
    assert 250 < len(asked) <= 300 and {frozenset(q) for q in asked} == {
        frozenset("id prompt left right label".split())
    }
    assert all(sorted((q["left"], q["right"])) == sorted(responses[q["prompt"]]) and q["label"] == "" for q in asked)
    first_left = np.mean([q["left"] == responses[q["prompt"]][0] for q in asked])
    assert abs(first_left - 0.5) < 4 * 0.5 / np.sqrt(len(asked))
    assert [q["prompt"] for q in asked] != sorted((q["prompt"] for q in asked), key=lambda p: int(p.split()[1]))
    # The same pairs, chosen and rejected told, in the other order: the same questions to the letter.
    pairs = [{"prompt": r["prompt"], "chosen": r["responses"][1], "rejected": r["responses"][0]} for r in lines(said)]
    out = ["--questions", str(tmp_path / "again.jsonl"), f"--pairs=[{write(tmp_path / 'pairs.jsonl', pairs)}]"]
    annotate.main(["export", *out])
    assert lines(tmp_path / "again.jsonl") == asked
    annotate.main(["export", "--seed=1", "--questions", str(tmp_path / "other.jsonl"), *out[2:]])
    other = {q["id"]: q for q in lines(tmp_path / "other.jsonl")}
    turned = np.mean([other[q["id"]]["left"] != q["left"] for q in asked])
    assert set(other) == {q["id"] for q in asked} and 0.3 < turned < 0.7


def test_which_pairs_of_candidates_are_asked_about(run, tmp_path):
    rows = [
        {"prompt": "p", "responses": ["a", "b", "a", " ", "c", "cut"], "finished": [True] * 5 + [False]},
        {"prompt": "q", "responses": ["x", "x"]},
        {"prompt": [{"role": "user", "content": "hi"}], "responses": ["d", "e"]},
    ]
    said = write(tmp_path / "said.jsonl", rows)

    def asked(*flags: str) -> list[tuple]:
        (tmp_path / "ask.jsonl").unlink(missing_ok=True)
        run("export", f"--responses=[{said}]", *flags)
        return [(json.dumps(q["prompt"]), frozenset((q["left"], q["right"]))) for q in lines(tmp_path / "ask.jsonl")]

    chat = json.dumps(rows[2]["prompt"])
    every = asked("--per_prompt=0")
    assert set(every) == {('"p"', frozenset(two)) for two in ("ab", "ac", "bc")} | {(chat, frozenset("de"))}
    assert len(asked("--per_prompt=0", "--unfinished=keep")) == 7
    counts = collections.Counter(prompt for prompt, _ in asked("--per_prompt=2"))
    assert counts == {'"p"': 2, chat: 1}
    assert {one for seed in range(12) for one in asked(f"--seed={seed}")} == set(every)  # one a prompt, any
    assert asked("--per_prompt=0", "--limit=2") == every[:2]


# --- in ---------------------------------------------------------------------------------------------------------------


def test_votes_become_pairs_and_what_cannot_be_used_is_counted(run, tmp_path, capsys):
    questions = [{"id": f"i{k}", "prompt": "p", "left": f"l{k}", "right": f"r{k}", "label": ""} for k in range(7)]
    write(tmp_path / "ask.jsonl", questions)
    ann = [
        *({"id": f"i{k}", "label": label} for k, label in enumerate(["left", "RIGHT ", "left", "left", "tie", ""])),
        {"id": "i3", "label": "right"},  # contradicts herself
        {"id": "i0", "label": "left"},  # repeats herself
        {"id": "nobody", "label": "left"},
        {"id": "i6", "label": "both"},
    ]
    write(tmp_path / "ann.jsonl", ann)
    (tmp_path / "more.csv").write_text("id,label,annotator\ni0,left,bob\ni0,right,eve\ni2,right,bob\ni1,tie,bob\n")
    run("import", f"--labels=[{tmp_path}/ann.jsonl, {tmp_path}/more.csv]", f"--out={tmp_path}/prefs.jsonl")
    base = {"prompt": "p", "source": "people"}
    rounded = lambda row: {k: round(v, 9) if isinstance(v, float) else v for k, v in row.items()}
    assert list(map(rounded, lines(tmp_path / "prefs.jsonl"))) == [
        base
        | {
            "id": "i0",
            "chosen": "l0",
            "rejected": "r0",
            "score_chosen": 0.666666667,
            "score_rejected": 0.333333333,
            "votes": 3,
        },
        base | {"id": "i1", "chosen": "r1", "rejected": "l1", "score_chosen": 0.75, "score_rejected": 0.25, "votes": 2},
    ]
    said = capsys.readouterr().out
    assert "8 labels of 3 annotators for 4 of 7 questions: 2 pairs, 2 ties" in said
    assert "two annotators of a question agree in 20 % of 5 cases" in said
    assert "not used: 1 × no label" in said
    assert "not used: 1 × contradictory labels of one annotator (i3 by ann)" in said
    assert f"not used: 1 × id of no question ({tmp_path}/ann.jsonl:9)" in said.replace("\n", "")
    assert f"not used: 1 × a label other than left, right, tie ({tmp_path}/ann.jsonl:10)" in said.replace("\n", "")
    pairs, _ = data.load_pairs([str(tmp_path / "prefs.jsonl")])
    assert (pairs[0].id, pairs[0].chosen, pairs[0].source) == ("i0", "l0", "people")
    np.testing.assert_allclose(pairs[0].scores, (2 / 3, 1 / 3))


def test_a_circle_in_peoples_preferences_is_counted_and_stays(run, tmp_path, capsys):
    two = [("a", "b"), ("b", "c"), ("c", "a")]
    write(tmp_path / "ask.jsonl", [{"id": x + y, "prompt": "p", "left": x, "right": y} for x, y in two])
    write(tmp_path / "ann.jsonl", [{"id": x + y, "label": "left"} for x, y in two])
    run("import", f"--labels=[{tmp_path}/ann.jsonl]", f"--out={tmp_path}/prefs.jsonl")
    assert "1 of 1 triples of responses, all compared and none tied, are intransitive" in capsys.readouterr().out
    assert [(row["chosen"], row["rejected"]) for row in lines(tmp_path / "prefs.jsonl")] == two


# --- the round trip ---------------------------------------------------------------------------------------------------


def test_from_candidates_by_labels_to_a_trained_model(run, tiny, tiny_config, tmp_path):
    """export → simulated annotators, one of whom errs at times → import → a preference model; labels are the
    majority's."""
    said = candidates(tmp_path / "said.jsonl")
    run("export", f"--responses=[{said}]", "--per_prompt=2")
    asked = lines(tmp_path / "ask.jsonl")
    rng, flip = np.random.default_rng(1), {"left": "right", "right": "left", "tie": "tie"}
    write(tmp_path / "ask-filled.jsonl", [q | {"label": judged(q)} for q in asked])
    for name in ("bob", "eve"):
        labels = [(q["id"], flip[judged(q)] if rng.random() < 0.2 else judged(q)) for q in asked]
        write(tmp_path / f"{name}.jsonl", [{"id": i, "label": label} for i, label in labels])
    files = ", ".join(str(tmp_path / f"{name}.jsonl") for name in ("ask-filled", "bob", "eve"))
    run("import", f"--labels=[{files}]", f"--out={tmp_path}/prefs.jsonl")
    pairs = lines(tmp_path / "prefs.jsonl")
    ties = sum(judged(q) == "tie" for q in asked)
    assert len(pairs) == len(asked) - ties > 60
    better = lambda row: len(set(row["chosen"].split())) > len(set(row["rejected"].split()))
    assert np.mean([better(row) for row in pairs]) > 0.9  # the majority of three
    assert {round(row["score_chosen"], 3) for row in pairs} == {0.667, 1.0}
    config = configs.parse(
        RewardModelConfig,
        [
            "--kind=preference_head",
            f"--run.dir={tmp_path / 'run'}",
            f"--model.path={tiny / 'model'}",
            "--model.weights=random",
            f"--data.pairs=[{tmp_path / 'prefs.jsonl'}]",
            "--data.validation=0.2",
            "--data.max_length=96",
            "--data.max_prompt_length=24",
            "--optimizer.batch_size=16",
            "--optimizer.learning_rate=3e-3",
            "--run.compilation_cache=off",
            "--mesh.fsdp=1",
        ],
    )
    reward_model.train(config)
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert sum(one["pairs"] for one in found["calibration"]) >= 10 and np.isfinite(found["validation/loss"])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "error: got nothing, expected export or import as the first word."),
        (["exprt"], "error: got ['exprt'], expected export or import as the first word."),
        (["export"], "error: responses and pairs are both empty, expected at least one file to ask about."),
        (["import"], "error: labels is () and out '', expected files of labels, and a new file."),
        (["import", "--labels=[{0}/ask.jsonl]", "--out={0}/said.jsonl"], "error: out: {0}/said.jsonl exists, expected"),
        (["export", "--questions={0}/said.jsonl"], "error: questions: {0}/said.jsonl exists, expected a new file."),
        (
            ["import", "--questions={0}/said.jsonl", "--labels=[{0}/said.jsonl]", "--out={0}/o.jsonl"],
            "error: {0}/said.jsonl:1: got no id, expected a question with id, prompt, left and right, as `sera",
        ),
        (
            ["import", "--questions={0}/one.jsonl", "--labels=[{0}/one.jsonl]", "--out={0}/o.jsonl"],
            "error: no label of {0}/one.jsonl makes a pair, expected left, right, tie for ids of {0}/one",
        ),
        (
            ["export", "--responses=[{0}/said.jsonl]"],
            "error: there is no prompt with two different responses, expected",
        ),
    ],
)
def test_refusals(tmp_path, args, said):
    write(tmp_path / "said.jsonl", [{"prompt": "p", "responses": ["a", "a"]}])
    write(tmp_path / "one.jsonl", [{"id": "i", "prompt": "p", "left": "a", "right": "b", "label": ""}])
    base = [] if any("--questions" in arg for arg in args) else [f"--questions={tmp_path / 'ask.jsonl'}"]
    with pytest.raises(SystemExit) as ended:
        annotate.main([*args[:1], *base, *(arg.format(tmp_path) for arg in args[1:])] if args else [])
    assert str(ended.value).startswith(said.format(tmp_path))
