"""A comparison of methods under equal terms: the same rows, steps and schedule, a learning rate chosen for each, three
seeds, and differences paired over rows and seeds.

    python -m exps.study                                       every method on the demo's word problems
    python -m exps.study --methods lora,soft_moa,lora:lora_rank=4 --steps 50
    python -m exps.study --collect_only                        the tables of what is finished

METHOD:flag=value is a method with another flag of finetune.py, and custom:adapter_config=FILE one of your own. Three
names in the place of a flag belong to the study: lora:lr_scale=0.1 trains at a tenth of the rate that was chosen for
lora, lora:seeds=1,2,3 has seeds of its own, and ia3:rates=1e-3,3e-3,1e-2 chooses among other rates. Each of these is a
line of the tables.

The rate is the one with the lowest loss, after the first seed, on validation rows that are held out of the training
rows. Tests are seen by the runs of that rate alone. Stopped anywhere, the same command goes on from there. A run of
other code (of moa/, llama/, training/, finetune.py and the scorer), another model, other rows or another budget is
refused by name; --redo trains it again. What writes the tables is no part of it.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from math import fsum, inf
from pathlib import Path
from typing import Any

from cli import cli_errors, die, flag, nearest, parse
from demo.model import ensure_model
from exps.study_data import SPLITS, write_rows
from llama.machine import prepare_libraries
from moa.methods import METHODS
from training.config import parse_flags

ROOT = Path(__file__).resolve().parent.parent
COMPUTING = ("moa/**/*.py", "llama/**/*.py", "training/**/*.py", "finetune.py", "exps/scorer.py")  # what a run is by
OWN = ("seeds", "rates", "lr_scale")  # of a line, in the place of flags of finetune.py
WHAT, BUDGET, OUTPUT = "what is compared", "budget, of every run", "output"


@dataclass(frozen=True)
class Flags:
    methods: str = flag("all", help="methods with commas between, as METHOD:flag=value; or all", group=WHAT)
    references: str = flag("lora,soft_moa", help="the lines that the others are compared with", group=WHAT)
    seeds: str = flag("0,125,1225", help="seeds of every line; the rate is chosen with the first", group=WHAT)
    rates: str = flag("3e-4,1e-3,3e-3", help="learning rates to choose from", group=WHAT)
    data: str = flag("demo", help="demo, and NAME=FILE of training rows; commas", group=WHAT)
    ckpt_dir: str | None = flag(None, help="base model, a folder in Meta's layout; default: the demo model", group=WHAT)
    steps: int = flag(100, least=2, help="optimizer steps; a tenth of them is warm-up", group=BUDGET)
    batch_size: int = flag(8, least=1, help="rows of a step", group=BUDGET)
    train_rows: int = flag(2000, least=1, help="rows to train on", group=BUDGET)
    val_rows: int = flag(200, least=2, help="further rows, by which the rate is chosen", group=BUDGET)
    test_rows: int = flag(500, least=2, help="further rows, whose losses are compared", group=BUDGET)
    demo_rows: int = flag(1000, least=2, help="of the demo: problems to answer", group=BUDGET)
    max_seq_len: int = flag(300, least=1, help="longest row in tokens; longer ones are not chosen", group=BUDGET)
    bf16: bool | None = flag(None, help="base in bf16; default: where the hardware multiplies bf16", group=BUDGET)
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N", group=BUDGET)
    out: str = flag("runs/study", help="folder of the runs and the tables", group=OUTPUT)
    redo: bool = flag(False, help="train a run again that was made otherwise", group=OUTPUT)
    collect_only: bool = flag(False, help="train nothing; the tables of the runs that there are", group=OUTPUT)
    quiet_machine: bool = flag(False, help="nothing else ran beside the runs: show times as well", group=OUTPUT)
    page: str | None = flag(None, help="page to write the tables into, between its two study marks", group=OUTPUT)

    @property
    def datasets(self) -> dict[str, str | None]:
        """Name -> file of training rows; None: the demo's are made."""
        named = [word.partition("=") for word in self.data.split(",")]
        wrong = [name for name, _, file in named if bool(file) == (name == "demo")]
        if wrong:
            raise ValueError(f"--data: expected demo or NAME=FILE, not {wrong[0]!r}")
        return {name: file or None for name, _, file in named}


