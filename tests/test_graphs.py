"""Recorded decode steps, without a GPU (`graph_stand_in`): the same answers, from few recordings."""

import pytest
import torch

from graph_stand_in import Graph, Recording, stand_in_for_graphs
from llama.accelerate import FastDecoding, cuda_graphs
from tiny import ALL, changed, prompts, shared


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    return stand_in_for_graphs(monkeypatch)


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("name", ALL)
def test_the_same_answers(name: str | None, block: int, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that end and make room at different times, so that there are fewer and fewer, and of growing length."""
    monkeypatch.setattr(cuda_graphs, "SEQ_LEN_BUCKET", block)
    llm, rows = shared(name), prompts(7, 1, 12, 3, 3, 9)
    settings = {"max_gen_len": 8, "temperature": 0.8, "seed": 11}
    with changed(llm, max_seq_len=16, max_batch_size=5):
        expected = llm.generate(rows, **settings)
        assert not graphs and len({len(row) for row in expected}) > 2
        with changed(llm, fast_decoding=FastDecoding(llm.model, cuda_graphs=True), async_lag=1):  # as on a GPU
            assert llm.generate(rows, **settings) == expected
    assert sum(graph.replays for graph in graphs) > len(graphs) > (2 if block == 4 else 1)
    assert len({graph.pool() for graph in graphs}) == 1


def test_a_graph_repeats_what_it_has_recorded(graphs: list[Graph]) -> None:
    """The stand-in notices what a real graph would not see."""
    x, outside, graph = torch.ones(3), [1.0], Graph()
    with Recording(graph):
        y = (x * 2).add_(outside[0])
    x.fill_(5)
    outside[0] = 100.0
    graph.replay()
    assert y.tolist() == [11.0] * 3


def test_hooks_are_called_all_the_same(graphs: list[Graph]) -> None:
    llm, calls = shared("soft_moa"), []
    hook = llm.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with changed(llm, fast_decoding=FastDecoding(llm.model, cuda_graphs=True)):
        llm.generate(prompts(4), max_gen_len=5, min_new_tokens=5)
    hook.remove()
    assert len(calls) == 5 and not graphs
