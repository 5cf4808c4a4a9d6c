"""fairscale's model-parallel layers, frozen and without weights: a checkpoint brings them
(`load_state_dict(assign=True)`).

fairscale's constructors make each matrix whole on every rank and fill it before they shard it. These take no memory and
know the whole sizes as well as this rank's.
"""

import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear as FairscaleColumnParallelLinear
from fairscale.nn.model_parallel.layers import RowParallelLinear as FairscaleRowParallelLinear
from fairscale.nn.model_parallel.layers import VocabParallelEmbedding as FairscaleVocabParallelEmbedding
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import Tensor, nn
from torch.nn import functional as F

from moa.parallel import divide, mp_rank, mp_size, num_kv_shards, reduce_from_model_parallel_region


def meta_parameter(*shape: int) -> nn.Parameter:
    """A frozen weight that a checkpoint will fill."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class ColumnParallelLinear(FairscaleColumnParallelLinear):
    """y = W x, (N, in) whole -> (N, out / ranks), this rank's shard; gather_output: whole.

    heads: the outputs are this many key/value heads, each held by several ranks where there are more ranks than heads.
    The gradient of x is this rank's part of a sum (`moa.parallel.copy_to_model_parallel_region`): layers that share x
    share one all-reduce.
    """

    def __init__(self, in_features: int, out_features: int, heads: int | None = None, gather_output: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.gather_output, self.heads = gather_output, heads
        num_shards = mp_size() if heads is None else num_kv_shards(heads)
        self.weight = meta_parameter(divide(out_features, "output width", num_shards), in_features)
        self.register_parameter("bias", None)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return gather_from_model_parallel_region(y) if self.gather_output and mp_size() > 1 else y


class RowParallelLinear(FairscaleRowParallelLinear):
    """y = W x, (N, in / ranks), this rank's shard -> (N, out), whole."""

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.input_is_parallel = in_features, out_features, True
        self.weight = meta_parameter(out_features, divide(in_features, "input width"))
        self.register_parameter("bias", None)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from_model_parallel_region(self.product(x))


class VocabParallelEmbedding(FairscaleVocabParallelEmbedding):
    """(N,) token ids -> (N, D), whole; this rank holds its part of the vocabulary."""

    def __init__(self, vocab_size: int, dim: int):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = vocab_size, dim
        local = divide(vocab_size, "vocab_size")
        self.vocab_start_index, self.vocab_end_index = mp_rank() * local, (mp_rank() + 1) * local
        self.weight = meta_parameter(local, dim)
        # What fairscale passes to F.embedding, at its defaults
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) if mp_size() > 1 else F.embedding(tokens, self.weight)
