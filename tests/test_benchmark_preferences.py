"""tests/benchmarks/preferences.py: circles and agreement on tiny files whose counts are known by hand."""

import json
import pathlib

import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmark(script):
    return script("tests/benchmarks/preferences.py")


# Prompt → what was said of its responses; "=" is a tie.
SAID = {
    "a circle": ["a>b", "b>c", "c>a"],
    "an order": ["a>b", "b>c", "a>c"],
    "a tie": ["a>b", "b>c", "c=a"],
    "two that nobody compared": ["a>b", "b>c"],
    "a circle and whom it loses to": ["a>b", "b>c", "c>a", "d>a", "d>b", "d>c"],
    "a majority makes it": ["a>b", "b>c", "c>a", "a>c", "c>a"],
    "votes that cancel out": ["a>b", "b>c", "c>a", "a>c"],
    "two responses": ["a>b"],
}
LABELS = (3, 7)  # circles; triples any two of which were compared, none a tie: 1 + 1 + 0 + 0 + 4 + 1 + 0 + 0


def write(path: pathlib.Path, said: dict[str, list[str]], key: str = "prompt") -> str:
    rows = []
    for prompt, votes in said.items():
        for n, vote in enumerate(votes):
            one, other, preference = vote[0], vote[2], 1.5 if vote[1] == "=" else 1.0
            if n % 2:  # the same, said the other way round
                one, other, preference = other, one, 3.0 - preference
            rows.append({key: prompt, "response_a": one, "response_b": other, "preference": preference})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def of(counts: tuple[int, int]) -> str:
    return f"{counts[0]} of {counts[1]} ({100 * counts[0] / counts[1]:.1f} %)"


@pytest.mark.parametrize("key", ["prompt", "instruction"])
def test_circles_in_labels(benchmark, tmp_path, key):
    told = benchmark.circles(write(tmp_path / "triples.jsonl", SAID, key), {}, 100, {})
    assert told == {"labels": of(LABELS), "prompts": len(SAID) - 1}


def test_rows_without_a_label_or_a_prompt_count_nowhere(benchmark, tmp_path):
    file = pathlib.Path(write(tmp_path / "triples.jsonl", SAID))
    two = {"response_a": "a", "response_b": "b"}
    odd = [{"prompt": "an order", **two, "preference": None}, {"prompt": "", **two, "preference": 2.0}]
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in odd))
    assert benchmark.circles(str(file), {}, 100, {})["labels"] == of(LABELS)


def test_circles_of_each_annotator(benchmark, tmp_path):
    """All of them agree on a>b and b>c; on c against a one says a, one c, one neither."""
    rows = [
        {"prompt": "p", "response_a": "a", "response_b": "b", "preference": 1.0, "annotators": [1, 1, 1]},
        {"prompt": "p", "response_a": "c", "response_b": "b", "preference": 2.0, "annotators": [2, 2, 2]},
        {"prompt": "p", "response_a": "c", "response_b": "a", "preference": 1.5, "annotators": [2, 1, 0]},
    ]
    file = tmp_path / "triples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = benchmark.circles(str(file), {}, 100, {})
    assert told["labels"] == "0 of 0" and told["labels, annotator by annotator"] == of((1, 2))


def test_circles_of_a_model(benchmark, tmp_path, monkeypatch):
    """It is asked about every two of the responses to a prompt, whoever compared them: once each."""
    beats, questions = {"ab", "bc", "ca", "ad", "bd", "cd"}, []

    def log_odds(path, asked, of):
        assert of == {"of": 1}
        questions.extend(asked)
        circle = [1.0 if one + other in beats else -1.0 for _, one, other in asked]
        return np.array({"circle": circle, "order": [ord(b) - ord(a) for _, a, b in asked]}[path], float)

    monkeypatch.setattr(benchmark, "log_odds", log_odds)
    file = write(tmp_path / "triples.jsonl", SAID)
    told = benchmark.circles(file, {"one": "circle", "other": "order"}, 100, {"of": 1})
    # Seven prompts have three responses, of which one has a fourth: 6 + 4 triples.
    assert (told["one"], told["other"]) == (of((7, 10)), of((0, 10))) and told["labels"] == of(LABELS)
    assert len(questions) == 2 * (6 * 3 + 6) and len(set(questions)) == len(questions) / 2
    few = benchmark.circles(file, {"one": "circle"}, 2, {"of": 1})
    assert few["prompts"] == 2 and few["labels"] == of(LABELS) and few["one"].startswith("2 of ")
    monkeypatch.setattr(benchmark, "LIMIT", 3)
    assert benchmark.circles(file, {"one": "order"}, 100, {"of": 1})["one"] == of((0, 7))


def test_agreement_with_annotators(benchmark, tmp_path, monkeypatch):
    """Ties of a model, and responses of one length, count half; the interval is 1.96 standard errors."""
    texts = [("long one", "short"), ("s", "longer"), ("same", "size"), ("longest", "no")]
    rows = [{"prompt": "p", "chosen": chosen, "rejected": rejected} for chosen, rejected in texts]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(benchmark, "log_odds", lambda path, asked, of: np.array([2.0, -1.0, 0.0, 0.1])[: len(asked)])
    told = benchmark.accuracies(str(file), {"model": "path"}, 0, {})
    of_four = 1.96 * 100 * np.sqrt((2 * 0.375**2 + 0.625**2 + 0.125**2) / 4 / 4)
    assert told == {"pairs": 4, "longer": f"62.5 ± {of_four:.1f}", "model": f"62.5 ± {of_four:.1f}"}
    assert benchmark.accuracies(str(file), {"model": "path"}, 2, {})["model"].startswith("50.0 ± ")
