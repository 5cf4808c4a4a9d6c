"""The time of a decode step, through the public interface alone."""

from collections.abc import Callable

import torch

from benchmarks.floors import generation_work
from benchmarks.machine import Machine
from benchmarks.measure import CPU, timed
from benchmarks.models import generator_of
from benchmarks.rows import rows_of
from llama import Transformer
from llama.derivations import COPIES_PAY_FROM
from llama.graphs import BLOCK

EARLY = COPIES_PAY_FROM  # tokens of the shorter of two runs: both make the copies of weights that pay


def decode_clock(
    model: Transformer,
    n_rows: int,
    context: int,
    steps: int,
    device: torch.device = CPU,
    cuda_graphs: bool = False,
) -> Callable[[], float]:
    """A clock that measures, at each call, the seconds of a decode step of `n_rows` rows behind prompts of `context`
    tokens: what a run takes longer than one of `steps` tokens less, divided by these. It is tried once here. ValueError
    where, with graphs, the longer run would record more of them."""
    whole = context + EARLY + steps
    if cuda_graphs and context // BLOCK != (whole - 1) // BLOCK:
        raise ValueError(
            f"tokens {context + 1} to {whole} of a row do not lie within {BLOCK} that one recording serves: "
            "another recording would be measured with the steps"
        )
    llm = generator_of(model, whole, n_rows, cuda_graphs)
    prompts = random_prompts(n_rows, context, model.args.vocab_size)
    return clock_of(lambda n: llm.generate(prompts, n, n), steps, device)


def random_prompts(n_rows: int, context: int, vocab_size: int) -> list[list[int]]:
    """Of random tokens, the same at every call."""
    return [row.tokens for row in rows_of([(context, 0)] * n_rows, vocab_size)]


def clock_of(answer: Callable[[int], object], steps: int, device: torch.device = CPU) -> Callable[[], float]:
    """A clock as `decode_clock` is one, of whatever answers its prompts by a given number of tokens each."""

    def seconds(new_tokens: int) -> float:
        return timed(lambda: answer(new_tokens), device)[0]

    def clock() -> float:
        return (seconds(EARLY + steps) - seconds(EARLY)) / steps

    clock()
    return clock


def decode_floor(model: Transformer, n_rows: int, context: int, steps: int, machine: Machine) -> float:
    """The least seconds of such a step, of those measured the middle one."""
    behind = context + EARLY + steps // 2
    return generation_work(model, [behind] * n_rows, [2] * n_rows, n_rows)[1].seconds(machine)
