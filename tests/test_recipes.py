"""The recipes in configs/ do what their names say: each runs on a tiny world, and what its iterations train on is
looked at. Sizes are the tiny world's; what makes the method is the file's own.
"""

import contextlib
import functools
import json
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from sera_jax import config as configs
from sera_jax import hf, losses, policies, preference, step
from sera_jax import run as run_room
from sera_jax import train as trainer
from sera_jax.toyworld import authors
from sera_jax.train import fresh, select, update

ROOT = pathlib.Path(__file__).parents[1]
LIVE = policies.Live(policies.Name("iterate", 9), None)  # nothing is in memory: what is asked for is in the ledger
SIZES = (
    "--run.compilation_cache=off",
    "--run.log_every=1",
    "--model.weights=random",
    "--model.compute=float32",
    "--model.attention=xla",
    "--model.remat=none",
    "--data.max_length=48",
    "--data.max_prompt_length=24",
    "--optimizer.batch_size=8",
    "--optimizer.learning_rate=3e-3",
    "--optimizer.row_tokens=128",
    "--optimizer.microbatch_rows=1",
    "--optimizer.row_shapes=1",
    "--bootstrap.max_new_tokens=10",
    "--bootstrap.slots=16",
    "--bootstrap.unfinished=keep",
    "--mesh.fsdp=1",
)


class Ready(Exception):
    """In the place of the last iteration's updates."""


@pytest.fixture
def run(tiny, tiny_config, tmp_path, monkeypatch):
    """run(names of files, *flags) → {iteration: (world, training stage, what was sampled)}, summaries, run folder.

    train False: the last iteration ends before its first update, with all that it has made on disk.
    """

    def runs(names: str, *flags: str, folder: str = "run", train: bool = True):
        caught, make = {}, update.training_set

        def caught_set(world, t, scored, chosen, made):
            stage = make(world, t, scored, chosen, made)
            caught[t] = (world, stage, made)
            return stage

        monkeypatch.setattr(update, "training_set", caught_set)
        files = [f"--config={ROOT / 'configs' / name}.yaml" for name in names.split()]
        own = (f"--run.dir={tmp_path / folder}", f"--model.path={tiny / 'model'}")
        config = configs.parse(configs.TrainConfig, [*files, *own, *SIZES, *flags])
        stage, last = run_room.run_stage, config.loop.iterations

        def ready(run_, of, *args, **keywords):
            if of.iteration == last:
                raise Ready
            return stage(run_, of, *args, **keywords)

        with monkeypatch.context() as patched, contextlib.nullcontext() if train else pytest.raises(Ready):
            if not train:
                patched.setattr(run_room, "run_stage", ready)
            trainer.train(config)
        monkeypatch.setattr(update, "training_set", make)
        path = pathlib.Path(config.run.dir)
        done = [t for t in sorted(caught) if train or t < last]
        told = [json.loads((path / "iterations" / str(t) / "summary.json").read_text()) for t in done]
        return caught, told, path

    return runs


def write(path, rows) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_of(tiny) -> list[dict]:
    return [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]


def updates_of(path) -> list[dict]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["stage"] == "update"]


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def first(kept, run, tiny):
    """A policy that has been through DPO, for recipes that begin behind one."""
    if "first" not in kept:
        given = f"--data.pairs=[{tiny / 'pairs.jsonl'}]"
        kept["first"] = run("iterative_dpo", given, "--loop.iterations=1", folder="first")[2] / "export"
    return f"--loop.first={kept['first']}"


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


def test_dice_ranks_by_the_step_before_without_length(run, tiny, first):
    flags = (f"--data.pairs=[{tiny / 'pairs.jsonl'}]", f"--data.prompts=[{tiny / 'prompts.jsonl'}]", first)
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


