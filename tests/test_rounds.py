"""Rounds of samples: what they leave and train on, that a stopped run goes on as if it had not, that they learn."""

import json
import pathlib

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from sera_jax import train as trainer
from sera_jax.records import Candidates
from sera_jax.train import rounds

RANKED = ("--reward.source=function", "--reward.function=tiny_reward:count", "--bootstrap.candidates=4")
ROUNDS = (*RANKED, "--on_policy.rounds=3", "--on_policy.prompts=10", "--optimizer.batch_size=4")
RLOO = ("--on_policy.algorithm=policy_gradient",)
PPO = (
    *("--on_policy.algorithm=policy_gradient", "--on_policy.advantage=group", "--on_policy.ratio=token"),
    *("--on_policy.average=token", "--on_policy.kl=loss", "--on_policy.passes=2", "--on_policy.clip_high=0.28"),
)
RAFT = ("--on_policy.algorithm=raft", "--on_policy.beta=0")


def lines(run: pathlib.Path) -> list[dict]:
    """metrics.jsonl without timings."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def summary(run: pathlib.Path, t: int) -> dict:
    return json.loads((run / f"iterations/{t}/summary.json").read_text())


def tables(run: pathlib.Path) -> dict[str, dict]:
    return {str(p.relative_to(run)): pyarrow.parquet.read_table(p).to_pydict() for p in sorted(run.rglob("*.parquet"))}


def left(run: pathlib.Path) -> tuple:
    """Everything that two equal runs must leave alike, bit for bit."""
    weights = safetensors.numpy.load_file(run / "export" / "model.safetensors")
    texts = {str(p.relative_to(run)): p.read_text() for p in run.rglob("*.jsonl") if p.name != "metrics.jsonl"}
    return lines(run), repr(tables(run)), texts, {name: array.tobytes() for name, array in weights.items()}


def count(text: str) -> int:
    return len(set(text.split()))


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def whole(made, tiny_config):
    """name → the folder of a run that nothing interrupted."""

    def run(name: str, *flags: str) -> pathlib.Path:
        if name not in made:
            config = tiny_config(*ROUNDS, *flags, run=name)
            trainer.train(config)
            made[name] = pathlib.Path(config.run.dir)
        return made[name]

    return run


def test_what_a_round_leaves(whole):
    """RLOO: three updates a round; weights are rewards less β·KL less the mean of the others'."""
    run = whole("rloo", *RLOO)
    stages = [(r["stage"], r["iteration"], r["step"]) for r in lines(run)]
    want = []
    for t in (1, 2):
        for number in range(3):
            want += [("round", t, number + 1)] + [("update", t, 3 * number + i) for i in (1, 2, 3)]
        want.append(("iteration", t, 0))
    assert stages == want
    seen = []
    for t in (1, 2):
        for number in range(3):
            path = run / f"iterations/{t}/rounds/{number + 1:04}"
            table = pyarrow.parquet.read_table(f"{path}.parquet").to_pydict()
            sampled = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
            sampled = {row["id"]: row["responses"] for row in sampled}
            texts = [sampled[name][c % 4] for c, name in enumerate(table["prompt_id"])]
            assert len(sampled) == 10 and texts == table["response"]
            assert table["reward"] == [count(text) for text in table["response"]]
            r_PC = np.array(table["reward"]).reshape(10, 4) - 0.05 * np.array(table["kl"]).reshape(10, 4)
            others = (r_PC.sum(axis=1, keepdims=True) - r_PC) / 3
            np.testing.assert_allclose(np.array(table["weight"]).reshape(10, 4), r_PC - others, atol=1e-6)
            first = t == 1 and number == 0
            assert np.abs(table["kl"]).max() < 1e-4 if first else np.abs(table["kl"]).mean() > 0.01
            seen.append(set(table["prompt_id"]))
            told = next(r for r in lines(run) if (r["stage"], r["iteration"], r["step"]) == ("round", t, number + 1))
            assert told["reward"] == pytest.approx(np.mean(table["reward"]))
            assert told["gen/kl"] == pytest.approx(np.mean(table["kl"]))
            deviations = np.array(table["reward"]).reshape(10, 4).std(axis=1, ddof=1)
            assert told["reward_std"] == pytest.approx(deviations.mean())
            assert told["frac_reward_zero_std"] == (deviations == 0).mean()
    # 20 prompts: two rounds use each once; another iteration draws in another order.
    assert seen[0] | seen[1] == seen[3] | seen[4] and not seen[0] & seen[1] and seen[0] != seen[3]
    updates = [r for r in lines(run) if r["stage"] == "update"]
    assert "kl" not in updates[0]  # it is in the reward
    told = summary(run, 2)
    table = pyarrow.parquet.read_table(run / "iterations/2/rounds/0003.parquet").to_pydict()
    assert told["updates"] == 9 and told["rounds"] == 3 and told["reward"] == pytest.approx(np.mean(table["reward"]))
    assert told["gen/kl"] == pytest.approx(np.mean(table["kl"])) and told["gen/length"] == np.mean(table["length"])
    distinct = [t for name, t in tables(run).items() if name.startswith("iterations/2/rounds")]
    assert told["labels"] == sum(len(set(zip(t["prompt_id"], t["response"]))) for t in distinct) <= 120
    # Sampled once, scored under two models, trained on once at three times the price.
    assert told["flops/score"] == 2 * told["flops/sample"] and told["flops/train"] == 3 * told["flops/sample"] > 0
    assert (run / "report.html").is_file() and "policy_gradient (advantage leave_one_out" in (
        run / "export" / "README.md"
    ).read_text()


