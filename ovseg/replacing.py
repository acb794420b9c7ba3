"""Files that are whole or not there, and whether there is a place for them: found out before the work, not after it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

LONGEST = 255  # bytes of a name, on the file systems in use


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name of the same suffix to write to, renamed to ``path`` at the end: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """The name in between, beside ``path``: hidden, and short where the whole would be too long a name."""
    name = f".part.{path.name}"
    if len(os.fsencode(name)) > LONGEST:
        name = f".part.{hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()}{path.suffix[:32]}"
    return path.with_name(name)


def folder_for(path: str | Path, option: str) -> Path:
    """``path``, if it is a folder that can be written to, or can become one. Nothing is made.

    Raises:
        InputError: if it cannot, naming ``option``.
    """
    _check(path, option, "a folder")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InputError(f"{option} is {str(path)!r}, {_kind(path)}; expected a folder")
    return Path(path)


def file_for(path: str | Path, option: str) -> Path:
    """``path``, if a file can be written there. Nothing is made.

    Raises:
        InputError: if it cannot, naming ``option``.
    """
    _check(path, option, "a file")
    if os.path.lexists(path) and not os.path.isfile(path):  # a device would be replaced by a file
        raise InputError(f"{option} is {str(path)!r}, {_kind(path)}; expected a file")
    return Path(path)


def _check(path: str | Path, option: str, expected: str) -> None:
    text = os.fspath(path)
    if not text or "\0" in text:  # an empty one would be the present folder
        raise InputError(f"{option} is {text!r}; expected {expected}")
    parts = Path(os.path.abspath(text))
    for name in parts.parts:
        if len(os.fsencode(name)) > LONGEST:
            raise InputError(f"{option} holds a name of {len(os.fsencode(name))} bytes, {name[:20]}...; expected at most {LONGEST}")
    above = parts if expected == "a folder" and os.path.isdir(parts) else next((p for p in parts.parents if os.path.lexists(p)), parts)
    if not os.path.isdir(above):
        raise InputError(f"{option} is {text!r} and {str(above)!r} is {_kind(above)}; expected {expected} in a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{option} is {text!r} and {str(above)!r} may not be written to; expected {expected} elsewhere")


def _kind(path: str | Path) -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return "a link to nothing"
    return "a file" if os.path.isfile(path) else "a folder" if os.path.isdir(path) else "neither a file nor a folder"
