#!/usr/bin/env bash
# A small Llama from nothing to aligned, on real data: launch/scratch.sh DATA, where DATA holds text/, instructions/, hh_rlhf/.
#
#   1 start     a tokenizer and the shape of a 2.2 M-parameter Llama
#   2 texts     pretraining on books, stories and articles (as an SFT stage with empty prompts)
#   3 SFT       instructions and HH's chosen replies
#   4 DPO and SeRA on HH helpful + harmless, the same number of updates
#   5 review    held-out pairs by subset: accuracy of the implicit reward, margins, beside "the longer reply wins"
#   6 samples   replies to held-out prompts, lengths
set -euo pipefail
DATA=$1
PYTHON=${PYTHON:-python3}
R=${R:-runs/scratch}
HH="[$DATA/hh_rlhf/helpful_train.jsonl.gz, $DATA/hh_rlhf/harmless_train_lastturn.jsonl.gz]"
TEST="[$DATA/hh_rlhf/helpful_test.jsonl.gz, $DATA/hh_rlhf/harmless_test.jsonl.gz]"

[ -f "$R/start/texts.jsonl" ] || "$PYTHON" launch/scratch_start.py "$DATA" "$R/start"
"$PYTHON" -m sera_jax.train --config configs/scratch_texts.yaml --run.dir "$R/texts" --model.path "$R/start/model" \
    --sft.data "[$R/start/texts.jsonl]"
"$PYTHON" -m sera_jax.train --config configs/scratch_sft.yaml --run.dir "$R/sft" --model.path "$R/texts/export" \
    --sft.data "[$R/start/instructions.jsonl]"
for arm in dpo sera; do
    flags=()
    [ "$arm" = sera ] || flags=(--select.rule all --bootstrap.fresh 0)
    "$PYTHON" -m sera_jax.train --config configs/scratch_hh.yaml --run.dir "$R/$arm" --run.ledger "$R/ledger" \
        --model.path "$R/sft/export" --data.pairs "$HH" "${flags[@]}"
    "$PYTHON" -m sera_jax.review --policy "$R/$arm/export" --reference "$R/sft/export" --out "$R/$arm-review" \
        --data.pairs "$TEST" --data.max_length 256 --data.max_prompt_length 128
    "$PYTHON" -m sera_jax.generate --model.path "$R/$arm/export" --prompts "$TEST" --limit 400 --max_prompt_length 128 \
        --max_new_tokens 128 --temperature 0.7 --out "$R/$arm-samples.jsonl"
done
"$PYTHON" -m sera_jax.generate --model.path "$R/sft/export" --prompts "$TEST" --limit 400 --max_prompt_length 128 \
    --max_new_tokens 128 --temperature 0.7 --out "$R/sft-samples.jsonl"