# RLHF Workflow (Dong et al. 2024, arXiv 2405.07863), online iterative DPO: what is published of each key.
WORKFLOW = {
    "model.compute": "bfloat16",
    "data.max_length": 2048,
    "data.max_prompt_length": 1000,
    "loop.iterations": 3,
    "loop.epochs": 2,
    "loop.passes": "all",
    "loop.start": "previous",
    "loop.best": True,
    "loop.best_by": "reward",
    "loss.name": "dpo",
    "loss.beta": 0.1,
    "loss.label_smoothing": 0.0,
    "loss.reference": "initial",
    "reward.source": "model",
    "reward.length_penalty": 0.0,
    "reward.length_unit": "characters",
    "bootstrap.from_iteration": 1,
    "bootstrap.fresh": 1.0,
    "bootstrap.candidates": 8,
    "bootstrap.prompts_per_iteration": 0.33333,  # 20,000 of 60,000
    "bootstrap.prompts_drawn": "in_turn",
    "bootstrap.temperature": (1.0, 0.7),
    "bootstrap.top_p": 1.0,
    "bootstrap.top_k": 0,
    "bootstrap.max_new_tokens": 2048,
    "bootstrap.pair_rule": "best_worst",
    "bootstrap.replay": True,
    "optimizer.learning_rate": 5e-7,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.03,
    "optimizer.batch_size": 128,
}
# The last version of its code, run_loop2.sh, where it is another.
WORKFLOW_CODE = WORKFLOW | {
    "loop.best": False,
    "loss.label_smoothing": 0.1,
    "loss.reference": "previous",
    "bootstrap.candidates": 4,
    "bootstrap.temperature": 1.0,
    "bootstrap.replay": False,
    "optimizer.warmup": 0.318,  # 100 updates
}
# Its pairwise preference model, and its reward model; weight decay is the code's.
PREFERENCE = {
    "kind": "preference",
    "epochs": 1,
    "data.max_length": 3072,
    "preference.orders": "random",
    "preference.labels": ("A", "B"),
    "optimizer.learning_rate": 5e-6,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.03,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip": 1.0,
    "optimizer.batch_size": 128,
}
SPPO = {  # Wu et al. 2024, arXiv 2405.00675
    "loop.iterations": 3,
    "loop.start": "previous",
    "loss.name": "sppo",
    "loss.beta": 0.001,
    "loss.reference": "previous",
    "bootstrap.candidates": 5,
    "bootstrap.temperature": 0.7,
    "bootstrap.top_p": 0.9,
    "bootstrap.pair_rule": "best_worst",
    "optimizer.learning_rate": 5e-7,
    "optimizer.schedule": "linear",
    "optimizer.batch_size": 64,
}
REWARD = {
    "kind": "bradley_terry",
    "epochs": 1,
    "optimizer.learning_rate": 2e-6,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.03,
    "optimizer.weight_decay": 0.001,
    "optimizer.batch_size": 512,
}


@pytest.mark.parametrize(
    "names, published",
    [
        ("rlhf_workflow", WORKFLOW),
        ("rlhf_workflow rlhf_workflow_code", WORKFLOW_CODE),
        ("preference_hh", PREFERENCE),
        ("preference_head_hh", PREFERENCE | {"kind": "preference_head"}),
        ("reward_hh", REWARD),
        ("sppo", SPPO),
    ],
)
def test_published_values_are_those_of_the_papers(names, published):
    files = [f"--config={ROOT / 'configs' / name}.yaml" for name in names.split()]
    record = configs.RewardModelConfig if "kind" in published else configs.TrainConfig
    given = ["--data.pairs=[P.jsonl]"] if names != "rlhf_workflow" and "_code" not in names else []
    config = configs.parse(record, [*files, "--model.path=M", *given])
    told = {key: functools.reduce(getattr, key.split("."), config) for key in published}
    assert told == published


def test_whatever_is_labelled_published_is_pinned():
    """Of the keys of rlhf_workflow.yaml all but those that name a model or a file."""
    section, labelled = "", set()
    for line in (ROOT / "configs" / "rlhf_workflow.yaml").read_text(encoding="utf-8").splitlines():
        section = line.split(":")[0] if re.match(r"\w+:", line) else section
        if re.match(r"  \w+: .*# .*published", line):
            labelled.add(f"{section}.{line.split(':')[0].strip()}")
    assert labelled - set(WORKFLOW) == {"model.path", "data.prompts", "reward.model"} and len(labelled) > 25


