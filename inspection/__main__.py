"""Look inside a mixture, and compare runs.

    python -m inspection gates      statistics of a model's routers over a test file, as JSON
    python -m inspection row        one prompt and its answer as an HTML page, each token coloured by a gate
    python -m inspection report     a folder of runs as one HTML page, with its charts

docs/inspection.md shows them at work.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

import cli
from llama.machine import prepare_libraries

MODULES = {"gates": "router_stats", "row": "token_heatmap", "report": "report"}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    word = cli.subcommand(argv, tuple(MODULES), __doc__ + "\nThe flags of each: python -m inspection gates --help")
    prepare_libraries()  # before torch is imported
    import_module(f"inspection.{MODULES[word]}").main(argv[1:], f"python -m inspection {word}")


if __name__ == "__main__":
    main()
