"""One record a door: the keys that it takes."""

import dataclasses
from typing import Literal

from sera_jax.config.names import ModelKind
from sera_jax.config.sections import (
    BootstrapConfig,
    DataConfig,
    EvaluateConfig,
    ExploreConfig,
    JudgeConfig,
    LoopConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OnPolicyConfig,
    OptimizerConfig,
    PreferenceConfig,
    RewardConfig,
    RewardLossConfig,
    RunConfig,
    SelectConfig,
    SftConfig,
)


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
