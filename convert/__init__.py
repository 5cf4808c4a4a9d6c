"""Checkpoints and adapters of other formats: `python -m convert --help`."""
