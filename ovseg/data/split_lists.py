"""Lists of a split: a line is the key of a picture, in any of the forms that are published."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from ..paths import no_file
from ..text_files import lines_of
from .images import SUFFIXES

_ENDING = "(?:" + "|".join(map(re.escape, SUFFIXES)) + ")"


@dataclass
class KeyList:
    """Keys in their order, each once.

    Attributes:
        repeated: keys that stand several times, and how often.
        unmatched: lines whose two names belong to different keys.
    """

    keys: list[str]
    repeated: dict[str, int] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)


def read_list(path: Path, root: Path, images: str) -> KeyList:
    """Read the keys that a list names.

    A line is a key, spaces and all, if the picture of that key is there, or if it has no other
    form: with the picture's suffix (``x.jpg``), with its folder too (``/JPEGImages/x.jpg``),
    followed by its mask (``/JPEGImages/x.jpg /SegmentationClassAug/x.png``) or by itself, or by -1,
    0 or 1, as VOC's lists of one class are.

    Args:
        path: of the list.
        root: of the set.
        images: where its pictures lie, with ``{}`` for the key.

    Raises:
        DataError: for a list that is missing, empty or no UTF-8 text.
    """
    expected = "a text file with the key of a picture on each line"
    counts: dict[str, int] = {}
    unmatched = []
    for line in lines_of(path, "list", expected, DataError):
        key, mask = _key(line, images, root)
        name = re.escape(_last(key))
        if mask is not None and not re.match(rf"{name}(?![0-9A-Za-z])", _last(mask)):
            unmatched.append(f"{path}: {line!r} names a picture and a mask of different keys")
        counts[key] = counts.get(key, 0) + 1
    repeated = {key: number for key, number in counts.items() if number > 1}
    return KeyList(list(counts), repeated, unmatched)


def _key(line: str, images: str, root: Path) -> tuple[str, str | None]:
    """(key of a line, the mask's name if the line has one)."""
    columns = line.split()
    suffix = Path(line).suffix.lower() in SUFFIXES
    if (len(columns) == 1 and not suffix and "/" not in line) or _is_there(line, images, root):
        return line, None  # as most lists are, or a key that looks like another form
    if (pair := re.match(rf"(.+?{_ENDING})\s+(\S.*)$", line, re.IGNORECASE)) is not None:
        return _bare(pair[1], images, root), pair[2]
    if len(columns) == 2 and columns[0] == columns[1]:
        return columns[0], None
    if (flag := re.search(r"\s+(-1|0|1)$", line)) is not None and _is_there(
        line[: flag.start()], images, root
    ):
        return line[: flag.start()], None
    return _bare(line, images, root), None


def _bare(name: str, images: str, root: Path) -> str:
    """Return the key of a picture's name: without suffix, folder and what leads there."""
    before, after = images.split("{}")
    if before and f"/{before}" in f"/{name}":
        name = f"/{name}".rpartition(f"/{before}")[2]
    if after and name.endswith(after):
        return name.removesuffix(after)
    stem = re.sub(f"{_ENDING}$", "", name, flags=re.IGNORECASE)
    return stem if _is_there(stem, images, root) else name


def _is_there(key: str, images: str, root: Path) -> bool:
    return no_file(root / images.format(key)) is None


def _last(name: str) -> str:
    return name.rpartition("/")[2]
