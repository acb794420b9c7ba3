"""Many results into one folder: which are done already."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..paths import no_file
from ..text_files import records_of
from .sources import Source


class Journal:
    """What has been done in a folder under the present settings: one line a picture, so that a killed run can go on.

    Args:
        folder: of the results; the journal is ``ovseg_segment.jsonl`` in it.
        settings: whatever changes a result. Results of other settings are not taken for done.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / "ovseg_segment.jsonl"
        self.key = f"{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}"
        self._done: dict[str, list[Any]] = {}
        for entry in records_of(self.path)[0]:  # without the line that a kill cut off
            try:
                self._done[entry["name"]] = [entry["settings"], *entry["source"]]
            except (KeyError, TypeError):
                continue

    def has(self, source: Source, files: Sequence[Path]) -> bool:
        """Whether this picture, as it is now, was written under these settings and its files are still there."""
        known = no_file(source.path) is None and self._done.get(source.name) == [self.key, *_state(source)]
        return known and all(no_file(file) is None for file in files)

    def add(self, source: Source) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            # It begins with a line break, in case a kill cut the last line off.
            file.write("\n" + json.dumps({"name": source.name, "settings": self.key, "source": _state(source)}))


def _state(source: Source) -> list[Any]:
    status = source.path.stat()
    return [str(source.path.resolve()), source.member, status.st_size, status.st_mtime_ns]


def fingerprint(model: torch.nn.Module) -> str:
    """Eight digits that change with any weight."""
    value = 0
    for name, tensor in sorted(model.state_dict().items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return f"{value:08x}"
