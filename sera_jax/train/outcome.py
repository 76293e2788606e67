"""What an iteration leaves: its pairs as files, its policy evaluated, a summary; and, at the end, export and report."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet

from sera_jax import config as configs
from sera_jax import disk, hf, metrics, model, policies, processes, programs, report, rewards, selection, sera, winrate
from sera_jax.policies import Live, Name
from sera_jax.records import Candidates, Tree
from sera_jax.run import Checks, Cursor, Rounds, Stage
from sera_jax.selection import Selection
from sera_jax.train import rounds, validate, watch
from sera_jax.train import world as worlds
from sera_jax.train.fresh import Made, candidate_logps, responses, responses_judged
from sera_jax.train.select import ensemble, loss_reference, reward_reference
from sera_jax.train.world import Given, World


def judged(world: World, t: int, made: Made | None) -> np.ndarray | None:
    """float32 [F, 2]: what evaluate.function thinks of (chosen, rejected) of every fresh pair, None without function.
    For files and the log alone: called when the iteration's training set stands.
    """
    if made is None or not world.config.evaluate.function:
        return None
    prompts = [made.prompts[p].prompt for p in made.fresh.prompt_F]
    texts_PC = made.candidates.texts_PC
    texts_F2 = [[texts_PC[p][c] for c in pair] for p, pair in zip(made.fresh.prompt_F, made.fresh.pair_F2)]
    function = rewards.load_function(world.config.evaluate.function)
    return rewards.by_function(function, prompts, texts_F2, f"iteration {t}: judging fresh pairs").reshape(-1, 2)


def write_pairs(
    world: World, t: int, chosen: Selection | None, made: Made | None, gold_F2: np.ndarray | None = None
) -> None:
    """iterations/t/kept.parquet (every given pair that the iteration sees, and its verdict), fresh.parquet (every fresh
    pair), of a source that compares probabilities.parquet (every two candidates), of a combined reward rewards.parquet
    (every candidate, and what each source said).

    Args:
        gold_F2: of the fresh pairs (`judged`).
    """
    folder = worlds.folder(world, t)
    if chosen is not None:
        given = worlds.given_at(world.given, t)
        columns = selection.columns(given.pairs, given.trees, chosen)
        _write_table(columns, folder / "kept.parquet")
    if made is not None:
        candidates, fresh, prob_PCC = made.candidates, made.fresh, made.ranked.prob_PCC
        text = lambda p, c: candidates.texts_PC[p][c]
        picks = list(zip(fresh.prompt_F, *fresh.pair_F2.T)) if len(fresh.trees) else []
        columns = {
            "id": [tree.id for tree in fresh.trees],
            "prompt_id": [candidates.ids[p] for p in fresh.prompt_F],
            "prompt": [selection.shown(made.prompts[p].prompt) for p in fresh.prompt_F],
            "chosen": [text(p, c) for p, c, _ in picks],
            "rejected": [text(p, r) for p, _, r in picks],
            "reward_chosen": fresh.reward_F2[:, 0],
            "reward_rejected": fresh.reward_F2[:, 1],
            "win_chosen": fresh.win_F2[:, 0],
            "win_rejected": fresh.win_F2[:, 1],
            "preference_chosen": fresh.preference_F2[:, 0],
            "preference_rejected": fresh.preference_F2[:, 1],
            "length_chosen": [len(tree.branches[0]) for tree in fresh.trees],
            "length_rejected": [len(tree.branches[1]) for tree in fresh.trees],
            "finished_chosen": [bool(candidates.finished_PC[p, c]) for p, c, _ in picks],
            "finished_rejected": [bool(candidates.finished_PC[p, r]) for p, _, r in picks],
            "kept": fresh.kept_F,
            **({} if fresh.gamma_F is None else {"gamma": fresh.gamma_F}),
            **({} if prob_PCC is None else {"probability": prob_PCC[fresh.prompt_F, *fresh.pair_F2.T]}),
            **({} if gold_F2 is None else {"gold_chosen": gold_F2[:, 0], "gold_rejected": gold_F2[:, 1]}),
            "prompt_tokens": [tree.prompt for tree in fresh.trees],
            "chosen_tokens": [tree.branches[0] for tree in fresh.trees],
            "rejected_tokens": [tree.branches[1] for tree in fresh.trees],
        }
        _write_table(columns, folder / "fresh.parquet")
        if prob_PCC is not None:
            _write_table(_probabilities(candidates, prob_PCC), folder / "probabilities.parquet")
        if made.ranked.sources:
            _write_table(_rewards(made), folder / "rewards.parquet")


def _rewards(made: Made) -> dict[str, Any]:
    """Every candidate: what each source said of it, and the reward that its pairs were made by."""
    found = np.argwhere(rewards.lengths(made.candidates) > 0)
    return {
        "prompt_id": [made.candidates.ids[p] for p, _ in found],
        "candidate": found[:, 1],
        **{name: rewards_PC[tuple(found.T)] for name, rewards_PC in made.ranked.sources.items()},
        "reward": made.rewards_PC[tuple(found.T)],
    }


def _probabilities(candidates: Candidates, prob_PCC: np.ndarray) -> dict[str, Any]:
    """Every two candidates of a prompt that were compared: the probability that the first is better than the second.
    Opponents are counted behind the candidates."""
    found = np.argwhere(np.isfinite(prob_PCC) & np.triu(np.ones(prob_PCC.shape[1:], bool), 1))
    return {
        "prompt_id": [candidates.ids[p] for p, _, _ in found],
        "first": found[:, 1],
        "second": found[:, 2],
        "probability": prob_PCC[tuple(found.T)],
    }


def _write_table(columns: dict[str, Any], path: pathlib.Path) -> None:
    _write(path, lambda beside: pyarrow.parquet.write_table(pyarrow.table(columns), beside))


def _write(path: pathlib.Path, content: Callable[[pathlib.Path], Any]) -> None:
    """One file, by process 0. content: writes it to a path beside."""

    def written() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.whole(path) as beside:
            content(beside)

    processes.once(written)


# --- the summary of an iteration --------------------------------------------------------------------------------------


def summarise(
    world: World,
    t: int,
    live: Live,
    chosen: Selection | None,
    made: Made | None,
    stage: Stage | Rounds | None,
    *,
    at: Cursor | None = None,
    gold_F2: np.ndarray | None = None,
    before: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What iteration t did and what became of the policy; also written to metrics.jsonl and shown as a table.

    Args:
        stage: its updates; None = the iterate was given (loop.first). at: the end of the updates; None = it had none.
        gold_F2: of the fresh pairs (`judged`). before: the summaries of the iterations before.
    """
    summary: dict[str, Any] = {"iteration": t, "pairs/given": len(worlds.given_at(world.given, t).trees)}
    if isinstance(stage, Rounds):
        summary |= {"updates": at.update, **_of_rounds(world, t)}
    elif stage is not None:
        done = stage.batches[: at.update]
        summary |= {"pairs/trained": len(np.unique(np.concatenate(done))), "updates": at.update}
        summary |= _flops(world, t, chosen, made, stage.trees, done)
    summary |= _of_selection(world, worlds.given_at(world.given, t), chosen)
    summary |= _of_candidates(made, gold_F2)
    summary |= watch.of_samples(world, made.sampled if made else None)
    summary |= watch.of_policy(world, live)
    evaluated = _of_evaluation(world, live)
    summary |= validate.at_end(world, t, live, at.checks if at else Checks(), at.update if at else 0, evaluated)
    summary |= evaluated
    if at is not None and at.checks.stopped:
        metrics.say(
            f"iteration {t}: stopped behind update {at.update} of {at.total}, no lower validation loss in "
            f"{at.checks.waited} checks (loop.early_stop)"
        )
    said = watch.warnings(summary, before)
    summary |= {"watch/warnings": len(said), "warnings": said}
    summary = processes.once(lambda: summary)  # it decides what is exported
    world.run.metrics.write({"stage": "iteration", "step": 0, **summary})
    shown = [[k, v] for k, v in summary.items() if k not in ("iteration", "warnings")]
    metrics.table(f"iteration {t}", ["measure", "value"], shown)
    return summary


