"""YAML and flags to records: what wins, what is refused and in which words, and that nothing in a config is idle."""

import ast
import dataclasses
import pathlib
import re
import typing

import pytest
import yaml

import sera_jax
from sera_jax import (
    attention,
    config,
    data,
    generate,
    losses,
    model,
    policy_gradient,
    programs,
    reward_model,
    rewards,
    step,
)
from sera_jax.config import (
    AgreeConfig,
    AnnotateConfig,
    ConfigError,
    GenerateConfig,
    ReviewConfig,
    RewardModelConfig,
    TrainConfig,
)
from sera_jax.train import fresh, rounds, validate

NEEDED = {"run": {"dir": "runs/a"}, "model": {"path": "models/m"}, "data": {"pairs": ["p.jsonl"]}}
RECORDS = [r for r in vars(config).values() if dataclasses.is_dataclass(r)]


def file(folder: pathlib.Path, content: dict | str) -> str:
    path = folder / "x.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def parse(folder: pathlib.Path, changes: dict, *flags: str, record: type = TrainConfig):
    content = {name: NEEDED.get(name, {}) | changes.get(name, {}) for name in {**NEEDED, **changes}}
    return config.parse(record, ["--config", file(folder, content), *flags])


def base(record: type):
    """A valid config of a door."""
    mine = config.ModelConfig("m")
    return {
        TrainConfig: lambda: TrainConfig(config.RunConfig("r"), mine, config.DataConfig(("p.jsonl",))),
        GenerateConfig: lambda: GenerateConfig(mine, ("p",), "o"),
        AnnotateConfig: lambda: AnnotateConfig("q.jsonl"),
        ReviewConfig: lambda: ReviewConfig("a", "b", config.DataConfig(("p.jsonl",)), "o"),
        AgreeConfig: lambda: AgreeConfig(("f.jsonl",)),
        RewardModelConfig: lambda: RewardModelConfig(
            config.RunConfig("r"), mine, config.DataConfig(("p.jsonl",), validation=0.1)
        ),
    }[record]()


def changed(record, key: str, value):
    """A config with another value at a dotted key."""
    first, _, rest = key.partition(".")
    return dataclasses.replace(record, **{first: changed(getattr(record, first), rest, value) if rest else value})


def refused(config_, *words: str) -> str:
    with pytest.raises(ConfigError) as error:
        config.check(config_, "x.yaml")
    said = str(error.value)
    assert said.startswith("x.yaml: ") and "\n" not in said
    for word in words:
        assert word in said
    return said


# --- YAML, flags, defaults --------------------------------------------------------------------------------------------


def test_yaml_gives_the_defaults_and_flags_win(tmp_path):
    changes = {"loss": {"beta": 0.2, "name": "ipo"}, "sft": {"optimizer": {"clip": 0.5}}}
    got = parse(tmp_path, changes, "--loss.beta", "0.3", "--data.pairs", "[a, b]")
    assert (got.loss.beta, got.loss.name, got.sft.optimizer.clip) == (0.3, "ipo", 0.5)
    assert got.data.pairs == ("a", "b") and got.run.dir == "runs/a"
    # What neither names keeps its default, also beside a key that was given, also where a section has its own.
    assert got.optimizer == config.OptimizerConfig() and got.loss.gamma == config.LossConfig().gamma
    assert got.sft.optimizer.learning_rate == 2e-5


def test_several_files(tmp_path):
    """What a later one does not name stays as an earlier one has it, section by section; flags win over all of them."""
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text(yaml.safe_dump(NEEDED | {"loss": {"beta": 0.2, "name": "ipo"}, "optimizer": {"batch_size": 32}}))
    two.write_text(yaml.safe_dump({"loss": {"beta": 0.4}, "optimizer": {"clip": 0.5}, "run": {"dir": "runs/two"}}))
    got = config.parse(TrainConfig, ["--config", str(one), f"--config={two}", "--optimizer.clip=0.7"])
    assert (got.loss.name, got.loss.beta, got.run.dir) == ("ipo", 0.4, "runs/two")
    assert (got.optimizer.batch_size, got.optimizer.clip) == (32, 0.7)
    two.write_text("loss: {bta: 1}")
    with pytest.raises(ConfigError, match="^" + re.escape(f"{one} + {two}: ") + ".*bta"):
        config.parse(TrainConfig, [f"--config={one}", "--config", str(two)])
    with pytest.raises(ConfigError, match="^nowhere.yaml: no such config file.$"):
        config.parse(TrainConfig, [f"--config={one}", "--config", "nowhere.yaml"])


def test_flags_alone_are_enough():
    got = config.parse(TrainConfig, ["--run.dir=r", "--model.path=m", "--data.pairs=[p]"])
    assert got == TrainConfig(config.RunConfig("r"), config.ModelConfig("m"), config.DataConfig(("p",)))


@pytest.mark.parametrize(
    "changes, flags, words",
    [
        ({"loss": {"bta": 1}}, (), ("bta", "loss")),
        ({"lss": {"beta": 1}}, (), ("lss",)),
        ({}, ("--loss.bta=1",), ("loss.bta",)),
        ({}, ("--beta=1",), ("--beta",)),
        ({"loss": {"beta": "high"}}, (), ("loss.beta", "float", "high")),
        ({"optimizer": {"batch_size": 1.5}}, (), ("optimizer.batch_size", "int", "1.5")),
        ({"data": {"pairs": "a.jsonl"}}, (), ("data.pairs", "tuple", "a.jsonl")),
        ({"loop": {"best": "maybe"}}, (), ("loop.best", "bool", "maybe")),
        ({"loss": {"name": "dop"}}, (), ("loss.name", "'dpo', 'robust_dpo'", "dop")),
        ({"select": {"rule": "best"}}, (), ("select.rule", "top_k", "best")),
        ({"model": {"compute": "fp8"}}, (), ("model.compute", "bfloat16", "fp8")),
        ({"loss": {"mix": {"foo": 1.0}}}, (), ("loss.mix", "'foo'", "dpo, robust_dpo")),
        ({"loss": {"beta": 0}}, (), ("loss.beta is 0.0, expected a number > 0.",)),
        ({}, ("--loss.beta=-1",), ("loss.beta is -1.0, expected a number > 0.",)),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_key_and_file(tmp_path, changes, flags, words):
    with pytest.raises(ConfigError) as error:
        parse(tmp_path, changes, *flags)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'x.yaml'}: ") and "\n" not in said
    for word in words:
        assert word in said


@pytest.mark.parametrize("missing", ["run.dir", "model.path"])
def test_missing_keys(tmp_path, missing):
    section = missing.split(".")[0]
    with pytest.raises(ConfigError, match=re.escape("x.yaml: ") + ".*required.*" + re.escape(missing)):
        config.parse(TrainConfig, ["--config", file(tmp_path, NEEDED | {section: {}})])
    with pytest.raises(ConfigError, match="^flags: .*required.*out"):
        config.parse(GenerateConfig, ["--model.path=m", "--prompts=[p]"])


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="^nowhere.yaml: no such config file.$"):
        config.parse(TrainConfig, ["--config", "nowhere.yaml"])
    with pytest.raises(ConfigError, match="^nowhere.yaml: no such config file.$"):
        config.parse(TrainConfig, ["--config=nowhere.yaml"])
    with pytest.raises(ConfigError, match=r"x\.yaml: .*line 2[^\n]*$"):
        config.parse(TrainConfig, ["--config", file(tmp_path, "run: [")])


