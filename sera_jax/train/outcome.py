"""What an iteration leaves: its pairs as files, its policy evaluated, a summary; and, at the end, export and report."""

import json
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet

from sera_jax import bootstrap, hf, metrics, policies, report, rewards, selection, winrate
from sera_jax.policies import Live, Name
from sera_jax.records import Candidates
from sera_jax.selection import Selection
from sera_jax.train import world as worlds
from sera_jax.train.fresh import Made, candidate_logps, sampler
from sera_jax.train.select import pair_logps
from sera_jax.train.world import World


def write_pairs(world: World, t: int, chosen: Selection | None, made: Made | None) -> None:
    """iterations/t/kept.parquet (every given pair with its verdict) and fresh.parquet (every fresh pair)."""
    folder = worlds.folder(world, t)
    folder.mkdir(parents=True, exist_ok=True)
    if chosen is not None:
        columns = selection.columns(world.given.pairs, world.given.trees, chosen)
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "kept.parquet")
    if made is not None:
        candidates, fresh = made.candidates, made.fresh
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
            "length_chosen": [len(tree.branches[0]) for tree in fresh.trees],
            "length_rejected": [len(tree.branches[1]) for tree in fresh.trees],
            "finished_chosen": [bool(candidates.finished_PC[p, c]) for p, c, _ in picks],
            "finished_rejected": [bool(candidates.finished_PC[p, r]) for p, _, r in picks],
            "kept": fresh.kept_F,
            "prompt_tokens": [tree.prompt for tree in fresh.trees],
            "chosen_tokens": [tree.branches[0] for tree in fresh.trees],
            "rejected_tokens": [tree.branches[1] for tree in fresh.trees],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "fresh.parquet")


# --- the summary of an iteration --------------------------------------------------------------------------------------


def summarise(
    world: World, t: int, live: Live, chosen: Selection | None, made: Made | None, trained: int
) -> dict[str, Any]:
    """What iteration t did and what became of the policy; also written to metrics.jsonl and shown as a table."""
    summary: dict[str, Any] = {"iteration": t, "pairs/given": len(world.given.trees), "pairs/trained": trained}
    summary |= _of_selection(world, chosen)
    summary |= _of_candidates(made)
    summary |= _of_held_out(world, live)
    summary |= _of_evaluation(world, live)
    world.run.metrics.write({"stage": "iteration", "step": 0, **summary})
    metrics.table(f"iteration {t}", ["measure", "value"], [[k, v] for k, v in summary.items() if k != "iteration"])
    return summary


def _of_selection(world: World, chosen: Selection | None) -> dict[str, Any]:
    """Margins of the given pairs under the policy that scored them, and what was kept."""
    if chosen is None:
        return {}
    lengths_N = np.array([tree.targets for tree in world.given.trees], np.float64)
    quantiles = dict(zip(("10", "50", "90"), np.quantile(chosen.margin_N, [0.1, 0.5, 0.9])))
    kept = chosen.mask_N.any()
    return {
        "pairs/kept": int(chosen.mask_N.sum()),
        "sera/kept_fraction": float(chosen.mask_N.mean()),
        "sera/accuracy": float((chosen.margin_N > 0).mean()),
        "sera/margin_mean": float(chosen.margin_N.mean()),
        **{f"sera/margin_q{q}": float(v) for q, v in quantiles.items()},
        "sera/kept_length_ratio": float(lengths_N[chosen.mask_N].mean() / lengths_N.mean()) if kept else None,
    }


def _of_candidates(made: Made | None) -> dict[str, Any]:
    """What the policy sampled, and the fresh pairs made of it; KL is to the reward's reference."""
    if made is None:
        return {}
    fresh, lengths_PC = made.fresh, rewards.lengths(made.candidates)
    kept = fresh.kept_F.any()
    length = np.array([[len(b) for b in tree.branches] for tree in fresh.trees], np.float64).reshape(-1, 2)
    return {
        "sera/fresh_made": len(fresh.trees),
        "sera/fresh_pairs": int(fresh.kept_F.sum()),
        "sera/fresh_margin_mean": float(fresh.margin_F[fresh.kept_F].mean()) if kept else None,
        "sera/fresh_length_gap": float((length[:, 0] - length[:, 1])[fresh.kept_F].mean()) if kept else None,
        "gen/length": float(lengths_PC.mean()),
        "gen/finished": float(made.candidates.finished_PC.mean()),
        **({} if made.kl is None else {"gen/kl": made.kl}),
    }


