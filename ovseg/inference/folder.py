"""Many pictures into one folder: where results go, which are done already, files that are whole or not there."""

from __future__ import annotations

import glob
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..data.images import SUFFIXES
from ..errors import InputError


def find_pictures(names: Sequence[str]) -> list[tuple[str, Path]]:
    """(result name, file) of files, folders (all pictures below) and patterns such as ``photos/*.jpg``.

    The result name of a file in a folder is its path below that folder without the suffix, so that folders are mirrored. Where two
    pictures differ in their suffix alone, both keep it: ``a_png``, ``a_jpg``.

    Raises:
        InputError: for a pattern or folder without pictures, and for two files of one result name.
    """
    found: list[tuple[Path, Path]] = []  # path below the folder, file
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not below:
                raise InputError(f"folder {name!r} holds no picture; expected files ending in {', '.join(SUFFIXES)}")
            found += [(p.relative_to(path), p) for p in below]
        elif glob.has_magic(name) and not path.exists():
            matches = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
            if not matches:
                raise InputError(f"no file matches {name!r}")
            found += [(Path(p.name), p) for p in matches]
        else:
            found.append((Path(path.name), path))
    shared = Counter(relative.with_suffix("") for relative, _ in found)
    results: dict[str, Path] = {}
    for relative, path in found:
        plain = relative.with_suffix("")
        name = str(plain if shared[plain] == 1 else plain.with_name(f"{plain.name}_{relative.suffix[1:]}"))
        if name in results and results[name].resolve() != path.resolve():
            raise InputError(f"{str(results[name])!r} and {str(path)!r} would both be written as {name!r}; expected one folder at a time")
        results[name] = path
    return list(results.items())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name of the same suffix to write to, renamed to ``path`` at the end: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part.{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
        if self.path.exists():
            for line in self.path.read_text("utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._done[entry["name"]] = [entry["settings"], *entry["source"]]
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a kill cut off

    def has(self, name: str, source: Path, files: Sequence[Path]) -> bool:
        """Whether this picture, as it is now, was written under these settings and its files are still there."""
        return source.is_file() and self._done.get(name) == [self.key, *_state(source)] and all(file.is_file() for file in files)

    def add(self, name: str, source: Path) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            # It begins with a line break, in case a kill cut the last line off.
            file.write("\n" + json.dumps({"name": name, "settings": self.key, "source": _state(source)}))


def _state(source: Path) -> list[Any]:
    status = source.stat()
    return [str(source.resolve()), status.st_size, status.st_mtime_ns]


def fingerprint(model: torch.nn.Module) -> str:
    """Eight digits that change with any weight."""
    value = 0
    for name, tensor in sorted(model.state_dict().items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return f"{value:08x}"
