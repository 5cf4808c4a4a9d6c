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
from training.config import RECOMPUTED
from training.estimate import activation_bytes, cache_bytes, estimates, held_bytes, traffic, uneven
from training.layout import Message, first_rank
from training.rehearsal import Kept, kept, messages_of_generation, messages_of_step, unfilled_model

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
        computed["kept"] = kept(model, LENGTHS, CPU)
        for kind in RECOMPUTED:
            model.activation_checkpointing = kind
            computed[kind] = messages_of_step(model, LENGTHS, notes)
        generation = messages_of_generation(model, 2, PROMPT, notes)
    for rank in (rank[name] for rank in ranks):
        assert computed["held"]["base"] == rank["base"]
        assert computed["held"]["adapters"] == computed["held"]["gradients"] == rank["adapters"]
        assert computed["cache"] == rank["cache"]
        for kind in RECOMPUTED:
            assert computed["kept"].standing[kind] == rank[kind]["kept"], kind
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
        require_kept(method, tiny.ARGS, lengths, bf16)


def require_kept(method: str, args: ModelArgs, lengths: list[int], bf16: bool) -> None:
    """What is computed is what is really kept."""
    found = kept(unfilled_model(args, tiny.config(method), bf16), lengths, CPU)
    real = count.zeros(method, args, bf16)
    for choice in RECOMPUTED:
        real.activation_checkpointing = choice
        standing, _ = count.kept_bytes(real, lengths)
        assert found.standing[choice] == standing, choice
        assert found.again[choice] == count.kept_in_parts(real, lengths), choice


@pytest.mark.parametrize("method, bf16", [("soft_moa", False), ("molora", True)])
def test_kept_activations_of_a_real_shape(method: str, bf16: bool) -> None:
    args = replace(ModelArgs(**SMOLLM2_135M), n_layers=tiny.ARGS.n_layers)
    with first_rank(1, 1):
        require_kept(method, args, [20, 17], bf16)


def test_base_of_each_rank() -> None:
    """By hand: all matrices cut, norms whole; from 16 ranks on two of them share each of the 8 key/value heads."""
    args = ModelArgs(**LLAMA_3_1["8B"])
    embeddings, norms = 2 * args.vocab_size * args.dim, (2 * args.n_layers + 1) * args.dim
    q_and_o, ffn = 2 * args.dim * args.dim, 3 * args.dim * args.ffn_dim
    for size in (1, 8, 16):
        with first_rank(size, size):
            model = unfilled_model(args, tiny.AdapterConfig.from_dict({"method": "lora"}, args.n_layers), bf16=True)
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
    lengths = [100, 99]

    def found(n_layers: int) -> Kept:
        flat = {"method": "lora", "lora_targets": "Q", "lora_layers": f"0-{n_layers}"}
        shape = replace(args, n_layers=n_layers)
        return kept(unfilled_model(shape, tiny.AdapterConfig.from_dict(flat, n_layers), bf16=True), lengths, GPU)

    with first_rank(1, 1):
        three, four = found(3), found(4)
    layer = {choice: four.standing[choice] - three.standing[choice] for choice in RECOMPUTED}
    kv, n = args.n_kv_heads * args.head_dim, sum(lengths)
    # Its norm's input; LoRA's input and its middle; q, k, v, heads; a float of the norm, and of each head's attention
    attention = n * (2 * (2 * args.dim + 16 + 2 * args.dim + 2 * kv) + 4 * (1 + args.n_heads))
    attention += 2 * 16 * 2 * args.dim  # copies of A and B in bf16
    given, gate_and_up = n * 2 * args.dim, n * (2 * 2 * args.ffn_dim + 4)  # the second half's input; with its norm's
    assert layer == {"off": attention + given + gate_and_up, "ffn": attention + given, "all": given}
    assert four.again == three.again == {"off": 0, "ffn": gate_and_up, "all": layer["off"] - given}
    # The last norm's input; of the loss, the gradient of its hidden states, and which they are
    rest = n * (2 * args.dim + 4) + (n - len(lengths)) * (2 * args.dim + 8)
    assert four.standing["all"] == 4 * given + rest
    assert activation_bytes(four, "ffn") == four.standing["ffn"] + gate_and_up


def test_an_estimate_is_the_sum_of_its_parts_and_more_ranks_need_less() -> None:
    args, config = ModelArgs(**LLAMA_3_1["8B"]), tiny.AdapterConfig.from_dict({"method": "soft_moa"}, 32)
    totals = []
    for size in (1, 2, 8):
        with first_rank(size, size):
            model = unfilled_model(args, config, bf16=True)
            found = estimates(model, uneven(2, 300), GPU)
        for parts in found.values():
            assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
        totals.append(found["off"]["total"])
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
