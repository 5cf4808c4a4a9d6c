"""The machine: flags about it, the settings of libraries, free memory. Imported before torch is loaded."""

import ctypes
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

QUANTIZATIONS = ("nf4",)  # of a base (`llama.quantize`)
MIN_TEMPERATURE = 1e-6  # logits divided by less overflow
M_ARENA_MAX = -8  # of glibc's <malloc.h>


def check_machine(
    device: str,
    bf16: bool | None,
    flash_attention2: bool = False,
    cuda_graphs: bool = False,
    model_parallel_size: int = 1,
    compile: bool = False,
) -> None:
    """ValueError naming a flag that this machine cannot satisfy, as far as that is known without torch."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, not {device!r}")
    if ":" in device and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--device {device}: all processes of torchrun would share this GPU; give --device cuda")
    if flash_attention2 and (device == "cpu" or bf16 is False):
        raise ValueError("--flash_attention2 needs a GPU and bf16")
    if cuda_graphs and (device == "cpu" or model_parallel_size > 1):
        raise ValueError("--cuda_graphs needs a GPU and --model_parallel_size 1")
    if compile and (device.startswith("cuda") or model_parallel_size > 1):
        raise ValueError("--compile needs --device cpu and --model_parallel_size 1")
    if compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError("--compile needs a C++ compiler: neither g++ nor one that CXX names is installed")
    if flash_attention2 and find_spec("flash_attn") is None:
        raise ValueError("--flash_attention2: the package flash-attn is not installed")


def check_sampling(temperature: float, top_p: float) -> None:
    """ValueError naming the number that is out of range."""
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE:g}, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")


def prepare_libraries() -> None:
    """Configure OpenMP, oneDNN, glibc and PyTorch's memory on a GPU. Call it before torch is imported.

    The user's environment takes precedence.

    OpenMP's waiting threads spin briefly, then sleep. By default libgomp spins so long that with one other busy process
    on two cores a training step took two to five times as long and a decode step up to four times; never spinning
    (OMP_WAIT_POLICY=PASSIVE) costs a third on an idle machine. On a machine of your own, ACTIVE is fastest.

    oneDNN keeps the kernels of the last 64 shapes instead of 1024: batches are packed, so every step has a new shape,
    and memory grew by 20 MB a step.

    glibc gives each thread an arena of its own, whose freed memory no other thread gets. One common arena saves memory
    where several threads compute, and was not slower.

    On a GPU the allocator's segments can grow, so that batches of changing size leave fewer gaps between them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the variable's other name
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(M_ARENA_MAX, 1)


def free_memory(device: "torch.device") -> int | None:
    """Bytes of `device` that this process can have; None where that cannot be known.

    On a CPU: the least of what the system and the process's control groups have left, divided among the processes of
    the run on this machine. Call it before any of them has loaded its model.
    """
    import torch

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
