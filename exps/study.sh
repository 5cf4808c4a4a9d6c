#!/usr/bin/env bash
# All methods under equal terms on the demo's word problems: a learning rate for each, three seeds, paired differences.
#   exps/study.sh [flags of `python -m exps.study`, as --steps 100 --data demo,gsm8k=data/gsm8k/train.json]
# Environment: METHODS="lora soft_moa lora:lora_rank=4" and SEEDS="0 125" for a part of it or another, OUT (runs/study).
# Stopped anywhere, the same command goes on from there; with --collect_only it makes the tables of what is finished.
# Tables: OUT/results.md and .json, OUT/DATASET/loss.svg, and OUT/method_comparison/ in the schema of PEFT's results.
set -euo pipefail
out=$(realpath -m "${OUT:-$(dirname "${BASH_SOURCE[0]}")/../runs/study}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python -m exps.study ${METHODS:+--methods "$METHODS"} ${SEEDS:+--seeds "${SEEDS// /,}"} --out "$out" "$@"
