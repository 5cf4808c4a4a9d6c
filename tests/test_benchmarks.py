"""Measurements run, and compare like with like: their figures are nobody's concern here, but for what is computed."""

import importlib
import io
import json
import multiprocessing
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, skipping
from benchmarks.decoding import decode_clock
from benchmarks.flags import ALL, methods_named
from benchmarks.floors import Work, generation_work, pairs, step_work
from benchmarks.generators import Task, agreement, theirs
from benchmarks.machine import Machine, measure_machine
from benchmarks.measure import apart, in_turn, ratio
from benchmarks.models import config_of, generator_of, on_base, random_base
from benchmarks.peers import copied_bytes, lora_on, transformers_on
from benchmarks.rows import LENGTHS, drawn_rows
from benchmarks.shapes import TINY
from benchmarks.steps import padded_step, step_of
from commands import run, write_rows
from cuda_graphs import stand_in
from llama import ModelArgs
from llama.data import IGNORE_INDEX
from llama.distributed import init_distributed
from llama.packing import PackedBatch
from llama.tokenizer import Tokenizer
from tiny import BASE, METHODS, build, save, shared, tokens

Run = Callable[..., tuple[dict[str, Any], str]]
MACHINE = Machine({"float32": 1e11}, 1e11)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs `python -m benchmarks.NAME FLAGS --json FILE` in this process, with those that it starts, on a machine that
    need not be measured -> what the file holds, and what was printed."""

    def call(module: str, words: list[object]) -> str:
        with redirect_stdout(io.StringIO()) as said:
            importlib.import_module(module).main([str(word) for word in words])
        return said.getvalue().splitlines()[-1]

    def of(name: str, *words: object) -> tuple[dict[str, Any], str]:
        module, figures = importlib.import_module(f"benchmarks.{name}"), tmp_path / "figures.json"
        for patched, by in (("own_process", call), ("measure_machine", lambda *_: MACHINE)):
            if hasattr(module, patched):
                monkeypatch.setattr(module, patched, by)
        module.main([*map(str, words), "--json", str(figures)])
        return json.loads(figures.read_text()), capsys.readouterr().out

    init_distributed(torch.device("cpu"))
    return of


def table_rows(printed: str) -> list[list[str]]:
    """Cells of the tables' lines, without the heads."""
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    heads = ("step of", "answers of", "method", "loaded", "matrix")
    return [line for line in lines if line[0].removeprefix("| ") not in heads]


def test_leaving_tokens_out_is_measured_on_the_same_task(command) -> None:
    found, printed = command("skipping", "--width", "8,24", "--tokens", 20, "--repeats", 1, "--rank", 2)
    assert list(found["seconds"]) == ["8", "24"] and len(found["seconds"]["8"]) == 1 + len(skipping.SHARES)
    assert [line[0] for line in table_rows(printed)][1:] == ["| 8", "| 24"]
    u, a, b = torch.randn(6, 4), torch.randn(2, 4), torch.randn(2, 4)
    gate = torch.tensor([[0.5], [0], [0.2], [0], [0], [1.0]])
    for_all, chosen = skipping.for_all(torch.ones(6, 4), u, a, b, gate), torch.tensor([0, 2, 5])
    torch.testing.assert_close(skipping.for_some(torch.ones(6, 4), u, a, b, gate, chosen), for_all)


def test_a_step_is_measured_beside_pefts_on_the_same_task(tmp_path) -> None:
    """Equal first losses are required by the command itself: PEFT's model has our weights and our labels."""
    data, figures = write_rows(tmp_path / "rows.json", 8), tmp_path / "figures.json"
    words = ["--ckpt_dir", BASE, "--data_path", data, "--methods", "soft_moa", "--rows", 2, "--repeats", 2, "--peft"]
    result = run("-m", "benchmarks.step", *words, "--threads", 1, "--json", figures)
    assert result.returncode == 0, result.stderr
    found = json.loads(figures.read_text())
    for figure in ("seconds", "memory", "floor"):
        assert list(found[figure]) == ["base", "soft_moa", "PEFT lora"]
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert all(found["floor"]["base"][i] < found["floor"]["soft_moa"][i] for i in range(2))
    assert found["labels"] < found["tokens"] and all(found["memory"].values())
    assert found["machine"]["bandwidth"] > 0
    assert len(table_rows(result.stdout)) == 3


