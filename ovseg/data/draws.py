"""Random draws that depend on nothing but the numbers given: no global state, the same in any process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

_MASK = 2**64 - 1


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers (splitmix64, one round a number): neighbours give unrelated seeds."""
    x = 0
    for number in numbers:
        x = (x + number * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return x >> 1


def mix_array(x: np.ndarray, key: int) -> np.ndarray:
    """``mix`` of every element of a uint64 array with one key, uint64."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(rng: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """A number of [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def integer(rng: torch.Generator, low: int, high: int) -> int:
    """An integer of low .. high - 1."""
    return int(torch.randint(low, high, (), generator=rng))


@contextlib.contextmanager
def drawing_from(rng: torch.Generator) -> Iterator[None]:
    """Inside, libraries that draw from the global generators of ``random`` and NumPy depend on ``rng`` alone; afterwards those go on as if
    nothing had been drawn."""
    before = random.getstate(), np.random.get_state()
    random.seed(integer(rng, 0, 2**31))
    np.random.seed(integer(rng, 0, 2**31))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def some(rng: torch.Generator, number: int, of: int) -> list[int]:
    """``number`` different integers below ``of``; where there are not so many, all of them again and again."""
    order = torch.randperm(of, generator=rng).tolist()
    return [order[i % of] for i in range(number)]
