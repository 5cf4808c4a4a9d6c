"""Runs as they are read, and figures: what they show is what was measured, and all of it can be read."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inspection import chart_style, plots
from inspection import figures as command
from inspection.running_stats import RouterStatistics
from inspection.runs import NOT_COMPARED, find_runs, group_runs
from run_folders import log, loss, write_run
from tiny import shared, tokens
from training import config

METHODS = ["soft_moa", "sparse_moa", "soft_moa_instance", "unipeft"]  # with a router per block


def statistics_of(name: str) -> dict[str, Any]:
    llm = shared(name)
    statistics = RouterStatistics(llm.model)
    with statistics.recorder():
        llm.generate([tokens(9).tolist(), tokens(5, seed=1).tolist()], 6, min_new_tokens=6)
    return statistics.result({})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "math"
    for method in ("soft_moa", "lora", "a_method_with_a_long_name"):
        for seed in (0, 1):
            sizes = {"trainable_parameters": 30_000} if method.startswith("a_") else {}
            write_run(folder / method / f"s{seed}", (40.0 + seed,), steps=30, **sizes)
    write_run(folder / "base" / "s0", (40.0,))
    return folder


# Reading runs


def test_a_finished_run_and_an_untuned_base(runs: Path) -> None:
    read = find_runs([runs, runs / "lora"])
    assert [run.method for run in read][:2] == ["base", "a_method_with_a_long_name"] and len(read) == 7
    assert all(run.problems == [] and run.dataset == "math" for run in read)
    run = next(run for run in read if (run.method, run.seed) == ("lora", 1))
    assert (run.logged_steps, run.numbers["trainable_parameters"]) == (30, 1_000_004)
    assert run.numbers["seconds"] == 30 * 21 and run.numbers["peak_memory_bytes"] == 30 * 2**29
    assert run.scores["AddSub (100 of 395)"]["robust"] == (42, None, [42], 5)
    assert run.answers == {"AddSub": runs / "lora" / "s1" / "AddSub.jsonl"}


def scores(**addsub: Any) -> str:
    part = {"rows": 5, "problems": 5} | {rule: {"percent": 10.0} for rule in ("published", "robust")}
    return json.dumps({"suites": {"AddSub": part | addsub}, "families": {}})


SETTINGS = '{"settings": {"seed": 3}, "adapter": {"method": "lora"}, "rows_per_step": 8, "steps": 4'


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("log.jsonl", log(1, 3) + '{"st', "1 of 4 steps in log.jsonl"),
        ("log.jsonl", None, "0 of 4 steps in log.jsonl"),
        ("log.jsonl", "nonsense\n" + log(4, 3), "log.jsonl: line 1: not valid JSON"),
        ("log.jsonl", log(4, 3).replace('"seconds"', '"secs"'), "log.jsonl: line 1: not a step (KeyError: 'seconds')"),
        ("log.jsonl", log(4, 3).replace("33.0", '"x"'), "log.jsonl: line 1: not a step (ValueError: could not"),
        ("adapter.pth", None, "no adapter file"),
        ("scores.json", None, "no scores.json"),
        ("scores.json", "{", "scores.json: not valid JSON"),
        ("scores.json", "[]", "scores.json: not scores of `python -m evaluate"),
        ("scores.json", '{"suites": {"AddSub": []}, "families": 3}', "scores.json: not scores of"),
        ("scores.json", scores(robust={"percent": "ten"}), "scores.json: not scores of"),
        ("scores.json", scores(robust={"percent": 1000}), "(ValueError: 1000 is no percentage)"),
        ("AddSub.jsonl", None, "no test was answered"),
        ("AddSub.jsonl.part0", "", "the answers to AddSub are not complete"),
        ("AddSub.jsonl.settings.json", "[1]", "AddSub.jsonl.settings.json: not the settings of generate.py"),
        ("config.json", "nonsense", "config.json: not valid JSON"),
        ("config.json", None, "4 of unknown steps"),
        ("config.json", "{}", "config.json: not the record of finetune.py (KeyError: 'settings')"),
        (
            "config.json",
            SETTINGS + "}",
            "config.json: not the record of finetune.py (KeyError: 'trainable_parameters')",
        ),
        ("config.json", SETTINGS + ', "trainable_parameters": "4"}', "expected whole numbers"),
    ],
)
def test_what_a_run_lacks_is_a_sentence(tmp_path: Path, name: str, text: str | None, problem: str) -> None:
    (run,) = find_runs([write_run(tmp_path / "d" / "lora" / "s3", files={name: text})])
    assert run.method == "lora" and run.seed == 3
    assert any(problem in sentence for sentence in run.problems), run.problems


def test_method_data_set_and_seed_are_in_the_path(tmp_path: Path) -> None:
    names = {"d/lora/s10": ("d", "lora", 10), "d/lora/s9": ("d", "lora", 9), "d/prompt-s8": ("d", "prompt", 8)}
    for i, path in enumerate(names):
        (tmp_path / "runs" / path).parent.mkdir(parents=True, exist_ok=True)
        write_run(tmp_path / str(i) / "lora" / "s0", files={"config.json": None}).rename(tmp_path / "runs" / path)
    read = [(run.dataset, run.method, run.seed) for run in find_runs([tmp_path / "runs"])]
    assert read == [("d", "lora", 9), ("d", "lora", 10), ("d", "prompt", 8)]


def test_what_a_resumed_run_may_change_is_not_compared() -> None:
    assert config.RESUMABLE_FIELDS <= NOT_COMPARED


# Figures can be read


def require_legible(figure: Any) -> None:
    """No text is small, cut off, or on another one."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    assert width / figure.dpi == chart_style.WIDTH and height / figure.dpi < 9
    visible = [axes for axes in figure.axes if axes.get_visible()]
    texts = [text for axes in visible for text in (axes.title, axes.xaxis.label)]
    texts += [tick.label1 for axes in visible for tick in axes.xaxis._update_ticks() if tick.label1.get_visible()]
    texts += [text for legend in figure.legends for text in legend.get_texts()] + figure.texts
    boxes = [text.get_window_extent() for text in texts if text.get_text().strip()]
    assert len(boxes) > 5 and all(text.get_fontsize() >= 7 for text in texts)
    for i, box in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, texts[i]
        for other in boxes[i + 1 :]:
            apart = box.x1 <= other.x0 + 1 or other.x1 <= box.x0 + 1 or box.y1 <= other.y0 + 1 or other.y1 <= box.y0 + 1
            assert apart, (box, other)


