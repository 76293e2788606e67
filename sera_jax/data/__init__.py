"""From files and `datasets` to preference pairs, to tokens, to the order of batches.

`files` reads rows, `forms` says what they mean, `tokens` makes trees of texts, `mismatch` adds what KTO compares them
with, `told` what else a loss is told, `order` says which of them an update takes, `evaluations` reads what several
judged. All on the host, NumPy only.
"""

from sera_jax.data.evaluations import Evaluated, load_evaluated
from sera_jax.data.files import (
    Progress,
    Report,
    Responses,
    demonstrations_of,
    load_pairs,
    load_prompts,
    load_responses,
    load_rows,
    load_texts,
    load_unpaired,
    prompts_of,
    silent,
)
from sera_jax.data.forms import FORMATS, RANKED, UNPAIRED, Demonstration
from sera_jax.data.mismatch import derangement, mismatched, unmatched
from sera_jax.data.order import PARTS, batches, order, parts, split_validation
from sera_jax.data.tokens import (
    CUTS,
    Counts,
    Tokenizer,
    bos_id,
    continuations,
    encoded,
    eos_ids,
    load_tokenizer,
    padding_id,
    tokenise_pairs,
    tokenise_prompts,
    tokenise_responses,
    tokenise_texts,
    tokenise_unpaired,
)
from sera_jax.data.told import valued

__all__ = [
    "CUTS",
    "FORMATS",
    "PARTS",
    "RANKED",
    "UNPAIRED",
    "Counts",
    "Demonstration",
    "Evaluated",
    "Progress",
    "Report",
    "Responses",
    "Tokenizer",
    "batches",
    "bos_id",
    "continuations",
    "demonstrations_of",
    "derangement",
    "encoded",
    "eos_ids",
    "load_evaluated",
    "load_pairs",
    "load_prompts",
    "load_responses",
    "load_rows",
    "load_texts",
    "load_tokenizer",
    "load_unpaired",
    "mismatched",
    "order",
    "padding_id",
    "parts",
    "prompts_of",
    "silent",
    "split_validation",
    "tokenise_pairs",
    "tokenise_prompts",
    "tokenise_responses",
    "tokenise_texts",
    "tokenise_unpaired",
    "unmatched",
    "valued",
]
