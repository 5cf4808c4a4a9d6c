"""The command line: what is typed is what the dataclass gets, and what is wrong is refused by name, exit status 2."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cli import cli_errors, die, flag, flags_of, out_of_memory, parse, parse_into, subcommand

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

    lr: float | None = flag(None, help="learning rate", group="optimiser")
    data: str = flag(help="training rows")
    max_steps: int | None = flag(None, help="stop early")
    save: bool | None = flag(None, help="write checkpoints")
    gradient: str | None = flag(None, help="how it learns", choices=("on", "none"))
    again: str = flag("auto", help="what is done again", choices=("auto", "off", "half", "all"), switch=("off", "all"))


@dataclass
class Extract:
    """A command with an argument of its own."""

    checkpoint: str = flag(help="the checkpoint", positional=True)
    force: bool = flag(False, help="overwrite")


@dataclass
class Everything(Model, Train):
    """A flat dataclass composed of others: a required flag stands among optional ones."""

    plain: float = 0.5
    described: str = field(default="", metadata={"help": "made without knob"})


def refused(capsys: pytest.CaptureFixture, classes: type | list[type], argv: list[str]) -> str:
    """The message with which `argv` is refused."""
    with pytest.raises(SystemExit) as stop:
        parse_into(classes if isinstance(classes, list) else [classes], argv, prog="prog")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ")
    return err


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--lora_targets", "Q,K,V"], "lora_targets", "Q,K,V"),
        (["--lora_targets=0-8,24-32"], "lora_targets", "0-8,24-32"),
        (["--lora_targets", "2024"], "lora_targets", "2024"),
        (["--lora_targets", "[1,2]"], "lora_targets", "[1,2]"),
        (["--lora-targets", "Q"], "lora_targets", "Q"),
        (["--lora_targets=a=b"], "lora_targets", "a=b"),
        (["--lora_targets", "1e3"], "lora_targets", "1e3"),
        (["--lora_targets", "None"], "lora_targets", "None"),
        (["--lora_targets="], "lora_targets", ""),
        (["--lora_targets=--odd"], "lora_targets", "--odd"),
        (["--lora_targets", "-"], "lora_targets", "-"),
        (["--lora_rank", "16"], "lora_rank", 16),
        (["--bf16"], "bf16", True),
        (["--bf16", "False"], "bf16", False),
        (["--bf16=false"], "bf16", False),
        (["--bf16", "True"], "bf16", True),
        (["--method", "soft_moa"], "method", "soft_moa"),
        (["--lr", "-1"], "lr", -1.0),
        (["--lr", "-6e-3"], "lr", -6e-3),
        (["--lr", "-.5"], "lr", -0.5),
        (["--lr=3"], "lr", 3.0),
        (["--lr", "None"], "lr", None),
        (["--max_steps", "7"], "max_steps", 7),
        (["--save"], "save", True),
        (["--save", "none"], "save", None),
        (["--gradient", "none"], "gradient", "none"),
        (["--again"], "again", "all"),
        (["--again", "True"], "again", "all"),
        (["--again", "false"], "again", "off"),
        (["--again=half"], "again", "half"),
        (["--gradient", "None"], "gradient", None),
        (["--plain", "1"], "plain", 1.0),
        (["--described", "x y"], "described", "x y"),
    ],
)
def test_a_typed_value_arrives_with_its_type(argv: list[str], name: str, value: object) -> None:
    parsed = parse_into([Everything], ["--data", "d.json", *argv])
    got = getattr(parsed.values[0], name)
    assert got == value and type(got) is type(value)
    assert parsed.given == {"data", name}


def test_defaults_stand_where_nothing_is_typed() -> None:
    flags = parse(Everything, ["--data", "d.json"])
    assert flags == Everything(data="d.json")
    assert (flags.method, flags.lora_rank, flags.bf16, flags.lr, flags.plain) == ("lora", 8, True, None, 0.5)


def test_several_dataclasses_share_a_line() -> None:
    parsed = parse_into([Model, Train], ["--data=x", "--lora_rank", "4", "--save"])
    assert parsed.values == [Model(lora_rank=4), Train(data="x", save=True)]
    assert parsed.given == {"data", "lora_rank", "save"}
    with pytest.raises(AssertionError, match="lora_rank"):
        parse_into([Model, Everything], [])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lora_rnk", "8"], "unknown flag --lora_rnk; the nearest is --lora_rank"),
        (["--lora_ran", "8"], "unknown flag --lora_ran; the nearest is --lora_rank"),
        (["-l", "8"], "unknown flag --l; the nearest is --lr"),
        (["--=3"], "unknown flag --=3"),
        (["---"], "unknown flag ---"),
        (["--nobf16"], "unknown flag --nobf16; write --bf16 False"),
        (["--no_bf16"], "unknown flag --no_bf16; write --bf16 False"),
        (["--no_again"], "unknown flag --no_again; write --again False"),
        (["--again", "maybe"], "--again: expected one of auto, off, half, all, got 'maybe'"),
        (["--", "--trace"], "unexpected '-- --trace': only --completion may stand behind --"),
        (["--", "--lr", "3"], "unexpected '-- --lr 3': only --completion may stand behind --"),
        (["--lr", "--", "3"], "--lr needs a value"),
        (["--interactive"], "unknown flag --interactive"),
        (["--lora_rank", "8.0"], "--lora_rank: expected a whole number, got '8.0'"),
        (["--lora_rank", "None"], "--lora_rank: expected a whole number, got 'None'"),
        (["--lora_rank="], "--lora_rank: expected a whole number, got ''"),
        (["--max_steps", "many"], "--max_steps: expected a whole number or None, got 'many'"),
        (["--lr", "fast"], "--lr: expected a number or None, got 'fast'"),
        (["--lr", "nan"], "--lr: expected a number or None, got 'nan'"),
        (["--lr=-inf"], "--lr: expected a number or None, got '-inf'"),
        (["--bf16", "maybe"], "--bf16: expected True or False, got 'maybe'"),
        (["--method", "soft"], "--method: expected one of lora, soft_moa, got 'soft' (nearest: soft_moa)"),
        (["--lr", "1", "--lr=2"], "--lr is given twice"),
        (["--bf16", "--bf16", "False"], "--bf16 is given twice"),
        (["--lora-rank=1", "--lora_rank", "1"], "--lora_rank is given twice"),
        (["--lr"], "--lr needs a value (write --lr=VALUE if it begins with a dash)\n"),
        (["--lr", "--bf16"], "--lr needs a value (write --lr=VALUE if it begins with a dash)\n"),
        (["--lora_targets", "-Q"], "--lora_targets needs a value (write --lora_targets=VALUE if"),
        (["--lora_targets", "Q", "K"], "unexpected argument 'K'"),
        (["lora_rank=3"], "unexpected argument 'lora_rank=3' (values follow their flag; nearest flag: --lora_rank)"),
        (["-"], "unexpected argument '-'"),
        (["lr"], "unexpected argument 'lr'"),
        (["values"], "unexpected argument 'values'"),
        (["0"], "unexpected argument '0'"),
        (["--lr", "1", "-", "values"], "unexpected argument 'values'"),
        (["--lora_rank", "0"], "--lora_rank must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_named(capsys: pytest.CaptureFixture, argv: list[str], said: str) -> None:
    message = refused(capsys, Everything, ["--data", "d.json", *argv])
    assert said in message
    assert message.endswith("`prog --help` lists the flags.\n")


def test_a_switch_stands_alone_before_another_flag() -> None:
    assert parse(Train, ["--again", "--data", "d.json"]) == Train(data="d.json", again="all")


def test_a_required_flag_is_missed(capsys: pytest.CaptureFixture) -> None:
    assert "error: --data is required: training rows\n" in refused(capsys, Train, [])


def test_all_problems_are_said_at_once(capsys: pytest.CaptureFixture) -> None:
    argv = ["--methd", "lora", "--lora_rank", "x", "--lr", "1", "--lr", "y", "extra"]
    message = refused(capsys, [Model, Train], argv)
    for said in ("--methd", "--lora_rank: ", "--lr: ", "--lr is given twice", "'extra'", "--data is required"):
        assert said in message
    assert message.count("error: ") == 6


def test_positional_argument(capsys: pytest.CaptureFixture) -> None:
    for argv in (
        ["a.pth", "--force"],
        ["--force", "a.pth"],
        ["--force", "True", "a.pth"],
        ["--checkpoint=a.pth", "--force"],
    ):
        assert parse(Extract, argv) == Extract(checkpoint="a.pth", force=True)
    assert parse_into([Extract], ["a.pth"]).given == {"checkpoint"}
    assert "unexpected argument 'b.pth'" in refused(capsys, Extract, ["a.pth", "b.pth"])
    assert "--checkpoint is given twice" in refused(capsys, Extract, ["a.pth", "--checkpoint", "b.pth"])
    assert "--checkpoint is required" in refused(capsys, Extract, ["--force"])


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--nonsense", "--help"]])
def test_help_shows_every_flag(capsys: pytest.CaptureFixture, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_into([Model, Train], argv, prog="prog", description="First paragraph. " * 12 + "\n\n    prog --data x\n")
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert out.startswith("usage: prog --data STR [flags]\n")
    assert max(map(len, out.splitlines())) <= 100
    assert "\n    prog --data x\n" in out
    assert out.index("\nmodel:") < out.index("\noptimiser:") < out.index("\nflags:")
    for said in (
        "--method str                  the adapter method (one of lora, soft_moa; default: lora)",
        "--bf16 [True|False]           bf16 weights (default: True)",
        "--lr float                    learning rate",
        "--data str                    training rows (required)",
        "--save [True|False]           write checkpoints",
        "--again [str]                 what is done again (one of auto, off, half, all; default: auto)",
    ):
        assert f"\n  {said}\n" in out + "\n"


def test_help_wraps_long_texts_and_names(capsys: pytest.CaptureFixture) -> None:
    @dataclass
    class Wide:
        a_name_that_is_longer_than_its_column: int = flag(0, help="word " * 50)
        path: str = flag("/".join(["folder"] * 40), help="somewhere")

    with pytest.raises(SystemExit):
        parse(Wide, ["--help"], prog="prog")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.count("word") == 50


def test_the_first_word_names_a_command_or_the_commands_are_named(capsys: pytest.CaptureFixture) -> None:
    words = {"make": 1, "check": 2}
    assert subcommand(["check", "--help"], words, "overview") == "check"
    for argv, found in ([], "nothing was given"), (["mke"], "not 'mke'"):
        with pytest.raises(SystemExit) as stop:
            subcommand(argv, words, "overview")
        assert (stop.value.code, capsys.readouterr().err) == (
            2,
            f"error: the first word must be one of make, check: {found}\n",
        )
    with pytest.raises(SystemExit) as stop:
        subcommand(["-h"], words, "\noverview\n")
    assert (stop.value.code, capsys.readouterr().out) == (0, "overview\n")


def test_a_flag_that_cannot_work_is_the_programmers_fault() -> None:
    @dataclass
    class Tuple:
        targets: tuple[str, ...] = ("Q",)

    @dataclass
    class Choice:
        method: str = flag("x", help="", choices=("a", "b"))

    with pytest.raises(AssertionError, match="Tuple.targets"):
        parse(Tuple, [])
    with pytest.raises(AssertionError, match="Choice.method"):
        parse(Choice, [])


def test_fail_and_errors(capsys: pytest.CaptureFixture) -> None:
    def ends(error: BaseException | None, status: int, said: str, otherwise: int = 1) -> None:
        with pytest.raises(SystemExit) as stop, cli_errors(otherwise):
            if error is None:
                die("no room", 3)
            raise error
        assert stop.value.code == status
        assert capsys.readouterr().err == f"error: {said}\n"

    ends(None, 3, "no room")
    ends(ValueError("row 3: no answer"), 1, "row 3: no answer")
    ends(ValueError("--a needs --b"), 2, "--a needs --b", otherwise=2)
    ends(FileNotFoundError(2, "No such file or directory", "x.json"), 1, "x.json: No such file or directory")
    ends(OSError("disk full"), 1, "disk full")
    ends(ValueError(), 1, "ValueError")
    ends(KeyboardInterrupt(), 130, "interrupted")
    with pytest.raises(KeyError), cli_errors():
        raise KeyError("a fault of the program keeps its traceback")


def test_importing_cli_leaves_torch_alone() -> None:
    code = "import sys, cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
