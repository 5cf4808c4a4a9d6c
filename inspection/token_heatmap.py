"""One prompt and its answer, token by token, coloured by what a router returned for each token.

    python -m inspection row --ckpt_dir DIR --adapter_path OUT/adapter.pth --prompt "How many ..." --slots lora_Q
    python -m inspection row ... --data_path test.json --row 7 --layers 0,14,29 --slots p_adapter --save_path row.html
    python -m inspection row ... --data_path test.json --row 7 --show used

The model answers the prompt (greedy), or reads the answer that --answer gives. --show gate: the gate of an adapter;
used: how many adapters of a block are on, or, of an adapter with several experts, how many of them; weight: that of
one expert (--expert). On a terminal tokens stand on a colour; elsewhere, and where NO_COLOR is set, the number stands
behind each. --save_path writes the same as an HTML page of its own.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cli import cli_errors, flag, parse_into
from inspection.html import render, visible, write_page
from inspection.model import ModelFlags, check_positive, running

TEXT, VIEW = "prompt and answer", "what is shown"
# Cividis, from dark blue to yellow: brighter as a value grows, and the same for all kinds of colour vision
CIVIDIS = ("00224e", "1a386f", "434e6c", "61656f", "7d7c78", "9b9476", "bcae6c", "dec958", "fee838")


@dataclass(frozen=True)
class Flags:
    prompt: str | None = flag(None, help="an instruction", group=TEXT)
    data_path: str | None = flag(None, help="a file of test rows, instead of --prompt", group=TEXT)
    row: int | None = flag(None, help="which of its rows, from 1", group=TEXT)
    answer: str | None = flag(None, help="the answer to read; default: the model's own", group=TEXT)
    max_gen_len: int = flag(200, help="new tokens at most", group=TEXT)
    show: str = flag("gate", help="what colours stand for", choices=("gate", "used", "weight"), group=VIEW)
    layers: str = flag("mean", help="layers with commas, as 0,14,29; or mean: over all layers", group=VIEW)
    slots: str | None = flag(None, help="adapters with commas, as lora_Q,p_adapter; default: all", group=VIEW)
    expert: int | None = flag(None, help="--show weight: of which expert, from 0", group=VIEW)
    save_path: str | None = flag(None, help="HTML file to write; replaced if it exists", group=VIEW)

    def __post_init__(self):
        if (self.prompt is None) == (self.data_path is None):
            raise ValueError("give one of --prompt and --data_path")
        if (self.data_path is None) != (self.row is None):
            raise ValueError("--data_path and --row go together")
        check_positive(self, "row", "max_gen_len")
        if (self.show == "weight") != (self.expert is not None):
            raise ValueError("--expert and --show weight go together")
        layers = self.layers.split(",")
        if self.layers != "mean" and not all(layer.strip().isdigit() and len(layer) < 9 for layer in layers):
            raise ValueError(f"--layers must be mean, or numbers such as 0,14,29, not {self.layers!r}")
        if self.save_path is not None and (not self.save_path or Path(self.save_path).is_dir()):
            raise ValueError(f"--save_path {self.save_path!r} must be the path of a file")


class View(NamedTuple):
    """One number per token. low, high: the ends of the scale; is_count: the numbers are whole."""

    title: str
    values: list[float]
    low: float
    high: float
    is_count: bool

    def marks(self) -> list[float]:
        """Values that a legend shows."""
        steps = round(self.high - self.low) if self.is_count else 10
        return [self.low + (self.high - self.low) * i / steps for i in range(steps + 1)]

    def number(self, value: float) -> str:
        return f"{value:.0f}" if self.is_count else f"{value:.2f}"

    def colours(self, value: float) -> tuple[bytes, bytes]:
        """Background and text colour (red, green, blue) of a value."""
        return colours((value - self.low) / (self.high - self.low))


class TokenHeatmap(NamedTuple):
    """The texts of a row's tokens, how many of them are the prompt's, and views of them."""

    method: str
    tokens: list[str]
    prompt_len: int
    views: list[View]

    def parts(self) -> list[tuple[str, int, int]]:
        return [("prompt", 0, self.prompt_len), ("answer", self.prompt_len, len(self.tokens))]


def main(argv: Sequence[str], prog: str) -> None:
    (flags, model_flags), _ = parse_into([Flags, ModelFlags], argv, prog=prog, description=__doc__)
    with cli_errors():
        from llama.distributed import is_rank0

        row = _read_row(flags)
        with running(model_flags) as llm:
            heatmap = make_heatmap(flags, llm, row)
            if not is_rank0():
                return
            coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal has every sign
            print(terminal(heatmap, coloured))
            if flags.save_path is not None:
                write_page(Path(flags.save_path), page(heatmap))
                print(f"wrote {flags.save_path}", file=sys.stderr)


def _read_row(flags: Flags) -> dict[str, Any]:
    from moa.reading import read_rows

    if flags.data_path is None:
        return {"instruction": flags.prompt, "input": ""}
    rows = read_rows(flags.data_path, ("instruction", "input"))
    if flags.row > len(rows):
        raise ValueError(f"--row {flags.row}: {flags.data_path} has {len(rows)} rows")
    return rows[flags.row - 1]


def make_heatmap(flags: Flags, llm: Any, row: dict[str, Any]) -> TokenHeatmap:
    """The row's tokens and views. ValueError naming a flag that asks for what this model does not have."""
    from inspection.router_recorder import RouterBatch, RouterRecorder
    from inspection.router_stats import read_answers
    from llama.data import encode_prompt

    selections = _select(flags, llm.model)
    prompt = encode_prompt(llm.tokenizer, row, llm.max_seq_len - 1)
    if len(prompt) >= llm.max_seq_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens: no room for an answer within {llm.max_seq_len}")
    if flags.answer is None:
        (answer,) = llm.generate([prompt], flags.max_gen_len)
    else:
        answer = llm.tokenizer.encode(flags.answer)
    tokens = (prompt + answer)[: llm.max_seq_len]
    batches: list[RouterBatch] = []
    with RouterRecorder(llm.model, batches.append):
        read_answers(llm, [prompt], [answer])
    views = [_view(flags, batches[0], layers, slot, len(tokens)) for layers, slot in selections]
    return TokenHeatmap(llm.model.config.method, token_texts(llm.tokenizer, tokens), len(prompt), views)


