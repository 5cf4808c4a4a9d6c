"""One prompt and its answer, token by token, coloured by what a router said of each token.

    python -m inspection row --ckpt_dir DIR --adapter_path OUT/adapter.pth --prompt "How many ..." --slots lora_Q
    python -m inspection row ... --data_path test.json --row 7 --layers 0,14,29 --slots p_adapter --html row.html
    python -m inspection row ... --data_path test.json --row 7 --show used

The model answers the prompt (greedy), or reads the answer that --answer gives. --show gate: the gate of an adapter;
used: how many adapters of a block are on, or, of an adapter with several experts, how many of them; weight: that of
one expert (--expert). On a terminal tokens stand on a colour; elsewhere, and where NO_COLOR is set, the number stands
behind each. --html writes the same as a page of its own.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cli import cli_errors, flag, parse_into
from inspection.model import ModelFlags, running

TEXT, VIEW = "prompt and answer", "what is shown"


@dataclass(frozen=True)
class Flags:
    prompt: str | None = flag(None, help="an instruction", group=TEXT)
    data_path: str | None = flag(None, help="a file of test rows, in the place of --prompt", group=TEXT)
    row: int | None = flag(None, help="which of its rows, from 1", group=TEXT)
    answer: str | None = flag(None, help="the answer to read; default: the model's own", group=TEXT)
    max_gen_len: int = flag(200, help="new tokens at most", group=TEXT)
    show: str = flag("gate", help="what colours stand for", choices=("gate", "used", "weight"), group=VIEW)
    layers: str = flag("mean", help="layers with commas, as 0,14,29; or mean: over all layers", group=VIEW)
    slots: str | None = flag(None, help="adapters with commas, as lora_Q,p_adapter; default: all", group=VIEW)
    expert: int | None = flag(None, help="--show weight: of which expert, from 0", group=VIEW)
    html: str | None = flag(None, help="HTML file to write; one that is there is replaced", group=VIEW)

    def __post_init__(self):
        if (self.prompt is None) == (self.data_path is None):
            raise ValueError("give one of --prompt and --data_path")
        if (self.data_path is None) != (self.row is None):
            raise ValueError("--data_path and --row go together")
        for name in ("row", "max_gen_len"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if (self.show == "weight") != (self.expert is not None):
            raise ValueError("--expert and --show weight go together")
        layers = self.layers.split(",")
        if self.layers != "mean" and not all(layer.strip().isdigit() and len(layer) < 9 for layer in layers):
            raise ValueError(f"--layers must be mean, or numbers such as 0,14,29, not {self.layers!r}")
        if self.html is not None and (not self.html or Path(self.html).is_dir()):
            raise ValueError(f"--html {self.html!r} must be the path of a file")


class View(NamedTuple):
    """One number per token. least and most: the ends of the scale; whole: the numbers are counts."""

    title: str
    values: list[float]
    least: float
    most: float
    whole: bool

    def share(self, value: float) -> float:
        """Where on the scale a value is, 0 to 1."""
        return (value - self.least) / (self.most - self.least)

    def marks(self) -> list[float]:
        """Values that a legend shows."""
        steps = round(self.most - self.least) if self.whole else 10
        return [self.least + (self.most - self.least) * i / steps for i in range(steps + 1)]


class Look(NamedTuple):
    """A row that was looked at: the tokens' texts, how many of them are the prompt's, and the views of them."""

    method: str
    tokens: list[str]
    prompt_len: int
    views: list[View]


def main(argv: Sequence[str], prog: str) -> None:
    (flags, model_flags), _ = parse_into([Flags, ModelFlags], argv, prog=prog, description=__doc__)
    with cli_errors():
        from inspection.paint import page, terminal
        from llama.distributed import is_rank0
        from moa.files import atomic_write

        row = _row(flags)
        with running(model_flags) as llm:
            look = look_at(flags, llm, row)
            if not is_rank0():
                return
            coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal has every sign
            print(terminal(look, coloured))
            if flags.html is not None:
                Path(flags.html).parent.mkdir(parents=True, exist_ok=True)
                atomic_write(Path(flags.html), page(look).encode("utf-8", "backslashreplace"))
                print(f"wrote {flags.html}", file=sys.stderr)


def _row(flags: Flags) -> dict[str, Any]:
    from llama.data import read_rows

    if flags.data_path is None:
        return {"instruction": flags.prompt, "input": ""}
    rows = read_rows(flags.data_path, ("instruction", "input"))
    if flags.row > len(rows):
        raise ValueError(f"--row {flags.row}: {flags.data_path} has {len(rows)} rows")
    return rows[flags.row - 1]


def look_at(flags: Flags, llm: Any, row: dict[str, Any]) -> Look:
    """The row's tokens and views. ValueError naming a flag that asks for what this model does not have."""
    from inspection.gates import read_answers
    from inspection.hooks import Batch, Recorder
    from llama.data import encode_prompt

    wanted = _places(flags, llm.model)
    prompt = encode_prompt(llm.tokenizer, row, llm.max_seq_len - 1)
    if len(prompt) >= llm.max_seq_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens: no room for an answer within {llm.max_seq_len}")
    if flags.answer is None:
        (answer,) = llm.generate([prompt], flags.max_gen_len)
    else:
        answer = llm.tokenizer.encode(flags.answer)
    tokens = (prompt + answer)[: llm.max_seq_len]
    batches: list[Batch] = []
    with Recorder(llm.model, batches.append):
        read_answers(llm, [prompt], [answer])
    (batch,) = batches
    views = [_view(flags, batch, *place, len(tokens)) for place in wanted]
    return Look(llm.model.config.method, texts(llm.tokenizer, tokens), len(prompt), views)


