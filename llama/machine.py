"""What the flags about the machine may be, told before torch is loaded."""

import re


def check_machine(device: str, bf16: bool | None, flash_attention2: bool) -> None:
    """ValueError naming the flag that no machine can do as told. Whether this one can is seen when it is used."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, not {device!r}")
    if flash_attention2 and (device == "cpu" or bf16 is False):
        raise ValueError("--flash_attention2 needs a GPU and bf16")
