"""A training step, forward, backward and AdamW: of our methods, of our bare base, and of transformers + PEFT."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import CPU
from benchmarks.models import config_of
from benchmarks.peers import peft_lora
from llama import Llama, Transformer
from llama.checkpoint import read_base
from llama.data import IGNORE_INDEX, Example
from moa.state import adapter_parameters
from training.data import label_count, micro_batches
from training.lanes import Passes
from training.loop import make_optimizer

BASE, TRANSFORMERS, PEFT = "base", "transformers", "PEFT lora"
Step = Callable[[list[Example]], float]  # returns the loss


def step_of(model: Transformer, device: torch.device = CPU) -> Step:
    """A step of finetune.py with its rows as one micro-batch. Of the bare model: forward and backward, with the
    gradient of a bias of the embeddings: at least as far as any adapter wants gradients."""
    model.train()
    optimizer = make_optimizer(model, 0.02) if model.config else None
    if optimizer:
        parameters = [entry.parameter for entry in adapter_parameters(model).values()]
    else:
        parameters = [nn.Parameter(torch.zeros(model.args.dim, dtype=model.output.weight.dtype, device=device))]
        model.tok_embeddings.register_forward_hook(lambda _, __, output: output + parameters[0])
    passes = Passes(model, parameters)

    def step(examples: list[Example]) -> float:
        n_labels = sum(map(label_count, examples))
        for parameter in parameters:
            parameter.grad = None
        (batch,) = micro_batches(examples, len(examples), device)
        losses = passes.run(batch, n_labels, len(batch[0]))
        if optimizer:
            optimizer.step()
        return losses[0].item()

    return step


def our_model(ckpt_dir: str, method: str | None, bf16: bool) -> Transformer:
    args, _ = read_base(ckpt_dir)
    return Llama.build(ckpt_dir, config=config_of(method, args.n_layers), bf16=bf16).model


def padded_step(model: nn.Module, device: torch.device = CPU) -> Step:
    """The same of a model of transformers and PEFT, as transformers' Trainer does it: rows padded to the longest, no
    cache, AdamW in its fused form."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), fused=True)

    def step(examples: list[Example]) -> float:
        longest = max(len(e.tokens) for e in examples)

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device)

        tokens = padded([e.tokens for e in examples], 0)
        labels = padded([e.labels for e in examples], IGNORE_INDEX)
        mask = padded([[1] * len(e.tokens) for e in examples], 0)
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def peft_step(ckpt_dir: str, bf16: bool) -> Step:
    return padded_step(peft_lora(ckpt_dir, torch.bfloat16 if bf16 else torch.float32))


def make(kind: str, ckpt_dir: str, bf16: bool) -> Step:
    if kind == PEFT:
        return peft_step(ckpt_dir, bf16)
    return step_of(our_model(ckpt_dir, None if kind == BASE else kind, bf16))


def method_of(kind: str) -> str | None:
    """Whose arithmetic a kind's is: that of transformers is the bare base's, that of PEFT's LoRA our LoRA's."""
    return {BASE: None, TRANSFORMERS: None, PEFT: "lora"}.get(kind, kind)
