"""data: reading, tokenising, order. Witnesses: transformers' own chat templating and decoding, files, brute force."""

import gzip
import json
import os
import pathlib
import typing

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import transformers

from sera_jax import config, data
from sera_jax.records import Pair, Prompt, Tree, Truth, Unpaired

SHARED = (
    pathlib.Path(os.environ.get("SERA_JAX_SHARED", pathlib.Path(__file__).resolve().parents[2] / "shared")) / "data"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)
WIDE = dict(max_length=10_000, max_prompt_length=5_000)


def shared(name: str) -> pathlib.Path:
    if not (SHARED / name).exists():
        pytest.skip(f"no {name} in {SHARED} (set SERA_JAX_SHARED)")
    return SHARED / name


def save(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, **tokens) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def bytelevel(
    folder: pathlib.Path, specials: tuple[str, ...] = ("<|end|>",), merges: tuple[tuple[str, str], ...] = (), **tokens
) -> str:
    """GPT-2's kind: bytes and a few merges, no BOS of its own."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("l", "l"), *merges]
    vocab = {piece: i for i, piece in enumerate(alphabet + [a + b for a, b in merges])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return save(folder, tokenizer, **{"bos_token": "<|end|>", "eos_token": "<|end|>", **tokens})


def piecelike(
    folder: pathlib.Path, *, adds_bos: bool = True, merges: tuple[tuple[str, str], ...] = (), **tokens
) -> str:
    """Llama 2's kind: a space before every text, byte pieces for what has none."""
    merges = (("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("▁", "S"), *merges)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127))]
    pieces += sorted({p for pair in merges for p in pair} - set(pieces) - {a + b for a, b in merges})
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces + [a + b for a, b in merges]))}
    kind = dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges), **kind))
    normal, decode = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    tokenizer.decoder = decode.Sequence(
        [decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if adds_bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return save(folder, tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **tokens})


def write(path: pathlib.Path, rows: list) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    content = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def row(i: int, **more) -> dict:
    return {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}", **more}


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def decoded(tokenizer, tree: Tree, branch: int = 0) -> str:
    ids = [*tree.prompt.tolist(), *tree.branches[branch].tolist()]
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# Reading


def test_formats_are_pinned_to_the_config():
    assert ("auto", *data.UNPAIRED) == typing.get_args(config.FormatName)
    assert set(data.FORMATS) == set(data.UNPAIRED) - {"unpaired"}


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "a.parquet.gz", "lines.json"]
)
def test_files_of_all_kinds_give_the_same_pairs(tmp_path, name):
    rows = [row(i, score_chosen=1.5, score_rejected=i, weight=0.5) for i in range(40)]
    path = tmp_path / name
    if "parquet" in name:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "plain")
        content = (tmp_path / "plain").read_bytes()
    elif "a.json" in name and "jsonl" not in name:
        content = json.dumps(rows, indent=1).encode()
    else:
        content = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    pairs, report = data.load_pairs([str(path)])
    stem = name.split(".")[0]
    assert pairs[3] == Pair(f"{stem}:4", "question 3", "good 3", "bad 3", (1.5, 3.0), 0.5, stem)
    assert [p.prompt for p in pairs] == [f"question {i}" for i in range(40)]
    assert report.files == ((str(path), "explicit", 40, 40),) and not report.dropped
    assert report.lines() == [f"{path}: 40 pairs of 40 rows, format explicit"]


def test_datasets_folders_and_splits(tmp_path):
    table = datasets.Dataset.from_list([row(i) for i in range(5)])
    table.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": table, "held": table.select([1])}).save_to_disk(tmp_path / "both")
    assert len(data.load_pairs([tmp_path / "single"])[0]) == 5
    (held,), _ = data.load_pairs([tmp_path / "both"], split="held")
    assert (held.id, held.prompt) == ("both:1", "question 1")
    with pytest.raises(ValueError, match=r"both: got data.split='test'; expected one of train, held\."):
        data.load_pairs([tmp_path / "both"], split="test")
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    parts = {"train-00000-of-00002": [0, 1], "train-00001-of-00002-ab": [2], "test-00000-of-00001": [3]}
    for name, rows in parts.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(i) for i in rows]), hub / f"{name}.parquet")
    pairs, report = data.load_pairs([tmp_path / "hub"])
    assert [(p.id, p.prompt) for p in pairs] == [(f"hub:{i + 1}", f"question {i}") for i in range(3)]
    assert len(data.load_pairs([tmp_path / "hub"], split="test")[0]) == 1
    with pytest.raises(ValueError, match=r"hub: got data.split='dev'; expected one of test, train\."):
        data.load_pairs([tmp_path / "hub"], split="dev")
    for subset, i in (("helpful", 7), ("harmless", 8)):
        (tmp_path / "parts" / subset).mkdir(parents=True)
        part = tmp_path / "parts" / subset / "train-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(i)]), part)
    table.save_to_disk(tmp_path / "parts" / "saved")
    for subset, prompts in (("harmless", ["question 8"]), ("saved", [f"question {i}" for i in range(5)])):
        pairs, _ = data.load_pairs([tmp_path / "parts"], subset=subset)
        assert [p.prompt for p in pairs] == prompts and pairs[0].id == "parts:1"
    with pytest.raises(
        ValueError, match=r"parts: got data.subset='all'; expected one of its folders \(harmless, helpful, saved\)\."
    ):
        data.load_pairs([tmp_path / "parts"], subset="all")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"void: got a folder without dataset_dict.json, state.json or .parquet files"):
        data.load_pairs([tmp_path / "void"])


