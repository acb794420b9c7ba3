"""From a source to the batches of one rank: which pictures, read ahead by workers, with a position
that can be kept and gone back to.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .. import stop_signals
from ..errors import ConfigError, DataError, InputError
from .batches import Batch
from .sampling import EpochOrder, mix, rank_slice
from .sources.base import Source

_LOOK = 1.0  # seconds without a batch after which the workers are looked at


class Waiting:
    """How long training waits for data.

    The first batch is not counted: it waits for the workers to start.

    Attributes:
        seconds: spent waiting.
        share: of the time since the first batch (or ``restart``).
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.seconds, self._since = 0.0, None

    def add(self, began: float, ended: float) -> None:
        if self._since is None:
            self._since = ended
        else:
            self.seconds += ended - began

    @property
    def share(self) -> float:
        return (
            0.0
            if self._since is None
            else self.seconds / max(time.perf_counter() - self._since, 1e-9)
        )

    _since: float | None


def batches_of(pictures: int, batch_size: int, *, ranks: int = 1, drop_last: bool = True) -> int:
    """Return the batches of an epoch.

    Raises:
        ConfigError: if there is none, or a rank would go without a picture.
    """
    if not ranks <= batch_size <= pictures:
        raise ConfigError(
            f"batch_size is {batch_size}; expected at least one picture for each of {ranks} "
            "processes and at most "
            f"{pictures}, the number of pictures"
        )
    rest = 0 if drop_last else pictures % batch_size
    if 0 < rest < ranks:
        raise ConfigError(
            f"the last batch of an epoch holds {rest} of {pictures} pictures, too few for {ranks} "
            "processes; "
            "expected drop_last, or another batch_size"
        )
    return pictures // batch_size + (rest > 0)


