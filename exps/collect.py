"""Tables of runs: what each method trained, how long it took, and its scores, as mean and spread over seeds.

A run is a folder with scores.json (`python -m evaluate`) and, for a tuned model, the config.json and log.jsonl
that finetune.py left there. Runs in DATASET/METHOD/sSEED, as exps/run.sh makes them, share a line of DATASET's table;
so do METHOD-s0 and METHOD-s1 of one folder. Runs whose settings differ are never averaged: they get lines of their
own, which name what differs. Runs that are not finished are named on stderr and left out.
Scores are percentages, published / robust rule; the spread behind ± is the sample standard deviation over seeds; time
is that of the training steps; memory the largest of the main process. Exit status: 0; 1 for bad input; 2 for bad flags.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lines import Line, lines_of
from run_folders import RULES, find


def markdown(lines: list[Line]) -> str:
    """A table per data set, under its name where there are several."""
    datasets = dict.fromkeys(line.dataset for line in lines)
    tables = []
    for dataset in datasets:
        own = [line for line in lines if line.dataset == dataset]
        columns = _columns(own)
        rows = [_cells(line, columns) for line in own]
        head = [name for name in rows[0] if name != "seeds" or any(len(line.runs) > 1 for line in own)]
        table = [head, [], *([row[name] for name in head] for row in rows)]
        table = [[cell.replace("|", "\\|") for cell in row] for row in table]
        widths = [max(len(row[i]) for row in table if row) for i in range(len(head))]
        table[1] = ["-" * width for width in widths]
        text = "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in table
        )
        tables.append(f"## {dataset}\n\n{text}\n" if len(datasets) > 1 else f"{text}\n")
    return "\n".join(tables)


def _columns(lines: list[Line]) -> list[str]:
    """The columns of scores: suites in the order in which they come, means last."""
    names = dict.fromkeys(name for line in lines for run in line.runs for name in run.scores)
    return sorted(names, key=lambda name: name.startswith("mean, "))


def _cells(line: Line, columns: list[str]) -> dict[str, str]:
    tuned = line.runs[0].record is not None
    cells = {"model": line.name, "seeds": str(len(line.runs))}
    cells["trained"] = f"{line.recorded('trainable_parameters'):,}" if tuned else "-"
    cells["steps"] = f"{line.recorded('steps')} x {line.recorded('rows_per_step')} rows" if tuned else "-"
    seconds = line.trained("seconds")
    hours = seconds is not None and seconds[0] >= 2 * 3600
    cells["training"] = _plus_minus(seconds, 3600 if hours else 60, " h" if hours else " min")
    speed, peak = line.trained("tokens_per_s"), line.peak()
    cells["tokens/s"] = f"{speed[0]:,.0f}" if speed else "-"
    cells["memory"] = "-" if peak is None else f"{peak / 2**30:.1f} GiB"
    for column in columns:
        both = [line.score(column, rule) for rule in RULES]
        cells[column] = " / ".join(map(_plus_minus, both)) if all(both) else "-"
    return cells


def _plus_minus(spread: tuple[float, float | None] | None, unit: float = 1, name: str = "") -> str:
    if spread is None:
        return "-"
    mean, deviation = spread
    return f"{mean / unit:.1f}" + ("" if deviation is None else f" ± {deviation / unit:.1f}") + name


def as_csv(lines: list[Line]) -> str:
    """One row per line of all tables; sd is empty where there is one seed."""
    rows = []
    for line in lines:
        row = {"dataset": line.dataset, "model": line.name, "seeds": len(line.runs)}
        row |= {name: line.recorded(name) for name in ("trainable_parameters", "steps", "rows_per_step")}
        spreads = {name: line.trained(name) for name in ("seconds", "tokens_per_s")}
        spreads |= {f"{column} {rule}": line.score(column, rule) for column in _columns(lines) for rule in RULES}
        for name, spread in spreads.items():
            row[f"{name} mean"], row[f"{name} sd"] = spread or (None, None)
        rows.append(row | {"peak_memory_bytes": line.peak()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(lines: list[Line], unfinished: dict[Path, str]) -> str:
    """All lines, and of each run everything that is known."""

    def spread(found: tuple[float, float | None] | None) -> dict[str, float | None] | None:
        return None if found is None else dict(zip(("mean", "sd"), found, strict=True))

    content = [
        {
            "dataset": line.dataset,
            "model": line.model,
            "differs": line.differs,
            "seeds": [run.seed for run in line.runs],
            **{name: line.recorded(name) for name in ("trainable_parameters", "steps", "rows_per_step")},
            **{name: spread(line.trained(name)) for name in ("seconds", "tokens_per_s")},
            "peak_memory_bytes": line.peak(),
            "scores": {c: {rule: spread(line.score(c, rule)) for rule in RULES} for c in line.runs[0].scores},
            "runs": [
                {
                    "folder": str(run.folder),
                    "seed": run.seed,
                    "training": run.training or None,
                    "scores": run.scores_file,
                    "config": run.record,
                    "answers": run.answers,
                }
                for run in line.runs
            ],
        }
        for line in lines
    ]
    left_out = [{"folder": str(folder), "why": why} for folder, why in unfinished.items()]
    return json.dumps({"lines": content, "unfinished": left_out}, indent=1, ensure_ascii=False) + "\n"


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\n`{self.prog} --help` lists the flags.", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    parser = _Parser(
        prog="exps/collect.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, or a folder with runs under it")
    formats: dict[str, Callable[[list[Line], dict[Path, str]], str]] = {
        "markdown": lambda lines, _: markdown(lines),
        "csv": lambda lines, _: as_csv(lines),
        "json": as_json,
    }
    parser.add_argument("--format", choices=tuple(formats), default="markdown", help="default: markdown")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of on the terminal")
    flags = parser.parse_args(argv)
    try:
        runs, unfinished = find(flags.folders)
        for folder, why in unfinished.items():
            print(f"left out, not finished: {folder}: {why}", file=sys.stderr)
        if not runs:
            raise ValueError(f"no finished run (a folder with scores.json) in {', '.join(map(str, flags.folders))}")
        lines, notes = lines_of(runs)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        text = formats[flags.format](lines, unfinished)
        if flags.output:
            write(flags.output, text)
        else:
            print(text, end="")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
