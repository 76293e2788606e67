#!/usr/bin/env bash
# The paper's neighbours and TRL's losses in the toy world (configs/baselines.yaml): worlds and starts, then arms × seeds.
#
#   launch/baselines.sh                              all of it; stopped, it goes on where it was
#   SEEDS="0 1" launch/baselines.sh --only '[dpo_1, dpo, spin]'    further flags go to `python -m sera_jax.arms`
set -euo pipefail
export PYTHON=${PYTHON:-python3} R=${R:-runs/baselines} SEEDS=${SEEDS:-0} LABELS=hard
bash launch/worlds.sh
"$PYTHON" -m sera_jax.arms --config configs/baselines.yaml --out "$R/hard" --seeds "[${SEEDS// /, }]" \
    --words "{worlds: $R/worlds, labels: hard}" "$@"
