#!/usr/bin/env bash
# Every method on one data set with every seed.
#   exps/runs.sh DATASET [flags of finetune.py]
# Environment: that of exps/run.sh; METHODS (default: base and all methods) and SEEDS (0 1 2).
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
dataset=$1
shift
methods=${METHODS:-base $(cd "$here/.." && python -m exps.recipe methods)}
for method in $methods; do
    for seed in ${SEEDS:-0 1 2}; do
        "$here/run.sh" "$method" "$dataset" "$seed" "$@"
    done
done
