"""What is in the data of a config? Everything is read and tokenised, one report is printed, and nothing else happens:
no weights, no accelerator, no run folder.

    python -m sera_jax.train --config configs/x.yaml --data.check true
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sera_jax import data, metrics
from sera_jax.config import TrainConfig
from sera_jax.records import Pair, Prompt, Text, Tree, Unpaired
from sera_jax.train import world as worlds

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
PLACES = 5  # ids shown of a finding
HEAD, TAIL = 24, 16  # tokens shown of either end of a text
ROLES = re.compile(r"\b(?:human|user|assistant):")
BRANCHES = {0: ("chosen", "rejected"), 1: ("desirable",), -1: ("undesirable",)}  # by the label of a tree
CONTEXT = 4  # tokens before a token that its text is read in: some tokenisers strip the space of the first


def check(config: TrainConfig) -> dict[str, Any]:
    """Reads what the config names and prints what was found.

    Returns:
        the numbers of the report; those of a part that the config does not have, or that cannot be used, are missing.

    Raises:
        ValueError: the tokeniser cannot be loaded; or, after the report: of some part of the data (pairs, prompts,
            texts) nothing can be used, the pairs lack the scores that select.score needs, or the examples of an
            unpaired loss other prompts.
    """
    jax.config.update("jax_platforms", "cpu")  # printing asks for the number of the process, which opens the devices
    tokenizer = data.load_tokenizer(config.model.path, config.data.chat_template)
    eos_ids = data.eos_ids(config.model.path, tokenizer)
    failed: list[str] = []

    def attempt(key: str, read: Callable[[], Any]) -> Any:
        metrics.say(f"\n{key}")
        try:
            return read()
        except ValueError as error:
            failed.append(f"{key}: {error}")
            metrics.say(f"cannot be used: {error}")
            return None

    found: dict[str, Any] = {}
    read = attempt("data.pairs", lambda: _pairs(config, tokenizer, eos_ids)) if config.data.pairs else None
    pairs: list[Pair] | list[Unpaired] = []
    if read:
        pairs, trees, counts = read
        found |= {"pairs/used": len(trees), "pairs/read": counts.items}
        _show_lengths(counts)
        if worlds.unpaired(config):
            found |= of_unpaired(pairs, trees)
            _show_unpaired(found, worlds.balance(config, trees))
        else:
            found |= of_pairs(pairs, counts.measured)
            _show_pairs(found)
        for tree in _examples(trees, eos_ids):
            _say(example(tree, tokenizer, eos_ids))
        used = {tree.id for tree in trees}
        if worlds.mismatches(config):
            attempt("loss.name", lambda: _mismatches(config, pairs, trees))
        elif not worlds.unpaired(config):
            attempt("select.score", lambda: _scores(config, [pair for pair in pairs if pair.id in used]))
        if config.loop.parts != "all" and config.loop.iterations:
            attempt("loop.parts", lambda: _parts(config, [pair for pair in pairs if pair.id in used]))
    sets = {"data.pairs": [pair.prompt for pair in pairs]}
    if config.data.prompts:
        read = attempt("data.prompts", lambda: _prompts(config, tokenizer, worlds.read_prompts))
        sets["data.prompts"] = [prompt.prompt for prompt in read[0]] if read else []
    if config.bootstrap.candidates_file and worlds.bootstraps(config) and sets.get("data.prompts", sets["data.pairs"]):
        attempt("bootstrap.candidates_file", lambda: _candidates(config, pairs, tokenizer, eos_ids))
    if config.sft.epochs and config.sft.data:
        read = attempt("sft.data", lambda: _texts(config, tokenizer, eos_ids))
        sets["sft.data"] = [text.prompt for text in read[0]] if read else []
    if config.evaluate.prompts:
        read = attempt("evaluate.prompts", lambda: _prompts(config, tokenizer, worlds.read_evaluated))
        for name, others in sets.items() if read else ():
            both = overlap(read[0], others)
            found[f"evaluate/in {name}"] = len(both)
            metrics.say(f"{len(both)} of {len(read[0])} prompts stand in {name} too{_places(both)}")
    if failed:
        raise ValueError("data.check: " + " | ".join(failed))
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def _pairs(
    config: TrainConfig, tokenizer: Any, eos_ids: Sequence[int]
) -> tuple[list[Pair] | list[Unpaired], list[Tree], data.Counts]:
    """All given pairs (examples of an unpaired loss), and the trees of those that can be used."""
    pairs, report = worlds.read_pairs(config)
    _say(report.lines())
    trees, counts = worlds.tokenise(config, pairs, tokenizer, eos_ids)
    _say([counts.lines()[0], *counts.losses()])
    train, held_out = data.split_validation(pairs, config.data.validation, config.run.seed)
    if held_out:
        metrics.say(f"{len(train)} {report.what} to train on, {len(held_out)} held out")
    return pairs, trees, counts


def _candidates(config: TrainConfig, pairs: Sequence[Pair], tokenizer: Any, eos_ids: Sequence[int]) -> None:
    """The candidates that somebody else sampled, matched with the run's prompts."""
    prompts = worlds.read_prompts(config)[0] if config.data.prompts else data.prompts_of(pairs)
    cut = config.data.max_prompt_length, config.data.truncation
    _say(worlds.read_candidates(config, *worlds.sampled_prompts(prompts, tokenizer, *cut), tokenizer, eos_ids)[1])


