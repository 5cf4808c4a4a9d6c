#!/usr/bin/env bash
# A table of the paper: every method on a data set with three seeds, scored on its tests; then one table of all.
#   CKPT_DIR=models/Llama-3.1-8B-Instruct [NPROC=4] exps/table.sh DATASET [flags of finetune.py]
#     DATASET  math_14k, commonsense_15k or codealpaca, as published, or another of exps/recipe.py
# For LLaMA-3.1-8B on GPUs; `python finetune.py --method METHOD --ckpt_dir DIR --dry_run` tells how much memory a method
# takes. exps/fetch.sh gets the data. The answers to HumanEval and MBPP are programs, which ALLOW_CODE_EXECUTION=1 runs:
# do so where they can do no harm. Without it all is trained and answered, and a later call with it scores.
# Environment: that of exps/run.sh, and METHODS="base lora" and SEEDS="0 125" for a part of the table. Stopped anywhere,
# the same command goes on from there. Tables: OUT/table_DATASET.md, .csv and .json.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/{/^set/!p}' "$0" >&2; exit 2; }
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
out=$(realpath -m "${OUT:-$here/../runs}")
dataset=$1
shift
for method in ${METHODS:-base $(cd "$here/.." && python -m exps.recipe methods)}; do
    for seed in ${SEEDS:-0 125 1225}; do # the published ones
        "$here/run.sh" "$method" "$dataset" "$seed" "$@"
    done
done
if [ "$dataset" != codealpaca ] || [ "${ALLOW_CODE_EXECUTION:-}" = 1 ]; then
    table=$out/table_$dataset
    python "$here/collect.py" "$out/$dataset" --save_path "$table.md"
    for format in csv json; do
        python "$here/collect.py" "$out/$dataset" --format $format --save_path "$table.$format" 2> /dev/null # said once is enough
    done
    echo
    cat "$table.md"
fi
