#!/usr/bin/env bash
# The public data sets of the experiments: fetched where they are not there yet, then checked.
#   exps/fetch.sh [NAME ...]
#     NAME  math, commonsense or code; a folder's name, as gsm8k; a test's, as SIQA. Without names: everything
# Environment: DATA, the folder that they go to (data). `python -m corpus list` shows what there is and from where.
set -euo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
data=$(realpath -m "${DATA:-$root/data}")
cd "$root"
python -m corpus fetch "$@" --output_dir "$data"
python -m corpus check "$@" --data_path "$data"
