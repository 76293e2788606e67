"""What a judge reads and how its reply is read: templates with named fields, verdicts, grades. Pure."""

import json
import math
import pathlib
import re
import sysconfig
from typing import Any

from sera_jax.records import Text

FIELDS = {"pairwise": ("prompt", "first", "second"), "grade": ("prompt", "response")}
# The shipped templates: of a checkout, else where pip has put them (pyproject.toml, data-files).
SHIPPED = (
    pathlib.Path(__file__).parents[2] / "configs" / "judge",
    pathlib.Path(sysconfig.get_path("data")) / "share" / "sera_jax" / "judge",
)

_FIELD = re.compile(r"\{(prompt|first|second|response)\}")
_VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5, "TIE": 0.5}  # of the first response; [[C]] is MT-bench's tie
_BESIDE = {"the", "final", "my", "better", "best", "answer", "verdict", "response", "choice", "winner", "option", "is"}
_NUMBERS = "one two three four five six seven eight nine ten".split()


def template(path: str, mode: str) -> str:
    """The text of a template; an empty path is the shipped one of the mode.

    Raises:
        ValueError: no such file, or not the mode's fields in it.
    """
    shipped = next((folder for folder in SHIPPED if folder.is_dir()), SHIPPED[0])
    file = pathlib.Path(path).expanduser() if path else shipped / f"{mode}.txt"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"judge.template: {file} cannot be read ({error}); expected a text file with the fields {_shown(mode)}."
        ) from None
    found = set(_FIELD.findall(text))
    for field in FIELDS[mode]:
        if field not in found:
            raise ValueError(
                f"judge.template: {file} lacks the field {{{field}}}, expected {_shown(mode)} for judge.mode {mode!r}."
            )
    strange = sorted(found - set(FIELDS[mode]))
    if strange:
        raise ValueError(
            f"judge.template: {file} has the field {{{strange[0]}}}, which judge.mode {mode!r} does not fill; expected "
            f"{_shown(mode)}."
        )
    return text


def _shown(mode: str) -> str:
    named = [f"{{{field}}}" for field in FIELDS[mode]]
    return ", ".join(named[:-1]) + " and " + named[-1]


def filled(text: str, fields: dict[str, Text]) -> str:
    """A template with its fields filled. Braces elsewhere, in the template or in what it is filled with, stand."""
    return _FIELD.sub(lambda found: rendered(fields[found[1]]), text)


def rendered(prompt: Text) -> str:
    """Text as it is; chat messages one below the other, each under its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


# --- replies ----------------------------------------------------------------------------------------------------------


def document(body: bytes) -> dict[str, Any]:
    """The JSON object of a reply.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError(f"the reply is no JSON: {body[:200]!r}") from None
    if not isinstance(found, dict):
        raise ValueError(f"the reply is a JSON {type(found).__name__}, expected an object")
    return found


def usage(reply: dict[str, Any]) -> tuple[int, int]:
    """(tokens in, tokens out) of a chat completion, 0 where it does not say."""
    told = reply.get("usage")
    counts = [told.get(key) for key in ("prompt_tokens", "completion_tokens")] if isinstance(told, dict) else [0, 0]
    return tuple(count if isinstance(count, int) else 0 for count in counts)


def said(reply: dict[str, Any]) -> tuple[str, list[dict[str, Any]], str]:
    """(text, its tokens with their log-probs or none, " (cut off ...)" where it was) of a chat completion.

    Raises:
        ValueError: it has no choice, or no text in it.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("the reply has no choices")
    message, logprobs = choices[0].get("message"), choices[0].get("logprobs")
    text = message.get("content") if isinstance(message, dict) else None
    cut = " (cut off at judge.max_tokens)" if choices[0].get("finish_reason") == "length" else ""
    if not isinstance(text, str):
        raise ValueError(f"the reply has no text{cut}")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    return text, tokens if isinstance(tokens, list) else [], cut


def verdict(reply: dict[str, Any]) -> float:
    """The probability that the first response is the better one: where the reply has log-probs, that of A against B at
    the token that decides; else 1, 0, or 0.5 of a tie.

    Read are A, B or tie by themselves or among words such as "Response A is better", and [[A]] at the end of reasons.

    Raises:
        ValueError: there is no verdict.
    """
    text, tokens, cut = said(reply)
    marked = re.findall(r"\[\[\s*(A|B|C|tie)\s*\]\]", text, re.IGNORECASE)
    words = marked[-1:] or [word for word in re.findall(r"\w+", text) if word.lower() not in _BESIDE]
    if len(words) != 1 or words[0].upper() not in _VERDICTS:
        raise ValueError(f"the reply {text[:200]!r} is no verdict{cut}, expected A, B or tie")
    letter = words[0].upper()
    deciding = [token for token in tokens if _letter(token.get("token")) == letter]
    if letter not in ("A", "B") or not deciding:
        return _VERDICTS[letter]
    likely = {"A": 0.0, "B": 0.0}
    for token in deciding[-1].get("top_logprobs") or deciding[-1:]:
        if _letter(token["token"]) in likely:
            likely[_letter(token["token"])] += math.exp(token["logprob"])
    total = likely["A"] + likely["B"]
    if not (math.isfinite(total) and total > 0):
        raise ValueError(f"the reply's log-probs of A and B are {likely}")
    return likely["A"] / total


def _letter(token: Any) -> str:
    return re.sub(r"[^A-Za-z]", "", token).upper() if isinstance(token, str) else ""


def grade(reply: dict[str, Any]) -> float:
    """The grade from 1 to 10: the reply's one number, in figures or as a word ("8/10", "Grade: 7.5", "eight"), or the
    last [[8]] of a longer one.

    Raises:
        ValueError: there is none.
    """
    text, _, cut = said(reply)
    marked = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", text)
    bare = re.sub(r"\b1\s*(?:-|–|to)\s*10\b|(?:/|\bout of)\s*10\b", "", text)
    spelt = [_NUMBERS.index(word) + 1 for word in re.findall(r"[a-z]+", bare.lower()) if word in _NUMBERS]
    numbers = [float(number) for number in marked[-1:] or re.findall(r"-?\d+(?:\.\d+)?", bare) or spelt]
    if len(numbers) != 1 or not 1 <= numbers[0] <= 10:
        raise ValueError(f"the reply {text[:200]!r} is no grade{cut}, expected one number from 1 to 10")
    return numbers[0]


READ = {"pairwise": verdict, "grade": grade}
