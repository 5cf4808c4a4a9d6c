"""Batched generation: one prefill per sequence, then decode steps over all sequences that run.

The engine knows token ids, not text. A sequence that ends leaves as soon as that is known, and a waiting one takes its
place (continuous batching).
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor

from llama.kv_cache import KVCache
from llama.model import Transformer
from llama.packing import PackedBatch, async_to_device
from moa.parallel import mp_rank, mp_size

INVALID_TOKEN = -1  # marks logits that are not finite

DecodeStep = Callable[[Transformer, KVCache, Tensor], Tensor]


@dataclass(frozen=True)
class SamplingParams:
    """stop_ids end an answer, but not before min_new_tokens. temperature 0: greedy.

    is_complete(tokens): an answer also ends, its last token kept, where this holds.
    """

    stop_ids: tuple[int, ...]
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    is_complete: Callable[[list[int]], bool] | None = None


@dataclass(eq=False)
class Request:
    """A prompt and its answer in the making.

    max_tokens: new tokens at most. uniforms: one number in [0, 1) per token; empty for greedy decoding.
    num_sampled: tokens sampled on the device, of which the CPU has read `tokens`.
    prompt_logits: (V,) behind the prompt, once the request runs.
    """

    index: int
    prompt: list[int]
    max_tokens: int
    uniforms: list[float]
    tokens: list[int] = field(default_factory=list)
    num_sampled: int = 0
    finished: bool = False
    prompt_logits: Tensor | None = None


def seeded_uniforms(prompt: list[int], seed: int, sample: int, n: int) -> Tensor:
    """(n,) numbers in [0, 1) for the n tokens of one answer.

    They follow from the prompt, the seed and the sample's number: neither neighbours nor the order matter.
    """
    digest = hashlib.sha256(f"{seed}/{sample}/{prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(n, generator=generator, dtype=torch.float64)


def sample(logits: Tensor, temperature: float, top_p: float, uniforms: Tensor | None) -> Tensor:
    """logits (R, V) float32 -> (R,) token ids.

    temperature 0: the largest logit, the lowest id of equals. Otherwise nucleus sampling: one draw per row, by its
    number in `uniforms` (R,), from the fewest most likely tokens whose probabilities sum to at least top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Minus the largest: a small temperature must not overflow
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.double().cumsum(-1)
    nucleus = (cumulative - ordered < top_p * cumulative[:, -1:]).sum(-1, keepdim=True)
    nucleus.clamp_(min=1)  # 0 where a logit is not finite
    rank = (cumulative <= uniforms[:, None] * cumulative.gather(-1, nucleus - 1)).sum(-1, keepdim=True)
    return ids.gather(-1, rank).squeeze(-1)


def prefill(model: Transformer, cache: KVCache, prompts: list[list[int]], device: torch.device) -> Tensor:
    """Cache the prompts of new sequences -> logits (R, V) of each one's first new token."""
    lengths = [len(prompt) for prompt in prompts]
    batch = PackedBatch(lengths, device)
    tokens = async_to_device([token for prompt in prompts for token in prompt], device)
    last = async_to_device([end - 1 for _, end in batch.spans], device)
    hidden, _ = model.forward_hidden(tokens, batch, cache, cache.allocate(lengths))
    return model.output(hidden[last])


def add_requests(
    model: Transformer, cache: KVCache, running: list[Request], new: list[Request], device: torch.device
) -> Tensor:
    """Start new requests -> their first logits (R, V).

    Each distinct prompt takes one pass; further requests with it (samples of one answer) copy its cached keys.
    """
    rows = {tuple(request.prompt): row for row, request in enumerate(running)}
    fresh, copies = [], []
    for request in new:
        (copies if tuple(request.prompt) in rows else fresh).append(request)
        rows.setdefault(tuple(request.prompt), len(running) + len(fresh) - 1)
    if fresh:
        logits = prefill(model, cache, [request.prompt for request in fresh], device)
        for request, request.prompt_logits in zip(fresh, logits, strict=True):
            running.append(request)
    for request in copies:
        source, n = rows[tuple(request.prompt)], len(request.prompt)
        cache.fork(source, *cache.allocate([n]), n)
        request.prompt_logits = running[source].prompt_logits
    running += copies
    return torch.stack([request.prompt_logits for request in fresh + copies])


def decode(model: Transformer, cache: KVCache, tokens: Tensor) -> Tensor:
    """Feed the newest token of every cached sequence, (R,) int64 -> logits (R, V) of the next."""
    lengths = cache.advance()
    seq_lens = async_to_device(lengths, tokens.device)
    return model.decode(tokens, cache, seq_lens, max(lengths), min(lengths) == max(lengths))


