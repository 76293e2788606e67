#!/usr/bin/env bash
# SeRA on real HH pairs from stories260K: launch/hh.sh DATA, where DATA holds models/stories260K and hh_rlhf/*.jsonl.gz.
set -euo pipefail
DATA=$1
PYTHON=${PYTHON:-python3}
"$PYTHON" -m sera_jax.train --config configs/hh_stories260k.yaml --model.path "$DATA/models/stories260K" \
    --data.pairs "[$DATA/hh_rlhf/helpful_train.jsonl.gz, $DATA/hh_rlhf/harmless_train.jsonl.gz]"
"$PYTHON" -m sera_jax.review --policy runs/hh/sera/export --reference "$DATA/models/stories260K" --out runs/hh/review \
    --data.pairs "[$DATA/hh_rlhf/helpful_test.jsonl.gz, $DATA/hh_rlhf/harmless_test.jsonl.gz]" \
    --data.max_length 256 --data.max_prompt_length 128
