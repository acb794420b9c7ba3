"""One run at a time writes into a folder, or a file: who comes second is told who is there.

A lock is a hidden file beside the results, ``.ovseg.lock`` in a folder and ``.ovseg.lock.NAME``
beside a file, held by ``flock``: the system lets go of it when the process ends, however it ends,
so no lock outlives its owner. Inside stands who holds it, in JSON. The processes of one run
(torchrun, srun) hold it together. It is removed at the end, and with it folders that were made and
stayed empty.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import distributed
from .errors import InputError
from .progress import duration
from .replacing import beside, remove_parts

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
NAME = ".ovseg.lock"
_PATIENCE = 0.5  # seconds: another run may be on its way out
_PATIENCE_TOGETHER = 5.0  # another process of this run may not yet have written its name
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_held: set[int] = set()  # open files of this process's locks


def _forget() -> None:
    """Let go in a forked child, which would hold the lock after the death of its parent."""
    for file in _held:
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def locked_folder(folder: Path, option: str, verb: str) -> Iterator[None]:
    """Hold ``folder``, which is made if need be, for the run of ``verb``.

    Raises:
        InputError: if another run holds it, by what the user called it, ``option``; nothing is made
            or changed then.
    """
    with _locked(folder / NAME, f"{option} {str(folder)!r}", verb, "folder") as since:
        if since is not None:
            remove_parts(
                (
                    Path(below) / name
                    for below, folders, files in os.walk(folder)
                    for name in (*folders, *files)
                ),
                older=since,
            )
        yield


@contextlib.contextmanager
def locked_file(path: Path, option: str, verb: str) -> Iterator[None]:
    """Hold the name of a file that is written at the end; see ``locked_folder``."""
    with _locked(beside(path, f"{NAME}."), f"{option} {str(path)!r}", verb, "file") as since:
        if since is not None:
            remove_parts(
                (part for part in path.parent.iterdir() if part.name.endswith(f".{path.name}")),
                older=since,
            )
        yield


@contextlib.contextmanager
def _locked(path: Path, what: str, verb: str, kind: str) -> Iterator[float | None]:
    """Hold the lock ``path``.

    Yields:
        The time since when, if another run was killed while it held it.
    """
    began = time.time()
    record = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "verb": verb,
        "began": began,
        "run": distributed.run_name(),
    }
    file, left = _acquire(path, record, what, kind)
    if file is None:
        yield None
        return
    _held.add(file)
    try:
        if left:
            logger.warning("%s was left by %s, which has ended; going on", what, _who(left))
        yield began if left else None
    finally:
        if file in _held:  # not in a child
            _release(path, file)


def _acquire(
    path: Path, record: dict[str, Any], what: str, kind: str
) -> tuple[int | None, dict[str, Any]]:
    """Return the open file of the lock, and the record of a run that did not end in order.

    There is no file where the system has no locks.

    Raises:
        InputError: if another run holds it.
    """
    until = time.monotonic() + (_PATIENCE_TOGETHER if record["run"] else _PATIENCE)
    made: list[str] = []
    while True:
        made += _make(path.parent)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was removed by a run that left it empty
            continue
        try:
            holder = _read(file)
            if (how := _taken(path, file, {**record, "made": made})) is not None:
                return file, holder if how == "first" else {}
        except OSError as error:
            with contextlib.suppress(OSError):  # of no length unless somebody holds it
                if os.fstat(file).st_size == 0:
                    _remove(path, made)
            os.close(file)
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s: the file system has no locks (%s); another run into it at the same time is "
                "not noticed",
                what,
                error,
            )
            return None, {}
        os.close(file)
        if time.monotonic() > until:
            raise InputError(
                f"{what} is being written by {_who(holder)}; wait until it ends, stop it, or give "
                f"another {kind}"
            )
        time.sleep(0.05)


def _taken(path: Path, file: int, record: dict[str, Any]) -> str | None:
    """Try to take the lock.

    Returns:
        "first" if this process holds it now, "with others" if those of its run held it before; None
        if it is another's.
    """
    run = record["run"]
    if _flock(file, "LOCK_EX") and _is_at(file, path):
        _write(file, record)
        return "first" if not run or _flock(file, "LOCK_SH") else None
    together = bool(run) and _read(file).get("run") == run
    return "with others" if together and _flock(file, "LOCK_SH") and _is_at(file, path) else None


def _release(path: Path, file: int) -> None:
    """Let go; the last one of a run removes the file, and folders that were made and are empty."""
    _held.discard(file)
    together = bool(distributed.run_name())
    for _ in range(5 if together else 1):
        with contextlib.suppress(OSError):
            if _flock(file, "LOCK_EX"):
                if _is_at(file, path):
                    _remove(path, _read(file).get("made", []))
                break
        time.sleep(0.02)
    os.close(file)


def _remove(path: Path, made: list[str]) -> None:
    """Remove a lock, and the folders that were made for it, up to the first that is not empty."""
    path.unlink()
    for folder in reversed(made):
        os.rmdir(folder)


def _make(folder: Path) -> list[str]:
    """Make a folder; return what was made, the outermost first."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    made = []
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):
            one.mkdir()
            made.append(os.path.abspath(one))
    return made


def _flock(file: int, how: str) -> bool:
    """Return whether the lock could be had at once."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no flock")
    try:
        fcntl.flock(file, getattr(fcntl, how) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    """Return whether the open file still has that name: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _read(file: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(file, 1 << 16, 0) or b"{}")
    except ValueError:  # as it is being written
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: int, record: dict[str, Any]) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(record).encode(), 0)
    os.fsync(file)


def _who(record: dict[str, Any]) -> str:
    """Say who holds a lock."""
    try:
        age = duration(time.time() - float(record["began"]))
        place = f"process {record['pid']} on {record['host']}"
        return f"`ovseg {record['verb']}` ({place}, begun {age} ago)"
    except (KeyError, TypeError, ValueError):
        return "another run of ovseg"
