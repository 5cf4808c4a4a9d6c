"""Compiled decode steps: the tokens of the plain formulas, by one compilation for all blocks and all lengths."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from llama import Llama
from llama.accelerate import FastDecoding
from llama.engine import prefill
from llama.machine import check_machine
from moa.config import AdapterConfig
from moa.state import load_adapter_state_dict
from tiny import ARGS, BASE, changed, prompts, random_state, relative

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
SMALL = {"lora": {"lora_rank": 4}, "p_adapter": {"p_adapter_size": 8}, "prompt": {"prompt_len": 5}}
PARTS = {None: (), "lora": ("lora",), "soft_moa": tuple(SMALL), "sparse_moa": tuple(SMALL)}


def build(method: str | None, bf16: bool) -> Llama:
    """A model whose blocks are all alike."""
    config = None
    if method is not None:
        sizes = {name: value for part in PARTS[method] for name, value in SMALL[part].items()}
        config = AdapterConfig.from_dict({"method": method, **sizes}, ARGS.n_layers)
    llm = Llama.build(BASE, config=config, max_seq_len=64, bf16=bf16)
    load_adapter_state_dict(llm.model, random_state(llm.model), "random")
    return llm


@needs_compiler
@pytest.mark.parametrize(("method", "bf16"), [*((method, False) for method in PARTS), ("soft_moa", True)])
def test_compiled_steps_are_those_of_the_formulas(method: str | None, bf16: bool) -> None:
    """Also where several rows run at first, and one is left."""
    torch._dynamo.reset()
    counters.clear()
    llm, rows = build(method, bf16), prompts(9, 4, 12)
    fast, cpu = FastDecoding(llm.model, prepack_from=1, compile=True), torch.device("cpu")
    cache = llm.model.new_cache(1, 12)  # before inference mode, as the engine does
    with fast.running(5, hooked=False) as step, torch.inference_mode():
        expected = llm.model(torch.tensor([rows[2]]), [7])[0, -6:]
        logits = [prefill(llm.model, cache, [rows[2][:7]], cpu)]
        logits += [step(llm.model, cache, torch.tensor([token])) for token in rows[2][7:]]
    assert relative(torch.cat(logits).float(), expected) < (0.08 if bf16 else 1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # a block, and the output
    if not bf16:
        settings = {"max_gen_len": 8, "min_new_tokens": 8}
        with changed(llm, fast_decoding=None):
            tokens = llm.generate(rows, **settings)
        for size in (1, 2):
            with changed(llm, fast_decoding=fast, max_batch_size=size):
                assert llm.generate(rows, **settings) == tokens
        assert counters["stats"]["unique_graphs"] == 2


def test_compilation_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in (("cuda", True), ("cpu", True, False, False, 2)):
        with pytest.raises(ValueError, match="compile needs --device cpu and --model_parallel_size 1"):
            check_machine(*machine, compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler"):
        Llama.build(BASE, compile=True)
