"""Many pictures: files, folders, patterns, list files, and the pictures in shards (.tar)."""

from __future__ import annotations

import glob
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..data.images import SUFFIXES
from ..errors import InputError

_MOST_BYTES = 256 << 20  # of a member of a shard


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
        """What ``read_image`` takes.

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


def find_pictures(names: Sequence[str]) -> tuple[list[Source], list[str]]:
    """The pictures that ``names`` stand for, and what is wrong with shards among them.

    A name is a picture; a folder (all pictures below); a pattern such as ``photos/*.jpg`` or ``shards/*.tar``; a list of any of
    these, ``.txt`` with a name on each line, relative to the list; or a shard, an uncompressed ``.tar`` as webdataset writes it.

    The result name of a picture in a folder is its path below that folder without the suffix, so that folders are mirrored; in a
    shard, the shard's name and the member's. Where two pictures differ in their suffix alone, both keep it: ``a_png``, ``a_jpg``.

    Raises:
        InputError: for a pattern, list, folder or shard without pictures, and for two pictures of one result name.
    """
    problems: list[str] = []
    found = [entry for name in names for entry in _expand(name, problems)]
    shared = Counter(relative.with_suffix("") for relative, _ in set(found))
    results: dict[str, Source] = {}
    for relative, source in found:
        plain = relative.with_suffix("")
        name = str(plain if shared[plain] == 1 else plain.with_name(f"{plain.name}_{relative.suffix[1:]}"))
        if name in results and _place(results[name]) != _place(source):
            raise InputError(f"{str(results[name])!r} and {str(source)!r} would both be written as {name!r}; expected one folder at a time")
        results.setdefault(name, Source(name, source.path, source.offset, source.size, source.member))
    return list(results.values()), problems


def _place(source: Source) -> tuple[Path, int | None]:
    return source.path.resolve(), source.offset


def _expand(name: str, problems: list[str], depth: int = 0) -> list[tuple[PurePosixPath, Source]]:
    """(path of the results with the picture's suffix, picture) of one name."""
    path = Path(name)
    if path.is_dir():
        below = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not below:
            raise InputError(f"folder {name!r} holds no picture; expected files ending in {', '.join(SUFFIXES)}")
        return [(PurePosixPath(p.relative_to(path).as_posix()), Source("", p)) for p in below]
    if glob.has_magic(name) and not path.exists():
        wanted = (*SUFFIXES, ".tar")  # captions and whatever else lies beside them are no pictures
        matches = sorted(p for p in glob.glob(name, recursive=True) if Path(p).suffix.lower() in wanted and Path(p).is_file())
        if not matches:
            raise InputError(f"no picture or shard matches {name!r}")
        return [entry for match in matches for entry in _expand(match, problems, depth + 1)]
    suffix = path.suffix.lower()
    if suffix == ".txt":
        if depth > 1:
            raise InputError(f"list {name!r} is named by a list; expected pictures, folders, patterns or shards there")
        return _listed(path, problems)
    if suffix == ".tar":
        return _members(path, problems)
    return [(PurePosixPath(path.name), Source("", path))]


def _listed(path: Path, problems: list[str]) -> list[tuple[PurePosixPath, Source]]:
    if not path.is_file():
        raise InputError(f"list {str(path)!r} does not exist; expected a text file with a picture on each line")
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"list {str(path)!r} is no UTF-8 text: {error}") from error
    if not lines:
        raise InputError(f"list {str(path)!r} is empty; expected a picture on each line")
    found = []
    for line in lines:
        entries = _expand(str(path.parent / line), problems, 2)
        relative = PurePosixPath(line)
        if len(entries) == 1 and not relative.is_absolute() and ".." not in relative.parts and relative.suffix.lower() in SUFFIXES:
            entries = [(relative, entries[0][1])]  # the list's folders are mirrored
        found += entries
    return found


def _members(path: Path, problems: list[str]) -> list[tuple[PurePosixPath, Source]]:
    if not path.is_file():
        raise InputError(f"shard {str(path)!r} does not exist; expected a .tar file")
    found: list[tuple[PurePosixPath, Source]] = []
    try:
        whole = path.stat().st_size
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.offset_data + member.size > whole:
                    raise tarfile.ReadError(f"{member.name!r} ends {member.offset_data + member.size - whole} bytes behind the file")
                inside = PurePosixPath(member.name)
                if not member.isreg() or inside.suffix.lower() not in SUFFIXES:
                    continue
                if inside.is_absolute() or ".." in inside.parts:
                    problems.append(f"{path}:{member.name}: the name leaves the folder of the results")
                elif member.size > _MOST_BYTES:
                    problems.append(f"{path}:{member.name}: {member.size} bytes; the limit is {_MOST_BYTES}")
                else:
                    found.append((PurePosixPath(path.stem) / inside, Source("", path, member.offset_data, member.size, member.name)))
    except tarfile.TarError as error:
        problems.append(f"{path}: {error}; the shard is damaged or cut off after {len(found)} pictures; expected an uncompressed .tar")
        return found
    if not found:
        raise InputError(f"shard {str(path)!r} holds no picture; expected members ending in {', '.join(SUFFIXES)}")
    return found