def test_hub_names_fetch_data_only(monkeypatch):
    asked = []

    def fake(*names, **options):
        asked.append((names, options))
        if names == ("owner/gone",):
            raise FileNotFoundError("not there")
        return datasets.Dataset.from_list([row(0)])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert data.load_pairs(["owner/name"], split="train_prefs")[0][0].id == "name:1"
    data.load_pairs(["owner/name"], subset="comparisons")
    data.load_prompts(["owner/name"], subset="comparisons")
    (owner, with_subset) = ("owner/name",), ("owner/name", "comparisons")
    assert asked == [  # trust_remote_code is never passed
        (owner, {"split": "train_prefs"}),
        (with_subset, {"split": "train"}),
        (with_subset, {"split": "train"}),
    ]
    with pytest.raises(ValueError, match=r"owner/gone: no such local file or folder, and the hub gave: FileNotF"):
        data.load_pairs(["owner/gone"])


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(
        ValueError, match=r"nothing.jsonl: no such file or folder \(looked in .*expected a file \(.json"
    ):
        data.load_pairs([tmp_path / "nothing.jsonl"])
    (tmp_path / "a.tsv").write_text("x")
    with pytest.raises(
        ValueError, match=r"a.tsv: got a file with extension '.tsv'; expected .jsonl, .json, .parquet, .csv, each also"
    ):
        data.load_pairs([tmp_path / "a.tsv"])
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"got a file with extension '.pkl'"):
        data.load_pairs([tmp_path / "a.pkl"])
    whole = gzip.compress(b"\n".join(json.dumps(row(i)).encode() for i in range(2000)))
    damaged = {"cut.jsonl.gz": whole[: len(whole) // 2], "fake.jsonl.gz": b"{}", "fake.parquet": b"PAR"}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: cannot be read to its end, it is damaged or not what its ext"):
            data.load_pairs([tmp_path / name])
    with pytest.raises(ValueError, match=r"pairs: got 'a.jsonl'; expected a list of files"):
        data.load_pairs("a.jsonl")
    with pytest.raises(ValueError, match=r"data.format: got 'trl'; expected auto, explicit, conversational, hh, imp"):
        data.load_pairs([tmp_path / "a.tsv"], format="trl")


def test_bad_rows_cost_only_themselves(tmp_path):
    bad = {
        '{"prompt": "x", "chosen"': "broken JSON",
        "[" * 100_000: "broken JSON",
        "[1, 2]": "not a JSON object",
        '{"prompt": "x", "chosen": "y"}': "missing column 'rejected'",
        json.dumps(row(0, prompt=" \n")): "empty prompt",
        json.dumps(row(0, chosen="")): "empty chosen",
        json.dumps(row(0, rejected=" ")): "empty rejected",
        json.dumps(row(0, rejected="good 0")): "chosen and rejected are identical",
        json.dumps(row(0, chosen=3)): "chosen is int, expected text",
        json.dumps(row(0, weight="x")): "weight is str, expected a number",
        json.dumps(row(0, weight=-1)): "weight is not a finite number of 0 or more",
        json.dumps(row(0, id=[1])): "id is list, expected text or an integer",
        '{"prompt": "x", "chosen": "\\ud800", "rejected": "z"}': "chosen is not valid Unicode (a lone surrogate)",
        '{"prompt": "\udc80", "chosen": "x", "rejected": "y"}': "not UTF-8",
    }
    good = [row(i) for i in range(6)]
    path = write(tmp_path / "mixed.jsonl", ["\ufeff" + json.dumps(good[0]), "", *bad, *good[1:]])
    pairs, report = data.load_pairs([path])
    assert [p.prompt for p in pairs] == [g["prompt"] for g in good]
    assert pairs[1].id == f"mixed:{len(bad) + 3}"  # lines of the file, the blank one counted
    dropped = {reason: (count, places) for reason, count, places in report.dropped}
    assert dropped.pop("broken JSON") == (2, ("mixed:3", "mixed:4"))
    assert dropped == {r: (1, (f"mixed:{n}",)) for n, r in enumerate(bad.values(), 3) if r != "broken JSON"}
    assert report.rows == 20 and report.usable == 6
    assert report.lines()[:2] == [
        f"{path}: 6 pairs of 20 rows, format explicit",
        "  not used: 2 × broken JSON (mixed:3, mixed:4)",
    ]


def test_many_bad_rows_show_the_first_places(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(0), *(["{"] * 9)])
    assert data.load_pairs([path])[1].lines()[1] == "  not used: 9 × broken JSON (a:2, a:3, a:4, a:5, a:6, …)"


def test_nothing_usable_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(0, chosen=""), row(1, chosen="")])
    with pytest.raises(
        ValueError,
        match=r"no usable pairs in .*a.jsonl as explicit. Got 2 rows: 2 × empty chosen \(a:1, a:2\); expected prompt",
    ):
        data.load_pairs([path])
    path = write(tmp_path / "b.jsonl", [{"question": "x", "answer": "y"}])
    with pytest.raises(
        ValueError, match=r"b.jsonl: cannot tell the form .* Got columns answer, question; expected pro"
    ):
        data.load_pairs([path])
    with pytest.raises(ValueError, match=r"c.jsonl: cannot tell the form .* Got no row; expected"):
        data.load_pairs([write(tmp_path / "c.jsonl", ["{"])])
    path = write(tmp_path / "d.jsonl", [row(0)])
    with pytest.raises(ValueError, match=r"as hh. Got 1 rows: 1 × no .*Assistant:\" in chosen.*Give data.format"):
        data.load_pairs([path], format="hh")


def test_hh_transcripts(tmp_path):
    head = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
    rows = [
        {"chosen": head + " yes", "rejected": head + " no", "subset": "helpful-base"},
        {"chosen": head + " yes", "rejected": "\n\nHuman: else\n\nAssistant: no"},
        {"chosen": head + " yes", "rejected": "no transcript"},
        {"chosen": head + " ", "rejected": head + " no"},
    ]
    pairs, report = data.load_pairs([write(tmp_path / "hh.jsonl", rows)])
    assert pairs == [Pair("hh:1", head, " yes", " no", source="helpful-base")]
    assert report.files[0][1] == "hh"
    assert {r for r, _, _ in report.dropped} == {
        "chosen and rejected have different prompts",
        'no "\\n\\nAssistant:" in rejected',
        "empty chosen",
    }
    assert data.load_prompts([tmp_path / "hh.jsonl"])[0] == [Prompt("hh:1", head)]


def test_conversational_forms_mean_the_same(tmp_path):
    user, system = turn("user", "hi"), turn("system", "be kind")
    good, bad = turn("assistant", "hello"), turn("assistant", "go away")
    same = [
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "hi", "chosen": [user, good], "rejected": [user, bad]},  # as ultrafeedback_binarized
        {"prompt": "hi", "chosen": [good], "rejected": [bad]},
        {"prompt": [user], "chosen": [user, good], "rejected": [user, bad]},
        {"prompt": [user], "chosen": "hello", "rejected": "go away"},
        {"prompt": [user], "chosen": [{**good, "tool_calls": None}], "rejected": [bad]},
    ]
    pairs, report = data.load_pairs([write(tmp_path / "same.jsonl", same)])
    assert {(p.prompt, p.chosen, p.rejected) for p in map(_hashable, pairs)} == {
        (("user: hi",), ("assistant: hello",), ("assistant: go away",))
    }
    assert len(pairs) == len(same) and report.files[0][1] == "conversational"
    deep = {
        "prompt": "hi",
        "chosen": [system, user, good, user, good],
        "rejected": [system, user, good, user, bad],
    }
    (pair,), _ = data.load_pairs([write(tmp_path / "deep.jsonl", [deep])])
    assert pair.prompt == (system, user, good, user) and pair.rejected == (bad,)
    # multi-turn answers: what is common goes to the prompt
    (pair,), _ = data.load_pairs(
        [write(tmp_path / "m.jsonl", [{"prompt": [user], "chosen": [good, user, good], "rejected": [good, user, bad]}])]
    )
    assert pair.prompt == (user, good, user) and pair.chosen == (good,)
    wrong = {
        "chosen and rejected have different prompts": {"chosen": [user, good], "rejected": [system, user, bad]},
        "the last message of chosen is not the assistant's": {"chosen": [user], "rejected": [user, bad]},
        "empty chosen": {"prompt": "hi", "chosen": [], "rejected": [bad]},
        "empty prompt": {"prompt": [], "chosen": [good], "rejected": [bad]},
        'a message of chosen is not {"role": text, "content": text}': {"chosen": [{"role": "user"}], "rejected": [bad]},
        "chosen and rejected are identical": {"prompt": "hi", "chosen": [good], "rejected": [good]},
    }
    _, report = data.load_pairs([write(tmp_path / "wrong.jsonl", [*same, *wrong.values()])])
    assert {reason for reason, _, _ in report.dropped} == set(wrong)


def _hashable(pair: Pair) -> Pair:
    flat = [tuple(f"{t['role']}: {t['content']}" for t in text) for text in (pair.prompt, pair.chosen, pair.rejected)]
    return Pair(pair.id, *flat)


def test_format_is_the_one_of_most_first_rows_and_can_be_forced(tmp_path):
    head = "\n\nHuman: hi\n\nAssistant:"
    both = {"prompt": "hi", "chosen": head + " yes", "rejected": head + " no"}
    path = write(tmp_path / "a.jsonl", [both])
    assert data.load_pairs([path])[0][0].prompt == "hi"
    assert data.load_pairs([path], format="hh")[0][0].prompt == head
    path = write(tmp_path / "b.jsonl", [{"chosen": head + " yes", "rejected": head + " no"}, row(1), row(2), "{"])
    assert data.load_pairs([path])[1].files == ((path, "explicit", 2, 4),)


def test_ids_sources_scores_and_limit(tmp_path):
    rows = [
        row(0, id="x", source="s"),
        row(1, id="x", chosen_score=2, rejected_score=1, subset="t"),
        row(2, id=7, score_chosen=float("nan"), score_rejected=1.0),
        row(3, id="x", score_chosen=3.0),
        row(4, id="x#2"),
    ]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl.gz", [row(9), row(10)])
    pairs, report = data.load_pairs([a, b])
    assert [p.id for p in pairs] == ["x", "x#2", "7", "x#3", "x#2#2", "b:1", "b:2"]
    assert [p.source for p in pairs] == ["s", "t", "a", "a", "a", "b", "b"]
    assert [p.scores for p in pairs][:4] == [None, (2.0, 1.0), None, None]
    assert report.renamed == 3 and report.lines()[-1] == "  3 ids were taken already and got a suffix (#2, #3, …)"
    assert [p.id for p in data.load_pairs([a, b], limit=6)[0]] == [p.id for p in pairs[:6]]
    _, report = data.load_pairs([a, b], limit=2)
    assert report.files == ((a, "explicit", 2, 2),)  # the rest is not read


