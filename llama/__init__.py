"""LLaMA-3 with adapters beside its layers. The names below are loaded when they are first used: torch takes seconds."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.args import ModelArgs
    from llama.generation import Llama
    from llama.model import Transformer
    from llama.tokenizer import Tokenizer

__all__ = ["Llama", "ModelArgs", "Tokenizer", "Transformer"]

_MODULES = {"Llama": "generation", "ModelArgs": "args", "Tokenizer": "tokenizer", "Transformer": "model"}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
