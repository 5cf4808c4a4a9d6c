"""Whether a device computes what a CPU does: the small models of tests/golden in float32, in bf16 and recorded.

Each check returns how far the device is off, and raises ValueError where that is more than rounding explains.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import CPU, REPO
from llama import Llama
from llama.data import IGNORE_INDEX, Example
from training.data import label_count, micro_batches
from training.loop import forward_backward

GOLDEN = REPO / "tests" / "golden"
BASE_ALONE = "no_adapter"
MODELS = sorted(file.parent.name for file in GOLDEN.glob("*/expected.npz"))
METHOD_OF = {"soft_moa_instance": "soft_moa_instance"}  # its files look like soft_moa's
PROMPT = 5  # tokens of each row
RAGGED = (14, 7, 10)  # tokens of rows cut to different lengths
NEW_TOKENS = 12
FLOAT32 = {"logits": 1e-4, "loss": 1e-4, "gradients": 1e-3}
BF16 = {"loss": 0.01, "gradients": 0.05}  # on a CPU 0.002 and 0.004 at most


def load(name: str, device: torch.device, bf16: bool = False, cuda_graphs: bool = False) -> Llama:
    """Load a golden model; "no_adapter" is the base alone."""
    path = None if name == BASE_ALONE else GOLDEN / name / "adapter.pth"
    settings = {"device": str(device), "bf16": bf16, "cuda_graphs": cuda_graphs, "max_seq_len": 64}
    return Llama.build(GOLDEN / "base", path, method=METHOD_OF.get(name), **settings)


def expected(name: str) -> dict[str, Tensor]:
    """Return the numbers of the authors' code (tests/golden/README.md)."""
    with np.load(GOLDEN / name / "expected.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def golden_rows(name: str, lengths: tuple[int, ...] | None = None) -> list[Example]:
    """Return the golden rows, whole or cut to these lengths."""
    numbers = expected(name)
    tokens, labels = numbers["tokens"].tolist(), numbers["labels"].where(numbers["labels"] != 0, IGNORE_INDEX).tolist()
    ends = lengths or [len(row) for row in tokens]
    return [Example(t[:end], label[:end], PROMPT) for t, label, end in zip(tokens, labels, ends, strict=True)]


def loss_and_gradients(llm: Llama, rows: list[Example]) -> tuple[float, Tensor]:
    """Return the loss of packed rows and its gradients, flat, on the CPU."""
    model = llm.model.train()
    (batch,) = micro_batches(rows, len(rows), model.output.weight.device)
    loss = forward_backward(model, batch, sum(map(label_count, rows)), len(batch[0]))
    gradients = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    return loss.sum().item(), torch.cat(gradients)


def required(differences: dict[str, float], bounds: dict[str, float]) -> dict[str, float]:
    """Return the differences. ValueError names those beyond their bounds."""
    beyond = [f"{name} {value:.2g}" for name, value in differences.items() if not value <= bounds[name]]
    if beyond:
        raise ValueError(f"differs from what is expected: {', '.join(beyond)} (at most {bounds})")
    return differences


def golden(name: str, device: torch.device) -> dict[str, Any]:
    """Compare logits, loss and greedy tokens in float32 with the authors', and gradients with the CPU's."""
    numbers, llm = expected(name), load(name, device)
    with torch.no_grad():
        logits = llm.model(numbers["tokens"].to(device)).cpu()
    differences = {"logits": (logits - numbers["logits"]).abs().max().item()}
    if name != BASE_ALONE:
        rows = golden_rows(name)
        (loss, gradients), (_, reference) = (loss_and_gradients(m, rows) for m in (llm, load(name, CPU)))
        differences["loss"] = abs(loss - numbers["loss"].item())
        differences["gradients"] = ((gradients - reference).norm() / reference.norm()).item()
    prompts, outputs = golden_prompts(name, llm.tokenizer.stop_ids)
    if llm.generate(prompts, NEW_TOKENS) != outputs:
        raise ValueError("greedy tokens are not the expected ones")
    return required(differences, FLOAT32)


def golden_prompts(name: str, stop_ids: tuple[int, ...]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the golden prompts and their greedy answers, which end where ours do."""
    numbers = expected(name)
    prompts, outputs = (
        [numbers[key].tolist() for key in sorted(numbers) if key.startswith(f"gen/{kind}")]
        for kind in ("prompt", "output")
    )
    ends = [next((i for i, token in enumerate(output) if token in stop_ids), None) for output in outputs]
    return prompts, [output[:end] for output, end in zip(outputs, ends, strict=True)]


def bf16(name: str, device: torch.device) -> dict[str, Any]:
    """Compare loss and gradients of rows of different lengths, with the base in bf16, with the CPU's in float32."""
    rows = golden_rows(name, RAGGED)
    (loss, gradients), (reference_loss, reference) = (
        loss_and_gradients(load(name, *where), rows) for where in ((device, True), (CPU, False))
    )
    differences = {
        "loss": abs(loss / reference_loss - 1),
        "gradients": 1 - torch.cosine_similarity(gradients, reference, dim=0).item(),
    }
    return required(differences, BF16)


def recorded(name: str, device: torch.device) -> dict[str, Any]:
    """Compare answers of eager and, on a GPU, recorded decode steps with the CPU's, in float32, greedy and sampled."""
    cpu = load(name, CPU)
    prompts, _ = golden_prompts(name, cpu.tokenizer.stop_ids)
    kinds = {"eager": load(name, device)}
    if device.type == "cuda":
        kinds["recorded"] = load(name, device, cuda_graphs=True)
    for temperature in (0.0, 0.8):
        answers = cpu.generate(prompts, NEW_TOKENS, temperature=temperature, seed=11)
        for kind, llm in kinds.items():
            if llm.generate(prompts, NEW_TOKENS, temperature=temperature, seed=11) != answers:
                raise ValueError(f"{kind} decode steps at temperature {temperature:g} answer otherwise than the CPU")
    return {"same": " = ".join([*kinds, "CPU"])}
