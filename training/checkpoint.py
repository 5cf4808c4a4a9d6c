"""Checkpoints of a run: the adapter and the state of its training, never the base.

`checkpoint-<step>.pth` and `checkpoint-BEST.pth`, that of the lowest validation loss, are written whole or not at all.
Tensors are whole, whatever the model-parallel layout.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama.args import ModelArgs
from llama.distributed import broadcast_from_rank0, is_rank0
from llama.model import Transformer
from moa.adapter_file import PARAMS, adapter_file, load_adapter
from moa.files import load_tensors, write_torch
from moa.reading import short_repr
from moa.state import (
    AdapterParameter,
    adapter_parameters,
    adapter_state_dict,
    check_state_dict,
    gather_full,
    load_adapter_state_dict,
    rename_old_keys,
    require_same_keys,
    require_tensors,
    shard_all,
)
from training.loop import TrainState
from training.resume import BEST, checkpoints
from training.validation import BestLoss

TRAINING_ONLY = {"lora_lr_ratio", "threshold_gradient", "lb_loss_coeff"}  # settings that an adapter's output is without
MOMENTS = ("exp_avg", "exp_avg_sq")


def state_dict(
    model: nn.Module, optimizer: torch.optim.AdamW, state: TrainState, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of a checkpoint, a copy on the CPU. Every rank of a model-parallel group must call it.

    ValueError where a number is not finite: no run could be resumed from it.
    """
    parameters = {key: entry.parameter for key, entry in adapter_parameters(model).items()}
    tensors = {"adapter": adapter_state_dict(model)}
    for name in MOMENTS:
        # Before the first update there is none
        local = {key: optimizer.state[p].get(name, torch.zeros_like(p)) for key, p in parameters.items()}
        tensors[name] = gather_full(local, model)
    for name, whole in tensors.items():
        require_tensors(whole, f"the {name} after step {state.done}")
    adapter = tensors.pop("adapter")
    progress = {"step": state.done, "skipped": list(state.skipped), "validation": asdict(state.best)}
    return {"adapter": adapter, "adapter_params": dict(params), "optimizer": tensors} | progress


def load_state_dict(content: dict[str, Any] | None, model: nn.Module, optimizer: torch.optim.AdamW) -> TrainState:
    """Restore a checkpoint (`read`). Rank 0 gives it, the others None: they need not see its file."""
    entries = adapter_parameters(model)
    step, skipped, best = broadcast_from_rank0(lambda: (content["step"], content["skipped"], content["validation"]))
    adapter = broadcast_tensors(content and content["adapter"], adapter_parameters(model, untrained=True))
    load_adapter_state_dict(model, adapter, "checkpoint")
    for name in MOMENTS:
        moments = broadcast_tensors(content and content["optimizer"][name], entries)
        for key, shard in shard_all(moments, model).items():
            parameter = entries[key].parameter
            state = optimizer.state[parameter]
            state[name] = torch.empty_like(parameter).copy_(shard)  # laid out as the parameter, as fused AdamW has it
            state["step"] = torch.tensor(float(step - len(skipped)), device=parameter.device)  # of updates
    return TrainState(step, list(skipped), BestLoss(**best))


def load_initial_adapter(path: str, model: Transformer, base: ModelArgs) -> None:
    """Load the numbers of an adapter file. ValueError where its settings are not the model's."""
    config, tensors = load_adapter(path, base)
    ours, theirs = model.config.to_dict(), config.to_dict()
    for name in sorted((model.config.active_fields() | config.active_fields()) - TRAINING_ONLY):
        if ours[name] != theirs[name]:
            raise ValueError(
                f"{path}: the adapter has {name} {short_repr(theirs[name])}, the run {short_repr(ours[name])} "
                f"(--adapter_config {adapter_file(path).with_name(PARAMS)} takes its settings)"
            )
    load_adapter_state_dict(model, tensors, path)


def broadcast_tensors(
    tensors: Mapping[str, Tensor] | None, entries: Mapping[str, AdapterParameter]
) -> Mapping[str, Tensor]:
    """Send rank 0's whole tensors of these parameters to every rank in one message."""
    if dist.get_world_size() == 1:
        return tensors
    device = next(iter(entries.values())).parameter.device
    sizes = [torch.Size(entry.spec.shape).numel() for entry in entries.values()]
    if is_rank0():
        flat = torch.cat([tensors[key].flatten().float() for key in entries]).to(device)
    else:
        flat = torch.empty(sum(sizes), device=device)
    dist.broadcast(flat, 0)
    return {k: t.view(e.spec.shape) for (k, e), t in zip(entries.items(), flat.cpu().split(sizes), strict=True)}


def save(
    folder: Path, content: dict[str, Any], keep: int | None = None, numbered: bool = True, best: bool = False
) -> None:
    """Write checkpoint-BEST.pth if `best`; if `numbered` checkpoint-<step>.pth, of which the newest `keep` stay."""
    if best:  # first: a run that goes on from the numbered one does not evaluate its step again
        write_torch(folder / BEST, content)
    if numbered:
        write_torch(folder / f"checkpoint-{content['step']}.pth", content)
        for _, old in checkpoints(folder)[:-keep] if keep else ():
            old.unlink()


def read(path: Path, model: nn.Module) -> dict[str, Any]:
    """Read a checkpoint of a run of this model. ValueError names the file and what is wrong with it."""
    content = load_tensors(path)
    content.setdefault("skipped", [])  # runs of earlier revisions
    content.setdefault("validation", asdict(BestLoss()))
    keys = ("adapter", "adapter_params", "optimizer", "step", "skipped", "validation")
    require_same_keys(keys, content, str(path), "key")
    step, skipped, optimizer = content["step"], content["skipped"], content["optimizer"]
    if not isinstance(skipped, list) or not all(type(n) is int and 1 <= n <= step for n in (step, *skipped)):
        raise ValueError(f"{path}: step must be a positive whole number, and skipped a list of earlier ones")
    require_same_keys(asdict(BestLoss()), content["validation"], str(path), "validation key")
    require_same_keys(MOMENTS, optimizer if isinstance(optimizer, dict) else {}, str(path), "optimizer key")
    content["adapter"] = rename_old_keys(content["adapter"])
    content["optimizer"] = {name: rename_old_keys(moments) for name, moments in optimizer.items()}
    for name, tensors in {"adapter": content["adapter"], **content["optimizer"]}.items():
        check_state_dict(model, tensors, f"{path}: {name}", untrained=name == "adapter")
    return content
