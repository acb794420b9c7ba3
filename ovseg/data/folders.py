"""What lies in a folder of pictures: the pictures, and by name or number everything that is none. Every command looks through this."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from ..paths import no_file, no_folder
from ..progress import waiting
from .foreign_files import VIDEO_SUFFIXES, by_suffix, not_read
from .images import FORMATS, SUFFIXES
from .own_results import OwnResults

# Pictures to people, but not to read_image: what needs a library of its own, runs a program, or cannot be told from noise.
_OTHERS = (".heic", ".heif", ".hif", ".jxl", ".jxr", ".wdp", ".psd", ".psb", ".xcf", ".kra", ".svg", ".svgz", ".eps", ".ps", ".ai", ".wmf",
          ".emf", ".ico", ".icns", ".cur", ".tga", ".dds", ".exr", ".hdr", ".pcx", ".ras", ".sgi", ".rgb", ".xbm", ".xpm", ".fits", ".dcm",
          ".djvu", ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw",
          ".x3f", ".3fr", ".erf", ".kdc", ".mrw", ".iiq", ".flif", ".bpg", ".pam")  # fmt: skip
LOCK = ".ovseg.lock"  # of whoever writes into a folder, who may be this process
_READ = frozenset(SUFFIXES)
UNREAD = tuple(suffix for suffix in _OTHERS if suffix not in _READ)
_MADE_BY_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")  # copies and thumbnails, never the pictures


def hidden(name: str) -> bool:
    """Whether a file or folder is left out everywhere: .ipynb_checkpoints, ._name.jpg, the parts of files that a kill left, thumbnails."""
    return name.startswith(".") or name in _MADE_BY_SYSTEMS


@dataclass
class Folder:
    """What has been seen while walking.

    Attributes:
        root: where it began.
        pictures: paths below it that end as a picture does, with "/".
        bad: what looks like a picture and cannot be read, a line each: of formats that are not read, links to nothing, links to folders,
            FIFOs, folders named like a picture, folders that cannot be opened.
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
        """(path below the root, "" or with "/" at its end; names of pictures; names of other files) of the root and each folder in it, in
        order. Links to folders are not followed: they may lead back. One look at each folder, none at a file."""
        waiting = [""]
        while waiting:
            below = waiting.pop()
            pictures, others, folders = self._sorted_out(below)
            yield below, pictures, others
            waiting += [f"{below}{name}/" for name in reversed(folders)]

    def _sorted_out(self, below: str) -> tuple[list[str], list[str], list[str]]:
        pictures, others, folders = [], [], []
        try:
            with os.scandir(self.root / below) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self.bad.append(f"{self.root / below}: the folder cannot be looked through: {error.strerror}")
            return [], [], []
        for entry in found:
            name = entry.name
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(LOCK):
                continue
            if hidden(name):
                self.hidden.append(f"{below}{name}")
            elif entry.is_file(follow_symlinks=False) or _leads_to(entry, "is_file"):
                if suffix in _READ and self._own.holds(Path(entry.path)):
                    self.results.append(f"{below}{name}")
                elif suffix in _READ:
                    pictures.append(name)
                elif suffix in UNREAD:
                    self.bad.append(f"{entry.path}: {not_read(suffix, ', '.join(FORMATS))}")
                else:
                    others.append(name)
            elif _leads_to(entry, "is_dir"):
                self.bad.append(f"{entry.path}: a link to a folder, which is not followed; give that folder itself")
            else:
                looks = suffix in _READ or suffix in UNREAD
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                    if looks:
                        self.bad.append(f"{entry.path}: a folder that is named like a picture")
                elif looks or (entry.is_symlink() and not suffix):  # what it led to may have been a folder
                    self.bad.append(f"{entry.path} {no_file(entry.path) or 'is gone'}; expected a picture")
                else:
                    others.append(name)
        self.pictures += [f"{below}{name}" for name in pictures]
        self.others.update(os.path.splitext(name)[1].lower() or "no suffix" for name in others)
        return pictures, others, folders

    def found(self) -> str:
        """What is there, for the message that something else is not: "3 .tar, 1 .json"."""
        parts = [f"{len(self.pictures)} pictures"] if self.pictures else []
        parts += [f"{number} {suffix}" for suffix, number in self.others.most_common(6)]
        parts += [f"{len(self.bad)} that cannot be read (the first: {self.bad[0]})"] if self.bad else []
        parts += [f"{len(self.hidden)} hidden"] if self.hidden else []
        parts += [f"{len(self.results)} results of earlier runs"] if self.results else []
        return ", ".join(parts) or "nothing"

    def left_out(self) -> list[str]:
        """Lines about what is no picture: results of earlier runs, hidden names and other files."""
        lines = []
        if self.results:
            more = ", ..." if len(self.results) > 4 else ""
            lines.append(f"{self.root}: {len(self.results)} results of earlier runs of ovseg are left out: "
                         f"{', '.join(self.results[:4])}{more}")
        if self.hidden:
            names = dict.fromkeys(path.rpartition("/")[2] for path in self.hidden)
            more = ", ..." if len(names) > 4 else ""
            lines.append(f"{self.root}: {len(self.hidden)} hidden files and folders are left out: {', '.join(list(names)[:4])}{more}")
        if self.others:
            lines.append(f"{self.root}: {sum(self.others.values())} files are no pictures and are left out: "
                         + ", ".join(f"{number} {suffix}" for suffix, number in self.others.most_common(6)))
            lines += [f"{self.root}: {line}" for line in self.videos()]
        return lines

    def videos(self) -> list[str]:
        """Return what to do about videos, if there are some, in one line."""
        return [f"{suffix} is {by_suffix(suffix)}" for suffix in VIDEO_SUFFIXES if suffix in self.others][:1]


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


def _leads_to(entry: os.DirEntry, what: str) -> bool:
    """Whether it is a link to a file (``is_file``) or to a folder (``is_dir``)."""
    try:
        return entry.is_symlink() and getattr(entry, what)()
    except OSError:  # a link that leads back to itself
        return False