def _flops(
    world: World,
    t: int,
    chosen: Selection | None,
    made: Made | None,
    trees: Sequence[Tree],
    batches: Sequence[np.ndarray],
) -> dict[str, float]:
    """What the iteration must cost: 2 FLOPs a parameter and token in a forward pass, 6 in training (4 where the
    parameter is frozen), once for every log-prob that its method needs, whoever computed it. Attention, padding,
    logging and evaluation are not counted.
    """
    config, (forward, update) = world.config, _flops_of_token(world)
    trained = np.array([tree.length for tree in trees])
    given = worlds.given_at(world.given, t)  # of parts each is new
    earlier = set() if world.given.parts else set().union(*(_scores_of(world, s) for s in range(1, t)))
    size = {False: _tokens(given.trees, False), True: _tokens(given.trees, True)}
    scored = sum(size[shared] for _, shared in _scores_of(world, t) - earlier)
    decoded, told, explores = 0, world.loss.target == "bonus", config.bootstrap.pair_rule == "explore"
    if t == (1 if told else config.bootstrap.from_iteration) and (told or (made is not None and explores)):
        scored += size[False]  # features of the given pairs
    if made is not None:
        candidates = rewards.trees(made.candidates)
        ranked = sum(tree.length for tree in candidates)
        sampled = sum(tree.length for tree in rewards.trees(made.sampled))
        opposed = sum(tree.length for tree in rewards.trees(made.opponents)) if made.opponents else 0
        # A mixture takes two passes for a token; before any update it is one of equals, and none.
        twice = 0 if config.bootstrap.mixture == 0 or t == 1 else opposed if made.opponents else sampled
        decoded = sampled + opposed + twice
        known: set[Name | None] = set()
        if ("implicit", "") in configs.sources(config.reward):
            scorer = Live(Name("iterate", t - 1), None)
            known = {*ensemble(world, scorer)[0], reward_reference(world, scorer)} - {None}
            scored += (ranked + opposed) * len(known)
        kept = [tree for tree, kept in zip(made.fresh.trees, made.fresh.kept_F) if kept]
        if world.loss.reference:
            scored += _tokens(kept, False) * (loss_reference(world, t) not in known)
            scored += _tokens(kept, True) * (config.loss.ld_alpha < 1)
        scored += (ranked + _tokens(kept, False)) * explores + _tokens(kept, False) * told
    return {
        "flops/train": float(update * sum(trained[batch].sum() for batch in batches)),
        "flops/score": float(forward * scored),
        "flops/sample": float(forward * decoded),
    }


