"""Augmentation of pictures with class masks.

Resize to a random scale, crop with a cap on the largest class, mirror, distort colours, pad: as
mmsegmentation does it for most of its models and ZegCLIP takes it over. Pictures are not normalised
here, so padding has the colour that becomes 0 when the model normalises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..bounds import bounded, check_bounds
from .sampling import integer, uniform
from .transforms import Compose, Items, RandomFlip, functional

_TRIES = 10
_MOST_SIDE = 16384  # in pixels


@dataclass
class MaskAugment:
    """How labelled pictures are changed, in this order.

    Attributes:
        scale: long and short side in pixels that a picture fits into, aspect kept, before the
            random factor.
        ratio: the factor on both, smallest and largest.
        class_cap: largest share of the labelled pixels of a crop that one class may have; ten
            tries.
        flip: how often pictures are mirrored.
        photometric: whether brightness, contrast, saturation and hue change.
    """

    scale: tuple[int, int] = bounded(
        (2048, 512),
        low=1,
        high=_MOST_SIDE,
        pair=True,
        expected=f"sides of 1 to {_MOST_SIDE} pixels",
    )
    ratio: tuple[float, float] = bounded((0.5, 2.0), low=0, above=True, high=16, ordered=True)
    class_cap: float = bounded(0.75, low=0, above=True, high=1, expected="a share above 0, up to 1")
    flip: float = bounded(0.5, low=0, high=1, expected="a share, 0 to 1")
    photometric: bool = True


class RatioResize:
    """Pictures are resized, aspect kept, to fit ``scale`` times a random factor.

    Bilinear without antialias; maps by nearest pixels.
    """

    def __init__(self, scale: tuple[int, int], ratio: tuple[float, float]):
        self.scale = scale
        self.ratio = ratio

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Resize."""
        F = functional()
        factor = uniform(rng, *self.ratio)
        long, short = (int(side * factor) for side in (max(self.scale), min(self.scale)))
        height, width = items[0].shape[-2:]
        by = min(long / max(height, width), short / min(height, width))
        size = [max(1, int(height * by + 0.5)), max(1, int(width * by + 0.5))]
        # Masks are resized by nearest pixels, whatever is asked.
        return tuple(F.resize(item, size, antialias=False) for item in items)