def test_generation_is_measured_beside_its_peers_on_the_same_task(tmp_path: Path, command: Run) -> None:
    """Transformers and PEFT, on our weights, answer token by token as our base does: padding is masked."""
    data = write_rows(tmp_path / "rows.json", 12)
    words = ["--ckpt_dir", BASE, "--data_path", data, "--methods", "lora", "--prompts", 12, "--new_tokens", 36]
    found, printed = command("generation", *words, "--peft", "--repeats", 1, "--threads", 1, "--bf16", "False")
    assert list(found["kinds"]) == ["base", "lora", "transformers", "PEFT lora"]
    assert len(set(found["task"]["prompts"])) > 1, "no padding to be tested"
    for figures in found["kinds"].values():
        assert figures["same_tokens"] == {"first": 1.0, "all": 1.0}
        assert figures["tokens"] == 12 * 36 and len(figures["seconds"]) == len(figures["decode_step"]) == 1
        assert figures["peak_memory_bytes"] > figures["memory_floor_bytes"] > 0
        assert figures["floor"] > figures["decode_step_floor"] > 0
    assert found["kinds"]["base"]["floor"] < found["kinds"]["lora"]["floor"] == found["kinds"]["PEFT lora"]["floor"]
    assert len(table_rows(printed)) == 4


def test_trained_adapters_answer_to_their_own_end(tmp_path: Path, command: Run, monkeypatch) -> None:
    """PEFT gets the same LoRA as we have, and gives the same answers, whatever rows shared its batch."""
    real = Tokenizer.__init__

    def with_more_stops(self: Tokenizer, *words: Any) -> None:
        real(self, *words)
        self.stop_ids = tuple(range(0, 512, 7))  # or random weights would hardly ever stop

    monkeypatch.setattr(Tokenizer, "__init__", with_more_stops)
    data = write_rows(tmp_path / "rows.json", 7)
    paths = [save(build(name), tmp_path / name) for name in ("soft_moa", "lora")]
    words = ["--ckpt_dir", BASE, "--data_path", data, "--adapter_path", f"{paths[0]},{paths[1].parent}", "--peft"]
    words += ["--natural_stops", "--prompts", 7, "--batch_size", 3, "--max_gen_len", 12]
    found, _ = command("generation", *words, "--repeats", 1, "--threads", 1, "--bf16", "False")
    kinds = found["kinds"]
    assert list(kinds) == ["base", "soft_moa, trained", "lora, trained", "transformers", "PEFT lora"]
    assert kinds["PEFT lora"]["same_tokens"] == kinds["transformers"]["same_tokens"] == {"first": 1.0, "all": 1.0}
    assert 7 < kinds["PEFT lora"]["tokens"] == kinds["lora, trained"]["tokens"] < 7 * 12
    assert kinds["base"]["decode_step"] == [] and found["task"]["min_new_tokens"] == 0


