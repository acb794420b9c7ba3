"""Many results into one folder: which are done already."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.file_types import JOURNAL
from ..paths import no_file
from ..text_files import records_of
from ..weights.files import bytes_of
from .sources import Source


class Journal:
    """What has been done in a folder under the present settings: one line a picture, so that a
    killed run can go on.

    Args:
        folder: of the results; the journal is ``ovseg_segment.jsonl`` in it.
        settings: whatever changes a result. Results of other settings are not taken for done.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / JOURNAL
        self.key = f"{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}"
        self._done: dict[str, tuple[list[Any], dict[str, int]]] = {}
        for entry in records_of(self.path)[0]:  # without the line that a kill cut off
            with contextlib.suppress(KeyError, TypeError, ValueError):  # a line of something else
                self._note(
                    entry["name"],
                    [entry["settings"], *entry["source"]],
                    dict(entry.get("files") or {}),
                )

    def has(self, source: Source, files: Sequence[Path]) -> bool:
        """Whether this picture, as it is now, was written under these settings and its files are
        still there, as long as they were.
        """
        state, sizes = self._done.get(source.name, ([], {}))
        known = no_file(source.path) is None and state == [self.key, *_state(source)]
        return known and all(
            no_file(file) is None and _as_written(file.stat().st_size, sizes.get(file.name))
            for file in files
        )

    def add(self, source: Source, files: Sequence[Path]) -> None:
        """Note that ``files`` are the results of a picture."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        sizes = {file.name: file.stat().st_size for file in files}
        entry = {
            "name": source.name,
            "settings": self.key,
            "source": _state(source),
            "files": sizes,
        }
        with open(self.path, "a", encoding="utf-8") as journal:
            # It begins with a line break, in case a kill cut the last line off. One write: lines of
            # several processes do not mix.
            journal.write("\n" + json.dumps(entry))

    def _note(self, name: str, state: list[Any], sizes: dict[str, int]) -> None:
        """Other formats of the same result come one after another."""
        before, others = self._done.get(name, (None, {}))
        self._done[name] = (state, {**others, **sizes} if before == state else sizes)


def _as_written(size: int, noted: int | None) -> bool:
    """Journals of earlier versions hold no sizes; what is empty was never written."""
    return size > 0 if noted is None else size == noted


def _state(source: Source) -> list[Any]:
    status = source.path.stat()
    return [str(source.path.resolve()), source.member, status.st_size, status.st_mtime_ns]


def fingerprint(model: torch.nn.Module) -> str:
    """Eight digits that change with any weight."""
    value = 0
    for name, tensor in sorted(model.state_dict().items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(bytes_of(tensor), value)
    return f"{value:08x}"
