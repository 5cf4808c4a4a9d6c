"""Damaged and hostile input of every kind never does harm (see hostile.py for the property and for the inputs)."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate.__main__
from commands import train_flags, write_rows
from hostile import (
    MAINS,
    compressed,
    damaged,
    evil_values,
    forged,
    hostile,
    json_lines,
    json_texts,
    odd_tensors,
    refusal,
    saved,
    sentence_of,
    snapshot,
    torch_files,
)
from llama import Llama
from llama.distributed import init_distributed
from llama.predictions import Predictions
from llama.tokenizer import Tokenizer
from moa.adapter_file import load_adapter
from moa.files import load_tensors
from moa.reading import read_rows
from moa.state import adapter_state_dict
from tiny import BASE, GOLDEN, PARAMS, golden_state, shared, tokens
from training.checkpoint import read

SMALL = {"lora_rank": 2, "p_adapter_size": 4, "prompt_len": 3}
ANSWER = {"max_gen_len": 2, "min_gen_len": 2, "temperature": 0.0, "device": "cpu", "bf16": False}


def flags(**values: Any) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def _processes() -> Iterator[None]:
    yield
    init_distributed(torch.device("cpu"))  # a run leaves the process group at its end; other tests' models need it


class Made(SimpleNamespace):
    """Valid files of every kind, which hypothesis need not print."""

    def __repr__(self) -> str:
        return "made"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A run of two steps, its adapter, rows and predictions."""
    folder = tmp_path_factory.mktemp("valid")
    data = write_rows(folder / "train.json", 4)
    tests = write_rows(folder / "test.json", 4, answer=True)
    run = folder / "run"
    assert refusal(MAINS["finetune"], train_flags(data, run, max_steps=2, save_every=1, accum_iter=1)) is None
    shutil.rmtree(run / "tensorboard")
    (run / ".lock").unlink(missing_ok=True)
    assert refusal(MAINS["extract_adapter"], [run, "--output_dir", folder / "adapter"]) is None
    words = flags(ckpt_dir=BASE, adapter_path=folder / "adapter", data_path=tests, **ANSWER)
    assert refusal(MAINS["generate"], [*words, "--save_path", folder / "answers" / "AddSub.jsonl"]) is None
    init_distributed(torch.device("cpu"))
    return Made(
        folder=folder,
        data=data,
        tests=tests,
        run=run,
        adapter=folder / "adapter",
        answers=folder / "answers",
        checkpoint=torch.load(run / "checkpoint-2.pth", weights_only=True),
        state=torch.load(folder / "adapter" / "adapter.pth", weights_only=True),
        model=Llama.build(BASE, folder / "adapter", device="cpu", max_seq_len=64).model,
    )


class Ground:
    """A folder of its own for each example."""

    def __init__(self, parent: Path):
        self.parent, self.n = parent, 0

    def __call__(self, *copied: Path) -> Path:
        self.n += 1
        folder = self.parent / str(self.n)
        folder.mkdir()
        for path in copied:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
        return folder


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


def unchanged(folder: Path, call: Callable[[], str | None]) -> str | None:
    """What `call` returns; if that is a refusal, the folder must be as before."""
    before = snapshot(folder)
    sentence = call()
    if sentence is not None:
        assert snapshot(folder) == before, sentence
    return sentence


# The base


@hostile(60)
@given(text=json_texts(PARAMS | {"ffn_dim_multiplier": None, "n_layers": 3}))
def test_params_json(text: bytes, ground: Ground) -> None:
    base = ground(BASE) / "base"
    (base / "params.json").write_bytes(text)
    built = []
    sentence = unchanged(base, lambda: sentence_of(lambda: built.append(Llama.build(base, device="cpu")), str(base)))
    if sentence is None:
        logits = built[0].model(tokens(1, 4))
        assert logits.shape == (1, 4, 512) and torch.isfinite(logits).all()


