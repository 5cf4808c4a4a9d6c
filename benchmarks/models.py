"""Models without files: random weights in a published shape, what trains them, their least work, a machine's rates."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import BASE, CPU, timed
from llama import Llama, ModelArgs, Transformer
from llama.accelerate import FastDecoding, Lanes, accelerate_model
from llama.data import Example
from llama.distributed import bf16_is_fast, init_distributed
from moa.config import AdapterConfig
from moa.state import freeze_base, reset_adapters
from training import loop
from training.estimate import meta_model
from training.schedule import Schedule

Trainer = Callable[[int], list[dict[str, Any]]]  # a number of steps -> their log entries


class Machine(NamedTuple):
    """Measured rates: FLOP/s of large products of the faster type, and bytes/s to and from memory."""

    flops: float
    bandwidth: float


def measure_machine(device: torch.device = CPU, repeats: int = 3) -> Machine:
    """Measure the best of a few large products, and of copies and sums far larger than any cache."""
    size, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    x, y = (torch.ones(length, device=device) for _ in range(2))

    def best(work: Callable[[], object]) -> float:
        return min(timed(work, device)[0] for _ in range(repeats + 1))  # the first is slower

    rates = (2 * x.nbytes / best(lambda: y.copy_(x)), x.nbytes / best(x.sum))
    return Machine(2 * size**3 / best(lambda: a @ b), max(rates))


def config_of(method: str, n_layers: int) -> AdapterConfig | None:
    """Return a method's preset; None (no adapter) for BASE."""
    return None if method == BASE else AdapterConfig.from_dict({"method": method}, n_layers)


def random_base(args: ModelArgs, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Make random weights of the bare model on the device."""
    init_distributed(device)
    generator, base = torch.Generator(device).manual_seed(0), {}
    for key, parameter in meta_model(args, None, False).named_parameters():
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        base[key] = weight.normal_(0, 0.02, generator=generator) if weight.dim() > 1 else weight.fill_(1)
    return base


def model_on(args: ModelArgs, base: Mapping[str, Tensor], config: AdapterConfig | None) -> Transformer:
    """Build a model with fresh adapters on these weights, which several models may share."""
    device = base["output.weight"].device
    init_distributed(device)
    model = Transformer(args, config)
    model.assign_base(base)
    reset_adapters(model, 0)
    freeze_base(model)
    accelerate_model(model)
    return model.to(device)


class NoText(NamedTuple):
    """What generation needs of a tokenizer where there is no text."""

    n_words: int
    stop_ids: tuple[int, ...] = (0,)


def llm_on(model: Transformer, max_seq_len: int, max_batch_size: int, cuda_graphs: bool = False) -> Llama:
    """Return what generates from token ids to token ids."""
    fast = FastDecoding(model, cuda_graphs)
    return Llama(model, NoText(model.args.vocab_size), max_seq_len, max_batch_size, fast)


def schedule_of(examples: list[Example], rows: int, steps: int) -> Schedule:
    """Return a schedule of steps at a constant rate, without warm-up."""
    return Schedule(len(examples), rows, steps, warmup_steps=0, lr=1e-3, min_lr=0.0, constant=True)


def trainer(model: Transformer, examples: list[Example], rows: int) -> Trainer:
    """Return what trains a model as `finetune.py` does, each call some steps more, of so many rows."""
    optimizer, state = loop.make_optimizer(model, 0.02), loop.TrainState()

    def train(steps: int) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        schedule = schedule_of(examples, rows, state.done + steps)
        with Lanes(model, loop.forward_backward, loop.expert_fraction, loop.uses_load_balancing(model)) as fast:
            more = {"state": state, "on_step": entries.append, "forward_backward": fast}
            loop.train(model, optimizer, examples, schedule, batch_size=rows, seed=0, **more)
        return entries

    return train


def training_flops(model: Transformer, n_tokens: int, n_labels: int) -> int:
    """Estimate a step's FLOPs: forward, gradients of all inputs and of the adapters' weights, without attention."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers."))
    return 4 * (layers * n_tokens + model.output.weight.numel() * n_labels) + 2 * trained * n_tokens


def decode_bytes(model: Transformer, n_rows: int, context: int) -> int:
    """Return the bytes that a decode step must read: weights, and keys and values of rows of `context` tokens."""
    args, size = model.args, model.output.weight.element_size()
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tok_embeddings"))
    return size * (weights + 2 * args.n_layers * n_rows * context * args.n_kv_heads * args.head_dim)
