"""A synthetic preference world with a known gold reward: `python -m sera_jax.toyworld --out DIR`.

A prompt asks for facts about people; a good response states each of them, truly, once and in the order asked:

    prompt    please tell : tom colour pet ; ann town ?
    response  well tom likes amber and keeps rabbit , i think ann visits minsk .

What is asked has to be copied from the prompt, what is true looked up in a fixed table (`truth`). Authors know one
part of the table and mostly get the other part wrong in one and the same way (`lure`), so that a model which imitates
them is right here and wrong there, samples the truth everywhere, and has something to learn from preferences. Filler
words cost and earn nothing: length is the easy cue, content the hard feature.

Written into DIR: model/ (config and tokeniser of a Llama of some 0.35 M parameters, no weights), sft.jsonl,
pairs.jsonl, prompts.jsonl, eval_prompts.jsonl. `--label CANDIDATES --out PAIRS` labels what `sera_jax.generate` wrote.
The gold reward is `sera_jax.toyworld:gold` wherever a config takes "module:function".
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import tokenizers

from sera_jax import config as configs
from sera_jax.config import ConfigError

Slot = tuple[str | None, str]
"""(person, kind): one thing that can be known of one person; None = a statement about nobody."""

# --- the world: people, kinds of facts, words -------------------------------------------------------------------------

PEOPLE = tuple(
    "tom ann joe sue max eva ben ida leo mia sam zoe dan amy kim lou roy fay gus ivy hal una ned pam".split()
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fact. name: in prompts. verb: in responses. weight: in gold. values: a ring of near misses."""

    name: str
    verb: str
    weight: float
    values: tuple[str, ...]


# The weights have few equal sums, so that few responses tie.
KINDS = tuple(
    Kind(name, verb, weight, tuple(values.split()))
    for name, verb, weight, values in (
        ("colour", "likes", 1.00,
         "red blue green pink grey white black brown gold silver purple orange teal olive coral amber"),
        ("pet", "keeps", 0.91,
         "cat dog fish bird mouse horse goat sheep duck frog snake rabbit turtle pony crab hen"),
        ("town", "visits", 0.83,
         "rome paris oslo cairo lima delhi tokyo quito minsk accra sofia dublin lisbon vienna prague athens"),
        ("food", "eats", 0.77,
         "rice bread soup cheese beans pasta plums cake eggs honey corn dates figs nuts peas salad"),
        ("game", "plays", 0.70,
         "chess golf tennis rugby cricket poker darts bowls polo squash hockey bingo whist tag snooker croquet"),
        ("vehicle", "drives", 0.64,
         "car bus van tram truck bike boat train plane taxi sled canoe tractor scooter wagon ferry"),
    )
)  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}
BY_VERB = {kind.verb: kind for kind in KINDS}
VALUES = frozenset(value for kind in KINDS for value in kind.values)

REQUESTS = tuple(
    tuple(r.split())
    for r in ("please tell", "kindly say", "now report", "can you tell", "i must know", "let us hear", "do say")
)
FILLER = tuple(
    tuple(f.split())
    for f in (
        "well", "so", "indeed", "of course", "you know", "as ever", "i think", "to be honest", "in my view", "it seems",
        "by the way", "after all", "as far as we can see", "quite frankly", "more or less", "for what it is worth",
        "if memory serves", "at this point", "some people say", "one might add", "without doubt", "in any case",
    )
)  # fmt: skip
MARKS = (":", ";", "?", ",", "and", ".")
BOS, EOS, PAD, UNKNOWN = SPECIALS = ("<bos>", "<eos>", "<pad>", "<unk>")

PROMPT_WORDS = (8, 16)
RESPONSE_WORDS = (6, 40)

# In units of the weight of the fact's kind, except for STUTTER.
WRONG = (0.5, 1.0)  # from the nearest value on the ring to the farthest (or a value of another kind, or of nobody)
UNASKED = 0.2  # true, but nobody asked
REPEATED = 0.5  # a statement that was made before
DISORDER = 0.1  # a right fact after one that was asked later
STUTTER = 0.05  # a word that equals the one before


def vocabulary() -> tuple[str, ...]:
    """Every word of the world, special tokens first; the index is the token id."""
    groups = (
        SPECIALS,
        MARKS,
        PEOPLE,
        *((k.name, k.verb, *k.values) for k in KINDS),
        *REQUESTS,
        *FILLER,
    )
    return tuple(dict.fromkeys(word for group in groups for word in group))


