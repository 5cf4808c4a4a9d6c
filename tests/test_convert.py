"""Damaged sources of conversions, output folders and the command line; what converts: test_conversions.py."""

import json
import os
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from convert import gguf as from_gguf
from convert import hf as from_hf
from convert.__main__ import main
from convert.meta_format import DTYPES
from convert_samples import gguf_tensors, refused_by_command, write_gguf, write_hf
from llama.args import ModelArgs


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Both styles of Hugging Face folders, with their models."""
    root = tmp_path_factory.mktemp("hf")
    return {style: (root / style, write_hf(root / style, style)) for style in ("llama3", "smol")}


@pytest.fixture
def folder(originals, tmp_path):
    """A copy of the smol folder that a test may damage."""
    return shutil.copytree(originals["smol"][0], tmp_path / "source")


def load(path):
    return torch.load(path / "consolidated.00.pth", weights_only=True)


def test_the_file_holds_each_tensor_once_in_the_asked_dtype(originals, tmp_path):
    for dtype, torch_dtype in DTYPES.items():
        from_hf.convert(originals["llama3"][0], tmp_path / dtype, dtype=dtype)
        state = load(tmp_path / dtype)
        assert {tensor.dtype for tensor in state.values()} == {torch_dtype}
        size = sum(tensor.nbytes for tensor in state.values())
        # A view into a larger tensor would bring all of that along.
        assert (tmp_path / dtype / "consolidated.00.pth").stat().st_size < size + 50_000


def test_old_inverse_frequencies_and_a_second_copy_of_a_tied_matrix_are_no_leftovers(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    from_hf.convert(folder, tmp_path / "out")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: tensor lm_head.weight differs"):
        from_hf.convert(folder, tmp_path / "out2")


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


UP = "model.layers.1.mlp.up_proj.weight"
OF_UP = f"model.safetensors: tensor {UP}"
BAD_HF = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "tensor missing": (edit_tensors(lambda t: t.pop(UP)), f"source: tensor {UP} is missing"),
    "no embedding": (edit_tensors(lambda t: t.pop("model.embed_tokens.weight")), "embed_tokens.weight is missing"),
    "tensor too many": (edit_tensors(lambda t: t.update(bias=torch.ones(48))), "safetensors: tensor bias has no place"),
    "shape": (
        edit_tensors(lambda t: t.update({UP: t[UP].T.contiguous()})),
        rf"{OF_UP} has shape \(48, 128\), expected",
    ),
    "not finite": (edit_tensors(lambda t: t[UP][3].fill_(torch.nan)), f"{OF_UP} has values that are not finite"),
    "integers": (edit_tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})), f"{OF_UP} is torch.int8"),
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 9999), "safetensors: not a whole safetensors file"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "x.bin"),
        "holds neither .*pickled weights are not read",
    ),
}


@pytest.mark.parametrize("case", BAD_HF)
def test_bad_folder(case, folder, tmp_path):
    damage, message = BAD_HF[case]
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        from_hf.convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_bad_index(tmp_path):
    source = tmp_path / "source"
    write_hf(source, "llama3", max_shard_size="60KB")
    index_file = source / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = index["weight_map"][UP]

    def refused(message):
        index_file.write_text(json.dumps(index))
        with pytest.raises(ValueError, match=message):
            from_hf.convert(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    index["weight_map"]["model.layers.9.x"] = shard
    refused(f"{shard}: tensor model.layers.9.x is missing, but model.safetensors.index.json names it")
    index["weight_map"]["model.layers.9.x"] = "../elsewhere.safetensors"
    refused("index.json: weight_map must map")
    del index["weight_map"]["model.layers.9.x"]
    (source / shard).unlink()
    refused(f"{shard}: no such file, but model.safetensors.index.json names it")


def test_fp16_overflow_is_refused(folder, tmp_path):
    edit_tensors(lambda t: t[UP].view(-1)[3:4].fill_(1e6))(folder)
    with pytest.raises(ValueError, match=f"tensor {UP} has values that are not finite numbers in fp16"):
        from_hf.convert(folder, tmp_path / "out", dtype="fp16")
    from_hf.convert(folder, tmp_path / "out", dtype="bf16")


def test_an_output_folder_is_replaced_only_when_asked_and_only_when_it_is_a_checkpoint(originals, tmp_path):
    out = tmp_path / "deep" / "out"
    from_hf.convert(originals["smol"][0], out)
    before = (out / "params.json").read_text()
    with pytest.raises(ValueError, match="out: exists already .--overwrite"):
        from_hf.convert(originals["llama3"][0], out)
    assert (out / "params.json").read_text() == before
    from_hf.convert(originals["llama3"][0], out, overwrite=True)
    assert (out / "params.json").read_text() != before
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="out: holds thesis.tex"):
        from_hf.convert(originals["smol"][0], out, overwrite=True)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_failed_write_leaves_nothing(originals, tmp_path, monkeypatch):
    def full_disk(*args):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file\nmore")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="consolidated.00.pth: could not be written"):
        from_hf.convert(originals["smol"][0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_quantised_tensors(tmp_path):
    tensors, result = gguf_tensors(), tmp_path / "out"
    kinds = {
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_1,
        "blk.1.ffn_down.weight": gguf.GGMLQuantizationType.BF16,
    }
    write_gguf(tmp_path / "tiny.gguf", tensors, kinds, heads=4)
    from_gguf.convert(tmp_path / "tiny.gguf", result, dtype="fp32")
    state = load(result)
    tensors |= {name: dequantize(quantize(tensors[name], kind), kind) for name, kind in kinds.items()}
    for ours, theirs in {"attention.wq": "0.attn_q", "attention.wk": "0.attn_k"}.items():
        assert np.array_equal(state[f"layers.0.{ours}.weight"], tensors[f"blk.{theirs}.weight"])
    assert np.array_equal(state["layers.1.feed_forward.w2.weight"], tensors["blk.1.ffn_down.weight"])
    for name in ("tok_embeddings", "output"):
        assert np.array_equal(state[f"{name}.weight"], tensors["token_embd.weight"])
    args = ModelArgs.from_file(result / "params.json")
    assert (args.norm_eps, args.rope_theta, args.ffn_dim, args.use_scaled_rope) == (1e-5, 10000.0, 96, False)


UP_GGUF = "blk.1.ffn_up.weight"
BAD_GGUF = {
    "missing": (lambda t: t.pop(UP_GGUF), {}, f"tensor {UP_GGUF} is missing"),
    "shape": (lambda t: t.update({UP_GGUF: t[UP_GGUF].T}), {}, rf"{UP_GGUF} has shape \(64, 96\), expected \(96, 64\)"),
    "integers": (lambda t: t.update({UP_GGUF: np.ones((96, 64), dtype=np.int32)}), {}, f"{UP_GGUF} has type I32"),
    "architecture": (len, {"architecture": "qwen2"}, "architecture 'qwen2', expected 'llama' or 'qwen3'"),
    "head width": (len, {"metadata": {"llama.attention.key_length": 32}}, r"attn_q.weight has shape .*\(128, 64\)"),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_bad_gguf(case, tmp_path):
    damage, flags, message = BAD_GGUF[case]
    tensors = gguf_tensors()
    damage(tensors)
    write_gguf(tmp_path / "bad.gguf", tensors, heads=4, **flags)
    with pytest.raises(ValueError, match=f"bad.gguf: .*({message})"):
        from_gguf.convert(tmp_path / "bad.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def test_truncated_and_foreign_files_are_no_gguf(tmp_path):
    write_gguf(tmp_path / "whole.gguf", gguf_tensors())
    write_gguf(tmp_path / "big.gguf", gguf_tensors(), endianess=gguf.GGUFEndian.BIG)
    data = (tmp_path / "whole.gguf").read_bytes()
    contents = [data[:size] for size in (0, 3, 20, 300, 9000, len(data) - 40)]
    for content in (*contents, b"PK\x03\x04" + data, (tmp_path / "big.gguf").read_bytes()):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ValueError, match="bad.gguf: not a whole GGUF file"):
            from_gguf.convert(tmp_path / "bad.gguf", tmp_path / "out")
    with pytest.raises(ValueError, match="none.gguf: no such file"):
        from_gguf.convert(tmp_path / "none.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(folder, tmp_path, capsys):
    main(["hf", "--input", str(folder), "--output_dir", str(tmp_path / "a"), "--dtype", "fp32"])
    assert f"wrote {tmp_path / 'a'}" in capsys.readouterr().out
    assert load(tmp_path / "a")["norm.weight"].dtype == torch.float32
    write_gguf(tmp_path / "tiny.gguf", gguf_tensors(), heads=4)
    main(["gguf", "--input", str(tmp_path / "tiny.gguf"), "--output_dir", str(tmp_path / "b")])
    assert (tmp_path / "b" / "params.json").is_file()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "hf, gguf"),
        (["onnx"], 2, "'onnx'"),
        (["hf", "--input", "x"], 2, "output_dir"),
        (["hf", "--input", "x", "--output_dir", "y", "--dtyp", "bf16"], 2, "dtype"),
        (["hf", "--input", "x", "--output_dir", "y", "--dtype", "int4"], 2, "dtype"),
        (["gguf", "--input", "nothing.gguf", "--output_dir", "y"], 1, "nothing.gguf: no such file"),
    ],
)
def test_command_line_refuses(words, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused_by_command(words, capsys, message, status=status)
    assert list(tmp_path.iterdir()) == []
