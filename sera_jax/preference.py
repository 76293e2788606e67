"""A pairwise preference model: what it reads of two responses, and how its answers become probabilities.

It reads both responses at once, so its preferences need not be transitive, and they are left as they are:
P[p, i, j], the probability that response i to prompt p is better than j, with P[p, i, j] + P[p, j, i] = 1. Of two
responses it is asked in both orders, since models favour places. Its question is that of RLHF Workflow (Dong et al.
2024, arXiv 2405.07863, pairwise preference model):

    [CONTEXT] {context} [RESPONSE A] {first} [RESPONSE B] {second} \\n

as the user's turn where the tokeniser has a chat template, else as plain text behind BOS. Two kinds answer it:

    generative   a policy, which goes on with the label of the better response, one token. With p(A | a, b) the softmax
                 over the two labels alone,  P(a > b) = ½ [p(A | a, b) + p(B | b, a)].
    head         a decoder with a scalar head, whose score s(a, b) is read at the question's last token:
                 P(a > b) = σ(½ [s(a, b) - s(b, a)]), antisymmetric whatever s is.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax import calibration, data
from sera_jax.records import Text, Tree

TEMPLATE = "[CONTEXT] {context} [RESPONSE {a}] {first} [RESPONSE {b}] {second} \n"
KEY = "preference"  # of config.json: the form that a model was trained with
CLIP = 1e-6  # least probability that log-odds are taken of
UNREADABLE = "\ufffd"  # what decoders write in the place of bytes that are no character
UTF8_BYTES = 4  # of a character, at most
TRIES = 8  # of cutting texts until their question fits

Asked = tuple[Text, Text, Text]  # prompt, one response, the other


@dataclasses.dataclass(frozen=True)
class Form:
    """How a preference model is asked.

    head: is its answer a score, in the place of a label? labels: of the first and the second response. max_length:
    tokens of question and label; of longer ones the prompt is cut to max_prompt_length tokens (truncation: a key of
    data.CUTS, which end stays), then the responses, to the same length, keeping their start.
    """

    head: bool
    labels: tuple[str, str] = ("A", "B")
    max_length: int = 4096
    max_prompt_length: int = 2048
    truncation: str = "keep_end"


def told(form: Form) -> dict[str, Any]:
    """What config.json says of the form; `read` reads it."""
    values = dataclasses.asdict(form)
    return {KEY: {**{k: v for k, v in values.items() if k != "head"}, "labels": list(form.labels)}}


def read(config: dict[str, Any], scored: bool) -> Form:
    """The form of a folder's config.json; of a policy that says nothing, as those of RLHF Workflow, the usual one.

    Args:
        scored: has it a scalar head?

    Raises:
        ValueError: a scalar head that says nothing: it is that of a reward model of single responses.
    """
    if KEY in config:
        stored = config[KEY]
        return Form(scored, **{**stored, "labels": tuple(stored["labels"])})
    if scored:
        raise ValueError(
            f"config.json has no key {KEY!r}: it is a reward model, which scores single responses; expected a "
            "preference model. Use reward.source 'model', or train one with `python -m sera_jax.reward_model` and kind "
            "'preference' or 'preference_head'."
        )
    longest = int(config.get("max_position_embeddings") or Form.max_length)
    return Form(False, max_length=longest, max_prompt_length=max(1, longest // 2))


# --- questions --------------------------------------------------------------------------------------------------------


def context(prompt: Text) -> str:
    """A prompt as the question shows it, turn by turn; plain text is one turn of the user."""
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return "".join(f"\n\n<turn> {turn['role']}\n {turn['content']}" for turn in turns)


def answer(response: Text) -> str:
    """A response as the question shows it: the text of a single message, else all its turns."""
    if isinstance(response, str):
        return response
    return response[0]["content"] if len(response) == 1 else context(response)


def question(form: Form, context: str, first: str, second: str) -> str:
    """The text of a question."""
    a, b = form.labels
    return TEMPLATE.format(context=context, a=a, first=first, b=b, second=second)


def label_ids(form: Form, tokenizer: data.Tokenizer) -> tuple[int, int]:
    """The two tokens that a generative model answers with.

    Raises:
        ValueError: a label is not exactly one token, or both are the same.
    """
    ids = data.continuations(tokenizer, form.labels)
    a, b = (tuple(one or ()) for one in ids)
    if len(a) != 1 or len(b) != 1 or a == b or tokenizer.unk_token_id in (*a, *b):
        shown = ", ".join(f"{label!r} → {list(one)}" for label, one in zip(form.labels, (a, b)))
        raise ValueError(
            f"preference.labels: this tokeniser makes {shown} of the labels, expected one known token each, and two "
            "different ones: the answer is read off that token. Set preference.labels to two words of its vocabulary, "
            "or use kind 'preference_head', which needs no labels."
        )
    return a[0], b[0]


@dataclasses.dataclass(frozen=True)
class Questions:
    """Token ids of both orders of each pair, (one first, the other first): int32 each; None where a question does not
    fit even when cut. cut: pairs whose texts were shortened.
    """

    orders: tuple[tuple[np.ndarray, np.ndarray] | None, ...]
    cut: int


def questions(form: Form, tokenizer: data.Tokenizer, asked: Sequence[Asked]) -> Questions:
    """Pairs of responses → the questions about them, tokenised whole. What is cut is cut alike in both orders."""
    room = form.max_length - (not form.head)  # the label's token
    bos = None if tokenizer.chat_template else data.bos_id(tokenizer)
    texts = [(context(prompt), answer(one), answer(other)) for prompt, one, other in asked]
    flat = [question(form, c, *pair) for c, one, other in texts for pair in ((one, other), (other, one))]
    ids = _ids(tokenizer, flat, bos)
    orders: list[tuple[np.ndarray, np.ndarray] | None] = list(zip(ids[::2], ids[1::2]))
    long = [n for n, both in enumerate(orders) if max(map(len, both)) > room]
    for n in long:
        orders[n] = _shortened(form, tokenizer, texts[n], room, max(map(len, orders[n])), bos)
    return Questions(tuple(orders), len(long))


def _ids(tokenizer: data.Tokenizer, texts: Sequence[str], bos: int | None) -> list[np.ndarray]:
    if tokenizer.chat_template:
        user = lambda text: [{"role": "user", "content": text}]
        texts = [tokenizer.apply_chat_template(user(t), tokenize=False, add_generation_prompt=True) for t in texts]
    begin = [] if bos is None else [bos]
    return [np.array(ids if ids[:1] == begin else begin + ids, np.int32) for ids in data.encoded(tokenizer, texts)]


def _shortened(
    form: Form, tokenizer: data.Tokenizer, texts: tuple[str, str, str], room: int, length: int, bos: int | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Both orders of a question of `length` tokens, cut to `room`; None where that cannot be."""
    prompt, one, other = data.encoded(tokenizer, texts)
    rest = room - (length - len(prompt) - len(one) - len(other))  # left for the three of them
    shown = texts[0]
    if len(prompt) > form.max_prompt_length:
        prompt = data.CUTS[form.truncation](prompt, form.max_prompt_length)
        shown = _part(tokenizer, prompt, form.truncation)
    rest -= len(prompt)
    # Texts tokenised apart, and cut ones, may come out longer together than they are: then a little less is kept.
    for _ in range(TRIES):
        if rest < 2:
            return None
        each = max(rest // 2, rest - min(len(one), len(other)))  # what a shorter one leaves is the other's
        first, second = (
            text if len(ids) <= each else _part(tokenizer, ids[:each], "keep_start")
            for text, ids in zip(texts[1:], (one, other))
        )
        both = _ids(tokenizer, [question(form, shown, *pair) for pair in ((first, second), (second, first))], bos)
        over = max(map(len, both)) - room
        if over <= 0:
            return both[0], both[1]
        rest -= over
    return None


def _part(tokenizer: data.Tokenizer, ids: list[int], kept: str) -> str:
    """The text of the tokens that a cut left over (kept: which end of the text they are, a key of data.CUTS).

    Of a character that the cut went through nothing is left. Where characters are written as tokens of a byte each, as
    of most alphabets by a small vocabulary, decoders make a whole run of them unreadable over one that is not complete.
    """

    def text(gone: int) -> str:
        left = data.CUTS[kept](ids, len(ids) - gone)
        return tokenizer.decode(left, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    if UNREADABLE not in (whole := text(0)):
        return whole
    return min(map(text, range(UTF8_BYTES)), key=lambda text: text.count(UNREADABLE))


# --- trees: what the model's forward pass takes -----------------------------------------------------------------------


def to_train(
    form: Form, tokenizer: data.Tokenizer, names: Sequence[str], found: Questions, *, seed: int, both: bool
) -> list[list[Tree]]:
    """Trees that teach the first response of each pair to be the better one; none where a question does not fit.

    generative: the question with its label as the one branch, in an order drawn by seed and name, or in both orders, a
    tree each. head: as `to_ask`.
    """
    if form.head:
        return to_ask(form, tokenizer, names, found)
    labels, out = label_ids(form, tokenizer), []
    for name, orders in zip(names, found.orders, strict=True):
        places = (0, 1) if both else (_place(seed, name),)
        label = lambda k: np.array([labels[k]], np.int32)
        out.append([Tree(f"{name}/{form.labels[k]}", orders[k], (label(k),)) for k in places] if orders else [])
    return out


def _place(seed: int, name: str) -> int:
    """Where the better response of a pair stands: 0 or 1, a fair coin by seed and name."""
    return hashlib.blake2b(f"{seed} {name}".encode(), digest_size=1).digest()[0] & 1


def to_ask(form: Form, tokenizer: data.Tokenizer, names: Sequence[str], found: Questions) -> list[list[Tree]]:
    """Trees whose values say which response of each pair is better (`probabilities`).

    generative: a tree for each order, the two labels as its branches. head: one tree, the two orders as its branches
    behind the tokens with which both begin, so that the context is computed once.
    """
    labels = () if form.head else tuple(np.array([i], np.int32) for i in label_ids(form, tokenizer))
    out = []
    for name, orders in zip(names, found.orders, strict=True):
        if orders is None:
            out.append([])
        elif form.head:
            n = _shared(*orders)
            out.append([Tree(name, orders[0][:n], (orders[0][n:], orders[1][n:]))])
        else:
            out.append([Tree(f"{name}/{k}", ids, labels) for k, ids in enumerate(orders)])
    return out


def longest(form: Form) -> tuple[list[int], list[int]]:
    """What the longest trees of `to_train` and of `to_ask` measure, as rows.measure: of a head both orders of a
    question of max_length tokens, which share one at least; else such a question with its label, or with both."""
    if form.head:
        both = [2 * form.max_length - 1, 2 * (form.max_length - 1), 2]
        return both, both
    return [form.max_length, 1, 1], [form.max_length + 1, 2, 2]


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens with which both begin; each keeps one of its own at least."""
    most = min(len(one), len(other)) - 1
    differ = np.flatnonzero(one[:most] != other[:most])
    return int(differ[0]) if len(differ) else most


# --- values → probabilities -------------------------------------------------------------------------------------------


def first_wins(form: Form, value_F: np.ndarray) -> np.ndarray | None:
    """float64 [Q, 2]: of the trees of Q pairs (`to_ask`), the probability that the response in the first place is the
    better one, in both orders; None of a head, whose scores mean something only together.

    Args:
        value_F: float [4Q] log-probs of the labels, by flat branch number.
    """
    if form.head:
        return None
    value_Q22 = np.asarray(value_F, np.float64).reshape(-1, 2, 2)  # order, label
    return _sigmoid(value_Q22[:, :, 0] - value_Q22[:, :, 1])


def probabilities(form: Form, value_F: np.ndarray) -> np.ndarray:
    """float64 [Q]: P(one > other) of Q pairs, exactly ½ in a tie, from the values of their trees (`to_ask`).

    Args:
        value_F: by flat branch number: log-probs of the labels (4 a pair), or scores (2 a pair).
    """
    place_Q2 = first_wins(form, value_F)
    if place_Q2 is None:
        score_Q2 = np.asarray(value_F, np.float64).reshape(-1, 2)
        return _sigmoid((score_Q2[:, 0] - score_Q2[:, 1]) / 2)
    return (place_Q2[:, 0] + 1 - place_Q2[:, 1]) / 2


def log_odds(prob: np.ndarray) -> np.ndarray:
    """log P / (1 - P) of probabilities that are kept CLIP away from 0 and 1."""
    kept = np.clip(prob, CLIP, 1 - CLIP)
    return np.log(kept) - np.log1p(-kept)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def of_places(place_Q2: np.ndarray | None) -> dict[str, float | None]:
    """preference/consistency: share of the pairs on which both orders agree; preference/first: mean probability that
    the response in the first place is the better one. {} of a head.
    """
    if place_Q2 is None or not len(place_Q2):
        return {}
    return dict(zip(("preference/consistency", "preference/first"), calibration.of_orders(place_Q2)))


# --- more than two responses ------------------------------------------------------------------------------------------

Ask = Callable[[list[tuple[int, int, int]]], np.ndarray]  # (prompt, i, j) of each question → P(i > j), float64 [Q]


def compared(valid_PC: np.ndarray, ask: Ask) -> np.ndarray:
    """float64 [P, C, C]: every two valid responses of a prompt, n(n-1)/2 questions; ½ on the diagonal, NaN where a
    response is not valid. What comes out is not made transitive.
    """
    pairs = [(int(p), int(i), int(j)) for p, i, j in np.argwhere(valid_PC[:, :, None] & valid_PC[:, None, :]) if i < j]
    prob_PCC = np.where(valid_PC[:, :, None] & valid_PC[:, None, :], 0.5, np.nan)
    prob_Q = ask(pairs)
    for (p, i, j), prob in zip(pairs, prob_Q, strict=True):
        prob_PCC[p, i, j], prob_PCC[p, j, i] = prob, 1 - prob
    return prob_PCC


def tournament(valid_PC: np.ndarray, ask: Ask) -> np.ndarray:
    """float64 [P, C] rewards from n-1 questions a prompt: a knock-out over the n valid responses, in ⌈log2 n⌉ rounds of
    all prompts together (RLHF Workflow's tournament is linear in n, too).

    Neighbours meet, the better one goes on (of a tie the earlier), an odd last one without a question. The winner's
    reward is 0; every other's is that of whom it lost to, less the log-odds of that comparison: the Bradley-Terry
    rewards of the n-1 answers, which they fit exactly. So best against worst is the winner against the end of the worst
    chain of defeats; responses that did not meet are compared along their chains alone.

    Returns:
        NaN where a response is not valid.
    """
    rewards_PC = np.where(valid_PC, 0.0, np.nan)
    left = [np.flatnonzero(row).tolist() for row in valid_PC]
    lost: list[tuple[int, int, int, float]] = []  # prompt, loser, whom to, log-odds
    while any(len(row) > 1 for row in left):
        pairs = [(p, row[k], row[k + 1]) for p, row in enumerate(left) for k in range(0, len(row) - 1, 2)]
        odds_Q = log_odds(ask(pairs))
        beaten = [(p, j, i, float(o)) if o >= 0 else (p, i, j, float(-o)) for (p, i, j), o in zip(pairs, odds_Q)]
        out = {(p, loser) for p, loser, _, _ in beaten}
        left = [[c for c in row if (p, c) not in out] for p, row in enumerate(left)]
        lost += beaten
    for p, loser, winner, odds in reversed(lost):
        rewards_PC[p, loser] = rewards_PC[p, winner] - odds
    return rewards_PC


def cycles(prob_PCC: np.ndarray) -> tuple[int, int]:
    """How many triples of responses to a prompt are intransitive (i beats j, j beats k, k beats i), and how many there
    are in which any two were compared and neither tied. float [P, C, C], NaN where nothing was compared.
    """
    beats_PCC = (np.nan_to_num(prob_PCC, nan=0.5) > 0.5).astype(np.int64)
    # A triple without ties is a cycle in one of two directions, or none; tr B³ counts each of its three starts.
    met_PCC = beats_PCC + beats_PCC.swapaxes(1, 2)
    closed = lambda m: int(np.einsum("pij,pjk,pki->", m, m, m))
    return closed(beats_PCC) // 3, closed(met_PCC) // 6