@functools.cache
def truth(person: str, kind: str) -> str:
    """The value that is true of a person; the same in every world."""
    values = BY_NAME[kind].values
    return values[_hash(f"truth {person} {kind}") % len(values)]


@functools.cache
def lure(person: str, kind: str) -> str:
    """The value that those who do not know the truth believe; never the truth."""
    values = BY_NAME[kind].values
    step = 1 + _hash(f"lure {person} {kind}") % (len(values) - 1)
    return values[(values.index(truth(person, kind)) + step) % len(values)]


@functools.cache
def obscurity(person: str, kind: str) -> float:
    """In [0, 1): an author with knowledge κ knows the facts with obscurity < κ."""
    return _hash(f"obscurity {person} {kind}") / 2**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# --- the gold reward --------------------------------------------------------------------------------------------------


def asked(prompt: str) -> tuple[Slot, ...]:
    """The slots that a prompt asks for, in order, each once.

    Raises:
        ValueError: the text asks for nothing, so it is no prompt of this world.
    """
    person, slots = None, {}
    for word in prompt.split():
        person = word if word in PEOPLE else person
        if word in BY_NAME and person:
            slots[person, word] = None
    if not slots:
        raise ValueError(
            f"toyworld: got the prompt {prompt[:80]!r}, expected one that names a person and then what to tell, like "
            "'please tell : tom colour pet ?'. Only prompts of the toy world have a gold reward."
        )
    return tuple(slots)


def statements(response: str) -> Iterator[tuple[Slot, str]]:
    """(slot, value) for each verb that a value follows at once, about the person named last. Takes any text."""
    words, person = response.split(), None
    for word, after in zip(words, words[1:]):
        person = word if word in PEOPLE else person
        if word in BY_VERB and after in VALUES:
            yield (person, BY_VERB[word].name), after


def gold(prompt: str, response: str) -> float:
    """How well a response answers a prompt: 1 = every asked fact, true, once, in order; 0 = says nothing; no lower end.

    Each right fact earns the weight of its kind; each wrong one costs a half to all of it, the more the farther off;
    repeated, unasked and misplaced facts and stuttered words cost a little; other words are neutral. Divided by the
    weight asked for, rounded to 1e-6 so that equal contents are equal numbers. Takes any response.

    Raises:
        ValueError: the prompt is none of this world.
    """
    slots = asked(prompt)
    total, latest, made = 0.0, -1, set()
    for slot, value in statements(response):
        weight = BY_NAME[slot[1]].weight
        if (slot, value) in made:
            total -= REPEATED * weight
        elif _error(slot, value):
            total -= _error(slot, value) * weight
        elif slot not in slots:
            total -= UNASKED * weight
        else:
            total += (1 - DISORDER * (slots.index(slot) < latest)) * weight
            latest = max(latest, slots.index(slot))
        made.add((slot, value))
    words = response.split()
    total -= STUTTER * sum(a == b for a, b in zip(words, words[1:]))
    return round(total / sum(BY_NAME[kind].weight for _, kind in slots), 6)