def _flops_of_token(world: World) -> tuple[int, int]:
    """Of a forward pass, and of training."""
    arch = world.policies.arch
    base, adapters = (
        sum(a.size for a in jax.tree.leaves(tree)) for tree in (model.abstract(arch), model.trainable(arch)[0])
    )
    return (2 * (base + adapters), 4 * base + 6 * adapters) if arch.lora else (2 * base, 6 * base)


def _of_rounds(world: World, t: int) -> dict[str, Any]:
    """What the rounds of iteration t sampled, and what their candidates look like in the last one."""
    told, tokens, last = rounds.outcome(world, t)
    forward, update = _flops_of_token(world)
    costs = {"train": update, "score": forward, "sample": forward}
    return {
        **told,
        **{f"flops/{what}": float(cost * tokens[what]) for what, cost in costs.items()},
        **watch.of_samples(world, last),
    }


def _tokens(trees: Sequence[Tree], shared: bool) -> int:
    """Tokens of trees; shared: of what is left when branches are cut to the shortest of their tree (LD-DPO)."""
    if not shared:
        return sum(tree.length for tree in trees)
    return sum(len(tree.prompt) + len(tree.branches) * min(map(len, tree.branches)) for tree in trees)


def _scores_of(world: World, t: int) -> set[tuple[Name, bool]]:
    """The models under which iteration t has to know the log-probs of the given set; True: of its shared parts."""
    config, found = world.config, set()
    reference = loss_reference(world, t)
    trained = config.select.rule != "none" or t < config.select.from_iteration
    if reference is not None and trained:
        found |= {(reference, False)} | ({(reference, True)} if config.loss.ld_alpha < 1 else set())
    weighs = config.select.rule not in ("all", "none") or config.select.unselected == "soft_weight"
    needs = set(sera.needs(config.select.score))
    if t >= config.select.from_iteration and weighs and needs & {"reward_N2", "loss_N", "reference_logp_N2"}:
        scorer = Live(Name("iterate", t - 1), None)
        names = [*ensemble(world, scorer)[0]] if needs & {"reward_N2", "loss_N"} else []
        names += [reward_reference(world, scorer)] if needs & {"reward_N2", "reference_logp_N2"} else []
        found |= {(name, False) for name in names if name is not None}
    return found


