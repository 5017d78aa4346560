"""What an interrupted calibration had already computed: JSON lines beside the file that it was to write."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from flowcut.atomic import write_file

Entry = dict[str, Any]


class Journal:
    """Results by key. The first line says of which inputs; a journal of others is begun anew.

    A line is written as soon as its result is known. The last one of a killed process may be cut: it is ignored, and
    so are the lines after it.
    """

    def __init__(self, path: Path, inputs: str) -> None:
        """Read the journal at `path`, or begin it.

        Args:
            inputs: identity of everything that the results depend on, beside their keys.

        Raises:
            EngineError: the folder cannot be written.
        """
        self._path = path
        lines = [{"inputs": inputs}, *_entries(path, inputs)]
        self._entries: dict[str, Entry] = {line["key"]: line for line in lines[1:]}
        # A new file, whole: another process may be writing to the old one.
        write_file(path, "".join(_line(line) for line in lines).encode())
        self._file: TextIO = path.open("a", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def add(self, key: str, entry: Entry) -> Entry:
        """Keep a result, in memory and on disk."""
        self._entries[key] = {"key": key, **entry}
        self._file.write(_line(self._entries[key]))
        self._file.flush()
        return self._entries[key]

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Done: nothing is left to resume."""
        self.close()
        self._path.unlink(missing_ok=True)


def _line(entry: Entry) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"


def _entries(path: Path, inputs: str) -> list[Entry]:
    """Whole lines of a journal of the same inputs; nothing of another, or of what is none."""
    found: list[Entry] = []
    with suppress(FileNotFoundError, ValueError), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            entry = json.loads(line)
            if not isinstance(entry, dict) or (entry.get("inputs") != inputs if number == 0 else "key" not in entry):
                break
            if number:
                found.append(entry)
    return found
