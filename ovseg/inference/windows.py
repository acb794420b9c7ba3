"""Sliding windows: where they lie, what the model sees in them, and how a picture is resized before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn import functional as F

from ..data.images import to_tensor
from ..errors import InputError
from ..models import ImageFeatures, OVSegModel
from .settings import Settings


@dataclass(frozen=True)
class View:
    """How a model saw one picture.

    Attributes:
        size: (H, W) of the picture, which label maps have.
        canvas: (Hc, Wc) of the resized picture.
        crop: (hc, wc) of a window.
        origins: [n, 2] int64, row and column of each window; None if the picture was seen whole.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    crop: tuple[int, int]
    origins: torch.Tensor | None

    @property
    def placing(self) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int], tuple[int, int]]:
        """origins, crop, canvas, size as ``window_argmax`` takes them. A whole picture is one window at the size of the labels."""
        if self.origins is None:
            return torch.zeros(1, 2, dtype=torch.int64), self.size, self.size, self.size
        return self.origins, self.crop, self.canvas, self.size


def view_of(size: tuple[int, int], settings: Settings, *, patch: int, trained: int) -> View:
    """The windows of a picture of ``size`` (H, W) for a model with this patch size, trained at ``trained`` pixels.

    Raises:
        InputError: if the resized picture would exceed ``max_pixels``.
    """
    short = settings.short_side or trained
    factor = short / min(size)
    if settings.long_side is not None:
        factor = min(factor, settings.long_side / max(size))
    unit = 1 if settings.crop else patch  # windows are whole patches; a picture seen whole must be
    height, width = (max(settings.crop or patch, int(side * factor / unit + 0.5) * unit) for side in size)
    if height * width > settings.max_pixels:
        raise InputError(f"image is {size[1]}x{size[0]}; resized to short side {short} it would have {height * width} pixels and the "
                         f"limit is {settings.max_pixels}")
    if settings.crop is None:
        return View(size, (height, width), (height, width), None)
    crop, stride = settings.crop, settings.stride or max(1, settings.crop // 2)
    return View(size, (height, width), (crop, crop), window_origins((height, width), (crop, crop), (stride, stride)))


def resized(picture: Image.Image, canvas: tuple[int, int], how: str) -> torch.Tensor:
    """RGB picture to [3, Hc, Wc] in 0..1."""
    if picture.size == canvas[::-1]:
        return to_tensor(picture)
    if how == "bicubic":
        return to_tensor(picture.resize(canvas[::-1], Image.Resampling.BICUBIC))
    return F.interpolate(to_tensor(picture)[None], canvas, mode="bilinear", align_corners=False)[0]


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
