"""The section of settings: what all runs share once, per run what it does otherwise, and the whole record folded."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from inspection.page.lines import Line, answering, brief, compared
from inspection.page.markup import Column, Html, Part, el, folded, table
from inspection.runs import Run


def section(datasets: dict[str, list[Line]]) -> Html:
    parts: list[Part] = [el("h2", "Configuration", id="configuration")]
    for dataset, lines in datasets.items():
        parts += [el("h3", f"RunConfig on {dataset}"), *_dataset(dataset, lines)]
    return el("section", *parts)


def _dataset(dataset: str, lines: Sequence[Line]) -> Iterable[Part]:
    runs = [(line.run_name(run), run, _shown(run)) for line in lines for run in line.runs]
    usual = _usual([settings for _, _, settings in runs])
    rows = []
    for name, _, settings in runs:
        own = [f"{key} {brief(value, 60)}" for key, value in settings.items() if _is_own(key, value, usual)]
        told = ", ".join(own) or ("as most runs" if settings else "not known: no settings are there")
        rows.append([name, el("span", told)])
    yield table(
        f"In what each run on {dataset} differs from most", [Column("run"), Column("settings of its own")], rows
    )
    if usual:
        caption = f"RunConfig that most runs on {dataset} share"
        yield folded("What most runs share", _pairs(caption, usual))
    for name, run, _ in runs:
        whole = _whole(run)
        if whole:
            yield folded(f"All settings of {name}", _pairs(f"All settings of {name} on {dataset}", whole))


def _shown(run: Run) -> dict[str, Any]:
    """What `compared` compares without what stands in the overview; how all tests alike were answered is said once."""
    settings = {name: value for name, value in compared(run).items() if name not in ("method", "trainable_parameters")}
    tests = answering(run)
    alike = {name: _key(value) for name, value in next(iter(tests.values()), {}).items()}
    alike = {n: v for n, v in alike.items() if all(n in one and _key(one[n]) == v for one in tests.values())}
    found = {}
    for name, value in settings.items():
        test, colon, setting = name.partition(": ")
        found[f"answers: {setting}" if colon and test in tests and setting in alike else name] = value
    return found


def _usual(all_settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The values that more than half of the runs with that setting have, of settings that at least two have."""
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    found = {}
    for name in names:
        values = Counter(_key(settings[name]) for settings in all_settings if name in settings)
        value, count = values.most_common(1)[0]
        if count > 1 and 2 * count > values.total():
            found[name] = json.loads(value)
    return found


def _is_own(name: str, value: Any, usual: dict[str, Any]) -> bool:
    return name not in usual or _key(usual[name]) != _key(value)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _pairs(caption: str, values: dict[str, Any]) -> Html:
    rows = [[name, el("span", brief(value, 400))] for name, value in values.items()]
    return table(caption, [Column("setting"), Column("value")], rows)


def _whole(run: Run) -> dict[str, Any]:
    """The record with the names of its parts before their entries, and how each test was answered."""
    found: dict[str, Any] = {}
    for name, value in (run.record or {}).items():
        if isinstance(value, dict):
            found |= {f"{name}: {key}": one for key, one in value.items()}
        else:
            found[name] = " ".join(map(str, value)) if name == "command" and isinstance(value, list) else value
    for suite, settings in answering(run).items():
        found |= {f"answers to {suite}: {key}": one for key, one in settings.items()}
    return found