def test_too_few_rows_and_a_second_adapter_of_a_method_are_refused(tmp_path: Path, command: Run, capsys) -> None:
    data, path = write_rows(tmp_path / "rows.json", 2), save(build("lora"), tmp_path / "lora")
    words = ["--ckpt_dir", BASE, "--data_path", data]
    for more, told in (
        (["--prompts", 3], "3 prompts are wanted, there are 2 rows"),
        (["--prompts", 1, "--adapter_path", f"{path},{path}"], "second adapter of method lora"),
    ):
        with pytest.raises(SystemExit):
            command("generation", *words, *more)
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generation", "--batch_size", 3], "--batch_size has no effect without --natural_stops"),
        (["generation", "--natural_stops", "--new_tokens", 20], "--new_tokens has no effect with --natural_stops"),
        (["load", "--only", "transformers"], "--hf_dir belongs to --only transformers"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(command: Run, capsys, words: list, told: str) -> None:
    with pytest.raises(SystemExit) as ended:
        command(*words)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_products_are_measured_by_the_ways_of_making_them(command: Run, capsys) -> None:
    found, printed = command("products", "--shapes", "24x16,8x40", "--rows", "1,3", "--repeats", 2)
    for shape in ("24x16", "8x40"):
        seconds = found["shapes"][shape]["seconds"]
        assert found["shapes"][shape]["made"] > 0 and list(seconds) == ["1", "3"]
        assert all(len(times) == 2 and min(times) > 0 for ways in seconds.values() for times in ways.values())
        assert list(seconds["1"]) == ["plain", "frozen", "copy"]
    assert len(table_rows(printed)) == 4
    for words in (["--rows", "2,x"], ["--shapes", "24"]):
        with pytest.raises(SystemExit):
            command("products", *words)
        assert words[0] in capsys.readouterr().err


def test_no_recording_falls_into_the_measured_steps() -> None:
    with pytest.raises(ValueError, match="tokens 121 to 156 of a row do not lie within 128"):
        decode_clock(shared("lora").model, 2, 120, 4, cuda_graphs=True)


def test_agreement_counts_first_tokens_and_all() -> None:
    assert agreement([[1, 2], [3]], [[1, 3], [3]]) == {"first": 1.0, "all": 2 / 3}
    assert agreement([[1, 2], []], [[4, 2, 5], [6]]) == {"first": 0.0, "all": 1 / 4}


def test_loading_is_measured_beside_from_pretrained(command: Run) -> None:
    found, printed = command("load", "--ckpt_dir", BASE, "--repeats", 1, "--threads", 1)
    measures = [f"{what}_{when}" for when in ("loaded", "used") for what in ("resident", "own")]
    for kind in ("ours", "transformers"):
        assert {*found["runs"][kind][0]} == {"seconds", "first_logits", *measures}
        assert found["runs"][kind][0]["seconds"] > 0
    assert [row[0] for row in table_rows(printed)] == ["| ours", "| transformers"]


def test_growth_has_a_table_per_axis(command: Run) -> None:
    axes = "length,experts,decode_rows"
    found, printed = command("growth", "--shape", "tiny", "--repeats", 1, "--threads", 1, "--axes", axes)
    assert list(found["axes"]) == axes.split(",")
    for axis, entries in found["axes"].items():
        assert len(entries) >= 4 and f"| {axis} | " in printed
        floors = [entry["floor"] for entry in entries.values()]
        assert floors == sorted(floors) and len(set(floors)) == len(floors)
        kept = [entry["kept_bytes"] for entry in entries.values() if "kept_bytes" in entry]
        assert kept == sorted(kept) and bool(kept) == (not axis.startswith("decode"))


def test_kinds_are_measured_in_turn_forwards_and_backwards() -> None:
    done: list[tuple[str, int]] = []
    works = {kind: lambda x, kind=kind: done.append((kind, x)) for kind in "abc"}
    seconds = in_turn(works, [1, 2, 3])
    assert done == [(kind, x) for x, order in ((1, "abc"), (2, "cba"), (3, "abc")) for kind in order]
    assert list(seconds) == ["a", "b", "c"] and all(len(times) == 3 for times in seconds.values())
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3


def _reciprocal(n: float) -> Callable[[float], float]:
    return lambda x: n / x


def _of_nothing() -> Callable[[float], float]:
    raise OSError("no such thing")


def test_work_apart_is_done_in_another_process_and_says_what_failed() -> None:
    with apart(partial(_reciprocal, 6.0), 1) as work:
        assert work(3.0) == 2.0 and work(2.0) == 3.0
        assert len(multiprocessing.active_children()) == 1
        with pytest.raises(ValueError, match="failed: ZeroDivisionError"):
            work(0.0)
        with pytest.raises(ValueError, match="ended with status"):
            work(1.0)
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match="failed: OSError: no such thing"), apart(_of_nothing, 1):
        pass


