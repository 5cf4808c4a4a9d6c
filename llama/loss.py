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
        product, wide = _room(min(chunk, len(hidden)), hidden, weight)
        for begin in range(0, len(hidden), chunk):
            h = hidden[begin : begin + chunk]
            narrow = torch.mm(h, weight.T, out=product[: len(h)])
            logits = narrow if wide is product else wide[: len(h)].copy_(narrow)
            local = labels[begin : begin + chunk, None] - first
            mine = (local >= 0) & (local < len(weight))
            local = local.clamp(0, len(weight) - 1)
            # -log p = log(sum of exp(z)) - z_label, for z less their largest; all in the logits' place
            logits -= _reduce(logits.amax(1, keepdim=True), dist.ReduceOp.MAX)
            total -= _reduce((logits.gather(1, local) * mine).sum())
            sums = _reduce(logits.exp_().sum(1, keepdim=True))
            total += sums.log().sum()
            if gradient is not None:  # softmax - one_hot, back through the output matrix
                p = logits.div_(sums).scatter_add_(1, local, -mine.to(logits.dtype))
                p = p if p.dtype == h.dtype else narrow.copy_(p)
                gradient[begin : begin + chunk] = _reduce(p @ weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def _room(n: int, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """For a chunk's logits in the hidden states' type, and in float32: the same memory where that is their type, and
    for all chunks, or a CPU's allocator would fetch its pages and give them back for each."""
    product = hidden.new_empty(n, len(weight))
    return product, product if product.dtype.itemsize >= 4 else torch.empty_like(product, dtype=torch.float32)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over all labels, a float32 scalar.

    hidden (M, D): final hidden states at the positions that predict a label; weight (V, D): the frozen output matrix
    (this rank's rows of it under model parallelism); labels (M,).
    """
    return _LabelLoss.apply(hidden, weight, labels)
