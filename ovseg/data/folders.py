"""Folders of pictures: the pictures in them, and by name or number everything that is none.

Every command looks through this.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from ..paths import no_file, no_folder
from ..progress import waiting
from .file_types import (
    HEIF_SUFFIXES,
    RAW_SUFFIXES,
    VIDEO_SUFFIXES,
    OwnResults,
    by_suffix,
    not_read,
    suffixes,
)
from .images import FORMATS, SUFFIXES

LOCK = ".ovseg.lock"  # of whoever writes into a folder, who may be this process
_READ = frozenset(SUFFIXES)
# Pictures to people, but not to read_image: what needs a library of its own, runs a program, or
# cannot be told from noise.
_OTHERS = suffixes(
    ".jxl .jxr .wdp .psd .psb .xcf .kra .svg .svgz .eps .ps .ai .wmf .emf .ico .icns .cur .tga "
    ".dds .exr .hdr .pcx .ras .sgi .rgb .xbm .xpm .fits .dcm .djvu .flif .bpg .pam"
)
UNREAD = tuple(
    suffix for suffix in (*HEIF_SUFFIXES, *RAW_SUFFIXES, *_OTHERS) if suffix not in _READ
)
# Copies and thumbnails that systems make, never the pictures.
_MADE_BY_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")


def hidden(name: str) -> bool:
    """Return whether a file or folder of that name is left out everywhere.

    Such are .ipynb_checkpoints, ._name.jpg, the parts of files that a kill left, thumbnails.
    """
    return name.startswith(".") or name in _MADE_BY_SYSTEMS


@dataclass
class Folder:
    """A folder, and what has been seen while walking through it.

    Attributes:
        root: where it began.
        pictures: paths below it that end as a picture does, with "/".
        bad: what looks like a picture and cannot be read, a line each: of formats that are not
            read, links to nothing, links to folders, FIFOs, folders named like a picture, folders
            that cannot be opened.
        hidden: paths of what was left out for its name.
        results: paths of pictures that earlier runs of this package wrote.
        others: files that are no pictures, by suffix.
    """

    root: Path
    pictures: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    _own: OwnResults = field(default_factory=OwnResults, repr=False)

    def walk(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Go through the root and each folder in it, in order.

        Links to folders are not followed: they may lead back. One look is taken at each folder,
        none at a file.

        Yields:
            The path below the root, "" or with "/" at its end; names of pictures; names of other
            files.
        """
        waiting = [""]
        while waiting:
            below = waiting.pop()
            pictures, others, folders = self._sorted_out(below)
            yield below, pictures, others
            waiting += [f"{below}{name}/" for name in reversed(folders)]

    def _sorted_out(self, below: str) -> tuple[list[str], list[str], list[str]]:
        """Sort one folder's names into pictures, other files and folders, and note the rest."""
        sorted_names: dict[str, list[str]] = {"picture": [], "other": [], "folder": []}
        try:
            with os.scandir(self.root / below) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self.bad.append(
                f"{self.root / below}: the folder cannot be looked through: {error.strerror}"
            )
            return [], [], []
        for entry in found:
            if entry.name.startswith(LOCK):
                continue
            if hidden(entry.name):
                self.hidden.append(f"{below}{entry.name}")
            elif (kind := self._kind_of(entry, below)) is not None:
                sorted_names[kind].append(entry.name)
        self.pictures += [f"{below}{name}" for name in sorted_names["picture"]]
        self.others.update(
            os.path.splitext(name)[1].lower() or "no suffix" for name in sorted_names["other"]
        )
        return sorted_names["picture"], sorted_names["other"], sorted_names["folder"]

    def _kind_of(self, entry: os.DirEntry, below: str) -> str | None:
        """Return whether it is a "picture", an "other" file or a "folder"; None where it is noted.

        What looks like a picture and cannot be read is noted in ``bad``.
        """
        suffix = os.path.splitext(entry.name)[1].lower()
        looks = suffix in _READ or suffix in UNREAD
        if entry.is_file(follow_symlinks=False) or _leads_to(entry, "is_file"):
            if not looks:
                return "other"
            if suffix in UNREAD:
                self.bad.append(f"{entry.path}: {not_read(suffix, ', '.join(FORMATS))}")
            elif self._own.holds(Path(entry.path)):
                self.results.append(f"{below}{entry.name}")
            else:
                return "picture"
            return None
        if _leads_to(entry, "is_dir"):
            self.bad.append(
                f"{entry.path}: a link to a folder, which is not followed; give that folder itself"
            )
            return None
        if entry.is_dir(follow_symlinks=False):
            if looks:
                self.bad.append(f"{entry.path}: a folder that is named like a picture")
            return "folder"
        if looks or (entry.is_symlink() and not suffix):  # it may have led to a folder
            self.bad.append(f"{entry.path} {no_file(entry.path) or 'is gone'}; expected a picture")
            return None
        return "other"

    def found(self) -> str:
        """Say what is there, for the message that something else is not: "3 .tar, 1 .json"."""
        parts = [f"{len(self.pictures)} pictures"] if self.pictures else []
        parts += [f"{number} {suffix}" for suffix, number in self.others.most_common(6)]
        if self.bad:
            parts.append(f"{len(self.bad)} that cannot be read (the first: {self.bad[0]})")
        if self.hidden:
            parts.append(f"{len(self.hidden)} hidden")
        if self.results:
            parts.append(f"{len(self.results)} results of earlier runs")
        return ", ".join(parts) or "nothing"

    def left_out(self, *, others: bool = True) -> list[str]:
        """Tell what is no picture: results of earlier runs, hidden names and other files.

        Args:
            others: whether other files are told of.
        """
        lines = []
        if self.results:
            lines.append(
                f"{self.root}: {len(self.results)} results of earlier runs of ovseg are left out: "
                f"{_first_four(self.results)}"
            )
        if self.hidden:
            names = list(dict.fromkeys(path.rpartition("/")[2] for path in self.hidden))
            lines.append(
                f"{self.root}: {len(self.hidden)} hidden files and folders are left out: "
                f"{_first_four(names)}"
            )
        if self.others and others:
            kinds = ", ".join(f"{number} {suffix}" for suffix, number in self.others.most_common(6))
            lines.append(
                f"{self.root}: {sum(self.others.values())} files are no pictures and are left out: "
                f"{kinds}"
            )
            lines += [f"{self.root}: {line}" for line in self.videos()]
        return lines

    def videos(self) -> list[str]:
        """Return what to do about videos, if there are some, in one line."""
        return [
            f"{suffix} is {by_suffix(suffix)}" for suffix in VIDEO_SUFFIXES if suffix in self.others
        ][:1]


def look(root: str | Path) -> Folder:
    """Walk a folder to its end; ``pictures`` sorted.

    Raises:
        DataError: if it is none.
    """
    if (found := no_folder(root)) is not None:
        raise DataError(f"{str(root)!r} {found}; expected a folder")
    folder = Folder(Path(root))
    with waiting(f"looking through {root}"):
        for _ in folder.walk():
            pass
    folder.pictures.sort()
    return folder


def _first_four(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def _leads_to(entry: os.DirEntry, what: str) -> bool:
    """Return whether it is a link to a file (``is_file``) or to a folder (``is_dir``)."""
    try:
        return entry.is_symlink() and getattr(entry, what)()
    except OSError:  # a link that leads back to itself
        return False
