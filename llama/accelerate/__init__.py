"""Faster equals of the plain formulas, applied to a model from outside, after loading.

    accelerate_model(model)         forwards of blocks that compute together what shares an input (`forwards`)
    FastDecoding(model)             decode steps on cached and prepacked weights, or recorded as CUDA graphs
    Lanes(model, ...)               on a CPU, the sequences of a micro-batch on two threads (`lanes`)
    fuse_small_operations(device)   small operations of those forwards as kernels of torch.compile (`kernels`)

Nothing in `llama.model` or `moa` knows of them. `restore_model` brings the plain forwards back.
"""

from llama.accelerate.decoding import FastDecoding
from llama.accelerate.forwards import WeightCache, install, uninstall
from llama.accelerate.kernels import fuse_small_operations
from llama.accelerate.lanes import Lanes
from llama.model import Transformer

__all__ = ["FastDecoding", "Lanes", "accelerate_model", "fuse_small_operations", "restore_model"]


def accelerate_model(model: Transformer, flash: bool = False) -> None:
    """Put faster forwards in place of the plain ones; they give the same results within rounding.

    flash: attention by the package flash-attn, on a GPU in bf16 or fp16.
    """
    install(model, WeightCache(), flash)


def restore_model(model: Transformer) -> None:
    """Bring the plain forwards back."""
    uninstall(model)
