"""A judge as the source of rewards: a language model behind an OpenAI-compatible endpoint compares the candidates of a
prompt two by two, or grades each.

Comparing asks for both orders of every two candidates, since judges favour places (Zheng et al., 2023: "Judging
LLM-as-a-Judge"), and gives probabilities [P, C, C] which need not be transitive; a candidate's reward is its mean over
the others, as in SPPO (Wu et al., 2024). Answers are kept on disk by content (`labels`) and asked for once.
"""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sera_jax import calibration, metrics, nash, processes
from sera_jax.judge import endpoint as endpoints
from sera_jax.judge import forms, labels
from sera_jax.judge.endpoint import Endpoint, Stopped, Traffic, Trouble
from sera_jax.judge.forms import template
from sera_jax.judge.labels import Label
from sera_jax.records import Text

__all__ = ["MODES", "Endpoint", "JudgeError", "Judged", "Prices", "grades", "pairwise", "ready", "template"]

Question = dict[str, Text]  # what the fields of the template are filled with


class JudgeError(ValueError):
    """A judge that gives no answer: says why, what is kept, and how to go on."""


@dataclasses.dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency; 0 = not known."""

    per_million_in: float = 0.0
    per_million_out: float = 0.0


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a judge says of candidates.

    rewards_PC: float32, NaN where there is no candidate. prob_PCC: float32, P[p, i, j] that candidate i is better than
    j: P[p, i, j] + P[p, j, i] = 1, 0.5 on the diagonal, NaN where there is no candidate; None of grades. told: measures
    for the log, the same whoever asked and when, but for those under perf/.
    """

    rewards_PC: np.ndarray
    prob_PCC: np.ndarray | None
    told: dict[str, float | None]


def ready(endpoint: Endpoint, path: str, mode: str) -> None:
    """Raises ValueError for what would else be found when the first candidates are there: no package, no template."""

    def look() -> None:
        endpoints.client(endpoint)
        template(path, mode)

    processes.once(look)


def pairwise(
    endpoint: Endpoint,
    prices: Prices,
    form: str,
    prompts: Sequence[Text],
    texts_PC: Sequence[Sequence[str | None]],
    *,
    cache: pathlib.Path,
    label: str,
) -> Judged:
    """Every two candidates of a prompt, in both orders. Process 0 asks, all know.

    Rewards are mean probabilities of being better than the other candidates of the prompt; 0.5 where there is no other.

    Args:
        form: the template's text. texts_PC: of the responses; None = none, about which nothing is asked. Of two equal
            texts neither is better, unasked. cache: JSONL of labels. label: of the progress.

    Raises:
        JudgeError: a question stays without an answer.
    """
    pairs = [
        (p, i, j)
        for p, texts in enumerate(texts_PC)
        for i, first in enumerate(texts)
        for j, second in enumerate(texts)
        if i != j and first is not None and second is not None and first != second
    ]
    questions = [{"prompt": prompts[p], "first": texts_PC[p][i], "second": texts_PC[p][j]} for p, i, j in pairs]
    first_Q, told = _values(endpoint, prices, "pairwise", form, questions, cache, label)
    prob_PCC = np.where(_there(texts_PC)[:, :, None] & _there(texts_PC)[:, None, :], 0.5, np.nan)
    first_PCC = prob_PCC.copy()
    if pairs:
        first_PCC[tuple(np.array(pairs).T)] = first_Q
    prob_PCC = (first_PCC + 1 - first_PCC.swapaxes(1, 2)) / 2
    return Judged(
        nash.win_rewards(prob_PCC), prob_PCC.astype(np.float32), told | _of_places(endpoint, first_PCC, pairs)
    )


def grades(
    endpoint: Endpoint,
    prices: Prices,
    form: str,
    prompts: Sequence[Text],
    texts_PC: Sequence[Sequence[str | None]],
    *,
    cache: pathlib.Path,
    label: str,
) -> Judged:
    """A grade from 1 to 10 of every candidate, which is its reward. Arguments and errors as in `pairwise`."""
    places = [(p, c) for p, texts in enumerate(texts_PC) for c, text in enumerate(texts) if text is not None]
    questions = [{"prompt": prompts[p], "response": texts_PC[p][c]} for p, c in places]
    value_Q, told = _values(endpoint, prices, "grade", form, questions, cache, label)
    rewards_PC = np.full(_there(texts_PC).shape, np.nan, np.float32)
    if places:
        rewards_PC[tuple(np.array(places).T)] = value_Q
    return Judged(rewards_PC, None, told)


MODES = {"pairwise": pairwise, "grade": grades}


def _there(texts_PC: Sequence[Sequence[str | None]]) -> np.ndarray:
    """bool [P, C]: where there is a response."""
    most = max(map(len, texts_PC), default=0)
    return np.array([[*(t is not None for t in texts), *[False] * (most - len(texts))] for texts in texts_PC], bool)