def _scores(config: TrainConfig, pairs: Sequence[Pair]) -> None:
    worlds.check_scores(config, pairs)
    metrics.say(f"{config.select.score}: the pairs have what it needs")


def _parts(config: TrainConfig, pairs: Sequence[Pair] | Sequence[Unpaired]) -> None:
    train, _ = data.split_validation(pairs, config.data.validation, config.run.seed)
    parts = data.parts(train, config.loop.iterations, config.loop.parts, seed=config.run.seed)
    metrics.say(f"{config.loop.parts}: {', '.join(str(len(part)) for part in parts)} pairs by iteration")


def _mismatches(config: TrainConfig, examples: Sequence[Unpaired], trees: Sequence[Tree]) -> None:
    for key, part in zip(
        ("data.pairs", "data.validation"), data.split_validation(examples, config.data.validation, config.run.seed)
    ):
        ids = {example.id for example in part}
        of_part = [tree for tree in trees if tree.id in ids]
        if of_part:
            worlds.trees_of(config, part, of_part, key)
    metrics.say(f"{config.loss.name}: every example finds a completion of another prompt")


def _prompts(config: TrainConfig, tokenizer: Any, read: Callable) -> tuple[list[Prompt], data.Counts]:
    prompts, report = read(config)
    _say(report.lines())
    longest, truncation = config.data.max_prompt_length, config.data.truncation
    _, counts = data.tokenise_prompts(prompts, tokenizer, max_prompt_length=longest, truncation=truncation)
    _say([counts.lines()[0], *counts.losses()])
    _show_lengths(counts)
    return prompts, counts


def _texts(config: TrainConfig, tokenizer: Any, eos_ids: Sequence[int]) -> tuple[list[data.Demonstration], data.Counts]:
    texts, report = worlds.read_texts(config)
    _say(report.lines())
    _, counts = data.tokenise_texts(texts, tokenizer, eos_ids, **worlds.cutting(config))
    _say([counts.lines()[0], *counts.losses()])
    _show_lengths(counts)
    return texts, counts


# --- findings ---------------------------------------------------------------------------------------------------------