@hostile(40)
@given(data=st.data())
def test_base_shards(data, ground: Ground) -> None:
    base = ground(BASE) / "base"
    trace = base.parent / "trace"
    (base / "consolidated.00.pth").write_bytes(data.draw(torch_files(golden_state(), trace)))
    built = []
    names = ("consolidated.00.pth",)
    if unchanged(base, lambda: sentence_of(lambda: built.append(Llama.build(base, device="cpu")), *names)) is None:
        logits = built[0].model(tokens(1, 4))
        fine = shared(None).model(tokens(1, 4))
        # The values of a base are not looked at, as long as they are numbers
        assert torch.equal(logits, fine) or not torch.isfinite(logits).all() or logits.shape == fine.shape
    assert not trace.exists()


@hostile(40)
@given(content=damaged((BASE / "tokenizer.model").read_bytes()), text=st.text(max_size=20))
def test_tokenizer_model(content: bytes, text: str, ground: Ground) -> None:
    file = ground() / "tokenizer.model"
    file.write_bytes(content)
    built = []
    if sentence_of(lambda: built.append(Tokenizer(file)), str(file)) is None:
        assert built[0].decode(built[0].encode(text)) == text


# The adapter


@hostile(60)
@given(data=st.data())
def test_adapter_params_json(data, made, ground: Ground) -> None:
    theirs = data.draw(st.sampled_from(("", "", "soft_moa", "adamole", "lora_bias_norm")))
    folder = ground(GOLDEN / theirs if theirs else made.adapter) / (theirs or "adapter")
    file = folder / "adapter_params.json"
    file.write_bytes(data.draw(json_texts(json.loads(file.read_text()))))
    built = []
    build = lambda: built.append(Llama.build(BASE, folder, device="cpu"))  # noqa: E731
    if unchanged(folder, lambda: sentence_of(build, "adapter_params.json", str(folder))) is None:
        assert torch.isfinite(built[0].model(tokens(1, 4), [3])).all()


@hostile(60)
@given(data=st.data())
def test_adapter_pth(data, made, ground: Ground) -> None:
    folder, trace = ground(made.adapter), ground.parent / "trace"
    file = folder / "adapter" / "adapter.pth"
    file.write_bytes(data.draw(torch_files(made.state, trace)))
    found = []
    build = lambda: found.append(adapter_state_dict(Llama.build(BASE, file, device="cpu").model))  # noqa: E731
    if unchanged(folder, lambda: sentence_of(build, str(file))) is None:
        assert all(torch.equal(tensor, made.state[key]) for key, tensor in found[0].items())
    assert not trace.exists()


@hostile(30)
@given(data=st.data())
def test_an_adapter_of_the_authors(data, ground: Ground) -> None:
    folder, trace = ground(GOLDEN / "soft_moa"), ground.parent / "trace"
    file = folder / "soft_moa" / "adapter.pth"
    valid = torch.load(file, weights_only=True)
    file.write_bytes(data.draw(torch_files(valid, trace)))
    found = []
    load = lambda: found.append(load_adapter(file, PARAMS)[1])  # noqa: E731
    if unchanged(folder, lambda: sentence_of(load, str(file), "adapter_params.json")) is None:
        fine = load_adapter(GOLDEN / "soft_moa", PARAMS)[1]
        same = found[0].keys() == fine.keys() and all(torch.equal(found[0][key], fine[key]) for key in fine)
        assert same or sentence_of(lambda: Llama.build(BASE, file, device="cpu"), str(file))
    assert not trace.exists()


# Checkpoints and runs


@hostile(60)
@given(data=st.data())
def test_checkpoints(data, made, ground: Ground) -> None:
    folder, trace = ground(), ground.parent / "trace"
    file = folder / "checkpoint-2.pth"
    file.write_bytes(data.draw(torch_files(made.checkpoint, trace)))
    found = []
    in_run = unchanged(folder, lambda: sentence_of(lambda: found.append(read(file, made.model)), str(file)))
    if in_run is None:
        for key, tensor in made.state.items():
            assert torch.equal(found[0]["adapter"][key], tensor)
    extracted = unchanged(folder, lambda: refusal(MAINS["extract_adapter"], [file], str(file)))
    if extracted is None:
        assert sorted(snapshot(folder)) == ["adapter.pth", "adapter_params.json", "checkpoint-2.pth"]
        load_tensors(folder / "adapter.pth")
    assert not trace.exists()


