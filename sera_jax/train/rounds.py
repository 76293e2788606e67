"""Rounds of an iteration that learns from its own samples at once: sample → reward → update, again and again.

Candidates, order and noise of a round depend on the run's seed, the iteration, the round, and on the policy as the
round begins; a run goes on from the beginning of a round.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet

from sera_jax import bootstrap, data, disk, metrics, policies, policy_gradient, processes, programs, rewards, score
from sera_jax.policies import Live, Name
from sera_jax.records import Candidates, Tree
from sera_jax.rows import Plan
from sera_jax.run import Rounds, Stage
from sera_jax.train import fresh
from sera_jax.train import world as worlds
from sera_jax.train.select import loss_reference
from sera_jax.train.world import World


def of_iteration(world: World, t: int) -> Rounds:
    """The rounds of iteration t, as `run.run_stage` takes them. The reference stays in memory while they run."""
    config, where = world.config, world.policies
    plan = score.plan_of(worlds.sampled_lengths(config, world.given), where.arch, world.mesh)
    held: list[Any] = []

    def make(number: int, trained: Any) -> Stage:
        live = Live(Name("iterate", t - 1), policies.whole(where, trained))
        drawn = _drawn(world, t, number)
        with metrics.quiet():
            candidates = _candidates(world, t, number, drawn, live)
            ranked, rewards_PC = fresh.rewarded(world, t, live, drawn, candidates)
        rewards_PC = usable(candidates, rewards_PC, keep_unfinished=config.bootstrap.unfinished == "keep")
        if not np.isfinite(rewards_PC).any():
            raise ValueError(
                f"round {number + 1} of iteration {t} has nothing to learn from: none of its {rewards_PC.size} "
                "candidates has a reward and has ended. Raise bootstrap.max_new_tokens, or set bootstrap.unfinished "
                "to keep."
            )
        if config.on_policy.beta and not held:
            held.append(policies.params(where, loss_reference(world, t)))
        known = _token_logps(world, candidates, {"old": live.params, "reference": held[0] if held else None}, plan)
        kl_PC = None
        if len(known) == 2:
            total = {name: np.array([v.sum() for v in values]) for name, values in known.items()}
            kl_PC = (total["old"] - total["reference"]).reshape(rewards_PC.shape)
        penalised_PC = rewards_PC
        if config.on_policy.beta and config.on_policy.kl == "reward":
            penalised_PC = rewards_PC - config.on_policy.beta * kl_PC
        weight_PC = LEARN[config.on_policy.algorithm](config.on_policy.advantage, penalised_PC)
        _tell(world, t, number, candidates, rewards_PC, weight_PC, kl_PC, ranked.told)
        return _stage(world, t, number, candidates, weight_PC, known)

    return Rounds("update", t, config.on_policy.rounds, worlds.updates_of_round(config), make)


def _drawn(world: World, t: int, number: int) -> np.ndarray:
    """Which prompts a round samples from: each once before one comes again."""
    config, count = world.config, len(world.given.prompts)
    asked = {"seed": config.run.seed + 1, "iteration": t, "epoch": 0, "updates": number + 1}
    return data.batches(count, config.on_policy.prompts, **asked)[number]


def _candidates(world: World, t: int, number: int, drawn: np.ndarray, live: Live | None) -> Candidates:
    """What a round sampled, kept in its file. live: None = it is all there."""
    b = world.config.bootstrap
    key = jax.random.fold_in(worlds.key(world, "sample", t), number)
    return bootstrap.sample_candidates(
        fresh.sampler(world, live, key, b.candidates, b),
        [world.given.prompts[i] for i in drawn],
        [world.given.prompt_tokens[i] for i in drawn],
        fresh.decoded(world),
        candidates=b.candidates,
        slots=b.slots,
        refill=b.refill,
        path=_file(world, t, number, "jsonl"),
        label=f"iteration {t}, round {number + 1}: sampling",
    )


def usable(candidates: Candidates, rewards_PC: np.ndarray, *, keep_unfinished: bool) -> np.ndarray:
    """float64 [P, C]: rewards, NaN for candidates that take no part. One that repeats another of its prompt has its
    reward, whoever ranks (a judge is not asked twice): samples count as often as they were drawn."""
    out = np.array(rewards_PC, np.float64)
    for p, row in enumerate(candidates.tokens_PC):
        first: dict[bytes, int] = {}
        for c, ids in enumerate(row):
            out[p, c] = out[p, first.setdefault(ids.tobytes(), c)]
    return out if keep_unfinished else np.where(candidates.finished_PC, out, np.nan)


def _token_logps(world: World, candidates: Candidates, params: dict[str, Any], plan: Plan) -> dict[str, list]:
    """By name float32 [tokens] of each candidate, of the models that the config asks for."""
    where, names = world.policies, worlds.scored_under(world.config)
    scorer = programs.token_scorer(where.arch, where.mesh, where.compute)
    run = lambda weights: programs.score_rows(scorer, weights, where.mesh)
    trees = rewards.trees(candidates)
    return {name: score.token_logps(trees, run(weights), plan) for name, weights in params.items() if name in names}


def _stage(
    world: World,
    t: int,
    number: int,
    candidates: Candidates,
    weight_PC: np.ndarray,
    known: dict[str, list],
) -> Stage:
    """The updates of a round: passes over its prompts, an update over so many of them with what was sampled."""
    config, asked = world.config, world.config.on_policy
    told = zip(candidates.ids, candidates.prompts, candidates.tokens_PC, weight_PC)
    if asked.algorithm == "raft":
        trees = [Tree(*head, (ids[int(np.nanargmax(w))],)) for *head, ids, w in told if np.nansum(w) > 0]
    else:
        trees = [Tree(*head, ids, values=tuple(w.tolist())) for *head, ids, w in told]
    size = config.optimizer.batch_size
    batches = [
        batch
        for epoch in range(number * asked.passes, (number + 1) * asked.passes)
        for batch in data.batches(
            len(trees), size, seed=config.run.seed, iteration=t, epoch=epoch, updates=-(-asked.prompts // size)
        )
    ]
    return Stage(
        name="update",
        iteration=t,
        batches=batches,
        trees=trees,
        reference_F=np.zeros(sum(len(tree.branches) for tree in trees), np.float32),
        weight_N=np.ones(len(trees), np.float32),
        plans=world.plans,
        tokens_F={name: known[name] for name in worlds.token_names(config)},
    )


def _best_alone(advantage: str, rewards_PC: np.ndarray) -> np.ndarray:
    """RAFT: 1 for each prompt's best candidate, 0 for the others, NaN for those that take no part."""
    chosen_PC = np.arange(rewards_PC.shape[1]) == policy_gradient.best(rewards_PC)[:, None]
    return np.where(np.isfinite(rewards_PC), chosen_PC.astype(np.float64), np.nan)


