"""Numbers of the authors' implementation (tests/golden/README.md): logits, loss, every gradient, greedy tokens."""

from itertools import takewhile

import pytest
import torch

from golden import LABELLED, METHOD_OF, METHODS, expected, load
from llama import Llama
from moa import reference_format
from tiny import BASE, GOLDEN, gradients, require_close

ENDS = (264, 265)  # ours ends at these too; theirs at 257 alone


@pytest.mark.parametrize("name", METHODS)
def test_logits_and_loss(name: str) -> None:
    llm, want = load(name), expected(name)
    with torch.no_grad():
        logits = llm.model(want["tokens"])
        loss = llm.model.loss(want["tokens"], want["labels"], [LABELLED] * len(want["tokens"]))
    assert logits.shape == want["logits"].shape and logits.dtype == torch.float32
    assert (logits - want["logits"]).abs().max() < 1e-5
    assert abs(loss - want["loss"]) < 1e-5


@pytest.mark.parametrize("name", [name for name in METHODS if name != "no_adapter"])
def test_every_gradient(name: str) -> None:
    llm, want = load(name), expected(name)
    llm.model.loss(want["tokens"], want["labels"], [LABELLED] * len(want["tokens"])).backward()
    wanted = {key.removeprefix("grad/"): grad for key, grad in want.items() if key.startswith("grad/")}
    grads = reference_format.to_reference_state(gradients(llm.model), llm.model.config)
    for key in [key for key in grads if "adapter_threshold_fn" in key]:
        assert key not in wanted and not grads.pop(key).any()  # theirs has no gradient
    if name == "unipeft":  # there the parallel adapter reads the prompt's gate, which holds the same weights
        for key in [key for key in grads if ".p_adapter_gate." in key]:
            grads[key.replace("p_adapter_gate", "prompt_gate")] += grads.pop(key)
            assert not wanted.pop(key, torch.zeros(1)).any()
    assert wanted and all(grads[key].shape == grad.shape for key, grad in wanted.items())
    require_close(grads, wanted, 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_path_gives_the_same_model(name: str) -> None:
    want = expected(name)
    path = None if name == "no_adapter" else GOLDEN / name / "adapter.pth"
    llm = Llama.build(BASE, path, method=METHOD_OF.get(name), device="cpu")
    with torch.no_grad():
        assert (llm.model(want["tokens"]) - want["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_greedy_tokens(name: str) -> None:
    llm, want = load(name), expected(name)
    n = sum(key.startswith("gen/prompt") for key in want)
    prompts = [want[f"gen/prompt{i}"].tolist() for i in range(n)]
    outputs = [want[f"gen/output{i}"].tolist() for i in range(n)]
    outputs = [list(takewhile(lambda token: token not in ENDS, out)) for out in outputs]
    assert len(METHODS) == 18 and n == 3 and all(outputs)
    assert llm.generate(prompts, max_gen_len=12) == outputs
