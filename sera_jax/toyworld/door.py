"""The command line: writes a world; turns candidates of a model into labelled pairs."""

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from sera_jax import config as configs
from sera_jax.config import ConfigError
from sera_jax.toyworld.authors import STRANGER, Author, compose, write_prompts
from sera_jax.toyworld.facts import EMPHASES, EMPHASIS, gold, hashed
from sera_jax.toyworld.folder import HEAD_DIM, model_config, parameter_count, write_model
from sera_jax.toyworld.labels import Annotator, annotate


@dataclasses.dataclass(frozen=True)
class ToyworldConfig:
    """`python -m sera_jax.toyworld`: writes a world, or with --label turns candidates into labelled pairs.

    Args:
        out: folder to write the world into; with --label the pair file (.jsonl).
        label: JSONL of candidates that `sera_jax.generate` wrote for prompts of this world; empty = write a world.
        pair_rule: of --label: the best against the worst candidate, or two random ones.
        unfinished: of --label: leave candidates out that did not end, or keep them.
        coverage: of --label: what is better than this quantile of the model's candidates takes no part; 1 = all does.
        off_policy: of --label: share of the prompts whose candidates are written by a stranger instead: an author with
            a manner and errors that the model does not have.
        limit: of --label: the first n pairs (0 = all).
        seed: of everything that is drawn.
        prompts: training prompts.
        tuning_prompts: prompts to fix hyperparameters on. No prompt of a split asks for what one of another asks for.
        eval_prompts: prompts to evaluate on.
        sft: demonstrations by the author, spread evenly over the training prompts.
        pairs: preference pairs between two responses of the author, spread likewise.
        knowledge: share of the facts that the author mostly gets right.
        filler: filler phrases in a response of the author, on average.
        flip: probability that a label is exchanged.
        gap_flip: probability that the label of a pair of equal gold is exchanged; e times less for each 0.25 of gap.
        temperature: of Bradley-Terry labels, in units of gold; 0 = hard labels.
        cue: how length misleads: additive = each word seems worth something; near_tie = gold is seen in steps, and on
            one step the longer wins; lazy = a share of the labels goes by length alone.
        cue_strength: gold that ten words seem worth, height of a step, or the share; 0 = no cue.
        layers: of the model.
        width: of the model, a multiple of 24.
    """

    out: str
    label: str = ""
    pair_rule: Literal["best_worst", "random"] = "best_worst"
    unfinished: Literal["drop", "keep"] = "drop"
    coverage: float = 1.0
    off_policy: float = 0.0
    limit: int = 0
    seed: int = 0
    prompts: int = 4000
    tuning_prompts: int = 512
    eval_prompts: int = 1024
    sft: int = 8000
    pairs: int = 0
    knowledge: float = 0.55
    filler: float = 3.0
    flip: float = 0.0
    gap_flip: float = 0.0
    temperature: float = 0.0
    cue: Literal["additive", "near_tie", "lazy"] = "additive"
    cue_strength: float = 0.0
    layers: int = 3
    width: int = 96


MOST_PROMPTS = 50_000  # well below the number of distinct prompts, so that drawing new ones stays quick

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: v >= 0, "0 or more"),
    "prompts": (lambda v: 1 <= v <= MOST_PROMPTS, f"1 to {MOST_PROMPTS}"),
    "tuning_prompts": (lambda v: 1 <= v <= MOST_PROMPTS, f"1 to {MOST_PROMPTS}"),
    "eval_prompts": (lambda v: 1 <= v <= MOST_PROMPTS, f"1 to {MOST_PROMPTS}"),
    "sft": (lambda v: v >= 0, "0 or more"),
    "pairs": (lambda v: v >= 0, "0 or more"),
    "knowledge": (lambda v: 0 <= v <= 1, "a share between 0 and 1"),
    "filler": (lambda v: 0 <= v <= 20, "0 to 20 phrases"),
    "coverage": (lambda v: 0 < v <= 1, "a share above 0 and up to 1"),
    "off_policy": (lambda v: 0 <= v <= 1, "a share between 0 and 1"),
    "limit": (lambda v: v >= 0, "0 or more"),
    "gap_flip": (lambda v: 0 <= v <= 1, "a probability between 0 and 1"),
    "cue_strength": (lambda v: v >= 0, "a number >= 0"),
    "flip": (lambda v: 0 <= v <= 1, "a probability between 0 and 1"),
    "temperature": (lambda v: v >= 0, "a number >= 0"),
    "layers": (lambda v: v >= 1, "at least 1"),
    "width": (lambda v: v >= HEAD_DIM and v % HEAD_DIM == 0, f"a multiple of {HEAD_DIM}"),
}


def check(config: ToyworldConfig) -> None:
    """Raises ConfigError for the first value out of range."""
    for key, (test, expected) in _RANGES.items():
        value = getattr(config, key)
        if not test(value):
            raise ConfigError(f"toyworld: {key} is {value!r}, expected {expected}.")
    if config.cue == "lazy" and config.cue_strength > 1:
        raise ConfigError(f"toyworld: cue_strength is {config.cue_strength!r}, expected a share up to 1 with cue lazy.")