def _of_selection(world: World, given: Given, chosen: Selection | None) -> dict[str, Any]:
    """Margins of the given pairs under the policy that scored them, and what was kept."""
    if chosen is None:
        return {}
    length_N2 = np.array([[len(b) for b in tree.branches] for tree in given.trees], np.float64)
    lengths_N = length_N2.sum(axis=1)
    quantiles = dict(zip(("10", "50", "90"), np.quantile(chosen.margin_N, [0.1, 0.5, 0.9])))
    share_N = kept_shares(world, chosen)
    return {
        "pairs/kept": int(np.count_nonzero(share_N)),
        "sera/kept_fraction": float(share_N.mean()),
        "sera/accuracy": float((chosen.margin_N > 0).mean()),
        "sera/margin_mean": float(chosen.margin_N.mean()),
        **{f"sera/margin_q{q}": float(v) for q, v in quantiles.items()},
        "sera/kept_length_ratio": _over(lengths_N / lengths_N.mean(), share_N),
        "sera/kept_length_gap": _over(length_N2[:, 0] - length_N2[:, 1], share_N),
        **_of_truth(given, share_N, length_N2),
    }


def kept_shares(world: World, chosen: Selection) -> np.ndarray:
    """float64 [N]: how much of each given pair is trained on as it is labelled: 1 or 0, or its soft weight."""
    if world.config.select.unselected == "soft_weight":
        return np.asarray(sera.soft_weight(chosen.score_N), np.float64)
    return chosen.mask_N.astype(np.float64)


def _of_truth(given: Given, share_N: np.ndarray, length_N2: np.ndarray) -> dict[str, Any]:
    """Whether selection found out what is true, where that is known; equal gold counts half.

    sera/flips_kept: share of the flipped pairs that were kept. gold_accuracy, gold_gap: of the pairs kept and dropped.
    gold_length_gap: tokens of the truly better response less those of the other, over the kept pairs; beside
    kept_length_gap it tells what the labels add to the length cue.
    """
    pairs = given.pairs
    told: dict[str, Any] = {}
    flipped_N = np.array([bool(pair.truth.flipped) for pair in pairs])
    if any(pair.truth.flipped is not None for pair in pairs):
        told["sera/flips_kept"] = _over(share_N, flipped_N)
    gold_N = selection.gaps([pair.truth.gold for pair in pairs]).astype(np.float64)
    known_N = np.isfinite(gold_N)
    if not known_N.any():
        return told
    for name, group_N in (("kept", share_N), ("dropped", 1 - share_N)):
        told[f"sera/gold_accuracy_{name}"] = _over((np.sign(gold_N) + 1) / 2, group_N * known_N)
        told[f"sera/gold_gap_{name}"] = _over(gold_N, group_N * known_N)
    towards_N = np.sign(gold_N) * (length_N2[:, 0] - length_N2[:, 1])
    told["sera/gold_length_gap"] = _over(towards_N, share_N * known_N)
    return told


def _over(value_N: np.ndarray, weight_N: np.ndarray) -> float | None:
    """The mean by weight, of what has one; None where nothing has."""
    weight_N = np.asarray(weight_N, np.float64)
    some = weight_N > 0
    return float(np.average(value_N[some], weights=weight_N[some])) if some.any() else None


