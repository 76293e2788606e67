"""Who ranks the candidates of a prompt, behind one small interface: Candidates → rewards_PC, the higher the better.

Each source is one function. A source that lives on the host (a Python function) is asked candidate by candidate; the
implicit reward comes from log-probs that the trainer's own forward pass computed.
"""

import importlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sera_jax import metrics, processes, sample, sera
from sera_jax.records import Candidates, Text, Tree


def implicit(
    logp_EPC: np.ndarray,
    reference_PC: np.ndarray,
    length_PC: np.ndarray,
    weights_E: np.ndarray,
    reward: Callable[..., np.ndarray],
) -> np.ndarray:
    """SeRA's reward: the ensemble over iterates of the loss's own implicit reward (sera_jax.sera.ensemble).

    Args:
        logp_EPC: float32 log-probs of the candidates under each iterate. reference_PC: under the reward's reference.
        length_PC: response tokens. weights_E: sera.ensemble_weights. reward: (logp, reference, length) → reward.

    Returns:
        float32 [P, C]; NaN where a log-prob is.
    """
    rewards_EPC = np.stack([np.asarray(reward(logp, reference_PC, length_PC)) for logp in logp_EPC])
    return np.asarray(sera.ensemble(rewards_EPC, weights_E), np.float32)


def by_function(
    function: Callable[[Text, str], float] | None,
    prompts: Sequence[Text],
    texts_PC: Sequence[Sequence[str | None]],
    label: str,
) -> np.ndarray:
    """float32 [P, C]: a Python function's value of every (prompt, response); NaN where there is no response. Process 0
    asks it, all know.

    Args:
        function: from `load_function`; called with the prompt as it stands in the data (text or messages) and the
            response's text.
        texts_PC: of the responses; None = none, the function is not asked.

    Raises:
        ValueError: it returned something that is not a finite number.
    """
    return processes.once(lambda: _asked(function, prompts, texts_PC, label))


def _asked(
    function: Callable[[Text, str], float],
    prompts: Sequence[Text],
    texts_PC: Sequence[Sequence[str | None]],
    label: str,
) -> np.ndarray:
    rewards_PC = np.full((len(prompts), max(map(len, texts_PC), default=0)), np.nan, np.float32)
    for p, prompt in enumerate(metrics.track(prompts, total=len(prompts), label=label, unit="prompts")):
        for c, text in enumerate(texts_PC[p]):
            if text is None:
                continue
            value = function(prompt, text)
            if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
                raise ValueError(
                    f"the reward function returned {value!r} for prompt {p} and response {text!r}, expected a "
                    "finite number."
                )
            rewards_PC[p, c] = value
    return rewards_PC


def by_preference(
    function: Callable[[Text, str, str], float] | None,
    prompts: Sequence[Text],
    texts_PC: Sequence[Sequence[str | None]],
    label: str,
) -> np.ndarray:
    """float32 [P, C, C]: P[p, i, j], a Python function's probability that response i is better than j, for i < j; the
    rest follows, since P[p, i, j] + P[p, j, i] = 1 and equal texts have 0.5, unasked. NaN where there is no response.
    Process 0 asks, all know.

    Args:
        function: from `load_function`; called with the prompt as it stands in the data and the texts of the two.
        texts_PC: of the responses; None = none, the function is not asked.

    Raises:
        ValueError: it returned something that is not a probability.
    """
    return processes.once(lambda: _compared(function, prompts, texts_PC, label))


def _compared(
    function: Callable[[Text, str, str], float],
    prompts: Sequence[Text],
    texts_PC: Sequence[Sequence[str | None]],
    label: str,
) -> np.ndarray:
    most = max(map(len, texts_PC), default=0)
    prob_PCC = np.full((len(prompts), most, most), np.nan, np.float32)
    for p, prompt in enumerate(metrics.track(prompts, total=len(prompts), label=label, unit="prompts")):
        there = [(c, text) for c, text in enumerate(texts_PC[p]) if text is not None]
        for (i, first), (j, second) in itertools.combinations_with_replacement(there, 2):
            value = 0.5 if first == second else function(prompt, first, second)
            if not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
                raise ValueError(
                    f"the preference function returned {value!r} for prompt {p} and responses {first!r} and "
                    f"{second!r}, expected a probability, that the first is better than the second."
                )
            prob_PCC[p, i, j], prob_PCC[p, j, i] = value, 1 - value
    return prob_PCC


def random(candidates: Candidates, key: jax.Array) -> np.ndarray:
    """float32 [P, C]: uniform noise by key, content of the prompt and number of the candidate, whatever the order."""
    hash_P2 = np.stack([sample.prompt_hash(tokens) for tokens in candidates.prompts])
    keys_PC = sample.candidate_keys(key, hash_P2, candidates.finished_PC.shape[1])
    return np.asarray(jax.vmap(jax.vmap(jax.random.uniform))(keys_PC), np.float32)


def load_function(spec: str) -> Callable[[Text, str], float] | None:
    """ "module:function" → the function; modules of the current folder are found too. Only process 0 imports it (it may
    bring a model of its own); None on the others.

    Raises:
        ValueError: no such module or function.
    """
    return processes.held(lambda: _imported(spec))


def _imported(spec: str) -> Callable[[Text, str], float]:
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: the module has no name
        raise ValueError(
            f"reward function {spec!r} cannot be imported ({error}); expected 'module:function' with a module of this "
            f"environment or of {os.getcwd()}."
        ) from None
    if not callable(function):
        raise ValueError(f"reward function {spec!r} is a {type(function).__name__}, expected a function.")
    return function