def _select(flags: Flags, model: Any) -> list[tuple[list[int], str | None]]:
    """(layers to take the mean over, slot or None for all of a block) of each view that the flags ask for."""
    from inspection.router_recorder import multi_expert_adapters

    config = model.config
    if config is None or not any(config.slots(layer) for layer in range(config.n_layers)):
        raise ValueError("--adapter_path: it has no adapter with a gate")
    experts = [(layer, slot) for layer, slot, _ in multi_expert_adapters(model)]
    routed = [block.layer for block in model.layers if block.router is not None]
    gates = [(layer, slot.name) for layer in routed for slot in config.slots(layer)]
    by_block = flags.show == "used" and bool(gates) and flags.slots is None
    available = gates if flags.show == "gate" else experts
    if not available and not by_block:
        lacks = "no router of a block's adapters" if flags.show == "gate" else "no adapter with several experts"
        other = "--show used or weight" if experts else "--show gate or used without --slots"
        raise ValueError(f"--show {flags.show}: method {config.method} has {lacks}; try {other}")
    if flags.expert is not None and not 0 <= flags.expert < config.experts.expert_num:
        raise ValueError(f"--expert must be from 0 to {config.experts.expert_num - 1}, not {flags.expert}")
    layers_of: dict[str | None, list[int]] = {None: routed} if by_block else {}
    for layer, slot in [] if by_block else available:
        layers_of.setdefault(slot, []).append(layer)
    selections: list[tuple[list[int], str | None]] = []
    for slot in flags.slots.split(",") if flags.slots else layers_of:
        if slot not in layers_of:
            raise ValueError(f"--slots: {slot!r} is none of {', '.join(map(str, layers_of))}")
        layers = layers_of[slot]
        if flags.layers == "mean":
            selections.append((layers, slot))
            continue
        for layer in map(int, flags.layers.split(",")):
            if layer not in layers:
                listed = ", ".join(map(str, layers))
                raise ValueError(f"--layers: layer {layer} has no {slot or 'router'} (it is in {listed})")
            selections.append(([layer], slot))
    return selections


