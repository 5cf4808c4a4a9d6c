"""What this machine can do, measured in the same run as what is held against it."""

from typing import NamedTuple

import torch

from benchmarks.measure import CPU, timed
from llama.distributed import bf16_is_fast


class Machine(NamedTuple):
    """What a machine can do: FLOP/s of large products by type, and bytes/s to and from memory."""

    flops: dict[str, float]
    bandwidth: float

    def __str__(self) -> str:
        rates = ", ".join(f"{name} products {rate / 1e12:,.3g} TFLOP/s" for name, rate in self.flops.items())
        return f"this machine: {rates}; memory {self.bandwidth / 1e9:,.3g} GB/s"


def measure_machine(device: torch.device = CPU, repeats: int = 10) -> Machine:
    """The best of several tries, of which the first still wake the processors: square products, and copies (counted as
    read and written) or sums (as read)."""
    gpu = device.type == "cuda"
    dtypes = [torch.float32] + ([torch.bfloat16] if bf16_is_fast(device) else [])
    flops = {}
    for dtype in dtypes:
        best = 0.0
        for size in (4096, 8192) if gpu else (1024, 2048):
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            best = max(best, *(2 * size**3 / timed(lambda a=a, b=b: a @ b, device)[0] for _ in range(repeats)))
        flops[str(dtype).removeprefix("torch.")] = best
    x = torch.zeros(2**28 if gpu else 2**26, device=device)  # 1 GiB or 256 MiB: no cache holds it
    y = torch.empty_like(x)
    copies = [2 * x.nbytes / timed(lambda: y.copy_(x), device)[0] for _ in range(repeats)]
    sums = [x.nbytes / timed(x.sum, device)[0] for _ in range(repeats)]
    return Machine(flops, max(*copies, *sums))
