"""Forms of rows: which columns mean what. A row → a prompt with judged responses → preference pairs.

FORMATS is the table of the forms of pairs: how a row is recognised and what it says; UNPAIRED has labelled single
responses beside them. A row that cannot be used raises Unusable with the reason; nothing here opens a file.
"""

import bisect
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sera_jax.records import Pair, Prompt, Text, Truth, Unpaired

ASSISTANT = "\n\nAssistant:"


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A response to imitate (SFT). An empty plain-text prompt means: the text stands by itself."""

    id: str
    prompt: Text
    response: Text
    weight: float = 1.0
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Judged:
    """A prompt with judged responses, as one row has them.

    scores: of each response, the higher the better; None = the row has none, or none for that response.
    pair: (chosen, rejected) as places in `responses`; None = the scores decide, by a rule of RANKED.
    """

    prompt: Text
    responses: tuple[Text, ...]
    scores: tuple[float | None, ...] | None = None
    pair: tuple[int, int] | None = (0, 1)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A prompt with one response and whether it is desirable, as one row has them."""

    prompt: Text
    response: Text
    label: bool


@dataclasses.dataclass(frozen=True)
class Responses:
    """A row of a file of candidates. where: "file:line"; finished, scores (None = unread): one for each response."""

    where: str
    prompt: Text
    texts: tuple[str, ...]
    finished: tuple[bool, ...]
    scores: tuple[float, ...] | None


class Unusable(ValueError):
    """Why a row, or one response of it, cannot be used: becomes a line of the report."""


# --- Forms of pairs: row → Judged -------------------------------------------------------------------------------------


def explicit(row: dict) -> Judged:
    """TRL's standard form: three texts, as they are."""
    return Judged(_string(row, "prompt"), (_string(row, "chosen"), _string(row, "rejected")))


def conversational(row: dict) -> Judged:
    """Messages. chosen and rejected may be the answers alone (the prompt is then messages, or a text = one user turn),
    or whole conversations, with or without a prompt beside them (HuggingFaceH4/ultrafeedback_binarized has one).

    Whichever: the prompt is what both have in common up to the last place from which both go on with the assistant's
    turn, and never less than the prompt that is given. A response is usually one message; conversations that part
    earlier leave several, the user's among them, which all count as response (as in TRL).
    """
    prompt = row.get("prompt")
    given = () if prompt is None else _messages(row, "prompt", "user")
    whole = []
    for column in ("chosen", "rejected"):
        turns = _messages(row, column, "assistant")
        if not turns:
            raise Unusable(f"empty {column}")
        # A text beside conversations only repeats their first user turn (HuggingFaceH4/ultrafeedback_binarized).
        repeated = len(turns) > 1 if isinstance(prompt, str) else turns[: len(given)] == given
        whole.append(turns if repeated else given + turns)
        if turns[-1]["role"] != "assistant":
            raise Unusable(f"the last message of {column} is not the assistant's")
    chosen, rejected = whole
    least = 0 if isinstance(prompt, str) else len(given)
    for cut in range(min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1), least - 1, -1):
        if chosen[cut]["role"] == rejected[cut]["role"] == "assistant":
            return Judged(chosen[:cut], (chosen[cut:], rejected[cut:]))
    raise Unusable("chosen and rejected have different prompts")


def hh(row: dict) -> Judged:
    """Anthropic's transcripts, cut after the last "\\n\\nAssistant:": prompt + reply is the transcript, the reply keeps
    its leading space.
    """
    cut = {}
    for column in ("chosen", "rejected"):
        transcript = _string(row, column)
        head, mark, reply = transcript.rpartition(ASSISTANT)
        if not mark:
            raise Unusable(f'no "\\n\\nAssistant:" in {column}')
        cut[column] = head + mark, reply
    if cut["chosen"][0] != cut["rejected"][0]:
        raise Unusable("chosen and rejected have different prompts")
    return Judged(cut["chosen"][0], (cut["chosen"][1], cut["rejected"][1]))


ROLE = re.compile(r"<\|[^<>|\s]+\|>|</?s>|\[/?[A-Z]+\]")  # what ends a role as a token of its own: any text may follow
LABEL = re.compile(r"^[^\S\n]*(?:#+[ \t]*)?[^\W\d_][\w .-]{0,30}[:：]", re.MULTILINE)  # "Assistant:", "### Response:"


