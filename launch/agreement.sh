#!/usr/bin/env bash
# Who agrees with whom on real data: launch/agreement.sh DATA, where DATA holds preferences/ and alpaca_eval/.
#
# Two judges of AlpacaEval saw the same outputs beside different baselines: their shares of wins, output by output.
set -euo pipefail
DATA=$1
PYTHON=${PYTHON:-python3}
R=${R:-runs/agreement}
mkdir -p "$R"
"$PYTHON" - "$DATA/alpaca_eval/pairs.jsonl.gz" "$R/alpaca_eval.jsonl" << 'END'
import collections, gzip, json, sys

found = collections.defaultdict(lambda: collections.defaultdict(dict))
for line in gzip.open(sys.argv[1], "rt", encoding="utf-8"):
    row = json.loads(line)
    found[row["instruction"]][row["response_b"]][row["annotator"]] = row["preference"] - 1
judges = ("alpaca_eval_gpt4", "weighted_alpaca_eval_gpt4_turbo")
with open(sys.argv[2], "w", encoding="utf-8") as file:
    for prompt, outputs in found.items():
        both = {text: said for text, said in outputs.items() if len(said) == 2}
        scores = {judge: [said[judge] for said in both.values()] for judge in judges}
        if both:
            file.write(json.dumps({"prompt": prompt, "responses": list(both), "scores": scores}) + "\n")
END
P=$DATA/preferences
for file in "$R/alpaca_eval.jsonl" "$P"/{ultrafeedback_subset,pandalm_human,llmbar_human,llmeval2_human,webgpt_test}.jsonl.gz; do
    name=$(basename "$file" .gz)
    "$PYTHON" -m sera_jax.agree --config configs/agree.yaml --files "[$file]" --out "$R/${name%.jsonl}.json"
done
