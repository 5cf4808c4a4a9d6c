"""The command line: what is typed is what the dataclass gets, and what is wrong is refused by name, exit status 2."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli import cli_errors, die, flag, out_of_memory, parse, parse_into, subcommand

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Model:
    """Stands for the model's part of a command line."""

    method: str = flag("lora", help="the adapter method", choices=("lora", "soft_moa"), group="model")
    lora_targets: str = flag("Q,K", help="linears with a LoRA", group="model")
    lora_rank: int = flag(8, help="rank", group="model")
    bf16: bool = flag(True, help="bf16 weights", group="model")

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise ValueError(f"--lora_rank must be at least 1, got {self.lora_rank}")


@dataclass
class Train:
    """Stands for the training part."""

    lr: float | None = flag(None, above=-5, help="learning rate", group="optimiser")
    data: str = flag(help="training rows")
    max_steps: int | None = flag(None, least=1, help="stop early")
    save: bool | None = flag(None, help="write checkpoints")
    gradient: str | None = flag(None, help="how it learns", choices=("on", "none"))
    again: str = flag("auto", help="what is done again", choices=("auto", "off", "half", "all"), alone="all")


@dataclass
class Extract:
    """A command with an argument of its own."""

    checkpoint: str = flag(help="the checkpoint", positional=True)
    force: bool = flag(False, help="overwrite")


@dataclass
class Everything(Model, Train):
    """A flat dataclass composed of others: a required flag stands among optional ones."""

    a_name_longer_than_its_column: float = flag(0.5, help="word " * 50)


def refused(capsys: pytest.CaptureFixture, classes: type | list[type], argv: list[str]) -> str:
    """The message with which `argv` is refused."""
    with pytest.raises(SystemExit) as stop:
        parse_into(classes if isinstance(classes, list) else [classes], argv, prog="prog")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ")
    return err


VALUES = [
    ("lora_rank", 16, ("--lora_rank 16", "--lora_rank=16", "--lora-rank 16")),
    ("bf16", True, ("--bf16", "--bf16 True", "--bf16 true", "--bf16=True")),
    ("bf16", False, ("--bf16 False", "--bf16 false", "--bf16=false")),
    ("method", "soft_moa", ("--method soft_moa",)),
    ("lr", -1.0, ("--lr -1", "--lr=-1")),
    ("lr", -6e-3, ("--lr -6e-3",)),
    ("lr", -0.5, ("--lr -.5",)),
    ("lr", 3.0, ("--lr=3",)),
    ("lr", None, ("--lr None", "--lr=none")),
    ("max_steps", 7, ("--max_steps 7",)),
    ("save", True, ("--save",)),
    ("save", None, ("--save none",)),
    ("gradient", "none", ("--gradient none",)),
    ("gradient", None, ("--gradient None",)),
    ("again", "all", ("--again", "--again all")),
    ("again", "half", ("--again=half",)),
]
TEXTS = ("Q,K,V", "0-8,24-32", "2024", "1e3", "None", "True", "[1,2]", "{a:1}", "a=b", "x y", "", "-", "-1")


@pytest.mark.parametrize(("name", "value", "lines"), VALUES)
def test_a_typed_value_arrives_with_its_type(name: str, value: object, lines: tuple[str, ...]) -> None:
    for line in lines:
        for argv in (["--data", "d.json", *line.split()], [*line.split(), "--data=d.json"]):
            (flags,), given = parse_into([Everything], argv)
            assert getattr(flags, name) == value and type(getattr(flags, name)) is type(value)
            assert flags.data == "d.json" and given == {"data", name}


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_as_it_was_typed(text: str) -> None:
    for argv in (["--lora_targets", text], [f"--lora_targets={text}"]):
        assert parse(Everything, ["--data", text, *argv]).lora_targets == text
    assert parse(Everything, ["--data=--odd", "--lora_targets=-Q"]).lora_targets == "-Q"
    assert parse(Extract, [text]).checkpoint == text


