"""Running the project's commands as a user does, on the golden base with rows that fit it."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llama.distributed import init_distributed
from tiny import BASE

REPO = Path(__file__).resolve().parents[2]
PATHS = {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests" / "helpers")])}  # of a program among the tests
PROGRAM = PATHS | {"OMP_NUM_THREADS": "1"}


def run(*words: object, env: dict[str, str] | None = None, timeout: float = 240) -> subprocess.CompletedProcess:
    """`python WORDS...` in the repository; nothing is raised for its exit status."""
    return _run([sys.executable, *map(str, words)], env, timeout)


def program(file: str, *words: object, timeout: float = 400) -> subprocess.CompletedProcess:
    """A program among the tests, as `run` runs a command; with one thread."""
    return run(file, *words, env=PROGRAM, timeout=timeout)


def side_by_side(file: str, n: int, folder: Path, timeout: float) -> list[str]:
    """Such a program as `n` processes at once, each given its number and the folder. What each printed, once all have
    ended well; none is left."""
    outputs = [folder / f"output{rank}" for rank in range(n)]
    processes, environment = [], os.environ | PATHS
    try:
        for rank, output in enumerate(outputs):
            command = [sys.executable, file, str(rank), str(folder)]
            with output.open("w") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=REPO)
            processes.append(process)
        for process in processes:
            process.wait(timeout=timeout)
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.wait() == 0, output.read_text()[-3000:]
    return [output.read_text() for output in outputs]


def torchrun(n: int, *words: object, timeout: float = 240) -> subprocess.CompletedProcess:
    """The same under torchrun with `n` processes, on a port of its own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    return _run([*launch, *map(str, words)], None, timeout)


def script(name: str, *words: object) -> None:
    """An entry script's own main, in this process: a new one takes seconds to load torch."""
    runpy.run_path(str(REPO / name))["main"]([str(word) for word in words])
    init_distributed(torch.device("cpu"))  # a run leaves the process group at its end; other tests' models need it


def _run(command: Sequence[str], env: dict[str, str] | None, timeout: float) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=REPO, env=os.environ | (env or {}), capture_output=True, text=True, timeout=timeout
    )


def refused(result: subprocess.CompletedProcess, *words: str, status: int = 1) -> None:
    """The command ended with this status and one error that has all the words, without a traceback."""
    assert result.returncode == status, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0], (word, errors[0])


def write_rows(path: Path, n: int = 24, answer: bool = False) -> Path:
    """Rows of sums; prompt and answer take about 170 of the golden base's one-byte tokens."""
    rows = [
        {"instruction": f"Add {i} and {3 * i % 7}", "input": "", "output": f"It is {i + 3 * i % 7}."}
        | ({"answer": str(i + 3 * i % 7)} if answer else {})
        for i in range(n)
    ]
    path.write_text(json.dumps(rows))
    return path


def train_flags(data: Path, out: Path, **flags: object) -> list[str]:
    """Flags of a short finetune.py run on the golden base."""
    values = {
        "method": "soft_moa",
        "ckpt_dir": BASE,
        "data_path": data,
        "output_dir": out,
        "lora_rank": 2,
        "p_adapter_size": 4,
        "prompt_len": 3,
        "batch_size": 2,
        "accum_iter": 2,
        "max_steps": 6,
        "lr": 0.01,
        "bf16": False,
        "device": "cpu",
    } | flags
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
