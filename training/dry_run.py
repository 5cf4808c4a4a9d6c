"""`--dry_run`: what a run would train, need and send, without reading a weight, in one process whatever the layout.

The number of processes is torchrun's, or the environment's WORLD_SIZE; else as many as share a model.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from corpus.contamination import check_contamination
from llama.args import ModelArgs
from llama.checkpoint import load_params_and_tokenizer
from llama.distributed import bf16_is_fast, dp_size, get_device
from moa.state import count_parameters
from training.config import RunConfig, TrainConfig
from training.data import load_train_and_validation, read_training_rows, split_rows
from training.estimate import (
    base_parameters,
    cache_bytes,
    comm_bytes_of_step,
    fake_rank,
    longest_batch,
    meta_model,
    trace_step,
)
from training.memory import fit_memory, room_of
from training.schedule import Schedule

GENERATION = {"max_batch_size": 32, "max_seq_len": 512}  # generate.py's defaults


def print_dry_run(config: RunConfig) -> None:
    """Print `dry_run` for a reader, then as JSON on the last line; of torchrun's processes the first one does."""
    if os.environ.get("RANK", "0") != "0":
        return
    result = dry_run(config)
    layout, exchanged = result["layout"], result["exchanged_per_step"]
    for slot, n in result["trainable_parameters"].items():
        print(f"{slot:>14}  {n:>14,}")
    steps = f"{result['steps']} steps" if result["steps"] else "steps"  # not known without rows
    print(f"{steps} of {result['rows_per_step']} rows, peak learning rate {result['lr']:g}")
    if layout["processes"] > 1:
        print(f"each of {layout['processes']} processes, {layout['model_parallel_size']} to a model:")
    print(f"micro-batches of up to {result['batch_size']} rows")
    for title, sizes in (
        ("memory", result["memory_bytes"]),
        ("total by --activation_checkpointing", result["activation_checkpointing"]),
    ):
        print(f"{title}: " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in sizes.items()))
    for title, part in (
        ("gradients between replicas, once a step", exchanged["gradients"]),
        (f"a micro-batch, of {exchanged['micro_batches']} in a step", exchanged["micro_batch"]),
    ):
        if part["messages"]:
            print(f"{title}: {part['messages']} messages, {part['bytes'] / 2**20:.1f} MiB")
    print(json.dumps(result))


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Work out a run from `params.json`, and from the rows of `data_path` if there are any.

    Memory and messages are those of one process; all are alike.
    """
    flags = config.train
    # A GPU may be planned for where there is none; those for such models all multiply bf16
    planned = flags.device.startswith("cuda") and not torch.cuda.is_available()
    device = torch.device("cuda") if planned else get_device(flags.device)
    bf16 = (planned or bf16_is_fast(device)) if flags.bf16 is None else flags.bf16
    args = ModelArgs.from_file(Path(flags.ckpt_dir) / "params.json")
    if args.vocab_size == -1:
        args, _ = load_params_and_tokenizer(flags.ckpt_dir)
    adapter_config = config.adapter_config(args)
    processes = _processes(flags)
    # What is free when the run starts is not known here; --batch_size auto goes by what is free now
    room = math.inf if planned or flags.batch_size else room_of(device)
    with fake_rank(processes, flags.model_parallel_size) as messages:
        model = meta_model(args, adapter_config, bf16, flags.quantize)
        n_rows, n_val_rows = _rows(flags)
        known = n_rows is not None
        schedule = Schedule.from_config(flags, n_rows or 1, dp_size())
        memory = fit_memory(model, flags, device, room)
        lengths = longest_batch(memory.batch_size, flags.max_seq_len)
        model.activation_checkpointing = memory.mode
        micro_batches = -(-flags.rows_per_rank // memory.batch_size)
        leaks = known and flags.leak_tests is not None
        return {
            "method": adapter_config.method,
            "trainable_parameters": count_parameters(model),
            "base_parameters": base_parameters(model),
            "layout": {
                "processes": processes,
                "model_parallel_size": flags.model_parallel_size,
                "data_parallel_size": dp_size(),
            },
            "batch_size": memory.batch_size,
            "memory_bytes": memory.by_mode[memory.mode],
            "activation_checkpointing": {mode: parts["total"] for mode, parts in memory.by_mode.items()},
            "exchanged_per_step": comm_bytes_of_step(*trace_step(model, lengths, messages), micro_batches),
            "generation": GENERATION | {"kv_cache_bytes": cache_bytes(model, *GENERATION.values())},
            "bf16": bf16,
            "rows": n_rows,
            "val_rows": n_val_rows,
            "leaks": check_contamination(flags.data_path, flags.leak_tests) if leaks else None,
            "rows_per_step": schedule.rows_per_step,
            "steps": schedule.steps if known or flags.max_steps else None,
            "warmup_steps": schedule.warmup_steps if known else None,
            "lr": schedule.lr,
            "adapter": adapter_config.to_dict(),
        }


def _processes(flags: TrainConfig) -> int:
    text = os.environ.get("WORLD_SIZE", str(flags.model_parallel_size))
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**31):
        raise ValueError(f"the environment's WORLD_SIZE must be a whole number from 1, not {text!r}")
    return int(text)


def _rows(flags: TrainConfig) -> tuple[int | None, int | None]:
    """Count the rows to train on and to validate on that fit; all where no tokenizer can tell; None without data."""
    if flags.data_path is None:
        return None, None
    if (Path(flags.ckpt_dir) / "tokenizer.model").is_file():
        _, tokenizer = load_params_and_tokenizer(flags.ckpt_dir)
        train, validation = load_train_and_validation(flags, tokenizer)
    else:
        train, validation = split_rows(read_training_rows(flags.data_path, flags.template), flags.val_share, flags.seed)
        if flags.val_data_path is not None:
            validation = read_training_rows(flags.val_data_path, flags.template)
    return len(train), len(validation)
