"""Being asked to stop: a node is taken away (SIGTERM), or somebody presses Ctrl-C (SIGINT)."""

import os
import signal
import socket
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 3  # torchrun passes a signal on that its processes have had already: only this many mean "at once"


class Stopped(SystemExit):
    """The run has ended early, in order, because of a signal. Its exit status is the shell's for that signal."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.name = signal.Signals(signum).name


class GracefulShutdown:
    """Takes note of the signals while it is entered; `signum` is the first that came, 0 before. The last of PATIENCE
    signals ends the process on the spot: a thread counts them, for the main one may be waiting for another process."""

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> "GracefulShutdown":
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        threading.Thread(target=self._count, name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._told.close()  # ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signum = self.signum or number

    def _count(self) -> None:
        with self._heard:
            left = PATIENCE
            while numbers := self._heard.recv(1):
                left -= numbers[0] in SIGNALS
                if not left:
                    os._exit(128 + numbers[0])
