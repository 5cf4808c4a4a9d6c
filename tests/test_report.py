"""The report of a folder of runs: what it says, that every text stays text, and how it looks in a real browser."""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import Tab, browser, chromium
from commands import refused, run
from evaluate import score_file
from inspection.page import routers
from inspection.page.document import document
from inspection.page.lines import FREE
from inspection.page.style import STYLE
from report_runs import LAYERS, SLOTS, loss, ten_runs, write_answers, write_gates, write_run, write_scores

VOID = {"meta", "link", "br", "hr", "wbr", "use", "rect", "path"}
NO_LOOK = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class Reader(HTMLParser):
    """A page as a program reads it: elements with their attributes and texts; `problems` where tags do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str], tuple[str, ...]]] = []
        self.problems: list[str] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.close()
        self.problems += [f"<{name}> is not closed" for name, _ in self._open]

    def handle_starttag(self, tag, attrs):
        texts: list[str] = []
        if len(dict(attrs)) < len(attrs):
            self.problems.append(f"<{tag}> has an attribute twice")
        self.elements.append((tag, dict(attrs), texts, tuple(name for name, _ in self._open)))
        if tag not in ("meta", "link", "wbr"):
            self._open.append((tag, texts))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [], tuple(name for name, _ in self._open)))

    def handle_endtag(self, tag):
        if not self._open or self._open[-1][0] != tag:
            self.problems.append(f"</{tag}> closes nothing")
        else:
            self._open.pop()

    def handle_data(self, data):
        for _, texts in self._open:
            texts.append(data)

    def of(self, *tags: str) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and whole texts of all elements with these names."""
        return [(attributes, "".join(texts)) for tag, attributes, texts, _ in self.elements if tag in tags]

    def tables(self) -> dict[str, list[list[str]]]:
        """The cells of each table by its caption."""
        found: dict[str, list[list[str]]] = {}
        for tag, _, texts, _ in self.elements:
            if tag == "caption":
                rows = found.setdefault("".join(texts), [])
            elif tag == "tr":
                rows.append([])
            elif tag in ("td", "th"):
                rows[-1].append("".join(texts))
        return found

    def table(self, beginning: str) -> dict[str, dict[str, str]]:
        """The table whose caption begins so: row's name -> column's name -> cell."""
        head, *rows = next(rows for caption, rows in self.tables().items() if caption.startswith(beginning))
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ten_runs(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    page = document(folder, "Runs <of> mine", 2, "2026-01-02")
    assert (page.runs, page.incomplete) == (10, 3)
    return page.html


@pytest.fixture(scope="module")
def page(html: str) -> Reader:
    return Reader(html)


def test_every_run_is_there_and_what_it_lacks(page: Reader) -> None:
    overview = page.table("The methods on gsm8k")
    methods = "base lora soft_moa sparse_moa adamole prompt molora hydralora unipeft"
    assert sorted(overview) == sorted(methods.split())
    incomplete = {name for name, row in overview.items() if row["state"] == "incomplete"}
    assert incomplete == {"prompt", "molora", "hydralora"}
    assert {row["state"] for row in overview.values()} == {"incomplete", "complete", "complete, see notes"}
    assert overview["prompt"]["steps"] == "7 of 20" and overview["lora"]["steps"] == "20"
    assert overview["base"]["final loss"] == overview["molora"]["AddSub (3 of 395 rows), robust %"] == "–"
    lacking = {name: row["what"] for name, row in page.table("Runs that lack something").items()}
    for run_, words in {
        "gsm8k: prompt s0": ("step 7 of 20", "adapter.pth is not there", "scores.json is not there", "no test"),
        "gsm8k: molora s0": ("scores.json is not there",),
        "gsm8k: hydralora s0": ("answers to MultiArith are not complete",),
        "gsm8k: unipeft s0": ("answers to SVAMP are not in scores.json",),
        "topk_moelora": ("holds no run",),
        "gsm8k: seed 1": ("no folder for", "soft_moa", "there is one for lora"),
    }.items():
        assert all(word in lacking[run_] for word in words), (run_, lacking[run_])
    assert set(lacking) == {f"gsm8k: {name} s0" for name in (*incomplete, "unipeft")} | {
        "topk_moelora",
        "gsm8k: seed 1",
    }


def test_means_spreads_and_intervals_are_those_of_the_files(folder: Path, page: Reader) -> None:
    scores = [score_file(folder / "lora" / f"s{seed}" / "AddSub.jsonl").robust for seed in (0, 1)]
    percents, widths = [one.percent for one in scores], [one.half_width for one in scores]
    assert len(set(percents)) == 2, "seeds that do not differ show no spread"
    cell = page.table("Scores on gsm8k")["lora"]["AddSub (3 of 395 rows), robust %"]
    told = f"{statistics.fmean(percents):.1f} ± {statistics.fmean(widths):.1f}"
    assert cell == f"{told}seeds {percents[0]:.1f}, {percents[1]:.1f}; sd {statistics.stdev(percents):.1f}"
    row = page.table("The methods on gsm8k")["lora"]
    last = [statistics.fmean(loss(step, seed) for step in (18, 19)) for seed in (0, 1)]
    assert row["final loss"] == f"{statistics.fmean(last):.2f}sd {statistics.stdev(last):.2f}"
    assert row["s per step"] == "2.50sd 0.71" and row["peak memory"] == "1.00 GiB"
    assert row["trained parameters"] == "1,004,000" and row["seeds"] == "0, 1"


def test_runs_with_other_settings_are_not_averaged(tmp_path: Path) -> None:
    for seed, rank in ((0, 8), (1, 16), (2, 8)):
        write_run(tmp_path / "d" / "lora" / f"s{seed}", "lora", seed, adapter={"lora_rank": rank})
    unfinished = write_run(tmp_path / "d" / "lora" / "s3", "lora", 3, done=4)
    (unfinished / "config.json").unlink()
    page = Reader(document(tmp_path, "x", 0, "").html)
    seeds = {name: row["seeds"] for name, row in page.table("The methods on d").items()}
    assert seeds == {"lora": "0, 2, 3", "lora (lora_rank 16)": "1"}
    own = page.table("In what each run on d differs")
    assert own["lora (lora_rank 16) s1"]["settings of its own"] == "lora_rank 16"
    assert own["lora s0"]["settings of its own"] == "as most runs"


def test_settings_that_may_differ_are_the_same_as_in_the_tables_of_runs() -> None:
    import exps.run_folders

    assert FREE == exps.run_folders.FREE


def test_answers_with_both_verdicts(tmp_path: Path) -> None:
    texts = ["The answer is 4.", "The answer is 5.", "The answer is 4. It took 2 steps."]
    write_run(tmp_path / "d" / "lora" / "s0", "lora", answers=texts)
    text = " ".join(text for _, text in Reader(document(tmp_path, "x", 1, "").html).of("article"))
    assert "Row 1: right under both rules" in text and "Row 2: wrong under both rules" in text
    apart = text[text.index("Row 3: the two rules differ") :]
    assert "published rule✗ wrong: took 2" in apart and "robust rule✓ right: took 4" in apart
    assert "<article>" not in document(tmp_path, "x", 0, "").html


def test_scores_that_today_s_rules_do_not_give_are_told(tmp_path: Path) -> None:
    place = write_run(tmp_path / "d" / "lora" / "s0", "lora")
    write_answers(place / "AddSub.jsonl", ["4", "4", "4"])
    lacking = Reader(document(tmp_path, "x", 1, "").html).table("Runs that lack something")["d: lora s0"]["what"]
    assert "scores.json has 33.3 % for AddSub (published), its answers give 100.0 % now" in lacking


def test_verdicts_on_programs_come_from_a_file(tmp_path: Path) -> None:
    place = write_run(tmp_path / "d" / "lora" / "s0", "lora")
    row = {"task_id": "HumanEval/0", "instruction": "Write f.", "prompt": "", "test": "", "entry_point": "f"}
    write_answers(place / "humaneval.jsonl", ["def f(): pass"], **row)
    missing = Reader(document(tmp_path, "x", 1, "").html).table("Runs that lack something")
    assert "no verdicts of HumanEval: a report runs no programs" in missing["d: lora s0"]["what"]
    verdict = {"found": "def f(): pass", "right": False, "why": "AssertionError in line 3"}
    line = {
        "suite": "HumanEval",
        "index": 0,
        "generate": "def f(): pass",
        "published": verdict,
        "robust": verdict,
    } | row
    (place / "verdicts.jsonl").write_text(json.dumps(line) + "\n")
    html = document(tmp_path, "x", 1, "").html
    assert "no verdicts" not in html and "HumanEval/0" in html and "AssertionError in line 3" in html


def test_routers_as_figures_and_numbers(page: Reader) -> None:
    gates = page.table("Gates of sparse_moa s0")
    assert list(gates) == [str(layer) for layer in range(LAYERS)] and set(SLOTS) < set(gates["0"])
    assert gates["2"]["p_adapter"] == f"{5 / 6:.3f}sd 0.100, on 75%"
    assert (gates["2"]["used"], gates["2"]["threshold"]) == ("3.000", "0.250")
    assert page.table("Gates of soft_moa s0")["1"]["threshold"] == "none"
    experts = page.table("Experts of adamole s0")["0 lora_Q"]
    assert experts["mean weights"] == "0.10 0.20 0.30 0.40" and experts["balance"] == "0.875"
    titles = {text for _, text in page.of("title")}
    for title in ("Mean gates of sparse_moa s0", "Loads of experts: adamole s0", "Mean threshold by layer"):
        assert any(title in one for one in titles), title


def test_statistics_are_those_that_gates_writes() -> None:
    import inspection.statistics

    assert routers.FORMAT == inspection.statistics.FORMAT


def test_damaged_statistics_are_told(tmp_path: Path) -> None:
    for number, change in enumerate((("mean", ["x"] * 4), ("mean", [0.5]), ("used", None), ("active", 3))):
        place = write_run(tmp_path / "d" / f"lora-{number}" / "s0", "lora")
        write_gates(place)
        content = json.loads((place / "gates.json").read_text())
        content["blocks"][1]["parts"]["all"] |= dict([change])
        (place / "gates.json").write_text(json.dumps(content))
    page = Reader(document(tmp_path, "x", 1, "").html)
    told = {name: row["what"] for name, row in page.table("Runs that lack something").items()}
    assert sorted(told) == ["d: lora-0 s0", "d: lora-1 s0", "d: lora-3 s0"], "the number of adapters may be unknown"
    assert all("gates.json cannot be read: " in what for what in told.values()), told
    assert page.table("Gates of lora-2 s0")["1"]["used"] == "none"


def test_costs_that_were_measured(tmp_path: Path) -> None:
    write_run(tmp_path / "d" / "lora" / "s0", "lora")
    figures = {"trainable": 5, "seconds_per_step": 1.5, "seconds_per_epoch": 120, "peak_memory_bytes": 2**30}
    content = {"methods": {"lora": figures | {"seconds_per_answer": 0.25}}, "base": figures, "peers": {}, "task": {}}
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(content))
    page = Reader(document(tmp_path, "x", 0, "", file).html)
    assert page.table("The methods on d")["lora"]["s per answer"] == "0.250"
    measured = page.table("Measured in turn")
    assert measured["lora"]["min per epoch"] == "2.0 min" and measured["base"]["s per answer"] == "not known"
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"costs\.json: not what"):
        document(tmp_path, "x", 0, "", file)


