"""What a study measures of a model: the loss of each held-out row, and its greedy answers. A part of a run's identity.

Rows are scored in the same packed batches for every model, so that what rounding does to a row differs by the model
alone.
"""

from collections.abc import Sequence
from typing import Any

import torch

from llama import Llama, Transformer
from llama.data import IGNORE_INDEX, Example, encode_prompt
from training.data import micro_batches

BATCH_ROWS, ANSWER_TOKENS = 16, 100


def row_losses(model: Transformer, examples: Sequence[Example]) -> list[float]:
    """Sum of -log p(label) over the labels of each row, without a method's auxiliary loss."""
    device, losses = model.output.weight.device, []
    model.eval()  # no noise in a router
    with torch.inference_mode():
        for tokens, labels, batch in micro_batches(examples, BATCH_ROWS, device):
            hidden, _ = model.forward_hidden(tokens, batch)
            for begin, end in batch.spans:
                positions = begin + 1 + (labels[begin + 1 : end] != IGNORE_INDEX).nonzero().squeeze(1)
                loss = model.cross_entropy(hidden[(positions - 1).to(device)], labels[positions].to(device))
                losses.append(loss.item())
    return losses


def greedy_answers(llm: Llama, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The model's answer to each row."""
    room = llm.max_seq_len - ANSWER_TOKENS
    prompts = [encode_prompt(llm.tokenizer, row, room) for row in rows]
    return [llm.tokenizer.decode(tokens) for tokens in llm.generate(prompts, ANSWER_TOKENS)]
