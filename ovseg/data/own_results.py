"""Pictures that this package wrote: marked inside, so that a search for pictures knows results of earlier runs from a user's own.

What counts is the mark, or the journal of ``ovseg segment``; the name only says where to look for a mark: few files are opened.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ..text_files import records_of

JOURNAL = "ovseg_segment.jsonl"
SOFTWARE = "ovseg"
# Of segment; of eval, demo and train; of validation; of data check.
_NAMED = re.compile(r"\.(overlay|mask|strip)\.png$|(^|_)(gallery|sweep|confusion|classes|loss|train|val|test)\.png$|^step_\d{8}\.png$")
_IN_FOLDERS = (".ovseg.lock", JOURNAL, "results.json", "log.jsonl")  # what tells a folder of results


def png_mark(path: str | os.PathLike) -> dict[str, Any]:
    """Return options for Pillow's ``save``: a mark in a PNG, nothing in other files."""
    if Path(path).suffix.lower() != ".png":
        return {}
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    return {"pnginfo": info}


class OwnResults:
    """Knows results of earlier runs; remembers the journals that it has read."""

    def __init__(self) -> None:
        self._journals: dict[Path, dict[str, int]] = {}

    def holds(self, path: Path) -> bool:
        """Return whether the file is a result: named like one, and marked as one or, unchanged since, in the journal of a folder above."""
        if _NAMED.search(path.name) is None:
            return False
        try:
            with open(path, "rb") as file:
                start = file.read(256)  # Pillow writes the mark right after the header
            size = path.stat().st_size
        except OSError:
            return False
        if start.startswith(b"\x89PNG") and f"tEXtSoftware\0{SOFTWARE}".encode() in start:
            return True
        whole = Path(os.path.abspath(path))
        return any(self._written(folder).get(whole.relative_to(folder).as_posix()) == size for folder in whole.parents)

    def _written(self, folder: Path) -> dict[str, int]:
        """Sizes of the files that a folder's journal names, by their paths below it."""
        if folder not in self._journals:
            found: dict[str, int] = {}
            try:
                entries = records_of(folder / JOURNAL)[0]
            except OSError:
                entries = []
            for entry in entries:
                name, files = entry.get("name"), entry.get("files")
                if isinstance(name, str) and isinstance(files, dict):
                    found |= {(Path(name).parent / file).as_posix(): size for file, size in files.items()}
            self._journals[folder] = found
        return self._journals[folder]


def is_folder_of_results(folder: Path) -> bool:
    """Return whether a run writes or wrote into it."""
    return any((folder / name).exists() for name in _IN_FOLDERS)
