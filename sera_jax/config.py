"""Typed configuration: YAML gives the defaults, flags win, everything is checked before anything is loaded.

Each door has one record. The config stops at the doors: rooms below take plain keyword values. Names of losses, scores,
rules … are `Literal`s here; a test pins them to the tables of functions they select. No JAX import.

Values marked * are not published by the paper as far as we could establish: they are starting points, not constants.
"""

import dataclasses
import math
import pathlib
import re
import sys
from typing import Any, Literal, get_args

import jsonargparse
import yaml

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
]
REFERENCE_FREE = ("simpo", "alphapo", "cpo", "orpo", "slic_hf")  # losses of log-probs alone
UNCERTAIN_LOSS = "dpo_pessimistic"  # is told Γ
UNPAIRED_LOSSES = ("kto",)  # learn from labelled single responses
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


class ConfigError(ValueError):
    """A config that cannot be run: says which key, in which file, what was got and what was expected."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how it repeats itself.

    Args:
        dir: the run folder (config, metrics, iterations, ledger, iterates, checkpoints, export).
        seed: of the order of batches, the sampling noise and random choices.
        resume: auto = go on where the folder stopped, or start; never = the folder must be new; must = it must exist.
        save_every: updates between two checkpoints inside a stage (a stage always ends with one).
        keep_checkpoints: how many full checkpoints stay on disk (iterates are never pruned).
        log_every: updates between two lines of metrics.jsonl.
        ledger: folder of the log-prob ledger; empty = inside the run folder. Runs on the same data may share one.
        compilation_cache: folder of XLA's persistent cache; empty = ~/.cache/sera_jax/xla, "off" = none.
        tensorboard: also write TensorBoard event files (needs the extra).
        wandb: also log to Weights & Biases under this project name (needs the extra); empty = off.
    """

    dir: str
    seed: int = 0
    resume: Literal["auto", "never", "must"] = "auto"
    save_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 10
    ledger: str = ""
    compilation_cache: str = ""
    tensorboard: bool = False
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The checkpoint to start from, which is also the reference (after the SFT stage, if there is one).

    Args:
        path: Hugging Face folder: config.json, safetensors, tokenizer.
        weights: pretrained = read the safetensors; random = draw them from run.seed (config.json and tokenizer are
        enough).
        compute: dtype of the matrix products; weights, moments and log-probs are float32 always.
        remat: what the backward pass keeps of each layer: none = everything, dots = matrix products, attention = its
            input and what its attention gave, full = its input only, host = the same in the memory of the machine.
        head_chunk: response tokens of a row projected onto the vocabulary at a time.
        attention: xla = all scores of a layer at once; loops = block by block, without a kernel; tree = block by block,
            in our kernel for TPUs; splash = in JAX's; auto = tree on TPUs, loops on CPUs, xla on
            GPUs.
    """

    path: str
    weights: Literal["pretrained", "random"] = "pretrained"
    compute: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "attention", "full", "host"] = "full"
    head_chunk: int = 256
    attention: Literal["auto", "xla", "loops", "splash", "tree"] = "auto"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters that train in the place of all weights (LoRA).

    Args:
        rank: R of the adapters; 0 = none, all weights train.
        alpha: α; an adapter adds α/R·A·B.
        targets: the linear layers that have one (gate where the architecture has it, head where it is not the embedding
            table); empty = all but the head.
        dropout: share of an adapter's input that is dropped, in updates alone.
        export: merged = one Hugging Face folder like any other; adapter = a PEFT adapter for the weights of model.path.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[TargetName, ...] = ()
    dropout: float = 0.0
    export: Literal["merged", "adapter"] = "merged"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The given preference pairs, the prompts to sample from, and how both become tokens.

    Args:
        pairs: files (.jsonl, .json, .parquet, .csv, each also .gz), `datasets` folders or hub names. An SFT stage alone
            (loop.iterations 0) on its own texts needs none; nor does a run that samples from data.prompts from
            iteration 1 on.
        prompts: files of prompts for bootstrapping; empty = the prompts of the pairs.
        format: of the pairs; auto = detected and shown. unpaired = labelled single responses, for loss kto.
        ranked: how K scored responses to a prompt become pairs (rows that are pairs already stay as they are).
        split: split of `datasets` folders and hub names.
        subset: config name of hub names, folder in `datasets` folders; empty = none.
        limit: use only the first n pairs, or labelled responses (0 = all).
        validation: share of the pairs held out to watch (and to choose the best iterate); 0 = none.
        max_length: tokens of prompt + longer response.
        max_prompt_length: a pair over max_length first has its prompt cut to this many tokens, then its responses.
        truncation: which end of a cut prompt stays; a cut response always keeps its start.
        chat_template: auto = chat messages through the tokenizer's own template; or a path to a Jinja file.
        check: read and tokenise everything, print what was found, and stop before any weights or run folder.
    """

    pairs: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    format: FormatName = "auto"
    ranked: RankedRuleName = "best_worst"
    split: str = "train"
    subset: str = ""
    limit: int = 0
    validation: float = 0.0
    max_length: int = 1024
    max_prompt_length: int = 512
    truncation: Literal["keep_end", "keep_start"] = "keep_end"
    chat_template: str = "auto"
    check: bool = False


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; moments are float32 whatever the compute dtype.

    Args:
        learning_rate: peak.
        schedule: after the linear warm-up.
        warmup: share of the stage's updates.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on matrices only.
        clip: global gradient norm; 0 = no clipping.
        batch_size: pairs (texts, in SFT) an update, over the whole mesh.
        row_tokens: tokens of a row, a multiple of 128; 0 = planned from the lengths.
        microbatch_rows: rows a device computes at once; 0 = planned.
        row_shapes: at most so many shapes of rows to choose from for each batch; each is a program to compile.
        moments: where both moments lie between updates: device, or host = the memory of the machine beside it.
    """

    learning_rate: float = 5e-7
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_size: int = 128
    row_tokens: int = 0
    microbatch_rows: int = 0
    row_shapes: int = 2
    moments: Literal["device", "host"] = "device"


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Optional supervised stage before the loop: its result is the reference and the start of iteration 1.

    Args:
        epochs: 0 = no SFT stage.
        data: files of {"prompt", "completion"}, {"messages"} or {"text"}, `datasets` folders or hub names; empty = the
            chosen responses of the pairs.
        split: of `datasets` folders and hub names in data; empty = data.split.
        optimizer: of this stage.
    """

    epochs: int = 0
    data: tuple[str, ...] = ()
    split: str = ""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The direct alignment loss (README, "Losses"). Keys that the chosen loss does not know must keep their defaults.

    Args:
        name: of the loss.
        beta: β > 0 (τ of ipo and ipo_soft, 1/η of sppo_hard and sppo, λ of orpo; slic_hf has it in its implicit reward
            only).
        label_smoothing: ε in [0, 0.5), the share of labels that are taken for wrong: dpo (cDPO), robust_dpo, exo_pair
            (which needs more than 0: 1e-3 in its paper), dpo_pessimistic, aot, aot_unpaired, simpo, alphapo, cpo.
        f_divergence: from the reference, in the place of the log-ratio (f-DPO): dpo, robust_dpo, exo_pair, discopop,
            slic, ipo, sigmoid_norm.
        f_alpha: α of alpha_divergence, as in TRL: 1 is reverse_kl, 0 forward_kl.
        normalisation: ipo only: log-ratios as sums (Azar et al.) or per token (TRL).
        gamma: simpo and alphapo: the target margin γ itself (TRL's simpo_gamma, 0.5 there); or else:
        gamma_beta_ratio: simpo and alphapo: γ/β, as SimPO's own code has it (0.3 to 1.6 there). Exactly one of the two.
        alphapo_alpha: alphapo only: α of its reward, 0 is SimPO's.
        discopop_tau: discopop only: τ in (0, 1].
        dpop_lambda: dpop only: λ >= 0, against chosen responses that fall below the reference.
        reward_scale: rpo_bwd_kl, rpo_fwd_kl and rpo_sq only: of the gaps of known rewards (NeMo's gt_reward_scale).
        rdpo_alpha: rdpo only: α >= 0, reward that a token of length explains.
        slic_delta: slic_hf only: δ > 0, the margin of log-probs that is enough, in nats.
        slic_lambda: slic_hf only: λ >= 0, weight of the negative log-prob (a sum) of the chosen response.
        desirable_weight: kto only: λ_D, of desirable responses.
        undesirable_weight: kto only: λ_U, of undesirable ones; λ_D·n_D / (λ_U·n_U) between 1 and 4/3 is advised.
        ld_alpha: LD-DPO's α, weight of the log-probs of tokens beyond the length of the pair's shorter response, under
            policy and reference; 1 = off. In the loss alone: margins and rewards of candidates count all tokens alike.
        weighting: wpo = each pair's loss times WPO's weight, how likely the policy finds the pair; none = off. In
            updates alone, not on held-out pairs.
        sft_weight: weight of an added SFT term on the chosen response (per-token mean of each pair): RPO, CPO's
            behaviour cloning.
        optimism: α of an added α·½(log π of the chosen + log π of the rejected response): XPO's term (alpha in TRL)
            where both are the reference's samples, SELM's with αβ.
        mix: further losses by weight, e.g. {ipo: 0.2}; they share β, the other keys and the reference, the reward stays
            that of `name`.
        reference: of the policy that is trained: initial = the start of iteration 1, previous = the iterate before it,
            ema = a running mean of iterates, none = reference-free (log-ratios become log-probs).
    """

    name: LossName = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: DivergenceName = "reverse_kl"
    f_alpha: float = 0.5
    normalisation: Literal["sum", "mean"] = "sum"
    gamma: float | None = None
    gamma_beta_ratio: float | None = None
    alphapo_alpha: float = 0.25
    discopop_tau: float = 0.05
    dpop_lambda: float = 50.0
    reward_scale: float = 1.0
    rdpo_alpha: float = 0.05
    slic_delta: float = 1.0
    slic_lambda: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    ld_alpha: float = 1.0
    weighting: Literal["none", "wpo"] = "none"
    sft_weight: float = 0.0
    optimism: float = 0.0
    mix: dict[LossName, float] = dataclasses.field(default_factory=dict)
    reference: Literal["initial", "previous", "ema", "none"] = "initial"


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Who ranks: margins of the given pairs, and candidates in bootstrapping.

    Args:
        source: of the candidates' rewards: implicit = the policy's own (SeRA); model = a reward model (RLHF Workflow);
            preference = a pairwise preference model, of every two candidates in both orders (RLHF Workflow);
            function = a Python function; preference_function = one that compares two responses; judge = a language
            model (section judge); file = the scores that bootstrap.candidates_file brings; random = noise by run.seed
            (what ranking gives at least); given = 1 for the given response of bootstrap.with_given, 0 for samples
            (SPIN); combined = several of these (sources). The given pairs are always scored by the implicit reward.
        sources: of source combined: weight by source, each named as above, model and function with what they are of:
            {"model:FOLDER": 1.0, "function:my_module:reward": 0.5, "implicit": 1.0}.
        combine: weighted = the sum of the sources' rewards by weight; worst = the smallest of them (weights are 1).
        scale: of each source before that: iteration = standardised over the candidates of the iteration, prompt = over
            those of each prompt, none = as it is.
        model: Hugging Face folder of a reward model (…ForSequenceClassification with one label) with the policy's
            tokens, as `sera_jax.reward_model` exports them, for source model; or of a preference model with any tokens,
            for source preference: likewise, or a policy that answers the same question (RLHFlow's).
        tournament: of source preference: a knock-out of n-1 comparisons a prompt, in the place of all n(n-1)/2; rewards
            are then log-odds along the defeats (sera_jax/preference.py), and probabilities of all pairs unknown.
        function: "module:function", called as function(prompt, response) -> float on texts; for source
            preference_function as function(prompt, first, second) -> the probability that the first is the better one.
        reference: of the policy that scores: initial, previous = the iterate before it, ema, none (see loss.reference).
        ensemble: over iterates (Eq. 7 of SeRA): two_term = (1-γ)·current + γ·previous, ema = recursive, mean = all
        alike.
        gamma: γ of two_term and ema.*
        length_penalty: subtracted from a candidate's reward for each unit of its length; auto = in each iteration as
            much as makes the best candidates on average as long as the worst ones (DICE), 0 where they are no longer.
        length_unit: of length_penalty and length_normalise: tokens, or characters (RLHF Workflow, DICE).
        length_normalise: divide a candidate's reward by its length.
        ema_decay: of the ema reference: ema ← decay·ema + (1-decay)·iterate, one step an iteration.
    """

    source: RewardName = "implicit"
    sources: dict[str, float] = dataclasses.field(default_factory=dict)
    combine: Literal["weighted", "worst"] = "weighted"
    scale: Literal["iteration", "prompt", "none"] = "iteration"
    model: str = ""
    tournament: bool = False
    function: str = ""
    reference: Literal["initial", "previous", "ema", "none"] = "initial"
    ensemble: EnsembleName = "two_term"
    gamma: float = 0.3
    length_penalty: float | Literal["auto"] = 0.0
    length_unit: Literal["tokens", "characters"] = "tokens"
    length_normalise: bool = False
    ema_decay: float = 0.5


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """The judge of reward.source judge: a language model behind an OpenAI-compatible endpoint.

    Args:
        model: its name at the endpoint.
        base_url: of the endpoint, as OpenAI's client takes it.
        mode: pairwise = every two candidates of a prompt in both orders, C(C-1) questions a prompt, the reward is the
            mean probability of being the better one; grade = each candidate from 1 to 10.
        template: text file of what the judge reads, with {prompt}, {first} and {second}, or {prompt} and {response};
            empty = the mode's file in configs/judge/.
        concurrent: questions at a time.
        per_minute: requests a minute, evenly spaced; 0 = no limit.
        retries: of a question after the first try, exponentially later; Retry-After is honoured.
        timeout: seconds for which the endpoint may be silent within a request.
        temperature: of the replies.
        max_tokens: of a reply; more where the template asks for reasons before the verdict.
        price_in: of a million tokens that the judge reads, for the log; 0 = not known.
        price_out: of a million tokens that it writes.
        key_env: the environment variable that holds the key of the endpoint; a local server may need none.
        cache: JSONL of its answers, by content; empty = judge.jsonl in the run folder. Runs may share one.
    """

    model: str = ""
    base_url: str = "https://api.openai.com/v1"
    mode: Literal["pairwise", "grade"] = "pairwise"
    template: str = ""
    concurrent: int = 16
    per_minute: int = 0
    retries: int = 8
    timeout: float = 60.0
    temperature: float = 0.0
    max_tokens: int = 16
    price_in: float = 0.0
    price_out: float = 0.0
    key_env: str = "OPENAI_API_KEY"
    cache: str = ""


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """Which of the given pairs an iteration trains on: a score and a rule.

    Args:
        from_iteration: the first iteration that selects; before it, all pairs are trained on. The implicit reward of a
            policy without any update is 0, so scores built on it need 2 or more.
        keep: k, the share of the pairs that top_k, bottom_k and middle keep.*
        score: what is ranked; alignment_potential is M_AP (Huang et al., 2025): annotator gap against |irm per token|;
            reward_gap is what reward.function says of both responses, chosen less rejected; gold_gap is gold_chosen -
            gold_rejected of pairs that carry them (what selection could give at most).
        rule: how the score selects; all = every pair; none = no given pair is trained on, fresh ones alone.
        threshold: of the rule "threshold": pairs with a score above it stay.
        stratify: keep the same share of every group, of each at least one pair; so a prompt with one pair keeps it.
        unselected: drop = leave out; relabel = swap chosen and rejected; soft_weight = keep every pair with weight
            sigmoid(score).
    """

    from_iteration: int = 2
    keep: float = 0.7
    score: ScoreName = "irm"
    rule: RuleName = "top_k"
    threshold: float = 0.0
    stratify: Literal["none", "source", "length", "prompt"] = "none"
    unselected: Literal["drop", "relabel", "soft_weight"] = "drop"


@dataclasses.dataclass(frozen=True)
class BootstrapConfig:
    """Fresh pairs from the policy's own samples.

    Args:
        from_iteration: the first iteration that samples; 1 needs a reward that is not the policy's own.
        fresh: k̃, fresh pairs as a share of the given ones that the iteration sees, or, of a run without given pairs,
            of the prompts that an iteration samples from; 0 = no bootstrapping.*
        candidates: C responses sampled for each prompt.*
        prompts_per_iteration: share of the prompts sampled from in each iteration.
        prompts_drawn: anew = each iteration draws its own; in_turn = they go on through one order of the prompts, so
            that none comes twice before all have come.
        temperature: of the sampling; 0 = greedy. A list splits the candidates evenly over its temperatures, in order.*
        top_k: 0 = off.
        top_p: nucleus; 1 = off.*
        min_p: 0 = off.
        max_new_tokens: of a candidate.
        slots: responses decoded side by side, over the whole mesh (slots // candidates prompts).
        refill: prompts in a sampling batch, in those for which there are slots. With 1 a batch waits for its longest
            response; with more, a slot whose response has ended takes the next one: for responses of very different
            lengths. A prompt's candidates then read its cache one by one, and that of all the batch's prompts is kept.
        pair_rule: how a prompt's candidates become pairs: by their rewards, or (most_certain, condorcet) by P(i > j),
            the source's own where it compares two, else σ(r_i - r_j); explore = the best against the one of which the
            reward is least certain (section explore).
        unfinished: drop = a candidate that did not reach EOS takes no part; keep = it does.
        mixture: α of Nash-MD: responses of the geometric mixture π^(1-α)·π_0^α of the policy and the initial one, token
            by token; 0 = off. Both are in memory while it samples.
        mixture_of: opponents = C more responses a prompt, which stand in no pair but are whom the candidates' wins are
            against (Nash-MD, with loss sppo); candidates = the candidates themselves (IPO-MD, with loss ipo_soft).
        with_given: the chosen response of a prompt's first given pair is one more candidate, number 0.
        replay: also train on the fresh pairs of earlier iterations.
        replay_last: of so many iterations before; 0 = of all.
        candidates_file: JSONL of candidates in the place of sampling, as `sera_jax.generate` writes it: {"prompt",
            "responses"} and, for each response, "finished" (default: all), "rewards" or "scores" (reward.source file).
            Prompts are matched by their text; the sampling keys are then unread. Empty = sample.
    """

    from_iteration: int = 2
    fresh: float = 0.3
    candidates: int = 4
    prompts_per_iteration: float = 1.0
    prompts_drawn: Literal["anew", "in_turn"] = "anew"
    temperature: float | tuple[float, ...] = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    max_new_tokens: int = 256
    slots: int = 64
    refill: int = 1
    pair_rule: PairRuleName = "best_worst"
    unfinished: Literal["drop", "keep"] = "drop"
    mixture: float = 0.0
    mixture_of: Literal["opponents", "candidates"] = "opponents"
    with_given: bool = False
    replay: bool = False
    replay_last: int = 0
    candidates_file: str = ""


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig:
    """Learning from the policy's own samples at once: the two-stage baseline of direct alignment.

    An iteration is then `rounds` rounds, each of which samples bootstrap.candidates responses to some prompts from the
    policy as it is, ranks them by reward.source (not the policy's own), and updates. Given pairs are only watched;
    sections select and bootstrap (but for its sampling keys and `unfinished`), loop.epochs and loss (but for its
    reference and the reward that is logged) are unread. KL is to loss.reference.

    Args:
        algorithm: none = the loop on pairs; policy_gradient; raft = supervised fine-tuning on each prompt's best
            candidate (rejection sampling).
        rounds: of an iteration.
        prompts: of a round; drawn without replacement until all were used. An update takes optimizer.batch_size of
            them, with all their candidates.
        passes: over a round's prompts (TRL's num_iterations, PPO's epochs).
        advantage: of a candidate: leave_one_out = its reward less the mean of the others' (RLOO); group = less the mean
            of all, over their standard deviation (GRPO); centred = less the mean of all (Dr. GRPO).
        ratio: π/π_old that is clipped: token = of each token (PPO, GRPO); sequence = of the response (TRL's RLOO).
        average: of the loss: token = every token of an update weighs the same (TRL's dapo); sequence = every response
            does (TRL's grpo; RLOO).
        clip: ε, ratios are clipped to [1-ε, 1+ε_high].
        clip_high: ε_high; none = ε.
        kl: where it is: reward = subtracted from the reward, β·log π_old/π_ref of the response; loss = β·k3 of each
            token is added to the loss.
        beta: β, 0 = no KL.
    """

    algorithm: AlgorithmName = "none"
    rounds: int = 50
    prompts: int = 64
    passes: int = 1
    advantage: AdvantageName = "leave_one_out"
    ratio: RatioName = "sequence"
    average: Literal["token", "sequence"] = "sequence"
    clip: float = 0.2
    clip_high: float | None = None
    kl: Literal["reward", "loss"] = "reward"
    beta: float = 0.05


@dataclasses.dataclass(frozen=True)
class ExploreConfig:
    """Γ, how uncertain a reward that is linear in features of the initial policy is: for bootstrap.pair_rule explore,
    and for loss dpo_pessimistic.

    Args:
        weight: β of Γ = β·‖Δφ‖_{Σ⁻¹}, in units of the reward.
        regularisation: λ of Σ = λI + Σ ΔφΔφᵀ over the labelled pairs: so many pairs' worth of every direction.
        dimension: features are projected at random (by run.seed) onto so many; 0, or the model's width or more = the
            last hidden state as it is.
    """

    weight: float = 1.0
    regularisation: float = 1.0
    dimension: int = 256


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The iterations.

    Args:
        iterations: T; iteration 1 is plain training on all pairs. 0 = the SFT stage alone.
        epochs: passes of an iteration.
        passes: given = a pass has as many updates as the given pairs take that the iteration sees (without given pairs:
            the prompts it samples from), whatever was kept and made: a smaller training set is cycled, of a larger one
            a random part is seen; all = as many as its whole training set takes, fresh and replayed pairs too.
        parts: which given pairs an iteration sees: all; or one of as many parts as there are iterations: random = equal
            ones by run.seed, sources = a file each in the order of data.pairs (sDPO), easy_first = equal ones by the
            annotator's gap, the largest first, of every prompt one pair before the second of any (Curry-DPO).
        first: Hugging Face folder of a policy that is this run's iterate 1: iteration 1 is not trained again. Runs that
            differ only later share it, and its log-probs.
        start: iteration t starts from the iterate before, or from the initial policy.
        optimizer_state: fresh moments and schedule each iteration, or carried moments.
        validate_every: updates between two checks on the held-out pairs (needs data.validation); 0 = only at the end of
            each iteration.
        early_stop: an iteration ends after so many checks in a row without a new lowest validation loss of the
            iteration, and the walk goes on from there (set best to export the best point); 0 = never.
        best: export the best of all points that were validated instead of the last iterate.
        best_by: what best goes by: implicit-reward accuracy on the held-out pairs, or their loss (both need
            data.validation); or the mean reward of responses to the evaluation prompts, of whole iterations alone.
    """

    iterations: int = 3
    epochs: int = 1
    passes: Literal["given", "all"] = "given"
    parts: PartsName = "all"
    first: str = ""
    start: Literal["previous", "initial"] = "previous"
    optimizer_state: Literal["fresh", "carried"] = "fresh"
    validate_every: int = 0
    early_stop: int = 0
    best: bool = False
    best_by: BestName = "accuracy"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; -1 for at most one axis = the devices that are left.

    Args:
        data: copies of the weights; rows are split over data and fsdp.
        fsdp: weights split, gathered layer by layer.
        tensor: heads, hidden units and the vocabulary split.
        slices: TPU slices that are one run, joined by a slower network; data is a multiple of it.
        distributed: this command is one of several, on one machine or many, that are one run on the devices of all:
            each is given the same config and sees the same files. The cluster (TPU pod, GKE, Slurm, MPI) tells who they
            are, or JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 1
    distributed: bool = False


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Win rate against the start while the run goes on; also the settings of `sera_jax.evaluate`.

    Args:
        prompts: files of prompts; empty = no evaluation.
        function: "module:function", called as function(prompt, response) -> float; the higher wins. Where it is given,
            it also judges the fresh pairs, for the log alone. Empty: reward.model or reward.function, whichever ranks.
        limit: first n prompts (0 = all).
        temperature: of the responses; 0 = greedy.
        top_p: of the responses.
        max_new_tokens: of a response.
    """

    prompts: tuple[str, ...] = ()
    function: str = ""
    limit: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`python -m sera_jax.train`: everything a run depends on.

    Args:
        run: the run folder.
        model: the checkpoint to start from.
        data: the given pairs and prompts.
        sft: the optional supervised stage.
        loop: the iterations.
        loss: what is trained with.
        reward: who ranks.
        judge: who it is, where a judge ranks.
        select: which of the given pairs stay.
        bootstrap: fresh pairs.
        on_policy: policy gradients and rejection sampling in the place of pairs.
        explore: how uncertain the reward is, where that decides.
        optimizer: of the iterations.
        lora: adapters in the place of all weights.
        mesh: devices by axis.
        evaluate: win rate while the run goes on.
    """

    run: RunConfig
    model: ModelConfig
    data: DataConfig = DataConfig()
    sft: SftConfig = SftConfig()
    loop: LoopConfig = LoopConfig()
    loss: LossConfig = LossConfig()
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()
    select: SelectConfig = SelectConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()
    explore: ExploreConfig = ExploreConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """`python -m sera_jax.generate`: prompts in, responses out as JSONL.

    Args:
        model: the policy.
        prompts: files of prompts, text or chat messages.
        out: JSONL file to write, one line a prompt in their order: {"id", "prompt", "responses", "finished",
            "lengths"}, lengths in tokens. It appears when complete; an interrupted command goes on where it stopped.
        candidates: responses a prompt.
        best_by: keep the best candidate of each prompt alone (best of n), by "module:function" or the folder of a
            reward model with the policy's tokens; empty = keep all.
        temperature: 0 = greedy.
        top_k: 0 = off.
        top_p: 1 = off.
        min_p: 0 = off.
        max_new_tokens: of a response.
        max_prompt_length: longer prompts keep their end.
        slots: responses decoded side by side.
        refill: as in the bootstrap section.
        limit: first n prompts (0 = all).
        seed: of the noise.
        mesh: devices by axis.
    """

    model: ModelConfig
    prompts: tuple[str, ...]
    out: str
    candidates: int = 1
    best_by: str = ""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    max_prompt_length: int = 512
    slots: int = 64
    refill: int = 1
    limit: int = 0
    seed: int = 0
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True)
class EvaluateDoorConfig:
    """`python -m sera_jax.evaluate`: win rate of a policy against a baseline on a prompt file.

    Args:
        policy: Hugging Face folder, or a JSONL that `sera_jax.generate` wrote for the same prompts.
        baseline: likewise.
        evaluate: prompts, reward function, and how folders are sampled from.
        out: JSON file for the result; empty = print only.
        max_prompt_length: longer prompts keep their end.
        slots: responses decoded side by side.
        refill: as in the bootstrap section.
        compute: dtype of the matrix products.
        seed: of the noise and of the bootstrap interval.
        mesh: devices by axis.
    """

    policy: str
    baseline: str
    evaluate: EvaluateConfig
    out: str = ""
    max_prompt_length: int = 512
    slots: int = 64
    refill: int = 1
    compute: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True)
class ReviewConfig:
    """`python -m sera_jax.review`: which pairs of a preference file are mislabelled or uninformative?

    Args:
        policy: Hugging Face folder of an aligned model.
        reference: Hugging Face folder of what it started from; not read where the loss has no reference.
        data: the pairs.
        out: folder for review.parquet (margins, ranks, flags), kept.jsonl, report.html and the ledger, with which a
            repetition scores nothing again.
        loss: whose implicit reward; loss.reference none = log-probs in the place of log-ratios.
        select: which pairs are kept.
        uninformative: a pair is called so where |margin| is below this share of the median |margin|.
        long: a pair is called so where its longer response has more than this many times the median's tokens.
        compute: dtype of the matrix products.
        mesh: devices by axis.
    """

    policy: str
    reference: str
    data: DataConfig
    out: str
    loss: LossConfig = LossConfig()
    select: SelectConfig = SelectConfig()
    uninformative: float = 0.1
    long: float = 4.0
    compute: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True)
class AgreeConfig:
    """`python -m sera_jax.agree`: do several evaluators agree on the same responses?

    Args:
        files: of responses with scores (README, "Who agrees with whom"): .jsonl, .json, .parquet, .csv, each also .gz.
        scores: names of the scores in the files that take part; empty = all of them.
        functions: more evaluators: "module:function", called as function(prompt, response) -> float.
        models: more evaluators: Hugging Face folders of reward models.
        out: JSON file for the result; empty = print only.
        limit: first n rows (0 = all).
        max_length: tokens of prompt and response together for the models; what is longer has no score of theirs.
        resamples: of the bootstrap over prompts.
        seed: of the bootstrap.
        compute: dtype of the models' matrix products.
        mesh: devices by axis.
    """

    files: tuple[str, ...]
    scores: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    out: str = ""
    limit: int = 0
    max_length: int = 1024
    resamples: int = 1000
    seed: int = 0
    compute: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True)
class RewardLossConfig:
    """The Bradley-Terry loss of a reward model: -log σ(r_w - r_l + α(L_w - L_l) - m) + λ·(r_w + r_l)².

    Args:
        margin: m is so many times the gap of the annotator's scores (score_chosen, score_rejected); 0 = no margin.
        center: λ, against rewards that drift together (TRL's center_rewards_coefficient, 0.01 where it is used).
        length_alpha: α, of a label what a token of length explains; with more than 0 the reward likes length less.
    """

    margin: float = 0.0
    center: float = 0.0
    length_alpha: float = 0.0


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """How a preference model is asked and taught.

    Args:
        labels: of kind preference: the answers that mean the first and the second response, one token each.
        orders: of kind preference, in which a pair is trained on: random = one, drawn by run.seed and the pair's id;
            both = a question in each, twice the updates. Asked is always in both.
    """

    labels: tuple[str, str] = ("A", "B")
    orders: Literal["random", "both"] = "random"


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """`python -m sera_jax.reward_model`: preference pairs in, a reward model or a preference model out.

    Args:
        run: the run folder.
        model: the checkpoint to start from: a policy, which gets a scalar head drawn from run.seed where the kind has
            one, or a model of the same kind.
        data: the pairs; a share of them (data.validation) is held out and measured on. For preference models max_length
            is that of a question with both responses.
        kind: bradley_terry = a reward of each response; preference = a policy that reads both and answers with the
            label of the better one (RLHF Workflow); preference_head = a scalar head in the place of the label.
        reward_loss: what bradley_terry is trained with.
        preference: of the other kinds.
        epochs: passes over the pairs.
        validate_every: updates between two checks on the held-out pairs; 0 = only at the end.
        lora: adapters in the place of all weights, and with them the scalar head, where there is one; the export has
            them merged in.
        optimizer: of the updates.
        mesh: devices by axis.
    """

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    kind: ModelKind = "bradley_terry"
    reward_loss: RewardLossConfig = RewardLossConfig()
    preference: PreferenceConfig = PreferenceConfig()
    epochs: int = 1
    validate_every: int = 0
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True)
class AnnotateConfig:
    """`python -m sera_jax.annotate export` and `import`: pairs of responses out for people to label, labels back in.

    Args:
        questions: JSONL of the pairs to label, one a line: {"id", "prompt", "left", "right", "label"}; export writes
            it, import reads it.
        responses: for export: files of candidates, as `sera_jax.generate` writes them.
        pairs: for export: files of pairs in any form, also fresh.parquet of a run; who was chosen is not told.
        per_prompt: for export: pairs of a prompt's responses, drawn by seed; 0 = every two.
        unfinished: for export: drop = a response that is marked as not finished is in no question; keep = it is.
        limit: for export: at most so many questions, drawn by seed (0 = all).
        seed: of which response is shown on the left, of the order of the questions, and of the draws.
        labels: for import: JSONL or CSV of {"id", "label"} and, if known, "annotator" (else the file's name); label is
            left, right or tie, empty = not labelled. The questions' file itself, filled in, is one, too.
        out: for import: JSONL of preference pairs to write, for data.pairs; score_chosen and score_rejected are the
            shares of the votes.
    """

    questions: str
    responses: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    per_prompt: int = 1
    unfinished: Literal["drop", "keep"] = "drop"
    limit: int = 0
    seed: int = 0
    labels: tuple[str, ...] = ()
    out: str = ""


# (key, test of the value, what was expected); keys that a config lacks are passed over.
_RANGES: tuple[tuple[str, Any, str], ...] = (
    ("loss.beta", lambda v: v > 0, "a number > 0"),
    ("lora.rank", lambda v: v >= 0, "0 or more"),
    ("lora.alpha", lambda v: v > 0, "a number > 0"),
    ("lora.targets", lambda v: len(v) == len(set(v)), "each linear layer once"),
    ("lora.dropout", lambda v: 0 <= v < 1, "a share in [0, 1)"),
    ("loss.label_smoothing", lambda v: 0 <= v < 0.5, "0 <= ε < 0.5"),
    ("loss.f_alpha", lambda v: v >= 0, "a number >= 0"),
    ("loss.gamma", lambda v: v >= 0, "a number >= 0"),
    ("loss.gamma_beta_ratio", lambda v: v >= 0, "a number >= 0"),
    ("loss.alphapo_alpha", math.isfinite, "a finite number"),
    ("loss.discopop_tau", lambda v: 0 < v <= 1, "0 < τ <= 1"),
    ("loss.dpop_lambda", lambda v: v >= 0, "a number >= 0"),
    ("loss.reward_scale", lambda v: 0 < v < math.inf, "a number > 0"),
    ("loss.rdpo_alpha", lambda v: v >= 0, "a number >= 0"),
    ("loss.slic_delta", lambda v: v > 0, "a number > 0"),
    ("loss.slic_lambda", lambda v: v >= 0, "a number >= 0"),
    ("loss.sft_weight", lambda v: v >= 0, "a number >= 0"),
    ("loss.optimism", lambda v: v >= 0, "a number >= 0"),
    ("loss.desirable_weight", lambda v: v >= 0, "a number >= 0"),
    ("loss.undesirable_weight", lambda v: v >= 0, "a number >= 0"),
    ("loss.ld_alpha", lambda v: 0 <= v <= 1, "0 <= α <= 1"),
    ("loss.mix", lambda v: all(w > 0 for w in v.values()), "weights > 0"),
    ("reward.gamma", lambda v: 0 <= v <= 1, "0 <= γ <= 1"),
    ("reward.ema_decay", lambda v: 0 < v < 1, "0 < decay < 1"),
    ("judge.base_url", lambda v: re.match(r"https?://[^/]", v), "http://... or https://..."),
    ("judge.concurrent", lambda v: v >= 1, "at least 1"),
    ("judge.per_minute", lambda v: v >= 0, "0 or more"),
    ("judge.retries", lambda v: v >= 0, "0 or more"),
    ("judge.timeout", lambda v: v > 0, "a number > 0"),
    ("judge.temperature", lambda v: v >= 0, "a number >= 0"),
    ("judge.max_tokens", lambda v: v >= 1, "at least 1"),
    ("judge.price_in", lambda v: v >= 0, "a number >= 0"),
    ("judge.price_out", lambda v: v >= 0, "a number >= 0"),
    ("reward.sources", lambda v: all(w > 0 and math.isfinite(w) for w in v.values()), "weights > 0"),
    ("reward.length_penalty", lambda v: v == "auto" or math.isfinite(v), "a finite number, or 'auto'"),
    ("bootstrap.replay_last", lambda v: v >= 0, "0 or more"),
    ("select.from_iteration", lambda v: v >= 1, "at least 1"),
    ("bootstrap.from_iteration", lambda v: v >= 1, "at least 1"),
    ("select.keep", lambda v: 0 <= v <= 1, "a share between 0 and 1"),
    ("on_policy.rounds", lambda v: v >= 1, "at least 1"),
    ("on_policy.prompts", lambda v: v >= 1, "at least 1"),
    ("on_policy.passes", lambda v: v >= 1, "at least 1"),
    ("on_policy.clip", lambda v: v > 0, "a number > 0"),
    ("on_policy.clip_high", lambda v: v > 0, "a number > 0"),
    ("on_policy.beta", lambda v: v >= 0, "a number >= 0"),
    ("bootstrap.fresh", lambda v: v >= 0, "a share >= 0"),
    ("bootstrap.prompts_per_iteration", lambda v: 0 < v <= 1, "a share in (0, 1]"),
    (
        "bootstrap.temperature",
        lambda v: len(v) > 0 and all(t >= 0 for t in v) if isinstance(v, tuple) else v >= 0,
        "a number >= 0, or a list of such",
    ),
    ("bootstrap.top_p", lambda v: 0 < v <= 1, "a share in (0, 1]"),
    ("bootstrap.mixture", lambda v: 0 <= v <= 1, "0 <= α <= 1"),
    ("bootstrap.min_p", lambda v: 0 <= v < 1, "0 <= min_p < 1"),
    ("bootstrap.max_new_tokens", lambda v: v >= 1, "at least 1"),
    ("bootstrap.top_k", lambda v: v >= 0, "0 or more"),
    ("explore.weight", lambda v: 0 < v < math.inf, "a number > 0"),
    ("explore.regularisation", lambda v: 0 < v < math.inf, "a number > 0"),
    ("explore.dimension", lambda v: v >= 0, "0 or more"),
    ("evaluate.temperature", lambda v: v >= 0, "a number >= 0"),
    ("evaluate.top_p", lambda v: 0 < v <= 1, "a share in (0, 1]"),
    ("evaluate.max_new_tokens", lambda v: v >= 1, "at least 1"),
    ("evaluate.limit", lambda v: v >= 0, "0 or more"),
    ("temperature", lambda v: v >= 0, "a number >= 0"),
    ("top_p", lambda v: 0 < v <= 1, "a share in (0, 1]"),
    ("min_p", lambda v: 0 <= v < 1, "0 <= min_p < 1"),
    ("top_k", lambda v: v >= 0, "0 or more"),
    ("limit", lambda v: v >= 0, "0 or more"),
    ("candidates", lambda v: v >= 1, "at least 1"),
    ("per_prompt", lambda v: v >= 0, "0 or more"),
    ("max_new_tokens", lambda v: v >= 1, "at least 1"),
    ("max_prompt_length", lambda v: v >= 1, "at least 1 token"),
    ("slots", lambda v: v >= 1, "at least 1"),
    ("refill", lambda v: v >= 1, "at least 1"),
    ("bootstrap.refill", lambda v: v >= 1, "at least 1"),
    ("data.limit", lambda v: v >= 0, "0 or more"),
    ("resamples", lambda v: v >= 1, "at least 1"),
    ("max_length", lambda v: v >= 2, "at least 2 tokens"),
    ("uninformative", lambda v: v >= 0, "a share >= 0"),
    ("reward_loss.margin", lambda v: 0 <= v < math.inf, "a number >= 0"),
    ("reward_loss.center", lambda v: 0 <= v < math.inf, "a number >= 0"),
    ("reward_loss.length_alpha", lambda v: 0 <= v < math.inf, "a number >= 0"),
    ("epochs", lambda v: v >= 1, "at least 1"),
    ("validate_every", lambda v: v >= 0, "0 or more"),
    ("long", lambda v: v > 1, "a number > 1"),
    ("data.validation", lambda v: 0 <= v < 1, "a share in [0, 1)"),
    ("data.max_length", lambda v: v >= 2, "at least 2 tokens"),
    ("data.max_prompt_length", lambda v: v >= 1, "at least 1 token"),
    ("loop.iterations", lambda v: v >= 0, "0 or more"),
    ("loop.epochs", lambda v: v >= 1, "at least 1"),
    ("loop.validate_every", lambda v: v >= 0, "0 or more"),
    ("loop.early_stop", lambda v: v >= 0, "0 or more"),
    ("sft.epochs", lambda v: v >= 0, "0 or more"),
    ("run.save_every", lambda v: v >= 1, "at least 1"),
    ("run.keep_checkpoints", lambda v: v >= 1, "at least 1"),
    ("run.log_every", lambda v: v >= 1, "at least 1"),
    ("model.head_chunk", lambda v: v >= 1, "at least 1"),
    *(
        (f"{stage}.{key}", test, expected)
        for stage in ("optimizer", "sft.optimizer")
        for key, test, expected in (
            ("learning_rate", lambda v: v > 0, "a number > 0"),
            ("warmup", lambda v: 0 <= v <= 1, "a share between 0 and 1"),
            ("b1", lambda v: 0 <= v < 1, "0 <= b1 < 1"),
            ("b2", lambda v: 0 <= v < 1, "0 <= b2 < 1"),
            ("eps", lambda v: v > 0, "a number > 0"),
            ("weight_decay", lambda v: v >= 0, "a number >= 0"),
            ("batch_size", lambda v: v >= 1, "at least 1"),
            ("clip", lambda v: v >= 0, "a number >= 0"),
            ("row_tokens", lambda v: v >= 0 and v % 128 == 0, "0 or a multiple of 128"),
            ("microbatch_rows", lambda v: v >= 0, "0 or more"),
            ("row_shapes", lambda v: v >= 1, "at least 1"),
        )
    ),
    ("mesh.slices", lambda v: v >= 1, "at least 1"),
    ("mesh.data", lambda v: v == -1 or v >= 1, "-1 or at least 1"),
    ("mesh.fsdp", lambda v: v == -1 or v >= 1, "-1 or at least 1"),
    ("mesh.tensor", lambda v: v == -1 or v >= 1, "-1 or at least 1"),
)

# Keys that only some losses know, and which.
_DIVERGING = ("dpo", "robust_dpo", "exo_pair", "discopop", "slic", "ipo", "sigmoid_norm")
_SMOOTHED = ("dpo", "robust_dpo", UNCERTAIN_LOSS, "exo_pair", "aot", "aot_unpaired", "simpo", "alphapo", "cpo")
_LOSS_KEYS = (
    ("label_smoothing", _SMOOTHED),
    ("f_divergence", _DIVERGING),
    ("f_alpha", _DIVERGING),
    ("normalisation", ("ipo",)),
    ("gamma", ("simpo", "alphapo")),
    ("gamma_beta_ratio", ("simpo", "alphapo")),
    ("alphapo_alpha", ("alphapo",)),
    ("discopop_tau", ("discopop",)),
    ("dpop_lambda", ("dpop",)),
    ("reward_scale", ("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")),
    ("rdpo_alpha", ("rdpo",)),
    ("slic_delta", ("slic_hf",)),
    ("slic_lambda", ("slic_hf",)),
    ("desirable_weight", ("kto",)),
    ("undesirable_weight", ("kto",)),
)


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
        config: any of this file's door configs.
        where: the file (or "flags") named in the message.
    """

    def refuse(key: str, expected: str) -> None:
        raise ConfigError(f"{where}: {key} is {get(config, key)!r}, expected {expected}.")

    for key, test, expected in _RANGES:
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
    for key, owners in _LOSS_KEYS:
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
                f"{where}: data.format is 'unpaired', but loss {loss.name!r} learns from pairs; use loss.name 'kto'."
            )
        return
    pairs_only = {"mix": {}, "sft_weight": 0.0, "optimism": 0.0, "ld_alpha": 1.0, "weighting": "none"}
    for key, default in pairs_only.items():
        if getattr(loss, key) != default:
            raise ConfigError(
                f"{where}: loss.{key} is {getattr(loss, key)!r} with loss {unpaired!r}, which learns from single "
                "responses; it is for pairs. Leave it out, or use 'kto_pair'."
            )
    if isinstance(config, ReviewConfig):
        raise ConfigError(f"{where}: loss.name is {unpaired!r}, but a review ranks pairs; use 'kto_pair'.")
    selects = config.loop.iterations >= config.select.from_iteration
    makes = config.bootstrap.fresh > 0 and config.loop.iterations >= config.bootstrap.from_iteration
    if selects or makes:
        section, what = ("select", "selection") if selects else ("bootstrap", "bootstrapping")
        raise ConfigError(
            f"{where}: loss.name is {unpaired!r} with {section}.from_iteration "
            f"{get(config, section).from_iteration} of {config.loop.iterations} iterations, but {what} ranks pairs, "
            f"and {unpaired!r} learns from single responses. Set loop.iterations to 1, or use 'kto_pair' on pairs."
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
    records = [record] if own is None else [record, own]
    parser = jsonargparse.ArgumentParser(exit_on_error=False, description=records[-1].__doc__)
    parser.add_argument(
        "--config", action="config", help="YAML file, may come several times; what comes later overrides"
    )
    for each in records:
        parser.add_class_arguments(each, None)
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


def dump(config: Any) -> str:
    """The complete config as YAML: training from it repeats the run."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
