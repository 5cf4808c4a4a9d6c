"""The file of router statistics that `python -m inspection gates` writes.

    {"format": "moa-router-statistics", "version": 2,
     "method", "block_router", "expert_router" (null where there is one expert), "n_layers",
     "source": {...},                                  # what was read, and how; see inspection/router_stats.py
     "bins": 50,                                       # histograms: equal bins from 0 to 1
     "counts": {"prompt", "answer", "all"},            # tokens that went through the model
     "blocks": [{"layer", "unit": "token" | "row", "slots": [n names],
                 "parts": {PART: {NUMBERS of the n gates, "threshold": {NUMBERS of 1; sparse routers only}}}}],
     "experts": [{"layer", "slot", "experts": n, "parts": {PART: {NUMBERS of the n experts' weights,
         "balance",                                    # entropy of the mean weights / ln n: 1 even, 0 all on one expert
         "entropy"}}}]}                                # mean over tokens of the entropy of their weights / ln n

NUMBERS: "count" of tokens (of rows where the router runs once per row), "mean" [n], "std" [n], "active" [n] (share
above 0: of experts their load), "quantiles" [n x 5] (5, 25, 50, 75 and 95 %, read off the histogram), "histogram"
[n x 50], "used": {"mean", "histogram" [n + 1]} (how many of the n are above 0).
PART is prompt, answer or all; parts without a token are left out. A router that runs once per row counts once per row,
and has the part "all" only. A gate is the weight of its adapter: 0 where a sparse router's threshold is above it.
Standard deviations divide by the count. The outer bins also hold what lies beyond 0 and 1.
"""

from pathlib import Path
from typing import Any

import numpy as np

from inspection.runs import expecting
from moa.reading import parse_json, read_text

FORMAT, VERSION = "moa-router-statistics", 2
PARTS = ("prompt", "answer", "all")


def read_statistics(path: Path) -> dict[str, Any]:
    """Statistics from a file. ValueError naming the file and what is wrong with it."""
    content = parse_json(read_text(path), str(path))
    with expecting(path, "router statistics as `python -m inspection gates` writes them"):
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{content['format']} of version {content['version']}, not {FORMAT} of version {VERSION}")
        _check(content)
    return content


def _check(content: dict[str, Any]) -> None:
    """Raise unless figures and tables can use the content."""
    content["source"].items(), content["counts"].items()
    for entry in (*content["blocks"], *content["experts"]):
        if entry["layer"] not in range(content["n_layers"]) or "all" not in entry["parts"]:
            raise ValueError(f"layer {entry['layer']} of {content['n_layers']}, or its parts")
        n = len(entry["slots"]) if "slots" in entry else entry["experts"]
        for part in entry["parts"].values():
            for numbers, size in ((part, n), (part.get("threshold"), 1)):
                if numbers is not None:
                    _require([numbers[name] for name in ("mean", "std", "active")], 3, size)
                    _require(numbers["quantiles"], size, 5)
                    _require(numbers["histogram"], size, content["bins"])
                    _require([numbers["used"]["mean"], numbers["count"]], 2)
            if "experts" in entry:
                _require([part["balance"], part["entropy"]], 2)


def _require(numbers: Any, *shape: int) -> None:
    array = np.array(numbers, dtype=float)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"expected {shape} numbers")


def part_of(block: dict[str, Any], part: str) -> dict[str, Any]:
    """A block's numbers for a part of the tokens; those of the rows where the router runs once per row."""
    return block["parts"]["all" if block["unit"] == "row" else part]


def slots_of(*files: dict[str, Any]) -> list[str]:
    """All slots of statistics, in the order of the layer that has most of them and then as they come."""
    blocks = [block for file in files for block in sorted(file["blocks"], key=lambda block: -len(block["slots"]))]
    return list(dict.fromkeys(slot for block in blocks for slot in block["slots"]))


def mean_gates(statistics: dict[str, Any], part: str, slots: list[str], n_layers: int) -> np.ndarray:
    """Mean gates (n_layers, slots), NaN where a layer has no such slot."""
    gates = np.full((n_layers, len(slots)), np.nan)
    for block in statistics["blocks"]:
        gates[block["layer"], [slots.index(slot) for slot in block["slots"]]] = part_of(block, part)["mean"]
    return gates
