"""What the flags about the machine and about sampling may be, told before torch is loaded."""

import re

MIN_TEMPERATURE = 1e-6  # logits divided by less overflow


def check_machine(device: str, bf16: bool | None, flash_attention2: bool) -> None:
    """ValueError naming the flag that no machine can do as told. Whether this one can is seen when it is used."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, not {device!r}")
    if flash_attention2 and (device == "cpu" or bf16 is False):
        raise ValueError("--flash_attention2 needs a GPU and bf16")


def check_sampling(temperature: float, top_p: float) -> None:
    """ValueError naming the flag that is out of range."""
    if temperature < 0 or 0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"--temperature must be 0 (greedy) or at least 1e-6, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1, not {top_p}")
