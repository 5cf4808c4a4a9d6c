"""One real end-to-end run: the demo model, made from its wheel (93 MB, once), trained for a few steps by every method
with nothing but `--method`, then one adapter all the way to its score."""

import json

import pytest

from commands import REPO, run, torchrun

pytestmark = pytest.mark.e2e
SHORT = ("--max_steps", "2", "--batch_size", "2")


@pytest.fixture(scope="module", autouse=True)
def demo():
    made = run("-m", "demo", timeout=600)
    assert made.returncode == 0, made.stderr
    return REPO / "models" / "SmolLM2-135M-Instruct"


@pytest.mark.parametrize("method", ["sparse_moa", "lora", "prompt", "parallel_adapter"])
def test_each_method_trains_on_the_demo(method, tmp_path):
    result = run("finetune.py", "--method", method, "--output_dir", tmp_path / "out", *SHORT)
    assert result.returncode == 0, result.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0.3 < loss < 6 for loss in losses)


def test_the_whole_path_under_torchrun(tmp_path):
    out = tmp_path / "out"
    trained = torchrun(1, "finetune.py", "--method", "soft_moa", "--output_dir", out, *SHORT, timeout=600)
    assert trained.returncode == 0, trained.stderr
    assert run("extract_adapter.py", out / "checkpoint-LAST.pth").returncode == 0
    flags = ("--adapter_path", out / "adapter.pth", "--max_rows", 4, "--max_gen_len", 40, "--temperature", 0)
    answered = run("generate.py", "--save_path", out / "demo.jsonl", *flags)
    assert answered.returncode == 0, answered.stderr
    scored = run("-m", "evaluate", "demo", "--predict_file", out / "demo.jsonl", "--save_path", out / "scores.json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads((out / "scores.json").read_text())["suites"]["demo"]["rows"] == 4
    table = run("exps/collect.py", out)
    assert table.returncode == 0 and "| 2 x 2 rows | 3,147,720 " in table.stdout


def test_the_demo_model_still_speaks(demo):
    """Its tokenizer and weights belong together: it continues a plain text as a language model does. Ids are those that
    transformers has."""
    from llama import Llama

    llm = Llama.build(demo, device="cpu", max_seq_len=64)
    prompt = llm.tokenizer.encode("The capital of France is", bos=True)
    assert llm.tokenizer.decode(llm.generate([prompt], 6)[0]).startswith(" Paris")
    ids = [27302, 7170, 34878, 85, 28, 216, 33, 34, 216, 35, 36, 37, 24927, 17, 198]
    assert llm.tokenizer.encode("Grüße, 12 345 €!\n") == ids
    assert llm.tokenizer.decode(ids) == "Grüße, 12 345 €!\n"
    assert llm.tokenizer.stop_ids == (0, 2)  # <|endoftext|>, <|im_end|>