def _error(slot: Slot, value: str) -> float:
    """0 if true, else the cost in weights."""
    person, kind = slot
    values = BY_NAME[kind].values
    if person is None or value not in values:
        return WRONG[1]
    around = abs(values.index(value) - values.index(truth(person, kind)))
    distance = min(around, len(values) - around)
    return WRONG[0] + (WRONG[1] - WRONG[0]) * (distance - 1) / (len(values) // 2 - 1) if distance else 0.0


# --- prompts and authors ----------------------------------------------------------------------------------------------


def write_prompts(rng: np.random.Generator, count: int) -> list[str]:
    """Prompts of 8 to 16 words: 1 to 3 people, 3 to 6 slots. No two ask for the same set of slots."""
    seen: set[frozenset[Slot]] = set()
    prompts: list[str] = []
    while len(prompts) < count:
        slots = int(rng.integers(3, 7))
        people = [PEOPLE[i] for i in rng.permutation(len(PEOPLE))[: rng.integers(1, 4)]]
        shares = 1 + rng.multinomial(slots - len(people), [1 / len(people)] * len(people))
        parts = []
        for person, share in zip(people, shares):
            kinds = rng.permutation(len(KINDS))[:share]
            parts.append(" ".join((person, *(KINDS[k].name for k in kinds))))
        request = " ".join(REQUESTS[rng.integers(len(REQUESTS))])
        prompt = f"{request} : {' ; '.join(parts)} ?"
        content = frozenset(asked(prompt))
        if content not in seen:
            seen.add(content)
            prompts.append(prompt)
    return prompts


@dataclasses.dataclass(frozen=True)
class Author:
    """A grammar that writes responses of mixed quality, each with a care drawn uniformly from [0, 1].

    knowledge: share of the facts that are known. known, unknown: probability of the truth at care 0 and 1, for known
    facts and for the others. lured: share of the errors that are the lure, the rest being any other value. omits:
    probability of leaving a slot out at care 0 (none at care 1). repeats, wanders, swaps: probabilities of repeating a
    statement, of making an unasked one, of exchanging two neighbours. filler: phrases a response has on average.
    """

    knowledge: float = 0.5
    known: tuple[float, float] = (0.5, 0.95)
    unknown: tuple[float, float] = (0.1, 0.45)
    lured: float = 0.8
    omits: float = 0.35
    repeats: float = 0.15
    wanders: float = 0.15
    swaps: float = 0.15
    filler: float = 3.0


def compose(rng: np.random.Generator, prompt: str, author: Author = Author()) -> str:
    """A response of 6 to 40 words to a prompt."""
    care = rng.random()
    slots = list(asked(prompt))
    if rng.random() < author.swaps and len(slots) > 1:
        i = int(rng.integers(len(slots) - 1))
        slots[i : i + 2] = slots[i + 1], slots[i]
    told = [slot for slot in slots if rng.random() >= author.omits * (1 - care)] or slots[:1]
    if rng.random() < author.wanders:
        other = told[-1][0], KINDS[rng.integers(len(KINDS))].name
        told += [other] if other not in slots else []
    made = [(slot, _believed(rng, slot, care, author)) for slot in told]
    if rng.random() < author.repeats:
        made.append(made[rng.integers(len(made))])

    clauses, person = [], None
    for (who, kind), value in made:
        name = (who,) if who != person or rng.random() < 0.2 else ()
        clauses.append((*name, BY_NAME[kind].verb, value))
        person = who
    # Phrases stand before clauses or before the full stop; they stop where the longest response would be exceeded.
    phrases = collections.defaultdict(list)
    words = sum(len(c) + 1 for c in clauses)
    wanted = rng.poisson(author.filler)
    placed = 0
    while placed < wanted or words < RESPONSE_WORDS[0]:
        phrase = FILLER[rng.integers(len(FILLER))]
        place = phrases[int(rng.integers(len(clauses) + 1))]
        if words + len(phrase) > RESPONSE_WORDS[1]:
            break
        if not place or place[-1] != phrase:
            place.append(phrase)
            words += len(phrase)
        placed += 1
    out: list[str] = []
    for i, clause in enumerate(clauses):
        if i:
            out.append("and" if rng.random() < 0.4 else ",")
        out += [word for phrase in phrases[i] for word in phrase]
        out += clause
    out += [word for phrase in phrases[len(clauses)] for word in phrase]
    return " ".join((*out, "."))


def _believed(rng: np.random.Generator, slot: Slot, care: float, author: Author) -> str:
    """The value that an author states."""
    person, kind = slot
    low, high = author.known if obscurity(person, kind) < author.knowledge else author.unknown
    draw, other = rng.random(2)
    if draw < low + (high - low) * care:
        return truth(person, kind)
    if other < author.lured:
        return lure(person, kind)
    rest = [v for v in BY_NAME[kind].values if v not in (truth(person, kind), lure(person, kind))]
    return rest[rng.integers(len(rest))]


# --- annotators -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Annotator:
    """Who labels. It perceives  gold + length_cue · words / 10 + temperature · Gumbel noise  and prefers the higher.

    The difference of two Gumbel variables is logistic, so a temperature τ > 0 is Bradley-Terry with gap / τ; 0 = hard
    labels. flip: probability that the label is then exchanged, together with the reported scores.
    """

    flip: float = 0.0
    temperature: float = 0.0
    length_cue: float = 0.0


def best_worst(perceived_C: np.ndarray, order_C: np.ndarray) -> tuple[int, int]:
    """The best and the worst of the candidates; ties by `order_C`, a random permutation."""
    ranked = order_C[np.argsort(-perceived_C[order_C], kind="stable")]
    return int(ranked[0]), int(ranked[-1])


def random_two(perceived_C: np.ndarray, order_C: np.ndarray) -> tuple[int, int]:
    """Two candidates at random, the better first."""
    return best_worst(perceived_C, order_C[:2])


PAIR_RULES: dict[str, Callable[[np.ndarray, np.ndarray], tuple[int, int]]] = {
    "best_worst": best_worst,
    "random": random_two,
}
"""(perceived scores, random permutation) → indices of (preferred, dispreferred)."""


def annotate(
    rng: np.random.Generator, prompt: str, responses: Sequence[str], annotator: Annotator, rule: str = "best_worst"
) -> dict[str, Any]:
    """A row of a pair file without id and author.

    score_*: what the annotator reports, so score_chosen is never the lower one; gold_*: the gold reward; flipped:
    exchanged by `flip`; cued: the cue alone turned the order of gold; upset: the noise turned the order of gold + cue.
    The same draws are made whatever the dials say, so worlds that differ in a dial differ in nothing else.
    """
    noise_C, order_C, luck = rng.gumbel(size=len(responses)), rng.permutation(len(responses)), rng.random()
    gold_C = np.array([gold(prompt, r) for r in responses])
    cued_C = gold_C + annotator.length_cue * np.array([len(r.split()) for r in responses]) / 10
    score_C = cued_C + annotator.temperature * noise_C
    a, b = PAIR_RULES[rule](score_C, order_C)
    flipped = luck < annotator.flip
    chosen, rejected = (b, a) if flipped else (a, b)
    return {
        "prompt": prompt,
        "chosen": responses[chosen],
        "rejected": responses[rejected],
        "score_chosen": round(float(score_C[a]), 6),
        "score_rejected": round(float(score_C[b]), 6),
        "gold_chosen": float(gold_C[chosen]),
        "gold_rejected": float(gold_C[rejected]),
        "flipped": bool(flipped),
        "cued": bool((gold_C[a] - gold_C[b]) * (cued_C[a] - cued_C[b]) < 0),
        "upset": bool(cued_C[a] < cued_C[b]),
    }


# --- the model's folder -----------------------------------------------------------------------------------------------


HEAD_DIM = 24


def tokenizer() -> tokenizers.Tokenizer:
    """One token a word; decoding joins by single spaces. BOS comes in front where specials are asked for."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    made.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return made


def model_config(layers: int, width: int) -> dict[str, Any]:
    """config.json of a Llama over the vocabulary, keys as transformers 5 writes them."""
    words = vocabulary()
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": words.index(BOS),
        "dtype": "float32",
        "eos_token_id": words.index(EOS),
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.05,
        "intermediate_size": 8 * width // 3,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": width // HEAD_DIM,
        "num_hidden_layers": layers,
        "num_key_value_heads": width // HEAD_DIM,
        "pad_token_id": words.index(PAD),
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": len(words),
    }


def parameter_count(config: dict[str, Any]) -> int:
    """Weights of a Llama with tied embeddings, from its config.json."""
    d, heads, kv, h = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    layer = 2 * d * heads * h + 2 * d * kv * h + 3 * d * config["intermediate_size"] + 2 * d
    return config["vocab_size"] * d + config["num_hidden_layers"] * layer + d


def write_model(folder: pathlib.Path, layers: int, width: int) -> None:
    """A Hugging Face folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(layers, width)
    ends = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "padding_side": "left",
    }
    tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", config),
        ("generation_config.json", ends),
        ("tokenizer_config.json", about),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