class Place(NamedTuple):
    """What one view is of: the layers that it is the mean over, and the adapter (None: all of a block)."""

    layers: list[int]
    slot: str | None


def _places(flags: Flags, model: Any) -> list[Place]:
    """Of the views that are asked for, all of which the model has."""
    from inspection.hooks import mixtures

    config = model.config
    if config is None or not any(config.slots(layer) for layer in range(config.n_layers)):
        raise ValueError("--adapter_path: it has no adapter with a gate")
    experts = {(layer, slot) for layer, slot, _ in mixtures(model)}
    routed = {block.layer for block in model.layers if block.router is not None}
    gates = {(layer, slot.name) for layer in routed for slot in config.slots(layer)}
    by_block = flags.show == "used" and bool(gates) and flags.slots is None
    known = gates if flags.show == "gate" else experts
    if not known and not by_block:
        lacks = "no router of a block's adapters" if flags.show == "gate" else "no adapter with several experts"
        has = "--show used or weight" if experts else "--show gate or used without --slots"
        raise ValueError(f"--show {flags.show}: method {config.method} has {lacks}; try {has}")
    if flags.expert is not None and not 0 <= flags.expert < config.experts.expert_num:
        raise ValueError(f"--expert must be from 0 to {config.experts.expert_num - 1}, not {flags.expert}")
    slots = list(dict.fromkeys(s.name for layer in range(config.n_layers) for s in config.slots(layer)))
    slots = [slot for slot in slots if slot in {slot for _, slot in known}]
    for slot in flags.slots.split(",") if flags.slots else []:
        if slot not in slots:
            raise ValueError(f"--slots: {slot!r} is none of {', '.join(slots)}")
    chosen = flags.slots.split(",") if flags.slots else [None] if by_block else slots
    places = []
    for slot in chosen:
        layers = sorted(routed) if slot is None else sorted(layer for layer, other in known if other == slot)
        if flags.layers == "mean":
            places.append(Place(layers, slot))
            continue
        for layer in map(int, flags.layers.split(",")):
            if layer not in layers:
                what = "router" if slot is None else slot
                raise ValueError(f"--layers: layer {layer} has no {what} (it is in {', '.join(map(str, layers))})")
            places.append(Place([layer], slot))
    return places


def _view(flags: Flags, batch: Any, layers: list[int], slot: str | None, n_tokens: int) -> View:
    import torch

    found = []
    for layer in layers:
        if slot is None:
            values = torch.cat(list(batch.gates[layer].values()), 1) > 0
        elif flags.show == "gate":
            values = batch.gates[layer][slot]
        elif flags.show == "used":
            values = batch.experts[layer, slot] > 0
        else:
            values = batch.experts[layer, slot][:, flags.expert, None]
        found.append(values.double().sum(1).expand(n_tokens))  # a gate of the whole row is that of all its tokens
    most = max(len(batch.gates[layer]) if slot is None else 1 for layer in layers)
    if flags.show == "used" and slot is not None:
        most = batch.experts[layers[0], slot].shape[1]
    where = f"layer {layers[0]}" if flags.layers != "mean" else f"mean over {len(layers)} layers"
    what = {"gate": f"gate of {slot}", "weight": f"weight of expert {flags.expert} of {slot}"}
    used = "adapters used" if slot is None else f"experts of {slot} used"
    values = torch.stack(found).mean(0).tolist()
    whole, least = flags.show == "used" and len(layers) == 1, 0
    if flags.show == "used" and not whole:  # means over layers lie close together
        least = min(math.floor(min(values)), most - 1)
        most = max(math.ceil(max(values)), least + 1)
    return View(f"{what.get(flags.show, used)}, {where}", values, least, most, whole)


def texts(tokenizer: Any, tokens: list[int]) -> list[str]:
    """What each token says. Of tokens that share a character, the first has it, and the others nothing."""
    found, begin = [""] * len(tokens), 0
    for i, token in enumerate(tokens):
        alone = tokenizer.decode([token])
        if begin < i and "\ufffd" not in alone:  # what came before is no character
            found[begin], begin = tokenizer.decode(tokens[begin:i]), i
        text = tokenizer.decode(tokens[begin : i + 1])
        if "\ufffd" not in text or i - begin == 3 or i == len(tokens) - 1:  # no character has more than four bytes
            found[begin], begin = text, i + 1
    return found
