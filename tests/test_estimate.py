"""What is computed of a layout beside what processes really hold and exchange."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import count
import tiny
from benchmarks.shapes import LLAMA_3_1, SMOLLM2_135M
from commands import side_by_side
from count import CASES, LENGTHS, PROMPT
from llama import ModelArgs
from training.estimate import activation_bytes, cache_bytes, estimate, held_bytes, traffic, uneven
from training.layout import Message, first_rank
from training.rehearsal import kept, messages_of_generation, messages_of_step, unfilled_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes counted."""
    folder = tmp_path_factory.mktemp("count")
    side_by_side(count.__file__, 2, folder, timeout=200)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def listed(messages: list[Message]) -> list[list[Any]]:
    return [list(message) for message in messages]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_hold_and_exchange_what_is_computed(ranks, name: str) -> None:
    method, args, bf16 = CASES[name]
    with first_rank(2, 2) as notes:
        model = unfilled_model(args, tiny.config(method), bf16)
        computed = {"held": held_bytes(model), "cache": cache_bytes(model, 2, PROMPT + 1)}
        computed["kept"] = kept(model, LENGTHS, CPU).total
        for kind, again in (("plain", False), ("checkpointed", True)):
            model.activation_checkpointing = again
            computed[kind] = messages_of_step(model, LENGTHS, notes)
        generation = messages_of_generation(model, 2, PROMPT, notes)
    for rank in (rank[name] for rank in ranks):
        assert computed["held"]["base"] == rank["base"]
        assert computed["held"]["adapters"] == computed["held"]["gradients"] == rank["adapters"]
        assert computed["cache"] == rank["cache"]
        assert computed["kept"] == rank["plain"]["kept"]
        for kind in ("plain", "checkpointed"):
            step = computed[kind]
            assert listed([*step.forward, *step.loss]) == rank[kind]["forward"]
            assert listed(step.backward) == rank[kind]["backward"] != []
            assert step.gradients == []  # there is one replica
        assert listed(generation.prefill) == rank["prefill"]
        assert listed(generation.decode) == rank["decode"]


