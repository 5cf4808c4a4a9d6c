"""Small Qwen3 models of transformers; also the program that each of two processes that share one runs.

As a program: `python tests/helpers/qwen3.py RANK FOLDER` writes FOLDER/rank{RANK}.pt: what `observe` sees of METHODS on
the checkpoint FOLDER/meta.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from convert_samples import write_hf
from llama.distributed import destroy_distributed, init_distributed
from observe import CPU, observe

# Of the models: heads as wide as the model's width shared among them, wider, and narrower; tied or not
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"head_dim": 8, "tie_word_embeddings": True},
    "untied": {"head_dim": 8, "tie_word_embeddings": False},
    "wide heads": {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}},
    "narrow heads": {"head_dim": 6, "tie_word_embeddings": False, "num_attention_heads": 4, "hidden_size": 64},
}
METHODS = ("soft_moa", "lora_bias_norm", "custom")  # the last two train the norms


def write(folder: Path, shape: str) -> Any:
    """A Qwen3 folder of Hugging Face's layout; returns its model."""
    return write_hf(folder, "qwen", qwen3=True, num_hidden_layers=3, **SHAPES[shape])


def main(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(seconds=60), rank=rank, world_size=2)
    init_distributed(CPU, 2)
    torch.save({name: observe(name, 2, folder / "meta") for name in METHODS}, folder / f"rank{rank}.pt")
    destroy_distributed()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
