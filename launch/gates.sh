#!/usr/bin/env bash
# Can the toy world answer? The gates of configs/gates.yaml on tuning seeds and tuning prompts.
set -euo pipefail
export PYTHON=${PYTHON:-python3} R=${R:-runs/arms} SEEDS=${SEEDS:-100 101} LABELS="hard flip20 flip40 off"
bash launch/worlds.sh
"$PYTHON" -m sera_jax.arms --config configs/gates.yaml --out "$R/gates" --seeds "[${SEEDS// /, }]" \
    --words "{worlds: $R/worlds}" "$@"
