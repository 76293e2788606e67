"""YAML and flags → a checked record, and back."""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jsonargparse
import yaml

from sera_jax.config.checks import ConfigError, check


def parse(record: type, args: list[str] | None = None) -> Any:
    """Reads `--config FILE.yaml` (defaults; of several the later ones win) and flags (which win over all of them) into
    `record`, and checks it.

    Args:
        record: TrainConfig, GenerateConfig, EvaluateDoorConfig, ReviewConfig, RewardModelConfig or AnnotateConfig.
        args: command line; None = sys.argv.

    Raises:
        ConfigError: unknown or missing key, wrong type, value out of range; the message names key and file.
    """
    return parse_beside(record, None, args)[0]


def parse_beside(record: type, own: type | None, args: list[str] | None = None) -> tuple[Any, Any]:
    """`parse` for a door that takes the keys of another one, and beside them its own.

    Args:
        own: a record of keys that `record` does not have; None = none.

    Returns:
        both records, the second None where `own` is.
    """
    args = sys.argv[1:] if args is None else args
    records = (record,) if own is None else (record, own)
    parser = _parser(records)
    files = [
        a.removeprefix("--config=") if a != "--config" else b
        for a, b in zip(args, [*args[1:], ""])
        if a == "--config" or a.startswith("--config=")
    ]
    for file in files:
        if not pathlib.Path(file).is_file():
            raise ConfigError(f"{file}: no such config file.")
    where = " + ".join(files) or "flags"
    try:
        values = vars(parser.instantiate(parser.parse_args(args)))
        made = [each(**{f.name: values[f.name] for f in dataclasses.fields(each)}) for each in records]
    except (jsonargparse.ArgumentError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    check(made[0], where)
    return made[0], (made[1] if own is not None else None)


@functools.cache
def _parser(records: tuple[type, ...]) -> jsonargparse.ArgumentParser:
    """Of the keys of these records; made once, since hundreds of keys take longer to declare than to read."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, description=records[-1].__doc__)
    parser.add_argument(
        "--config", action="config", help="YAML file, may come several times; what comes later overrides"
    )
    for each in records:
        parser.add_class_arguments(each, None)
    return parser


def dump(config: Any) -> str:
    """The complete config as YAML: training from it repeats the run."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
