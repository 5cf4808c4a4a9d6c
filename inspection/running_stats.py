"""Statistics of a model's routers: running sums over tokens, added up over processes, and the JSON that they become
(inspection/router_file.py describes it)."""

import math
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor, nn

from inspection.router_file import FORMAT, PARTS, VERSION
from inspection.router_recorder import RouterBatch, RouterKey, RouterRecorder, multi_expert_adapters
from moa.routers import SparseRouter

BINS = 50
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class RunningStats:
    """Sums over tokens of `columns` numbers each, views of one float64 tensor, so that two can be added up at once."""

    def __init__(self, columns: int, device: torch.device):
        sizes = [1, 1, columns, columns, columns, columns + 1, columns * BINS]
        self.sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.count, self.entropy, self.sum, self.squares, self.active, self.used, bins = self.sums.split(sizes)
        self.histogram = bins.view(columns, BINS)

    def add(self, values: Tensor) -> None:
        """values (T, columns), not negative."""
        values = values.double()
        columns, active = values.shape[1], values > 0
        self.count += len(values)
        self.entropy += torch.special.entr(values).sum()
        self.sum += values.sum(0)
        self.squares += values.square().sum(0)
        self.active += active.sum(0)
        self.used += torch.bincount(active.sum(1), minlength=columns + 1)
        bins = (values * BINS).long().clamp_(0, BINS - 1) + BINS * torch.arange(columns, device=values.device)
        self.histogram += torch.bincount(bins.flatten(), minlength=columns * BINS).view(columns, BINS)

    def __add__(self, other: "RunningStats") -> "RunningStats":
        both = RunningStats(len(self.sum), self.sum.device)
        both.sums += self.sums + other.sums
        return both

    def numbers(self) -> dict[str, Any]:
        mean = self.sum / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return {
            "count": int(self.count),
            "mean": mean.tolist(),
            "std": std.tolist(),
            "active": (self.active / self.count).tolist(),
            "quantiles": quantiles(self.histogram).tolist(),
            "histogram": self.histogram.long().tolist(),
            "used": {"mean": float(self.active.sum() / self.count), "histogram": self.used.long().tolist()},
        }

    def evenness(self) -> dict[str, float]:
        """Of experts' weights: the entropy of their means, and the mean of the tokens' entropies, from 0 to 1."""
        share, log_n = self.sum / self.sum.sum().clamp(min=1e-300), math.log(len(self.sum))
        entropies = {"balance": torch.special.entr(share).sum(), "entropy": self.entropy / self.count}
        return {name: float(entropy) / log_n for name, entropy in entropies.items()}


class RouterStatistics:
    """Statistics of the routers of `model`. `with statistics.recorder(): ...` adds what runs inside; then `reduce` adds
    up the data-parallel processes, and `result` is the JSON. ValueError for a model without a router."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.counts = torch.zeros(2, dtype=torch.float64, device=model.output.weight.device)
        columns: dict[RouterKey, int] = {}
        for block in model.layers:
            if block.router is not None:
                columns[RouterKey("gates", block.layer)] = len(model.config.slots(block.layer))
            if isinstance(block.router, SparseRouter):
                columns[RouterKey("threshold", block.layer)] = 1
        for layer, slot, adapter in multi_expert_adapters(model):
            columns[RouterKey("experts", layer, slot)] = len(adapter.expert_router.proj.weight)
        if not columns:
            raise ValueError(f"a model with {model.config.method if model.config else 'no adapter'} has no router")
        # Of the prompts' tokens and of the answers'
        self.stats = {key: [RunningStats(n, self.counts.device) for _ in range(2)] for key, n in columns.items()}

    def _per_sequence(self, key: RouterKey) -> bool:
        return key.kind == "gates" and self.model.layers[key.layer].router.per_sequence

    def recorder(self) -> RouterRecorder:
        return RouterRecorder(self.model, self.add)

    def add(self, batch: RouterBatch) -> None:
        self.counts += torch.stack([(~batch.is_answer).sum(), batch.is_answer.sum()])
        for key, values in batch.values.items():
            prompt, answer = self.stats[key]
            if self._per_sequence(key):
                prompt.add(values)
            else:
                prompt.add(values[~batch.is_answer])
                answer.add(values[batch.is_answer])

    def reduce(self) -> None:
        """Add up the sums of all data-parallel processes. Each of them calls it once, also one that read nothing."""
        if mp.get_data_parallel_world_size() > 1:
            for sums in (self.counts, *(stats.sums for pair in self.stats.values() for stats in pair)):
                dist.all_reduce(sums, group=mp.get_data_parallel_group())

    def result(self, source: dict[str, Any]) -> dict[str, Any]:
        """The statistics as they are saved."""
        config, (prompt, answer) = self.model.config, map(int, self.counts)
        several = config.expert_num > 1
        return {
            "format": FORMAT,
            "version": VERSION,
            "method": config.method,
            "block_router": config.block_router,
            "expert_router": config.expert_router if several else None,
            "n_layers": config.n_layers,
            "source": source,
            "bins": BINS,
            "counts": {"prompt": prompt, "answer": answer, "all": prompt + answer},
            "blocks": [self._block(key) for key in self.stats if key.kind == "gates"],
            "experts": [
                {"layer": key.layer, "slot": key.slot, "experts": len(self.stats[key][0].sum)}
                | {"parts": {part: s.numbers() | s.evenness() for part, s in self._parts(key).items()}}
                for key in self.stats
                if key.kind == "experts"
            ],
        }

    def _block(self, key: RouterKey) -> dict[str, Any]:
        parts = {part: stats.numbers() for part, stats in self._parts(key).items()}
        thresholds = key._replace(kind="threshold")
        for part, stats in self._parts(thresholds).items() if thresholds in self.stats else ():
            parts[part]["threshold"] = stats.numbers()
        unit, slots = "row" if self._per_sequence(key) else "token", self.model.config.slots(key.layer)
        return {"layer": key.layer, "unit": unit, "slots": [slot.name for slot in slots], "parts": parts}

    def _parts(self, key: RouterKey) -> dict[str, RunningStats]:
        """The sums of all parts that have a token; of rows there is one part."""
        prompt, answer = self.stats[key]
        if self._per_sequence(key):
            return {"all": prompt}
        parts = zip(PARTS, (prompt, answer, prompt + answer), strict=True)
        return {part: stats for part, stats in parts if stats.count}


def quantiles(histograms: Tensor) -> Tensor:
    """QUANTILES (columns, 5) of values from 0 to 1 in equal bins (columns, n), within which they are taken to lie
    evenly."""
    up_to = histograms.cumsum(1)
    wanted = up_to[:, -1:] * torch.tensor(QUANTILES, dtype=up_to.dtype, device=up_to.device)
    bins = torch.searchsorted(up_to, wanted)
    above = (up_to.gather(1, bins) - wanted) / histograms.gather(1, bins)
    return (bins + 1 - above) / histograms.shape[1]
