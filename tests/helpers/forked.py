"""Processes of a run without torchrun: forked from one that has loaded everything and computed nothing, which takes
milliseconds where a new one takes seconds."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def start(rank: int, size: int, port: int, work: Callable[[], None], log: Path) -> int:
    """Fork process `rank` of a run of `size` that does `work` and prints to the end of `log`. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        rendezvous = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ |= {name: str(value) for name, value in rendezvous.items()}
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def forked(work: Callable[[], None], logs: list[Path]) -> Iterator[list[int]]:
    """Start a run of as many processes as there are logs, each of which does `work`. The context's end kills them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [start(rank, len(logs), port, work, log) for rank, log in enumerate(logs)]
    try:
        yield pids
    finally:
        for pid in pids:
            kill(pid)


def ended(pid: int) -> int | None:
    """Exit status of a process that is over (-9: killed), None while it runs. It can be asked for again."""
    state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if state is None:
        return None
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def wait(pids: list[int], seconds: float) -> list[int | None]:
    """Wait until all are over, `seconds` at most. Returns their exit statuses."""
    end = time.monotonic() + seconds
    while None in (statuses := [ended(pid) for pid in pids]) and time.monotonic() < end:
        time.sleep(0.002)
    return statuses
