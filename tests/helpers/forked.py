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
    """Process `rank` of a run of `size` does `work`; what it prints goes to the end of `log`. Its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
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
    """As many processes as there are logs do `work`, as one run. None is left when the context is left."""
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
    """Exit status of a process that is over (-9: killed), None while it runs. Its entry is left for the next call."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def wait(pids: list[int], seconds: float) -> list[int | None]:
    """Until all are over, `seconds` at most. Their exit statuses."""
    end = time.monotonic() + seconds
    while None in (statuses := [ended(pid) for pid in pids]) and time.monotonic() < end:
        time.sleep(0.002)
    return statuses
