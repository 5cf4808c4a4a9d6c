"""How much memory a process of a run can still have."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes of `device` that this process can have; None where that cannot be known.

    On a CPU: what the system has, or what is left of the limits of the process's control groups, divided among the
    run's processes on this machine. Call before any of them has loaded its model.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [*_of_the_system(Path("/proc/meminfo")), *_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    return min(found) // int(local) if found else None


def _of_the_system(meminfo: Path) -> Iterator[int]:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:  # another system than Linux
        return
    yield from (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _of_groups(mine: Path, root: Path) -> Iterator[int]:
    """What is left of each limit above this process: `root` has the groups as folders, `mine` lists this process's."""
    try:
        lines = mine.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if "memory" in controllers.split(","):  # version 1
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        (limit, used, files), place = names, top / path.lstrip("/")
        for group in (place, *place.parents):
            try:
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                left = int((group / limit).read_text()) - int((group / used).read_text())
            except (OSError, ValueError):  # a group of another place or without a limit ("max")
                continue
            yield left + int(counts.get(files, 0))  # pages of files are given up where memory is short