# --- values -----------------------------------------------------------------------------------------------------------

SHARE = ([-0.1, 1.1, float("nan")], [0.0, 1.0])
AT_LEAST_1 = ([0, -1], [1])
NOT_NEGATIVE = ([-1], [0])
POSITIVE = ([0.0, -1.0, float("nan")], [1e-9])
# Key → (values refused, values at the edge that pass); written anew, not read off the program.
RANGES = {
    "loss.beta": POSITIVE,
    "loss.label_smoothing": ([-0.1, 0.5], [0.0, 0.49]),
    "loss.f_alpha": ([-0.1, float("nan")], [0.0, 2.0]),
    "loss.gamma": ([-0.1], [0.0]),
    "loss.gamma_beta_ratio": ([-0.1], [0.0, 1.6]),
    "loss.alphapo_alpha": ([float("inf"), float("nan")], [-0.5, 0.0]),
    "loss.discopop_tau": ([0.0, 1.1], [1e-3, 1.0]),
    "loss.dpop_lambda": ([-1.0], [0.0, 500.0]),
    "loss.rdpo_alpha": ([-0.1], [0.0]),
    "loss.reward_scale": ([0.0, float("inf")], [2.0]),
    "loss.slic_delta": POSITIVE,
    "loss.slic_lambda": ([-0.1], [0.0]),
    "loss.sft_weight": ([-0.1], [0.0]),
    "loss.optimism": ([-0.1], [0.0]),
    "loss.desirable_weight": ([-0.1], [0.0]),
    "loss.undesirable_weight": ([-0.1], [0.0]),
    "loss.ld_alpha": SHARE,
    "loss.mix": ([{"ipo": 0.0}, {"ipo": -1.0}], [{"ipo": 0.1}]),
    "lora.rank": NOT_NEGATIVE,
    "lora.alpha": POSITIVE,
    "lora.targets": ([("up", "up")], [(), ("up", "head")]),
    "lora.dropout": ([-0.1, 1.0], [0.0, 0.99]),
    "reward.gamma": SHARE,
    "reward.ema_decay": ([0.0, 1.0], [0.01, 0.99]),
    "judge.base_url": (["", "localhost:8000", "http://"], ["http://localhost", "https://a.b/v1"]),
    "judge.concurrent": AT_LEAST_1,
    "judge.per_minute": NOT_NEGATIVE,
    "judge.retries": NOT_NEGATIVE,
    "judge.timeout": POSITIVE,
    "judge.temperature": ([-0.1], [0.0]),
    "judge.max_tokens": AT_LEAST_1,
    "judge.price_in": ([-0.1, float("nan")], [0.0]),
    "judge.price_out": ([-0.1, float("nan")], [0.0]),
    "select.from_iteration": ([0], [2]),
    "bootstrap.from_iteration": ([0], [2]),
    "select.keep": SHARE,
    "on_policy.rounds": AT_LEAST_1,
    "on_policy.prompts": AT_LEAST_1,
    "on_policy.passes": AT_LEAST_1,
    "on_policy.clip": POSITIVE,
    "on_policy.clip_high": POSITIVE,
    "on_policy.beta": ([-0.1, float("nan")], [0.0]),
    "bootstrap.fresh": ([-0.1], [0.0, 2.0]),
    "bootstrap.prompts_per_iteration": ([0.0, 1.1], [1.0, 0.01]),
    "bootstrap.temperature": ([-0.1, (), (1.0, -0.1)], [0.0, (1.0, 0.0)]),
    "bootstrap.replay_last": ([-1], [0]),
    "reward.sources": (
        [{"implicit": 0.0, "random": 1.0}, {"implicit": float("inf")}],
        [{"implicit": 0.5, "random": 2}],
    ),
    "reward.length_penalty": ([float("nan"), float("inf")], ["auto", -1.0, 0.0]),
    "bootstrap.top_k": NOT_NEGATIVE,
    "bootstrap.top_p": ([0.0, 1.1], [1.0]),
    "bootstrap.mixture": ([-0.1, 1.5], [0.0, 1.0]),
    "bootstrap.min_p": ([-0.1, 1.0], [0.0]),
    "bootstrap.max_new_tokens": AT_LEAST_1,
    "explore.weight": ([0.0, float("inf")], [1e-9]),
    "explore.regularisation": ([0.0, float("inf")], [1e-9]),
    "explore.dimension": NOT_NEGATIVE,
    "evaluate.temperature": ([-0.1], [0.0]),
    "evaluate.top_p": ([0.0, 1.1], [1.0]),
    "evaluate.max_new_tokens": AT_LEAST_1,
    "evaluate.limit": NOT_NEGATIVE,
    "data.validation": ([-0.1, 1.0], [0.0, 0.99]),
    "data.limit": NOT_NEGATIVE,
    "data.max_length": ([1], [513]),
    "data.max_prompt_length": ([0], [1, 1023]),
    "loop.iterations": NOT_NEGATIVE,
    "loop.epochs": AT_LEAST_1,
    "loop.validate_every": NOT_NEGATIVE,
    "loop.early_stop": NOT_NEGATIVE,
    "sft.epochs": NOT_NEGATIVE,
    "run.save_every": AT_LEAST_1,
    "run.keep_checkpoints": AT_LEAST_1,
    "run.log_every": AT_LEAST_1,
    "model.head_chunk": AT_LEAST_1,
    "mesh.data": ([0, -2], [1]),
    "bootstrap.refill": AT_LEAST_1,
    "mesh.fsdp": ([0, -2], [-1, 1]),
    "mesh.tensor": ([0, -2], [1]),
    "mesh.slices": ([0, -1], [1, 2]),
} | {
    f"{stage}.{key}": values
    for stage in ("optimizer", "sft.optimizer")
    for key, values in {
        "learning_rate": POSITIVE,
        "warmup": SHARE,
        "b1": ([-0.1, 1.0], [0.0]),
        "b2": ([-0.1, 1.0], [0.0]),
        "eps": POSITIVE,
        "weight_decay": ([-0.1], [0.0]),
        "batch_size": AT_LEAST_1,
        "clip": ([-1.0], [0.0]),
        "row_tokens": ([-128, 100, 129], [0, 128]),
        "microbatch_rows": NOT_NEGATIVE,
        "row_shapes": AT_LEAST_1,
    }.items()
}
# What else has to be set for a key to have a say.
OWNERS = {
    "lora.alpha": {"lora.rank": 1},
    "lora.targets": {"lora.rank": 1},
    "lora.dropout": {"lora.rank": 1},
    **{f"explore.{key}": {"bootstrap.pair_rule": "explore"} for key in ("weight", "regularisation", "dimension")},
    "loss.f_alpha": {"loss.f_divergence": "alpha_divergence"},
    "reward.sources": {"reward.source": "combined"},
    "loss.gamma": {"loss.name": "simpo"},
    "loss.gamma_beta_ratio": {"loss.name": "simpo"},
    "loss.alphapo_alpha": {"loss.name": "alphapo", "loss.gamma": 0.5},
    "loss.discopop_tau": {"loss.name": "discopop"},
    "loss.dpop_lambda": {"loss.name": "dpop"},
    "loss.rdpo_alpha": {"loss.name": "rdpo"},
    "loss.reward_scale": {"loss.name": "rpo_sq"},
    "loss.slic_delta": {"loss.name": "slic_hf"},
    "loss.slic_lambda": {"loss.name": "slic_hf"},
    "loss.desirable_weight": {"loss.name": "kto", "loop.iterations": 1},
    "loss.undesirable_weight": {"loss.name": "kto", "loop.iterations": 1},
}
DOOR_RANGES = {
    GenerateConfig: {
        "temperature": ([-0.1], [0.0]),
        "top_k": NOT_NEGATIVE,
        "top_p": ([0.0, 1.1], [1.0]),
        "min_p": ([-0.1, 1.0], [0.0]),
        "candidates": AT_LEAST_1,
        "max_new_tokens": AT_LEAST_1,
        "max_prompt_length": AT_LEAST_1,
        "slots": AT_LEAST_1,
        "refill": AT_LEAST_1,
        "limit": NOT_NEGATIVE,
    },
    AgreeConfig: {"resamples": AT_LEAST_1, "max_length": ([1], [2])},
    ReviewConfig: {"uninformative": ([-0.1], [0.0]), "long": ([1.0], [1.1])},
    RewardModelConfig: {
        **{f"reward_loss.{key}": ([-0.1, float("inf")], [0.0, 2.0]) for key in ("margin", "center", "length_alpha")},
        "epochs": AT_LEAST_1,
        "validate_every": NOT_NEGATIVE,
    },
    AnnotateConfig: {"per_prompt": NOT_NEGATIVE},
}
CASES = [(r, k, *v) for r, table in {TrainConfig: RANGES, **DOOR_RANGES}.items() for k, v in table.items()]


