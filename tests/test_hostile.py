"""Damaged files of every kind never do harm (see hostile.py for the property and for the inputs)."""

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commands import train_flags, write_rows
from hostile import (
    MAINS,
    damaged,
    hostile,
    json_lines,
    json_texts,
    keys,
    refusal,
    saved,
    sentence_of,
    snapshot,
    torch_files,
)
from llama import Llama
from llama.distributed import init_distributed
from llama.predictions import Predictions
from moa.reading import read_rows
from moa.state import adapter_state_dict
from tiny import BASE, GOLDEN, PARAMS, golden_state, tokens
from training.checkpoint import read as read_checkpoint

Folders = Callable[..., Path]


@pytest.fixture(autouse=True)
def _processes():
    yield
    init_distributed(torch.device("cpu"))  # a run leaves the process group at its end; other tests' models need it


class Made(SimpleNamespace):
    """Valid files of every kind, which hypothesis need not print."""

    def __repr__(self) -> str:
        return "made"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A run of two steps and its adapter."""
    folder = tmp_path_factory.mktemp("valid")
    data = write_rows(folder / "train.json", 4)
    run = folder / "run"
    assert refusal(MAINS["finetune"], train_flags(data, run, max_steps=2, save_every=1, accum_iter=1)) is None
    shutil.rmtree(run / "tensorboard")
    assert refusal(MAINS["extract_adapter"], [run, "--output_dir", folder / "adapter"]) is None
    init_distributed(torch.device("cpu"))
    return Made(
        data=data,
        run=run,
        adapter=folder / "adapter",
        checkpoint=torch.load(run / "checkpoint-2.pth", weights_only=True),
        state=torch.load(folder / "adapter" / "adapter.pth", weights_only=True),
        model=Llama.build(BASE, folder / "adapter", device="cpu", max_seq_len=64).model,
    )


@pytest.fixture
def new_folder(tmp_path: Path) -> Folders:
    """Makes a folder for each example, with copies of files and folders in it."""
    numbers = count()

    def make(*copied: Path) -> Path:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        for path in copied:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
        return folder

    return make


def unchanged(folder: Path, call: Callable[[], str | None]) -> str | None:
    """What `call` returns; if that is a refusal, the folder must be as before."""
    before = snapshot(folder)
    sentence = call()
    assert sentence is None or snapshot(folder) == before, sentence
    return sentence


def result_of(folder: Path, read: Callable[[], Any], *names: str) -> Any:
    """What `read` makes of a folder; None where it refuses it by one of the names, and then all must be as before."""
    results = []
    unchanged(folder, lambda: sentence_of(lambda: results.append(read()), *names))
    return results[0] if results else None


# The base


@hostile(50)
@given(data=st.data(), name=st.sampled_from(("params.json", "tokenizer.model", "consolidated.00.pth")))
def test_a_base(data, name: str, new_folder: Folders) -> None:
    base = new_folder(BASE) / "base"
    contents = {
        "params.json": json_texts(PARAMS | {"ffn_dim_multiplier": None}),
        "tokenizer.model": damaged((BASE / name).read_bytes()),
        "consolidated.00.pth": torch_files(golden_state()),
    }
    (base / name).write_bytes(data.draw(contents[name]))
    if llm := result_of(base, lambda: Llama.build(base, device="cpu"), str(base)):
        # The values of large tensors are not looked at, for which the whole file would have to be read
        assert llm.model(tokens(1, 4)).shape == (1, 4, 512)


# Adapters, checkpoints and runs


@hostile(50)
@given(data=st.data(), name=st.sampled_from(("", "soft_moa", "adamole", "lora_bias_norm")))
def test_settings_of_an_adapter(data, name: str, made, new_folder: Folders) -> None:
    """Ours, and the authors' golden ones."""
    folder = new_folder(GOLDEN / name if name else made.adapter) / (name or "adapter")
    file = folder / "adapter_params.json"
    file.write_bytes(data.draw(json_texts(json.loads(file.read_text()))))
    read = lambda: Llama.build(BASE, folder, device="cpu")  # noqa: E731
    if llm := result_of(folder, read, "adapter_params.json", str(folder)):
        assert torch.isfinite(llm.model(tokens(1, 4))).all()


@hostile(50)
@given(data=st.data())
def test_tensors_of_an_adapter(data, made, new_folder: Folders) -> None:
    folder = new_folder(made.adapter)
    file = folder / "adapter" / "adapter.pth"
    file.write_bytes(data.draw(torch_files(made.state)))
    if llm := result_of(folder, lambda: Llama.build(BASE, file, device="cpu"), str(file)):
        state = adapter_state_dict(llm.model)
        assert all(torch.equal(tensor, made.state[key]) for key, tensor in state.items())


