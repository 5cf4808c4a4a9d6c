"""Generating many rows at once: one prefill per row, then one decode step at a time over all that run.

The engine knows token ids, not text. A row that ends leaves at once, as soon as that is known, and a waiting one takes
its place.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor

from llama.graphs import Graphs
from llama.kv_cache import KVCache
from llama.model import Transformer
from llama.packing import PackedBatch, async_to_device
from llama.sampling import sample
from moa.parallel import mp_rank, mp_size

INVALID_TOKEN = -1  # in the place of a token


@dataclass(eq=False)
class Request:
    """An answer in the making. `draws`: one number in [0, 1) per token, empty for greedy generation. `chosen`: how many
    tokens the device has chosen, of which the CPU has read `tokens`. `first`: once it runs, the logits (V,) behind its
    prompt."""

    index: int
    prompt: list[int]
    limit: int  # tokens at most
    draws: list[float]
    tokens: list[int] = field(default_factory=list)
    chosen: int = 0
    ended: bool = False
    first: Tensor | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen: `stop_ids` end an answer, but not before `min_new_tokens`."""

    stop_ids: tuple[int, ...]
    min_new_tokens: int
    temperature: float
    top_p: float


def prefill(model: Transformer, cache: KVCache, prompts: list[list[int]], device: torch.device) -> Tensor:
    """Admit new rows to the cache -> logits (R, V) of each row's first new token. Rows of the same prompt, several
    samples of an answer, share its pass."""
    places = cache.admit([len(prompt) for prompt in prompts])
    numbers: dict[tuple[int, ...], int] = {}  # of the different prompts
    which = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    first = [places[which.index(number)] for number in range(len(numbers))]
    rows = PackedBatch([len(prompt) for prompt in numbers], device)
    tokens = async_to_device([token for prompt in numbers for token in prompt], device)
    last = async_to_device([end - 1 for _, end in rows.spans], device)
    logits = model.output(model.hidden(tokens, rows, cache, first)[last])
    for number, place in zip(which, places, strict=True):
        if place != first[number]:
            cache.copy(first[number], place)
    return logits[async_to_device(which, device)]


def start(
    model: Transformer, cache: KVCache, running: list[Request], new: list[Request], device: torch.device
) -> Tensor:
    """Admit new answers and let them run -> their first logits (R, V). One whose prompt a running answer has already
    takes what is held of it; the others' prompts take a pass."""
    places = {tuple(answer.prompt): place for place, answer in enumerate(running)}
    again = [answer for answer in new if tuple(answer.prompt) in places]
    for answer in again:
        source, n = places[tuple(answer.prompt)], len(answer.prompt)
        cache.copy(source, *cache.admit([n]), n)
        answer.first = running[source].first
    fresh = [answer for answer in new if tuple(answer.prompt) not in places]
    if fresh:
        for answer, logits in zip(fresh, prefill(model, cache, [a.prompt for a in fresh], device), strict=True):
            answer.first = logits
    running += again + fresh
    return torch.stack([answer.first for answer in again + fresh])


def decode(model: Transformer, cache: KVCache, tokens: Tensor) -> Tensor:
    """Feed the newest token of every cached row, (R,) int64 -> logits (R, V) of the next."""
    lengths = cache.advance()
    fed = torch.stack([tokens, async_to_device(lengths, tokens.device)])
    return decode_step(model, cache, fed, lengths, min(lengths) == max(lengths))


def decode_step(model: Transformer, cache: KVCache, fed: Tensor, lengths: list[int], even: bool) -> Tensor:
    """What of a decode step the device does alone. fed (2, R): the newest tokens, and how many their rows have with
    them: `lengths`, or less in a graph, which is for all that are not longer. even: all rows have as many."""
    tokens, ends = fed
    cache.at(ends, max(lengths), even)
    rows = PackedBatch([1] * len(lengths), fed.device, starts=[n - 1 for n in lengths], positions=ends - 1)
    return model.output(model.hidden(tokens, rows, cache))


