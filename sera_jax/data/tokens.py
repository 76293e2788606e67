"""Texts → prompt trees of token ids.

The boundary between prompt and response is fixed in the text: both sides are tokenised apart, so a prompt has the same
ids in training as in sampling and all its branches share them, and prompt ids + response ids decode to prompt +
response. Tokenisers that put a space before every text (SentencePiece's dummy prefix) would break that for responses;
these are tokenised behind a short text whose tokens do not merge with what follows, which is then cut off.

Plain text: BOS (see `bos_id`) + prompt | response + EOS. No other special tokens are added; those written in the text
count as such.

Messages: the template is rendered to text, with the generation prompt for the prompt, and once with each response; the
response is what the second text has after the first. The ids are those of the rendered text alone: a BOS is there if
the template writes it, never twice. White space that a template writes after its last special token is cut, so a
response ends at the template's end of turn; if that is none of the EOS ids, the first EOS id follows it, for else a
sampler would not know where to stop. A row whose prompt is no prefix of its conversation is dropped and counted.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2
import numpy as np
import transformers

from sera_jax.data.files import Progress, silent
from sera_jax.data.forms import Demonstration
from sera_jax.records import Pair, Prompt, Text, Tree, Unpaired

CHUNK = 1024  # items a call of the tokeniser
SENTINELS = ("", "\n", ":", "0", "#", "\x01")
PROBES = (("a", "b"), ("Hello", "world"), ("0", "1"))
PLACES = 5

Tokenizer = transformers.PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Counts:
    """What tokenising did.

    items: given; kept: trees that came out; tokens: of these, after cutting; prompts_cut: prompts that were shortened;
    responses_cut: responses that were (they have no EOS); dropped: (reason, items, first ids), the most frequent first;
    measured: int by name, [items] each, in tokens before any cutting, dropped items included where they have a length:
    of prompts, of every response, and of prompt + longer response, which is what max_length bounds.
    """

    items: int
    kept: int
    tokens: int
    prompts_cut: int
    responses_cut: int
    dropped: tuple[tuple[str, int, tuple[str, ...]], ...]
    measured: dict[str, np.ndarray] = dataclasses.field(compare=False)

    @property
    def lengths(self) -> tuple[tuple[str, float, float, int], ...]:
        """(name, mean, 95 % quantile, maximum) of what was measured."""
        return tuple(
            (name, float(column.mean()), float(np.quantile(column, 0.95)), int(column.max()))
            for name, column in self.measured.items()
        )

    def lines(self) -> list[str]:
        """For people, one fact a line."""
        out = [f"{self.kept} of {self.items} tokenised, {self.tokens} tokens"]
        for name, mean, p95, top in self.lengths:
            out.append(f"  {name}: mean {mean:.0f}, 95 % {p95:.0f}, longest {top} tokens")
        return out + self.losses()

    def losses(self) -> list[str]:
        """What was cut and what was not used, one fact a line."""
        out = []
        if self.prompts_cut or self.responses_cut:
            out.append(f"  cut: {self.prompts_cut} prompts, {self.responses_cut} responses (these have no EOS)")
        for reason, count, ids in self.dropped:
            out.append(f"  not used: {count} × {reason} ({', '.join(ids)}{', …' if count > len(ids) else ''})")
        return out


def load_tokenizer(path: str, chat_template: str = "auto") -> Tokenizer:
    """The tokeniser of a local Hugging Face folder; no code of the folder is run, nothing is fetched.

    chat_template: auto = the folder's own, if it has one; else a path to a Jinja file that takes its place.
    """
    folder = pathlib.Path(path).expanduser()
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"{path}: got {'a folder with none of' if folder.is_dir() else 'no folder; expected one with'} "
            f"{', '.join(names)}. Set model.path to a Hugging Face folder on this machine."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a broken tokenizer.json makes of the Rust library
        raise ValueError(f"{path}: transformers cannot load this tokeniser: {type(error).__name__}: {error}") from error
    config = folder / "tokenizer_config.json"
    told = json.loads(config.read_text(encoding="utf-8")).get("add_bos_token") if config.is_file() else None
    tokenizer.init_kwargs["add_bos_token"] = told  # transformers drops it where there is a tokenizer.json; see bos_id
    if chat_template != "auto":
        template = pathlib.Path(chat_template).expanduser()
        if not template.is_file():
            raise ValueError(f"data.chat_template: got {chat_template!r}; expected auto or a Jinja file that exists.")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def padding_id(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> int:
    """An id that ends no response: to fill up a batch with for a reader who takes the last other id for the end of a
    text. The tokeniser's padding if it is none of the EOS ids, else another special token, one for padding by its name
    before <unk>, BOS and the others.

    Raises:
        ValueError: every special token ends responses.
    """
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = [i for i, token in special.items() if "pad" in token.lower()]
    known = (tokenizer.pad_token_id, *named, tokenizer.unk_token_id, tokenizer.bos_token_id, *special)
    found = next((int(i) for i in known if i is not None and i not in eos_ids), None)
    if found is None:
        raise ValueError(
            f"the tokeniser's special tokens {', '.join(special.values()) or '(none)'} all end responses (EOS ids "
            f"{', '.join(map(str, eos_ids))}); expected one more, for padding: whoever scores a batch of texts looks "
            "for the last token that is not padding. Add one to the tokeniser (and a row to the embedding)."
        )
    return found


def eos_ids(path: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a response, the one to append first: from generation_config.json (one or a list), else
    config.json, else the tokeniser. EOS may equal BOS (GPT-NeoX, stories260K).
    """
    looked = []
    for name in ("generation_config.json", "config.json"):
        file = pathlib.Path(path).expanduser() / name
        looked.append(str(file))
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: broken JSON: {error}") from error
        value = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(f"{file}: eos_token_id: got {value!r}; expected a token id or a list of them.")
        if ids:
            return tuple(dict.fromkeys(ids))
    if tokenizer.eos_token_id is not None:
        return (int(tokenizer.eos_token_id),)
    raise ValueError(
        f"no EOS token: looked for eos_token_id in {', '.join(looked)} and for eos_token in the tokeniser; found none. "
        "Add eos_token_id to generation_config.json: without it no response can end."
    )