@pytest.fixture(autouse=True)
def in_style() -> Iterator[None]:
    with chart_style.styled():
        yield


@pytest.mark.parametrize("part", ["all", "prompt", "answer"])
def test_gates(part: str) -> None:
    named = [("soft", statistics_of("soft_moa")), ("sparse", statistics_of("sparse_moa"))]
    figure = plots.gates(named, part)
    require_legible(figure)
    soft, sparse, threshold, used, _ = figure.axes
    for axes, (_, statistics) in ((soft, named[0]), (sparse, named[1])):
        cells, slots = axes.collections[0].get_array(), plots.slots_of(statistics)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == slots
        for block in statistics["blocks"]:
            mean = dict(zip(block["slots"], block["parts"][part]["mean"], strict=True))
            for i, slot in enumerate(slots):
                cell = cells[block["layer"], i]
                assert (cell == pytest.approx(mean[slot])) if slot in mean else cell.mask
    parts = [block["parts"][part] for block in named[1][1]["blocks"]]
    assert list(threshold.lines[0].get_xdata()) == [numbers["threshold"]["mean"][0] for numbers in parts]
    assert list(used.lines[0].get_xdata()) == [numbers["used"]["mean"] for numbers in parts]


def test_more_than_two_heat_maps_stand_below_each_other() -> None:
    names = ["sparse 0", "sparse 1", "sparse 2"]
    figure = plots.gates([(name, statistics_of("sparse_moa")) for name in names], "all")
    require_legible(figure)
    first, second, third = (axes.get_window_extent() for axes in figure.axes if axes.get_title() in names)
    assert first.y1 == second.y1 and third.y1 < min(first.y0, second.y0)


