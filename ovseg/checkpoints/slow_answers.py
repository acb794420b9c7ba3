"""A bound on how slowly a server may answer. The Hub's client waits for each read by itself: one
byte every few seconds goes on for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, TypeVar

LEAST = 1 << 16  # bytes that a download has to bring within ...
WINDOW = 45.0  # ... so many seconds
QUESTION = 20.0  # seconds that a question without a body may take
_LOOK = 0.1  # seconds between two looks
_T = TypeVar("_T")


class Stalled(OSError):
    """A server that sends too little."""


class Received:
    """Bytes that have come so far, by whoever counts them; ``ended``: nobody waits any more."""

    def __init__(self) -> None:
        self.bytes = 0
        self.ended = False

    def add(self, count: float | None = 1) -> None:
        """Count, or raise Stalled into a download that nobody waits for any more: it lets go of its
        lock and its unfinished file."""
        self.bytes += int(count or 0)
        if self.ended:
            raise Stalled("the download was given up")


def answered(ask: Callable[[], _T]) -> _T:
    """``ask()``, a question with a short answer; Stalled after ``QUESTION`` seconds."""
    return _awaited(ask, Received(), QUESTION, 1)


def watched(download: Callable[[], _T], received: Received) -> _T:
    """``download()``, as long as ``received`` grows by ``LEAST`` bytes in every ``WINDOW`` seconds;
    Stalled else."""
    return _awaited(download, received, WINDOW, LEAST)


def _awaited(work: Callable[[], _T], received: Received, window: float, least: int) -> _T:
    """Return what ``work`` gives, or raise what it raises; it runs in a thread of its own, which is
    left behind where it is too slow: its reads cannot be broken off."""
    found: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # raised again below
            failed.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    began, before = time.monotonic(), 0
    try:
        while thread.is_alive():
            thread.join(_LOOK)
            now, count = time.monotonic(), received.bytes
            if count - before >= least:
                began, before = now, count
            elif now - began > window and thread.is_alive():
                raise Stalled(
                    f"the server sent {count - before} bytes in {window:.0f} seconds; expected at "
                    f"least {least}"
                )
    except BaseException:  # Ctrl-C too
        received.ended = True
        thread.join(1.0)  # at its next byte it takes its unfinished file away
        raise
    if failed:
        raise failed[0]
    return found[0]


@contextmanager
def counted(session: Any, received: Received) -> Iterator[None]:
    """While it lasts the bytes of all answers to ``session``, a client of httpx, are counted as
    they come."""

    def count(response: Any) -> None:
        stream = response.stream
        base = next(
            kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream"
        )  # httpx asks for one of its own

        class Counted(base):  # type: ignore[misc, valid-type]
            def __iter__(self) -> Iterator[bytes]:
                for part in stream:
                    received.add(len(part))
                    yield part

            def close(self) -> None:
                stream.close()

        response.stream = Counted()

    hooks = session.event_hooks["response"]
    hooks.append(count)
    try:
        yield
    finally:
        hooks.remove(count)
