"""Signals that ask a run to stop: they are noted, so that what is trained is saved first.

The first one is noted, and what comes within ten seconds of it is counted and otherwise without
effect: a launcher, a terminal and a cluster often say the same thing twice. A later one acts as it
would have without this module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

PATIENCE = 10.0  # seconds
# What clusters announce the end of the time by (USR1, USR2, XCPU), what torchrun passes on, and
# what a closed terminal leaves.
_NAMES = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")
# Windows has three of them.
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class StopRequest:
    """A note of the signals that ask this process to stop; it is true once one has come.

    Attributes:
        numbers: of the signals that came, in their order.
        speak: whether Ctrl-C is answered on stderr.
    """

    def __init__(self, *, speak: bool) -> None:
        self.numbers: list[int] = []
        self.speak = speak
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.numbers)

    def __str__(self) -> str:
        if not self.numbers:
            return "a signal to another process"
        return f"signal {self.numbers[0]} ({signal.Signals(self.numbers[0]).name})"

    def install(self) -> None:
        """Take the place of the handlers that are there.

        Only the main thread may; in others nothing is noted.
        """
        for number in SIGNALS:
            hung_up = number == getattr(signal, "SIGHUP", None)
            if hung_up and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread
                return

    def leave(self) -> None:
        """Put the former handlers back.

        While repetitions are still expected they stay, until a signal comes that is late enough.
        """
        if not self.numbers or time.monotonic() - self._since > PATIENCE:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.numbers and now - self._since > PATIENCE:
            self._restore()
            os.kill(os.getpid(), number)
            return
        if not self.numbers:
            self._since = now
        self.numbers.append(number)
        if self.speak and number == signal.SIGINT and len(self.numbers) <= 2:
            # Neither logging nor sys.stderr: what was interrupted may hold their locks.
            with contextlib.suppress(OSError):
                os.write(
                    2, b"\nsaving after this step; press again after ten seconds to stop at once\n"
                )


_current: StopRequest | None = None


@contextlib.contextmanager
def noted(*, speak: bool = True) -> Iterator[StopRequest]:
    """Note the signals that come meanwhile. Within another such context it is that one's request.

    Args:
        speak: say on stderr what Ctrl-C does now.
    """
    global _current
    if _current is not None:
        _current.speak &= speak
        yield _current
        return
    request = _current = StopRequest(speak=speak)
    request.install()
    try:
        yield request
    finally:
        _current = None
        request.leave()


def ignore() -> None:
    """Let no signal change the exit code of a process that ends.

    Handlers of Python's own do not last until its end; this does.
    """
    for number in SIGNALS:
        with contextlib.suppress(ValueError):
            signal.signal(number, signal.SIG_IGN)


def end_of(code: int) -> str:
    """Return in words how a process ended, by its exit code as ``multiprocessing`` gives it."""
    if code >= 0:
        return f"exited unexpectedly with code {code}"
    try:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"was killed by signal {-code}"
