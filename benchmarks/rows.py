"""Rows of random tokens: of given lengths, or of lengths drawn as real data sets have them."""

import random
from collections.abc import Sequence

from llama.data import IGNORE_INDEX, Example

# Tokens of prompts and of answers, with template and end token, as SmolLM2's tokenizer has them: the smallest, each
# tenth of the rows, and the largest. GSM8K's training rows, and the mixed commonsense set's.
LENGTHS = {
    "gsm8k": (
        (40, 65, 70, 75, 79, 84, 89, 96, 104, 118, 251),
        (25, 49, 59, 67, 76, 85, 96, 108, 123, 149, 338),
    ),
    "commonsense": (
        (56, 57, 57, 58, 59, 61, 80, 86, 94, 107, 233),
        (6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7),
    ),
}


def drawn_rows(n: int, data: str, longest: int, vocab_size: int, seed: int = 0) -> list[Example]:
    """n rows with lengths drawn from those of `data`, none above `longest`."""
    generator = random.Random(f"{seed}/{data}")
    lengths = []
    while len(lengths) < n:
        prompt, answer = (_drawn(tenths, generator) for tenths in LENGTHS[data])
        if prompt + answer <= longest:
            lengths.append((prompt, answer))
    return rows_of(lengths, vocab_size, seed)


def _drawn(tenths: Sequence[int], generator: random.Random) -> int:
    """A value between two neighbouring tenths, all tenths being as likely."""
    i = generator.randrange(len(tenths) - 1)
    return round(generator.uniform(tenths[i], tenths[i + 1]))


def rows_of(lengths: Sequence[tuple[int, int]], vocab_size: int, seed: int = 0) -> list[Example]:
    """Rows with so many tokens of prompt and of answer each."""
    generator = random.Random(seed)
    rows = []
    for prompt, answer in lengths:
        tokens = [generator.randrange(1, vocab_size) for _ in range(prompt + answer)]
        rows.append(Example(tokens, [IGNORE_INDEX] * prompt + tokens[prompt:], prompt))
    return rows


def halves(length: int) -> tuple[int, int]:
    """A row of this length, half of it an answer, as GSM8K's are."""
    return length - length // 2, length // 2
