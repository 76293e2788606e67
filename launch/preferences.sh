#!/usr/bin/env bash
# Reward and preference models of the three kinds on real pairs, and how far they agree with annotators on others: HH,
# AlpacaEval, UltraFeedback, LLMBar, HHH. DATA is a folder with hh_rlhf/, alpaca_eval/, preferences/, models/stories260K/.
#
#   launch/preferences.sh DATA                       all of it; stopped, it goes on where it was
#   KINDS="preference" launch/preferences.sh DATA --optimizer.learning_rate 1e-3      further flags go to the training
set -euo pipefail
DATA=${1:?usage: launch/preferences.sh DATA [flags of python -m sera_jax.reward_model]}
shift
PYTHON=${PYTHON:-python3} R=${R:-runs/pm} KINDS=${KINDS:-bradley_terry preference_head preference}
mkdir -p "$R/data"
# AlpacaEval: every sixth row, no instruction on both sides. UltraFeedback: its own split. LLMBar: by what it was built for.
[ -f "$R/data/done" ] || "$PYTHON" -c '
import gzip, json, pathlib, sys, zlib
data, out = map(pathlib.Path, sys.argv[1:])
read = lambda name: [json.loads(line) for line in gzip.open(data / name, "rt", encoding="utf-8")]
write = lambda name, rows: (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
alpaca = read("alpaca_eval/pairs.jsonl.gz")[::6]
tests = lambda row: zlib.crc32(row["instruction"].encode()) % 5 == 0
write("alpaca_train", [row for row in alpaca if not tests(row)])
write("alpaca_test", [row for row in alpaca if tests(row)])
feedback = read("preferences/ultrafeedback_subset.jsonl.gz")
for name, split in (("uf_train", "train"), ("uf_test", "eval")):
    write(name, [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in feedback if row["split"] == split])
bar = [row for row in read("preferences/llmbar_human.jsonl.gz") if row["dataset"].startswith("LLMBar/")]
write("llmbar_adversarial", [row for row in bar if "/Adversarial/" in row["dataset"]])
write("llmbar_natural", [row for row in bar if row["dataset"] == "LLMBar/Natural"])
(out / "done").touch()' "$DATA" "$R/data"
H=$DATA/hh_rlhf D=$R/data MODELS=
for kind in $KINDS; do
    [ -f "$R/$kind/result.json" ] || "$PYTHON" -m sera_jax.reward_model --config configs/reward_hh.yaml \
        --reward_loss.center 0 --kind "$kind" --model.path "$DATA/models/stories260K" --model.compute float32 \
        --data.pairs "[$H/helpful_train.jsonl.gz, $H/harmless_train.jsonl.gz, $D/alpaca_train.jsonl, $D/uf_train.jsonl]" \
        --data.validation 0.05 --data.max_length 512 --data.max_prompt_length 128 --optimizer.batch_size 32 \
        --optimizer.learning_rate 5e-4 --run.seed 0 --run.dir "$R/$kind" "$@"
    MODELS+="${MODELS:+, }$kind: $R/$kind/export"
done
P=$H/helpful_test.jsonl.gz,$H/harmless_test.jsonl.gz,$D/alpaca_test.jsonl,$D/uf_test.jsonl
P+=,$D/llmbar_adversarial.jsonl,$D/llmbar_natural.jsonl,$DATA/preferences/hhh_alignment.jsonl.gz
"$PYTHON" tests/benchmarks/preferences.py --models "{$MODELS}" --pairs "[$P]"
