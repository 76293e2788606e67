"""The recipes in configs/ do what their names say: each runs on a tiny world, and what its iterations train on is
looked at. Sizes are the tiny world's; what makes the method is the file's own.
"""

import json
import pathlib

import numpy as np
import pyarrow.parquet
import pytest

from sera_jax import config as configs
from sera_jax import hf, policies
from sera_jax import train as trainer
from sera_jax.train import fresh, select, update

ROOT = pathlib.Path(__file__).parents[1]
LIVE = policies.Live(policies.Name("iterate", 9), None)  # nothing is in memory: what is asked for is in the ledger
SIZES = (
    "--run.compilation_cache=off",
    "--run.log_every=1",
    "--model.weights=random",
    "--model.compute=float32",
    "--data.max_length=48",
    "--data.max_prompt_length=24",
    "--optimizer.batch_size=8",
    "--optimizer.learning_rate=3e-3",
    "--optimizer.row_tokens=128",
    "--optimizer.microbatch_rows=1",
    "--bootstrap.max_new_tokens=10",
    "--bootstrap.slots=16",
    "--bootstrap.unfinished=keep",
    "--mesh.fsdp=1",
)


@pytest.fixture
def run(tiny, tiny_config, tmp_path, monkeypatch):
    """run(names of files, *flags) → {iteration: (world, training stage, what was sampled)}, summaries, run folder."""

    def runs(names: str, *flags: str, folder: str = "run"):
        caught, make = {}, update.training_set

        def caught_set(world, t, scored, chosen, made):
            stage = make(world, t, scored, chosen, made)
            caught[t] = (world, stage, made)
            return stage

        monkeypatch.setattr(update, "training_set", caught_set)
        files = [f"--config={ROOT / 'configs' / name}.yaml" for name in names.split()]
        own = (f"--run.dir={tmp_path / folder}", f"--model.path={tiny / 'model'}")
        config = configs.parse(configs.TrainConfig, [*files, *own, *SIZES, *flags])
        trainer.train(config)
        monkeypatch.setattr(update, "training_set", make)
        path = pathlib.Path(config.run.dir)
        told = [json.loads((path / "iterations" / str(t) / "summary.json").read_text()) for t in sorted(caught)]
        return caught, told, path

    return runs


def write(path, rows) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_of(tiny) -> list[dict]:
    return [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]