@pytest.mark.parametrize("name", CASES)
def test_two_replicas_exchange_what_is_computed(ranks, name: str) -> None:
    method, args, bf16 = CASES[name]
    with first_rank(2, 1) as notes:
        step = messages_of_step(unfilled_model(args, tiny.config(method), bf16), LENGTHS, notes)
    assert not (step.forward or step.loss or step.backward)
    for rank in ranks:
        assert listed(step.gradients) == rank[name]["gradients"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("lengths", [LENGTHS, [5, 5]])
def test_kept_activations_are_computed_to_the_byte(method: str, lengths: list[int], bf16: bool) -> None:
    with first_rank(1, 1):
        found, _ = count.kept_bytes(count.zeros(method, tiny.ARGS, bf16), lengths)
        assert kept(unfilled_model(tiny.ARGS, tiny.config(method), bf16), lengths, CPU).total == found


@pytest.mark.parametrize("method, bf16", [("soft_moa", False), ("molora", True)])
def test_kept_activations_of_a_real_shape(method: str, bf16: bool) -> None:
    args = replace(ModelArgs(**SMOLLM2_135M), n_layers=tiny.ARGS.n_layers)
    with first_rank(1, 1):
        found, _ = count.kept_bytes(count.zeros(method, args, bf16), [20, 17])
        assert kept(unfilled_model(args, tiny.config(method), bf16), [20, 17], CPU).total == found


def test_base_of_each_rank() -> None:
    """By hand: all matrices cut, norms whole; from 16 ranks on two of them share each of the 8 key/value heads."""
    args = ModelArgs(**LLAMA_3_1["8B"])
    embeddings, norms = 2 * args.vocab_size * args.dim, (2 * args.n_layers + 1) * args.dim
    q_and_o, ffn = 2 * args.dim * args.dim, 3 * args.dim * args.ffn_dim
    for size in (1, 8, 16):
        with first_rank(size, size):
            model = unfilled_model(args, tiny.AdapterConfig.from_flat({"method": "lora"}, args.n_layers), bf16=True)
            kv = 2 * args.dim * args.head_dim * max(1, args.n_kv_heads // size)
            expected = embeddings // size + norms + args.n_layers * ((q_and_o + ffn) // size + kv)
            assert held_bytes(model)["base"] == 2 * expected
            lora_q = args.n_layers * 16 * (args.dim + args.dim // size)
            lora_kv = 2 * args.n_layers * 16 * (args.dim + args.head_dim * max(1, args.n_kv_heads // size))
            lora_o_and_down = args.n_layers * 16 * (2 * args.dim + (args.dim + args.ffn_dim) // size)
            assert held_bytes(model)["adapters"] == 4 * (lora_q + lora_kv + lora_o_and_down)
            assert held_bytes(model)["optimizer"] == 2 * held_bytes(model)["adapters"]


def test_memory_of_a_gpu() -> None:
    """By hand, per token and layer: what torch's kernels for GPUs keep of a base in bf16 with LoRA at Q alone."""
    args = ModelArgs(**LLAMA_3_1["8B"])
    flat = {"method": "lora", "lora_targets": "Q", "lora_layers": "0-32"}
    lengths = [100, 99]
    with first_rank(1, 1):
        model = unfilled_model(args, tiny.AdapterConfig.from_flat(flat, args.n_layers), bf16=True)
        found = kept(model, lengths, GPU)
    kv, n = args.n_kv_heads * args.head_dim, sum(lengths)
    # both norms' inputs; LoRA's input and its middle; q, k, v, heads; gate, up
    numbers = 2 * args.dim + args.dim + 16 + 2 * args.dim + 2 * kv + 2 * args.ffn_dim
    floats = 2 + args.n_heads  # of each norm; of each head's attention
    lora = 2 * 16 * 2 * args.dim  # copies of A and B in bf16
    assert found.blocks[1:-1] == [n * (2 * numbers + 4 * floats) + lora] * (args.n_layers - 2)
    assert found.inputs == args.n_layers * n * 2 * args.dim
    # The last norm's input; of the loss, the gradient of its hidden states, and which they are
    rest = n * (2 * args.dim + 4) + (n - len(lengths)) * (2 * args.dim + 8)
    assert activation_bytes(found, recompute=False) == sum(found.blocks) + rest
    assert activation_bytes(found, recompute=True) == found.inputs + max(found.blocks) + rest


def test_an_estimate_is_the_sum_of_its_parts_and_more_ranks_need_less() -> None:
    args, config = ModelArgs(**LLAMA_3_1["8B"]), tiny.AdapterConfig.from_flat({"method": "soft_moa"}, 32)
    totals = []
    for size in (1, 2, 8):
        with first_rank(size, size):
            model = unfilled_model(args, config, bf16=True)
            found = estimate(model, kept(model, uneven(2, 300), GPU), sum(uneven(2, 300)), recompute=False)
        assert found["total"] == sum(size for name, size in found.items() if name != "total")
        totals.append(found["total"])
    assert totals[0] > 1.7 * totals[1] > 1.7 * 2.5 * totals[2]


def test_what_a_ring_sends() -> None:
    assert Message("all_reduce", 4, 100).sent == 150  # three quarters to add up, three quarters to spread
    assert Message("all_gather", 4, 100).sent == 300
    with first_rank(4, 2) as notes:
        step = messages_of_step(unfilled_model(tiny.ARGS, tiny.config("lora"), False), [5, 5], notes)
        messages = traffic(step, 3)
    inside = [*step.forward, *step.loss, *step.backward]
    assert {m.ranks for m in inside} == {m.ranks for m in step.gradients} == {2}
    assert messages["sent_bytes"] == 3 * sum(m.bytes for m in inside) + sum(m.bytes for m in step.gradients)
    assert messages["gradients"]["messages"] == len(step.gradients) == 1


def test_uneven_rows() -> None:
    assert uneven(1, 300) == [300] and uneven(3, 300) == [300, 300, 299] and uneven(2, 1) == [1, 1]
