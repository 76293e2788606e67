"""The door of reward models: what a run leaves, that one learns a preference and none where there is none, that a
stopped run goes on as if it had not, what is refused and in which words; ranking candidates with what it exports."""

import dataclasses
import gc
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from sera_jax import config as configs
from sera_jax import data, hf, policies, preference, programs, reward_model, score
from sera_jax import mesh as meshes
from sera_jax import run as runs
from sera_jax import train as trainer
from sera_jax.config import RewardModelConfig
from sera_jax.ledger import Ledger
from sera_jax.records import Tree

COLOURS, BEASTS = "red blue green ball".split(), "cat dog sits runs".split()


def toy(path: pathlib.Path, seed: int = 0, shuffled: bool = False, count: int = 160) -> pathlib.Path:
    """Pairs in which the response with more colours is chosen; shuffled: the label is a coin's. Words of both kinds
    stand in any place, and lengths say nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        n = int(rng.integers(4, 7))
        high, low = n - int(rng.integers(0, 2)), int(rng.integers(0, 2))
        sides = []
        for colours in (high, low):
            words = [*rng.choice(COLOURS, colours), *rng.choice(BEASTS, n - colours)]
            sides.append(" ".join(rng.permutation(words)))
        if shuffled and rng.random() < 0.5:
            sides.reverse()
        prompt = " ".join(rng.choice(["the", "a", "on", "in", "big", "small"], 4)) + f" {i}"
        rows.append({"id": f"p{i}", "prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config_of(tiny, tiny_config, tmp_path):
    """flags → RewardModelConfig of a small run in tmp_path (tiny_config: meshes of one device)."""

    def make(*flags: str, run: str = "run", pairs: pathlib.Path | None = None) -> RewardModelConfig:
        base = [
            f"--run.dir={tmp_path / run}",
            "--run.compilation_cache=off",
            "--run.log_every=1",
            "--run.save_every=2",
            f"--model.path={tiny / 'model'}",
            "--model.weights=random",
            f"--data.pairs=[{pairs or tiny / 'pairs.jsonl'}]",
            "--data.max_length=48",
            "--data.max_prompt_length=24",
            "--optimizer.batch_size=8",
            "--optimizer.learning_rate=3e-3",
            "--optimizer.row_tokens=128",
            "--optimizer.microbatch_rows=1",
            "--mesh.fsdp=1",
        ]
        return configs.parse(RewardModelConfig, [*base, *flags])

    return make


def lines(run: pathlib.Path) -> list[dict]:
    """metrics.jsonl without timings."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def weights(run: pathlib.Path) -> dict[str, bytes]:
    return {k: a.tobytes() for k, a in safetensors.numpy.load_file(run / "export" / "model.safetensors").items()}


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_preference_is_learned_and_none_where_labels_are_a_coins(config_of, tmp_path, shuffled):
    pairs = toy(tmp_path / "toy.jsonl", shuffled=shuffled)
    run = tmp_path / "run"
    reward_model.train(config_of("--data.validation=0.3", "--epochs=3", "--run.save_every=99", pairs=pairs))
    found = json.loads((run / "result.json").read_text())
    assert sum(one["pairs"] for one in found["calibration"]) >= 48  # of 160, 0.3 held out
    if shuffled:
        assert 0.25 < found["validation/accuracy"] < 0.75
    else:
        assert found["validation/accuracy"] > 0.95 and found["validation/loss"] < 0.3
        assert found["validation/calibration_error"] < 0.2
    assert 0.3 < found["validation/longer"] < 0.7  # it was not length
    trained = [record for record in lines(run) if record["stage"] == "reward"]
    assert len(trained) == 3 * -(-112 // 8) and trained[-1]["iteration"] == 0


def test_every_key_of_the_loss_acts_on_what_is_trained(config_of, tmp_path, tiny):
    """The loss of the first update, of rewards by the start's weights, by hand."""
    scored = tmp_path / "scored.jsonl"
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()][:8]
    for i, row in enumerate(rows):
        row |= {"score_chosen": 1 + i, "score_rejected": 0.5, "weight": 1 + i % 3}
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"margin": 0.25, "center": 0.3, "length_alpha": 0.1}
    flags = [f"--reward_loss.{key}={value}" for key, value in keys.items()]
    config = config_of(*flags, pairs=scored)
    reward_model.train(config)
    told = lines(tmp_path / "run")[0]
    opened = reward_model._opened(config, meshes.make(1, 1, 1))
    w, l = of_pairs(opened).reshape(-1, 2).T.astype(np.float64)
    n = np.array([[len(b) for b in tree.branches] for tree in opened.pairs.trees])
    gap = np.array([0.5 + int(tree.id[1:]) for tree in opened.pairs.trees])
    z = w - l + 0.1 * (n[:, 0] - n[:, 1]) - 0.25 * gap
    loss = np.logaddexp(0, -z) + 0.3 * (w + l) ** 2
    weight = np.array([1 + i % 3 for i in range(8)])
    np.testing.assert_allclose(told["loss"], np.average(loss, weights=weight), rtol=1e-4)
    np.testing.assert_allclose(told["rewards/margins"], np.average(w - l, weights=weight), rtol=1e-3, atol=1e-5)


