"""Being asked to stop: a node is taken away (SIGTERM), or somebody presses Ctrl-C (SIGINT)."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 3  # torchrun passes a signal on that its processes have had already: only this many mean "at once"


class Stopped(SystemExit):
    """The run has ended early, in order, because of a signal. Its exit status is the shell's for that signal."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.name = signal.Signals(signum).name


class StopRequest:
    """Takes note of the signals while it is entered; `signum` is the first that came, 0 before. The last of PATIENCE
    signals does what it does elsewhere."""

    def __init__(self) -> None:
        self.signum = 0
        self._count = 0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signum = self.signum or number
        self._count += 1
        if self._count >= PATIENCE:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
