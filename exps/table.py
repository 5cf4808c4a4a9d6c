"""One Markdown table of runs: what each trained, how long it took, and its scores.

    python exps/table.py RUN [RUN ...]

A RUN is a folder with scores.json (`python -m evaluate --json`) and, for a tuned model, the config.json and log.jsonl
that finetune.py left there. Scores are percentages, published / robust; time is that of the training steps.
"""

import json
import sys
from pathlib import Path


def read(run: Path) -> dict[str, str]:
    """The cells of one row, by column."""
    row = {"model": run.name, "trained": "-", "steps": "-", "training": "-"}
    if (run / "config.json").exists():
        config = json.loads((run / "config.json").read_text())
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        row["model"] = config["adapter"]["method"]
        row["trained"] = f"{config['trainable_parameters']:,}"
        row["steps"] = f"{len(log)} x {config['rows_per_step']} rows"
        row["training"] = f"{sum(entry['seconds'] for entry in log) / 60:.1f} min"
    scores = json.loads((run / "scores.json").read_text())
    for name, suite in scores["suites"].items():
        row[f"{name} ({suite['rows']})"] = f"{suite['published']['percent']:.1f} / {suite['robust']['percent']:.1f}"
    for family, part in scores["families"].items():
        if len(part["suites"]) > 1:
            mean = part["mean"]
            row[f"mean, {family}"] = f"{mean['published']['percent']:.1f} / {mean['robust']['percent']:.1f}"
    return row


def main(runs: list[str]) -> None:
    if not runs or runs[0].startswith("-"):
        print(__doc__)
        sys.exit(0 if runs[:1] in (["-h"], ["--help"]) else 2)
    rows = []
    for run in runs:
        try:
            rows.append(read(Path(run)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            sys.exit(f"error: {run}: not a scored run ({error})")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [columns, ["-"] * len(columns), *([row.get(c, "-") for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    table[1] = ["-" * width for width in widths]
    for line in table:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