def test_the_codes_warm_up_is_a_hundred_updates():
    """Of an iteration in which each of its 20,000 prompts has a pair."""
    updates = 2 * -(-20_000 // 128)
    of = {"peak": 1.0, "schedule": "cosine", "warmup": WORKFLOW_CODE["optimizer.warmup"]}
    rate = [float(step.learning_rate(jnp.int32(n), jnp.int32(updates), **of)) for n in range(updates)]
    assert max(range(updates), key=rate.__getitem__) == 99 and rate[49] == pytest.approx(0.5)


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


# --- preferences that are compared ------------------------------------------------------------------------------------


def longer(first: str, second: str) -> float:
    """tiny_reward:longer, by hand."""
    gap = len(first.split()) - len(second.split())
    return 0.5 + np.sign(gap) / 4


FOUR = "--bootstrap.candidates=4"  # of all of them: they share a sampler


@pytest.fixture
def played(run, tiny, kept, tmp_path_factory):
    """One iteration of self-play on twelve prompts; recipes share the log-probs of their start."""
    kept.setdefault("ledger", tmp_path_factory.mktemp("ledger"))

    def play(name: str, *flags: str, train: bool = False):
        given = (f"--data.pairs=[{tiny / 'pairs.jsonl'}]", "--data.limit=12", f"--run.ledger={kept['ledger']}", FOUR)
        game = ("--reward.function=tiny_reward:longer", "--loop.iterations=1")
        caught, _, path = run(name, *given, *flags, *game, train=train)
        world, stage, made = caught[1]
        assert [tree.id for tree in stage.trees] == [tree.id for tree in made.fresh.trees] and len(stage.trees) > 6
        assert made.ranked.prob_PCC is not None and made.fresh.kept_F.all()  # no given pair trains
        return world, stage, made, path

    return play


def loss_at_start(world, stage) -> np.ndarray:
    """The run's loss of what it is about to train on, where the policy is still its reference."""
    logp_P2 = jnp.asarray(stage.reference_F).reshape(-1, 2)
    length_P2 = jnp.array([[len(branch) for branch in tree.branches] for tree in stage.trees], jnp.float32)
    told = losses.told(world.loss, jnp.array([tree.told for tree in stage.trees], jnp.float32))
    return np.asarray(world.loss.loss(logp_P2, logp_P2, length_P2, *told, **world.loss_keys))


def test_sppo_learns_how_often_each_response_wins(played):
    """Among the candidates of its prompt; squares of (win - ½)/β at the published β; against the iterate before."""
    world, stage, made, path = played("sppo", train=True)
    texts_PC = made.candidates.texts_PC
    assert made.candidates.finished_PC.shape == (12, 4) and world.config.bootstrap.top_p == 0.9
    others = lambda p, c: [texts_PC[p][j] for j in range(4) if j != c and texts_PC[p][j]]
    wins = [
        [np.mean([longer(texts_PC[p][c], text) for text in others(p, c)]) for c in pair]
        for p, pair in zip(made.fresh.prompt_F, made.fresh.pair_F2)
    ]
    np.testing.assert_allclose([tree.values for tree in stage.trees], wins, atol=1e-6)
    want = ((np.array(wins) - 0.5) ** 2).sum(axis=1) / 0.001**2
    np.testing.assert_allclose(loss_at_start(world, stage), want, rtol=1e-5)
    np.testing.assert_allclose(updates_of(path)[0]["loss"], want[stage.batches[0]].mean(), rtol=1e-4)
    assert select.loss_reference(world, 3).t == 2


def test_self_play_ipo_learns_who_of_two_is_preferred(played):
    world, stage, made, _ = played("self_play_ipo", "--bootstrap.candidates=2")
    texts_PC = made.candidates.texts_PC
    assert made.candidates.finished_PC.shape == (12, 2) and select.loss_reference(world, 3).t == 0
    said = [[texts_PC[p][c] for c in pair] for p, pair in zip(made.fresh.prompt_F, made.fresh.pair_F2)]
    prefer = np.array([[longer(*two), longer(*two[::-1])] for two in said])
    np.testing.assert_allclose([tree.values for tree in stage.trees], prefer, atol=1e-6)
    want = ((prefer[:, 0] - prefer[:, 1]) / (2 * 0.1)) ** 2
    np.testing.assert_allclose(loss_at_start(world, stage), want, rtol=1e-4)


def test_nash_md_wins_against_a_mixture(played):
    """Whose samples are kept beside the policy's own."""
    world, stage, made, path = played("nash_md")
    lines = (path / "iterations" / "1" / "opponents.jsonl").read_text().splitlines()
    against = {row["id"]: [text for text in row["responses"] if text] for row in map(json.loads, lines)}
    assert world.config.bootstrap.mixture == 0.125 and len(against) == 12 and sum(map(len, against.values())) > 36
    assert made.candidates.finished_PC.shape == (12, 4) and made.opponents.texts_PC != made.candidates.texts_PC
    wins = [
        [
            np.mean([longer(made.candidates.texts_PC[p][c], text) for text in against[made.candidates.ids[p]]])
            for c in two
        ]
        for p, two in zip(made.fresh.prompt_F, made.fresh.pair_F2)
    ]
    np.testing.assert_allclose([tree.values for tree in stage.trees], wins, atol=1e-6)
    want = ((np.array(wins) - 0.5) ** 2).sum(axis=1) / 0.1**2
    np.testing.assert_allclose(loss_at_start(world, stage), want, rtol=1e-4, atol=1e-8)


@pytest.fixture
def preferring(tiny, tmp_path, one_device):
    """A preference model with a head, of drawn weights."""
    scored = policies.with_score(policies.open_folder(str(tiny / "model"), one_device, compute="float32", seed=5), 5)
    form = preference.told(preference.Form(True, max_length=96, max_prompt_length=48))
    of = {"source": str(tiny / "model"), "dtype": np.float32, "extra": form}
    hf.save(tmp_path / "pm", scored.arch, scored.load(), **of)
    return tmp_path / "pm"


def test_preference_online_trains_on_the_most_certain_pair(run, tiny, preferring):
    flags = (f"--data.pairs=[{tiny / 'pairs.jsonl'}]", "--data.limit=8", "--loop.iterations=1")
    caught, _, path = run("preference_online", *flags, f"--reward.model={preferring}", FOUR, train=False)
    world, stage, made = caught[1]
    table = pyarrow.parquet.read_table(path / "iterations" / "1" / "probabilities.parquet").to_pylist()
    best: dict[str, float] = {}
    for row in table:
        best[row["prompt_id"]] = max(best.get(row["prompt_id"], 0), row["probability"], 1 - row["probability"])
    assert len(table) > 30 and len(made.fresh.trees) > 6
    chosen = [best[made.candidates.ids[p]] for p in made.fresh.prompt_F]
    np.testing.assert_allclose(made.fresh.preference_F2[:, 0], chosen, rtol=1e-6)
    assert len(stage.trees) == 8 + len(made.fresh.trees)  # the given pairs all stay


@pytest.fixture
def judging(script):
    """launch/judge_server.py on a free port; its address, and what it sees in a response."""
    pytest.importorskip("openai")
    module = script("launch/judge_server.py")
    command = [sys.executable, module.__file__, "--port", "0", "--noise", "1", "--temperature", "0.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split()[-1], lambda prompt, text: module.seen(prompt, text, 1.0)
        process.terminate()


def test_judge_asks_an_endpoint_about_every_two_candidates(run, tiny, tmp_path, judging, monkeypatch):
    """In both orders; best against worst, beside the given pairs. The prompts are the toy world's, and the tiny model
    knows none of their words: the judge does, and has a taste of its own for each response."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    (url, seen), count = judging, 6
    prompts = authors.write_prompts(np.random.default_rng(0), count)
    given = [row | {"prompt": prompt} for row, prompt in zip(pairs_of(tiny), prompts)]
    flags = (f"--data.pairs=[{write(tmp_path / 'pairs.jsonl', given)}]", "--loop.iterations=1")
    caught, _, path = run("judge", *flags, f"--judge.base_url={url}", train=False)
    world, stage, made = caught[1]
    compared = np.isfinite(made.ranked.prob_PCC)
    seen_PC = np.array(
        [[seen(prompt.prompt, text) for text in texts] for prompt, texts in zip(made.prompts, made.candidates.texts_PC)]
    )
    want_PCC = 1 / (1 + np.exp((seen_PC[:, None, :] - seen_PC[:, :, None]) / 0.5))
    np.testing.assert_allclose(made.ranked.prob_PCC[compared], want_PCC[compared], atol=1e-5)
    assert compared.shape == (count, 4, 4) and compared.mean() > 0.8
    labels = [json.loads(line) for line in (path / "judge.jsonl").read_text().splitlines()]
    told = made.ranked.told
    assert len(labels) == told["judge/labels"] > 40 and told["judge/consistency"] == 1
    best_P, worst_P = (f(made.ranked.rewards_PC, axis=1) for f in (np.nanmax, np.nanmin))
    of = made.fresh.prompt_F
    np.testing.assert_array_equal(made.fresh.reward_F2, np.stack([best_P[of], worst_P[of]], axis=1))
    assert len(stage.trees) == count + len(made.fresh.trees) > 9


# --- uncertainty ------------------------------------------------------------------------------------------------------


def test_explore_pairs_the_best_candidate_with_the_least_known(run, tiny, first):
    """And leaves what its labelled pairs have spanned behind."""
    flags = (f"--data.pairs=[{tiny / 'pairs.jsonl'}]", "--data.limit=16", "--loop.iterations=2", first)
    caught, _, path = run("explore", *flags, FOUR, "--explore.dimension=16", train=False)
    world, stage, made = caught[2]
    sigma = {t: np.load(path / "covariance" / f"{t}.npz")["sigma"] for t in (0, 2)}
    kept = made.fresh.kept_F
    assert sigma[0].shape == (16, 16) and 0 < kept.sum() <= round(0.3 * 16) < len(kept)
    grown = np.linalg.eigvalsh((sigma[2] - sigma[0]).astype(np.float64))
    assert (grown > 1e-6).sum() == kept.sum() and grown[0] > -1e-5  # a direction a pair
    assert made.fresh.gamma_F[kept].min() >= made.fresh.gamma_F[~kept].max() > 0
    reward = np.where(fresh.valid(world, made.candidates), made.ranked.rewards_PC, -np.inf)
    assert (made.fresh.pair_F2[:, 0] == reward.argmax(axis=1)[made.fresh.prompt_F]).all()
    assert (made.fresh.pair_F2[:, 1] != reward.argmin(axis=1)[made.fresh.prompt_F]).any()  # not best against worst
    trained = {tree.id for tree in stage.trees}
    assert all((tree.id in trained) == k for tree, k in zip(made.fresh.trees, kept))


def test_selm_makes_its_own_samples_less_likely(run, tiny, ranker):
    """Those of the iterate that is the reference: DPO's loss and 1e-4·½(w + l)."""
    flags = (f"--data.pairs=[{tiny / 'pairs.jsonl'}]", "--loop.iterations=1", f"--reward.model={ranker}", FOUR)
    caught, _, _ = run("selm", *flags, train=False)
    world, stage, made = caught[1]
    assert len(made.prompts) == round(0.33 * 44) and made.candidates.finished_PC.shape[1] == 4 + 1  # the given one
    assert len(stage.trees) == len(made.fresh.trees) > 7 and select.loss_reference(world, 3).t == 2
    want = np.log(2) + 1e-4 * stage.reference_F.reshape(-1, 2).mean(axis=1)
    np.testing.assert_allclose(loss_at_start(world, stage), want, rtol=1e-6)
    assert np.ptp(want) > 1e-4


def test_pessimistic_learns_from_given_pairs_less_their_uncertainty(run, tiny):
    flags = (f"--data.pairs=[{tiny / 'pairs.jsonl'}]", "--data.limit=16", "--explore.dimension=16")
    caught, _, path = run("pessimistic", *flags, train=False)
    world, stage, made = caught[1]
    assert list(caught) == [1] and made is None and len(stage.trees) == 16
    gamma = np.array([tree.values for tree in stage.trees])
    assert gamma.shape == (16, 2) and (gamma > 0).all() and gamma.std() > 0.01
    assert [file.name for file in (path / "covariance").iterdir()] == ["0.npz"]
    np.testing.assert_allclose(loss_at_start(world, stage), np.logaddexp(0, -(gamma[:, 0] - gamma[:, 1])), rtol=1e-5)


# --- two stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rloo", "ppo", "raft"])
def test_two_stages_learn_from_their_own_samples(run, tiny, name):
    """Two rounds of six prompts, two updates a pass: the recipes differ in what a candidate weighs."""
    flags = (
        f"--data.prompts=[{tiny / 'prompts.jsonl'}]",
        "--reward.function=tiny_reward:count",
        "--evaluate.prompts=[]",
    )
    sizes = ("--loop.iterations=1", "--on_policy.rounds=2", "--on_policy.prompts=6", "--optimizer.batch_size=3")
    caught, _, path = run(name, *flags, *sizes, "--evaluate.function=")
    tables = [
        pyarrow.parquet.read_table(file).to_pydict()
        for file in sorted((path / "iterations" / "1" / "rounds").glob("*.parquet"))
    ]
    updates = updates_of(path)
    assert not caught and len(tables) == 2 and len(updates) == 2 * 2 * (2 if name == "ppo" else 1)
    grid = lambda key: np.concatenate([np.reshape(table[key], (6, 4)) for table in tables])
    r_PC, w_PC = grid("reward"), grid("weight")
    if name == "rloo":  # the KL is in the reward, less the mean of the others'
        r_PC = r_PC - 0.05 * grid("kl")
        np.testing.assert_allclose(w_PC, (r_PC - r_PC.mean(axis=1, keepdims=True)) * 4 / 3, atol=1e-5)
        assert "kl" not in updates[0] and "clip_ratio/region_mean" in updates[0]
    if name == "ppo":  # a group's mean and deviation, the KL in the loss
        z_PC = (r_PC - r_PC.mean(axis=1, keepdims=True)) / (r_PC.std(axis=1, ddof=1, keepdims=True) + 1e-4)
        np.testing.assert_allclose(w_PC, z_PC, atol=1e-5)
        assert abs(updates[0]["kl"]) < 1e-6 < updates[-1]["kl"]
    if name == "raft":  # imitation of the best, no ratio and no KL
        assert (w_PC.sum(axis=1) == 1).all() and (r_PC[w_PC > 0] == r_PC.max(axis=1)).all()
        assert not {"kl", "clip_ratio/region_mean"} & set(updates[0])
