"""config.json ↔ `Arch`: every number is read from the file, in the layouts of transformers 4 and 5."""

import inspect
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sera_jax import model, processes, rope
from sera_jax.hf.families import CAPS, FAMILIES, KEYS, POLICY, REWARD_MODEL, Family
from sera_jax.model import Arch


def read_arch(path: str | os.PathLike[str]) -> Arch:
    """The architecture in `path`/config.json, of a policy.

    Raises:
        ValueError: no config.json, an architecture that is not in FAMILIES, a key that is missing or has a value that
            this program does not compute (biases, rope scaling, an effective sliding window, ...); a reward model.
    """
    arch = read_any_arch(path)
    if arch.scored:
        raise ValueError(
            f"{pathlib.Path(path) / 'config.json'}: the architecture is {_name(arch)!r}, a reward model; expected "
            f"{arch.family!r} or another policy, which has a head over the vocabulary."
        )
    return arch


def read_reward_arch(path: str | os.PathLike[str]) -> Arch:
    """The same of a reward model.

    Raises:
        ValueError: as `read_arch`, but for a policy; more than one label.
    """
    arch = read_any_arch(path)
    if not arch.scored:
        raise ValueError(
            f"{pathlib.Path(path) / 'config.json'}: the architecture is {_name(arch)!r}, a policy; expected a reward "
            f"model, {arch.family.removesuffix(POLICY) + REWARD_MODEL!r} with one label, say. Train one with "
            "`python -m sera_jax.reward_model`."
        )
    return arch


def read_any_arch(path: str | os.PathLike[str]) -> Arch:
    """The same of either."""
    return arch_of(read_config(path), pathlib.Path(path) / "config.json")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`path`/config.json as it stands. Raises ValueError: there is none."""
    return read_json(pathlib.Path(path) / "config.json", "the config of a Hugging Face model folder")


def _name(arch: Arch) -> str:
    """What config.json calls the architecture."""
    return arch.family.removesuffix(POLICY) + REWARD_MODEL if arch.scored else arch.family


def write_config(
    path: str | os.PathLike[str],
    arch: Arch,
    *,
    source: str | os.PathLike[str] | None = None,
    dtype: Any = jnp.float32,
    extra: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes config.json alone, which is enough for random weights.

    Args:
        path: folder, created where it is missing.
        source: folder whose config.json gives the keys that `Arch` does not have; without it, they are left out and
            the defaults of transformers hold.
        dtype: of the weights, for those who load them. extra: further keys ({"eos_token_id": 1}, ...); they win.

    Returns:
        The folder.
    """
    path = pathlib.Path(path)
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        partial = path / "config.json.partial"
        partial.write_text(config_text(arch, source, dtype, extra))
        os.replace(partial, path / "config.json")
    processes.barrier("config.json")
    return path