@hostile(10)
@given(data=st.data())
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(data, made, ground: Ground) -> None:
    folder, trace = ground(made.run) / "run", ground.parent / "trace"
    newest = folder / "checkpoint-2.pth"
    newest.write_bytes(data.draw(torch_files(made.checkpoint, trace)))
    words = [*train_flags(made.data, folder, max_steps=2, save_every=1, accum_iter=1), "--resume"]
    assert refusal(MAINS["finetune"], words) is None
    again = load_tensors(newest)["adapter"]
    assert all(torch.equal(tensor, again[key]) for key, tensor in made.state.items())
    assert not trace.exists()


@hostile(30)
@given(data=st.data())
def test_config_json_of_a_run(data, made, ground: Ground) -> None:
    folder = ground(made.run) / "run"
    (folder / "checkpoint-2.pth").unlink()  # there is a step to do
    record = json.loads((folder / "config.json").read_text())
    record["settings"]["data_path"] = str(made.data)
    text = data.draw(json_texts(record))
    (folder / "config.json").write_bytes(text)
    outside = {name: digest for name, digest in snapshot(made.folder).items() if name != "run"}
    words = ["--data_path", made.data, "--ckpt_dir", BASE, "--output_dir", folder, "--resume", "--device", "cpu"]
    sentence = unchanged(folder, lambda: refusal(MAINS["finetune"], words, str(folder), "--"))
    assert {name: digest for name, digest in snapshot(made.folder).items() if name != "run"} == outside
    assert sentence or read(folder / "checkpoint-2.pth", made.model)["step"] == 2


# Rows


ROW = {"instruction": "Add 1 and 2", "input": "", "output": "It is 3.", "answer": "3"}


@hostile(60)
@given(data=st.data())
def test_training_and_test_rows(data, ground: Ground) -> None:
    file = ground() / "rows.json"
    form = json_texts if data.draw(st.booleans()) else json_lines
    file.write_bytes(data.draw(form([ROW, ROW | {"extra": [1, {"a": None}]}])))
    found = []
    if sentence_of(lambda: found.append(read_rows(file, ("instruction", "input", "output"))), str(file)) is None:
        for row in found[0]:
            assert all(isinstance(row[field], str) for field in ("instruction", "input", "output"))
            json.loads(json.dumps(row, allow_nan=False))


@hostile(12)
@given(data=st.data())
def test_rows_in_a_run(data, ground: Ground) -> None:
    folder = ground()
    file = folder / "rows.json"
    file.write_bytes(data.draw(json_lines([ROW, ROW | {"extra": [1, {"a": None}]}])))
    words = train_flags(file, folder / "run", max_steps=1, accum_iter=1)
    if unchanged(folder, lambda: refusal(MAINS["finetune"], words, str(file))) is None:
        assert load_tensors(folder / "run" / "checkpoint-1.pth")["step"] == 1


@hostile(12)
@given(data=st.data())
def test_rows_to_answer_and_to_score(data, ground: Ground) -> None:
    folder = ground()
    file, answers = folder / "rows.json", folder / "AddSub.jsonl"
    file.write_bytes(data.draw(json_lines([ROW, ROW | {"extra": [1, {"a": None}]}])))
    words = flags(ckpt_dir=BASE, data_path=file, save_path=answers, **ANSWER)
    if unchanged(folder, lambda: refusal(MAINS["generate"], words, str(file))) is None:
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        assert [row | {"generate": ""} for row in rows] == [
            row | {"generate": ""} for row in read_rows(file, ("instruction",))
        ]
        before = snapshot(folder)
        refusal(score, ["--predict_file", answers], str(answers))  # the answers to compare with may be the damaged part
        assert snapshot(folder) == before


# Predictions


def score(words: list[str]) -> None:
    evaluate.__main__.main(words)


ROWS = [{"instruction": f"row {i}", "input": "", "answer": str(i)} for i in range(4)]
SETTINGS = {"seed": 0, "temperature": 0.1, "adapter_sha256": None, "bf16": False}
FILES = {
    "AddSub.jsonl": [row | {"generate": f"answer {row['answer']}"} for row in ROWS[:3]],
    "AddSub.jsonl.part0": [{"index": 0, "generate": "answer 0"}, {"index": 3, "generate": "answer 3"}],
    "AddSub.jsonl.part1": [{"index": 1, "generate": ["answer 1", "or 2"]}],
    "AddSub.jsonl.settings.json": SETTINGS,
}