def test_rounds_go_on_from_a_given_first_policy(whole, tiny_config):
    """loop.first: iteration 2 is that of the run which trained the policy, bit for bit."""
    run = whole("rloo", *RLOO)
    first = trainer.train(tiny_config(*ROUNDS, *RLOO, "--loop.iterations=1", run="rloo_first"))
    config = tiny_config(*ROUNDS, *RLOO, f"--loop.first={first}", run="rloo_second")
    trainer.train(config)
    second = pathlib.Path(config.run.dir)
    assert not (second / "iterations/1/rounds").exists() and "updates" not in summary(second, 1)
    direct = {name: table for name, table in tables(run).items() if name.startswith("iterations/2/rounds")}
    assert len(direct) == 3 and all(repr(tables(second)[name]) == repr(table) for name, table in direct.items())
    read = lambda folder: safetensors.numpy.load_file(folder / "export" / "model.safetensors")
    assert all(np.array_equal(array, read(run)[name]) for name, array in read(second).items())


def test_ppo_takes_several_updates_of_the_same_samples(whole):
    """Two passes: the KL is in the loss, and once the policy has moved ratios are."""
    run = whole("ppo", *PPO)
    updates = [r for r in lines(run) if r["stage"] == "update" and r["iteration"] == 1]
    assert len(updates) == 18 and summary(run, 1)["flops/train"] == 6 * summary(run, 1)["flops/sample"]
    assert abs(updates[0]["kl"]) < 1e-6 < updates[-1]["kl"]
    assert updates[0]["clip_ratio/region_mean"] == 0 < max(r["clip_ratio/region_mean"] for r in updates)
    table = pyarrow.parquet.read_table(run / "iterations/1/rounds/0002.parquet").to_pydict()
    r_PC = np.array(table["reward"]).reshape(10, 4)
    want = (r_PC - r_PC.mean(axis=1, keepdims=True)) / (r_PC.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(np.array(table["weight"]).reshape(10, 4), want, atol=1e-6)


def test_raft_imitates_the_best_candidate(whole, monkeypatch):
    run = whole("raft", *RAFT)
    for table in (t for name, t in tables(run).items() if "/rounds/" in name):
        r_PC, w_PC = (np.array(table[key]).reshape(10, 4) for key in ("reward", "weight"))
        assert (w_PC.sum(axis=1) == 1).all() and (r_PC[w_PC > 0] == r_PC.max(axis=1)).all()
    best = [t for name, t in tables(run).items() if name.startswith("iterations/1/rounds")]
    tokens = sum(n + p for t in best for n, p, w in zip(t["length"], t["prompt_length"], t["weight"]) if w)
    told = summary(run, 1)
    assert told["flops/score"] == 0 and told["flops/train"] / told["flops/sample"] == pytest.approx(
        3 * tokens / sum(sum(t["length"]) + sum(t["prompt_length"][::4]) for t in best)
    )


@pytest.mark.parametrize(
    "name, flags, program, calls",
    [
        ("rloo", RLOO, "policy_update", 5),  # in the second round of iteration 1, behind a checkpoint at its beginning
        ("ppo", PPO, "policy_update", 27),  # in the second round of iteration 2
        ("raft", RAFT, "sft_update", 11),
        ("rloo", RLOO, "decoder", 5),  # while the second round samples
    ],
)
def test_stopped_and_resumed_is_not_stopped(whole, tiny_config, stopped_at, name, flags, program, calls):
    """Metrics, samples, rewards and weights, bit for bit."""
    want = left(whole(name, *flags))
    config = tiny_config(*ROUNDS, *flags, run="stopped")
    with stopped_at(program, calls):
        trainer.train(config)
    assert not (pathlib.Path(config.run.dir) / "export").exists()
    trainer.train(config)
    got = left(pathlib.Path(config.run.dir))
    for a, b in zip(got, want):
        assert a == b


@pytest.mark.parametrize("flags", [RLOO, PPO, RAFT], ids=["rloo", "ppo", "raft"])
def test_each_learns_without_given_pairs(tiny_config, flags):
    """More different words in a response, from prompts alone."""
    config = tiny_config(
        *ROUNDS, *flags, "--data.pairs=[]", "--loop.iterations=1", "--on_policy.rounds=12", run="learns"
    )
    trainer.train(config)
    told = summary(pathlib.Path(config.run.dir), 1)
    assert told["reward"] > told["reward_first"] + 0.5 and "gen/length_ratio" not in told
    assert not any(key.startswith("watch/logp") for key in told)


def test_who_takes_part():
    """Repeated candidates have the reward of the first one; unfinished ones take no part unless they are kept."""
    ids = [np.array(i, np.int32) for i in ([3, 2], [4, 2], [3, 2], [5])]
    finished = np.array([[True, True, True, False]])
    made = Candidates(("a",), (np.array([1]),), (("x", "y", "x", "z"),), (tuple(ids),), finished)
    asked = np.array([[1.0, 2.0, np.nan, 4.0]], np.float32)
    np.testing.assert_array_equal(rounds.usable(made, asked, keep_unfinished=True), [[1, 2, 1, 4]])
    np.testing.assert_array_equal(rounds.usable(made, asked, keep_unfinished=False), [[1, 2, 1, np.nan]])


def test_a_round_without_rewards_says_so(tiny_config, monkeypatch):
    monkeypatch.setattr(rounds, "usable", lambda candidates, rewards_PC, **_: np.full(rewards_PC.shape, np.nan))
    with pytest.raises(ValueError, match="round 1 of iteration 1 has nothing to learn from: none of its 40 candidates"):
        trainer.train(tiny_config(*ROUNDS, *RLOO, run="none"))


def test_a_round_takes_each_prompt_once(tiny_config):
    config = tiny_config(*ROUNDS, *RLOO, "--on_policy.prompts=21", run="many")
    with pytest.raises(ValueError, match="on_policy.prompts is 21, expected at most the 20 prompts that have a token"):
        trainer.train(config)
