#!/usr/bin/env bash
# Every method on a small model: SmolLM2-135M-Instruct, 200 steps on GSM8K's training problems and 200 on commonsense
# questions, greedy answers to the first 64 problems of each test; then one table of all. It shows that every method
# trains on real data, and is no reproduction of the paper's tables.
#   exps/table_small.sh
# For two CPU cores that multiply bf16. DATA needs gsm8k/train.json and the tests named below, which exps/fetch.sh gets,
# and commonsense_15k_mixed/train.json: 15,000 rows drawn from the training splits of BoolQ, ARC-e, ARC-c and OBQA.
# Environment: that of exps/run.sh, and METHODS="base lora" and SEEDS="0 125" for a part of the table. Stopped anywhere,
# the same command goes on from there. Tables: OUT/table_small.md, .csv and .json.
set -euo pipefail
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
out=$(realpath -m "${OUT:-$here/../runs}")
methods=${METHODS:-base $(cd "$here/.." && python -m exps.recipe methods)}
all_seeds=${SEEDS:-0 125 1225}
greedy="--temperature 0 --max_rows 64 --max_seq_len 512 --max_batch_size 64"
short=(--max_steps 200 --accum_iter 1 --max_seq_len 200 --lr 1e-3)
for method in $methods; do
    seeds=$all_seeds router=()
    case $method in
        base) seeds=${all_seeds%% *} ;; # its greedy answers are the same for every seed
        soft_moa | soft_moa_instance) router=(--swi_x 4) ;; # as in the math runs
    esac
    for seed in $seeds; do
        export SUITES="AddSub MultiArith SingleEq gsm8k" GENERATE="$greedy --max_gen_len 120"
        "$here/run.sh" "$method" gsm8k "$seed" "${short[@]}" --batch_size 2 --warmup_epochs 0.008
        export SUITES="boolq piqa social_i_qa winogrande ARC-Easy openbookqa"
        export GENERATE="$greedy --max_gen_len 16 --min_gen_len 16"
        "$here/run.sh" "$method" commonsense_15k_mixed "$seed" "${short[@]}" --batch_size 4 --warmup_epochs 0.01 \
            "${router[@]}"
    done
done
"$here/tables.sh" "$out/table_small" "$out/gsm8k" "$out/commonsense_15k_mixed"