class Loader:
    """Batches of a source, for one rank; iterating goes on from the position.

    Every epoch visits each picture once. Step s of an epoch is one global batch, of which each rank
    takes its slice, so what a step sees depends on (seed, epoch, s) only: not on ranks, workers or
    interruptions.

    Args:
        source: what is read.
        batch_size: pictures of a step over all ranks.
        seed: of order and augmentation.
        rank, ranks: which slice is ours.
        epochs: after how many the data ends; None: never, steps decide.
        drop_last: whether the rest of an epoch that fills no batch is left out.
        shuffle: False: the order of the source.
        workers: processes that read; 0: the caller's.
        prefetch: batches each worker keeps ready.
        pin_memory: for copies to a GPU that do not wait.
        timeout: seconds without a batch after which workers are given up; 0: never.
        tell_signals: whether a worker passes a signal that asks it to end on to this process, which
            then decides (``stop_signals.noted``).

    Attributes:
        epoch, step: of the next batch; ``step`` counts within the epoch.
        waiting: see ``Waiting``.

    Raises:
        ConfigError: if a batch does not go into the source, or a rank would go without a picture.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        epochs: int | None = None,
        drop_last: bool = True,
        shuffle: bool = True,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        timeout: float = 0.0,
        tell_signals: bool = False,
    ):
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}; expected 0 to {ranks - 1}")
        self.steps_per_epoch = batches_of(len(source), batch_size, ranks=ranks, drop_last=drop_last)
        self.source, self.seed, self.batch_size, self.epochs, self.drop_last = (
            source,
            seed,
            batch_size,
            epochs,
            drop_last,
        )
        self.epoch = self.step = 0
        self.waiting = Waiting()
        self._steps = _Steps(
            source,
            EpochOrder(len(source), seed, shuffle=shuffle),
            batch_size,
            self.steps_per_epoch,
            rank,
            ranks,
        )
        self._how: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
        self._timeout, self._of_rank = timeout, f" of process {rank}" if ranks > 1 else ""
        if workers:
            telling = partial(_start_telling_worker, parent=os.getpid())
            begin = telling if tell_signals else _start_worker
            self._how |= {"prefetch_factor": prefetch, "worker_init_fn": begin}
            self._how |= {"timeout": min(_LOOK, timeout or _LOOK)}
        self._running: Iterator[Batch] | None = None

    def __len__(self) -> int:
        """Batches from the start to the end of the data."""
        if self.epochs is None:
            raise TypeError("this loader has no end: epochs is None")
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._running = self._batches()
        return self._running

    def _batches(self) -> Iterator[Batch]:
        first = self.epoch * self.steps_per_epoch + self.step
        places = count(first) if self.epochs is None else range(first, len(self))
        # A generator of its own: DataLoader would take its seed from torch's global one, and so
        # change what training draws.
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=places,
            generator=torch.Generator().manual_seed(self.seed),
            **self._how,
        )
        with _signals_held():
            iterator, loud = _quietly(loader)
        self.waiting.restart()
        atexit.register(
            self.close
        )  # Python's own end would send one SIGTERM to the workers and wait
        try:
            while True:
                began = time.perf_counter()
                batch = _next(iterator, self._timeout, self._of_rank)
                self.waiting.add(began, time.perf_counter())
                if batch is None:
                    return
                self.epoch, self.step = divmod(
                    self.epoch * self.steps_per_epoch + self.step + 1, self.steps_per_epoch
                )
                yield batch
        finally:
            atexit.unregister(self.close)
            _stop(iterator)
            if loud is not None:
                _on_child(loud)

    def close(self) -> None:
        """End the workers. The position stays; iterating starts new ones."""
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]
            self._running = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, int]:
        """The position: of the batch after the last one that was handed out, whatever the workers
        have read already.
        """
        return {"epoch": self.epoch, "step": self.step, **self._same()}

    def load_state_dict(self, state: dict[str, int], *, strict: bool = True) -> None:
        """Go to a position; iterate anew after it.

        Args:
            state: of ``state_dict``.
            strict: False: with another batch size, seed or number of pictures go to about the same
                share of the epoch.

        Raises:
            ConfigError: if it belongs to other data; the message names what differs.
        """
        self.close()
        different = [name for name, value in self._same().items() if state[name] != value]
        if different and strict:
            name = different[0]
            raise ConfigError(
                f"the position was saved with {name} {state[name]}, and {name} is "
                f"{self._same()[name]} now: "
                "the pictures of a step would not be the same"
            )
        share = state["step"] * state["batch_size"] / state["pictures"]
        step = int(share * len(self.source) / self.batch_size) if different else state["step"]
        self.epoch, self.step = divmod(
            state["epoch"] * self.steps_per_epoch + step, self.steps_per_epoch
        )

    def _same(self) -> dict[str, int]:
        return {
            "pictures": len(self.source),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "drop_last": int(self.drop_last),
        }


@dataclass
class _Failed:
    """Why there is no batch: errors of data cross from a worker as they are, not as a traceback in
    a string.
    """

    message: str


class _Steps(Dataset):
    """Item k: the rank's slice of the k-th global batch since the beginning."""

    def __init__(
        self,
        source: Source,
        order: EpochOrder,
        batch_size: int,
        steps_per_epoch: int,
        rank: int,
        ranks: int,
    ):
        self.source, self.order, self.batch_size, self.steps_per_epoch = (
            source,
            order,
            batch_size,
            steps_per_epoch,
        )
        self.rank, self.ranks = rank, ranks

    def chosen(self, k: int) -> tuple[int, list[int]]:
        """(epoch, pictures)."""
        epoch, step = divmod(k, self.steps_per_epoch)
        pictures = self.order(epoch, step * self.batch_size, (step + 1) * self.batch_size)
        return epoch, pictures[rank_slice(len(pictures), self.rank, self.ranks)].tolist()

    def __getitem__(self, k: int) -> Batch | _Failed:
        epoch, pictures = self.chosen(k)
        try:
            return self.source.collate(
                [self.source.sample(i, mix(self.order.seed, epoch, i)) for i in pictures]
            )
        except (DataError, InputError) as error:
            return _Failed(str(error))