def test_what_is_known_behind_a_label(tmp_path):
    known = {"gold_chosen": 0.5, "gold_rejected": -1, "flipped": True, "cued": False, "upset": None, "author": "me"}
    odd = {"gold_chosen": 1.0, "flipped": "no", "author": {"name": "x"}}  # somebody else's columns
    pairs, report = data.load_pairs([write(tmp_path / "a.jsonl", [row(0, **known), row(1), row(2, **odd)])])
    assert [p.truth for p in pairs] == [Truth((0.5, -1.0), True, False, None, "me"), Truth(), Truth()]
    assert all(p.scores is None for p in pairs) and report.usable == 3


def test_candidates_of_a_file(tmp_path):
    chat = [turn("user", "hi")]
    rows = [
        {"id": "x", "prompt": "the", "responses": ["a", ""], "finished": [True, False], "lengths": [2, 1]},
        {"prompt": chat, "responses": ["b"], "rewards": [0.5], "scores": ["unread"]},
        {"prompt": "the", "responses": ["c"], "scores": [-1]},
    ]
    path = write(tmp_path / "c.jsonl", rows)
    found = data.load_responses(path, scored=False)
    assert [(r.prompt, r.texts, r.finished, r.scores) for r in found] == [
        ("the", ("a", ""), (True, False), None),
        (tuple(chat), ("b",), (True,), None),
        ("the", ("c",), (True,), None),
    ]
    assert [r.where for r in found] == [f"{path}:{n}" for n in (1, 2, 3)]
    scored = data.load_responses(write(tmp_path / "d.jsonl", rows[1:]), scored=True)
    assert [r.scores for r in scored] == [(0.5,), (-1,)]


@pytest.mark.parametrize(
    "line, scored, reason",
    [
        ("{", False, "broken JSON"),
        ("[1]", False, "not a JSON object"),
        ('{"responses": ["a"]}', False, "missing column 'prompt'"),
        ('{"prompt": " ", "responses": ["a"]}', False, "empty prompt"),
        ('{"prompt": "p"}', False, "responses is no list of texts"),
        ('{"prompt": "p", "responses": []}', False, "responses is no list of texts"),
        ('{"prompt": "p", "responses": ["a", null]}', False, "responses is no list of texts"),
        (
            '{"prompt": "p", "responses": ["a", "b"], "finished": [true]}',
            False,
            "finished is no list of 2 booleans, one for each response",
        ),
        (
            '{"prompt": "p", "responses": ["a"], "finished": ["stop"]}',
            False,
            "finished is no list of 1 booleans, one for each response",
        ),
        ('{"prompt": "p", "responses": ["a"]}', True, "no rewards and no scores, which reward.source 'file' needs"),
        (
            '{"prompt": "p", "responses": ["a"], "rewards": [NaN]}',
            True,
            "rewards is no list of 1 finite numbers, one for each response",
        ),
        (
            '{"prompt": "p", "responses": ["a", "b"], "scores": [1, true]}',
            True,
            "scores is no list of 2 finite numbers, one for each response",
        ),
    ],
)
def test_a_line_of_candidates_that_cannot_be_used_is_an_error(tmp_path, line, scored, reason):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "p", "responses": ["a"], "rewards": [1]}\n\n' + line + "\n")
    with pytest.raises(ValueError) as error:
        data.load_responses(str(path), scored=scored)
    assert str(error.value).startswith(f'{path}:3: {reason}; expected {{"prompt": text or messages, "responses": [')


def test_files_of_candidates_that_are_none(tmp_path):
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"c.jsonl has no rows, expected candidates. Check bootstrap.candidates_file."):
        data.load_responses(str(tmp_path / "c.jsonl"), scored=False)
    with pytest.raises(ValueError, match="no such file"):
        data.load_responses(str(tmp_path / "d.jsonl"), scored=False)


def test_prompts(tmp_path):
    def get(*rows):
        return [p.prompt for p in data.load_prompts([write(tmp_path / "p.jsonl", list(rows))])[0]]

    assert get({"prompt": "a"}, {"prompt": "a"}, {"prompt": [turn("user", "b")]}) == ["a", "a", (turn("user", "b"),)]
    assert get({"text": "a"}) == ["a"]
    assert get({"instruction": "a", "input": ""}, {"instruction": "a", "input": "b"}) == ["a", "a\n\nb"]
    assert get(row(1), row(1, chosen="other"), row(2, rejected="")) == ["question 1", "question 2"]
    head = "\n\nHuman: hi\n\nAssistant:"
    assert get({"chosen": head + " a", "rejected": head + " b"}) == [head]
    user, a, b = turn("user", "hi"), turn("assistant", "a"), turn("assistant", "b")
    chat = {"prompt": "hi", "chosen": [user, a], "rejected": [user, b]}
    assert get(chat, chat) == [(turn("user", "hi"),)]
    with pytest.raises(ValueError, match=r"Got columns turns; expected a column prompt \(text or messages\), text or"):
        get({"turns": ["x"]})
    pairs = [Pair("1", "a", "x", "y"), Pair("2", "a", "x", "z"), Pair("3", (turn("user", "b"),), "x", "y")]
    assert data.prompts_of(pairs) == [Prompt("1", "a"), Prompt("3", (turn("user", "b"),))]


def test_texts(tmp_path):
    def get(*rows):
        texts, _ = data.load_texts([write(tmp_path / "t.jsonl", list(rows))])
        return [(t.prompt, t.response) for t in texts]

    user, answer = turn("user", "hi"), turn("assistant", "hello")
    assert get({"prompt": "a", "completion": "b"}) == [("a", "b")]
    assert get({"prompt": [user], "completion": [answer]}) == [((user,), (answer,))]
    assert get({"prompt": "hi", "completion": [answer]}) == [((user,), (answer,))]
    assert get({"messages": [user, answer, user, answer, user]}) == [((user, answer, user), (answer,))]
    assert get({"text": "once"}) == [("", "once")]
    alpaca = {"instruction": "a", "input": "b", "output": "c", "text": "all of it"}
    assert get(alpaca) == [("a\n\nb", "c")]
    rows = [{"messages": turns} for turns in ([user, answer], [user], [answer])]
    _, report = data.load_texts([write(tmp_path / "t.jsonl", rows)])
    assert {reason for reason, _, _ in report.dropped} == {"no assistant turn", "empty prompt"}
    pair = Pair("i", "p", "c", "r", weight=0.5, source="s")
    assert data.demonstrations_of([pair]) == [data.Demonstration("i", "p", "c", 0.5, "s")]


def labelled(i: int, **more) -> dict:
    return {"prompt": f"question {i}", "completion": f"answer {i}", "label": i % 2 == 0, **more}


def test_unpaired_rows(tmp_path):
    user, answer = turn("user", "hi"), turn("assistant", "hello")
    rows = [
        labelled(0),
        labelled(1, id="x", weight=0.5, source="s"),
        {"prompt": [user], "completion": [answer], "label": True},
        {"prompt": "hi", "completion": [answer], "label": False},
        labelled(4, label=1),
        labelled(5, label="yes"),
        labelled(6, completion=" "),
        {"prompt": "no label", "completion": "b", "label": None},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    examples, report = data.load_unpaired([path])
    assert examples == [
        Unpaired("a:1", "question 0", "answer 0", True, 1.0, "a"),
        Unpaired("x", "question 1", "answer 1", False, 0.5, "s"),
        Unpaired("a:3", (user,), (answer,), True, 1.0, "a"),
        Unpaired("a:4", (user,), (answer,), False, 1.0, "a"),
    ]
    assert report.files == ((path, "unpaired", 4, 8),) and report.lines()[0].endswith("8 rows, format unpaired")
    assert dict((reason, count) for reason, count, _ in report.dropped) == {
        "label is int, expected true or false": 1,
        "label is str, expected true or false": 1,
        "empty completion": 1,
        "label is NoneType, expected true or false": 1,
    }
    assert data.load_unpaired([path], limit=2)[0] == examples[:2]
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), parquet)
    assert [e.label for e in data.load_unpaired([str(parquet)], format="unpaired")[0]] == [True, False]


