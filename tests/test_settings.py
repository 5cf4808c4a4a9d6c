"""What finetune.py's command line comes to."""

import json

import pytest

from llama.args import ModelArgs
from moa.adapter_file import adapter_params
from tiny import BASE
from training.config import parse_flags

RECIPE = {"max_steps": 100, "lr": 2e-3, "batch_size": 8}
ARGS = ModelArgs(dim=8, n_layers=4, n_heads=2)


def settings(*argv):
    return parse_flags(list(argv), RECIPE, "")


def test_the_recipe_fills_in_what_is_not_typed_and_only_for_the_demo():
    demo = settings("--batch_size", "2").train
    assert (demo.max_steps, demo.lr, demo.batch_size) == (100, 2e-3, 2)
    own = settings("--data_path", "x.json").train
    assert (own.max_steps, own.lr, own.batch_size) == (None, None, 4)


def test_a_typed_flag_is_not_undone_by_its_counterpart_in_the_recipe():
    typed = settings("--epochs", "1", "--blr", "0.1").train
    assert (typed.epochs, typed.max_steps, typed.blr, typed.lr) == (1.0, None, 0.1, None)


@pytest.mark.parametrize(
    "words",
    [
        "--threshold_gradient none --max_threshold 0.3 --lora_targets O,Q --lora_alpha 4.0 --swi_x 0",
        "--const_threshold True --lora_layers 0-1,3-4 --lora_rank 3 --p_adapter_layers 1-2 --p_adapter_size 5",
        "--prompt_layers 2-4 --prompt_len 7",
    ],
)
def test_every_adapter_flag_reaches_the_configuration(words):
    flags, default = words.split(), settings("--method", "sparse_moa").adapter_config(ARGS).to_dict()
    config = settings("--method", "sparse_moa", *flags).adapter_config(ARGS).to_dict()
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        name = name.removeprefix("--")
        assert str(config[name]) == value != str(default[name]), name


def test_earlier_names_of_checkpointing_modes_are_taken():
    flag = "--activation_checkpointing"
    for values, mode in (("off False", "none"), ("ffn selective", "selective"), ("all True full", "full")):
        for value in values.split():
            assert settings(flag, value).train.activation_checkpointing == mode
    assert [settings(*argv).train.activation_checkpointing for argv in ([flag], [])] == ["full", "auto"]


WRONG = {
    "--lora_rnk 4": "unknown flag --lora_rnk; the nearest is --lora_rank",
    "--method sofd_moa": "got 'sofd_moa' (nearest: soft_moa)",
    "--lr fast": "--lr: expected a number or None, got 'fast'",
    "--batch_size 0": "--batch_size must be at least 1, not 0",
    "--batch_size all": "--batch_size: expected a whole number or auto, got 'all'",
    "--lora_targets Q,X": "lora_targets: 'X' is none of",
    "--lora_layers 3": "lora_layers: '3' is not a range",
    "--method lora --swi_x 2": "--swi_x has no effect with method lora",
    "--method lora --lora_layers 0-0": "no adapter",
    "--epochs 1 --max_steps 1": "--epochs and --max_steps exclude each other",
    "--lr 1 --blr 1": "--blr and --lr exclude each other",
    "--epochs 1e308": "--epochs 1e+308",
    "--seed 100000000000000000000": "--seed 100000000000000000000",
    "--device tpu": "--device must be auto, cpu, cuda or cuda:N, not 'tpu'",
    "--flash_attention2 --device cpu": "--flash_attention2 needs a GPU",
    "--lr 1e-3 --min_lr 1": "--min_lr 1.0 is above --lr 0.001",
    "--grad_clip 0": "--grad_clip must be above 0",
    "--beta2 1": "--beta2 must be from 0 to below 1, not 1.0",
    f"--ckpt_dir {BASE} --lora_layers 0-4": "lora_layers: '0-4' goes beyond the model's 3 layers",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_named(line, capsys):
    with pytest.raises(SystemExit) as ended:
        settings(*line.split())
    assert ended.value.code == 2 and WRONG[line] in capsys.readouterr().err


# A mixture of one's own

MIXTURE = {
    "block_router": "instance",
    "lora_layers": "0-2",
    "lora_targets": "V,O",
    "lora_rank": 3,
    "prompt_layers": "1-4",
}


def test_a_mixture_from_flags_and_from_a_file_are_the_same(tmp_path):
    typed = settings(
        "--method", "custom", *(word for k, v in MIXTURE.items() for word in (f"--{k}", str(v)))
    ).adapter_config(ARGS)
    file = tmp_path / "mixture.json"
    file.write_text(json.dumps(MIXTURE))
    read = settings("--adapter_config", str(file)).adapter_config(ARGS)
    assert read == typed and read.method == "custom" and read.block_router == "instance"
    assert [slot.name for slot in read.slots(1)] == ["lora_V", "prompt", "lora_O"]
    # What adapter_params.json holds is such a file
    file.write_text(json.dumps(adapter_params(read, {"dim": 99})))
    assert settings("--adapter_config", str(file)).adapter_config(ARGS) == read
    changed = settings("--adapter_config", str(file), "--lora_rank", "5").adapter_config(ARGS)
    assert changed.to_dict() == read.to_dict() | {"lora_rank": 5}


def test_a_file_of_sizes_goes_with_the_method_that_is_typed(tmp_path):
    file = tmp_path / "sizes.json"
    file.write_text('{"lora_rank": 2}')
    config = settings("--method", "molora", "--adapter_config", str(file)).adapter_config(ARGS)
    assert (config.method, config.adapters["lora"].rank, config.expert_num) == ("molora", 2, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"lora_rank": 4}', "method custom with these layers has no adapter"),
        ('{"method": "moa"}', "method 'moa' is none of soft_moa"),
        ('{"method": "lora", "lora_rnk": 4}', "unknown adapter setting lora_rnk (did you mean lora_rank?)"),
        ('{"method": "lora", "lora_rank": "4"}', "lora_rank must be of type int, not '4'"),
        ('{"method": "sparse_moa", "gate_activation": "softmax"}', "--gate_activation has no effect"),
        ('{"method": "lora", "swi_x": 2}', "--swi_x has no effect"),
        ('{"method": "prompt"}', "its method is prompt, not lora (--method)"),
    ],
)
def test_a_file_that_is_not_right_is_named(text, words, tmp_path, capsys):
    file = tmp_path / "mixture.json"
    if text is not None:
        file.write_text(text)
    typed = ("--method", "lora") if "not lora" in words else ()
    with pytest.raises(SystemExit) as ended:
        settings("--adapter_config", str(file), *typed)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith(f"error: {file}: ") and words in error


def test_a_file_with_layers_that_the_model_lacks_is_named(tmp_path, capsys):
    file = tmp_path / "mixture.json"
    file.write_text('{"method": "lora", "lora_layers": "0-5"}')
    with pytest.raises(SystemExit) as ended:
        settings("--adapter_config", str(file), "--ckpt_dir", str(BASE))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {file}: lora_layers: '0-5' goes beyond the model's 3 layers")
