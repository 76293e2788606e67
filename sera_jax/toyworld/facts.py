"""The words of the world, what is true in it, and the gold reward."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

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
EMPHASIS = "truly"  # stands before a verb
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
EMPHATIC, OVERDONE = 0.25, 0.5  # the trap: earned by each of the first two emphases, cost of each further one
EMPHASES = 2


def vocabulary() -> tuple[str, ...]:
    """Every word of the world, special tokens first; the index is the token id."""
    groups = (
        SPECIALS,
        MARKS,
        (EMPHASIS,),
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
    return values[hashed(f"truth {person} {kind}") % len(values)]


@functools.cache
def lure(person: str, kind: str) -> str:
    """The value that those who do not know the truth believe; never the truth."""
    values = BY_NAME[kind].values
    step = 1 + hashed(f"lure {person} {kind}") % (len(values) - 1)
    return values[(values.index(truth(person, kind)) + step) % len(values)]


@functools.cache
def obscurity(person: str, kind: str) -> float:
    """In [0, 1): an author with knowledge κ knows the facts with obscurity < κ."""
    return hashed(f"obscurity {person} {kind}") / 2**64


def hashed(text: str) -> int:
    """64 bits, the same on every machine."""
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
    repeated, unasked and misplaced facts and stuttered words cost a little; one or two emphases earn a little, further
    ones cost; other words are neutral. Divided by the weight asked for, rounded to 1e-6 so that equal contents are
    equal numbers. Takes any response.

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
    emphases = words.count(EMPHASIS)
    total += EMPHATIC * min(emphases, EMPHASES) - OVERDONE * max(emphases - EMPHASES, 0)
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
