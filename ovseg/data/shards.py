"""Pictures in shards: uncompressed .tar files as webdataset writes them, read by offset.

Shards may be whole, cut off or hostile, and are named by the range.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path, PurePosixPath

from ..errors import InputError
from ..paths import no_file
from .file_types import not_read
from .folders import UNREAD, hidden
from .images import FORMATS, SUFFIXES

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
    """A shard and what it holds.

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
    """Find the pictures of a shard, without their bytes.

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
            f"{len(members)} pictures; expected an uncompressed .tar"
        )
    shard.members = list(members.values())
    return shard


def expand_braces(name: str) -> list[str]:
    """Return the names that ``shard-{000..002}.tar`` or ``{train,val}.tar`` stands for, in order.

    A name without braces is taken as it is.

    Raises:
        InputError: for a range that is none, or more than 100 000 names.
    """
    parts = _BRACES.split(name)
    choices = [_choices(part, name) if i % 2 else [part] for i, part in enumerate(parts)]
    count = prod(map(len, choices))
    if count > _MOST_NAMES:
        raise InputError(f"{name!r} stands for {count} names; expected at most {_MOST_NAMES}")
    return ["".join(some) for some in product(*choices)]


def _choices(inside: str, name: str) -> list[str]:
    """Return what the text between two braces stands for."""
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
        padded = any(len(text) > 1 and text[0] == "0" for text in found.groups())
        width = max(map(len, found.groups())) if padded else 0
        return [f"{number:0{width}d}" for number in range(first, last + 1)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """Go through the members, then look at what follows the last.

    There tarfile itself stops without a word.

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
    """Say why a member is not taken, if it is or looks like a picture."""
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
