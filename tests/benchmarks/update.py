"""A DPO update beside TRL and Tunix: the same weights, the same token ids, the same losses; then each side's time.

    bash tests/benchmarks/peers.sh ENVS
    python tests/benchmarks/update.py --data DATA --peers ENVS [--out FILE.jsonl]

DATA holds hh_rlhf/ and tokenizers/llama2 (a tokenizer's folder). Without --peers only our own rows are timed, with the
switches of own_update.py.
"""

import argparse
import pathlib
import sys

from harness import child, finish, hh_pairs, model_folder, parser, python_of, shared_data, spread

OFF = ("unshared", "unpacked", "all-logits", "reference-inside")
CLOSE = 1e-3  # of losses, before anything is compared


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--steps", type=int, default=7)
    p.add_argument("--max-length", type=int, default=512)
    p.add_argument("--lr", type=float, default=1e-4, help="large enough that the losses move and can be compared")
    p.add_argument("--only", nargs="*", help="of: sera_jax, off (the switches), trl, trl-precomputed, tunix")
    p.add_argument("--own", nargs=argparse.REMAINDER, default=[], help="further words for own_update.py")
    a = p.parse_args()
    data, work = shared_data(a.data), pathlib.Path(a.work)
    tokenizer = data / "tokenizers" / "llama2"
    model = model_folder(work / "llama-19m", tokenizer)
    pairs = work / f"hh-{a.batch * a.steps}-{a.max_length}.jsonl"
    hh_pairs(pairs, data, tokenizer, a.batch * a.steps, a.max_length)
    same = ["--model", model, "--pairs", pairs, "--batch", a.batch, "--steps", a.steps, "--lr", a.lr]
    trl = ["peers/trl_update.py", *same, "--max-length", a.max_length]
    sides = {"sera_jax": (sys.executable, "own_update.py", *same, *a.own)}
    sides |= {f"off: {name}": (sys.executable, "own_update.py", *same, f"--{name}", *a.own) for name in OFF}
    if a.peers:
        sides["trl-precomputed"] = (python_of(a.peers, "trl"), *trl, "--precompute-reference")
        sides["trl"] = (python_of(a.peers, "trl"), *trl)
        sides["tunix"] = (python_of(a.peers, "tunix"), "peers/tunix_update.py", *same)
    wanted = lambda name: not a.only or name.split(":")[0] in a.only
    rows, losses = [], None
    for name, (interpreter, script, *words) in sides.items():
        if not wanted(name):
            continue
        told = child(interpreter, script, *words)
        losses = losses or told["losses"]
        apart = max(abs(x - y) for x, y in zip(losses, told["losses"], strict=True))
        if apart > CLOSE:
            raise SystemExit(
                f"{name}'s losses are {told['losses']}, those of the first side {losses}: not the same work."
            )
        seconds = spread(told["seconds"])
        rows.append(
            {
                "side": name,
                "s a step": seconds["median"],
                "least": seconds["least"],
                "most": seconds["most"],
                "pairs/s": a.batch / seconds["median"],
                "× first": seconds["median"] / rows[0]["s a step"] if rows else 1.0,
                "peak MiB": told["peak_mib"],
                "loss apart": apart,
                "useful": told.get("useful"),
                "waited": told.get("waited"),
                "versions": told.get("versions"),
                "plan": told.get("plan"),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    finish("update", a.out, rows, losses=losses)


if __name__ == "__main__":
    main()