def _next(iterator: Any, timeout: float, of_rank: str) -> Batch | None:
    """Return the next batch, None at the end.

    Raises:
        DataError: that names the workers, if one of them has ended or none has given a batch for
            ``timeout`` seconds.
    """
    with _given_up(getattr(iterator, "_workers", ()), timeout) as given_up:
        while True:
            try:
                batch = next(iterator, None)
                break
            except (RuntimeError, OSError, EOFError) as error:
                ended = _ended(iterator, of_rank, wait=not isinstance(error, RuntimeError))
                if given_up.is_set():
                    names = ", ".join(
                        f"{i} (pid {one.pid})" for i, one in enumerate(iterator._workers)
                    )
                    raise DataError(
                        f"DataLoader timed out after {timeout:g} s without a batch: workers {names}"
                        f"{of_rank} read too slowly, stood still or waited for the disk. "
                        "OVSEG_DATA_TIMEOUT is how long training waits"
                    ) from error
                if ended:
                    raise DataError(
                        f"DataLoader {ended}. Often memory or shared memory (/dev/shm) ran out: "
                        "lower "
                        "data.workers or data.prefetch"
                    ) from error
                # A bug of the source says "Caught".
                if not str(error).startswith("DataLoader timed out"):
                    raise
    if isinstance(batch, _Failed):
        raise DataError(batch.message)
    return batch


@contextlib.contextmanager
def _given_up(workers: Sequence[Any], timeout: float) -> Iterator[threading.Event]:
    """Kill the workers after ``timeout`` seconds, and note it.

    What waits for a tensor of one that stands still, deep in torch, has no limit of its own.
    """
    noted = threading.Event()

    def give_up() -> None:
        noted.set()
        for worker in workers:
            worker.kill()

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    if workers and timeout:
        timer.start()
    try:
        yield noted
    finally:
        timer.cancel()


def _ended(iterator: Any, of_rank: str, *, wait: bool) -> str:
    """Say which workers have ended and how; nothing if all run.

    Args:
        wait: one that has just been killed may not be known to be dead.
    """
    found = []
    for number, worker in enumerate(getattr(iterator, "_workers", ())):
        if wait:
            worker.join(0.1)
        if not worker.is_alive():
            how = stop_signals.end_of(worker.exitcode)
            found.append(f"worker {number}{of_rank} (pid {worker.pid}) {how}")
    return ", ".join(found)


def _quietly(loader: DataLoader) -> tuple[Any, Any]:
    """Start to iterate; returns the iterator, and torch's handler of SIGCHLD, to be put back.

    That handler raises a worker's death out of whatever line runs, in the middle of a step or of a
    collective. ``_next`` finds out as well.
    """
    iterator = iter(loader)
    loud = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if not loader.num_workers or not callable(loud):
        return iterator, None

    def quiet(number: int, frame: Any) -> None:
        with contextlib.suppress(RuntimeError):
            loud(number, frame)

    return iterator, loud if _on_child(quiet) else None


def _on_child(handler: Any) -> bool:
    """Set the handler of SIGCHLD, where this is the thread that may."""
    if threading.current_thread() is not threading.main_thread():
        return False
    signal.signal(signal.SIGCHLD, handler)
    return True


def _stop(iterator: Any) -> None:
    """End the workers now, not when the iterator happens to be collected; one that hangs has been
    asked before and is killed.
    """
    if hasattr(iterator, "_shutdown_workers"):
        for worker in iterator._workers:
            worker.terminate = worker.kill  # SIGTERM has another meaning in a worker
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()


def _start_worker(number: int) -> None:
    """Signals that end a run go to all its processes; the training process must get the batch it
    waits for and save first.

    Ctrl-C is for the training process alone. The first SIGTERM leaves the worker a minute, the
    second ends it.
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


def _release() -> None:
    """Let the signals come that were held while this worker started."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals.SIGNALS)


def _tell(parent: int, number: int, _: Any) -> None:
    stop_signals.ignore()
    if os.getppid() == parent:  # otherwise the worker is about to find out that it is alone
        os.kill(parent, number)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """A signal that comes while workers start waits, here until all of them run, in a worker until
    it knows what to do with it.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _last_minute(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "alarm"):
        signal.alarm(60)
