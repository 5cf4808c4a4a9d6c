"""What finetune.py's command line comes to."""

import pytest

from llama.args import ModelArgs
from training.settings import read_settings

RECIPE = {"max_steps": 100, "lr": 2e-3, "batch_size": 8}
ARGS = ModelArgs(dim=8, n_layers=4, n_heads=2)


def settings(*argv):
    return read_settings(list(argv), RECIPE, "")


def test_the_recipe_fills_in_what_is_not_typed_and_only_for_the_demo():
    demo = settings("--batch_size", "2").train
    assert (demo.max_steps, demo.lr, demo.batch_size) == (100, 2e-3, 2)
    own = settings("--data_path", "x.json").train
    assert (own.max_steps, own.lr, own.batch_size) == (None, None, 4)


def test_a_typed_flag_is_not_undone_by_its_counterpart_in_the_recipe():
    typed = settings("--epochs", "1", "--blr", "0.1").train
    assert (typed.epochs, typed.max_steps, typed.blr, typed.lr) == (1.0, None, 0.1, None)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (("--threshold_gradient", "none"), "threshold_gradient", "none"),
        (("--const_threshold",), "const_threshold", True),
        (("--max_threshold", "0.3"), "max_threshold", 0.3),
        (("--lora_targets", "O,Q"), "lora_targets", "O,Q"),
        (("--lora_alpha", "4"), "lora_alpha", 4.0),
        (("--lora_layers", "0-1,3-4"), "lora_layers", "0-1,3-4"),
        (("--lora_rank", "3"), "lora_rank", 3),
        (("--p_adapter_layers", "1-2"), "p_adapter_layers", "1-2"),
        (("--p_adapter_size", "5"), "p_adapter_size", 5),
        (("--swi_x", "0"), "swi_x", 0),
    ],
)
def test_every_adapter_flag_reaches_the_configuration(words, name, value):
    config = settings("--method", "sparse_moa", *words).config(ARGS)
    assert config.flat()[name] == value
    assert settings("--method", "sparse_moa").config(ARGS).flat()[name] != value


def test_prompt_flags_reach_the_configuration():
    config = settings("--method", "prompt", "--prompt_layers", "2-4", "--prompt_len", "7").config(ARGS)
    assert (config.flat()["prompt_layers"], config.flat()["prompt_len"]) == ("2-4", 7)


@pytest.mark.parametrize("pair", [("--epochs", "--max_steps"), ("--lr", "--blr")])
def test_flags_that_exclude_each_other_are_refused(pair, capsys):
    with pytest.raises(SystemExit) as ended:
        settings(*(word for flag in pair for word in (flag, "1")))
    assert ended.value.code == 2 and all(flag in capsys.readouterr().err for flag in pair[:1])
