#!/usr/bin/env bash
# One run: fine-tune a method on a data set, extract its adapter, answer every test, score the answers.
#   exps/run.sh METHOD DATASET SEED [flags of finetune.py]
#     METHOD   a method of finetune.py, or `base`: the untuned model, only answered and scored
#     DATASET  math_14k, commonsense_15k, codealpaca, gsm8k, commonsense_15k_mixed or demo; exps/recipe.py holds the
#              flags that go with each, and a flag given here takes the place of the recipe's
# Environment, each with its default:
#   DATA=data          folder with DATASET/train.json and SUITE/test.json
#   OUT=runs           the run is the folder OUT/DATASET/METHOD/sSEED
#   VARIANT=           a name for a method with other flags: the folder is OUT/DATASET/METHOD-VARIANT/sSEED
#   CKPT_DIR=          base model in Meta's layout; by default the demo model
#   NPROC=1            processes; more than one are started by torchrun and share the rows of a step
#   SUITES=            folders of the tests to answer instead of the recipe's, as "AddSub gsm8k"
#   GENERATE=          flags of generate.py, which take the place of the recipe's
#   ALLOW_CODE_EXECUTION=    1: score HumanEval and MBPP, which runs the code that the model wrote
# Stopped anywhere, the same command goes on from there; where all is done, with the same flags on the same contents of
# base, rows, tests and adapter, it says so. Remove scores.json to score anew.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,/^set/{/^set/!p}' "$0" >&2; exit 2; }
method=$1 dataset=$2 seed=$3
shift 3
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
data=$(realpath -m "${DATA:-$root/data}")
out=$(realpath -m "${OUT:-$root/runs}")/$dataset/$method${VARIANT:+-$VARIANT}/s$seed
ckpt=${CKPT_DIR:+$(realpath -m "$CKPT_DIR")}
cd "$root"
fail() { echo "error: $1" >&2; exit 1; }

base=()
[ -z "$ckpt" ] || base=(--ckpt_dir "$ckpt")
launch=(python)
[ "${NPROC:-1}" = 1 ] || launch=(python -m torch.distributed.run --standalone --nproc_per_node "$NPROC")

# The recipe's flags, and behind them those that are given
suites=${SUITES:-$(python -m exps.recipe suites "$dataset")}
# shellcheck disable=SC2086 # GENERATE is a list of flags
answering="$(python -m exps.recipe generate "$dataset" ${GENERATE:-}) ${GENERATE:-} --seed $seed"
training=
[ "$method" = base ] || training=$(python -m exps.recipe train "$method" "$dataset" "${NPROC:-1}" "$@")

# Every file is looked for before any work; folders may be written in any case
if [ "$dataset" = demo ]; then
    python -c 'import sys; from demo.problems import ensure_data; ensure_data(sys.argv[1])' "$data/demo"
fi
train=$data/$dataset/train.json
[ "$method" = base ] || [ -f "$train" ] || fail "no $train (exps/fetch.sh gets the data)"
files=() code=
for suite in $suites; do
    path=
    for file in "$data"/*/test.json "$data"/*/test.jsonl; do
        folder=${file%/*} folder=${folder##*/}
        [ "${folder,,}" != "${suite,,}" ] || [ ! -f "$file" ] || path=${path:-$file}
    done
    [ -n "$path" ] || fail "no $data/$suite/test.json (exps/fetch.sh gets the data, SUITES names other tests)"
    files+=("$path")
    case ${suite,,} in humaneval | mbpp) code=1 ;; esac
done

# All that the scores follow from, by contents: where they have been made from the same, there is nothing to do
fingerprint=$(python -m exps.recipe fingerprint ${ckpt:+"$ckpt"})
inputs() {
    printf '%s\n' "$method $training $*" "$answering" "base: $fingerprint" "tests: $suites"
    local trained=()
    [ "$method" = base ] || trained=("$train" "$out/adapter.pth")
    for file in "${files[@]}" "${trained[@]}"; do [ ! -f "$file" ] || cksum < "$file"; done
}
if [ -f "$out/scores.json" ] && [ "$(inputs "$@")" = "$(cat "$out/inputs.txt" 2> /dev/null)" ]; then
    echo "$out: complete" >&2
    exit
fi

# A wrong flag of generate.py is refused now (status 2), not after the training; a right one finds no such file
# shellcheck disable=SC2086 # a list of flags
said=$(python generate.py "${base[@]}" --data_path "$out/none" --save_path "$out/none" $answering 2>&1) ||
    [ $? != 2 ] || { echo "$said" >&2; exit 2; }

adapter=()
if [ "$method" != base ]; then
    tests=$(IFS=,; echo "${files[*]}")
    # shellcheck disable=SC2086 # a list of flags
    "${launch[@]}" finetune.py --method "$method" "${base[@]}" --data_path "$train" --output_dir "$out" --resume \
        --seed "$seed" --leak_tests "$tests" $training "$@"
    if [ ! -f "$out/adapter.pth" ] || [ -n "$(find "$out" -name 'checkpoint-*.pth' -newer "$out/adapter.pth")" ]; then
        python extract_adapter.py "$out/checkpoint-LAST.pth"
    fi
    adapter=(--adapter_path "$out/adapter.pth")
fi
rm -f "$out/scores.json" # of earlier answers
answers=()
for suite in $suites; do
    # shellcheck disable=SC2086 # a list of flags
    "${launch[@]}" generate.py "${base[@]}" "${adapter[@]}" --data_path "${files[${#answers[@]}]}" \
        --save_path "$out/$suite.jsonl" $answering
    answers+=("$out/$suite.jsonl")
done
if [ -n "$code" ] && [ "${ALLOW_CODE_EXECUTION:-}" != 1 ]; then
    echo "$out: answered, not scored, since that runs code which the model wrote. Where it can do no harm, give the" \
        "same command with ALLOW_CODE_EXECUTION=1" >&2
    exit
fi
python -m evaluate --predict_files "${answers[@]}" --save_path "$out/scores.json" ${code:+--allow_code_execution}
inputs "$@" > "$out/inputs.txt"
