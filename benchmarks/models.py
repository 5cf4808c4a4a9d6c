"""Models without files: a given shape with random weights, on any device, and the adapters of any method beside it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama import Llama, ModelArgs, Transformer
from llama.distributed import init_distributed
from moa.config import AdapterConfig
from moa.state import freeze_base, reset_adapters
from training.rehearsal import unfilled_model


def config_of(method: str | None, n_layers: int, **flat: object) -> AdapterConfig | None:
    """A method's preset, with other settings on top; None (no adapter) for None."""
    return None if method is None else AdapterConfig.from_dict({"method": method, **flat}, n_layers)


def shape_only(args: ModelArgs, config: AdapterConfig | None, bf16: bool) -> Transformer:
    """The model without memory: shapes and types, ready to train."""
    init_distributed(torch.device("cpu"))
    return unfilled_model(args, config, bf16)


def random_base(args: ModelArgs, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Weights of the bare model, made on the device."""
    generator = torch.Generator(device).manual_seed(0)
    base = {}
    for key, parameter in shape_only(args, None, False).named_parameters():
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        base[key] = weight.normal_(0, 0.02, generator=generator) if weight.dim() > 1 else weight.fill_(1)
    return base


def on_base(
    args: ModelArgs, base: Mapping[str, Tensor], config: AdapterConfig | None, flash: bool = False
) -> Transformer:
    """A model with fresh adapters on these weights, which several models may share."""
    device = base["output.weight"].device
    init_distributed(device)
    model = Transformer(args, config, flash)
    model.load_state_dict(dict(base), strict=False, assign=True)
    reset_adapters(model, 0)
    freeze_base(model)
    return model.to(device)


@dataclass(frozen=True)
class NoText:
    """What generation needs of a tokenizer where there is no text."""

    n_words: int
    stop_ids: tuple[int, ...] = (0,)


def generator_of(model: Transformer, max_seq_len: int, max_batch_size: int, cuda_graphs: bool = False) -> Llama:
    """From token ids to token ids."""
    return Llama(model, NoText(model.args.vocab_size), max_seq_len, max_batch_size, cuda_graphs)