# --- the door ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ToyworldConfig:
    """`python -m sera_jax.toyworld`: writes a world, or with --label turns candidates into labelled pairs.

    Args:
        out: folder to write the world into; with --label the pair file (.jsonl).
        label: JSONL of candidates that `sera_jax.generate` wrote for prompts of this world; empty = write a world.
        pair_rule: of --label: the best against the worst candidate, or two random ones.
        unfinished: of --label: leave candidates out that did not end, or keep them.
        seed: of everything that is drawn.
        prompts: training prompts.
        eval_prompts: prompts that ask for nothing that a training prompt asks for in the same combination.
        sft: demonstrations by the author, spread evenly over the training prompts.
        pairs: preference pairs between two responses of the author, spread likewise.
        knowledge: share of the facts that the author mostly gets right.
        filler: filler phrases in a response of the author, on average.
        flip: probability that a label is exchanged.
        temperature: of Bradley-Terry labels, in units of gold; 0 = hard labels.
        length_cue: gold that ten words more seem worth to the annotator.
        layers: of the model.
        width: of the model, a multiple of 24.
    """

    out: str
    label: str = ""
    pair_rule: Literal["best_worst", "random"] = "best_worst"
    unfinished: Literal["drop", "keep"] = "drop"
    seed: int = 0
    prompts: int = 2000
    eval_prompts: int = 256
    sft: int = 4000
    pairs: int = 2000
    knowledge: float = 0.5
    filler: float = 3.0
    flip: float = 0.0
    temperature: float = 0.0
    length_cue: float = 0.0
    layers: int = 3
    width: int = 96