LEARN: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
    "policy_gradient": lambda advantage, rewards_PC: policy_gradient.ADVANTAGES[advantage](rewards_PC),
    "raft": _best_alone,
}
"""(name of an advantage, rewards [P, C]) → what each candidate weighs in the updates, NaN = nothing."""


# --- what stays of a round --------------------------------------------------------------------------------------------


def _file(world: World, t: int, number: int, kind: str) -> pathlib.Path:
    return worlds.folder(world, t) / "rounds" / f"{number + 1:04}.{kind}"


def _tell(
    world: World,
    t: int,
    number: int,
    candidates: Candidates,
    rewards_PC: np.ndarray,
    weight_PC: np.ndarray,
    kl_PC: np.ndarray | None,
    told: dict[str, Any],
) -> None:
    """A line of the log under TRL's names, and rounds/NUMBER.parquet with a row for each candidate."""
    known_PC, length_PC = np.isfinite(rewards_PC), rewards.lengths(candidates)
    spread_P = np.array([row[known].std(ddof=1) for row, known in zip(rewards_PC, known_PC) if known.sum() > 1])
    world.run.metrics.write(
        {
            "stage": "round",
            "iteration": t,
            "step": number + 1,
            "reward": float(rewards_PC[known_PC].mean()),
            "reward_std": float(spread_P.mean()) if len(spread_P) else 0.0,
            "frac_reward_zero_std": float((spread_P < 1e-8).mean()) if len(spread_P) else 1.0,
            **({} if kl_PC is None else {"gen/kl": float(kl_PC.mean())}),
            "completions/mean_length": float(length_PC.mean()),
            "completions/clipped_ratio": 1 - float(candidates.finished_PC.mean()),
            **told,
        }
    )
    count = rewards_PC.shape[1]
    columns = {
        "prompt_id": np.repeat(np.array(candidates.ids), count),
        "prompt_length": np.repeat([len(prompt) for prompt in candidates.prompts], count),
        "response": [text for row in candidates.texts_PC for text in row],
        "length": length_PC.reshape(-1),
        "finished": candidates.finished_PC.reshape(-1),
        "reward": rewards_PC.reshape(-1),
        "weight": weight_PC.reshape(-1),
        **({} if kl_PC is None else {"kl": kl_PC.reshape(-1)}),
    }

    def written() -> None:
        with disk.whole(_file(world, t, number, "parquet")) as beside:
            pyarrow.parquet.write_table(pyarrow.table(columns), beside)

    processes.once(written)


def outcome(world: World, t: int) -> tuple[dict[str, Any], dict[str, int], Candidates]:
    """Measures for the summary of iteration t, tokens by what was done with them, the candidates of its last round.

    labels: candidates that were ranked, repeated ones once. reward, reward_first: means of last and first round.
    """
    count = world.config.on_policy.rounds
    told, tokens = processes.once(lambda: _counted(world, [_read(world, t, number) for number in range(count)]))
    return told, tokens, _candidates(world, t, count - 1, _drawn(world, t, count - 1), None)


def _read(world: World, t: int, number: int) -> dict[str, np.ndarray]:
    table = pyarrow.parquet.read_table(_file(world, t, number, "parquet"))
    return {name: table[name].to_numpy() for name in table.column_names}


def _counted(world: World, rounds: list[dict[str, np.ndarray]]) -> tuple[dict[str, Any], dict[str, int]]:
    asked, candidates = world.config.on_policy, world.config.bootstrap.candidates
    sampled = sum(int(r["length"].sum() + r["prompt_length"][::candidates].sum()) for r in rounds)
    trained = sampled
    if asked.algorithm == "raft":
        trained = sum(int((r["length"] + r["prompt_length"])[r["weight"] > 0].sum()) for r in rounds)
    scored = len(worlds.scored_under(world.config)) * sampled
    mean = lambda values: float(np.nanmean(values))
    told = {
        "rounds": len(rounds),
        "labels": sum(len(set(zip(r["prompt_id"], r["response"]))) for r in rounds),
        "reward": mean(rounds[-1]["reward"]),
        "reward_first": mean(rounds[0]["reward"]),
        **({"gen/kl": mean(rounds[-1]["kl"])} if "kl" in rounds[-1] else {}),
    }
    return told, {"train": asked.passes * trained, "score": scored, "sample": sampled}
