"""Every method through everything a user does with it: train, resume, extract, load, generate, score, and the authors'
format there and back. (Gradients, formulas, numbers and processes: test_adapters, test_formulas, test_golden,
test_parallel, over the same methods.)"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from commands import script, train_flags, write_rows
from evaluate.scoring import score_file
from llama import Llama
from moa.adapter_file import save_reference_adapter
from moa.methods import METHODS as PRESETS
from moa.state import adapter_parameters, adapter_state_dict
from tiny import ARGS, BASE, BASELINES, authors_can_say, tokens
from tiny import METHODS as PUBLISHED

METHODS = PUBLISHED | BASELINES
LENGTHS = (3, 11, 7)


def test_every_method_is_here() -> None:
    assert {flat["method"] for flat in METHODS.values()} == set(PRESETS)


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A run of four steps of one method, its checkpoint of two, and its adapter extracted and loaded."""
    folder = tmp_path_factory.mktemp(request.param)
    data = write_rows(folder / "train.json", 8)
    out, shape = folder / "out", dict.fromkeys(("lora_rank", "p_adapter_size", "prompt_len"))
    flags = train_flags(data, out, **shape | METHODS[request.param], max_steps=4, save_every=2, warmup_epochs=0)
    script("finetune.py", *flags)
    script("extract_adapter.py", out / "checkpoint-LAST.pth")
    llm = Llama.build(BASE, out / "adapter.pth", device="cpu", max_seq_len=64, seed=9)
    yield SimpleNamespace(name=request.param, data=data, out=out, llm=llm)


def test_training_moves_the_adapter_and_the_loss(trained) -> None:
    losses = [json.loads(line)["loss"] for line in (trained.out / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[3] < losses[0]
    config = json.loads((trained.out / "config.json").read_text())
    state = torch.load(trained.out / "adapter.pth", weights_only=True)
    trainable = adapter_parameters(trained.llm.model)
    assert config["trainable_parameters"] == sum(state[key].numel() for key in trainable)
    assert all(torch.isfinite(t).all() for t in state.values())
    fresh = Llama.build(BASE, config=trained.llm.model.config, device="cpu", seed=config["settings"]["seed"]).model
    still = {key for key, tensor in adapter_state_dict(fresh).items() if torch.equal(tensor, state[key])}
    assert still == {key for key in state.keys() - trainable.keys() if not key.endswith("rank_bias")}


def test_what_is_extracted_is_what_was_trained(trained) -> None:
    checkpoint = torch.load(trained.out / "checkpoint-4.pth", weights_only=True)
    state = adapter_state_dict(trained.llm.model)
    assert state.keys() == checkpoint["adapter"].keys()
    assert all(torch.equal(tensor, checkpoint["adapter"][key]) for key, tensor in state.items())
    flat = trained.llm.model.config.to_dict()
    assert {k: v for k, v in METHODS[trained.name].items() if flat[k] != v} == {}


def test_resuming_gives_the_same_adapter(trained, tmp_path: Path) -> None:
    for name in ("checkpoint-2.pth", "config.json", "log.jsonl"):
        (tmp_path / name).write_bytes((trained.out / name).read_bytes())
    script("finetune.py", "--data_path", trained.data, "--output_dir", tmp_path, "--resume")
    script("extract_adapter.py", tmp_path)
    again, state = torch.load(tmp_path / "adapter.pth", weights_only=True), adapter_state_dict(trained.llm.model)
    assert all(torch.equal(tensor, again[key]) for key, tensor in state.items())


def test_ragged_generation_is_each_row_alone(trained) -> None:
    rows = [[256, *tokens(n - 1, seed=n).tolist()] for n in LENGTHS]
    settings = {"max_gen_len": 9, "temperature": 0.8, "seed": 3}
    alone = [trained.llm.generate([row], **settings)[0] for row in rows]
    assert trained.llm.generate(rows, **settings) == alone and any(alone)


def test_answers_are_written_and_scored(trained, tmp_path: Path) -> None:
    tests = write_rows(tmp_path / "test.json", 5, answer=True)
    save_path = tmp_path / "AddSub.jsonl"
    shape = ("--max_gen_len", 8, "--min_gen_len", 8, "--max_batch_size", 3, "--device", "cpu", "--bf16", False)
    files = ("--ckpt_dir", BASE, "--adapter_path", trained.out / "adapter.pth", "--data_path", tests)
    script("generate.py", *files, "--save_path", save_path, *shape)
    score = score_file(save_path)
    assert len(score.rows) == 5 and 0 <= score.published.percent <= 100


def test_the_authors_format_there_and_back(trained, tmp_path: Path) -> None:
    model, batch = trained.llm.model, tokens(2, 9)
    if not authors_can_say(trained.name):
        with pytest.raises(ValueError, match="the authors'"):
            save_reference_adapter(tmp_path / "theirs", adapter_state_dict(model), model.config)
        assert not (tmp_path / "theirs").exists()
        return
    path = save_reference_adapter(tmp_path / "theirs", adapter_state_dict(model), model.config)
    assert "method" not in json.loads(path.with_name("adapter_params.json").read_text())
    assert all(key.startswith("llama.") for key in torch.load(path, weights_only=True))
    other = Llama.build(BASE, path, method=METHODS[trained.name]["method"], device="cpu")
    assert torch.equal(other.model(batch, [4, 6]), model(batch, [4, 6]))
    assert other.model.args == ARGS
