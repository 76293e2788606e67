"""Names that keys take: of losses, scores, rules, sources. A test pins each to the table that it selects from."""

from typing import Literal

LossName = Literal[
    "dpo",
    "robust_dpo",
    "exo_pair",
    "discopop",
    "slic",
    "ipo",
    "ipo_soft",
    "rpo_bwd_kl",
    "rpo_fwd_kl",
    "rpo_sq",
    "sigmoid_norm",
    "dpop",
    "rdpo",
    "dpo_pessimistic",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "sppo",
    "apo_zero",
    "apo_down",
    "simpo",
    "alphapo",
    "cpo",
    "orpo",
    "slic_hf",
    "kto_pair",
    "bco_pair_shift",
    "aot",
    "aot_unpaired",
    "kto",
    "apo_zero_unpaired",
]
REFERENCE_FREE = ("simpo", "alphapo", "cpo", "orpo", "slic_hf")  # losses of log-probs alone
UNCERTAIN_LOSS = "dpo_pessimistic"  # is told Γ
UNPAIRED_LOSSES = {"kto": "kto_pair", "apo_zero_unpaired": "apo_zero"}
"""Losses that learn from labelled single responses → the one that does so from pairs."""
DivergenceName = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
EnsembleName = Literal["current", "two_term", "ema", "mean"]
ScoreName = Literal[
    "irm",
    "irm_per_token",
    "irm_magnitude",
    "reference_logp",
    "annotator_gap",
    "reward_gap",
    "gold_gap",
    "loss",
    "random",
    "alignment_potential",
]
MARGIN_SCORES = (
    "irm",
    "irm_per_token",
    "irm_magnitude",
    "alignment_potential",
)  # built on the implicit reward of the policy
RuleName = Literal["top_k", "bottom_k", "middle", "threshold", "all", "none"]
RewardName = Literal[
    "implicit",
    "model",
    "preference",
    "function",
    "preference_function",
    "judge",
    "file",
    "random",
    "given",
    "combined",
]
WITH_ARGUMENT = ("model", "function")  # sources that a key of reward.sources names with what they are of
SOURCE_KEYS = {"model": "model", "preference": "model", "function": "function", "preference_function": "function"}
FUNCTION_SOURCES = ("function", "preference_function")  # of reward.function
ALONE = ("preference", "preference_function", "combined")  # sources that are no part of a combined one
BestName = Literal["accuracy", "loss", "reward"]
PartsName = Literal["all", "random", "sources", "easy_first"]
RankedRuleName = Literal["best_worst", "best_random", "best_second", "best_each", "random", "all_pairs"]
WinRuleName = Literal["most_certain", "condorcet"]  # read P(i > j) in the place of rewards
PairRuleName = Literal[RankedRuleName, WinRuleName, "explore"]
ModelKind = Literal["bradley_terry", "preference", "preference_head"]
TargetName = Literal["query", "key", "value", "out", "gate", "up", "down", "head"]
AlgorithmName = Literal["none", "policy_gradient", "raft"]
AdvantageName = Literal["leave_one_out", "group", "centred"]
RatioName = Literal["token", "sequence"]
FormatName = Literal[
    "auto", "explicit", "conversational", "hh", "implicit", "ultrafeedback", "ranked", "tldr", "alpaca_eval", "unpaired"
]
