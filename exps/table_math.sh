#!/usr/bin/env bash
# The paper's math table: every method on math_14k with three seeds, scored on AddSub, AQuA, GSM8K, MultiArith,
# SingleEq and SVAMP; then one table of all.
#   CKPT_DIR=models/Llama-3.1-8B-Instruct [NPROC=4] exps/table_math.sh [flags of finetune.py]
# For LLaMA-3.1-8B on GPUs; `python finetune.py --method METHOD --ckpt_dir DIR --dry_run` tells how much memory a method
# takes. exps/fetch.sh gets the data.
# Environment: that of exps/run.sh, and METHODS="base lora" and SEEDS="0 1" for a part of the table. Stopped anywhere,
# the same command goes on from there. Tables: OUT/table_math.md, .csv and .json.
set -euo pipefail
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
out=$(realpath -m "${OUT:-$here/../runs}")
"$here/runs.sh" math_14k "$@"
"$here/tables.sh" "$out/table_math" "$out/math_14k"
