"""`--dry_run`: what a run would train, need and send, without reading a weight, in one process whatever the layout.

How many processes the run will have is torchrun's to say, or the environment's WORLD_SIZE; else they are as many as
share a model.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from llama import ModelArgs
from llama.checkpoint import load_params_and_tokenizer
from llama.data import read_rows
from llama.distributed import bf16_is_fast, dp_size, get_device
from moa.state import count_parameters
from training.config import RECOMPUTED, RunConfig, TrainConfig
from training.data import FIELDS, load_examples
from training.estimate import base_parameters, cache_bytes, estimates, traffic, uneven
from training.layout import first_rank
from training.leaks import check_leaks
from training.rehearsal import messages_of_step, unfilled_model
from training.schedule import plan_of

GENERATION = {"max_batch_size": 32, "max_seq_len": 512}  # what generate.py does by default


def print_dry_run(settings: RunConfig) -> None:
    """Print `dry_run` for a reader, then as JSON on the last line; of torchrun's processes the first one does."""
    if os.environ.get("RANK", "0") != "0":
        return
    result = dry_run(settings)
    for slot, n in result["trainable_parameters"].items():
        print(f"{slot:>14}  {n:>14,}")
    layout, exchanged = result["layout"], result["exchanged_per_step"]
    if layout["processes"] > 1:
        print(f"each of {layout['processes']} processes, {layout['model_parallel_size']} to a model:")
    print("  ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in result["memory_bytes"].items()))
    totals = [f"{choice} {size / 2**30:.2f} GiB" for choice, size in result["activation_checkpointing"].items()]
    print("total by --activation_checkpointing: " + ", ".join(totals))
    if layout["data_parallel_size"] > 1:
        print("gradients between replicas, once a step: " + _messages(exchanged["gradients"]))
    if layout["model_parallel_size"] > 1:
        for name, summed in exchanged["micro_batch"].items():
            print(f"{name} within a model, each of {exchanged['micro_batches']} micro-batches: {_messages(summed)}")
    print(json.dumps(result))


def _messages(summed: dict[str, int]) -> str:
    return f"{summed['messages']} messages, {summed['bytes'] / 2**20:.1f} MiB"


def dry_run(settings: RunConfig) -> dict[str, Any]:
    """What a run would train, need and send, from `params.json` alone (and the rows of `data_path`, if it is there).
    Memory and messages are those of one process; all are alike."""
    flags = settings.train
    device = _device(flags.device)
    folder = Path(flags.ckpt_dir)
    args = ModelArgs.from_file(folder / "params.json")
    if args.vocab_size == -1:
        args, _ = load_params_and_tokenizer(folder)
    config = settings.config(args)
    planned = device.type == "cuda" and not torch.cuda.is_available()  # GPUs for such models all multiply bf16
    bf16 = (planned or bf16_is_fast(device)) if flags.bf16 is None else flags.bf16
    processes, lengths = _processes(flags), uneven(flags.batch_size, flags.max_seq_len)
    with first_rank(processes, flags.model_parallel_size) as notes:
        model = unfilled_model(args, config, bf16)
        n_rows = _rows(flags)
        plan = plan_of(flags, n_rows or 1, dp_size())
        known = n_rows is not None
        memory = estimates(model, lengths, device)
        # What is free when the run starts is not known here
        recompute = RECOMPUTED[0] if flags.activation_checkpointing == "auto" else flags.activation_checkpointing
        model.activation_checkpointing = recompute
        return {
            "method": config.method,
            "trainable_parameters": count_parameters(model),
            "base_parameters": base_parameters(model),
            "layout": {
                "processes": processes,
                "model_parallel_size": flags.model_parallel_size,
                "data_parallel_size": dp_size(),
            },
            "memory_bytes": memory[recompute],
            "activation_checkpointing": {choice: parts["total"] for choice, parts in memory.items()},
            "exchanged_per_step": traffic(messages_of_step(model, lengths, notes), flags.accum_iter),
            "generation": GENERATION | {"kv_cache_bytes": cache_bytes(model, *GENERATION.values())},
            "bf16": bf16,
            "rows": n_rows,
            "leaks": check_leaks(flags.data_path, flags.leak_tests) if known and flags.leak_tests is not None else None,
            "rows_per_step": plan.rows_per_step,
            "steps": plan.steps if known or flags.max_steps else None,
            "warmup_steps": plan.warmup_steps if known else None,
            "lr": plan.lr,
            "adapter": config.to_dict(),
        }


def _device(name: str) -> torch.device:
    """The run's device. Here a GPU may be named where there is none, to plan for it."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        return torch.device("cuda")
    return get_device(name)


def _processes(flags: TrainConfig) -> int:
    """Processes of the run. ValueError where the environment says nonsense."""
    text = os.environ.get("WORLD_SIZE", str(flags.model_parallel_size))
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**31):
        raise ValueError(f"the environment's WORLD_SIZE must be a whole number from 1, not {text!r}")
    return int(text)


def _rows(flags: TrainConfig) -> int | None:
    """Rows that fit; all of them where there is no tokenizer to tell; None without data."""
    if flags.data_path is None:
        return None
    if (Path(flags.ckpt_dir) / "tokenizer.model").is_file():
        _, tokenizer = load_params_and_tokenizer(flags.ckpt_dir)
        return len(load_examples(flags.data_path, tokenizer, flags.max_seq_len))
    return len(read_rows(flags.data_path, FIELDS))
