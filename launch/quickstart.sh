#!/usr/bin/env bash
# The quick start: from nothing to an aligned model. README's `make quickstart` calls it; about three minutes on two cores.
#
#   1 world   a toy world with a known reward: tokenizer, prompts, demonstrations of a mediocre author
#   2 SFT     a 0.35 M-parameter Llama shape learns to answer like that author
#   3 pairs   preference pairs of the model's own responses, labelled by the known reward, a fifth of the labels flipped
#   4 DPO     three epochs on all pairs
#   5 SeRA    T = 3: the policy keeps the pairs it believes in and makes new ones from its own samples
#   6 who wins, on prompts that no stage has seen
set -euo pipefail
PYTHON=${PYTHON:-python3}
R=runs/quickstart
rm -rf "$R"
run() { echo; echo "== $*"; "$PYTHON" -m "$@"; }

run sera_jax.toyworld --out "$R/world" --prompts 3200 --eval_prompts 256 --sft 5000
run sera_jax.train --config configs/toyworld_sft.yaml
run sera_jax.generate --model.path "$R/sft/export" --prompts "[$R/world/prompts.jsonl]" --out "$R/candidates.jsonl" \
    --candidates 4 --temperature 1 --max_new_tokens 48 --slots 128
run sera_jax.toyworld --label "$R/candidates.jsonl" --out "$R/pairs.jsonl" --coverage 0.6 --limit 2000 --flip 0.2
run sera_jax.train --config configs/quickstart_dpo.yaml
run sera_jax.train --config configs/quickstart_sera.yaml
run sera_jax.evaluate --policy "$R/sera/export" --baseline "$R/dpo/export" --out "$R/sera-against-dpo.json" \
    --evaluate.prompts "[$R/world/eval_prompts.jsonl]" --evaluate.function sera_jax.toyworld:gold --evaluate.max_new_tokens 48
"$PYTHON" - "$R" <<'PY'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
print("\nwin rates on 256 unseen prompts, by the known reward")
for name in ("dpo", "sera"):
    told = json.loads((folder / name / "iterations" / "3" / "summary.json").read_text())
    low, rate, high = (100 * told[f"eval/win_rate{end}"] for end in ("_low", "", "_high"))
    print(f"  {name + ' against sft':18} {rate:5.1f} % [{low:.1f}, {high:.1f}] sampled, KL {told['eval/kl']:.1f} nats a response")
told = json.loads((folder / "sera-against-dpo.json").read_text())
print(f"  sera against dpo   {100 * told['win_rate']:5.1f} % [{100 * told['low']:.1f}, {100 * told['high']:.1f}] greedy")
print(f"the aligned checkpoint: {folder / 'sera' / 'export'}\nthe run as a page:      {folder / 'sera' / 'report.html'}")
PY