@pytest.mark.parametrize("names", [METHODS, ["custom"]])
def test_spread(names: list[str]) -> None:
    named = [(name, statistics_of(name)) for name in names]
    figure = plots.spread(named, "all")
    require_legible(figure)
    axes, blocks = figure.axes[0], named[0][1]["blocks"]
    slot = axes.get_title()
    parts = [(block["slots"].index(slot), block["parts"]["all"]) for block in blocks if slot in block["slots"]]
    count = sum(part["count"] for _, part in parts)
    heights = axes.lines[0].get_ydata()
    assert heights[0] == pytest.approx(1 - sum(part["active"][i] * part["count"] for i, part in parts) / count)
    half = sum(sum(part["histogram"][i][:25]) for i, part in parts) / count
    assert heights[25] == pytest.approx(half) and heights[-1] == 1


def test_agreement_of_mean_gates() -> None:
    soft, sparse = statistics_of("soft_moa"), statistics_of("sparse_moa")
    (line,) = plots.agreement([("a", soft), ("b", soft)], "all")
    assert line == "mean gates of a and b: correlation 1.000 over 18 layers and slots"
    assert len(plots.agreement([("a", soft), ("b", sparse), ("c", soft)], "all")) == 3


@pytest.mark.parametrize("name", ["adamole", "molora", "prompt_moe", "mola", "soft_moa_experts"])
def test_loads(name: str) -> None:
    statistics = statistics_of(name)
    assert plots.chooses(statistics) == (name in ("adamole", "mola"))
    show = "active" if plots.chooses(statistics) else "mean"
    figure = plots.loads(name, statistics, "all", show)
    require_legible(figure)
    first = next(mixture for mixture in statistics["experts"] if mixture["slot"] == figure.axes[0].get_title())
    cells = figure.axes[0].collections[0].get_array()
    assert list(cells[first["layer"]].compressed()) == pytest.approx(first["parts"]["all"][show])
    balance, entropy = figure.axes[1].lines
    assert balance.get_xdata()[0] == first["parts"]["all"]["balance"]
    assert entropy.get_xdata()[0] == first["parts"]["all"]["entropy"]


def test_losses(runs: Path) -> None:
    curves = [(f"{run.method} s{run.seed}", i, run.losses) for i, run in enumerate(find_runs([runs])[1:])]
    figure = plots.losses(curves, 5)
    require_legible(figure)
    lines = figure.axes[0].lines[1::2]
    assert [line.get_label() for line in lines] == [name for name, _, _ in curves]
    assert lines[0].get_ydata()[0] == loss(0, 0)
    assert lines[0].get_ydata()[6] == pytest.approx(sum(loss(i, 0) for i in range(2, 7)) / 5)


def test_lines_differ_without_colour() -> None:
    assert len({(str(chart_style.look(i)["linestyle"]), chart_style.look(i)["marker"]) for i in range(55)}) == 55


@pytest.mark.parametrize(("rule", "extra"), [("published", 0), ("robust", 1)])
def test_tradeoff_and_scores(runs: Path, rule: str, extra: int) -> None:
    groups, column = group_runs(find_runs([runs])), "AddSub (100 of 395)"
    figure = plots.tradeoff(groups, rule, column)
    require_legible(figure)
    assert {"100k", "1M"} <= {tick.get_text() for tick in figure.axes[0].get_xticklabels()}
    by_label = {line.get_label(): line for line in figure.axes[1].lines}
    assert by_label["lora"].get_xdata()[0] == 30 * 18 / 60 and by_label["lora"].get_ydata()[0] == 40.5 + extra
    assert by_label["base"].get_ydata()[0] == 40 + extra
    figure = plots.scores(groups, [column])
    require_legible(figure)
    points = figure.axes[0].containers[2 * [group.name for group in groups].index("lora") + extra]
    assert points.lines[0].get_xdata()[0] == 40.5 + extra


