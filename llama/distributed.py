"""Processes: the device, torch's process group and fairscale's model-parallel groups, from torchrun's environment.

A plain `python` process gets a group of one, without a rendezvous.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp

from llama.watch import Watch
from moa.reading import short_repr

T = TypeVar("T")
# Replicas may load, or end their share of rows, at very different times; that one is gone is noticed by other means
PATIENCE = timedelta(hours=2)


def get_device(device: str = "auto") -> torch.device:
    """ "auto": this process's GPU where there is one, else the CPU. ValueError where the device is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device!r}: this machine has no GPU that torch can use")
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(f"device {chosen}: there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(chosen)
    return chosen


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere bf16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", "avx_ne_convert"))


@contextmanager
def processes(device: torch.device, model_parallel_size: int = 1) -> Iterator[None]:
    """Join the other processes for the length of a command. When one of them fails, the others end too, at once, and
    say so; what went wrong is told once."""
    init_distributed(device, model_parallel_size)
    watch = None
    if dist.get_world_size() > 1:
        watch = Watch(dist.distributed_c10d._get_default_store().clone(), dist.get_rank(), dist.get_world_size())
    try:
        yield
        dist.barrier()
        if watch:
            watch.stop()
    except SystemExit:  # all processes end so
        if watch:
            watch.stop()
        raise
    except BaseException as error:
        if watch and _broken_off(error):
            watch.explain()
        if watch:
            known = isinstance(error, (ValueError, OSError, MemoryError)) and str(error)
            watch.tell(str(error) if known else f"{type(error).__name__} {error}".strip())
        raise
    destroy_distributed()


def _broken_off(error: BaseException) -> bool:
    """Whether an exchange failed because of its other side."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo/" in text or "NCCL" in text or "Connection closed" in text)
    )


def init_distributed(device: torch.device, model_parallel_size: int = 1) -> None:
    """Join the other processes of torchrun (or form a group of one), and cut them into model-parallel groups.

    Does nothing when groups of that size stand already. ValueError where the sizes do not divide.
    """
    if not dist.is_initialized():
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        else:
            init_single_process()
    world = dist.get_world_size()
    if model_parallel_size < 1 or world % model_parallel_size:
        raise ValueError(f"model_parallel_size {model_parallel_size} does not divide the {world} processes of this run")
    if mp.model_parallel_is_initialized():
        if mp.get_model_parallel_world_size() == model_parallel_size:
            return
        mp.destroy_model_parallel()
    with redirect_stdout(io.StringIO()):  # fairscale announces its groups
        mp.initialize_model_parallel(model_parallel_size)


def init_single_process() -> None:
    """A process group of one, whatever the environment says."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def destroy_distributed() -> None:
    """Leave the group cleanly; harmless where there is none."""
    if dist.is_initialized():
        mp.destroy_model_parallel()
        dist.destroy_process_group()


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, which alone does it, on all of them."""
    made = [work() if is_rank0() else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(made)
    return made[0]


def assert_same_on_all_ranks(facts: dict[str, Any]) -> None:
    """ValueError, on all processes, naming the first of `facts` that is not everywhere what it is on the main one."""
    everyone: list[Any] = [None] * dist.get_world_size()
    if len(everyone) == 1:
        return
    dist.all_gather_object(everyone, facts)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                raise ValueError(
                    f"{name}: process {rank} has {short_repr(theirs[name], 80)}, process 0 {short_repr(value, 80)}"
                )


def dp_rank() -> int:
    return mp.get_data_parallel_rank()


def dp_size() -> int:
    return mp.get_data_parallel_world_size()


def is_rank0() -> bool:
    """The one process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0