def test_cost_has_all_that_the_figure_needs(tmp_path: Path, command: Run) -> None:
    data = write_rows(tmp_path / "rows.json", 8)
    words = ["--ckpt_dir", BASE, "--data_path", data, "--test_path", data, "--rows", 2, "--repeats", 2, "--threads", 1]
    found, printed = command(
        "cost", *words, "--batch_size", 3, "--new_tokens", 4, "--methods", "lora,soft_moa", "--peft"
    )
    assert list(found["methods"]) == ["lora", "soft_moa"] and list(found["peers"]) == ["PEFT lora"]
    for figures in (*found["methods"].values(), *found["peers"].values(), found["base"]):
        for name in ("seconds_per_step", "seconds_per_epoch", "peak_memory_bytes", "seconds_per_answer"):
            assert figures[name] > 0
    assert found["base"]["trainable"] == 0
    assert found["base"]["step_over_base"] == found["base"]["answer_over_base"] == 1
    assert all(0 < one[f"{what}_over_base"] != 1 for one in found["methods"].values() for what in ("step", "answer"))
    assert found["peers"]["PEFT lora"]["trainable"] == found["methods"]["lora"]["trainable"] == 35_328
    assert found["task"]["training_rows"] == 8 and found["task"]["new_tokens"] == 4
    assert len(table_rows(printed)) == 4


def test_counting_gates_is_measured_beside_not_counting(tmp_path: Path, command: Run) -> None:
    data = write_rows(tmp_path / "rows.json", 3)
    words = ["--ckpt_dir", BASE, "--data_path", data, "--prompts", 3, "--new_tokens", 3, "--repeats", 2, "--threads", 1]
    found, printed = command("hooks", *words, "--methods", "soft_moa,adamole")
    assert list(found["seconds"]) == ["soft_moa", "adamole"] and len(table_rows(printed)) == 2
    assert all(len(times) == 2 and min(times) > 0 for of in found["seconds"].values() for times in of.values())


GPU_FLAGS = ["--shape", "tiny", "--device", "cpu", "--rows", 2, "--decode_rows", "1,3", "--context", 5]
GPU_FLAGS += ["--repeats", 1, "--decode_steps", 3]