@pytest.mark.parametrize("record, key, bad, good", CASES, ids=[c[1] for c in CASES])
def test_ranges(record, key, bad, good):
    valid = base(record)
    for other, value in OWNERS.get(key, {}).items():
        valid = changed(valid, other, value)
    for value in bad:
        refused(changed(valid, key, value), f"{key} is {value!r}, expected ")
    for value in good:
        config.check(changed(valid, key, value), "x.yaml")


def test_every_range_is_tested():
    assert {key for key, _, _ in config.ranges.RANGES} == {case[1] for case in CASES}


# A run without given pairs.
ONLINE = {
    "data.pairs": (),
    "data.prompts": ("q.jsonl",),
    "bootstrap.from_iteration": 1,
    "reward.source": "random",
    "select.rule": "all",
}


# --- combinations that cannot run -------------------------------------------------------------------------------------

ON_POLICY = {"on_policy.algorithm": "policy_gradient", "reward.source": "function", "reward.function": "a:b"}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data.pairs": ()}, "data.pairs is empty, expected at least one file of preference pairs"),
        (
            {"explore.weight": 2.0},
            "explore.weight is 2.0, but nothing reads it: set bootstrap.pair_rule to 'explore' or loss.name to "
            "'dpo_pessimistic', or leave it out",
        ),
        ({"bootstrap.candidates": 1}, "bootstrap.candidates is 1, expected at least 2: a best and a worst"),
        ({"bootstrap.slots": 3}, "bootstrap.slots is 3, expected at least bootstrap.candidates (4)"),
        ({"data.max_prompt_length": 1024}, "data.max_prompt_length is 1024, expected less than data.max_length (1024)"),
        ({"reward.source": "function"}, "reward.function is '', expected 'module:function'"),
        (
            {"reward.source": "judge"},
            "judge.model is empty, expected the name of a model at judge.base_url (https://api.openai.com/v1) for rewa",
        ),
        (
            {"judge.key_env": "sk-123"},
            "judge.key_env is no name of an environment variable, expected one such as 'OPENAI_API_KEY'. The key "
            "itself belongs into that variable, and into no file.",
        ),
        ({"evaluate.prompts": ("p",)}, "evaluate.function is '', expected 'module:function'"),
        ({"evaluate.function": "judge"}, "evaluate.function is 'judge', expected 'module:function'"),
        (
            {"reward.source": "model"},
            "reward.model is '' with reward.source 'model', expected the folder of a reward model",
        ),
        (
            {"reward.model": "a/export"},
            "reward.model is 'a/export' with reward.source 'implicit', expected none; leave it out",
        ),
        (
            {"reward.source": "preference"},
            "reward.model is '' with reward.source 'preference', expected the folder of a preference model",
        ),
        (
            {"reward.tournament": True},
            "reward.tournament is True with reward.source 'implicit', expected 'preference': other sources do not",
        ),
        (
            {
                "reward.source": "preference",
                "reward.model": "m",
                "bootstrap.pair_rule": "condorcet",
                "reward.length_penalty": 0.1,
            },
            "reward.length_penalty is 0.1 with bootstrap.pair_rule 'condorcet', which reads the probabilities of",
        ),
        (
            {
                "reward.source": "judge",
                "judge.model": "m",
                "bootstrap.pair_rule": "most_certain",
                "reward.length_normalise": True,
            },
            "reward.length_normalise is True with bootstrap.pair_rule 'most_certain', which reads the probabilities of",
        ),
        ({"reward.source": "file"}, "reward.source is 'file', expected bootstrap.candidates_file with the scores"),
        ({"loop.best": True}, "loop.best needs held-out pairs: set data.validation"),
        (
            {"loop.best": True, "loop.best_by": "reward"},
            "loop.best_by is 'reward' with evaluate.prompts empty, expected prompts whose responses are rewarded",
        ),
        (
            {"bootstrap.temperature": (1.0, 0.9, 0.8, 0.7, 0.6)},
            "bootstrap.temperature has 5 values, expected at most bootstrap.candidates (4)",
        ),
        (
            {"bootstrap.replay_last": 1},
            "bootstrap.replay_last is 1 with bootstrap.replay False, expected replay",
        ),
        (
            {"select.rule": "none", "bootstrap.fresh": 0.0},
            "select.rule is 'none' from iteration 2 on, expected fresh pairs to train on from then on",
        ),
        (
            {"select.rule": "none", "bootstrap.from_iteration": 3},
            "set bootstrap.fresh, and bootstrap.from_iteration to 2 or less",
        ),
        (
            {"select.rule": "none", "select.unselected": "relabel"},
            "select.unselected is 'relabel' with select.rule 'none', which drops every given pair",
        ),
        (
            {"reward.source": "given"},
            "reward.source is 'given' with bootstrap.with_given False, expected given responses among the candidates",
        ),
        (
            {"bootstrap.with_given": True, "bootstrap.candidates": 0},
            "bootstrap.candidates is 0, expected at least 1",
        ),
        (
            {"reward.sources": {"implicit": 1.0, "random": 1.0}},
            "with reward.source 'implicit', which is one source; use reward.source 'combined', or leave it out",
        ),
        (
            {"reward.source": "combined", "reward.sources": {"implicit": 1.0}},
            "reward.sources is {'implicit': 1.0}, expected two sources or more to combine",
        ),
        *(
            (
                {"reward.source": "combined", "reward.sources": {name: 1.0, "random": 1.0}},
                f"reward.sources names {name!r}, expected one of 'implicit', 'judge', 'file', 'random', 'given', 'mode",
            )
            for name in ("combined", "strange", "model", "model:", "implicit:x", "function:no_colon")
        ),
        (
            {
                "reward.source": "combined",
                "reward.sources": {"implicit": 0.5, "random": 1.0},
                "reward.combine": "worst",
            },
            "reward.sources has weights (0.5, 1.0) with reward.combine 'worst', which takes the smallest",
        ),
        (
            {
                "reward.source": "combined",
                "reward.sources": {"implicit": 1.0, "random": 1.0},
                "bootstrap.from_iteration": 1,
            },
            "bootstrap.from_iteration is 1 with reward.source 'combined': ranking before any update",
        ),
        (
            {"reward.source": "combined", "reward.sources": {"judge": 1.0, "random": 1.0}},
            "judge.model is empty, expected the name of a model",
        ),
        *(
            ({**ONLINE, key: value}, f"{key} is {value!r} with data.pairs empty, expected given pairs for it")
            for key, value in (
                ("loop.parts", "random"),
                ("data.validation", 0.1),
                ("bootstrap.with_given", True),
                ("loop.first", "a/export"),
            )
        ),
        ({**ONLINE, "select.rule": "top_k", "select.score": "random"}, "select.rule is 'top_k' with data.pairs empty"),
        ({**ONLINE, "bootstrap.from_iteration": 2}, "data.pairs is empty, expected at least one file"),
        ({**ONLINE, "data.prompts": ()}, "data.pairs is empty, expected at least one file"),
        ({"loop.validate_every": 5}, "loop.validate_every needs held-out pairs: set data.validation"),
        ({"loop.early_stop": 2, "data.validation": 0.1}, "loop.early_stop is 2, expected checks inside an iteration"),
        (
            {"loop.best": True, "loop.best_by": "loss", "data.validation": 0.1, "loss.reference": "ema"},
            "loop.best_by is 'loss' with loss.reference 'ema': losses of iterations with different references",
        ),
        (
            {"select.keep": 0.0, "bootstrap.fresh": 0.0},
            "select.keep and bootstrap.fresh are both 0: nothing would be left",
        ),
        ({"select.from_iteration": 1}, "select.from_iteration is 1 with select.score 'irm': selection before"),
        (
            {"select.from_iteration": 1, "select.score": "alignment_potential"},
            "select.score 'alignment_potential': selection before any update",
        ),
        ({"bootstrap.from_iteration": 1}, "bootstrap.from_iteration is 1 with reward.source 'implicit': ranking"),
        ({"mesh.data": -1}, "mesh has -1 on several axes, expected it on one at most"),
        ({"loss.label_smoothing": 0.1, "loss.name": "ipo"}, "loss.label_smoothing is 0.1, but loss 'ipo' does not"),
        ({"loss.normalisation": "mean"}, "loss.normalisation is 'mean', but loss 'dpo' does not know it (only ipo"),
        (
            {"loss.gamma": 1.0},
            "loss.gamma is 1.0, but loss 'dpo' does not know it (only simpo, alphapo do); leave it out",
        ),
        (
            {"loss.dpop_lambda": 5.0, "loss.name": "cpo"},
            "loss.dpop_lambda is 5.0, but loss 'cpo' does not know it (only",
        ),
        (
            {"loss.f_divergence": "forward_kl", "loss.name": "aot"},
            "loss.f_divergence is 'forward_kl', but loss 'aot' does not know it (only dpo, robust_dpo",
        ),
        ({"loss.f_alpha": 0.3}, "loss.f_alpha is 0.3, but loss.f_divergence 'reverse_kl' has no α; leave it out"),
        (
            {"loss.f_divergence": "forward_kl", "loss.reference": "none"},
            "loss.reference is 'none' with loss.f_divergence 'forward_kl', expected a reference: without one there is",
        ),
        (
            {"loss.f_divergence": "js_divergence", "reward.reference": "none"},
            "reward.reference is 'none' with loss.f_divergence 'js_divergence', expected a reference",
        ),
        (
            {"loss.name": "exo_pair"},
            "loss.label_smoothing is 0.0, expected more than 0 for loss 'exo_pair', whose target is (1-ε, ε)",
        ),
        (
            {"loss.mix": {"exo_pair": 0.5}},
            "loss.label_smoothing is 0.0, expected more than 0 for loss 'exo_pair'",
        ),
        (
            {"loss.name": "simpo"},
            "loss.gamma is None and loss.gamma_beta_ratio is None, expected exactly one of them for loss 'simpo'",
        ),
        (
            {"loss.name": "simpo", "loss.gamma": 0.5, "loss.gamma_beta_ratio": 0.5},
            "loss.gamma is 0.5 and loss.gamma_beta_ratio is 0.5, expected exactly one of them for loss 'simpo'",
        ),
        ({"loss.mix": {"alphapo": 0.5}}, "expected exactly one of them for loss 'alphapo'"),
        ({"loss.name": "orpo", "loss.beta": 0.0}, "loss.beta is 0.0, expected a number > 0"),
        ({"loss.mix": {"dpo": 0.5}}, "loss.mix names 'dpo', which is loss.name already"),
        (
            {"loss.desirable_weight": 2.0},
            "loss.desirable_weight is 2.0, but loss 'dpo' does not know it (only kto, apo_zero_unpaired do)",
        ),
        (
            {"data.format": "unpaired"},
            "data.format is 'unpaired', but loss 'dpo' learns from pairs; use loss.name 'kto' or 'apo_zero_unpaired'.",
        ),
        (
            {"loss.name": "kto"},
            "loss.name is 'kto' with select.from_iteration 2 of 3 iterations, but selection ranks pa",
        ),
        (
            {"loss.name": "kto", "select.from_iteration": 4},
            "loss.name is 'kto' with bootstrap.from_iteration 2 of 3 iterations, but bootstrapping ranks pairs, and "
            "'kto' learns from single responses. Set loop.iterations to 1, or use 'kto_pair' on pairs.",
        ),
        (
            {"loss.name": "kto", "loop.iterations": 1, "loss.sft_weight": 0.1},
            "loss.sft_weight is 0.1 with loss 'kto', which learns from single responses; it is for pairs. Leave it out",
        ),
        (
            {"loss.name": "apo_zero_unpaired", "loop.iterations": 1, "loss.sft_weight": 0.1},
            "with loss 'apo_zero_unpaired', which learns from single responses; it is for pairs. Leave it out, or use "
            "'apo_zero'.",
        ),
        ({"loss.name": "apo_zero_unpaired"}, "Set loop.iterations to 1, or use 'apo_zero' on pairs."),
        ({"loss.name": "kto", "loss.mix": {"dpo": 0.5}}, "loss.mix is {'dpo': 0.5} with loss 'kto'"),
        ({"loss.mix": {"kto": 0.5}}, "loss.mix is {'kto': 0.5} with loss 'kto'"),
        ({"loss.name": "kto", "loss.ld_alpha": 0.5}, "loss.ld_alpha is 0.5 with loss 'kto'"),
        ({"loss.name": "kto", "loss.weighting": "wpo"}, "loss.weighting is 'wpo' with loss 'kto'"),
        (
            {"loop.first": "a/export", "select.from_iteration": 1, "select.score": "random"},
            "loop.first is 'a/export' with select.from_iteration 1 and bootstrap.from_iteration 2, expected 2 or more",
        ),
        (
            {"loop.first": "a/export", "bootstrap.from_iteration": 1, "reward.source": "random"},
            "loop.first is 'a/export' with select.from_iteration 2 and bootstrap.from_iteration 1, expected 2 or more",
        ),
        (
            {"bootstrap.replay": True, "bootstrap.fresh": 0.0},
            "bootstrap.replay is True with bootstrap.fresh 0, expected fresh pairs to train on again",
        ),
        (
            {"loss.name": "orpo", "loss.reference": "previous"},
            "loss.reference is 'previous', but loss 'orpo' reads no reference; leave it out",
        ),
        (
            {"select.score": "reference_logp", "loss.name": "orpo"},
            "select.score is 'reference_logp' with loss 'orpo' and reward.reference 'initial': there is no reference",
        ),
        (
            {"select.score": "reference_logp", "reward.reference": "none"},
            "select.score is 'reference_logp' with loss 'dpo' and reward.reference 'none': there is no reference",
        ),
        (
            {"select.score": "loss", "loss.reference": "previous"},
            "select.score is 'loss' with loss.reference 'previous': the policy that scores is that reference",
        ),
        (
            {"select.score": "reward_gap"},
            "select.score is 'reward_gap' with reward.function '', expected 'module:function'",
        ),
        (
            {"on_policy.algorithm": "raft"},
            "reward.source is 'implicit' with on_policy.algorithm 'raft', expected someone who ranks fresh samples",
        ),
        (ON_POLICY | {"data.pairs": ()}, "and on_policy.algorithm with data.prompts."),
        (
            ON_POLICY | {"data.pairs": (), "data.prompts": ("p",), "sft.epochs": 1},
            "data.pairs is empty, expected at least one file",
        ),
        (
            ON_POLICY | {"bootstrap.candidates_file": "c.jsonl"},
            "bootstrap.candidates_file is 'c.jsonl' with on_policy.algorithm 'policy_gradient', expected none",
        ),
        (ON_POLICY | {"bootstrap.candidates": 1}, "bootstrap.candidates is 1 with on_policy.algorithm"),
        (ON_POLICY | {"bootstrap.slots": 3}, "expected at least bootstrap.candidates (4)"),
        (ON_POLICY | {"loop.best": True, "data.validation": 0.1}, "loop.best is True with on_policy.algorithm"),
        (ON_POLICY | {"loop.validate_every": 2, "data.validation": 0.1}, "loop.validate_every is 2 with on_policy.alg"),
        (
            ON_POLICY | {"loss.reference": "none"},
            "on_policy.beta is 0.05 with on_policy.algorithm 'policy_gradient'",
        ),
        (ON_POLICY | {"loss.name": "orpo"}, "there is no KL to nothing"),
        (
            ON_POLICY | {"on_policy.algorithm": "raft", "on_policy.kl": "loss"},
            "on_policy.kl is 'loss' with on_policy.algorithm 'raft', expected 'reward', or on_policy.beta 0",
        ),
        (
            {"bootstrap.mixture": 0.1, "bootstrap.candidates_file": "c.jsonl"},
            "bootstrap.mixture is 0.1 with bootstrap.candidates_file, expected candidates that the run samples itself",
        ),
        (
            {"bootstrap.mixture_of": "candidates"},
            "bootstrap.mixture_of is 'candidates' with bootstrap.mixture 0, so that there is no mixture",
        ),
        (
            {"reward.source": "preference_function"},
            "reward.function is '', expected 'module:function'",
        ),
        (
            {"select.score": "reward_gap", "reward.source": "preference_function", "reward.function": "a:b"},
            "select.score is 'reward_gap' with reward.source 'preference_function', whose function compares two",
        ),
    ],
)
def test_combinations_that_cannot_run(changes, said):
    record = base(TrainConfig)
    for key, value in changes.items():
        record = changed(record, key, value)
    refused(record, said)


