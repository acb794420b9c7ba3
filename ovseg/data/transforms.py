"""Augmentation on torchvision.transforms.v2: pictures change together with what lies over them.

v2's own classes draw from torch's global generator; ours draw from one that is given and call v2's
functions, so that a picture looks the same in any process. Superpixels and class masks are both a
``tv_tensors.Mask``: resized by nearest pixels, moved as the picture is. torchvision is imported
when the first transform is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..bounds import bounded, check_bounds
from ..errors import first_line
from .sampling import drawing_from, integer, uniform

_MOST_RATIO = 1000.0  # of a crop's sides
# The words that timm knows; what it does not know it leaves out in silence.
_POLICY = (
    r"rand(-(m\d{1,2}|mstd\d{1,3}(\.\d+)?|mmax\d{1,2}|n\d{1,2}|p[01](\.\d+)?|inc[01]|tweights))*"
)
_POLICY_IN_WORDS = (
    "a policy such as 'rand-m9-mstd0.5-inc1': magnitude m up to 99, its deviation mstd, its bound "
    "mmax, n changes up to 99, each with probability p, inc1, tweights"
)
Items = tuple[Any, ...]  # a tv_tensors.Image uint8 [3, H, W], then Masks [1, H, W]


def functional() -> ModuleType:
    """Import ``torchvision.transforms.v2.functional``.

    Raises:
        ImportError: in one sentence, if it does not import.
    """
    try:
        from torchvision.transforms.v2 import functional as F
    except (ImportError, RuntimeError) as error:  # RuntimeError: of a release for another torch
        raise ImportError(
            "pictures from files are augmented by torchvision, which does not import: "
            f"{first_line(error)}; expected a release that belongs to this torch, "
            "pip install 'ovseg-kernels[models]'"
        ) from error
    return F


def as_items(image: Image.Image | torch.Tensor, *masks: np.ndarray | torch.Tensor) -> Items:
    """Return the picture and its maps [H, W] as v2 knows them.

    A map of another size than the picture is resized to it by nearest pixels.
    """
    F = functional()
    from torchvision import tv_tensors

    if not isinstance(image, torch.Tensor):
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    size = list(image.shape[-2:])
    items: list[Any] = [tv_tensors.Image(image)]
    for mask in masks:
        ids = torch.as_tensor(mask.astype(np.int32) if isinstance(mask, np.ndarray) else mask)
        item = tv_tensors.Mask(ids[None])
        items.append(item if list(item.shape[-2:]) == size else F.resize(item, size))
    return tuple(items)


def plain(item: torch.Tensor) -> torch.Tensor:
    """Return the pixels without their subclass, in memory of their own."""
    return item.as_subclass(torch.Tensor).contiguous()


@dataclass
class PairAugment:
    """How pictures of pairs are cropped and changed, in this order.

    Attributes:
        scale: share of the picture's area that a crop takes, smallest and largest.
        ratio: width by height of the crop before it is made a square.
        interpolation: of the crop: bicubic or bilinear, both with antialias.
        flip: how often it is mirrored.
        rand_augment: a policy in timm's words, ``rand-m9-mstd0.5-inc1``; None for none. Not with
            superpixels, which would not follow.
        erase: how often a rectangle of it becomes noise.
    """

    scale: tuple[float, float] = bounded((0.5, 1.0), low=0, above=True, high=1, ordered=True)
    ratio: tuple[float, float] = bounded(
        (0.75, 4 / 3), low=0, above=True, high=_MOST_RATIO, ordered=True
    )
    interpolation: str = bounded("bicubic", one_of=("bicubic", "bilinear"))
    flip: float = bounded(0.0, low=0, high=1, expected="a share, 0 to 1")
    rand_augment: str | None = bounded(None, pattern=_POLICY, expected=_POLICY_IN_WORDS)
    erase: float = bounded(0.0, low=0, high=1, expected="a share, 0 to 1")

    def drawn(self) -> str | None:
        """Return the first field that makes a picture look different each time; None: none does."""
        draws = {
            "scale": min(self.scale) < 1,
            "ratio": self.ratio[0] != self.ratio[1],
            "flip": 0 < self.flip < 1,
            "rand_augment": self.rand_augment is not None,
            "erase": self.erase > 0,
        }
        return next((name for name, does in draws.items() if does), None)


class RandomResizedCrop:
    """A crop of random area, shape and place, resized to a square with antialias.

    Ten tries for a crop that fits, as everywhere; then the largest one in the middle whose shape is
    allowed. The whole area of one shape is that one at once: nothing is drawn.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        interpolation: str = "bicubic",
    ):
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.interpolation = interpolation

    def box(self, rng: torch.Generator, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width)."""
        low, high = np.log(self.ratio)
        fixed = min(self.scale) == 1 and low == high
        for _ in range(0 if fixed else 10):
            area = height * width * uniform(rng, *self.scale)
            shape = float(np.exp(uniform(rng, low, high)))
            w = round((area * shape) ** 0.5)
            h = round((area / shape) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                return integer(rng, 0, height - h + 1), integer(rng, 0, width - w + 1), h, w
        shape = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = min(width, max(1, round(height * shape)))
        h = min(height, max(1, round(width / shape)))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Crop and resize."""
        F = functional()
        from torchvision.transforms import InterpolationMode

        box = self.box(rng, *items[0].shape[-2:])
        how = InterpolationMode(self.interpolation)
        return tuple(
            F.resized_crop(item, *box, [self.size, self.size], interpolation=how, antialias=True)
            for item in items
        )


