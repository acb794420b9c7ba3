"""Texts of different lengths without their padding: layers over tokens see [N, D], only attention goes through [T, L, D].

Of texts of 8 to 30 tokens, padded to 77, three quarters of the work is padding. Attention itself is little of it, so it runs padded to the
longest text, on any device and under its own kernels; every linear layer, norm and activation runs on the tokens alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from .upload import upload


class Packing:
    """Where the tokens of texts lie.

    Args:
        keep: [T, L] bool, the tokens. A text without any is its first place.
        pads: compute the padding too, as published training does: it is looked at by nobody, but looks itself.
        device: where the tokens are computed. With ``keep`` on the CPU nothing waits for it; on a GPU the lengths do.

    Attributes:
        seen: [T, L'] bool, what may be looked at; L' is the longest text, or L with ``pads``.
        positions: [N] int64, of each packed token in its text.
        starts: [T] int64, the packed index of each text's first token.
    """

    def __init__(self, keep: torch.Tensor, pads: bool = False, device: torch.device | None = None):
        device = keep.device if device is None else device
        self.whole = pads or torch.compiler.is_compiling()  # under torch.compile lengths are no numbers: everything is computed
        rows, starts, seen, self._firsts = places(keep, self.whole)
        self.shape = (seen.shape[0], seen.shape[1])
        self.rows, self.starts, self.seen = upload(rows, device), upload(starts, device), upload(seen, device)
        self.positions = (self.rows % self.shape[1]) if self.shape[1] else self.rows

    def split(self, sizes: Sequence[int]) -> list[Packing]:
        """Of neighbouring texts, so many each, with the places within them."""
        found, first = [], 0
        for size in sizes:
            part, last = copy.copy(self), first + size
            at, end = (first * self.shape[1], last * self.shape[1]) if self.whole else (self._firsts[first], self._firsts[last])
            part.shape, part.rows = (size, self.shape[1]), self.rows[at:end] - first * self.shape[1]
            part.positions, part.starts, part.seen = self.positions[at:end], self.starts[first:last] - at, self.seen[first:last]
            part._firsts = [x - at for x in self._firsts[first : last + 1]]
            found.append(part)
            first = last
        return found

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[T, L', ...] to the tokens [N, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.whole else flat.index_select(0, self.rows)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens [N, ...] to [T, L', ...]; zeros where there is none."""
        if not self.whole:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.rows, x)
        return x.unflatten(0, self.shape)


def places(keep: torch.Tensor, whole: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Where ``keep`` [T, L] has them, what a ``Packing`` is made of: rows [N] of [T L'], starts [T], seen [T, L'], and without ``whole``
    the starts and N as numbers. Reads ``keep``, unless ``whole``."""
    keep = keep | (torch.arange(keep.shape[1], device=keep.device) == 0)
    if whole:
        every = torch.arange(keep.numel(), device=keep.device)
        return every, every[:: keep.shape[1]] if keep.shape[1] else every.new_zeros(len(keep)), keep, []
    longest = int((keep.int() * torch.arange(1, keep.shape[1] + 1, device=keep.device)).amax()) if keep.numel() else 0
    keep = keep[:, :longest]
    ends = keep.sum(1).cumsum(0)
    return keep.flatten().nonzero()[:, 0], ends - keep.sum(1), keep, [0, *ends.tolist()]