@pytest.mark.parametrize(
    "changes",
    [
        {"bootstrap.candidates": 1, "bootstrap.fresh": 0.0},
        {"bootstrap.candidates": 1, "loop.iterations": 1},
        {"bootstrap.slots": 3, "bootstrap.fresh": 0.0},
        {"reward.source": "function", "reward.function": "a:b", "bootstrap.from_iteration": 1},
        {"select.from_iteration": 1, "select.score": "annotator_gap"},
        {"select.keep": 0.0, "bootstrap.fresh": 0.0, "loop.iterations": 1},
        {"loop.best": True, "data.validation": 0.1},
        {"loop.best": True, "loop.best_by": "reward", "evaluate.prompts": ("p",), "evaluate.function": "a:b"},
        {"evaluate.prompts": ("p",), "reward.source": "model", "reward.model": "a/export"},
        {"evaluate.prompts": ("p",), "reward.source": "function", "reward.function": "a:b"},
        ONLINE,
        ONLINE | {"select.rule": "none", "select.from_iteration": 1},
        {"select.rule": "none"},
        {"select.rule": "none", "select.from_iteration": 1, "reward.source": "random", "bootstrap.from_iteration": 1},
        {"bootstrap.with_given": True, "bootstrap.candidates": 1, "reward.source": "given"},
        {"bootstrap.temperature": (1.0, 0.7)},
        {
            "reward.source": "combined",
            "reward.sources": {"model:a/b": 1.0, "function:a:b": 2.0, "implicit": 0.5, "random": 1.0},
        },
        {"loop.validate_every": 5, "loop.early_stop": 2, "data.validation": 0.1},
        {"loop.best": True, "loop.best_by": "loss", "data.validation": 0.1},
        {
            "loop.best": True,
            "loop.best_by": "loss",
            "data.validation": 0.1,
            "loss.reference": "ema",
            "loop.iterations": 1,
        },
        {"reward.source": "file", "bootstrap.candidates_file": "c.jsonl", "bootstrap.from_iteration": 1},
        {"reward.source": "file", "bootstrap.fresh": 0.0},
        {"reward.source": "random", "bootstrap.from_iteration": 1},
        {"reward.source": "judge", "judge.model": "m", "bootstrap.from_iteration": 1},
        {"reward.source": "model", "reward.model": "a/export", "bootstrap.from_iteration": 1},
        {
            "reward.source": "preference",
            "reward.model": "m",
            "reward.tournament": True,
            "bootstrap.from_iteration": 1,
            "bootstrap.pair_rule": "most_certain",
            "reward.length_penalty": 0.1,
        },
        {"bootstrap.pair_rule": "most_certain", "reward.length_penalty": 0.1},
        {
            "reward.source": "judge",
            "judge.model": "m",
            "judge.mode": "grade",
            "bootstrap.pair_rule": "condorcet",
            "reward.length_penalty": 0.1,
        },
        {"bootstrap.candidates_file": "c.jsonl", "bootstrap.candidates": 1, "bootstrap.slots": 1},
        {"loss.mix": {"ipo": 0.5}, "loss.normalisation": "mean"},
        {"loss.name": "exo_pair", "loss.label_smoothing": 1e-3},
        {"loss.name": "simpo", "loss.gamma": 0.5},
        {"loss.name": "alphapo", "loss.gamma_beta_ratio": 0.5},
        {"loss.mix": {"simpo": 0.5}, "loss.gamma": 0.5},
        {"loss.f_divergence": "alpha_divergence", "loss.f_alpha": 0.3},
        {"loss.reference": "none", "reward.reference": "none"},
        {"loss.name": "orpo", "select.from_iteration": 1, "bootstrap.from_iteration": 1},
        {"loss.name": "slic_hf", "select.from_iteration": 1},
        {"mesh.data": -1, "mesh.fsdp": 1},
        {"loss.name": "kto", "loop.iterations": 1, "data.format": "unpaired", "loss.desirable_weight": 2.0},
        {"loss.name": "kto", "select.from_iteration": 4, "bootstrap.fresh": 0.0},
        {"loss.name": "apo_zero_unpaired", "loop.iterations": 1, "loss.undesirable_weight": 2.0},
        {"loop.first": "a/export", "select.from_iteration": 1, "select.rule": "all", "select.score": "random"},
        {"loss.name": "orpo", "loss.mix": {"dpo": 0.5}, "loss.reference": "previous"},
        {"select.score": "reference_logp", "reward.reference": "none", "loop.iterations": 1},
        {"select.score": "loss", "loss.reference": "ema"},
        {"select.score": "reward_gap", "reward.function": "a:b"},
        ON_POLICY,
        ON_POLICY | {"data.pairs": (), "data.prompts": ("p",)},
        ON_POLICY | {"loss.reference": "none", "on_policy.beta": 0.0},
        ON_POLICY | {"on_policy.algorithm": "raft", "on_policy.kl": "loss", "on_policy.beta": 0.0},
        {"loss.ld_alpha": 0.0, "loss.weighting": "wpo", "loss.sft_weight": 0.1, "loss.mix": {"ipo": 0.5}},
    ],
)
def test_their_neighbours_run(changes):
    record = base(TrainConfig)
    for key, value in changes.items():
        record = changed(record, key, value)
    config.check(record, "x.yaml")


