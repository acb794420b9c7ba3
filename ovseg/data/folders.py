"""What lies in a folder of pictures: the pictures, and by name or number everything that is none.

Every command looks through this.

Pictures in shards: uncompressed .tar files as webdataset writes them, read by offset; whole, cut
off, hostile, by the range.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath

from ..errors import DataError, InputError
from ..paths import no_file, no_folder
from ..progress import waiting
from .file_types import VIDEO_SUFFIXES, OwnResults, by_suffix, not_read
from .images import FORMATS, SUFFIXES

# Pictures to people, but not to read_image: what needs a library of its own, runs a program, or
# cannot be told from noise.
_OTHERS = (
    ".heic",
    ".heif",
    ".hif",
    ".jxl",
    ".jxr",
    ".wdp",
    ".psd",
    ".psb",
    ".xcf",
    ".kra",
    ".svg",
    ".svgz",
    ".eps",
    ".ps",
    ".ai",
    ".wmf",
    ".emf",
    ".ico",
    ".icns",
    ".cur",
    ".tga",
    ".dds",
    ".exr",
    ".hdr",
    ".pcx",
    ".ras",
    ".sgi",
    ".rgb",
    ".xbm",
    ".xpm",
    ".fits",
    ".dcm",
    ".djvu",
    ".raw",
    ".dng",
    ".cr2",
    ".cr3",
    ".crw",
    ".nef",
    ".nrw",
    ".arw",
    ".srf",
    ".sr2",
    ".orf",
    ".rw2",
    ".raf",
    ".pef",
    ".srw",
    ".x3f",
    ".3fr",
    ".erf",
    ".kdc",
    ".mrw",
    ".iiq",
    ".flif",
    ".bpg",
    ".pam",
)
LOCK = ".ovseg.lock"  # of whoever writes into a folder, who may be this process
_READ = frozenset(SUFFIXES)
UNREAD = tuple(suffix for suffix in _OTHERS if suffix not in _READ)
_MADE_BY_SYSTEMS = (
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
)  # copies and thumbnails, never the pictures


def hidden(name: str) -> bool:
    """Whether a file or folder is left out everywhere: .ipynb_checkpoints, ._name.jpg, the parts of
    files that a kill left, thumbnails.
    """
    return name.startswith(".") or name in _MADE_BY_SYSTEMS


@dataclass
class Folder:
    """What has been seen while walking.

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
        """(path below the root, "" or with "/" at its end; names of pictures; names of other files)
        of the root and each folder in it, in order. Links to folders are not followed: they may
        lead back. One look at each folder, none at a file.
        """
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
            self.bad.append(
                f"{self.root / below}: the folder cannot be looked through: {error.strerror}"
            )
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
                self.bad.append(
                    f"{entry.path}: a link to a folder, which is not followed; give that folder "
                    "itself"
                )
            else:
                looks = suffix in _READ or suffix in UNREAD
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                    if looks:
                        self.bad.append(f"{entry.path}: a folder that is named like a picture")
                elif looks or (
                    entry.is_symlink() and not suffix
                ):  # what it led to may have been a folder
                    self.bad.append(
                        f"{entry.path} {no_file(entry.path) or 'is gone'}; expected a picture"
                    )
                else:
                    others.append(name)
        self.pictures += [f"{below}{name}" for name in pictures]
        self.others.update(os.path.splitext(name)[1].lower() or "no suffix" for name in others)
        return pictures, others, folders

    def found(self) -> str:
        """What is there, for the message that something else is not: "3 .tar, 1 .json"."""
        parts = [f"{len(self.pictures)} pictures"] if self.pictures else []
        parts += [f"{number} {suffix}" for suffix, number in self.others.most_common(6)]
        parts += (
            [f"{len(self.bad)} that cannot be read (the first: {self.bad[0]})"] if self.bad else []
        )
        parts += [f"{len(self.hidden)} hidden"] if self.hidden else []
        parts += [f"{len(self.results)} results of earlier runs"] if self.results else []
        return ", ".join(parts) or "nothing"

    def left_out(self) -> list[str]:
        """Lines about what is no picture: results of earlier runs, hidden names and other files."""
        lines = []
        if self.results:
            more = ", ..." if len(self.results) > 4 else ""
            lines.append(
                f"{self.root}: {len(self.results)} results of earlier runs of ovseg are left out: "
                f"{', '.join(self.results[:4])}{more}"
            )
        if self.hidden:
            names = dict.fromkeys(path.rpartition("/")[2] for path in self.hidden)
            more = ", ..." if len(names) > 4 else ""
            lines.append(
                f"{self.root}: {len(self.hidden)} hidden files and folders are left out: "
                f"{', '.join(list(names)[:4])}{more}"
            )
        if self.others:
            lines.append(
                f"{self.root}: {sum(self.others.values())} files are no pictures and are left out: "
                + ", ".join(f"{number} {suffix}" for suffix, number in self.others.most_common(6))
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


def _leads_to(entry: os.DirEntry, what: str) -> bool:
    """Whether it is a link to a file (``is_file``) or to a folder (``is_dir``)."""
    try:
        return entry.is_symlink() and getattr(entry, what)()
    except OSError:  # a link that leads back to itself
        return False


_MOST_BYTES = 256 << 20  # of a member
_MOST_NAMES = 100_000  # that braces stand for
_BLOCK = 512
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Member:
    """A picture in a shard: its name there, and where its bytes are."""

    name: PurePosixPath
    offset: int
    size: int


@dataclass
class Shard:
    """What a shard holds.

    Attributes:
        members: pictures in the order of the file; of several under one name the last, as tar
            unpacks them.
        bad: what is wrong, a line each: with the shard, or with a member that is left out.
        repeated: names that stand several times.
        hidden: how many members were left out for their names.
        whole: False: it is damaged or cut off.
    """

    path: Path
    members: list[Member] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    hidden: int = 0
    whole: bool = True


def read_shard(path: Path) -> Shard:
    """The pictures of a shard, without their bytes.

    Whatever is wrong inside is told in ``bad``; the rest can be used.

    Raises:
        InputError: if there is no file.
    """
    if (found := no_file(path)) is not None:
        raise InputError(f"shard {str(path)!r} {found}; expected a .tar file")
    shard = Shard(path)
    members: dict[PurePosixPath, Member] = {}
    try:
        for member in _headers(path):
            name = PurePosixPath(member.name)
            if any(hidden(part) for part in name.parts if part not in (".", "..")):
                shard.hidden += 1
            elif (why := _refused(member, name)) is not None:
                shard.bad.append(f"{path}:{member.name}: {why}")
            elif name.suffix.lower() in SUFFIXES and member.isreg():
                if members.pop(name, None) is not None:
                    shard.repeated.append(str(name))
                members[name] = Member(name, member.offset_data, member.size)
    except Exception as error:  # hostile headers raise about anything
        shard.whole = False
        shard.bad.append(
            f"{path}: {error or type(error).__name__}; the shard is damaged or cut off after "
            f"{len(members)} pictures; "
            "expected an uncompressed .tar"
        )
    shard.members = list(members.values())
    return shard


def expand_braces(name: str) -> list[str]:
    """``shard-{000..002}.tar`` and ``{train,val}.tar`` as the names they stand for, in order; a
    name without them as it is.

    Raises:
        InputError: for a range that is none, or more than 100 000 names.
    """
    parts = _BRACES.split(name)
    choices = [_choices(part, name) if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for some in choices:
        count *= len(some)
    if count > _MOST_NAMES:
        raise InputError(f"{name!r} stands for {count} names; expected at most {_MOST_NAMES}")
    return ["".join(some) for some in product(*choices)]


def _choices(inside: str, name: str) -> list[str]:
    if (found := re.fullmatch(r"(\d+)\.\.(\d+)", inside)) is not None:
        first, last = map(int, found.groups())
        if last < first:
            raise InputError(
                f"{name!r} counts from {first} to {last}; expected the smaller number first"
            )
        if last - first >= _MOST_NAMES:
            raise InputError(
                f"{name!r} stands for {last - first + 1} names; expected at most {_MOST_NAMES}"
            )
        width = (
            max(map(len, found.groups()))
            if any(len(text) > 1 and text[0] == "0" for text in found.groups())
            else 0
        )
        return [f"{number:0{width}d}" for number in range(first, last + 1)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members one after the other; then a look at what follows the last, where tarfile itself
    stops without a word.

    Raises:
        tarfile.TarError: for anything but an end as it must be.
    """
    whole = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        end = 0
        while (member := tar.next()) is not None:
            if tar.offset <= end:  # a size below zero would lead round in a circle
                raise tarfile.ReadError(
                    f"the header at byte {member.offset} gives {member.name!r} {member.size} bytes"
                )
            end = tar.offset
            stored = member.size if member.isreg() and not member.issparse() else 0
            if member.offset_data + stored > whole:
                raise tarfile.ReadError(
                    f"{member.name!r} ends {member.offset_data + stored - whole} bytes behind the "
                    "file"
                )
            yield member
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise tarfile.ReadError(
                "the block that ends an archive is missing"
                if not block
                else f"a header is cut off at byte {end}"
            )
        if any(block):
            raise tarfile.ReadError(f"the header at byte {end} is damaged")
        while data := file.read(1 << 20):
            if data.strip(b"\0"):
                raise tarfile.ReadError(
                    f"more follows its end at byte {end}, as where archives are put together by cat"
                )


def _refused(member: tarfile.TarInfo, name: PurePosixPath) -> str | None:
    """Why a member is not taken, if it is or looks like a picture."""
    suffix = name.suffix.lower()
    if suffix not in SUFFIXES and suffix not in UNREAD:
        return None
    if member.islnk() or member.issym():
        return "a link, which is not followed"
    if not member.isreg():
        return "a folder that is named like a picture" if member.isdir() else "no regular file"
    if suffix in UNREAD:
        return not_read(suffix, ", ".join(FORMATS))
    if name.is_absolute() or ".." in name.parts:
        return "the name leaves the folder of the results"
    if member.issparse():
        return "stored with holes (sparse); expected a plain file"
    if member.size > _MOST_BYTES:
        return f"{member.size} bytes; the limit is {_MOST_BYTES}"
    return None