def bos_id(tokenizer: Tokenizer) -> int | None:
    """The id that starts a plain-text prompt, None for none. In this order:

    1. the tokeniser puts its BOS before a text by itself → BOS (Llama, Mistral, Gemma);
    2. its tokenizer_config.json has `add_bos_token` → as that says;
    3. it is of the SentencePiece kind (byte pieces <0x0A> in its vocabulary) and its BOS is not its EOS → BOS: such
       models were pretrained with it, the tokeniser file merely lost the rule;
    4. else none (GPT-2, GPT-NeoX, Phi-2, Qwen: a BOS that is the EOS, or that only chat templates use, or none).
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    if bos in tokenizer("a", verbose=False)["input_ids"][:1]:
        return bos
    told = tokenizer.init_kwargs.get("add_bos_token")
    if told is not None:
        return bos if told else None
    return bos if "<0x0A>" in tokenizer.get_vocab() and bos != tokenizer.eos_token_id else None


def tokenise_pairs(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    *,
    max_length: int,
    max_prompt_length: int,
    truncation: str = "keep_end",
    progress: Progress = silent,
) -> tuple[list[Tree], Counts]:
    """Trees of two branches, 0 = chosen, 1 = rejected, in the order of the pairs.

    A pair is too long if prompt + longer response > max_length. Then its prompt is cut to max_prompt_length tokens
    (keep_end, keep_start: which end stays; a BOS stays at the start), and then each response to what is left, keeping
    its start. A cut response has no EOS. Pairs that become identical are dropped and counted.
    """
    asked = [(pair.id, pair.prompt, (pair.chosen, pair.rejected), pair.weight) for pair in pairs]
    bounds = _bounds(max_length, max_prompt_length, truncation)
    return _trees(asked, tokenizer, eos_ids, bounds, progress, "tokenising pairs")


def tokenise_unpaired(
    examples: Sequence[Unpaired],
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    *,
    max_length: int,
    max_prompt_length: int,
    truncation: str = "keep_end",
    progress: Progress = silent,
) -> tuple[list[Tree], Counts]:
    """Trees of one branch and a label, cut as pairs are, in the order of the examples (`mismatched` adds a branch)."""
    asked = [(example.id, example.prompt, (example.completion,), example.weight) for example in examples]
    bounds = _bounds(max_length, max_prompt_length, truncation)
    trees, counts = _trees(asked, tokenizer, eos_ids, bounds, progress, "tokenising responses")
    label = {example.id: 1 if example.label else -1 for example in examples}
    return [dataclasses.replace(tree, label=label[tree.id]) for tree in trees], counts


def tokenise_texts(
    texts: Sequence[Demonstration],
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    *,
    max_length: int,
    max_prompt_length: int,
    truncation: str = "keep_end",
    progress: Progress = silent,
) -> tuple[list[Tree], Counts]:
    """Trees of one branch for SFT, cut as pairs are. A text without prompt becomes prompt = (BOS) or empty, and is
    tokenised as the start of a text.
    """
    asked = [(text.id, text.prompt, (text.response,), text.weight) for text in texts]
    bounds = _bounds(max_length, max_prompt_length, truncation)
    return _trees(asked, tokenizer, eos_ids, bounds, progress, "tokenising texts", bare=True)


def tokenise_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    truncation: str = "keep_end",
    progress: Progress = silent,
) -> tuple[list[Tree], Counts]:
    """Trees without branches, to sample from; every prompt is cut to max_prompt_length tokens."""
    asked = [(prompt.id, prompt.prompt, (), 1.0) for prompt in prompts]
    bounds = _bounds(max_prompt_length, max_prompt_length, truncation)
    return _trees(asked, tokenizer, (), bounds, progress, "tokenising prompts")


def tokenise_responses(
    prompts: Sequence[Text],
    texts_PC: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    *,
    progress: Progress = silent,
) -> list[list[np.ndarray]]:
    """Ids of C responses to each prompt, not cut: int32 [r], with the EOS that ends a finished one; empty for a text of
    no tokens or without an exact boundary.
    """
    sentinels, ends, out = _sentinels(tokenizer), _end_strings(tokenizer, eos_ids), []
    for start in progress(range(0, len(prompts), CHUNK), -(-len(prompts) // CHUNK), "tokenising candidates"):
        rendered = []
        for prompt, texts in zip(prompts[start : start + CHUNK], texts_PC[start : start + CHUNK], strict=True):
            result = _render(tokenizer, prompt, tuple(texts), ends)
            if isinstance(result, str):
                raise ValueError(f"candidates of the prompt {str(prompt)[:80]!r} cannot be tokenised: {result}.")
            rendered.append(result[1])
        flat = iter(_continue(tokenizer, [text for texts in rendered for text in texts], sentinels))
        for texts in rendered:
            ids_C = [next(flat) or [] for _ in texts]
            ended = [ids if not ids or ids[-1] in eos_ids else [*ids, eos_ids[0]] for ids in ids_C]
            out.append([np.asarray([] if ids and ids[0] in eos_ids else ids, np.int32) for ids in ended])
    return out


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of whole texts as they stand: no special tokens are added, those written in a text count as such."""
    return _encode(tokenizer, list(texts))


