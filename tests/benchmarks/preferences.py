"""Models of preferences on annotated pairs, and circles among triples; by hand, one command:

    python tests/benchmarks/preferences.py --models '{head: runs/pm/export, rewards: runs/rm/export}' \
        --pairs '[test.jsonl, ...]' --triples '[pandalm_human.jsonl.gz, ...]'

Models are exports of `sera_jax.reward_model`, of any kind. For each file of pairs: how often a model agrees with the
annotators, with a 95 % interval, beside "the longer response wins"; ties of a model count half. For each file of
triples (rows of prompt or instruction, response_a, response_b, preference from 1 to 2): of the triples of responses to
a prompt any two of which the annotators compared, none a tie, how many go in a circle, in the labels, and among all
triples of responses to some of the prompts in a model's answers. Preferences drawn by coins give 25 %.
"""

import collections
import itertools
import json
import pathlib
import tempfile

import jsonargparse
import numpy as np

from sera_jax import data, hf, policies, preference
from sera_jax import mesh as meshes
from sera_jax.ledger import Ledger
from sera_jax.records import Pair

LIMIT = 5  # responses to a prompt that a model is asked about


def main(
    models: dict[str, str],
    pairs: list[str] = (),
    triples: list[str] = (),
    limit: int = 0,
    prompts: int = 100,
    max_length: int = 512,
    max_prompt_length: int = 128,
) -> None:
    """Prints a table and a line of JSON.

    Args:
        models: name → folder. limit: first n pairs of each file (0 = all). prompts: with triples, that models are asked
            about, drawn by seed 0, and of their responses LIMIT. max_length, max_prompt_length: of what a reward model
            reads; a preference model's own are in its config.json.
    """
    mesh = meshes.make(1, 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        of = {"ledger": Ledger(pathlib.Path(folder)), "mesh": mesh, "lengths": (max_length, max_prompt_length)}
        found: dict[str, dict] = {}
        for file in pairs:
            found[file] = accuracies(file, models, limit, of)
            print(file, json.dumps(found[file]), flush=True)
        for file in triples:
            found[f"{file}, triples"] = circles(file, models, prompts, of)
            print(file, json.dumps(found[f"{file}, triples"]), flush=True)
    print(json.dumps(found))


def accuracies(file: str, models: dict[str, str], limit: int, of: dict) -> dict:
    given, _ = data.load_pairs([file], limit=limit)
    asked = [(pair.prompt, pair.chosen, pair.rejected) for pair in given]
    text = preference.answer
    longer = [np.sign(len(text(pair.chosen)) - len(text(pair.rejected))) for pair in given]
    right = {"longer": longer, **{name: np.sign(log_odds(path, asked, of)) for name, path in models.items()}}
    return {"pairs": len(given), **{name: interval((np.array(sign) + 1) / 2) for name, sign in right.items()}}


def interval(value_N: np.ndarray) -> str:
    return f"{100 * value_N.mean():.1f} ± {196 * value_N.std() / np.sqrt(len(value_N)):.1f}"


def log_odds(path: str, asked: list[preference.Asked], of: dict) -> np.ndarray:
    """Of one response against the other, by an export of any kind."""
    how = {"compute": "float32"}
    if preference.KEY in hf.read_config(path):
        folder, form = policies.open_preference_model(path, of["mesh"], **how)
        prob, _ = policies.folder_preferences(folder, form, asked, ledger=of["ledger"], label=f"{len(asked)} pairs")
        return preference.log_odds(prob)
    folder, (most, room) = policies.open_reward_model(path, of["mesh"], **how), of["lengths"]
    pairs = [data_pair(n, *one) for n, one in enumerate(asked)]
    cut = {"max_length": most, "max_prompt_length": room}
    trees, _ = data.tokenise_pairs(pairs, folder.tokenizer, folder.eos_ids, **cut)
    reward = policies.folder_rewards(folder, trees, ledger=of["ledger"], label=f"{len(asked)} pairs").reshape(-1, 2)
    out = np.zeros(len(asked))  # what cannot be told apart is a tie
    out[[int(tree.id) for tree in trees]] = reward[:, 0] - reward[:, 1]
    return out


def data_pair(n: int, prompt: preference.Text, one: preference.Text, other: preference.Text):
    return Pair(str(n), prompt, one, other)


def circles(file: str, models: dict[str, str], most: int, of: dict) -> dict:
    votes = collections.defaultdict(lambda: collections.defaultdict(list))  # prompt → (response, response) → votes
    single = collections.defaultdict(lambda: collections.defaultdict(lambda: collections.defaultdict(list)))
    for _, row in data.load_rows(file):
        prompt = row.get("prompt") or row.get("instruction")
        if not prompt or row.get("preference") is None:
            continue
        two = row["response_a"], row["response_b"]
        votes[prompt][two].append(2 - row["preference"])
        for k, vote in enumerate(row.get("annotators") or []):
            single[k][prompt][two].append({1: 1.0, 2: 0.0}.get(vote, 0.5))
    told = {"labels": share(preference.cycles(table(votes)))}
    if single:
        counts = np.sum([preference.cycles(table(votes_k)) for votes_k in single.values()], axis=0)
        told["labels, annotator by annotator"] = share(counts)
    rng = np.random.default_rng(0)
    several = [(prompt, sorted({text for two in pairs for text in two})) for prompt, pairs in votes.items()]
    several = [(prompt, texts) for prompt, texts in several if len(texts) > 2]
    chosen = [several[i] for i in np.sort(rng.permutation(len(several))[:most])]
    chosen = [(prompt, [texts[i] for i in np.sort(rng.permutation(len(texts))[:LIMIT])]) for prompt, texts in chosen]
    told["prompts"] = len(chosen)
    asked = [(prompt, *two) for prompt, texts in chosen for two in itertools.combinations(texts, 2)]
    for name, path in models.items() if asked else ():
        odds = log_odds(path, asked, of)
        said = collections.defaultdict(dict)
        for (prompt, *two), value in zip(asked, odds):
            said[prompt][tuple(two)] = [1 / (1 + np.exp(-value))]
        told[name] = share(preference.cycles(table(said)))
    return told


def table(votes: dict[str, dict[tuple[str, str], list[float]]]) -> np.ndarray:
    """P[p, i, j], the mean vote for response i against j; NaN where nobody compared them."""
    places = [{text: k for k, text in enumerate(sorted({t for two in pairs for t in two}))} for pairs in votes.values()]
    most = max(map(len, places))
    total, count = np.zeros((2, len(places), most, most))
    for p, (known, pairs) in enumerate(zip(places, votes.values())):
        for (one, other), given in pairs.items():
            i, j = known[one], known[other]
            if i != j:
                total[p, i, j] += sum(given)
                total[p, j, i] += len(given) - sum(given)
                count[p, i, j] += len(given)
                count[p, j, i] += len(given)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def share(counts: tuple[int, int]) -> str:
    circles, triples = map(int, counts)
    return f"{circles} of {triples}" + (f" ({100 * circles / triples:.1f} %)" if triples else "")


if __name__ == "__main__":
    jsonargparse.CLI(main, as_positional=False)
