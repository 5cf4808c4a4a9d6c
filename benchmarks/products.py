"""Products of a decode step's few rows with a frozen matrix: by the weight as it is, and by a copy.

    python -m benchmarks.products [--shapes 3072x576,576x1536,49152x576] [--rows 1,4,16,256] [--repeats 5] [--json FILE]

"plain": `F.linear`, as transformers has it. "frozen": as layers do it where there are no copies, few rows' float32
products with the weight in front. "copy": as generation does it (`llama/copies.py`). In bf16 where the hardware
multiplies it, else in float32, of numbers that bf16 holds. Every product reads another matrix, 64 MB of them or 100,
as a step's layers do; milliseconds of one, medians, and x plain. "made": milliseconds for making a copy, on one thread.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.flags import Timed, numbers_of, require_positive
from benchmarks.measure import CPU, figure, in_turn, ratio, table, timed
from cli import cli_errors, flag, parse
from llama.copies import frozen_product, product_of_copy
from llama.distributed import bf16_is_fast
from moa.files import write_json

READ = 64 * 2**20  # bytes, more than caches hold
MOST = 100  # matrices


@dataclass(frozen=True)
class Flags(Timed):
    shapes: str = flag("3072x576,576x1536,49152x576", help="matrices, outputs x inputs, with commas")
    rows: str = flag("1,4,16,256", help="rows, with commas")
    repeats: int = flag(5, help="times that each is measured")

    def __post_init__(self):
        require_positive(self, "repeats", "threads")
        numbers_of("rows", self.rows)
        numbers_of("shapes", self.shapes.replace("x", ","))
        if any(shape.count("x") != 1 for shape in self.shapes.split(",")):
            raise ValueError(f"--shapes: {self.shapes!r} are no OUTPUTSxINPUTS with commas between them")


def all_of(products: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], None]:
    def run(x: Tensor) -> None:
        for product in products:
            product(x)

    return run


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.products", description=__doc__)
    with cli_errors(), torch.inference_mode():
        torch.set_num_threads(flags.threads)
        dtype = torch.bfloat16 if bf16_is_fast(CPU) else torch.float32
        found, rows = {}, []
        for shape in flags.shapes.split(","):
            k, width = map(int, shape.split("x"))
            n = min(MOST, max(2, READ // (k * width * dtype.itemsize)))
            weights = [torch.randn(k, width).bfloat16().to(dtype) for _ in range(n)]
            making, copies = timed(lambda ws=weights: [product_of_copy([weight], dtype) for weight in ws])
            ways = {
                "plain": all_of([partial(F.linear, weight=weight) for weight in weights]),
                "frozen": all_of([partial(frozen_product, weight=weight) for weight in weights]),
                "copy": all_of(copies),
            }
            found[shape] = {"made": making / n, "seconds": {}}
            for few in numbers_of("rows", flags.rows):
                x = torch.randn(few, width).to(dtype)
                in_turn(ways, [x])  # the first are slower
                seconds = in_turn(ways, [x] * flags.repeats)
                found[shape]["seconds"][few] = {way: [t / n for t in times] for way, times in seconds.items()}
                times = [1000 * statistics.median(seconds[way]) / n for way in ways]
                ratios = [ratio(seconds[way], seconds["plain"]) for way in ("frozen", "copy")]
                rows.append([shape, str(few), *map(figure, (*times, *ratios, 1000 * making / n))])
        print(f"{dtype}, {flags.threads} threads, medians of {flags.repeats}\n")
        heads = ["matrix", "rows", *(f"{way}, ms" for way in ways), "frozen, x plain", "copy, x plain", "made, ms"]
        print(table(heads, rows))
        if flags.json:
            write_json(Path(flags.json), {"dtype": str(dtype), "threads": flags.threads, "shapes": found})


if __name__ == "__main__":
    main(sys.argv[1:])
