"""One row looked at: the numbers are the routers', and what is shown is what was read."""

import re
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest
import torch

from inspection import token_heatmap as command
from inspection.html import write_page
from inspection.token_heatmap import Flags, TokenHeatmap, View, make_heatmap, one_line, token_texts
from llama.distributed import init_distributed
from llama.packing import PackedBatch
from tiny import BASE, build, save, shared

HOSTILE = 'a <b>&amp; "\x1b[31m\u202e\x00 \n\n\té🙂</script>'


def look(name: str, answer: str | None = "two", **flags: object) -> TokenHeatmap:
    llm = build(name, max_seq_len=400)
    parsed = Flags(**{"prompt": "one", "answer": answer, "max_gen_len": 5} | flags)
    return make_heatmap(parsed, llm, {"instruction": "one", "input": ""})


def gates_of(name: str, heatmap: TokenHeatmap) -> dict[str, torch.Tensor]:
    """The gates of layer 0, slot by slot, of the tokens of a row."""
    llm = shared(name)
    tokens = llm.tokenizer.encode("".join(heatmap.tokens).removeprefix("<|begin_of_text|>"), bos=True)
    assert len(tokens) == len(heatmap.tokens)
    x = llm.model.tok_embeddings(torch.tensor(tokens))
    router = llm.model.layers[0].router
    if router.per_sequence:
        x = PackedBatch([len(tokens)], "cpu", [heatmap.prompt_len]).mean_over_prompt(x)
    with torch.no_grad():
        gates = router(x)
    return {slot: gate.squeeze(1).expand(len(tokens)) for slot, gate in gates.items()}


@pytest.mark.parametrize("name", ["soft_moa", "sparse_moa", "soft_moa_instance", "unipeft"])
def test_gates_are_the_routers(name: str) -> None:
    heatmap = look(name, layers="0", show="p_adapter,lora_Q,used")
    gates = gates_of(name, heatmap)
    p_adapter, lora_q, used = heatmap.views
    assert [view.title for view in heatmap.views] == [f"{name}, layer 0" for name in ("p_adapter", "lora_Q", "used")]
    assert p_adapter.values == pytest.approx(gates["p_adapter"].tolist(), abs=1e-6)
    assert lora_q.values == pytest.approx(gates["lora_Q"].tolist(), abs=1e-6) and lora_q.high == 1
    assert used.values == [sum(float(gates[slot][i]) > 0 for slot in gates) for i in range(len(used.values))]
    assert used.marks() == list(range(int(max(used.values)) + 1))


def test_means_over_layers_and_what_is_shown_unless_named() -> None:
    first, second = look("sparse_moa", layers="0,1", show="lora_K").views
    (mean,) = look("sparse_moa", show="lora_K").views
    both = [(a + b) / 2 for a, b in zip(first.values, second.values, strict=True)]
    assert mean.values == pytest.approx(both) and mean.title == "lora_K, mean over 2 layers"
    names = [view.title.partition(",")[0] for view in look("soft_moa").views]
    assert set(names) == {slot.name for layer in range(3) for slot in shared("soft_moa").model.config.slots(layer)}
    assert look("topk_moelora").views[0].title == "lora_Q/used, mean over 3 layers"


@pytest.mark.parametrize(("name", "slot", "experts"), [("topk_moelora", "lora_V", 4), ("comol", "comol_V", 3)])
def test_experts(name: str, slot: str, experts: int) -> None:
    used, *weights = look(name, show=",".join([f"{slot}/used", *(f"{slot}/{e}" for e in range(experts))])).views
    assert set(used.values) == {2.0 if name == "topk_moelora" else 3.0} and used.high == max(used.values)
    sums = [sum(values) for values in zip(*(view.values for view in weights), strict=True)]
    assert sums == pytest.approx([1.0] * len(used.values))


