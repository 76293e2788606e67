"""A stated rule for little stories, and the files that the stories runs need.

The rule: a story scores one point for each *different* word of HAPPY that it holds, however often (each word counts
once, present or not). Binary preferences follow: of two continuations the one with more points is chosen, ties make no
pair.

    python configs/stories_rule.py openings STORIES.txt.gz OUT_DIR     # train.jsonl, held_out.jsonl: {"id", "prompt"}
    python configs/stories_rule.py pairs CANDIDATES.jsonl OUT.jsonl    # what sera_jax.generate wrote → pairs
"""

import argparse
import gzip
import json
import pathlib
import re

HAPPY = frozenset(
    "happy smile smiled laugh laughed love loved fun play played friend friends hug hugged joy kind nice good "
    "glad".split()
)


def happy(prompt: str, response: str) -> float:
    """Different words of HAPPY in the response."""
    return float(len(HAPPY & set(re.findall(r"[a-z]+", response.lower()))))


def write_openings(stories: str, out: str, held_out: int) -> None:
    """The first sentence of each story is its opening; the last `held_out` different ones are kept apart."""
    text = gzip.open(stories, "rt", encoding="utf-8").read()
    firsts = (re.match(r"[^.!?]+[.!?]", " ".join(story.split())) for story in text.split("<|endoftext|>"))
    openings = list(dict.fromkeys(m.group() for m in firsts if m and 20 <= len(m.group()) <= 160))
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", openings[:-held_out]), ("held_out", openings[-held_out:])):
        rows = ({"id": f"{name}{i}", "prompt": opening} for i, opening in enumerate(part))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{len(part)} openings: {folder / name}.jsonl")


def write_pairs(candidates: str, out: str) -> None:
    """Best against worst candidate of each prompt by the rule."""
    pairs, seen = [], 0
    for line in pathlib.Path(candidates).read_text(encoding="utf-8").splitlines():
        row, seen = json.loads(line), seen + 1
        ranked = sorted(row["responses"], key=lambda r: happy(row["prompt"], r))
        low, high = (happy(row["prompt"], r) for r in (ranked[0], ranked[-1]))
        if high > low:
            pair = {"id": row["id"], "prompt": row["prompt"], "chosen": ranked[-1], "rejected": ranked[0]}
            pairs.append(pair | {"score_chosen": high, "score_rejected": low})
    pathlib.Path(out).write_text("".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8")
    print(f"{len(pairs)} pairs of {seen} prompts: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("openings", "pairs"))
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--held_out", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.job == "openings":
        write_openings(arguments.source, arguments.out, arguments.held_out)
    else:
        write_pairs(arguments.source, arguments.out)
