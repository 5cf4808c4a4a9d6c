"""What a run's `config.json` says of it: everything that is needed to tell later what the run was."""

import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama import ModelArgs
from moa.config import AdapterConfig
from training.config import RunConfig
from training.schedule import Plan


def start_record(
    settings: RunConfig, config: AdapterConfig, args: ModelArgs, plan: Plan, contents: dict[str, str]
) -> dict[str, Any]:
    """Of a run that begins. contents: hashes of its base and its rows."""
    return {
        "settings": asdict(settings.train) | settings.adapter,
        "adapter": config.to_dict(),
        "base": asdict(args),
        "steps": plan.steps,
        "warmup_steps": plan.warmup_steps,
        "rows_per_step": plan.rows_per_step,
        "lr": plan.lr,
        "rows": plan.n_rows,
        **contents,
        **_here(),
    }


def resume_record(step: int) -> dict[str, Any]:
    """Of a run that goes on after `step`."""
    return {"step": step, **_here()}


def _here() -> dict[str, Any]:
    """When, by what, and on what."""
    return {
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
