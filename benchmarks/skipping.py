"""Does it pay to leave out the tokens whose gate is 0? A LoRA for all tokens against one for those that use it.

    python -m benchmarks.skipping [--width 576,4096] [--rank 8] [--tokens 704] [--repeats 20] [--json FILE]

Beside a square linear layer, forward and backward, bf16 where the hardware multiplies it. "all": as `moa/lora.py` does
it, gates of 0 included. The others take the rows with a gate above 0 out, and put their updates back in their places;
they get the rows' numbers for nothing, where a router would have to make them (and a GPU to wait for them). Medians of
the ratios to "all", by the share of tokens that use the adapter.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.flags import Timed, numbers_of, require_positive
from benchmarks.measure import CPU, figure, in_turn, ratio, table
from cli import cli_errors, flag, parse
from llama.distributed import bf16_is_fast
from moa.files import write_json

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Flags(Timed):
    width: str = flag("576,4096", help="widths of the layer, with commas")
    rank: int = flag(8, help="rank of the LoRA")
    tokens: int = flag(704, help="tokens")
    repeats: int = flag(20, help="times that each is measured")

    def __post_init__(self):
        require_positive(self, "rank", "tokens", "repeats", "threads")
        numbers_of("width", self.width)


def for_all(output: Tensor, u: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """u, output (N, D), a (r, D), b (r, D), gate (N, 1)."""
    return output.addmm_(F.linear(u, a) * gate, b)


def for_some(output: Tensor, u: Tensor, a: Tensor, b: Tensor, gate: Tensor, chosen: Tensor) -> Tensor:
    """The same for the rows that `chosen` numbers."""
    return output.index_add_(0, chosen, (F.linear(u[chosen], a) * gate[chosen]) @ b)


def works(width: int, rank: int, n: int, dtype: torch.dtype) -> dict[str, Callable[[object], object]]:
    """By name: one forward and backward pass each."""
    made = torch.Generator().manual_seed(0)
    u, upstream = (torch.randn(n, width, generator=made).to(dtype) for _ in range(2))
    a, b = (torch.randn(rank, width, generator=made).to(dtype).requires_grad_() for _ in range(2))
    u.requires_grad_()

    def work(share: float | None) -> Callable[[object], object]:
        used = torch.rand(n, generator=made) < (1.0 if share is None else share)
        gate = (used.float()[:, None] * 0.9).to(dtype).requires_grad_()
        chosen = used.nonzero().squeeze(1)

        def step(_: object) -> None:
            output = torch.zeros_like(u)
            done = for_all(output, u, a, b, gate) if share is None else for_some(output, u, a, b, gate, chosen)
            torch.autograd.grad(done, [u, a, b, gate], upstream)

        return step

    return {"all": work(None)} | {f"{share:.0%}": work(share) for share in SHARES}


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.skipping", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        dtype = torch.bfloat16 if bf16_is_fast(CPU) else torch.float32
        found, rows = {}, []
        for width in numbers_of("width", flags.width):
            kinds = works(width, flags.rank, flags.tokens, dtype)
            in_turn(kinds, range(2))  # the first passes are slower
            seconds = found[width] = in_turn(kinds, range(flags.repeats))
            ratios = [ratio(seconds[kind], seconds["all"]) for kind in kinds if kind != "all"]
            rows.append([f"{width:,}", *map(figure, ratios)])
        print(f"{flags.tokens} tokens, rank {flags.rank}, {dtype}, {flags.threads} threads; x the time for all\n")
        print(table(["width", *(f"{share:.0%} of the tokens" for share in SHARES)], rows))
        if flags.json:
            write_json(Path(flags.json), {"tokens": flags.tokens, "rank": flags.rank, "seconds": found})


if __name__ == "__main__":
    main(sys.argv[1:])