def test_pairs_become_two_labelled_responses(tmp_path):
    """As TRL unpairs them; a file of each form beside the other."""
    pairs = write(tmp_path / "p.jsonl", [row(0, id="x", weight=0.5), row(1, rejected="good 1")])
    single = write(tmp_path / "s.jsonl", [labelled(2)])
    examples, report = data.load_unpaired([pairs, single])
    assert examples == [
        Unpaired("x/chosen", "question 0", "good 0", True, 0.5, "p"),
        Unpaired("x/rejected", "question 0", "bad 0", False, 0.5, "p"),
        Unpaired("s:1", "question 2", "answer 2", True, 1.0, "s"),
    ]
    assert [(form, items, rows) for _, form, items, rows in report.files] == [("explicit", 2, 2), ("unpaired", 1, 1)]
    assert report.dropped[0][0] == "chosen and rejected are identical"
    assert data.load_unpaired([pairs, single], limit=1)[0] == examples[:1]


def test_unpaired_rows_where_they_do_not_belong(tmp_path):
    path = write(tmp_path / "a.jsonl", [labelled(i) for i in range(4)])
    with pytest.raises(
        ValueError,
        match=r"Got columns completion, label, prompt; .*\(unpaired\) are for losses kto and apo_zero_unpaired alone",
    ):
        data.load_pairs([path])
    with pytest.raises(ValueError, match="data.format: got 'unpaired'; expected auto, explicit, conversational, hh"):
        data.load_pairs([path], format="unpaired")
    with pytest.raises(ValueError, match="data.format: got 'x'; expected auto, explicit, .*, alpaca_eval, unpaired"):
        data.load_unpaired([path], format="x")
    with pytest.raises(ValueError, match="data.ranked: got 'x'; expected best_worst"):
        data.load_unpaired([path], ranked="x")
    said = (
        r"Got columns text; expected prompt, chosen .*, or prompt, completion and label \(true or false\) \(unpaired\)"
    )
    with pytest.raises(ValueError, match=said):
        data.load_unpaired([write(tmp_path / "t.jsonl", [{"text": "a"}])])
    # What is undesirable is nothing to imitate, in a file of its own or in the given data.
    texts, report = data.load_texts([path])
    assert [t.prompt for t in texts] == ["question 0", "question 2"]
    assert report.dropped[0][:2] == ("label is false, an undesirable response", 2)
    given = data.load_unpaired([path])[0]
    assert [(d.id, d.response) for d in data.demonstrations_of(given)] == [("a:1", "answer 0"), ("a:3", "answer 2")]
    assert [p.prompt for p in data.load_prompts([path])[0]] == [f"question {i}" for i in range(4)]


def test_progress_sees_every_row_and_changes_nothing(tmp_path):
    seen = []

    def progress(iterable, total, label):
        for item in iterable:
            seen.append((total, label))
            yield item

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(i) for i in range(50)]), path)
    pairs, _ = data.load_pairs([path], progress=progress)
    assert seen == [(50, "reading a")] * 50 and pairs == data.load_pairs([path])[0]
    tokenizer = data.load_tokenizer(bytelevel(tmp_path / "tok"))
    seen.clear()
    trees, _ = data.tokenise_pairs(pairs * 50, tokenizer, (0,), progress=progress, **WIDE)
    assert seen == [(3, "tokenising pairs")] * 3 and len(trees) == 2500


# Tokenisers and their special ids


def test_load_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: got no folder; expected one with tokenizer.json"):
        data.load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"got a folder with none of tokenizer.json"):
        data.load_tokenizer(str(tmp_path))
    path = bytelevel(tmp_path / "tok")
    with pytest.raises(ValueError, match=r"data.chat_template: got 'x.jinja'; expected auto or a Jinja file"):
        data.load_tokenizer(path, "x.jinja")
    (tmp_path / "t.jinja").write_text(CHATML)
    assert data.load_tokenizer(path, str(tmp_path / "t.jinja")).chat_template == CHATML
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tok: transformers cannot load this tokeniser"):
        data.load_tokenizer(path)


def test_eos_ids_where_they_are_found(tmp_path):
    path = bytelevel(tmp_path / "tok")
    tokenizer = data.load_tokenizer(path)
    assert data.eos_ids(path, tokenizer) == (tokenizer.eos_token_id,)
    (tmp_path / "tok" / "config.json").write_text('{"eos_token_id": 5}')
    assert data.eos_ids(path, tokenizer) == (5,)
    (tmp_path / "tok" / "config.json").write_text('{"text_config": {"eos_token_id": [6, 7]}}')
    assert data.eos_ids(path, tokenizer) == (6, 7)
    (tmp_path / "tok" / "generation_config.json").write_text('{"eos_token_id": [9, 8, 9]}')
    assert data.eos_ids(path, tokenizer) == (9, 8)
    (tmp_path / "tok" / "generation_config.json").write_text('{"eos_token_id": null}')
    assert data.eos_ids(path, tokenizer) == (6, 7)
    (tmp_path / "tok" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id: got '</s>'; expected a token id or"):
        data.eos_ids(path, tokenizer)
    bare = bytelevel(tmp_path / "bare", bos_token=None, eos_token=None)
    with pytest.raises(ValueError, match=r"no EOS token: looked for eos_token_id in .*bare/generation_config.json"):
        data.eos_ids(bare, data.load_tokenizer(bare))


def test_bos_rule(tmp_path):
    def bos(path):
        tokenizer = data.load_tokenizer(path)
        trees, _ = data.tokenise_prompts([Prompt("a", "the S")], tokenizer, max_prompt_length=99)
        assert (trees[0].prompt[0] == data.bos_id(tokenizer)) == (data.bos_id(tokenizer) is not None)
        assert trees[0].branches == ()
        return data.bos_id(tokenizer)

    assert bos(piecelike(tmp_path / "1")) == 1  # the tokeniser adds it
    assert bos(piecelike(tmp_path / "2", adds_bos=False)) == 1  # SentencePiece's kind
    assert bos(piecelike(tmp_path / "3", adds_bos=False, add_bos_token=False)) is None
    assert bos(bytelevel(tmp_path / "4")) is None  # BOS is EOS
    assert bos(bytelevel(tmp_path / "5", ("<|end|>", "<|go|>"), bos_token="<|go|>")) is None  # templates' business
    told = bytelevel(tmp_path / "6", ("<|end|>", "<|go|>"), bos_token="<|go|>", add_bos_token=True)
    assert bos(told) == data.load_tokenizer(told).bos_token_id
    assert bos(bytelevel(tmp_path / "7", bos_token=None)) is None


def test_a_bos_written_in_the_text_is_not_doubled(tmp_path):
    tokenizer = data.load_tokenizer(piecelike(tmp_path))
    trees, _ = data.tokenise_prompts([Prompt("a", "<s>the"), Prompt("b", "the")], tokenizer, max_prompt_length=99)
    assert trees[0].prompt.tolist() == trees[1].prompt.tolist() and trees[0].prompt.tolist().count(1) == 1


# The boundary


BOUNDARIES = [
    ("the", "the"), ("hell", "lo"), ("a ", "b"), ("a", " b"), ("a\n", "\nb"), ("Sy", "\n\n the"), ("é", "ü"),
    ("x", "  y"), ("#", "##"),
    ("\n\nHuman: Sall\n\nAssistant:", " The\nend "), (" lead", ":)"), ("日本", "語"), ("a", "😀"), ("1", "0"),
]  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        bytelevel,
        piecelike,
        # the first sentinel merges with what follows, as in Gemma: the next one has to serve
        lambda folder: piecelike(folder, merges=(("▁", "\n"), ("\n", "\n"), ("\n", "h"), ("\n", "l"), ("\n", "b"))),
    ],
)
def test_prompt_and_response_decode_to_the_text(tmp_path, make):
    path = make(tmp_path)
    tokenizer = data.load_tokenizer(path)
    eos = data.eos_ids(path, tokenizer)
    pairs = [Pair(str(i), a, b, b + "l") for i, (a, b) in enumerate(BOUNDARIES)]
    trees, counts = data.tokenise_pairs(pairs, tokenizer, eos, **WIDE)
    assert [decoded(tokenizer, t) for t in trees] == [a + b for a, b in BOUNDARIES]
    assert [decoded(tokenizer, t, 1) for t in trees] == [a + b + "l" for a, b in BOUNDARIES]
    for tree in trees:
        assert tree.prompt.dtype == np.int32 and all(b.dtype == np.int32 for b in tree.branches)
        assert all(b[-1] == eos[0] and eos[0] not in b[:-1] for b in tree.branches)
    assert counts.kept == counts.items == len(pairs) and counts.prompts_cut == counts.responses_cut == 0
    # a prompt has the same ids wherever it stands
    alone, _ = data.tokenise_prompts(data.prompts_of(pairs), tokenizer, max_prompt_length=999)
    first = {pair.prompt: tree.prompt.tolist() for pair, tree in zip(pairs[::-1], trees[::-1], strict=True)}
    assert {t.id: t.prompt.tolist() for t in alone} == {p.id: first[p.prompt] for p in data.prompts_of(pairs)}


