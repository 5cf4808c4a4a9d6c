"""Rows shared out over lanes: what a step is does not depend on who works it out."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.shapes import SMOLLM2_135M
from llama import ModelArgs
from llama.data import Example
from llama.model import Transformer
from moa.state import adapter_parameters, adapter_state_dict
from tiny import METHODS, NOISY, build, gradients, relative, tokens
from training.data import label_count, micro_batches
from training.estimate import temporary_bytes
from training.lanes import Passes, lanes_of
from training.loop import Progress, make_optimizer, train
from training.rehearsal import unfilled_model
from training.schedule import make_plan

LENGTHS = (9, 5, 12, 7)
CPU = torch.device("cpu")


def examples(lengths: tuple[int, ...] = LENGTHS) -> list[Example]:
    rows = [tokens(n, seed=i).tolist() for i, n in enumerate(lengths)]
    return [Example(row, [-100] * 3 + row[3:], 3) for row in rows]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[int]]]:
    """(thread, its number of torch's threads, lengths of its rows) of each of the model's losses."""
    calls, losses = [], Transformer.losses

    def noted(model: Transformer, *batch: Any) -> Any:
        calls.append((threading.current_thread().name, torch.get_num_threads(), batch[2].lengths))
        return losses(model, *batch)

    monkeypatch.setattr(Transformer, "losses", noted)
    return calls


def passes(model: Transformer) -> Passes:
    return Passes(model, [entry.parameter for entry in adapter_parameters(model).values()])


def step(model: Transformer, batch_size: int = 4, rows: list[Example] | None = None) -> tuple[torch.Tensor, dict]:
    """The loss, the auxiliary loss, and all gradients, of a step of these rows."""
    rows = rows or examples()
    n_labels, n_tokens = sum(map(label_count, rows)), sum(len(row.tokens) for row in rows)
    model.train()
    running = passes(model)
    try:
        parts = [running.run(batch, n_labels, n_tokens) for batch in micro_batches(rows, batch_size, CPU)]
    finally:
        running.close()
    return torch.stack(parts).sum(0), gradients(model)


def test_two_lanes_where_both_would_be_at_work() -> None:
    assert lanes_of([9, 5, 12, 7], 2) == [[0, 3], [1, 2]]
    assert lanes_of([9, 5, 12, 7], 1) == [[0, 1, 2, 3]]
    assert lanes_of([9, 5, 12, 7], 8) == [[0, 3], [1, 2]]
    assert lanes_of([9], 8) == [[0]]
    assert lanes_of([100, 30], 2) == [[0, 1]]  # the second would wait for the first
    assert lanes_of([100, 60], 2) == [[0], [1]]


@pytest.mark.parametrize("recompute", ["off", "ffn", "all"])
@pytest.mark.parametrize("name", METHODS)
def test_two_lanes_give_what_one_gives(name: str, recompute: str, two_threads: None, seen: list) -> None:
    model = build(name).model
    model.activation_checkpointing = recompute
    torch.set_num_threads(1)
    expected, whole = step(model)
    torch.set_num_threads(2)
    found, shared = step(model)
    assert [lengths for _, _, lengths in seen[:1]] == [[9, 5, 12, 7]]
    assert sorted(lengths for _, _, lengths in seen[1:]) == [[5, 12], [9, 7]]
    assert all(name.startswith("lane") and threads == 1 for name, threads, _ in seen[1:])
    assert torch.get_num_threads() == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found[1] > 0) == (name in ("adamole", "topk_moelora", "custom"))
    for key, gradient in shared.items():
        assert relative(gradient, whole[key]) < (2e-3 if "threshold" in key else 1e-4), key  # sums in another order


@pytest.mark.parametrize("name", ["soft_moa", "adamole"])
def test_twice_the_same_is_the_same_to_the_bit(name: str, two_threads: None) -> None:
    model = build(name).model
    (first, gradients), (second, again) = step(model), step(model)
    assert torch.equal(first, second)
    assert all(torch.equal(gradient, again[key]) for key, gradient in gradients.items())


@pytest.mark.parametrize("batch_size", [2, 3])
def test_micro_batches_add_up(batch_size: int, two_threads: None, seen: list) -> None:
    """Also where one of them is a single lane: with three rows at a time the last is alone."""
    model = build("soft_moa").model
    torch.set_num_threads(1)
    expected, whole = step(model)
    torch.set_num_threads(2)
    found, parts = step(model, batch_size)
    assert len(seen) == 1 + {2: 4, 3: 3}[batch_size]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for key, gradient in parts.items():
        assert relative(gradient, whole[key]) < 1e-4, key


def test_a_model_that_draws_random_numbers_is_one_lane(two_threads: None, seen: list) -> None:
    """Two would draw them in the order in which they come to it."""
    assert NOISY
    step(build("noisy").model)
    assert [lengths for _, _, lengths in seen] == [[9, 5, 12, 7]]


def test_a_lane_without_labels(two_threads: None, seen: list) -> None:
    model = build("soft_moa").model
    rows = examples((9, 9))
    rows[1] = rows[1]._replace(labels=[-100] * 9)
    (found, shared), (alone, whole) = step(model, rows=rows), step(model, rows=rows[:1])
    assert [lengths for _, _, lengths in seen] == [[9], [9], [9]]
    torch.testing.assert_close(found, alone)
    for key, gradient in shared.items():
        assert relative(gradient, whole[key]) < 1e-5, key


def test_what_a_lane_raises_is_raised_when_none_runs_any_more(two_threads: None, monkeypatch) -> None:
    finished, begun, losses = [], threading.Event(), Transformer.losses

    def failing(model: Transformer, *batch: Any) -> Any:
        if batch[2].lengths == [9, 7]:
            assert begun.wait(60)
            raise RuntimeError("out of memory")
        begun.set()
        time.sleep(0.2)
        finished.append(batch[2].lengths)
        return losses(model, *batch)

    monkeypatch.setattr(Transformer, "losses", failing)
    model = build("soft_moa").model
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model)
    assert finished == [[5, 12]] and not any(gradient.any() for gradient in gradients(model).values())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


def test_a_whole_run(two_threads: None, seen: list) -> None:
    plan = make_plan(8, 4, 1.0, 4, 0, 0.01, 0.0, 0.0, False)
    states, logs = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model, log = build("adamole").model, []
        train(model, make_optimizer(model, 0.02), examples(LENGTHS * 2), plan, 4, 7, Progress(), log.append)
        states.append(adapter_state_dict(model))
        logs.append([(entry["loss"], entry["auxiliary_loss"]) for entry in log])
    assert len(seen) == 4 + 8
    for expected, found in zip(*logs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for key, tensor in states[1].items():
        assert relative(tensor, states[0][key]) < 1e-2, key
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


def test_each_lane_has_room_for_logits(two_threads: None) -> None:
    args = replace(ModelArgs(**SMOLLM2_135M), n_layers=1)
    model, lengths = unfilled_model(args, None, bf16=False), [150, 150]
    both = temporary_bytes(model, lengths, CPU)
    torch.set_num_threads(1)
    assert both - temporary_bytes(model, lengths, CPU) == 96 * args.vocab_size * 4
