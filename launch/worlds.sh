#!/usr/bin/env bash
# Toy worlds by seed: world, SFT model, its candidates, labelled pairs. What is there already is not made again.
#
#   SEEDS="0 1" LABELS="hard flip40" R=runs/arms launch/worlds.sh
#   WIDTH=144 LAYERS=4 ...                           a model of 1.03 M parameters in place of 0.35 M
#
#   hard     the better response by gold, always       bt       Bradley-Terry labels at temperature 0.3
#   flip40   hard labels, 40 % of them exchanged (flip20: 20 %)
#   off      hard labels, both responses by a stranger
#   all      hard labels on every prompt, whatever its candidates are worth
set -euo pipefail
PYTHON=${PYTHON:-python3}
declare -A DIALS=([hard]="" [bt]="--temperature 0.3" [flip20]="--flip 0.2" [flip40]="--flip 0.4" [off]="--off_policy 1"
    [all]="--coverage 1 --limit 0")

for seed in $SEEDS; do
    W=$R/worlds/$seed
    if [ ! -f "$W/candidates.jsonl" ]; then
        "$PYTHON" -m sera_jax.toyworld --out "$W/world" --seed "$seed" --layers "${LAYERS:-3}" --width "${WIDTH:-96}"
        "$PYTHON" -m sera_jax.train --config configs/toyworld_sft.yaml --run.dir "$W/sft" --run.seed "$seed" \
            --model.path "$W/world/model" --sft.data "[$W/world/sft.jsonl]"
        "$PYTHON" -m sera_jax.generate --model.path "$W/sft/export" --prompts "[$W/world/prompts.jsonl]" \
            --out "$W/candidates.jsonl" --candidates 4 --temperature 1 --max_new_tokens 48 --slots 256 --seed "$seed"
    fi
    for labels in $LABELS; do
        # shellcheck disable=SC2086
        [ -f "$W/$labels.jsonl" ] || "$PYTHON" -m sera_jax.toyworld --label "$W/candidates.jsonl" --seed "$seed" \
            --out "$W/$labels.jsonl" --coverage 0.6 --limit 2000 ${DIALS[$labels]}
    done
done
