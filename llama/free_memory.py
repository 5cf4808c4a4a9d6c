"""How much memory a process of a run can still have."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes of `device` that this process can have; None where that cannot be known.

    On a CPU: the least of what the system and the process's control groups have left, divided among the processes of
    the run on this machine. Call it before any of them has loaded its model.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [*available_memory(Path("/proc/meminfo")), *cgroup_limits(Path("/proc/self/cgroup"))]
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    return min(limits) // int(local) if limits else None


def available_memory(meminfo: Path) -> Iterator[int]:
    """What Linux says is available, in bytes."""
    if meminfo.exists():
        lines = meminfo.read_text().splitlines()
        yield from (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def cgroup_limits(membership: Path, root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes left of each memory limit (control groups, version 2) on this process: containers and batch systems set it.

    membership: names this process's group; root: has the groups as folders.
    """
    lines = membership.read_text().splitlines() if membership.exists() else []
    for own_group in (root / line.removeprefix("0::/") for line in lines if line.startswith("0::")):
        for group in (own_group, *own_group.parents):
            try:
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
            except (OSError, ValueError):  # a group without a limit ("max")
                continue
            yield left + int(stat.get("inactive_file", 0))  # the system takes back pages of files when memory is short
