"""Orderly end of a run on SIGTERM (a node is taken away) or SIGINT (Ctrl-C)."""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """The run has ended early, in order, because of a signal. Its exit status is the shell's for that signal."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.name = signal.Signals(signum).name


class GracefulShutdown:
    """Notes signals while it is entered: `signum` is the first that came, 0 before.

    The same signal once more, over a second later, or any third one ends the process at once. (torchrun passes on a
    signal that its processes have had from the terminal already.)
    """

    def __init__(self) -> None:
        self.signum = self._count = 0
        self._first_time = 0.0

    def __enter__(self) -> "GracefulShutdown":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._count += 1
        if self._count == 1:
            self.signum, self._first_time = number, now
        elif self._count == 3 or (number == self.signum and now - self._first_time > 1):
            os._exit(128 + number)
