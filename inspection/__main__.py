"""Look inside a mixture, and compare runs.

    python -m inspection gates      statistics of a model's routers over a test file or a prompt, as JSON
    python -m inspection row        one prompt and its answer, token by token, coloured by a gate
    python -m inspection figures    pictures of statistics, runs and costs (needs matplotlib)
    python -m inspection report     a folder of runs as one HTML page

docs/inspection.md shows them at work.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

import cli

COMMANDS = ("gates", "row", "figures", "report")  # each a module of this package with `main(argv, prog)`


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if list(argv[:1]) in (["--help"], ["-h"]):
        print(__doc__.strip() + "\n\nThe flags of each: python -m inspection gates --help")
        return
    if not argv or argv[0] not in COMMANDS:
        found = f"not {argv[0]!r}" if argv else "nothing was given"
        cli.fail(f"the first word must be one of {', '.join(COMMANDS)}: {found}", status=2)
    import_module(f"inspection.{argv[0]}").main(argv[1:], f"python -m inspection {argv[0]}")


if __name__ == "__main__":
    main()
