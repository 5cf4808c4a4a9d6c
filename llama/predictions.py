"""A prediction file that grows row by row, survives a crash, and never holds a row twice.

Finished rows are appended to `FILE.part<rank>` as they come. `finish` merges all parts into FILE, in the order of the
test rows, and removes them. `FILE.settings.json` holds what the answers depend on: a file made with other settings is
not added to. `.FILE.lock` keeps a second writer away.
"""

import glob
import json
from pathlib import Path
from typing import Any

from moa.files import atomic_write, lock, read_json, remove_stale_temp_files, write_json
from moa.reading import numbered_rows, safe_name, short_repr

Answer = str | list[str]
# Settings that are contents of files -> the flag that names these
HASHED = {"base_fingerprint": "--ckpt_dir", "data_sha256": "--data_path"}
HASHED |= dict.fromkeys(("adapter_sha256", "adapter_params_sha256"), "--adapter_path")


class Predictions:
    """The answers to `rows` (test rows) that `path` and its parts hold already, and those that are still missing."""

    def __init__(self, path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], rank: int, overwrite: bool):
        """Read what is there; nothing is changed before `start`.

        ValueError where it was made with other settings or belongs to other rows.
        """
        self.path, self.rows, self.settings, self.overwrite = path, rows, settings, overwrite
        self.answers: dict[int, Answer] = {}
        self._part, self._lock = self._beside(f"part{rank}"), None
        if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
            raise ValueError(f"{path}: expected the path of a file inside a folder")
        if overwrite:
            return
        settings_file = self._beside("settings.json")
        if not path.exists() and not any(part.stat().st_size for part in self._parts()):
            return  # a start that ended before the first answer
        if settings_file.exists():
            before = read_json(settings_file)
            for name in sorted(before.keys() | settings.keys()):
                if before.get(name) != settings.get(name):
                    was, now = (short_repr(values.get(name)) for values in (before, settings))
                    change = f"{safe_name(name)} {was}, now it is {now}"
                    change = f"another {HASHED[name]}, by its contents" if name in HASHED else change
                    raise ValueError(
                        f"{path}: was made with {change}; give --overwrite to begin anew, or another --save_path"
                    )
        else:
            raise ValueError(f"{path}: exists, but {settings_file.name} does not: give --overwrite to begin anew")
        self._read_file()
        self._read_parts()

    @property
    def missing(self) -> list[int]:
        """Numbers (from 0) of the rows without an answer."""
        return [i for i in range(len(self.rows)) if i not in self.answers]

    def start(self) -> None:
        """Prepare the folder: on rank 0, before any rank's `add`. ValueError where another process writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock_file = self.path.with_name(f".{self.path.name}.lock")
        self._lock = lock(lock_file, f"{self.path}: another generate.py is writing it").lock
        for file in (self.path, self._beside("settings.json"), self._part):
            remove_stale_temp_files(file.parent, file.name)
        if self.overwrite:
            self.path.unlink(missing_ok=True)
        write_json(self._beside("settings.json"), self.settings)
        # One part with all answers so far: no line in it was cut short by a crash
        atomic_write(self._part, b"".join(_part_line(i, answer) for i, answer in self.answers.items()))
        for part in set(self._parts()) - {self._part}:
            part.unlink()

    def require_started(self) -> None:
        """On every process, after `start`: ValueError where this one does not see rank 0's folder."""
        if not self._beside("settings.json").exists():
            raise ValueError(f"{self.path.parent}: not the folder that the first process writes; all must share it")

    def add(self, index: int, answer: Answer) -> None:
        """Keep an answer; once this returns, it survives the process."""
        with open(self._part, "ab") as part:
            part.write(_part_line(index, answer))

    def finish(self) -> None:
        """On rank 0, when all ranks have added theirs: write the whole file, then remove the parts."""
        self._read_parts()
        assert not self.missing, f"{len(self.missing)} rows without an answer"
        lines = (json.dumps(row | {"generate": self.answers[i]}, ensure_ascii=False) for i, row in enumerate(self.rows))
        # Half a surrogate pair, which UTF-8 cannot hold, is written as JSON spells it
        atomic_write(self.path, "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
        for part in self._parts():
            part.unlink()
        self.release()

    def release(self) -> None:
        """Let others write the file. Answers so far stay for the next one."""
        if self._lock is not None:
            self._lock.release()

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{ending}")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.part[0-9]*"))

    def _read_file(self) -> None:
        """Take the answers of a finished file, of which lines may have been removed since: they are in row order."""
        numbers = iter(range(len(self.rows)))
        for where, row in _json_lines(self.path):
            if not _is_answer(row.get("generate")):
                raise ValueError(f"{where}: field 'generate' is missing or not text")
            i = next((i for i in numbers if self.rows[i] | {"generate": None} == row | {"generate": None}), None)
            if i is None:
                raise ValueError(f"{where}: not one of the rows that --data_path and --max_rows ask for")
            self.answers[i] = row["generate"]

    def _read_parts(self) -> None:
        for part in self._parts():
            for where, row in _json_lines(part):
                index = row.get("index")
                if type(index) is not int or not 0 <= index < len(self.rows) or not _is_answer(row.get("generate")):
                    raise ValueError(f"{where}: not an answer to one of the {len(self.rows)} rows")
                self.answers.setdefault(index, row["generate"])


def _part_line(index: int, answer: Answer) -> bytes:
    return json.dumps({"index": index, "generate": answer}).encode() + b"\n"


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """("FILE: line N", object) of a file's lines, without a last one that a crash cut short. ValueError otherwise."""
    whole = path.read_bytes().rpartition(b"\n")[0].decode(errors="replace") if path.exists() else ""
    return [(f"{path}: {line}", row) for line, row in numbered_rows(whole, str(path))] if whole.strip() else []
