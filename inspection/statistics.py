"""Statistics of a model's routers: sums over tokens, added up over processes, and the JSON that they become.

    {"format": "moa-router-statistics", "version": 1,
     "method", "block_router", "expert_router" (null where there is one expert), "n_layers",
     "source": {...},                                  # what was read, and how; see inspection/gates.py
     "bins": 50,                                       # histograms: as many equal bins from 0 to 1
     "counts": {"prompt", "answer", "all"},            # tokens that went through the model
     "blocks": [{"layer", "unit": "token" | "row", "slots": [n names], "parts": {PART: {
         "count",                                      # tokens; rows where the router is asked once per row
         "mean": [n], "std": [n], "active": [n],       # of the gates; active: share of gates above 0
         "quantiles": [n x 5], "histogram": [n x 50],  # 5, 25, 50, 75 and 95 %, read off the histogram
         "used": {"mean", "histogram": [n + 1]},       # adapters with a gate above 0, per token
         "threshold": {"mean", "std", "quantiles", "histogram"}}}}],      # sparse routers alone
     "experts": [{"layer", "slot", "experts": E, "parts": {PART: {
         "count", "mean": [E], "std": [E],             # of the experts' weights
         "load": [E],                                  # share of tokens that chose an expert: weight above 0
         "used": {"mean", "histogram": [E + 1]},       # experts that a token chose
         "balance",                                    # entropy of the mean weights / ln E: 1 even, 0 all on one expert
         "entropy"}}}]}                                # mean over tokens of their own weights' entropy / ln E

PART is prompt, answer or all; parts without a token are left out. Where a router is asked once per row, its gates hold
for all the row's tokens: they are counted once per row, and "all" is the only part. A gate is what weighs its adapter:
0 where a sparse router's threshold is above it. Spreads are those of the whole (divided by the count). The outer bins
also hold what lies beyond 0 and 1.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor, nn

from inspection.hooks import Batch, Recorder, mixtures
from moa.files import read_json
from moa.reading import short_repr

FORMAT, VERSION = "moa-router-statistics", 1
BINS = 50
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PARTS = ("prompt", "answer", "all")


class Tally:
    """Sums over tokens of `columns` numbers each. All sums are float64, so that they can be added up in one message."""

    def __init__(self, columns: int, device: torch.device):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.sum, self.squares, self.active = zeros(1), zeros(columns), zeros(columns), zeros(columns)
        self.histogram, self.used, self.entropy = zeros(columns, BINS), zeros(columns + 1), zeros(1)

    def sums(self) -> list[Tensor]:
        return [self.count, self.sum, self.squares, self.active, self.histogram, self.used, self.entropy]

    def add(self, values: Tensor) -> None:
        """values (T, columns), not negative."""
        values = values.double()
        columns, active = values.shape[1], values > 0
        self.count += len(values)
        self.sum += values.sum(0)
        self.squares += values.square().sum(0)
        self.active += active.sum(0)
        self.used += torch.bincount(active.sum(1), minlength=columns + 1)
        bins = (values * BINS).long().clamp_(0, BINS - 1) + BINS * torch.arange(columns, device=values.device)
        self.histogram += torch.bincount(bins.flatten(), minlength=columns * BINS).view(columns, BINS)
        self.entropy -= torch.xlogy(values, values).sum()

    def plus(self, other: "Tally") -> "Tally":
        both = Tally(len(self.sum), self.sum.device)
        for total, mine, theirs in zip(both.sums(), self.sums(), other.sums(), strict=True):
            total += mine + theirs
        return both

    def spread(self) -> dict[str, list]:
        """Count, means and standard deviations of the columns."""
        mean = self.sum / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        return {"count": int(self.count), "mean": mean.tolist(), "std": variance.sqrt().tolist()}

    def shape(self) -> dict[str, list]:
        """Quantiles and histograms of the columns."""
        histograms = self.histogram.long().tolist()
        return {"quantiles": [quantiles(one) for one in histograms], "histogram": histograms}

    def chosen(self) -> dict[str, Any]:
        """How many of the columns are above 0 in a token."""
        numbers = torch.arange(len(self.used), dtype=torch.float64, device=self.used.device)
        return {"mean": float(self.used @ numbers / self.count), "histogram": self.used.long().tolist()}


class Statistics:
    """Of the routers of `model`. `with statistics.recorder(): ...` adds what runs inside; then `reduce` adds up the
    data-parallel processes', and `result` is the JSON. ValueError for a model without a router."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.counts = torch.zeros(2, dtype=torch.float64, device=model.output.weight.device)
        self.gates: dict[int, list[Tally]] = {}
        self.limits: dict[int, list[Tally]] = {}
        self.experts = {place[:2]: self._tallies(model.config.experts.expert_num) for place in mixtures(model)}
        for block in model.layers:
            if block.router is not None:
                self.gates[block.layer] = self._tallies(len(model.config.slots(block.layer)))
                if hasattr(block.router, "limit"):
                    self.limits[block.layer] = self._tallies(1)
        if not self.gates and not self.experts:
            method = model.config.method if model.config else "no adapter"
            raise ValueError(f"a model with {method} has no router: there is nothing to count")

    def _tallies(self, columns: int) -> list[Tally]:
        """One for the prompts' tokens, one for the answers'."""
        return [Tally(columns, self.counts.device) for _ in range(2)]

    def recorder(self) -> Recorder:
        return Recorder(self.model, self.add)

    def add(self, batch: Batch) -> None:
        for answer, mask in enumerate((~batch.answer, batch.answer)):
            self.counts[answer] += mask.sum()
            for tallies, values in self._values(batch):
                assert len(values) == len(mask), (len(values), len(mask))
                tallies[answer].add(values[mask])
        for layer, gates in batch.gates.items():
            if self.model.layers[layer].router.per_row:
                self.gates[layer][0].add(torch.cat(list(gates.values()), 1))

    def _values(self, batch: Batch) -> list[tuple[list[Tally], Tensor]]:
        """What there is one of per token: tallies, and the values that belong there."""
        per_token = [layer for layer in batch.gates if not self.model.layers[layer].router.per_row]
        found = [(self.gates[layer], torch.cat(list(batch.gates[layer].values()), 1)) for layer in per_token]
        found += [(self.limits[layer], limits) for layer, limits in batch.limits.items()]
        found += [(self.experts[place], weights) for place, weights in batch.experts.items()]
        return found

    def reduce(self) -> None:
        """Add up the sums of all data-parallel processes. To be called once, by each of them, also by one that had
        nothing to read."""
        tallies = [
            tally for group in (self.gates, self.limits, self.experts) for two in group.values() for tally in two
        ]
        sums = [self.counts, *(one for tally in tallies for one in tally.sums())]
        if mp.get_data_parallel_world_size() > 1:
            flat = torch.cat([one.flatten() for one in sums])
            dist.all_reduce(flat, group=mp.get_data_parallel_group())
            for one, total in zip(sums, flat.split([one.numel() for one in sums]), strict=True):
                one.copy_(total.view_as(one))

    def result(self, source: dict[str, Any]) -> dict[str, Any]:
        """The statistics as they are saved."""
        config = self.model.config
        prompt, answer = (int(count) for count in self.counts)
        return {
            "format": FORMAT,
            "version": VERSION,
            "method": config.method,
            "block_router": config.router.block_router,
            "expert_router": config.experts.expert_router if config.experts.expert_num > 1 else None,
            "n_layers": config.n_layers,
            "source": source,
            "bins": BINS,
            "counts": {"prompt": prompt, "answer": answer, "all": prompt + answer},
            "blocks": [self._block(layer) for layer in sorted(self.gates)],
            "experts": [self._mixture(*place) for place in self.experts],
        }

    def _block(self, layer: int) -> dict[str, Any]:
        per_row, parts = self.model.layers[layer].router.per_row, {}
        for part, tally in _parts(self.gates[layer], per_row):
            active = (tally.active / tally.count).tolist()
            parts[part] = tally.spread() | {"active": active} | tally.shape() | {"used": tally.chosen()}
        for part, tally in _parts(self.limits[layer], per_row) if layer in self.limits else []:
            limit = tally.spread() | tally.shape()
            parts[part]["threshold"] = {name: values[0] for name, values in limit.items() if name != "count"}
        slots = [slot.name for slot in self.model.config.slots(layer)]
        return {"layer": layer, "unit": "row" if per_row else "token", "slots": slots, "parts": parts}

    def _mixture(self, layer: int, slot: str) -> dict[str, Any]:
        parts, n = {}, self.model.config.experts.expert_num
        for part, tally in _parts(self.experts[layer, slot]):
            load, share = (tally.active / tally.count).tolist(), tally.sum / tally.sum.sum().clamp(min=1e-300)
            balance = float(-torch.xlogy(share, share).sum()) / math.log(n)
            entropy = float(tally.entropy / tally.count) / math.log(n)
            own = {"load": load, "used": tally.chosen(), "balance": balance, "entropy": entropy}
            parts[part] = tally.spread() | own
        return {"layer": layer, "slot": slot, "experts": n, "parts": parts}


