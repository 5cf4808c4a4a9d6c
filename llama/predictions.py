"""A prediction file that grows row by row, survives a crash, and never holds a row twice.

Finished rows are appended to `FILE.part<rank>` as they come. `finish` merges all parts into FILE, in the order of the
test rows, and removes them. `FILE.settings.json` holds what the answers depend on: a file made with other settings is
not added to.
"""

import json
import re
from pathlib import Path
from typing import Any

from moa.files import atomic_write, claim, open_to_append, read_json, release, remove_stale_temp_files, write_json
from moa.reading import parse_json, safe_name, short_repr

Answer = str | list[str]


class Predictions:
    """The answers to `rows` (test rows) that `path` and its parts hold already, and those that are still missing."""

    def __init__(self, path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], rank: int, overwrite: bool):
        """Raises ValueError where what is there was made with other settings or belongs to other rows; nothing is
        changed before `start`."""
        self.path, self.rows, self.settings, self.rank, self.overwrite = path, rows, settings, rank, overwrite
        self.answers: dict[int, Answer] = {}
        self._part = self._lock = None
        if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
            raise ValueError(f"{path}: expected the path of a file inside a folder")
        if overwrite:
            return
        settings_file = self._beside("settings.json")
        if settings_file.exists():
            made_with = read_json(settings_file)
            for name in sorted(made_with.keys() | settings.keys()):
                if made_with.get(name) != settings.get(name):
                    raise ValueError(
                        f"{path}: was made with {safe_name(name)} {short_repr(made_with.get(name))}, now it is "
                        f"{short_repr(settings.get(name))}; give --overwrite to begin anew, or another --save_path"
                    )
        elif path.exists() or self._parts():
            raise ValueError(f"{path}: exists, but {settings_file.name} does not: give --overwrite to begin anew")
        self._read_file()
        for part in self._parts():
            self._read_part(part)

    @property
    def missing(self) -> list[int]:
        """Numbers (from 0) of the rows without an answer."""
        return [i for i in range(len(self.rows)) if i not in self.answers]

    def start(self) -> None:
        """On the main process, before any rank's `add`: prepare the folder. ValueError where another one is at it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = claim(self._beside("lock"), f"{self.path}: another generate.py is writing it")
        for file in (self.path, self._beside("settings.json")):
            remove_stale_temp_files(file.parent, file.name)
        if self.overwrite:
            for file in [self.path, *self._parts()]:
                file.unlink(missing_ok=True)
        write_json(self._beside("settings.json"), self.settings)

    def require_started(self) -> None:
        """On every process, after `start`: ValueError where this one does not see the main one's folder."""
        if not self._beside("settings.json").exists():
            raise ValueError(f"{self.path.parent}: not the folder that the first process writes; all must share it")

    def add(self, index: int, answer: Answer) -> None:
        """Keep an answer; once this returns, it survives the process."""
        if self._part is None:
            path = self._beside(f"part{self.rank}")
            self._part = open_to_append(path)
            self._part.truncate(path.read_bytes().rfind(b"\n") + 1)  # a line that a crash cut short goes
        self._part.write(json.dumps({"index": index, "generate": answer}).encode() + b"\n")
        self._part.flush()

    def close(self) -> None:
        if self._part is not None:
            self._part.close()

    def finish(self) -> None:
        """On the main process, when all ranks have closed: write the whole file, then remove the parts."""
        for part in self._parts():
            self._read_part(part)
        assert not self.missing, f"{len(self.missing)} rows without an answer"
        lines = (json.dumps(row | {"generate": self.answers[i]}, ensure_ascii=False) for i, row in enumerate(self.rows))
        # Half a surrogate pair, which UTF-8 cannot hold, is written as JSON spells it
        atomic_write(self.path, "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
        for part in self._parts():
            part.unlink()
        self.release()

    def release(self) -> None:
        """Let others write the file. What has been answered stays for the next one."""
        self.close()
        if self._lock is not None:
            release(self._lock)
            self._lock = None

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{ending}")

    def _parts(self) -> list[Path]:
        if not self.path.parent.is_dir():
            return []
        name = re.compile(re.escape(self.path.name) + r"\.part[0-9]+")
        return sorted(file for file in self.path.parent.iterdir() if name.fullmatch(file.name))

    def _read_file(self) -> None:
        """Answers of a finished file, whatever rows have been taken out of it since. Equal test rows (some suites have
        them) are told apart by their order."""
        places: dict[str, list[int]] = {}
        for i in reversed(range(len(self.rows))):
            asked = {name: value for name, value in self.rows[i].items() if name != "generate"}
            places.setdefault(json.dumps(asked, sort_keys=True), []).append(i)
        for number, row in _json_lines(self.path):
            if not _is_answer(row.get("generate")):
                raise ValueError(f"{self.path}: line {number}: field 'generate' is missing or not text")
            answer = row.pop("generate")
            waiting = places.get(json.dumps(row, sort_keys=True))
            if waiting is None:
                raise ValueError(
                    f"{self.path}: line {number}: not one of the rows that --data_path and --max_rows ask for"
                )
            if waiting:
                self.answers[waiting.pop()] = answer

    def _read_part(self, part: Path) -> None:
        for number, row in _json_lines(part):
            index = row.get("index")
            if type(index) is not int or not 0 <= index < len(self.rows) or not _is_answer(row.get("generate")):
                raise ValueError(f"{part}: line {number}: not an answer to one of the {len(self.rows)} rows")
            self.answers.setdefault(index, row["generate"])


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of a file's lines. A line that a crash cut short is left out, anything else that is not an
    object is a ValueError."""
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        try:
            row = parse_json(line.decode(), place)
        except ValueError as error:
            if number == len(lines):
                continue
            raise ValueError(f"{place}: not UTF-8 text" if isinstance(error, UnicodeError) else str(error)) from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object")
        rows.append((number, row))
    return rows