def run(
    model: Transformer,
    answers: list[Request],
    max_rows: int,
    rules: SamplingParams,
    cuda_graphs: bool = False,
    behind: int = 0,
) -> Iterator[Request]:
    """Complete all `answers`, up to `max_rows` at a time; yields each as it ends, without its stop token. cuda_graphs:
    decode steps by `llama.graphs`.

    behind: so many steps later than they are chosen the CPU reads tokens, so that a device which works on its own never
    waits for it; a row takes as many steps in vain once it has chosen a stop token. The results are the same.
    """
    device = model.output.weight.device
    # Longest prompts first: the peak of memory comes at the start, and rows that share a prefill are alike.
    waiting = sorted(answers, key=lambda answer: (-len(answer.prompt), answer.index), reverse=True)
    cache = model.new_cache(min(max_rows, len(answers)), max(len(a.prompt) + a.limit for a in answers))
    step = partial(decode, model, cache)
    if cuda_graphs:
        model.reach(cache.max_len, device)  # and stay where it is
        step = Graphs(cache, partial(decode_step, model, cache)).decode
    running: list[Request] = []  # in the order of the cache's places
    newest = torch.empty(0)  # their last tokens
    unread: deque[tuple[list[Request], _Arriving]] = deque()
    while waiting or running or unread:
        if waiting or running:
            new = [waiting.pop() for _ in range(min(cache.max_rows - len(running), len(waiting)))]
            with torch.inference_mode():
                logits = [step(newest)] if running else []
                if new:
                    logits.append(start(model, cache, running, new, device))
                chosen = _next_tokens(torch.cat(logits).float(), running, rules)
                newest = chosen.clamp(min=0)  # what is not finite is told when it is read
            unread.append((list(running), _Arriving(chosen)))
            for answer in running:
                answer.chosen += 1
        newest = _leave(cache, running, newest, [answer for answer in running if answer.chosen == answer.limit])
        if len(unread) > behind or not (waiting or running):
            ended = _read(*unread.popleft(), rules)
            newest = _leave(cache, running, newest, ended)
            yield from ended


class _Arriving:
    """Numbers on their way from the device."""

    def __init__(self, numbers: Tensor):
        self._numbers, self._there = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def tolist(self) -> list[int]:
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()


def _read(answers: list[Request], chosen: _Arriving, rules: SamplingParams) -> list[Request]:
    """Add to the answers what a step has chosen for them -> those that it ends."""
    tokens = chosen.tolist()
    if INVALID_TOKEN in tokens:
        raise ValueError("the model's logits are not finite: its weights or its adapter are damaged")
    ended = []
    for answer, token in zip(answers, tokens, strict=True):
        if answer.ended:  # a step in vain
            continue
        stops = token in rules.stop_ids
        if not stops:
            answer.tokens.append(token)
        answer.ended = stops or len(answer.tokens) == answer.limit
        if answer.ended:
            ended.append(answer)
    return ended


def _leave(cache: KVCache, running: list[Request], newest: Tensor, leaving: list[Request]) -> Tensor:
    """Let rows leave that still run -> the newest tokens of those that stay."""
    places = list(range(len(running)))
    for place in reversed(range(len(running))):
        if running[place] in leaving:
            cache.drop(place)
            for row in (running, places):  # as the cache does
                row[place] = row[-1]
                row.pop()
    return newest[async_to_device(places, newest.device, torch.int64)] if len(places) < len(newest) else newest


def _next_tokens(logits: Tensor, running: list[Request], rules: SamplingParams) -> Tensor:
    """(R,) int64, the next token of each running row: chosen on the first rank of the model's group and sent to the
    others, so that all of them feed the same tokens and stop at the same one, whatever their last bits say."""
    if mp_rank() == 0:
        chosen = _choose(logits, running, rules)
    else:
        chosen = torch.empty(len(running), dtype=torch.int64, device=logits.device)
    if mp_size() > 1:
        dist.broadcast(chosen, mp.get_model_parallel_src_rank(), group=mp.get_model_parallel_group())
    return chosen


def _choose(logits: Tensor, running: list[Request], rules: SamplingParams) -> Tensor:
    """(R,) int64; INVALID_TOKEN where a row's logits are not. Nothing here waits for a GPU."""
    finite = torch.isfinite(logits.amax(-1))
    early = [place for place, answer in enumerate(running) if answer.chosen < rules.min_new_tokens]
    if early:
        rows, stops = (async_to_device(numbers, logits.device) for numbers in (early, rules.stop_ids))
        logits[rows[:, None], stops] = logits.new_full((), -torch.inf)  # a number would be copied there first
    draws = None
    if rules.temperature > 0:
        now = [answer.draws[answer.chosen] for answer in running]
        draws = async_to_device(now, logits.device, torch.float64)
    return sample(logits, rules.temperature, rules.top_p, draws).masked_fill(~finite, INVALID_TOKEN)