def generate(
    model: Transformer,
    requests: list[Request],
    max_rows: int,
    params: SamplingParams,
    decode_step: DecodeStep = decode,
    async_lag: int = 0,
) -> Iterator[Request]:
    """Complete all requests, up to max_rows at a time; yields each as it finishes, without its stop token.

    decode_step: `decode` or a faster equal (`llama.accelerate`).
    async_lag: read sampled tokens this many steps late, so that a GPU never waits for the CPU. A sequence that has
    already stopped runs that many extra steps; results do not change.
    """
    device = model.output.weight.device
    # Longest prompts first: memory peaks at the start, and sequences that share a prefill are alike
    waiting = sorted(requests, key=lambda request: (-len(request.prompt), request.index), reverse=True)
    cache = model.new_cache(min(max_rows, len(requests)), max(len(r.prompt) + r.max_tokens for r in requests))
    model.extend_rope_cache(cache.max_len, device)
    running: list[Request] = []  # in the order of the cache's rows
    next_tokens = torch.empty(0)
    in_flight: deque[tuple[list[Request], AsyncTokens]] = deque()
    while waiting or running or in_flight:
        if waiting or running:
            new = [waiting.pop() for _ in range(min(cache.max_rows - len(running), len(waiting)))]
            with torch.inference_mode():
                logits = [decode_step(model, cache, next_tokens)] if running else []
                if new:
                    logits.append(add_requests(model, cache, running, new, device))
                sampled = sample_and_broadcast(torch.cat(logits).float(), running, params)
                next_tokens = sampled.clamp(min=0)
            in_flight.append((list(running), AsyncTokens(sampled)))
            for request in running:
                request.num_sampled += 1
        full = [request for request in running if request.num_sampled == request.max_tokens]
        next_tokens = remove(cache, running, next_tokens, full)
        if len(in_flight) > async_lag or not (waiting or running):
            finished = process_tokens(*in_flight.popleft(), params)
            next_tokens = remove(cache, running, next_tokens, finished)
            yield from finished


class AsyncTokens:
    """Token ids on their way from the device."""

    def __init__(self, tokens: Tensor):
        self._tokens, self._arrived = tokens, None
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tokens.tolist()


def process_tokens(requests: list[Request], sampled: AsyncTokens, params: SamplingParams) -> list[Request]:
    """Append a step's tokens to their requests -> the requests that finish with it."""
    tokens = sampled.tolist()
    if INVALID_TOKEN in tokens:
        raise ValueError("the model's logits are not finite: its weights or its adapter are damaged")
    finished = []
    for request, token in zip(requests, tokens, strict=True):
        if request.finished:  # an extra step
            continue
        stops = token in params.stop_ids
        if not stops:
            request.tokens.append(token)
        full = len(request.tokens) == request.max_tokens
        request.finished = stops or full or (params.is_complete is not None and params.is_complete(request.tokens))
        if request.finished:
            finished.append(request)
    return finished


def remove(cache: KVCache, running: list[Request], next_tokens: Tensor, leaving: list[Request]) -> Tensor:
    """Take requests out of the running ones -> the next tokens of those that stay."""
    rows = list(range(len(running)))
    for row in reversed(range(len(running))):
        if running[row] in leaving:
            cache.free(row)
            for moved in (running, rows):  # as the cache does
                moved[row] = moved[-1]
                moved.pop()
    if len(rows) == len(next_tokens):
        return next_tokens
    return next_tokens[async_to_device(rows, next_tokens.device, torch.int64)]


def sample_and_broadcast(logits: Tensor, running: list[Request], params: SamplingParams) -> Tensor:
    """(R,) int64, the next token of each running request.

    Sampled on the first rank of the model-parallel group and sent to the others: all feed the same tokens and stop at
    the same one, whatever their last bits say.
    """
    if mp_rank() == 0:
        sampled = sample_running(logits, running, params)
    else:
        sampled = torch.empty(len(running), dtype=torch.int64, device=logits.device)
    if mp_size() > 1:
        dist.broadcast(sampled, mp.get_model_parallel_src_rank(), group=mp.get_model_parallel_group())
    return sampled


def sample_running(logits: Tensor, running: list[Request], params: SamplingParams) -> Tensor:
    """(R,) int64; INVALID_TOKEN where a row's logits are not finite. Does not wait for a GPU."""
    finite = torch.isfinite(logits.amax(-1))
    early = [row for row, request in enumerate(running) if request.num_sampled < params.min_new_tokens]
    if early:
        rows, stops = (async_to_device(numbers, logits.device) for numbers in (early, params.stop_ids))
        logits[rows[:, None], stops] = logits.new_full((), -torch.inf)  # a Python number would be copied to the GPU
    uniforms = None
    if params.temperature > 0:
        step = [request.uniforms[request.num_sampled] for request in running]
        uniforms = async_to_device(step, logits.device, torch.float64)
    return sample(logits, params.temperature, params.top_p, uniforms).masked_fill(~finite, INVALID_TOKEN)
