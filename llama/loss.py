"""Cross-entropy on label positions only, without ever holding their logits all at once.

LLaMA-3's vocabulary has 128,256 tokens: the float32 logits of 1,000 labels alone take half a gigabyte, and their
gradients as much again. The output matrix is frozen, so the gradient of the loss with respect to the hidden states can
be finished for one chunk of labels before the next begins.
"""

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor

from moa.parallel import mp_rank, mp_size

CHUNK_ELEMENTS = 32 * 1024 * 1024  # logits held at a time


def _reduce(x: Tensor, op) -> Tensor:
    if mp_size() > 1:
        dist.all_reduce(x, op, group=mp.get_model_parallel_group())
    return x


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        first = mp_rank() * len(weight)  # this rank's part of the vocabulary
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        chunk = max(1, CHUNK_ELEMENTS // len(weight))
        for begin in range(0, len(hidden), chunk):
            h = hidden[begin : begin + chunk]
            logits = (h @ weight.T).float()
            local = labels[begin : begin + chunk, None] - first
            mine = (local >= 0) & (local < len(weight))
            local = local.clamp(0, len(weight) - 1)
            top = _reduce(logits.amax(1, keepdim=True), dist.ReduceOp.MAX)
            chosen = _reduce((logits.gather(1, local) - top) * mine, dist.ReduceOp.SUM)
            exp = logits.sub_(top).exp_()
            norm = _reduce(exp.sum(1, keepdim=True), dist.ReduceOp.SUM)
            total += (norm.log() - chosen).sum()
            if gradient is not None:  # softmax - one_hot, back through the output matrix
                exp.div_(norm).scatter_add_(1, local, -mine.to(exp.dtype))
                gradient[begin : begin + chunk] = _reduce(exp.to(h.dtype) @ weight, dist.ReduceOp.SUM)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def label_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over all labels, a float32 scalar.

    hidden (M, D): final hidden states at the positions that predict a label; weight (V, D): the frozen output matrix
    (this rank's rows of it under model parallelism); labels (M,).
    """
    return _LabelLoss.apply(hidden, weight, labels)
