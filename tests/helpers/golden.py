"""Numbers of the authors' implementation and how to load its adapters (tests/golden/README.md)."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llama import Llama
from moa.adapter_file import load_adapter
from moa.state import load_adapter_state_dict
from tiny import ARGS, BASE, GOLDEN

METHODS = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "expected.npz").is_file())
METHOD_OF = {"soft_moa_instance": "soft_moa_instance"}  # its files look like soft_moa's
LABELLED = 5  # prompt tokens of the rows whose loss was computed


def expected(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / name / "expected.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    arrays["labels"][arrays["labels"] == 0] = -100  # their label to ignore
    return arrays


def load(name: str, model_parallel_size: int = 1) -> Llama:
    """The method as users load it; the sparse threshold without a gradient, as theirs is."""
    if name == "no_adapter":
        return Llama.build(BASE, device="cpu", max_seq_len=64, model_parallel_size=model_parallel_size)
    path = GOLDEN / name / "adapter.pth"
    config, state = load_adapter(path, ARGS, METHOD_OF.get(name))
    config = replace(config, threshold_gradient="none")
    llm = Llama.build(BASE, config=config, max_seq_len=64, seed=5, model_parallel_size=model_parallel_size)
    load_adapter_state_dict(llm.model, state, str(path))
    return llm
