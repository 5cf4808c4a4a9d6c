"""Log-likelihoods of given continuations: how probable a model finds each possible answer to a prompt."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama.generation import Llama
from llama.model import Transformer
from llama.packing import PackedBatch, async_to_device

LOGITS_AT_ONCE = 1024  # positions; at 128,256 tokens of vocabulary half a gigabyte in float32


class Likelihood(NamedTuple):
    """log p(continuation | context), and whether each of its tokens is the most likely."""

    log_prob: float
    is_greedy: bool


@torch.inference_mode()
def log_likelihoods(
    llm: Llama,
    pairs: Sequence[tuple[list[int], list[int]]],
    on_batch: Callable[[int], None] = lambda num_pairs: None,
) -> list[Likelihood]:
    """The likelihood of each pair of a context and a continuation, token ids, in the order of the pairs.

    The context is the prompt of routers that look at one. It is cut from its left where the pair without its last
    token, which the model does not read, is longer than `max_seq_len`. Up to `max_batch_size` rows are packed into a
    pass; pairs that differ in their last token alone share a row. on_batch: called with the pairs done in a pass.
    ValueError for an empty context, an empty continuation, and one longer than `max_seq_len`.
    """
    sharing = defaultdict(list)  # row and prompt length -> pairs
    for i, (context, continuation) in enumerate(pairs):
        if not context or not 1 <= len(continuation) <= llm.max_seq_len:
            raise ValueError(
                f"pair {i} has {len(context)} tokens of context and {len(continuation)} to score: expected at least 1, "
                f"and 1 to max_seq_len {llm.max_seq_len}"
            )
        row = (context + continuation)[-llm.max_seq_len - 1 : -1]
        sharing[tuple(row), len(row) + 1 - len(continuation)].append(i)
    device = llm.model.output.weight.device
    results: dict[int, Likelihood] = {}
    rows = sorted(sharing, key=lambda row: -len(row[0]))  # longest first: memory peaks at the start
    for begin in range(0, len(rows), llm.max_batch_size):
        batch = rows[begin : begin + llm.max_batch_size]
        packed = PackedBatch([len(row) for row, _ in batch], device, [prompt_len for _, prompt_len in batch])
        hidden, _ = llm.model.forward_hidden(async_to_device([t for row, _ in batch for t in row], device), packed)
        ends = {i: end for row, (_, end) in zip(batch, packed.spans, strict=True) for i in sharing[row]}
        lengths = [len(pairs[i][1]) for i in ends]
        positions = [p for (_, end), n in zip(ends.items(), lengths, strict=True) for p in range(end - n, end)]
        labels = [token for i in ends for token in pairs[i][1]]
        log_probs, is_greedy = score_labels(llm.model, hidden, positions, labels)
        for i, log_prob, greedy in zip(ends, log_probs.split(lengths), is_greedy.split(lengths), strict=True):
            results[i] = Likelihood(log_prob.sum().item(), bool(greedy.all()))
        on_batch(len(ends))
    return [results[i] for i in range(len(pairs))]


def score_labels(model: Transformer, hidden: Tensor, positions: list[int], labels: list[int]) -> tuple[Tensor, Tensor]:
    """log p(label) in float64 and whether it is the largest, (M,) each, on the CPU. hidden (N, D); M positions in it.

    ValueError where one is not finite.
    """
    log_probs, is_greedy = [], []
    at, wanted = (async_to_device(numbers, hidden.device) for numbers in (positions, labels))
    for part, label in zip(at.split(LOGITS_AT_ONCE), wanted.split(LOGITS_AT_ONCE), strict=True):
        logits = model.output(hidden[part]).float()  # (M, V)
        log_probs.append(logits.log_softmax(-1).gather(1, label[:, None]).squeeze(1))
        is_greedy.append(logits.argmax(-1) == label)
    log_prob = torch.cat(log_probs).double().cpu()
    if not log_prob.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights or its adapter are damaged")
    return log_prob, torch.cat(is_greedy).cpu()