class WholeSquare:
    """A picture made a square without chance, with antialias.

    Args:
        size: of the square, in pixels.
        fit: ``squash``: the whole picture, its aspect changed; ``crop``: the largest square in its
            middle.
        interpolation: bicubic or bilinear.
    """

    def __init__(self, size: int, fit: str = "squash", interpolation: str = "bicubic"):
        self.size = size
        self.fit = fit
        self.interpolation = interpolation

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Crop and resize."""
        F = functional()
        from torchvision.transforms import InterpolationMode

        height, width = items[0].shape[-2:]
        box = (0, 0, height, width)
        if self.fit == "crop":
            side = min(height, width)
            box = ((height - side) // 2, (width - side) // 2, side, side)
        how = InterpolationMode(self.interpolation)
        return tuple(
            F.resized_crop(item, *box, [self.size, self.size], interpolation=how, antialias=True)
            for item in items
        )


class RandomFlip:
    """Mirrored left to right with probability ``share``."""

    def __init__(self, share: float):
        self.share = share

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Mirror, or do not."""
        if uniform(rng) >= self.share:
            return items
        return tuple(functional().horizontal_flip(item) for item in items)


class RandAugment:
    """Changes of colours and of geometry, by a policy in timm's words.

    Source: RandAugment (Cubuk et al., arXiv:1909.13719), by timm.

    Args:
        policy: see ``PairAugment.rand_augment``.
        size: of the pictures, in pixels: the largest shift is 0.45 of it.
        mean: RGB in 0..1, the colour of what moves in from outside.
        interpolation: of what is moved.
    """

    def __init__(
        self, policy: str, size: int, mean: Sequence[float], interpolation: str = "bicubic"
    ):
        try:
            from timm.data.auto_augment import rand_augment_transform
        except (
            ImportError,
            RuntimeError,
        ) as error:  # RuntimeError: a torchvision for another torch
            raise ImportError(
                f"augment.rand_augment is timm's, which does not import ({first_line(error)}): "
                "pip install 'ovseg-kernels[models]', or leave it null"
            ) from error
        colour = tuple(min(255, round(255 * x)) for x in mean)
        how = getattr(Image.Resampling, interpolation.upper())
        self.change = rand_augment_transform(
            policy, {"translate_const": int(0.45 * size), "img_mean": colour, "interpolation": how}
        )

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Change the picture; there must be nothing over it."""
        if len(items) != 1:
            raise ValueError(
                f"augment.rand_augment moves the picture and {len(items) - 1} maps lie over it, "
                "which would not follow; expected none, or rand_augment null"
            )
        F = functional()
        from torchvision import tv_tensors

        with drawing_from(rng):
            return (tv_tensors.Image(F.pil_to_tensor(self.change(F.to_pil_image(items[0])))),)


class RandomErasing:
    """A rectangle becomes noise with probability ``share``, as timm's mode ``pixel`` does.

    It has 1/50 to 1/3 of the area and is 0.3 to 1 / 0.3 wide by high, with ten tries; every value
    of it is N(0, 1) once normalised, cut off where 8 bits end.

    Source: Zhong et al., arXiv:1708.04896.
    """

    def __init__(self, share: float, mean: Sequence[float], std: Sequence[float]):
        self.share = share
        self.mean = mean
        self.std = std

    def box(
        self, rng: torch.Generator, height: int, width: int
    ) -> tuple[int, int, int, int] | None:
        """Draw (top, left, height, width), or None."""
        if uniform(rng) >= self.share:
            return None
        for _ in range(10):
            area = height * width * uniform(rng, 0.02, 1 / 3)
            shape = float(np.exp(uniform(rng, np.log(0.3), -np.log(0.3))))
            h = round((area * shape) ** 0.5)
            w = round((area / shape) ** 0.5)
            if 0 < h < height and 0 < w < width:
                return integer(rng, 0, height - h + 1), integer(rng, 0, width - w + 1), h, w
        return None

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Erase, or do not."""
        box = self.box(rng, *items[0].shape[-2:])
        if box is None:
            return items
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.mean, self.std))
        noise = 255 * (torch.randn(3, *box[2:], generator=rng) * std + mean)
        pixels = noise.round().clamp(0, 255).to(torch.uint8)
        return (functional().erase(items[0], *box, pixels), *items[1:])


class Compose:
    """One transform after the other."""

    def __init__(self, *steps: Any):
        self.steps = steps

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        """Apply all transforms."""
        for step in self.steps:
            items = step(rng, *items)
        return items


def pair_transform(
    options: PairAugment, size: int, mean: Sequence[float], std: Sequence[float]
) -> Compose:
    """Make the transform that ``PairAugment`` describes.

    Args:
        options: see there.
        size: side of the pictures that come out, in pixels.
        mean: by which the model normalises, RGB in 0..1.
        std: likewise.
    """
    functional()
    check_bounds(options, "augment.", ValueError)
    steps: list[Any] = [
        RandomResizedCrop(size, options.scale, options.ratio, options.interpolation),
        RandomFlip(options.flip),
    ]
    if options.rand_augment is not None:
        steps.append(RandAugment(options.rand_augment, size, mean, options.interpolation))
    if options.erase:
        steps.append(RandomErasing(options.erase, mean, std))
    return Compose(*steps)
