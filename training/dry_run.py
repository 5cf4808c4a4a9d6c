"""`--dry_run`: what a run would train and need, without reading a weight."""

import json
from pathlib import Path
from typing import Any

from llama import ModelArgs, Transformer
from llama.checkpoint import read_base
from llama.data import read_rows
from llama.parallel import bf16_is_fast, data_size, is_main, pick_device, start_processes
from moa.state import count
from training.data import FIELDS, load_examples
from training.estimate import base_parameters, estimate
from training.leaks import check_leaks
from training.schedule import plan_of
from training.settings import Settings, TrainFlags


def print_dry_run(settings: Settings) -> None:
    """Print `dry_run` for a reader, then as JSON on the last line."""
    result = dry_run(settings)
    if is_main():
        for slot, n in result["trainable_parameters"].items():
            print(f"{slot:>14}  {n:>14,}")
        print("  ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in result["memory_bytes"].items()))
        print(json.dumps(result))


def dry_run(settings: Settings) -> dict[str, Any]:
    """What a run would train and need, from `params.json` alone (and the rows of `data_path`, if it is there)."""
    flags = settings.train
    device = pick_device(flags.device)
    start_processes(device, flags.model_parallel_size)
    folder = Path(flags.ckpt_dir)
    args = ModelArgs.from_file(folder / "params.json")
    if args.vocab_size == -1:
        args, _ = read_base(folder)
    config = settings.config(args)
    model = Transformer(args, config)
    n_rows = _rows(flags)
    plan = plan_of(flags, n_rows or 1, data_size())
    bf16 = bf16_is_fast(device) if flags.bf16 is None else flags.bf16
    known = n_rows is not None
    checked = known and flags.leak_tests is not None and is_main()
    leaks = check_leaks(flags.data_path, flags.leak_tests) if checked else None
    return {
        "method": config.method,
        "trainable_parameters": count(model),
        "base_parameters": base_parameters(model),
        "memory_bytes": estimate(
            model,
            bf16,
            device,
            flags.batch_size * flags.max_seq_len,
            flags.activation_checkpointing,
            flags.model_parallel_size,
        ),
        "bf16": bf16,
        "rows": n_rows,
        "leaks": leaks,
        "rows_per_step": plan.rows_per_step,
        "steps": plan.steps if known or flags.max_steps else None,
        "warmup_steps": plan.warmup_steps if known else None,
        "lr": plan.lr,
        "adapter": config.flat(),
    }


def _rows(flags: TrainFlags) -> int | None:
    """Rows that fit; all of them where there is no tokenizer to tell; None without data."""
    if flags.data_path is None:
        return None
    if (Path(flags.ckpt_dir) / "tokenizer.model").is_file():
        _, tokenizer = read_base(flags.ckpt_dir)
        return len(load_examples(flags.data_path, tokenizer, flags.max_seq_len, quiet=not is_main()))
    return len(read_rows(flags.data_path, FIELDS))
