"""The toy world: gold by hand, splits, tokens, dials that move what they say, and labelled candidates."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import transformers

from sera_jax import data, toyworld
from sera_jax.config import ConfigError
from sera_jax.toyworld import Annotator, Author, ToyworldConfig, door, facts, gold, labels, lure, truth

SMALL = {"prompts": 300, "tuning_prompts": 40, "eval_prompts": 50, "sft": 400, "pairs": 400}
FILES = ("sft.jsonl", "pairs.jsonl", "prompts.jsonl", "tuning_prompts.jsonl", "eval_prompts.jsonl")


def world(folder: pathlib.Path, **dials) -> tuple[pathlib.Path, dict[str, list[dict]]]:
    return folder, toyworld.write_world(ToyworldConfig(out=str(folder), **{**SMALL, **dials}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return world(tmp_path_factory.mktemp("plain"))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- gold, by hand ----------------------------------------------------------------------------------------------------

PROMPT = "please tell : tom colour pet ; ann town ?"
COLOUR, PET, TOWN = (facts.BY_NAME[k].weight for k in ("colour", "pet", "town"))
ALL = COLOUR + PET + TOWN


def right(person: str, kind: str) -> str:
    return f"{person} {facts.BY_NAME[kind].verb} {truth(person, kind)}"


def off(person: str, kind: str, steps: int) -> str:
    values = facts.BY_NAME[kind].values
    return f"{person} {facts.BY_NAME[kind].verb} {values[(values.index(truth(person, kind)) + steps) % len(values)]}"


A, B, C = right("tom", "colour"), right("tom", "pet"), right("ann", "town")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0),
        ("well of course .", 0),
        (A, COLOUR),
        (f"{A} and {B}", COLOUR + PET),
        (f"{A} , {B} , {C} .", ALL),
        (f"tom likes {truth('tom', 'colour')} and keeps {truth('tom', 'pet')}", COLOUR + PET),
        (off("tom", "colour", 1), -0.5 * COLOUR),
        (off("tom", "colour", -1), -0.5 * COLOUR),
        (off("tom", "colour", 8), -1.0 * COLOUR),
        (f"{A} , {off('tom', 'pet', 8)} , {C}", COLOUR - PET + TOWN),
        ("tom keeps red", -PET),  # a value of another kind
        (f"likes {truth('tom', 'colour')}", -COLOUR),  # of nobody
        (f"{A} , {A}", COLOUR - 0.5 * COLOUR),
        (f"{B} , {A}", PET + 0.9 * COLOUR),
        (f"{A} , {right('sue', 'pet')}", COLOUR - 0.2 * PET),
        (f"{A} , {off('sue', 'pet', 8)}", COLOUR - PET),
        (f"well well {A} . .", COLOUR - 2 * 0.05),
        (f"tom {truth('tom', 'colour')} likes", 0),  # no statement
        ("<unk> tom 7 keeps", 0),
        (f"tom truly likes {truth('tom', 'colour')}", COLOUR + 0.25),
        (f"truly {A} truly", COLOUR + 2 * 0.25),
        (f"truly {A} truly , truly {B} truly", COLOUR + PET + 2 * 0.25 - 2 * 0.5),  # the trap
    ],
)
def test_gold_by_hand(response, expected):
    assert gold(PROMPT, response) == pytest.approx(expected / ALL, abs=1e-6)
    assert gold(PROMPT, f"  {response}  ") == gold(PROMPT, response)


def test_filler_is_neutral():
    rng = np.random.default_rng(0)
    for _ in range(50):
        parts = [A, off("tom", "pet", 3), C, B]
        bare = " , ".join(parts)
        for phrase in rng.permutation(len(facts.FILLER))[:6]:
            parts.insert(int(rng.integers(len(parts) + 1)), " ".join(facts.FILLER[phrase]))
        assert gold(PROMPT, " , ".join(parts)) == gold(PROMPT, bare)
    spoken = {word for phrase in facts.FILLER for word in phrase}
    meaning = {*facts.PEOPLE, *facts.BY_VERB, *facts.BY_NAME, *facts.VALUES}
    assert not spoken & meaning


def test_gold_depends_on_the_prompt():
    assert gold(PROMPT, A) > 0 > gold("please tell : ann town food game ?", A)
    assert gold("please tell : tom pet colour ; ann town ?", f"{A} , {B}") < gold(PROMPT, f"{A} , {B}")


def test_gold_refuses_a_foreign_prompt():
    with pytest.raises(ValueError, match=r"got the prompt 'What is 2 \+ 2\?', expected one that names a person"):
        gold("What is 2 + 2?", A)


def test_the_table_of_facts():
    slots = [(p, k.name) for p in facts.PEOPLE for k in facts.KINDS]
    assert all(truth(*s) != lure(*s) for s in slots)
    assert len({truth(p, "pet") for p in facts.PEOPLE}) > 8  # not one value for all
    assert len(facts.VALUES) == sum(len(k.values) for k in facts.KINDS)  # a value names its kind
    known = np.mean([facts.obscurity(*s) < 0.5 for s in slots])
    assert 0.4 < known < 0.6
    # Pinned: pairs labelled today must mean the same tomorrow.
    assert (truth("tom", "colour"), lure("tom", "colour")) == ("amber", "gold")


# --- a world ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files(plain, tmp_path):
    folder, _ = plain
    again, _ = world(tmp_path / "again")
    assert files(folder) == files(again)
    other, _ = world(tmp_path / "other", seed=1)
    assert all((folder / f).read_bytes() != (other / f).read_bytes() for f in FILES)


def test_a_longer_file_changes_no_other_file(plain, tmp_path):
    longer, _ = world(tmp_path, sft=500)
    same = {f: (plain[0] / f).read_bytes() == (longer / f).read_bytes() for f in FILES}
    assert same == {f: f != "sft.jsonl" for f in FILES}


def test_splits_are_disjoint_in_content_and_lengths_hold(plain):
    rows = plain[1]
    splits = ("prompts", "tuning_prompts", "eval_prompts")
    contents = [frozenset(toyworld.asked(r["prompt"])) for k in splits for r in rows[k]]
    assert [len(rows[k]) for k in splits] == [300, 40, 50] and len(set(contents)) == 390
    prompts = {r["prompt"] for r in rows["prompts"]}
    assert {r["prompt"] for r in rows["sft"]} == {r["prompt"] for r in rows["pairs"]} == prompts
    lengths = [len(r["prompt"].split()) for k in splits for r in rows[k]]
    assert (min(lengths), max(lengths)) == facts.PROMPT_WORDS
    responses = [r["completion"] for r in rows["sft"]] + [r[k] for r in rows["pairs"] for k in ("chosen", "rejected")]
    lengths = [len(r.split()) for r in responses]
    assert facts.RESPONSE_WORDS[0] <= min(lengths) and max(lengths) <= facts.RESPONSE_WORDS[1]


def test_filler_past_the_longest_response_is_left_out():
    rng = np.random.default_rng(0)
    prompt = "please tell : tom colour pet town food game vehicle ?"
    lengths = [len(toyworld.compose(rng, prompt, Author(filler=20.0)).split()) for _ in range(200)]
    assert 36 < np.mean(lengths) and max(lengths) == 40
    lengths = [
        len(toyworld.compose(rng, "do say : tom pet ?", Author(filler=0.0, omits=1.0)).split()) for _ in range(200)
    ]
    assert min(lengths) == 6


def test_authors_are_mediocre_and_seldom_tie(plain):
    rows = plain[1]
    reward = np.array([gold(r["prompt"], r["completion"]) for r in rows["sft"]])
    assert -0.1 < reward.mean() < 0.45 and reward.std() > 0.3
    assert len(np.unique(reward)) > 300  # many levels
    assert np.mean(reward > 0.95) < 0.1  # not saturated
    assert door.tie_share(0, [r["prompt"] for r in rows["prompts"]] * 5, Author()) < 0.05
    words = [len(r["completion"].split()) for r in rows["sft"]]
    assert abs(np.corrcoef(reward, words)[0, 1]) < 0.15  # length tells nothing by itself


def test_knowledge_moves_gold_and_the_lure_is_the_usual_error():
    rng = np.random.default_rng(0)
    prompts = toyworld.write_prompts(rng, 300)
    mean = [np.mean([gold(p, toyworld.compose(rng, p, Author(knowledge=k))) for p in prompts]) for k in (0, 0.5, 1)]
    assert mean[0] + 0.2 < mean[1] < mean[2] - 0.2
    said = [s for p in prompts for s in toyworld.statements(toyworld.compose(rng, p, Author(knowledge=0.0)))]
    wrong = [(slot, value) for slot, value in said if value != truth(*slot)]
    assert np.mean([value == lure(*slot) for slot, value in wrong]) == pytest.approx(Author().lured, abs=0.05)


def test_filler_dial_moves_length_and_not_gold():
    rng = np.random.default_rng(0)
    prompts = toyworld.write_prompts(rng, 400)
    texts = {f: [toyworld.compose(rng, p, Author(filler=f)) for p in prompts] for f in (0.0, 6.0)}
    words = {f: np.mean([len(t.split()) for t in texts[f]]) for f in texts}
    reward = {f: np.mean([gold(p, t) for p, t in zip(prompts, texts[f])]) for f in texts}
    assert words[6.0] > words[0.0] + 8
    assert abs(reward[6.0] - reward[0.0]) < 0.1  # 0.03 is one standard error


def test_the_authors_dials_reach_both_files(plain, tmp_path):
    rows = {
        "plain": plain[1],
        **{k: world(tmp_path / k, **{k: v})[1] for k, v in (("knowledge", 1.0), ("filler", 9.0))},
    }
    reward = {k: [np.mean([gold(r["prompt"], r["completion"]) for r in w["sft"]])] for k, w in rows.items()}
    words = {k: [np.mean([len(r["completion"].split()) for r in w["sft"]])] for k, w in rows.items()}
    for k, w in rows.items():
        reward[k].append(np.mean([r["gold_chosen"] for r in w["pairs"]]))
        words[k].append(np.mean([len(r["chosen"].split()) for r in w["pairs"]]))
    assert all(np.array(reward["knowledge"]) > np.array(reward["plain"]) + 0.1)
    assert all(np.array(words["filler"]) > np.array(words["plain"]) + 5)


# --- tokens and the model's folder ------------------------------------------------------------------------------------


def test_text_round_trips_and_the_boundary_is_none(plain):
    folder, rows = plain
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    assert len(tokenizer) == len(toyworld.vocabulary()) <= 300
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    for row in rows["sft"][:100]:
        for text in (row["prompt"], row["completion"]):
            assert tokenizer.decode(ids(text), skip_special_tokens=True) == text
            assert tokenizer.unk_token_id not in ids(text)
        assert ids(row["prompt"]) + ids(row["completion"]) == ids(f"{row['prompt']} {row['completion']}")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert tokenizer("well")["input_ids"][0] == tokenizer.bos_token_id
    assert ids("antidisestablishmentarianism") == [tokenizer.unk_token_id]


def test_the_data_room_reads_the_world(plain):
    folder, rows = plain
    pairs, report = data.load_pairs([str(folder / "pairs.jsonl")])
    assert report.usable == len(pairs) == len(rows["pairs"])
    row, pair = rows["pairs"][0], pairs[0]
    assert (pair.id, pair.chosen, pair.scores) == (
        row["id"],
        row["chosen"],
        (row["score_chosen"], row["score_rejected"]),
    )
    assert len(data.load_prompts([str(folder / "eval_prompts.jsonl")])[0]) == 50
    assert len(data.load_texts([str(folder / "sft.jsonl")])[0]) == 400
    tokenizer = data.load_tokenizer(str(folder / "model"))
    config = json.loads((folder / "model" / "config.json").read_text())
    ends = data.eos_ids(str(folder / "model"), tokenizer)
    assert ends == (config["eos_token_id"],) and data.bos_id(tokenizer) == config["bos_token_id"]
    trees, _ = data.tokenise_pairs(pairs[:5], tokenizer, ends, max_length=64, max_prompt_length=32)
    want = [len(row["prompt"].split()) + 1, len(row["chosen"].split()) + 1, len(row["rejected"].split()) + 1]
    assert [len(trees[0].prompt), *map(len, trees[0].branches)] == want


def test_the_model_is_a_small_llama(plain):
    config = json.loads((plain[0] / "model" / "config.json").read_text())
    assert 300_000 < toyworld.parameter_count(config) <= 500_000
    read = transformers.AutoConfig.from_pretrained(plain[0] / "model")
    assert isinstance(read, transformers.LlamaConfig)
    written = read.to_dict()
    assert {k: written[k] for k in config} == config
    longest = facts.PROMPT_WORDS[1] + facts.RESPONSE_WORDS[1] + 2
    assert config["max_position_embeddings"] >= longest


def test_the_parameter_count_is_what_torch_counts(plain):
    torch = pytest.importorskip("torch", reason="parameters are counted against torch, which is not installed")
    read = transformers.AutoConfig.from_pretrained(plain[0] / "model")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(read)
    assert model.num_parameters() == toyworld.parameter_count(toyworld.model_config(3, 96))


# --- dials: each moves its outcome ------------------------------------------------------------------------------------


def right_share(rows: list[dict]) -> float:
    return float(np.mean([r["gold_chosen"] > r["gold_rejected"] for r in rows]))


def test_plain_labels_are_hard_and_gold(plain):
    rows = plain[1]["pairs"]
    assert right_share(rows) == 1
    assert not any(r[k] for r in rows for k in ("flipped", "upset", "cued"))
    assert all(r["gold_chosen"] == gold(r["prompt"], r["chosen"]) == r["score_chosen"] for r in rows)
    assert all(r["gold_rejected"] == gold(r["prompt"], r["rejected"]) == r["score_rejected"] for r in rows)


def test_flip_exchanges_its_share_of_labels_and_nothing_else(plain, tmp_path):
    rows = world(tmp_path, flip=0.3)[1]["pairs"]
    share = np.mean([r["flipped"] for r in rows])
    assert share == pytest.approx(0.3, abs=0.07)
    for before, after in zip(plain[1]["pairs"], rows):
        two = (before["chosen"], before["rejected"])
        assert (after["chosen"], after["rejected"]) == (two[::-1] if after["flipped"] else two)
        assert after["gold_chosen"] == gold(after["prompt"], after["chosen"])
        assert after["score_chosen"] > after["score_rejected"]  # what the annotator reports agrees with its label
    assert right_share(rows) == pytest.approx(1 - share)


def test_temperature_is_bradley_terry():
    prompt, texts = PROMPT, (f"{A} , {B}", A)
    gap = gold(prompt, texts[0]) - gold(prompt, texts[1])
    for temperature in (0.2, 1.0):
        labels = np.random.default_rng(0)
        rows = [toyworld.annotate(labels, prompt, texts, Annotator(temperature=temperature)) for _ in range(4000)]
        expected = 1 / (1 + np.exp(-gap / temperature))
        assert right_share(rows) == pytest.approx(expected, abs=0.03)  # 4 standard errors
        assert np.mean([r["upset"] for r in rows]) == pytest.approx(1 - right_share(rows))


def test_temperature_costs_label_accuracy(tmp_path):
    shares = [right_share(world(tmp_path / str(t), temperature=t)[1]["pairs"]) for t in (0.1, 0.5, 5.0)]
    assert shares[0] > shares[1] + 0.05 > shares[2] + 0.1
    assert shares[0] < 1 and shares[2] == pytest.approx(0.5, abs=0.09)


def test_gap_dependent_flips_hit_close_pairs(plain, tmp_path):
    rows = world(tmp_path, gap_flip=0.6)[1]["pairs"]
    gap = np.array([abs(r["gold_chosen"] - r["gold_rejected"]) for r in rows])
    flipped = np.array([r["flipped"] for r in rows])
    expected = 0.6 * np.exp(-gap / labels.GAP)
    error = np.sqrt(np.sum(expected * (1 - expected))) / len(rows)
    assert flipped.mean() == pytest.approx(expected.mean(), abs=4 * error)
    close, far = flipped[gap < np.median(gap)].mean(), flipped[gap >= np.median(gap)].mean()
    assert close > far + 0.1
    # The same pairs are flipped or not, and nothing else moves.
    assert [{r["chosen"], r["rejected"]} for r in rows] == [{r["chosen"], r["rejected"]} for r in plain[1]["pairs"]]


def longer(rows: list[dict]) -> np.ndarray:
    return np.array([np.sign(len(r["chosen"].split()) - len(r["rejected"].split())) for r in rows])


def test_the_additive_cue_makes_the_longer_response_win(plain, tmp_path):
    rows = [plain[1]["pairs"], *(world(tmp_path / str(c), cue_strength=c)[1]["pairs"] for c in (0.5, 50.0))]
    shares = [float(np.mean(longer(r)[longer(r) != 0] > 0)) for r in rows]
    assert shares[0] == pytest.approx(0.5, abs=0.1) and shares[1] > shares[0] + 0.15 and shares[2] == 1
    # `cued` is what the cue got wrong (but for a gap of gold that the words outweigh to the last bit).
    assert all(right_share(r) == pytest.approx(1 - np.mean([x["cued"] for x in r]), abs=0.005) for r in rows)


def test_the_near_tie_cue_decides_close_pairs_only(plain, tmp_path):
    rows = world(tmp_path, cue="near_tie", cue_strength=0.4)[1]["pairs"]
    gap = np.array([abs(r["gold_chosen"] - r["gold_rejected"]) for r in rows])
    wrong = np.array([r["gold_chosen"] < r["gold_rejected"] for r in rows])
    assert wrong.any() and not wrong[gap > 0.4].any()  # beyond a step gold decides
    assert all(longer(rows)[wrong] >= 0) and (longer(rows)[wrong] > 0).mean() > 0.9  # ties in words go either way
    cued = np.array([r["cued"] for r in rows])
    assert np.array_equal(cued[longer(rows) != 0], wrong[longer(rows) != 0]) and not cued[~wrong].any()
    assert right_share(world(tmp_path / "off", cue="near_tie", cue_strength=0.0)[1]["pairs"]) == 1


def test_lazy_annotators_go_by_length(plain, tmp_path):
    rows = [world(tmp_path / str(c), cue="lazy", cue_strength=c)[1]["pairs"] for c in (0.0, 0.5, 1.0)]
    assert right_share(rows[0]) == 1 and all(longer(rows[2]) >= 0)
    wrong = [np.mean([r["gold_chosen"] < r["gold_rejected"] for r in w]) for w in rows]
    assert 0.15 < wrong[1] < 0.35 < wrong[2]
    assert wrong[2] == pytest.approx(2 * wrong[1], abs=0.1)  # half of them are lazy


def test_layers_and_width_size_the_model(tmp_path):
    folder, _ = world(tmp_path, layers=2, width=48)
    config = json.loads((folder / "model" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]) == (2, 48, 2)


# --- candidates -------------------------------------------------------------------------------------------------------


def label(tmp_path: pathlib.Path, rows: list, **dials) -> tuple[list[dict], dict]:
    source = tmp_path / "candidates.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = ToyworldConfig(out=str(tmp_path / "deep" / "pairs.jsonl"), label=str(source), **dials)
    made, left_out = toyworld.label_candidates(config)
    assert [json.loads(line) for line in pathlib.Path(config.out).read_text().splitlines()] == made
    return made, dict(left_out)


def test_candidates_become_best_against_worst(tmp_path):
    responses = [A, f"{A} , {B}", off("tom", "colour", 8), f"{A} , {B} , {C}", ""]
    one = {"id": "p1", "prompt": PROMPT, "responses": responses, "finished": [True] * 5}
    cut = {**one, "id": "p2", "finished": [True, True, False, False, True]}
    same = {**one, "id": "p3", "responses": [A] * 5}
    tie = {**one, "id": "p4", "responses": [A, f"{A} .", f"well {A}", A, A]}
    made, left_out = label(tmp_path, [one, cut, same, tie])
    assert [(r["id"], r["chosen"], r["rejected"]) for r in made] == [
        ("p1", responses[3], responses[2]),
        ("p2", responses[1], responses[0]),
    ]
    assert made[0]["gold_chosen"] == 1 and made[0]["author"] == "candidates"
    assert left_out == {"fewer than two different usable responses": 1, "equal gold rewards": 1}
    made, _ = label(tmp_path, [cut], unfinished="keep")
    assert made[0]["chosen"] == responses[3]
    pairs, _ = data.load_pairs([str(tmp_path / "deep" / "pairs.jsonl")])
    assert pairs[0].scores == (made[0]["score_chosen"], made[0]["score_rejected"])


def test_random_pairs_and_the_dials_of_candidates(tmp_path):
    responses = [A, f"{A} , {B}", off("tom", "colour", 8), f"{A} , {B} , {C}"]
    rows = [{"id": str(i), "prompt": PROMPT, "responses": responses} for i in range(300)]
    made, _ = label(tmp_path, rows, pair_rule="random")
    assert len({(r["chosen"], r["rejected"]) for r in made}) == 6 and right_share(made) == 1
    again, _ = label(tmp_path, rows, pair_rule="random")
    assert again == made
    assert right_share(label(tmp_path, rows, flip=0.4)[0]) == pytest.approx(0.6, abs=0.1)
    assert right_share(label(tmp_path, rows, temperature=2.0, pair_rule="random")[0]) < 0.8


def candidates_of(plain, count: int = 4) -> list[dict]:
    """What a model that imitates the author could have sampled for the prompts of a world."""
    rng = np.random.default_rng(5)
    return [
        {"id": r["id"], "prompt": r["prompt"], "responses": [toyworld.compose(rng, r["prompt"]) for _ in range(count)]}
        for r in plain[1]["prompts"]
    ]


def test_coverage_keeps_good_candidates_and_the_trap_out(plain, tmp_path):
    rows = candidates_of(plain)
    every = np.array([gold(r["prompt"], t) for r in rows for t in r["responses"]])
    made = {c: label(tmp_path, rows, coverage=c)[0] for c in (0.6, 1.0)}
    best = {c: max(r["gold_chosen"] for r in m) for c, m in made.items()}
    assert best[0.6] <= np.quantile(every, 0.6) < np.quantile(every, 0.95) < best[1.0]
    trapped = [{**r, "responses": [f"truly truly truly {r['responses'][0]}", *r["responses"]]} for r in rows]
    assert label(tmp_path, trapped)[0] == made[1.0]  # three emphases are outside the support of given pairs


def test_off_policy_pairs_are_the_strangers(plain, tmp_path):
    rows = candidates_of(plain)
    made = {share: label(tmp_path, rows, off_policy=share, pair_rule="random")[0] for share in (0.0, 0.5, 1.0)}
    share = {s: np.mean([r["author"] == "stranger" for r in m]) for s, m in made.items()}
    assert share[0.0] == 0 and share[1.0] == 1 and share[0.5] == pytest.approx(0.5, abs=0.12)
    text = {s: " ".join(r[k] for r in m for k in ("chosen", "rejected")).split() for s, m in made.items()}
    commas = {s: w.count(",") / (w.count(",") + w.count("and")) for s, w in text.items()}
    assert commas[1.0] < 0.1 < commas[0.0] - 0.3  # the manner
    told = {s: [x for r in m for x in toyworld.statements(r["rejected"])] for s, m in made.items()}
    lured = {s: np.mean([v == lure(*x) for x, v in t if x[0] and v != truth(*x)]) for s, t in told.items()}
    assert lured[1.0] < lured[0.0] - 0.3  # the errors
    worth = {s: np.mean([r["gold_chosen"] for r in m]) for s, m in made.items()}
    assert worth[1.0] == pytest.approx(worth[0.0], abs=0.12)  # as good as the plain author
    # What one prompt gives does not depend on the others: the strangers' half is the same in both.
    half = {r["id"]: r["chosen"] for r in made[0.5] if r["author"] == "stranger"}
    assert half.items() <= {r["id"]: r["chosen"] for r in made[1.0]}.items()


def test_limit_cuts_the_pairs(plain, tmp_path):
    rows = candidates_of(plain)
    assert label(tmp_path, rows, limit=17)[0] == label(tmp_path, rows)[0][:17]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"candidates.jsonl:2: got no JSON"),
        ('{"prompt": "x"}', r"candidates.jsonl:2: got .*expected .*responses"),
        ('{"prompt": "x", "responses": ["a", "b"]}', r"candidates.jsonl:2: toyworld: got the prompt 'x'"),
        ('{"prompt": "x", "responses": ["a"], "finished": [true, true]}', r"got 2 entries in finished for 1 responses"),
    ],
)
def test_a_bad_candidate_line_is_named(tmp_path, line, message):
    source = tmp_path / "candidates.jsonl"
    source.write_text(json.dumps({"prompt": PROMPT, "responses": [A, B]}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        toyworld.label_candidates(ToyworldConfig(out=str(tmp_path / "o.jsonl"), label=str(source)))


# --- the door ---------------------------------------------------------------------------------------------------------


def test_the_door_writes_and_tells(tmp_path, capsys):
    flags = [f"--{k}={v}" for k, v in SMALL.items()]
    toyworld.main(["--out", str(tmp_path / "w"), *flags, "--flip", "0.2"])
    told = capsys.readouterr().out
    for part in (
        "parameters",
        "300 to train, 40 to tune, 50 to evaluate",
        "gold",
        "Bayes accuracy",
        "tie in",
        "example",
    ):
        assert part in told
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == sorted((*FILES, "model"))
    candidates = tmp_path / "c.jsonl"
    candidates.write_text(
        json.dumps({"id": "a", "prompt": PROMPT, "responses": [A, B], "finished": [True, True]}) + "\n"
    )
    toyworld.main(["--label", str(candidates), "--out", str(tmp_path / "p.jsonl")])
    assert "pairs         1;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("flip", 1.5),
        ("prompts", 0),
        ("knowledge", -0.1),
        ("width", 100),
        ("temperature", -1.0),
        ("filler", 21.0),
        ("coverage", 0.0),
        ("off_policy", 1.5),
        ("limit", -1),
        ("gap_flip", 2.0),
        ("cue_strength", -0.5),
        ("tuning_prompts", 0),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"toyworld: {key} is {value}, expected"):
        toyworld.write_world(dataclasses.replace(ToyworldConfig(out=str(tmp_path / "w")), **{key: value}))
    with pytest.raises(SystemExit, match=f"{key} is {value}, expected"):
        toyworld.main(["--out", str(tmp_path / "w"), f"--{key}={value}"])
    assert not (tmp_path / "w").exists()
