#!/usr/bin/env bash
# Fine-tune one method on a file of rows and score it on every suite of a folder.
#   exps/run.sh METHOD TRAIN TESTS OUT [flags of finetune.py]
#     METHOD  a method of finetune.py, or `base`: the untuned model, scored alone
#     TRAIN   training rows; for `base` a word that is not looked at
#     TESTS   folder with SUITE/test.json for each suite
#     OUT     folder of the run: checkpoints, adapter, predictions, scores.json
# Environment: CKPT_DIR (base model; default: the demo's), SUITES (default: the math suites that TESTS has), GENERATE
# (flags of generate.py). Stopped anywhere, the same command goes on from there.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,9p' "$0" >&2; exit 2; }
method=$1 train=$(realpath -m "$2") tests=$(realpath "$3") out=$(realpath -m "$4")
ckpt=${CKPT_DIR:+$(realpath "$CKPT_DIR")}
shift 4
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base=(); [ -z "$ckpt" ] || base=(--ckpt_dir "$ckpt")
adapter=()
if [ "$method" != base ]; then
    python finetune.py --method "$method" --data_path "$train" --output_dir "$out" --resume "${base[@]}" "$@"
    python extract_adapter.py "$out/checkpoint-LAST.pth"
    adapter=(--adapter_path "$out/adapter.pth")
fi
files=()
for suite in ${SUITES:-AddSub AQuA GSM8K MultiArith SingleEq SVAMP}; do
    data=$(find "$tests" -maxdepth 2 -ipath "$tests/$suite/test.json" | head -n 1)
    [ -n "$data" ] || { [ -z "${SUITES:-}" ] && continue; echo "error: no $tests/$suite/test.json" >&2; exit 1; }
    # shellcheck disable=SC2086 - GENERATE is a list of flags
    python generate.py "${base[@]}" "${adapter[@]}" --data_path "$data" --save_path "$out/$suite.jsonl" ${GENERATE:-}
    files+=("$out/$suite.jsonl")
done
[ ${#files[@]} -gt 0 ] || { echo "error: no SUITE/test.json of a math suite in $tests" >&2; exit 1; }
python -m evaluate --predict_files "${files[@]}" --json "$out/scores.json"