def _of_held_out(world: World, live: Live) -> dict[str, Any]:
    """Implicit-reward accuracy on the held-out pairs, against iterate 0."""
    trees = world.given.held_out
    if not trees:
        return {}
    reference = Name("iterate", 0) if world.loss.reference else None
    length_N2 = np.array([[len(b) for b in tree.branches] for tree in trees], np.float32)
    reward_N2 = np.asarray(
        world.loss.reward(
            jnp.asarray(pair_logps(world, live.name, trees, live)),
            jnp.asarray(pair_logps(world, reference, trees, live)),
            jnp.asarray(length_N2),
            **world.loss_keys,
        )
    )
    margin_N = reward_N2[:, 0] - reward_N2[:, 1]
    return {"validation/accuracy": float((margin_N > 0).mean()), "validation/margin": float(margin_N.mean())}


def _of_evaluation(world: World, live: Live) -> dict[str, Any]:
    """Responses to the evaluation prompts against those of iterate 0, judged by the evaluation's function."""
    config, prompts = world.config.evaluate, world.given.eval_prompts
    if not prompts:
        return {}
    function = rewards.load_function(config.function)
    before = Live(Name("iterate", 0), None)
    told = {}
    for who in (before, live):
        responses = _responses(world, who)
        label = f"judging iterate {who.name.t}"
        told[who.name.t] = (
            responses,
            rewards.by_function(function, [p.prompt for p in prompts], responses.texts_PC, label)[:, 0],
        )
    responses, reward_P = told[live.name.t]
    wins = winrate.win_rate(reward_P, told[0][1], seed=world.config.run.seed)
    texts = winrate.texts(
        [t[0] for t in responses.texts_PC], rewards.lengths(responses)[:, 0], responses.finished_PC[:, 0]
    )
    logp_P, start_P = (candidate_logps(world, who.name, responses, live)[:, 0] for who in (live, before))
    return {
        "eval/win_rate": wins.rate,
        "eval/win_rate_low": wins.low,
        "eval/win_rate_high": wins.high,
        "eval/ties": wins.ties,
        "eval/reward": float(reward_P.mean()),
        "eval/reward_start": float(told[0][1].mean()),
        "eval/kl": float(np.nanmean(logp_P - start_P)),
        "eval/nll_start": float(np.nansum(-start_P) / max(rewards.lengths(responses).sum(), 1)),
        "eval/length": texts.length,
        "eval/finished": texts.finished,
        "eval/distinct_2": texts.distinct_2,
    }


def _responses(world: World, live: Live) -> Candidates:
    """One response to each evaluation prompt, kept in evaluation/<t>.jsonl."""
    config = world.config
    return bootstrap.sample_candidates(
        sampler(world, live, worlds.key(world, "evaluate", 0), 1, config.evaluate),
        world.given.eval_prompts,
        world.given.eval_tokens,
        lambda ids: world.policies.start.tokenizer.decode(ids, skip_special_tokens=True),
        candidates=1,
        slots=config.bootstrap.slots,
        path=world.run.path / "evaluation" / f"{live.name.t}.jsonl",
        label=f"evaluation: responses of iterate {live.name.t}",
    )


def write_summary(world: World, t: int, summary: dict[str, Any]) -> None:
    """iterations/t/summary.json."""
    (worlds.folder(world, t) / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


# --- the end ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "iteration": "iteration",
    "pairs/kept": "kept",
    "sera/fresh_pairs": "fresh",
    "sera/margin_q50": "margin, median",
    "sera/accuracy": "accuracy",
    "validation/accuracy": "held out",
    "gen/length": "length",
    "gen/kl": "KL",
    "eval/win_rate": "win rate",
    "eval/win_rate_low": "from",
    "eval/win_rate_high": "to",
}


def finish(world: World, live: Live, summaries: list[dict]) -> pathlib.Path:
    """Exports the last (or the best) iterate as a Hugging Face folder, writes the report, says where they lie."""
    config, where = world.config, world.policies
    used = {key: name for key, name in COLUMNS.items() if any(key in s for s in summaries)}
    if summaries:
        metrics.table("the run", list(used.values()), [[s.get(key) for key in used] for s in summaries])
    t = live.name.t
    if config.loop.best and summaries:
        t = max(summaries, key=lambda s: s["validation/accuracy"])["iteration"]
    params = live.params if t == live.name.t else policies.params(where, Name("iterate", t))
    last = summaries[t - 1] if t else {}
    facts = [
        f"Trained with sera_jax from `{config.model.path}`: iterate {t} of {config.loop.iterations}, "
        f"loss {config.loss.name}, β {config.loss.beta}.",
        *(f"- {key}: {value}" for key, value in last.items() if not key.startswith("perf/")),
    ]
    export = hf.save(
        world.run.path / "export", where.arch, params, source=config.model.path, dtype=jnp.float32, card=facts
    )
    if config.data.chat_template != "auto":  # who chats with the model needs the template that it was aligned with
        shutil.copyfile(pathlib.Path(config.data.chat_template).expanduser(), export / "chat_template.jinja")
    page = report.build(world.run.path)
    metrics.say(f"exported iterate {t}: {export}")
    metrics.say(f"report: {page}")
    return export
