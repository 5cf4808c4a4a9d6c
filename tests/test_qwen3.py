"""Qwen3: transformers' logits, token ids and answers, and the same gradients however they are computed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen3
from commands import side_by_side
from convert import gguf as from_gguf
from convert import hf as from_hf
from convert_samples import as_gguf, same_ids, same_logits, write_gguf
from llama import Llama, ModelArgs
from llama.accelerate import accelerate_model, restore_model
from moa.state import count_parameters
from observe import observe
from qwen3 import METHODS, SHAPES
from tiny import BASELINES, build, float64, gradients, relative, require_close, tokens, unfilled
from tiny import METHODS as ALL_METHODS
from training.config import parse_flags
from training.dry_run import dry_run


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random model of transformers, and a folder with it in Hugging Face's layout (hf) and in Meta's (meta)."""
    folder = tmp_path_factory.mktemp("qwen3")
    model = qwen3.write(folder / "hf", request.param)
    from_hf.convert(folder / "hf", folder / "meta", dtype="fp32")
    return model, folder


def test_a_hugging_face_folder(pair: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = pair
    result = from_hf.convert(folder / "hf", tmp_path / "meta", dtype="fp32")
    same_logits(result, model)
    same_ids(result, folder / "hf" / "tokenizer.json")
    tied, state = model.config.tie_word_embeddings, torch.load(result.folder / "consolidated.00.pth")
    assert result.args.tied_embeddings == tied and ("output.weight" in state) != tied
    assert result.args.qk_norm and result.args.head_dim == model.config.head_dim


def gguf_metadata(model: Any) -> dict[str, int]:
    return dict.fromkeys(("qwen3.attention.key_length", "qwen3.attention.value_length"), model.config.head_dim)


def test_a_gguf_file(pair: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = pair
    config = model.config
    numbers = {"theta": config.rope_parameters["rope_theta"], "heads": config.num_attention_heads, "style": "qwen"}
    metadata = gguf_metadata(model)
    write_gguf(tmp_path / "q.gguf", as_gguf(model), architecture="qwen3", metadata=metadata, **numbers)
    result = from_gguf.convert(tmp_path / "q.gguf", tmp_path / "meta", dtype="fp32")
    same_logits(result, model)
    same_ids(result, folder / "hf" / "tokenizer.json")
    assert result.args == from_hf.convert(folder / "hf", tmp_path / "hf").args
    metadata |= {"qwen3.pooling_type": 3}
    write_gguf(tmp_path / "e.gguf", as_gguf(model), architecture="qwen3", metadata=metadata, **numbers)
    with pytest.raises(ValueError, match="e.gguf: qwen3.pooling_type is 3"):
        from_gguf.convert(tmp_path / "e.gguf", tmp_path / "out")


@torch.no_grad()
def test_greedy_answers(pair: tuple[Any, Path]) -> None:
    model, folder = pair
    llm = Llama.build(folder / "meta", device="cpu")
    prompts = [llm.tokenizer.encode(text) for text in ("the tin", "12 in 21?", "na\u00efve")]
    for prompt, answer in zip(prompts, llm.generate(prompts, max_gen_len=16), strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0)
        theirs = ids[0, len(prompt) :].tolist()
        ends = [i for i, token in enumerate(theirs) if token in llm.tokenizer.stop_ids]
        assert len(answer) > 2 and answer == theirs[: ends[0] if ends else None]


def require_same_gradients(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The gradients of a method, which are the same with and without acceleration."""
    plain = build(name, ckpt_dir=folder).model
    restore_model(plain)
    fast = copy.deepcopy(plain)
    accelerate_model(fast)
    batch, results = tokens(2, 9), []
    for model in (plain, fast):
        with float64(model):
            loss = model.loss(batch, batch)
            loss.backward()
            results.append((loss.detach(), gradients(model)))
    (loss, grads), (fast_loss, fast_grads) = results
    assert all(grad.norm() > 0 for grad in grads.values()) and relative(fast_loss, loss) < 1e-6
    require_close(fast_grads, grads, 1e-9)
    return grads


@pytest.mark.parametrize("name", METHODS)
def test_every_gradient_is_the_same_with_and_without_acceleration(pair: tuple[Any, Path], name: str) -> None:
    grads = require_same_gradients(pair[1] / "meta", name)
    assert name == "soft_moa" or "layers.1.attention.k_norm.adapters.norm.weight" in grads


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    qwen3.write(folder / "hf", "wide heads")
    from_hf.convert(folder / "hf", folder / "meta", dtype="fp32")
    return folder / "meta"


@pytest.mark.parametrize("name", [name for name in (*ALL_METHODS, *BASELINES) if name not in METHODS])
def test_every_other_method(wide_heads: Path, name: str) -> None:
    require_same_gradients(wide_heads, name)


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    qwen3.write(tmp_path / "hf", "wide heads")
    from_hf.convert(tmp_path / "hf", tmp_path / "meta", dtype="fp32")
    side_by_side(qwen3.__file__, 2, tmp_path, timeout=300)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name in METHODS:
        alone = observe(name, 1, tmp_path / "meta")
        for rank in ranks:
            shared = rank[name]
            assert relative(shared["logits"], alone["logits"]) < 1e-5
            assert shared["greedy"] == alone["greedy"]
            for choice in ("none", "selective", "full"):
                require_close(shared[choice]["gradients"], alone[choice]["gradients"], 1e-9)
        for key, grad in ranks[0][name]["float32"]["local"].items():  # the norms of heads are whole on both
            if "_norm.adapters" in key:
                assert torch.equal(grad, ranks[1][name]["float32"]["local"][key]), key


_RELEASE = {
    "n_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "qk_norm": True,
}
RELEASES = {  # untied; and their numbers of parameters
    "8B": ({**_RELEASE, "dim": 4096, "n_layers": 36, "n_heads": 32, "ffn_dim": 12288}, 8_190_735_360),
    "14B": ({**_RELEASE, "dim": 5120, "n_layers": 40, "n_heads": 40, "ffn_dim": 17408}, 14_768_307_200),
}


def counts_by_hand(params: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Method -> slot -> trained numbers of a layer, at the published sizes."""
    d, f, q, kv = params["dim"], params["ffn_dim"], 128 * params["n_heads"], 128 * 8
    shapes = {"Q": (d, q), "K": (d, kv), "V": (d, kv), "O": (q, d), "FFN_DOWN": (f, d)}  # inputs, outputs

    def beside(name: str, count: Callable[[int, int], int]) -> dict[str, int]:
        return {f"{name}_{target}": count(*shape) for target, shape in shapes.items()}

    def lora(rank: int, experts: int = 1) -> dict[str, int]:
        return beside("lora", lambda n, m: rank * experts * (n + m) + (experts * n if experts > 1 else 0))

    prompt, p_adapter = {"prompt": 10 * d + params["n_heads"]}, {"p_adapter": 2 * 16 * d + 16 + d}
    six, seven = (2 * (d + 1) * 4 * n + (4 * n + 1) * n for n in (6, 7))  # SwiGLU routers of so many slots
    return {
        "soft_moa": {**lora(8), **prompt, **p_adapter, "router": seven},
        "sparse_moa": {**lora(8), **p_adapter, "router": six + d + 1},
        "unipeft": {**lora(8), **prompt, **p_adapter, "router": 3 * (d + 1)},
        "lora": lora(16),
        "molora": lora(8, experts=8),
        "dora": beside("dora", lambda n, m: 16 * (n + m) + m),
        "comol": beside("comol", lambda n, m: 16 * (n + m) + 8 * 16 * 16 + 8 * 16),
        "flylora": beside("flylora", lambda n, m: 32 * m),
        "vera": beside("vera", lambda n, m: 256 + m),
        "ia3": {"ia3_K": kv, "ia3_V": kv, "ia3_FFN_UP": f},
    }


@pytest.mark.parametrize("release", RELEASES)
def test_counts_of_the_releases(release: str, tmp_path: Path) -> None:
    params, n_base = RELEASES[release]
    expected = {}
    for method, by_layer in counts_by_hand(params).items():
        counts = {slot: params["n_layers"] * count for slot, count in by_layer.items()}
        expected[method] = counts | {"total": sum(counts.values())}
        assert count_parameters(unfilled(ModelArgs(**params), {"method": method})) == expected[method], method
    (tmp_path / "params.json").write_text(json.dumps(params))
    result = dry_run(parse_flags(["--dry_run", "--ckpt_dir", str(tmp_path), "--method", "soft_moa"], {}, ""))
    assert (result["trainable_parameters"], result["base_parameters"]) == (expected["soft_moa"], n_base)


REFUSED = {
    "sliding window": ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window = True"),
    "sliding layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
    "biases": ({"attention_bias": True}, "attention_bias = True"),
    "mixture of experts": ({"model_type": "qwen3_moe"}, "of model_type 'qwen3_moe'"),
    "experts": ({"num_experts": 8}, "num_experts = 8"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    "head of the other": ({"architectures": ["LlamaForCausalLM"]}, "only LlamaForCausalLM and Qwen3ForCausalLM"),
    "no head width": ({"head_dim": None}, r"q_proj.weight has shape \(48, 48\), expected \(768, 48\)"),  # then 128
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    qwen3.write(tmp_path / "hf", "tied")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        from_hf.convert(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_window_that_is_not_in_use_is_none(tmp_path: Path) -> None:
    qwen3.write(tmp_path / "hf", "tied")
    path = tmp_path / "hf" / "config.json"
    changes = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    from_hf.convert(tmp_path / "hf", tmp_path / "out")
