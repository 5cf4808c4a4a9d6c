"""A GPU that is not there, for the code that only a GPU runs.

`Pretended("meta")`: tensors on the meta device say that they are on cuda:0. They have shapes and types but no numbers,
and are told apart from the host's: what waits for the GPU, what mixes devices and what is copied while a graph is
recorded is seen. `Pretended("cpu")`: the CPU's tensors say so, and have numbers to compare.
"""

import traceback
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
FOLDER = Path(__file__).parent
MODULE = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "set_device": lambda device: None,
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda **_: True,
    "mem_get_info": lambda device=None: (140 * 2**30,) * 2,
    "is_current_stream_capturing": lambda: False,
    "Event": lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
}
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put_", "_index_put_impl_")  # brings indices to the device, and waits


class Pretended(ExitStack):
    """waits: where the CPU would wait for the GPU, as "what at file:line"."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.waits = torch.device(device), list[str]()

    def __enter__(self) -> "Pretended":
        for name, value in MODULE.items():
            self.enter_context(mock.patch.object(torch.cuda, name, value))
        self.enter_context(mock.patch.object(torch.backends.cuda, "is_flash_attention_available", lambda: True))
        # Recomputed tensors are compared within and outside of modes, where devices have other names
        metadata = {"default": lambda t: {"shape": t.shape, "dtype": t.dtype}}
        self.enter_context(mock.patch.dict(torch.utils.checkpoint._allowed_determinism_checks_to_fns, metadata))
        if self.device.type == "meta":
            self.enter_context(_Operations(self))
        self.enter_context(_Calls(self))
        return super().__enter__()

    def wait(self, what: str) -> None:
        frames = [
            f for f in traceback.extract_stack() if "/torch/" not in f.filename and Path(f.filename).parent != FOLDER
        ]
        self.waits.append(f"{what} at {Path(frames[-1].filename).name}:{frames[-1].lineno}")


class _Calls(TorchFunctionMode):
    """What Python sees: devices' names, pinned memory, and numbers that are brought to the device."""

    def __init__(self, gpu: Pretended):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            device = func(*args)
            return CUDA if device.type == self.gpu.device.type else device
        if func == Tensor.is_cuda.__get__:
            return args[0].device.type == self.gpu.device.type
        if func is Tensor.backward:
            # A mode is off within the functions that it sees; but this one runs ours
            with self, mock.patch.object(torch.autograd, "has_torch_function", lambda _: False):
                return torch.autograd.backward(args[0])
        if func is Tensor.pin_memory or kwargs.get("pin_memory"):
            pinned = args[0].clone() if func is Tensor.pin_memory else func(*args, **kwargs | {"pin_memory": False})
            pinned.is_pinned_here = True
            return pinned
        if self._brings_number(func, args, kwargs):
            self.gpu.wait("a number made a tensor")
        return func(*tree_map(self._actual, args), **tree_map(self._actual, kwargs))

    def _actual(self, value: Any) -> Any:
        return self.gpu.device if is_cuda(value) else value

    def _brings_number(self, func: Any, args: tuple, kwargs: dict) -> bool:
        if func in (torch.tensor, torch.as_tensor):
            return is_cuda(kwargs.get("device")) and not isinstance(args[0], Tensor)
        if func in (Tensor.new_tensor, Tensor.__getitem__, Tensor.__setitem__) and args[0].device == self.gpu.device:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            by_tensor = func is Tensor.__setitem__ and any(isinstance(part, Tensor) for part in index)
            number = by_tensor and not isinstance(args[2], Tensor)
            return func is Tensor.new_tensor or number or any(isinstance(part, list) for part in index)
        return False


class _Operations(TorchDispatchMode):
    """What the GPU is given to do: copies from and to the host, values that are read, and devices that are mixed."""

    def __init__(self, gpu: Pretended):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if torch.is_inference_mode_enabled():  # which brings whole functions here
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name == "_local_scalar_dense" and tensors[0].is_meta:
            self.gpu.wait("a value read")
            return torch.zeros((), dtype=tensors[0].dtype).item()
        on_gpu, on_host = any(t.is_meta for t in tensors), [t for t in tensors if not t.is_meta]
        if name in COPIES:
            return self._copy(func, args, kwargs)
        if on_gpu and any(t.dim() for t in on_host):  # a number in a tensor without dimensions goes with the launch
            if name not in INDEXING:
                raise RuntimeError(f"{name}: tensors on cuda:0 and on cpu")
            self.gpu.wait("indices brought")
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """`_to_copy(source, device=...)` or `copy_(target, source)`."""
        in_place = func.overloadpacket.__name__ == "copy_"
        source = args[1] if in_place else args[0]
        target = args[0] if in_place else None
        goes_to_gpu = target.is_meta if in_place else (kwargs.get("device") or source.device).type in ("meta", "cuda")
        if goes_to_gpu == source.is_meta:
            return func(*args, **kwargs)
        host = source if goes_to_gpu else target
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if torch.cuda.is_current_stream_capturing():
            self.gpu.wait("a copy while recording")
        elif not (non_blocking and getattr(host, "is_pinned_here", False)):
            self.gpu.wait("a copy of memory that is not pinned")
        if goes_to_gpu:
            return func(*args, **kwargs)
        return target.zero_() if in_place else torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)


def is_cuda(value: Any) -> bool:
    """Whether an argument names the GPU."""
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.startswith("cuda")
    )
