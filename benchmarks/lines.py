"""Result files that survive a kill: one JSON object a line, on the disk before the next begins.

Several processes may append to one file. A worker says what it starts before it starts it, so that
after a kill the file tells where it was, and a restarted worker goes on with the next. Needs
nothing but Python.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Lines:
    """Appends rows to a file; what an earlier process left cut off stays a line of its own."""

    def __init__(self, path: str | os.PathLike, **common: Any):
        self.path, self.common = Path(path), common
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def write(self, row: Row) -> Row:
        """Append a row, and return it with the facts that all rows share."""
        row = {**row, **self.common}
        # One write: lines of several processes do not mix.
        os.write(self._file, (json.dumps(row) + "\n").encode())
        os.fsync(self._file)
        return row

    def start(self, key: str, **facts: Any) -> None:
        """Append a line that says what is begun."""
        self.write({"started": key, **facts})


def read(path: str | os.PathLike) -> tuple[list[Row], int]:
    """Return the rows, and how many lines are no JSON object: the last one of a killed process."""
    rows, cut = [], 0
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            cut += bool(line.strip())
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            cut += 1
    return rows, cut


def last_run(rows: list[Row]) -> list[Row]:
    """Return the rows from the first line of the run that was begun last.

    All rows where no run has a name.
    """
    names = [row.get("run") for row in rows if row.get("op") == "environment"]
    if not names or not names[-1]:
        return rows
    return rows[
        next(
            i
            for i, row in enumerate(rows)
            if row.get("op") == "environment" and row.get("run") == names[-1]
        ) :
    ]


def finished(rows: Iterable[Row]) -> dict[str, Row]:
    """Return key to its last result, since the last line that begins a run."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.get("op") == "environment":
            found = {}
        elif "key" in row:
            found[row["key"]] = row
    return found


def unfinished(rows: Iterable[Row]) -> dict[str, Row]:
    """Return key to its line of beginning, of all that began and has no result."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.get("op") == "environment":
            found = {}
        elif "started" in row:
            found[row["started"]] = row
        elif "key" in row:
            found.pop(row["key"], None)
    return found


def planned(rows: Iterable[Row]) -> list[str]:
    """Return every key that was to come, since the last line that begins a run."""
    found: dict[str, None] = {}
    for row in rows:
        if row.get("op") == "environment":
            found = {}
        found |= dict.fromkeys(row.get("planned", ()))
    return list(found)
