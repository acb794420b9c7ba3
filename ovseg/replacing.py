"""Files that are whole or not there; whether there is a place for them is known before the work."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import InputError
from .paths import address, as_given, no_file, no_folder

LONGEST = 255  # bytes of a name, on the file systems in use
_PART = re.compile(r"\.part\.(\d+)-[0-9a-f]{8}\..")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name of the same suffix to write to, which is renamed to ``path`` at the end.

    A reader sees the old file or the whole new one. Who may read it is for the umask to say:
    safetensors from 0.8 on writes files that their owner alone can read.
    """
    made = [above for above in path.parents if not above.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        part.touch(exist_ok=False)
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        # What was made for nothing goes; a folder that holds something stays.
        with contextlib.suppress(OSError):
            for above in made:
                above.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write all of ``text`` or nothing, in UTF-8 but for names of files that are not."""
    with replacing(path) as part:
        part.write_text(text, "utf-8", "surrogateescape")


def part_of(path: Path) -> Path:
    """Return a new name in between, beside ``path``.

    It is hidden, of this process alone, and of the same suffix. It holds the number of the process,
    by which ``remove_parts`` knows what was left behind.
    """
    return beside(path, f".part.{os.getpid()}-{secrets.token_hex(4)}.")


def beside(path: Path, before: str) -> Path:
    """Return the path of the name with ``before`` in front, or of a hash where it is too long."""
    name = f"{before}{path.name}"
    if len(os.fsencode(name)) > LONGEST:
        short = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
        name = f"{before}{short}{path.suffix[:32]}"
    return path.with_name(name)


def remove_parts(paths: Iterable[Path], *, older: float = float("inf")) -> int:
    """Remove what a process that is gone was writing when it ended; return how many.

    For whoever holds the folder: a process on another machine counts as gone.

    Args:
        paths: of which only names as ``part_of`` makes them are looked at.
        older: only what was last written to before this time.
    """
    removed = 0
    for path in paths:
        found = _PART.match(path.name)
        if found is None or _runs(int(found[1])):
            continue
        with contextlib.suppress(OSError):  # somebody else has
            if path.stat().st_mtime >= older:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed += 1
    return removed


def _runs(pid: int) -> bool:
    """Return whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def folder_for(path: str | Path, option: str) -> Path:
    """Return ``path``, if it is a folder that can be written to, or can become one.

    Nothing is made.

    Raises:
        InputError: if it cannot, naming ``option``.
    """
    _is_path(path, option)
    if address(path):
        raise InputError(
            f"{option} {as_given(path)!r} is an address, and only local folders are written to; "
            "expected a folder"
        )
    found = no_folder(path)
    if found not in (None, "does not exist"):
        raise InputError(
            f"{option} {str(path)!r} {found}; expected a folder, or a name where nothing is yet"
        )
    _check(path, option, "a folder", there=found is None)
    return Path(path)


def file_for(path: str | Path, option: str) -> Path:
    """Return ``path``, if a file can be written there. Nothing is made.

    Raises:
        InputError: if it cannot, naming ``option``.
    """
    _is_path(path, option)
    if address(path):
        raise InputError(
            f"{option} {as_given(path)!r} is an address, and only local files are written; "
            "expected the name of a file"
        )
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
            raise InputError(
                f"{option} holds a name of {length} bytes, {name[:20]}...; expected at most "
                f"{LONGEST}"
            )
    above = whole if there else next((p for p in whole.parents if os.path.lexists(p)), whole)
    if (found := no_folder(above)) is not None:
        raise InputError(
            f"{option} {str(path)!r} cannot be made: {str(above)!r} {found}; expected {expected} "
            "in a folder"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"{option} {str(path)!r} cannot be written: {str(above)!r} may not be written to; "
            f"expected {expected} elsewhere"
        )