@dataclass(frozen=True)
class Line:
    """A line of the tables: a method, flags of finetune.py, and what it is trained with."""

    name: str
    method: str
    options: dict[str, str]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    lr_scale: float = 1.0

    @property
    def model(self) -> str:
        """The line without what is the study's own: lines of one model share its runs."""
        return "-".join([self.method, *(f"{n}={value}".replace("/", "_") for n, value in self.options.items())])

    @classmethod
    def from_text(cls, text: str, flags: Flags) -> "Line":
        method, *pairs = text.split(":")
        if method not in METHODS:
            raise ValueError(f"--methods: no method {method!r} (nearest: {nearest(method, METHODS)})")
        options = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals or name in options:
                raise ValueError(f"--methods: {text}: expected flag=value, each flag once, not {pair!r}")
            options[name] = value
        own = {name: options.pop(name) for name in OWN if name in options}
        seeds = numbers(own.get("seeds", flags.seeds), int, f"{text}: seeds")
        rates = numbers(own.get("rates", flags.rates), float, f"{text}: rates")
        (scale,) = numbers(own.get("lr_scale", "1"), float, f"{text}: lr_scale")[:1]
        return cls(text, method, options, seeds, rates, scale)


def numbers(text: str, kind: type, what: str) -> tuple[Any, ...]:
    """Numbers between commas, none twice. ValueError names `what` they are."""
    try:
        values = tuple(map(kind, text.split(",")))
    except ValueError:
        values = ()
    if not values or len({*values}) < len(values) or not all(0 <= value < inf for value in values):
        raise ValueError(f"{what}: expected numbers between commas, none twice, not {text!r}")
    return values


def lines_of(text: str, flags: Flags) -> list[Line]:
    """The lines named in a text, between spaces or commas (values of flags may hold commas)."""
    if text == "all":
        text = " ".join(name for name in METHODS if name != "custom")
    words = re.split(rf"\s+|,(?=(?:{'|'.join(METHODS)})(?:[:,\s]|$))", text.strip())
    lines = [Line.from_text(word, flags) for word in words]
    if len({line.name for line in lines}) < len(lines):
        raise ValueError(f"--methods: a line is named twice in {text}")
    return lines


@dataclass(frozen=True)
class Run:
    """One training, or the base: the folder DATASET/MODEL-lrRATE/sSEED."""

    path: Path
    line: Line | None = None
    lr: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        return "/".join(self.path.parts[-3:] if self.line else self.path.parts[-2:])

    def losses(self, split: str) -> list[float]:
        return json.loads((self.path / f"{split}.json").read_text())["losses"]

    def loss(self, split: str) -> float:
        """Mean loss per label token; infinite where the training diverged, or was not."""
        file = self.path / f"{split}.json"
        content = json.loads(file.read_text()) if file.is_file() else {"labels": [], "losses": []}
        return fsum(content["losses"]) / sum(content["labels"]) if content["labels"] else inf


@dataclass
class Study:
    """The runs of one data set, in OUT/DATASET, whose rows lie in OUT/DATASET/rows."""

    flags: Flags
    dataset: str
    lines: list[Line]
    folder: Path = field(init=False)

    def __post_init__(self):
        self.folder = Path(self.flags.out) / self.dataset

    @property
    def base(self) -> Run:
        return Run(self.folder / "base")

    def run(self, line: Line, lr: float, seed: int) -> Run:
        return Run(self.folder / f"{line.model}-lr{lr:g}" / f"s{seed}", line, lr, seed)

    def candidates(self, line: Line) -> list[Run]:
        """The runs among which the line's rate is chosen."""
        return [self.run(line, lr, numbers(self.flags.seeds, int, "--seeds")[0]) for lr in line.rates]

    def best(self, line: Line) -> Run:
        """The candidate with the lowest validation loss."""
        return min(self.candidates(line), key=lambda run: run.loss("val"))

    def chosen(self, line: Line) -> list[Run]:
        """The line's runs, one per seed, at the chosen rate; none where there is no candidate with a finite loss."""
        best = self.best(line)
        if best.loss("val") == inf:
            return []
        return [self.run(line, best.lr * line.lr_scale, seed) for seed in line.seeds]

    @property
    def measurements(self) -> list[str]:
        """The files that a run has when it has been tested."""
        return ["val.json", "test.json", *["demo.jsonl"] * (self.dataset == "demo")]

    def complete(self, line: Line) -> bool:
        """Whether all candidates have been validated and all runs of the chosen rate tested."""
        candidates, chosen = self.candidates(line), self.chosen(line)
        validated = all((run.path / "val.json").is_file() for run in candidates)
        tested = all((run.path / name).is_file() for run in chosen for name in self.measurements)
        return validated and tested and bool(chosen)


