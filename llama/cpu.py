"""Settings of the CPU libraries under torch. They are read when torch is loaded, so this module does not load it."""

import os


def prepare_cpu() -> None:
    """Call before torch is imported. What the user's environment says already is kept.

    OpenMP's waiting threads sleep instead of spinning: with any other work on the machine, spinning made a decode step
    on two cores ten times slower. oneDNN keeps the kernels of the last 64 shapes and not of 1024: batches are packed,
    so every step has a new shape, and memory grew by 20 MB a step.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
