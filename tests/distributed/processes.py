"""Run a function of a test in several gloo processes, with a time limit: what hangs is killed and
fails.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
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


def start(code: list[str], world: int) -> list[subprocess.Popen]:
    """``python *code`` in ``world`` processes."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *code],
            env=environment(rank, world, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def finish(children: list[subprocess.Popen], seconds: float = 60) -> list[str]:
    """What each printed.

    Fails if one is still running after so many seconds, or ends with another code than 0.
    """
    deadline, printed = time.time() + seconds, []
    try:
        for child in children:
            printed.append(child.communicate(timeout=max(0.1, deadline - time.time()))[0])
    except subprocess.TimeoutExpired:
        raise AssertionError(
            f"a process hangs after {seconds} s; printed so far: {printed}"
        ) from None
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
    assert [child.returncode for child in children] == [0] * len(children), "\n".join(printed)
    return printed


def run(file: str, function: str, world: int, *arguments: object, seconds: float = 60) -> list[str]:
    """``function(*arguments)`` of the test module ``file`` in ``world`` processes; arguments travel
    as strings.
    """
    folder = str(Path(file).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import {Path(file).stem} as m; m.{function}(*sys.argv[1:])"
    return finish(start(["-c", code, *map(str, arguments)], world), seconds)