def test_no_text_becomes_markup(html: str, page: Reader) -> None:
    assert page.problems == []
    assert not NO_LOOK.search(html.replace("\n", "").replace("\t", "")), "a character that cannot be seen"
    assert not page.of("script", "img", "iframe", "object", "embed", "form", "base")
    assert not [name for _, attributes, _, _ in page.elements for name in attributes if name.startswith("on")]
    text = "".join(text for _, text in page.of("html"))
    markup, spelt = "</style><script>document.title='taken'", "\\x1b[31m\\u202eevil\\u202c"
    assert all(words in text for words in (markup, spelt, "\\ud83d", "\\x00", "&lt;b&gt;"))
    assert "more characters are not shown" in text and text.count("very long") < 400
    assert page.of("h1")[0][1] == "Runs <of> mine" == page.of("title")[0][1]


def test_nothing_is_asked_of_the_network(html: str, page: Reader) -> None:
    links = [value for _, a, _, _ in page.elements for name in ("href", "src", "xlink:href") if (value := a.get(name))]
    ids = {attributes["id"] for _, attributes, _, _ in page.elements if "id" in attributes}
    assert links and not [link for link in links if link != "data:," and link.removeprefix("#") not in ids]
    assert "url(" not in STYLE and "@import" not in STYLE
    policy = [a["content"] for a, _ in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none'")
    assert len(html.encode()) < 5_000_000


def test_it_can_be_heard(page: Reader) -> None:
    names = [tag for tag, _, _, _ in page.elements]
    assert page.of("html")[0][0]["lang"] == "en"
    assert all(names.count(tag) == 1 for tag in ("header", "nav", "main", "footer", "h1", "title") if tag != "title")
    levels = [int(name[1]) for name in names if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)), levels
    ids = [attributes["id"] for _, attributes, _, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    first = next(attributes for tag, attributes, _, _ in page.elements if tag == "a")
    assert first["class"] == "skip" and first["href"].removeprefix("#") in ids
    for tag, attributes, texts, above in page.elements:
        if tag == "svg" and attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img" and attributes["aria-labelledby"] in ids
            assert attributes["aria-describedby"] in ids and "".join(texts).strip()
            assert "figure" in above
        if tag == "th":
            assert attributes["scope"] in ("col", "row") and "".join(texts).strip()
        if tag == "div" and attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
        if tag == "nav":
            assert attributes["aria-label"]
    assert names.count("caption") == names.count("table") > 5
    assert all(text.strip() for _, text in page.of("caption", "summary", "figcaption", "h2", "h3", "h4", "h5", "a"))


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out(dark: bool) -> None:
    light, _, rest = STYLE.partition("prefers-color-scheme: dark")
    colours = dict(re.findall(r"--(\w+): (#\w+)", light)) | (dict(re.findall(r"--(\w+): (#\w+)", rest)) if dark else {})

    def brightness(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ink in ("text", "soft", "link", "right", "wrong"):
        for ground in ("ground", "panel"):
            one, other = sorted((brightness(colours[ink]), brightness(colours[ground])))
            assert (other + 0.05) / (one + 0.05) >= 4.5, (ink, ground)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    done = run("-m", "inspection", "report", folder, "--output", output)
    assert done.returncode == 0 and f"{output}: 10 runs, 3 of them incomplete" in done.stdout, done
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "empty").mkdir()
    refused(run("-m", "inspection", "report", tmp_path / "empty", "--output", tmp_path / "x.html"), "no run in it")
    refused(run("-m", "inspection", "report", tmp_path / "none", "--output", tmp_path / "x.html"), "no such folder")
    refused(run("-m", "inspection", "report", folder, "--output", tmp_path), "--output", status=2)
    refused(run("-m", "inspection", "report", folder, "--samples", "-1"), "--samples", status=2)
    assert not (tmp_path / "x.html").exists()


def test_it_needs_no_torch() -> None:
    code = "import sys, inspection.report, inspection.page.document; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


DAMAGE = [
    ("config.json", "[]"),
    ("config.json", json.dumps({"settings": 3, "adapter": {"method": ["x"]}, "steps": "many"})),
    ("config.json", json.dumps({"settings": {"seed": 10**300}, "adapter": {}, "steps": 10**400})),
    ("config.json", json.dumps({"settings": {}, "adapter": {}, "trainable_parameters": 10**400, "steps": -1})),
    ("log.jsonl", '{"step": 1, "loss": 1e308, "seconds": -1}\n{"step": 1, "loss": -1e308, "peak_memory_bytes": "x"}\n'),
    ("log.jsonl", f'{{"step": {10**400}, "loss": {10**400}, "seconds": {10**400}, "tokens": 1}}\n'),
    ("log.jsonl", '{"step": 0, "loss": 0}\nnonsense\n{"step": 0, "loss": null}\n'),
    ("scores.json", json.dumps({"suites": {"AddSub": [], "x": {"published": {"percent": 1e9}}}, "families": 3})),
    ("scores.json", json.dumps({"suites": {"A": {"published": {"percent": 1}, "robust": {"percent": 2}}}})),
    ("scores.json", json.dumps({"families": {"m": {"suites": ["A", "B"], "mean": {"published": {"percent": "9"}}}}})),
    ("AddSub.jsonl", "{"),
    ("AddSub.jsonl.settings.json", "[1]"),
    ("gates.json", '{"format": "moa-router-statistics"}'),
    ("verdicts.jsonl", '{"suite": "HumanEval", "generate": [1], "published": 3}\nnonsense'),
    ("notatest.jsonl", ""),
]


@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_a_damaged_file_takes_nothing_else_with_it(tmp_path: Path, name: str, content: str) -> None:
    write_run(tmp_path / "d" / "lora" / "s0", "lora")
    place = write_run(tmp_path / "d" / "soft_moa" / "s0", "soft_moa")
    (place / name).write_text(content)
    page = Reader(document(tmp_path, "x", 1, "").html)
    assert page.problems == []
    overview = page.table("The methods on d")
    assert len(overview) == 2 and overview["lora"]["state"] == "complete"
    if name not in ("AddSub.jsonl.settings.json",):
        lacking = page.table("Runs that lack something")
        assert any(name.startswith("d: soft_moa s") for name in lacking), "nobody would know"


def test_a_folder_without_trainings_or_scores(tmp_path: Path) -> None:
    write_run(tmp_path / "d" / "base" / "s0", "base", scored=False)
    ids = [attributes.get("id") for attributes, _ in Reader(document(tmp_path, "x", 1, "").html).of("h2")]
    assert ids == ["overview", "answers", "configuration"]
    write_scores(tmp_path / "d" / "base" / "s0")
    ids = [attributes.get("id") for attributes, _ in Reader(document(tmp_path, "x", 1, "").html).of("h2")]
    assert ids == ["overview", "scores", "answers", "configuration"]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium is installed (apt-get install chromium), or CHROMIUM=PROGRAM names one")
    with browser(program, tmp_path_factory.mktemp("browser")) as tab:
        yield tab


OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true)"
CUT_OFF = """[...document.querySelectorAll('svg[role=img]')].flatMap(svg => {
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(text => {
        const own = text.getBoundingClientRect();
        return own.left < box.left - 1 || own.right > box.right + 1
            || own.top < box.top - 1 || own.bottom > box.bottom + 1;
    }).map(text => svg.querySelector('title').textContent + ': ' + text.textContent);
})"""
OVER_EACH_OTHER = """[...document.querySelectorAll('svg[role=img]')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text:not([transform])')].map(text => [text, text.getBoundingClientRect()]);
    return boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([other, b]) => a.width && b.width
        && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.4 * Math.min(a.height, b.height)
    ).map(([other]) => svg.querySelector('title').textContent + ': ' + one.textContent + ', ' + other.textContent));
})"""
SMALL = """[...document.querySelectorAll('p, td, th, li, dd, dt, a, summary, figcaption, caption')]
    .filter(one => parseFloat(getComputedStyle(one).fontSize) < 16).map(one => one.outerHTML.slice(0, 80))"""
BESIDE = """[...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll, svg, .skip')
    && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(one => one.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(tab: Tab, html: str, tmp_path: Path, width: int, dark: bool) -> None:
    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")
    tab.open(file, width, dark=dark)
    assert tab.value("document.title") == "Runs <of> mine"
    for _ in range(2):  # as it opens, then with everything unfolded
        assert tab.value("document.documentElement.scrollWidth") <= tab.value("window.innerWidth") == width
        assert tab.value(BESIDE) == []
        assert tab.value(CUT_OFF) == []
        assert tab.value(OVER_EACH_OTHER) == []
        assert tab.value(SMALL) == []
        tab.value(OPEN_ALL)
    assert tab.value("[...document.querySelectorAll('svg[role=img]')].every(one => one.clientWidth > 200)")
    assert tab.complaints() == []


def test_a_browser_that_complains_is_heard(tab: Tab, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text("<!DOCTYPE html><title>x</title><script>undefined_name()</script><img src='none.png'>")
    tab.open(file, 360)
    told = " ".join(tab.complaints())
    assert "undefined_name" in told and "ERR_FILE_NOT_FOUND" in told
