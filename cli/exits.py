"""How a command ends: one clear sentence on stderr and an exit status, never a traceback for a user's mistake."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


def fail(message: str, status: int = 1) -> NoReturn:
    """Print `error: message` on stderr and exit with `status` (2 for flags, 1 for the rest)."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextmanager
def errors(status: int = 1) -> Iterator[None]:
    """Turn ValueError and OSError into `error: ...` with exit `status`, and Ctrl-C into exit status 130.

    Other exceptions are faults of the program and keep their traceback.
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


def _sentence(error: Exception) -> str:
    return str(error) or type(error).__name__
