"""launch/over_optimise.py: what it reads from a run folder, its picture, its means, and the table in RESULTS."""

import json
import pathlib
import re
import sys
import types

import matplotlib.figure
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sera_jax import policies, toyworld
from sera_jax.toyworld.facts import truth

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPT = "please tell tom colour ."
TRUE = f"tom likes {truth('tom', 'colour')}"
SAID = {  # iterate → a response to each of two prompts
    0: (f"truly {TRUE}", TRUE),
    1: (f"truly truly {TRUE}", f"truly truly {TRUE}"),
    2: (f"truly truly truly {TRUE}", f"truly truly {TRUE}"),
}
TOKENS = {0: ([5, 6], [7]), 1: ([8], [9, 10]), 2: ([11, 12, 13], [14])}
LOGP = {0: (-2.0, -3.0), 1: (-1.0, -2.5), 2: (-0.5, -1.0)}


@pytest.fixture(scope="module")
def driver(script):
    return script("launch/over_optimise.py")


def gold(t: int) -> list[float]:
    return [toyworld.gold(PROMPT, text) for text in SAID[t]]


def write_run(folder: pathlib.Path) -> pathlib.Path:
    """What the evaluation of a run of two iterations leaves; also a point inside an iteration, which is none."""
    (folder / "evaluation").mkdir(parents=True)
    for t, texts in SAID.items():
        rows = [
            {"id": f"e{i}", "responses": [text], "tokens": [ids]} for i, (text, ids) in enumerate(zip(texts, TOKENS[t]))
        ]
        path = folder / "evaluation" / f"{t}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if t:
            columns = {
                "reward": gold(t),
                "reward_start": gold(0),
                "logp": LOGP[t],
                "logp_start": (*LOGP[0][:1], np.nan),
            }
            pyarrow.parquet.write_table(pyarrow.table(columns), path.with_suffix(".parquet"))
    (folder / "evaluation" / "best-2.jsonl").write_text("not read\n")
    return folder


def ids_summed(ranker, trees, *, ledger, label):
    """In the place of a reward model: the sum of a response's ids, a hundredth of the prompt's."""
    assert ranker.path == "proxy" and ledger is not None
    return np.array([sum(tree.branches[0]) + sum(tree.prompt) / 100 for tree in trees], np.float32)


def test_what_is_read_from_a_run(driver, tmp_path, monkeypatch):
    """Every number by hand. The third emphasis is the trap: overdone, and gold falls, where two of them earned."""
    monkeypatch.setattr(policies, "folder_rewards", ids_summed)
    prompts = {"e0": np.array([100, 200], np.int32), "e1": np.array([300], np.int32)}
    got = driver.of_run(write_run(tmp_path), types.SimpleNamespace(path="proxy"), prompts, object())
    assert [row["point"] for row in got] == [0, 1, 2]
    # The second response's log-prob under the start is not known: it does not count.
    assert [row["kl"] for row in got] == [0, 1, 1.5]
    assert [row["proxy"] for row in got] == [9 + 3, 13.5 + 3, 25 + 3]
    assert [row["words"] for row in got] == [3.5, 5, 5.5]
    assert [row["emphases"] for row in got] == [0.5, 2, 2.5]
    assert [row["overdone"] for row in got] == [0, 0, 0.5]
    # All of what is asked (weight 1), 0.25 for each of two emphases, -0.5 for the third, -0.05 for each repeated word.
    want = [1 + 0.25 / 2, 1 + 0.5 - 0.05, 1 + 0.5 - (0.5 + 0.1 + 0.05) / 2]
    assert [row["gold"] for row in got] == pytest.approx(want, abs=1e-6)


def points(driver) -> list[dict]:
    """Two seeds of each arm, three points, every number another one."""
    measures = ("kl", "gold", "proxy", "words", "emphases", "overdone")
    value = iter(range(1000))
    return [
        {"seed": seed, "arm": arm, "point": t, **{key: float(next(value)) for key in measures}}
        for seed in (3, 7)
        for arm in driver.ARMS
        for t in range(3)
    ]


def test_the_picture_holds_each_series(driver, tmp_path, monkeypatch):
    drawn, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, path: (drawn.append(figure), save(figure, path))
    )
    rows = points(driver)
    driver.drawn(rows, tmp_path / "over.svg")
    assert (tmp_path / "over.svg").read_text(encoding="utf-8").count("<path") > 18
    assert len(drawn[0].axes) == len(driver.SHOWN) == 3
    for axes, (measure, label) in zip(drawn[0].axes, driver.SHOWN.items()):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("KL to the start, nats", label)
        found = sorted((*line.get_xdata(), *line.get_ydata()) for line in axes.get_lines())
        of = lambda seed, arm, key: [row[key] for row in rows if (row["seed"], row["arm"]) == (seed, arm)]
        assert found == sorted(
            (*of(seed, arm, "kl"), *of(seed, arm, measure)) for seed in (3, 7) for arm in driver.ARMS
        )
    shown = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert shown == list(driver.ARMS.values())


def test_means_are_over_the_seeds(driver):
    rows = points(driver)
    told = driver.means(rows)
    assert [(row["arm"], row["point"]) for row in told] == [(arm, t) for arm in driver.ARMS for t in range(3)]
    for i, row in enumerate(told):
        assert all(row[key] == (rows[i][key] + rows[i + 9][key]) / 2 for key in ("kl", "gold", "proxy", "overdone"))


