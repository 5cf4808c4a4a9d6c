"""What is computed of a run beside what processes really save and exchange."""

import json
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import count
import tiny
from benchmarks.common import LLAMA_3_1, SMOLLM2_135M
from commands import side_by_side
from count import LENGTHS
from llama import ModelArgs
from llama.packing import PackedBatch
from moa.config import AdapterConfig
from training.config import CHECKPOINTING_MODES
from training.estimate import (
    Message,
    comm_bytes_of_step,
    fake_rank,
    longest_batch,
    memory_by_mode,
    meta_model,
    saved_activation_bytes,
    static_bytes,
    trace_step,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LLAMA_8B = ModelArgs(**LLAMA_3_1["8B"])


def test_two_processes_exchange_what_is_computed(tmp_path) -> None:
    side_by_side(count.__file__, 2, tmp_path, timeout=200)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for name, messages in ranks[0].items():
        method, mode, size = name.split()
        with fake_rank(2, int(size)) as recorded:
            model = meta_model(tiny.ARGS, tiny.config(method), bf16=False)
            model.activation_checkpointing = mode
            within, gradients = trace_step(model, LENGTHS, recorded)
        computed = [list(m) for m in within + gradients]
        assert computed == messages == ranks[1][name] != [], name
        assert len(gradients) == (size == "1") and (within or size == "1")


SHALLOW = replace(ModelArgs(**SMOLLM2_135M), n_layers=tiny.ARGS.n_layers)  # a real width
SAVED = [
    (m, tiny.ARGS, n, bf16)
    for m in (*tiny.METHODS, *tiny.BASELINES)
    for n in (LENGTHS, [5, 5])
    for bf16 in (False, True)
]
SAVED += [("soft_moa", SHALLOW, [20, 17], False), ("molora", SHALLOW, [20, 17], True)]


@pytest.mark.parametrize(("method", "args", "lengths", "bf16"), SAVED)
def test_saved_activations_are_computed_to_the_byte(method, args, lengths, bf16) -> None:
    """What is computed for each mode is what autograd really saves."""
    with fake_rank(1, 1):
        computed = saved_activation_bytes(meta_model(args, tiny.config(method), bf16), lengths, CPU)
    model, storages = count.zeros(method, args, bf16), {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    for mode in CHECKPOINTING_MODES:
        storages.clear()
        model.activation_checkpointing = mode
        tokens = torch.ones(sum(lengths), dtype=torch.int64)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = model(tokens, labels=tokens.clone(), batch=PackedBatch(lengths, "cpu"))
        assert losses.ce_loss.requires_grad
        assert computed.saved[mode] == sum(s.nbytes() for key, s in storages.items() if key not in own), mode


def test_base_of_each_rank() -> None:
    """By hand: all matrices sharded, norms whole; of 16 ranks two share each of the 8 key/value heads."""
    args = LLAMA_8B
    embeddings, norms = 2 * args.vocab_size * args.dim, (2 * args.n_layers + 1) * args.dim
    q_and_o, ffn = 2 * args.dim * args.dim, 3 * args.dim * args.ffn_dim
    for size in (1, 8, 16):
        with fake_rank(size, size):
            held = static_bytes(meta_model(args, AdapterConfig.from_dict({"method": "lora"}, args.n_layers), bf16=True))
        heads = args.head_dim * max(1, args.n_kv_heads // size)
        layer = (q_and_o + ffn) // size + 2 * args.dim * heads
        assert held["base"] == 2 * (embeddings // size + norms + args.n_layers * layer)
        lora = (args.dim + args.dim // size) + 2 * (args.dim + heads)
        lora += 2 * args.dim + (args.dim + args.ffn_dim) // size
        assert held["adapters"] == held["gradients"] == held["optimizer"] // 2 == 4 * args.n_layers * 16 * lora


def test_memory_of_a_gpu() -> None:
    """By hand, per token and layer: what torch's kernels for GPUs save of a base in bf16 with LoRA at Q alone."""
    args, lengths = LLAMA_8B, [100, 99]

    def saved(n_layers: int):
        flat = {"method": "lora", "lora_targets": "Q", "lora_layers": f"0-{n_layers}"}
        model = meta_model(replace(args, n_layers=n_layers), AdapterConfig.from_dict(flat, n_layers), bf16=True)
        return saved_activation_bytes(model, lengths, GPU)

    with fake_rank(1, 1):
        three, four = saved(3), saved(4)
    layer = {mode: four.saved[mode] - three.saved[mode] for mode in CHECKPOINTING_MODES}
    kv, n = args.n_kv_heads * args.head_dim, sum(lengths)
    # Its norm's input; LoRA's input and its middle; q, k, v, heads; a float of the norm, and of each head's attention
    attention = n * (2 * (2 * args.dim + 16 + 2 * args.dim + 2 * kv) + 4 * (1 + args.n_heads))
    attention += 2 * 16 * 2 * args.dim  # copies of A and B in bf16
    given, gate_and_up = n * 2 * args.dim, n * (2 * 2 * args.ffn_dim + 4)  # the second half's input; with its norm's
    assert layer == {"none": attention + given + gate_and_up, "selective": attention + given, "full": given}
    assert four.recomputed == three.recomputed
    assert four.recomputed == {"none": 0, "selective": gate_and_up, "full": layer["none"] - given}
    # The last norm's input; of the loss, the gradient of its hidden states, and which they are
    rest = n * (2 * args.dim + 4) + (n - len(lengths)) * (2 * args.dim + 8)
    assert four.saved["full"] == 4 * given + rest
    assert four.total("selective") == four.saved["selective"] + gate_and_up


def test_an_estimate_is_the_sum_of_its_parts_and_more_ranks_need_less() -> None:
    config, totals = AdapterConfig.from_dict({"method": "soft_moa"}, 32), []
    for size in (1, 2, 8):
        with fake_rank(size, size):
            by_mode = memory_by_mode(meta_model(LLAMA_8B, config, bf16=True), longest_batch(2, 300), GPU)
        for parts in by_mode.values():
            assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
        totals.append(by_mode["none"]["total"])
    assert totals[0] > 1.7 * totals[1] > 1.7 * 2.5 * totals[2]


def test_what_a_ring_sends() -> None:
    assert Message("all_reduce", 4, 100).sent == 150  # three quarters to add up, three quarters to spread
    assert Message("all_gather", 4, 100).sent == 300
    with fake_rank(4, 2) as messages:
        within, gradients = trace_step(meta_model(tiny.ARGS, tiny.config("lora"), False), [5, 5], messages)
    assert {m.ranks for m in within} == {m.ranks for m in gradients} == {2}
    sent = comm_bytes_of_step(within, gradients, 3)["sent_bytes"]
    assert sent == 3 * sum(m.bytes for m in within) + sum(m.bytes for m in gradients)


def test_rows_of_the_longest_batch_are_not_all_alike() -> None:
    assert longest_batch(1, 300) == [300] and longest_batch(3, 300) == [300, 300, 299] and longest_batch(2, 1) == [1, 1]
