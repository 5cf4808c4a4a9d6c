"""RunConfig of all tests. Torch is not imported here: many tests do without it."""

import os

# Tiny tensors gain nothing from threads, and processes that each start several slow one another down. Processes that
# tests start inherit it. Torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