def test_the_command_reads_worlds_and_runs(driver, tmp_path, monkeypatch):
    """Its proxy is the world's own reward model, the one of the many pairs; every arm of every seed has its rows."""
    opened = []

    def opened_model(path, mesh, *, compute):
        opened.append((path, mesh, compute))
        return types.SimpleNamespace(path="proxy", tokenizer=None)

    ids = lambda prompts, tokenizer, *, max_prompt_length: (
        [types.SimpleNamespace(id=prompt.id, prompt=np.zeros(1, np.int32)) for prompt in prompts],
        None,
    )
    monkeypatch.setattr(driver.meshes, "make", lambda *sizes: sizes)
    monkeypatch.setattr(policies, "open_reward_model", opened_model)
    monkeypatch.setattr(policies, "folder_rewards", ids_summed)
    monkeypatch.setattr(driver.data, "tokenise_prompts", ids)
    for seed in (0, 4):
        world = tmp_path / "worlds" / str(seed) / "world"
        world.mkdir(parents=True)
        rows = [{"id": f"e{i}", "prompt": PROMPT} for i in range(2)]
        (world / "eval_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for arm in driver.ARMS:
            write_run(tmp_path / "runs" / str(seed) / arm)
    paths = ["--runs", str(tmp_path / "runs"), "--worlds", str(tmp_path / "worlds"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["over_optimise.py", *paths, "--seeds", "0", "4"])
    driver.main()
    folders = [str(tmp_path / "worlds" / seed / "bt_more" / "export") for seed in "04"]
    assert opened == [(folder, (1, 1, 1), "float32") for folder in folders]
    found = pyarrow.parquet.read_table(tmp_path / "out" / "over.parquet").to_pylist()
    assert [(row["seed"], row["arm"], row["point"]) for row in found] == [
        (seed, arm, t) for seed in (0, 4) for arm in driver.ARMS for t in range(3)
    ]
    assert [row["proxy"] for row in found[:3]] == [9, 13.5, 25] and (tmp_path / "out" / "over.svg").is_file()


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    return pyarrow.parquet.read_table(ROOT / "configs" / "results" / "online" / "over.parquet").to_pylist()


def test_the_table_in_results_is_that_of_the_data(driver, measured):
    """Each number is a mean over the seeds, rounded from the three decimals that the command prints."""
    results = (ROOT / "configs" / "RESULTS.md").read_text(encoding="utf-8")
    section = re.split(r"^### Over-optimisation$", results, flags=re.M)[1].split("\n## ")[0].split("\n### ")[0]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    keys = {"KL": "kl", "gold": "gold", "proxy": "proxy", "emphases": "emphases", "overdone": "overdone"}
    assert table[0] == ["", "iterate", *keys]
    known = {(row["arm"], row["point"]): row for row in driver.means(measured)}
    arms = {"start": list(driver.ARMS), "all": list(driver.ARMS), "offline DPO": ["over_dpo"]}
    arms |= {"online, reward model": ["over_bt"], "online, gold": ["over_gold"]}
    seen, who = set(), ""
    for name, point, *shown in table[2:]:
        who = name or who
        for arm in arms[who]:
            seen.add((arm, int(point)))
            for key, text in zip(keys.values(), shown, strict=True):
                number = text.replace("−", "-").removesuffix(" %")
                unit = 10.0 ** -len(number.partition(".")[2]) / (100 if text.endswith("%") else 1)
                value = float(number) / (100 if text.endswith("%") else 1)
                assert abs(round(known[arm, int(point)][key], 3) - value) <= unit / 2 + 1e-9, (arm, point, key, text)
    assert {(arm, t) for arm in driver.ARMS for t in (0, 1, 8)} <= seen and len(seen) >= 16


def test_the_learnt_reward_is_over_optimised_where_no_pair_ever_was(driver, measured):
    """Of every seed: online by the reward model the proxy goes on rising while gold turns; responses with more emphases
    than any given pair has are rare at the start and nearly all at the end. Gold as the reward does not go there."""
    assert len({row["seed"] for row in measured}) == 5
    for seed in range(5):
        of = {arm: [r for r in measured if (r["seed"], r["arm"]) == (seed, arm)] for arm in driver.ARMS}
        assert all([row["point"] for row in rows] == list(range(9)) for rows in of.values())
        bt, gold_ = of["over_bt"], of["over_gold"]
        best = max(range(9), key=lambda t: bt[t]["gold"])
        assert 1 < best < 8 and bt[8]["gold"] < bt[best]["gold"] - 0.1 and bt[8]["proxy"] > bt[best]["proxy"] + 0.5
        assert bt[0]["overdone"] < 0.05 and bt[8]["overdone"] > 0.85 > 0.4 > gold_[8]["overdone"]
        assert gold_[8]["gold"] > max(row["gold"] for row in bt) and gold_[8]["proxy"] < bt[8]["proxy"]
    means = [row for row in driver.means(measured) if row["arm"] == "over_bt"]
    assert max(means, key=lambda row: row["gold"])["point"] == 3  # what loop.best_by reward keeps
