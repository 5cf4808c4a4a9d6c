"""The adapters' parameters, as their modules declare them, and their tensors as state dicts.

Freezing, counting, optimizer groups, initialising, saving and loading all go through `adapter_parameters`. Saved
tensors are always whole, whatever the model-parallel layout that wrote or reads them.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moa.adapter import AdapterModule, ParamSpec
from moa.parallel import gather, mp_rank, shard_of
from moa.reading import short_repr

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class AdapterParameter(NamedTuple):
    parameter: nn.Parameter
    spec: ParamSpec
    slot: str  # adapter's name in its block ("lora_Q", "prompt", ...), or "router"


def adapter_parameters(model: nn.Module, untrained: bool = False) -> dict[str, AdapterParameter]:
    """Key in the state dict -> parameter, for all that trains of the adapters and routers of `model`.

    untrained: with those that are saved but have no gradient.
    """
    parameters = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterModule):
            parts = path.split(".")
            slot = parts[parts.index("adapters") + 1] if "adapters" in parts else "router"
            for name, spec in module.specs.items():
                if spec.trained or untrained:
                    parameters[f"{path}.{name}"] = AdapterParameter(getattr(module, name), spec, slot)
    return parameters


def self_balancing(model: nn.Module) -> list[AdapterModule]:
    """The adapters that balance the use of their parts after each training step."""
    return [module for module in model.modules() if isinstance(module, AdapterModule) and module.self_balancing]


def freeze_base(model: nn.Module) -> None:
    """Train the adapters and nothing else."""
    model.requires_grad_(False)
    for entry in adapter_parameters(model).values():
        entry.parameter.requires_grad_(True)


def reset_adapters(model: nn.Module, seed: int) -> None:
    """Give all adapters their initial values.

    Each tensor is drawn whole from (seed, its key): it depends neither on other adapters nor on the model-parallel
    layout.
    """
    with torch.no_grad():
        for key, (parameter, spec, _) in adapter_parameters(model, untrained=True).items():
            digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            values = spec.init(spec.shape, generator)
            parameter.copy_(values if values.shape == parameter.shape else shard_of(values, spec.shard))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trainable parameters of the whole (unsharded) model: per slot, summed over the layers, and "total"."""
    counts: dict[str, int] = {}
    for _, spec, slot in adapter_parameters(model).values():
        counts[slot] = counts.get(slot, 0) + torch.Size(spec.shape).numel()
    return counts | {"total": sum(counts.values())}


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: weight decay on matrices, none on biases and 1-D parameters.

    "lr_scale" of a group: the factor of its learning rate.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for parameter, spec, _ in adapter_parameters(model).values():
        decay = len(spec.shape) > 1 if spec.decay is None else spec.decay
        groups.setdefault((decay, spec.lr_scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decay else 0.0, "lr_scale": lr_scale}
        for (decay, lr_scale), parameters in groups.items()
    ]


