"""Loss curves of several runs."""

from collections.abc import Sequence
from typing import Any

from inspection.plots import style
from inspection.runs import Run

MOST = 11  # curves that can be told apart


def losses(runs: Sequence[tuple[str, Run]], smooth: int) -> Any:
    """Loss by step: the mean of the last `smooth` steps as a line, the steps themselves faint behind it."""
    figure = style.new_figure(3.2)
    axes = figure.subplots()
    ends, last = [], 1
    for i, (name, run) in enumerate(runs):
        points = [(entry["step"], entry["loss"]) for entry in run.log if isinstance(entry.get("loss"), (int, float))]
        steps, values = zip(*points, strict=True)
        smoothed = smoothed_losses(values, smooth)
        axes.plot(steps, values, color=style.colour(i), alpha=0.15, linewidth=0.6)
        every = max(1, len(steps) // 8)
        look = {"marker": style.mark(i), "markevery": (i * every // max(1, len(runs)), every)}
        axes.plot(steps, smoothed, color=style.colour(i), linestyle=style.dash(i), label=name, **look)
        ends, last = ends + smoothed[len(smoothed) // 10 :], max(last, steps[-1])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss" if smooth == 1 else f"training loss, mean of the last {smooth} steps")
    room = (max(ends) - min(ends)) * 0.25 or 0.1
    axes.set_ylim(min(ends) - room, max(ends) + room)  # single steps may go beyond
    axes.set_xlim(0, last + 1)
    axes.grid(axis="y", linewidth=0.4, color="#cccccc")
    figure.legend(loc="outside right center")
    return figure


def smoothed_losses(values: Sequence[float], n: int) -> list[float]:
    """Each value's mean with the n - 1 before it, of those that there are."""
    return [sum(values[max(0, i + 1 - n) : i + 1]) / (i + 1 - max(0, i + 1 - n)) for i in range(len(values))]