def continuations(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int] | None]:
    """Ids of texts that continue another one, as a response continues its prompt; None where no boundary is exact."""
    return _continue(tokenizer, list(texts), _sentinels(tokenizer))


# Walking


def _bounds(max_length: int, max_prompt_length: int, truncation: str) -> tuple[int, int, str]:
    if truncation not in CUTS:
        raise ValueError(f"data.truncation: got {truncation!r}; expected {' or '.join(CUTS)}.")
    if not 1 <= max_prompt_length <= max_length:
        raise ValueError(
            f"data.max_prompt_length: got {max_prompt_length} with data.max_length={max_length}; expected at least "
            "1 and less than max_length, so that a response finds room."
        )
    return max_length, max_prompt_length, truncation


def _trees(
    asked: list[tuple[str, Text, tuple[Text, ...], float]],
    tokenizer: Tokenizer,
    eos: Sequence[int],
    bounds: tuple[int, int, str],
    progress: Progress,
    label: str,
    bare: bool = False,
) -> tuple[list[Tree], Counts]:
    """bare: a response may stand without a prompt."""
    if not asked:
        raise ValueError(f"{label}: got nothing; expected at least one item.")
    if any(branches for _, _, branches, _ in asked):
        if not eos:
            raise ValueError(f"{label}: got no EOS ids; expected at least one (see eos_ids).")
        if bounds[0] == bounds[1]:
            raise ValueError(
                f"data.max_prompt_length: got {bounds[1]} with data.max_length={bounds[0]}; expected less than "
                "max_length, so that a response finds room."
            )
    bos, sentinels, ends = bos_id(tokenizer), _sentinels(tokenizer), _end_strings(tokenizer, eos)
    trees, lengths, cut = [], [], collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    examples: dict[str, list[str]] = collections.defaultdict(list)
    for start in progress(range(0, len(asked), CHUNK), -(-len(asked) // CHUNK), label):
        chunk = asked[start : start + CHUNK]
        rendered = [_render(tokenizer, prompt, branches, ends) for _, prompt, branches, _ in chunk]
        usable = [r for r in rendered if not isinstance(r, str)]
        prompts = iter(_encode(tokenizer, [prompt for prompt, _, _ in usable]))
        # The start of a text is tokenised as such, what continues a prompt as a continuation.
        continuing = [text for prompt, texts, _ in usable if prompt for text in texts]
        starting = [text for prompt, texts, _ in usable if not prompt for text in texts]
        continued, started = iter(_continue(tokenizer, continuing, sentinels)), iter(_encode(tokenizer, starting))
        for (name, _, _, weight), row in zip(chunk, rendered, strict=True):
            if isinstance(row, str):
                result = row
            else:
                text, responses, chat = row
                ids = [next(continued if text else started) for _ in responses]
                result = _tree(
                    next(prompts), ids, None if chat else bos, tokenizer.bos_token_id, eos, bounds, bare, lengths, cut
                )
            if isinstance(result, str):
                counts[result] += 1
                if len(examples[result]) < PLACES:
                    examples[result].append(name)
            else:
                prompt, branches = result
                trees.append(Tree(name, prompt, branches, weight))
    dropped = tuple((reason, count, tuple(examples[reason])) for reason, count in counts.most_common())
    tokens = sum(tree.length for tree in trees)
    out = Counts(len(asked), len(trees), tokens, cut["prompts"], cut["responses"], dropped, _measured(lengths))
    if not trees:
        got = "; ".join(f"{count} × {reason} ({', '.join(ids)})" for reason, count, ids in dropped)
        raise ValueError(
            f"{label}: none of {len(asked)} items is left: {got}. Check the data, the tokeniser and its chat template."
        )
    return trees, out


def _tree(
    prompt: list[int],
    branches: list[list[int] | None],
    bos: int | None,
    bos_token: int | None,
    eos: Sequence[int],
    bounds: tuple[int, int, str],
    bare: bool,
    lengths: list[tuple[int, ...]],
    cut: collections.Counter,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]] | str:
    """The ids of a tree, or why there is none. Adds to lengths and cut."""
    max_length, max_prompt_length, truncation = bounds
    if any(ids is None for ids in branches):
        return "a response merges with every text before it, no boundary is exact"
    if not (prompt or bare):
        return "the prompt has no tokens"
    if any(not ids or (len(ids) == 1 and ids[0] in eos) for ids in branches):
        return "a response has no tokens"
    if bos is not None and prompt[:1] != [bos]:
        prompt = [bos, *prompt]
    branches = [ids if ids[-1] in eos else [*ids, eos[0]] for ids in branches]
    if len(branches) == 2 and branches[0] == branches[1]:
        return "chosen and rejected are the same tokens"
    longest = len(prompt) + max(map(len, branches), default=0)
    lengths.append((len(prompt), *map(len, branches), longest))
    prompts_cut = responses_cut = 0
    if longest > max_length:
        if len(prompt) > max_prompt_length:
            kept = prompt[:1] if prompt[0] == bos_token else []
            prompt = kept + CUTS[truncation](prompt[len(kept) :], max_prompt_length - len(kept))
            prompts_cut = 1
        room = max_length - len(prompt)
        responses_cut = sum(len(ids) > room for ids in branches)
        branches = [ids[:room] for ids in branches]
        if len(branches) == 2 and branches[0] == branches[1]:
            return "chosen and rejected are the same tokens after cutting"
    cut["prompts"] += prompts_cut
    cut["responses"] += responses_cut
    return np.asarray(prompt, np.int32), tuple(np.asarray(ids, np.int32) for ids in branches)


CUTS: dict[str, Callable[[list[int], int], list[int]]] = {
    "keep_end": lambda ids, n: ids[len(ids) - n :],
    "keep_start": lambda ids, n: ids[:n],
}


def _measured(lengths: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    if not lengths:
        return {}
    columns = np.asarray(lengths).T  # [prompt, responses …, prompt + longer]
    names = {2: ("prompt",), 3: ("prompt", "response", "prompt + response")}.get(
        len(columns), ("prompt", "chosen", "rejected", "prompt + longer response")
    )
    return dict(zip(names, columns, strict=False))


# Chat templates


def _render(
    tokenizer: Tokenizer, prompt: Text, branches: tuple[Text, ...], ends: tuple[str, ...]
) -> tuple[str, list[str], bool] | str:
    """(prompt, responses, whether a template wrote them) as text, or why not."""
    if isinstance(prompt, str):
        if not all(isinstance(branch, str) for branch in branches):
            return "the prompt is text, a response is messages"
        return prompt, list(branches), False
    if not tokenizer.chat_template:
        raise ValueError(
            "got chat messages, but the tokeniser has no chat template; expected one in model.path (a file "
            "chat_template.jinja or tokenizer_config.json). Set data.chat_template to a Jinja file, or give plain text."
        )
    turns = list(prompt)
    try:
        head = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        responses = []
        for branch in branches:
            answer = [{"role": "assistant", "content": branch}] if isinstance(branch, str) else list(branch)
            whole = tokenizer.apply_chat_template(turns + answer, tokenize=False, add_generation_prompt=False)
            if not whole.startswith(head):
                return "chat template: the prompt with its generation prompt is not the start of the conversation"
            response = whole[len(head) :]
            bare = response.rstrip()
            responses.append(bare if bare.endswith(ends) else response)
    except jinja2.TemplateError as error:
        return f"chat template: {error}"
    return head, responses, True


def _end_strings(tokenizer: Tokenizer, eos: Iterable[int]) -> tuple[str, ...]:
    """What may stand at the end of a turn: special tokens, and the EOS ids whether marked special or not."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    written = tokenizer.convert_ids_to_tokens(list(eos)) + special + tokenizer.all_special_tokens
    return tuple({token for token in written if token and token.strip()})


# Encoding


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    out = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return out["input_ids"]


def _continue(tokenizer: Tokenizer, texts: list[str], sentinels: tuple[str, ...]) -> list[list[int] | None]:
    """Ids of texts that continue another: tokenised behind a sentinel, which is cut off. Where its tokens do not come
    out as they stand alone, it merged with the text, and the next sentinel is tried; None if all of them merge.
    """
    out: list[Any] = [None] * len(texts)
    left = list(range(len(texts)))
    for sentinel in sentinels:
        prefix = _encode(tokenizer, [sentinel])[0] if sentinel else []
        for i, ids in zip(left, _encode(tokenizer, [sentinel + texts[i] for i in left]), strict=True):
            if ids[: len(prefix)] == prefix:
                out[i] = ids[len(prefix) :]
        left = [i for i in left if out[i] is None]
    return out


def _sentinels(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Which sentinels keep texts exact: none ("") where texts tokenised apart decode to the texts joined.

    Asked of the tokeniser itself. A tokeniser that cannot write any probe back (a toy of words) has no exact boundary
    at all and is used as it is.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    probes = [(a, b) for a, b in PROBES if decode(_encode(tokenizer, [a + b])[0]) == a + b]
    exact = []
    for sentinel in SENTINELS:
        pieces = [(_encode(tokenizer, [a])[0], _continue(tokenizer, [b], (sentinel,))[0], a + b) for a, b in probes]
        if all(b is not None and decode(a + b) == joined for a, b, joined in pieces):
            exact.append(sentinel)
    return ("",) if "" in exact or not exact else tuple(exact)