def _of_places(endpoint: Endpoint, first_PCC: np.ndarray, pairs: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """judge/consistency: share of the pairs on which both orders agree. judge/first: mean probability that the response
    in the first place is the better one, 0.5 where places do not count.
    """
    if not pairs:
        return {"judge/consistency": None, "judge/first": None}
    place_Q2 = np.array([(first_PCC[p, i, j], first_PCC[p, j, i]) for p, i, j in pairs if i < j])
    agree, first = calibration.of_orders(place_Q2)
    metrics.say(f"judge {endpoint.model}: both orders agree on {100 * agree:.0f} % of {len(place_Q2)} pairs")
    return {"judge/consistency": agree, "judge/first": first}


# --- questions → answers ----------------------------------------------------------------------------------------------


def _values(
    endpoint: Endpoint,
    prices: Prices,
    mode: str,
    form: str,
    questions: Sequence[Question],
    cache: pathlib.Path,
    label: str,
) -> tuple[np.ndarray, dict[str, Any]]:
    """float64 [Q]: the answers, one to one, and what they took; known on all processes."""
    return processes.once(lambda: _asked(endpoint, prices, mode, form, questions, cache, label))


def _asked(
    endpoint: Endpoint,
    prices: Prices,
    mode: str,
    form: str,
    questions: Sequence[Question],
    cache: pathlib.Path,
    label: str,
) -> tuple[np.ndarray, dict[str, Any]]:
    keys = [
        labels.key(
            model=endpoint.model,
            mode=mode,
            template=form,
            question=forms.filled(form, question),
            temperature=endpoint.temperature,
            max_tokens=endpoint.max_tokens,
        )
        for question in questions
    ]
    traffic = Traffic()
    with labels.opened(cache) as (known, keep):
        missing = {key: question for key, question in zip(keys, questions) if key not in known}
        try:
            _fill(endpoint, mode, form, missing, keep, traffic, label)
        except Trouble as trouble:
            keyless = trouble.status in (401, 403)
            hint = f" Is the right key in the environment variable {endpoint.key_env}?" if keyless else ""
            raise JudgeError(
                f"the judge {endpoint.model!r} at {endpoint.base_url} gave no answer: {trouble}.{hint} {len(known)} "
                f"labels are kept in {cache}: the same command goes on behind them."
            ) from None
        used = [known[key] for key in dict.fromkeys(keys)]
        value_Q = np.array([known[key].value for key in keys], np.float64)
    return value_Q, _costs(endpoint, prices, used, len(missing), traffic)


def _fill(
    endpoint: Endpoint,
    mode: str,
    form: str,
    missing: Mapping[str, Question],
    keep: Any,
    traffic: Traffic,
    label: str,
) -> None:
    """Asks what is missing, `concurrent` questions at a time; each answer is on disk before it counts as given."""
    if not missing:
        return
    send = endpoints.client(endpoint)

    def answer(key: str) -> None:
        try:
            keep(key, endpoints.ask(forms.filled(form, missing[key]), endpoint, mode, send, traffic))
        except BaseException:
            traffic.stop.set()  # before any thread turns to its next question
            raise

    with concurrent.futures.ThreadPoolExecutor(endpoint.concurrent) as pool:
        futures = [pool.submit(answer, key) for key in missing]
        done = concurrent.futures.as_completed(futures)
        try:
            for _ in metrics.track(done, total=len(futures), label=label, unit="labels"):
                if traffic.stop.is_set():
                    break
        finally:  # what is under way is kept if it is answered at once
            traffic.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    errors = [future.exception() for future in futures if not future.cancelled()]
    for error in errors:
        if error is not None and not isinstance(error, Stopped):
            raise error


def _costs(
    endpoint: Endpoint, prices: Prices, used: Sequence[Label], asked: int, traffic: Traffic
) -> dict[str, float | None]:
    """What these labels took, whenever they were asked for; and, under perf/, what this process has asked."""
    tokens_in, tokens_out = sum(label.tokens_in for label in used), sum(label.tokens_out for label in used)
    cost = (tokens_in * prices.per_million_in + tokens_out * prices.per_million_out) / 1e6
    priced = prices.per_million_in or prices.per_million_out
    metrics.say(
        f"judge {endpoint.model}: {len(used)} labels, {len(used) - asked} of them known; {traffic.requests} requests, "
        f"{traffic.retries} retries; {tokens_in:,} tokens in, {tokens_out:,} out"
        + (f", cost {cost:.4g}" if priced else "")
    )
    return {
        "judge/labels": len(used),
        "judge/tokens_in": tokens_in,
        "judge/tokens_out": tokens_out,
        **({"judge/cost": cost} if priced else {}),
        "perf/judge_requests": traffic.requests,
        "perf/judge_retries": traffic.retries,
    }
