"""Prompts → candidates → rewards → fresh pairs: what the policy makes of its own samples (SeRA, section 3.3)."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sera_jax import data, disk, explore, metrics, processes, sample, sera
from sera_jax.data import Responses, order
from sera_jax.records import Candidates, Pair, Prompt, Text, Tree


@dataclasses.dataclass(frozen=True)
class Fresh:
    """Pairs made of candidates, best margins first cut off at K̃ or not (`kept`).

    trees: prompt, (chosen, rejected) with the sampled ids. pair_F2: candidate numbers (chosen, rejected); prompt_F:
    index into the candidates. reward_F2, margin_F float32. win_F2 float32: mean probability of beating the prompt's
    other candidates; preference_F2 float32: the other one of the pair. kept_F bool: among the K̃ of the largest margin,
    or, of the rule `explore`, of the largest Γ, which is gamma_F, float32.
    """

    trees: tuple[Tree, ...]
    prompt_F: np.ndarray
    pair_F2: np.ndarray
    reward_F2: np.ndarray
    margin_F: np.ndarray
    win_F2: np.ndarray
    preference_F2: np.ndarray
    kept_F: np.ndarray
    gamma_F: np.ndarray | None = None


def prompts_of_iteration(count: int, share: float, *, seed: int, iteration: int, turn: int | None = None) -> np.ndarray:
    """Indices of the prompts an iteration samples from, ascending: the first share of a permutation of its own.

    Args:
        turn: how many iterations have sampled before, which then all go on through one permutation, from its start
            again where it ends; None = each has its own.
    """
    size = count_of_prompts(count, share)
    if turn is None:
        return np.sort(order(count, seed=seed + 1, iteration=iteration, epoch=0)[:size])
    return np.sort(order(count, seed=seed + 1, iteration=0, epoch=0)[np.arange(turn * size, (turn + 1) * size) % count])


def count_of_prompts(count: int, share: float) -> int:
    """How many of `count` prompts an iteration samples from."""
    return max(1, round(share * count))


def sample_candidates(
    run: Callable,
    prompts: Sequence[Prompt],
    tokens: Sequence[np.ndarray],
    decode: Callable[[np.ndarray], str],
    *,
    candidates: int,
    slots: int,
    refill: int = 1,
    path: pathlib.Path,
    label: str,
) -> Candidates:
    """C candidates of every prompt, appended to a file batch by batch; what the file holds already is not sampled
    again. Process 0 alone reads and writes it; all processes sample.

    Args:
        run: programs.sample_prompts(...). tokens: ids of the prompts. decode: token ids → text, specials removed.
        slots: responses decoded side by side. refill: times slots // candidates, prompts of a batch. path: JSONL of
            this stage.

    Raises:
        DiskError: the disk took no more. What is whole in the file is not sampled again.
    """
    per_batch = max(1, slots // candidates) * refill
    batches = sample.sampling_batches([len(t) for t in tokens], per_batch)
    known = processes.once(lambda: _read(path, [p.id for p in prompts]))
    found = {index: (tokens, finished) for index, tokens, finished in known}
    missing = [(size, members) for size, members in batches if not all(int(i) in found for i in members)]
    if missing:
        stages = sample.run_batches(run, tokens, missing, per_batch)
        for members, responses, finished in metrics.track(stages, total=len(missing), label=label, unit="batches"):
            # Without what is there already, of a batch that was torn.
            new = [
                (int(index), responses[row], finished[row])
                for row, index in enumerate(members)
                if int(index) not in found
            ]
            for index, ids, done in processes.once(lambda new=new: _append(path, new, prompts, decode)):
                found[index] = (ids, done)
    order_ = range(len(prompts))
    return Candidates(
        ids=tuple(p.id for p in prompts),
        prompts=tuple(tokens),
        texts_PC=tuple(tuple(decode(r) for r in found[i][0]) for i in order_),
        tokens_PC=tuple(tuple(found[i][0]) for i in order_),
        finished_PC=np.array([found[i][1] for i in order_], bool).reshape(len(prompts), candidates),
    )


def _append(path: pathlib.Path, new: list[tuple], prompts: Sequence[Prompt], decode: Callable) -> list[tuple]:
    """Writes (index of the prompt, its candidates' tokens, which are finished); they are on disk when it returns."""
    lines = []
    for index, ids, finished in new:
        record = {
            "index": index,
            "id": prompts[index].id,
            "responses": [decode(r) for r in ids],
            "finished": finished.tolist(),
            "tokens": [r.tolist() for r in ids],
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    with disk.guarded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
    return new


def _read(path: pathlib.Path, ids: Sequence[str]) -> list[tuple]:
    """Candidates that an earlier, interrupted run left in the file, as `_append` takes them; a torn last line is cut
    off."""
    found: list[tuple] = []
    if not path.is_file():
        return found
    whole = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            record = json.loads(line)
            index = record["index"]
            if index >= len(ids) or ids[index] != record["id"]:
                raise ValueError(
                    f"{path} holds candidates of prompt {record['id']!r} at place {index}, expected another one: it "
                    "belongs to other prompts. Remove the file, or use another run folder."
                )
            found.append((index, [np.array(t, np.int32) for t in record["tokens"]], record["finished"]))
    os.truncate(path, whole)
    return found


@dataclasses.dataclass(frozen=True)
class Imported:
    """Candidates that somebody else sampled, of those prompts of the run that the file has.

    used_P: index of each prompt among those of the run, ascending. scores_PC float32, NaN where there is no candidate;
    None = the file's were not asked for.
    """

    used_P: np.ndarray
    candidates: Candidates
    scores_PC: np.ndarray | None


def imported(
    rows: Sequence[Responses],
    prompts: Sequence[Prompt],
    tokens: Sequence[np.ndarray],
    tokenizer: data.Tokenizer,
    eos_ids: Sequence[int],
    *,
    path: str,
    max_length: int,
    progress: data.Progress = data.silent,
) -> tuple[Imported, list[str]]:
    """Rows of data.load_responses → candidates, and what to tell of them. Several rows of a prompt are one.

    A response is tokenised as a pair's is, EOS behind it where it was finished; one that does not fit into max_length
    with its prompt keeps its start and counts as unfinished.

    Args:
        prompts, tokens: of the run, one to one; matched with the rows by text. path: of the file, for messages.

    Raises:
        ValueError: no row has a prompt of the run.
    """
    by_prompt: dict[str, list[Responses]] = {}
    for row in rows:
        by_prompt.setdefault(_content(row.prompt), []).append(row)
    used = [i for i, prompt in enumerate(prompts) if _content(prompt.prompt) in by_prompt]
    known = {_content(prompts[i].prompt) for i in used}
    strange = [row.where for row in rows if _content(row.prompt) not in known]
    if not used:
        raise ValueError(
            f"{path}: none of its {len(rows)} prompts is one of the {len(prompts)} that the run samples from. Got "
            f"{_content(rows[0].prompt)[:80]} ({rows[0].where}), expected {_content(prompts[0].prompt)[:80]} or "
            "another one. Set data.prompts to the prompts that the candidates were sampled for."
        )
    groups = [by_prompt[_content(prompts[i].prompt)] for i in used]
    texts_PC = [[text for row in group for text in row.texts] for group in groups]
    ids_PC = data.tokenise_responses([prompts[i].prompt for i in used], texts_PC, tokenizer, eos_ids, progress=progress)
    most, cut = max(map(len, texts_PC)), 0
    finished_PC = np.zeros((len(used), most), bool)
    scored = rows[0].scores is not None
    scores_PC = np.full((len(used), most), np.nan, np.float32)
    for p, (index, group) in enumerate(zip(used, groups)):
        room = max_length - len(tokens[index])
        for c, finished in enumerate(done for row in group for done in row.finished):
            ids = ids_PC[p][c] if finished else ids_PC[p][c][:-1]
            finished_PC[p, c] = finished and 0 < len(ids) <= room
            if len(ids) > room:
                cut += 1
                ids = ids[:room]
                texts_PC[p][c] = tokenizer.decode(ids, skip_special_tokens=True)
            ids_PC[p][c] = ids
        if scored:
            scores_PC[p, : len(texts_PC[p])] = [score for row in group for score in row.scores]
        ids_PC[p] += [np.zeros(0, np.int32)] * (most - len(ids_PC[p]))
        texts_PC[p] += [""] * (most - len(texts_PC[p]))
    candidates = Candidates(
        ids=tuple(prompts[i].id for i in used),
        prompts=tuple(tokens[i] for i in used),
        texts_PC=tuple(map(tuple, texts_PC)),
        tokens_PC=tuple(map(tuple, ids_PC)),
        finished_PC=finished_PC,
    )
    told = [f"{path}: {sum(len(row.texts) for row in rows)} candidates in {len(rows)} rows"]
    if cut:
        told.append(f"  cut to data.max_length: {cut}, which count as unfinished")
    if strange:
        told.append(f"  not used: {len(strange)} rows whose prompt is none of the run ({strange[0]}, …)")
    if len(used) < len(prompts):
        missing = len(prompts) - len(used)
        told.append(f"  without candidates, and left out: {missing} of {len(prompts)} prompts of the run")
    return Imported(np.array(used), candidates, scores_PC if scored else None), told


def take(candidates: Candidates, chosen_Q: np.ndarray) -> Candidates:
    """The candidates of some of the prompts."""
    pick = lambda values: tuple(values[i] for i in chosen_Q)
    return Candidates(
        ids=pick(candidates.ids),
        prompts=pick(candidates.prompts),
        texts_PC=pick(candidates.texts_PC),
        tokens_PC=pick(candidates.tokens_PC),
        finished_PC=candidates.finished_PC[chosen_Q],
    )


def picked(candidates: Candidates, chosen_P: np.ndarray) -> Candidates:
    """One candidate of each prompt."""
    pick = lambda values_PC: tuple((row[c],) for row, c in zip(values_PC, chosen_P))
    return dataclasses.replace(
        candidates,
        texts_PC=pick(candidates.texts_PC),
        tokens_PC=pick(candidates.tokens_PC),
        finished_PC=np.take_along_axis(candidates.finished_PC, np.asarray(chosen_P)[:, None], axis=1),
    )


def joined(one: Candidates, other: Candidates) -> Candidates:
    """The candidates of the same prompts by two samplers, side by side."""
    both = lambda a, b: tuple((*x, *y) for x, y in zip(a, b, strict=True))
    return Candidates(
        ids=one.ids,
        prompts=one.prompts,
        texts_PC=both(one.texts_PC, other.texts_PC),
        tokens_PC=both(one.tokens_PC, other.tokens_PC),
        finished_PC=np.concatenate((one.finished_PC, other.finished_PC), axis=1),
    )


def with_given(
    candidates: Candidates, tokens: Sequence[np.ndarray], decode: Callable[[np.ndarray], str], eos_ids: Sequence[int]
) -> Candidates:
    """The candidates with a given response before them as number 0, so that a sample that repeats it is the repetition.

    Args:
        tokens: of each prompt's response, EOS included where it was not cut; empty = there is none.
    """
    finished_P = np.array([len(ids) > 0 and int(ids[-1]) in eos_ids for ids in tokens], bool)
    return dataclasses.replace(
        candidates,
        texts_PC=tuple((decode(ids), *row) for ids, row in zip(tokens, candidates.texts_PC)),
        tokens_PC=tuple((ids, *row) for ids, row in zip(tokens, candidates.tokens_PC)),
        finished_PC=np.concatenate([finished_P[:, None], candidates.finished_PC], axis=1),
    )


def chosen_of(prompts: Sequence[Prompt], pairs: Sequence[Pair], trees: Sequence[Tree]) -> tuple[np.ndarray, ...]:
    """Token ids of the chosen response that the first given pair of each prompt has, empty where no pair has it."""
    first: dict[str, np.ndarray] = {}
    for pair, tree in zip(pairs, trees):
        first.setdefault(_content(pair.prompt), tree.branches[0])
    return tuple(first.get(_content(prompt.prompt), np.zeros(0, np.int32)) for prompt in prompts)


def _content(prompt: Text) -> str:
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def copies(candidates: Candidates, *, keep_unfinished: bool, draws: int = 0) -> np.ndarray:
    """int32 [P, C]: how many of a prompt's candidates say the same, at the first of them; 0 at the others, and at those
    that may stand in no pair: empty, or unfinished unless told otherwise.

    Args:
        draws: so many candidates in a row are looked at by themselves, those of several samplers; 0 = all.
    """
    out = np.zeros(candidates.finished_PC.shape, np.int32)
    for p, tokens in enumerate(candidates.tokens_PC):
        first: dict[tuple[int, bytes], int] = {}
        for c, ids in enumerate(tokens):
            place = first.setdefault((c // draws if draws else 0, ids.tobytes()), c)
            usable = len(ids) > 0 and candidates.texts_PC[p][c].strip() != ""
            usable &= keep_unfinished or bool(candidates.finished_PC[p, place])
            out[p, place] += usable
    return out


def valid(candidates: Candidates, *, keep_unfinished: bool) -> np.ndarray:
    """bool [P, C]: which candidates may stand in a pair: not empty, not repeated, finished unless told otherwise."""
    return copies(candidates, keep_unfinished=keep_unfinished) > 0


PAIR_RULES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {**sera.PAIR_RULES, "explore": explore.enhancer}
"""Those of sera, and the one that takes Γ beside what they take."""


def fresh_pairs(
    candidates: Candidates,
    rewards_PC: np.ndarray,
    valid_PC: np.ndarray,
    prob_PCC: np.ndarray | None = None,
    against_PC: np.ndarray | None = None,
    *,
    rule: str,
    keep: int,
    key: jax.Array,
    gamma_PC: np.ndarray | None = None,
    eta: float = 0.0,
) -> Fresh:
    """Candidates and their rewards → pairs by a rule of PAIR_RULES, of which the K̃ largest margins are kept; or by one
    of sera.WIN_RULES, whose margin is P(chosen > rejected) - P(rejected > chosen).

    Args:
        prob_PCC: probabilities that one candidate is better than another, of a source that compares; against_PC: whom
            they win against (`sera.win_rates`). WIN_RULES choose by them, and by σ of the rewards' differences where
            there are none.
        keep: K̃; fewer pairs than that are all kept. key: of the iteration, for the rules that draw.
        gamma_PC, eta: for the rule `explore` alone (explore.enhancer), whose K̃ pairs are those of the largest Γ.

    Raises:
        ValueError: the reward of a valid candidate is not finite.
    """
    bad = np.argwhere(valid_PC & ~np.isfinite(rewards_PC))
    if len(bad):
        p, c = bad[0]
        raise ValueError(
            f"candidate {c} of prompt {candidates.ids[p]!r} has reward {rewards_PC[p, c]}, expected a finite number "
            f"({len(bad)} of {int(valid_PC.sum())} candidates)."
        )
    also = {} if gamma_PC is None else {"gamma_PC": jnp.asarray(gamma_PC), "eta": jnp.float32(eta)}
    reward, usable = jnp.asarray(rewards_PC), jnp.asarray(valid_PC)
    compares, known_PCC = rule in sera.WIN_RULES, jnp.asarray(sera.probabilities(reward, prob_PCC))
    pick, told = (sera.WIN_RULES[rule], known_PCC) if compares else (PAIR_RULES[rule], reward)
    pair_PQ2, ok_PQ = jax.device_get(jax.jit(pick)(told, usable, key, **also))
    prompt_F, q_F = np.nonzero(ok_PQ)
    pair_F2 = pair_PQ2[prompt_F, q_F]
    win_PC = np.asarray(sera.win_rates(reward, usable, known_PCC, against_PC), np.float32)
    met_F = np.isfinite(win_PC[prompt_F[:, None], pair_F2]).all(axis=1)  # an opponent
    prompt_F, pair_F2 = prompt_F[met_F], pair_F2[met_F]
    reward_F2 = rewards_PC[prompt_F[:, None], pair_F2].astype(np.float32)
    margin_F = reward_F2[:, 0] - reward_F2[:, 1]
    first_F = np.asarray(known_PCC, np.float32)[prompt_F, *pair_F2.T]
    margin_F = 2 * first_F - 1 if compares else margin_F
    gamma_F = None if gamma_PC is None else gamma_PC[prompt_F, pair_F2[:, 1]]
    rank_F = margin_F if gamma_F is None else gamma_F
    kept_F = np.zeros(len(prompt_F), bool)
    if len(prompt_F):
        one_group = jnp.zeros(len(prompt_F), jnp.int32)
        kept_F = np.array(jax.jit(sera.top_k_mask)(jnp.asarray(rank_F), one_group, jnp.array([keep], jnp.int32)))
    trees = tuple(
        Tree(
            f"{candidates.ids[p]}/{chosen}>{rejected}",
            candidates.prompts[p],
            (candidates.tokens_PC[p][chosen], candidates.tokens_PC[p][rejected]),
        )
        for p, (chosen, rejected) in zip(prompt_F, pair_F2)
    )
    return Fresh(
        trees,
        prompt_F,
        pair_F2,
        reward_F2,
        margin_F,
        win_F2=win_PC[prompt_F[:, None], pair_F2],
        preference_F2=np.stack([first_F, 1 - first_F], axis=1),
        kept_F=kept_F,
        gamma_F=gamma_F,
    )