def arch_of(config: Mapping[str, Any], where: pathlib.Path) -> Arch:
    name, scored = _architecture(config, where)
    family = FAMILIES[name]
    for key, accepted in family.fixed.items():
        if config.get(key, accepted[0]) not in accepted:
            raise ValueError(
                f"{where}: {key} is {config[key]!r}, expected {' or '.join(map(repr, accepted))}; nothing else is "
                "computed here yet."
            )

    def read(key: str, kind: type) -> Any:
        """The value of a key, or its default; a number must be positive."""
        value = config.get(key, family.defaults.get(key))
        if value is None and key not in config:
            raise ValueError(f"{where}: {key} is missing, and {name} has no default for it.")
        fits = {bool: isinstance(value, bool), int: type(value) is int, float: type(value) in (int, float)}[kind]
        if not fits or (kind is not bool and value <= 0):
            raise ValueError(
                f"{where}: {key} is {value!r}, expected a {'' if kind is bool else 'positive '}{kind.__name__}."
            )
        return value

    def given(key: str | None) -> bool:
        return key is not None and config.get(key, family.defaults[key]) is not None

    width, heads = read("hidden_size", int), read("num_attention_heads", int)
    kv_heads = read("num_key_value_heads", int) if given(family.key("kv_heads")) else heads
    if not given(family.key("head_dim")) and width % heads:
        raise ValueError(f"{where}: hidden_size is {width}, expected a multiple of num_attention_heads ({heads}).")
    head_dim = read("head_dim", int) if given(family.key("head_dim")) else width // heads
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_key_value_heads is {kv_heads}, expected a divisor of num_attention_heads ({heads})."
        )
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim is {head_dim}, expected an even number.")
    form = dict(family.form(config))
    if family.key("activation"):
        act = form["activation"] = config.get("hidden_act", family.defaults["hidden_act"])
        if act not in model.ACTIVATIONS:
            raise ValueError(f"{where}: hidden_act is {act!r}, expected one of {', '.join(model.ACTIVATIONS)}.")
    for field in family.caps:
        form[field] = float(read(CAPS[field], float)) if given(CAPS[field]) else None
    layers = read("num_hidden_layers", int)
    return Arch(
        family=name,
        vocab=read("vocab_size", int),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=read("intermediate_size", int),
        norm_eps=float(read(family.key("norm_eps"), float)),
        tied=read("tie_word_embeddings", bool),
        scored=scored,
        init_std=float(read("initializer_range", float)),
        biases=family.biases(config),
        windows=_windows(config, family, layers, where),
        **_rope(config, family, head_dim, where),
        **form,
    )


def _architecture(config: Mapping[str, Any], where: pathlib.Path) -> tuple[str, bool]:
    """The row of FAMILIES, and whether it is a reward model of that family."""
    by_type = [name for name, family in FAMILIES.items() if family.model_type == config.get("model_type")]
    names = config.get("architectures") or by_type or [config.get("model_type")]
    policy = str(names[0]).removesuffix(REWARD_MODEL) + POLICY
    scored = policy in FAMILIES and names[0].endswith(REWARD_MODEL)
    if not scored and names[0] not in FAMILIES:
        raise ValueError(f"{where}: the architecture is {names[0]!r}, expected one of {', '.join(FAMILIES)}.")
    if scored:
        labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
        if labels != 1:
            raise ValueError(
                f"{where}: {names[0]} has {labels} labels (id2label, num_labels), expected 1: a reward model."
            )
    return policy if scored else names[0], scored


