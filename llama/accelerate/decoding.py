"""Decode steps on cached weights: what is derived from weights is kept while they stay as they are."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

from llama.accelerate.cuda_graphs import CUDAGraphRunner
from llama.accelerate.forwards import install
from llama.accelerate.fused_decode import FusedDecode, is_known
from llama.accelerate.prepack import DECODE_MAX_TOKENS, WeightCache
from llama.engine import DecodeStep, decode
from llama.machine import free_memory
from llama.model import Transformer
from moa.parallel import mp_size

PREPACK_FROM = 32  # decode steps that make up for prepacking
PREPACK_MEMORY = 4  # free memory must be this many times the size of the weights


class FastDecoding:
    """For the runs of generation of one model, whose forwards it replaces (`accelerate_model`).

    cuda_graphs: decode steps are recorded and replayed. flash: attention by flash-attn 2.

    On a CPU derived weights last from run to run, until a weight changes. On a GPU, and under model parallelism, they
    last for one run.
    """

    def __init__(
        self,
        model: Transformer,
        cuda_graphs: bool = False,
        flash: bool = False,
        prepack_from: int = PREPACK_FROM,
        decode_max_tokens: int = DECODE_MAX_TOKENS,
        compile: bool = False,
    ):
        self._model, self._cuda_graphs, self._prepack_from = model, cuda_graphs, prepack_from
        self._compile = compile
        self._cache, self._versions = WeightCache(decode_max_tokens), None
        self._on_gpu = model.output.weight.device.type == "cuda"
        install(model, self._cache, flash)

    @contextmanager
    def running(self, steps: int, hooked: bool) -> Iterator[DecodeStep]:
        """A run of generation of so many decode steps, while no weight changes -> its decode step.

        hooked: modules have hooks, which a recorded step would not call.
        """
        cache = self._cache
        versions = self._weight_versions()
        if versions is None or versions != self._versions:
            cache.entries, cache.prepack = {}, False
        self._versions = versions
        cache.prepack = cache.prepack or self._prepack_pays(steps)
        cache.frozen = True
        fused = (cache.prepack or self._on_gpu) and not hooked and is_known(self._model)
        try:
            if fused:
                with torch.inference_mode():
                    self._model.decode = cache.get(self._model, "decode", self._fused_decode)
            yield CUDAGraphRunner().decode if self._cuda_graphs and not hooked else decode
        finally:
            cache.frozen = False
            self._model.__dict__.pop("decode", None)
            if versions is None:
                cache.entries, cache.prepack = {}, False

    def _fused_decode(self) -> FusedDecode:
        if not self._compile:
            return FusedDecode(self._model, self._cache)
        from llama.accelerate.compile import CompiledDecode  # takes seconds to load

        return CompiledDecode(self._model, self._cache)

    def _prepack_pays(self, steps: int) -> bool:
        weights = [p for p in self._model.parameters() if not p.requires_grad]
        if weights[0].device.type != "cpu" or steps < self._prepack_from or mp_size() > 1:
            return False
        free = free_memory(weights[0].device)
        return free is not None and PREPACK_MEMORY * sum(p.numel() * p.element_size() for p in weights) <= free

    def _weight_versions(self) -> list[Hashable] | None:
        """Address, version and sum of each weight, for writes through `.data` count no version; scales of adapters."""
        if self._model.output.weight.device.type != "cpu" or mp_size() > 1:
            return None
        return [
            (w.data_ptr(), 0 if w.is_inference() else w._version, w.detach().sum(dtype=torch.float32).item())
            for w in self._model.parameters()
        ] + [getattr(module, "scale", None) for module in self._model.modules()]
