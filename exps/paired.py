"""Differences between two methods, paired over the rows and the seeds that both have had.

Two methods are scored on the same R rows after training with the same S seeds. d[s, r] is the difference of their
losses on row r after seed s, n[r] the row's label tokens (1 where a right answer is counted), N = sum of n. The mean
difference is

    m = mean over s of m[s],    m[s] = sum over r of d[s, r] / N

Both the seeds and the rows are a sample of those that there could have been, so both add to its error:

    e_seeds^2 = var(m[s]) / S                       var: with S - 1, R - 1 in the denominator
    e_rows^2  = var(u[r]) / R                       u[r] = R / N * (mean over s of d[s, r] - m * n[r])
    interval    m -+ sqrt((t[S-1] * e_seeds)^2 + (t[R-1] * e_rows)^2)

with t[k] the quantile of Student's distribution of k degrees of freedom. It is exact where one of the errors is all
there is, and wider than need be between: what is noise of a single row after a single seed counts in both errors. p is
that of the narrowest such interval that does not reach zero. This decides what is called significant. With three seeds
it is wide, t[2] is 4.3, and after Holm's correction for twenty comparisons 20: that is how much three seeds tell.
(Pooling both errors with Satterthwaite's degrees of freedom is narrower, but at p = 0.0025, where Holm's correction
looks, it would call equal methods different in up to 2 % of comparisons.)

The bootstrap draws S seeds and R rows with replacement, both at once, and takes the middle 95 % of the means. It
assumes nothing of a distribution, but seeds drawn from three say too little of how seeds differ: where that is most of
the error it finds a difference between equal methods in 20 to 30 % of studies instead of 5 %. It is shown beside the
other and decides nothing.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

LEVEL, DRAWS, SMALLEST_P = 0.95, 2000, 1e-9


class Difference(NamedTuple):
    """Mean of a method minus that of a reference. interval: (low, high), and p, by t; bootstrap: the other interval.
    None where there is one seed."""

    mean: float
    interval: tuple[float, float] | None
    p: float | None
    bootstrap: tuple[float, float] | None


def paired_difference(method: np.ndarray, reference: np.ndarray, counts: np.ndarray, seed: int = 0) -> Difference:
    """method, reference (S, R): of the same rows after the same seeds; counts (R,): what a row's value is a sum over.

    seed: of the bootstrap's draws.
    """
    d, n = np.asarray(method, float) - np.asarray(reference, float), np.asarray(counts, float)
    seeds, rows = d.shape
    by_seed = d.sum(1) / n.sum()
    mean = float(by_seed.mean())
    if seeds == 1 or rows == 1:
        return Difference(mean, None, None, None)
    by_row = (d.mean(0) - mean * n) * rows / n.sum()
    of_seeds, of_rows = by_seed.var(ddof=1) / seeds, by_row.var(ddof=1) / rows
    if of_seeds + of_rows == 0:  # the same in every seed and row
        return Difference(mean, (mean, mean), float(mean == 0), (mean, mean))

    def half_width(p: float) -> float:
        return math.sqrt(of_seeds * student_t(p, seeds - 1) ** 2 + of_rows * student_t(p, rows - 1) ** 2)

    half, low, high = half_width(1 - LEVEL), SMALLEST_P, 1.0
    for _ in range(60):
        p = math.sqrt(low * high)
        low, high = (p, high) if half_width(p) > abs(mean) else (low, p)
    return Difference(mean, (mean - half, mean + half), high, _bootstrap(d, n, seed))


def _bootstrap(d: np.ndarray, n: np.ndarray, seed: int) -> tuple[float, float]:
    """The middle 95 % of the means of seeds and rows drawn with replacement."""
    generator, (seeds, rows) = np.random.default_rng(seed), d.shape
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    of_rows = generator.multinomial(rows, np.full(rows, 1 / rows), DRAWS)
    means = ((of_seeds @ d) * of_rows).sum(1) / (of_rows @ n)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def student_t(p: float, freedom: int) -> float:
    """The value that |T| of Student's distribution exceeds with probability p."""
    x, above = _tail(freedom)
    return math.sqrt(freedom) * math.tan(np.interp(p, above, x))


@cache
def _tail(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles x from 90 degrees down to 0, and P(|T| > sqrt(freedom) * tan(x)): x has density cos(x)^(freedom - 1)."""
    x = np.linspace(math.pi / 2, 0, 50_001)
    density = np.cos(x) ** (freedom - 1)
    above = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return x, above / above[-1]


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of the p of several comparisons: as many times each, the smallest first, never decreasing."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected
