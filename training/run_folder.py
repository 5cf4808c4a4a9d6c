"""A run's folder: the record of its start, its lock, and the checkpoint that it goes on from."""

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from corpus.contamination import check_contamination
from llama.args import ModelArgs
from llama.checkpoint import fingerprint
from llama.distributed import assert_same_on_all_ranks, broadcast_from_rank0, dp_size, is_rank0
from llama.model import Transformer
from moa.adapter_file import PARAMS, adapter_file
from moa.files import file_hash, lock, read_json, remove_stale_temp_files, write_json
from moa.state import assert_replicas_equal, count_parameters
from training.checkpoint import load_state_dict, read
from training.config import PER_HOST_FIELDS, RunConfig
from training.estimate import base_parameters
from training.loop import TrainState
from training.recorder import log_rank0
from training.resume import BEST, HASHED_FILES, checkpoints, record_to_resume, restorable
from training.schedule import Schedule

PACKAGES = ("torch", "numpy", "fairscale", "tiktoken", "flash_attn")
DAMAGED = ".damaged"  # behind the name of a checkpoint that could not be read


class RunFolder:
    """The folder of a run. All processes call its methods; rank 0 reads and writes.

    ValueError, before anything is changed, where the folder holds another run, or where processes differ in what they
    were told. record: of the run to resume, None of one that begins.
    """

    def __init__(self, config: RunConfig, args: ModelArgs):
        flags = config.train
        self.path, self._config, self._args = config.folder, config, args
        files = {name: getattr(flags, name) for name in HASHED_FILES}
        files["init_adapter"] = flags.init_adapter and adapter_file(flags.init_adapter)
        self._hashes = {f"{HASHED_FILES[name]}_sha256": file_hash(path) for name, path in files.items() if path}
        self._hashes["base_fingerprint"] = fingerprint(flags.ckpt_dir)
        self.record = broadcast_from_rank0(lambda: record_to_resume(config, self._hashes, dp_size()))
        shared = {f"--{name}": value for name, value in asdict(flags).items() if name not in PER_HOST_FIELDS}
        adapter = config.adapter_config(args).to_dict()
        assert_same_on_all_ranks(shared | adapter | self._hashes | {"torch": torch.__version__})
        self._leaks = {}
        if flags.leak_tests is not None and is_rank0():
            self._leaks = {"leaks": check_contamination(flags.data_path, flags.leak_tests)}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, keep other runs out of it, and remove what a killed process had half written."""
        if not is_rank0():
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.path / ".lock", f"{self.path}: another run is writing there; give another --output_dir"):
            remove_stale_temp_files(self.path)
            yield

    def begin(self, model: Transformer, optimizer: torch.optim.AdamW, schedule: Schedule) -> TrainState:
        """Restore the last whole checkpoint, or write the record of a new run -> what is done. Call it when locked."""
        resumes = self.record is not None and self.record["has_checkpoint"]
        if is_rank0() and not resumes and not self._config.train.overwrite and restorable(self.path):
            raise ValueError(f"{self.path}: another run has been there in the meantime; give --resume to go on with it")
        state = TrainState()
        if resumes:
            state = load_state_dict(self._latest(model) if is_rank0() else None, model, optimizer)
        assert_replicas_equal(model)
        if is_rank0() and resumes:
            record = read_json(self._config.record)
            if not state.is_complete(schedule.steps):
                record["resumed"] = [*record.get("resumed", []), {"step": state.done, **run_metadata()}]
            write_json(self._config.record, record | self._leaks)
        elif is_rank0():
            self._delete_old_run()
            write_json(self._config.record, self._start_record(schedule, count_parameters(model)["total"]))
        return state

    def summary(self, model: Transformer, schedule: Schedule, val_rows: int) -> str:
        """What is trained, on what, and where, in one line."""
        trainable, weight = count_parameters(model)["total"], model.output.weight
        percent = 100 * trainable / base_parameters(model)
        rows = f"{schedule.n_rows} rows" + (f" and {val_rows} for validation" if val_rows else "")
        dtype = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
        return (
            f"{model.config.method}: {trainable:,} trainable parameters ({percent:.2f} % of the base), "
            f"{rows}, {schedule.steps} steps of {schedule.rows_per_step} rows, "
            f"{dtype} on {weight.device}, in {self.path}"
        )

    def _latest(self, model: Transformer) -> dict[str, Any]:
        """Read the latest checkpoint that is not damaged; later ones are reported and renamed.

        ValueError where there is none.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(restorable(self.path)):
            try:
                content = read(path, model)
            except ValueError as error:
                damaged[path] = str(error)
                continue
            for file, problem in damaged.items():
                file.rename(file.with_name(file.name + DAMAGED))
                log_rank0(f"{problem}; kept as {file.name}{DAMAGED}, going on from {path.name}")
            return content
        raise ValueError(f"{self.path}: no checkpoint can be read: {'; '.join(damaged.values())}")

    def _delete_old_run(self) -> None:
        """Delete the checkpoints, adapter and log of an earlier run (--overwrite)."""
        old = [*(file for _, file in reversed(checkpoints(self.path))), *self.path.glob(f"checkpoint-*{DAMAGED}")]
        for file in [*old, *(self.path / name for name in (BEST, "adapter.pth", PARAMS, "log.jsonl"))]:
            file.unlink(missing_ok=True)
        for name in ("tensorboard", "validation"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def _start_record(self, schedule: Schedule, trainable: int) -> dict[str, Any]:
        return {
            "settings": asdict(self._config.train) | self._config.adapter,
            "adapter": self._config.adapter_config(self._args).to_dict(),
            "base": asdict(self._args),
            "steps": schedule.steps,
            "warmup_steps": schedule.warmup_steps,
            "rows_per_step": schedule.rows_per_step,
            "lr": schedule.lr,
            "rows": schedule.n_rows,
            **self._hashes,
            **run_metadata(),
            "trainable_parameters": trainable,
            **self._leaks,
        }


def run_metadata() -> dict[str, Any]:
    """When, by what program, and on what machine the run goes."""
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processes": dist.get_world_size(),
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version()}
        | {p.name: p.version for p in distributions() if p.name in PACKAGES},
        "machine": {"platform": platform.platform(), "processor": platform.machine()},
    }


def _git_revision() -> str | None:
    """Commit of this source tree, with "+changes" where it has uncommitted ones; None outside a git checkout."""
    git = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
