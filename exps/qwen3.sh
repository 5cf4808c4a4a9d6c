#!/usr/bin/env bash
# A run of Qwen3-8B or -14B on math_14k with the published settings: 1 epoch, 16 rows a step, lr 1e-4 constant after 200
# steps of warm-up, no weight decay, rank and alpha 8, no prompt expert; greedy answers of up to 300 tokens.
#   CKPT_DIR=models/Qwen3-8B [NPROC=4] exps/qwen3.sh METHOD SEED [flags of finetune.py]
# Room for the prompts beside the answers is ours. The rest is as in exps/run.sh; VARIANT is qwen3 unless given.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/{/^set/!p}' "$0" >&2; exit 2; }
method=$1 seed=$2
shift 2
flags=(--epochs 1 --batch_size 4 --accum_iter $((4 / ${NPROC:-1})) --max_seq_len 300 --weight_decay 0)
flags+=(--lr 1e-4 --lr_schedule constant --warmup_epochs 0.22986) # 200 steps of 16 of the 13,921 rows
case $method in
    lora) flags+=(--lora_rank 8 --lora_alpha 8) ;;
    soft_moa | soft_moa_instance | unipeft) flags+=(--prompt_layers 0-0) ;;
esac
export VARIANT=${VARIANT:-qwen3}
export GENERATE="--temperature 0 --max_gen_len 300 --max_seq_len 1024 --min_gen_len 300 ${GENERATE:-}"
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$method" math_14k "$seed" "${flags[@]}" "$@"