class CappedCrop:
    """A crop at a random place in which several classes are seen.

    No class has more than a share ``cap`` of the labelled pixels. After ten tries the next place is
    taken as it is. The last of the items is the class mask.
    """

    def __init__(self, size: int, cap: float, ignore_index: int):
        self.size = size
        self.cap = cap
        self.ignore_index = ignore_index

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Crop."""
        F = functional()
        height, width = items[-1].shape[-2:]
        h = min(self.size, height)
        w = min(self.size, width)
        tries = _TRIES if self.cap < 1 else 0
        while True:
            top = integer(rng, 0, height - h + 1)
            left = integer(rng, 0, width - w + 1)
            if not tries or self.mixed(items[-1][0, top : top + h, left : left + w]):
                break
            tries -= 1
        return tuple(F.crop(item, top, left, h, w) for item in items)

    def mixed(self, mask: torch.Tensor) -> bool:
        """Return whether a crop [h, w] of the mask shows several classes, none above the cap."""
        counts = mask.flatten().bincount(minlength=self.ignore_index + 1)
        counts[self.ignore_index] = 0
        return int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < self.cap


class MiddleCrop:
    """The middle, for validation."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Crop."""
        height, width = items[0].shape[-2:]
        h = min(self.size, height)
        w = min(self.size, width)
        return tuple(
            functional().crop(item, (height - h) // 2, (width - w) // 2, h, w) for item in items
        )


class PadTo:
    """Padded at the right and below to a square."""

    def __init__(self, size: int, fill: Sequence[int], ignore_index: int):
        self.size = size
        self.fill = list(fill)
        self.ignore_index = ignore_index

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Pad."""
        F = functional()
        height, width = items[0].shape[-2:]
        by = [0, 0, max(0, self.size - width), max(0, self.size - height)]
        return (
            F.pad(items[0], by, self.fill),
            *(F.pad(mask, by, self.ignore_index) for mask in items[1:]),
        )


class PhotoMetricDistortion:
    """Brightness, contrast, saturation and hue change, each every second time.

    Contrast comes before or after the other two. As in mmsegmentation: every step ends in whole
    numbers of 0 .. 255, saturation and hue are those of OpenCV's 8-bit HSV. Brightness adds up to
    32, contrast and saturation are times 0.5 .. 1.5, hue turns by -36 .. 34 degrees in steps of
    two.
    """

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Change the colours."""
        from torchvision import tv_tensors

        x = items[0].as_subclass(torch.Tensor)
        if integer(rng, 0, 2):
            x = _linear(x, 1.0, uniform(rng, -32, 32))
        first = integer(rng, 0, 2)
        if first and integer(rng, 0, 2):
            x = _linear(x, uniform(rng, 0.5, 1.5), 0.0)
        if integer(rng, 0, 2):
            hue, saturation, value = to_hsv(x)
            x = from_hsv(hue, _linear(saturation, uniform(rng, 0.5, 1.5), 0.0), value)
        if integer(rng, 0, 2):
            hue, saturation, value = to_hsv(x)
            x = from_hsv((hue.int() + integer(rng, -18, 18)) % 180, saturation, value)
        if not first and integer(rng, 0, 2):
            x = _linear(x, uniform(rng, 0.5, 1.5), 0.0)
        return (tv_tensors.Image(x), *items[1:])


def _linear(x: torch.Tensor, factor: float, plus: float) -> torch.Tensor:
    return (x.float() * factor + plus).clamp(0, 255).to(torch.uint8)


def to_hsv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convert RGB uint8 [3, H, W] to hue, saturation and value, uint8 [H, W] each.

    Hue is 0 .. 179 (degrees by two), the others 0 .. 255.
    """
    red, green, blue = x.int()
    value = x.amax(0).int()
    chroma = value - x.amin(0).int()
    part = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    # OpenCV divides by tables of 12 fraction bits; quotients rounded otherwise differ on one pixel
    # in a hundred.
    inverse = 4096 / torch.arange(256, dtype=torch.float64).clamp(min=1)
    hue = (part * (30 * inverse).round().int()[chroma] + 2048) >> 12
    saturation = (chroma * (255 * inverse).round().int()[value] + 2048) >> 12
    return (
        torch.where(hue < 0, hue + 180, hue).to(torch.uint8),
        saturation.to(torch.uint8),
        value.to(torch.uint8),
    )


def from_hsv(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Convert hue, saturation and value, as ``to_hsv`` makes them, to RGB.

    A channel is v - v s max(0, min(k, 4 - k, 1)) with k = (n + h / 60 degrees) mod 6 and n = 5, 3,
    1 for red, green, blue.
    """
    sector = hue.float() / 30
    s = saturation.float() / 255
    v = value.float()
    channels = []
    for n in (5, 3, 1):
        k = (n + sector) % 6
        channels.append(v - v * s * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels).round().to(torch.uint8)


def mask_transform(
    options: MaskAugment | None,
    size: int,
    mean: Sequence[float],
    ignore_index: int,
    *,
    train: bool = True,
) -> Compose:
    """Make the transform that ``MaskAugment`` describes.

    Args:
        options: see there; None: the whole picture, its long side as long as the square's.
        size: side of the pictures that come out, in pixels.
        mean: by which the model normalises, RGB in 0..1.
        ignore_index: of the mask, where the picture is padded.
        train: False: the middle at factor 1.
    """
    functional()
    pad = PadTo(size, [round(255 * channel) for channel in mean], ignore_index)
    if options is None:
        return Compose(RatioResize((size, size), (1.0, 1.0)), pad)
    check_bounds(options, "augment.", ValueError)
    if not train:
        return Compose(RatioResize(options.scale, (1.0, 1.0)), MiddleCrop(size), pad)
    steps: list[Any] = [
        RatioResize(options.scale, options.ratio),
        CappedCrop(size, options.class_cap, ignore_index),
        RandomFlip(options.flip),
    ]
    if options.photometric:
        steps.append(PhotoMetricDistortion())
    return Compose(*steps, pad)
