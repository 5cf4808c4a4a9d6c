"""LLaMA-3 with adapters beside its layers."""

from llama.args import ModelArgs
from llama.generation import Llama
from llama.model import Transformer
from llama.tokenizer import Tokenizer

__all__ = ["Llama", "ModelArgs", "Tokenizer", "Transformer"]
