"""Figures for print, as SVG and PNG.

    python -m inspection figures gates --statistics soft.json,sparse.json --save_path gates
    python -m inspection figures spread --statistics s0.json,s1.json --names "seed 0,seed 1" --save_path spread
    python -m inspection figures loads --statistics adamole.json --save_path loads
    python -m inspection figures losses --runs runs/gsm8k/soft_moa,runs/gsm8k/sparse_moa --save_path losses
    python -m inspection figures tradeoff --runs runs/gsm8k --save_path tradeoff
    python -m inspection figures cost --costs cost.json --save_path cost

Statistics are what `python -m inspection gates` writes, runs the folders of finetune.py and `python -m evaluate`, costs
what `python -m benchmarks.cost --json` writes. docs/inspection.md tells how to read each figure.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cli
from cli import flag
from inspection.runs import RULES, Run, find_runs

PARTS = ("all", "prompt", "answer")


@dataclass(frozen=True)
class Out:
    save_path: str = flag(help="where to write: SAVE_PATH.svg and SAVE_PATH.png")


@dataclass(frozen=True)
class StatisticsFlags(Out):
    statistics: str = flag(help="files of `python -m inspection gates`, with commas between them")
    names: str | None = flag(None, help="what to call them, with commas; default: the files' names")
    part: str = flag("all", help="which tokens", choices=PARTS)

    def __post_init__(self):
        files = self.statistics.split(",")
        if self.names is not None and len(self.names.split(",")) != len(files):
            raise ValueError(f"--names has {len(self.names.split(','))} names for {len(files)} --statistics")


@dataclass(frozen=True)
class LoadsFlags(StatisticsFlags):
    show: str = flag(
        "auto",
        help="load: share of tokens that chose an expert; weight: its mean weight; auto: weights where all are chosen",
        choices=("auto", "load", "weight"),
    )

    def __post_init__(self):
        super().__post_init__()
        if "," in self.statistics:
            raise ValueError("--statistics: a figure of loads is of one file")


@dataclass(frozen=True)
class LossesFlags(Out):
    runs: str = flag(help="folders of runs, with commas; of each, all runs in it")
    smooth: int = flag(20, help="the line is the mean of so many steps (1: as they are)")

    def __post_init__(self):
        if self.smooth < 1:
            raise ValueError(f"--smooth must be at least 1, not {self.smooth}")


@dataclass(frozen=True)
class TradeoffFlags(Out):
    runs: str = flag(help="folders of runs of one data set, with commas; of each, all runs in it")
    rule: str = flag("robust", help="which score", choices=RULES)


@dataclass(frozen=True)
class CostFlags(Out):
    costs: str = flag(help="the JSON file of `python -m benchmarks.cost`")


def _gates(flags: StatisticsFlags) -> Any:
    from inspection.plots import gates

    named = _statistics(flags, "blocks", "no block's router (--block_router): there are no gates")
    _tell(gates.agreement(named, flags.part))
    return gates.layer_by_slot(named, flags.part)


def _spread(flags: StatisticsFlags) -> Any:
    from inspection.plots import gates

    named = _statistics(flags, "blocks", "no block's router (--block_router): there are no gates")
    _tell(gates.agreement(named, flags.part))
    return gates.spreads(named, flags.part)


def _loads(flags: LoadsFlags) -> Any:
    from inspection.plots import loads

    ((name, statistics),) = _statistics(flags, "experts", "no mixture of experts (--expert_num above 1)")
    show = flags.show
    if show == "auto":
        show = "load" if loads.chooses(statistics) else "weight"
    return loads.layer_by_expert(name, statistics, flags.part, "load" if show == "load" else "mean")


def _losses(flags: LossesFlags) -> Any:
    from inspection.plots import curves

    runs = [run for run in _runs(flags.runs) if run.record is not None or run.log]
    _tell([f"{run.path}: left out, no step in its log.jsonl" for run in runs if not _losses_of(run)])
    runs = [run for run in runs if _losses_of(run)]
    if not runs:
        raise ValueError(f"--runs {flags.runs}: no run with a loss in its log.jsonl")
    if len(runs) > curves.MOST:
        raise ValueError(f"--runs {flags.runs}: {len(runs)} runs; more than {curves.MOST} curves cannot be told apart")
    short = len({run.dataset for run in runs}) == 1
    return curves.losses([(run.name if short else f"{run.dataset}, {run.name}", run) for run in runs], flags.smooth)


def _losses_of(run: Run) -> bool:
    return any(isinstance(entry.get("loss"), (int, float)) for entry in run.log)


def _tradeoff(flags: TradeoffFlags) -> Any:
    from inspection.plots import comparison

    runs = _runs(flags.runs)
    _tell([f"{run.path}: left out, {run.missing[0]}" for run in runs if run.missing])
    runs = [run for run in runs if not run.missing]
    for run in runs:
        lacking = [name for name in comparison.MEASURES if run.record is not None and getattr(run, name) is None]
        if lacking or run.mean_score(flags.rule) is None:
            file = (
                f"log.jsonl or config.json does not tell {lacking[0]}" if lacking else "scores.json has no mean score"
            )
            raise ValueError(f"{run.path}: {file}")
    if not any(run.record is not None for run in runs):
        raise ValueError(f"--runs {flags.runs}: no finished run that trained anything")
    datasets = sorted({run.dataset for run in runs})
    if len(datasets) > 1:
        raise ValueError(f"--runs {flags.runs}: runs of several data sets ({', '.join(datasets)}); give those of one")
    return comparison.tradeoff(runs, flags.rule)


def _cost(flags: CostFlags) -> Any:
    from inspection.plots import comparison
    from moa.files import read_json

    content = read_json(Path(flags.costs))
    methods = content.get("methods")
    if not isinstance(methods, dict) or not all(isinstance(one, dict) for one in methods.values()):
        raise ValueError(f"{flags.costs}: no object 'methods' as `python -m benchmarks.cost` writes it")
    base, peers = content.get("base"), content.get("peers")
    methods = ({"base": base} if isinstance(base, dict) else {}) | methods
    methods |= {name: one for name, one in (peers if isinstance(peers, dict) else {}).items() if isinstance(one, dict)}
    known = {
        name: {cost: v for cost, v in one.items() if cost in comparison.COSTS and isinstance(v, (int, float)) and v > 0}
        for name, one in methods.items()
    }
    if not any(known.values()):
        raise ValueError(f"{flags.costs}: methods have none of {', '.join(comparison.COSTS)}")
    return comparison.costs(known)


def _statistics(flags: StatisticsFlags, needed: str, lack: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and statistics of the files, each of which has what is needed, for the tokens that are asked for."""
    from inspection.statistics import read_statistics

    files = flags.statistics.split(",")
    named = []
    for name, file in zip(flags.names.split(",") if flags.names else map(_stem, files), files, strict=True):
        statistics = read_statistics(file)
        if not statistics[needed]:
            raise ValueError(f"{file}: method {statistics['method']} has {lack}")
        if any(flags.part not in one["parts"] and one.get("unit") != "row" for one in statistics[needed]):
            raise ValueError(f"{file}: it has no tokens of {flags.part}s")
        named.append((name, statistics))
    return named


