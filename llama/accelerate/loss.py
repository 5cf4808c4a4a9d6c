"""Cross-entropy at label positions, without ever holding all their logits.

LLaMA-3's vocabulary has 128,256 tokens: the float32 logits of 1,000 labels take half a gigabyte, and their gradients as
much again. The output matrix is frozen, so the gradient with respect to the hidden states is finished for one chunk of
labels before the next begins.
"""

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor

from moa.parallel import mp_rank, mp_size

CHUNK_BYTES = 128 * 2**20  # of float32 logits at a time on a GPU
CPU_CHUNK = 96  # labels at a time on a CPU


def chunk_size(vocab: int, device: torch.device) -> int:
    """Labels per chunk; on a GPU a multiple of 128, which fills the tiles of its matrix products."""
    if device.type == "cpu":
        return CPU_CHUNK
    rows = CHUNK_BYTES // (4 * vocab)
    return max(128, rows // 128 * 128)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of -log p(label) over all labels, a scalar of at least float32.

    hidden (M, D): final hidden states at the positions that predict a label. weight (V, D): the frozen output matrix,
    under model parallelism this rank's rows of it. labels (M,). chunk: labels at a time.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk or chunk_size(len(weight), hidden.device))


def _all_reduce(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    if mp_size() > 1:
        dist.all_reduce(x, op, group=mp.get_model_parallel_group())
    return x


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        vocab_start = mp_rank() * len(weight)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        product, wide = _logit_buffers(min(chunk, len(hidden)), hidden, weight)
        for begin in range(0, len(hidden), chunk):
            h = hidden[begin : begin + chunk]
            narrow = torch.mm(h, weight.T, out=product[: len(h)])
            logits = narrow if wide is product else wide[: len(h)].copy_(narrow)
            local = labels[begin : begin + chunk, None] - vocab_start
            owned = (local >= 0) & (local < len(weight))
            local = local.clamp(0, len(weight) - 1)
            # -log p = log(sum exp(z)) - z_label, for z minus their largest; in place of the logits
            logits -= _all_reduce(logits.amax(1, keepdim=True), dist.ReduceOp.MAX)
            total -= _all_reduce((logits.gather(1, local) * owned).sum())
            sums = _all_reduce(logits.exp_().sum(1, keepdim=True))
            total += sums.log().sum()
            if grad_hidden is not None:  # softmax - one_hot, back through the output matrix
                probs = logits.div_(sums).scatter_add_(1, local, -owned.to(logits.dtype))
                probs = probs if probs.dtype == h.dtype else narrow.copy_(probs)
                grad_hidden[begin : begin + chunk] = _all_reduce(probs @ weight)
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), None, None, None


def _logit_buffers(n: int, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for a chunk's logits in the type of hidden, and in float32 (the same where that is the type).

    One for all chunks: a CPU's allocator would fetch and give back its pages for each.
    """
    product = hidden.new_empty(n, len(weight))
    return product, product if product.dtype.itemsize >= 4 else torch.empty_like(product, dtype=torch.float32)
