"""A fine-tuning run from its settings: folder, model, data, loop, checkpoints. What `finetune.py` calls."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama import Llama, ModelArgs, Transformer
from llama.accelerate import Lanes
from llama.checkpoint import fingerprint, load_params_and_tokenizer
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
from moa.reading import short_repr
from moa.replicas import assert_replicas_equal
from moa.state import count_parameters
from training.checkpoint import Saver, newest, pack, restore
from training.config import HERE, RunConfig, TrainConfig, run_folder
from training.data import load_examples
from training.estimate import base_parameters
from training.leaks import check_leaks
from training.log import RunLog
from training.loop import (
    NonFiniteLoss,
    TrainState,
    expert_fraction,
    forward_backward,
    make_optimizer,
    train,
    uses_load_balancing,
)
from training.memory import Needed, advice, needed, needed_by_all
from training.paths import CONFIG, DAMAGED, LOCK, checkpoints
from training.record import resume_record, start_record
from training.schedule import Plan, plan_of
from training.shutdown import GracefulShutdown, Stopped


def run(settings: RunConfig) -> Path:
    """Train as the settings say (`ckpt_dir` and `data_path` filled in). Returns the run's folder.

    Raises ValueError or OSError with one sentence; what an earlier run left is then untouched. Raises Stopped, a
    SystemExit, after a last checkpoint, where a signal asked for it.
    """
    device = get_device(settings.train.device)
    args, tokenizer = load_params_and_tokenizer(settings.train.ckpt_dir)
    memory = needed(settings, args, device)
    with distributed_run(device, settings.train.model_parallel_size):
        memory = needed_by_all(memory)
        with advice(settings, memory):
            return _run(settings, args, tokenizer, device, memory)


def _run(settings: RunConfig, args: ModelArgs, tokenizer: Tokenizer, device: torch.device, memory: Needed) -> Path:
    flags = settings.train
    folder = run_folder(settings)
    contents = {"base_fingerprint": fingerprint(flags.ckpt_dir), "data_sha256": file_hash(flags.data_path)}
    resumed = broadcast_from_rank0(lambda: _run_to_resume(settings, folder, contents))
    begun = resumed is not None and resumed["begun"]
    if flags.bf16 is None:
        flags = replace(flags, bf16=bf16_is_fast(device))
        settings = replace(settings, train=flags)

    config = settings.config(args)
    same = {f"--{name}": value for name, value in asdict(flags).items() if name not in HERE}
    assert_same_on_all_ranks(same | config.to_dict() | contents | {"torch": torch.__version__})
    examples = load_examples(flags.data_path, tokenizer, flags.max_seq_len, quiet=not is_rank0())
    plan = plan_of(flags, len(examples), dp_size(), resumed and resumed["rows_per_step"])
    if resumed and resumed.get("steps") != plan.steps:
        raise ValueError(
            f"{folder / CONFIG}: steps is {short_repr(resumed.get('steps'))}, its settings ask for {plan.steps}"
        )
    leaks = {}
    if flags.leak_tests is not None and is_rank0():
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
    model.activation_checkpointing = memory.choice
    optimizer = make_optimizer(model, flags.weight_decay)
    with _locked(folder) if is_rank0() else nullcontext():
        if is_rank0() and not begun and not flags.overwrite and checkpoints(folder):
            raise ValueError(f"{folder}: another run has been there in the meantime; give --resume to go on with it")
        progress = TrainState()
        if begun:
            progress = restore(_newest(folder, model) if is_rank0() else None, model, optimizer)
        assert_replicas_equal(model)
        complete, trained = progress.done >= plan.steps, count_parameters(model)["total"]
        if is_rank0() and begun:
            _add_to_record(folder, leaks, None if complete else progress.done)
        elif is_rank0():
            record = start_record(settings, config, args, plan, contents)
            _prepare(folder, record | {"trainable_parameters": trained} | leaks)
        if complete:
            say(f"{folder}: the run is complete, all {plan.steps} steps are done")
            return folder
        say(
            f"{config.method}: {trained:,} trainable parameters ({100 * trained / base_parameters(model):.2f} % of the "
            f"base), {len(examples)} rows, {plan.steps} steps of {plan.rows_per_step} rows, "
            f"{'bf16' if flags.bf16 else 'fp32'} on {device}, in {folder}; estimated memory {memory.in_words()}"
        )
        if memory.why():
            say(memory.why())
        _train(flags, model, optimizer, examples, plan, progress, adapter_params(config, asdict(args)), folder)
    say(f"{folder / f'checkpoint-{plan.steps}.pth'}: done; python extract_adapter.py writes the adapter")
    return folder


def _train(
    flags: TrainConfig,
    model: Transformer,
    optimizer: torch.optim.AdamW,
    examples: list,
    plan: Plan,
    progress: TrainState,
    params: dict[str, Any],
    folder: Path,
) -> None:
    """The loop with its log and its checkpoints: every `save_every` steps, at the end, and before an early end."""
    log = RunLog(folder, plan.steps, progress.done) if is_rank0() else None
    saver = Saver(folder, flags.keep_checkpoints)
    every = flags.save_every or plan.steps_per_epoch
    saved = progress.done

    def save() -> None:
        nonlocal saved
        if saved != progress.done:
            assert_replicas_equal(model)
            content = pack(model, optimizer, progress, params)
            if is_rank0():
                saver.save(content)
            saved = progress.done

    def on_step(entry: dict[str, Any]) -> None:
        if log:
            log.step(entry)
        if entry["step"] % every == 0 or entry["step"] == plan.steps:
            save()

    with GracefulShutdown() as request:
        try:
            arguments = (flags.batch_size, flags.seed, progress, on_step, lambda: request.signum)
            with Lanes(model, forward_backward, expert_fraction, uses_load_balancing(model)) as fast:
                train(model, optimizer, examples, plan, *arguments, forward_backward=fast)
        except (NonFiniteLoss, Stopped) as end:
            save()
            saver.wait()
            dist.barrier()  # nobody goes, and takes the others along, before it is on the disk
            at = f"checkpoint-{progress.done}.pth is saved" if progress.done else "no step was done"
            if isinstance(end, NonFiniteLoss):
                raise NonFiniteLoss(f"{end} ({at})") from None
            say(f"stopped by {end.name} after step {progress.done}: {at}; the same command with --resume goes on")
            raise
        finally:
            if log:
                log.close()
            saver.wait()


def say(text: str) -> None:
    """Tell the user, once for all processes."""
    if is_rank0():
        print(text, file=sys.stderr, flush=True)


def _run_to_resume(settings: RunConfig, folder: Path, contents: dict[str, str]) -> dict[str, Any] | None:
    """The record of the run to go on with, None where one begins; "begun": whether it has a checkpoint. ValueError
    where the folder holds a run and neither --resume nor --overwrite is given, or where its run had another base, other
    rows or other numbers of them."""
    flags = settings.train
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: --output_dir is a file, expected a folder")
    found = checkpoints(folder)
    if flags.overwrite or not (found or (flags.resume and (folder / CONFIG).exists())):
        return None
    if not flags.resume:
        raise ValueError(
            f"{folder}: holds a run already ({found[-1][1].name}); give --resume to go on with it, --overwrite to "
            "begin anew, or another --output_dir"
        )
    record = read_json(folder / CONFIG)
    if contents["data_sha256"] != record.get("data_sha256"):
        raise ValueError(f"{flags.data_path}: not the rows that the run in {folder} was started with")
    if contents["base_fingerprint"] != record.get("base_fingerprint"):
        raise ValueError(f"{flags.ckpt_dir}: not the base that the run in {folder} was started with")
    rows = record.get("rows_per_step")
    if not isinstance(rows, int) or isinstance(rows, bool) or not 1 <= rows <= 10**9:
        raise ValueError(f"{folder / CONFIG}: rows_per_step must be a number from 1 to 10**9, not {short_repr(rows)}")
    if not isinstance(record.get("resumed", []), list):
        raise ValueError(f"{folder / CONFIG}: resumed must be a list, not {short_repr(record['resumed'])}")
    if "accum_iter" in settings.given and rows != plan_of(flags, 1, dp_size()).rows_per_step:
        raise ValueError(
            f"{folder}: the run takes {rows} rows per step, not --batch_size {flags.batch_size} x --accum_iter "
            f"{flags.accum_iter} x {dp_size()} data-parallel ranks; leave --accum_iter out"
        )
    return record | {"begun": bool(found)}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the run's folder, keep other runs out of it, and remove what a killed process had half written."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK, f"{folder}: another run is writing there; give another --output_dir"):
        remove_stale_temp_files(folder)
        yield


def _newest(folder: Path, model: Transformer) -> dict[str, Any]:
    """The newest checkpoint that can be read. Newer ones that cannot are told and set aside."""
    content, path, wrong = newest(folder, model)
    for damaged, problem in wrong.items():
        damaged.rename(damaged.with_name(damaged.name + DAMAGED))
        say(f"{problem}; kept as {damaged.name}{DAMAGED}, going on from {path.name}")
    return content


def _prepare(folder: Path, record: dict[str, Any]) -> None:
    """Write the run's record; an earlier run's checkpoints, adapter and log go (--overwrite)."""
    old = [*(file for _, file in reversed(checkpoints(folder))), *folder.glob(f"checkpoint-*{DAMAGED}")]
    for file in [*old, *(folder / name for name in ("adapter.pth", PARAMS, "log.jsonl"))]:
        file.unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    write_json(folder / CONFIG, record)


def _add_to_record(folder: Path, leaks: dict[str, Any], step: int | None) -> None:
    """To the record of a run that is resumed: what `--leak_tests` found, and that it goes on after `step`."""
    record = read_json(folder / CONFIG)
    if step is not None:
        record["resumed"] = [*record.get("resumed", []), resume_record(step)]
    write_json(folder / CONFIG, record | leaks)
