"""Processes: the device, torch's process group and fairscale's model-parallel groups, from torchrun's environment.

A plain `python` process gets a group of one, without a rendezvous.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from moa.reading import short_repr

T = TypeVar("T")
# Replicas load, and end their share of the rows to answer, at very different times
DIST_TIMEOUT = timedelta(hours=2)


def get_device(device: str = "auto") -> torch.device:
    """Resolve a device's name; "auto" is this process's GPU if there is one, else the CPU.

    ValueError where the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N")
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device!r}: this machine has no GPU that torch can use")
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(f"device {chosen}: there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(chosen)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares each new shape anew, and shapes change all the time
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
def distributed_run(device: torch.device, model_parallel_size: int = 1) -> Iterator[None]:
    """Join the other processes for the length of a command.

    Where one of them fails, the others end too and say so. An error that all of them meet is raised on one; the others
    end with SystemExit and say nothing.
    """
    init_distributed(device, model_parallel_size)
    try:
        yield
        dist.barrier()
    except Exception as error:
        if dist.get_world_size() > 1:
            if _is_peer_failure(error):
                lost = "another process failed, was killed, or its machine was lost"
                raise ValueError(f"process {dist.get_rank()} stops: {lost}") from None
            if _is_raised_elsewhere(error):
                raise SystemExit(1) from None
            get_error_handler().record_exception(error)  # torchrun's report quotes it
        raise
    destroy_distributed()


def _is_raised_elsewhere(error: Exception) -> bool:
    """Whether another process has already raised the same error."""
    try:
        return dist.distributed_c10d._get_default_store().add(f"{type(error).__name__}: {error}", 1) > 1
    except RuntimeError:  # the store is gone with the process that kept it, which has failed before
        return True


def _is_peer_failure(error: Exception) -> bool:
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
            gpu = device if device.type == "cuda" else None  # named, so that NCCL need not guess it from the rank
            dist.init_process_group("nccl" if gpu else "gloo", timeout=DIST_TIMEOUT, device_id=gpu)
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
    if dist.get_backend() in ("nccl", "gloo"):
        for group in (mp.get_model_parallel_group(), mp.get_data_parallel_group()):  # made with torch's own timeout
            dist.distributed_c10d._set_pg_timeout(DIST_TIMEOUT, group)


def init_single_process() -> None:
    """Form a process group of one, whatever the environment says."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def destroy_distributed() -> None:
    """Leave the group cleanly; harmless where there is none."""
    if dist.is_initialized():
        mp.destroy_model_parallel()
        dist.destroy_process_group()


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 alone; all processes get its result."""
    results = [work() if is_rank0() else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(results)
    return results[0]


def assert_same_on_all_ranks(facts: dict[str, Any]) -> None:
    """Raise ValueError, on all processes, naming the first of `facts` that differs from rank 0's."""
    if dist.get_world_size() == 1:
        return
    all_facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_facts, facts)
    for rank, other in enumerate(all_facts):
        for name, value in all_facts[0].items():
            if other[name] != value:
                raise ValueError(
                    f"{name}: process {rank} has {short_repr(other[name], 80)}, process 0 {short_repr(value, 80)}"
                )


def dp_rank() -> int:
    return mp.get_data_parallel_rank()


def dp_size() -> int:
    return mp.get_data_parallel_world_size()


def is_rank0() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0