def _view(flags: Flags, batch: Any, layers: list[int], slot: str | None, n_tokens: int) -> View:
    import torch

    values, high = [], 1
    for layer in layers:
        if slot is None:
            numbers = torch.cat(list(batch.gates[layer].values()), 1) > 0
        elif flags.show == "gate":
            numbers = batch.gates[layer][slot]
        elif flags.show == "used":
            numbers = batch.experts[layer, slot] > 0
        else:
            numbers = batch.experts[layer, slot][:, flags.expert, None]
        high = max(high, numbers.shape[1])
        values.append(numbers.double().sum(1).expand(n_tokens))  # a gate of the whole row is that of all its tokens
    means = torch.stack(values).mean(0).tolist()
    titles = {"gate": f"gate of {slot}", "weight": f"weight of expert {flags.expert} of {slot}"}
    titles["used"] = "adapters used" if slot is None else f"experts of {slot} used"
    where = f"layer {layers[0]}" if flags.layers != "mean" else f"mean over {len(layers)} layers"
    is_count, low = flags.show == "used" and len(layers) == 1, 0
    if flags.show == "used" and not is_count:  # means over layers lie close together
        low = min(math.floor(min(means)), high - 1)
        high = max(math.ceil(max(means)), low + 1)
    return View(f"{titles[flags.show]}, {where}", means, low, high, is_count)


def token_texts(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of each token. Of tokens that share a character, the first has it, and the others nothing."""
    texts, begin = [""] * len(tokens), 0
    for i, token in enumerate(tokens):
        alone = tokenizer.decode([token])
        if begin < i and "\ufffd" not in alone:  # what came before is no character
            texts[begin], begin = tokenizer.decode(tokens[begin:i]), i
        text = tokenizer.decode(tokens[begin : i + 1])
        if "\ufffd" not in text or i - begin == 3 or i == len(tokens) - 1:  # no character has more than four bytes
            texts[begin], begin = text, i + 1
    return texts


def colours(share: float) -> tuple[bytes, bytes]:
    """Background colour of 0 to 1 on the scale, and black or white, whichever can be read better on it (WCAG 2)."""
    x = min(max(share, 0.0), 1.0) * (len(CIVIDIS) - 1)
    i = min(int(x), len(CIVIDIS) - 2)
    low, high = (bytes.fromhex(CIVIDIS[j]) for j in (i, i + 1))
    back = bytes(round(a + (b - a) * (x - i)) for a, b in zip(low, high, strict=True))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in back)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return back, bytes(3) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else b"\xff\xff\xff"


def one_line(token: str) -> str:
    """A token's text with signs for the ends of lines and tabs, and other invisible characters spelt."""
    return visible(token.replace("\r", "").replace("\n", "\u21b5").replace("\t", "\u21e5"))


def terminal(heatmap: TokenHeatmap, coloured: bool) -> str:
    """All views, one below the other."""
    lines = []
    for view in heatmap.views:
        legend = "".join(_on_colour(f" {view.number(value)} ", view, value) for value in view.marks())
        plain = f"[number behind each token, {view.low:g} to {view.high:g}]"
        lines += [f"{heatmap.method}: {view.title}", legend if coloured else plain]
        for name, begin, end in heatmap.parts():
            text = ""
            for token, value in zip(heatmap.tokens[begin:end], view.values[begin:end], strict=True):
                number = f"{one_line(token)}[{view.number(value)}]"
                text += _on_colour(one_line(token), view, value) if coloured else number
                text += "\n" * token.count("\n")
            lines += [f"{name}:", text.rstrip("\n")]
        lines.append("")
    return "\n".join(lines)


def _on_colour(text: str, view: View, value: float) -> str:
    back, ink = view.colours(value)
    codes = ";".join(map(str, (48, 2, *back, 38, 2, *ink)))
    return f"\x1b[{codes}m{text}\x1b[0m"


def page(heatmap: TokenHeatmap) -> str:
    """A page that needs no other file. A token shows its number when pointed at; a table below has all of them."""
    return render("token_heatmap.html.j2", heatmap=heatmap, css=_css, one_line=one_line)


def _css(view: View, value: float) -> str:
    back, ink = view.colours(value)
    return f"background:#{back.hex()};color:#{ink.hex()}"