# --- one place per fact -----------------------------------------------------------------------------------------------


def test_a_review_ranks_pairs():
    refused(
        changed(base(ReviewConfig), "loss.name", "kto"), "loss.name is 'kto', but a review ranks pairs; use 'kto_pa"
    )
    refused(
        changed(base(ReviewConfig), "loss.name", "dpo_pessimistic"),
        "loss.name is 'dpo_pessimistic', but a review knows no Γ; use 'dpo', whose implicit reward is the same.",
    )


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("data.pairs", (), "data.pairs is empty, expected at least one file of preference pairs."),
        (
            "data.format",
            "unpaired",
            "data.format is 'unpaired', but a reward model learns from pairs; use another form",
        ),
        ("data.check", True, "data.check is True, but only sera_jax.train has this mode; leave it out."),
        ("data.max_prompt_length", 1024, "data.max_prompt_length is 1024, expected less than data.max_length (1024)"),
    ],
)
def test_a_reward_model_learns_from_pairs(key, value, said):
    refused(changed(base(RewardModelConfig), key, value), said)


def test_keys_of_one_kind_of_reward_model_are_refused_by_the_others():
    record = changed(base(RewardModelConfig), "kind", "preference_head")
    said = "{} is for kind {!r}, but kind is {!r}; leave it out, or change kind."
    refused(changed(record, "reward_loss.center", 0.1), said.format("reward_loss", "bradley_terry", "preference_head"))
    refused(changed(record, "preference.orders", "both"), said.format("preference", "preference", "preference_head"))
    labels = changed(base(RewardModelConfig), "preference.labels", ("yes", "no"))
    refused(labels, said.format("preference", "preference", "bradley_terry"))
    config.check(changed(labels, "kind", "preference"), "x.yaml")