def of_pairs(pairs: Sequence[Pair], measured: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the pairs say of themselves.

    pairs/repeated: ids of those that say the same as an earlier one. pairs/contradicting: ids of those that prefer what
    an earlier one rejects, and the other way round. pairs/with their prompt: ids of those whose two responses begin
    with the text of their prompt. pairs/touching: ids of those, of plain text, without white space between prompt and a
    response. chosen longer: share of pairs whose chosen response has more tokens, equal ones count
    half (the accuracy of "the longer one is better"). gaps: float [pairs with scores], chosen - rejected.
    """
    seen: dict[bytes, str] = {}
    repeated, contradicting = [], []
    for pair in pairs:
        if _key(pair.prompt, pair.rejected, pair.chosen) in seen:
            contradicting.append(pair.id)
        key = _key(pair.prompt, pair.chosen, pair.rejected)
        if key in seen:
            repeated.append(pair.id)
        seen.setdefault(key, pair.id)
    full = [pair.id for pair in pairs if _begins(pair.chosen, pair.prompt) and _begins(pair.rejected, pair.prompt)]
    longer = np.sign(measured["chosen"] - measured["rejected"]) / 2 + 0.5
    return {
        "pairs/repeated": repeated,
        "pairs/contradicting": contradicting,
        "pairs/with their prompt": full,
        "pairs/touching": [
            pair.id for pair in pairs if any(_touch(pair.prompt, r) for r in (pair.chosen, pair.rejected))
        ],
        "chosen longer": float(longer.mean()),
        "gaps": np.array([pair.scores[0] - pair.scores[1] for pair in pairs if pair.scores is not None]),
        "pairs/without scores": sum(pair.scores is None for pair in pairs),
    }


def of_unpaired(examples: Sequence[Unpaired], trees: Sequence[Tree]) -> dict[str, Any]:
    """What labelled responses say of themselves: the same of prompt, completion and label.

    pairs/contradicting: ids of those whose label is not that of an earlier one of the same prompt and completion.
    desirable longer: of a desirable and an undesirable response, drawn at random, how often the first has more tokens,
    equal ones count half; NaN where all have one label.
    """
    seen: dict[bytes, set[bool]] = {}
    repeated, contradicting = [], []
    for example in examples:
        labels = seen.setdefault(_key(example.prompt, example.completion), set())
        if example.label in labels:
            repeated.append(example.id)
        if (not example.label) in labels:
            contradicting.append(example.id)
        labels.add(example.label)
    good, bad = (np.sort([len(tree.branches[0]) for tree in trees if tree.label == label]) for label in (1, -1))
    shorter = (np.searchsorted(bad, good, "left") + np.searchsorted(bad, good, "right")) / 2
    return {
        "pairs/repeated": repeated,
        "pairs/contradicting": contradicting,
        "pairs/with their prompt": [e.id for e in examples if _begins(e.completion, e.prompt)],
        "pairs/touching": [e.id for e in examples if _touch(e.prompt, e.completion)],
        "desirable longer": float(shorter.mean() / len(bad)) if len(good) and len(bad) else float("nan"),
    }


def overlap(prompts: Sequence[Prompt], others: Sequence[Text]) -> list[str]:
    """ids of the prompts that stand among the others, whatever their roles, case and white space."""
    known = {_words(text) for text in others} - {""}
    return [prompt.id for prompt in prompts if _words(prompt.prompt) in known]


def _words(text: Text) -> str:
    contents = [text] if isinstance(text, str) else [turn["content"] for turn in text]
    return " ".join(ROLES.sub(" ", " ".join(contents).lower()).split())


def _key(*texts: Text) -> bytes:
    return hashlib.blake2b(json.dumps(texts, sort_keys=True, default=str).encode(), digest_size=16).digest()


def _begins(text: Text, prompt: Text) -> bool:
    return isinstance(text, str) and isinstance(prompt, str) and text.strip().startswith(prompt.strip())


def _examples(trees: Sequence[Tree], eos_ids: Sequence[int]) -> list[Tree]:
    """The first that is whole, if any is, and the longest."""
    whole = (tree for tree in trees if all(branch[-1] in eos_ids for branch in tree.branches))
    two = [next(whole, trees[0]), max(trees, key=lambda tree: tree.length)]
    return two[:1] if two[0] is two[1] else two


def _touch(prompt: Text, text: Text) -> bool:
    return isinstance(text, str) and isinstance(prompt, str) and not (prompt[-1:].isspace() or text[:1].isspace())


def example(tree: Tree, tokenizer: Any, eos_ids: Sequence[int]) -> list[str]:
    """A tree as text, a bar between two tokens; BOS and EOS are named, line breaks written as \\n."""
    prompt, names = tree.prompt.tolist(), ("prompt", *BRANCHES[tree.label])
    counted = ", ".join(f"{name} {len(ids)}" for name, ids in zip(names, (tree.prompt, *tree.branches)))
    shown = _pieces(tokenizer, [], prompt)
    if prompt and prompt[0] == tokenizer.bos_token_id:
        shown[0] = f"BOS {shown[0]}"
    wide = max(map(len, names))
    out = [f"example {tree.id}, in tokens: {counted}", f"  {'prompt':{wide}} │{'│'.join(shown)}│"]
    for name, branch in zip(names[1:], tree.branches):
        shown = _pieces(tokenizer, prompt, branch.tolist())
        if branch[-1] in eos_ids:
            shown[-1] = f"EOS {shown[-1]}"
        else:
            shown.append(" (cut: no EOS)")
        out.append(f"  {name:{wide}} │{'│'.join(shown)}│")
    return out


def _pieces(tokenizer: Any, before: list[int], ids: list[int]) -> list[str]:
    """The text of each token of `ids`, which stand behind `before`; of many both ends."""
    if len(ids) > HEAD + TAIL + 1:
        first = _pieces(tokenizer, before, ids[:HEAD])
        last = _pieces(tokenizer, ids[: len(ids) - TAIL], ids[len(ids) - TAIL :])
        return [*first, f" … {len(ids) - HEAD - TAIL} tokens … ", *last]

    def decode(some: list[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    whole, out = [*before[-CONTEXT:], *ids], []
    for i in range(len(whole) - len(ids), len(whole)):
        start, context = decode(whole[:i][-CONTEXT:]), decode(whole[:i][-CONTEXT:] + [whole[i]])
        # A part of a character has no text of its own.
        own = context.startswith(start) and "�" not in context[len(start) :]
        piece = context[len(start) :] if own else tokenizer.convert_ids_to_tokens(whole[i])
        out.append(piece.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t"))
    return out


# --- the report -------------------------------------------------------------------------------------------------------


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        metrics.say(line)


def _places(ids: Sequence[str]) -> str:
    return f" ({', '.join(ids[:PLACES])}{', …' if len(ids) > PLACES else ''})" if ids else ""


def _names() -> list[str]:
    return ["", "mean", *("longest" if q == 1 else f"{q:.0%}" for q in QUANTILES)]


def _show_lengths(counts: data.Counts) -> None:
    rows = [[name, float(n.mean()), *np.quantile(n, QUANTILES).tolist()] for name, n in counts.measured.items()]
    metrics.table("tokens before cutting", _names(), rows)


def _show_unpaired(found: dict[str, Any], balance: str) -> None:
    metrics.say(balance)
    if not np.isnan(found["desirable longer"]):
        metrics.say(
            f"a desirable response is longer than an undesirable one in {found['desirable longer']:.1%} of the cases "
            "(equal: half)"
        )
    for key, told in (
        ("pairs/repeated", "say the same as an earlier example"),
        ("pairs/contradicting", "have another label than an earlier example of the same prompt and completion"),
        ("pairs/with their prompt", "have a completion that begins with its prompt (full texts need no prompt column)"),
        ("pairs/touching", "have no white space between prompt and response (they are joined as they are)"),
    ):
        metrics.say(f"{len(found[key])} examples {told}{_places(found[key])}")


def _show_pairs(found: dict[str, Any]) -> None:
    metrics.say(f"the chosen response is the longer one in {found['chosen longer']:.1%} of the pairs (equal: half)")
    for key, told in (
        ("pairs/repeated", "say the same as an earlier pair"),
        ("pairs/contradicting", "prefer what an earlier pair of the same prompt rejects"),
        ("pairs/with their prompt", "have responses that begin with their prompt (full texts need no prompt column)"),
        ("pairs/touching", "have no white space between prompt and response (they are joined as they are)"),
    ):
        metrics.say(f"{len(found[key])} pairs {told}{_places(found[key])}")
    gaps = found["gaps"]
    if len(gaps):
        metrics.say(
            f"{len(gaps)} pairs have scores, {found['pairs/without scores']} have none; chosen - rejected is negative "
            f"in {int((gaps < 0).sum())}, zero in {int((gaps == 0).sum())}"
        )
        row = ["chosen - rejected", float(gaps.mean()), *np.quantile(gaps, QUANTILES).tolist()]
        metrics.table("score gaps", [*_names()[:-1], "largest"], [row])
    else:
        metrics.say("no pair has scores")