def test_the_gpus_command_runs_without_one(command: Run) -> None:
    found, printed = command("gpu", *GPU_FLAGS, "--peers")
    assert not found["failed"] and found["task"]["transformers"] and found["task"]["peft"]
    for kind in ("soft_moa", "base"):
        for choice in ("off", "ffn", "all"):
            part = found[f"training, {kind}, {choice}"]
            assert part["gsm8k"]["tokens_per_second"] > 0 and part["full"]["tokens"] == [600]
        assert all(found[f"decoding, {kind}, {n}"]["floor"] > 0 for n in (1, 3))
        for trace in (f"trace of a step, {kind}", f"trace of decoding, {kind}"):
            top = found[trace]["top"]
            assert top[0]["share"] >= top[-1]["share"] > 0 and sum(k["share"] for k in top) <= 1 + 1e-9
            assert f"{trace}: " in printed
    assert "| soft_moa, off | gsm8k | " in printed and "| base | 3 | " in printed
    for choice in ("off", "all"):
        part, ours = (found[f"training, {kind}, {choice}"] for kind in ("PEFT lora", "soft_moa"))
        for data in ("gsm8k", "commonsense"):
            assert part[data]["tokens_per_second"] > 0 and part[data]["tokens"] == ours[data]["tokens"]
            assert part[data]["floor"][0] < ours[data]["floor"][0]
        assert part["full"]["tokens"] == [600] and f"| PEFT lora, {choice} | commonsense | " in printed
    for n in (1, 3):
        kinds = ("base", "transformers", "PEFT lora", "soft_moa")
        floors = [found[f"decoding, {kind}, {n}"]["floor"] for kind in kinds]
        assert floors[0] == floors[1] < floors[2] < floors[3]
        assert all(f"| {kind} | {n} | " in printed for kind in kinds)


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_the_gpus_command_refuses_peers_that_are_missing(command: Run, monkeypatch, capsys, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(gpu.Bench, "part", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(SystemExit) as ended:
        command("gpu", *GPU_FLAGS, "--peers")
    assert ended.value.code == 1 and f"error: {package} is not installed" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scaled() -> tuple[ModelArgs, dict[str, Tensor]]:
    """The tiny shape with LLaMA-3.1's angles, and weights so large that it matters what attention looks at."""
    args = ModelArgs(**TINY, use_scaled_rope=True)
    base = random_base(args, torch.float32, torch.device("cpu"))
    return args, {key: 8 * weight if weight.dim() > 1 else weight for key, weight in base.items()}


def test_a_peer_shares_our_weights(scaled: tuple[ModelArgs, dict[str, Tensor]]) -> None:
    args, base = scaled
    ours = {weight.data_ptr() for weight in base.values()}
    weights = list(transformers_on(args, base).parameters())
    copies = [weight for weight in weights if weight.data_ptr() not in ours]
    assert len(weights) == len(base) and len(copies) == 2 * args.n_layers
    assert sum(weight.nbytes for weight in copies) == copied_bytes(base)


def test_pefts_first_loss_is_our_loras(scaled: tuple[ModelArgs, dict[str, Tensor]]) -> None:
    """B is 0 in both, whatever A is. Gradients are the same where blocks are worked out again."""
    args, base = scaled
    rows = drawn_rows(3, "gsm8k", 150, args.vocab_size)
    assert len({len(row.tokens) for row in rows}) > 1, "no padding to be tested"
    loss = step_of(on_base(args, base, config_of("lora", args.n_layers)))(rows)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model, passes = lora_on(transformers_on(args, base), recompute=recompute), []
        block = model.get_submodule("base_model.model.model.layers.0.mlp")
        block.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        assert padded_step(model)(rows) == pytest.approx(loss, rel=1e-5)
        assert len(passes) == 1 + recompute
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(p.dtype == torch.float32 and "lora_" in name for name, p in trained.items())
        gradients.append({name: p.grad for name, p in trained.items()})
    assert all(gradient.any() for name, gradient in gradients[0].items() if "lora_B" in name)
    torch.testing.assert_close(*gradients)


def test_peers_answer_as_our_base_does(scaled: tuple[ModelArgs, dict[str, Tensor]]) -> None:
    args, base = scaled
    prompts = [row.tokens for row in drawn_rows(3, "commonsense", 150, args.vocab_size)]
    task = Task(prompts, 12, 12, 3)
    answers = generator_of(on_base(args, base, None), 200, 3).generate(prompts, 12, 12)
    assert len(set(map(tuple, answers))) == 3 and len(set(answers[0])) > 3
    for model in (transformers_on(args, base), lora_on(transformers_on(args, base))):
        assert theirs(model, [0])(task) == answers


def test_decoding_with_graphs_is_measured_beside_the_other(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = stand_in(monkeypatch)
    monkeypatch.setattr(gpu.Bench, "ways", [gpu.DECODING, gpu.WITH_GRAPHS])
    found, printed = command("gpu", *GPU_FLAGS)
    assert not found["failed"] and sum(graph.replays for graph in graphs) > len(graphs) > 3
    assert all(
        len(found[f"decoding with graphs, {kind}, {n}"]["seconds"]) == 1
        for kind in ("soft_moa", "base")
        for n in (1, 3)
    )
    assert "| soft_moa with graphs | 3 | " in printed and "trace of decoding with graphs, base: " in printed


def test_a_part_that_fails_on_the_gpu_leaves_the_others(tmp_path, command: Run, monkeypatch, capsys) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: so it goes\nat length")

    monkeypatch.setattr(gpu.Bench, "decoding", broken)
    with pytest.raises(SystemExit) as ended:
        command("gpu", *GPU_FLAGS)
    assert ended.value.code == 1 and "CUDA error" in capsys.readouterr().err
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["failed"]["decoding, soft_moa, 3"] == "RuntimeError: CUDA error: so it goes"
    assert "trace of decoding, base" in found and "training, soft_moa, off" in found


def test_methods_by_name() -> None:
    assert methods_named("all") == ALL and len(ALL) == 13 and methods_named("") == []
    for text in ("lora,", "custom", "lora,lora"):
        with pytest.raises(ValueError, match="--methods"):
            methods_named(text)


@pytest.mark.parametrize("data", LENGTHS)
def test_rows_are_drawn_as_the_data_has_them(data: str) -> None:
    rows = drawn_rows(400, data, 300, 512)
    assert rows == drawn_rows(400, data, 300, 512) != drawn_rows(400, data, 300, 512, seed=1)
    prompts, lengths = sorted(row.prompt_len for row in rows), [len(row.tokens) for row in rows]
    assert max(lengths) <= 300 and abs(prompts[200] - LENGTHS[data][0][5]) < 6  # the median
    for row in rows[:20]:
        assert row.labels == [IGNORE_INDEX] * row.prompt_len + row.tokens[row.prompt_len :]


def count_in_place(out: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def counter() -> FlopCounterMode:
    """Counts products, those that add to a tensor in its place included."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: count_in_place})


def require_counted(counted: FlopCounterMode, *works: Work, slack: float = 0.0) -> None:
    """All products but attention's, own and to prompts, are counted. Of those torch's counter sees none where a CPU's
    kernel does them, and where matrix products do, upper triangles and other rows' length too."""
    attention = sum(part.get("attention", 0) for work in works for part in (work.forward, work.backward))
    prompts = sum(part.get("prompt", 0) for work in works for part in (work.forward, work.backward))
    total, found = sum(work.flops for work in works), counted.get_total_flops()
    assert total - attention - prompts <= found <= (total + 2 * attention) * (1 + slack)
    assert attention < 0.025 * total and prompts < 0.15 * total, "the check would be a loose one"


@pytest.mark.parametrize("name", [None, *METHODS])
def test_a_steps_products_are_those_that_torch_counts(name: str | None) -> None:
    """But for one product that stands for a sum, where parallel adapters have no gate."""
    model, lengths = build(name).model.train(), [3, 2, 4]
    if name is None:
        model.tok_embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    row = tokens(sum(lengths))
    with counter() as counted:
        losses = model.losses(row, row.clone(), PackedBatch(lengths, "cpu", [2, 1, 2]))
        (losses.labels + losses.auxiliary).backward()
    work = step_work(model, lengths, sum(lengths) - len(lengths))
    require_counted(counted, work, slack=0.0025 if name == "parallel_adapter" else 0.0)


@pytest.mark.parametrize("name", [None, "lora", "soft_moa", "soft_moa_instance", "molora"])
def test_an_answers_products_are_those_that_torch_counts(name: str | None) -> None:
    llm, prompts = build(name), [[1] * 5, [2] * 9, [3] * 4]
    llm.model.requires_grad_(False)  # or the counter hangs itself on inference's tensors
    with counter() as counted:
        answers = llm.generate(prompts, 6, 6)
    work = generation_work(llm.model, [len(p) for p in prompts], [len(a) for a in answers], 3)
    require_counted(counted, *work)


def test_attention_counts_each_tokens_earlier_ones_alone() -> None:
    n, n_heads, width = 7, 4, 16
    q = torch.randn(1, n_heads, n, width, requires_grad=True)
    with counter() as counted, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    model = shared(None).model.train()
    work = step_work(model, [n], 1)
    model.eval()
    whole = counted.get_total_flops() * model.args.n_layers  # the upper triangle included
    assert (work.forward["attention"] + work.backward["attention"]) * n * n == whole * pairs([n])


def test_the_floor_is_the_slower_of_products_and_bytes() -> None:
    work = Work({"wq": 3 * 10**12}, {"wq": 10**12}, 10**10)
    assert work.seconds(Machine({"float32": 1e12}, 1e10)) == 4.0
    assert work.seconds(Machine({"float32": 1e12, "bfloat16": 8e12}, 1e10)) == 1.0


def test_a_decode_step_reads_all_weights_and_the_keys_and_values_of_its_rows() -> None:
    args = ModelArgs(**TINY)
    model = on_base(args, random_base(args, torch.float32, torch.device("cpu")), config_of("lora", args.n_layers))
    prefill, decode = generation_work(model, [10, 20], [1, 4], 2)
    read = sum(p.numel() for name, p in model.named_parameters() if "embeddings" not in name)
    kv = 2 * args.n_layers * args.n_kv_heads * args.head_dim
    assert prefill.bytes == 4 * read
    assert decode.bytes == 4 * (3 * read + kv * (21 + 22 + 23))  # the first token of each came from the prefill
    assert decode_clock(model, 2, 3, 2)() != 0


def test_a_machine_can_do_something() -> None:
    found = measure_machine(repeats=1)
    assert found.flops["float32"] > 1e8 and found.bandwidth > 1e7 and "GB/s" in str(found)