def of_pairs(opened) -> np.ndarray:
    """Rewards of the pairs' branches under the start."""
    start = opened.start
    run = programs.score_rows(programs.reward_scorer(start.arch, start.mesh, start.compute), start.load(), start.mesh)
    return score.logps(opened.pairs.trees, run, score.plan_for(opened.pairs.trees, start.arch, start.mesh))


# --- preference models ------------------------------------------------------------------------------------------------

CIRCLE = {"red": "blue", "blue": "green", "green": "red"}  # each is better than what it points to
GENERATIVE = ("--kind=preference", "--preference.labels=[or, and]", "--preference.orders=both")


def circle(path: pathlib.Path, count: int = 96) -> pathlib.Path:
    """Pairs whose preferences go in a circle, whatever the prompt."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        chosen = list(CIRCLE)[i % 3]
        prompt = " ".join(rng.choice(BEASTS, 2)) + f" {i}"
        rows.append({"id": f"p{i}", "prompt": prompt, "chosen": chosen, "rejected": CIRCLE[chosen]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("flags", [GENERATIVE, ("--kind=preference_head",)], ids=["generative", "head"])
def test_preferences_that_go_in_a_circle_are_learned(config_of, tmp_path, flags, one_device):
    """Which no reward can say: of three pairs a Bradley-Terry model gets two at most."""
    config = config_of(
        *flags,
        "--data.validation=0.25",
        "--epochs=6",
        "--run.save_every=999",
        "--validate_every=20",
        pairs=circle(tmp_path / "circle.jsonl"),
    )
    export = reward_model.train(config)
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["validation/accuracy"] > 0.95 and found["validation/loss"] < 0.3 and found["validation/longer"] == 0.5
    if flags == GENERATIVE:
        assert found["validation/consistency"] > 0.95 and 0.4 < found["validation/first"] < 0.6
    checks = [record for record in lines(tmp_path / "run") if record["stage"] == "validation"]
    assert len(checks) > 2 and checks[0]["validation/loss"] > found["validation/loss"]
    folder, form = policies.open_preference_model(str(export), one_device, compute="float32")
    asked = [("dog cat 7", a, b) for a in CIRCLE for b in CIRCLE]
    prob, _ = policies.folder_preferences(folder, form, asked, ledger=Ledger(tmp_path / "ledger"), label="asked")
    prob_PCC = prob.reshape(1, 3, 3)
    np.testing.assert_allclose(prob_PCC + prob_PCC.swapaxes(1, 2), 1, atol=1e-6)
    assert preference.cycles(prob_PCC) == (1, 1)


def test_the_first_update_of_both_kinds_by_hand(config_of, tmp_path, tiny, one_device):
    """The loss is the label's NLL over the whole vocabulary, or -log σ(½[s(c, r) - s(r, c)]), by the weights."""
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()][:8]
    weighted = tmp_path / "weighted.jsonl"
    weighted.write_text("".join(json.dumps(row | {"weight": 1 + i % 3}) + "\n" for i, row in enumerate(rows)))
    weight = np.array([1 + i % 3 for i in range(8)])
    for name, flags in (("label", GENERATIVE[:2]), ("head", ("--kind=preference_head",))):
        config = config_of(*flags, "--data.max_length=64", run=name, pairs=weighted)
        reward_model.train(config)
        told = lines(tmp_path / name)[0]
        opened = reward_model._opened(config, one_device)
        start, trees = opened.start, opened.pairs.trees
        build = programs.scorer if name == "label" else programs.reward_scorer
        run = programs.score_rows(build(start.arch, start.mesh, start.compute), start.load(), start.mesh)
        value = score.logps(trees, run, score.plan_for(trees, start.arch, start.mesh)).astype(np.float64)
        if name == "label":
            assert {len(tree.branches) for tree in trees} == {1} and {tree.targets for tree in trees} == {1}
            assert len({int(tree.branches[0][0]) for tree in trees}) == 2
            want = -value
        else:
            s = value.reshape(8, 2)
            want = np.logaddexp(0, -(s[:, 0] - s[:, 1]) / 2)
            margin = np.average((s[:, 0] - s[:, 1]) / 2, weights=weight)
            np.testing.assert_allclose(told["rewards/margins"], margin, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(told["loss"], np.average(want, weights=weight), rtol=1e-4)


def test_a_preference_model_ranks_the_candidates_of_a_run(config_of, tiny_config, tmp_path, one_device):
    """Every probability that the run keeps is what the exported folder says of the two texts; rewards are their means,
    or log-odds of a tournament."""
    export = reward_model.train(config_of(*GENERATIVE, "--data.max_length=96", run="judge"))
    base = ("--reward.source=preference", f"--reward.model={export}", "--loop.iterations=1", "--bootstrap.fresh=1.0")
    base += ("--bootstrap.from_iteration=1",)
    trainer.train(tiny_config(*base, "--bootstrap.pair_rule=most_certain"))
    folder, form = policies.open_preference_model(str(export), one_device, compute="float32")
    made = tmp_path / "run" / "iterations" / "1"
    texts = {r["id"]: r["responses"] for r in map(json.loads, (made / "candidates.jsonl").read_text().splitlines())}
    prompts = {r["id"]: r["prompt"] for r in map(json.loads, (tiny_prompts(tiny_config)).read_text().splitlines())}
    rows = pyarrow.parquet.read_table(made / "probabilities.parquet").to_pylist()
    assert len(rows) > 60
    asked = [(prompts[r["prompt_id"]], *(texts[r["prompt_id"]][r[side]] for side in ("first", "second"))) for r in rows]
    said, _ = policies.folder_preferences(folder, form, asked, ledger=Ledger(tmp_path / "ledger"), label="again")
    np.testing.assert_allclose([row["probability"] for row in rows], said, atol=1e-5)
    best = {}
    for row in rows:
        best[row["prompt_id"]] = max(best.get(row["prompt_id"], 0), row["probability"], 1 - row["probability"])
    fresh = pyarrow.parquet.read_table(made / "fresh.parquet").to_pylist()
    assert len(fresh) > 15
    for row in fresh:
        np.testing.assert_allclose(row["probability"], best[row["prompt_id"]], rtol=1e-6)
    summary = json.loads((made / "summary.json").read_text())
    assert 0 <= summary["preference/consistency"] <= 1 and 0 < summary["preference/first"] < 1
    assert 0 <= summary["sera/intransitive"] <= 1
    # A tournament: the same samples, a third of the questions, and rewards that are log-odds where two met.
    trainer.train(tiny_config(*base, "--reward.tournament=true", run="tournament"))
    made = tmp_path / "tournament" / "iterations" / "1"
    assert not (made / "probabilities.parquet").exists()
    odds = {(r["prompt_id"], r["first"], r["second"]): np.log(r["probability"] / (1 - r["probability"])) for r in rows}
    met = 0
    for row in pyarrow.parquet.read_table(made / "fresh.parquet").to_pylist():
        assert row["reward_chosen"] == 0 > row["reward_rejected"]  # the winner
        i, j = (texts[row["prompt_id"]].index(row[side]) for side in ("chosen", "rejected"))
        known = odds.get((row["prompt_id"], min(i, j), max(i, j)))
        gap = row["reward_chosen"] - row["reward_rejected"]
        met += known is not None and abs(gap - (known if i < j else -known)) < 1e-3
    assert met > 3


def tiny_prompts(tiny_config) -> pathlib.Path:
    return pathlib.Path(tiny_config().data.prompts[0])


def test_reward_models_and_preference_models_are_not_taken_for_each_other(config_of, tiny, tiny_config, one_device):
    rewards = reward_model.train(config_of(run="rewards"))
    head = reward_model.train(config_of("--kind=preference_head", "--data.max_length=96", run="head"))
    of = {"compute": "float32"}
    with pytest.raises(ValueError, match="config.json has the key 'preference': it is a preference model, which reads"):
        policies.open_reward_model(str(head), one_device, **of)
    with pytest.raises(ValueError, match="config.json has no key 'preference': it is a reward model, which scores sin"):
        policies.open_preference_model(str(rewards), one_device, **of)
    with pytest.raises(ValueError, match="preference.labels: this tokeniser makes 'A' → "):  # a policy: asked as usual
        policies.open_preference_model(str(tiny / "model"), one_device, **of)
    with pytest.raises(ValueError, match="a reward model; expected 'LlamaForCausalLM'"):
        reward_model.train(config_of(*GENERATIVE, f"--model.path={rewards}", "--model.weights=pretrained", run="wrong"))
    folder, form = policies.open_preference_model(str(head), one_device, **of)
    short = dataclasses.replace(form, max_length=8, max_prompt_length=4)
    with pytest.raises(
        ValueError, match=r"1 of 1 questions do not fit into max_length 8, not even with their responses"
    ):
        policies.folder_preferences(folder, short, [("a cat", "b", "c")], ledger=None, label="")


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [(), ("--lora.rank=2", "--lora.dropout=0.1")])
def test_a_stopped_run_goes_on_as_if_it_had_not(config_of, tmp_path, stopped_at, adapters):
    flags = ("--data.validation=0.2", "--validate_every=2", "--epochs=2", *adapters)
    reward_model.train(config_of(*flags, run="whole"))
    with stopped_at("reward_update", 6):
        reward_model.train(config_of(*flags, run="stopped"))
    assert not (tmp_path / "stopped" / "export").exists()
    reward_model.train(config_of(*flags, run="stopped"))
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    checks = [record for record in lines(tmp_path / "whole") if record["stage"] == "validation"]
    assert len(checks) > 3 and all("validation/calibration_error" in record for record in checks)
    before = weights(tmp_path / "whole")
    reward_model.train(config_of(*flags, run="whole"))  # nothing is left to do
    assert weights(tmp_path / "whole") == before


