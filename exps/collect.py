"""Tables of runs: what each method trained, how long it took, and its scores, as mean and spread over seeds.

    python exps/collect.py FOLDER [FOLDER ...] [--format csv] [--save_path FILE]

FOLDER is a run, or a folder with runs under it. A run is a folder with scores.json (`python -m evaluate --save_path`)
and, for a tuned model, the config.json and log.jsonl that finetune.py left there. Runs in DATASET/METHOD/sSEED, as
exps/run.sh makes them, share a row of DATASET's table; so do METHOD-s0 and METHOD-s1 of one folder. Runs whose settings
differ are never averaged: they get rows of their own, which name what differs. Unfinished runs are named on stderr and
left out.

Scores are percentages, published / robust rule; the spread behind ± is the sample standard deviation over seeds; time
is that of the training steps; memory is the largest of the main process.
"""

import csv
import io
import json
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file is run by its path, from any folder

from tabulate import tabulate  # noqa: E402

from cli import cli_errors, die, flag, parse  # noqa: E402
from inspection import runs  # noqa: E402
from inspection.runs import COUNTS, NONE, QUANTITIES, RULES, Run, RunGroup, Spread, show  # noqa: E402
from moa.files import atomic_write  # noqa: E402

TRAINING = ("seconds", "tokens_per_s", "peak_memory_bytes")


@dataclass(frozen=True)
class Flags:
    format: str = flag("markdown", help="of the tables", choices=("markdown", "csv", "json"))
    save_path: str | None = flag(None, help="file to write; default: the terminal")


def markdown(groups: list[RunGroup]) -> str:
    """A table per data set, under its name where there are several."""
    tables, datasets = [], runs.by_dataset(groups)
    for dataset, members in datasets.items():
        rows = [_cells(group, runs.columns_of(members)) for group in members]
        table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
        tables.append(f"## {dataset}\n\n{table}\n" if len(datasets) > 1 else f"{table}\n")
    return "\n".join(tables)


def _cells(group: RunGroup, columns: list[str]) -> dict[str, str]:
    steps, rows, _ = (group.runs[0].numbers.get(name) for name in COUNTS)
    cells = {"model": group.name, "seeds": str(len(group.runs)), "steps": f"{steps} x {rows} rows" if steps else NONE}
    for name in ("trainable_parameters", *TRAINING):
        cells[QUANTITIES[name].label] = show(group.over(name), name)
    for column in columns:
        both = [group.score(column, rule) for rule in RULES]
        cells[column] = " / ".join(show(score, "percent") for score in both) if all(both) else NONE
    return cells


def as_csv(groups: list[RunGroup]) -> str:
    """One row per row of all tables; sd is empty where there is one seed."""
    rows, columns = [], runs.columns_of(groups)
    for group in groups:
        row: dict[str, Any] = {"dataset": group.dataset, "model": group.name, "seeds": len(group.runs)}
        row |= {name: group.runs[0].numbers.get(name) for name in COUNTS}
        spreads = {name: group.over(name) for name in TRAINING}
        spreads |= {f"{column} {rule}": group.score(column, rule) for column in columns for rule in RULES}
        for name, spread in spreads.items():
            row[f"{name} mean"], row[f"{name} sd"] = spread[:2] if spread else (None, None)
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(groups: list[RunGroup], unfinished: list[Run]) -> str:
    """All rows, and of each run everything that is known."""

    def spread(value: Spread | None) -> dict[str, float | None] | None:
        return value and {"mean": value.mean, "sd": value.deviation}

    def run_record(run: Run) -> dict[str, Any]:
        training = {name: run.numbers.get(name) for name in TRAINING} if run.trained else None
        record = {"folder": str(run.path), "seed": run.seed, "training": training, "scores": run.scores_file}
        return record | {"config": run.record, "answers": run.answer_settings}

    lines = [
        {"dataset": group.dataset, "model": group.method, "differs": group.differs}
        | {"seeds": [run.seed for run in group.runs]}
        | {name: group.runs[0].numbers.get(name) for name in COUNTS}
        | {name: spread(group.over(name)) for name in TRAINING}
        | {"scores": {c: {rule: spread(group.score(c, rule)) for rule in RULES} for c in group.runs[0].scores}}
        | {"runs": list(map(run_record, group.runs))}
        for group in groups
    ]
    left_out = [{"folder": str(run.path), "why": run.unfinished[0]} for run in unfinished]
    return json.dumps({"lines": lines, "unfinished": left_out}, indent=1) + "\n"


def notes(groups: list[RunGroup]) -> list[str]:
    """What a reader of the tables should know: rows that differ in more than the method, and leaks."""
    lines = []
    for group in groups:
        if group.differs:
            folders = ", ".join(run.path.name for run in group.runs)
            lines.append(f"{group.dataset}/{group.method}: other settings, not averaged: {group.name}: {folders}")
    for dataset, members in runs.by_dataset(groups).items():
        unlike = []
        for name in dict.fromkeys(name for group in members for name in group.settings):
            values = {json.dumps(g.settings[name], sort_keys=True) for g in members if name in g.settings}
            if len(values) > 1 and (": " in name or name in ("base_fingerprint", "data_sha256")):
                unlike.append(name.split(": ")[-1])
        if unlike:
            lines.append(f"{dataset}: the rows do not all have the same {', '.join(dict.fromkeys(unlike))}")
        records = [run.record or {} for group in members for run in group.runs]
        lines += dict.fromkeys(f"{dataset}: {leak}" for record in records for leak in _leaks(record))
    return lines


def _leaks(record: dict[str, Any]) -> list[str]:
    """Tests of which rows stand in the training rows, as finetune.py recorded it."""
    return [
        f"{test['exact'] + test['near']} of {test['rows']} rows of {'/'.join(Path(test['file']).parts[-2:])} stand in "
        "the training rows"
        for test in record.get("leaks", {}).get("tests", [])
        if test["exact"] + test["near"]
    ]


def require_sound(groups: list[RunGroup]) -> None:
    """ValueError naming a damaged file, or two runs of one seed."""
    for group in groups:
        for run in group.runs:
            if run.damaged:
                raise ValueError(f"{run.path}/{run.damaged[0]}")
        if "run" in group.differs:
            others = [run.path for other in groups if other.method == group.method for run in other.runs]
            raise ValueError(f"{' and '.join(map(str, others))}: two runs of seed {group.runs[0].seed}, leave one out")


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    folders = list(takewhile(lambda word: not word.startswith("-"), words))
    flags = parse(Flags, words[len(folders) :], prog="exps/collect.py", description=__doc__)
    if not folders:
        die("FOLDER is required: a run, or a folder with runs under it", status=2)
    with cli_errors():
        every_run = runs.find_runs(folders)
        unfinished = [run for run in every_run if run.unfinished and not run.damaged]
        for run in unfinished:
            print(f"left out, not finished: {run.path}: {run.unfinished[0]}", file=sys.stderr)
        groups = runs.group_runs(run for run in every_run if run not in unfinished)
        require_sound(groups)
        if not groups:
            raise ValueError(f"no finished run (a folder with scores.json) in {', '.join(folders)}")
        for note in notes(groups):
            print(f"note: {note}", file=sys.stderr)
        formats = {"markdown": markdown, "csv": as_csv, "json": lambda groups: as_json(groups, unfinished)}
        text = formats[flags.format](groups)
        if flags.save_path:
            atomic_write(Path(flags.save_path), text.encode("utf-8", "backslashreplace"))
        else:
            print(text, end="")


if __name__ == "__main__":
    main()
