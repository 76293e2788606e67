"""Which pairs of a preference file are mislabelled or uninformative? An aligned policy is asked.

    python -m sera_jax.review --policy runs/x/export --reference FOLDER --data.pairs '[pairs.jsonl]' --out review/

OUT gets review.parquet (every pair in the given order: margin, score, kept, rank, flag), kept.jsonl (the kept pairs, in
the form that `data.pairs` reads), report.html, and ledger/, with which a repetition under another rule scores nothing
again. The margin is the loss's implicit reward of the chosen response minus that of the rejected one.

Flags of a pair, joined by commas:
    doubted        margin < 0: the policy prefers the rejected response
    uninformative  |margin| below a share of the median |margin|: next to nothing is left to learn, or noise
    cut            a response was cut to the maximal length, so that the margin is that of a part
    long           the longer response has many times the tokens that are usual in the file
    unscored       the pair could not be tokenised (the reasons are printed): no margin, never kept
"""

import collections
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from jax.sharding import Mesh

from sera_jax import config as configs
from sera_jax import data, losses, metrics, policies, processes, programs, report, score, selection, sera
from sera_jax import mesh as meshes
from sera_jax.config import ConfigError, ReviewConfig
from sera_jax.ledger import Ledger
from sera_jax.losses import Loss
from sera_jax.policies import Folder
from sera_jax.records import Pair, Tree
from sera_jax.selection import Selection

FLAGS = ("doubted", "uninformative", "cut", "long", "unscored")
ALL = "all"  # of the tables
DOUBTFUL_SHOWN = 5
TEXT_SHOWN = 60  # characters of a text on the screen


