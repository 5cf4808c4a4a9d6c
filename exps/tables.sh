#!/usr/bin/env bash
# The tables of runs in every format, NAME.md, NAME.csv and NAME.json, and the first on the terminal.
#   exps/tables.sh NAME FOLDER [FOLDER ...]
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,3p' "$0" >&2; exit 2; }
name=$1
shift
collect=$(dirname "${BASH_SOURCE[0]}")/collect.py
python "$collect" "$@" --save_path "$name.md"
for format in csv json; do
    python "$collect" "$@" --format $format --save_path "$name.$format" 2> /dev/null # said once is enough
done
echo
cat "$name.md"
