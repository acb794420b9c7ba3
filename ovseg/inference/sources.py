"""Many pictures: files, folders, patterns, list files, and the pictures in shards (.tar)."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from .. import distributed
from ..data.file_types import OwnResults, by_suffix, not_read
from ..data.folders import UNREAD, Folder, hidden, look
from ..data.images import FORMATS, SUFFIXES
from ..data.shards import expand_braces, read_shard
from ..errors import InputError
from ..paths import address, no_file, no_folder
from ..progress import note
from ..text_files import lines_of

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


@dataclass(frozen=True)
class Source:
    """A picture somewhere.

    Attributes:
        name: of its results, without suffix; may hold folders.
        path: the file, or the shard that holds it.
        offset, size: of its bytes in the shard; None for a file.
        member: its name in the shard.
    """

    name: str
    path: Path
    offset: int | None = None
    size: int = 0
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def read(self) -> Path | bytes:
        """Return what ``read_image`` takes.

        Raises:
            InputError: if the shard has become shorter since it was listed.
        """
        if self.offset is None:
            return self.path
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise InputError(f"cannot read {self}: {error}") from error
        if len(data) != self.size:
            raise InputError(f"{self} is cut off: {len(data)} of {self.size} bytes are there")
        return data


Found = tuple[PurePosixPath, Source]  # the path of the results, with the picture's suffix


def find_pictures(names: Sequence[str]) -> tuple[list[Source], list[str]]:
    """Find the pictures that ``names`` stand for.

    Returns them, and what is wrong among them, a line each: files that look like pictures and are
    none, damaged shards.

    A name is a picture; a folder (all pictures below); a pattern such as ``photos/*.jpg`` or
    ``shards/*.tar``; a range of names, ``shard-{000..002}.tar``; a list of any of these, ``.txt``
    with a name on each line, relative to the list; or a shard, an uncompressed ``.tar`` as
    webdataset writes it. Of folders and patterns hidden files and folders, files that are no
    pictures and results of earlier runs are left out, which is said once.

    The result name of a picture in a folder is its path below that folder without the suffix, so
    that folders are mirrored; in a shard, the shard's name and the member's. Where two pictures
    differ in their suffix alone, both keep it: ``a_png``, ``a_jpg``.

    Raises:
        InputError: for a pattern, list, folder or shard without pictures, and for two pictures of
            one result name.
    """
    search = _Search()
    found = [entry for name in names for entry in search.expand(name)]
    if distributed.rank() == 0:
        for line in search.notes:
            note(line)
    named = _result_names(found)
    results: dict[str, Source] = {}
    for relative, source in found:
        name = named[relative]
        if name in results and _place(results[name]) != _place(source):
            raise InputError(
                f"{str(results[name])!r} and {str(source)!r} would both be written as {name!r}; "
                "expected one folder at a time"
            )
        results.setdefault(name, replace(source, name=name))
    return list(results.values()), search.problems


def _result_names(found: Iterable[Found]) -> dict[PurePosixPath, str]:
    """Return the result name of each path: the path without its suffix.

    Paths that would have one name keep their suffix, and so do those that are then in the way of
    such a name.
    """
    relatives = [relative for relative, _ in set(found)]
    names = {relative: str(relative.with_suffix("")) for relative in relatives}
    kept: set[PurePosixPath] = set()
    while True:
        counts = Counter(names[relative] for relative in relatives)
        in_the_way = {relative for relative, name in names.items() if counts[name] > 1} - kept
        if not in_the_way:
            return names
        for relative in in_the_way:
            names[relative] = str(relative.with_name(f"{relative.stem}_{relative.suffix[1:]}"))
        kept |= in_the_way


def _place(source: Source) -> tuple[str, int | None]:
    # Path.resolve fails on links that lead to each other.
    return os.path.realpath(source.path), source.offset


class _Search:
    """A search for what names stand for.

    Attributes:
        problems: what cannot be done, a line each.
        notes: what is left out on purpose.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def expand(self, name: str, *, listed: bool = False) -> list[Found]:
        """Find the pictures of a name; ``listed``: it stands in a list, which names no list."""
        path = Path(name)
        if not name.strip():
            raise InputError(
                "a name of pictures is empty; expected a picture, folder, pattern, list or shard"
            )
        if (what := address(name)) is not None:
            raise InputError(f"{name!r} {what}")
        if no_folder(path) is None:
            return self._folder(path)
        if not os.path.lexists(path):  # a long pattern too
            if (names := expand_braces(name)) != [name]:
                return self._each(names, lambda one: self.expand(one, listed=listed))
            if glob.has_magic(name):
                return self._pattern(name)
        suffix = path.suffix.lower()
        if suffix == ".txt":
            if listed:
                raise InputError(
                    f"list {name!r} is named by a list; expected pictures, folders, patterns or "
                    "shards there"
                )
            return self._list(path)
        if suffix == ".tar":
            return self._shard(path)
        if suffix in _COMPRESSED:
            raise InputError(
                f"{name!r} is compressed; expected an uncompressed .tar, or the folder that it "
                "unpacks to"
            )
        if (
            suffix not in SUFFIXES
            and (what := by_suffix(suffix)) is not None
            and no_file(path) is None
        ):
            raise InputError(f"{name!r} is {what}")
        return [(PurePosixPath(path.name), Source("", path))]

    def _each(self, names: Iterable[str], find: Callable[[str], list[Found]]) -> list[Found]:
        """Find the pictures of several names that one stands for.

        A name that cannot be used is told and the others are used, unless there is no other.
        """
        found: list[Found] = []
        failed: list[str] = []
        for name in names:
            try:
                found += find(name)
            except InputError as error:
                failed.append(str(error))
        if failed and not found:
            raise InputError(failed[0])
        self.problems += failed
        return found

    def _folder(self, path: Path) -> list[Found]:
        seen = look(path)
        self.problems += seen.bad
        if not seen.pictures:
            shards = f"; shards are given by name: '{path}/*.tar'" if ".tar" in seen.others else ""
            raise InputError(
                f"folder {str(path)!r} holds no picture but {seen.found()}; expected files ending "
                f"in " + "; ".join([f"{', '.join(SUFFIXES)}{shards}", *seen.videos()])
            )
        self.notes += seen.left_out()
        return [(PurePosixPath(name), Source("", path / name)) for name in seen.pictures]

    def _pattern(self, name: str) -> list[Found]:
        matched: list[str] = []
        seen = Folder(Path(name))
        own = OwnResults()
        for match in sorted(glob.glob(name, recursive=True)):
            path = Path(match)
            suffix = path.suffix.lower()
            why = no_file(match)
            if any(hidden(part) and part not in Path(name).parts for part in path.parts):
                seen.hidden.append(match)
            elif why is None and own.holds(path):
                seen.results.append(match)
            elif suffix in UNREAD and why is None:
                self.problems.append(f"{match}: {not_read(suffix, ', '.join(FORMATS))}")
            elif suffix not in (*SUFFIXES, ".tar"):  # captions and whatever else lies beside them
                seen.others["folders" if why == "is a folder" else suffix or "no suffix"] += 1
            elif why is not None:
                self.problems.append(f"{match} {why}; expected a picture or a shard")
            else:
                matched.append(match)
        if not matched:
            raise InputError(f"no picture or shard matches {name!r}, but {seen.found()}")
        self.notes += seen.left_out()
        return self._each(matched, lambda match: self.expand(match, listed=True))

    def _list(self, path: Path) -> list[Found]:
        def find(line: str) -> list[Found]:
            name = line if address(line) else str(path.parent / line)
            entries = self.expand(name, listed=True)
            relative = PurePosixPath(line)
            inside = not relative.is_absolute() and ".." not in relative.parts
            if len(entries) == 1 and inside and relative.suffix.lower() in SUFFIXES:
                return [(relative, entries[0][1])]  # the list's folders are mirrored
            return entries

        lines = lines_of(path, "list", "a text file with a picture on each line", InputError)
        return self._each(lines, find)

    def _shard(self, path: Path) -> list[Found]:
        shard = read_shard(path)
        self.problems += shard.bad
        if not shard.members and shard.whole:
            raise InputError(
                f"shard {str(path)!r} holds no picture; expected members ending in "
                f"{', '.join(SUFFIXES)}"
            )
        if shard.hidden:
            self.notes.append(f"{path}: {shard.hidden} hidden members are left out")
        if shard.repeated:
            self.notes.append(
                f"{path}: {len(shard.repeated)} names stand twice, of which the last counts: "
                f"{shard.repeated[0]}" + (", ..." if len(shard.repeated) > 1 else "")
            )
        return [
            (
                PurePosixPath(path.stem) / member.name,
                Source("", path, member.offset, member.size, str(member.name)),
            )
            for member in shard.members
        ]
