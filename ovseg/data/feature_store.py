"""Features of pictures on disk, in 16 bits: rows that are whole or not there.

A folder of one key holds

    index.json     what the key stands for, and the form of the rows; written last
    features.bin   [pictures, N D + E] float16, little endian: tokens, then the embedding
    done.bin       [pictures] bytes, 1 where the row is whole; written once the row is on disk
    pictures.bin   [pictures, 16] bytes, which picture each row is of, where the source can tell

so that a run that is killed, or fills the disk, leaves rows that count and rows that do not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..paths import no_file, read_bounded
from ..replacing import write_text
from .batches import StoredFeatures

_INDEX = "index.json"
_ROWS = "features.bin"
_DONE = "done.bin"
_PICTURES = "pictures.bin"
_IDENTITY = 16  # bytes of a picture
_COPIED = 64  # rows at a time
_LONGEST = 1 << 20  # bytes of an index
_NUMBERS = np.dtype("<f2")


@dataclass(frozen=True)
class Form:
    """The form of the rows.

    Attributes:
        pictures: how many rows there are.
        grid: (h, w) of the tokens.
        width: D of the tokens.
        embedding: E of the vector of a picture.
    """

    pictures: int
    grid: tuple[int, int]
    width: int
    embedding: int

    @property
    def tokens(self) -> int:
        """Numbers of a row that are tokens."""
        return self.grid[0] * self.grid[1] * self.width

    @property
    def row(self) -> int:
        """Numbers of a row."""
        return self.tokens + self.embedding

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self.pictures * self.row * _NUMBERS.itemsize


class FeatureStore:
    """The folder of one key.

    It may go to a worker process, which opens the files anew.

    Args:
        folder: of the key.
        form: of the rows.
        facts: what the key stands for, plain values.
    """

    def __init__(self, folder: Path, form: Form, facts: dict[str, Any]):
        self.folder = folder
        self.form = form
        self.facts = facts
        self._rows: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None}

    # What is there.

    def exists(self) -> bool:
        """Return whether the folder holds rows of this form, some of which may be missing."""
        try:
            found = json.loads(read_bounded(self.folder / _INDEX, _LONGEST).decode())
            sizes = [(self.folder / name).stat().st_size for name in (_ROWS, _DONE)]
        except (OSError, ValueError):
            return False
        return found == self._index() and sizes == [self.form.size, self.form.pictures]

    def missing(self) -> np.ndarray:
        """Return the numbers of the rows that are not whole, ascending."""
        marks = np.fromfile(self.folder / _DONE, np.uint8)
        return np.flatnonzero(marks != 1)

    def read(self, numbers: Sequence[int]) -> StoredFeatures:
        """Return copies of rows."""
        rows = torch.from_numpy(np.asarray(self._take(numbers), np.float16))
        tokens, embedding = rows.split([self.form.tokens, self.form.embedding], 1)
        tokens = tokens.reshape(len(rows), -1, self.form.width)
        return StoredFeatures(tokens, embedding, self.form.grid)

    def _take(self, numbers: Sequence[int]) -> np.ndarray:
        if self._rows is None:
            shape = (self.form.pictures, self.form.row)
            self._rows = np.memmap(self.folder / _ROWS, _NUMBERS, "r", shape=shape)
        return np.take(self._rows, np.asarray(numbers), axis=0)

    # Writing, for whoever holds the folder.

    def check_room(self, limit: int) -> None:
        """Look for room before anything is written.

        Raises:
            DataError: if the folders of all keys would exceed ``limit`` bytes, or the disk lacks
                the room.
        """
        above = self.folder.parent
        others = sum(
            (folder / name).stat().st_size
            for folder in above.iterdir()
            for name in (_INDEX, _ROWS, _DONE)
            if folder != self.folder and no_file(folder / name) is None
        )
        needed = self.form.size
        if needed + others > limit:
            beside = f", beside {in_words(others)} of other keys there," if others else ""
            raise DataError(
                f"train.cache {str(above)!r} would hold {in_words(needed)} of features{beside} and "
                f"train.cache_limit is {limit} bytes; expected a limit of "
                f"{needed + others} bytes, or subfolders that are not needed removed"
            )
        there = self._on_disk()
        free = shutil.disk_usage(above).free
        if needed - there > free:
            raise DataError(
                f"train.cache {str(above)!r} needs {in_words(needed - there)} more for the "
                f"features of {self.form.pictures} pictures and {in_words(free)} are free on its "
                "disk; expected more room, another folder, or no train.cache"
            )

    def create(self, identities: Sequence[bytes] | None = None) -> None:
        """Make the files, without a row; what was there, and is not of this form, goes.

        Args:
            identities: 16 bytes for each picture, by which others recognise it.
        """
        (self.folder / _INDEX).unlink(missing_ok=True)
        (self.folder / _PICTURES).unlink(missing_ok=True)
        if identities is not None:
            (self.folder / _PICTURES).write_bytes(b"".join(identities))
        for name, size in ((_DONE, self.form.pictures), (_ROWS, self.form.size)):
            with open(self.folder / name, "wb") as file:
                file.truncate(size)
        write_text(self.folder / _INDEX, json.dumps(self._index(), indent=2) + "\n")

    def write(self, numbers: Sequence[int], rows: np.ndarray) -> None:
        """Write rows, and once they are on the disk, that they are there.

        Raises:
            OSError: if they cannot be written; they do not count then.
        """
        size = self.form.row * _NUMBERS.itemsize
        with open(self.folder / _ROWS, "r+b", buffering=0) as file:
            for number, row in zip(numbers, rows, strict=True):
                _write_at(file, row.astype(_NUMBERS, copy=False).tobytes(), int(number) * size)
            os.fsync(file.fileno())
        with open(self.folder / _DONE, "r+b", buffering=0) as file:
            for number in numbers:
                _write_at(file, b"\x01", int(number))

    def take_over(self, own: Sequence[str]) -> int:
        """Copy rows of the same pictures from the folders beside that the same tower filled.

        Args:
            own: names of facts that are of this selection of pictures alone.

        Returns:
            How many rows were copied.
        """
        numbers = self._numbers_of_pictures()
        lacking = set(self.missing().tolist())
        copied = 0
        for folder in sorted(self.folder.parent.iterdir()):
            if folder == self.folder or not lacking or (other := self._like(folder, own)) is None:
                continue
            whole = set(range(other.form.pictures)) - set(other.missing().tolist())
            there = other._numbers_of_pictures()
            pairs = [
                (number, there[name])
                for name, number in numbers.items()
                if number in lacking and there.get(name) in whole
            ]
            for start in range(0, len(pairs), _COPIED):
                mine, theirs = zip(*pairs[start : start + _COPIED], strict=True)
                self.write(mine, other._take(theirs))
            lacking -= {number for number, _ in pairs}
            copied += len(pairs)
        return copied

    def _like(self, folder: Path, own: Sequence[str]) -> FeatureStore | None:
        """Return the store in a folder, if its rows are those that this one would hold."""
        try:
            found = json.loads(read_bounded(folder / _INDEX, _LONGEST).decode())
            form = Form(**{**found["form"], "grid": tuple(found["form"]["grid"])})
            other = FeatureStore(folder, form, found["facts"])
            if not other.exists():
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        alike = replace(form, pictures=self.form.pictures) == self.form
        mine, theirs = (
            {key: value for key, value in facts.items() if key not in own}
            for facts in (self.facts, other.facts)
        )
        return other if alike and mine == theirs else None

    def _numbers_of_pictures(self) -> dict[bytes, int]:
        """Return the number of each picture by its identity; nothing where that is not known."""
        try:
            data = read_bounded(self.folder / _PICTURES, _IDENTITY * self.form.pictures)
        except (OSError, ValueError):
            return {}
        if len(data) != _IDENTITY * self.form.pictures:
            return {}
        starts = range(0, len(data), _IDENTITY)
        return {data[start : start + _IDENTITY]: i for i, start in enumerate(starts)}

    def _index(self) -> dict[str, Any]:
        form = json.loads(json.dumps(asdict(self.form)))
        return {"format": 1, "form": form, "facts": self.facts}

    def _on_disk(self) -> int:
        """Return the bytes of rows that the disk holds already: files begin as holes."""
        try:
            found = os.stat(self.folder / _ROWS)
        except OSError:
            return 0
        return min(found.st_size, getattr(found, "st_blocks", 0) * 512)


def _write_at(file: RawIOBase, data: bytes, at: int) -> None:
    """Write all of ``data``: a disk that fills takes a part first."""
    file.seek(at)
    while data:
        data = data[file.write(data) :]


def in_words(size: int) -> str:
    """Say a number of bytes: "20.0 GB", "3.1 MB", "800 bytes"."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
