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
    missing = [
        f"{section}.{field.name}"
        for section, record in sections.items()
        for field in dataclasses.fields(record)
        if f"`{section}.{field.name}`" not in readme and f"`{field.name}`" not in readme
    ]
    assert not missing, f"README has no line for {', '.join(missing)}"
