"""Preferences of people: pairs of responses out as JSONL to label, their labels back in as preference pairs.

    python -m sera_jax.annotate export --responses '[said.jsonl]' --questions ask.jsonl
    python -m sera_jax.annotate import --questions ask.jsonl --labels '[ann.jsonl, bob.csv]' --out prefs.jsonl

A question shows two responses, left and right, and tells neither who wrote them nor which one anybody has preferred:
the side is a coin's by seed and content, the id a hash of the content. A question that is exported again has the same
id, so labels of several files come together. Of several annotators each has a vote, and a tie is half a vote for both.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sera_jax import config as configs
from sera_jax import data, disk, metrics, preference
from sera_jax.config import AnnotateConfig, ConfigError
from sera_jax.records import Text

VOTES = {"left": 1.0, "right": 0.0, "tie": 0.5}  # label → vote for the left response
PLACES = 5  # shown of what cannot be used


@dataclasses.dataclass(frozen=True)
class Question:
    """Two different responses to a prompt, as people see them."""

    id: str
    prompt: Text
    left: Text
    right: Text


@dataclasses.dataclass(frozen=True)
class Counts:
    """What could not be used of labels: reason → "file:line" of each; labels: that count, unlabelled: without one;
    contradictory: (question, annotator) whose labels of it differ, none of which counts.
    """

    labels: int
    unlabelled: int
    contradictory: tuple[tuple[str, str], ...]
    dropped: dict[str, list[str]]


def main(args: list[str] | None = None) -> None:
    """Reads the config and exports or imports; an error of the user's ends with one line."""
    args = sys.argv[1:] if args is None else args
    try:
        if not args or args[0] not in DOORS:
            raise ConfigError(f"got {args[:1] or 'nothing'}, expected {' or '.join(DOORS)} as the first word.")
        DOORS[args[0]](configs.parse(AnnotateConfig, args[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")


# --- out --------------------------------------------------------------------------------------------------------------


def export(config: AnnotateConfig) -> pathlib.Path:
    """Writes the questions about responses and pairs.

    Raises:
        ValueError: the file exists; nothing to ask about; a file that cannot be read.
    """
    out = _new(config.questions, "questions")
    if not (config.responses or config.pairs):
        raise ConfigError("responses and pairs are both empty, expected at least one file to ask about.")
    asked = list(itertools.chain(_of_responses(config), _of_pairs(config)))
    found = {question.id: question for question in (_question(config.seed, *one) for one in asked)}
    questions = sorted(found.values(), key=lambda q: _hash(config.seed, "order", q.id))[: config.limit or None]
    if not questions:
        raise ConfigError("there is no prompt with two different responses, expected at least one to ask about.")
    _write(out, ({**dataclasses.asdict(question), "label": ""} for question in questions))
    repeated = len(asked) - len(found)
    metrics.say(f"{out}: {len(questions)} questions" + (f", {repeated} more were repetitions" if repeated else ""))
    return out


def _of_responses(config: AnnotateConfig) -> Iterator[tuple[Text, Text, Text]]:
    """Pairs out of each prompt's responses: finished ones that are not empty, each text once."""
    for path in config.responses:
        for row in data.load_responses(path, scored=False):
            kept = [t for t, ended in zip(row.texts, row.finished) if ended or config.unfinished == "keep"]
            texts = sorted({text for text in kept if text.strip()})
            pairs = list(itertools.combinations(texts, 2))
            if config.per_prompt:
                pairs.sort(key=lambda pair: _hash(config.seed, "draw", _id(row.prompt, *pair)))
                pairs = pairs[: config.per_prompt]
            yield from ((row.prompt, *pair) for pair in pairs)


def _of_pairs(config: AnnotateConfig) -> Iterator[tuple[Text, Text, Text]]:
    if config.pairs:
        pairs, report = data.load_pairs(config.pairs)
        for line in report.lines():
            metrics.say(line)
        yield from ((pair.prompt, pair.chosen, pair.rejected) for pair in pairs if pair.chosen != pair.rejected)


def _question(seed: int, prompt: Text, one: Text, other: Text) -> Question:
    """The same question whichever of the two comes first."""
    name = _id(prompt, one, other)
    sides = sorted((one, other), key=_text)
    left = _hash(seed, "side", name)[0] & 1
    return Question(name, prompt, sides[left], sides[1 - left])


def _id(prompt: Text, one: Text, other: Text) -> str:
    """By content, whatever the order of the two: 16 hex digits."""
    content = json.dumps([_text(prompt), *sorted(map(_text, (one, other)))])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _text(text: Text) -> str:
    return json.dumps(text, sort_keys=True)


def _hash(seed: int, use: str, name: str) -> bytes:
    return hashlib.blake2b(f"{seed} {use} {name}".encode(), digest_size=8).digest()


# --- in ---------------------------------------------------------------------------------------------------------------


def import_(config: AnnotateConfig) -> pathlib.Path:
    """Writes the preference pairs that labels make of questions: the response with more than half of the votes is
    chosen; with half of them it is a tie, which makes no pair.

    Raises:
        ValueError: the file exists; no label counts; a file that cannot be read.
    """
    if not config.out or not config.labels:
        raise ConfigError(
            f"labels is {config.labels!r} and out {config.out!r}, expected files of labels, and a new file."
        )
    out, questions = _new(config.out, "out"), read_questions(config.questions)
    votes, counts = read_labels(config.labels, questions)
    rows = [row for name, given in votes.items() if (row := _pair(questions[name], list(given.values())))]
    for line in _lines(questions, votes, counts, len(rows)):
        metrics.say(line)
    if not rows:
        raise ConfigError(
            f"no label of {', '.join(config.labels)} makes a pair, expected {', '.join(VOTES)} for ids of "
            f"{config.questions}. See the counts above for the reasons."
        )
    _write(out, rows)
    metrics.say(f"{out}: {len(rows)} pairs")
    return out


def read_questions(path: str) -> dict[str, Question]:
    """id → question of the file that `export` wrote.

    Raises:
        ValueError: a line that is none; the first one is named.
    """
    found = {}
    for line, row in data.load_rows(path):
        lacking = [key for key in ("id", "prompt", "left", "right") if not isinstance(row, dict) or not row.get(key)]
        if lacking:
            raise ConfigError(
                f"{path}:{line}: got {row if isinstance(row, str) else 'no ' + lacking[0]}, expected a question with "
                "id, prompt, left and right, as `sera_jax.annotate export` writes it."
            )
        plain = lambda value: tuple(value) if isinstance(value, list) else value
        found[row["id"]] = Question(row["id"], *(plain(row[key]) for key in ("prompt", "left", "right")))
    return found


def read_labels(paths: Sequence[str], questions: dict[str, Question]) -> tuple[dict[str, dict[str, float]], Counts]:
    """Votes for the left response, question → annotator → vote, and what could not be used."""
    said: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    dropped: dict[str, list[str]] = collections.defaultdict(list)
    unlabelled = 0
    for path in paths:
        for line, row in data.load_rows(path):
            where, stem = f"{path}:{line}", pathlib.Path(path).name.split(".")[0]
            if isinstance(row, str):
                dropped[row].append(where)
                continue
            name, label = str(row.get("id") or ""), str(row.get("label") or "").strip().lower()
            if not label:
                unlabelled += 1
            elif name not in questions:
                dropped["id of no question"].append(where)
            elif label not in VOTES:
                dropped[f"a label other than {', '.join(VOTES)}"].append(where)
            else:
                said[name, str(row.get("annotator") or stem)].add(label)
    votes: dict[str, dict[str, float]] = {}
    for (name, annotator), labels in said.items():
        if len(labels) == 1:
            votes.setdefault(name, {})[annotator] = VOTES[min(labels)]
    contradictory = tuple(key for key, labels in said.items() if len(labels) > 1)
    return votes, Counts(sum(map(len, votes.values())), unlabelled, contradictory, dict(dropped))


def _pair(question: Question, votes: Sequence[float]) -> dict[str, Any] | None:
    share = sum(votes) / len(votes)
    if share == 0.5:
        return None
    chosen, rejected = (question.left, question.right) if share > 0.5 else (question.right, question.left)
    return {
        "id": question.id,
        "prompt": question.prompt,
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": max(share, 1 - share),
        "score_rejected": min(share, 1 - share),
        "votes": len(votes),
        "source": "people",
    }


def _lines(questions: dict[str, Question], votes: dict[str, dict[str, float]], counts: Counts, pairs: int) -> list[str]:
    """What came in, one fact a line."""
    names = {annotator for given in votes.values() for annotator in given}
    out = [
        f"{counts.labels} labels of {len(names)} annotators for {len(votes)} of {len(questions)} questions: {pairs} "
        f"pairs, {len(votes) - pairs} ties"
    ]
    both = [one == other for given in votes.values() for one, other in itertools.combinations(given.values(), 2)]
    if both:
        out.append(f"  two annotators of a question agree in {100 * np.mean(both):.0f} % of {len(both)} cases")
    circles, triples = preference.cycles(probabilities(questions, votes))
    if triples:
        out.append(f"  {circles} of {triples} triples of responses, all compared and none tied, are intransitive")
    if counts.unlabelled:
        out.append(f"  not used: {counts.unlabelled} × no label")
    if counts.contradictory:
        shown = ", ".join(f"{name} by {annotator}" for name, annotator in counts.contradictory[:PLACES])
        more = ", …" * (len(counts.contradictory) > PLACES)
        out.append(f"  not used: {len(counts.contradictory)} × contradictory labels of one annotator ({shown}{more})")
    for reason, places in counts.dropped.items():
        more = ", …" * (len(places) > PLACES)
        out.append(f"  not used: {len(places)} × {reason} ({', '.join(places[:PLACES])}{more})")
    return out


def probabilities(questions: dict[str, Question], votes: dict[str, dict[str, float]]) -> np.ndarray:
    """float64 [P, C, C]: the share of votes for response i against j, prompt by prompt, responses by first sight; NaN
    where nobody compared the two."""
    places: dict[str, dict[str, int]] = {}
    shares = []
    for name, given in votes.items():
        question = questions[name]
        known = places.setdefault(_text(question.prompt), {})
        sides = [known.setdefault(_text(text), len(known)) for text in (question.left, question.right)]
        shares.append((_text(question.prompt), *sides, sum(given.values()) / len(given)))
    index = {prompt: p for p, prompt in enumerate(places)}
    most = max((len(known) for known in places.values()), default=0)
    prob_PCC = np.full((len(places), most, most), np.nan)
    for prompt, left, right, share in shares:
        prob_PCC[index[prompt], left, right], prob_PCC[index[prompt], right, left] = share, 1 - share
    return prob_PCC


# --- files ------------------------------------------------------------------------------------------------------------


def _new(path: str, key: str) -> pathlib.Path:
    out = pathlib.Path(path).expanduser()
    if out.exists():
        raise ConfigError(f"{key}: {out} exists, expected a new file. Remove it, or choose another one.")
    return out


def _write(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.whole(path) as beside:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        beside.write_text(text, encoding="utf-8", errors="surrogatepass")


DOORS = {"export": export, "import": import_}

if __name__ == "__main__":
    main()
