"""The sections of a config: what each key is, its default, and where that comes from.

Values marked * are not published by the paper as far as we could establish: they are starting points, not constants.
"""

import dataclasses
from typing import Literal

from sera_jax.config.names import (
    AdvantageName,
    AlgorithmName,
    BestName,
    DivergenceName,
    EnsembleName,
    FormatName,
    LossName,
    PairRuleName,
    PartsName,
    RankedRuleName,
    RatioName,
    RewardName,
    RuleName,
    ScoreName,
    TargetName,
)


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
            in our kernel for TPUs; splash = in JAX's; triton = in our kernel for GPUs; auto = tree on TPUs, loops on
            CPUs, xla on GPUs.
    """

    path: str
    weights: Literal["pretrained", "random"] = "pretrained"
    compute: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "attention", "full", "host"] = "full"
    head_chunk: int = 256
    attention: Literal["auto", "xla", "loops", "splash", "tree", "triton"] = "auto"


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
        format: of the pairs; auto = detected and shown. unpaired = labelled single responses, for losses kto and
            apo_zero_unpaired.
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
        desirable_weight: kto and apo_zero_unpaired only: λ_D, of desirable responses.
        undesirable_weight: kto and apo_zero_unpaired only: λ_U, of undesirable ones; λ_D·n_D / (λ_U·n_U) between 1 and
            4/3 is advised.
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
