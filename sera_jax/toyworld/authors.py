"""Prompts of the world, and the authors who write responses of mixed quality."""

import collections
import dataclasses

import numpy as np

from sera_jax.toyworld.facts import (
    BY_NAME,
    EMPHASES,
    EMPHASIS,
    FILLER,
    KINDS,
    PEOPLE,
    REQUESTS,
    RESPONSE_WORDS,
    Slot,
    asked,
    lure,
    obscurity,
    truth,
)


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

    knowledge: share of the facts that are known; contrary: they are those that are obscure to the others. known,
    unknown: probability of the truth at care 0 and 1, for known facts and for the others. lured: share of the errors
    that are the lure, the rest being any other value. omits: probability of leaving a slot out at care 0 (none at care
    1). repeats, wanders, swaps: probabilities of repeating a statement, of making an unasked one, of exchanging two
    neighbours. emphasises: probability of an emphasis in a clause, until the response has two. names, joins:
    probabilities of naming the person where it is known, and of "and" rather than a comma. filler: phrases a response
    has on average.
    """

    knowledge: float = 0.55
    contrary: bool = False
    known: tuple[float, float] = (0.6, 0.98)
    unknown: tuple[float, float] = (0.15, 0.55)
    lured: float = 0.8
    omits: float = 0.15
    repeats: float = 0.15
    wanders: float = 0.15
    swaps: float = 0.15
    emphasises: float = 0.15
    names: float = 0.2
    joins: float = 0.4
    filler: float = 3.0


STRANGER = Author(
    contrary=True, lured=0.0, omits=0.0, repeats=0.0, wanders=0.0, swaps=0.0, emphasises=0.0, names=1.0, joins=0.95
)
"""Another manner, and other errors: wrong where the plain author is right, never careless in form. Off-policy."""


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

    clauses, person, emphases = [], None, 0
    for (who, kind), value in made:
        named, emphatic = rng.random(2)
        name = (who,) if who != person or named < author.names else ()
        emphasis = (EMPHASIS,) if emphases < EMPHASES and emphatic < author.emphasises else ()
        clauses.append((*name, *emphasis, BY_NAME[kind].verb, value))
        person, emphases = who, emphases + len(emphasis)
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
            out.append("and" if rng.random() < author.joins else ",")
        out += [word for phrase in phrases[i] for word in phrase]
        out += clause
    out += [word for phrase in phrases[len(clauses)] for word in phrase]
    return " ".join((*out, "."))


def _believed(rng: np.random.Generator, slot: Slot, care: float, author: Author) -> str:
    """The value that an author states."""
    person, kind = slot
    obscure = 1 - obscurity(person, kind) if author.contrary else obscurity(person, kind)
    low, high = author.known if obscure < author.knowledge else author.unknown
    draw, other = rng.random(2)
    if draw < low + (high - low) * care:
        return truth(person, kind)
    if other < author.lured:
        return lure(person, kind)
    rest = [v for v in BY_NAME[kind].values if v not in (truth(person, kind), lure(person, kind))]
    return rest[rng.integers(len(rest))]
