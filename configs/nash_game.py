"""A game of preferences that go in a circle, played with words, and the files that `launch/nash.py` needs.

A prompt is answered by `rock`, `paper` or `scissors` and two more words, which nobody looks at. Rock beats scissors
with probability 0.9, paper rock with 0.7, scissors paper with 0.8; of two alike neither is better; anything else loses
with 0.9. Without a reference the Nash policy is (3, 4, 2)/9; no reward explains all three probabilities.

    python configs/nash_game.py OUT_DIR --seed 0       # model, demonstrations, pairs, scored .jsonl
"""

import argparse
import json
import pathlib

import numpy as np
import tokenizers
import transformers

from sera_jax import nash

MOVES = ("rock", "paper", "scissors")  # and, last in PROB, whatever else is said
PROB = np.array(
    [[0.5, 0.3, 0.9, 0.9], [0.7, 0.5, 0.2, 0.9], [0.1, 0.8, 0.5, 0.9], [0.1, 0.1, 0.1, 0.5]]
)  # last: the rest
SHOWN = np.array([0.6, 0.25, 0.15])  # how often demonstrations play each
REWARD = dict(zip(MOVES, nash.bradley_terry(PROB[:3, :3], SHOWN)))
SCORES = dict(zip(MOVES, (0.0, 0.1, -0.1)))  # of another annotator, who scores moves: for losses that are told gaps
PROMPTS, DEMONSTRATIONS = 128, 1536
FILLERS = tuple(f"w{i}" for i in range(16))
ROUNDS = tuple(f"r{i}" for i in range(16))
SPECIALS = ("<s>", "</s>", "<unk>")


def move(response: str) -> int:
    """Which of MOVES a response plays, len(MOVES) = none."""
    first = response.split()[:1]
    return MOVES.index(first[0]) if first and first[0] in MOVES else len(MOVES)


def prefer(prompt: str, first: str, second: str) -> float:
    """The probability that the first response is better (reward.source preference_function)."""
    return float(PROB[move(first), move(second)])


def fitted(prompt: str, response: str) -> float:
    """The Bradley-Terry reward that is nearest to the same probabilities (reward.source function)."""
    return float(REWARD.get(response.split()[0] if response.split() else "", -3.0))


def prompts() -> list[str]:
    """PROMPTS different ones of two words."""
    return [f"{ROUNDS[i // 16]} {ROUNDS[i % 16]}" for i in range(PROMPTS)]


def write(out: pathlib.Path, seed: int) -> None:
    """A Llama without weights, demonstrations for its SFT stage, pairs, of which self-play takes the prompts alone, and
    pairs of two moves with their scores."""
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate((*SPECIALS, *MOVES, *ROUNDS, *FILLERS))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends).save_pretrained(out / "model")
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ).save_pretrained(out / "model")
    rng = np.random.default_rng(seed)
    asked = prompts()
    said = lambda: f" {rng.choice(MOVES, p=SHOWN)} {rng.choice(FILLERS)} {rng.choice(FILLERS)}"
    rows = {
        "demonstrations": [{"prompt": asked[i % PROMPTS], "completion": said()} for i in range(DEMONSTRATIONS)],
        "pairs": [{"prompt": prompt, "chosen": " rock w0 w0", "rejected": " rock w1 w1"} for prompt in asked],
    }
    best_first = lambda: sorted(rng.choice(MOVES, 2, replace=False), key=SCORES.get, reverse=True)
    scored = [(prompt, *best_first(), *rng.choice(FILLERS, 2)) for prompt in asked for _ in range(4)]
    rows["scored"] = [
        {"prompt": prompt, "chosen": f" {best} {one} {other}", "rejected": f" {worst} {one} {other}"}
        | {"score_chosen": SCORES[best], "score_rejected": SCORES[worst]}
        for prompt, best, worst, one, other in scored
    ]
    for name, lines in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)