@pytest.mark.parametrize("make", [bytelevel, piecelike])
def test_implicit_prompts_end_where_tokens_end(tmp_path, make):
    """The tokens of the prompt and of the responses are those of the whole texts."""
    tokenizer = data.load_tokenizer(make(tmp_path))
    texts = [
        ("Sall the\nhe: the all", "Sall the\nhe: tell the"),
        ("the hell", "the hello the"),
        ("the\nhell", "the\nhe the"),
        ("é 日本 語", "é 日本 本"),
        ("the  hell", "the  all"),
        ("a\nS:the", "a\nS:tell"),
    ]
    rows = [{"chosen": one, "rejected": other} for one, other in texts]
    pairs, _ = data.load_pairs([write(tmp_path / "f.jsonl", rows)])
    trees, _ = data.tokenise_pairs(pairs, tokenizer, (0,), **WIDE)
    assert len(trees) == len(texts)
    for tree, two in zip(trees, texts, strict=True):
        for branch, text in zip(tree.branches, two, strict=True):
            assert [*tree.prompt, *branch[:-1]] == tokenizer(text, add_special_tokens=True)["input_ids"]


def test_a_response_that_merges_with_everything_is_dropped(tmp_path):
    merges = tuple((s, "Q") for s in ("\n", ":", "0", "#", "\x01"))
    tokenizer = data.load_tokenizer(piecelike(tmp_path, merges=merges))
    pairs = [Pair("a", "x", "Q", "r"), Pair("b", "x", "q", "r")]
    trees, counts = data.tokenise_pairs(pairs, tokenizer, (2,), **WIDE)
    assert [t.id for t in trees] == ["b"]
    assert counts.dropped == (("a response merges with every text before it, no boundary is exact", 1, ("a",)),)