def rng(seed: int, stream: str) -> np.random.Generator:
    """Each stream of draws has its own generator: more demonstrations change no pair."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, hashed(stream)))))


def write_world(config: ToyworldConfig) -> dict[str, list[dict]]:
    """Writes the folder; returns the rows of its JSONL files by name."""
    check(config)
    sizes = config.prompts, config.tuning_prompts, config.eval_prompts
    prompts = write_prompts(rng(config.seed, "prompts"), sum(sizes))
    train, tuning, evaluation = (prompts[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3))
    author = Author(knowledge=config.knowledge, filler=config.filler)
    annotator = _annotator(config)

    draw = rng(config.seed, "sft")
    sft = [{"prompt": p, "completion": compose(draw, p, author)} for p in _spread(draw, train, config.sft)]

    draw, labels = rng(config.seed, "pairs"), rng(config.seed, "labels")
    pairs = []
    for i, prompt in enumerate(_spread(draw, train, config.pairs)):
        two = _distinct(draw, prompt, author)
        pairs.append({"id": f"pair-{i}", **annotate(labels, prompt, two, annotator), "author": "grammar"})

    rows = {
        "sft": sft,
        "pairs": pairs,
        "prompts": [{"id": f"train-{i}", "prompt": p} for i, p in enumerate(train)],
        "tuning_prompts": [{"id": f"tuning-{i}", "prompt": p} for i, p in enumerate(tuning)],
        "eval_prompts": [{"id": f"eval-{i}", "prompt": p} for i, p in enumerate(evaluation)],
    }
    folder = pathlib.Path(config.out)
    write_model(folder / "model", config.layers, config.width)
    for name, content in rows.items():
        _write_jsonl(folder / f"{name}.jsonl", content)
    return rows


def label_candidates(config: ToyworldConfig) -> tuple[list[dict], collections.Counter]:
    """Writes the pair file; returns its rows and how many prompts gave none, by reason.

    Raises:
        ValueError: the candidate file is missing or a line of it cannot be used; names file and line.
    """
    check(config)
    annotator, labels = _annotator(config), rng(config.seed, "labels of candidates")
    strangers = rng(config.seed, "stranger")
    sets = [_golds(where, row, config) for where, row in _read_candidates(pathlib.Path(config.label))]
    every = np.array([reward for _, told in sets for reward in told.values()])
    ceiling = np.quantile(every, config.coverage) if every.size and config.coverage < 1 else np.inf
    rows, left_out = [], collections.Counter()
    for row, told in sets:
        author, stranger = "candidates", _own(strangers)
        if stranger.random() < config.off_policy:
            texts = [compose(stranger, row["prompt"], STRANGER) for _ in row["responses"]]
            author, told = "stranger", {text: gold(row["prompt"], text) for text in texts}
        noise = _own(labels)
        texts = [text for text, reward in told.items() if reward <= ceiling and _within(text)]
        if len(texts) < 2:
            left_out["fewer than two different usable responses"] += 1
            continue
        pair = annotate(noise, row["prompt"], texts, annotator, config.pair_rule)
        if pair["gold_chosen"] == pair["gold_rejected"]:
            left_out["equal gold rewards"] += 1
            continue
        rows.append({"id": str(row.get("id", f"pair-{len(rows)}")), **pair, "author": author})
        if len(rows) == config.limit:
            break
    _write_jsonl(pathlib.Path(config.out), rows)
    return rows, left_out


def _golds(where: str, row: dict, config: ToyworldConfig) -> tuple[dict, dict[str, float]]:
    """A row, and the gold rewards of its usable responses, each once."""
    done = row.get("finished") or [True] * len(row["responses"])
    texts = [t for t, end in zip(row["responses"], done) if t.strip() and (end or config.unfinished == "keep")]
    try:
        return row, {text: gold(row["prompt"], text) for text in texts}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _own(stream: np.random.Generator) -> np.random.Generator:
    """A generator for one row, so that what one row draws moves no other."""
    return np.random.Generator(np.random.Philox(stream.integers(2**63)))


def _within(text: str) -> bool:
    """Inside the support of the given pairs: no more emphases than are good."""
    return text.split().count(EMPHASIS) <= EMPHASES


def _read_candidates(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    if not path.is_file():
        raise ValueError(f"toyworld: label is {str(path)!r}, expected a JSONL file that sera_jax.generate wrote.")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: got no JSON ({error}), expected one object a line.") from None
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not _texts(row.get("responses")):
                raise ValueError(
                    f'{where}: got {line.strip()[:80]!r}, expected {{"prompt": text, "responses": [text, ...]}} as '
                    "sera_jax.generate writes it."
                )
            if row.get("finished") and len(row["finished"]) != len(row["responses"]):
                raise ValueError(
                    f"{where}: got {len(row['finished'])} entries in finished for {len(row['responses'])} responses, "
                    "expected one each."
                )
            yield where, row


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _annotator(config: ToyworldConfig) -> Annotator:
    return Annotator(
        flip=config.flip,
        gap_flip=config.gap_flip,
        temperature=config.temperature,
        cue=config.cue,
        cue_strength=config.cue_strength,
    )


def _spread(draw: np.random.Generator, prompts: Sequence[str], count: int) -> Iterator[str]:
    """`count` prompts, each used equally often up to one, in a new random order every round."""
    done = 0
    while done < count:
        for i in draw.permutation(len(prompts))[: count - done]:
            yield prompts[i]
        done += min(len(prompts), count - done)


def _distinct(draw: np.random.Generator, prompt: str, author: Author) -> tuple[str, str]:
    """Two responses that differ in gold: a tie has no label."""
    first = compose(draw, prompt, author)
    while True:
        second = compose(draw, prompt, author)
        if gold(prompt, first) != gold(prompt, second):
            return first, second


def _write_jsonl(path: pathlib.Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def tie_share(seed: int, prompts: Sequence[str], author: Author) -> float:
    """Share of prompts whose two independent responses have the same gold reward."""
    draw = rng(seed, "ties")
    return float(np.mean([gold(p, compose(draw, p, author)) == gold(p, compose(draw, p, author)) for p in prompts]))


def describe_pairs(rows: Sequence[dict]) -> list[str]:
    """What is in a pair file, for people."""
    if not rows:
        return ["pairs         none"]
    chosen, rejected = (np.array([r[f"gold_{k}"] for r in rows]) for k in ("chosen", "rejected"))
    words = {k: np.array([len(r[k].split()) for r in rows]) for k in ("chosen", "rejected")}
    agree = np.mean(chosen > rejected)
    share = {k: np.mean([r[k] for r in rows]) for k in ("flipped", "upset", "cued")}
    return [
        f"pairs         {len(rows)}; gold of chosen {chosen.mean():.3f}, of rejected {rejected.mean():.3f}",
        f"              labels right (Bayes accuracy) {agree:.1%}; flipped {share['flipped']:.1%}, "
        f"upset by sampling {share['upset']:.1%}, by the length cue {share['cued']:.1%}",
        "              written by "
        + ", ".join(f"{who}: {n}" for who, n in collections.Counter(r["author"] for r in rows).items()),
        f"              words: chosen {words['chosen'].mean():.1f}, rejected {words['rejected'].mean():.1f}; the "
        f"longer one is chosen in {np.mean(words['chosen'] > words['rejected']):.1%}",
    ]


def describe_world(config: ToyworldConfig, rows: dict[str, list[dict]]) -> list[str]:
    """What is in a world, for people."""
    sft, pairs = rows["sft"], rows["pairs"]
    splits = [rows[k] for k in ("prompts", "tuning_prompts", "eval_prompts")]
    asks = [len(r["prompt"].split()) for split in splits for r in split]
    model = model_config(config.layers, config.width)
    author = Author(knowledge=config.knowledge, filler=config.filler)
    ties = tie_share(config.seed, [r["prompt"] for r in rows["prompts"]], author)
    out = [
        f"model         {parameter_count(model):,} parameters (no weights yet), {model['vocab_size']} words",
        "prompts       {} to train, {} to tune, {} to evaluate, ".format(*map(len, splits))
        + f"{min(asks)}-{max(asks)} words",
    ]
    if sft:
        reward = np.array([gold(r["prompt"], r["completion"]) for r in sft])
        words = np.array([len(r["completion"].split()) for r in sft])
        low, middle, high = np.quantile(reward, (0.1, 0.5, 0.9))
        out += [
            f"sft           {len(sft)} responses, {words.min()}-{words.max()} words, mean {words.mean():.1f}",
            f"              gold {reward.mean():.3f} on average, deviation {reward.std():.3f}, quantiles 10/50/90 % "
            f"{low:.2f} {middle:.2f} {high:.2f}; 1 = perfect, 0 = says nothing",
            f"              two responses of the author to a prompt tie in {ties:.1%}",
        ]
    out += describe_pairs(pairs)
    for row in pairs[:2]:
        out += [f"example       {row['prompt']}"]
        out += [f"  {k:<11} {row[f'gold_{k}']:6.3f}  {row[k]}" for k in ("chosen", "rejected")]
    return out


def main(args: list[str] | None = None) -> None:
    """The door."""
    try:
        config = configs.parse(ToyworldConfig, args)
        if config.label:
            rows, left_out = label_candidates(config)
            lines = describe_pairs(rows) + [f"left out      {n} prompts: {reason}" for reason, n in left_out.items()]
        else:
            lines = describe_world(config, write_world(config))
    except ValueError as error:
        sys.exit(str(error))
    print("\n".join((*lines, f"written       {config.out}")))
