"""Texts of different lengths without their padding: layers over tokens see [N, D], only attention goes through [T, L, D].

Of texts of 8 to 30 tokens, padded to 77, three quarters of the work is padding. Attention itself is little of it, so it runs padded to the
longest text, on any device and under its own kernels; every linear layer, norm and activation runs on the tokens alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch


class Packing:
    """Where the tokens of texts lie.

    Args:
        keep: [T, L] bool, the tokens. A text without any is its first place.
        pads: compute the padding too, as published training does: it is looked at by nobody, but looks itself.
        device: where the tokens are computed; ``keep`` may lie on the CPU, which is cheaper: a GPU must be waited for.

    Attributes:
        seen: [T, L'] bool, what may be looked at; L' is the longest text, or L with ``pads``.
        positions: [N] int64, of each packed token in its text.
        starts: [T] int64, the packed index of each text's first token.
    """

    def __init__(self, keep: torch.Tensor, pads: bool = False, device: torch.device | None = None):
        device = keep.device if device is None else device
        keep = keep | (torch.arange(keep.shape[1], device=keep.device) == 0)
        computed = torch.ones_like(keep) if pads else keep
        # Under torch.compile the lengths are no numbers: everything is computed.
        if torch.compiler.is_compiling():
            computed = torch.ones_like(keep)
        elif not pads:
            longest = int((keep.int() * torch.arange(1, keep.shape[1] + 1, device=keep.device)).amax()) if keep.numel() else 0
            computed, keep = keep[:, :longest], keep[:, :longest]
        self.shape = (computed.shape[0], computed.shape[1])
        self.whole = pads or torch.compiler.is_compiling()
        lengths = computed.sum(1)
        starts = lengths.cumsum(0) - lengths
        every = torch.arange(computed.numel(), device=computed.device)
        rows = every if self.whole else computed.flatten().nonzero()[:, 0]
        self.rows = rows.to(device, non_blocking=True)
        self.positions = (self.rows % self.shape[1]) if self.shape[1] else self.rows
        self.starts, self.seen = starts.to(device, non_blocking=True), keep.to(device, non_blocking=True)
        self._starts = starts  # where they are known without waiting

    def split(self, sizes: Sequence[int]) -> list[Packing]:
        """Of neighbouring texts, so many each, with the places within them."""
        found, first = [], 0
        for size in sizes:
            part, last = copy.copy(self), first + size
            if self.whole:
                at, end = first * self.shape[1], last * self.shape[1]
            else:
                at = int(self._starts[first]) if first < len(self._starts) else len(self.rows)
                end = int(self._starts[last]) if last < len(self._starts) else len(self.rows)
            part.shape, part.rows = (size, self.shape[1]), self.rows[at:end] - first * self.shape[1]
            part.positions, part.starts, part.seen = self.positions[at:end], self.starts[first:last] - at, self.seen[first:last]
            part._starts = self._starts[first:last] - at
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
