"""Generation: the cache changes nothing, a row depends on itself alone, and it ends where it should."""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from llama import Llama
from llama.accelerate import FastDecoding, prepack, restore_model
from llama.engine import (
    INVALID_TOKEN,
    Request,
    SamplingParams,
    decode,
    prefill,
    sample,
    sample_running,
    seeded_uniforms,
)
from tiny import ALL, BASE, build, changed, config, prompts, relative, shared, tokens

ENDS = (257, 264, 265)


def by_recomputation(
    llm: Llama, prompt: list[int], max_gen_len: int, min_new_tokens: int = 0, temperature: float = 0.0, uniforms=None
) -> list[int]:
    """The whole sequence through the model for every token: no cache, no batch, no packing."""
    row: list[int] = []
    while len(row) < max_gen_len and len(prompt) + len(row) < llm.max_seq_len:
        with torch.no_grad():
            logits = llm.model(torch.tensor([prompt + row]), [len(prompt)])[0, -1]
        if len(row) < min_new_tokens:
            logits[list(ENDS)] = -math.inf
        if temperature == 0:
            token = int(logits.argmax())
        else:  # inverse of the distribution function over tokens in order of probability
            p = (logits.double() / temperature).softmax(0)
            order = p.argsort(descending=True, stable=True)
            token = int(order[(p[order].cumsum(0) > uniforms[len(row)]).nonzero()[0]])
        if token in ENDS:
            break
        row.append(token)
    return row


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", ALL)
def test_cached_equals_uncached(name: str | None, temperature: float) -> None:
    llm, rows = shared(name), prompts(3, 9, 1, 6)
    uniforms = [seeded_uniforms(row, seed=3, sample=0, n=10) for row in rows]
    expected = [by_recomputation(llm, r, 10, 0, temperature, u) for r, u in zip(rows, uniforms, strict=True)]
    assert llm.generate(rows, max_gen_len=10, temperature=temperature, seed=3) == expected
    assert any(len(row) == 10 for row in expected)
    assert (expected == llm.generate(rows, max_gen_len=10)) == (temperature == 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_a_row_depends_on_itself_alone(name: str | None, temperature: float) -> None:
    llm, rows = shared(name), prompts(7, 1, 12, 3, 3, 9)
    settings = {"max_gen_len": 8, "temperature": temperature, "top_p": 0.9, "seed": 11}
    with changed(llm, max_seq_len=16):  # so that rows end at different times
        alone = [llm.generate([row], **settings)[0] for row in rows]
    assert len({len(row) for row in alone}) > 2
    for size, order in ((2, 1), (4, -1), (32, 1), (32, -1)):
        with changed(llm, max_batch_size=size, max_seq_len=16):
            assert llm.generate(rows[::order], **settings) == alone[::order], size


@pytest.mark.parametrize("name", ["soft_moa", "soft_moa_instance", "topk_moelora"])
def test_tokens_that_are_read_later_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end by a stop token, after 8 tokens, or because there is no more room; several are samples of a prompt."""
    llm, rows = shared(name), prompts(7, 1, 12, 3, 3, 9) * 3
    monkeypatch.setattr(llm.tokenizer, "stop_ids", tuple(range(0, 512, 6)))
    settings = {"max_gen_len": 8, "temperature": 1.0, "seed": 11, "samples": [0] * 6 + [1] * 6 + [2] * 6}
    with changed(llm, max_seq_len=16):
        expected = llm.generate(rows, **settings)
        assert len({len(row) for row in expected}) > 3 and max(map(len, expected)) == 8
        for lag, size in itertools.product((1, 3), (1, 4, 32)):
            finished: dict[int, list[int]] = {}
            with changed(llm, max_batch_size=size, async_lag=lag):
                assert llm.generate(rows, **settings, on_finish=finished.__setitem__) == expected
            assert [finished[i] for i in range(18)] == expected


@contextmanager
def passes(llm: Llama) -> Iterator[list[int]]:
    """How many tokens each pass takes, meanwhile."""
    lengths: list[int] = []
    hook = llm.model.tok_embeddings.register_forward_hook(lambda _, inputs, __: lengths.append(len(inputs[0])))
    try:
        yield lengths
    finally:
        hook.remove()


def test_hooks_see_each_token_once_also_where_tokens_are_read_later() -> None:
    llm = shared("soft_moa")
    with changed(llm, async_lag=1), passes(llm) as lengths:
        llm.generate(prompts(4), max_gen_len=4, min_new_tokens=4)
    assert lengths == [4, 1, 1, 1]


@pytest.mark.parametrize("name", ["soft_moa", "soft_moa_instance", "adamole"])
def test_samples_of_a_prompt_share_its_pass(name: str) -> None:
    llm, (long, short) = shared(name), prompts(9, 5)
    rows, samples = [long, short, long, long, short], [0, 0, 1, 2, 1]
    settings = {"max_gen_len": 6, "temperature": 1.0, "min_new_tokens": 6}
    with passes(llm) as lengths:
        together = llm.generate(rows, samples=samples, **settings)
    assert lengths == [9 + 5] + [5] * 5
    alone = [llm.generate([row], samples=[sample], **settings)[0] for row, sample in zip(rows, samples, strict=True)]
    assert together == alone and together[0] != together[2]


@pytest.mark.parametrize("name", ["soft_moa", "soft_moa_instance", "adamole"])
def test_a_later_sample_takes_the_prompt_of_one_that_runs(name: str, monkeypatch) -> None:
    llm, (row, other) = shared(name), prompts(9, 4)
    settings = {"max_gen_len": 12, "temperature": 1.0, "seed": 3}
    monkeypatch.setattr(llm.tokenizer, "stop_ids", tuple(range(0, 512, 7)))  # so that samples end at different times
    alone = [llm.generate([row], samples=[i], **settings)[0] for i in range(6)]
    with changed(llm, max_batch_size=3), passes(llm) as lengths:
        together = llm.generate([*[row] * 6, other], samples=[*range(6), 0], **settings)
    assert together[:6] == alone and len({len(answer) for answer in alone}) > 2
    assert [n for n in lengths if n > 3] == [9, 4]


PATHS = {
    "plain": None,
    "cached weights": {},
    "cached weights, no decode path": {"decode_max_tokens": 1},
    "prepacked": {"prepack_from": 1},
    "prepacked, no decode path": {"prepack_from": 1, "decode_max_tokens": 1},
}


def require_decode_steps_like_a_whole_pass(name: str | None, bf16: bool, paths: Iterable[str]) -> None:
    """In float32 prepacked weights are fp16 here, where the processor's kernels take them: all are numbers of bf16."""
    model, (long, short) = build(name, bf16=bf16).model, prompts(12, 8)
    restore_model(model)
    device, n = torch.device("cpu"), 5
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data.copy_(parameter.bfloat16())
    routers = name and (config(name).block_router, config(name).expert_router)
    bf16_bound = 0.08 if routers in (None, ("soft", "soft")) else 0.5  # rounding may choose other experts
    with torch.inference_mode():
        expected = [model(torch.tensor([row]), [len(row) - n])[0] for row in (long, short)]
        for path in paths:
            restore_model(model)
            fast = None if PATHS[path] is None else FastDecoding(model, **PATHS[path])
            with fast.running(5, False) if fast else nullcontext(decode) as step:
                cache = model.new_cache(2, 12)
                logits = [prefill(model, cache, [long[:-n], short[:-n]], device)]
                logits += [step(model, cache, torch.tensor([long[-i], short[-i]])) for i in range(n, 0, -1)]
            rows = torch.stack(logits, 1).float()
            off = [relative(row, whole[-n - 1 :]) for row, whole in zip(rows, expected, strict=True)]
            assert max(off) < (bf16_bound if bf16 else 1e-5), (path, off)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_decode_steps_equal_a_whole_pass(name: str | None, bf16: bool) -> None:
    """By the plain formulas and by each faster way."""
    require_decode_steps_like_a_whole_pass(name, bf16, PATHS)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("has_fbgemm", [False, prepack.has_fbgemm()])
def test_prepacking_on_a_processor_without_bf16_or_with_no_kernels_of_its_own(bf16, has_fbgemm, monkeypatch) -> None:
    monkeypatch.setattr(prepack, "has_onednn_bf16", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    monkeypatch.setattr(prepack, "has_fbgemm", lambda: has_fbgemm)
    if not has_fbgemm:
        monkeypatch.setattr(torch.ops.quantized, "linear_prepack_fp16", None)
    require_decode_steps_like_a_whole_pass("soft_moa", bf16, ["prepacked"])


def test_prepacked_weights_are_dropped_when_a_weight_changes() -> None:
    llm, rows = build("soft_moa"), prompts(6, 3)
    llm.fast_decoding = FastDecoding(llm.model, prepack_from=1)
    plain = Llama.build(BASE, config=config("soft_moa"), max_seq_len=64, accelerate=False)
    plain.model.load_state_dict(llm.model.state_dict())
    settings = {"max_gen_len": 8, "min_new_tokens": 8}
    assert llm.generate(rows, **settings) == plain.generate(rows, **settings)
    for model in (llm.model, plain.model):
        model.layers[1].feed_forward.w1.weight.data.neg_()  # counts no version
        with torch.no_grad():
            model.layers[0].attention.adapters["lora_Q"].lora_B.mul_(-1)
    assert llm.generate(rows, **settings) == plain.generate(rows, **settings)


def test_seeds_and_samples_differ_and_repeat() -> None:
    llm, (row,) = shared("soft_moa"), prompts(5)
    settings = {"max_gen_len": 10, "temperature": 1.0}
    draws = llm.generate([row] * 4, samples=[0, 1, 2, 0], **settings)
    assert draws[0] == draws[3] and len({tuple(draw) for draw in draws}) == 3
    assert llm.generate([row], samples=[2], **settings) == [draws[2]]
    assert llm.generate([row], seed=1, **settings) != [draws[0]]
    assert llm.generate([row], seed=0, **settings) == [draws[0]]
    assert llm.generate([row] * 3, **settings) == [draws[0]] * 3  # duplicates of a prompt
    greedy = llm.generate([row] * 2, max_gen_len=10, samples=[0, 1], seed=4)
    assert greedy == llm.generate([row] * 2, max_gen_len=10, seed=5)


@pytest.fixture(scope="module", params=ENDS)
def ending(request) -> tuple[Llama, list[list[int]]]:
    """A model that says `request.param` where the untouched one says a certain ordinary token, and what comes out
    before it: the output rows of the two tokens are swapped."""
    llm, rows = build("lora"), prompts(4, 7, 5)
    free = llm.generate(rows, max_gen_len=12)
    stop = free[0][4]
    assert all(len(row) == 12 for row in free) and stop not in free[0][:4]
    weight = llm.model.output.weight
    weight[[stop, request.param]] = weight[[request.param, stop]]
    return llm, rows


def test_stops_at_the_end_tokens(ending) -> None:
    llm, rows = ending
    outputs = llm.generate(rows, max_gen_len=12)
    assert len(outputs[0]) == 4
    assert outputs == [by_recomputation(llm, row, 12) for row in rows]
    assert not {*ENDS} & {token for row in outputs for token in row}


def test_min_new_tokens_puts_the_end_off(ending) -> None:
    llm, rows = ending
    for n in (3, 4, 5, 9, 12):
        outputs = llm.generate(rows, max_gen_len=12, min_new_tokens=n)
        assert all(len(row) >= n for row in outputs)
        assert outputs == [by_recomputation(llm, row, 12, min_new_tokens=n) for row in rows]
    assert len(llm.generate(rows, max_gen_len=12, min_new_tokens=4)[0]) == 4
    sampled = llm.generate(rows, max_gen_len=12, min_new_tokens=12, temperature=1.5)
    assert [len(row) for row in sampled] == [12] * 3
    assert not {*ENDS} & {token for row in sampled for token in row}


def test_a_row_ends_where_max_seq_len_is_full() -> None:
    llm = shared("soft_moa")
    free = llm.generate(prompts(10, 14, 15), max_gen_len=6)
    with changed(llm, max_seq_len=16):
        assert llm.generate(prompts(10, 14, 15), max_gen_len=6) == [free[0], free[1][:2], free[2][:1]]


def test_on_finish_as_rows_finish() -> None:
    llm, rows, calls = shared("lora"), prompts(10, 14, 12, 3), []
    with changed(llm, max_seq_len=16, max_batch_size=3):
        outputs = llm.generate(rows, max_gen_len=5, on_finish=lambda i, row: calls.append((i, list(row))))
    assert [len(row) for row in outputs] == [5, 2, 4, 5]
    # 14, 12 and 10 tokens run first; 3 tokens wait for room
    assert calls == [(i, outputs[i]) for i in (1, 2, 0, 3)]


def test_generation_leaves_the_model_trainable() -> None:
    llm, batch = build("prompt"), tokens(1, 5)
    assert llm.generate([], max_gen_len=4) == []
    llm.generate(prompts(4), max_gen_len=3)
    llm.model.loss(batch, batch).backward()
    assert llm.model.layers[0].attention.adapters["prompt"].prompt.grad.norm() > 0


BAD = [
    ({"prompts": [[256, 1], []]}, "prompt 1 is empty"),
    ({"prompts": [[256] * 64]}, "prompt 0 has 64 tokens.* 64"),
    ({"prompts": [[256, 512]]}, "prompt 0 .* 512"),
    ({"max_gen_len": 0}, "max_gen_len .* 0"),
    ({"min_new_tokens": -1}, "min_new_tokens .* -1"),
    ({"min_new_tokens": 5}, "min_new_tokens .*4.* 5"),
    ({"temperature": -0.5}, "temperature .* -0.5"),
    ({"top_p": 0.0}, "top_p .* 0.0"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_requests_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared(None).generate(**({"prompts": [[256, 1]], "max_gen_len": 4} | change))
    with pytest.raises(ValueError, match="max_seq_len must be at least 1, not 0"):
        build(None, max_seq_len=0)


# Sampling


@pytest.mark.parametrize(
    "probabilities, top_p, kept",
    [
        ([0.5, 0.25, 0.125, 0.125], 0.5, {0}),  # reached exactly: the next one is not needed
        ([0.5, 0.25, 0.125, 0.125], 0.51, {0, 1}),
        ([0.5, 0.25, 0.125, 0.125], 0.75, {0, 1}),
        ([0.125, 0.25, 0.125, 0.5], 0.8, {3, 1, 0}),  # of equals, the lower id
        ([0.5, 0.25, 0.125, 0.125], 1.0, {0, 1, 2, 3}),
        ([0.5, 0.25, 0.125, 0.125], 0.01, {0}),
        ([1.0, 0.0, 0.0, 0.0], 1.0, {0}),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(probabilities: list, top_p: float, kept: set) -> None:
    draws = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    logits = torch.tensor(probabilities).log().expand(len(draws), -1)
    chosen = sample(logits, 1.0, top_p, draws)
    assert set(chosen.tolist()) == kept
    total = sum(probabilities[i] for i in kept)
    for i in kept:  # in proportion to their probabilities
        assert abs((chosen == i).float().mean().item() - probabilities[i] / total) < 0.002


def test_sampling_at_the_limits() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, -math.inf], [-math.inf, 300.0, 2.0, 1.0]])
    assert sample(logits, 0.0, 1.0, None).tolist() == [1, 1]  # the lowest id of equals
    largest = torch.full((2,), 1 - 2**-53, dtype=torch.float64)
    assert sample(logits, 2e-38, 1.0, largest).tolist() == [2, 1]  # no overflow
    assert sample(logits, 1.0, 1.0, largest)[0] == 0  # the last that is possible, never an excluded one
    draws = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
    assert torch.equal(sample(torch.zeros(1024, 1024), 1.0, 1.0, draws), torch.arange(1024))  # equals by their ids


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logits_that_are_not_finite_are_marked(temperature: float) -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [-math.inf] * 3])
    running = [Request(i, [256], 5, [0.1] * 5) for i in range(4)]
    chosen = sample_running(logits, running, SamplingParams((0,), 0, temperature, 0.9))
    assert chosen.tolist() == [1, INVALID_TOKEN, INVALID_TOKEN, INVALID_TOKEN]


def test_the_numbers_of_a_row() -> None:
    numbers = seeded_uniforms([1, 2], seed=0, sample=0, n=2000)
    assert numbers.min() >= 0 and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.03
    assert torch.equal(seeded_uniforms([1, 2], 0, 0, 5), numbers[:5])  # max_gen_len does not matter
    others = [seeded_uniforms(*key, n=5) for key in (([1, 3], 0, 0), ([1, 2], 1, 0), ([1, 2], 0, 1), ([12], 0, 0))]
    assert len({tuple(t.tolist()) for t in (numbers[:5], *others)}) == 5
