"""Arms: configs of arms, paths cut at equal cost, paired intervals, and a set of runs that goes on where it stopped."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from sera_jax import arms, winrate
from sera_jax import train as trainer
from sera_jax.arms import ArmsConfig, Path
from sera_jax.config import ConfigError
from sera_jax.run import RunBusy

ONE = {"run": {"dir": "x"}, "model": {"path": "{world}/model"}, "data": {"pairs": ["{world}/{seed}.jsonl"]}}


def config_of(tmp_path, **changes) -> ArmsConfig:
    values = {
        "out": str(tmp_path / "arms"),
        "base": ONE,
        "arms": {"dpo": {"loop.iterations": 1}, "mixed": {"loss.mix": {"ipo": 0.5}, "loop.first": "{runs}/dpo/export"}},
        "baseline": "dpo",
        "seeds": (3, 4),
        "words": {"world": "w"},
    }
    return ArmsConfig(**{**values, **changes})


def test_an_arm_is_the_base_and_its_keys(tmp_path):
    made = arms.arm_config(config_of(tmp_path), "mixed", 3)
    assert (made.run.dir, made.run.seed) == (str(tmp_path / "arms" / "3" / "mixed"), 3)
    assert (made.model.path, made.data.pairs) == ("w/model", ("w/3.jsonl",))
    assert (made.loss.mix, made.loop.first) == ({"ipo": 0.5}, str(tmp_path / "arms" / "3" / "dpo" / "export"))
    assert arms.arm_config(config_of(tmp_path), "dpo", 4).loop.iterations == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "sera"}, "got 'sera', expected one of: dpo, mixed"),
        ({"only": ("sera",)}, "got 'sera', expected one of: dpo, mixed"),
        ({"seeds": ()}, "seeds is empty"),
        ({"table": "never"}, "table is 'never', expected 'after' or 'only'"),
        ({"words": {}}, r"arm dpo: '\{world\}/model' names 'world', expected one of seed, runs"),
        ({"arms": {"dpo": {"loss.gama": 1.0}}}, "gama"),
    ],
)
def test_what_cannot_be_run_is_told_first(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        arms.check(config_of(tmp_path, **changes))


def path_of(reward_TP, kl_T, flops_T, **told) -> Path:
    reward_TP, kl_T, flops_T = (np.asarray(a, float) for a in (reward_TP, kl_T, flops_T))
    return Path(reward_TP, kl_T, np.full(len(reward_TP), 5.0), flops_T, told)


def test_a_path_is_cut_where_it_first_reaches_a_cost():
    reward_TP = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 2.0]])
    kl_T = np.array([0.0, 1.0, 3.0])
    for kl, expected in ((0.0, [0, 0]), (0.5, [0.5, 1]), (1.0, [1, 2]), (2.0, [2, 2]), (3.0, [3, 2]), (9.0, [3, 2])):
        assert np.allclose(arms.at(reward_TP, kl_T, kl), expected)
    bent = np.array([0.0, 2.0, 1.0])  # a path that comes back: the first crossing counts
    assert np.allclose(arms.at(reward_TP, bent, 1.5), [0.75, 1.5])


def test_comparisons_at_equal_updates_kl_and_flops():
    """The arm gains as much a nat as the baseline and goes twice as far at 1.5 times the FLOPs."""
    base = path_of([[0.0] * 4, [1.0] * 4], [0, 1], [0, 10])
    arm = path_of([[0.0] * 4, [2.0] * 4], [0, 2], [0, 15])
    told = arms.compare([arm, arm], [base, base])
    assert told["reward"].mean == 1.0 and told["win"].mean == 1.0
    assert told["reward_at_kl"].mean == pytest.approx(0.0)
    assert told["reward_at_flops"].mean == pytest.approx(2 * 10 / 15 - 1)
    assert arms.own([path_of([[0.0], [1.0]], [0, 1], [0, 1], **{"sera/x": 3.0})])["told"]["sera/x"] == 3.0


def test_runs_that_do_not_share_a_start_are_not_compared(tmp_path):
    """Runs of another machine: rounding drew other samples, so neither worlds nor noise are paired."""
    config, one = config_of(tmp_path), path_of([[0.25, 0.5], [1.0, 1.0]], [0, 1], [0, 1])
    other = path_of([[0.5, 0.25], [1.0, 1.0]], [0, 1], [0, 1])  # the same mean
    arms.paired(config, {(3, "dpo"): one, (3, "mixed"): one, (4, "mixed"): other})
    with pytest.raises(ValueError, match="arm mixed of seed 3 with mean reward 0.3750 at its start.*on other machines"):
        arms.paired(config, {(3, "dpo"): one, (3, "mixed"): other})


def test_the_interval_over_seeds_holds_both_kinds_of_noise():
    rng = np.random.default_rng(0)
    effects = rng.normal(0.0, 1.0, 12)
    values = [e + rng.normal(0.0, 2.0, 400) for e in effects]
    told = winrate.over_seeds(values)
    assert told.mean == pytest.approx(np.mean([v.mean() for v in values]))
    error = np.sqrt(
        (np.var(effects) + 2 * 4 / 400) / 12
    )  # of seeds, and of prompts twice: in the sample, in the resample
    assert (told.high - told.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    alone = winrate.over_seeds(values[:1])
    assert (alone.high - alone.low) / 2 == pytest.approx(1.96 * 2 / 20, rel=0.15)
    with pytest.raises(ValueError, match="at least one each"):
        winrate.over_seeds([])


def test_arms_run_share_resume_and_become_a_table(tiny, tiny_config, tmp_path, monkeypatch, capsys):
    """Two arms on two seeds; the second call runs nothing, the table says what the evaluation files say."""
    # tiny_config has put the reward on the path and one device under every mesh
    base = {
        "run": {"dir": "", "compilation_cache": "off", "ledger": str(tmp_path / "ledger-{seed}")},
        "model": {"path": str(tiny / "model"), "weights": "random"},
        "data": {"pairs": [str(tiny / "pairs.jsonl")], "max_length": 48, "max_prompt_length": 24, "limit": 16},
        "optimizer": {"batch_size": 8, "learning_rate": 3e-3, "row_tokens": 128, "microbatch_rows": 1},
        "bootstrap": {"fresh": 0, "slots": 16},
        "evaluate": {
            "prompts": [str(tiny / "prompts.jsonl")],
            "function": "tiny_reward:count",
            "max_new_tokens": 10,
            "temperature": 1.0,
        },
        "mesh": {"fsdp": 1},
        "loop": {"iterations": 2},
    }
    first = "{runs}/one/export"
    config = ArmsConfig(
        out=str(tmp_path / "arms"),
        base=base,
        arms={
            "one": {"loop.iterations": 1},
            "dpo": {"loop.first": first, "select.rule": "all"},
            "top": {"loop.first": first, "select.keep": 0.5},
        },
        baseline="dpo",
        seeds=(0, 1),
    )
    calls = []
    train = trainer.train
    monkeypatch.setattr(trainer, "train", lambda c: calls.append(c.run.dir) or train(c))
    arms.check(config)
    arms.run(config)
    assert calls == [str(arms.folder(config, name, seed)) for seed in (0, 1) for name in ("one", "dpo", "top")]
    arms.run(config)
    assert len(calls) == 6  # nothing was left to do
    arms.write_table(config)
    told = json.loads((tmp_path / "arms" / "table.json").read_text())
    assert list(told) == ["one", "dpo", "top"] and told["top"]["paired_seeds"] == [0, 1]
    paths = {name: [arms.read(config, name, s) for s in (0, 1)] for name in told}
    gaps = [a.reward_TP[2].mean() - b.reward_TP[2].mean() for a, b in zip(paths["top"], paths["dpo"])]
    assert told["top"]["against"]["reward"]["mean"] == pytest.approx(np.mean(gaps))
    for a, b in zip(paths["top"], paths["dpo"]):
        assert np.array_equal(a.reward_TP[:2], b.reward_TP[:2]) and a.kl_T[1] == b.kl_T[1]  # one first policy
        assert a.flops_T[1] == b.flops_T[1] > 0 and a.flops_T[2] > b.flops_T[2]  # selection scores the given pairs
    # One epoch trains on every pair once and scores it under the reference: 3 + 1 forward passes of 2 FLOPs a weight.
    weights = safetensors.numpy.load_file(arms.folder(config, "one", 0) / "export" / "model.safetensors")
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()][:16]
    words = sum(
        len(r["prompt"].split()) + len(r["chosen"].split()) + len(r["rejected"].split()) + 2 for r in rows
    )  # EOS twice
    forward = 2 * sum(w.size for w in weights.values()) * words
    assert paths["one"][0].flops_T.tolist() == [0, 4 * forward]
    assert paths["dpo"][0].flops_T.tolist() == [0, 4 * forward, 7 * forward]
    assert paths["top"][0].flops_T[2] - 4 * forward > forward  # and one pass to score them, before training on half
    text = (tmp_path / "arms" / "table.md").read_text()
    assert text.count("\n") == 5 and "| top | 2 |" in text
    # Without the folders the table is the same, and a new arm makes only the first policies again.
    table = (tmp_path / "arms" / "table.json").read_text()
    shutil.rmtree(arms.folder(config, "top", 0))
    shutil.rmtree(arms.folder(config, "dpo", 0))
    shutil.rmtree(arms.folder(config, "one", 0))
    arms.run(config)
    arms.write_table(config)
    assert len(calls) == 6 and (tmp_path / "arms" / "table.json").read_text() == table
    # Runs of another base are not taken for these, whether they are there as folders or are stored.
    other = dataclasses.replace(config, base=base | {"loss": {"beta": 5.0}})
    with pytest.raises(ValueError, match=r"seed 0, arm dpo: .*runs.parquet holds it, but .* differs in base.loss "):
        arms.run(other)
    with pytest.raises(ValueError, match="runs.parquet holds it, but made of something else"):
        arms.write_table(other)
    with pytest.raises(ValueError, match=r"seed 1, arm one: .* complete, but .* differs in loss.beta \(0.1 → 5.0\)"):
        arms.made(other, 1, "one")
    more = dataclasses.replace(config, arms=config.arms | {"low": {"loop.first": first, "select.rule": "bottom_k"}})
    arms.run(dataclasses.replace(more, seeds=(0,)))
    assert [pathlib.Path(c).name for c in calls[6:]] == ["one", "low"]
    # The first policy is trained where only an arm that starts from it is asked for; what it cost may be stored alone.
    alone = dataclasses.replace(config, out=str(tmp_path / "alone"), seeds=(0,), only=("top",))
    arms.run(alone)
    assert [pathlib.Path(c).name for c in calls[8:]] == ["one", "dpo", "top"]
    arms.write_table(dataclasses.replace(alone, only=()))
    shutil.rmtree(arms.folder(alone, "one", 0))
    assert arms.read(alone, "top", 0).flops_T[1] == paths["top"][0].flops_T[1]
    (tmp_path / "alone" / "runs.parquet").unlink()
    with pytest.raises(ValueError, match="from which others start, is gone"):
        arms.read(alone, "top", 0)
    # What starts from a run that another process holds waits until that one is done.
    (tmp_path / "arms" / "runs.parquet").unlink()
    shutil.rmtree(arms.folder(config, "top", 1))
    done = arms.folder(config, "one", 1) / "result.json"
    result = done.read_text()
    done.unlink()
    naps = []

    def other_process(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            done.write_text(result)

    def held(c):
        if c.run.dir.endswith("one"):
            raise RunBusy("held by process 7")
        return train(c)

    monkeypatch.setattr(arms.time, "sleep", other_process)
    monkeypatch.setattr(trainer, "train", held)
    arms.run(dataclasses.replace(config, seeds=(1,)))
    assert naps == [arms.PATIENCE] * 2 and arms.made(config, 1, "top")
    # A run that another process holds is left to it.
    (arms.folder(config, "top", 1) / "result.json").unlink()

    def busy(_):
        raise RunBusy("held by process 7")

    monkeypatch.setattr(trainer, "train", busy)
    capsys.readouterr()
    arms.run(dataclasses.replace(config, seeds=(1,)))
    assert "left to another process: held by process 7" in capsys.readouterr().out
    assert arms.read(config, "top", 1) is None
    arms.write_table(dataclasses.replace(config, only=("top",)))
    assert json.loads((tmp_path / "arms" / "table.json").read_text()).keys() == {"dpo"}
