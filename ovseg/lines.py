"""Files of JSON lines that are written while work goes on: what a kill cut off, or is no text, is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of whole lines; none if there is no file."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # JSON's and UTF-8's
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