def test_several_dataclasses_share_a_line() -> None:
    assert parse(Everything, ["--data", "d.json"]) == Everything(data="d.json")
    parsed = parse_into([Model, Train], ["--data=x", "--lora_rank", "4", "--save"])
    assert parsed.values == [Model(lora_rank=4), Train(data="x", save=True)]
    assert parsed.given == {"data", "lora_rank", "save"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora_rnk", "8"], "unknown flag --lora_rnk; the nearest is --lora_rank"),
        (["-l", "8"], "unknown flag --l; the nearest is --lr"),
        (["--=3"], "unknown flag --;"),
        (["---"], "unknown flag --;"),
        (["--nobf16"], "unknown flag --nobf16; the nearest is --bf16"),
        (["--again", "maybe"], "--again: expected one of auto, off, half, all, got 'maybe'"),
        (["--", "--trace"], "unknown flag --trace"),
        (["--lr", "--", "3"], "--lr needs a value"),
        (["--lora_rank", "8.0"], "--lora_rank: expected a whole number, got '8.0'"),
        (["--lora_rank", "None"], "--lora_rank: expected a whole number, got 'None'"),
        (["--max_steps", "many"], "--max_steps: expected a whole number or None, got 'many'"),
        (["--lr=-inf"], "--lr: expected a number or None, got '-inf'"),
        (["--bf16", "maybe"], "--bf16: expected True or False, got 'maybe'"),
        (["--method", "soft"], "--method: expected one of lora, soft_moa, got 'soft' (nearest: soft_moa)"),
        (["--lr", "1", "--lr=2"], "--lr is given twice"),
        (["--lora-rank=1", "--lora_rank", "1"], "--lora_rank is given twice"),
        (["--lr"], "--lr needs a value (write --lr=VALUE if it begins with a dash)\n"),
        (["--lr", "--bf16"], "--lr needs a value (write --lr=VALUE if it begins with a dash)\n"),
        (["--lora_targets", "Q", "K"], "unexpected argument 'K'"),
        (["lora_rank=3"], "unexpected argument 'lora_rank=3' (values follow their flag; nearest flag: --lora_rank)"),
        (["--lr", "1", "-", "values"], "unexpected argument '-'"),
        (["--lora_rank", "0"], "--lora_rank must be at least 1, got 0"),
        (["--max_steps", "0"], "--max_steps must be at least 1, not 0"),
        (["--lr", "-5"], "--lr must be above -5, not -5.0"),
    ],
)
def test_what_is_wrong_is_named(capsys: pytest.CaptureFixture, argv: list[str], words: str) -> None:
    message = refused(capsys, Everything, ["--data", "d.json", *argv])
    assert words in message
    assert message.endswith("`prog --help` lists the flags.\n")


def test_all_problems_are_said_at_once(capsys: pytest.CaptureFixture) -> None:
    argv = ["--methd", "lora", "--lora_rank", "x", "--lr", "1", "--lr", "y", "extra"]
    message = refused(capsys, [Model, Train], argv)
    for words in ("--methd", "--lora_rank: ", "--lr is given twice", "'extra'", "--data is required"):
        assert words in message
    assert message.count("error: ") == 5


