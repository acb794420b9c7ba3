"""Sliding windows: where they lie, and what the model sees in them."""

from __future__ import annotations

import torch

from ..models import ImageFeatures, OVSegModel


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


def encode_windows(model: OVSegModel, image: torch.Tensor, origins: torch.Tensor, crop: tuple[int, int], batch: int) -> ImageFeatures:
    """Features of the windows of one normalised picture [3, H, W], ``batch`` of them at a time."""
    parts = []
    for some in origins.split(batch):
        windows = torch.stack([image[:, y : y + crop[0], x : x + crop[1]] for y, x in some.tolist()])
        parts.append(model.encode_image(windows))
    return ImageFeatures.concatenate(parts)
