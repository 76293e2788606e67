"""What sharing the prompt between the two responses of a pair gives on top of packing: an update, beside its limit.

    python tests/benchmarks/sharing.py [--response 128] [--steps 8] [--out FILE.jsonl]

Pairs of equal responses behind prompts as long as one of them, and four times as long; a model whose head is small
beside its layers (vocabulary 512). The limit is the ratio of tokens: 2 (p + r) / (p + 2 r); what attention does is
shared less, 1.49 where tokens are 1.67, so that narrow models stay farther from it. The losses of both sides have to
agree to 1e-3 before anything is compared.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
from harness import child, finish, random_model, spread

CLOSE = 1e-3


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="/tmp/sera_jax_benchmarks")
    p.add_argument("--response", type=int, default=128)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--out")
    a = p.parse_args()
    work = pathlib.Path(a.work)
    sizes = {"hidden_size": a.width, "head_dim": a.width // 8, "intermediate_size": a.width * 43 // 16}
    model = random_model(work / f"llama-small-head-{a.width}", vocab_size=512, **sizes)
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(3, 512, n).tolist()
    rows = []
    for times in (1, 4):
        prompt = times * a.response
        pairs = work / f"sharing-{prompt}-{a.response}.jsonl"
        with open(pairs, "w", encoding="utf-8") as file:
            for _ in range(a.batch * a.steps):
                pair = {"prompt_ids": ids(prompt), "chosen_ids": ids(a.response), "rejected_ids": ids(a.response)}
                file.write(json.dumps(pair) + "\n")
        words = ["--model", model, "--pairs", pairs, "--batch", a.batch, "--steps", a.steps, "--lr", 1e-4]
        found = [child(sys.executable, "own_update.py", *words, *more) for more in ((), ("--unshared",))]
        apart = max(abs(x - y) for x, y in zip(*(told["losses"] for told in found), strict=True))
        if apart > CLOSE:
            raise SystemExit(f"losses differ by {apart}: not the same work.")
        shared, unshared = (spread(told["seconds"]) for told in found)
        limit, gain = 2 * (prompt + a.response) / (prompt + 2 * a.response), unshared["median"] / shared["median"]
        rows.append(
            {
                "width": a.width,
                "prompt": prompt,
                "responses": f"2 × {a.response}",
                "s, shared": shared["median"],
                "least": shared["least"],
                "most": shared["most"],
                "s, unshared": unshared["median"],
                "ratio": gain,
                "limit": limit,
                "share of it": gain / limit,
                "useful, shared": found[0]["useful"],
                "useful, unshared": found[1]["useful"],
                "loss apart": apart,
            }
        )
    finish("sharing", a.out, rows)


if __name__ == "__main__":
    main()
