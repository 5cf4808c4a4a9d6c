"""Checkpoints of a run: the adapter and the state of its training, never the base.

`checkpoint-<step>.pth` is written whole or not at all. Tensors are whole, whatever the model-parallel layout.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama.distributed import broadcast_from_rank0, is_rank0
from moa.files import load_tensors, write_torch
from moa.reading import short_repr
from moa.state import (
    adapter_parameters,
    adapter_state_dict,
    check_state_dict,
    gather_full,
    load_adapter_state_dict,
    require_same_keys,
    require_tensors,
    shard_all,
)
from training.loop import TrainState
from training.paths import checkpoints

MOMENTS = ("exp_avg", "exp_avg_sq")


def pack(
    model: nn.Module, optimizer: torch.optim.AdamW, progress: TrainState, params: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a checkpoint, a copy on the CPU. Every rank of a model-parallel group must call it. ValueError
    where it has numbers that are not finite: nobody could go on from it."""
    entries = adapter_parameters(model)
    adapter = adapter_state_dict(model)
    moments = {
        name: gather_full({key: _moment(optimizer, entry.parameter, name) for key, entry in entries.items()}, model)
        for name in MOMENTS
    }
    for what, tensors in {"adapter": adapter, **moments}.items():
        require_tensors(tensors, f"the {what} after step {progress.done}")
    return {
        "adapter": adapter,
        "adapter_params": dict(params),
        "optimizer": moments,
        "step": progress.done,
        "skipped": list(progress.skipped),
    }


def save(folder: Path, content: dict[str, Any], keep: int | None = None) -> Path:
    """Write a checkpoint; of all there are, the newest `keep` stay (None: all)."""
    path = folder / f"checkpoint-{content['step']}.pth"
    write_torch(path, content)
    for _, old in checkpoints(folder)[:-keep] if keep else ():
        old.unlink()
    return path


class Saver:
    """Writes checkpoints beside the training, one at a time. On the main process."""

    def __init__(self, folder: Path, keep: int | None):
        self._folder, self._keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, content: dict[str, Any]) -> None:
        """Begin to write; `content` must not change from now on. Then raises what went wrong with the one before: this
        one may still be the last."""
        before = self._join()
        self._thread = threading.Thread(target=self._write, args=(content,), name="save")
        self._thread.start()
        if before is not None:
            raise before

    def wait(self) -> None:
        """Until what was begun is on the disk. Raises OSError where it could not be written."""
        error = self._join()
        if error is not None:
            raise error

    def _join(self) -> BaseException | None:
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        return error

    def _write(self, content: dict[str, Any]) -> None:
        try:
            save(self._folder, content, self._keep)
        except BaseException as error:
            self._error = error


def read(path: Path, model: nn.Module) -> dict[str, Any]:
    """A checkpoint of a run of this model, checked. ValueError naming the file and what is wrong with it."""
    content = load_tensors(path)
    content.setdefault("skipped", [])  # runs of earlier revisions
    require_same_keys(("adapter", "adapter_params", "optimizer", "step", "skipped"), content, str(path), "entry")
    step, skipped, optimizer_state = content["step"], content["skipped"], content["optimizer"]
    if not _is_step(step):
        raise ValueError(f"{path}: step must be a positive whole number, not {short_repr(step)}")
    if not isinstance(skipped, list) or not all(_is_step(s) and s <= step for s in skipped):
        raise ValueError(f"{path}: skipped must be a list of steps")
    if not isinstance(optimizer_state, dict):
        raise ValueError(f"{path}: optimizer must be a dictionary, not {type(optimizer_state).__name__}")
    require_same_keys(MOMENTS, optimizer_state, str(path), "optimizer entry")
    for what, tensors in {"adapter": content["adapter"], **optimizer_state}.items():
        check_state_dict(model, tensors, f"{path}: {what}")
    return content


def newest(folder: Path, model: nn.Module) -> tuple[dict[str, Any], Path, dict[Path, str]]:
    """The newest checkpoint that is whole: content, file, and the newer ones with what is wrong with each. ValueError
    where there is none."""
    wrong: dict[Path, str] = {}
    for _, path in reversed(checkpoints(folder)):
        try:
            return read(path, model), path, wrong
        except ValueError as error:
            wrong[path] = str(error)
    raise ValueError(f"{folder}: no checkpoint can be read: {'; '.join(wrong.values())}")


def restore(content: dict[str, Any] | None, model: nn.Module, optimizer: torch.optim.AdamW) -> TrainState:
    """Put a checkpoint (`read`) back. The main process has it and hands it to all others, which give None: they need
    not see its file."""
    entries = adapter_parameters(model)
    step, skipped = broadcast_from_rank0(lambda: (content["step"], content["skipped"]))
    load_adapter_state_dict(model, _hand_out(content and content["adapter"], model), "checkpoint")
    for name in MOMENTS:
        moments = _hand_out(content and content["optimizer"][name], model)
        for key, part in shard_all(moments, model).items():
            parameter = entries[key].parameter
            state = optimizer.state[parameter]
            state[name] = torch.empty_like(parameter).copy_(part)  # laid out as the parameter, as fused AdamW has it
            state["step"] = torch.tensor(float(step - len(skipped)), device=parameter.device)  # of updates
    return TrainState(step, list(skipped))


def _moment(optimizer: torch.optim.AdamW, parameter: nn.Parameter, name: str) -> Tensor:
    """One of AdamW's moments of a parameter; before the first update it has none."""
    state = optimizer.state.get(parameter)
    return state[name] if state else torch.zeros_like(parameter)


def _hand_out(tensors: Mapping[str, Tensor] | None, model: nn.Module) -> Mapping[str, Tensor]:
    """Whole tensors, keyed as the adapter's are, from the main process on every one, in one message."""
    if dist.get_world_size() == 1:
        return tensors
    entries = adapter_parameters(model)
    device = next(iter(entries.values())).parameter.device
    sizes = [torch.Size(entry.spec.shape).numel() for entry in entries.values()]
    if is_rank0():
        flat = torch.cat([tensors[key].flatten().float() for key in entries]).to(device)
    else:
        flat = torch.empty(sum(sizes), device=device)
    dist.broadcast(flat, 0)
    pieces = flat.cpu().split(sizes)
    return {key: t.view(entries[key].declared.shape) for key, t in zip(entries, pieces, strict=True)}


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