def main(args: list[str] | None = None) -> None:
    """Reads the config and reviews; an error of the user's ends with one line."""
    try:
        programs.compilation_cache()
        config = configs.parse(ReviewConfig, args)
        processes.join(config.mesh.distributed)
        review(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


def review(config: ReviewConfig) -> pathlib.Path:
    """Scores and selects the pairs, writes and prints what was found.

    Returns:
        the folder `config.out`.

    Raises:
        ValueError: of config, files or data; policy and reference are the same model; a score is not finite.
    """
    if not config.data.pairs:
        raise ConfigError("data.pairs is empty, expected at least one file of preference pairs.")
    if config.loss.reference not in ("initial", "none"):
        raise ConfigError(
            f"loss.reference is {config.loss.reference!r}, expected 'initial' (the folder `reference`) or 'none': "
            "a review knows no iterations."
        )
    with programs.precision(config.compute):
        mesh = meshes.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
        loss = losses.mixture({config.loss.name: 1.0, **config.loss.mix}, config.loss.sft_weight, config.loss.optimism)
        policy, reference, pairs, trees = processes.agreed(
            lambda: _opened(config, loss, mesh),
            lambda found: configs.dump(config) + repr([model and model.tag for model in found[:2]]) + repr(found[2:]),
            "config, models and pairs",
        )
        chosen = _select(config, policy, reference, loss, pairs, trees)
    flags = _flags(config, pairs, trees, chosen, policy.eos_ids)
    columns = {**selection.columns(pairs, trees, chosen), "flag": [",".join(names) for names in flags]}
    summary = _summary(pairs, columns, flags)
    out = pathlib.Path(config.out)
    processes.once(lambda: _write(config, out, pairs, trees, chosen, columns, summary))
    _show(config, columns, summary)
    metrics.say(f"{out}: review.parquet, kept.jsonl ({summary['pairs/kept']} pairs), report.html")
    return out


def _models(config: ReviewConfig, loss: Loss, mesh: Mesh) -> tuple[Folder, Folder | None]:
    """The policy, and the reference where the loss has one."""
    template = config.data.chat_template
    policy = policies.open_folder(config.policy, mesh, compute=config.compute, chat_template=template)
    if not loss.reference or config.loss.reference != "initial":
        return policy, None
    reference = policies.open_folder(config.reference, mesh, compute=config.compute, chat_template=template)
    sera.check_references(policy.tag, reference.tag, "reference")
    if not policies.same_tokens(policy, reference):
        raise ValueError(
            f"reference: the tokeniser of {config.reference} differs from that of {config.policy}, expected the same "
            "vocabulary and EOS ids. Give the model that the policy was trained from."
        )
    return policy, reference


def _opened(config: ReviewConfig, loss: Loss, mesh: Mesh) -> tuple[Folder, Folder | None, list[Pair], list[Tree]]:
    policy, reference = _models(config, loss, mesh)
    return policy, reference, *_read(config, policy)


def _read(config: ReviewConfig, policy: Folder) -> tuple[list[Pair], list[Tree]]:
    """All pairs, and the trees of those that can be tokenised."""
    progress = lambda items, total, label: metrics.track(items, total=total, label=label, unit="rows")
    given = config.data
    pairs, told = data.load_pairs(
        given.pairs,
        format=given.format,
        split=given.split,
        subset=given.subset,
        ranked=given.ranked,
        limit=given.limit,
        progress=progress,
    )
    trees, counts = data.tokenise_pairs(
        pairs,
        policy.tokenizer,
        policy.eos_ids,
        max_length=given.max_length,
        max_prompt_length=given.max_prompt_length,
        truncation=given.truncation,
        progress=progress,
    )
    for line in (*told.lines(), *counts.lines()):
        metrics.say(line)
    return pairs, trees


def _select(
    config: ReviewConfig, policy: Folder, reference: Folder | None, loss: Loss, pairs: list[Pair], trees: list[Tree]
) -> Selection:
    """score → margins → select, through the ledger."""
    mesh, plan = policy.mesh, score.plan_for(trees, policy.arch, policy.mesh)
    ledger = Ledger(pathlib.Path(config.out) / "ledger")

    def logp_N2(name: str, folder: Folder) -> np.ndarray:
        label = f"scoring the pairs under the {name}"
        flat = policies.folder_logps(folder, trees, ledger=ledger, plan=plan, label=label)
        return flat.reshape(-1, 2)

    reference_N2 = np.zeros((len(trees), 2), np.float32) if reference is None else logp_N2("reference", reference)
    loss_keys = {"beta": config.loss.beta, **{key: getattr(config.loss, key) for key in loss.keys}}
    by_id = {pair.id: pair for pair in pairs}
    return selection.select(
        [by_id[tree.id] for tree in trees],
        trees,
        logp_EN2=logp_N2("policy", policy)[None],
        weights_E=np.ones(1, np.float32),
        reward_reference_N2=reference_N2,
        loss_reference_N2=reference_N2,
        selector=programs.selector(
            mesh,
            loss,
            loss_keys,
            score_name=config.select.score,
            rule=config.select.rule,
            threshold=config.select.threshold,
        ),
        mesh=mesh,
        key=jax.random.key(0),
        keep=config.select.keep,
        stratify=config.select.stratify,
        what=f"score {config.select.score}",
    )


def _flags(
    config: ReviewConfig, pairs: Sequence[Pair], trees: Sequence[Tree], chosen: Selection, eos_ids: Sequence[int]
) -> list[tuple[str, ...]]:
    """The flags of every pair, in the order of FLAGS."""
    size_N = np.abs(chosen.margin_N)
    longest_N = np.array([max(map(len, tree.branches)) for tree in trees])
    told = {
        "doubted": chosen.margin_N < 0,
        "uninformative": size_N <= config.uninformative * np.median(size_N),
        "cut": np.array([any(b[-1] not in eos_ids for b in tree.branches) for tree in trees]),
        "long": longest_N > config.long * np.median(longest_N),
    }
    scored = {tree.id: tuple(name for name in told if told[name][i]) for i, tree in enumerate(trees)}
    return [scored.get(pair.id, ("unscored",)) for pair in pairs]


def _summary(pairs: Sequence[Pair], columns: dict[str, Any], flags: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Numbers for the screen and the report.

    accuracy: share of scored pairs with margin > 0; longer: share whose chosen response is the longer one (ties count
    half), the baseline that any accuracy has to be held against.
    """
    margin_N = columns["margin"]
    scored_N = np.isfinite(margin_N)
    counts = collections.Counter(name for names in flags for name in names)
    summary: dict[str, Any] = {"pairs/given": len(pairs), "pairs/kept": int(columns["kept"].sum())}
    summary |= {f"flag/{name}": counts[name] for name in FLAGS}
    quantiles = np.quantile(margin_N[scored_N], [0.05, 0.1, 0.5, 0.9, 0.95])
    summary |= {f"margin/q{q}": float(v) for q, v in zip(("05", "10", "50", "90", "95"), quantiles)}
    longer_N = (np.sign(columns["length_chosen"] - columns["length_rejected"]) + 1) / 2
    source_N = np.array(columns["source"])
    for source in (*dict.fromkeys(columns["source"]), ALL):
        of_source = scored_N & ((source_N == source) | (source is ALL))
        if of_source.any():
            summary[f"scored/{source}"] = int(of_source.sum())
            summary[f"accuracy/{source}"] = float((margin_N[of_source] > 0).mean())
            summary[f"longer/{source}"] = float(longer_N[of_source].mean())
    return summary


def _show(config: ReviewConfig, columns: dict[str, Any], summary: dict[str, Any]) -> None:
    n = summary["pairs/given"]
    counts = [["all", n, 1.0], ["kept", summary["pairs/kept"], summary["pairs/kept"] / n]]
    counts += [[name, summary[f"flag/{name}"], summary[f"flag/{name}"] / n] for name in FLAGS]
    metrics.table("pairs by flag", ["", "pairs", "share"], counts)
    quantiles = [key for key in summary if key.startswith("margin/")]
    metrics.table(
        f"margins of {config.loss.name}, β {config.loss.beta}",
        [f"{int(key.removeprefix('margin/q'))} %" for key in quantiles],
        [[summary[key] for key in quantiles]],
    )
    sources = [key.removeprefix("scored/") for key in summary if key.startswith("scored/")]
    metrics.table(
        "accuracy: share of margins > 0; beside it, how often the longer response is the chosen one",
        ["source", "scored pairs", "accuracy", "±", "longer"],
        [
            [source, n, accuracy, 1.96 * (accuracy * (1 - accuracy) / n) ** 0.5, summary[f"longer/{source}"]]
            for source in sources
            for n, accuracy in ((summary[f"scored/{source}"], summary[f"accuracy/{source}"]),)
        ],
    )
    scored = summary[f"scored/{ALL}"]
    worst = np.argsort(columns["margin"], kind="stable")[: min(DOUBTFUL_SHOWN, scored)]  # NaN goes last
    metrics.table(
        "the most doubtful pairs",
        ["id", "margin", "prompt", "chosen", "rejected"],
        [
            [
                columns["id"][i],
                float(columns["margin"][i]),
                *(_short(columns[key][i]) for key in ("prompt", "chosen", "rejected")),
            ]
            for i in worst
        ],
    )


def _short(text: str) -> str:
    """One line; of a long text both ends."""
    text, half = " ".join(text.split()), TEXT_SHOWN // 2
    return text if len(text) <= TEXT_SHOWN else f"{text[: half - 1]} … {text[-half + 2 :]}"


# --- files ------------------------------------------------------------------------------------------------------------


def _write(
    config: ReviewConfig,
    out: pathlib.Path,
    pairs: Sequence[Pair],
    trees: Sequence[Tree],
    chosen: Selection,
    columns: dict[str, Any],
    summary: dict[str, Any],
) -> None:
    """review.parquet, kept.jsonl and report.html, each complete or not there."""
    out.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        # The report reads run folders; a review looks like one of a single iteration.
        run = pathlib.Path(scratch) / out.resolve().name
        iteration = run / "iterations" / "1"
        iteration.mkdir(parents=True)
        pyarrow.parquet.write_table(table, iteration / "kept.parquet")
        (iteration / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        (run / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
        kept = run / "kept.jsonl"
        with open(kept, "w", encoding="utf-8", errors="surrogatepass") as file:
            for row in kept_rows(pairs, trees, chosen, config.select.unselected):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(report.build(run), out / "report.html")
        os.replace(iteration / "kept.parquet", out / "review.parquet")
        os.replace(kept, out / "kept.jsonl")


def kept_rows(pairs: Sequence[Pair], trees: Sequence[Tree], chosen: Selection, unselected: str) -> list[dict[str, Any]]:
    """The pairs to train on, as `data.load_pairs` reads them, in the given order.

    Args:
        trees: of the scored pairs, which `chosen` is about. unselected: drop, relabel or soft_weight (SelectConfig).
    """
    by_id = {pair.id: pair for pair in pairs}
    scored = [by_id[tree.id] for tree in trees]
    if unselected == "drop":
        scored = [pair for pair, kept in zip(scored, chosen.mask_N) if kept]
    elif unselected == "relabel":
        scored = [pair if kept else _swapped(pair) for pair, kept in zip(scored, chosen.mask_N)]
    else:
        weight_N = np.asarray(sera.soft_weight(chosen.score_N), np.float64)
        scored = [dataclasses.replace(pair, weight=pair.weight * w) for pair, w in zip(scored, weight_N.tolist())]
    return [_row(pair) for pair in scored]


def _swapped(pair: Pair) -> Pair:
    """The pair with its label exchanged."""
    scores = None if pair.scores is None else pair.scores[::-1]
    gold = None if pair.truth.gold is None else pair.truth.gold[::-1]
    flipped = None if pair.truth.flipped is None else not pair.truth.flipped
    truth = dataclasses.replace(pair.truth, gold=gold, flipped=flipped)
    return dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen, scores=scores, truth=truth)


def _row(pair: Pair) -> dict[str, Any]:
    plain = lambda text: text if isinstance(text, str) else list(text)
    row = {"id": pair.id} | {key: plain(getattr(pair, key)) for key in ("prompt", "chosen", "rejected")}
    if pair.scores is not None:
        row |= {"score_chosen": pair.scores[0], "score_rejected": pair.scores[1]}
    if pair.weight != 1:
        row["weight"] = pair.weight
    row |= {key: values[0] for key, values in selection.truths([pair]).items()}
    return row | ({"source": pair.source} if pair.source else {})


if __name__ == "__main__":
    main()
