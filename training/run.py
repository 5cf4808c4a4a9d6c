"""A fine-tuning run from its settings: folder, model, data, loop, checkpoints. What `finetune.py` calls."""

import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from llama import Llama, ModelArgs
from llama.checkpoint import fingerprint, read_base
from llama.parallel import bf16_is_fast, data_size, is_main, pick_device, start_processes, stop_processes
from moa.adapter_file import adapter_params
from moa.config import AdapterConfig
from moa.files import claim, file_hash, read_json, write_json
from moa.state import count
from training.checkpoint import pack, restore, save
from training.data import load_examples
from training.estimate import base_parameters
from training.folder import CONFIG, checkpoints
from training.leaks import check_leaks
from training.log import RunLog
from training.loop import make_optimizer, train
from training.schedule import Plan, plan_of
from training.settings import Settings, output_folder


def run(settings: Settings) -> Path:
    """Train as the settings say (`ckpt_dir` and `data_path` filled in). Returns the run's folder.

    Raises ValueError or OSError with one sentence; what an earlier run left is then untouched.
    """
    flags = settings.train
    device = pick_device(flags.device)
    start_processes(device, flags.model_parallel_size)
    folder = output_folder(settings)
    last = _last_checkpoint(settings, folder)
    if flags.bf16 is None:
        settings = replace(settings, train=replace(flags, bf16=bf16_is_fast(device)))
        flags = settings.train

    args, tokenizer = read_base(flags.ckpt_dir)
    config = settings.config(args)
    examples = load_examples(flags.data_path, tokenizer, flags.max_seq_len, quiet=not is_main())
    plan = plan_of(flags, len(examples), data_size())
    leaks = {}
    if flags.leak_tests is not None and is_main():
        leaks = {"leaks": check_leaks(flags.data_path, flags.leak_tests)}
    llm = Llama.build(
        flags.ckpt_dir,
        config=config,
        bf16=flags.bf16,
        device=str(device),
        seed=flags.seed,
        model_parallel_size=flags.model_parallel_size,
        flash_attention2=flags.flash_attention2,
    )
    model = llm.model
    model.activation_checkpointing = flags.activation_checkpointing
    optimizer = make_optimizer(model, flags.weight_decay)
    done = restore(last, model, optimizer) if last else 0
    lock = _claim(folder) if is_main() else None
    if is_main() and last is not None and leaks:  # a resumed run's record stands already
        write_json(folder / CONFIG, read_json(folder / CONFIG) | leaks)
    if done >= plan.steps:
        say(f"{last}: the run is complete, all {plan.steps} steps are done")
        stop_processes()
        return folder

    trained = count(model)["total"]
    if is_main():
        if last is None:
            _prepare(folder, _record(settings, config, args, plan) | {"trainable_parameters": trained} | leaks)
        say(
            f"{config.method}: {trained:,} trainable parameters ({100 * trained / base_parameters(model):.2f} % of the "
            f"base), {len(examples)} rows, {plan.steps} steps of {plan.rows_per_step} rows, "
            f"{'bf16' if flags.bf16 else 'fp32'} on {device}, in {folder}"
        )
    log = RunLog(folder, plan.steps, done) if is_main() else None
    params = adapter_params(config, asdict(args))
    every = flags.save_every or plan.steps_per_epoch

    def on_step(entry: dict[str, Any]) -> None:
        if log:
            log.step(entry)
        if entry["step"] % every == 0 or entry["step"] == plan.steps:
            content = pack(model, optimizer, entry["step"], params)
            if is_main():
                save(folder, content)

    try:
        train(model, optimizer, examples, plan, flags.batch_size, flags.seed, done, on_step)
    finally:
        if log:
            log.close()
    say(f"{checkpoints(folder)[-1][1] if is_main() else folder}: done; python extract_adapter.py writes the adapter")
    dist.barrier()
    stop_processes()
    if lock:
        lock.close()
    return folder


def say(text: str) -> None:
    """Tell the user, once for all processes."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def _last_checkpoint(settings: Settings, folder: Path) -> Path | None:
    """The checkpoint to go on from. ValueError where the folder holds a run and neither --resume nor --overwrite is
    given, or where its run had other rows or another number of rows per step."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: --output_dir is a file, expected a folder")
    found = checkpoints(folder)
    if not found or settings.train.overwrite:
        return None
    last = found[-1][1]
    if not settings.train.resume:
        raise ValueError(
            f"{folder}: holds a run already ({last.name}); give --resume to go on with it, --overwrite to begin anew, "
            "or another --output_dir"
        )
    record = read_json(folder / CONFIG)
    if file_hash(settings.train.data_path) != record.get("data_sha256"):
        raise ValueError(f"{settings.train.data_path}: not the rows that the run in {folder} was started with")
    if record.get("base_fingerprint") != fingerprint(settings.train.ckpt_dir):
        raise ValueError(f"{settings.train.ckpt_dir}: not the base that the run in {folder} was started with")
    if record.get("rows_per_step") != plan_of(settings.train, 1, data_size()).rows_per_step:
        raise ValueError(
            f"{folder}: the run takes {record.get('rows_per_step')} rows per step; with {data_size()} data-parallel "
            f"ranks, set --batch_size and --accum_iter so that their product with it is the same"
        )
    return last


def _claim(folder: Path) -> IO[bytes]:
    """Make the run's folder and keep other runs out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    return claim(folder / ".lock", f"{folder}: another run is writing there; give another --output_dir")


def _prepare(folder: Path, record: dict[str, Any]) -> None:
    """Write the run's record; an earlier run's checkpoints and log go (--overwrite)."""
    for _, file in checkpoints(folder):
        file.unlink()
    (folder / "log.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    write_json(folder / CONFIG, record)


def _record(settings: Settings, config: AdapterConfig, args: ModelArgs, plan: Plan) -> dict[str, Any]:
    """Everything that is needed to tell later what this run was."""
    return {
        "settings": asdict(settings.train) | settings.adapter,
        "adapter": config.flat(),
        "base": asdict(args),
        "base_fingerprint": fingerprint(settings.train.ckpt_dir),
        "steps": plan.steps,
        "warmup_steps": plan.warmup_steps,
        "rows_per_step": plan.rows_per_step,
        "lr": plan.lr,
        "rows": plan.n_rows,
        "data_sha256": file_hash(settings.train.data_path),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processes": dist.get_world_size(),
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {"platform": platform.platform(), "processor": platform.machine()},
    }


PACKAGES = ("torch", "numpy", "fairscale", "tiktoken", "flash-attn")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Commit of this source tree, with "+changes" where it has uncommitted ones; None outside a git checkout."""
    try:
        where = Path(__file__).parent
        git = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(git, cwd=where, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
