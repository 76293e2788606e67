#!/usr/bin/env bash
# Offline against online (configs/online.yaml): worlds, more labels, reward models, best of four, a judge, then arms × seeds.
#
#   launch/online.sh                                 all of it; stopped, it goes on where it was
#   SEEDS="0 1" launch/online.sh --only '[dpo, online_gold]'       further flags go to `python -m sera_jax.arms`
set -euo pipefail
export PYTHON=${PYTHON:-python3} R=${R:-runs/online} SEEDS=${SEEDS:-0 1 2 3 4} LABELS=hard
PORT=${PORT:-8001} NOISE=${NOISE:-0.3}
bash launch/worlds.sh
for seed in $SEEDS; do
    W=$R/worlds/$seed
    [ -f "$W/more_candidates.jsonl" ] || "$PYTHON" -m sera_jax.generate --model.path "$W/sft/export" \
        --prompts "[$W/world/prompts.jsonl]" --out "$W/more_candidates.jsonl" --candidates 4 --temperature 1 \
        --max_new_tokens 48 --slots 256 --seed "$((seed + 1000))"
    [ -f "$W/more.jsonl" ] || "$PYTHON" -m sera_jax.toyworld --label "$W/more_candidates.jsonl" --seed "$seed" \
        --out "$W/more.jsonl" --limit 2000
    # 16 candidates a prompt, in groups of four: a pair each.
    if [ ! -f "$W/many.jsonl" ]; then
        "$PYTHON" -m sera_jax.generate --model.path "$W/sft/export" --prompts "[$W/world/prompts.jsonl]" \
            --out "$W/sixteen.jsonl" --candidates 16 --temperature 1 --max_new_tokens 48 --slots 256 --seed "$((seed + 2000))"
        "$PYTHON" -c '
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    for g in range(0, 16, 4):
        part = {key: row[key][g : g + 4] for key in ("responses", "finished", "lengths")}
        print(json.dumps(row | part | {"id": row["id"] + "-" + str(g)}))' < "$W/sixteen.jsonl" > "$W/groups.jsonl"
        "$PYTHON" -m sera_jax.toyworld --label "$W/groups.jsonl" --seed "$((seed + 1))" --out "$W/many.jsonl"
    fi
    [ -f "$W/bt_more/result.json" ] || "$PYTHON" -m sera_jax.reward_model --config configs/online_bt.yaml \
        --model.path "$W/sft/export" --data.pairs "[$W/many.jsonl]" --run.dir "$W/bt_more" --run.seed "$seed"
    [ -f "$W/bt/result.json" ] || "$PYTHON" -m sera_jax.reward_model --config configs/online_bt.yaml \
        --model.path "$W/sft/export" --data.pairs "[$W/hard.jsonl]" --run.dir "$W/bt" --run.seed "$seed"
    # Best of four of the start's responses, whoever chooses: no training, four times the sampling for each response given.
    E="[$W/world/eval_prompts.jsonl]"
    for by in sera_jax.toyworld:gold "$W/bt/export" "$W/bt_more/export"; do
        best=$W/best_of/$(basename "${by%/export}")
        [ -f "$best.jsonl" ] || "$PYTHON" -m sera_jax.generate --model.path "$W/sft/export" --prompts "$E" --candidates 4 \
            --temperature 1 --max_new_tokens 48 --slots 256 --seed "$((seed + 3000))" --best_by "$by" --out "$best.jsonl"
        [ -f "$best.json" ] || "$PYTHON" -m sera_jax.evaluate --policy "$best.jsonl" --baseline "$W/sft/export" \
            --evaluate.prompts "$E" --evaluate.function sera_jax.toyworld:gold --evaluate.temperature 1 \
            --evaluate.max_new_tokens 48 --slots 256 --out "$best.json"
    done
done
# shellcheck disable=SC2086
"$PYTHON" -c '
import json, pathlib, sys
root, *seeds = sys.argv[1:]
for by in ("sera_jax.toyworld:gold", "bt", "bt_more"):
    found = [json.loads(pathlib.Path(root, s, "best_of", by + ".json").read_text()) for s in seeds]
    win, gold = ([f(one) for one in found] for f in (lambda o: 100 * o["win_rate"], lambda o: o["policy"]["reward"]))
    mean = lambda values: f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    print(f"best of 4 by {by}: wins {mean(win)} %, gold {mean(gold)}, {len(seeds)} seeds")' "$R/worlds" $SEEDS
"$PYTHON" launch/judge_server.py --port "$PORT" --noise "$NOISE" &
trap 'kill $!' EXIT
"$PYTHON" -m sera_jax.arms --config configs/online.yaml --out "$R/hard" --seeds "[${SEEDS// /, }]" \
    --words "{worlds: $R/worlds, judge: \"http://127.0.0.1:$PORT/v1\"}" "$@"