@pytest.mark.parametrize("kind", ["bradley_terry", "preference_head", "preference"])
def test_adapters_train_and_what_is_beneath_them_does_not(config_of, tmp_path, kind):
    """The export differs from the start by matrices of rank R, and by its scalar head, which is a row."""
    shared = (f"--kind={kind}", "--data.max_length=96") if kind != "bradley_terry" else ()
    shared += ("--preference.labels=[red,blue]",) if kind == "preference" else ()
    config = config_of(*shared, "--lora.rank=2", "--lora.targets=[query,down]", "--lora.alpha=4")
    export = reward_model.train(config)
    got = safetensors.numpy.load_file(export / "model.safetensors")
    opened = reward_model._opened(config, meshes.make(1, 1, 1))
    folder = dataclasses.replace(opened.start.arch, lora=None)
    hf.save(tmp_path / "start", folder, opened.start.load(), source=config.model.path, dtype=np.float32, card=[])
    start = safetensors.numpy.load_file(tmp_path / "start" / "model.safetensors")
    assert start.keys() == got.keys()
    moved = {name: np.linalg.matrix_rank(got[name] - start[name], tol=1e-6) for name in got if got[name].ndim == 2}
    for name, rank in moved.items():
        trained = "q_proj" in name or "down_proj" in name
        assert rank == (2 if trained else name == "score.weight"), name
    assert ("score.weight" in moved) == (kind != "preference")
    assert all(np.array_equal(got[name], start[name]) for name in got if got[name].ndim == 1)