def _of_candidates(made: Made | None, gold_F2: np.ndarray | None) -> dict[str, Any]:
    """The fresh pairs made of what the policy sampled; KL is to the reward's reference. labels: candidates that got a
    reward, repeated ones once."""
    if made is None:
        return {}
    fresh = made.fresh
    kept, explored = fresh.kept_F.any(), fresh.gamma_F is not None
    length = np.array([[len(b) for b in tree.branches] for tree in fresh.trees], np.float64).reshape(-1, 2)
    ranked = zip(made.candidates.texts_PC, np.isfinite(made.rewards_PC), strict=True)
    return {
        "labels": sum(len({text for text, one in zip(texts_C, some_C) if one}) for texts_C, some_C in ranked),
        "sera/fresh_made": len(fresh.trees),
        "sera/fresh_pairs": int(fresh.kept_F.sum()),
        "sera/fresh_margin_mean": float(fresh.margin_F[fresh.kept_F].mean()) if kept else None,
        "sera/fresh_length_gap": float((length[:, 0] - length[:, 1])[fresh.kept_F].mean()) if kept else None,
        **({"sera/fresh_gamma_mean": float(fresh.gamma_F[fresh.kept_F].mean())} if explored and kept else {}),
        **_of_fresh_gold(fresh.kept_F, gold_F2),
        **({} if made.ranked.kl is None else {"gen/kl": made.ranked.kl}),
        **made.ranked.told,
    }


def _of_fresh_gold(kept_F: np.ndarray, gold_F2: np.ndarray | None) -> dict[str, Any]:
    """Whether evaluate.function agrees with the fresh pairs that are trained on; equal values count half."""
    if gold_F2 is None:
        return {}
    gap_F = gold_F2[:, 0].astype(np.float64) - gold_F2[:, 1]
    return {
        "sera/fresh_gold_accuracy": _over((np.sign(gap_F) + 1) / 2, kept_F),
        "sera/fresh_gold_gap": _over(gap_F, kept_F),
    }


def _of_evaluation(world: World, live: Live) -> dict[str, Any]:
    """Responses to the evaluation prompts against those of iterate 0, judged as `fresh.responses_judged` does."""
    prompts = world.given.eval_prompts
    if not prompts:
        return {}
    before = Live(Name("iterate", 0), None)
    told = {}
    for who in (before, live):
        said = _responses(world, who)
        label = f"judging {who.name.kind} {who.name.t}"
        told[who.name] = (said, responses_judged(world, prompts, said, label))
    said, reward_P = told[live.name]
    start_reward_P = told[before.name][1]
    wins = winrate.win_rate(reward_P, start_reward_P, seed=world.config.run.seed)
    texts = winrate.texts([t[0] for t in said.texts_PC], rewards.lengths(said)[:, 0], said.finished_PC[:, 0])
    logp_P, start_P = (candidate_logps(world, who.name, said, live)[:, 0] for who in (live, before))
    columns = {
        "id": said.ids,
        "response": [t[0] for t in said.texts_PC],
        "reward": reward_P,
        "reward_start": start_reward_P,
        "length": rewards.lengths(said)[:, 0],
        "finished": said.finished_PC[:, 0],
        "logp": logp_P,
        "logp_start": start_P,
    }
    _write_table(columns, world.run.path / "evaluation" / f"{policies.folder_name(live.name)}.parquet")
    return {
        "eval/win_rate": wins.rate,
        "eval/win_rate_low": wins.low,
        "eval/win_rate_high": wins.high,
        "eval/ties": wins.ties,
        "eval/reward": float(reward_P.mean()),
        "eval/reward_start": float(start_reward_P.mean()),
        "eval/kl": float(np.nanmean(logp_P - start_P)),
        "eval/nll_start": float(np.nansum(-start_P) / max(rewards.lengths(said).sum(), 1)),
        "eval/length": texts.length,
        "eval/finished": texts.finished,
        "eval/distinct_2": texts.distinct_2,
    }