def implicit(row: dict) -> Judged:
    """Two full texts: the prompt is what both begin with, cut back to where tokens end as well (see `_boundary`).

    TRL's extract_prompt cuts at the first different character, wherever that is, and steps back over one space.
    """
    chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
    if chosen == rejected:
        raise Unusable("chosen and rejected are identical")
    cut = _boundary(chosen, rejected)
    return Judged(chosen[:cut], (chosen[cut:], rejected[cut:]))


def _boundary(chosen: str, rejected: str) -> int:
    """The last place within the common beginning where tokenisers part anyway: behind a line break; before white space,
    which stays whole and goes with the responses (" yes" is a token); behind a role. Both responses keep some text.
    """
    common = _common(chosen, rejected)
    roles = {match.end() for match in ROLE.finditer(chosen[:common])}
    labels = {match.end() for match in LABEL.finditer(chosen[:common])}
    for cut in range(common, 0, -1):
        before, after = chosen[cut - 1], (chosen[cut : cut + 1], rejected[cut : cut + 1])
        line = before == "\n" and not any(c in ("\r", "\n") for c in after)
        space = not before.isspace() and all(map(str.isspace, after))
        label = cut in labels and all(c.isspace() or c.isalnum() for c in after)
        if (line or space or label or cut in roles) and chosen[cut:].strip() and rejected[cut:].strip():
            return cut
    raise Unusable("chosen and rejected have no common prompt (no white space or role ends their common beginning)")


def _common(one: Sequence, other: Sequence) -> int:
    """How many of the first items are equal."""
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect.bisect_left(lengths, True, key=lambda n: one[:n] != other[:n])


def ultrafeedback(row: dict) -> Judged:
    """UltraFeedback as it was published: an instruction and rated completions of several models.

    The rating is overall_score, fine-grained_score or the mean of the annotations' ratings: the first of these that the
    most completions of the row have. (The binarised sets are `conversational`.)
    """
    completions = _list(row, "completions")
    if not all(isinstance(completion, dict) for completion in completions):
        raise Unusable("a completion is not an object with a response")
    responses = tuple(_part(completion.get("response"), "response") for completion in completions)
    rated = [tuple(map(rating, completions)) for rating in RATINGS]
    scores = max(rated, key=lambda values: sum(value is not None for value in values))
    return Judged(_instruction(row), responses, scores, pair=None)


def _mean_rating(completion: dict) -> float | None:
    annotations = completion.get("annotations")
    aspects = [a[0] if isinstance(a, list) and a else a for a in mapping(annotations).values()]
    found = [value for value in (rating(mapping(aspect).get("Rating")) for aspect in aspects) if value is not None]
    return sum(found) / len(found) if found else None


RATINGS: tuple[Callable[[dict], float | None], ...] = (
    lambda completion: rating(completion.get("overall_score")),
    lambda completion: rating(completion.get("fine-grained_score")),
    _mean_rating,
)


def ranked(row: dict) -> Judged:
    """K responses (texts, or messages) with scores, the higher the better, or ranks, 1 the best (a score of -rank)."""
    prompt = _text_or_messages(row, "prompt", "user")
    parts = [_part(part, "response") for part in _list(row, "responses")]
    if not all(isinstance(part, str) for part in (prompt, *parts)):  # one of them chat: all of them
        prompt = _messages(row, "prompt", "user")
        parts = [({"role": "assistant", "content": p},) if isinstance(p, str) else p for p in parts]
        if any(part and part[-1]["role"] != "assistant" for part in parts):
            raise Unusable("the last message of a response is not the assistant's")
    column = "scores" if row.get("scores") is not None else "ranks"
    scores = [number({column: value}, column) for value in _list(row, column)]
    if len(scores) != len(parts):
        raise Unusable(f"responses and {column} differ in number")
    if column == "ranks":
        scores = [None if rank is None else -rank for rank in scores]
    return Judged(prompt, tuple(parts), tuple(scores), pair=None)


