"""Responses that several judged: rows of a file → who said what of which response.

A row is a set of responses to one prompt with scores, each under a name: of reward dimensions, annotators, judges. The
forms are told by their columns:

    responses            texts; `scores` by name ({"helpful": [4, 2]}), and any other column of one number a response
    completions          UltraFeedback: the Rating of each dimension in `annotations`, overall_score, fine-grained_score
    preference           two outputs as `alpaca_eval` has them, verdicts too that are ties: `preference` is 2 - p and
                         p - 1; `annotators`, a list of 1, 2 and 0 (tie), are "annotator 1", ...; score_a, score_b
    any other pair form  `label` is 1 of the chosen response and 0 of the other; `score` and `gold` where a row has them
"""

import dataclasses
from collections.abc import Callable, Sequence

from sera_jax.data import files, forms
from sera_jax.data.files import Progress
from sera_jax.data.forms import Unusable
from sera_jax.records import Text

Scores = dict[str, tuple[float | None, ...]]


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Responses to a prompt that were judged side by side; scores: by name, of each response, None = none."""

    prompt: Text
    responses: tuple[Text, ...]
    scores: Scores


def load_evaluated(paths: Sequence[str], *, limit: int = 0, progress: Progress = files.silent) -> list[Evaluated]:
    """Rows of files, as `load_pairs` reads them.

    Args:
        limit: the first n rows over all files (0 = all).

    Raises:
        ValueError: a file that cannot be read; a row of another form, by its line; no row at all.
    """
    found: list[Evaluated] = []
    for path in paths:
        stem, total, rows = files.opened(path, "train", "")
        for line, row in progress(rows, total, f"reading {stem}"):
            if limit and len(found) >= limit:
                break
            try:
                if isinstance(row, str):
                    raise Unusable(row)
                found.append(evaluated(row))
            except Unusable as reason:
                raise ValueError(
                    f"{path}:{line}: {reason}; expected responses with scores, completions, two outputs with a "
                    "preference, or a preference pair. See README, 'Who agrees with whom'."
                ) from None
    if not found:
        raise ValueError(f"{', '.join(paths)}: no rows, expected responses that somebody judged.")
    return found


def evaluated(row: dict) -> Evaluated:
    """What a row says. Raises Unusable."""
    return next(convert for holds, convert in ROWS if holds(row))(row)


def _listed(row: dict) -> Evaluated:
    said = forms.responses_of(row, "", scored=False)
    scores: Scores = {}
    for name, values in {**row, **forms.mapping(row.get("scores"))}.items():
        if name not in ("responses", "finished") and isinstance(values, list) and _numbers(values):
            if len(values) != len(said.texts):
                raise Unusable(
                    f"{name} has {len(values)} numbers, expected one for each of {len(said.texts)} responses"
                )
            scores[name] = tuple(None if value is None else float(value) for value in values)
    return Evaluated(said.prompt, said.texts, scores)


def _numbers(values: list) -> bool:
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    return any(map(number, values)) and all(value is None or number(value) for value in values)


def _ultrafeedback(row: dict) -> Evaluated:
    said = forms.ultrafeedback(row)
    parts = [forms.mapping(part) for part in row["completions"]]
    told: dict[str, list[float | None]] = {}
    for i, part in enumerate(parts):
        rated = {
            name: forms.mapping(about).get("Rating") for name, about in forms.mapping(part.get("annotations")).items()
        }
        rated |= {name: part.get(name) for name in ("overall_score", "fine-grained_score")}
        for name, value in rated.items():
            told.setdefault(name, [None] * len(parts))[i] = forms.rating(value)
    scores = {name: tuple(values) for name, values in told.items() if any(value is not None for value in values)}
    return Evaluated(said.prompt, said.responses, scores)


def _verdict(row: dict) -> Evaluated:
    prompt, responses = forms.two_outputs(row)
    preference = forms.number(row, "preference")
    preference = 1.5 if preference == 0 else preference  # a tie of old files
    if preference is not None and not 1 <= preference <= 2:
        raise Unusable("preference is not from 1 to 2")
    scores: Scores = {} if preference is None else {"preference": (2 - preference, preference - 1)}
    shares = {0: (0.5, 0.5), 1: (1.0, 0.0), 2: (0.0, 1.0)}
    verdicts = row.get("annotators") or []
    if not isinstance(verdicts, list) or any(verdict not in shares for verdict in verdicts):
        raise Unusable("annotators is no list of 1, 2 and 0 (tie)")
    scores |= {f"annotator {i}": shares[verdict] for i, verdict in enumerate(verdicts, start=1)}
    both = tuple(forms.number(row, f"score_{side}") for side in "ab")
    return Evaluated(prompt, responses, scores | ({} if None in both else {"score": both}))


def _pair(row: dict) -> Evaluated:
    form = forms.format_of(row)
    if form is None:
        raise Unusable("no form of responses that somebody judged")
    said = forms.FORMATS[form].convert(row)
    scores: Scores = {}
    if said.scores is not None:
        scores["score"] = said.scores
    if said.pair is not None:
        chosen, rejected = said.pair
        scores["label"] = tuple(1.0 if i == chosen else 0.0 for i in range(len(said.responses)))
        for name, of_pair in forms.scores_of_pair(row).items():
            scores[name] = of_pair if (chosen, rejected) == (0, 1) else of_pair[::-1]
    return Evaluated(said.prompt, said.responses, scores)


ROWS: tuple[tuple[Callable[[dict], bool], Callable[[dict], Evaluated]], ...] = (
    (lambda row: isinstance(row.get("responses"), list), _listed),
    (lambda row: isinstance(row.get("completions"), list), _ultrafeedback),
    (lambda row: "preference" in row, _verdict),
    (lambda row: True, _pair),
)