def _responses(world: World, live: Live) -> Candidates:
    """One response to each evaluation prompt, kept in evaluation/."""
    config = world.config
    return responses(
        world,
        live,
        world.given.eval_prompts,
        world.given.eval_tokens,
        use="evaluate",
        t=0,
        candidates=1,
        values=config.evaluate,
        path=world.run.path / "evaluation" / f"{policies.folder_name(live.name)}.jsonl",
        label=f"evaluation: responses of {live.name.kind} {live.name.t}",
    )


def write_summary(world: World, t: int, summary: dict[str, Any]) -> None:
    """iterations/t/summary.json."""
    text = json.dumps(summary, indent=1)
    _write(worlds.folder(world, t) / "summary.json", lambda beside: beside.write_text(text, encoding="utf-8"))


def read_summaries(world: World, count: int) -> list[dict[str, Any]]:
    """Those of the first iterations, as an earlier process left them."""
    return processes.once(
        lambda: [json.loads((worlds.folder(world, t) / "summary.json").read_text()) for t in range(1, count + 1)]
    )


# --- the end ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "iteration": "iteration",
    "pairs/kept": "kept",
    "sera/fresh_pairs": "fresh",
    "sera/margin_q50": "margin, median",
    "sera/accuracy": "accuracy",
    "validation/accuracy": "held out",
    "reward": "reward",
    "gen/length": "length",
    "gen/kl": "KL",
    "eval/win_rate": "win rate",
    "eval/win_rate_low": "from",
    "eval/win_rate_high": "to",
}


def finish(world: World, live: Live, summaries: list[dict]) -> pathlib.Path:
    """Exports the last iterate, or the best point, as a Hugging Face folder, writes the report, says where they lie."""
    config, where = world.config, world.policies
    used = {key: name for key, name in COLUMNS.items() if any(key in s for s in summaries)}
    if summaries:
        metrics.table("the run", list(used.values()), [[s.get(key) for key in used] for s in summaries])
    name, behind = live.name, ""
    if config.loop.best and summaries:
        name, update = validate.best(world, summaries)
        behind = f" behind update {update}" if name.kind == "best" else ""
    t = name.t
    params = live.params if name == live.name else policies.params(where, name)
    told = {key: value for key, value in (summaries[t - 1] if t else {}).items() if not key.startswith("perf/")}
    if name.kind == "best":  # what the iteration's end says of its policy is not said of this one
        told = {key: v for key, v in told.items() if not key.startswith(("eval/", "validation/", "watch/", "warnings"))}
        told |= {"validation/best": summaries[t - 1]["validation/best"]} | _of_evaluation(world, Live(name, params))
    asked = config.on_policy
    how = f"loss {config.loss.name}, β {config.loss.beta}"
    if worlds.on_policy(config):
        how = f"{asked.algorithm} (advantage {asked.advantage}, β {asked.beta}), ranked by {config.reward.source}"
    facts = [
        f"Trained with sera_jax from `{config.model.path}`: iterate {t} of {config.loop.iterations}{behind}, {how}.",
        *(f"- {key}: {value}" for key, value in told.items()),
    ]
    export, given = world.run.path / "export", {"source": config.model.path, "dtype": jnp.float32, "card": facts}
    if config.lora.rank and config.lora.export == "adapter":
        hf.save_adapter(export, where.arch, policies.trained(where, params), **given)
    elif config.lora.rank:
        base = dataclasses.replace(where.arch, lora=None)
        hf.save(export, base, programs.to_merged(where.arch, where.mesh)(params), **given)
    else:
        hf.save(export, where.arch, params, **given)
    if config.data.chat_template != "auto":  # who chats with the model needs the template that it was aligned with
        template = pathlib.Path(config.data.chat_template).expanduser()
        _write(export / "chat_template.jinja", lambda beside: shutil.copyfile(template, beside))
    page = processes.once(lambda: str(report.build(world.run.path)))
    result = {"exported": policies.folder_name(name), "iteration": t, "iterations": len(summaries)}
    text = json.dumps(result) + "\n"
    _write(world.run.path / "result.json", lambda beside: beside.write_text(text, encoding="utf-8"))
    metrics.say(f"exported iterate {t}{behind}: {export}")
    metrics.say(f"report: {page}")
    return export
