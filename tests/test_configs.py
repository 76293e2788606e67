"""Every YAML in configs/ can be run: it parses, its header says how, and README's commands name files that exist."""

import dataclasses
import pathlib
import re
import typing

import pytest

from sera_jax import arms
from sera_jax import config as configs

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
SETS = [file for file in FILES if re.search("^arms:", file.read_text(encoding="utf-8"), re.M)]
AGREEMENTS = [file for file in FILES if re.search("^files:", file.read_text(encoding="utf-8"), re.M)]


@pytest.mark.parametrize("file", sorted(set(FILES) - set(SETS) - set(AGREEMENTS)), ids=lambda f: f.stem)
def test_a_config_parses(file):
    door = re.search(r"^#   command   .*?python -m sera_jax\.(\w+)", file.read_text(encoding="utf-8"), re.M)
    if door and door[1] == "annotate":
        assert configs.parse(configs.AnnotateConfig, ["--config", str(file)]).questions.startswith("runs/")
        return
    record = configs.RewardModelConfig if door and door[1] == "reward_model" else configs.TrainConfig
    paths = ["--model.path=model", "--data.pairs=[pairs.jsonl]"]
    if "source: preference\n" in file.read_text(encoding="utf-8"):
        paths.append("--reward.model=judge")
    assert configs.parse(record, ["--config", str(file), *paths]).run.dir.startswith("runs/")


@pytest.mark.parametrize("file", AGREEMENTS, ids=lambda f: f.stem)
def test_a_config_of_agreements_parses(file):
    config = configs.parse(configs.AgreeConfig, ["--config", str(file), "--files=[judged.jsonl]"])
    assert config.files == ("judged.jsonl",) and config.out.startswith("runs/")


@pytest.mark.parametrize("file", SETS, ids=lambda f: f.stem)
def test_every_arm_of_a_set_is_a_config(file):
    """With what its own command puts under it."""
    command = re.findall(r"--config (configs/\S+\.yaml)", file.read_text(encoding="utf-8").split("\nout:")[0])
    under = [name for name in command if ROOT / name != file]
    config = configs.parse(arms.ArmsConfig, [f"--config={path}" for path in (*(ROOT / name for name in under), file)])
    arms.check(config)
    assert config.out.startswith("runs/") and config.baseline in config.arms


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_config_says_how_it_is_run(file):
    text = file.read_text(encoding="utf-8")
    header = re.split("^(?:run|out|files):", text, maxsplit=1, flags=re.M)[0]
    assert re.search(r"^#   command   \S", header, re.M) and re.search(r"^#   hardware  \S", header, re.M)
    told = re.search(r"configs/RESULTS.md, \"(.+)\"", header)
    if told:
        assert f"## {told[1]}" in (ROOT / "configs" / "RESULTS.md").read_text(encoding="utf-8")


def test_what_readme_names_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:configs|launch|tests|sera_jax)/[\w./-]+\.(?:yaml|sh|py|md)\b", text))
    assert len(named) > 4
    assert not [name for name in named if not (ROOT / name).exists()]
    doors = set(re.findall(r"python -m sera_jax\.(\w+)", text))
    known = "train generate evaluate review report toyworld reward_model annotate agree".split()
    assert doors >= set(known)
    for door in doors:
        assert (ROOT / "sera_jax" / f"{door}.py").exists() or (ROOT / "sera_jax" / door / "__main__.py").exists()


def test_every_choice_of_a_key_is_in_readme():
    """The table "What it can be set to" and the config cannot drift apart."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for names in (
        configs.LossName,
        configs.EnsembleName,
        configs.ScoreName,
        configs.RuleName,
        configs.PairRuleName,
        configs.FormatName,
        configs.RewardName,
        configs.ModelKind,
        configs.BestName,
        configs.AlgorithmName,
        configs.AdvantageName,
        configs.RatioName,
        configs.PartsName,
    ):
        missing = [name for name in typing.get_args(names) if f"`{name}`" not in text]
        assert not missing, missing


def test_readme_has_a_line_for_every_knob_of_the_algorithm():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = {
        name: getattr(configs, record)
        for name, record in (
            ("loss", "LossConfig"),
            ("reward", "RewardConfig"),
            ("judge", "JudgeConfig"),
            ("select", "SelectConfig"),
            ("bootstrap", "BootstrapConfig"),
            ("explore", "ExploreConfig"),
            ("loop", "LoopConfig"),
            ("on_policy", "OnPolicyConfig"),
            ("reward_loss", "RewardLossConfig"),
            ("preference", "PreferenceConfig"),
        )
    }
    # A key that stands without its section has it before it in the same row; those of a loss alone are in Losses.
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    of_losses = readme[readme.index("\n### Losses\n") : readme.index("`loss.sft_weight` adds")]
    missing = [
        f"{section}.{field.name}"
        for section, record in sections.items()
        for field in dataclasses.fields(record)
        if not any(
            f"`{section}.{field.name}`" in row or (f"`{section}." in row and f"`{field.name}`" in row) for row in rows
        )
        and not (section == "loss" and f"`{field.name}`" in of_losses)
    ]
    assert not missing, f"README's tables have no row for {', '.join(missing)}"


# What iterative preference learning is made of → its configs.
PARTS = {
    "a Bradley-Terry reward model": "reward_hh",
    "pairwise preference models": "preference_hh preference_head_hh preference_online",
    "a judge": "judge",
    "a Python function": "rloo ppo raft",
    "people": "annotate",
    "online iterative DPO": "iterative_dpo rlhf_workflow rlhf_workflow_code",
    "exploration": "explore selm",
    "beyond Bradley-Terry": "sppo self_play_ipo nash_md nash_game",
    "pessimism": "pessimistic",
    "policy gradients and rejection sampling": "rloo ppo raft on_policy",
    "other alignment methods and loops": "spin dice sdpo curry_dpo baselines",
    "whose feedback": "agree combined",
    "over-optimisation, offline against online": "online online_grid online_bt",
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_its_configs(part):
    """And each of them is one of the files that the tests above start from."""
    assert {ROOT / "configs" / f"{name}.yaml" for name in PARTS[part].split()} <= set(FILES)


def test_each_part_has_a_row_in_what_it_can_be_set_to():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("\n## What it can be set to\n")[1].split("\n### ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for words in (
        ("`kind`", "`bradley_terry`", "`reward_loss.margin`", "`center`", "`length_alpha`"),
        ("`preference`", "`preference_head`"),
        ("`reward.source`", "`judge`", "`function`", "`preference_function`"),
        ("`judge.model`", "`base_url`"),
        ("`python -m sera_jax.annotate`", "`configs/annotate.yaml`"),
        ("`bootstrap.fresh`", "`candidates`", "`best_worst`"),
        ("`bootstrap.pair_rule`", "`explore`"),
        ("`bootstrap.mixture`", "Nash-MD"),
        ("`dpo_pessimistic`", "`configs/pessimistic.yaml`"),
        ("`on_policy.algorithm`", "`policy_gradient`", "`raft`"),
        ("`loss.name`", "[Losses](#losses)"),
        ("`loop.parts`", "sDPO", "Curry-DPO"),
        ("`python -m sera_jax.agree`", "`configs/agree.yaml`"),
        ("`reward.sources`", "`worst`"),
        ("`launch/over_optimise.py`", "`configs/online.yaml`"),
        ("`loop.best`", "`reward`"),
    ):
        assert any(all(word in row for word in words) for row in rows), words