def test_adapters_of_a_reward_model():
    record = changed(base(RewardModelConfig), "lora.rank", 4)
    config.check(record, "x.yaml")
    refused(changed(record, "lora.export", "adapter"), "lora.export is 'adapter', expected 'merged': who ranks reads a")
    record = changed(record, "lora.targets", ("query", "head"))
    refused(
        record, "lora.targets names 'head' with kind 'bradley_terry', expected none but layers: a scalar head is in"
    )
    config.check(changed(record, "kind", "preference"), "x.yaml")
    refused(changed(base(RewardModelConfig), "lora.alpha", 3.0), "lora.alpha is 3.0, but lora.rank is 0, so that")


def test_checks_of_a_reward_model_need_held_out_pairs():
    record = changed(changed(base(RewardModelConfig), "validate_every", 5), "data.validation", 0.0)
    refused(record, "validate_every needs held-out pairs: set data.validation to a share > 0.")


def test_what_is_dumped_parses_to_the_same_config(tmp_path):
    record = base(TrainConfig)
    other = {
        "data.pairs": ("a.jsonl", "b.parquet"), "loss.mix": {"ipo": 0.25, "slic": 1.0}, "optimizer.learning_rate": 3e-7,
        "sft.optimizer.weight_decay": 0.1, "run.seed": 7, "loop.best": True, "data.validation": 0.1, "loss.beta": 1e-2,
    }  # fmt: skip
    for key, value in other.items():
        record = changed(record, key, value)
    text = config.dump(record)
    assert config.parse(TrainConfig, ["--config", file(tmp_path, text)]) == record
    assert config.dump(config.parse(TrainConfig, ["--config", file(tmp_path, text)])) == text

    def complete(stored: dict, part) -> bool:
        fields = [f.name for f in dataclasses.fields(part)]
        nested = {f: getattr(part, f) for f in fields if dataclasses.is_dataclass(getattr(part, f))}
        return list(stored) == fields and all(complete(stored[f], value) for f, value in nested.items())

    assert complete(yaml.safe_load(text), record)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.__name__)