def tldr(row: dict) -> Judged:
    """OpenAI's comparisons of summaries (Stiennon et al., 2020): of Reddit posts, or of news articles. The prompt ends
    with "TL;DR:", a summary starts with one space.
    """
    prompt, texts = _post(row), [_string(mapping(part), "text") for part in _list(row, "summaries")]
    if len(texts) != 2:
        raise Unusable("summaries has not two entries")
    choice = number(row, "choice")
    if choice not in (0, 1):
        raise Unusable("choice is not 0 or 1")
    # Without the strip, white space would tell which model wrote a summary.
    responses = tuple(" " + text.strip() for text in texts)
    return Judged(prompt, responses, pair=(int(choice), 1 - int(choice)))


def _post(row: dict) -> str:
    info = mapping(row.get("info"))
    if info.get("post") is None and info.get("article") is not None:
        return f"Article:\n{_string(info, 'article')}\n\nTL;DR:"
    subreddit, title, post = (_string(info, column) for column in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


OUTPUTS = (("output_1", "output_2"), ("response_a", "response_b"))


def alpaca_eval(row: dict) -> Judged:
    """AlpacaEval's annotations: two outputs and a preference from 1 (the first is better) to 2 (the second), in between
    where it is graded. 1.5, and 0 in old files, is a tie. The scores are the two shares, 2 - preference and
    preference - 1.
    """
    prompt, responses = two_outputs(row)
    preference = number(row, "preference")
    if preference is None:
        raise Unusable("no preference")
    if preference in (0, 1.5):
        raise Unusable("the preference is a tie")
    if not 1 <= preference <= 2:
        raise Unusable("preference is not from 1 to 2")
    pair = (0, 1) if preference < 1.5 else (1, 0)
    return Judged(prompt, responses, (2 - preference, preference - 1), pair)


def two_outputs(row: dict) -> tuple[str, tuple[str, str]]:
    """The prompt and the two outputs of a comparison."""
    columns = next(two for two in OUTPUTS if two[0] in row or two is OUTPUTS[-1])
    one, other = (_string(row, column) for column in columns)
    return _question(row), (one, other)


def _question(row: dict) -> str:
    return _string(row, "prompt") if row.get("prompt") is not None else _instruction(row)


# --- A form of single responses: row → Labelled -----------------------------------------------------------------------


def unpaired(row: dict) -> Labelled:
    """TRL's form for KTO: prompt and completion as text or messages, label true (desirable) or false."""
    prompt, completion = _completion(row)
    if not isinstance(row.get("label"), bool):
        raise Unusable(f"label is {type(row.get('label')).__name__}, expected true or false")
    return Labelled(prompt, completion, row["label"])


# --- The tables of them -----------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """recognise: has a row this form? convert: what it says, or Unusable. columns: for people."""

    recognise: Callable[[dict], bool]
    convert: Callable[[dict], Judged | Labelled]
    columns: str


QUESTIONS = ("instruction", "question", "query", "input", "context")
"""Columns that look like a prompt under another name: beside them, texts are answers, not prompt and answer."""


def _has(row: dict, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _lists(row: dict) -> bool:
    return any(isinstance(row.get(column), list) for column in ("prompt", "chosen", "rejected"))


FORMATS: dict[str, Form] = {
    "explicit": Form(
        lambda row: _has(row, "prompt", "chosen", "rejected") and not _lists(row),
        explicit,
        "prompt, chosen and rejected as text",
    ),
    "conversational": Form(
        lambda row: _has(row, "chosen", "rejected") and _lists(row),
        conversational,
        "chosen and rejected as lists of messages, with or without prompt",
    ),
    "hh": Form(
        lambda row: _has(row, "chosen", "rejected") and ASSISTANT in str(row["chosen"]),
        hh,
        'chosen and rejected as "\\n\\nHuman: …\\n\\nAssistant: …" transcripts',
    ),
    "implicit": Form(
        lambda row: _has(row, "chosen", "rejected") and not any(_has(row, column) for column in QUESTIONS),
        implicit,
        "chosen and rejected as full texts that begin with the prompt",
    ),
    "ultrafeedback": Form(
        lambda row: _has(row, "instruction", "completions"),
        ultrafeedback,
        "instruction and completions with response and overall_score",
    ),
    "ranked": Form(
        lambda row: _has(row, "prompt", "responses") and (_has(row, "scores") or _has(row, "ranks")),
        ranked,
        "prompt, responses and scores or ranks as lists",
    ),
    "tldr": Form(
        lambda row: _has(row, "info", "summaries", "choice"),
        tldr,
        "info, two summaries and choice",
    ),
    "alpaca_eval": Form(
        lambda row: "preference" in row and any(_has(row, *two) for two in OUTPUTS),
        alpaca_eval,
        "instruction, output_1, output_2 (or prompt, response_a, response_b) and preference",
    ),
}


UNPAIRED: dict[str, Form] = {
    **FORMATS,
    "unpaired": Form(
        lambda row: _has(row, "prompt", "completion", "label"),
        unpaired,
        "prompt, completion and label (true or false)",
    ),
}
"""Forms of what an unpaired loss learns from; a pair is a desirable and an undesirable response."""


def format_of(row: dict) -> str | None:
    """The first form of FORMATS that recognises a row of pairs, None if none does."""
    return next((name for name, form in FORMATS.items() if form.recognise(row)), None)


def unpaired_format_of(row: dict) -> str | None:
    """The same of UNPAIRED."""
    return next((name for name, form in UNPAIRED.items() if form.recognise(row)), None)


# --- Judged → pairs; Labelled, and pairs → labelled responses ---------------------------------------------------------


def pairs_of(form: str, row: dict, name: str, stem: str, *, rule: str, seed: int) -> list[Pair | Unusable]:
    """The pairs of a row, and what of it took no part.

    Args:
        name: id of a row that has none. stem: source likewise. rule, seed: of RANKED, for K scored responses.

    Raises:
        Unusable: nothing of the row can be used.
    """
    judged = FORMATS[form].convert(row)
    _filled(judged.prompt, "prompt")
    own, weight, source = _id(row, name), _weight(row), _source(row, stem)
    if judged.pair is None:
        pairs, faults = _by_rule(judged, rule, seed)
        ids = [f"{own}/{chosen}>{rejected}" for chosen, rejected in pairs]  # as fresh pairs have them
    else:
        pairs, faults, ids = [judged.pair], [], [own]
        for column, place in zip(("chosen", "rejected"), judged.pair):
            _filled(judged.responses[place], column)
        if judged.responses[0] == judged.responses[1]:
            raise Unusable("chosen and rejected are identical")
    items: list[Pair | Unusable] = []
    for key, (chosen, rejected) in zip(ids, pairs):
        scores = (judged.scores[chosen], judged.scores[rejected]) if judged.scores else _scores(row)
        truth = _truth(row) if judged.pair else Truth()  # its columns speak of one pair
        items.append(
            Pair(
                key, judged.prompt, judged.responses[chosen], judged.responses[rejected], scores, weight, source, truth
            )
        )
    return items + faults


def unpaired_of(form: str, row: dict, name: str, stem: str, *, rule: str, seed: int) -> list[Unpaired | Unusable]:
    """The labelled responses of a row of a form of UNPAIRED; arguments and errors as of `pairs_of`."""
    if form not in FORMATS:
        said = UNPAIRED[form].convert(row)
        for column, text in (("prompt", said.prompt), ("completion", said.response)):
            _filled(text, column)
        return [Unpaired(_id(row, name), said.prompt, said.response, said.label, _weight(row), _source(row, stem))]
    items: list[Unpaired | Unusable] = []
    for pair in pairs_of(form, row, name, stem, rule=rule, seed=seed):
        if isinstance(pair, Unusable):
            items.append(pair)
            continue
        for side, response, label in (("chosen", pair.chosen, True), ("rejected", pair.rejected, False)):
            items.append(Unpaired(f"{pair.id}/{side}", pair.prompt, response, label, pair.weight, pair.source))
    return items


def _by_rule(judged: Judged, rule: str, seed: int) -> tuple[list[tuple[int, int]], list[Unusable]]:
    """(chosen, rejected) places by a rule, and why some responses took no part: as for sampled candidates, those that
    are empty, repeated (the first stays) or without a score.
    """
    places, faults, seen = [], [], []
    for place, (response, score) in enumerate(zip(judged.responses, judged.scores)):
        wrong = {
            "a response is empty": _empty(response),
            "a response has no score": score is None,
            "a response is repeated": response in seen,
        }
        reason = next((reason for reason, holds in wrong.items() if holds), None)
        if reason:
            faults.append(Unusable(reason))
        else:
            places.append(place)
            seen.append(response)
    scores = [judged.scores[place] for place in places]
    content = json.dumps([judged.prompt, judged.responses], sort_keys=True, default=str).encode()

    def draw(n: int) -> int:
        """In range(n), by the seed and the content of the row, not its place in a file."""
        digest = hashlib.blake2b(content, key=str(seed).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % n

    pairs = [(places[i], places[j]) for i, j in RANKED[rule](scores, draw)] if places else []
    if not pairs:
        equal = "all scores are equal" if len(set(scores)) < 2 else "the highest scores are equal"
        faults.append(Unusable("fewer than two responses to rank" if len(places) < 2 else equal))
    return pairs, faults


def all_pairs(scores: Sequence[float], draw: Callable[[int], int]) -> list[tuple[int, int]]:
    """Every two of unlike score."""
    two = [(i, j) for i in range(len(scores)) for j in range(i + 1, len(scores)) if scores[i] != scores[j]]
    return [(i, j) if scores[i] > scores[j] else (j, i) for i, j in two]


def best_worst(scores: Sequence[float], draw: Callable[[int], int]) -> list[tuple[int, int]]:
    """The highest against the lowest; of equal ones the first."""
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return [(best, worst)] if scores[best] > scores[worst] else []


def best_random(scores: Sequence[float], draw: Callable[[int], int]) -> list[tuple[int, int]]:
    """The highest against a random one of those below it (Zephyr's binarisation of UltraFeedback)."""
    best = scores.index(max(scores))
    below = [i for i, score in enumerate(scores) if score < scores[best]]
    return [(best, below[draw(len(below))])] if below else []


def best_second(scores: Sequence[float], draw: Callable[[int], int]) -> list[tuple[int, int]]:
    """The two highest; no pair where they are equal."""
    first, second = (sorted(range(len(scores)), key=lambda i: -scores[i]) + [0, 0])[:2]
    return [(first, second)] if scores[first] > scores[second] else []


def best_each(scores: Sequence[float], draw: Callable[[int], int]) -> list[tuple[int, int]]:
    """The highest against each of those below it (Curry-DPO)."""
    best = scores.index(max(scores))
    return [(best, i) for i, score in enumerate(scores) if score < scores[best]]


def random_pair(scores: Sequence[float], draw: Callable[[int], int]) -> list[tuple[int, int]]:
    """A random one of `all_pairs`."""
    pairs = all_pairs(scores, draw)
    return [pairs[draw(len(pairs))]] if pairs else []


RANKED: dict[str, Callable[[Sequence[float], Callable[[int], int]], list[tuple[int, int]]]] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "best_second": best_second,
    "best_each": best_each,
    "random": random_pair,
    "all_pairs": all_pairs,
}
"""rule(scores, draw) → (chosen, rejected) places; ties make no pair. The rules, and the names, of fresh pairs
(sera.PAIR_RULES), for scores that a file has."""


# --- Forms of prompts and of demonstrations ---------------------------------------------------------------------------


def _instruction(row: dict) -> str:
    extra = _string(row, "input") if row.get("input") else ""
    return _string(row, "instruction") + (f"\n\n{extra}" if extra else "")


def _text_or_messages(row: dict, column: str, role: str) -> Text:
    return _messages(row, column, role) if isinstance(row.get(column), list) else _string(row, column)


def _completion(row: dict) -> tuple[Text, Text]:
    prompt, response = _text_or_messages(row, "prompt", "user"), _text_or_messages(row, "completion", "assistant")
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt, response
    turns = _messages(row, "prompt", "user") + _messages(row, "completion", "assistant")
    return _last_turn(turns)


def _last_turn(turns: tuple[dict, ...]) -> tuple[Text, Text]:
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise Unusable("no assistant turn")
    _filled(turns[:last], "prompt")
    return turns[:last], turns[last : last + 1]


def _prompt(row: dict) -> Text:
    return _text_or_messages(row, "prompt", "user")


PROMPTS: dict[str, Callable[[dict], Text]] = {
    # Of pairs; where the prompt has columns of its own, the answers need not be usable.
    "explicit": _prompt,
    "conversational": lambda row: conversational(row).prompt,
    "hh": lambda row: hh(row).prompt,
    "implicit": lambda row: implicit(row).prompt,
    "ultrafeedback": _instruction,
    "ranked": _prompt,
    "tldr": _post,
    "alpaca_eval": _question,
    # Of prompts alone.
    "prompt": _prompt,
    "text": lambda row: _string(row, "text"),
    "instruction": _instruction,
}

TEXTS: dict[str, Callable[[dict], tuple[Text, Text]]] = {
    "completion": _completion,
    "messages": lambda row: _last_turn(_messages(row, "messages", "user")),
    "instruction": lambda row: (_instruction(row), _string(row, "output")),
    "text": lambda row: ("", _string(row, "text")),
}

COLUMNS = {"completion": ("prompt", "completion"), "instruction": ("instruction", "output")}
"""What tells the forms that are not told by the column of their name."""


def prompt_form_of(row: dict) -> str | None:
    """The key of PROMPTS for a row, None if there is none."""
    return format_of(row) or next((c for c in ("prompt", "text", "instruction") if row.get(c) is not None), None)


def text_form_of(row: dict) -> str | None:
    """The key of TEXTS for a row, None if there is none."""
    return next((f for f in TEXTS if all(row.get(c) is not None for c in COLUMNS.get(f, (f,)))), None)


def prompt_of(form: str, row: dict, name: str, stem: str) -> Prompt:
    """The prompt of a row of the form `form`."""
    prompt = PROMPTS[form](row)
    _filled(prompt, "prompt")
    return Prompt(_id(row, name), prompt)


def demonstration_of(form: str, row: dict, name: str, stem: str) -> Demonstration:
    """The demonstration of a row of the form `form`."""
    if form == "completion" and row.get("label") is False:  # of unpaired data: nothing to imitate
        raise Unusable("label is false, an undesirable response")
    prompt, response = TEXTS[form](row)
    _filled(response, "response")
    return Demonstration(_id(row, name), prompt, response, _weight(row), _source(row, stem))


def responses_of(row: dict, where: str, scored: bool) -> Responses:
    """A row of candidates; where: "file:line". Raises Unusable."""
    prompt = _text_or_messages(row, "prompt", "user")
    _filled(prompt, "prompt")
    texts = row.get("responses")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Unusable("responses is no list of texts")

    def beside(column: str, what: str, fits: Callable[[Any], bool]) -> tuple | None:
        values = row.get(column)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) != len(texts) or not all(map(fits, values)):
            raise Unusable(f"{column} is no list of {len(texts)} {what}, one for each response")
        return tuple(values)

    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
    scores = None
    if scored:
        scores = next((s for s in (beside(c, "finite numbers", number) for c in ("rewards", "scores")) if s), None)
        if scores is None:
            raise Unusable("no rewards and no scores, which reward.source 'file' needs")
    finished = beside("finished", "booleans", lambda v: isinstance(v, bool)) or (True,) * len(texts)
    return Responses(where, prompt, tuple(_unicode(text, "a response") for text in texts), finished, scores)


# --- Columns ----------------------------------------------------------------------------------------------------------


def _string(row: dict, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise Unusable(f"missing column {column!r}")
    if not isinstance(value, str):
        raise Unusable(f"{column} is {type(value).__name__}, expected text")
    return _unicode(value, column)


def _unicode(text: str, column: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable(f"{column} is not valid Unicode (a lone surrogate)") from None
    return text


def _messages(row: dict, column: str, role: str) -> tuple[dict, ...]:
    value = row.get(column)
    if value is None or isinstance(value, str):
        return ({"role": role, "content": _string(row, column)},)
    if not isinstance(value, list):
        raise Unusable(f"{column} is {type(value).__name__}, expected messages")
    for turn in value:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
            raise Unusable(f'a message of {column} is not {{"role": text, "content": text}}')
        _unicode(turn["content"], column)
    # Columns of structs give every message the keys of all of them, as nulls.
    return tuple({key: item for key, item in turn.items() if item is not None} for turn in value)


def _list(row: dict, column: str) -> list:
    value = row.get(column)
    if not isinstance(value, list):
        raise Unusable(f"{column} is {type(value).__name__}, expected a list")
    return value


def mapping(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _part(value: Any, what: str) -> Text:
    """One of several responses; nothing at all is an empty one."""
    return _text_or_messages({what: "" if value is None else value}, what, "assistant")


def _empty(text: Text) -> bool:
    contents = [text] if isinstance(text, str) else [turn["content"] for turn in text]
    return not any(content.strip() for content in contents)


def _filled(text: Text, column: str) -> None:
    if _empty(text):
        raise Unusable(f"empty {column}")


def number(row: dict, column: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable(f"{column} is {type(value).__name__}, expected a number")
    return float(value) if math.isfinite(value) else None


def rating(value: Any) -> float | None:
    """A number, also one that is written as text; "N/A" and the like are none."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


SCORES = ("score_{}", "{}_score", "{}_rating", "{}-rating")
"""Names of the columns that hold the scores of chosen and rejected."""


def _scores(row: dict, forms: Sequence[str] = SCORES) -> tuple[float, float] | None:
    for form in forms:
        chosen, rejected = number(row, form.format("chosen")), number(row, form.format("rejected"))
        if chosen is not None and rejected is not None:
            return chosen, rejected
    return None


def scores_of_pair(row: dict) -> dict[str, tuple[float, float]]:
    """The annotator's and the gold scores of (chosen, rejected), those that the row has; also out of `metadata`."""
    found = {"score": _scores(row) or _scores(mapping(row.get("metadata"))), "gold": _scores(row, ("gold_{}",))}
    return {name: scores for name, scores in found.items() if scores is not None}


def _truth(row: dict) -> Truth:
    """Flags and authors of another type are somebody else's columns of that name."""
    flags = {key: row.get(key) if isinstance(row.get(key), bool) else None for key in ("flipped", "cued", "upset")}
    author = row.get("author") if isinstance(row.get("author"), str) else None
    return Truth(gold=_scores(row, ("gold_{}",)), author=author, **flags)


def _weight(row: dict) -> float:
    if row.get("weight") is None:
        return 1.0
    weight = number(row, "weight")
    if weight is None or weight < 0:
        raise Unusable("weight is not a finite number of 0 or more")
    return weight


def _id(row: dict, name: str) -> str:
    value = row.get("id")
    if value is None or value == "":
        return name
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Unusable(f"id is {type(value).__name__}, expected text or an integer")
    return _unicode(str(value), "id")


def _source(row: dict, stem: str) -> str:
    named = (row.get(column) for column in ("source", "subset"))
    return next((value for value in named if isinstance(value, str) and value), stem)


# --- Cells of a CSV ---------------------------------------------------------------------------------------------------

NUMBERS = {
    "weight",
    "preference",
    "choice",
    *(f.format(w) for f in (*SCORES, "gold_{}") for w in ("chosen", "rejected")),
}
NESTED = {"responses", "scores", "ranks", "completions", "info", "summaries"}
CHATS = {"prompt", "chosen", "rejected", "completion", "messages"}
FLAGS = {"label", "flipped", "cued", "upset"}
BOOLEANS = {"true": True, "false": False}


def from_cells(cells: dict[str, str]) -> dict:
    """A row as JSON would have it: columns of numbers and flags parsed, columns of lists and objects read as JSON, and
    texts that are JSON lists of messages too. What cannot be parsed stays text; an empty cell where no text is expected
    is None.
    """
    return {column: _value(column, cell) for column, cell in cells.items()}


def _value(column: str, cell: str) -> Any:
    if column in NUMBERS | NESTED | FLAGS and not cell.strip():
        return None
    if column in FLAGS:
        return BOOLEANS.get(cell.strip().lower(), cell)
    try:
        if column in NUMBERS:
            return float(cell)
        if column in NESTED or (column in CHATS and cell.lstrip()[:1] == "["):
            value = json.loads(cell)
            chat = isinstance(value, list) and all("role" in mapping(turn) and "content" in turn for turn in value)
            return value if column in NESTED or (chat and value) else cell
    except (ValueError, RecursionError):
        pass
    return cell