@hostile(80)
@given(data=st.data())
def test_predictions_in_the_making(data, ground: Ground) -> None:
    folder = ground()
    chosen = data.draw(st.sampled_from(sorted(FILES)))
    for name, content in FILES.items():
        lines = [json.dumps(row) + "\n" for row in content] if isinstance(content, list) else [json.dumps(content)]
        (folder / name).write_text("".join(lines))
    form = json_texts if chosen.endswith(".json") else json_lines
    (folder / chosen).write_bytes(data.draw(form(FILES[chosen])))
    found = []
    begin = lambda: found.append(Predictions(folder / "AddSub.jsonl", ROWS, SETTINGS, 0, False))  # noqa: E731
    if unchanged(folder, lambda: sentence_of(begin, "AddSub.jsonl")) is not None:
        return
    found[0].start()
    for index in found[0].missing:
        found[0].add(index, "new")
    found[0].close()
    found[0].finish()
    assert sorted(snapshot(folder)) == ["AddSub.jsonl", "AddSub.jsonl.settings.json"]
    rows = [json.loads(line) for line in (folder / "AddSub.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "generate"} for row in rows] == ROWS


@hostile(60)
@given(data=st.data())
def test_predictions_to_score(data, ground: Ground) -> None:
    folder = ground()
    file = folder / "AddSub.jsonl"
    form = json_texts if data.draw(st.booleans()) else json_lines
    file.write_bytes(data.draw(form([row | {"generate": "3"} for row in ROWS])))
    words = ["--predict_file", file, "--save_path", folder / "scores.json", "--verdicts", folder / "verdicts.jsonl"]
    if unchanged(folder, lambda: refusal(score, words, str(file))) is None:
        assert sorted(snapshot(folder)) == ["AddSub.jsonl", "scores.json", "verdicts.jsonl"]
        assert 0 <= json.loads((folder / "scores.json").read_text())["suites"]["AddSub"]["robust"]["percent"] <= 100


# What lies in a file's place


def things(place: Path, valid: bytes) -> Iterator[tuple[str, bool]]:
    """(what is there, whether it may be refused), one after the other in the place of a file."""
    place.unlink()
    elsewhere = place.with_name("elsewhere")
    elsewhere.write_bytes(valid)
    place.symlink_to(elsewhere)
    yield "a link to a valid file", False
    place.unlink()
    for target in ("nowhere", place.name, "/dev/zero", "/"):
        place.symlink_to(target)
        yield f"a link to {target}", True
        place.unlink()
    os.mkfifo(place)
    yield "a pipe", True
    place.unlink()
    place.mkdir()
    yield "a folder", True
    place.rmdir()


@pytest.mark.parametrize("kind", ["params.json", "tokenizer.model", "consolidated.00.pth"])
def test_what_is_no_file_in_the_place_of_a_base(kind: str, ground: Ground) -> None:
    base = ground(BASE) / "base"
    for thing, refused in things(base / kind, (BASE / kind).read_bytes()):
        sentence = unchanged(base, lambda: sentence_of(lambda: Llama.build(base, device="cpu"), str(base)))
        assert (sentence is not None) == refused, thing


@pytest.mark.parametrize("kind", ["adapter.pth", "adapter_params.json", "checkpoint-2.pth", "rows.json"])
def test_what_is_no_file_in_the_place_of_another(kind: str, made, ground: Ground) -> None:
    folder = ground(made.adapter / "adapter.pth", made.adapter / "adapter_params.json", made.run / "checkpoint-2.pth")
    shutil.copy(made.data, folder / "rows.json")
    reads = {
        "rows.json": lambda: sentence_of(lambda: read_rows(folder / kind, ("instruction",)), str(folder)),
        "checkpoint-2.pth": lambda: refusal(
            MAINS["extract_adapter"], [folder / kind, "--output_dir", ground()], str(folder)
        ),
    }
    load = lambda: sentence_of(lambda: load_adapter(folder / "adapter.pth", PARAMS), str(folder))  # noqa: E731
    for thing, refused in things(folder / kind, (folder / kind).read_bytes()):
        assert (unchanged(folder, reads.get(kind, load)) is not None) == refused, thing


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_file_in_the_place_of_predictions(kind: str, ground: Ground) -> None:
    folder = ground()
    path = folder / "AddSub.jsonl"
    (folder / "AddSub.jsonl.settings.json").write_text(json.dumps(SETTINGS))
    (folder / kind).write_text(json.dumps(SETTINGS) if kind.endswith("json") else "")
    begin = lambda: sentence_of(lambda: Predictions(path, ROWS, SETTINGS, 0, False), str(path))  # noqa: E731
    for thing, refused in things(folder / kind, (folder / kind).read_bytes()):
        sentence = unchanged(folder, begin)
        assert refused or sentence is None, thing


@pytest.mark.parametrize("place", ["part0", "lock"])
def test_nothing_is_written_through_a_link(place: str, ground: Ground) -> None:
    mine, folder = ground() / "mine", ground()
    mine.write_text("a line\nand more")
    path = folder / "AddSub.jsonl"
    overwritten = Predictions(path, ROWS, SETTINGS, 0, True)
    (folder / f"AddSub.jsonl.{place}").symlink_to(mine)

    def begin() -> None:
        overwritten.start()
        (folder / f"AddSub.jsonl.{place}").symlink_to(mine)
        overwritten.add(0, "answer")

    assert sentence_of(begin, "AddSub.jsonl") and mine.read_text() == "a line\nand more"
    overwritten.release()


def test_a_temporary_name_that_is_a_link_is_not_followed(made, ground: Ground) -> None:
    mine, folder = ground() / "mine", ground(made.run / "checkpoint-2.pth")
    mine.write_text("mine")
    for name in ("adapter.pth", "adapter_params.json"):
        (folder / f".{name}.{os.getpid()}.tmp").symlink_to(mine)
    assert refusal(MAINS["extract_adapter"], [folder / "checkpoint-2.pth"]) is None
    assert mine.read_text() == "mine" and sorted(snapshot(folder)) == [
        "adapter.pth",
        "adapter_params.json",
        "checkpoint-2.pth",
    ]


# Every kind of hostile tensor and archive at least once, whatever is drawn above


def test_every_odd_tensor_is_refused_in_an_adapter(made, ground: Ground) -> None:
    key = "layers.1.attention.adapters.prompt.prompt"
    tensor, trace, folder = made.state[key], ground.parent / "trace", ground(made.adapter)
    file = folder / "adapter" / "adapter.pth"
    files = {what: saved(made.state | {key: odd}) for what, odd in odd_tensors(tensor).items()}
    evil = evil_values(tuple(tensor.shape), trace)
    files |= {what: forged({key: value}, {"data/0": b"\0" * 16}) for what, value in evil.items()}
    files |= {f"compression {c}": compressed(saved(made.state), c) for c in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)}
    for what, content in files.items():
        file.write_bytes(content)
        assert sentence_of(lambda: Llama.build(BASE, file, device="cpu"), str(file)), what
        for mmap in (False, True):
            sentence_of(lambda mmap=mmap: load_tensors(file, mmap), str(file))
    assert not trace.exists()


def test_what_is_refused_would_have_worked(tmp_path: Path) -> None:
    trace, file = tmp_path / "trace", tmp_path / "file.pth"
    for what in ("a command", "a program"):
        file.write_bytes(forged({"key": evil_values((2, 3), trace)[what]}, {"data/0": b"\0" * 16}))
        torch.load(file, weights_only=False)
        assert trace.exists(), what
        trace.unlink()
    file.write_bytes(compressed(saved({"a": torch.zeros(4)}), zipfile.ZIP_DEFLATED, 0))
    assert torch.load(file, weights_only=True)["a"].shape == (4,)


def test_one_flipped_bit_anywhere_is_told_or_does_nothing(tmp_path: Path) -> None:
    valid = {"a": torch.tensor([1.5, -2.0]), "b": torch.arange(3.0)}
    whole, file = saved(valid), tmp_path / "file.pth"
    told = 0
    for at in range(0, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        found: list = []
        if sentence_of(lambda found=found: found.append(load_tensors(file)), str(file)) is None:
            assert found[0].keys() == valid.keys() and all(torch.equal(found[0][k], valid[k]) for k in valid), at
        else:
            told += 1
    assert told > len(whole) // 12
