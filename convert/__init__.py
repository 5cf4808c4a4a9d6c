"""Checkpoints of other formats into Meta's layout: `python -m convert hf` and `python -m convert gguf`."""