def adjusted(rewards_PC: np.ndarray, length_PC: np.ndarray, *, penalty: float, normalise: bool) -> np.ndarray:
    """Rewards by length if asked for, then less `penalty` for each unit of length (DICE, RLHF Workflow's max_min_p).

    Args:
        length_PC: in tokens or characters (LENGTHS).
    """
    return (rewards_PC / np.maximum(length_PC, 1) if normalise else rewards_PC) - penalty * length_PC


def unbiased_penalty(rewards_PC: np.ndarray, length_PC: np.ndarray, valid_PC: np.ndarray) -> float:
    """α >= 0 such that the best response by r - α·length is, on average over prompts, as long as the worst one (DICE).

    The mean gap falls as α grows: the best one gets shorter, the worst one longer. So bisection finds where it crosses
    0, and of both sides the one nearer to 0 is taken; DICE looks for the first minimum on a grid of 0.001. 0 where the
    best ones are no longer as it is, or where no prompt has a pair.
    """
    rewards_PC, length_PC = np.asarray(rewards_PC, np.float64), np.asarray(length_PC, np.float64)

    def gap(alpha: float) -> float:
        value_PC = rewards_PC - alpha * length_PC
        high_PC, low_PC = np.where(valid_PC, value_PC, -np.inf), np.where(valid_PC, value_PC, np.inf)
        some_P = high_PC.max(axis=1) > low_PC.min(axis=1)
        of = lambda pick_P: np.take_along_axis(length_PC, pick_P[:, None], axis=1)[:, 0]
        gap_P = of(high_PC.argmax(axis=1)) - of(low_PC.argmin(axis=1))
        return float(gap_P[some_P].mean()) if some_P.any() else 0.0

    if gap(0.0) <= 0:
        return 0.0
    spread = lambda value_PC: float(np.std(value_PC[valid_PC]))
    low, high = 0.0, max(spread(rewards_PC), 1e-6) / max(spread(length_PC), 1e-6)
    while gap(high) > 0:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) > 0 else (low, middle)
    return low if abs(gap(low)) < abs(gap(high)) else high


def standardised(values_PC: np.ndarray, valid_PC: np.ndarray, scale: str) -> np.ndarray:
    """float64 [P, C]: (value - mean) / standard deviation (population form) over the valid candidates of all prompts
    (`iteration`) or of each prompt (`prompt`); 0 where all of them are alike. `none`: as they are."""
    values_PC = np.where(valid_PC, np.asarray(values_PC, np.float64), np.nan)
    if scale == "none" or not valid_PC.any():
        return values_PC
    axis = {"iteration": None, "prompt": 1}[scale]
    count = np.maximum(valid_PC.sum(axis=axis, keepdims=True), 1)
    mean = np.nansum(values_PC, axis=axis, keepdims=True) / count
    deviation = np.sqrt(np.nansum((values_PC - mean) ** 2, axis=axis, keepdims=True) / count)
    size = np.nanmax(np.abs(np.where(valid_PC, values_PC, 0)), axis=axis, keepdims=True)
    flat = deviation <= 1e-6 * size  # equal values have a deviation of rounding size
    return np.where(flat & valid_PC, 0, (values_PC - mean) / np.where(flat, 1, deviation))


def weighted(values_SPC: np.ndarray, weights_S: np.ndarray) -> np.ndarray:
    """Σ_s weight_s · value_s."""
    return np.tensordot(np.asarray(weights_S, np.float64), values_SPC, axes=1)


def worst(values_SPC: np.ndarray, weights_S: np.ndarray) -> np.ndarray:
    """min_s value_s: worst-case over the sources (Coste et al., ICLR 2024, arXiv 2310.02743); weights unread."""
    return values_SPC.min(axis=0)


COMBINATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"weighted": weighted, "worst": worst}
"""combine(values_SPC, weights_S) → values_PC, of several sources of rewards."""


def combined(
    values_SPC: np.ndarray, valid_PC: np.ndarray, weights_S: np.ndarray, *, combine: str, scale: str
) -> np.ndarray:
    """float32 [P, C]: one reward of several sources, each standardised first as `scale` says; NaN where not valid."""
    scaled_SPC = np.stack([standardised(values_PC, valid_PC, scale) for values_PC in values_SPC])
    return COMBINATIONS[combine](scaled_SPC, weights_S).astype(np.float32)


def trees(candidates: Candidates) -> list[Tree]:
    """One tree of C branches for each prompt, for scoring; an empty candidate (cannot be scored) is left out."""
    return [
        Tree(name, prompt, tuple(t for t in tokens if len(t)))
        for name, prompt, tokens in zip(candidates.ids, candidates.prompts, candidates.tokens_PC)
        if any(len(t) for t in tokens)
    ]


def lengths(candidates: Candidates) -> np.ndarray:
    """int32 [P, C]: tokens of each candidate."""
    return np.array([[len(t) for t in tokens] for tokens in candidates.tokens_PC], np.int32)


def characters(candidates: Candidates) -> np.ndarray:
    """int32 [P, C]: characters of each candidate."""
    return np.array([[len(text) for text in texts] for texts in candidates.texts_PC], np.int32)


LENGTHS: dict[str, Callable[[Candidates], np.ndarray]] = {"tokens": lengths, "characters": characters}


def text_length(prompt: Text, response: str) -> float:
    """A reward function: characters of the response. What length alone would say."""
    return float(len(response))


def on_grid(values_F: np.ndarray, candidates: Candidates) -> np.ndarray:
    """Values by flat branch number of `trees(candidates)` → [P, C], NaN for empty candidates."""
    length_PC = lengths(candidates)
    out = np.full(length_PC.shape, np.nan, np.float32)
    out[length_PC > 0] = values_F
    return out
