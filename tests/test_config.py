"""YAML and flags to records: what wins, what is refused and in which words, and that nothing in a config is idle."""

import ast
import dataclasses
import pathlib
import re
import typing

import pytest
import yaml

import sera_jax
from sera_jax import config, losses, model, step
from sera_jax.config import ConfigError, GenerateConfig, ReviewConfig, TrainConfig

NEEDED = {"run": {"dir": "runs/a"}, "model": {"path": "models/m"}, "data": {"pairs": ["p.jsonl"]}}
RECORDS = [r for r in vars(config).values() if dataclasses.is_dataclass(r)]
SECTIONS = [f.name for f in dataclasses.fields(TrainConfig)]


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
        ReviewConfig: lambda: ReviewConfig("a", "b", config.DataConfig(("p.jsonl",)), "o"),
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
        ({"loss": {"name": "dop"}}, (), ("loss.name", "'dpo', 'ipo'", "dop")),
        ({"select": {"rule": "best"}}, (), ("select.rule", "top_k", "best")),
        ({"model": {"compute": "fp8"}}, (), ("model.compute", "bfloat16", "fp8")),
        ({"loss": {"mix": {"foo": 1.0}}}, (), ("loss.mix", "'foo'", "dpo, ipo")),
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
    "loss.sft_weight": ([-0.1], [0.0]),
    "loss.mix": ([{"ipo": 0.0}, {"ipo": -1.0}], [{"ipo": 0.1}]),
    "reward.gamma": SHARE,
    "reward.ema_decay": ([0.0, 1.0], [0.01, 0.99]),
    "select.from_iteration": ([0], [2]),
    "bootstrap.from_iteration": ([0], [2]),
    "select.keep": SHARE,
    "bootstrap.fresh": ([-0.1], [0.0, 2.0]),
    "bootstrap.prompts_per_iteration": ([0.0, 1.1], [1.0, 0.01]),
    "bootstrap.temperature": ([-0.1], [0.0]),
    "bootstrap.top_k": NOT_NEGATIVE,
    "bootstrap.top_p": ([0.0, 1.1], [1.0]),
    "bootstrap.min_p": ([-0.1, 1.0], [0.0]),
    "bootstrap.max_new_tokens": AT_LEAST_1,
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
    "sft.epochs": NOT_NEGATIVE,
    "run.save_every": AT_LEAST_1,
    "run.keep_checkpoints": AT_LEAST_1,
    "run.log_every": AT_LEAST_1,
    "model.head_chunk": AT_LEAST_1,
    "mesh.data": ([0, -2], [1]),
    "mesh.fsdp": ([0, -2], [-1, 1]),
    "mesh.tensor": ([0, -2], [1]),
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
    }.items()
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
        "limit": NOT_NEGATIVE,
    },
    ReviewConfig: {"uninformative": ([-0.1], [0.0]), "long": ([1.0], [1.1])},
}
CASES = [(r, k, *v) for r, table in {TrainConfig: RANGES, **DOOR_RANGES}.items() for k, v in table.items()]


@pytest.mark.parametrize("record, key, bad, good", CASES, ids=[c[1] for c in CASES])
def test_ranges(record, key, bad, good):
    for value in bad:
        refused(changed(base(record), key, value), f"{key} is {value!r}, expected ")
    for value in good:
        config.check(changed(base(record), key, value), "x.yaml")


def test_every_range_is_tested():
    assert {key for key, _, _ in config._RANGES} == {case[1] for case in CASES}


# --- combinations that cannot run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data.pairs": ()}, "data.pairs is empty, expected at least one file of preference pairs"),
        ({"bootstrap.candidates": 1}, "bootstrap.candidates is 1, expected at least 2: a best and a worst"),
        ({"bootstrap.slots": 3}, "bootstrap.slots is 3, expected at least bootstrap.candidates (4)"),
        ({"data.max_prompt_length": 1024}, "data.max_prompt_length is 1024, expected less than data.max_length (1024)"),
        ({"reward.source": "function"}, "reward.function is '', expected 'module:function'"),
        ({"evaluate.prompts": ("p",)}, "evaluate.function is '', expected 'module:function'"),
        ({"loop.best": True}, "loop.best needs held-out pairs: set data.validation"),
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
        ({"loss.gamma": 1.0}, "loss.gamma is 1.0, but loss 'dpo' does not know it (only simpo does)"),
        ({"loss.mix": {"dpo": 0.5}}, "loss.mix names 'dpo', which is loss.name already"),
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
        {"loss.mix": {"ipo": 0.5}, "loss.normalisation": "mean"},
        {"mesh.data": -1, "mesh.fsdp": 1},
    ],
)
def test_their_neighbours_run(changes):
    record = base(TrainConfig)
    for key, value in changes.items():
        record = changed(record, key, value)
    config.check(record, "x.yaml")


# --- one place per fact -----------------------------------------------------------------------------------------------


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
    """The other tables are pinned beside them: LOSSES, the tables of sera, FORMATS."""
    names = lambda record, field: set(typing.get_args(typing.get_type_hints(record)[field]))
    assert names(config.OptimizerConfig, "schedule") == set(step.SCHEDULES)
    assert names(config.ModelConfig, "remat") == set(model.REMAT)


def test_no_field_is_idle():
    """Every key of a run is read by a room: as an attribute, or by its name (keys of losses, config.yaml read back)."""
    house = pathlib.Path(sera_jax.__file__).parent
    read = {key for loss in losses.LOSSES.values() for key in loss.keys}
    for path in house.rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                read.add(getattr(node.args[1], "value", None))
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                read.add(node.slice.value)
    sections = [f.type for f in dataclasses.fields(TrainConfig)]
    fields = {(s.__name__, f.name) for s in sections for f in dataclasses.fields(s)}
    assert {f for f in fields if f[1] not in read} == set()
    assert set(SECTIONS) <= read
