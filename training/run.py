"""A fine-tuning run: folder, model, data, loop, checkpoints. What `finetune.py` calls."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from corpus.contamination import check_contamination
from llama import Llama, ModelArgs, Transformer
from llama.accelerate import Lanes
from llama.checkpoint import fingerprint, load_params_and_tokenizer
from llama.data import Example
from llama.distributed import (
    assert_same_on_all_ranks,
    bf16_is_fast,
    broadcast_from_rank0,
    distributed_run,
    dp_size,
    get_device,
    is_rank0,
)
from llama.tokenizer import Tokenizer
from moa.adapter_file import PARAMS, adapter_params
from moa.files import file_hash, lock, read_json, remove_stale_temp_files, write_json
from moa.replicas import assert_replicas_equal
from moa.state import count_parameters
from training.checkpoint import CheckpointWriter, latest, load_state_dict, state_dict
from training.config import PER_HOST_FIELDS, RunConfig, TrainConfig, run_folder
from training.data import load_examples
from training.estimate import base_parameters
from training.log import RunLog, run_metadata, start_record
from training.loop import (
    NonFiniteLoss,
    TrainState,
    expert_fraction,
    forward_backward,
    make_optimizer,
    train,
    uses_load_balancing,
)
from training.memory import MemoryEstimate, estimate_memory, oom_hint, with_least_free
from training.paths import CONFIG, DAMAGED, LOCK, checkpoints
from training.schedule import Schedule
from training.shutdown import GracefulShutdown, Stopped


def run(config: RunConfig) -> Path:
    """Train as configured (`ckpt_dir` and `data_path` filled in). Returns the run's folder.

    Raises ValueError or OSError with one sentence; what an earlier run left is then untouched. Raises Stopped, a
    SystemExit, after a last checkpoint, where a signal asked for it.
    """
    flags = config.train
    device = get_device(flags.device)
    args, tokenizer = load_params_and_tokenizer(flags.ckpt_dir)
    if flags.bf16 is None:
        config = replace(config, train=replace(flags, bf16=bf16_is_fast(device)))
    estimate = estimate_memory(config, args, device)
    with distributed_run(device, flags.model_parallel_size):
        estimate = with_least_free(estimate)
        with oom_hint(config, estimate):
            return _run(config, args, tokenizer, device, estimate)


def _run(
    config: RunConfig, args: ModelArgs, tokenizer: Tokenizer, device: torch.device, estimate: MemoryEstimate
) -> Path:
    flags, adapter_config = config.train, config.adapter_config(args)
    folder = run_folder(config)
    hashes = {"base_fingerprint": fingerprint(flags.ckpt_dir), "data_sha256": file_hash(flags.data_path)}
    record = broadcast_from_rank0(lambda: _record_to_resume(config, folder, hashes))
    shared = {f"--{name}": value for name, value in asdict(flags).items() if name not in PER_HOST_FIELDS}
    assert_same_on_all_ranks(shared | adapter_config.to_dict() | hashes | {"torch": torch.__version__})

    examples = load_examples(flags.data_path, tokenizer, flags.max_seq_len, quiet=not is_rank0())
    schedule = Schedule.from_config(flags, len(examples), dp_size(), record and record["rows_per_step"])
    leaks = {}
    if flags.leak_tests is not None and is_rank0():
        leaks = {"leaks": check_contamination(flags.data_path, flags.leak_tests)}

    model = Llama.build(
        flags.ckpt_dir,
        config=adapter_config,
        bf16=flags.bf16,
        device=str(device),
        seed=flags.seed,
        model_parallel_size=flags.model_parallel_size,
        flash_attention2=flags.flash_attention2,
    ).model
    model.activation_checkpointing = estimate.mode
    optimizer = make_optimizer(model, flags.weight_decay)

    with _locked(folder) if is_rank0() else nullcontext():
        resumes = record is not None and record["has_checkpoint"]
        if is_rank0() and not resumes and not flags.overwrite and checkpoints(folder):
            raise ValueError(f"{folder}: another run has been there in the meantime; give --resume to go on with it")
        state = TrainState()
        if resumes:
            state = load_state_dict(_latest(folder, model) if is_rank0() else None, model, optimizer)
        assert_replicas_equal(model)
        complete, trainable = state.done >= schedule.steps, count_parameters(model)["total"]
        if is_rank0() and resumes:
            _extend_record(folder, leaks, None if complete else state.done)
        elif is_rank0():
            start = start_record(config, adapter_config, args, schedule, hashes)
            _begin_anew(folder, start | {"trainable_parameters": trainable} | leaks)
        if complete:
            log_rank0(f"{folder}: the run is complete, all {schedule.steps} steps are done")
            return folder
        log_rank0(
            f"{adapter_config.method}: {trainable:,} trainable parameters "
            f"({100 * trainable / base_parameters(model):.2f} % of the base), {len(examples)} rows, {schedule.steps} "
            f"steps of {schedule.rows_per_step} rows, {'bf16' if flags.bf16 else 'fp32'} on {device}, in {folder}; "
            f"estimated memory {estimate.summary()}"
        )
        if estimate.explain():
            log_rank0(estimate.explain())
        params = adapter_params(adapter_config, asdict(args))
        _train(flags, model, optimizer, examples, schedule, state, params, folder)
    log_rank0(f"{folder / f'checkpoint-{schedule.steps}.pth'}: done; python extract_adapter.py writes the adapter")
    return folder


def _train(
    flags: TrainConfig,
    model: Transformer,
    optimizer: torch.optim.AdamW,
    examples: list[Example],
    schedule: Schedule,
    state: TrainState,
    params: dict[str, Any],
    folder: Path,
) -> None:
    """Run the loop with its log and its checkpoints: every `save_every` steps, at the end, and before an early end."""
    log = RunLog(folder, schedule.steps, state.done) if is_rank0() else None
    writer = CheckpointWriter(folder, flags.keep_checkpoints)
    every = flags.save_every or schedule.steps_per_epoch
    saved = state.done

    def save() -> None:
        nonlocal saved
        if saved != state.done:
            assert_replicas_equal(model)
            content = state_dict(model, optimizer, state, params)
            if is_rank0():
                writer.save(content)
            saved = state.done

    def on_step(entry: dict[str, Any]) -> None:
        if log:
            log.step(entry)
        if entry["step"] % every == 0 or entry["step"] == schedule.steps:
            save()

    with GracefulShutdown() as shutdown:
        try:
            arguments = (flags.batch_size, flags.seed, state, on_step, lambda: shutdown.signum)
            with Lanes(model, forward_backward, expert_fraction, uses_load_balancing(model)) as fast:
                train(model, optimizer, examples, schedule, *arguments, forward_backward=fast)
        except (NonFiniteLoss, Stopped) as end:
            save()
            writer.wait()
            dist.barrier()  # no process ends, and takes the others along, before the checkpoint is on the disk
            result = f"checkpoint-{state.done}.pth is saved" if state.done else "no step was done"
            if isinstance(end, NonFiniteLoss):
                raise NonFiniteLoss(f"{end} ({result})") from None
            log_rank0(
                f"stopped by {end.name} after step {state.done}: {result}; the same command with --resume goes on"
            )
            raise
        finally:
            if log:
                log.close()
            writer.wait()


def log_rank0(text: str) -> None:
    """Print a line for the user, once for all processes."""
    if is_rank0():
        print(text, file=sys.stderr, flush=True)


def _record_to_resume(config: RunConfig, folder: Path, hashes: dict[str, str]) -> dict[str, Any] | None:
    """Return the record of the run to resume, with "has_checkpoint", or None where a run begins.

    ValueError where the folder holds a run and neither --resume nor --overwrite is given, or where that run had another
    base, other rows or other numbers of them.
    """
    flags = config.train
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: --output_dir is a file, expected a folder")
    existing = checkpoints(folder)
    if flags.overwrite or not (existing or (flags.resume and (folder / CONFIG).exists())):
        return None
    if not flags.resume:
        raise ValueError(
            f"{folder}: holds a run already ({existing[-1][1].name}); give --resume to go on with it, --overwrite to "
            "begin anew, or another --output_dir"
        )
    record = read_json(folder / CONFIG)
    if hashes["data_sha256"] != record.get("data_sha256"):
        raise ValueError(f"{flags.data_path}: not the rows that the run in {folder} was started with")
    if hashes["base_fingerprint"] != record.get("base_fingerprint"):
        raise ValueError(f"{flags.ckpt_dir}: not the base that the run in {folder} was started with")
    rows = record["rows_per_step"]
    if "accum_iter" in config.explicit and rows != flags.batch_size * flags.accum_iter * dp_size():
        raise ValueError(
            f"{folder}: the run takes {rows} rows per step, not --batch_size {flags.batch_size} x --accum_iter "
            f"{flags.accum_iter} x {dp_size()} data-parallel ranks; leave --accum_iter out"
        )
    return record | {"has_checkpoint": bool(existing)}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the run's folder, keep other runs out of it, and remove what a killed process had half written."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK, f"{folder}: another run is writing there; give another --output_dir"):
        remove_stale_temp_files(folder)
        yield


def _latest(folder: Path, model: Transformer) -> dict[str, Any]:
    """Read the latest checkpoint that is not damaged; later ones are reported and renamed."""
    content, path, damaged = latest(folder, model)
    for file, problem in damaged.items():
        file.rename(file.with_name(file.name + DAMAGED))
        log_rank0(f"{problem}; kept as {file.name}{DAMAGED}, going on from {path.name}")
    return content


def _begin_anew(folder: Path, record: dict[str, Any]) -> None:
    """Write the run's record; an earlier run's checkpoints, adapter and log are deleted (--overwrite)."""
    old = [*(file for _, file in reversed(checkpoints(folder))), *folder.glob(f"checkpoint-*{DAMAGED}")]
    for file in [*old, *(folder / name for name in ("adapter.pth", PARAMS, "log.jsonl"))]:
        file.unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    write_json(folder / CONFIG, record)


def _extend_record(folder: Path, leaks: dict[str, Any], step: int | None) -> None:
    """Add to a resumed run's record the result of `--leak_tests`, and that the run goes on after `step`."""
    record = read_json(folder / CONFIG)
    if step is not None:
        record["resumed"] = [*record.get("resumed", []), {"step": step, **run_metadata()}]
    write_json(folder / CONFIG, record | leaks)
