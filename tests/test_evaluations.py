"""Rows of files → who said what of which response, in each of the forms."""

import json

import pytest

from sera_jax import data


def read(folder, *rows, **options):
    path = folder / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.load_evaluated([str(path)], **options)


def test_responses_with_scores_by_name_and_by_column(tmp_path):
    row = {
        "prompt": "p", "responses": ["a", "b"], "finished": [True, False], "lengths": [3, 4], "id": "x",
        "scores": {"helpful": [4, None], "honest": [1, 2.5]}, "reward": [0.5, 1],
    }  # fmt: skip
    (one,) = read(tmp_path, row)
    assert (one.prompt, one.responses) == ("p", ("a", "b"))
    assert one.scores == {
        "lengths": (3, 4), "helpful": (4, None), "honest": (1, 2.5), "reward": (0.5, 1),
    }  # fmt: skip
    (one,) = read(tmp_path, {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]})
    assert one.scores == {"scores": (1, 2)}


def test_ultrafeedback_has_its_dimensions(tmp_path):
    rated = lambda text, helpful, honest, overall: {
        "response": text, "overall_score": overall,
        "annotations": {"helpfulness": {"Rating": helpful}, "honesty": {"Rating": honest, "Rationale": "x"}},
    }  # fmt: skip
    row = {"instruction": "p", "completions": [rated("a", "4", "N/A", 7.5), rated("b", "2", "3", 5)]}
    (one,) = read(tmp_path, row)
    assert (one.prompt, one.responses) == ("p", ("a", "b"))
    assert one.scores == {"helpfulness": (4, 2), "honesty": (None, 3), "overall_score": (7.5, 5)}


def test_verdicts_are_shares_and_ties_count(tmp_path):
    two = {"prompt": "p", "response_a": "a", "response_b": "b"}
    rows = read(
        tmp_path,
        two | {"preference": 2.0, "annotators": [2, 1, 0]},
        {"instruction": "p", "output_1": "a", "output_2": "b", "preference": 1.25},
        two | {"preference": 1.5, "score_a": 1.5, "score_b": 0.5},
        two | {"preference": 0},
    )
    assert rows[0].scores == {
        "preference": (0, 1), "annotator 1": (0, 1), "annotator 2": (1, 0), "annotator 3": (0.5, 0.5),
    }  # fmt: skip
    assert [row.scores["preference"] for row in rows[1:]] == [(0.75, 0.25), (0.5, 0.5), (0.5, 0.5)]
    assert rows[2].scores["score"] == (1.5, 0.5)


def test_pairs_have_their_label_and_scores(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 9, "score_rejected": 8}
    one, nested = read(tmp_path, row | {"gold_chosen": 0, "gold_rejected": 1}, {
        "prompt": "p", "chosen": "a", "rejected": "b", "metadata": {"score_chosen": 3, "score_rejected": 4},
    })  # fmt: skip
    assert one.responses == ("a", "b")
    assert one.scores == {"label": (1, 0), "score": (9, 8), "gold": (0, 1)}
    assert nested.scores == {"label": (1, 0), "score": (3, 4)}
    summaries = {"info": {"subreddit": "s", "title": "t", "post": "q"}, "summaries": [{"text": "x"}, {"text": "y"}]}
    (one,) = read(tmp_path, summaries | {"choice": 1})
    assert one.responses == (" x", " y") and one.scores == {"label": (0, 1)}


def test_limit(tmp_path):
    rows = [{"prompt": f"p{i}", "responses": ["a"], "scores": [i]} for i in range(5)]
    assert [row.prompt for row in read(tmp_path, *rows, limit=3)] == ["p0", "p1", "p2"]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "p", "responses": ["a", "b"], "scores": {"x": [1]}}, "x has 1 numbers, expected one for each of 2"),
        ({"prompt": "p", "responses": []}, "responses is no list of texts"),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "preference": 3}, "preference is not from 1 to 2"),
        (
            {"prompt": "p", "response_a": "a", "response_b": "b", "preference": 1, "annotators": [3]},
            "annotators is no list of 1, 2 and 0",
        ),
        ({"strange": 1}, "no form of responses that somebody judged"),
    ],
)
def test_what_cannot_be_used_is_told_by_its_line(tmp_path, row, said):
    good = {"prompt": "p", "responses": ["a"], "scores": [1]}
    with pytest.raises(ValueError, match=r"f\.jsonl:2: " + said):
        read(tmp_path, good, row)
    with pytest.raises(ValueError, match="no rows, expected responses that somebody judged"):
        read(tmp_path)
