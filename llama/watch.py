"""The processes of a run keep an eye on each other: when one fails, dies or hangs, the others end within a minute.

A collective waits for all its members. When one of them is gone, gloo notices at once, NCCL after many minutes or
never. So every process has a thread that shows a sign of life in torchrun's store and looks at those of the others, and
one that fails leaves its message there.
"""

import contextlib
import json
import os
import sys
import threading
import time

import torch.distributed as dist

BEAT = 2.0  # seconds between signs of life
SILENCE = 45.0  # seconds without one after which a process counts as gone
FAILED = "moa/failed"


class Watch:
    """Of one process over the others; `store` is the thread's own connection."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self._over = threading.Event()
        self._telling = threading.Lock()  # held by whoever tells of the end, for good
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The work is done: what the others do from now on is no concern."""
        self._over.set()
        self._thread.join()

    def tell(self, message: str) -> None:
        """This process fails with `message`, which it goes on to print. SystemExit in its place where another one has
        failed with the same words: they are printed once."""
        self._over.set()
        self._telling.acquire()
        mine = json.dumps({"rank": self.rank, "message": message})
        try:
            first = json.loads(self.store.compare_set(FAILED, "", mine))
        except RuntimeError:  # the store went with the process that kept it
            return
        if first["rank"] != self.rank and first["message"] == message:
            raise SystemExit(1)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # what torchrun's report of the failure quotes
            report = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
            with contextlib.suppress(OSError), open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
                json.dump(report, file)

    def explain(self) -> None:
        """An exchange with another process broke off: end with the word of the one that failed."""
        self._over.set()
        self._telling.acquire()
        problem = None
        with contextlib.suppress(RuntimeError):
            problem = self._failed()
        self._end(problem or "another process of this run is gone without a word: killed, or its machine lost")

    def _failed(self) -> str | None:
        if not self.store.check([FAILED]):
            return None
        first = json.loads(self.store.get(FAILED))
        return f"process {first['rank']} failed: {first['message']}"

    def _run(self) -> None:
        beats, seen, count = {r: b"" for r in range(self.size) if r != self.rank}, {}, 0
        last = time.monotonic()
        while not self._over.wait(BEAT if count else 0):
            count += 1
            try:
                self.store.set(f"moa/alive/{self.rank}", str(count))
                problem = self._failed()
                now = time.monotonic()
                if now - last > 3 * BEAT:
                    seen.clear()  # this process has slept itself, perhaps with all the others
                last = now
                for rank, beat in beats.items():
                    name = f"moa/alive/{rank}"
                    found = self.store.get(name) if self.store.check([name]) else b""
                    if found != beat or rank not in seen:
                        beats[rank], seen[rank] = found, now
                    elif now - seen[rank] > SILENCE and problem is None:
                        problem = f"process {rank} has shown no sign of life for {SILENCE:.0f} seconds"
            except RuntimeError:
                self._over.wait(1)  # at a run's end the store may go a moment before this process
                problem = "the process that started this run is gone"
            if problem is not None and not self._over.is_set() and self._telling.acquire(blocking=False):
                self._end(problem)

    def _end(self, problem: str) -> None:
        if " failed: " in problem:
            time.sleep(0.5)  # it speaks first
        print(f"error: process {self.rank} stops: {problem}", file=sys.stderr, flush=True)
        for thread in threading.enumerate():  # what is being written gets to its end
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(10)
        os._exit(1)  # the main thread may wait in an exchange for ever
