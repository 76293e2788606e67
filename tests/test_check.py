"""train.check: what `--data.check true` says of data whose faults are known; nothing but the data is touched."""

import json

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sera_jax import config, data, hf, metrics, policies, run
from sera_jax import mesh as meshes
from sera_jax.records import Pair, Prompt, Tree
from sera_jax.train import check, loop


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def ask(tiny, tmp_path, monkeypatch, capsys):
    """flags → (what the door printed, exit code). Weights, devices and run folder raise when they are touched."""

    def untouched(*args, **kwargs):
        raise AssertionError("a check touched more than the data")

    for module, name in (
        (meshes, "make"),
        (policies, "open_folder"),
        (run, "open_run"),
        (hf, "load"),
        (hf, "read_arch"),
    ):
        monkeypatch.setattr(module, name, untouched)
    for name in ("jit", "devices", "device_put"):
        monkeypatch.setattr(jax, name, untouched)
    monkeypatch.setattr(metrics, "_console", lambda: metrics.rich.console.Console(width=200, force_terminal=False))

    def run_door(*flags: str) -> tuple[str, int | str]:
        base = [f"--run.dir={tmp_path / 'run'}", f"--model.path={tiny / 'model'}", "--data.check=true"]
        base += ["--data.max_length=24", "--data.max_prompt_length=12"]
        code: int | str = 0
        try:
            loop.main([*base, *flags])
        except SystemExit as stop:
            code = stop.code
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().out, code

    return run_door


