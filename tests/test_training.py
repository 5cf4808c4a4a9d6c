"""The fine-tuning loop in one process: schedule, steps, checkpoints, resuming, estimates."""

import errno
import json
import math
import os
from functools import partial

import pytest
import torch

import tiny
import training.loop
from llama.data import IGNORE_INDEX, Example
from llama.model import Transformer
from llama.packing import PackedBatch, balance_by_length
from moa.files import load_tensors, write_torch
from moa.state import adapter_parameters, adapter_state_dict, optimizer_groups
from training.checkpoint import load_state_dict, read, save, state_dict
from training.config import TrainConfig
from training.data import load_examples, micro_batches
from training.loop import NonFiniteLoss, TrainState, make_optimizer, train
from training.recorder import RunLog
from training.schedule import Schedule


def plan(n_rows=10, rows_per_step=4, min_lr=1e-5, **flags):
    return Schedule.from_config(TrainConfig(min_lr=min_lr, batch_size=rows_per_step, **flags), n_rows)


def test_learning_rate_follows_the_published_schedule():
    p = plan(n_rows=320, rows_per_step=32)  # 10 steps an epoch, 2 epochs, 1 of warm-up
    assert (p.steps, p.warmup_steps, p.lr) == (20, 10, 6e-3 * 32 / 256)
    rates = [p.learning_rate(step) for step in range(20)]
    assert rates[:10] == pytest.approx([p.lr * (i + 1) / 10 for i in range(10)])
    assert rates[10:] == pytest.approx(
        [1e-5 + (p.lr - 1e-5) * 0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    )
    flat = plan(n_rows=320, rows_per_step=32, warmup_epochs=0.4, min_lr=0.0, lr_schedule="constant")
    long = plan(n_rows=320, rows_per_step=32, warmup_epochs=4)  # the slope asked for, beyond the end
    assert [long.learning_rate(i) for i in range(20)] == pytest.approx([long.lr * (i + 1) / 40 for i in range(20)])
    assert flat.warmup_steps == 4 and {flat.learning_rate(step) for step in range(4, 20)} == {flat.lr}


def test_every_epoch_is_a_new_order_of_all_rows():
    p = plan()
    epochs = [[row for step in range(e * 3, e * 3 + 3) for row in p.rows(step, seed=1)] for e in range(2)]
    assert [sorted(rows) for rows in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1] and p.rows(0, seed=2) != p.rows(0, seed=1)
    assert [len(p.rows(step, 1)) for step in range(3)] == [4, 4, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 5, 8, 32])