def test_every_field_has_a_line_in_the_docstring(record):
    told = re.findall(r"^ {8}(\w+): ", record.__doc__, re.MULTILINE)
    assert told == [f.name for f in dataclasses.fields(record)]


def test_names_are_those_of_the_tables():
    """The other tables are pinned beside them: LOSSES, the tables of sera."""
    names = lambda record, field: set(typing.get_args(typing.get_type_hints(record)[field]))
    assert names(config.DataConfig, "format") == {"auto", *data.UNPAIRED}
    assert names(config.DataConfig, "ranked") == set(data.RANKED)
    assert names(config.LossConfig, "weighting") == set(losses.WEIGHTINGS)
    assert names(config.OptimizerConfig, "schedule") == set(step.SCHEDULES)
    assert names(config.ModelConfig, "remat") == set(model.REMAT)
    assert names(config.OptimizerConfig, "moments") == set(programs.MEMORY)
    assert set(typing.get_args(config.TargetName)) == {*model.LINEAR, "head"}
    assert names(config.ModelConfig, "attention") == {"auto", *attention.ATTENTION}
    assert names(config.RewardConfig, "source") == set(fresh.SOURCES)
    assert names(config.RewardModelConfig, "kind") == set(reward_model.KINDS)
    assert names(config.LoopConfig, "best_by") == set(validate.BEST)
    assert names(config.OnPolicyConfig, "algorithm") == {"none", *rounds.LEARN}
    assert names(config.OnPolicyConfig, "advantage") == set(policy_gradient.ADVANTAGES)
    assert names(config.OnPolicyConfig, "ratio") == set(policy_gradient.RATIOS)
    assert names(config.LoopConfig, "parts") == {"all", *data.PARTS}
    assert names(config.RewardConfig, "combine") == set(rewards.COMBINATIONS)
    assert names(config.RewardConfig, "length_unit") == set(rewards.LENGTHS)


