"""Scales of figures: from values to places, and the ticks between."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on places from `start` to `end`; log: by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the scale, at most about `most`."""
        if self.log:
            return _log_ticks(self.low, self.high, most)
        step = _step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def spanning(values: Iterable[float], start: float, end: float, zero: bool = False, log: bool = False) -> Scale:
    """The scale that holds all of the values, with some room; zero: it begins at 0."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(known), max(known)
    if log:
        room = 1.12 if high / low < 1e3 else 1.5
        return Scale(low / room, high * room, start, end, log)
    if zero:
        return Scale(0.0, (high or 1.0) * 1.06, start, end)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start, end)


def _step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            break
    every = math.ceil(len(ticks) / most) if ticks else 1
    return ticks[::every]


def short(value: float) -> str:
    """A number as a tick shows it: 12.3M, 250k, 0.35."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 1e-9):
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"
