"""What lies at a path, in words: errors say what is there, not that nothing is."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = ((stat.S_ISDIR, "is a folder"), (stat.S_ISFIFO, "is a FIFO"), (stat.S_ISSOCK, "is a socket"),
          (stat.S_ISCHR, "is a device"), (stat.S_ISBLK, "is a device"))  # fmt: skip


def no_file(path: str | Path) -> str | None:
    """Why there is no file to read at ``path``: "does not exist", "is a folder", ...; None if there is one."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        return _unreachable(path, error)
    if stat.S_ISREG(mode):
        return None
    return next((words for test, words in _KINDS if test(mode)), "is no regular file")


def no_folder(path: str | Path) -> str | None:
    """The same of a folder."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        return _unreachable(path, error)
    if stat.S_ISDIR(mode):
        return None
    return next((words for test, words in _KINDS if test(mode)), "is a file")


def check_new_file(path: Path, what: str, error: type[Exception]) -> None:
    """Before long work: whether ``what`` can be written to ``path``; its folder is made.

    Raises:
        error: if a folder lies there, a parent is a file, or nothing may be written there.
    """
    found = no_file(path)
    if found not in (None, "does not exist"):
        raise error(f"{what} {str(path)!r} {found}; expected the name of a file to write")
    check_new_folder(path.parent, f"the folder of {what}", error)


def check_new_folder(path: Path, what: str, error: type[Exception]) -> None:
    """The same of a folder."""
    found = no_folder(path)
    if found not in (None, "does not exist"):
        raise error(f"{what} {str(path)!r} {found}; expected a folder, or a name where nothing is yet")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise error(f"{what} {str(path)!r} cannot be made: {failure.strerror}; expected a folder that can be written to") from failure
    if not os.access(path, os.W_OK):
        raise error(f"{what} {str(path)!r} cannot be written to; expected a folder that can")


def _unreachable(path: str | Path, error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return "holds a NUL character"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "is a link to nothing" if os.path.islink(path) else "does not exist"
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself"
    return f"cannot be looked at: {error.strerror}"