def test_spin_plays_given_responses_against_the_policys_own(run, tiny):
    caught, told, _ = run(
        "spin", f"--data.pairs=[{tiny / 'pairs.jsonl'}]", "--data.limit=8", "--loop.iterations=3", "--loop.epochs=1"
    )
    made = {}
    for t, (world, stage, made_) in caught.items():
        given = {tree.prompt.tobytes(): tree.branches[0].tobytes() for tree in world.given.trees}
        samples = {p.tobytes(): row[0].tobytes() for p, row in zip(made_.sampled.prompts, made_.sampled.tokens_PC)}
        made[t] = [tree.id for tree in made_.fresh.trees]
        assert 5 <= len(made[t]) <= 8 and made_.fresh.kept_F.all()
        for tree in stage.trees:
            assert tree.branches[0].tobytes() == given[tree.prompt.tobytes()]
        for tree in made_.fresh.trees:
            assert tree.branches[1].tobytes() == samples[tree.prompt.tobytes()]
        assert select.loss_reference(world, t).t == t - 1  # the opponent
        assert len(stage.batches) == -(-len(stage.trees) // 8) and world.config.loop.passes == "all"
    assert len(caught[1][1].trees) == len(made[1])
    for t in (2, 3):  # its own pairs and those of the iteration before, no older ones
        assert [tree.id for tree in caught[t][1].trees] == made[t] + made[t - 1]
    assert [summary["updates"] for summary in told] == [len(stage.batches) for _, stage, _ in caught.values()]


def test_sdpo_takes_one_file_after_the_other(run, tiny, tmp_path):
    rows = pairs_of(tiny)[:20]
    one, two = write(tmp_path / "one.jsonl", rows[:6]), write(tmp_path / "two.jsonl", rows[6:])
    caught, told, _ = run("sdpo", f"--data.pairs=[{one}, {two}]")
    ids = {t: [tree.id for tree in stage.trees] for t, (_, stage, _) in caught.items()}
    assert ids == {1: [f"p{i}" for i in range(6)], 2: [f"p{i}" for i in range(6, 20)]}
    for t, (world, stage, made) in caught.items():
        assert made is None and select.loss_reference(world, t).t == t - 1
        want = select.pair_logps(world, select.loss_reference(world, t), stage.trees, LIVE)
        np.testing.assert_array_equal(stage.reference_F, want.reshape(-1))
    assert [summary["updates"] for summary in told] == [1, 2] and [s["pairs/given"] for s in told] == [6, 14]


def test_curry_dpo_goes_from_easy_to_hard(run, tiny, tmp_path):
    rows = [
        {"id": row["id"], "prompt": row["prompt"], "responses": ["red", "red dog", "dog sees", "a small box"],
         "scores": [10 * i + n, 4, 1 + n, -n]}
        for i, (row, n) in enumerate(zip(pairs_of(tiny)[:8], range(2, 10)), start=1)
    ]  # fmt: skip
    caught, _, _ = run("curry_dpo", f"--data.pairs=[{write(tmp_path / 'ranked.jsonl', rows)}]")
    seen = {t: {tree.id for tree in stage.trees} for t, (_, stage, _) in caught.items()}
    for t in (1, 2, 3):
        want = set()
        for row in rows:
            order = sorted(range(4), key=lambda i: row["scores"][i])  # the worst first
            want.add(f"{row['id']}/{order[-1]}>{order[t - 1]}")
        assert seen[t] == want
        assert select.loss_reference(caught[t][0], t).t == t - 1


def test_iterative_dpo_filters_nothing(run, tiny):
    flags = (f"--data.pairs=[{tiny / 'pairs.jsonl'}]", "--data.limit=16", "--loop.iterations=2")
    caught, _, _ = run("iterative_dpo", *flags)
    world, stage, made = caught[2]
    assert made.candidates.finished_PC.shape == (16, 5) and made.ranked.kl is not None
    assert [tree.id for tree in stage.trees[:16]] == [tree.id for tree in world.given.trees]
    assert len(stage.trees) == 16 + len(made.fresh.trees) and made.fresh.kept_F.all() and len(made.fresh.trees) > 12


def test_dice_ranks_by_the_step_before_without_length(run, tiny, tmp_path):
    given = f"--data.pairs=[{tiny / 'pairs.jsonl'}]"
    _, _, dpo = run("iterative_dpo", given, "--loop.iterations=1", folder="dpo")
    flags = (given, f"--data.prompts=[{tiny / 'prompts.jsonl'}]", f"--loop.first={dpo / 'export'}")
    caught, told, path = run("dice", *flags, "--bootstrap.candidates=8")
    assert sorted(caught) == [2, 3]  # iteration 1 is the given policy
    for t, (world, stage, made) in caught.items():
        live = policies.Live(policies.Name("iterate", t - 1), None)
        assert select.reward_reference(world, live).t == t - 2 and select.loss_reference(world, t).t == t - 1
        fresh_ = {tree.id for tree in made.fresh.trees}
        offline = [tree for tree in stage.trees if tree.id not in fresh_]
        assert len(offline) == 22 and len(stage.trees) - 22 == made.fresh.kept_F.sum() <= 22
        gap = lambda rule, texts=made.candidates.texts_PC: np.mean(
            [len(texts[p][a]) - len(texts[p][b]) for p, a, b in rule]
        )
        best = [(p, *pair) for p, pair in zip(made.fresh.prompt_F, made.fresh.pair_F2)]
        biased = [(p, int(np.argmax(row)), int(np.argmin(row))) for p, row in enumerate(made.ranked.rewards_PC)]
        alpha = made.ranked.told["reward/length_penalty"]
        assert alpha >= 0 and (alpha == 0 or abs(gap(best)) < abs(gap(biased)))
    assert all("reward/length_penalty" in summary for summary in told)


@pytest.fixture
def ranker(tiny, tmp_path, one_device):
    """A reward model of drawn weights."""
    scored = policies.with_score(policies.open_folder(str(tiny / "model"), one_device, compute="float32", seed=5), 5)
    hf.save(tmp_path / "rm", scored.arch, scored.load(), source=str(tiny / "model"), dtype=np.float32, card=[])
    return tmp_path / "rm"


def test_rlhf_workflow_needs_prompts_and_a_reward_model(run, tiny, tmp_path, ranker):
    """No given pairs; new prompts in each iteration; earlier pairs again; the best iterate by its validation reward."""
    lines = (tiny / "prompts.jsonl").read_text().splitlines()
    asked = write(tmp_path / "validation.jsonl", [json.loads(line) for line in lines[:4]])
    flags = (f"--data.prompts=[{tiny / 'prompts.jsonl'}]", f"--evaluate.prompts=[{asked}]", "--loop.iterations=2")
    caught, told, path = run(
        "rlhf_workflow", *flags, f"--reward.model={ranker}", "--evaluate.max_new_tokens=10", "--bootstrap.candidates=4"
    )
    prompts = {t: {prompt.id for prompt in made.prompts} for t, (_, _, made) in caught.items()}
    assert len(prompts[1]) == len(prompts[2]) == 7 and not prompts[1] & prompts[2]
    for t, (world, stage, made) in caught.items():
        reward = np.where(fresh.valid(world, made.candidates), made.ranked.rewards_PC, -np.inf)
        assert (
            made.fresh.kept_F.all() and (made.fresh.pair_F2[:, 0] == reward.argmax(axis=1)[made.fresh.prompt_F]).all()
        )
        assert select.loss_reference(world, t).t == 0 and not world.given.trees
        assert len(stage.batches) == 2 * -(-len(stage.trees) // 8)
    both = [tree.id for t in (2, 1) for tree in caught[t][2].fresh.trees]
    assert [tree.id for tree in caught[2][1].trees] == both  # D_1 ∪ D_2
    by_reward = [summary["eval/reward"] for summary in told]
    assert [summary["validation/best"] for summary in told] == by_reward
    assert json.loads((path / "result.json").read_text())["iteration"] == 1 + int(np.argmax(by_reward))
    table = pyarrow.parquet.read_table(path / "evaluation" / "1.parquet").to_pydict()
    assert np.mean(table["reward"]) == pytest.approx(by_reward[0], abs=1e-6) and len(set(table["reward"])) > 1


def test_rlhf_workflows_code_differs_where_it_says():
    files = [f"--config={ROOT / 'configs' / name}.yaml" for name in ("rlhf_workflow", "rlhf_workflow_code")]
    paper, code = (configs.parse(configs.TrainConfig, files[:n]) for n in (1, 2))
    told = lambda c: (c.loss.reference, c.loss.label_smoothing, c.bootstrap.candidates, c.bootstrap.temperature)
    assert told(paper) == ("initial", 0.0, 8, (1.0, 0.7)) and told(code) == ("previous", 0.1, 4, 1.0)
    assert (paper.bootstrap.replay, code.bootstrap.replay, code.loop.best) == (True, False, False)
    assert code.optimizer == paper.optimizer and code.loop.epochs == 2 and code.select == paper.select


def test_combined_takes_the_worst_of_its_sources(run, tiny, ranker):
    sources = {f"model:{ranker}": 1.0, "function:sera_jax.rewards:text_length": 1.0, "implicit": 1.0}
    flags = (f"--data.pairs=[{tiny / 'pairs.jsonl'}]", "--data.limit=16", "--loop.iterations=2")
    caught, told, path = run("combined", *flags, f"--reward.sources={json.dumps(sources)}")
    world, _, made = caught[2]
    valid_PC = fresh.valid(world, made.candidates)
    each = np.stack([made.ranked.sources[name] for name in sources])
    live = each[:, valid_PC].astype(np.float64)
    z = (live - live.mean(axis=1, keepdims=True)) / live.std(axis=1, keepdims=True)
    np.testing.assert_allclose(made.rewards_PC[valid_PC], z.min(axis=0), atol=1e-4)
    assert [len(text) for text in made.candidates.texts_PC[0]] == each[1, 0].tolist() and valid_PC.sum() > 64
    table = pyarrow.parquet.read_table(path / "iterations" / "2" / "rewards.parquet").to_pydict()
    assert list(table) == ["prompt_id", "candidate", *sources, "reward"] and len(table["reward"]) == 128
    assert len([key for key in told[1] if key.startswith("agree/")]) == 9
