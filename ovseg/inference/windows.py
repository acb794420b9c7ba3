"""Sliding windows: where they lie on a picture, and what a model sees in those of many pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..errors import InputError
from ..models import OVSegModel, PatchFeatures
from .view import View


@dataclass(frozen=True)
class Placement:
    """Where the windows of one picture lie.

    Attributes:
        size: (H, W) of the picture, which label maps have.
        canvas: (Hc, Wc) of the resized picture.
        crop: (hc, wc) of a window.
        origins: [n, 2] int64 on the CPU, row and column of each window; None if the picture is seen whole.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    crop: tuple[int, int]
    origins: torch.Tensor | None

    @property
    def windows(self) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int], tuple[int, int]]:
        """origins, crop, canvas, size as ``window_argmax`` takes them. A whole picture is one window at the size of the labels."""
        if self.origins is None:
            return torch.zeros(1, 2, dtype=torch.int64), self.size, self.size, self.size
        return self.origins, self.crop, self.canvas, self.size


def place(size: tuple[int, int], view: View, *, patch: int, trained: int) -> Placement:
    """The windows of a picture of ``size`` (H, W) for a model with this patch size, trained at ``trained`` pixels.

    Raises:
        InputError: if the resized picture would exceed ``max_pixels``; as ``View.check`` does.
    """
    view.check(patch=patch, trained=trained)
    short = view.short_side or trained
    factor = short / min(size)
    if view.long_side is not None:
        factor = min(factor, view.long_side / max(size))
    unit = 1 if view.crop else patch  # windows are whole patches; a picture seen whole must be
    height, width = (max(view.crop or patch, int(side * factor / unit + 0.5) * unit) for side in size)
    if height * width > view.max_pixels:
        raise InputError(f"image is {size[1]}x{size[0]}; resized to short side {short} it would have {height * width} pixels and the "
                         f"limit is {view.max_pixels}")
    if view.crop is None or view.step is None:
        return Placement(size, (height, width), (height, width), None)
    crop, step = (view.crop, view.crop), (view.step, view.step)
    return Placement(size, (height, width), crop, window_origins((height, width), crop, step))


def window_origins(canvas: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]) -> torch.Tensor:
    """[n, 2] int64, row and column of each window, row by row.

    As mmsegmentation cuts them: ``max(size - crop + stride - 1, 0) // stride + 1`` along an axis, the last ones shifted back to
    the border, so that every window is whole.

    Args:
        canvas: (H, W) of the picture, at least ``crop``.
        crop: (h, w) of a window.
        stride: rows and columns from one window to the next, at most ``crop``.
    """
    starts = []
    for size, side, step in zip(canvas, crop, stride, strict=True):
        if not 0 < side <= size or not 0 < step <= side:
            raise ValueError(f"canvas, crop and stride are {size}, {side} and {step}; expected stride <= crop <= canvas, all above 0")
        count = max(size - side + step - 1, 0) // step + 1
        starts.append(torch.tensor([min(i * step, size - side) for i in range(count)]))
    return torch.cartesian_prod(*starts)


@torch.no_grad()
def encode(model: OVSegModel, pictures: Sequence[tuple[torch.Tensor, Placement]], batch: int) -> list[PatchFeatures]:
    """Features of the windows of each picture. Windows of one size and dtype, of whichever picture, share encoder calls.

    Args:
        model: called as a module, so that hooks and ``torch.compile`` act.
        pictures: (pixels [3, Hc, Wc], uint8 or floats in 0..1, on the model's device; placement) of each.
        batch: windows in one call; a picture seen whole is one window.
    """
    windows: dict[tuple[tuple[int, int], torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for i, (pixels, placement) in enumerate(pictures):
        origins = [(0, 0)] if placement.origins is None else placement.origins.tolist()
        h, w = placement.crop
        windows.setdefault((placement.crop, pixels.dtype), []).extend((i, pixels[:, y : y + h, x : x + w]) for y, x in origins)
    parts: list[list[PatchFeatures]] = [[] for _ in pictures]
    for found in windows.values():
        for start in range(0, len(found), batch):
            some = found[start : start + batch]
            features = model(model.normalize(torch.stack([window for _, window in some])))
            at = 0
            for i, run in groupby(some, key=lambda entry: entry[0]):
                count = len(list(run))
                parts[i].append(features.select(slice(at, at + count)))
                at += count
    return [part[0] if len(part) == 1 else part[0].concatenate(part) for part in parts]
