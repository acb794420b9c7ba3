"""Masks of a benchmark: how their values are read from files, and what they mean.

Augmentation of pictures with class masks, as mmsegmentation does it for most of its models and
ZegCLIP takes it over.

Resize to a random scale, crop with a cap on the largest class, mirror, distort colours, pad.
Pictures are not normalised here, so padding has the colour that becomes 0 when the model
normalises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from ..paths import no_file
from .images import MAX_PIXELS, TOO_LARGE, orientation_of, use_picture
from .sampling import integer, uniform
from .transforms import Compose, Items, RandomFlip, functional

IGNORE = -1  # of a truth: pixels that are not counted
INVALID = -2
_MASK_FORMATS = ("PNG", "TIFF", "BMP")
_MOST = 65535  # value of a mask


@dataclass(frozen=True)
class MaskLayout:
    """Where masks lie and what their values mean.

    Attributes:
        path: below the set's folder, ``{}`` for the key of a picture.
        table: int16 [65536], the label of each value; -1 is ignored, -2 must not occur.
    """

    path: str
    table: np.ndarray


def table_of(rule: dict[str, Any], classes: int) -> np.ndarray:
    """``map``; or classes one after the other from the value ``start``, without the ``removed``
    ones, the first one labelled ``label``. Then ``background`` values are 0 and ``ignore`` values
    are not counted.

    Raises:
        ValueError: for a value that no mask can hold, or a label that is no class.
    """
    table = np.full(_MOST + 1, INVALID, np.int16)
    if "map" in rule:
        for value, label in rule["map"].items():
            if not (isinstance(label, int) and 0 <= label < classes):
                raise ValueError(
                    f"value {value} is mapped to {label!r}; expected a class, 0 to {classes - 1}"
                )
            table[_values([value])] = label
    else:
        value, removed = rule["start"], set(rule.get("removed", ()))
        for label in range(rule.get("label", 0), classes):
            while value in removed:
                value += 1
            table[_values([value])], value = label, value + 1
    table[_values(rule.get("background", ()))] = 0
    table[_values(rule.get("ignore", ()))] = IGNORE
    return table


def _values(entries: Iterable[int | str]) -> list[int]:
    found: list[int] = []
    for entry in entries:
        first, _, last = str(entry).partition("-")
        if not (first.isdigit() and (last or first).isdigit() and int(last or first) <= _MOST):
            raise ValueError(
                f"{entry!r} is no value of a mask; expected 0 to {_MOST}, or a range such as 91-181"
            )
        found += range(int(first), int(last or first) + 1)
    return found


def read_mask(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The values of a mask [H, W] as they are stored, uint8 or uint16: class indices, with or
    without a palette.

    Raises:
        DataError: for a missing, damaged or coloured mask; the message names it.
    """
    if (found := no_file(path)) is not None:
        raise DataError(f"mask {path} {'is missing' if found == 'does not exist' else found}")

    def values_of(mask: Image.Image) -> np.ndarray:
        if mask.width * mask.height > max_pixels:
            raise DataError(
                f"mask {path} is {mask.width}x{mask.height}; the limit is {max_pixels} pixels. "
                f"{TOO_LARGE}"
            )
        if mask.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
            raise DataError(
                f"mask {path} is a {mask.mode} picture; expected class indices in one channel, "
                "grey or with a palette"
            )
        if orientation_of(mask) != 1:
            raise DataError(
                f"mask {path} has an EXIF orientation of its own; expected masks that are stored "
                "as they are to be read"
            )
        return np.asarray(mask)

    try:
        values = use_picture(path, values_of, _MASK_FORMATS)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"cannot decode mask {path}: it is none of {', '.join(_MASK_FORMATS)}, or its header "
            "is damaged"
        ) from error
    except Exception as error:  # decoders of damaged pictures raise about anything
        raise DataError(
            f"cannot decode mask {path}: {error}; expected a complete {' or '.join(_MASK_FORMATS)}"
        ) from error
    if values.dtype.kind == "i" and (int(values.min()) < 0 or int(values.max()) > _MOST):
        raise DataError(
            f"mask {path} holds values from {int(values.min())} to {int(values.max())}; expected "
            f"0 to {_MOST}"
        )
    return values.astype(
        np.uint8
        if values.dtype == bool
        else values.dtype
        if values.dtype.kind == "u"
        else np.uint16
    )


_TRIES = 10


@dataclass
class MaskAugment:
    """Attributes:
    scale: long and short side in pixels that a picture fits into, aspect kept, before the random
        factor.
    ratio: the factor on both, smallest and largest.
    class_cap: largest share of the labelled pixels of a crop that one class may have; ten tries.
    flip: how often pictures are mirrored.
    photometric: whether brightness, contrast, saturation and hue change.
    """

    scale: tuple[int, int] = (2048, 512)
    ratio: tuple[float, float] = (0.5, 2.0)
    class_cap: float = 0.75
    flip: float = 0.5
    photometric: bool = True


