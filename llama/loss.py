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

CHUNK_ELEMENTS = 32 * 1024 * 1024  # logits held at a time on a GPU
CHUNK_LABELS = 96  # and labels at a time on a CPU; products of 128 are no quicker, of 64 a tenth slower


def _reduce(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    if mp_size() > 1:
        dist.all_reduce(x, op, group=mp.get_model_parallel_group())
    return x


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        first = mp_rank() * len(weight)  # this rank's part of the vocabulary
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        chunk = CHUNK_LABELS if hidden.device.type == "cpu" else max(1, CHUNK_ELEMENTS // len(weight))
        room = _room(min(chunk, len(hidden)), hidden, weight)
        for begin in range(0, len(hidden), chunk):
            h = hidden[begin : begin + chunk]
            product, logits, log_p = (t[: len(h)] for t in room)
            logits.copy_(torch.mm(h, weight.T, out=product))
            _log_softmax(logits, log_p)
            local = labels[begin : begin + chunk, None] - first
            mine = (local >= 0) & (local < len(weight))
            local = local.clamp(0, len(weight) - 1)
            total -= _reduce((log_p.gather(1, local) * mine).sum())
            if gradient is not None:  # softmax - one_hot, back through the output matrix
                p = log_p.exp_().scatter_add_(1, local, -mine.to(log_p.dtype))
                p = p if p.dtype == h.dtype else product.copy_(p)
                gradient[begin : begin + chunk] = _reduce(p @ weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def _room(n: int, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For a chunk's logits in the hidden states' type, the same in float32, and their log softmax: for all chunks the
    same memory, whose pages a CPU's allocator would else fetch and give back for each."""
    product = hidden.new_empty(n, len(weight))
    logits = product if product.dtype.itemsize >= 4 else torch.empty_like(product, dtype=torch.float32)
    return product, logits, torch.empty_like(logits)


def _log_softmax(logits: Tensor, log_p: Tensor) -> None:
    """Into log_p: the log softmax over the whole vocabulary, of this rank's part of it."""
    torch.log_softmax(logits, 1, out=log_p)
    if mp_size() > 1:
        mine = logits[:, :1] - log_p[:, :1]  # the logarithm of the part's sum of exponentials
        top = _reduce(mine.clone(), dist.ReduceOp.MAX)
        log_p += mine - (top + _reduce((mine - top).exp()).log())


def label_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over all labels, a float32 scalar.

    hidden (M, D): final hidden states at the positions that predict a label; weight (V, D): the frozen output matrix
    (this rank's rows of it under model parallelism); labels (M,).
    """
    return _LabelLoss.apply(hidden, weight, labels)