def test_rows_are_shared_out_in_equal_numbers_and_about_equal_tokens(n, ranks):
    lengths = torch.randint(60, 301, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    shares = balance_by_length(lengths, ranks)
    assert sorted(i for share in shares for i in share) == list(range(n))
    assert all(share == sorted(share) for share in shares)
    counts, tokens = [len(share) for share in shares], [sum(lengths[i] for i in share) for share in shares]
    assert len(shares) == ranks and max(counts) - min(counts) == (n % ranks > 0)
    if n % ranks == 0:  # no further apart than what a round can leave
        assert max(tokens) - min(tokens) <= max(lengths) - min(lengths)


@pytest.mark.parametrize(
    ("n", "batch_size", "count", "sizes"),
    [
        (8, 4, None, [4, 4]),
        (5, 4, None, [4, 1]),
        (5, 4, 2, [4, 1]),
        (4, 4, 2, [3, 1]),
        (3, 1, 3, [1, 1, 1]),
        (1, 4, 2, [1]),
        (0, 4, 1, []),
    ],
)
def test_micro_batches_hold_rows_in_their_order(n, batch_size, count, sizes):
    rows = examples(n)
    packed = list(micro_batches(rows, batch_size, torch.device("cpu"), count))
    assert [len(batch.lengths) for _, _, batch in packed] == sizes
    assert [t for tokens, _, _ in packed for t in tokens.tolist()] == [t for row in rows for t in row.tokens]
    assert [t for _, labels, _ in packed for t in labels.tolist()] == [t for row in rows for t in row.labels]
    assert [n for _, _, batch in packed for n in batch.prompt_lens] == [row.prompt_len for row in rows]


def examples(n=8, seed=0):
    """Rows of unequal lengths and label counts."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        tokens = torch.randint(0, 256, (6 + 3 * (i % 4),), generator=generator).tolist()
        prompt = 2 + i % 3
        made.append(Example(tokens, [IGNORE_INDEX] * prompt + tokens[prompt:], prompt))
    return made


def trained(method="soft_moa", batch_size=2, done=0, steps=3, state=None, rows=None, lr=0.01, on_step=None):
    llm = tiny.build(method, seed=3)
    optimizer = make_optimizer(llm.model, 0.02)
    progress = load_state_dict(read(state, llm.model), llm.model, optimizer) if state else TrainState()
    assert progress.done == done
    log = []
    p = plan(n_rows=8, max_steps=6, lr=lr, warmup_epochs=0)
    rows = rows or examples()

    def each(entry):
        log.append(entry)
        if on_step:
            on_step(entry, llm.model, optimizer)
        if entry["step"] == steps:
            raise StopIteration

    with pytest.raises(StopIteration):
        train(llm.model, optimizer, rows, p, batch_size, 7, progress, each)
    return llm, optimizer, log


def saving(folder, step, skipped=()):
    """An on_step that writes a checkpoint after this step."""

    def on_step(entry, model, optimizer):
        if entry["step"] == step:
            save(folder, state_dict(model, optimizer, TrainState(step, list(skipped)), {}))

    return on_step


def assert_same_adapters(first, second, tolerance=None):
    """Equal to the bit, or within a relative tolerance."""
    second = adapter_state_dict(second.model)
    for key, tensor in adapter_state_dict(first.model).items():
        same = torch.equal(tensor, second[key]) if tolerance is None else tiny.relative(tensor, second[key]) < tolerance
        assert same, key


def test_a_step_is_one_mean_over_all_its_labels_whatever_the_micro_batches():
    whole, _, log_whole = trained(batch_size=4)
    for size in (1, 2, 3):
        parts, _, log_parts = trained(batch_size=size)
        assert [e["loss"] for e in log_parts] == pytest.approx([e["loss"] for e in log_whole], rel=1e-5)
        assert_same_adapters(parts, whole, 1e-3)


def test_the_auxiliary_loss_is_a_mean_over_micro_batches_by_their_tokens():
    _, _, log = trained("adamole", steps=1, batch_size=2)
    model = tiny.build("adamole", seed=3).model
    batch = [examples()[i] for i in plan(n_rows=8, max_steps=6).rows(0, 7)]
    total = 0.0
    for part in (batch[:2], batch[2:]):
        tokens = [t for example in part for t in example.tokens]
        rows = PackedBatch([len(example.tokens) for example in part], "cpu")
        labels = torch.tensor([label for example in part for label in example.labels])
        stats = model(torch.tensor(tokens), labels=labels, batch=rows).router_stats
        total += model.load_balancing_loss(stats, stats.tokens_per_expert / len(tokens)).item()
    assert log[0]["auxiliary_loss"] == pytest.approx(total / log[0]["tokens"], rel=1e-5) and total > 0
    assert "auxiliary_loss" not in trained("molora", steps=1)[2][0]


def test_first_loss_is_the_mean_over_the_steps_rows():
    _, _, log = trained(steps=1)
    llm = tiny.build("soft_moa", seed=3)
    rows = [examples()[i] for i in plan(n_rows=8, max_steps=6).rows(0, 7)]
    total = sum(
        llm.model.loss(torch.tensor([r.tokens]), torch.tensor([r.labels])).item() * (len(r.tokens) - r.prompt_len)
        for r in rows
    )
    labels = sum(len(r.tokens) - r.prompt_len for r in rows)
    assert log[0]["loss"] == pytest.approx(total / labels, rel=1e-5)
    assert log[0]["label_tokens"] == labels and log[0]["tokens"] == sum(len(r.tokens) for r in rows)


@pytest.mark.parametrize("method", [*tiny.METHODS, *tiny.BASELINES])
def test_only_adapters_move_and_all_of_them_do(method):
    before = tiny.build(method, seed=3)
    after, _, _ = trained(method)
    adapters = adapter_parameters(after.model)
    old = dict(before.model.named_parameters())
    for key, tensor in after.model.named_parameters():
        assert torch.equal(tensor, old[key]) != (key in adapters or key.endswith("rank_bias")), key


@pytest.mark.parametrize("method", [*tiny.METHODS, *tiny.BASELINES, "noisy"])
def test_resumed_training_equals_unbroken_training_bit_for_bit(tmp_path, method):
    unbroken, _, log = trained(method, steps=6, on_step=saving(tmp_path, 2))
    resumed, _, rest = trained(method, done=2, steps=6, state=tmp_path / "checkpoint-2.pth")
    assert [e["loss"] for e in rest] == [e["loss"] for e in log[2:]]
    assert_same_adapters(unbroken, resumed)


def test_the_optimizer_is_adamw_whatever_form_a_checkpoint_comes_from(tmp_path, monkeypatch):
    """Fused as it is here, or the plain form of earlier runs."""

    class Plain(torch.optim.AdamW):
        found_inf = property(lambda self: None, lambda self, value: None)

    def use(fused):
        adamw = partial(Plain, lr=0.0, betas=(0.9, 0.95), foreach=False)
        name = f"{__name__}.make_optimizer"
        monkeypatch.setattr(name, make_optimizer if fused else lambda m, decay: adamw(optimizer_groups(m, decay)))

    make_optimizer = training.loop.make_optimizer
    use(False)
    expected, _, _ = trained("custom", steps=4, on_step=saving(tmp_path, 2))
    use(True)
    resumed, optimizer, _ = trained("custom", done=2, steps=4, state=tmp_path / "checkpoint-2.pth")
    assert optimizer.param_groups[0]["fused"]
    assert_same_adapters(resumed, expected, 1e-6)


def test_a_checkpoint_holds_the_adapter_and_its_training_state_alone(tmp_path):
    llm, optimizer, _ = trained(steps=2)
    path = tmp_path / "checkpoint-2.pth"
    save(tmp_path, state_dict(llm.model, optimizer, TrainState(2), {"method": "soft_moa"}))
    adapter_bytes = sum(t.numel() * 4 for t in adapter_state_dict(llm.model).values())
    entries = 3 * len(adapter_state_dict(llm.model))
    assert 3 * adapter_bytes < path.stat().st_size < 3 * adapter_bytes + 600 * entries
    assert set(load_tensors(path)) == {"adapter", "adapter_params", "optimizer", "step", "skipped", "validation"}
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-2.pth"]


def not_finite(monkeypatch, steps, gradient=False):
    """From now on the loss (its gradient alone) is not finite in these steps, counted from the first one trained."""
    whole, count = Transformer.forward, iter(range(1, 1000))

    def forward(model, *arguments, **named):
        losses = whole(model, *arguments, **named)
        if next(count) not in steps:
            return losses
        wrong = (losses.ce_loss - losses.ce_loss.detach()).sqrt() if gradient else torch.nan  # 0, of slope infinity
        return losses._replace(ce_loss=losses.ce_loss + wrong)

    monkeypatch.setattr(Transformer, "forward", forward)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_named(monkeypatch, tmp_path, gradient):
    def on_step(entry, model, optimizer):
        states.append(adapter_state_dict(model))
        updates.append({int(state["step"]) for state in optimizer.state.values()})
        saving(tmp_path, 3, [2])(entry, model, optimizer)

    states, updates = [], []
    not_finite(monkeypatch, {2}, gradient)
    llm, _, log = trained(batch_size=4, steps=6, on_step=on_step)
    assert all(torch.equal(tensor, states[0][key]) for key, tensor in states[1].items())
    assert updates == [{1}, {1}, {2}, {3}, {4}, {5}]
    rows = ", ".join(str(i + 1) for i in sorted(plan(n_rows=8, max_steps=6).rows(1, 7)))
    what = "a gradient" if gradient else "the loss"
    assert log[1]["skipped"].startswith(f"step 2: {what} is not finite (loss ")
    assert f"; rows {rows} of" in log[1]["skipped"]
    assert (log[1]["loss"] is None) != gradient and not any("skipped" in entry for entry in log[:1] + log[2:])
    assert not torch.equal(states[2]["layers.0.router.proj.w1.bias"], states[0]["layers.0.router.proj.w1.bias"])
    # ... and a run that is resumed later knows of it
    resumed, _, _ = trained(batch_size=4, steps=6, done=3, state=tmp_path / "checkpoint-3.pth")
    assert_same_adapters(llm, resumed)


@pytest.mark.parametrize(
    ("progress", "steps"), [(TrainState(), {3, 4}), (TrainState(3, [3]), {1})], ids=["unbroken", "resumed"]
)
def test_a_second_step_in_a_row_that_is_not_finite_ends_the_run(monkeypatch, progress, steps):
    not_finite(monkeypatch, steps)
    model, log = tiny.build("soft_moa", seed=3).model, []
    p = plan(n_rows=8, max_steps=6, lr=0.01)
    words = r"^step 4: the loss is not finite \(loss nan; rows \d+, .*, nor was it in step 3; a lower --lr"
    with pytest.raises(NonFiniteLoss, match=words):
        train(model, make_optimizer(model, 0.02), examples(), p, 4, 7, progress, log.append)
    assert (progress.done, progress.skipped) == (3, [3])
    assert [entry["step"] for entry in log] == ([] if steps == {1} else [1, 2, 3])


def test_numbers_that_are_not_finite_are_not_saved():
    llm, optimizer, _ = trained(steps=1)
    with torch.no_grad():
        llm.model.layers[1].router.proj.w1.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="the adapter after step 1: .*w1.weight.*not finite"):
        state_dict(llm.model, optimizer, TrainState(1), {})


def test_a_save_that_fails_deletes_nothing(tmp_path, monkeypatch):
    llm, optimizer, _ = trained(steps=1)
    save(tmp_path, state_dict(llm.model, optimizer, TrainState(1), {}))

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device.*checkpoint-2.pth"):
        save(tmp_path, state_dict(llm.model, optimizer, TrainState(2), {}), keep=1)
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-1.pth"]


ROUTER_BIAS = "layers.0.router.proj.w1.bias"
DAMAGES = {
    "no tensor": lambda content: content["adapter"].pop(ROUTER_BIAS),
    "no moment": lambda content: content["optimizer"]["exp_avg"].pop(ROUTER_BIAS),
    "no moments": lambda content: content["optimizer"].pop("exp_avg"),
    "shape": lambda content: content["optimizer"]["exp_avg_sq"].update({ROUTER_BIAS: torch.zeros(3)}),
    "nan": lambda content: content["optimizer"]["exp_avg_sq"][ROUTER_BIAS].fill_(math.nan),
    "step": lambda content: content.update(step="1"),
    "list": lambda content: content["optimizer"].update(exp_avg=[1]),
    "no step": lambda content: content.pop("step"),
    "skipped": lambda content: content.update(skipped=[0.5]),
    "skipped later": lambda content: content.update(skipped=[2]),
    "number as a key": lambda content: content["adapter"].update({7: torch.zeros(1)}),
    "cut short": lambda content: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, damage):
    llm, optimizer, _ = trained(steps=1)
    content, path = state_dict(llm.model, optimizer, TrainState(1), {}), tmp_path / "checkpoint-1.pth"
    DAMAGES[damage](content)
    write_torch(path, content)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="checkpoint-1.pth"):
        read(path, llm.model)


def test_a_resumed_log_has_each_step_once_and_tells_of_damaged_lines(tmp_path, capsys):
    entry = {"loss": 1.0, "lr": 0.1, "tokens_per_s": 5.0, "seconds": 1.0}
    log = RunLog(tmp_path, 5, 0)
    for step in (1, 2, 3):
        log.step(entry | {"step": step})
    log.close()
    (tmp_path / "log.jsonl").write_bytes((tmp_path / "log.jsonl").read_bytes() + b'\xff\n{"step": 4, "lo')
    log = RunLog(tmp_path, 5, 2)
    assert "log.jsonl: 1 damaged line left out" in capsys.readouterr().err
    for step in (3, 4, 5):
        log.step(entry | {"step": step})
    log.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("train_on_input", [False, True])
def test_labels_are_the_answer_and_if_asked_the_prompt(tmp_path, train_on_input):
    path, tokenizer = tmp_path / "rows.json", tiny.shared(None).tokenizer
    path.write_text(json.dumps([{"instruction": "add", "input": "", "output": "b"}]))
    (example,) = load_examples(path, tokenizer, 300, train_on_input)
    ignored = 1 if train_on_input else example.prompt_len  # BOS is never predicted
    assert example.labels == [IGNORE_INDEX] * ignored + example.tokens[ignored:]
    assert example.tokens[example.prompt_len :] == tokenizer.encode("b", eos=True)


def test_rows_that_do_not_fit_are_left_out_aloud(tmp_path, capsys):
    rows = [{"instruction": "a" * n, "input": "", "output": "b"} for n in (10, 400, 20, 500)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    tokenizer = tiny.shared(None).tokenizer
    assert len(load_examples(path, tokenizer, 300)) == 2
    assert "2 of 4 rows are longer than --max_seq_len 300 and left out (rows 2, 4)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of the 4 rows fits --max_seq_len 100"):
        load_examples(path, tokenizer, 100)