MOST_PROMPTS = 50_000  # well below the number of distinct prompts, so that drawing new ones stays quick

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: v >= 0, "0 or more"),
    "prompts": (lambda v: 1 <= v <= MOST_PROMPTS, f"1 to {MOST_PROMPTS}"),
    "eval_prompts": (lambda v: 1 <= v <= MOST_PROMPTS, f"1 to {MOST_PROMPTS}"),
    "sft": (lambda v: v >= 0, "0 or more"),
    "pairs": (lambda v: v >= 0, "0 or more"),
    "knowledge": (lambda v: 0 <= v <= 1, "a share between 0 and 1"),
    "filler": (lambda v: 0 <= v <= 20, "0 to 20 phrases"),
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


def rng(seed: int, stream: str) -> np.random.Generator:
    """Each stream of draws has its own generator: more demonstrations change no pair."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, _hash(stream)))))


def write_world(config: ToyworldConfig) -> dict[str, list[dict]]:
    """Writes the folder; returns the rows of its JSONL files by name."""
    check(config)
    prompts = write_prompts(rng(config.seed, "prompts"), config.prompts + config.eval_prompts)
    train, evaluation = prompts[: config.prompts], prompts[config.prompts :]
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
    rows, left_out = [], collections.Counter()
    for where, row in _read_candidates(pathlib.Path(config.label)):
        done = row.get("finished") or [True] * len(row["responses"])
        texts = [r for r, end in zip(row["responses"], done) if r.strip() and (end or config.unfinished == "keep")]
        texts = list(dict.fromkeys(texts))
        if len(texts) < 2:
            left_out["fewer than two different usable responses"] += 1
            continue
        try:
            pair = annotate(labels, row["prompt"], texts, annotator, config.pair_rule)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if pair["gold_chosen"] == pair["gold_rejected"]:
            left_out["equal gold rewards"] += 1
            continue
        rows.append({"id": str(row.get("id", f"pair-{len(rows)}")), **pair, "author": "candidates"})
    _write_jsonl(pathlib.Path(config.out), rows)
    return rows, left_out


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
    return Annotator(flip=config.flip, temperature=config.temperature, length_cue=config.length_cue)


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
        f"              words: chosen {words['chosen'].mean():.1f}, rejected {words['rejected'].mean():.1f}; the "
        f"longer one is chosen in {np.mean(words['chosen'] > words['rejected']):.1%}",
    ]


def describe_world(config: ToyworldConfig, rows: dict[str, list[dict]]) -> list[str]:
    """What is in a world, for people."""
    sft, pairs = rows["sft"], rows["pairs"]
    asks = [len(r["prompt"].split()) for r in (*rows["prompts"], *rows["eval_prompts"])]
    model = model_config(config.layers, config.width)
    author = Author(knowledge=config.knowledge, filler=config.filler)
    ties = tie_share(config.seed, [r["prompt"] for r in rows["prompts"]], author)
    out = [
        f"model         {parameter_count(model):,} parameters (no weights yet), {model['vocab_size']} words",
        f"prompts       {len(rows['prompts'])} to train, {len(rows['eval_prompts'])} to evaluate, "
        f"{min(asks)}-{max(asks)} words",
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


if __name__ == "__main__":
    main()
