"""Sampling beside transformers' generate(): the same weights and prompt ids, equal output lengths, new tokens a second.

    bash tests/benchmarks/peers.sh ENVS
    python tests/benchmarks/sampling.py --data DATA --peers ENVS [--stories] [--mixed] [--devices N] [--out FILE.jsonl]

DATA holds hh_rlhf/, tokenizers/llama2 and models/stories260K (for --stories, a model so small that overhead is all).
--mixed: sets of eight batches in which every fourth candidate is eight times as long as the others; ours refills its
slots, generate() goes batch by batch. --devices: into which ours cuts the processor, one for each core, say; generate()
has all cores either way.
Before anything is timed both sides decode one batch greedily: the tokens have to be the same, up to the first place
where two logits are as good as equal.
"""

import pathlib
import sys

from harness import child, finish, hh_pairs, model_folder, parser, python_of, shared_data, spread


def batched(values: list, size: int) -> list:
    """Sums of so many at a time."""
    return [sum(values[i : i + size]) for i in range(0, len(values), size)]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--batches", type=int, default=6)
    p.add_argument("--candidates", type=int, default=4)
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--max-length", type=int, default=256)
    p.add_argument("--stories", action="store_true")
    p.add_argument("--mixed", action="store_true")
    p.add_argument("--devices", type=int, default=1)
    a = p.parse_args()
    data, work = shared_data(a.data), pathlib.Path(a.work)
    tokenizer = data / "tokenizers" / "llama2"
    model = model_folder(work / "llama-19m", tokenizer)
    if a.stories:
        model = data / "models" / "stories260K"
        tokenizer = model
    sets = 8 if a.mixed else 1  # batches that are timed together
    count = a.batch * a.batches * sets
    prompts = work / f"prompts-{model.name}-{count}-{a.max_length}.jsonl"
    hh_pairs(prompts, data, tokenizer, count, a.max_length)
    same = ["--model", model, "--prompts", prompts, "--candidates", a.candidates, "--batch", a.batch]
    sides = {"sera_jax": (sys.executable, "own_sampling.py")}
    if a.peers:
        sides["generate()"] = (python_of(a.peers, "trl"), "peers/generate.py")
    rows, tokens = [], None
    for name, (interpreter, script) in sides.items():
        cut = ["--devices", a.devices] if name == "sera_jax" else []
        greedy = child(interpreter, script, *same, *cut, "--batches", 1, "--new-tokens", 16, "--greedy")["first"]
        tokens = tokens or greedy
        equal = sum(x == y for x, y in zip(tokens, greedy, strict=True)) / len(greedy)
        if equal < 0.9:
            raise SystemExit(f"{name}: only {equal:.0%} of the greedy responses are those of the first side.")
        refills = name == "sera_jax" and a.mixed
        how = ["--batches", a.batches * (1 if refills else sets), "--new-tokens", a.new_tokens]
        how += ["--short", a.new_tokens // 8] if a.mixed else []
        told = child(interpreter, script, *same, *cut, *how, *(["--refill", sets] if refills else []))
        size = 1 if refills else sets
        seconds, tokens_made = (batched(told[what], size) for what in ("seconds", "tokens"))
        rate, seconds = spread([n / s for n, s in zip(tokens_made, seconds, strict=True)]), spread(seconds)
        rows.append(
            {
                "side": name,
                "new tokens/s": rate["median"],
                "least": rate["least"],
                "most": rate["most"],
                "s a batch": seconds["median"],
                "first ×": rows[0]["new tokens/s"] / rate["median"] if rows else 1.0,
                "peak MiB": told["peak_mib"],
                "greedy equal": equal,
                "versions": told.get("versions"),
            }
        )
    finish("sampling", a.out, rows, model=model.name, mixed=a.mixed, devices=a.devices)


if __name__ == "__main__":
    main()
