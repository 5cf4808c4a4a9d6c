"""Meta's checkpoints: what loads, and what is wrong is named in one sentence. (Any number of shards: test_parallel.)"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama import Llama, ModelArgs
from llama.checkpoint import load_params_and_tokenizer, shard_specs
from tiny import BASE, PARAMS, golden_state, require_identical, tokens, write_base

State = dict[str, Tensor]


def load(folder: Path) -> Llama:
    return Llama.build(folder, device="cpu", max_seq_len=32)


def base_tensors(llm: Llama) -> State:
    return {key: tensor.detach() for key, tensor in llm.model.named_parameters() if key in shard_specs(llm.model)}


def edit(file: Path, change: Callable[[State], State | None]) -> None:
    """Change a shard file's dictionary, in place or for the one that `change` returns."""
    state = torch.load(file, weights_only=True)
    torch.save(change(state) or state, file)


def refused(folder: Path, *words: str) -> str:
    """The one sentence with which a folder is refused; it holds all `words`."""
    with pytest.raises(ValueError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint in one file."""
    return shutil.copytree(BASE, tmp_path / "ckpt")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A sound checkpoint in two shards."""
    return write_base(tmp_path / "two", PARAMS, golden_state(), 2)


# What loads


def test_rope_frequencies_in_the_file_are_ignored(folder: Path) -> None:
    expected = load(folder).model(tokens(1, 5))
    edit(folder / "consolidated.00.pth", lambda s: s | {"rope.freqs": torch.zeros(8)})
    assert torch.equal(load(folder).model(tokens(1, 5)), expected)


def test_an_open_vocabulary_size_is_the_tokenizers(folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": -1}))
    assert load(folder).model.args.vocab_size == 512


def test_dtype_is_converted(tmp_path: Path) -> None:
    state = {key: tensor.bfloat16() for key, tensor in golden_state().items()}
    folder = write_base(tmp_path / "half", PARAMS, state)
    as_float, as_half = load(folder), Llama.build(folder, device="cpu", bf16=True)
    require_identical(base_tensors(as_float), {key: tensor.float() for key, tensor in state.items()})
    require_identical(base_tensors(as_half), state)
    batch = tokens(2, 6)
    logits = as_half.model(batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, as_float.model(batch), rtol=0.05, atol=0.2)


def test_a_base_stays_in_its_file_which_is_never_written_to(folder: Path) -> None:
    """Where nothing is converted it takes no memory (on Linux); a change in memory stays there."""
    file = folder / "consolidated.00.pth"
    before, tensors = file.read_bytes(), base_tensors(load(folder))
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines if line[-1] == str(file.resolve())]
    for key, tensor in tensors.items():
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert any(begin <= first and last <= end for begin, end in ranges), key
        tensor.add_(1)
    assert file.read_bytes() == before


# What does not: files


def test_missing_folder_and_files(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    (folder / "consolidated.00.pth").rename(tmp_path / "weights.pth")
    refused(folder, str(folder), "consolidated.NN.pth")
    (folder / "tokenizer.model").unlink()
    refused(folder, "tokenizer.model", "no such file")
    (folder / "params.json").unlink()
    refused(folder, "params.json", "no such file")
    (folder / "config.json").touch()
    refused(folder, f"params.json: no such file; python -m convert hf --input {folder} makes it")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "four", PARAMS, golden_state(), 4)
    (folder / "consolidated.02.pth").unlink()
    refused(folder, "consolidated.02.pth is missing", "3 present")
    (folder / "consolidated.03.pth").unlink()  # now two are left, numbered without a hole
    refused(folder, "consolidated.00.pth", "of 2 shards", "shape (128, 64)", "(512, 64)")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_shard_is_named(two: Path, kept: float) -> None:
    file = two / "consolidated.01.pth"
    os.truncate(file, int(file.stat().st_size * kept))
    refused(two, "consolidated.01.pth", "damaged, cut short or not what torch.save writes")


@pytest.mark.parametrize("value, words", [({"model": golden_state()}, "tensors"), ({7: torch.zeros(1)}, "")])
def test_a_dictionary_of_something_else(folder: Path, value: object, words: str) -> None:
    torch.save(value, folder / "consolidated.00.pth")
    refused(folder, "consolidated.00.pth", "expected a dictionary", words)


# What does not: tensors


def test_left_over_and_missing_tensors(two: Path) -> None:
    edit(two / "consolidated.01.pth", lambda s: s | {"layers.3.attention.wq.weight": torch.zeros(2, 2)})
    refused(two, "consolidated.01.pth", "unexpected tensor layers.3.attention.wq.weight")
    edit(two / "consolidated.01.pth", lambda s: {k: t for k, t in s.items() if ".w2." not in k and "layers.3" not in k})
    message = refused(two, "consolidated.01.pth", "missing tensors layers.0.feed_forward.w2.weight")
    assert "unexpected" not in message


def test_many_missing_tensors_are_counted_not_listed(folder: Path) -> None:
    edit(folder / "consolidated.00.pth", lambda s: {"norm.weight": s["norm.weight"]})
    assert len(refused(folder, "missing tensors", "and 26 more")) < 400


@pytest.mark.parametrize(
    "key, tensor, words",
    [
        ("layers.0.attention.adapters.lora_Q.lora_A", torch.zeros(4, 64), "unexpected tensor"),
        ("norm.weight", torch.zeros(65), "shape (65,), params.json asks for"),
        ("layers.2.feed_forward.w3.weight", torch.zeros(223, 64), "shape (223, 64)"),
        ("output.weight", torch.zeros(2), "shape (2,)"),
        ("norm.weight", torch.zeros(64, dtype=torch.int8), "torch.int8"),
        ("norm.weight", torch.zeros(64, dtype=torch.bool), "torch.bool"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder: Path, key: str, tensor: Tensor, words: str) -> None:
    edit(folder / "consolidated.00.pth", lambda s: s | {key: tensor})
    refused(folder, "consolidated.00.pth", key, words)


@pytest.mark.parametrize("key", ["layers.1.attention.wo.weight", "norm.weight"])
def test_shards_of_unequal_shapes(two: Path, key: str) -> None:
    edit(two / "consolidated.01.pth", lambda s: s | {key: s[key][:-1].clone()})
    refused(two, "consolidated.01.pth", key, "consolidated.00.pth")


def test_every_shard_whole(folder: Path) -> None:
    """Copies of one whole file are not shards of it."""
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    refused(folder, "of 2 shards", "tok_embeddings.weight", "shape (512, 64)")


def test_a_width_that_shards_cannot_share(two: Path) -> None:
    """Two shards of 111 make 222, which params.json's 223 must not pass for."""
    (two / "params.json").write_text(json.dumps(PARAMS | {"multiple_of": 1, "ffn_dim_multiplier": 1.315}))
    assert ModelArgs.from_file(two / "params.json").ffn_dim == 223

    def narrower(state: State) -> None:
        for key in [key for key in state if "feed_forward" in key]:
            state[key] = (state[key][:, :111] if ".w2." in key else state[key][:111]).clone()

    for i in range(2):
        edit(two / f"consolidated.0{i}.pth", narrower)
    refused(two, "of 2 shards", "layers.0.feed_forward.w1.weight", "shape (111, 64)", "(223, 64)")


# What does not: params.json and the tokenizer


@pytest.mark.parametrize(
    "change, words",
    [
        ({"moe_args": {}, "vision_chunk_size": 4}, "unknown keys moe_args, vision_chunk_size"),
        ({"n_layer": 3}, "unknown key n_layer"),
        ({"dim": None}, "dim must be a whole number from 1 to .*, not None"),
        ({"dim": 64.0}, "dim .* 64.0"),
        ({"n_heads": True}, "n_heads .* True"),
        ({"n_heads": 5}, "dim 64 .* n_heads 5"),
        ({"dim": 12, "n_heads": 4, "n_kv_heads": 4}, "dim 12 .* n_heads 4"),  # heads of odd width
        ({"n_kv_heads": 3}, "n_heads 4 .* n_kv_heads 3"),
        ({"vocab_size": 0}, "vocab_size .* 0"),
        ({"vocab_size": -5}, "vocab_size .* -5"),
        ({"norm_eps": "1e-5"}, "norm_eps .* '1e-5'"),
        ({"rope_theta": 1e300}, r"rope_theta .* 1e\+300"),
        ({"rope_theta": float("inf")}, "rope_theta .* inf"),
        ({"n_layers": 10**7}, "n_layers must be a whole number from 1 to 10000"),
        ({"dim": 10**3000}, "dim .* 1000"),
        ({"ffn_dim_multiplier": -1}, "ffn_dim_multiplier .* -1"),
        ({"ffn_dim_multiplier": [1.3]}, "ffn_dim_multiplier"),
        ({"use_scaled_rope": 1}, "use_scaled_rope .* 1"),
        ({"use_scaled_rope": True, "rope_low_freq_factor": 4}, "rope_low_freq_factor 4 .*rope_high_freq_factor 4"),
    ],
)
def test_bad_params(change: dict, words: str, folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | change))
    assert re.search(words, refused(folder, "params.json"))


@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads"])
def test_missing_params(name: str, folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps({key: value for key, value in PARAMS.items() if key != name}))
    refused(folder, "params.json", f"missing key {name}")


@pytest.mark.parametrize("content, words", [(b"{", "not valid JSON"), (b"[64]", "expected a JSON object, found list")])
def test_params_that_are_no_json_object(content: bytes, words: str, folder: Path) -> None:
    (folder / "params.json").write_bytes(content)
    refused(folder, "params.json", words)


def test_defaults_are_metas() -> None:
    args = ModelArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3)
    assert (args.head_dim, args.ffn_dim, args.rope_theta, args.norm_eps) == (128, 14336, 500000.0, 1e-5)
    assert ModelArgs(dim=4096, n_layers=32, n_heads=32).n_kv_heads == 32
    assert ModelArgs(dim=4096, n_layers=32, n_heads=32, multiple_of=256).ffn_dim == 11008  # LLaMA-2-7B
    assert ModelArgs(dim=8192, n_layers=80, n_heads=64, multiple_of=4096, ffn_dim_multiplier=1.3).ffn_dim == 28672


def test_another_models_tokenizer(folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": 511}))
    refused(folder, "tokenizer.model", "512", "511")
    with pytest.raises(ValueError, match="not this model's tokenizer"):
        load_params_and_tokenizer(folder)
