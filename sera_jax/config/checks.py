"""What is refused, and in which words: a value out of range, and combinations that cannot run."""

import dataclasses
import math
import re
from typing import Any, get_args

from sera_jax.config.doors import ReviewConfig, RewardModelConfig, TrainConfig
from sera_jax.config.names import (
    ALONE,
    FUNCTION_SOURCES,
    MARGIN_SCORES,
    REFERENCE_FREE,
    SOURCE_KEYS,
    UNCERTAIN_LOSS,
    UNPAIRED_LOSSES,
    WITH_ARGUMENT,
    LossName,
    RewardName,
    WinRuleName,
)
from sera_jax.config.ranges import LOSS_KEYS, RANGES
from sera_jax.config.sections import (
    ExploreConfig,
    LoraConfig,
    LossConfig,
    PreferenceConfig,
    RewardConfig,
    RewardLossConfig,
)


class ConfigError(ValueError):
    """A config that cannot be run: says which key, in which file, what was got and what was expected."""


def get(config: Any, key: str) -> Any:
    """The value at a dotted key of nested records, None where a part is missing."""
    for part in key.split("."):
        if config is None:
            return None
        config = getattr(config, part, None)
    return config


def check(config: Any, where: str) -> None:
    """Raises ConfigError for the first value out of range and for combinations that cannot run.

    Args:
        config: any of the doors' records.
        where: the file (or "flags") named in the message.
    """

    def refuse(key: str, expected: str) -> None:
        raise ConfigError(f"{where}: {key} is {get(config, key)!r}, expected {expected}.")

    for key, test, expected in RANGES:
        value = get(config, key)
        if value is not None and not test(value):
            refuse(key, expected)
    if get(config, "mesh") is not None and [config.mesh.data, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1:
        raise ConfigError(f"{where}: mesh has -1 on several axes, expected it on one at most.")
    if get(config, "loss") is not None:
        _check_loss(config, where)
        _check_unpaired(config, where)
    if isinstance(config, TrainConfig):
        _check_train(config, where)
    elif isinstance(config, RewardModelConfig):
        _check_reward_model(config, where)
    if get(config, "data.check") and not isinstance(config, TrainConfig):
        raise ConfigError(f"{where}: data.check is True, but only sera_jax.train has this mode; leave it out.")


def _check_loss(config: Any, where: str) -> None:
    loss = config.loss
    names = {loss.name, *loss.mix}
    strange = sorted(names - set(get_args(LossName)))  # the parser does not check the keys of a mapping
    if strange:
        raise ConfigError(
            f"{where}: loss.mix names {strange[0]!r}, expected losses out of: {', '.join(get_args(LossName))}."
        )
    if loss.name in loss.mix:
        raise ConfigError(f"{where}: loss.mix names {loss.name!r}, which is loss.name already; leave it out of mix.")
    for key, owners in LOSS_KEYS:
        default = LossConfig.__dataclass_fields__[key].default
        if getattr(loss, key) != default and not names & set(owners):
            raise ConfigError(
                f"{where}: loss.{key} is {getattr(loss, key)!r}, but loss {loss.name!r} does not know it "
                f"(only {', '.join(owners)} {'do' if len(owners) > 1 else 'does'}); leave it out."
            )
    if "exo_pair" in names and not loss.label_smoothing:
        raise ConfigError(
            f"{where}: loss.label_smoothing is {loss.label_smoothing!r}, expected more than 0 for loss 'exo_pair', "
            "whose target is (1-ε, ε): its paper has 1e-3."
        )
    for name in sorted(names & {"simpo", "alphapo"}):
        if (loss.gamma is None) == (loss.gamma_beta_ratio is None):
            raise ConfigError(
                f"{where}: loss.gamma is {loss.gamma!r} and loss.gamma_beta_ratio is {loss.gamma_beta_ratio!r}, "
                f"expected exactly one of them for loss {name!r}: gamma is the target margin γ itself (TRL: 0.5), "
                "gamma_beta_ratio is γ/β (SimPO's code: 0.3 to 1.6)."
            )
    if loss.f_alpha != LossConfig.f_alpha and loss.f_divergence != "alpha_divergence":
        raise ConfigError(
            f"{where}: loss.f_alpha is {loss.f_alpha!r}, but loss.f_divergence {loss.f_divergence!r} has no α; leave "
            "it out, or use 'alpha_divergence'."
        )
    for key in ("loss.reference", "reward.reference"):
        if loss.f_divergence != "reverse_kl" and get(config, key) == "none":
            raise ConfigError(
                f"{where}: {key} is 'none' with loss.f_divergence {loss.f_divergence!r}, expected a reference: without "
                "one there is nothing to diverge from."
            )


def _check_unpaired(config: Any, where: str) -> None:
    """What single responses cannot do, and a review."""
    loss = config.loss
    if isinstance(config, ReviewConfig) and UNCERTAIN_LOSS in (loss.name, *loss.mix):
        raise ConfigError(
            f"{where}: loss.name is {UNCERTAIN_LOSS!r}, but a review knows no Γ; use 'dpo', whose implicit reward is "
            "the same."
        )
    unpaired = next((name for name in UNPAIRED_LOSSES if name in (loss.name, *loss.mix)), None)
    if unpaired is None:
        if get(config, "data.format") == "unpaired":
            raise ConfigError(
                f"{where}: data.format is 'unpaired', but loss {loss.name!r} learns from pairs; use loss.name "
                f"{' or '.join(map(repr, UNPAIRED_LOSSES))}."
            )
        return
    paired = UNPAIRED_LOSSES[unpaired]
    pairs_only = {"mix": {}, "sft_weight": 0.0, "optimism": 0.0, "ld_alpha": 1.0, "weighting": "none"}
    for key, default in pairs_only.items():
        if getattr(loss, key) != default:
            raise ConfigError(
                f"{where}: loss.{key} is {getattr(loss, key)!r} with loss {unpaired!r}, which learns from single "
                f"responses; it is for pairs. Leave it out, or use {paired!r}."
            )
    if isinstance(config, ReviewConfig):
        raise ConfigError(f"{where}: loss.name is {unpaired!r}, but a review ranks pairs; use {paired!r}.")
    selects = config.loop.iterations >= config.select.from_iteration
    makes = config.bootstrap.fresh > 0 and config.loop.iterations >= config.bootstrap.from_iteration
    if selects or makes:
        section, what = ("select", "selection") if selects else ("bootstrap", "bootstrapping")
        raise ConfigError(
            f"{where}: loss.name is {unpaired!r} with {section}.from_iteration "
            f"{get(config, section).from_iteration} of {config.loop.iterations} iterations, but {what} ranks pairs, "
            f"and {unpaired!r} learns from single responses. Set loop.iterations to 1, or use {paired!r} on pairs."
        )


def _check_lora(config: TrainConfig | RewardModelConfig, where: str) -> None:
    if config.lora.rank:
        return
    for field in dataclasses.fields(LoraConfig):
        if getattr(config.lora, field.name) != field.default:
            raise ConfigError(
                f"{where}: lora.{field.name} is {getattr(config.lora, field.name)!r}, but lora.rank is 0, so that "
                "there are no adapters; set lora.rank, or leave it out."
            )


def _check_explore(config: TrainConfig, where: str) -> None:
    if config.bootstrap.pair_rule == "explore" or UNCERTAIN_LOSS in (config.loss.name, *config.loss.mix):
        return
    for field in dataclasses.fields(ExploreConfig):
        if getattr(config.explore, field.name) != field.default:
            raise ConfigError(
                f"{where}: explore.{field.name} is {getattr(config.explore, field.name)!r}, but nothing reads it: set "
                f"bootstrap.pair_rule to 'explore' or loss.name to {UNCERTAIN_LOSS!r}, or leave it out."
            )


def _check_room(config: TrainConfig | RewardModelConfig, where: str) -> None:
    if config.data.max_prompt_length >= config.data.max_length:
        raise ConfigError(
            f"{where}: data.max_prompt_length is {config.data.max_prompt_length}, expected less than data.max_length "
            f"({config.data.max_length}): a cut pair must keep room for its responses."
        )


def _check_reward_model(config: RewardModelConfig, where: str) -> None:
    if not config.data.pairs:
        raise ConfigError(f"{where}: data.pairs is empty, expected at least one file of preference pairs.")
    if config.data.format == "unpaired":
        raise ConfigError(
            f"{where}: data.format is 'unpaired', but a reward model learns from pairs; use another form."
        )
    for section, kinds, record in (
        ("reward_loss", ("bradley_terry",), RewardLossConfig()),
        ("preference", ("preference",), PreferenceConfig()),
    ):
        if config.kind not in kinds and get(config, section) != record:
            raise ConfigError(
                f"{where}: {section} is for kind {kinds[0]!r}, but kind is {config.kind!r}; leave it out, or change "
                "kind."
            )
    if config.validate_every and not config.data.validation:
        raise ConfigError(f"{where}: validate_every needs held-out pairs: set data.validation to a share > 0.")
    _check_lora(config, where)
    if config.lora.export != "merged":
        raise ConfigError(
            f"{where}: lora.export is {config.lora.export!r}, expected 'merged': who ranks reads a whole model."
        )
    if "head" in config.lora.targets and config.kind != "preference":
        raise ConfigError(
            f"{where}: lora.targets names 'head' with kind {config.kind!r}, expected none but layers: a scalar head is "
            "in its place, which trains whole."
        )
    _check_room(config, where)


def _check_train(config: TrainConfig, where: str) -> None:
    _check_lora(config, where)
    if config.lora.rank and config.loop.first:
        raise ConfigError(
            f"{where}: loop.first is {config.loop.first!r} with lora.rank {config.lora.rank}, expected no policy with "
            "weights of its own: adapters stand on those of model.path. Leave one of them out."
        )
    _check_explore(config, where)
    bootstrapping = config.bootstrap.fresh > 0 and config.loop.iterations >= config.bootstrap.from_iteration
    _check_given(config, where)
    on_policy = config.on_policy.algorithm != "none"
    if on_policy:
        _check_on_policy(config, where)
    sampling = bootstrapping and not config.bootstrap.candidates_file
    least = 1 if config.bootstrap.with_given else 2
    if sampling and config.bootstrap.candidates < least:
        raise ConfigError(
            f"{where}: bootstrap.candidates is {config.bootstrap.candidates}, expected at least {least}: a best and a "
            "worst response need two candidates. Raise it, or set bootstrap.fresh to 0."
        )
    if sampling and config.bootstrap.slots < config.bootstrap.candidates:
        raise ConfigError(
            f"{where}: bootstrap.slots is {config.bootstrap.slots}, expected at least bootstrap.candidates "
            f"({config.bootstrap.candidates}): the candidates of a prompt are decoded side by side."
        )
    if config.bootstrap.mixture and config.bootstrap.candidates_file:
        raise ConfigError(
            f"{where}: bootstrap.mixture is {config.bootstrap.mixture} with bootstrap.candidates_file, expected "
            "candidates that the run samples itself. Leave one of them out."
        )
    if config.bootstrap.mixture_of != "opponents" and not config.bootstrap.mixture:
        raise ConfigError(
            f"{where}: bootstrap.mixture_of is {config.bootstrap.mixture_of!r} with bootstrap.mixture 0, so that there "
            "is no mixture; set bootstrap.mixture, or leave it out."
        )
    if sampling and isinstance(config.bootstrap.temperature, tuple):
        if len(config.bootstrap.temperature) > config.bootstrap.candidates:
            raise ConfigError(
                f"{where}: bootstrap.temperature has {len(config.bootstrap.temperature)} values, expected at most "
                f"bootstrap.candidates ({config.bootstrap.candidates}): they are split over them."
            )
    _check_room(config, where)
    kinds = {"model": "the folder of a reward model", "preference": "the folder of a preference model"}
    if (config.reward.source in kinds) != bool(config.reward.model):
        expected = kinds.get(config.reward.source, "none; leave it out")
        raise ConfigError(
            f"{where}: reward.model is {config.reward.model!r} with reward.source {config.reward.source!r}, expected "
            f"{expected}."
        )
    if config.reward.tournament and config.reward.source != "preference":
        raise ConfigError(
            f"{where}: reward.tournament is True with reward.source {config.reward.source!r}, expected "
            "'preference': other sources do not compare two by two, or in no rounds. Leave it out."
        )
    compares = {
        "preference": not config.reward.tournament,
        "judge": config.judge.mode == "pairwise",
        "preference_function": True,
    }.get(config.reward.source, False)
    if compares and config.bootstrap.pair_rule in get_args(WinRuleName):
        for key in ("length_penalty", "length_normalise"):
            if getattr(config.reward, key):
                raise ConfigError(
                    f"{where}: reward.{key} is {getattr(config.reward, key)!r} with bootstrap.pair_rule "
                    f"{config.bootstrap.pair_rule!r}, which reads the probabilities of reward.source "
                    f"{config.reward.source!r}, and not its rewards. Leave it out, or use 'best_worst'."
                )
    if config.reward.source in FUNCTION_SOURCES and ":" not in config.reward.function:
        raise ConfigError(f"{where}: reward.function is {config.reward.function!r}, expected 'module:function'.")
    _check_sources(config, where)
    kinds = [kind for kind, _ in sources(config.reward)]
    if "file" in kinds and bootstrapping and not config.bootstrap.candidates_file:
        raise ConfigError(
            f"{where}: reward.source is {config.reward.source!r}, expected bootstrap.candidates_file with the scores. "
            "Set it, or use another reward.source."
        )
    if "judge" in kinds and not config.judge.model:
        raise ConfigError(
            f"{where}: judge.model is empty, expected the name of a model at judge.base_url ({config.judge.base_url}) "
            f"for reward.source {config.reward.source!r}."
        )
    if not re.fullmatch(r"[A-Za-z_]\w*", config.judge.key_env):  # it may be a key: not repeated
        raise ConfigError(
            f"{where}: judge.key_env is no name of an environment variable, expected one such as 'OPENAI_API_KEY'. The "
            "key itself belongs into that variable, and into no file."
        )
    ranks = config.reward.source in WITH_ARGUMENT and not config.evaluate.function
    if (config.evaluate.prompts or config.evaluate.function) and ":" not in config.evaluate.function and not ranks:
        raise ConfigError(f"{where}: evaluate.function is {config.evaluate.function!r}, expected 'module:function'.")
    if config.loop.first and (config.loop.optimizer_state == "carried" or not config.loop.iterations):
        raise ConfigError(
            f"{where}: loop.first is {config.loop.first!r} with "
            + ("loop.iterations 0" if not config.loop.iterations else "loop.optimizer_state 'carried'")
            + ", expected an iteration 1 to stand for, and a fresh optimiser after it: a folder holds no moments."
        )
    by_reward = config.loop.best_by == "reward"
    for key in ("best", "validate_every"):
        if getattr(config.loop, key) and not config.data.validation and not (key == "best" and by_reward):
            raise ConfigError(f"{where}: loop.{key} needs held-out pairs: set data.validation to a share > 0.")
    if config.loop.best and by_reward and not config.evaluate.prompts:
        raise ConfigError(
            f"{where}: loop.best_by is 'reward' with evaluate.prompts empty, expected prompts whose responses are "
            "rewarded. Set them, or use best_by 'accuracy'."
        )
    if config.loop.early_stop and not config.loop.validate_every:
        raise ConfigError(
            f"{where}: loop.early_stop is {config.loop.early_stop}, expected checks inside an iteration that it can "
            "count: set loop.validate_every to a number of updates."
        )
    free = all(name in REFERENCE_FREE for name in (config.loss.name, *config.loss.mix))
    if free and config.loss.reference in ("previous", "ema"):
        raise ConfigError(
            f"{where}: loss.reference is {config.loss.reference!r}, but loss {config.loss.name!r} reads no reference; "
            "leave it out."
        )
    if config.loop.best and config.loop.best_by == "loss" and config.loop.iterations > 1:
        if config.loss.reference in ("previous", "ema"):
            raise ConfigError(
                f"{where}: loop.best_by is 'loss' with loss.reference {config.loss.reference!r}: losses of iterations "
                "with different references cannot be compared. Use best_by 'accuracy', or reference 'initial'."
            )
    if config.loop.first and 1 in (
        *([config.select.from_iteration] if config.select.rule not in ("all", "none") else []),
        *([config.bootstrap.from_iteration] if config.bootstrap.fresh else []),
    ):
        raise ConfigError(
            f"{where}: loop.first is {config.loop.first!r} with select.from_iteration {config.select.from_iteration} "
            f"and bootstrap.from_iteration {config.bootstrap.from_iteration}, expected 2 or more: the given policy "
            "stands for iteration 1, which then neither selects nor samples."
        )
    if config.bootstrap.replay and not config.bootstrap.fresh:
        raise ConfigError(
            f"{where}: bootstrap.replay is True with bootstrap.fresh 0, expected fresh pairs to train on again. Leave "
            "it out, or set bootstrap.fresh."
        )
    if config.bootstrap.replay_last and not config.bootstrap.replay:
        raise ConfigError(
            f"{where}: bootstrap.replay_last is {config.bootstrap.replay_last} with bootstrap.replay False, expected "
            "replay. Set bootstrap.replay, or leave it out."
        )
    if config.select.rule == "none" and config.select.unselected != "drop":
        raise ConfigError(
            f"{where}: select.unselected is {config.select.unselected!r} with select.rule 'none', which drops every "
            "given pair; leave it out."
        )
    ranks = config.select.rule in ("top_k", "bottom_k", "middle") and config.select.unselected == "drop"
    selects = config.loop.iterations >= config.select.from_iteration
    fresh_from = config.bootstrap.from_iteration if config.bootstrap.fresh else math.inf
    if selects and not on_policy and config.select.rule == "none" and fresh_from > config.select.from_iteration:
        raise ConfigError(
            f"{where}: select.rule is 'none' from iteration {config.select.from_iteration} on, expected fresh pairs to "
            "train on from then on: set bootstrap.fresh, and bootstrap.from_iteration to "
            f"{config.select.from_iteration} or less."
        )
    if selects and ranks and config.select.keep == 0 and config.bootstrap.fresh == 0:
        raise ConfigError(f"{where}: select.keep and bootstrap.fresh are both 0: nothing would be left to train on.")
    _check_references(config, where)


def _check_on_policy(config: TrainConfig, where: str) -> None:
    """What rounds of samples cannot do."""
    name, on_policy, sampled = config.on_policy.algorithm, config.on_policy, config.bootstrap

    def refuse(key: str, expected: str) -> None:
        raise ConfigError(
            f"{where}: {key} is {get(config, key)!r} with on_policy.algorithm {name!r}, expected {expected}."
        )

    if {"implicit", "file", "given"} & {kind for kind, _ in sources(config.reward)}:
        refuse("reward.source", "someone who ranks fresh samples and is not the policy: model, function or judge")
    if sampled.candidates_file:
        refuse("bootstrap.candidates_file", "none: candidates are the policy's own of that moment")
    if sampled.candidates < 2:
        refuse("bootstrap.candidates", "at least 2: a candidate is compared with the others of its prompt")
    if sampled.slots < sampled.candidates:
        refuse("bootstrap.slots", f"at least bootstrap.candidates ({sampled.candidates})")
    for key in ("validate_every", "best"):
        if getattr(config.loop, key):
            refuse(f"loop.{key}", "none: the loss of held-out pairs is not what is trained with")
    if on_policy.beta and (config.loss.reference == "none" or config.loss.name in REFERENCE_FREE):
        refuse("on_policy.beta", "0, or a loss.name and loss.reference with a reference: there is no KL to nothing")
    if name == "raft" and on_policy.kl == "loss" and on_policy.beta:
        refuse("on_policy.kl", "'reward', or on_policy.beta 0: its loss is that of SFT")


def sources(reward: RewardConfig) -> tuple[tuple[str, str], ...]:
    """(kind, what it is of) of each source that ranks candidates: the one, or those of reward.sources."""
    if reward.source != "combined":
        return ((reward.source, getattr(reward, SOURCE_KEYS[reward.source]) if reward.source in SOURCE_KEYS else ""),)
    return tuple((kind, of) for kind, _, of in (name.partition(":") for name in reward.sources))


def _check_given(config: TrainConfig, where: str) -> None:
    """Runs without given pairs, and what needs them."""
    own = config.loop.iterations and config.data.prompts and config.bootstrap.fresh > 0
    own = own and config.bootstrap.from_iteration == 1
    on_policy = config.on_policy.algorithm != "none"
    own = own or (on_policy and config.data.prompts and (config.sft.data or not config.sft.epochs))
    if not config.data.pairs and not own and (config.loop.iterations or not config.sft.data):
        raise ConfigError(
            f"{where}: data.pairs is empty, expected at least one file of preference pairs. Only an SFT stage on its "
            "own data (sft.data, loop.iterations 0) needs none, a run that samples from data.prompts with "
            "bootstrap.from_iteration 1, and on_policy.algorithm with data.prompts."
        )
    if "given" in [kind for kind, _ in sources(config.reward)] and not config.bootstrap.with_given:
        raise ConfigError(
            f"{where}: reward.source is {config.reward.source!r} with bootstrap.with_given False, expected given "
            "responses among the candidates: set bootstrap.with_given."
        )
    if config.data.pairs or not config.loop.iterations or on_policy:
        return
    selects = config.loop.iterations >= config.select.from_iteration and config.select.rule not in ("all", "none")
    wrong = {
        "select.rule": selects,
        "loop.parts": config.loop.parts != "all",
        "loop.first": bool(config.loop.first),
        "data.validation": config.data.validation > 0,
        "bootstrap.with_given": config.bootstrap.with_given,
        "sft.data": config.sft.epochs > 0 and not config.sft.data,
    }
    key = next((key for key, holds in wrong.items() if holds), None)
    if key:
        raise ConfigError(
            f"{where}: {key} is {get(config, key)!r} with data.pairs empty, expected given pairs for it. Give them, or "
            "leave it out" + (": use rule 'all' or 'none'." if key == "select.rule" else ".")
        )


def _check_sources(config: TrainConfig, where: str) -> None:
    reward = config.reward
    if reward.source != "combined":
        if reward.sources:
            raise ConfigError(
                f"{where}: reward.sources is {reward.sources!r} with reward.source {reward.source!r}, which is one "
                "source; use reward.source 'combined', or leave it out."
            )
        return
    if len(reward.sources) < 2:
        raise ConfigError(f"{where}: reward.sources is {reward.sources!r}, expected two sources or more to combine.")
    for name in reward.sources:
        kind, _, of = name.partition(":")
        known = kind in get_args(RewardName) and kind not in ALONE
        fits = ":" in of if kind == "function" else bool(of) == (kind in WITH_ARGUMENT)
        if not (known and fits):
            raise ConfigError(
                f"{where}: reward.sources names {name!r}, expected one of 'implicit', 'judge', 'file', 'random', "
                "'given', 'model:FOLDER', 'function:module:function'."
            )
    if reward.combine == "worst" and any(weight != 1 for weight in reward.sources.values()):
        raise ConfigError(
            f"{where}: reward.sources has weights {tuple(reward.sources.values())} with reward.combine 'worst', which "
            "takes the smallest of the sources; expected weights of 1."
        )


def _check_references(config: TrainConfig, where: str) -> None:
    referenced = config.loss.name not in REFERENCE_FREE and config.reward.reference != "none"
    before_update = "the policy is its own reference before any update, so every margin is 0"
    first = config.select.from_iteration == 1 and config.select.rule != "none"
    if referenced and first and config.data.pairs and config.select.score in MARGIN_SCORES:
        raise ConfigError(
            f"{where}: select.from_iteration is 1 with select.score {config.select.score!r}: selection before any "
            f"update; {before_update}. Use 2 or more, or another score."
        )
    implicit = config.bootstrap.fresh > 0 and "implicit" in [kind for kind, _ in sources(config.reward)]
    if referenced and config.bootstrap.from_iteration == 1 and implicit:
        raise ConfigError(
            f"{where}: bootstrap.from_iteration is 1 with reward.source {config.reward.source!r}: ranking before any "
            f"update; {before_update}. Use 2 or more, or another reward.source."
        )
    selects = config.loop.iterations >= config.select.from_iteration and config.select.rule not in ("all", "none")
    if selects and config.select.score == "reference_logp" and not referenced:
        raise ConfigError(
            f"{where}: select.score is 'reference_logp' with loss {config.loss.name!r} and reward.reference "
            f"{config.reward.reference!r}: there is no reference. Use another score, or reward.reference 'initial'."
        )
    if selects and config.select.score == "loss" and referenced and config.loss.reference == "previous":
        raise ConfigError(
            f"{where}: select.score is 'loss' with loss.reference 'previous': the policy that scores is that "
            "reference, so every pair would have the same loss. Use another score, or loss.reference 'initial'."
        )
    if selects and config.select.score == "reward_gap" and ":" not in config.reward.function:
        raise ConfigError(
            f"{where}: select.score is 'reward_gap' with reward.function {config.reward.function!r}, expected "
            "'module:function'."
        )
    if selects and config.select.score == "reward_gap" and config.reward.source == "preference_function":
        raise ConfigError(
            f"{where}: select.score is 'reward_gap' with reward.source 'preference_function', whose function compares "
            "two responses, expected one that scores each. Use another score, or reward.source 'function'."
        )
    moving = config.reward.reference in ("previous", "ema")
    if moving and config.loop.iterations > 2 and config.reward.ensemble != "current":
        raise ConfigError(
            f"{where}: reward.reference is {config.reward.reference!r} with reward.ensemble "
            f"{config.reward.ensemble!r}: older iterates would be held against a reference that is younger than they "
            "are. Use ensemble 'current', or reference 'initial'."
        )
