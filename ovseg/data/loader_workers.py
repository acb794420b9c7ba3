"""The worker processes of a loader: started, waited for, looked after and ended.

What torch does here is kept from three habits: it raises a worker's death out of whatever line
runs, its workers end by a signal that asks the whole run to save first, and one that hangs is
waited for without end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from .. import stop_signals
from ..errors import DataError
from .batches import Batch

_LAST_MINUTE = 60  # seconds that a worker has after the first SIGTERM


@dataclass
class Failed:
    """Why there is no batch.

    Errors of data cross from a worker as they are, not as a traceback in a string.
    """

    message: str


class Workers:
    """The workers that read for one iteration of a loader; of none it reads itself.

    Args:
        loader: torch's.
        timeout: seconds without a batch after which workers are given up; 0: never.
        of_rank: which process this is, for messages; "" in one process.
    """

    def __init__(self, loader: DataLoader, timeout: float, of_rank: str):
        self.timeout = timeout
        self.of_rank = of_rank
        with _signals_held():
            self._batches: Any = iter(loader)
            self._torch_handler = self._quieten() if loader.num_workers else None
        self._processes: list[Any] = getattr(self._batches, "_workers", [])

    def next_batch(self) -> Batch | None:
        """Return the next batch, None at the end.

        Raises:
            DataError: for data that fail; and naming the workers, if one of them has ended or none
                has given a batch for ``timeout`` seconds.
        """
        with self._given_up() as given_up:
            while True:
                try:
                    batch = next(self._batches, None)
                    break
                except (RuntimeError, OSError, EOFError) as error:
                    # One that has just been killed may not be known to be dead.
                    ended = self._ended(wait=not isinstance(error, RuntimeError))
                    if given_up.is_set():
                        names = ", ".join(f"{i} (pid {w.pid})" for i, w in self._numbered())
                        raise DataError(
                            f"DataLoader timed out after {self.timeout:g} s without a batch: "
                            f"workers {names}{self.of_rank} read too slowly, stood still or waited "
                            "for the disk. OVSEG_DATA_TIMEOUT is how long training waits"
                        ) from error
                    if ended:
                        raise DataError(
                            f"DataLoader {ended}. Often memory or shared memory (/dev/shm) ran "
                            "out: lower data.workers or data.prefetch"
                        ) from error
                    # A bug of the source says "Caught".
                    if not str(error).startswith("DataLoader timed out"):
                        raise
        if isinstance(batch, Failed):
            raise DataError(batch.message)
        return batch

    def stop(self) -> None:
        """End the workers now, not when the iterator happens to be collected."""
        if hasattr(self._batches, "_shutdown_workers"):
            for worker in self._processes:
                worker.terminate = worker.kill  # SIGTERM has another meaning in a worker
            self._batches._shutdown_workers()
            for worker in self._processes:
                if worker.is_alive():  # it hangs, and has been asked before
                    worker.kill()
                    worker.join()
        if self._torch_handler is not None:
            _on_child(self._torch_handler)

    def _quieten(self) -> Any:
        """Keep torch's handler of SIGCHLD from raising; return it, to be put back.

        It raises a worker's death in the middle of a step or of a collective. ``next_batch`` finds
        out as well.
        """
        loud = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if not callable(loud):
            return None

        def quiet(number: int, frame: Any) -> None:
            with contextlib.suppress(RuntimeError):
                loud(number, frame)

        return loud if _on_child(quiet) else None

    @contextlib.contextmanager
    def _given_up(self) -> Iterator[threading.Event]:
        """Kill the workers after ``timeout`` seconds, and note it.

        What waits for a tensor of one that stands still, deep in torch, has no limit of its own.
        """
        noted = threading.Event()

        def give_up() -> None:
            noted.set()
            for worker in self._processes:
                worker.kill()

        timer = threading.Timer(self.timeout, give_up)
        timer.daemon = True
        if self._processes and self.timeout:
            timer.start()
        try:
            yield noted
        finally:
            timer.cancel()

    def _ended(self, *, wait: bool) -> str:
        """Say which workers have ended and how; nothing if all run."""
        found = []
        for number, worker in self._numbered():
            if wait:
                worker.join(0.1)
            if not worker.is_alive():
                how = stop_signals.end_of(worker.exitcode)
                found.append(f"worker {number}{self.of_rank} (pid {worker.pid}) {how}")
        return ", ".join(found)

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self._processes)


def _on_child(handler: Any) -> bool:
    """Set the handler of SIGCHLD, where this is the thread that may."""
    if threading.current_thread() is not threading.main_thread():
        return False
    signal.signal(signal.SIGCHLD, handler)
    return True


def starter(*, tell_signals: bool) -> Callable[[int], None]:
    """Return what a worker calls first: what signals mean to it.

    Args:
        tell_signals: whether it passes a signal that asks it to end on to this process.
    """
    return partial(_start_telling_worker, parent=os.getpid()) if tell_signals else _start_worker


def _start_worker(number: int) -> None:
    """Let signals that end a run be handled by the training process, to which they go as well.

    It must get the batch that it waits for and save first. Ctrl-C is for it alone. The first
    SIGTERM leaves the worker a minute, the second ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _last_minute)
    _release()


def _start_telling_worker(number: int, parent: int) -> None:
    """Pass the first signal on to the training process, as it may have come to this worker alone.

    The others are ignored.
    """
    for known in stop_signals.SIGNALS:
        signal.signal(known, partial(_tell, parent))
    _release()


def _tell(parent: int, number: int, _: Any) -> None:
    stop_signals.ignore()
    if os.getppid() == parent:  # otherwise the worker is about to find out that it is alone
        os.kill(parent, number)


def _last_minute(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "alarm"):
        signal.alarm(_LAST_MINUTE)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let a signal that comes while workers start wait until they know what to do with it.

    It waits here until all of them run, and in a worker until ``_release``.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _release() -> None:
    """Let the signals come that were held while this worker started."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals.SIGNALS)