def test_the_head_that_a_scalar_takes_the_place_of_is_let_go(config_of, tiny, tmp_path):
    """Weights beneath adapters are kept: of two arrays of this shape, table and head, the table alone."""
    folder = pathlib.Path(shutil.copytree(tiny / "model", tmp_path / "untied"))
    told = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(told))
    opened = reward_model._opened(config_of("--lora.rank=2", f"--model.path={folder}"), meshes.make(1, 1, 1))
    arch = opened.start.arch
    alive = lambda: sum(a.shape == (arch.vocab, arch.width) for a in jax.live_arrays())
    gc.collect()
    before = alive()
    weights = opened.start.load()
    gc.collect()
    assert not arch.tied and "head" not in weights
    assert alive() - before == 1


def test_a_preference_is_learned_by_adapters(config_of, tmp_path):
    """And the merged export says what was measured, on the same pairs."""
    flags = (
        "--data.validation=0.3",
        "--epochs=6",
        "--run.save_every=99",
        "--lora.rank=4",
        "--optimizer.learning_rate=1e-2",
    )
    pairs = toy(tmp_path / "toy.jsonl")
    config = config_of(*flags, pairs=pairs)
    export = reward_model.train(config)
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["validation/accuracy"] > 0.9
    merged = config_of(*flags[:2], f"--model.path={export}", "--model.weights=pretrained", run="again", pairs=pairs)
    opened = reward_model._opened(merged, meshes.make(1, 1, 1))
    told, _ = reward_model._measured(merged, meshes.make(1, 1, 1), opened)(opened.start.load())
    assert told["validation/loss"] == pytest.approx(found["validation/loss"], rel=1e-5)
    assert told["validation/accuracy"] == found["validation/accuracy"]


