"""Processes: the device, torch's process group and fairscale's model-parallel groups, from torchrun's environment.

A plain `python` process gets a group of one, without a rendezvous.
"""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp


def pick_device(device: str = "auto") -> torch.device:
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


def start_processes(device: torch.device, model_parallel_size: int = 1) -> None:
    """Join the other processes of torchrun (or form a group of one), and cut them into model-parallel groups.

    Does nothing when groups of that size stand already. ValueError where the sizes do not divide.
    """
    if not dist.is_initialized():
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        else:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    if model_parallel_size < 1 or world % model_parallel_size:
        raise ValueError(f"model_parallel_size {model_parallel_size} does not divide the {world} processes of this run")
    if mp.model_parallel_is_initialized():
        if mp.get_model_parallel_world_size() == model_parallel_size:
            return
        mp.destroy_model_parallel()
    with redirect_stdout(io.StringIO()):  # fairscale announces its groups
        mp.initialize_model_parallel(model_parallel_size)


def stop_processes() -> None:
    """Leave the group cleanly; harmless where there is none."""
    if dist.is_initialized():
        mp.destroy_model_parallel()
        dist.destroy_process_group()


def data_rank() -> int:
    return mp.get_data_parallel_rank()


def data_size() -> int:
    return mp.get_data_parallel_world_size()


def is_main() -> bool:
    """The one process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0
