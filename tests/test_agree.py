"""The door of agreement: scores of files, functions and reward models on the same responses."""

import json

import numpy as np
import pytest
import scipy.stats

from sera_jax import agree, hf, policies
from sera_jax import config as configs
from sera_jax.ledger import Ledger
from sera_jax.records import Tree


@pytest.fixture
def judged(tiny, tmp_path, monkeypatch):
    """30 prompts with three responses each and two annotators; a good one, and one who looks at length alone."""
    monkeypatch.syspath_prepend(tiny)
    rng, rows = np.random.default_rng(0), []
    words = "red blue green ball box cat dog sits runs sees".split()
    for i in range(30):
        texts = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(3)]
        good = [len(set(text.split())) + rng.normal() for text in texts]
        rows.append(
            {
                "id": f"q{i}", "prompt": f"the {words[i % 10]}", "responses": texts,
                "scores": {"good": good, "long": [len(text) for text in texts], "same": [1, 1, 1]},
            }
        )  # fmt: skip
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def run(path, *flags):
    args = [f"--files=[{path}]", "--resamples=100", "--mesh.fsdp=1", *flags]
    return agree.agree(configs.parse(configs.AgreeConfig, args))


def test_scores_and_functions_are_correlated(judged, tmp_path, capsys):
    path, rows = judged
    out = tmp_path / "deep" / "out.json"
    got = run(path, "--functions=[tiny_reward:count, sera_jax.rewards:text_length]", f"--out={out}")
    assert json.loads(out.read_text()) == got
    assert list(got["evaluators"]) == ["good", "long", "same", "tiny_reward:count", "sera_jax.rewards:text_length"]
    assert (got["responses"], got["prompts"]) == (90, 10)  # prompts stand in three rows each
    pairs = {(pair["one"], pair["other"]): pair for pair in got["pairs"]}
    assert len(pairs) == 10
    flat = lambda of: np.array([value for row in rows for value in of(row)])
    good, count = flat(lambda r: r["scores"]["good"]), flat(lambda r: [len(set(t.split())) for t in r["responses"]])
    pair = pairs["good", "tiny_reward:count"]
    assert pair["pearson"]["value"] == pytest.approx(scipy.stats.pearsonr(good, count)[0], abs=1e-6)
    assert pair["spearman"]["value"] == pytest.approx(scipy.stats.spearmanr(good, count)[0], abs=1e-6)
    assert pair["pearson"]["low"] < pair["pearson"]["value"] < pair["pearson"]["high"]
    assert pairs["long", "sera_jax.rewards:text_length"]["pearson"]["value"] == 1
    assert pairs["good", "same"]["pearson"]["value"] is None
    assert got["evaluators"]["same"] == {"responses": 90, "mean": 1.0, "std": 0.0}
    assert "Spearman within" in capsys.readouterr().out


def test_scores_may_be_chosen_and_rows_limited(judged):
    path, _ = judged
    got = run(path, "--scores=[long, good]", "--limit=5")
    assert list(got["evaluators"]) == ["long", "good"] and got["responses"] == 15


def test_a_reward_model_reads_the_texts(judged, tiny, tiny_config, tmp_path, one_device):
    """The tokens of prompt and response, put together by hand here; what is too long has no score."""
    path, rows = judged
    policy = policies.open_folder(str(tiny / "model"), one_device, compute="float32", seed=3)
    scored = policies.with_score(policy, 3)
    hf.save(tmp_path / "rm", scored.arch, scored.load(), source=str(tiny / "model"), dtype=np.float32, card=[])
    got = run(path, f"--models=[{tmp_path / 'rm'}]", "--scores=[good]", "--max_length=10")
    folder = policies.open_reward_model(str(tmp_path / "rm"), one_device, compute="float32")
    ids = lambda text: [folder.tokenizer.get_vocab()[word] for word in text.split()]
    trees = [
        Tree("x", np.array(ids(row["prompt"]), np.int32), (np.array([*ids(text), 2], np.int32),))
        for row in rows
        for text in row["responses"]
    ]
    fitting = [tree for tree in trees if tree.length <= 10]
    want = policies.folder_rewards(folder, fitting, ledger=Ledger(tmp_path / "ledger"), label="")
    told = got["evaluators"][str(tmp_path / "rm")]
    assert told["responses"] == len(fitting) and 0 < len(fitting) < 90
    assert told["mean"] == pytest.approx(want.mean(), abs=1e-5) and told["std"] == pytest.approx(want.std(), abs=1e-5)
    good = np.array([value for row in rows for value in row["scores"]["good"]])
    both = good[[tree.length <= 10 for tree in trees]], want
    assert got["pairs"][0]["pearson"]["value"] == pytest.approx(scipy.stats.pearsonr(*both)[0], abs=1e-4)


def test_errors(judged, tmp_path):
    path, _ = judged
    for flags, said in (
        (["--scores=[missing]"], "scores: no row has 'missing', expected one of 'good', 'long', 'same'"),
        (["--scores=[good]"], r"got 1 evaluators \(good\), expected two or more"),
        (["--functions=[nothing]"], "functions names 'nothing', expected 'module:function'"),
        (["--functions=[no_module:f]"], "reward function 'no_module:f' cannot be imported"),
    ):
        with pytest.raises(ValueError, match=said):
            run(path, *flags)
    with pytest.raises(SystemExit, match="error: files is empty"):
        agree.main(["--files=[]"])