def _parts(tallies: list[Tally], only_all: bool = False) -> list[tuple[str, Tally]]:
    """The tallies of all parts that have a token."""
    found = zip(PARTS, [*tallies, tallies[0].plus(tallies[1])], strict=True)
    return [(part, tally) for part, tally in found if tally.count and (part == "all" or not only_all)]


def quantiles(histogram: list[int]) -> list[float]:
    """QUANTILES of values from 0 to 1 in equal bins; within a bin they are taken to lie evenly."""
    total, found = sum(histogram), []
    for q in QUANTILES:
        below = 0
        for i, count in enumerate(histogram):
            if count and below + count >= q * total:
                found.append((i + (q * total - below) / count) / len(histogram))
                break
            below += count
    return found


def read_statistics(path: str | Path) -> dict[str, Any]:
    """Statistics that were saved. ValueError naming the file and what it is instead."""
    value = read_json(Path(path))
    if value.get("format") != FORMAT:
        raise ValueError(f"{path}: not router statistics as `python -m inspection gates` writes them")
    if value.get("version") != VERSION:
        raise ValueError(f"{path}: statistics of version {short_repr(value.get('version'))}, expected {VERSION}")
    for name, kind in (("blocks", list), ("experts", list), ("source", dict), ("counts", dict)):
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{path}: field {name!r} is missing or no {kind.__name__}")
    return value
