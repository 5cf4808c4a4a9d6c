"""Running generated programs, each in a process of its own that can harm nothing but itself; see docs/scoring.md.

from evaluate import Program, Sandbox
sandbox = Sandbox(timeout=10)
[outcome] = sandbox.run([Program(("def f(x): return x + 1",), ("assert f(1) == 2",))])
outcome.passed, outcome.why
"""

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate.sandbox_kernel import policy, readable_folders

_CHILD = Path(__file__).with_name("sandbox_child.py")
SECONDS = 10.0  # of CPU time that a program may take, where nothing else is given
_WALL = 10  # times that, as wall time, in which it has to end: on a busy machine, or if it sleeps
_MEMORY = 1 << 30  # bytes of address space
_FILE_SIZE = 16 << 20
_RESULT_SIZE = 4096  # bytes of a result that are read

_WEAK = "note: generated code was kept in by guards inside its own interpreter, not by this machine's kernel"


@dataclass(frozen=True)
class Program:
    """Sources in Python, and the tests that they must pass.

    candidate: run one after another in one module. tests: run after it, in a copy of its variables without those that
    hide a built-in function, except `names`, which the tests are about. seconds: of CPU time that it may take; None:
    the sandbox's limit. A program passes if nothing raises an error up to the end of the last test.
    """

    candidate: tuple[str, ...]
    tests: tuple[str, ...]
    names: tuple[str, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """passed: the tests ran to their end. why: "passed", or in one line why not."""

    passed: bool
    why: str


class Sandbox:
    """Runs programs, `jobs` at once (None: one per CPU), each at most `timeout` seconds of CPU time.

    CPU time, since a verdict must not depend on what else the machine does; rounded up, and a second for Python itself.

    weak: where this machine's kernel offers no filter of system calls, do with guards inside the interpreter. OSError
    where it offers none and `weak` is not set, and where a process cannot be set up as it should be.
    """

    def __init__(self, timeout: float = SECONDS, jobs: int | None = None, weak: bool = False) -> None:
        assert 0 < timeout < math.inf and (jobs is None or jobs > 0)
        if os.name != "posix":
            raise OSError("generated code can be run on Linux and macOS only")
        self.timeout = timeout
        self.jobs = jobs or os.cpu_count() or 1
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = threading.Event()
        self._policy = policy()
        refusal = "" if self._policy else "no seccomp filter for this system"
        try:
            self.run([Program((), ())])
        except OSError as error:
            if not self._policy:
                raise
            refusal, self._policy = str(error), None
        if refusal and not weak:
            raise OSError(
                f"this machine's kernel cannot keep generated code in ({refusal}); --weak_sandbox does with guards "
                "inside its interpreter: only where it may come to harm, as in a container"
            )

    @property
    def note(self) -> str:
        """A note on the protection for whoever reads the scores; empty where the kernel gives it."""
        return "" if self._policy else _WEAK

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """Return the outcome of each program, in their order. However this ends, none of their processes is left."""
        self._stopped.clear()
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = [pool.submit(self._run, program) for program in programs]
                left = set(futures)
                while left:  # in short waits: Ctrl-C can be missed by a thread that is just about to wait
                    done, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()  # or what went wrong with it
                    if len(programs) > 1 and sys.stderr.isatty():
                        end = "\r" if left else "\n"
                        print(f"{len(programs) - len(left)} of {len(programs)} programs run", end=end, file=sys.stderr)
                return [future.result() for future in futures]
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in tuple(self._running):
                    process.kill()
                raise

    def _run(self, program: Program) -> Outcome:
        with (
            tempfile.TemporaryDirectory(prefix="candidate-", ignore_cleanup_errors=True) as name,
            tempfile.TemporaryFile() as task,
            tempfile.TemporaryFile() as result,
        ):
            folder, token = os.path.realpath(name), secrets.token_hex(16)
            task.write(json.dumps(self._task(program, folder, token)).encode())
            task.seek(0)
            ended = self._wait_for(folder, task, result, _WALL * self._seconds(program))
            result.seek(0)
            return _outcome(result.read(_RESULT_SIZE), token, ended)

    def _seconds(self, program: Program) -> int:
        return math.ceil(program.seconds or self.timeout) + 1

    def _task(self, program: Program, folder: str, token: str) -> dict[str, Any]:
        task = {
            "candidate": program.candidate,
            "tests": program.tests,
            "names": program.names,
            "folder": folder,
            "readable": [path + "/" for path in readable_folders()],
            "token": token,
            "seconds": self._seconds(program),
            "memory": _MEMORY,
            "file_size": _FILE_SIZE,
            "policy": None,
        }
        if self._policy:
            paths = [*self._policy.paths, (folder, self._policy.folder)]
            handled, code = self._policy.handled, self._policy.filter.hex()
            task["policy"] = {"filter": code, "handled": handled, "paths": paths, "parent": os.getpid()}
        return task

    def _wait_for(self, folder: str, task: Any, result: Any, wall: int) -> int | None:
        """Return the exit status of the process, None after `wall` seconds. It and its group are gone on return."""
        # -s -S -P: the standard library alone. The seed makes the order of sets, and so a verdict, the same every time.
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(_CHILD)]
        process = subprocess.Popen(
            command,
            stdin=task,
            stdout=result,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        self._running.add(process)
        try:
            if self._stopped.is_set():
                process.kill()
            return process.wait(wall)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._running.discard(process)


def _outcome(result: bytes, token: str, ended: int | None) -> Outcome:
    start, _, rest = result.decode("utf-8", "replace").partition("\n")
    if ended in (None, -signal.SIGXCPU):
        return Outcome(False, "timeout")
    if start != "ready":
        raise OSError(f"cannot set up a process for generated code: {start or f'exit status {ended}'}")
    if rest == token:
        return Outcome(True, "passed")
    if not rest:
        how = f"signal {signal.Signals(-ended).name}" if ended < 0 else f"exit status {ended}"
        return Outcome(False, f"ended before the tests did: {how}")
    line = rest.split("\n")[0][:200]
    return Outcome(False, "".join(c if c.isprintable() else "?" for c in line))
