#!/usr/bin/env bash
# Environments of the peers that the benchmarks time: peers.sh FOLDER. PYTHON311 and PYTHON312 name interpreters.
set -euo pipefail
folder=${1:?expected a folder for the environments}
"${PYTHON311:-python3.11}" -m venv "$folder/trl"
"$folder/trl/bin/pip" install --quiet torch==2.13.0
"$folder/trl/bin/pip" install --quiet trl==1.16.0
"${PYTHON312:-python3.12}" -m venv "$folder/tunix"
"$folder/tunix/bin/pip" install --quiet google-tunix==0.1.7