@hostile(50)
@given(data=st.data())
def test_checkpoints(data, made, new_folder: Folders) -> None:
    folder = new_folder()
    file = folder / "checkpoint-2.pth"
    content = dict(made.checkpoint)
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged(saved(content))))
    else:
        del content[data.draw(keys(content))]
        file.write_bytes(saved(content))
    if checkpoint := result_of(folder, lambda: read_checkpoint(file, made.model), str(file)):
        assert all(torch.equal(checkpoint["adapter"][key], tensor) for key, tensor in made.state.items())
    if unchanged(folder, lambda: refusal(MAINS["extract_adapter"], [file], str(file))) is None:
        assert sorted(snapshot(folder)) == ["adapter.pth", "adapter_params.json", "checkpoint-2.pth"]


@hostile(15)
@given(data=st.data())
def test_the_record_of_a_run(data, made, new_folder: Folders) -> None:
    folder = new_folder(made.run) / "run"
    (folder / "checkpoint-2.pth").unlink()  # there is a step to do
    content = (folder / "config.json").read_bytes()
    kinds = (content[: data.draw(st.integers(0, len(content) - 3))], b"hello\n", b"[]", b"{}")
    (folder / "config.json").write_bytes(data.draw(st.sampled_from(kinds)))
    words = ["--data_path", made.data, "--ckpt_dir", BASE, "--output_dir", folder, "--resume", "--device", "cpu"]
    assert unchanged(folder, lambda: refusal(MAINS["finetune"], words, str(folder), "--"))


# Rows and predictions

ROW = {"instruction": "Add 1 and 2", "input": "", "output": "It is 3.", "answer": "3"}
ROWS = [{"instruction": f"row {i}", "input": "", "answer": str(i)} for i in range(4)]
SETTINGS = {"seed": 0, "temperature": 0.1, "adapter_sha256": None, "bf16": False}
FILES = {
    "AddSub.jsonl": [row | {"generate": f"answer {row['answer']}"} for row in ROWS[:3]],
    "AddSub.jsonl.part0": [{"index": 0, "generate": "answer 0"}, {"index": 3, "generate": "answer 3"}],
    "AddSub.jsonl.part1": [{"index": 1, "generate": ["answer 1", "or 2"]}],
    "AddSub.jsonl.settings.json": SETTINGS,
}


@hostile(50)
@given(content=json_lines([ROW, ROW | {"extra": [1, {"a": None}]}]))
def test_rows(content: bytes, new_folder: Folders) -> None:
    file = new_folder() / "rows.json"
    file.write_bytes(content)
    for row in result_of(file.parent, lambda: read_rows(file, ("instruction", "input", "output")), str(file)) or ():
        assert all(isinstance(row[field], str) for field in ("instruction", "input", "output"))


@hostile(8)
@given(content=json_lines([ROW, ROW]))
def test_rows_in_a_run_and_to_answer(content: bytes, new_folder: Folders) -> None:
    folder = new_folder()
    file, answers = folder / "rows.json", folder / "AddSub.jsonl"
    file.write_bytes(content)
    words = train_flags(file, folder / "run", max_steps=1, accum_iter=1)
    if unchanged(folder, lambda: refusal(MAINS["finetune"], words, str(file))) is None:
        assert (folder / "run" / "checkpoint-1.pth").exists()
    words = ["--ckpt_dir", BASE, "--data_path", file, "--save_path", answers, "--max_gen_len=2", "--device=cpu"]
    if unchanged(folder, lambda: refusal(MAINS["generate"], [*words, "--bf16=False"], str(file))) is None:
        assert len(answers.read_text().splitlines()) == len(read_rows(file))


@hostile(60)
@given(data=st.data(), damaged_name=st.sampled_from(sorted(FILES)))
def test_predictions_in_the_making(data, damaged_name: str, new_folder: Folders) -> None:
    folder = new_folder()
    for name, content in FILES.items():
        lines = [json.dumps(row) + "\n" for row in content] if isinstance(content, list) else [json.dumps(content)]
        (folder / name).write_text("".join(lines))
    form = json_texts if damaged_name.endswith(".json") else json_lines
    (folder / damaged_name).write_bytes(data.draw(form(FILES[damaged_name])))
    begin = lambda: Predictions(folder / "AddSub.jsonl", ROWS, SETTINGS, 0, False)  # noqa: E731
    predictions = result_of(folder, begin, "AddSub.jsonl")
    if predictions is None:
        return
    predictions.start()
    for index in predictions.missing:
        predictions.add(index, "new")
    predictions.finish()
    rows = [json.loads(line) for line in (folder / "AddSub.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "generate"} for row in rows] == ROWS
