"""fairscale's model-parallel layers, frozen and without weights: a checkpoint brings them
(`load_state_dict(assign=True)`).

fairscale's own constructors make each matrix whole on every rank and fill it before they cut it, gigabytes for nothing.
These take no memory, and know the whole sizes as well as this rank's. Forward passes are fairscale's, but for the sum
of an input's gradients over the ranks: layers that share an input share one (`moa.parallel.copy_to_model_parallel_region`, outside).
"""

from collections.abc import Sequence

import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import Tensor, nn
from torch.nn import functional as F

from llama.copies import frozen_product, packs, product_of_copy
from llama.pointwise import swiglu, swiglu_gradients
from moa.adapter import AdapterModule, Deriving, reads_of, shared_out, stacked
from moa.block import AdapterDict, Read
from moa.parallel import (
    all_reduce,
    copy_to_model_parallel_region,
    mp_rank,
    mp_size,
    num_kv_shards,
    reduce_from_model_parallel_region,
    share,
)


def unfilled(*shape: int) -> nn.Parameter:
    """A frozen weight that is still to come."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class ColumnParallel(Deriving, ColumnParallelLinear):
    """y = W x, (N, in) whole -> (N, out / parts), this rank's part; `gather`: whole. heads: the outputs are so many
    key/value heads, each of which several ranks hold where there are more ranks (`moa.parallel.num_kv_shards`). The
    gradient of x is this rank's part of a sum."""

    def __init__(self, in_features: int, out_features: int, heads: int | None = None, gather: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.gather_output, self.heads = in_features, out_features, gather, heads
        parts = mp_size() if heads is None else num_kv_shards(heads)
        self.weight = unfilled(share(out_features, "output width", parts), in_features)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.may_copy and self.gather_output:  # others are copied with those beside them (`side_by_side`)
            y = self.derived(x.dtype, lambda: product_of_copy([self.weight], x.dtype))(x)
        else:
            y = frozen_product(x, self.weight)
        return gather_from_model_parallel_region(y) if self.gather_output else y


class RowParallel(RowParallelLinear):
    """y = W x, (N, in / ranks), this rank's part -> (N, out), whole."""

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.input_is_parallel = in_features, out_features, True
        self.weight = unfilled(out_features, share(in_features, "input width"))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from_model_parallel_region(frozen_product(x, self.weight))


class VocabParallel(VocabParallelEmbedding):
    """(N,) token ids -> (N, D), whole; this rank holds its part of the vocabulary."""

    def __init__(self, vocab_size: int, dim: int):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = vocab_size, dim
        mine = share(vocab_size, "vocab_size")
        self.vocab_start_index, self.vocab_end_index = mp_rank() * mine, (mp_rank() + 1) * mine
        self.weight = unfilled(mine, dim)
        # What fairscale passes on to torch's embedding, as it is there by default
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False


def side_by_side(
    x: Tensor,
    layers: list[ColumnParallel] | list[RowParallel],
    adapters: AdapterDict,
    *sites: str,
    others: Sequence[AdapterModule] = (),
) -> tuple[list[Tensor], Read]:
    """What frozen layers make of the input x (N, in) that they share, and what the adapters at `sites`, beside them,
    and `others` read of it: in training with one gradient of x for all. While all weights stand still, and there is
    memory for a copy, that is one product of the layers' weights, one above the other, and of the adapters' unless
    copies have too few digits for what is trained."""
    column = isinstance(layers[0], ColumnParallel)
    weights, readers = [layer.weight for layer in layers], [*adapters.at(*sites), *others]
    widths, read = [len(weight) for weight in weights], reads_of(readers)
    if adapters.may_copy:
        alone = packs(weights[0])
        copied = weights if alone else [*weights, *read]
        y = adapters.derived(("copy", sites, x.dtype), lambda: product_of_copy(copied, x.dtype))(x)
        y = y if column else reduce_from_model_parallel_region(y)
        if alone:
            return list(y.split(widths, -1)), adapters.read(x, *sites, others=others)
        *outputs, product = y.split([*widths, y.shape[1] - sum(widths)], -1)
    elif torch.is_grad_enabled() and x.requires_grad and read:
        outputs = _SideBySide.apply(x, stacked(read, x.dtype), column and mp_size() > 1, *weights)
        *outputs, product = outputs if column else map(reduce_from_model_parallel_region, outputs)
    else:
        shared = copy_to_model_parallel_region(x) if column else x
        return [layer(shared) for layer in layers], adapters.read(x, *sites, others=others)
    return outputs, Read(x, shared_out(product, readers))


def gated_side_by_side(
    gate: Tensor, up: Tensor, layer: RowParallel, adapters: AdapterDict, site: str
) -> tuple[Tensor, Read]:
    """The same for one layer and the input silu(gate) * up, (N, in) each. In training that product is not kept where
    adapters want no more of it than what they read: the backward pass, which needs most of it anyway, makes it anew."""
    readers = adapters.at(site)
    trains = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if not (trains and readers and all(module.reads() for module in readers)):
        (output,), read = side_by_side(swiglu(gate, up), [layer], adapters, site)
        return output, read
    made = _GatedSideBySide.apply(gate, up, stacked(reads_of(readers), gate.dtype), layer.weight)
    output, product = map(reduce_from_model_parallel_region, made)
    return output, Read(None, shared_out(product, readers))


class _SideBySide(torch.autograd.Function):
    """x (N, in) times frozen weights (k, in) each, and times one of adapters, which trains. cut: the frozen weights are
    this rank's parts of whole ones, and what they give of the gradient of x is summed over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, trained: Tensor, cut: bool, *frozen: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, trained)
        ctx.frozen, ctx.cut = frozen, cut
        return _products(x, frozen, trained)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, trained = ctx.saved_tensors
        return *_gradients(x, ctx.frozen, trained, grads, ctx.cut), None, *(None for _ in ctx.frozen)


class _GatedSideBySide(torch.autograd.Function):
    """The same of x = silu(gate) * up, for which gate and up alone are kept."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, trained: Tensor, *frozen: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gate, up, trained)
        ctx.frozen = frozen
        return _products(swiglu(gate, up), frozen, trained)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, trained = ctx.saved_tensors
        active = F.silu(gate)
        of_x, of_trained = _gradients(active * up, ctx.frozen, trained, grads)
        return *swiglu_gradients(gate, up, active, of_x), of_trained, *(None for _ in ctx.frozen)


def _products(x: Tensor, frozen: Sequence[Tensor], trained: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight) for weight in (*frozen, trained))


def _gradients(
    x: Tensor, frozen: Sequence[Tensor], trained: Tensor, grads: Sequence[Tensor], cut: bool = False
) -> tuple[Tensor, Tensor]:
    """Of x, which the products add up themselves, and of the trained weight."""
    *of_frozen, of_trained = grads
    of_x = of_frozen[0] @ frozen[0]
    for grad, weight in zip(of_frozen[1:], frozen[1:], strict=True):
        of_x.addmm_(grad, weight)
    of_x = all_reduce(of_x) if cut else of_x
    of_x.addmm_(of_trained, trained)
    return of_x, of_trained.T @ x