class RatioResize:
    """Resized, aspect kept, to fit ``scale`` times a random factor: bilinear without antialias,
    maps by nearest pixels.
    """

    def __init__(self, scale: tuple[int, int], ratio: tuple[float, float]):
        self.scale, self.ratio = scale, ratio

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        F = functional()
        factor = uniform(rng, *self.ratio)
        long, short = (int(side * factor) for side in (max(self.scale), min(self.scale)))
        height, width = items[0].shape[-2:]
        by = min(long / max(height, width), short / min(height, width))
        size = [max(1, int(height * by + 0.5)), max(1, int(width * by + 0.5))]
        return tuple(
            F.resize(item, size, antialias=False) for item in items
        )  # masks: nearest, whatever is asked


class CappedCrop:
    """A crop at a random place in which no class has more than a share ``cap`` of the labelled
    pixels and at least two are seen.

    After ten tries the next place is taken as it is. The last of the items is the class mask.
    """

    def __init__(self, size: int, cap: float, ignore_index: int):
        self.size, self.cap, self.ignore_index = size, cap, ignore_index

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        F = functional()
        height, width = items[-1].shape[-2:]
        h, w = min(self.size, height), min(self.size, width)
        tries = _TRIES if self.cap < 1 else 0
        top, left = integer(rng, 0, height - h + 1), integer(rng, 0, width - w + 1)
        while tries and not self.mixed(items[-1][0, top : top + h, left : left + w]):
            top, left = integer(rng, 0, height - h + 1), integer(rng, 0, width - w + 1)
            tries -= 1
        return tuple(F.crop(item, top, left, h, w) for item in items)

    def mixed(self, mask: torch.Tensor) -> bool:
        counts = mask.flatten().bincount(minlength=self.ignore_index + 1)
        counts[self.ignore_index] = 0
        return int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < self.cap


class MiddleCrop:
    """The middle, for validation."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        height, width = items[0].shape[-2:]
        h, w = min(self.size, height), min(self.size, width)
        return tuple(
            functional().crop(item, (height - h) // 2, (width - w) // 2, h, w) for item in items
        )


class PadTo:
    """Padded at the right and below to a square."""

    def __init__(self, size: int, fill: Sequence[int], ignore_index: int):
        self.size, self.fill, self.ignore_index = size, list(fill), ignore_index

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
        F = functional()
        height, width = items[0].shape[-2:]
        by = [0, 0, max(0, self.size - width), max(0, self.size - height)]
        return (
            F.pad(items[0], by, self.fill),
            *(F.pad(mask, by, self.ignore_index) for mask in items[1:]),
        )


class PhotoMetricDistortion:
    """Brightness, contrast, saturation, hue, each every second time; contrast before or after the
    other two.

    As in mmsegmentation: every step ends in whole numbers of 0 .. 255, saturation and hue are those
    of OpenCV's 8-bit HSV. Brightness adds up to 32, contrast and saturation are times 0.5 .. 1.5,
    hue turns by -36 .. 34 degrees in steps of two.
    """

    def __call__(self, rng: torch.Generator, *items: Any) -> Items:
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
    """RGB uint8 [3, H, W] to hue 0 ..

    179 (degrees by two), saturation and value 0 .. 255, uint8 [H, W] each.
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
    """The inverse: v - v s max(0, min(k, 4 - k, 1)) with k = (n + h / 60 degrees) mod 6 and n = 5,
    3, 1 for red, green, blue.
    """
    sector, s, v = hue.float() / 30, saturation.float() / 255, value.float()
    channels = []
    for n in (5, 3, 1):
        k = (n + sector) % 6
        channels.append(v - v * s * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels).round().to(torch.uint8)


def mask_transform(
    options: MaskAugment, size: int, mean: Sequence[float], ignore_index: int, *, train: bool = True
) -> Compose:
    """What ``MaskAugment`` says, to pictures of ``size`` pixels; without ``train`` the middle at
    factor 1.

    Args:
        mean: of the model, RGB in 0..1.
    """
    functional()
    pad = PadTo(size, [round(255 * channel) for channel in mean], ignore_index)
    if not train:
        return Compose(RatioResize(options.scale, (1.0, 1.0)), MiddleCrop(size), pad)
    steps = [
        RatioResize(options.scale, options.ratio),
        CappedCrop(size, options.class_cap, ignore_index),
        RandomFlip(options.flip),
    ]
    return Compose(*steps, *([PhotoMetricDistortion()] if options.photometric else []), pad)
