"""The recipes of the published runs: what finetune.py and generate.py are called with, by method and data set.

python -m exps.recipe train METHOD DATASET PROCESSES [flags of finetune.py]     each prints words for a command line;
python -m exps.recipe generate DATASET [flags of generate.py]                   a flag that is given takes the place
python -m exps.recipe suites DATASET                                            of the recipe's
python -m exps.recipe methods                                                   those of the tables
python -m exps.recipe fingerprint [CKPT_DIR]                                    tells bases apart by their contents

What a method's preset holds already (ranks, targets, widths, experts) is not repeated here. Values are those of the
published runs; where a comment says "ours", no publication states them.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from cli import cli_errors, die, nearest
from demo import RECIPE as DEMO
from moa.methods import METHODS
from training.config import BATCH_SIZE

LARGEST_MICRO_BATCH = 8
LORA_MIXTURES = ("molora", "hydralora", "topk_moelora", "adamole")
PUBLISHED = (
    *("soft_moa", "sparse_moa", "soft_moa_instance", "unipeft", "lora", "prompt", "parallel_adapter"),
    *(*LORA_MIXTURES, "parallel_adapter_moe", "prompt_moe"),
)


@dataclass(frozen=True)
class Recipe:
    """What is done with a data set.

    train, generate: flags of finetune.py and generate.py. by_method: further ones of finetune.py, for some methods.
    suites: folders of the tests. rows: per optimizer step, over all processes.
    """

    train: Mapping[str, Any]
    generate: Mapping[str, Any]
    suites: tuple[str, ...]
    rows: int = 32
    by_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_COMMON = {"blr": 6e-3, "min_lr": 0, "weight_decay": 0.02, "epochs": 2, "warmup_epochs": 1}
_SAMPLING = {"temperature": 0.1, "top_p": 0.75}

MATH = Recipe(
    train=_COMMON | {"max_seq_len": 300},
    by_method={method: {"epochs": 1, "warmup_epochs": 0.4} for method in LORA_MIXTURES},
    # With 120 of 300 tokens kept free most AQuA prompts are cut, and a sixth of GSM8K's
    generate=_SAMPLING | {"max_seq_len": 300, "max_gen_len": 200, "min_gen_len": 120},
    suites=("AddSub", "AQuA", "gsm8k", "MultiArith", "SingleEq", "SVAMP"),
)
COMMONSENSE = Recipe(
    train=_COMMON | {"max_seq_len": 200},
    by_method={"soft_moa": {"swi_x": 0}, "soft_moa_instance": {"swi_x": 0}},  # the latter is ours
    generate=_SAMPLING | {"max_seq_len": 600, "max_gen_len": 40, "min_gen_len": 10},
    suites=("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Challenge", "ARC-Easy", "openbookqa"),
)
CODE = Recipe(
    train={
        **{"lr": 1e-4, "lr_schedule": "constant", "max_seq_len": 500, "weight_decay": 0, "beta2": 0.999},
        **{"grad_clip": 1, "train_on_input": True},
        "epochs": 1,  # ours: 1 and 5 are published
        "warmup_epochs": 0.16,  # ours: published as 200 steps; an epoch of CodeAlpaca-20k has 1,252
    },
    # Published for soft_moa; the others are ours
    by_method={method: {"prompt_layers": "0-0"} for method in ("soft_moa", "soft_moa_instance", "unipeft")},
    generate={
        **{"temperature": 0.7, "top_p": 0.95, "num_samples": 10, "max_gen_len": 400},
        **{"max_seq_len": 1536, "min_gen_len": 400},  # ours: room for the longest prompt beside the answer
    },
    suites=("humaneval", "mbpp"),
    rows=16,
)
RECIPES = {
    "math_14k": MATH,
    "gsm8k": MATH,  # ours: on other rows
    "commonsense_15k": COMMONSENSE,
    "commonsense_15k_mixed": COMMONSENSE,  # ours: on other rows
    "codealpaca": CODE,
    "demo": Recipe(  # ours
        train={name: value for name, value in DEMO.items() if name != "batch_size"},
        generate={"temperature": 0, "max_gen_len": 100},
        suites=("demo",),
        rows=DEMO["batch_size"],
    ),
}


def recipe_of(dataset: str) -> Recipe:
    """ValueError where there is none."""
    if dataset not in RECIPES:
        near = nearest(dataset, RECIPES)
        raise ValueError(f"no recipe for data set {dataset!r} (nearest: {near}); there are {', '.join(RECIPES)}")
    return RECIPES[dataset]


def train_flags(method: str, dataset: str, processes: int = 1, typed: Sequence[str] = ()) -> list[str]:
    """Words for finetune.py beside `typed`, the user's own: those flags of the recipe that `typed` leaves open, and
    micro-batches that make up the recipe's rows per step on so many processes. ValueError where they cannot."""
    recipe, given = recipe_of(dataset), _given(typed)
    if method not in METHODS:
        raise ValueError(f"no method {method!r} (nearest: {nearest(method, METHODS)}); there are {', '.join(METHODS)}")
    flags = {**recipe.train, **recipe.by_method.get(method, {})}
    for pair in ({"epochs", "max_steps"}, {"lr", "blr"}):  # finetune.py takes one of each
        chosen = pair & given.keys() or pair & recipe.train.keys()
        flags = {name: value for name, value in flags.items() if name not in pair or not chosen or name in chosen}
    return _words(flags | _batches(recipe.rows, processes, given), given)


