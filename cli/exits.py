"""How a command ends: one clear sentence on stderr and an exit status, never a traceback for a user's mistake."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


def fail(message: str, status: int = 1) -> NoReturn:
    """Print `error: message` on stderr and exit with `status` (2 for flags, 1 for the rest). What a terminal would not
    print but obey, in a file's name say, is spelt out."""
    told = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    print(f"error: {told}", file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextmanager
def errors(status: int = 1, memory_advice: str = "") -> Iterator[None]:
    """Turn ValueError, OSError and lack of memory into `error: ...` with exit `status`, Ctrl-C into exit status 130.

    memory_advice: what to turn down, said behind the error where memory runs out. Other exceptions are faults of the
    program and keep their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted", status=130)
    except OSError as error:
        named = error.filename is not None and error.strerror
        fail(f"{error.filename}: {error.strerror}" if named else _sentence(error), status)
    except ValueError as error:
        fail(_sentence(error), status)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        told = _sentence(error).splitlines()[0].rstrip(".")
        fail(f"out of memory: {told}" + (f"; {memory_advice}" if memory_advice else ""), status)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's own error, or torch's for a GPU or the CPU (told by name and text: torch is not
    loaded here)."""
    torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or torchs


def _sentence(error: Exception) -> str:
    return str(error) or type(error).__name__