def test_an_export_is_a_start_and_scores_as_the_run_did(config_of, tmp_path):
    config = config_of("--reward_loss.center=0.01")
    export = reward_model.train(config)
    told = json.loads((export / "config.json").read_text())
    assert told["architectures"] == ["LlamaForSequenceClassification"] and told["id2label"] == {"0": "reward"}
    assert told["pad_token_id"] == 0 and told["eos_token_id"] == 2
    stored = safetensors.numpy.load_file(export / "model.safetensors")
    assert stored["score.weight"].shape == (1, 32) and "lm_head.weight" not in stored
    again = config_of(f"--model.path={export}", "--model.weights=pretrained", run="again")
    opened = reward_model._opened(again, meshes.make(1, 1, 1))
    assert opened.start.arch.scored
    np.testing.assert_array_equal(np.asarray(opened.start.load()["score"]["head"]), stored["score.weight"])
    first = reward_model._opened(config, meshes.make(1, 1, 1))
    assert np.abs(of_pairs(opened) - of_pairs(first)).max() > 0.01  # it was trained
    first_loss = [record["loss"] for record in lines(tmp_path / "run")][0]
    reward_model.train(again)
    assert lines(tmp_path / "again")[0]["loss"] < first_loss - 0.05  # it goes on where the other ended


# --- ranking with one -------------------------------------------------------------------------------------------------