def test_a_tokeniser_of_words_is_used_as_it_is(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = data.load_tokenizer(save(tmp_path, words, eos_token="</s>", unk_token="?"))
    (tree,), _ = data.tokenise_pairs([Pair("1", "a b", "b", "a a")], tokenizer, (2,), **WIDE)
    assert [tree.prompt.tolist(), *(b.tolist() for b in tree.branches)] == [[0, 1], [1, 2], [0, 0, 2]]


def test_eos_in_the_text_is_not_doubled(tmp_path):
    tokenizer = data.load_tokenizer(piecelike(tmp_path))
    (tree,), _ = data.tokenise_pairs([Pair("a", "x", "y</s>", "y y")], tokenizer, (2, 7), **WIDE)
    assert [b.tolist().count(2) for b in tree.branches] == [1, 1] and tree.branches[0][-1] == 2


@pytest.mark.parametrize("make", [bytelevel, piecelike])
def test_responses_have_the_ids_that_pairs_have(tmp_path, make):
    path = make(tmp_path)
    tokenizer = data.load_tokenizer(path)
    eos = data.eos_ids(path, tokenizer)
    pairs = [Pair(str(i), a, b, b + "l") for i, (a, b) in enumerate(BOUNDARIES)]
    trees, _ = data.tokenise_pairs(pairs, tokenizer, eos, **WIDE)
    texts = [[p.chosen, p.rejected, ""] for p in pairs]
    made = data.tokenise_responses([p.prompt for p in pairs], texts, tokenizer, eos)
    for tree, (chosen, rejected, nothing) in zip(trees, made, strict=True):
        np.testing.assert_array_equal(chosen, tree.branches[0])
        np.testing.assert_array_equal(rejected, tree.branches[1])
        assert chosen.dtype == np.int32 and len(nothing) == 0


def test_sft_texts(tmp_path):
    texts = [data.Demonstration("a", "", "the S", 0.5), data.Demonstration("b", "the", "the")]
    tokenizer = data.load_tokenizer(piecelike(tmp_path / "p"))
    (text, answer), counts = data.tokenise_texts(texts, tokenizer, (2,), **WIDE)
    # a text by itself is what the tokeniser makes of it, BOS as its prompt
    assert [*text.prompt, *text.branches[0]] == [*tokenizer("the S")["input_ids"], 2]
    assert text.prompt.tolist() == [1] and text.weight == 0.5 and len(answer.branches) == 1
    assert decoded(tokenizer, answer) == "thethe"
    assert [name for name, *_ in counts.lengths] == ["prompt", "response", "prompt + response"]
    tokenizer = data.load_tokenizer(bytelevel(tmp_path / "b"))
    (text, _), _ = data.tokenise_texts(texts, tokenizer, (9,), **WIDE)
    assert text.prompt.shape == (0,) and text.branches[0].tolist() == [*tokenizer("the S")["input_ids"], 9]


def test_unpaired_trees_carry_their_label(tmp_path):
    examples = [Unpaired("a", "the", "the S", True, 0.5), Unpaired("b", "the S", "the", False)]
    tokenizer = data.load_tokenizer(piecelike(tmp_path / "p"))
    trees, counts = data.tokenise_unpaired(examples, tokenizer, (2,), **WIDE)
    assert [(t.id, t.label, t.weight, len(t.branches)) for t in trees] == [("a", 1, 0.5, 1), ("b", -1, 1.0, 1)]
    assert [decoded(tokenizer, t) for t in trees] == ["thethe S", "the Sthe"]
    assert all(t.branches[0][-1] == 2 for t in trees) and counts.kept == 2
    # The same ids as the chosen response of a pair has.
    (pair,), _ = data.tokenise_pairs([Pair("a", "the", "the S", "x")], tokenizer, (2,), **WIDE)
    assert pair.label == 0 and pair.branches[0].tolist() == trees[0].branches[0].tolist()
    # Nothing to score a mismatch behind: only a text to imitate may stand without a prompt.
    trees, counts = data.tokenise_unpaired([examples[0], Unpaired("c", "", "the", True)], tokenizer, (2,), **WIDE)
    assert [t.id for t in trees] == ["a"] and counts.dropped == (("the prompt has no tokens", 1, ("c",)),)


# Chat templates


def conversation(i: int) -> Pair:
    prompt = (turn("user", f"the {i}"), turn("assistant", "Sall"), turn("user", "more\n"))
    return Pair(str(i), prompt, (turn("assistant", f"good {i}"),), (turn("assistant", f"bad {i}"),))


@pytest.mark.parametrize(
    "template, specials, eos, end",
    [
        (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
        (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", "<|eot_id|>"),
    ],
)
def test_chat_ids_are_those_of_transformers(tmp_path, template, specials, eos, end):
    specials = ("<|end|>", "<|go|>", *specials)
    path = bytelevel(tmp_path, specials, bos_token="<|go|>", eos_token=eos, chat_template=template)
    tokenizer = data.load_tokenizer(path)
    go, stop = tokenizer.convert_tokens_to_ids(["<|go|>", end])
    pairs = [conversation(i) for i in range(3)]
    trees, _ = data.tokenise_pairs(pairs, tokenizer, data.eos_ids(path, tokenizer), **WIDE)
    for pair, tree in zip(pairs, trees, strict=True):
        prompt = tokenizer.apply_chat_template(list(pair.prompt), add_generation_prompt=True)["input_ids"]
        assert tree.prompt.tolist() == prompt
        for branch, answer in zip(tree.branches, (pair.chosen, pair.rejected), strict=True):
            whole = tokenizer.apply_chat_template([*pair.prompt, *answer])["input_ids"]
            tail = whole[len(prompt) + len(branch) :]
            assert [*prompt, *branch, *tail] == whole and not tokenizer.decode(tail).strip()
            assert branch[-1] == stop and branch.tolist().count(stop) == 1 and go not in branch
        assert tree.prompt.tolist().count(go) == (1 if template is LLAMA3 else 0)
    # the prompts sampled from are the same
    sampled, _ = data.tokenise_prompts(data.prompts_of(pairs), tokenizer, max_prompt_length=999)
    assert [t.prompt.tolist() for t in sampled] == [t.prompt.tolist() for t in trees]
    # an end of turn the sampler does not stop at is followed by one it does stop at
    last = tokenizer.convert_tokens_to_ids("<|end|>")
    trees, _ = data.tokenise_pairs(pairs, tokenizer, (last,), **WIDE)
    assert trees[0].branches[0][-2:].tolist() == [stop, last]


def test_responses_in_a_chat_end_as_its_template_ends_a_turn(tmp_path):
    path = bytelevel(tmp_path, ("<|end|>", "<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>")
    tokenizer = data.load_tokenizer(path)
    tokenizer.chat_template = CHATML
    eos = data.eos_ids(path, tokenizer)
    pair = conversation(3)
    (tree,), _ = data.tokenise_pairs([pair], tokenizer, eos, **WIDE)
    text = pair.chosen[-1]["content"]
    ((ids,),) = data.tokenise_responses([pair.prompt], [[text]], tokenizer, eos)
    np.testing.assert_array_equal(ids, tree.branches[0])
    assert tokenizer.decode(ids[:-1]) == text and ids[-1] == eos[0]
    tokenizer.chat_template = "{{ raise_exception('no turns') }}"
    with pytest.raises(ValueError, match="candidates of the prompt .* cannot be tokenised: chat template: no turns"):
        data.tokenise_responses([pair.prompt], [[text]], tokenizer, eos)


def test_a_response_never_changes_the_ids_of_its_prompt(tmp_path):
    """GPT-2's rule for white space makes one token of a final blank line and two of one before a word: the ids of the
    whole conversation do not start with those that are sampled from. Apart, they do.
    """
    path = bytelevel(tmp_path, merges=(("Ċ", "Ċ"),), chat_template=LLAMA3.replace("{{ bos_token }}", ""))
    tokenizer = data.load_tokenizer(path)
    pair = conversation(0)
    (tree,), _ = data.tokenise_pairs([pair], tokenizer, (9,), **WIDE)
    prompt = tokenizer.apply_chat_template(list(pair.prompt), add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*pair.prompt, *pair.chosen])["input_ids"]
    assert whole[: len(prompt)] != prompt and tree.prompt.tolist() == prompt
    assert decoded(tokenizer, tree) == tokenizer.decode([*whole, 9])


def test_llama2_template_on_its_kind_of_tokeniser(tmp_path):
    tokenizer = data.load_tokenizer(piecelike(tmp_path, chat_template=LLAMA2))
    pairs = [conversation(0), Pair("s", (turn("system", "x"), turn("user", "y")), "a", "b")]
    (tree,), counts = data.tokenise_pairs(pairs, tokenizer, (2,), **WIDE)
    whole = tokenizer.apply_chat_template([*pairs[0].prompt, *pairs[0].chosen])["input_ids"]
    assert [*tree.prompt, *tree.branches[0]] == whole
    assert tree.prompt[0] == 1 and tree.prompt[1] != 1 and tree.branches[0][-1] == 2
    assert counts.dropped == (("chat template: no system turns", 1, ("s",)),)


def test_a_template_without_bos_gets_none(tmp_path):
    """As transformers does it: the rendered text is all there is, whatever the tokeniser adds to plain text."""
    tokenizer = data.load_tokenizer(piecelike(tmp_path, chat_template=CHATML))
    (tree,), _ = data.tokenise_pairs([conversation(0)], tokenizer, (2,), **WIDE)
    ids = tokenizer.apply_chat_template(list(conversation(0).prompt), add_generation_prompt=True)["input_ids"]
    assert data.bos_id(tokenizer) == 1 and 1 not in ids and tree.prompt.tolist() == ids


def test_chat_template_that_rewrites_the_prompt_is_counted(tmp_path):
    template = (
        "{% if add_generation_prompt %}ask{% else %}say{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer = data.load_tokenizer(bytelevel(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match=r"none of 1 items is left: 1 × chat template: the prompt with its"):
        data.tokenise_pairs([conversation(0)], tokenizer, (3,), **WIDE)


def test_messages_without_template_and_mixed_rows(tmp_path):
    tokenizer = data.load_tokenizer(bytelevel(tmp_path))
    with pytest.raises(
        ValueError, match=r"got chat messages, but the tokeniser has no chat template; .* Set data.chat"
    ):
        data.tokenise_pairs([conversation(0)], tokenizer, (3,), **WIDE)
    mixed = Pair("m", "text", (turn("assistant", "a"),), "b")
    _, counts = data.tokenise_pairs([mixed, Pair("t", "a", "b", "c")], tokenizer, (3,), **WIDE)
    assert counts.dropped == (("the prompt is text, a response is messages", 1, ("m",)),)


# Too long


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_cutting_against_brute_force(tmp_path, truncation):
    """Letters are one token each, so the rule can be written on strings."""
    tokenizer = data.load_tokenizer(piecelike(tmp_path))
    rng = np.random.default_rng(0)
    texts = [["".join(rng.choice(list("abcdefg"), n)) for n in rng.integers(1, 14, 3)] for _ in range(200)]
    pairs = [Pair(str(i), *three) for i, three in enumerate(texts)]
    trees, counts = data.tokenise_pairs(
        pairs, tokenizer, (2,), max_length=16, max_prompt_length=6, truncation=truncation
    )
    kept, prompts_cut, responses_cut, dropped = {}, 0, 0, []
    for pair in pairs:
        prompt, responses = ["<s>", "▁", *pair.prompt], [[*pair.chosen, "</s>"], [*pair.rejected, "</s>"]]
        if responses[0] == responses[1]:
            dropped.append(pair.id)
            continue
        cut = 0
        if len(prompt) + max(map(len, responses)) > 16:
            cut = len(prompt) > 6
            if cut:
                prompt = ["<s>", *(prompt[-5:] if truncation == "keep_end" else prompt[1:6])]
            shorter = [r[: 16 - len(prompt)] for r in responses]
            if shorter[0] == shorter[1]:
                dropped.append(pair.id)
                continue
            responses_cut += sum(a != b for a, b in zip(responses, shorter, strict=True))
            responses = shorter
        prompts_cut += cut
        kept[pair.id] = [prompt, *responses]
    assert responses_cut > 5 and prompts_cut > 20
    got = {t.id: [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in (t.prompt, *t.branches)] for t in trees}
    assert got == kept
    assert (counts.items, counts.kept) == (200, len(kept))
    assert (counts.prompts_cut, counts.responses_cut) == (prompts_cut, responses_cut)
    assert sum(n for _, n, _ in counts.dropped) == len(dropped)
    assert counts.tokens == sum(t.length for t in trees)
    assert all(len(t.prompt) + max(map(len, t.branches)) <= 16 for t in trees)


def test_identical_after_cutting(tmp_path):
    tokenizer = data.load_tokenizer(bytelevel(tmp_path))
    pairs = [Pair("a", "x", "abcdefgh", "abcdefgz"), Pair("b", "x", "abc", "abd")]
    trees, counts = data.tokenise_pairs(pairs, tokenizer, (3,), max_length=6, max_prompt_length=2)
    assert [t.id for t in trees] == ["b"]
    assert counts.dropped == (("chosen and rejected are the same tokens after cutting", 1, ("a",)),)
    assert counts.lines()[0] == "1 of 2 tokenised, 9 tokens"
    assert counts.lines()[-1] == "  not used: 1 × chosen and rejected are the same tokens after cutting (a)"


def test_responses_without_tokens_and_bad_bounds(tmp_path):
    tokenizer = data.load_tokenizer(piecelike(tmp_path))
    pairs = [Pair("a", "x", "</s>", "y"), Pair("b", "x", "y", "z")]
    _, counts = data.tokenise_pairs(pairs, tokenizer, (2,), **WIDE)
    assert counts.dropped == (("a response has no tokens", 1, ("a",)),)
    assert counts.lengths[3] == ("prompt + longer response", 5.0, 5.0, 5)
    for bounds in [dict(max_length=8, max_prompt_length=8), dict(max_length=8, max_prompt_length=9)]:
        with pytest.raises(ValueError, match=r"data.max_prompt_length: got [89] with data.max_length=8; expected"):
            data.tokenise_pairs(pairs, tokenizer, (2,), **bounds)
    with pytest.raises(ValueError, match=r"data.truncation: got 'middle'; expected keep_end or keep_start\."):
        data.tokenise_pairs(pairs, tokenizer, (2,), truncation="middle", **WIDE)
    with pytest.raises(ValueError, match=r"tokenising pairs: got no EOS ids"):
        data.tokenise_pairs(pairs, tokenizer, (), **WIDE)
    with pytest.raises(ValueError, match=r"tokenising pairs: got nothing"):
        data.tokenise_pairs([], tokenizer, (2,), **WIDE)


def test_prompts_are_always_cut(tmp_path):
    tokenizer = data.load_tokenizer(piecelike(tmp_path))
    (long, short), counts = data.tokenise_prompts(
        [Prompt("a", "abcdefgh"), Prompt("b", "x")], tokenizer, max_prompt_length=4
    )
    assert tokenizer.convert_ids_to_tokens(long.prompt.tolist()) == ["<s>", "f", "g", "h"] and short.length == 3
    assert counts.prompts_cut == 1 and counts.lengths == (("prompt", 6.5, 9.65, 10),)
    (one,), _ = data.tokenise_prompts([Prompt("a", "abcd")], tokenizer, max_prompt_length=1)
    assert one.prompt.tolist() == [1]


# Order


def test_order_is_a_function_of_its_arguments():
    one = data.order(1000, seed=3, iteration=1, epoch=0)
    assert one.dtype == np.int64 and sorted(one) == list(range(1000))
    assert np.array_equal(one, data.order(1000, seed=3, iteration=1, epoch=0))
    others = [(4, 1, 0), (3, 2, 0), (3, 1, 1), (3, 0, 1), (-3, 1, 0)]
    runs = [one] + [data.order(1000, seed=s, iteration=i, epoch=e) for s, i, e in others]
    assert len({run.tobytes() for run in runs}) == len(runs)
    # uniform: every place gets every index about equally often
    table = np.stack([data.order(4, seed=s, iteration=1, epoch=0) for s in range(4000)])
    counts = np.stack([(table == i).sum(0) for i in range(4)])
    assert (abs(counts - 1000) < 150).all()
    assert data.order(0, seed=0, iteration=0, epoch=0).shape == (0,)
    with pytest.raises(ValueError, match=r"order: got n=-1"):
        data.order(-1, seed=0, iteration=0, epoch=0)


def test_order_uses_the_stream_that_numpy_promises():
    words = np.random.Philox(counter=[0, 0, 2, 5], key=[7, 0]).random_raw(100)
    assert data.order(100, seed=7, iteration=2, epoch=5).tolist() == sorted(range(100), key=lambda i: words[i])


def test_batches_are_exactly_full():
    where = dict(seed=0, iteration=1, epoch=2)
    permutation = data.order(10, **where)
    got = data.batches(10, 4, **where)
    assert [b.shape for b in got] == [(4,)] * 3 and got[0].dtype == np.int64
    assert np.concatenate(got).tolist() == [*permutation, *permutation[:2]]
    assert [b.tolist() for b in data.batches(10, 5, **where)] == [permutation[:5].tolist(), permutation[5:].tolist()]
    small = data.batches(3, 8, **where)
    assert len(small) == 1 and np.bincount(small[0]).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    longer = data.batches(10, 4, updates=5, **where)
    assert np.concatenate(longer).tolist() == [*permutation, *permutation]
    with pytest.raises(ValueError, match=r"batches: got n=0, batch_size=4, updates=None; expected at least 1"):
        data.batches(0, 4, **where)


@pytest.mark.parametrize("seed", range(4))
def test_a_derangement_sends_nothing_into_its_own_group(seed):
    rng = np.random.default_rng(seed)
    for n in (2, 3, 7, 50):
        for kinds in (2, 3, n, 10 * n):
            groups = rng.integers(kinds, size=n).tolist()
            largest = max(map(groups.count, groups))
            if 2 * largest > n:
                with pytest.raises(ValueError, match=f"{largest} of {n} examples have the same prompt, expected at mo"):
                    data.derangement(groups, seed)
                continue
            other = data.derangement(groups, seed)
            assert sorted(other) == list(range(n)) and other.dtype == np.int64
            assert all(groups[i] != groups[j] for i, j in enumerate(other))
            assert np.array_equal(other, data.derangement(groups, seed))


def test_derangements_of_other_seeds_are_others():
    assert len({data.derangement(range(20), seed).tobytes() for seed in range(10)}) == 10


def test_mismatches_are_completions_of_other_prompts():
    rng = np.random.default_rng(0)
    ids = lambda low, high: rng.integers(0, 90, rng.integers(low, high)).astype(np.int32)
    prompts = [ids(1, 20) for _ in range(9)]
    singles = [Tree(f"{i}", prompts[i // 2], (ids(1, 12),), 0.5, label=(-1) ** i) for i in range(18)]
    trees = data.mismatched(singles, max_length=24, seed=3)
    used = []
    for single, tree in zip(singles, trees):
        assert (tree.id, tree.weight, tree.label) == (single.id, single.weight, single.label)
        own, mismatch = tree.branches
        assert own is single.branches[0] and 1 <= len(mismatch) <= 24 - len(tree.prompt)
        whole = [s for s in singles if s.branches[0][: len(mismatch)].tolist() == mismatch.tolist()]
        cut = [s for s in whole if len(s.branches[0]) == len(mismatch) or len(tree.prompt) + len(mismatch) == 24]
        assert cut and all(s.prompt.tolist() != tree.prompt.tolist() for s in cut)
        used += [s.id for s in cut]
    assert set(used) == {s.id for s in singles}  # each once, up to short ones that begin alike
    assert any(len(t.prompt) + len(t.branches[1]) == 24 for t in trees)


def test_a_loss_without_mismatches_has_a_token_in_their_place():
    """Also where all prompts are the same."""
    singles = [Tree(f"{i}", np.int32([7]), (np.arange(i + 1, dtype=np.int32) + 3,), 0.5, label=-1) for i in range(4)]
    for single, tree in zip(singles, data.unmatched(singles), strict=True):
        assert (tree.id, tree.weight, tree.label) == (single.id, 0.5, -1) and tree.prompt is single.prompt
        assert tree.branches[0] is single.branches[0] and tree.branches[1].tolist() == [3]


def test_validation_never_shares_a_prompt():
    rng = np.random.default_rng(0)
    pairs = [Pair(str(i), f"q{rng.integers(60)}", f"c{i}", "r") for i in range(300)]
    pairs += [Pair("chat", (turn("user", "q1"),), "c", "r")]
    train, held = data.split_validation(pairs, 0.1, seed=1)
    assert {p.prompt for p in map(_text, train)}.isdisjoint(p.prompt for p in map(_text, held))
    assert sorted(train + held, key=lambda p: p.id) == sorted(pairs, key=lambda p: p.id)
    assert 30 <= len(held) <= 45 and train == [p for p in pairs if p in train]
    again, _ = data.split_validation(pairs[::-1], 0.1, seed=1)
    assert {p.id for p in again} == {p.id for p in train}  # by content, whatever the order
    assert {p.id for p in data.split_validation(pairs, 0.1, seed=2)[1]} != {p.id for p in held}
    assert data.split_validation(pairs, 0.0, seed=1) == (pairs, [])
    train, _ = data.split_validation(pairs, 0.999, seed=1)
    assert len({_text(p).prompt for p in train}) == 1  # something stays to train on
    with pytest.raises(ValueError, match=r"data.validation: got 1.0; expected a share in \[0, 1\)"):
        data.split_validation(pairs, 1.0, seed=1)
    with pytest.raises(ValueError, match=r"data.validation=0.5: got 1 different prompt\(s\) among 2 pairs; expected"):
        data.split_validation([pairs[0], pairs[0]], 0.5, seed=1)


def _text(pair: Pair) -> Pair:
    return Pair(pair.id, str(pair.prompt), "", "")


# Real files


@pytest.mark.parametrize("name", ["hh_rlhf/helpful_train.jsonl.gz", "preferences/ultrafeedback_subset.jsonl.gz"])
def test_real_pairs(name):
    path = shared(name)
    pairs, report = data.load_pairs([path], limit=300)
    raw = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")][:300]
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [(r["prompt"], r["chosen"], r["rejected"]) for r in raw]
    assert report.files[0][1] == "explicit" and not report.dropped


def test_real_transcripts_are_cut_where_their_files_say(tmp_path):
    raw = [json.loads(line) for line in gzip.open(shared("hh_rlhf/harmless_test.jsonl.gz"), "rt", encoding="utf-8")]
    rows = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in raw]
    pairs, report = data.load_pairs([write(tmp_path / "hh.jsonl.gz", rows)])
    assert report.files[0][1] == "hh"
    same = {int(p.id.split(":")[1]) - 1: (p.prompt, p.chosen, p.rejected) for p in pairs}
    assert len(same) >= 0.99 * len(raw)
    assert all(got == (raw[i]["prompt"], raw[i]["chosen"], raw[i]["rejected"]) for i, got in same.items())


@pytest.mark.parametrize(
    "name, bos",
    [
        ("tokenizers/gpt2", None),
        ("tokenizers/gpt_neox_20b", None),
        ("tokenizers/phi2", None),
        ("tokenizers/llama2", 1),
        ("tokenizers/mistral_v1", 1),
        ("tokenizers/stories512", 1),
        ("models/stories260K", 1),
    ],
)
def test_real_tokenisers_keep_texts_exact(name, bos):
    path = str(shared(name))
    pairs, _ = data.load_pairs([shared("hh_rlhf/helpful_train.jsonl.gz")], limit=60)
    pairs += data.load_pairs([shared("preferences/ultrafeedback_subset.jsonl.gz")], limit=60)[0]
    pairs += [Pair(f"b{i}", a, b, b + "l") for i, (a, b) in enumerate(BOUNDARIES)]
    tokenizer = data.load_tokenizer(path)
    eos = data.eos_ids(path, tokenizer)
    assert data.bos_id(tokenizer) == bos
    assert eos == ((1,) if "260K" in name else (tokenizer.eos_token_id,))
    trees, counts = data.tokenise_pairs(pairs, tokenizer, eos, **WIDE)
    assert counts.kept == len(pairs)
    joint = 0
    for pair, tree in zip(pairs, trees, strict=True):
        for branch, response in enumerate((pair.chosen, pair.rejected)):
            assert decoded(tokenizer, tree, branch) == pair.prompt + response
            assert tree.branches[branch][-1] == eos[0]
            ids = tokenizer(pair.prompt + response, verbose=False)["input_ids"]
            joint += ids == [*tree.prompt, *tree.branches[branch][:-1]]
        first = tree.prompt.tolist().index(tokenizer.bos_token_id) if bos else None
        assert (first, tree.prompt.tolist().count(tokenizer.bos_token_id)) == ((0, 1) if bos else (None, 0))
    assert joint >= 100  # HH's replies start with a space: apart = together there


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_20b", "llama2", "mistral_v1"])
def test_real_tokenisers_part_at_implicit_prompts(tmp_path, name):
    """Prompt and response apart have the tokens of the whole text, but where blank lines are merged at a text's end."""
    path = str(shared(f"tokenizers/{name}"))
    tokenizer = data.load_tokenizer(path)
    raw = [json.loads(line) for line in gzip.open(shared("hh_rlhf/helpful_train.jsonl.gz"), "rt", encoding="utf-8")][
        :80
    ]
    full = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in raw]
    pairs, _ = data.load_pairs([write(tmp_path / "f.jsonl", full)], format="implicit")
    trees, _ = data.tokenise_pairs(pairs, tokenizer, data.eos_ids(path, tokenizer), **WIDE)
    assert len(trees) > 75
    for pair, tree in zip(pairs, trees, strict=True):
        for branch, response in enumerate((pair.chosen, pair.rejected)):
            whole = tokenizer(pair.prompt + response, verbose=False)["input_ids"]
            same = [*tree.prompt, *tree.branches[branch][:-1]] == whole
            assert same or pair.prompt.endswith("\n\n")


def test_llama2_chat_on_the_real_tokeniser(tmp_path):
    path = str(shared("tokenizers/llama2"))
    (tmp_path / "t.jinja").write_text(LLAMA2)
    tokenizer = data.load_tokenizer(path, str(tmp_path / "t.jinja"))
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    (tree,), _ = data.tokenise_pairs([conversation(1)], tokenizer, data.eos_ids(path, tokenizer), **WIDE)
    pair = conversation(1)
    whole = tokenizer.apply_chat_template([*pair.prompt, *pair.rejected])["input_ids"]
    assert [*tree.prompt, *tree.branches[1]] == whole


def test_what_a_loss_is_told_of_given_pairs():
    """A label is a comparison that was won, for certain; rewards are the annotator's scores."""
    trees = [Tree(name, np.array([1]), (np.array([2]), np.array([3]))) for name in ("b", "a")]
    pairs = [Pair("a", "p", "x", "y", scores=(5.0, 3.5)), Pair("b", "p", "x", "y", scores=(1.0, -1.0))]
    told = lambda target: [tree.values for tree in data.valued(trees, pairs, target)]
    assert told("win") == told("preference") == [(1.0, 0.0)] * 2
    assert told("reward") == [(1.0, -1.0), (5.0, 3.5)]
    assert told("") == told("label") == [(), ()]
    pairs[0] = Pair("a", "p", "x", "y")
    with pytest.raises(ValueError, match="annotator's scores, but 1 of 2 pairs have none, the first 'a'. Give score_"):
        told("reward")


def of_parts(count=10, sources=None, gaps=None, prompts=None):
    return [
        Pair(
            str(i),
            prompts[i] if prompts else f"p{i}",
            "c",
            "r",
            scores=None if gaps is None else (float(gaps[i]), 0.0),
            source=sources[i] if sources else "s",
        )
        for i in range(count)
    ]


def test_random_parts_are_equal_and_hold_every_pair_once():
    parts = data.parts(of_parts(11), 3, "random", seed=0)
    assert [len(part) for part in parts] == [4, 4, 3] and sorted(np.concatenate(parts)) == list(range(11))
    assert all((np.diff(part) > 0).all() for part in parts) and parts[0].tolist() != [0, 1, 2, 3]
    again, other = (data.parts(of_parts(11), 3, "random", seed=seed) for seed in (0, 1))
    assert [p.tolist() for p in again] == [p.tolist() for p in parts] != [p.tolist() for p in other]


def test_parts_of_sources_stand_in_the_order_of_the_files():
    parts = data.parts(of_parts(5, sources=["b", "b", "a", "b", "a"]), 2, "sources", seed=0)
    assert [part.tolist() for part in parts] == [[0, 1, 3], [2, 4]]
    said = r"got pairs of 1 sources \('s'\), expected one for each of 2 iterations. Set loop.iterations to 1"
    with pytest.raises(ValueError, match=said):
        data.parts(of_parts(), 2, "sources", seed=0)


def test_easy_pairs_come_first_and_of_every_prompt_one_before_the_second_of_any():
    """Curry-DPO: of four ranked responses (best, worst), then (best, third), then (best, second)."""
    prompts, gaps = [f"p{i // 3}" for i in range(12)], [3, 1, 2, 9, 8, 7, 1, 3, 2, 0.2, 0.1, 0.3]
    parts = data.parts(of_parts(12, gaps=gaps, prompts=prompts), 3, "easy_first", seed=0)
    assert [part.tolist() for part in parts] == [[0, 3, 7, 11], [2, 4, 8, 9], [1, 5, 6, 10]]
    single = data.parts(of_parts(6, gaps=[1, 5, 3, 6, 2, 4]), 3, "easy_first", seed=0)  # one pair a prompt: by gap
    assert [part.tolist() for part in single] == [[1, 3], [2, 5], [0, 4]]
    with pytest.raises(ValueError, match="loop.parts is 'easy_first': pair '0' has no scores, expected score_chosen"):
        data.parts(of_parts(), 2, "easy_first", seed=0)
    with pytest.raises(ValueError, match="loop.parts is 'random': got 2 pairs, expected at least one for each of 3"):
        data.parts(of_parts(2), 3, "random", seed=0)
