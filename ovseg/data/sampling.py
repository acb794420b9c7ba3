"""Random draws that depend on nothing but the numbers given, and which pictures a step takes.

There is no global state: draws are the same in any process. Epoch e visits every picture once, in
an order that (seed, e) fixes; any part of it costs only that part. A batch of step s is a run of
places of the epoch's order, and ranks take neighbouring slices of that one batch: the pictures of a
step do not depend on the number of ranks, nor on how often training was interrupted.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_MASK = 2**64 - 1
_ROUNDS = 8  # of the network that shuffles an epoch


def mix(*numbers: int) -> int:
    """Make a 63-bit seed of several numbers; neighbours give unrelated seeds.

    Source: splitmix64, one round a number.
    """
    x = 0
    for number in numbers:
        x = (x + number * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return x >> 1


def mix_array(x: np.ndarray, key: int) -> np.ndarray:
    """Mix every element of a uint64 array with one key, as ``mix`` does; uint64."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def generator(seed: int) -> torch.Generator:
    """Return a generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def uniform(rng: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """Draw a number of [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def integer(rng: torch.Generator, low: int, high: int) -> int:
    """Draw an integer of low .. high - 1."""
    return int(torch.randint(low, high, (), generator=rng))


@contextlib.contextmanager
def drawing_from(rng: torch.Generator) -> Iterator[None]:
    """Let libraries that draw from the generators of ``random`` and NumPy depend on ``rng`` alone.

    Afterwards the generators, which are global, go on as if nothing had been drawn.
    """
    python = random.getstate()
    numpy = np.random.get_state()
    random.seed(integer(rng, 0, 2**31))
    np.random.seed(integer(rng, 0, 2**31))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def some(rng: torch.Generator, number: int, of: int) -> list[int]:
    """Draw ``number`` different integers below ``of``.

    Where there are not so many, all of them come again and again.
    """
    order = torch.randperm(of, generator=rng).tolist()
    return [order[i % of] for i in range(number)]


class EpochOrder:
    """Permutations of 0 .. length - 1, one for each epoch, without a table.

    A number x = l a + r with a = ceil(sqrt(length)) goes through a Feistel network, (l, r) -> (r,
    (l + f(r)) mod a), which permutes 0 .. a^2 - 1 whatever f is; what falls beyond the length goes
    through it again (cycle walking), at most a share of 2 / a of the numbers.

    Args:
        length: number of pictures.
        seed: of all epochs.
        shuffle: False for the order of the source.
    """

    def __init__(self, length: int, seed: int = 0, *, shuffle: bool = True):
        if length < 1:
            raise ValueError(f"length is {length}; expected at least one picture")
        self.length = length
        self.seed = seed
        self.shuffle = shuffle

    def __call__(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the pictures at places start .. stop - 1 of an epoch, int64."""
        x = np.arange(start, min(stop, self.length), dtype=np.uint64)
        if not self.shuffle:
            return x.astype(np.int64)
        side = np.uint64(math.isqrt(self.length - 1) + 1)
        keys = [mix(self.seed, epoch, i) for i in range(_ROUNDS)]
        x = _permuted(x, side, keys)
        beyond = np.flatnonzero(x >= self.length)
        while len(beyond):
            x[beyond] = _permuted(x[beyond], side, keys)
            beyond = beyond[x[beyond] >= self.length]
        return x.astype(np.int64)


def _permuted(x: Any, side: np.uint64, keys: list[int]) -> Any:
    left = x // side
    right = x % side
    for key in keys:
        left, right = right, (left + mix_array(right, key) % side) % side
    return left * side + right


def rank_slice(size: int, rank: int, ranks: int) -> slice:
    """Return the places of a rank in a batch: neighbours, as equal as can be.

    The slices of all ranks in order are the batch.
    """
    return slice(rank * size // ranks, (rank + 1) * size // ranks)
