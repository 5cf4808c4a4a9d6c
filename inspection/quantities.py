"""Numbers of runs: how each is shown, and what several seeds come to."""

import statistics
from typing import NamedTuple


class Quantity(NamedTuple):
    """How a number is shown: its name, how far to divide it to get the unit in the name, its format."""

    label: str
    unit: float
    form: str

    def show(self, value: float) -> str:
        return format(value / self.unit, self.form)


QUANTITIES = {
    "percent": Quantity("%", 1, ".1f"),
    "trainable_parameters": Quantity("trained parameters", 1, ",.0f"),
    "rows_per_step": Quantity("rows per step", 1, ",.0f"),
    "final_loss": Quantity("final loss", 1, ".2f"),
    "seconds": Quantity("training, min", 60, ",.1f"),
    "seconds_per_epoch": Quantity("an epoch, min", 60, ",.1f"),
    "seconds_per_step": Quantity("a step, s", 1, ",.2f"),
    "tokens_per_s": Quantity("tokens/s", 1, ",.0f"),
    "peak_memory_bytes": Quantity("peak memory, GB", 1e9, ",.2f"),
    "adapter_bytes": Quantity("adapter file, MB", 1e6, ",.1f"),
    "seconds_per_answer": Quantity("an answer, s", 1, ",.3f"),
}
NONE = "–"  # what is not known, in a table


class Spread(NamedTuple):
    """Mean and sample standard deviation (None of a single value) of values over seeds. half_width: of scores, the mean
    of those of their intervals."""

    mean: float
    deviation: float | None
    values: list[float]
    half_width: float | None = None


def show(spread: Spread | None, name: str, between: str = " ± ") -> str:
    """A quantity's mean, and its deviation over the seeds where there is one."""
    if spread is None:
        return NONE
    form = QUANTITIES[name].show
    return form(spread.mean) + (f"{between}{form(spread.deviation)}" if spread.deviation else "")


def spread_of(values: list[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, values)