def gather_full(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Whole CPU tensors, keyed like `tensors`, from this rank's shards.

    tensors: parameters by the keys of `adapter_parameters`, or others of their shapes, such as optimizer moments. Every
    rank of a model-parallel group must call it.
    """
    entries, result = adapter_parameters(model, untrained=True), {}
    for key, tensor in tensors.items():
        spec = entries[key].spec
        whole = tensor.detach() if tensor.shape == spec.shape else gather(tensor.detach(), spec.shard)
        result[key] = whole.cpu().clone()
    return result


def shard_all(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Inverse of `gather_full`: this rank's shards of whole tensors."""
    shards = {key: entry.spec.shard for key, entry in adapter_parameters(model, untrained=True).items()}
    return {k: t if shards[k] is None else shard_of(t, shards[k]) for k, t in tensors.items()}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole adapter, float32 on the CPU: the content of `adapter.pth`."""
    entries = adapter_parameters(model, untrained=True)
    return gather_full({key: entry.parameter for key, entry in entries.items()}, model)


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a whole adapter into `model`.

    Raises ValueError naming `origin` and the tensors that do not fit, before the model is changed.
    """
    entries = adapter_parameters(model, untrained=True)
    check_state_dict(model, state, origin)
    with torch.no_grad():
        for key, part in shard_all({key: state[key] for key in entries}, model).items():
            entries[key].parameter.copy_(part)


def assert_replicas_equal(model: nn.Module) -> None:
    """ValueError, on all processes, unless the adapters' copies are equal to the bit, as they are by construction.

    Replicated tensors are held by all processes; a shard by the same model-parallel rank of every data-parallel replica
    and by ranks that share a key/value head. All processes must call it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    digests = {}  # (key, shard) -> hash of the bits
    for key, (parameter, spec, _) in adapter_parameters(model, untrained=True).items():
        bits = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digests[key, spec.shard.index(mp_rank()) if spec.shard else 0] = hashlib.sha256(bits).digest()
    all_digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_digests, digests)
    first: dict[tuple[str, int], tuple[int, bytes]] = {}  # the first process that holds it, and its hash
    for rank, theirs in enumerate(all_digests):
        for (key, shard), digest in theirs.items():
            holder, expected = first.setdefault((key, shard), (rank, digest))
            if digest != expected:
                raise ValueError(f"{key}: process {rank} has other values than process {holder}; they must be equal")


# Keys of adapters and checkpoints of earlier revisions -> today's.
_RENAMED = (
    (r"(adapters\.lora_\w+)\.([AB])$", r"\1.lora_\2"),
    (r"adapters\.prompt\.P$", "adapters.prompt.prompt"),
    (r"adapters\.prompt\.z$", "adapters.prompt.gate"),
    (r"(adapters\.p_adapter)\.(down|up)(_bias)?$", r"\1.\2_proj\3"),
    (r"^(layers\.\d+\.router)\.router\.", r"\1.proj."),
    (r"\.expert_router\.linear\.", ".expert_router.proj."),
)


def rename_old_keys(state: Any) -> Any:
    """The same tensors under today's keys, where a file of an earlier revision holds them."""
    for old, new in _RENAMED if isinstance(state, Mapping) else ():
        state = {re.sub(old, new, str(key)): tensor for key, tensor in state.items()}
    return state


def check_state_dict(model: nn.Module, state: Any, origin: str, untrained: bool = True) -> None:
    """ValueError naming `origin` and the tensors at fault, unless `state` has the adapter's keys and whole shapes.

    state: an adapter, or moments of its optimizer (untrained False).
    """
    entries = adapter_parameters(model, untrained)
    require_tensors(state, origin)
    require_same_keys(entries, state, origin, "adapter tensor")
    for key, (_, spec, _) in entries.items():
        if tuple(state[key].shape) != spec.shape:
            raise ValueError(f"{origin}: {key} has shape {tuple(state[key].shape)}, the model's is {spec.shape}")


def require_tensors(state: Any, origin: str, finite: bool = True) -> None:
    """ValueError naming `origin` and the entry, unless `state` maps names to plain tensors of (finite) numbers."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{origin}: expected a dictionary of tensors, found {type(state).__name__}")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{origin}: expected a dictionary of tensors, but {short_repr(key)} is none")
        if (tensor.layout, tensor.device.type) != (torch.strided, "cpu") or tensor.dtype not in FLOATS:
            kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device.type}"
            raise ValueError(f"{origin}: {key} is not a plain tensor of floating-point numbers ({kind})")
        if finite and not torch.isfinite(tensor.float()).all():  # as the model would hold them
            raise ValueError(f"{origin}: {key} has values that are not finite")


def require_same_keys(expected: Iterable[str], actual: Iterable[str], origin: str, what: str) -> None:
    """ValueError listing the missing and the unexpected keys, unless both hold the same ones."""
    missing, extra = sorted(set(expected) - set(actual), key=str), sorted(set(actual) - set(expected), key=str)
    named = {"missing": missing, "unexpected": extra}
    problems = [f"{label} {what}{'s' * (len(keys) > 1)} {_some(keys)}" for label, keys in named.items() if keys]
    if problems:
        raise ValueError(f"{origin}: {'; '.join(problems)}")


def _some(keys: list[str]) -> str:
    return ", ".join(map(str, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