def _windows(config: Mapping[str, Any], family: Family, layers: int, where: pathlib.Path) -> tuple[int | None, ...]:
    """How far each layer looks back; () where all look back to the start."""
    window = config.get("sliding_window", family.defaults["sliding_window"])
    used = config.get("use_sliding_window", family.defaults.get("use_sliding_window", True))
    if family.slides is None or window is None or not used:
        return ()
    if type(window) is not int or window <= 0:
        raise ValueError(f"{where}: sliding_window is {window!r}, expected a positive int or null.")
    kinds = config.get("layer_types") or [
        "sliding_attention" if family.slides(config, layer) else "full_attention" for layer in range(layers)
    ]
    strange = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if strange or len(kinds) != layers:
        raise ValueError(
            f"{where}: layer_types has {len(kinds)} entries"
            f"{f', one of them {strange[0]!r}' if strange else ''}, expected {layers} (num_hidden_layers), each "
            "'sliding_attention' or 'full_attention'."
        )
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _rope(config: Mapping[str, Any], family: Family, head_dim: int, where: pathlib.Path) -> dict[str, Any]:
    """The fields of `Arch` on rotary embeddings: from `rope_scaling` and keys beside it (transformers 4), or all in
    `rope_parameters` (5)."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    told = dict(config.get(key) or {})
    kinds = (told.pop("rope_type", None), told.pop("type", None))  # "type" is the older word
    kind = kinds[0] or kinds[1] or "default"
    if kind not in rope.ROPES:
        raise ValueError(f"{where}: {key} has the type {kind!r}, expected one of {', '.join(rope.ROPES)}.")
    theta = told.pop("rope_theta", config.get(family.theta, config.get("rope_theta", family.defaults["rope_theta"])))
    if type(theta) not in (int, float) or theta <= 0:
        raise ValueError(f"{where}: {family.theta} is {theta!r}, expected a positive float.")
    share_key, default = family.rotary or ("partial_rotary_factor", 1.0)
    share = told.pop("partial_rotary_factor", config.get(share_key, default))
    rotary = int(head_dim * share) if type(share) in (int, float) else 0
    if not 0 < rotary <= head_dim or rotary % 2 or (family.rotary is None and rotary < head_dim):
        wanted = "1.0" if family.rotary is None else f"a share of head_dim ({head_dim}) that is an even number"
        raise ValueError(f"{where}: {share_key} is {share!r}, expected {wanted}.")
    known = inspect.signature(rope.ROPES[kind]).parameters.values()
    own = {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY}
    if "original_max_position_embeddings" in own:
        told.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    told = {name: value for name, value in told.items() if value is not None}
    strange = [name for name in told if name not in own] if kind != "default" else []
    missing = [name for name, value in own.items() if value is inspect.Parameter.empty and name not in told]
    if strange or missing:
        raise ValueError(
            f"{where}: {key} of type {kind!r} has {', '.join(told) or 'no keys'}, expected {', '.join(own)}"
            f" ({'unknown: ' + ', '.join(strange) if strange else 'missing: ' + ', '.join(missing)})."
        )
    return {
        "rope_theta": float(theta),
        "rotary": None if rotary == head_dim else rotary,
        "rope": kind,
        "rope_keys": tuple(sorted((name, value) for name, value in told.items() if name in own)),
    }


def config_text(arch: Arch, source: Any, dtype: Any, extra: Mapping[str, Any] | None) -> str:
    """config.json of `arch`; what it has no word for comes from the source."""
    family = FAMILIES[arch.family]
    own = _own_keys(arch, family) if source is None else {}
    config = dict(own)
    if source is not None:
        config = read_json(pathlib.Path(source) / "config.json", "the config of the source folder")
    config["architectures"] = [_name(arch)]
    if arch.scored:
        # transformers counts the labels here, two where nothing is said.
        config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        config.pop("num_labels", None)
    config["model_type"] = family.model_type
    keys = {field: family.key(field) for field in KEYS} | {field: CAPS[field] for field in family.caps}
    config.update({key: getattr(arch, field) for field, key in keys.items() if key is not None})
    if config.get("rope_parameters"):
        config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": arch.rope_theta}
        config.pop(family.theta, None)
    else:
        config[family.theta] = arch.rope_theta  # transformers 5 reads it here, too
    # transformers 5 writes "dtype" and reads both; version 4 and others know "torch_dtype" only.
    config["dtype" if "dtype" in config else "torch_dtype"] = np.dtype(dtype).name
    config.update(extra or {})
    where = pathlib.Path("config.json to be written")
    for key in own.keys() - (extra or {}).keys():  # what goes without saying is left out
        rest = {k: v for k, v in config.items() if k != key}
        config = rest if arch_of(rest, where) == arch else config
    again = arch_of(config, where)
    if again != arch:
        raise ValueError(f"the config to be written reads as {again}, expected {arch}; check `source` and `extra`.")
    return json.dumps(config, indent=2) + "\n"


def _own_keys(arch: Arch, family: Family) -> dict[str, Any]:
    """The keys that say what KEYS and CAPS do not, of any family."""
    windows = [window for window in arch.windows if window]
    config: dict[str, Any] = {
        "sliding_window": windows[0] if windows else None,
        "use_sliding_window": bool(windows),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in arch.windows] or None,
        "attention_bias": "attention" in arch.biases,
        "mlp_bias": "mlp" in arch.biases,
        "use_parallel_residual": arch.block == "parallel",
    }
    if family.rotary is not None:
        config[family.rotary[0]] = (arch.rotary or arch.head_dim) / arch.head_dim
    if arch.score_scale is not None:
        config["query_pre_attn_scalar"] = round(arch.score_scale**-2)
    if arch.rope != "default":
        config["rope_scaling"] = {"rope_type": arch.rope, **dict(arch.rope_keys)}
    return config


def read_json(path: pathlib.Path, what: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, expected {what}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}), expected {what}.") from None
