"""Recorded decode steps, without a GPU (`cuda_graphs`): the same answers, from few recordings."""

import pytest
import torch

from graph_stand_in import Graph, Recording, stand_in
from llama import Llama
from llama.accelerate import FastDecoding, cuda_graphs
from llama.generation import check_gpu_features
from tiny import ALL, BASE, changed, prompts, shared


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    return stand_in(monkeypatch)


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
        recorded = FastDecoding(llm.model, cuda_graphs=True)
        with changed(llm, fast_decoding=recorded, async_lag=1):  # as on a GPU
            assert llm.generate(rows, **settings) == expected
    assert sum(graph.replays for graph in graphs) > len(graphs) > (2 if block == 4 else 1)
    assert len({graph.pool() for graph in graphs}) == 1


def test_a_graph_repeats_what_it_has_recorded(graphs: list[Graph]) -> None:
    """The stand-in notes work, and finds what a real graph would not see."""
    x, outside = torch.ones(3), [1.0]
    with Recording(Graph()):
        y = (x * 2).add_(outside[0])
    x.fill_(5)
    outside[0] = 100.0
    graphs[0].replay()
    assert y.tolist() == [11.0] * 3


def test_few_sizes_are_recorded() -> None:
    assert [cuda_graphs.bucket(n) for n in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17)] == [1, 2, 4, 4, 8, 8, 8, 16, 16, 24]


def test_hooks_are_called_all_the_same(graphs: list[Graph]) -> None:
    llm, calls = shared("soft_moa"), []
    hook = llm.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        with changed(llm, fast_decoding=FastDecoding(llm.model, cuda_graphs=True)):
            llm.generate(prompts(4), max_gen_len=5, min_new_tokens=5)
    finally:
        hook.remove()
    assert len(calls) == 5 and not graphs


def test_asked_for_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU"):
        Llama.build(BASE, device="cpu", cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs needs model_parallel_size 1, not 2"):
        check_gpu_features(torch.device("cuda"), True, 2, flash_attention2=False, cuda_graphs=True)
