"""Paths: messages say in words what lies there; and the folder of the cache.

Errors say what is there, not that nothing is.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISFIFO, "is a FIFO"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)

# With one "/" as well, which is what pathlib makes of two.
_ADDRESS = re.compile(
    r"(https?|s?ftps?|s3[an]?|gs|gcs|az|abfss?|wasbs?|hdfs|hf|oss|ssh|scp|smb|webdavs?|file):/+[^/]"
    r"|data:[a-z]+/",
    re.IGNORECASE,
)


def cache_folder() -> Path | None:
    """Return the folder for what can be made again; None where there is to be no cache.

    It is ``OVSEG_CACHE`` (``off``: none), else ``$XDG_CACHE_HOME/ovseg`` or ``~/.cache/ovseg``. It
    need not exist, nor be writable: who writes into it goes on without.
    """
    asked = os.environ.get("OVSEG_CACHE", "")
    if asked.lower() in ("off", "0", "no", "false"):
        return None
    if asked:
        return Path(asked).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "ovseg"
    except RuntimeError:  # a user without a home
        return None


def address(path: str | Path) -> str | None:
    """Say why a name that is an address, such as ``https://...`` or ``file://...``, is no path.

    None if it is no address.
    """
    name = str(path)
    if _ADDRESS.match(name) is None or os.path.lexists(name):
        return None
    if name[:5].lower() == "file:":
        return "is an address; expected the path alone, which begins after file://"
    return "is an address, and only files are read: download it first"


def as_given(path: str | Path) -> str:
    """Return the name for messages, with the "/" that pathlib takes from an address."""
    name = str(path)
    return re.sub(r"^(\w+):/(?=[^/])", r"\1://", name) if address(name) else name


def exists(path: str | Path) -> bool:
    """Return whether something lies at ``path``.

    A string that no file can be called names nothing: ``Path.exists`` raises for some.
    """
    try:
        return Path(path).exists()
    except ValueError:
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def no_file(path: str | Path) -> str | None:
    """Say why there is no file to read at ``path``: "does not exist", "is a folder", ...

    None if there is one.
    """
    return _unlike(path, stat.S_ISREG, "is no regular file")


def no_folder(path: str | Path) -> str | None:
    """Say why there is no folder at ``path``; None if there is one."""
    return _unlike(path, stat.S_ISDIR, "is a file")


def _unlike(path: str | Path, wanted: Callable[[int], bool], otherwise: str) -> str | None:
    """Say what lies at ``path`` in place of what is wanted."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        return _unreachable(path, error)
    if wanted(mode):
        return None
    return next((words for test, words in _KINDS if test(mode)), otherwise)


def read_bounded(path: str | Path, most: int) -> bytes:
    """Read a plain file of at most ``most`` bytes.

    Nothing else is opened: a FIFO would be waited for, a device has no end.

    Raises:
        OSError: FileNotFoundError and the like if it is not there, an OSError in words if it is no
            plain file, cannot be read or is longer.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} {no_file(path)}; expected a file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"{path} has more than {most} bytes; expected at most that")
    return data


def _unreachable(path: str | Path, error: OSError | ValueError) -> str:
    """Say why a path cannot be looked at."""
    if isinstance(error, ValueError):
        return "holds a NUL character"
    if (what := address(path)) is not None:
        return what
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "is a link to nothing" if os.path.islink(path) else "does not exist"
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself"
    return f"cannot be looked at: {error.strerror}"
