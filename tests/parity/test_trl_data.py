"""Implicit prompts against TRL's extract_prompt, where the two should agree, and where they should not."""

import json

import numpy as np
import pytest

from sera_jax import data

data_utils = pytest.importorskip("trl.data_utils", reason="parity with TRL needs trl: install the `parity` extra")


def ours(folder, rows):
    path = folder / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = lambda text: text if isinstance(text, str) else list(text)
    pairs, report = data.load_pairs([str(path)])
    assert not report.dropped
    return [{key: plain(getattr(p, key)) for key in ("prompt", "chosen", "rejected")} for p in pairs]


def test_texts_whose_words_differ_in_their_first_letter(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(["apple", "bear", "cat", "dog", "egg"])
    rows = []
    for _ in range(200):
        shared = " ".join(rng.choice(words, rng.integers(1, 6)))
        one, other = rng.permutation(5)[:2]
        tail = lambda: " ".join(["", *rng.choice(words, rng.integers(0, 3))])
        rows.append({"chosen": f"{shared} {words[one]}{tail()}", "rejected": f"{shared} {words[other]}{tail()}"})
    assert ours(tmp_path, rows) == [data_utils.extract_prompt(row) for row in rows]


def test_conversations(tmp_path):
    turn = lambda role, content: {"role": role, "content": content}
    user, good, bad, more = turn("user", "hi"), turn("assistant", "a"), turn("assistant", "b"), turn("user", "more")
    system = turn("system", "be kind")
    rows = [
        {"chosen": chosen, "rejected": rejected}
        for chosen, rejected in (
            ([user, good], [user, bad]),
            ([system, user, good], [system, user, bad]),
            ([user, good, more, good], [user, good, more, bad]),
            ([user, good, more, good], [user, bad, more, bad]),
        )
    ]
    assert ours(tmp_path, rows) == [data_utils.extract_prompt(row) for row in rows]
    assert ours(tmp_path, [row | {"prompt": "hi"} for row in rows[:1]]) == [data_utils.maybe_extract_prompt(rows[0])]


def test_where_they_differ(tmp_path):
    """TRL cuts inside words, and takes all but a letter of a text that is the beginning of the other."""
    rows = [
        {"chosen": "Q: why? because", "rejected": "Q: why? beware"},
        {"chosen": "Q: why? yes", "rejected": "Q: why? yes, so"},
    ]
    assert [row["prompt"] for row in ours(tmp_path, rows)] == ["Q: why?", "Q: why?"]
    assert [data_utils.extract_prompt(row)["prompt"] for row in rows] == ["Q: why? be", "Q: why? ye"]
