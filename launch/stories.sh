#!/usr/bin/env bash
# stories260K taught a stated rule: launch/stories.sh DATA, where DATA holds models/stories260K and text/tinystories_train.txt.gz.
set -euo pipefail
DATA=$1
PYTHON=${PYTHON:-python3}
R=runs/stories
mkdir -p "$R"
"$PYTHON" configs/stories_rule.py openings "$DATA/text/tinystories_train.txt.gz" "$R"
[ -f "$R/candidates.jsonl" ] || "$PYTHON" -m sera_jax.generate --model.path "$DATA/models/stories260K" --prompts "[$R/train.jsonl]" --out "$R/candidates.jsonl" \
    --candidates 4 --temperature 1 --max_new_tokens 96 --slots 128
"$PYTHON" configs/stories_rule.py pairs "$R/candidates.jsonl" "$R/pairs.jsonl"
"$PYTHON" -m sera_jax.train --config configs/stories.yaml --model.path "$DATA/models/stories260K"
for temperature in 0 1; do
    "$PYTHON" -m sera_jax.evaluate --policy "$R/sera/export" --baseline "$DATA/models/stories260K" --out "$R/evaluate-$temperature.json" \
        --evaluate.prompts "[$R/held_out.jsonl]" --evaluate.function configs.stories_rule:happy \
        --evaluate.temperature "$temperature" --evaluate.max_new_tokens 96
done
