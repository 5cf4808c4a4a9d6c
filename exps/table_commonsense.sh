#!/usr/bin/env bash
# The paper's commonsense table: every method on commonsense_15k with three seeds, scored on BoolQ, PIQA, SIQA,
# HellaSwag, WinoGrande, ARC-c, ARC-e and OBQA; then one table of all.
#   CKPT_DIR=models/Llama-3.1-8B-Instruct [NPROC=4] exps/table_commonsense.sh [flags of finetune.py]
# For LLaMA-3.1-8B on GPUs; `python finetune.py --method METHOD --ckpt_dir DIR --dry_run` tells how much memory a method
# takes. exps/fetch.sh gets the data.
# Environment: that of exps/run.sh, and METHODS="base lora" and SEEDS="0 1" for a part of the table. Stopped anywhere,
# the same command goes on from there. Tables: OUT/table_commonsense.md, .csv and .json.
set -euo pipefail
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
out=$(realpath -m "${OUT:-$here/../runs}")
"$here/runs.sh" commonsense_15k "$@"
"$here/tables.sh" "$out/table_commonsense" "$out/commonsense_15k"
