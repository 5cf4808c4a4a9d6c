"""A base in 4 bits: its numbers are bitsandbytes', and every gradient is that of the dequantised matrices in place."""

import sys

import pytest
import torch
from torch import nn

from llama import Llama
from llama.checkpoint import shard_specs
from llama.packing import PackedBatch
from llama.quantize import NF4Layer, is_quantizable, nf4_bytes
from tiny import ARGS, BASE, METHODS, build, config, float64, gradients, relative, tokens
from training.estimate import fake_rank, meta_model, saved_activation_bytes, static_bytes

bitsandbytes = pytest.importorskip("bitsandbytes.functional")


def dequantized(llm: Llama) -> Llama:
    """The same model with the dequantised matrices as plain ones."""
    plain = Llama.build(BASE, config=llm.model.config, max_seq_len=64, accelerate=False)
    plain.model.load_state_dict(llm.model.state_dict(), strict=False)
    for key in filter(is_quantizable, shard_specs(llm.model)):
        layer = plain.model.get_submodule(key.removesuffix(".weight"))
        layer.weight = nn.Parameter(llm.model.get_submodule(key.removesuffix(".weight")).weight, requires_grad=False)
    return plain


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_dequantised_matrices(name: str) -> None:
    llm, batch = build(name, quantize="nf4"), tokens(2, 9)
    plain, results = dequantized(llm), []
    for model in (llm.model, plain.model):
        with float64(model):
            loss = model.loss(batch, batch)
            loss.backward()
            results.append((loss.detach(), gradients(model)))
    (loss, grads), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss)
    for key, grad in expected.items():
        assert relative(grads[key], grad) < 1e-9, key
    prompts = [[256, 1, 2, 3], [256, 9]]
    assert llm.generate(prompts, max_gen_len=5) == plain.generate(prompts, max_gen_len=5)


def test_matrices_are_bitsandbytes_own_and_the_rest_stays() -> None:
    llm, plain = build(None, quantize="nf4"), build(None)
    for key in shard_specs(plain.model):
        original = plain.model.get_parameter(key)
        layer = llm.model.get_submodule(key.removesuffix(".weight"))
        assert isinstance(layer, NF4Layer) == is_quantizable(key)
        if is_quantizable(key):
            packed, state = bitsandbytes.quantize_4bit(original, quant_type="nf4", compress_statistics=True)
            assert torch.equal(layer.quantized.packed, packed)
            assert torch.equal(layer.weight, bitsandbytes.dequantize_4bit(packed, state))
            held = [packed, state.absmax, state.state2.absmax]
            assert sum(t.numel() * t.element_size() for t in held) == nf4_bytes(original.numel())
        else:
            assert torch.equal(layer.weight, original), key


def test_the_backward_pass_keeps_no_dequantised_matrix() -> None:
    model, batch, saved = build("lora", quantize="nf4").model, tokens(1, 5), []
    matrices = {layer.weight.shape for layer in model.modules() if isinstance(layer, NF4Layer)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        model.loss(batch, batch)
    assert saved and not matrices & set(saved)


def test_what_is_refused(monkeypatch) -> None:
    with pytest.raises(ValueError, match="quantize needs model_parallel_size 1, not 2"):
        build(None, quantize="nf4", model_parallel_size=2)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match="--quantize needs the package bitsandbytes, which is not installed"):
        build(None, quantize="nf4")


def test_the_estimate_knows_what_is_held_and_what_is_saved() -> None:
    lengths = [9, 6]
    with fake_rank(1, 1):
        model = meta_model(ARGS, config("soft_moa"), bf16=False, quantize="nf4")
        computed = static_bytes(model) | {
            "saved": saved_activation_bytes(model, lengths, torch.device("cpu")).saved["none"]
        }
        plain = static_bytes(meta_model(ARGS, config("soft_moa"), bf16=False))
    llm, storages = build("soft_moa", quantize="nf4"), {}
    own = {t.untyped_storage().data_ptr() for t in llm.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.ones(15, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = llm.model(ids, labels=ids.clone(), batch=PackedBatch(lengths, "cpu"))
    assert losses.ce_loss.requires_grad
    saved = sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)
    assert computed["saved"] == saved
    matrices = [layer for layer in llm.model.modules() if isinstance(layer, NF4Layer)]
    others = [llm.model.get_parameter(key) for key in shard_specs(llm.model) if not is_quantizable(key)]
    kept = sum(4 * parameter.numel() for parameter in others)
    assert computed["base"] == kept + sum(nf4_bytes(layer.weight.numel()) for layer in matrices) < plain["base"] / 2
