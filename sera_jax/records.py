"""The nouns that travel through the house. Frozen, with shapes; no behaviour beyond their own meaning.

Shape letters, everywhere in sera_jax:
    A microbatches of an update   B rows     L tokens of a row    M response tokens of a row   S branch slots of a row
    N examples of a set           P prompts  C candidates         E policy iterates            T response positions
    D model width                 V vocabulary                    2 the pair axis: 0 = chosen, 1 = rejected
"""

import dataclasses

import jax
import numpy as np

Text = str | tuple[dict, ...]
"""Plain text, or chat messages ({"role": ..., "content": ...}) in order."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is known of a pair behind its label, None where it is not: to watch a run by. Nothing trains on it but the
    score `gold_gap`.

    gold: true rewards of (chosen, rejected). flipped: the label was exchanged; cued: a spurious cue turned it; upset:
    the annotator's noise did. author: who wrote the responses.
    """

    gold: tuple[float, float] | None = None
    flipped: bool | None = None
    cued: bool | None = None
    upset: bool | None = None
    author: str | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """One preference, as text, on the host.

    `scores` are the annotator's scores of (chosen, rejected) where the file has them; `weight` scales the pair's loss;
    `source` names the file or data set it came from (groups for stratified selection); `truth` is what a synthetic
    world, or a gold annotator, knows beside.
    """

    id: str
    prompt: Text
    chosen: Text
    rejected: Text
    scores: tuple[float, float] | None = None
    weight: float = 1.0
    source: str = ""
    truth: Truth = Truth()


@dataclasses.dataclass(frozen=True)
class Unpaired:
    """One response with a label, as text, on the host: is it desirable (KTO)? `weight` and `source` as in a Pair."""

    id: str
    prompt: Text
    completion: Text
    label: bool
    weight: float = 1.0
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to sample from."""

    id: str
    prompt: Text


@dataclasses.dataclass(frozen=True)
class Tree:
    """A prompt with its branches, as token ids: two branches for a pair, C for ranked candidates, one for SFT.

    prompt: int32 [p], BOS included where the tokenizer has one, may be empty (plain-text SFT).
    branches: int32 [r_i] each, EOS included unless that response was truncated; never empty.
    label: of an unpaired example, +1 desirable, -1 not; 0 = a pair, or nothing with a label. To train on, an unpaired
    example has two branches, (own completion, another example's completion: the mismatch; one token where the loss has
    no use for it).
    values: what is known of each branch beside its tokens, as the loss asks for it (`losses.Loss.target`), () =
    nothing.
    """

    id: str
    prompt: np.ndarray
    branches: tuple[np.ndarray, ...]
    weight: float = 1.0
    label: int = 0
    values: tuple[float, ...] = ()

    @property
    def length(self) -> int:
        """Tokens the tree takes in a row."""
        return len(self.prompt) + self.targets

    @property
    def told(self) -> tuple[float, ...]:
        """Of each branch: `values`, or the label."""
        return self.values or (float(self.label),) * len(self.branches)

    @property
    def targets(self) -> int:
        """Response tokens, that is, log-probs to compute."""
        return sum(len(b) for b in self.branches)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Prompt trees packed side by side in rows of L tokens: the one batch format (README, "Rows"). All int32.

    tokens_BL    token ids (0 on padding: nothing reads the value, masks come from `tree_BL`)
    tree_BL      which tree of the row, from 1; 0 = padding
    branch_BL    0 = prompt, 1.. = branch of its tree
    position_BL  position within (prompt + own branch): a branch continues its prompt
    parent_BM    for each response token: index in the row of the token that predicts it
    target_BM    its token id
    slot_BM      the slot of its branch, in [0, S); S = no token. A row's targets stand slot by slot, in order.
    example_BS   flat branch number of the slot in the packed list of trees (tree 0's branches, tree 1's, ..), -1 =
    empty.
                 Branches of a tree have neighbouring slots; a tree of two branches starts at an even slot.

    Leading axes may be added (A microbatches); the names keep their own axes.
    """

    tokens_BL: np.ndarray | jax.Array
    tree_BL: np.ndarray | jax.Array
    branch_BL: np.ndarray | jax.Array
    position_BL: np.ndarray | jax.Array
    parent_BM: np.ndarray | jax.Array
    target_BM: np.ndarray | jax.Array
    slot_BM: np.ndarray | jax.Array
    example_BS: np.ndarray | jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What one update consumes: `count` microbatches of rows (leading axis A, the rest of it padding) and,
    slot by slot, the reference log-probs (the annotator's scores, where a reward model trains), the weights of the
    examples, and their branches' targets (`Tree.values`, else `Tree.label`).

    rows: Rows with leading axis A; reference_ABS, weight_ABS, target_ABS: float32; count: int32 scalar. tokens: by name
    what is known of each response token, float32 [A, B, M] each (policy gradients: "old" and "reference" log-probs).
    """

    rows: Rows
    reference_ABS: np.ndarray | jax.Array
    weight_ABS: np.ndarray | jax.Array
    target_ABS: np.ndarray | jax.Array
    count: np.ndarray | jax.Array
    tokens: dict[str, np.ndarray | jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """C sampled responses to each of P prompts, on the host.

    ids: prompt ids of the prompts; prompts: token ids, int32 [p] each; texts_PC: decoded, specials removed;
    tokens_PC: int32 [r] each, EOS included where the response finished; finished_PC: bool. A candidate without tokens
    is none: it fills up a row of fewer.
    """

    ids: tuple[str, ...]
    prompts: tuple[np.ndarray, ...]
    texts_PC: tuple[tuple[str, ...], ...]
    tokens_PC: tuple[tuple[np.ndarray, ...], ...]
    finished_PC: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters as arrays, so that a change of value compiles nothing again.

    temperature float32 [] or [C], one for each candidate of a prompt (0 = greedy) · top_k int32 [] (0 = off) ·
    top_p float32 [] (1 = off) · min_p float32 [] (0 = off) · eos_ids int32 [n] (-1 = unused entry)
    """

    temperature: np.ndarray | jax.Array
    top_k: np.ndarray | jax.Array
    top_p: np.ndarray | jax.Array
    min_p: np.ndarray | jax.Array
    eos_ids: np.ndarray | jax.Array
