"""Augmentation on torchvision.transforms.v2: pictures and what lies over them as ``tv_tensors.Mask`` change together.

v2's own classes draw from torch's global generator; ours draw from one that is given and call v2's functions, so that a picture looks
the same in any process. Superpixels and class masks are both a ``Mask``: resized by nearest pixels, moved as the picture is.
torchvision is imported when the first transform is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from .draws import integer, uniform

MOST_RATIO = 1000.0  # of a crop's sides
Items = tuple[Any, ...]  # a tv_tensors.Image uint8 [3, H, W], then Masks [1, H, W]


def functional() -> ModuleType:
    """``torchvision.transforms.v2.functional``."""
    try:
        from torchvision.transforms.v2 import functional as F
    except ImportError as error:
        raise ImportError(f"pictures from files are augmented by torchvision, which does not import: {error}; expected a release that "
                          "belongs to this torch, pip install 'ovseg-kernels[models]'") from error
    return F


def as_items(image: Image.Image | torch.Tensor, *masks: np.ndarray | torch.Tensor) -> Items:
    """The picture and its maps [H, W] as v2 knows them. A map of another size than the picture is resized to it by nearest pixels."""
    F = functional()
    from torchvision import tv_tensors

    pixels = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)
    items: list[Any] = [tv_tensors.Image(pixels)]
    for mask in masks:
        ids = torch.as_tensor(mask.astype(np.int32) if isinstance(mask, np.ndarray) else mask)
        item = tv_tensors.Mask(ids[None])
        items.append(item if item.shape[-2:] == pixels.shape[-2:] else F.resize(item, list(pixels.shape[-2:])))
    return tuple(items)


def plain(item: torch.Tensor) -> torch.Tensor:
    """The pixels without their subclass, in memory of their own."""
    return item.as_subclass(torch.Tensor).contiguous()


@dataclass
class PairAugment:
    """How pictures of pairs are cropped.

    Attributes:
        scale: share of the picture's area that a crop takes, smallest and largest.
        ratio: width by height of the crop before it is made a square.
        flip: how often it is mirrored.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.0


class RandomResizedCrop:
    """A crop of random area, shape and place, resized to a square: bicubic with antialias.

    Ten tries for a crop that fits, as everywhere; then the largest one in the middle whose shape is allowed.
    """

    def __init__(self, size: int, scale: tuple[float, float], ratio: tuple[float, float]):
        self.size, self.scale, self.ratio = size, scale, ratio

    def box(self, rng: torch.Generator, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width)."""
        low, high = np.log(self.ratio)
        for _ in range(10):
            area = height * width * uniform(rng, *self.scale)
            shape = float(np.exp(uniform(rng, low, high)))
            w, h = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                return integer(rng, 0, height - h + 1), integer(rng, 0, width - w + 1), h, w
        shape = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        F = functional()
        box = self.box(rng, *items[0].shape[-2:])
        return tuple(F.resized_crop(item, *box, [self.size, self.size], interpolation=_bicubic(), antialias=True) for item in items)


class RandomFlip:
    """Mirrored left to right with probability ``share``."""

    def __init__(self, share: float):
        self.share = share

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        if uniform(rng) >= self.share:
            return items
        return tuple(functional().horizontal_flip(item) for item in items)


class Compose:
    """One transform after the other."""

    def __init__(self, *steps: Any):
        self.steps = steps

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        for step in self.steps:
            items = step(rng, *items)
        return items


def pair_transform(options: PairAugment, size: int) -> Compose:
    """What ``PairAugment`` says, to pictures of ``size`` pixels."""
    functional()
    return Compose(RandomResizedCrop(size, options.scale, options.ratio), RandomFlip(options.flip))


def _bicubic() -> Any:
    from torchvision.transforms import InterpolationMode

    return InterpolationMode.BICUBIC


def checked_range(name: str, values: Sequence[float], low: float, high: float) -> None:
    """A pair of numbers in order, within bounds; the error is a ``ValueError`` that names it."""
    if len(values) != 2 or not low < values[0] <= values[1] <= high:
        raise ValueError(f"{name} is {list(values)}; expected two numbers in order, above {low:g} and up to {high:g}")
