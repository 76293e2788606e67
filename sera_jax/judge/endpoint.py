"""One question to an OpenAI-compatible endpoint, until it is answered: pace, retries, what goes wrong in words."""

import dataclasses
import email.utils
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from sera_jax import metrics
from sera_jax.judge import forms
from sera_jax.judge.labels import Label

BACKOFF = 1.0  # seconds before the first retry at most, doubled with each
LONGEST = 60.0  # of such a pause; an endpoint that says Retry-After is left alone for as long as it says
_DAY = 86400.0  # but for no longer
_SECRET = 8  # characters of a key that is one
_TOP = 20  # alternatives to a token that are asked for


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Whom to ask and how patiently: what the config's section `judge` says (config.JudgeConfig)."""

    model: str
    base_url: str
    key_env: str
    temperature: float
    max_tokens: int
    timeout: float
    retries: int
    concurrent: int
    per_minute: int


@dataclasses.dataclass
class Traffic:
    """What the threads that ask have in common. not_before: when the next request may go (monotonic seconds); refused:
    parameters that the endpoint does not know; stop: set when no more is to be asked.
    """

    requests: int = 0
    retries: int = 0
    not_before: float = 0.0
    refused: set[str] = dataclasses.field(default_factory=set)
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class Trouble(Exception):
    """A request without a usable answer. status: of HTTP, None = none came. after: seconds that the endpoint asks to
    be left alone for.
    """

    def __init__(self, why: str, status: int | None = None, after: float = 0.0):
        super().__init__(why)
        self.status, self.after = status, after

    @property
    def passes(self) -> bool:
        """May the same request be answered later?"""
        return self.status is None or self.status in (408, 409, 425, 429) or self.status >= 500


class Stopped(Exception):
    """Another question failed for good, or somebody stopped the run."""


def client(endpoint: Endpoint) -> Callable[..., bytes]:
    """Parameters of a chat completion → the body of the reply, by the package openai, which retries nothing itself.

    The key comes from the environment and stays in here: what others say is told without it.

    Raises:
        ValueError: the package is not installed. By the function, Trouble: no reply, or a status that is an error.
    """
    try:
        import openai
    except ImportError:
        raise ValueError(
            "reward.source 'judge' needs the package openai: pip install 'sera_jax[judge]', or pip install openai."
        ) from None
    key = os.environ.get(endpoint.key_env, "").strip()
    # Local servers are content with any word, which then is no secret and may well stand in a reply.
    hidden = lambda text: text.replace(key, "***") if len(key) >= _SECRET else text
    made = openai.OpenAI(api_key=key or "none", base_url=endpoint.base_url, timeout=endpoint.timeout, max_retries=0)

    def send(**parameters: Any) -> bytes:
        try:
            body = made.chat.completions.with_raw_response.create(model=endpoint.model, **parameters).content
            return hidden(body.decode(errors="replace")).encode()
        except openai.APIStatusError as error:
            text = " ".join(hidden(error.response.text).split())[:300]
            wait = _seconds(error.response.headers.get("retry-after"))
            raise Trouble(f"status {error.status_code} ({text})", error.status_code, wait) from None
        except openai.APITimeoutError:
            raise Trouble(f"no reply within {endpoint.timeout:g} s") from None
        except openai.OpenAIError as error:
            raise Trouble(hidden(f"no connection ({error.__cause__ or error})")) from None

    return send


def _seconds(after: str | None) -> float:
    """Retry-After, seconds or a date, as seconds from now; 0 where it says neither."""
    try:
        seconds = float(after or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), _DAY)


def ask(question: str, endpoint: Endpoint, mode: str, send: Callable[..., bytes], traffic: Traffic) -> Label:
    """A question's label.

    Raises:
        Trouble: the last try failed, or one in a way that another will not mend. Stopped: traffic.stop was set.
    """
    tokens_in = tokens_out = tries = 0
    while True:
        _turn(endpoint, traffic)
        parameters = _parameters(question, endpoint, mode, traffic)
        try:
            reply = forms.document(send(**parameters))
            used = forms.usage(reply)
            tokens_in, tokens_out = tokens_in + used[0], tokens_out + used[1]
            return Label(forms.READ[mode](reply), forms.said(reply)[0], tokens_in, tokens_out)
        except Trouble as error:
            if _refused(error, parameters, traffic):
                continue
            trouble = error
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # a reply of another shape
            trouble = Trouble(str(error) if isinstance(error, ValueError) else f"the reply is malformed ({error!r})")
        tries += 1
        if tries > endpoint.retries or not trouble.passes:
            raise Trouble(f"{trouble} (try {tries} of {endpoint.retries + 1})", trouble.status)
        _pause(tries, trouble, traffic)


def _parameters(question: str, endpoint: Endpoint, mode: str, traffic: Traffic) -> dict[str, Any]:
    """Of the chat completion. Log-probs are asked for where they are read, until the endpoint refuses."""
    limit = "max_completion_tokens" if "max_tokens" in traffic.refused else "max_tokens"
    wanted = mode == "pairwise" and "logprobs" not in traffic.refused
    return {
        "messages": [{"role": "user", "content": question}],
        "temperature": endpoint.temperature,
        limit: endpoint.max_tokens,
        **({"logprobs": True, "top_logprobs": _TOP} if wanted else {}),
    }


def _refused(error: Trouble, sent: dict[str, Any], traffic: Traffic) -> bool:
    """Was it a parameter that there is another way for? From then on all requests go that way."""
    named = [name for name in ("logprobs", "max_tokens") if name in sent and name in str(error)]
    if error.status not in (400, 422) or not named:
        return False
    with traffic.lock:
        new = set(named) - traffic.refused
        traffic.refused.update(named)
    for name in sorted(new):
        metrics.say(f"judge: the endpoint refuses {name}, asking without it")
    return True


def _turn(endpoint: Endpoint, traffic: Traffic) -> None:
    """Returns when a request may go: requests of all threads keep 60 s / per_minute apart."""
    with traffic.lock:
        now = time.monotonic()
        start = max(now, traffic.not_before)
        if endpoint.per_minute:
            traffic.not_before = start + 60 / endpoint.per_minute
    if traffic.stop.wait(start - now):
        raise Stopped
    with traffic.lock:
        traffic.requests += 1


def _pause(tries: int, trouble: Trouble, traffic: Traffic) -> None:
    """Before a retry: exponential, with jitter, so that threads that failed together do not come back together. What
    the endpoint says of itself holds for all threads.
    """
    with traffic.lock:
        traffic.retries += 1
        traffic.not_before = max(traffic.not_before, time.monotonic() + trouble.after)
    if trouble.after > LONGEST:
        metrics.say(f"judge: {trouble}; waiting for {trouble.after:.0f} s, as the endpoint asks")
    if traffic.stop.wait(min(LONGEST, BACKOFF * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)):
        raise Stopped