def test_an_answer_is_generated_where_none_is_given() -> None:
    llm, heatmap = shared("soft_moa"), look("soft_moa", answer=None)
    text = "".join(heatmap.tokens[: heatmap.prompt_len]).removeprefix("<|begin_of_text|>")
    answer = build("soft_moa", max_seq_len=400).generate([llm.tokenizer.encode(text, bos=True)], 5)[0]
    assert heatmap.tokens[heatmap.prompt_len :] == token_texts(llm.tokenizer, answer)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("soft_moa", {"show": "lora_X"}, "--show: 'lora_X' is none of lora_Q"),
        ("soft_moa", {"show": "prompt", "layers": "0"}, "--layers: layer 0 has no prompt"),
        ("soft_moa", {"layers": "9"}, "--layers: layer 9"),
        ("molora", {"show": "lora_Q/4"}, "--show: 'lora_Q/4' is none of lora_Q/0"),
        ("lora", {}, "a model with lora has no router"),
    ],
)
def test_what_is_not_there_is_refused(name: str, flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        look(name, **flags)


def test_tokens_say_the_text_whatever_their_bytes() -> None:
    tokenizer = shared(None).tokenizer
    for text in (HOSTILE, "é🙂é", "plain"):
        texts = token_texts(tokenizer, tokenizer.encode(text))
        assert "".join(texts) == text and len(texts) == len(tokenizer.encode(text))
    broken = [0xF0, 0x9F, 0x41, 0xE2, 0x42, 0xFF]  # ids of the golden tokenizer are bytes
    assert token_texts(tokenizer, broken) == ["\ufffd", "", "A", "\ufffd", "B", "\ufffd"]


def test_page_is_whole_and_nothing_in_it_becomes_markup(tmp_path: Path) -> None:
    file, tokens = tmp_path / "row.html", list(HOSTILE)
    values = [i / len(tokens) for i in range(len(tokens))]
    heatmap = TokenHeatmap("soft_moa", tokens, 3, [View("lora_Q, layer 0", values, 1)])
    write_page(file, "token_heatmap.html.j2", heatmap=heatmap, one_line=one_line)
    shown = file.read_text()
    tags = [element.tag for element in fromstring(shown).iter()]
    assert not {"b", "script", "link", "img"} & set(tags) and tags.count("br") == 2
    assert "http" not in shown and "\x1b" not in shown and "\u202e" not in shown
    spans = [element for element in fromstring(shown).iter("span") if element.get("title")]
    assert [float(span.get("title")) for span in spans] == pytest.approx(values, abs=1e-3)
    assert spans[0].get("style") == "background:#00224d;color:#ffffff"


def luminance(colour: str) -> float:
    shares = (value / 255 for value in bytes.fromhex(colour))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_scale_grows_lighter_and_can_be_read() -> None:
    styles = [re.findall("#(.{6})", View("", [], 2).css(i / 50)) for i in range(101)]
    pairs = [[luminance(colour) for colour in style] for style in styles]
    lights = [back for back, _ in pairs]
    assert lights == sorted(lights) and lights[-1] > 10 * lights[0]
    assert all((max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5 for pair in pairs)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adapter, html = save(shared("sparse_moa"), tmp_path), tmp_path / "new" / "row.html"
    words = ["--adapter_path", adapter, "--ckpt_dir", BASE, "--device", "cpu", "--bf16", "False", "--max_gen_len", 4]
    command.main([str(w) for w in (*words, "--prompt", "Hi", "--show", "used", "--save_path", html)], "row")
    init_distributed(torch.device("cpu"))
    assert "used, mean over 3 layers" in html.read_text() and f"wrote {html}" in capsys.readouterr().out
    for wrong, message in ((["--layers", "0-3"], "--layers must be"), (["--row", "3"], "--data_path and --row")):
        with pytest.raises(SystemExit) as end:
            command.main([str(w) for w in (*words, "--prompt", "Hi", *wrong)], "row")
        assert end.value.code == 2 and message in capsys.readouterr().err