def generate_flags(dataset: str, typed: Sequence[str] = ()) -> list[str]:
    """Words for generate.py beside `typed`."""
    return _words(recipe_of(dataset).generate, _given(typed))


def _batches(rows: int, processes: int, given: dict[str, str]) -> dict[str, int]:
    """batch_size and accum_iter, or the one of them that is not given."""
    names = ("model_parallel_size", "batch_size", "accum_iter")
    if given.get("batch_size") == "auto":
        given = given | {"batch_size": str(BATCH_SIZE)}
    shares = {name: _whole(f"--{name}", given[name]) for name in names if name in given}
    if {"batch_size", "accum_iter"} <= shares.keys():
        return {}
    parallel, batch, accum = (shares.get(name, 1) for name in names)
    rows_at_once = processes // parallel * batch * accum
    if rows_at_once < 1 or rows % rows_at_once:
        with_flags = "".join(f", --{name} {value}" for name, value in shares.items())
        raise ValueError(
            f"{rows} rows per step cannot be shared out evenly with {processes} processes{with_flags}; "
            "give both --batch_size and --accum_iter to have other steps"
        )
    left = rows // rows_at_once
    if "accum_iter" in shares:
        return {"batch_size": left}
    micro_batch = 1 if "batch_size" in shares else gcd(left, LARGEST_MICRO_BATCH)
    return {"batch_size": batch * micro_batch, "accum_iter": left // micro_batch}


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**31):
        raise ValueError(f"{name}: expected a whole number from 1, got {text!r}")
    return int(text)


def _given(typed: Sequence[str]) -> dict[str, str]:
    """Name -> value of the flags that were typed; the value is checked by the command that they are for."""
    given = {}
    for i, word in enumerate(typed):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name] = value if equals or i + 1 == len(typed) else typed[i + 1]
    return given


def _words(flags: dict[str, Any], given: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() if name not in given for word in (f"--{name}", str(value))]


def main(argv: list[str]) -> None:
    with cli_errors(status=2):
        match argv:
            case ["train", method, dataset, processes, *typed]:
                print(*train_flags(method, dataset, _whole("NPROC", processes), typed))
            case ["generate", dataset, *typed]:
                print(*generate_flags(dataset, typed))
            case ["suites", dataset]:
                print(*recipe_of(dataset).suites)
            case ["fingerprint", *ckpt_dirs]:
                from demo.model import ensure_model
                from llama.checkpoint import fingerprint  # loads torch, which the others need not wait for

                print(*map(fingerprint, ckpt_dirs or [ensure_model()]))
            case ["methods"]:
                print(*PUBLISHED)
            case _:
                die(str(__doc__), status=2)


if __name__ == "__main__":
    main(sys.argv[1:])
