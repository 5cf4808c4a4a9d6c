"""RunConfig of the CPU libraries under torch. They are read when torch is loaded, so this module does not load it."""

import ctypes
import os
import sys

M_ARENA_MAX = -8  # of glibc's <malloc.h>


def prepare_cpu() -> None:
    """Call before torch is imported. What the user's environment says already is kept.

    OpenMP's waiting threads spin briefly, then sleep. Left to itself libgomp spins so long that with one other busy
    process on two cores a training step took two to five times as long and a decode step up to four times; never
    spinning (OMP_WAIT_POLICY=PASSIVE) costs a third on an idle machine. On a machine of your own, ACTIVE is fastest.

    oneDNN keeps the kernels of the last 64 shapes and not of 1024: batches are packed, so every step has a new shape,
    and memory grew by 20 MB a step.

    glibc gives each thread memory of its own, and what one has freed no other gets: the lanes of a training step
    (`training.lanes`) held 80 MB more than from one common store, and were no quicker.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(M_ARENA_MAX, 1)
