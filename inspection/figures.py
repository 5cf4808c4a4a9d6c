"""Charts for print, as SVG and PNG.

    python -m inspection figures gates --statistics soft.json,sparse.json --save_path gates
    python -m inspection figures spread --statistics s0.json,s1.json --names "seed 0,seed 1" --save_path spread
    python -m inspection figures loads --statistics adamole.json --save_path loads
    python -m inspection figures losses --runs runs/gsm8k/soft_moa,runs/gsm8k/sparse_moa --save_path losses
    python -m inspection figures tradeoff --runs runs/gsm8k --save_path tradeoff
    python -m inspection figures cost --costs cost.json --save_path cost

gates: mean gates, layer by slot, with the thresholds and adapters used of sparse routers. spread: how gates are spread,
by slot. loads: loads of a mixture of experts, layer by expert. losses: loss curves. tradeoff: scores against trainable
parameters, time and memory. cost: time, memory and time per answer.
Statistics are what `python -m inspection gates` writes, runs the folders of finetune.py and `python -m evaluate`, costs
what `python -m benchmarks.step --json` writes. docs/inspection.md tells how to read each chart.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli
from cli import flag
from inspection import chart_style, plots
from inspection.router_file import PARTS, read_statistics
from inspection.runs import RULES, columns_of, expecting, find_runs, group_runs, headlines
from moa.reading import parse_json, read_text

SOURCES = {"gates": "statistics", "spread": "statistics", "loads": "statistics"}
SOURCES |= {"losses": "runs", "tradeoff": "runs", "cost": "costs"}


@dataclass(frozen=True)
class Flags:
    figure: str = flag(help="which chart", choices=tuple(SOURCES), positional=True)
    save_path: str = flag(help="where to write: SAVE_PATH.svg and SAVE_PATH.png")
    statistics: str | None = flag(None, help="gates, spread, loads: files of router statistics, with commas")
    names: str | None = flag(None, help="what to call them, with commas; default: the files' names")
    part: str = flag("all", help="gates, spread, loads: which tokens", choices=PARTS)
    show: str = flag(
        "auto",
        help="loads: share of tokens that chose an expert, or its mean weight; auto: weights where all are chosen",
        choices=("auto", "load", "weight"),
    )
    runs: str | None = flag(None, help="losses, tradeoff: folders of runs, with commas; of each, all runs in it")
    smooth: int = flag(20, least=1, help="losses: the line is the mean of so many steps (1: as they are)")
    rule: str = flag("robust", help="tradeoff: which score", choices=RULES)
    costs: str | None = flag(None, help="cost: the JSON file of `python -m benchmarks.step`")

    def __post_init__(self):
        for source in ("statistics", "runs", "costs"):
            if (getattr(self, source) is not None) != (SOURCES[self.figure] == source):
                needs = "needs" if SOURCES[self.figure] == source else "does not use"
                raise ValueError(f"the chart {self.figure} {needs} --{source}")
        files, names = (self.statistics or "").split(","), self.names and self.names.split(",")
        if names and len(names) != len(files):
            raise ValueError(f"--names has {len(names)} names for {len(files)} --statistics")
        if self.figure == "loads" and len(files) > 1:
            raise ValueError("--statistics: a chart of loads is of one file")


def draw(flags: Flags) -> Any:
    """The chart that the flags ask for."""
    match flags.figure:
        case "gates" | "spread":
            named = _statistics(flags, "blocks", "no block router (--block_router): there are no gates")
            _note(plots.agreement(named, flags.part))
            return (plots.gates if flags.figure == "gates" else plots.spread)(named, flags.part)
        case "loads":
            ((name, statistics),) = _statistics(flags, "experts", "no mixture of experts (--expert_num above 1)")
            by_load = plots.chooses(statistics) if flags.show == "auto" else flags.show == "load"
            return plots.loads(name, statistics, flags.part, "active" if by_load else "mean")
        case "losses":
            return _losses(flags)
        case "tradeoff":
            return _tradeoff(flags)
    return plots.costs(read_costs(Path(flags.costs)))


def _losses(flags: Flags) -> Any:
    runs = [run for run in find_runs(flags.runs.split(",")) if run.trained]
    _note(f"{run.path}: left out, no step in its log.jsonl" for run in runs if not run.losses)
    groups = group_runs(run for run in runs if run.losses)
    if not groups:
        raise ValueError(f"--runs {flags.runs}: no run with a loss in its log.jsonl")
    several = len({group.dataset for group in groups}) > 1
    named = [(group.dataset, group.run_name(run), run) for group in groups for run in group.runs]
    curves = [(f"{data}, {name}" if several else name, i, run.losses) for i, (data, name, run) in enumerate(named)]
    return plots.losses(curves, flags.smooth)


def _tradeoff(flags: Flags) -> Any:
    runs = find_runs(flags.runs.split(","))
    _note(f"{run.path}: left out, {run.problems[0]}" for run in runs if run.problems)
    groups = group_runs(run for run in runs if not run.problems)
    if not any(group.trained for group in groups):
        raise ValueError(f"--runs {flags.runs}: no finished run that trained anything")
    datasets = sorted({group.dataset for group in groups})
    if len(datasets) > 1:
        raise ValueError(f"--runs {flags.runs}: runs of several data sets ({', '.join(datasets)}); give those of one")
    column = headlines(columns_of(groups))[0]
    lacking = [run.path for group in groups for run in group.runs if column not in run.scores]
    if lacking:
        raise ValueError(f"{lacking[0]}: scores.json has no score for {column}, as other runs have")
    return plots.tradeoff(groups, flags.rule, column)


def read_costs(path: Path) -> dict[str, dict[str, float]]:
    """Costs by method from what `python -m benchmarks.step --json` wrote. ValueError naming the file."""
    with expecting(path, "what `python -m benchmarks.step --json` writes"):
        content = parse_json(read_text(path), str(path))
        methods = {"base": content.get("base", {})} | content["methods"] | content.get("peers", {})
        costs = {
            name: {cost: float(numbers[cost]) for cost in plots.COSTS if cost in numbers}
            for name, numbers in methods.items()
        }
        if not any(costs.values()):
            raise ValueError(f"methods have none of {', '.join(plots.COSTS)}")
    return {name: numbers for name, numbers in costs.items() if numbers}


def _statistics(flags: Flags, needed: str, lack: str) -> list[plots.Named]:
    """Names and statistics of the files, each of which has what is needed, for the tokens that are asked for."""
    files, named = flags.statistics.split(","), []
    names = flags.names.split(",") if flags.names else [Path(file).stem for file in files]
    for name, file in zip(names, files, strict=True):
        statistics = read_statistics(Path(file))
        if not statistics[needed]:
            raise ValueError(f"{file}: method {statistics['method']} has {lack}")
        if any(flags.part not in entry["parts"] and entry.get("unit") != "row" for entry in statistics[needed]):
            raise ValueError(f"{file}: it has no tokens of {flags.part}s")
        named.append((name, statistics))
    return named


def _note(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def main(argv: Sequence[str], prog: str) -> None:
    flags = cli.parse(Flags, argv, prog=prog, description=__doc__)
    with cli.cli_errors(), chart_style.styled():
        print("wrote " + " and ".join(map(str, chart_style.save(draw(flags), flags.save_path))))
