#!/usr/bin/env bash
# The ablation of configs/arms.yaml: worlds and starts once a seed, then arms × seeds in one process a kind of labels.
#
#   launch/arms.sh                                   all of it: hours on two cores; stopped, it goes on where it was
#   SEEDS="0 1 2" LABELS=flip40 launch/arms.sh --only '[dpo, sera]'     further flags go to `python -m sera_jax.arms`
#   WIDTH=144 LAYERS=4 R=runs/arms-1m launch/arms.sh                    a model of another size
#
# LABELS are those of launch/worlds.sh. Two calls on different labels share two cores well.
set -euo pipefail
export PYTHON=${PYTHON:-python3} R=${R:-runs/arms} SEEDS=${SEEDS:-0 1 2 3 4 5 6 7} LABELS=${LABELS:-hard bt flip40}
bash launch/worlds.sh
for labels in $LABELS; do
    "$PYTHON" -m sera_jax.arms --config configs/arms.yaml --out "$R/$labels" --seeds "[${SEEDS// /, }]" \
        --words "{worlds: $R/worlds, labels: $labels}" "$@"
done