def test_a_reward_model_ranks_the_candidates_of_a_run(config_of, tiny_config, tmp_path):
    """Every reward in fresh.parquet is what the exported folder says of that response, alone in a row."""
    export = reward_model.train(config_of(run="judge"))
    flags = ("--reward.source=model", f"--reward.model={export}", "--bootstrap.from_iteration=1", "--loop.iterations=1")
    trainer.train(tiny_config(*flags))
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "iterations" / "1" / "fresh.parquet").to_pylist()
    judge = policies.open_reward_model(str(export), meshes.make(1, 1, 1), compute="float32")
    for row in rows[:6]:
        said = []
        for side in ("chosen", "rejected"):
            branch = np.array(row[f"{side}_tokens"], np.int32)
            alone = [Tree(side, np.array(row["prompt_tokens"], np.int32), (branch,))]
            ledger = Ledger(tmp_path / "ledger")
            said.append(policies.folder_rewards(judge, alone, ledger=ledger, label="alone")[0])
        np.testing.assert_allclose((row["reward_chosen"], row["reward_rejected"]), said, rtol=1e-4, atol=1e-5)
        assert row["reward_chosen"] > row["reward_rejected"]
    assert len(rows) > 10


def test_a_reward_model_of_other_tokens_is_refused(config_of, tiny_config):
    export = reward_model.train(config_of(run="judge"))
    told = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(told | {"eos_token_id": 3}))
    flags = ("--reward.source=model", f"--reward.model={export}")
    with pytest.raises(ValueError, match="reward.model: the tokeniser of .* differs from that of model.path"):
        trainer.train(tiny_config(*flags))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_scores_that_a_margin_needs(config_of):
    with pytest.raises(ValueError) as error:
        reward_model.train(config_of("--reward_loss.margin=0.5"))
    assert str(error.value) == (
        "reward_loss.margin 0.5 needs the annotator's scores, but 44 of 44 pairs have none, the first 'p0'. Give "
        "score_chosen and score_rejected, or set it to 0."
    )


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(config_of, tiny, tiny_config, tmp_path):
    export = reward_model.train(config_of())
    with pytest.raises(
        ValueError, match="'LlamaForSequenceClassification', a reward model; expected 'LlamaForCausalLM'"
    ):
        hf.read_arch(export)
    with pytest.raises(ValueError, match="'LlamaForCausalLM', a policy; expected a reward model, 'LlamaForSequenceCla"):
        hf.read_reward_arch(tiny / "model")
    told = json.loads((export / "config.json").read_text())
    for labels in ({"id2label": {"0": "A", "1": "B"}}, {"id2label": None}):
        (tmp_path / "config.json").write_text(json.dumps(told | labels))
        with pytest.raises(
            ValueError, match=r"SequenceClassification has 2 labels \(id2label, num_labels\), expected 1"
        ):
            hf.read_any_arch(tmp_path)


@dataclasses.dataclass
class Special:
    """A tokeniser's special tokens."""

    pad_token_id: int | None
    unk_token_id: int | None
    bos_token_id: int | None
    added_tokens_decoder: dict


class Added(str):
    special = True


@pytest.mark.parametrize(
    "pad, unk, bos, added, eos, want",
    [
        (7, 0, 1, {}, (2,), 7),
        (2, 0, 1, {}, (2,), 0),  # the padding is EOS: a reader would take the token before EOS for the last
        (None, None, 1, {}, (2,), 1),
        (None, None, 2, {2: "<eos>", 5: "<|padding|>"}, (2,), 5),
        (2, None, 1, {1: "<bos>", 5: "<|pad_right|>"}, (2,), 5),
        (None, None, None, {2: "<eos>", 9: "<other>"}, (2,), 9),
    ],
)
def test_padding_ends_no_response(pad, unk, bos, added, eos, want):
    added = {i: Added(text) for i, text in added.items()}
    assert data.padding_id(Special(pad, unk, bos, added), eos) == want


def test_no_padding_at_all():
    with pytest.raises(ValueError, match=re.escape("special tokens <eos> all end responses (EOS ids 2); expected one")):
        data.padding_id(Special(2, 2, 2, {2: Added("<eos>")}), (2,))


def test_a_full_disk_tells_where_a_reward_model_goes_on():
    saved = 5, {"stage": "reward", "iteration": 0, "update": 5, "total": 9}
    assert runs._goes_on(saved).endswith("the same command goes on behind update 5 of 9 of the reward model.")