def test_cost() -> None:
    minutes = {f"method_number_{i}": i + 1 for i in range(13)}
    methods = {name: {"seconds_per_epoch": 60.0 * n, "seconds_per_answer": 0.5} for name, n in minutes.items()}
    methods["method_number_0"] = {"peak_memory_bytes": 2**31, "seconds_per_step": 1.0}
    figure = plots.costs(methods)
    require_legible(figure)
    assert [axes.get_xlabel() for axes in figure.axes] == ["an epoch, min", "peak memory, GB", "an answer, s"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0, *range(2, 14)]
    assert [text.get_text() for text in figure.axes[0].texts][:2] == ["not measured", "2.0"]


# The command


def run(*words: object) -> None:
    command.main([str(word) for word in words], "figures")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    for name in ("soft_moa", "sparse_moa", "adamole"):
        (folder / f"{name}.json").write_text(json.dumps(statistics_of(name)))
    return folder


def test_every_figure_is_written_the_same_each_time_without_a_trace_of_the_machine(saved: Path, runs: Path) -> None:
    soft, sparse, adamole = (saved / f"{name}.json" for name in ("soft_moa", "sparse_moa", "adamole"))
    cost = saved / "cost.json"
    numbers = {"methods": {"lora": {"seconds_per_step": 2.0, "trainable": 1}}, "base": {"seconds_per_step": 1}}
    cost.write_text(json.dumps(numbers))
    commands = [
        ("gates", "--statistics", f"{soft},{sparse}"),
        ("spread", "--statistics", f"{soft},{sparse}", "--names", "a,b"),
        ("loads", "--statistics", adamole),
        ("losses", "--runs", runs),
        ("tradeoff", "--runs", runs),
        ("cost", "--costs", cost),
    ]
    for kind, *words in commands:
        run(kind, *words, "--save_path", saved / f"{kind}.svg")
        for ending in ("svg", "png"):
            content = (saved / f"{kind}.{ending}").read_bytes()
            assert 1000 < len(content) < 200_000, (kind, ending, len(content))
            for trace in (str(saved), "Date", "date>", "Software", "Matplotlib v"):
                assert trace.encode() not in content, (kind, ending, trace)
    run(*commands[0], "--save_path", saved / "again")
    assert all((saved / f"again.{end}").read_bytes() == (saved / f"gates.{end}").read_bytes() for end in ("svg", "png"))


@pytest.mark.parametrize(
    ("words", "expected", "status"),
    [
        (["gates", "--statistics", "SAVED/adamole.json"], "adamole.json: method adamole has no block router", 1),
        (["loads", "--statistics", "SAVED/soft_moa.json"], "soft_moa.json: method soft_moa has no mixture", 1),
        (["loads", "--statistics", "a,b"], "a chart of loads is of one file", 2),
        (["gates", "--statistics", "SAVED/none.json"], "none.json: no such file", 1),
        (["gates", "--statistics", "a,b", "--names", "one"], "--names has 1 names for 2", 2),
        (["gates", "--runs", "RUNS"], "the chart gates needs --statistics", 2),
        (["losses", "--runs", "SAVED"], "no run in it", 1),
        (["losses", "--runs", "RUNS/base"], "no run with a loss", 1),
        (["losses", "--runs", "RUNS", "--smooth", "0"], "--smooth must be at least 1", 2),
        (["tradeoff", "--runs", "RUNS/base"], "no finished run", 1),
        (["cost", "--costs", "SAVED/soft_moa.json"], "soft_moa.json: not what", 1),
        (["heatmap"], "gates, spread, loads", 2),
    ],
)
def test_what_is_missing_is_named(
    saved: Path, runs: Path, words: list[str], expected: str, status: int, capsys
) -> None:
    words = [word.replace("SAVED", str(saved)).replace("RUNS", str(runs)) for word in words]
    with pytest.raises(SystemExit) as end:
        run(*words, "--save_path", saved / "no")
    assert end.value.code == status and expected in capsys.readouterr().err
    assert not list(saved.glob("no*"))


def test_unfinished_runs_are_left_out_aloud(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(runs / "lora" / "s2", files={"log.jsonl": ""})
    run("tradeoff", "--runs", runs, "--save_path", tmp_path / "t")
    assert "lora/s2: left out, 0 of 4 steps" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        run("cost", "--costs", tmp_path, "--save_path", tmp_path / "x")
    assert "figures need matplotlib, which is not installed" in capsys.readouterr().err
