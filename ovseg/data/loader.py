"""From a source to the batches of one rank, read ahead by workers, with a position that is kept."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigError, DataError, InputError
from .batches import Batch
from .loader_workers import Failed, Workers, starter
from .sampling import EpochOrder, mix, rank_slice
from .sources.base import Source

_LOOK = 1.0  # seconds without a batch after which the workers are looked at


class Waiting:
    """How long training waits for data.

    The first batch is not counted: it waits for the workers to start.

    Attributes:
        seconds: spent waiting.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self.seconds = 0.0
        self._since: float | None = None

    def add(self, began: float, ended: float) -> None:
        """Count the wait for one batch."""
        if self._since is None:
            self._since = ended
        else:
            self.seconds += ended - began

    @property
    def share(self) -> float:
        """Share of the time since the first batch."""
        if self._since is None:
            return 0.0
        return self.seconds / max(time.perf_counter() - self._since, 1e-9)


def batches_of(pictures: int, batch_size: int, *, ranks: int = 1, drop_last: bool = True) -> int:
    """Return the batches of an epoch.

    Raises:
        ConfigError: if there is none, or a rank would go without a picture.
    """
    if not ranks <= batch_size <= pictures:
        raise ConfigError(
            f"batch_size is {batch_size}; expected at least one picture for each of {ranks} "
            f"processes and at most {pictures}, the number of pictures"
        )
    rest = 0 if drop_last else pictures % batch_size
    if 0 < rest < ranks:
        raise ConfigError(
            f"the last batch of an epoch holds {rest} of {pictures} pictures, too few for {ranks} "
            "processes; expected drop_last, or another batch_size"
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
        self.source = source
        self.seed = seed
        self.batch_size = batch_size
        self.epochs = epochs
        self.drop_last = drop_last
        self.epoch = 0
        self.step = 0
        self.waiting = Waiting()
        order = EpochOrder(len(source), seed, shuffle=shuffle)
        self._steps = _Steps(source, order, batch_size, self.steps_per_epoch, rank, ranks)
        self._how: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
        if workers:
            self._how |= {
                "prefetch_factor": prefetch,
                "worker_init_fn": starter(tell_signals=tell_signals),
                "timeout": min(_LOOK, timeout or _LOOK),
            }
        self._timeout = timeout
        self._of_rank = f" of process {rank}" if ranks > 1 else ""
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
        workers = Workers(loader, self._timeout, self._of_rank)
        self.waiting.restart()
        # Python's own end would send one SIGTERM to the workers and wait.
        atexit.register(self.close)
        try:
            while True:
                began = time.perf_counter()
                batch = workers.next_batch()
                self.waiting.add(began, time.perf_counter())
                if batch is None:
                    return
                self._go_to(self.epoch, self.step + 1)
                yield batch
        finally:
            atexit.unregister(self.close)
            workers.stop()

    def _go_to(self, epoch: int, step: int) -> None:
        """Set the position; a step beyond the epoch's end lies in a later one."""
        whole = epoch * self.steps_per_epoch + step
        self.epoch, self.step = divmod(whole, self.steps_per_epoch)

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
        """Return the position, and what else must be the same for it to mean anything.

        It is that of the batch after the last one that was handed out, whatever the workers have
        read already.
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
        now = self._same()
        different = [name for name, value in now.items() if state[name] != value]
        if different and strict:
            name = different[0]
            raise ConfigError(
                f"the position was saved with {name} {state[name]}, and {name} is {now[name]} now: "
                "the pictures of a step would not be the same"
            )
        step = state["step"]
        if different:
            share = step * state["batch_size"] / state["pictures"]
            step = int(share * len(self.source) / self.batch_size)
        self._go_to(state["epoch"], step)

    def _same(self) -> dict[str, int]:
        return {
            "pictures": len(self.source),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "drop_last": int(self.drop_last),
        }


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
        self.source = source
        self.order = order
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.rank = rank
        self.ranks = ranks

    def chosen(self, k: int) -> tuple[int, list[int]]:
        """Return (epoch, pictures)."""
        epoch, step = divmod(k, self.steps_per_epoch)
        pictures = self.order(epoch, step * self.batch_size, (step + 1) * self.batch_size)
        return epoch, pictures[rank_slice(len(pictures), self.rank, self.ranks)].tolist()

    def __getitem__(self, k: int) -> Batch | Failed:
        epoch, pictures = self.chosen(k)
        seed = self.order.seed
        try:
            samples = [self.source.sample(i, mix(seed, epoch, i)) for i in pictures]
            return self.source.collate(samples)
        except (DataError, InputError) as error:
            return Failed(str(error))
