"""One prompt and its answer as an HTML page, token by token, each on the colour of what a router returned for it.

    python -m inspection row --ckpt_dir DIR --adapter_path RUN/adapter.pth --prompt "How many ..." --show lora_Q
    python -m inspection row ... --data_path test.json --row 7 --layers 0,14,29 --show p_adapter,used
    python -m inspection row ... --show lora_V/3

The model answers the prompt (greedy), or reads the answer that --answer gives. --show names what is shown: a slot, for
its adapter's gate; `used`, how many adapters of a block are on; SLOT/3, for the weight of an adapter's expert 3;
SLOT/used, how many of its experts are.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cli import cli_errors, flag, parse_into
from inspection import charts
from inspection.html import visible, write_page
from inspection.model import ModelFlags, running
from inspection.router_recorder import record, routers_of
from llama import Llama
from llama.data import encode_prompt
from llama.distributed import is_rank0
from moa.reading import read_rows

TEXT, VIEW = "prompt and answer", "what is shown"
USED = "used"
DARK = 0.465  # below this share of the scale white letters can be read better than black ones (WCAG 2)


@dataclass(frozen=True)
class Flags:
    prompt: str | None = flag(None, help="an instruction", group=TEXT)
    data_path: str | None = flag(None, help="a file of test rows, instead of --prompt", group=TEXT)
    row: int | None = flag(None, least=1, help="which of its rows, from 1", group=TEXT)
    answer: str | None = flag(None, help="the answer to read; default: the model's own", group=TEXT)
    max_gen_len: int = flag(200, least=1, help="new tokens at most", group=TEXT)
    show: str | None = flag(None, help="what colours stand for, with commas; default: all gates", group=VIEW)
    layers: str = flag("mean", help="layers with commas, as 0,14,29; or mean: over all layers", group=VIEW)
    save_path: str = flag("row.html", help="HTML file to write; replaced if it exists", group=VIEW)

    def __post_init__(self):
        if (self.prompt is None) == (self.data_path is None):
            raise ValueError("give one of --prompt and --data_path")
        if (self.data_path is None) != (self.row is None):
            raise ValueError("--data_path and --row go together")
        layers = self.layers.split(",")
        if self.layers != "mean" and not all(layer.strip().isdigit() and len(layer) < 9 for layer in layers):
            raise ValueError(f"--layers must be mean, or numbers such as 0,14,29, not {self.layers!r}")
        if not self.save_path or Path(self.save_path).is_dir():
            raise ValueError(f"--save_path {self.save_path!r} must be the path of a file")


class View(NamedTuple):
    """A number per token, on a scale from 0 to `high`."""

    title: str
    values: list[float]
    high: float

    def css(self, value: float) -> str:
        """Background and letters of a value: cividis, brighter as it grows, and the same for all colour vision."""
        import matplotlib

        red, green, blue, _ = matplotlib.colormaps["cividis"](value / self.high, bytes=True)
        letters = "ffffff" if value / self.high < DARK else "000000"
        return f"background:#{red:02x}{green:02x}{blue:02x};color:#{letters}"

    def marks(self) -> list[float]:
        """Values that a legend shows."""
        return [self.high * i / 10 for i in range(11)] if self.high == 1 else list(range(int(self.high) + 1))


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
    with cli_errors(), charts.styled():
        row = {"instruction": flags.prompt, "input": ""}
        if flags.data_path is not None:
            rows = read_rows(flags.data_path, ("instruction", "input"))
            if flags.row > len(rows):
                raise ValueError(f"--row {flags.row}: {flags.data_path} has {len(rows)} rows")
            row = rows[flags.row - 1]
        with running(model_flags) as llm:
            heatmap = make_heatmap(flags, llm, row)
            if is_rank0():
                write_page(Path(flags.save_path), "token_heatmap.html.j2", heatmap=heatmap, one_line=one_line)
                print(f"wrote {flags.save_path}")


def make_heatmap(flags: Flags, llm: Llama, row: dict[str, Any]) -> TokenHeatmap:
    """The row's tokens and views. ValueError naming a flag that asks for what this model does not have."""
    routers_of(llm.model)  # refuses a model without one before it answers
    prompt = encode_prompt(llm.tokenizer, row, llm.max_seq_len - 1)
    if len(prompt) >= llm.max_seq_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens: no room for an answer within {llm.max_seq_len}")
    if flags.answer is None:
        (answer,) = llm.generate([prompt], flags.max_gen_len)
    else:
        answer = llm.tokenizer.encode(flags.answer)
    tokens = (prompt + answer)[: llm.max_seq_len]
    views = make_views(flags, numbers_of(llm, prompt, answer), len(tokens))
    return TokenHeatmap(llm.model.config.method, token_texts(llm.tokenizer, tokens), len(prompt), views)


def numbers_of(llm: Llama, prompt: list[int], answer: list[int]) -> dict[str, dict[int, Tensor]]:
    """All that --show can name: numbers (T,), or (1,) of a whole row, by layer."""
    (recording,) = record(llm, [prompt], [answer])
    numbers: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, (names, _) in routers_of(llm.model).items():
        weights, prefix = recording.weights[key][:, : len(names)], f"{key.slot}/" if key.slot else ""
        for name, column in zip(names, weights.T, strict=True):
            numbers[prefix + name][key.layer] = column
        numbers[prefix + USED][key.layer] = (weights > 0).sum(1)
    return numbers


def make_views(flags: Flags, numbers: dict[str, dict[int, Tensor]], n_tokens: int) -> list[View]:
    """A view of each name and layer, or of each name with means over the layers."""
    default = [name for name in numbers if name.endswith(USED) == ("/" in name)]
    views = []
    for name in flags.show.split(",") if flags.show else default:
        if name not in numbers:
            raise ValueError(f"--show: {name!r} is none of {', '.join(numbers)}")
        by_layer, is_mean = numbers[name], flags.layers == "mean"
        for layers in [list(by_layer)] if is_mean else [[int(layer)] for layer in flags.layers.split(",")]:
            if layers[0] not in by_layer:
                listed = ", ".join(map(str, by_layer))
                raise ValueError(f"--layers: layer {layers[0]} has no {name} (it is in {listed})")
            values = torch.stack([by_layer[layer] for layer in layers]).double().mean(0)
            values = values.expand(n_tokens).tolist()  # a gate of the whole row is that of all its tokens
            where = f"mean over {len(layers)} layers" if is_mean else f"layer {layers[0]}"
            views.append(View(f"{name}, {where}", values, max(1, math.ceil(max(values)))))
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


def one_line(token: str) -> str:
    """A token's text with signs for the ends of lines and tabs, and other invisible characters spelt."""
    return visible(token.replace("\r", "").replace("\n", "\u21b5").replace("\t", "\u21e5"))
