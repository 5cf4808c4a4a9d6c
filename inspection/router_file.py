"""The file of router statistics that `python -m inspection gates` writes.

    {"format": "moa-router-statistics", "version": 1,
     "method", "block_router", "expert_router" (null where there is one expert), "n_layers",
     "source": {...},                                  # what was read, and how; see inspection/router_stats.py
     "bins": 50,                                       # histograms: equal bins from 0 to 1
     "counts": {"prompt", "answer", "all"},            # tokens that went through the model
     "blocks": [{"layer", "unit": "token" | "row", "slots": [n names], "parts": {PART: {
         "count",                                      # tokens; rows where the router runs once per row
         "mean": [n], "std": [n], "active": [n],       # of the gates; active: share of gates above 0
         "quantiles": [n x 5], "histogram": [n x 50],  # 5, 25, 50, 75 and 95 %, read off the histogram
         "used": {"mean", "histogram": [n + 1]},       # adapters with a gate above 0, per token
         "threshold": {"mean", "std", "quantiles", "histogram"}}}}],      # sparse routers only
     "experts": [{"layer", "slot", "experts": E, "parts": {PART: {
         "count", "mean": [E], "std": [E],             # of the experts' weights
         "load": [E],                                  # share of tokens that chose an expert: weight above 0
         "used": {"mean", "histogram": [E + 1]},       # experts that a token chose
         "balance",                                    # entropy of the mean weights / ln E: 1 even, 0 all on one expert
         "entropy"}}}]}                                # mean over tokens of the entropy of their weights / ln E

PART is prompt, answer or all; parts without a token are left out. A router that runs once per row counts once per row,
and has the part "all" only. A gate is the weight of its adapter: 0 where a sparse router's threshold is above it.
Standard deviations divide by the count. The outer bins also hold what lies beyond 0 and 1.
"""

import json
from pathlib import Path
from typing import Any

from inspection.runs import is_number

FORMAT, VERSION = "moa-router-statistics", 1
PARTS = ("prompt", "answer", "all")


def read_statistics(path: str | Path) -> dict[str, Any]:
    """Statistics from a file. ValueError naming the file and what is wrong with it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not router statistics as `python -m inspection gates` writes them")
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: statistics of version {content.get('version')!r:.40}, expected {VERSION}")
    try:
        _check(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: damaged router statistics ({type(error).__name__}: {error!s:.200})") from None
    return content


def _check(content: dict[str, Any]) -> None:
    """Raise KeyError, TypeError, AttributeError or ValueError unless figures and tables can use the content."""
    content["source"].items(), content["counts"].items()
    layers, bins = range(content["n_layers"]), content["bins"]
    for block in content["blocks"]:
        for part in block["parts"].values():
            n = len(block["slots"])
            for name in ("mean", "std", "active"):
                _check_numbers(name, part[name], n)
            _check_numbers("histogram", [count for slot in part["histogram"] for count in slot], n * bins)
            _check_numbers("used and count", [part["used"]["mean"], part["count"]], 2)
            if "threshold" in part:
                _check_numbers("threshold", [part["threshold"]["mean"], *part["threshold"]["quantiles"]], 6)
    for mixture in content["experts"]:
        for part in mixture["parts"].values():
            for name in ("mean", "load"):
                _check_numbers(name, part[name], mixture["experts"])
            _check_numbers("used, balance and entropy", [part["used"]["mean"], part["balance"], part["entropy"]], 3)
    for entry in (*content["blocks"], *content["experts"]):
        if entry["layer"] not in layers or "all" not in entry["parts"] or not set(entry["parts"]) <= set(PARTS):
            raise ValueError(f"layer {entry['layer']!r:.20} of {len(layers)}, or its parts")


def _check_numbers(name: str, values: list[Any], count: int) -> None:
    if len(values) != count or not all(map(is_number, values)):
        raise ValueError(f"{name}: expected {count} numbers")


def part_of(block: dict[str, Any], part: str) -> dict[str, Any]:
    """A block's numbers for a part of the tokens; those of the rows where the router runs once per row."""
    return block["parts"]["all" if block["unit"] == "row" else part]


def slots_of(statistics: dict[str, Any]) -> list[str]:
    """All slots, in the order of the layer that has most of them and then as they come."""
    blocks = sorted(statistics["blocks"], key=lambda block: -len(block["slots"]))
    return list(dict.fromkeys(slot for block in blocks for slot in block["slots"]))
