"""Run a function of a test in several gloo processes, with a time limit: what hangs is killed and
fails.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """As torchrun sets it."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    return {**os.environ, **{key: str(value) for key, value in place.items()}}


def run(file: str, function: str, world: int, *arguments: object, seconds: float = 60) -> list[str]:
    """What each of ``world`` processes printed in ``function(*arguments)`` of the test module
    ``file``; arguments travel as strings.

    A host imports the module, torch and all, and forks them. Fails if one is still running after
    so many seconds, or ends with another code than 0.
    """
    folder, module = str(Path(file).parent), Path(file).stem
    code = f"import sys; sys.path.insert(0, {folder!r}); import processes; processes.host(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as printed:
        files = [Path(printed) / str(rank) for rank in range(world)]
        child = subprocess.Popen(
            [sys.executable, "-c", code, module, function, printed, str(world)]
            + [str(x) for x in arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said = child.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"a process hangs after {seconds} s; printed so far: {texts(files)}"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # ranks of a host that has ended too
            child.wait()
        assert child.returncode == 0, "\n".join([said, *texts(files)])
        return texts(files)


def texts(files: list[Path]) -> list[str]:
    return [path.read_text() if path.exists() else "" for path in files]


def host(module: str, function: str, printed: str, world: str, *arguments: str) -> None:
    """The ranks, each with an output of its own; an exit code of 1 if one of them had another than
    0.
    """
    called = getattr(importlib.import_module(module), function)
    port, children = free_port(), []
    for rank in range(int(world)):
        if (child := os.fork()) == 0:
            os.environ |= environment(rank, int(world), port)
            file = os.open(Path(printed) / str(rank), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            return called(*arguments)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(f"the processes ended with {codes}" if any(codes) else 0)
