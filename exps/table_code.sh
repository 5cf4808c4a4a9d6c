#!/usr/bin/env bash
# The paper's code table: every method on CodeAlpaca-20k with three seeds, pass@1, 5 and 10 of ten samples on HumanEval
# and MBPP; then one table of all.
#   CKPT_DIR=models/Llama-3.1-8B-Instruct ALLOW_CODE_EXECUTION=1 [NPROC=4] exps/table_code.sh [flags of finetune.py]
# ALLOW_CODE_EXECUTION=1 runs the code that the models write: do so where it can do no harm. Without it all is trained
# and answered, and a later call with it scores.
# For LLaMA-3.1-8B on GPUs; `python finetune.py --method METHOD --ckpt_dir DIR --dry_run` tells how much memory a method
# takes. exps/fetch.sh gets the data.
# Environment: that of exps/run.sh, and METHODS="base lora" and SEEDS="0 1" for a part of the table. Stopped anywhere,
# the same command goes on from there. Tables: OUT/table_code.md, .csv and .json.
set -euo pipefail
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
out=$(realpath -m "${OUT:-$here/../runs}")
"$here/runs.sh" codealpaca "$@"
[ "${ALLOW_CODE_EXECUTION:-}" != 1 ] || "$here/tables.sh" "$out/table_code" "$out/codealpaca"
