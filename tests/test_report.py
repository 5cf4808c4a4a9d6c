"""The report of a folder of runs: what it says, and that every text stays text."""

import base64
import json
import re
import statistics
import sys
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest

from evaluate import score_file
from inspection import report as command
from run_folders import loss, score, ten_runs, write_gates, write_run

INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def text_of(element: Element) -> str:
    return "".join(element.itertext())


class Page:
    """A page as a program reads it. Tags that do not match are an error."""

    def __init__(self, html: str):
        self.html, self.root = html, fromstring(html)

    def of(self, tag: str) -> list[str]:
        return [text_of(element) for element in self.root.iter(tag)]

    def rows(self, caption: str) -> list[list[str]]:
        """The first table whose caption begins so."""
        tables = [table for table in self.root.iter("table") if text_of(table.find("caption")).startswith(caption)]
        return [[text_of(cell) for cell in row] for row in tables[0].iter("tr")] if tables else []

    def table(self, caption: str) -> dict[str, dict[str, str]]:
        """Row's name -> column's name -> cell."""
        head, *rows = self.rows(caption)
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}

    def missing(self) -> dict[str, str]:
        """What each run lacks."""
        return dict(self.rows("What runs lack"))


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory):
    """Runs the command on a folder; the page that it wrote."""

    def call(folder: Path, *words: object) -> Page:
        file = tmp_path_factory.mktemp("page") / "new" / "report.html"
        command.main([str(folder), "--save_path", str(file), *map(str, words)], "report")
        assert [path.name for path in file.parent.iterdir()] == ["report.html"]
        return Page(file.read_text())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ten_runs(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(read, folder: Path) -> Page:
    return read(folder, "--title", "Runs <of> mine")


def test_every_run_is_there_and_what_it_lacks(page: Page) -> None:
    runs = page.table("Means over seeds")
    methods = "base lora soft_moa sparse_moa adamole prompt molora hydralora unipeft"
    assert sorted(runs) == sorted(methods.split())
    assert runs["prompt"]["steps"] == "7" and runs["lora"]["steps"] == "20" and runs["lora"]["seed"] == "0, 1"
    assert runs["base"]["final loss"] == page.table("Percent right")["molora"]["AddSub (3 of 395), robust %"] == "–"
    missing = page.missing()
    for name, sentences in {
        "prompt s0": ("7 of 20 steps", "no adapter file"),
        "molora s0": ("no scores.json",),
    }.items():
        assert all(words in missing[name] for words in sentences), (name, missing[name])
    assert set(missing) == {"prompt s0", "molora s0"}


def test_means_spreads_and_intervals_are_those_of_the_files(folder: Path, page: Page) -> None:
    scores = [score_file(folder / "lora" / f"s{seed}" / "AddSub.jsonl").robust for seed in (0, 1)]
    percents, widths = [s.percent for s in scores], [s.half_width for s in scores]
    assert len(set(percents)) == 2, "seeds that do not differ show no spread"
    cell = page.table("Percent right")["lora"]["AddSub (3 of 395), robust %"]
    mean = f"{statistics.fmean(percents):.1f} ± {statistics.fmean(widths):.1f}"
    assert cell == f"{mean}\nseeds {percents[0]:.1f}, {percents[1]:.1f}; sd {statistics.stdev(percents):.1f}"
    row = page.table("Means over seeds")["lora"]
    last = [statistics.fmean(loss(step, seed) for step in (18, 19)) for seed in (0, 1)]
    assert row["final loss"] == f"{statistics.fmean(last):.2f}\nsd {statistics.stdev(last):.2f}"
    assert (row["lowest validation loss"], row["at step"]) == ("0.750", "20")
    assert row["a step, s"] == "18.00\nsd 4.24" and row["peak memory, GB"] == "10.74"
    assert row["trained parameters"] == "1,000,004" and row["training, min"] == "6.0\nsd 1.4"


def test_all_settings_of_a_run_are_there(page: Page) -> None:
    assert page.table("All settings of lora s0")["run: rows_per_step"]["value"] == "32"


def test_every_chart_is_an_svg_inside_the_page(page: Page) -> None:
    captions = [image.get("alt").partition(":")[0] for image in page.root.iter("img")]
    routers = [f"Routers of {name} s0" for name in ("adamole", "soft_moa", "sparse_moa")]
    assert captions == ["Losses", "Scores", *routers]
    for image in page.root.iter("img"):
        svg = base64.b64decode(image.get("src").removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in svg and b"<script" not in svg and b'href="http' not in svg


def test_charts_are_written_the_same_each_time_without_a_trace_of_the_machine(
    folder: Path, tmp_path: Path, read
) -> None:
    for name in "ab":
        read(folder, "--figures", tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    names = ["Losses", "Scores", *(f"Routers_of_{name}_s0" for name in ("soft_moa", "sparse_moa", "adamole"))]
    assert files == sorted(f"gsm8k_{name}.{ending}" for name in names for ending in ("svg", "png"))
    for file in files:
        content = (tmp_path / "a" / file).read_bytes()
        assert content == (tmp_path / "b" / file).read_bytes() and 1000 < len(content) < 200_000
        assert not [trace for trace in (str(folder), "date>", "Software", "Matplotlib v") if trace.encode() in content]


def test_no_text_becomes_markup(page: Page) -> None:
    assert not INVISIBLE.search(page.html.replace("\n", "").replace("\t", "")), "a character that cannot be seen"
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {element.tag for element in page.root.iter()}
    assert not [name for element in page.root.iter() for name in element.keys() if name.startswith("on")]
    text = text_of(page.root)
    markup, spelt = "</style><script>document.title='taken'", "\\x1b[31m\\u202eevil\\u202c"
    assert all(words in text for words in (markup, spelt, "\\ud83d", "\\x00", "&lt;b&gt;"))
    assert 0 < text.count("very long") < 400
    assert page.of("h1") == ["Runs <of> mine"] == page.of("title")


def test_nothing_is_asked_of_the_network(page: Page) -> None:
    links = [link for element in page.root.iter() for name in ("href", "src") if (link := element.get(name))]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in page.html and "@import" not in page.html and len(page.html) < 2_000_000
    assert [meta.get("content") for meta in page.root.iter("meta")][1].startswith("default-src 'none'")


def test_hostile_names_of_folders_and_methods(tmp_path: Path, read) -> None:
    for name in ("<b>&$x_$", "\x1b[31m\u202e", "مرحبا🙂"):
        score(write_run(tmp_path / "d$<i>" / name / "s0"))
    page = read(tmp_path)
    assert not page.of("b")
    assert set(page.table("Means over seeds")) == {"\\x1b[31m\\u202e", "<b>&$x_$", "مرحبا🙂"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", json.dumps({"settings": 3, "adapter": {"method": ["x"]}, "steps": "many"})),
        ("log.jsonl", '{"step": 0, "loss": 0}\nnonsense\n{"step": 0, "loss": null}\n'),
        ("scores.json", json.dumps({"families": {"m": {"suites": ["A"], "mean": {"published": {"percent": "9"}}}}})),
        ("AddSub.jsonl.settings.json", "{"),
        ("gates.json", '{"format": "moa-router-statistics"}'),
    ],
)
def test_a_damaged_file_takes_nothing_else_with_it(tmp_path: Path, name: str, content: str, read) -> None:
    score(write_run(tmp_path / "d" / "lora" / "s0"))
    (score(write_run(tmp_path / "d" / "soft_moa" / "s0")) / name).write_text(content)
    page = read(tmp_path)
    assert len(page.table("Means over seeds")) == 2 and "lora s0" not in page.missing()
    assert name.split(".")[0] in page.missing()["soft_moa s0"], "nobody would know"


@pytest.mark.parametrize("change", [{"mean": ["x"] * 4}, {"mean": [0.5] * 3}, {"mean": None}])
def test_damaged_statistics_are_named(tmp_path: Path, change: dict, read) -> None:
    file = write_gates(score(write_run(tmp_path / "d" / "lora" / "s0"))) / "gates.json"
    content = json.loads(file.read_text())
    content["routers"][1]["parts"]["all"] |= change
    file.write_text(json.dumps(content))
    assert "gates.json: not router statistics" in read(tmp_path).missing()["lora s0"]


def test_a_folder_without_trainings_or_scores(tmp_path: Path, read) -> None:
    folder = score(write_run(tmp_path / "d" / "base" / "s0"))
    assert read(tmp_path).of("h3") == ["Runs", "Scores", "Settings"]
    (folder / "scores.json").unlink()
    assert read(tmp_path).of("h3") == ["Runs", "Settings"]


@pytest.mark.parametrize(
    ("words", "expected", "status"),
    [
        (["EMPTY"], "no run in it", 1),
        (["none"], "none: no such folder", 1),
        (["FULL", "--save_path", "EMPTY"], "--save_path", 2),
    ],
)
def test_a_wrong_call_is_refused(words, expected, status, folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        command.main([word.replace("EMPTY", str(tmp_path)).replace("FULL", str(folder)) for word in words], "report")
    assert end.value.code == status and expected in capsys.readouterr().err


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_what_is_not_installed_is_named(package, folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        command.main([str(folder / "base"), "--save_path", str(tmp_path / "x.html")], "report")
    assert f"{package}, which is not installed" in capsys.readouterr().err