# --- nothing in a config is idle: types followed through the syntax trees ---------------------------------------------

HOUSE = pathlib.Path(sera_jax.__file__).parent
SOURCES = {str(path.relative_to(HOUSE)): path.read_text(encoding="utf-8") for path in sorted(HOUSE.rglob("*.py"))}


def named(annotation: ast.AST | None, known: set[str]) -> set[str]:
    """The known classes that an annotation names by itself or as one of a union (not inside of list[...])."""
    if isinstance(annotation, ast.BinOp):
        return named(annotation.left, known) | named(annotation.right, known)
    name = annotation.attr if isinstance(annotation, ast.Attribute) else getattr(annotation, "id", None)
    return {name} & known


def reads(sources: dict[str, str]) -> set[tuple[str, str]]:
    """(class, field) of every read outside of config whose object's class follows from annotations: of parameters,
    of fields of classes, of what is returned; through assignments, also of tuples. `getattr` of a literal name counts.
    """
    trees = {name: ast.parse(text) for name, text in sources.items()}
    classes = {n.name: n for t in trees.values() for n in ast.walk(t) if isinstance(n, ast.ClassDef)}
    known = set(classes)
    fields = {
        name: {n.target.id: named(n.annotation, known) for n in node.body if isinstance(n, ast.AnnAssign)}
        for name, node in classes.items()
    }
    functions = [n for t in trees.values() for n in ast.walk(t) if isinstance(n, ast.FunctionDef)]
    returned = {n.name: named(n.returns, known) for n in functions}
    found: set[tuple[str, str]] = set()

    def classes_of(node: ast.AST, names: dict[str, set[str]]) -> set[str]:
        if isinstance(node, ast.Name):
            return names.get(node.id, set())
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called == "parse" and node.args:  # configs.parse(TrainConfig, args) gives what it is asked for
                return named(node.args[0], known)
            return returned.get(called, set()) | ({called} & known)
        if isinstance(node, ast.Attribute):
            return set().union(*(fields[c].get(node.attr, set()) for c in classes_of(node.value, names)))
        if isinstance(node, ast.IfExp):
            return classes_of(node.body, names) | classes_of(node.orelse, names)
        return set()

    def walk(node: ast.AST, names: dict[str, set[str]]) -> None:
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            names = names | {a.arg: named(a.annotation, known) for a in every}
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts))
                for to, value in pairs:
                    if isinstance(to, ast.Name):
                        names[to.id] = classes_of(value, names)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.update((c, node.attr) for c in classes_of(node.value, names))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr" and len(node.args) > 1:
            if isinstance(node.args[1], ast.Constant):
                found.update((c, node.args[1].value) for c in classes_of(node.args[0], names))
        for child in ast.iter_child_nodes(node):
            walk(child, names)

    for name, tree in trees.items():
        if not name.startswith("config/"):
            walk(tree, {})
    return found


# Read by names that stand in a variable: keys of losses, of sampling, the two sides of an evaluation; read back from
# config.yaml.
DYNAMIC = (
    {("LossConfig", key) for loss in losses.LOSSES.values() for key in loss.keys}
    | {("GenerateConfig", key) for key in generate.SAMPLING}
    | {("EvaluateDoorConfig", key) for key in ("policy", "baseline")}
    | {("RunConfig", "dir")}
)
FIELDS = {(record.__name__, f.name) for record in RECORDS for f in dataclasses.fields(record)}


def test_no_field_is_idle():
    """Every key of every door is read by a room, off its own record."""
    assert FIELDS - reads(SOURCES) - DYNAMIC == set()


@pytest.mark.parametrize(
    "file, used, instead, field",
    [
        ("train/validate.py", "best_by", "best", ("LoopConfig", "best_by")),
        ("train/update.py", "config.bootstrap.replay", "False", ("BootstrapConfig", "replay")),
        ("train/fresh.py", "values.top_p", "1.0", ("BootstrapConfig", "top_p")),
        ("train/fresh.py", '"top_k", 0', '"top_q", 0', ("BootstrapConfig", "top_k")),
        ("train/world.py", "optimizer.clip", "1.0", ("OptimizerConfig", "clip")),
        ("review.py", "config.uninformative", "0.1", ("ReviewConfig", "uninformative")),
    ],
)
def test_a_field_that_falls_idle_is_caught(file, used, instead, field):
    """Also one whose name others have: top_p is read off other records all over the house."""
    assert used in SOURCES[file]
    changed_sources = SOURCES | {file: SOURCES[file].replace(used, instead)}
    assert FIELDS - reads(changed_sources) - DYNAMIC >= {field}


def test_reads_are_followed():
    source = """
@dataclass
class Inner:
    a: int
    b: int
    c: int
    d: int
class Outer:
    inner: Inner
class World:
    outer: Outer | None
def f(world: World, other: Any):
    x, y = world.outer.inner, other
    def g(inner: Inner | None = None):
        return inner.b
    return [x.a for _ in y.c], getattr(x, "d"), lambda: y.a
"""
    want = {("World", "outer"), ("Outer", "inner"), ("Inner", "a"), ("Inner", "b"), ("Inner", "d")}
    assert reads({"x.py": source}) == want
    assert reads({"config/checks.py": source}) == set()
