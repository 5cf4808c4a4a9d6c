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

import numpy as np
import torch
from torch import Tensor

from cli import cli_errors, flag, parse_into
from inspection.html import visible, write_page
from inspection.model import ModelFlags, running
from inspection.router_recorder import RouterBatch, RouterRecorder, read_answers
from llama import Llama
from llama.data import encode_prompt
from llama.distributed import is_rank0
from moa.config import AdapterConfig
from moa.reading import read_rows

TEXT, VIEW = "prompt and answer", "what is shown"
# Cividis, from dark blue to yellow: brighter as a value grows, and the same for all kinds of colour vision
CIVIDIS = ("00224e", "1a386f", "434e6c", "61656f", "7d7c78", "9b9476", "bcae6c", "dec958", "fee838")
DARK = 0.465  # below this share of the scale white letters can be read better than black ones (WCAG 2)


@dataclass(frozen=True)
class Flags:
    prompt: str | None = flag(None, help="an instruction", group=TEXT)
    data_path: str | None = flag(None, help="a file of test rows, instead of --prompt", group=TEXT)
    row: int | None = flag(None, least=1, help="which of its rows, from 1", group=TEXT)
    answer: str | None = flag(None, help="the answer to read; default: the model's own", group=TEXT)
    max_gen_len: int = flag(200, least=1, help="new tokens at most", group=TEXT)
    show: str = flag("gate", help="what colours stand for", choices=("gate", "used", "weight"), group=VIEW)
    layers: str = flag("mean", help="layers with commas, as 0,14,29; or mean: over all layers", group=VIEW)
    slots: str | None = flag(None, help="adapters with commas, as lora_Q,p_adapter; default: all", group=VIEW)
    expert: int | None = flag(None, least=0, help="--show weight: of which expert, from 0", group=VIEW)
    save_path: str | None = flag(None, help="HTML file to write; replaced if it exists", group=VIEW)

    def __post_init__(self):
        if (self.prompt is None) == (self.data_path is None):
            raise ValueError("give one of --prompt and --data_path")
        if (self.data_path is None) != (self.row is None):
            raise ValueError("--data_path and --row go together")
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
        return np.linspace(self.low, self.high, round(self.high - self.low) + 1 if self.is_count else 11).tolist()

    def number(self, value: float) -> str:
        return f"{value:.0f}" if self.is_count else f"{value:.2f}"

    def colours(self, value: float) -> tuple[str, str]:
        """Background and text colour of a value, in hex."""
        return colours((value - self.low) / (self.high - self.low))


class TokenHeatmap(NamedTuple):
    """The texts of a row's tokens, how many of them are the prompt's, and views of them."""

    method: str
    tokens: list[str]
    prompt_len: int
    views: list[View]

    def parts(self) -> list[tuple[str, range]]:
        return [("prompt", range(self.prompt_len)), ("answer", range(self.prompt_len, len(self.tokens)))]