def _stem(file: str) -> str:
    return Path(file).stem


def _runs(folders: str) -> list[Run]:
    """Of all the folders, each once. ValueError naming a folder that holds none."""
    found: dict[Path, Run] = {}
    for folder in folders.split(","):
        runs = find_runs(folder)
        if not runs:
            raise ValueError(f"{folder}: no run in it (config.json, log.jsonl or scores.json)")
        found |= {run.path.resolve(): run for run in runs}
    return list(found.values())


def _tell(lines: list[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


class Figure(NamedTuple):
    flags: type
    make: Callable[[Any], Any]
    what: str


FIGURES = {
    "gates": Figure(StatisticsFlags, _gates, "Mean gates, layer by slot; thresholds and adapters used per layer."),
    "spread": Figure(StatisticsFlags, _spread, "How gates are spread, by slot, across seeds or methods."),
    "loads": Figure(LoadsFlags, _loads, "Loads of a mixture of experts, layer by expert, with balance and entropy."),
    "losses": Figure(LossesFlags, _losses, "Loss curves of runs."),
    "tradeoff": Figure(TradeoffFlags, _tradeoff, "Scores against trainable parameters, time and memory."),
    "cost": Figure(CostFlags, _cost, "Time, memory and time per answer of all methods."),
}


def main(argv: Sequence[str], prog: str) -> None:
    overview = __doc__ + f"\nThe flags of each: {prog} gates --help"
    word = cli.subcommand(argv, FIGURES, overview, where="the word behind `figures`")
    figure = FIGURES[word]
    flags = cli.parse(figure.flags, argv[1:], prog=f"{prog} {word}", description=figure.what)
    with cli.errors():
        from inspection.plots.style import save, styled

        with styled():
            written = save(figure.make(flags), flags.save_path)
        print("wrote " + " and ".join(map(str, written)))
