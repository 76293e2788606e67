"""The nearest change of a config with which a program fits, the cheapest tried first."""

import dataclasses
from collections.abc import Callable, Iterator

from sera_jax import mesh as meshes
from sera_jax.compile_check import cases
from sera_jax.compile_check.cases import Setting
from sera_jax.config import RewardModelConfig, TrainConfig

Change = tuple[str, object]
"""A dotted key of the config and its new value."""


def changed(config: TrainConfig | RewardModelConfig, changes: list[Change]) -> TrainConfig | RewardModelConfig:
    """The config with other values at dotted keys."""

    def put(record: object, parts: list[str], value: object) -> object:
        first, *rest = parts
        inner = put(getattr(record, first), rest, value) if rest else value
        return dataclasses.replace(record, **{first: inner})

    for key, value in changes:
        config = put(config, key.split("."), value)
    return config


def flags(changes: list[Change]) -> str:
    """As they are typed; of a key that is changed twice, the last value."""
    return " ".join(f"--{key} {value}" for key, value in dict(changes).items())


def steps(setting: Setting, name: str) -> Iterator[list[Change]]:
    """Changes for a program of cases.CASES, one after the other, each on top of those before.

    Fewer rows a device at once cost nothing but launches; recomputing costs a forward pass; weights over all chips cost
    gathering; moments, or what the backward pass keeps, in the host's memory cost two trips of them; a smaller chunk of
    the head costs launches; heads and hidden units over several chips cost a sum a layer.
    """
    config, mesh = setting.config, setting.mesh
    if name in ("update", "sft update", "reward update"):
        stage = "sft.optimizer" if name == "sft update" else "optimizer"
        optimizer = config.sft.optimizer if name == "sft update" else config.optimizer
        rows = cases.plan(config, optimizer, setting.arch, mesh).rows // meshes.row_shards(mesh)
        yield from _halvings(f"{stage}.microbatch_rows", rows, 1)
        if config.model.remat not in ("full", "host"):
            yield [("model.remat", "full")]
        yield from _one_copy(setting)
        if optimizer.moments != "host":
            yield [(f"{stage}.moments", "host")]
        if config.model.remat != "host":
            yield [("model.remat", "host")]
        yield from _halvings("model.head_chunk", config.model.head_chunk, 64)
    elif name in ("features", "ranker"):
        yield from _one_copy(setting)
    elif name in ("scorer", "held-out scorer"):
        yield from _one_copy(setting)
        yield from _halvings("model.head_chunk", config.model.head_chunk, 64)
    elif name in ("prefill", "decode"):
        yield from _halvings("bootstrap.refill", config.bootstrap.refill, 1)
        yield from _halvings("bootstrap.slots", config.bootstrap.slots, max(1, config.bootstrap.candidates))
        yield from _one_copy(setting)
    elif name == "to decode layout":
        yield from _one_copy(setting)
    if name in cases.LAYERED:
        yield from _tensor(setting)


def nearest(setting: Setting, name: str, fits: Callable[[list[Change]], bool]) -> list[Change] | None:
    """The first changes, one on top of the other, with which a program fits; None if none does.

    Args:
        fits: compiles the program with these changes and says whether it does.
    """
    taken: list[Change] = []
    for step in steps(setting, name):
        taken += step
        if fits(taken):
            return taken
    return None


def _halvings(key: str, value: int, least: int) -> Iterator[list[Change]]:
    while value > least:
        value = max(least, value // 2)
        yield [(key, value)]


def _one_copy(setting: Setting) -> Iterator[list[Change]]:
    """Every chip of a slice holds another part of the weights."""
    slices = setting.config.mesh.slices
    if setting.mesh.shape["data"] > slices or setting.mesh.shape["tensor"] > 1:
        yield [("mesh.data", slices), ("mesh.fsdp", -1), ("mesh.tensor", 1)]


def _tensor(setting: Setting) -> Iterator[list[Change]]:
    """Heads and hidden units over 2, 4, .. chips, as far as the heads go."""
    config, ways = setting.config, 2
    while (setting.mesh.size // config.mesh.slices) % ways == 0 and setting.arch.kv_heads % ways == 0:
        yield [("mesh.data", config.mesh.slices), ("mesh.fsdp", -1), ("mesh.tensor", ways)]
        ways *= 2
