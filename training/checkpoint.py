"""Checkpoints of a run: the adapter and the state of its training, never the base.

`checkpoint-<step>.pth` is written whole or not at all. Tensors are whole, whatever the model-parallel layout.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moa.files import read_torch, write_torch
from moa.state import adapter_parameters, adapter_state, load_adapter_state, parts, require_same_keys, whole

MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's checkpoints, oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)\.pth", f.name), f) for f in folder.glob("checkpoint-*.pth")]
    return sorted((int(match[1]), file) for match, file in found if match)


def pack(model: nn.Module, optimizer: torch.optim.AdamW, step: int, params: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint after `step` steps. Every rank of a model-parallel group must call it."""
    entries = adapter_parameters(model)
    moments = {
        name: whole({key: optimizer.state[entry.parameter][name] for key, entry in entries.items()}, model)
        for name in MOMENTS
    }
    return {"adapter": adapter_state(model), "adapter_params": params, "optimizer": moments, "step": step}


def save(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / f"checkpoint-{content['step']}.pth"
    write_torch(path, content)
    return path


def restore(path: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """Put a checkpoint back; returns the number of steps done. ValueError naming the file and what does not fit."""
    content = read_torch(path)
    require_same_keys(("adapter", "adapter_params", "optimizer", "step"), content, str(path), "entry")
    step, optimizer_state = content["step"], content["optimizer"]
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise ValueError(f"{path}: step must be a positive whole number, not {step!r}")
    for name in ("adapter", "optimizer"):
        if not isinstance(content[name], dict):
            raise ValueError(f"{path}: {name} must be a dictionary, not {type(content[name]).__name__}")
    entries = adapter_parameters(model)
    load_adapter_state(model, content["adapter"], str(path))
    require_same_keys(MOMENTS, optimizer_state, str(path), "optimizer entry")
    for name in MOMENTS:
        moments = optimizer_state[name]
        if not isinstance(moments, dict):
            raise ValueError(f"{path}: optimizer {name} must be a dictionary, not {type(moments).__name__}")
        require_same_keys(entries, moments, f"{path}: optimizer {name}", "tensor")
        for key, tensor in moments.items():
            shape = entries[key].declared.shape
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not torch.isfinite(tensor).all():
                raise ValueError(f"{path}: optimizer {name} of {key} is not a tensor of {shape} finite numbers")
        for key, part in parts(moments, model).items():
            parameter = entries[key].parameter
            state = optimizer.state[parameter]
            state[name] = part.to(parameter.device, torch.float32).clone()
            state["step"] = torch.tensor(float(step))
    return step
