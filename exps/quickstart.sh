#!/usr/bin/env bash
# The main job on a small real model: score the base, fine-tune it with a mixture of adapters, score it again.
#   exps/quickstart.sh [METHOD]          (default soft_moa; `make quickstart` calls it with its own Python)
# Takes about ten minutes on two cores. What is there already is reused: a second call only prints the table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
method=${1:-soft_moa}
base=runs/quickstart/base
tuned=runs/quickstart/$method

python -m demo                                                    # models/SmolLM2-135M-Instruct, data/demo
python generate.py --save_path "$base/demo.jsonl" --temperature 0 --max_gen_len 100
python -m evaluate demo --predict_file "$base/demo.jsonl" --save_path "$base/scores.json"

python finetune.py --method "$method" --output_dir "$tuned" --resume
python extract_adapter.py "$tuned/checkpoint-LAST.pth"
python generate.py --adapter_path "$tuned/adapter.pth" --save_path "$tuned/demo.jsonl" --temperature 0 --max_gen_len 100
python -m evaluate demo --predict_file "$tuned/demo.jsonl" --save_path "$tuned/scores.json" --show 2

echo
python exps/collect.py "$base" "$tuned"
