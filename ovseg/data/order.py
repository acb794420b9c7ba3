"""Which pictures a step takes. Epoch e visits every picture once, in an order that (seed, e) fixes; any part of it costs only that part.

A batch of step s is a run of places of the epoch's order, and ranks take neighbouring slices of that one batch: the pictures of a step do
not depend on the number of ranks, nor on how often training was interrupted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .draws import mix, mix_array

_ROUNDS = 8


class EpochOrder:
    """Permutations of 0 .. length - 1, one for each epoch, without a table.

    A number x = l a + r with a = ceil(sqrt(length)) goes through a Feistel network, (l, r) -> (r, (l + f(r)) mod a), which permutes
    0 .. a^2 - 1 whatever f is; what falls beyond the length goes through it again (cycle walking), at most a share of 2 / a of the numbers.

    Args:
        length: number of pictures.
        seed: of all epochs.
        shuffle: False for the order of the source.
    """

    def __init__(self, length: int, seed: int = 0, *, shuffle: bool = True):
        if length < 1:
            raise ValueError(f"length is {length}; expected at least one picture")
        self.length, self.seed, self.shuffle = length, seed, shuffle

    def __call__(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The pictures at places start .. stop - 1 of an epoch, int64."""
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
    left, right = x // side, x % side
    for key in keys:
        left, right = right, (left + mix_array(right, key) % side) % side
    return left * side + right


def rank_slice(size: int, rank: int, ranks: int) -> slice:
    """The places of a rank in a batch: neighbours, as equal as can be, the slices of all ranks in order are the batch."""
    return slice(rank * size // ranks, (rank + 1) * size // ranks)
