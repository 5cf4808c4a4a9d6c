"""What processes really exchange: the program that one of two runs.

`python tests/helpers/count.py RANK FOLDER`, RANK of 2, writes FOLDER/rank{RANK}.json.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llama import ModelArgs, Transformer
from llama.accelerate import accelerate_model
from llama.distributed import destroy_distributed, init_distributed
from llama.packing import PackedBatch
from moa.state import adapter_parameters, freeze_base, reset_adapters, self_balancing
from tiny import ARGS, config
from training.config import CHECKPOINTING_MODES
from training.estimate import CommRecorder
from training.loop import all_reduce_gradients, forward_backward

LENGTHS = [7, 9, 4]
METHODS = ("soft_moa", "unipeft", "adamole", "custom", "flylora")


def zeros(method: str, args: ModelArgs = ARGS, bf16: bool = False) -> Transformer:
    """A model whose base is zero: what is saved and exchanged does not depend on values."""
    model = Transformer(args, config(method))
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = {key: torch.zeros(t.shape, dtype=dtype) for key, t in model.named_parameters() if t.is_meta}
    model.load_state_dict(base, strict=False, assign=True)
    reset_adapters(model, 0)
    freeze_base(model)
    accelerate_model(model)
    return model.train()


def exchanged(method: str, mode: str) -> list:
    """The messages of a step of one micro-batch."""
    model, messages, n = zeros(method), [], sum(LENGTHS)
    model.activation_checkpointing = mode
    with CommRecorder(messages):
        micro_batch = torch.ones(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64), PackedBatch(LENGTHS, "cpu")
        forward_backward(model, micro_batch, n, n)
        parameters = [entry.parameter for entry in adapter_parameters(model).values()]
        all_reduce_gradients(parameters, self_balancing(model))
    return messages


def main(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(seconds=60), rank=rank, world_size=2)
    result = {}
    for size in (2, 1):
        init_distributed(torch.device("cpu"), size)
        result |= {f"{m} {mode} {size}": exchanged(m, mode) for m in METHODS for mode in CHECKPOINTING_MODES}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    destroy_distributed()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