def pair(i: int, prompt: str, chosen: str, rejected: str, **more) -> dict:
    return {"id": f"x{i}", "prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


FAULTY = [
    pair(0, "the dog", "sits on the box", "runs", score_chosen=3, score_rejected=1),
    pair(1, "the dog", "sits on the box", "runs", score_chosen=1, score_rejected=2),  # again, with a negative gap
    pair(2, "the dog", "runs", "sits on the box", score_chosen=1, score_rejected=1),  # the other way round
    pair(3, "the cat", "the cat sits", "the cat runs"),  # full texts beside their prompt
    pair(4, "a ball", "red", "red"),
    pair(5, "a ball", "", "red"),
    pair(6, "a ball", "blue " * 30, "red"),  # cut
    pair(7, "red " * 20, "big", "small or big"),  # its prompt is not cut: with the longer response it has 24
]


def test_a_check_finds_what_is_wrong(ask, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", FAULTY)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "A  Ball"}, {"prompt": "it was"}])
    sft = write(tmp_path / "sft.jsonl", [{"prompt": "it was", "completion": "big"}, {"prompt": "to", "completion": ""}])
    held = [{"id": "e0", "prompt": "The dog"}, {"id": "e1", "prompt": "a ball"}, {"id": "e2", "prompt": "it was"}]
    held = write(tmp_path / "held.jsonl", held + [{"id": "e3", "prompt": "in the box"}])
    out, code = ask(
        f"--data.pairs=[{pairs}]",
        f"--data.prompts=[{prompts}]",
        "--sft.epochs=1",
        f"--sft.data=[{sft}]",
        f"--evaluate.prompts=[{held}]",
        "--evaluate.function=no_such_module:is_imported",
    )
    lines = out.splitlines()
    assert code == 0
    for line in (
        f"{pairs}: 6 pairs of 8 rows, format explicit",
        "  not used: 1 × chosen and rejected are identical (pairs:5)",
        "  not used: 1 × empty chosen (pairs:6)",
        "  cut: 0 prompts, 1 responses (these have no EOS)",
        "1 pairs say the same as an earlier pair (x1)",
        "1 pairs prefer what an earlier pair of the same prompt rejects (x2)",
        "1 pairs have responses that begin with their prompt (full texts need no prompt column) (x3)",
        "5 pairs have no white space between prompt and response (they are joined as they are) (x0, x1, x2, x3, x6)",
        "the chosen response is the longer one in 58.3% of the pairs (equal: half)",  # 3 of 6, and one equal
        "3 pairs have scores, 3 have none; chosen - rejected is negative in 1, zero in 1",
        f"{sft}: 1 texts of 2 rows, format completion",
        "  not used: 1 × empty response (sft:2)",
        f"{prompts}: 2 prompts of 2 rows, format prompt",
        f"{held}: 4 prompts of 4 rows, format prompt",
        "2 of 4 prompts stand in data.pairs too (e0, e1)",
        "2 of 4 prompts stand in data.prompts too (e1, e2)",
        "1 of 4 prompts stand in sft.data too (e2)",
        "irm: the pairs have what it needs",
    ):
        assert line in lines, line
    heads = [lines.index(key) for key in ("data.pairs", "select.score", "data.prompts", "sft.data", "evaluate.prompts")]
    assert heads == sorted(heads)
    # Lengths with EOS: the chosen responses of x0, x1, x2, x3, x6, x7.
    chosen = [5, 5, 2, 4, 31, 2]
    cells = lambda start: next(line for line in lines if line.startswith(start)).removeprefix(start).split()
    want = [np.mean(chosen), *np.quantile(chosen, [0.05, 0.25, 0.5, 0.75, 0.95, 1])]
    np.testing.assert_allclose([float(cell) for cell in cells("  chosen    ")], want, rtol=1e-3)
    assert cells("  chosen - rejected") == ["0.3333", "-0.9", "-0.5", "0", "1", "1.8", "2"]
    # Two examples: the first that is whole, the longest as it will be trained on.
    examples = [i for i, line in enumerate(lines) if line.startswith("example ")]
    shown = [lines[i : i + 3] for i in examples]
    assert shown[0] == [
        "example x0, in tokens: prompt 2, chosen 5, rejected 2",
        "  prompt   │the│ dog│",
        "  chosen   │ sits│ on│ the│ box│EOS  </s>│",
    ]
    assert shown[1][0] == "example x6, in tokens: prompt 2, chosen 22, rejected 2" and len(shown) == 2
    assert shown[1][2].endswith("│ blue│ (cut: no EOS)│")


def test_a_part_that_cannot_be_used_is_named_at_the_end(ask, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", FAULTY)
    empty = write(tmp_path / "empty.jsonl", [{"prompt": " "}])
    out, code = ask(f"--data.pairs=[{pairs}]", f"--data.prompts=[{empty}]", "--select.score=annotator_gap")
    assert "1 pairs say the same as an earlier pair (x1)" in out
    for said in (
        "select.score 'annotator_gap' needs the annotator's scores, but 3 of 6 pairs have none, the first 'x3'.",
        "no usable prompts in",
        "1 × empty prompt (empty:1)",
    ):
        assert said in out and said in code
    assert code.startswith("error: data.check: select.score: select.score 'annotator_gap' needs")
    # pairs that are no good do not keep the rest from being looked at
    out, code = ask(f"--data.pairs=[{empty}]", f"--data.prompts=[{pairs}]")
    assert code.startswith("error: data.check: data.pairs: ") and "cannot tell the form of the data" in code
    assert f"{pairs}: 4 prompts of 8 rows, format explicit" in out


def test_every_key_of_the_data_is_asked(ask, tmp_path):
    """The form, the rule and its seed, the subset, the limit, the held-out share: as a run would have them."""
    turn = {"prompt": "the dog", "responses": ["sits", "runs", "sees"], "scores": [2, 1, 0]}
    rows = [{**turn, "prompt": f"the {word}"} for word in ("dog", "cat", "ball", "box")]
    for part, some in (("part", rows), ("other", rows[:1])):
        (tmp_path / "set" / part).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / "set" / part / "train.parquet")
    flags = (f"--data.pairs=[{tmp_path / 'set'}]", "--data.subset=part", "--data.format=ranked")
    assert "4 pairs of 4 rows, format ranked" in ask(*flags)[0]
    assert "11 pairs of 4 rows, format ranked" in ask(*flags, "--data.ranked=all_pairs", "--data.limit=11")[0]
    out, code = ask(*flags, "--data.ranked=all_pairs", "--data.validation=0.2")
    assert "12 pairs of 4 rows, format ranked" in out and "9 pairs to train on, 3 held out" in out and code == 0
    first = lambda out: [line for line in out.splitlines() if line.startswith("example ")][0]
    seeded = {first(ask(*flags, "--data.ranked=random", f"--run.seed={seed}")[0]) for seed in range(8)}
    assert len(seeded) > 1
    assert "expected info, two summaries and choice (tldr)" in ask(*flags, "--data.format=tldr")[1]
    out, code = ask(*flags, "--data.ranked=best_each", "--loop.parts=easy_first")
    assert "easy_first: 3, 3, 2 pairs by iteration" in out and code == 0
    out, code = ask(*flags, "--loop.parts=sources")
    assert "loop.parts: loop.parts is 'sources': got pairs of 1 sources" in str(code)


LABELLED = [
    {"prompt": "the dog", "completion": "sits on the box", "label": True},
    {"prompt": "the dog", "completion": "sits on the box", "label": True},  # again
    {"prompt": "the dog", "completion": "sits on the box", "label": False},  # the other way round
    {"prompt": "the cat", "completion": "the cat runs", "label": False},
    {"prompt": "a ball", "completion": " ", "label": True},
    {"prompt": "a ball", "completion": "red", "label": "yes"},
    {"prompt": "a ball", "completion": "red " * 30, "label": False},  # cut
    {"prompt": "a box", "completion": "big", "label": True},
]
KTO = ("--loss.name=kto", "--loop.iterations=1")


def test_labelled_responses(ask, tmp_path):
    path = write(tmp_path / "l.jsonl", LABELLED)
    held = write(tmp_path / "held.jsonl", [{"id": "e0", "prompt": "the dog"}])
    flags = (f"--data.pairs=[{path}]", f"--evaluate.prompts=[{held}]", "--evaluate.function=no_such_module:no")
    out, code = ask(*KTO, "--loss.undesirable_weight=0.5", *flags)
    lines = out.splitlines()
    assert code == 0
    for line in (
        f"{path}: 6 examples of 8 rows, format unpaired",
        "  not used: 1 × empty completion (l:5)",
        "  not used: 1 × label is str, expected true or false (l:6)",
        "  cut: 0 prompts, 1 responses (these have no EOS)",
        "3 desirable and 3 undesirable examples, weights 1 and 0.5: 2 : 1 by weight (between 1 and 4/3 is advised)",
        # 5, 5 and 2 tokens with EOS against 5, 4 and 22
        "a desirable response is longer than an undesirable one in 33.3% of the cases (equal: half)",
        "1 examples say the same as an earlier example (l:2)",
        "1 examples have another label than an earlier example of the same prompt and completion (l:3)",
        "1 examples have a completion that begins with its prompt (full texts need no prompt column) (l:4)",
        "6 examples have no white space between prompt and response (they are joined as they are) "
        "(l:1, l:2, l:3, l:4, l:7, …)",
        "example l:1, in tokens: prompt 2, desirable 5",
        "  prompt    │the│ dog│",
        "  desirable │ sits│ on│ the│ box│EOS  </s>│",
        "example l:7, in tokens: prompt 2, undesirable 22",
        "kto: every example finds a completion of another prompt",
        "1 of 1 prompts stand in data.pairs too (e0)",
    ):
        assert line in lines, line
    assert not any("select.score" in line or "scores" in line for line in lines)
    # Pairs are two examples each; too many of one prompt are found with everything else looked at.
    pairs = write(tmp_path / "p.jsonl", FAULTY[:3] + FAULTY[6:7])
    out, code = ask(*KTO, f"--data.pairs=[{pairs}]", f"--evaluate.prompts=[{held}]", "--evaluate.function=no:no")
    assert "8 examples of 4 rows, format explicit" in out and "1 of 1 prompts stand in data.pairs too (e0)" in out
    assert code.startswith(
        "error: data.check: loss.name: data.pairs: 6 of 8 examples have the same prompt, expected at"
    )
    assert "(x1/chosen, x1/rejected)" in out and "(x2/chosen, x2/rejected)" in out
    rows = [{"prompt": f"the {word}", "completion": "sits", "label": True} for word in ("dog", "cat", "ball", "box")]
    path = write(tmp_path / "four.jsonl", rows)
    out, code = ask(*KTO, f"--data.pairs=[{path}]", "--data.validation=0.5")
    assert "2 examples to train on, 2 held out" in out and "a desirable response is longer" not in out and code == 0
    out, code = ask(*KTO, f"--data.pairs=[{path}]", "--data.validation=0.25")
    assert code.startswith("error: data.check: loss.name: data.validation: 1 of 1 examples have the same prompt")
    # APO asks for no completions of other prompts.
    out, code = ask("--loss.name=apo_zero_unpaired", *KTO[1:], f"--data.pairs=[{path}]", "--data.validation=0.25")
    assert "3 examples to train on, 1 held out" in out and "another prompt" not in out and code == 0


def test_an_accelerator_is_left_alone(ask, tiny, monkeypatch):
    """Whatever asks for devices, as printing does, finds the CPU chosen: another job may hold the others."""
    before = jax.config.jax_platforms
    asked = []
    monkeypatch.setattr(jax, "process_index", lambda: asked.append(jax.config.jax_platforms) or 0)
    jax.config.update("jax_platforms", "some_accelerator")
    try:
        out, code = ask(f"--data.pairs=[{tiny / 'pairs.jsonl'}]")
    finally:
        jax.config.update("jax_platforms", before)
    assert code == 0 and "44 pairs of 44 rows, format explicit" in out
    assert len(asked) > 10 and set(asked) == {"cpu"}


def test_prompts_alone(ask, tiny):
    """Runs on the policy's own samples need no pairs."""
    flags = ("--on_policy.algorithm=policy_gradient", "--reward.source=random")
    said, code = ask(*flags, f"--data.prompts=[{tiny}/prompts.jsonl]")
    assert code == 0 and "20 prompts of 20 rows" in said and "\ndata.pairs" not in said


def test_only_training_has_this_mode():
    with pytest.raises(
        config.ConfigError, match=r"flags: data.check is True, but only sera_jax.train has this mode; l"
    ):
        config.parse(
            config.ReviewConfig, ["--policy=a", "--reference=b", "--out=o", "--data.pairs=[p]", "--data.check=true"]
        )


def test_findings_by_brute_force():
    rng = np.random.default_rng(0)
    pairs = [Pair(str(i), *(str(n) for n in rng.integers(0, 3, 3))) for i in range(60)]
    found = check.of_pairs(pairs, {"chosen": rng.integers(1, 4, 50), "rejected": rng.integers(1, 4, 50)})
    said = [(p.prompt, p.chosen, p.rejected) for p in pairs]
    assert found["pairs/repeated"] == [str(i) for i, s in enumerate(said) if s in said[:i]]
    assert found["pairs/contradicting"] == [str(i) for i, (p, c, r) in enumerate(said) if (p, r, c) in said[:i]]
    assert 5 < len(found["pairs/repeated"]) < 55 and len(found["pairs/contradicting"]) > 5
    assert found["pairs/without scores"] == 60 and len(found["gaps"]) == 0
    told = lambda *texts: check.of_pairs([Pair("a", *texts)], {"chosen": np.ones(1), "rejected": np.ones(1)})
    for texts, touching in ((("a", "b", " c"), ["a"]), (("a", " b", "\nc"), []), (("a\n", "b", "c"), [])):
        assert told(*texts)["pairs/touching"] == touching and told(*texts)["pairs/with their prompt"] == []
    assert told("a", "a b", " a c")["pairs/with their prompt"] == ["a"]
    assert told("a", "a b", "c")["pairs/with their prompt"] == []
    chat = ({"role": "user", "content": "What\nnow?"},)
    prompts = [Prompt("a", chat), Prompt("b", "\n\nHuman: what now?\n\nAssistant:"), Prompt("c", "what")]
    assert told(chat, chat, chat)["pairs/touching"] == told(chat, chat, chat)["pairs/with their prompt"] == []
    assert check.overlap(prompts, ["What now?", ""]) == ["a", "b"]
    assert check.overlap([Prompt("d", "x")], [""]) == []


def test_the_tokens_of_an_example(shared_data):
    """Joined, the pieces are the text, whatever the tokeniser: bytes, or pieces that carry their space."""
    for name in ("gpt2", "llama2"):
        path = str(shared_data / "tokenizers" / name)
        tokenizer = data.load_tokenizer(path)
        prompt, response = "\n\nHuman: The 日本 café?\n\nAssistant:", " It is\n\n  open 😀."
        (tree,), _ = data.tokenise_pairs(
            [Pair("a", prompt, response, "no")], tokenizer, (2,), max_length=99, max_prompt_length=98
        )
        lines = check.example(tree, tokenizer, (2,))
        ids = tree.prompt.tolist()
        shown = lines[1].removeprefix("  prompt   │").removesuffix("│").split("│")
        assert len(shown) == len(ids) and shown[-1] == ":" and "│".join(shown).count("\\n") == 4
        assert (shown[0] == "BOS <s>") == (name == "llama2") and "│ The│" in lines[1]
        shown = lines[2].removeprefix("  chosen   │").removesuffix("│").split("│")
        assert shown[0] == " It" and shown[-1].startswith("EOS ") and len(shown) == len(tree.branches[0])
    long = Tree("b", np.arange(3, 300), (np.array([5, 2]), np.array([6])))
    lines = check.example(long, tokenizer, (2,))
    assert " … 257 tokens … " in lines[1] and lines[1].count("│") == 42
    assert lines[3].endswith("│ (cut: no EOS)│")
