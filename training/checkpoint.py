"""Checkpoints of a run: the adapter and the state of its training, never the base.

`checkpoint-<step>.pth` is written whole or not at all. Tensors are whole, whatever the model-parallel layout.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moa.files import read_torch, write_torch
from moa.state import (
    adapter_parameters,
    adapter_state,
    load_adapter_state,
    parts,
    require_same_keys,
    require_tensors,
    whole,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


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
    if not isinstance(optimizer_state, dict):
        raise ValueError(f"{path}: optimizer must be a dictionary, not {type(optimizer_state).__name__}")
    entries = adapter_parameters(model)
    load_adapter_state(model, content["adapter"], str(path))
    require_same_keys(MOMENTS, optimizer_state, str(path), "optimizer entry")
    for name in MOMENTS:
        moments = optimizer_state[name]
        require_tensors(moments, f"{path}: optimizer {name}")
        require_same_keys(entries, moments, f"{path}: optimizer {name}", "tensor")
        for key, tensor in moments.items():
            if tuple(tensor.shape) != entries[key].declared.shape:
                raise ValueError(f"{path}: optimizer {name} of {key} has shape {tuple(tensor.shape)}")
        for key, part in parts(moments, model).items():
            parameter = entries[key].parameter
            state = optimizer.state[parameter]
            state[name] = part.to(parameter.device, torch.float32).clone()
            state["step"] = torch.tensor(float(step))
    return step