def code_hash() -> str:
    """Tells apart code that may train or score otherwise."""
    digest = sha256()
    for file in sorted(file for pattern in COMPUTING for file in ROOT.glob(pattern)):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Worker:
    """Trains and measures the runs of a study that are missing."""

    def __init__(self, study: Study, file: str | None):
        from llama.checkpoint import fingerprint, load_params_and_tokenizer
        from llama.distributed import bf16_is_fast, get_device
        from moa.files import file_hash

        self.study, self.flags = study, study.flags
        self.ckpt_dir = str(self.flags.ckpt_dir or ensure_model())
        _, self.tokenizer = load_params_and_tokenizer(self.ckpt_dir)
        rows = write_rows(study.folder / "rows", file, self.flags, self.tokenizer)
        device = get_device(self.flags.device)
        self.machine = {"bf16": bf16_is_fast(device) if self.flags.bf16 is None else self.flags.bf16}
        self.machine["device"] = str(device)
        warmup = max(1, self.flags.steps // 10) / -(-self.flags.train_rows // self.flags.batch_size)
        budget = ("steps", "batch_size", "max_seq_len", "test_rows", "demo_rows")
        self.identity = {
            "code": code_hash(),
            "base": fingerprint(self.ckpt_dir),
            **{f"{split} rows": file_hash(rows / f"{split}.json")[:16] for split in SPLITS},
            **{name: getattr(self.flags, name) for name in budget},
            "warmup_epochs": f"{warmup:.9g}",
            **self.machine,
        }

    def do(self) -> Iterator[str]:
        """Do all that is missing -> the lines that could not be trained, with the reason."""
        self.measure(self.study.base, self.study.measurements)
        for line in self.study.lines:
            try:
                for run in self.study.candidates(line):
                    self.measure(run, ["val.json"])
                chosen = self.study.chosen(line)
                if not chosen:
                    raise ValueError("no rate has a finite validation loss")
                for run in chosen:
                    self.measure(run, self.study.measurements)
                    if run.loss("test") == inf:
                        raise ValueError(f"the training of {run} diverged")
            except ValueError as error:
                yield f"{self.study.dataset}: {line.name}: {error}"

    def measure(self, run: Run, wanted: list[str]) -> None:
        """Train a run where it is not trained, and write those of the wanted files that it lacks."""
        from moa.adapter_file import PARAMS
        from moa.files import read_json, write_json

        if self.identity["code"] != code_hash():
            raise SystemExit("error: the code has changed while the study went on; start it again")
        record, identity = run.path / "study.json", self.identity | self.files(run)
        if record.is_file() and (before := read_json(record)) != identity:
            differ = ", ".join(name for name in before | identity if before.get(name) != identity.get(name))
            if not self.flags.redo:
                raise SystemExit(f"error: {run.path}: made with other {differ}; give --redo, or another --out")
            print(f"{run.path}: made with other {differ}, trained again", file=sys.stderr)
            shutil.rmtree(run.path)
        missing = [name for name in wanted if not (run.path / name).is_file()]
        if not missing:
            return
        write_json(record, identity)
        if run.line and not (run.path / PARAMS).is_file() and not self.train(run):  # written last
            write_json(run.path / "val.json", {"losses": [], "labels": []})  # diverged
            print(f"{run}: the training diverged", file=sys.stderr, flush=True)
            return
        self.score(run, missing)

    def files(self, run: Run) -> dict[str, str]:
        """The contents of the files that a line's flags name."""
        from moa.files import file_hash

        options = run.line.options if run.line else {}
        return {f"--{name} {value}": file_hash(value)[:16] for name, value in options.items() if Path(value).is_file()}

    def words(self, run: Run) -> list[str]:
        """The command line of finetune.py."""
        flags, rows = self.flags, self.study.folder / "rows"
        values = {
            "ckpt_dir": Path(self.ckpt_dir).resolve(),
            "data_path": (rows / "train.json").resolve(),
            "output_dir": run.path.resolve(),
        }
        values |= {"seed": run.seed, "lr": f"{run.lr:g}", "max_steps": flags.steps, "batch_size": flags.batch_size}
        values |= {"warmup_epochs": self.identity["warmup_epochs"], "max_seq_len": flags.max_seq_len, **self.machine}
        pairs = [("method", run.line.method), *values.items(), *run.line.options.items()]
        return [word for name, value in pairs for word in (f"--{name}", str(value))] + ["--resume"]

    def train(self, run: Run) -> bool:
        """Train a run and leave its adapter, and no checkpoint -> whether its loss stayed finite."""
        from moa.adapter_file import save_adapter
        from moa.files import load_tensors
        from training.resume import checkpoints

        command, log = [sys.executable, "finetune.py", *self.words(run)], run.path / "train.txt"
        with log.open("wb") as output:
            status = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output).returncode
        if status:
            last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            if status < 0 or status > 128:
                raise SystemExit(f"error: {run}: stopped by signal {-status if status < 0 else status - 128}")
            if "not finite" in last:
                return False
            raise ValueError(f"{run}: {last}")
        content = load_tensors(checkpoints(run.path)[-1][1])
        save_adapter(run.path, content["adapter"], content["adapter_params"])
        for _, file in checkpoints(run.path):
            file.unlink()
        return True

    def score(self, run: Run, missing: list[str]) -> None:
        from exps.scorer import greedy_answers, row_losses
        from llama import Llama
        from moa.files import atomic_write, write_json
        from moa.reading import read_rows
        from training.data import label_count, load_examples

        flags, rows = self.flags, self.study.folder / "rows"
        adapter = run.path / "adapter.pth" if run.line else None
        longest = max(512, flags.max_seq_len + 200)
        llm = Llama.build(self.ckpt_dir, adapter, max_seq_len=longest, max_batch_size=64, **self.machine)
        for split in ("val", "test"):
            if f"{split}.json" in missing:
                examples = load_examples(rows / f"{split}.json", self.tokenizer, flags.max_seq_len, quiet=True)
                losses = row_losses(llm.model, examples[: getattr(flags, f"{split}_rows")])
                labels = list(map(label_count, examples[: len(losses)]))
                write_json(run.path / f"{split}.json", {"losses": losses, "labels": labels})
                print(f"{run}: {split} loss {run.loss(split):.4f}", file=sys.stderr, flush=True)
        if "demo.jsonl" in missing:
            problems = read_rows(rows / "test.json", ("instruction", "input"))[: flags.demo_rows]
            answers = greedy_answers(llm, problems)
            lines = [json.dumps(row | {"generate": text}) for row, text in zip(problems, answers, strict=True)]
            atomic_write(run.path / "demo.jsonl", "".join(f"{line}\n" for line in lines).encode())
            print(f"{run}: {len(answers)} problems answered", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m exps.study", description=__doc__)
    failed = False
    with cli_errors():
        lines = lines_of(flags.methods, flags)
        names = [line.name for line in lines]
        references = [name for name in flags.references.split(",") if name in names]
        numbers(flags.seeds, int, "--seeds")
        for line in lines:  # a wrong flag is refused before any work
            words = [word for name, value in line.options.items() for word in (f"--{name}", value)]
            parse_flags(["--method", line.method, "--data_path", "rows", *words], {}, "")
        prepare_libraries()
        for dataset, file in flags.datasets.items():
            study = Study(flags, dataset, lines)
            if not flags.collect_only:
                for problem in Worker(study, file).do():
                    print(f"not done: {problem}", file=sys.stderr, flush=True)
                    failed = True
    from exps.study_page import collect  # not before: it loads what the runs need not wait for

    with cli_errors():
        collect([Study(flags, dataset, lines) for dataset in flags.datasets], references, Path(flags.out))
    if failed:
        die("some lines could not be trained, as said above")


if __name__ == "__main__":
    main(sys.argv[1:])
