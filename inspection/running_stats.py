"""Statistics of a model's routers: running sums over tokens, added up over processes, and the JSON they become.

    {"format": "moa-router-statistics", "version": 3, "method", "n_layers",
     "source": {...},                                  # what was read, and how; see inspection/router_stats.py
     "counts": {"prompt", "answer", "all"},            # tokens that went through the model
     "routers": [{"layer",
         "slot",                                       # of the adapter whose experts it weighs; null: of a block
         "names": [...],                               # of the n that it weighs: slots, or experts 0, 1, ...
         "unit": "token" | "row",                      # whether it runs once per token or once per row
         "parts": {PART: {"count", "mean" [n], "std" [n],
             "active" [n],                             # share of tokens with a weight above 0: an expert's load
             "histogram" [n x 50],                     # counts in equal bins from 0 to 1
             "entropy",                                # of experts: the mean entropy of a token's weights / ln n
             "balance",                                # of experts: the entropy of their mean weights / ln n, 1 if even
             "threshold": {"mean", "std"}}}}]}         # of a sparse router

PART is prompt, answer or all; parts without a token are left out, and a router that runs once per row has "all" alone.
A gate is the weight of its adapter: 0 where a sparse router's threshold is above it. Standard deviations divide by the
count. The outer bins also hold what lies beyond 0 and 1.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor

from inspection.router_recorder import RouterKey, record, routers_of
from llama import Llama
from moa.files import read_json

FORMAT, VERSION = "moa-router-statistics", 3
PARTS = ("prompt", "answer", "all")
BINS = 50


class RunningStats:
    """Sums over tokens of `columns` weights each, views of one float64 tensor, so that two can be added up at once."""

    def __init__(self, columns: int, device: torch.device):
        sizes = [1, 1, columns, columns, columns, columns * BINS]
        self.sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.count, self.entropy, self.sum, self.squares, self.active, bins = self.sums.split(sizes)
        self.histogram = bins.view(columns, BINS)

    def add(self, weights: Tensor) -> None:
        """weights (T, columns), not negative."""
        weights, columns = weights.double(), weights.shape[1]
        self.count += len(weights)
        self.entropy += torch.special.entr(weights).sum()
        self.sum += weights.sum(0)
        self.squares += weights.square().sum(0)
        self.active += (weights > 0).sum(0)
        bins = (weights * BINS).long().clamp_(0, BINS - 1) + BINS * torch.arange(columns, device=weights.device)
        self.histogram += torch.bincount(bins.flatten(), minlength=columns * BINS).view(columns, BINS)

    def __add__(self, other: "RunningStats") -> "RunningStats":
        both = RunningStats(len(self.sum), self.sum.device)
        both.sums += self.sums + other.sums
        return both

    def numbers(self, n: int, of_experts: bool) -> dict[str, Any]:
        """The numbers of the first n columns; a further one is a threshold's."""
        mean = self.sum / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        numbers = {"count": int(self.count), "mean": mean[:n].tolist(), "std": std[:n].tolist()}
        numbers |= {"active": (self.active / self.count)[:n].tolist(), "histogram": self.histogram[:n].long().tolist()}
        if of_experts:
            share = self.sum / self.sum.sum().clamp(min=1e-300)
            entropies = {"entropy": self.entropy / self.count, "balance": torch.special.entr(share).sum()}
            numbers |= {name: float(entropy) / math.log(n) for name, entropy in entropies.items()}
        if len(mean) > n:
            numbers["threshold"] = {"mean": float(mean[n]), "std": float(std[n])}
        return numbers


class RouterStatistics:
    """Statistics of the routers of a model. `read` adds rows; then `reduce` adds up the data-parallel processes, and
    `result` is the JSON. ValueError for a model without a router."""

    def __init__(self, llm: Llama):
        self.llm, self.routers, device = llm, routers_of(llm.model), llm.model.output.weight.device
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)
        # Of the prompts' tokens and of the answers'; of rows there are no parts
        self.stats = {
            key: [RunningStats(len(router.names) + router.is_sparse, device) for _ in range(2)]
            for key, router in self.routers.items()
        }

    def read(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        """Add the tokens of prompts and of their answers."""
        for is_answer, weights_of in record(self.llm, prompts, answers):
            self.counts += torch.stack([(~is_answer).sum(), is_answer.sum()])
            for key, weights in weights_of.items():
                of_prompt, of_answer = self.stats[key]
                if self.routers[key].module.per_sequence:
                    of_prompt.add(weights)
                else:
                    of_prompt.add(weights[~is_answer])
                    of_answer.add(weights[is_answer])

    def reduce(self) -> None:
        """Add up the sums of all data-parallel processes. Each of them calls it once, also one that read nothing."""
        if mp.get_data_parallel_world_size() > 1:
            for sums in (self.counts, *(stats.sums for pair in self.stats.values() for stats in pair)):
                dist.all_reduce(sums, group=mp.get_data_parallel_group())

    def result(self, source: dict[str, Any]) -> dict[str, Any]:
        """The statistics as they are saved."""
        config, (prompt, answer) = self.llm.model.config, map(int, self.counts)
        counts = dict(zip(PARTS, (prompt, answer, prompt + answer), strict=True))
        head = {"format": FORMAT, "version": VERSION, "method": config.method, "n_layers": config.n_layers}
        return head | {"source": source, "counts": counts, "routers": list(map(self._router, self.routers))}

    def _router(self, key: RouterKey) -> dict[str, Any]:
        (names, module), (prompt, answer) = self.routers[key], self.stats[key]
        by_row = module.per_sequence
        parts = {"all": prompt} if by_row else dict(zip(PARTS, (prompt, answer, prompt + answer), strict=True))
        numbers = {p: s.numbers(len(names), key.slot is not None) for p, s in parts.items() if s.count}
        unit = "row" if by_row else "token"
        return {"layer": key.layer, "slot": key.slot, "names": names, "unit": unit, "parts": numbers}


def read_statistics(path: Path) -> dict[str, Any]:
    """Statistics from a file. ValueError where it is of another format or version."""
    content = read_json(path)
    if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path}: not {FORMAT} of version {VERSION}, as `python -m inspection gates` writes them")
    return content