def main(argv: Sequence[str], prog: str) -> None:
    (flags, model_flags), _ = parse_into([Flags, ModelFlags], argv, prog=prog, description=__doc__)
    with cli_errors():
        row = {"instruction": flags.prompt, "input": ""}
        if flags.data_path is not None:
            rows = read_rows(flags.data_path, ("instruction", "input"))
            if flags.row > len(rows):
                raise ValueError(f"--row {flags.row}: {flags.data_path} has {len(rows)} rows")
            row = rows[flags.row - 1]
        with running(model_flags) as llm:
            heatmap = make_heatmap(flags, llm, row)
            if not is_rank0():
                return
            sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal has every sign
            print(terminal(heatmap, coloured=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
            if flags.save_path is not None:
                write_page(Path(flags.save_path), "token_heatmap.html.j2", heatmap=heatmap, one_line=one_line)
                print(f"wrote {flags.save_path}", file=sys.stderr)


def make_heatmap(flags: Flags, llm: Llama, row: dict[str, Any]) -> TokenHeatmap:
    """The row's tokens and views. ValueError naming a flag that asks for what this model does not have."""
    prompt = encode_prompt(llm.tokenizer, row, llm.max_seq_len - 1)
    if len(prompt) >= llm.max_seq_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens: no room for an answer within {llm.max_seq_len}")
    if flags.answer is None:
        (answer,) = llm.generate([prompt], flags.max_gen_len)
    else:
        answer = llm.tokenizer.encode(flags.answer)
    batches: list[RouterBatch] = []
    with RouterRecorder(llm.model, batches.append):
        read_answers(llm, [prompt], [answer])
    tokens = (prompt + answer)[: llm.max_seq_len]
    views = _views(flags, _numbers(flags, llm.model.config, batches[0]), len(tokens))
    return TokenHeatmap(llm.model.config.method, token_texts(llm.tokenizer, tokens), len(prompt), views)


def _numbers(flags: Flags, config: AdapterConfig, batch: RouterBatch) -> dict[str, dict[int, Tensor]]:
    """What --show asks for, (T,) or (1,), by slot and layer; how many adapters a block uses as slot "adapters"."""
    numbers: dict[str, dict[int, Tensor]] = {}
    of_block = flags.slots is None and any(key.kind == "gates" for key in batch.values)
    for (kind, layer, slot), values in batch.values.items():
        columns = {}
        if flags.show == "used" and kind == ("gates" if of_block else "experts"):
            columns = {slot or "adapters": (values > 0).sum(1)}
        elif flags.show == "gate" and kind == "gates":
            columns = {slot.name: values[:, i] for i, slot in enumerate(config.slots(layer))}
        elif flags.show == "weight" and kind == "experts" and flags.expert < values.shape[1]:
            columns = {slot: values[:, flags.expert]}
        for name, column in columns.items():
            numbers.setdefault(name, {})[layer] = column
    if not numbers:
        lacks = "no router of a block's adapters" if flags.show == "gate" else "no adapter with several experts"
        lacks = f"no adapter with an expert {flags.expert}" if flags.show == "weight" else lacks
        raise ValueError(f"--show {flags.show}: method {config.method} has {lacks}")
    return numbers


def _views(flags: Flags, numbers: dict[str, dict[int, Tensor]], n_tokens: int) -> list[View]:
    """A view of each slot and layer, or of each slot with means over the layers."""
    titles = {"gate": "gate of", "used": "experts used of", "weight": f"weight of expert {flags.expert} of"}
    views = []
    for slot in flags.slots.split(",") if flags.slots else numbers:
        if slot not in numbers:
            raise ValueError(f"--slots: {slot!r} is none of {', '.join(numbers)}")
        title = "adapters used" if slot == "adapters" else f"{titles[flags.show]} {slot}"
        by_layer, is_mean = numbers[slot], flags.layers == "mean"
        for layers in [list(by_layer)] if is_mean else [[int(layer)] for layer in flags.layers.split(",")]:
            if layers[0] not in by_layer:
                listed = ", ".join(map(str, by_layer))
                raise ValueError(f"--layers: layer {layers[0]} has no {slot} (it is in {listed})")
            values = torch.stack([by_layer[layer] for layer in layers]).double().mean(0)
            values = values.expand(n_tokens).tolist()  # a gate of the whole row is that of all its tokens
            low, high = 0, 1
            if flags.show == "used":  # means over layers lie close together
                low, high = math.floor(min(values)), max(math.ceil(max(values)), math.floor(min(values)) + 1)
            where = f"mean over {len(layers)} layers" if is_mean else f"layer {layers[0]}"
            views.append(View(f"{title}, {where}", values, low, high, flags.show == "used" and not is_mean))
    return views


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


def colours(share: float) -> tuple[str, str]:
    """Background colour of 0 to 1 on the scale, and white or black for the letters on it, in hex."""
    ends = np.linspace(0, 1, len(CIVIDIS))
    channels = zip(*map(bytes.fromhex, CIVIDIS), strict=True)
    back = bytes(round(np.interp(share, ends, channel)) for channel in channels)
    return back.hex(), "ffffff" if share < DARK else "000000"


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
        for name, tokens in heatmap.parts():
            text = ""
            for i in tokens:
                token, value = one_line(heatmap.tokens[i]), view.values[i]
                text += _on_colour(token, view, value) if coloured else f"{token}[{view.number(value)}]"
                text += "\n" * heatmap.tokens[i].count("\n")
            lines += [f"{name}:", text.rstrip("\n")]
        lines.append("")
    return "\n".join(lines)


def _on_colour(text: str, view: View, value: float) -> str:
    back, letters = (";".join(map(str, bytes.fromhex(colour))) for colour in view.colours(value))
    return f"\x1b[48;2;{back};38;2;{letters}m{text}\x1b[0m"
