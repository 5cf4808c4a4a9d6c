"""Statistics of a model's routers: running sums over tokens, added up over processes, and the JSON that they become
(inspection/router_file.py describes it)."""

import math
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor, nn

from inspection.router_file import FORMAT, PARTS, VERSION
from inspection.router_recorder import RouterBatch, RouterRecorder, multi_expert_adapters
from moa.routers import SparseRouter

BINS = 50
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class RunningStats:
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

    def __add__(self, other: "RunningStats") -> "RunningStats":
        both = RunningStats(len(self.sum), self.sum.device)
        for total, a, b in zip(both.sums(), self.sums(), other.sums(), strict=True):
            total += a + b
        return both

    def moments(self) -> dict[str, Any]:
        """Count, means and standard deviations of the columns."""
        mean = self.sum / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        return {"count": int(self.count), "mean": mean.tolist(), "std": variance.sqrt().tolist()}

    def distribution(self) -> dict[str, list]:
        """Quantiles and histograms of the columns."""
        histograms = self.histogram.long().tolist()
        return {"quantiles": [quantiles(histogram) for histogram in histograms], "histogram": histograms}

    def usage(self) -> dict[str, Any]:
        """How many of the columns are above 0 in a token."""
        numbers = torch.arange(len(self.used), dtype=torch.float64, device=self.used.device)
        return {"mean": float(self.used @ numbers / self.count), "histogram": self.used.long().tolist()}

    def gate_stats(self) -> dict[str, Any]:
        active = (self.active / self.count).tolist()
        return self.moments() | {"active": active} | self.distribution() | {"used": self.usage()}

    def threshold_stats(self) -> dict[str, Any]:
        columns = self.moments() | self.distribution()
        return {name: values[0] for name, values in columns.items() if name != "count"}

    def expert_stats(self) -> dict[str, Any]:
        """Of experts' weights: their moments, loads, use, balance and entropy."""
        log_n, share = math.log(len(self.sum)), self.sum / self.sum.sum().clamp(min=1e-300)
        return self.moments() | {
            "load": (self.active / self.count).tolist(),
            "used": self.usage(),
            "balance": float(-torch.xlogy(share, share).sum()) / log_n,
            "entropy": float(self.entropy / self.count) / log_n,
        }


class RouterStatistics:
    """Statistics of the routers of `model`. `with statistics.recorder(): ...` adds what runs inside; then `reduce` adds
    up the data-parallel processes, and `result` is the JSON. ValueError for a model without a router."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.counts = torch.zeros(2, dtype=torch.float64, device=model.output.weight.device)
        config, routed = model.config, [block for block in model.layers if block.router is not None]
        self.gates = {block.layer: self._stats(len(config.slots(block.layer))) for block in routed}
        self.thresholds = {block.layer: self._stats(1) for block in routed if isinstance(block.router, SparseRouter)}
        adapters = multi_expert_adapters(model)
        self.experts = {(layer, slot): self._stats(config.experts.expert_num) for layer, slot, _ in adapters}
        if not self.gates and not self.experts:
            raise ValueError(f"a model with {config.method if config else 'no adapter'} has no router")

    def _stats(self, columns: int) -> tuple[RunningStats, RunningStats]:
        """Of the prompts' tokens and of the answers'."""
        return RunningStats(columns, self.counts.device), RunningStats(columns, self.counts.device)

    def _per_sequence(self, layer: int) -> bool:
        return self.model.layers[layer].router.per_sequence

    def recorder(self) -> RouterRecorder:
        return RouterRecorder(self.model, self.add)

    def add(self, batch: RouterBatch) -> None:
        gates = {layer: torch.cat(list(by_slot.values()), 1) for layer, by_slot in batch.gates.items()}
        per_token = [(self.gates[layer], values) for layer, values in gates.items() if not self._per_sequence(layer)]
        per_token += [(self.thresholds[layer], values) for layer, values in batch.thresholds.items()]
        per_token += [(self.experts[key], weights) for key, weights in batch.experts.items()]
        for i, mask in enumerate((~batch.is_answer, batch.is_answer)):
            self.counts[i] += mask.sum()
            for stats, values in per_token:
                assert len(values) == len(mask), (len(values), len(mask))
                stats[i].add(values[mask])
        for layer, values in gates.items():
            if self._per_sequence(layer):
                self.gates[layer][0].add(values)

    def reduce(self) -> None:
        """Add up the sums of all data-parallel processes. Each of them calls it once, also one that read nothing."""
        if mp.get_data_parallel_world_size() == 1:
            return
        groups = (self.gates, self.thresholds, self.experts)
        sums = [t for group in groups for pair in group.values() for stats in pair for t in stats.sums()]
        sums.append(self.counts)
        flat = torch.cat([total.flatten() for total in sums])
        dist.all_reduce(flat, group=mp.get_data_parallel_group())
        for total, reduced in zip(sums, flat.split([total.numel() for total in sums]), strict=True):
            total.copy_(reduced.view_as(total))

    def result(self, source: dict[str, Any]) -> dict[str, Any]:
        """The statistics as they are saved."""
        config, (prompt, answer) = self.model.config, map(int, self.counts)
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
            "experts": [
                {"layer": layer, "slot": slot, "experts": config.experts.expert_num}
                | {"parts": {part: total.expert_stats() for part, total in _parts(stats).items()}}
                for (layer, slot), stats in self.experts.items()
            ],
        }

    def _block(self, layer: int) -> dict[str, Any]:
        kept = ("all",) if self._per_sequence(layer) else PARTS
        parts = {part: total.gate_stats() for part, total in _parts(self.gates[layer]).items() if part in kept}
        for part, total in _parts(self.thresholds[layer]).items() if layer in self.thresholds else ():
            parts[part]["threshold"] = total.threshold_stats()
        slots = [slot.name for slot in self.model.config.slots(layer)]
        return {"layer": layer, "unit": "row" if self._per_sequence(layer) else "token", "slots": slots, "parts": parts}


def _parts(stats: tuple[RunningStats, RunningStats]) -> dict[str, RunningStats]:
    """The sums of all parts that have a token."""
    parts = zip(PARTS, [*stats, stats[0] + stats[1]], strict=True)
    return {part: total for part, total in parts if total.count}


def quantiles(histogram: list[int]) -> list[float]:
    """QUANTILES of values from 0 to 1 in equal bins, within which they are taken to lie evenly."""
    total, values = sum(histogram), []
    for q in QUANTILES:
        below = 0
        for i, count in enumerate(histogram):
            if count and below + count >= q * total:
                values.append((i + (q * total - below) / count) / len(histogram))
                break
            below += count
    return values
