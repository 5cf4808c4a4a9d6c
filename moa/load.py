"""From a registered name to its class: modules are imported when a model needs them, so that knobs need no torch."""

from importlib import import_module
from typing import Any


def load_class(name: str) -> Any:
    """The class behind "package.module:Class"."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
