"""Files that are whole or not there, and whether there is a place for them: found out before the work, not after it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError
from .paths import no_file, no_folder

LONGEST = 255  # bytes of a name, on the file systems in use


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name of the same suffix to write to, renamed to ``path`` at the end: a reader sees the old file or the whole new one.

    Who may read it is for the umask to say: safetensors from 0.8 on writes files that their owner alone can read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The whole of ``text``, UTF-8 but for names of files that are not, or what was there before."""
    with replacing(path) as part:
        part.write_text(text, "utf-8", "surrogateescape")


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
    _is_path(path, option)
    found = no_folder(path)
    if found not in (None, "does not exist"):
        raise InputError(f"{option} {str(path)!r} {found}; expected a folder, or a name where nothing is yet")
    _check(path, option, "a folder", there=found is None)
    return Path(path)


def file_for(path: str | Path, option: str) -> Path:
    """``path``, if a file can be written there. Nothing is made.

    Raises:
        InputError: if it cannot, naming ``option``.
    """
    _is_path(path, option)
    found = no_file(path)
    if found not in (None, "does not exist"):  # a device would be replaced by a file
        raise InputError(f"{option} {str(path)!r} {found}; expected the name of a file to write")
    _check(path, option, "a file", there=False)
    return Path(path)


def _is_path(path: object, option: str) -> None:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{option} is a {type(path).__name__}; expected a path")


def _check(path: str | Path, option: str, expected: str, *, there: bool) -> None:
    if not os.fspath(path):  # it would be the present folder
        raise InputError(f"{option} is empty; expected {expected}")
    whole = Path(os.path.abspath(path))
    for name in whole.parts:
        if (length := len(os.fsencode(name))) > LONGEST:
            raise InputError(f"{option} holds a name of {length} bytes, {name[:20]}...; expected at most {LONGEST}")
    above = whole if there else next((p for p in whole.parents if os.path.lexists(p)), whole)
    if (found := no_folder(above)) is not None:
        raise InputError(f"{option} {str(path)!r} cannot be made: {str(above)!r} {found}; expected {expected} in a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{option} {str(path)!r} cannot be written: {str(above)!r} may not be written to; expected {expected} elsewhere")
