"""fairscale's model-parallel layers, frozen and without weights: a checkpoint brings them
(`load_state_dict(assign=True)`).

fairscale's own constructors make each matrix whole on every rank and fill it before they cut it, gigabytes for nothing.
These take no memory, and know the whole sizes as well as this rank's. Forward passes are fairscale's, but for the sum
of an input's gradients over the ranks: layers that share an input share one (`moa.parallel.copy_to_ranks`, outside).
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import Tensor, nn
from torch.nn import functional as F

from moa.adapter import AdapterModule, Deriving, reads_of, shared_out
from moa.block import Adapters, Read
from moa.parallel import copy_to_ranks, mp_rank, mp_size, parts_of_heads, share, sum_over_ranks


def unfilled(*shape: int) -> nn.Parameter:
    """A frozen weight that is still to come."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class ColumnParallel(Deriving, ColumnParallelLinear):
    """y = W x, (N, in) whole -> (N, out / parts), this rank's part; `gather`: whole. heads: the outputs are so many
    key/value heads, each of which several ranks hold where there are more ranks (`moa.parallel.parts_of_heads`). The
    gradient of x is this rank's part of a sum."""

    def __init__(self, in_features: int, out_features: int, heads: int | None = None, gather: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.gather_output, self.heads = in_features, out_features, gather, heads
        parts = mp_size() if heads is None else parts_of_heads(heads)
        self.weight = unfilled(share(out_features, "output width", parts), in_features)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        # Others are copied with those beside them (`side_by_side`)
        copied = self.may_copy and self.gather_output
        y = product_of_copies(self, x, lambda: [self.weight]) if copied else F.linear(x, self.weight)
        return gather_from_model_parallel_region(y) if self.gather_output else y


class RowParallel(RowParallelLinear):
    """y = W x, (N, in / ranks), this rank's part -> (N, out), whole."""

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.input_is_parallel = in_features, out_features, True
        self.weight = unfilled(out_features, share(in_features, "input width"))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return sum_over_ranks(F.linear(x, self.weight))


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
    adapters: Adapters,
    *sites: str,
    others: Sequence[AdapterModule] = (),
) -> tuple[list[Tensor], Read]:
    """What frozen layers make of the input x (N, in) that they share, and what the adapters at `sites`, beside them,
    and `others` read of it. While all weights stand still, and there is memory for a copy, that is one product of all
    the weights, one above the other."""
    column = isinstance(layers[0], ColumnParallel)
    if not adapters.may_copy:
        shared = copy_to_ranks(x) if column else x
        return [layer(shared) for layer in layers], adapters.read(x, *sites, others=others)
    weights, readers = [layer.weight for layer in layers], [*adapters.at(*sites), *others]
    y = product_of_copies(adapters, x, lambda: [*weights, *reads_of(readers)], sites)
    y = y if column else sum_over_ranks(y)
    widths = [len(weight) for weight in weights]
    *outputs, read = y.split([*widths, y.shape[1] - sum(widths)], -1)
    return outputs, Read(x, shared_out(read, readers))


def product_of_copies(
    keeper: Deriving, x: Tensor, weights: Callable[[], list[Tensor]], name: Hashable = "stack"
) -> Tensor:
    """x (N, in) times all `weights` (k, in), one above the other, by a copy that `keeper` keeps of them. For a CPU's
    bf16 kernels it is laid out in the order in which they read it: they would sort it anew for every product."""
    sort = x.device.type == "cpu" and x.dtype == torch.bfloat16

    def stack() -> Tensor:
        stacked = torch.cat([weight.to(x.dtype) for weight in weights()])
        return torch.ops.mkldnn._reorder_linear_weight(stacked, None) if sort else stacked

    stacked = keeper.derived((name, x.dtype), stack)
    return torch.ops.mkldnn._linear_pointwise(x, stacked, None, "none", [], "") if sort else F.linear(x, stacked)
