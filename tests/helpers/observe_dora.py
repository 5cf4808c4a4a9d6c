"""What DoRA, registered by one file, gives at a model-parallel size: the program of two processes, and of one.

As a program: `python tests/helpers/observe_dora.py RANK FOLDER` writes FOLDER/dora{RANK}.pt.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dora  # noqa: F401 - registers it
from llama import Llama
from llama.distributed import destroy_distributed, init_distributed
from moa.config import AdapterConfig
from moa.state import adapter_state_dict, gather_full, load_adapter_state_dict
from observe import float64
from tiny import ARGS, BASE, gradients, random_state, tokens

FLAT = {"method": "custom", "dora_layers": "all", "p_adapter_layers": "all", "block_router": "soft", "swi_x": 1}


def observe_dora(model_parallel_size: int) -> dict[str, Any]:
    """Initial state, logits, gradients and answers of DoRAs and parallel adapters under soft_moa's router."""
    config = AdapterConfig.from_dict(FLAT, ARGS.n_layers)
    llm = Llama.build(BASE, config=config, max_seq_len=64, model_parallel_size=model_parallel_size)
    model, batch = llm.model, tokens(2, 9)
    observed = {"fresh": adapter_state_dict(model)}
    load_adapter_state_dict(model, random_state(model), "random")
    observed["answers"] = llm.generate([[256, 5, 6], [256, 7]], max_gen_len=5)
    with float64(model):
        loss = model.loss(batch, batch)
        loss.backward()
        return observed | {"loss": loss.detach(), "gradients": gather_full(gradients(model), model)}


def main(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'dora'}"
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(seconds=60), rank=rank, world_size=2)
    init_distributed(torch.device("cpu"), 2)
    torch.save(observe_dora(2), folder / f"dora{rank}.pt")
    destroy_distributed()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
