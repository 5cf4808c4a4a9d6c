"""Where the time of some work goes: the kernels of a GPU, or the operators of a CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.measure import timed

LONGEST_NAME = 90


def profile(work: Callable[[], object], device: torch.device, top: int = 15) -> dict[str, Any]:
    """Seconds of `work` (done once before) and of what the device did in it; of the `top` kernels that took most, the
    share of the latter, and how often they ran. Under the profiler `work` itself takes longer than without."""
    work()
    gpu = device.type == "cuda"
    seconds, _ = timed(work, device)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as profiler:
        timed(work, device)
    kernels: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if getattr(event, "is_user_annotation", False):  # a span, whose kernels are there too
            continue
        on_gpu = event.device_type == DeviceType.CUDA
        taken = event.self_device_time_total if gpu else event.self_cpu_time_total  # microseconds
        if on_gpu == gpu and taken > 0:
            kernels[event.key] = (taken / 1e6, event.count)
    busy = sum(taken for taken, _ in kernels.values())
    ordered = sorted(kernels.items(), key=lambda entry: -entry[1][0])
    listed = [
        {"name": name[:LONGEST_NAME], "share": taken / busy, "seconds": taken, "count": count}
        for name, (taken, count) in ordered[:top]
    ]
    launched = sum(count for _, count in kernels.values())
    return {"seconds": seconds, "device_seconds": busy, "kernels": launched, "top": listed}


def summary(found: dict[str, Any]) -> str:
    """Some lines of text."""
    steps = f"{found['decode_steps']} steps, " if "decode_steps" in found else ""
    head = (
        f"{steps}{1000 * found['seconds']:.1f} ms without the profiler, of which the device works "
        f"{1000 * found['device_seconds']:.1f} ms, in {found['kernels']} kernels"
    )
    lines = [f"  {100 * k['share']:5.1f} %  {k['count']:6d} x  {k['name']}" for k in found["top"]]
    return "\n".join([head, *lines])
