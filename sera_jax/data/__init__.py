"""From files and `datasets` to preference pairs, to tokens, to the order of batches.

`files` reads text, `tokens` makes trees of it, `order` says which of them an update takes. All on the host, NumPy only.
"""

from sera_jax.data.files import (
    FORMATS,
    Demonstration,
    Progress,
    Report,
    demonstrations_of,
    load_pairs,
    load_prompts,
    load_texts,
    prompts_of,
    silent,
)
from sera_jax.data.order import batches, order, split_validation
from sera_jax.data.tokens import (
    Counts,
    bos_id,
    eos_ids,
    load_tokenizer,
    tokenise_pairs,
    tokenise_prompts,
    tokenise_texts,
)

__all__ = [
    "FORMATS",
    "Counts",
    "Demonstration",
    "Progress",
    "Report",
    "batches",
    "bos_id",
    "demonstrations_of",
    "eos_ids",
    "load_pairs",
    "load_prompts",
    "load_texts",
    "load_tokenizer",
    "order",
    "prompts_of",
    "silent",
    "split_validation",
    "tokenise_pairs",
    "tokenise_prompts",
    "tokenise_texts",
]