def test_positional_argument(capsys: pytest.CaptureFixture) -> None:
    for line in ("a.pth --force", "--force a.pth", "--force True a.pth", "--checkpoint=a.pth --force"):
        assert parse(Extract, line.split()) == Extract(checkpoint="a.pth", force=True)
    assert parse_into([Extract], ["a.pth"]).given == {"checkpoint"}
    assert "unexpected argument 'b.pth'" in refused(capsys, Extract, ["a.pth", "b.pth"])
    assert "--checkpoint is given twice" in refused(capsys, Extract, ["a.pth", "--checkpoint", "b.pth"])
    assert "error: --checkpoint is required: the checkpoint\n" in refused(capsys, Extract, ["--force"])


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--nonsense", "--help"]])
def test_help_shows_every_flag(capsys: pytest.CaptureFixture, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_into([Everything], argv, prog="prog", description="Prose.\n\n    prog --data x\n")
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert out.startswith("usage: prog --data STR [flags]\n")
    assert out.endswith("\n\nTab completion in bash: source <(python prog -- --completion)\n")
    assert max(map(len, out.splitlines())) <= 100 and out.count("word") == 50
    assert "\n    prog --data x\n" in out
    assert out.index("\noptimiser:") < out.index("\nflags:") < out.index("\nmodel:")
    for words in (
        "--method str                  the adapter method (one of lora, soft_moa; default: lora)",
        "--bf16 [True|False]           bf16 weights (default: True)",
        "--lr float                    learning rate",
        "--data str                    training rows (required)",
        "--save [True|False]           write checkpoints",
        "--again [str]                 what is done again (one of auto, off, half, all; default: auto)",
    ):
        assert f"\n  {words}\n" in out + "\n"


def test_completion_in_bash_offers_the_flags_that_are_left(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_into([Model, Train], ["--", "--completion"], prog="python -m make it")
    script = capsys.readouterr().out
    assert stop.value.code == 0
    for line, offered in (
        ("python -m make it --lo", {"--lora_rank", "--lora_targets"}),
        ("python -m make it --lora_rank 3 --lo", {"--lora_targets"}),
        ("python -m make other --lo", set()),
    ):
        words = f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}"
        code = f'{script}\n{words}; _complete-it; echo "${{COMPREPLY[@]}}"; complete -p python >&2'
        result = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
        assert set(result.stdout.split()) == offered and "-F _complete-it python" in result.stderr


@pytest.mark.parametrize("work", ["parse(F, ['--help'])", "subcommand(['--help'], ['a'], 'a')", "work()"])
def test_a_reader_that_has_gone_ends_the_command_quietly(work: str) -> None:
    code = f"""
from dataclasses import make_dataclass
from cli import *
F = make_dataclass("F", [("x", int, 0)])
def work():
    with cli_errors():
        for i in range(9999):
            print(i)
{work}"""
    line = (
        f"{{ sleep 0.5; exec {sys.executable} -c '{code.replace(chr(39), chr(34))}'; }} | true; exit ${{PIPESTATUS[0]}}"
    )
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (141, "")


def test_subcommand_returns_the_first_word_or_names_the_words(capsys: pytest.CaptureFixture) -> None:
    words = {"make": 1, "check": 2}
    assert subcommand(["check", "--help"], words, "overview") == "check"
    for argv, status, out, err in (
        ([], 2, "", "error: the first word must be one of make, check: nothing was given\n"),
        (["mke"], 2, "", "error: the first word must be one of make, check: not 'mke'\n"),
        (["-h"], 0, "overview\n", ""),
    ):
        with pytest.raises(SystemExit) as stop:
            subcommand(argv, words, "\noverview\n")
        assert (stop.value.code, *capsys.readouterr()) == (status, out, err)


def test_errors_end_in_a_sentence_and_a_status(capsys: pytest.CaptureFixture) -> None:
    def ends(error: Exception | KeyboardInterrupt, status: int, message: str, otherwise: int = 1) -> None:
        with pytest.raises(SystemExit) as stop, cli_errors(otherwise, memory_advice="turn it down"):
            raise error
        assert (stop.value.code, capsys.readouterr().err) == (status, f"error: {message}\n")

    ends(ValueError("row 3: no answer"), 1, "row 3: no answer")
    ends(ValueError("--a needs --b"), 2, "--a needs --b", otherwise=2)
    ends(FileNotFoundError(2, "No such file or directory", "x\t.json"), 1, "x\\t.json: No such file or directory")
    ends(OSError("disk full"), 1, "disk full")
    ends(BrokenPipeError(32, "Broken pipe"), 1, "[Errno 32] Broken pipe")  # some other pipe than stdout
    ends(ValueError(), 1, "ValueError")
    ends(KeyboardInterrupt(), 130, "interrupted")
    ends(MemoryError(), 1, "out of memory: MemoryError; turn it down")
    ends(RuntimeError("CUDA out of memory.\nMore"), 1, "out of memory: CUDA out of memory; turn it down")
    for fault in (KeyError("a fault of the program keeps its traceback"), RuntimeError("shapes")):
        with pytest.raises(type(fault)), cli_errors():
            raise fault
    with pytest.raises(SystemExit) as stop:
        die("no room", 3)
    assert (stop.value.code, capsys.readouterr().err) == (3, "error: no room\n")


def test_out_of_memory_in_all_spellings() -> None:
    for text in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ):
        assert out_of_memory(RuntimeError(text)) and not out_of_memory(ValueError(text))
    assert out_of_memory(MemoryError()) and out_of_memory(type("OutOfMemoryError", (RuntimeError,), {})(""))
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
