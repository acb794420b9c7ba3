"""How pictures are seen: the first of the three values that make a label map.

``View`` says it, ``place`` finds where the windows of a picture lie, ``encode`` shows those of many
pictures to a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..bounds import POSITIVE, bounded, check_bounds, choice
from ..data.images import MAX_PIXELS
from ..errors import InputError
from ..systems import OVSegModel, PatchFeatures

WINDOWS = 32  # times max_tokens: patches of all windows of a picture


def patches(size: tuple[int, int], patch: int, stride: int | None = None) -> int:
    """Count the patches of a window of ``size``."""
    return math.prod(max(0, side - patch) // (stride or patch) + 1 for side in size)


@dataclass(frozen=True)
class View:
    """How a picture is resized and cut before a model sees it; each field says what it does."""

    short_side: int | None = bounded(
        None,
        POSITIVE,
        "resize pictures to this short side, keeping their shape (default: the model's training "
        "size)",
    )
    long_side: int | None = bounded(
        None, POSITIVE, "and make them smaller where the long side would exceed this"
    )
    resize: str = bounded(
        "bicubic",
        choice("bicubic", "bilinear"),
        "bicubic (antialiased, Pillow's) or bilinear (not, as OpenCV does it)",
    )
    crop: int | None = bounded(
        None,
        POSITIVE,
        "see the resized picture through square windows of this side (default: whole)",
    )
    stride: int | None = bounded(
        None, POSITIVE, "pixels from one window to the next (default: half of --crop)"
    )
    window_batch: int = bounded(
        8, POSITIVE, "windows, or pictures seen whole, in one encoder call, of several pictures"
    )
    max_pixels: int = bounded(
        MAX_PIXELS,
        POSITIVE,
        f"pictures of more pixels, as they come or resized, are refused ({MAX_PIXELS})",
    )
    max_tokens: int = bounded(
        32768,
        POSITIVE,
        "pictures of more patches in one view are refused (32768), and of "
        f"{WINDOWS} times as many in all windows; time and memory grow with their square",
    )

    def __post_init__(self) -> None:
        check_bounds(self, "", InputError)
        if self.stride is not None and self.crop is None:
            raise InputError(
                f"stride is {self.stride} and crop is missing; expected both, or neither"
            )
        if self.crop and self.stride and self.stride > self.crop:
            raise InputError(f"stride is {self.stride}; expected 1 to the crop, {self.crop} pixels")

    @property
    def step(self) -> int | None:
        """The pixels from one window to the next; None without windows."""
        return None if self.crop is None else self.stride or max(1, self.crop // 2)

    def check(self, *, patch: int, trained: int, stride: int | None = None) -> None:
        """Refuse to show pictures so to a model of this patch, training size and step of patches.

        Args:
            patch: side of a patch in pixels.
            trained: the size that the model was trained at.
            stride: pixels from patch to patch; the patch if None.

        Raises:
            InputError: for a short side below a patch, and windows that are no whole patches,
                exceed the short side or have too many.
        """
        short = self.short_side or trained
        if short < patch:
            raise InputError(f"short_side is {short}; expected at least a patch, {patch} pixels")
        if self.crop is None:
            return
        if not (patch <= self.crop <= short and self.crop % patch == 0):
            raise InputError(
                f"crop is {self.crop}; expected a multiple of the patch, {patch} pixels, up to "
                f"the short side, {short}"
            )
        count = patches((self.crop, self.crop), patch, stride)
        if count > self.max_tokens:
            raise InputError(
                f"crop is {self.crop}, {count} patches of {patch}; expected at most "
                f"{self.max_tokens} (max_tokens)"
            )


@dataclass(frozen=True)
class Placement:
    """The placement of the windows of one picture.

    Attributes:
        size: (H, W) of the picture, which label maps have.
        canvas: (Hc, Wc) of the resized picture.
        crop: (hc, wc) of a window; less than asked for along a side of the canvas that is shorter.
        origins: [n, 2] int64 on the CPU, row and column of each window; None if the picture is seen
            whole.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    crop: tuple[int, int]
    origins: torch.Tensor | None

    @property
    def windows(self) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int], tuple[int, int]]:
        """The origins, crop, canvas and size, as ``window_argmax`` takes them.

        A whole picture is one window at the size of the labels.
        """
        if self.origins is None:
            return torch.zeros(1, 2, dtype=torch.int64), self.size, self.size, self.size
        return self.origins, self.crop, self.canvas, self.size


def place(
    size: tuple[int, int], view: View, *, patch: int, trained: int, stride: int | None = None
) -> Placement:
    """Find the windows of a picture of ``size`` (H, W).

    The canvas has the picture's shape: of both sides, one that a window does not fit into is
    rounded to whole patches, and the windows are as long as it is; so is a picture that is seen
    whole.

    Args:
        size: of the picture.
        view: how it is seen; one that ``View.check`` has let pass.
        patch: side of the model's patch in pixels.
        trained: the size that the model was trained at.
        stride: pixels from patch to patch; the patch if None.

    Raises:
        InputError: if the resized picture would exceed ``max_pixels`` or ``max_tokens``, or
            ``long_side`` leave less than half a patch of its short side.
    """
    short = view.short_side or trained
    factor = short / min(size)
    about = f"image is {size[1]}x{size[0]}; resized to short side {short}"
    if view.long_side is not None:
        factor = min(factor, view.long_side / max(size))
        about += f" and long side {view.long_side}"
    if min(size) * factor < patch / 2:
        raise InputError(
            f"{about} its short side would be {min(size) * factor:.1f} pixels, less than half a "
            f"patch of {patch}; expected a larger long_side, or crop and no long_side"
        )
    height, width = (_side(side * factor, patch, view.crop) for side in size)
    if height * width > view.max_pixels:
        raise InputError(
            f"{about} it would have {height * width} pixels and the limit is {view.max_pixels}; "
            "set long_side to make it smaller, or max_pixels (--long-side, --max-pixels)"
        )
    crop = (height, width) if view.crop is None else (min(view.crop, height), min(view.crop, width))
    tokens = patches(crop, patch, stride)
    if tokens > view.max_tokens:
        raise InputError(
            f"{about} it would be {width}x{height}, {tokens} patches in one view, and the limit "
            f"is {view.max_tokens}; set long_side to make it smaller, crop to see it through "
            "windows, or max_tokens (--long-side, --crop, --max-tokens)"
        )
    if view.step is None:
        return Placement(size, (height, width), (height, width), None)
    step = (min(view.step, crop[0]), min(view.step, crop[1]))
    count = math.prod(_count(*axis) for axis in zip((height, width), crop, step, strict=True))
    if count * tokens > WINDOWS * view.max_tokens:
        raise InputError(
            f"{about} it would be {width}x{height}, {count} windows of {tokens} patches, and the "
            f"limit is {WINDOWS} times {view.max_tokens} patches; set long_side to make it "
            "smaller, crop and stride for fewer windows, or max_tokens (--long-side, --crop, "
            "--stride, --max-tokens)"
        )
    return Placement(size, (height, width), crop, window_origins((height, width), crop, step))


def _side(exact: float, patch: int, crop: int | None) -> int:
    """Return a side of the canvas.

    Windows cut it at any pixel; what is seen in one piece is whole patches.
    """
    side = int(exact + 0.5)
    return side if crop is not None and side >= crop else max(1, int(exact / patch + 0.5)) * patch


def _count(size: int, side: int, step: int) -> int:
    return max(size - side + step - 1, 0) // step + 1


def window_origins(
    canvas: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> torch.Tensor:
    """Return row and column of each window, row by row, [n, 2] int64.

    As mmsegmentation cuts them: ``max(size - crop + stride - 1, 0) // stride + 1`` along an axis,
    the last ones shifted back to the border, so that every window is whole.

    Args:
        canvas: (H, W) of the picture, at least ``crop``.
        crop: (h, w) of a window.
        stride: rows and columns from one window to the next, at most ``crop``.
    """
    starts = []
    for size, side, step in zip(canvas, crop, stride, strict=True):
        if not 0 < side <= size or not 0 < step <= side:
            raise ValueError(
                f"canvas, crop and stride are {size}, {side} and {step}; expected stride <= crop "
                "<= canvas, all above 0"
            )
        starts.append(
            torch.tensor([min(i * step, size - side) for i in range(_count(size, side, step))])
        )
    return torch.cartesian_prod(*starts)


@torch.no_grad()
def encode(
    model: OVSegModel, pictures: Sequence[tuple[torch.Tensor, Placement]], batch: int
) -> list[PatchFeatures]:
    """Encode the windows of each picture.

    Windows of one size and dtype, of whichever picture, share encoder calls.

    Args:
        model: called as a module, so that hooks and ``torch.compile`` act.
        pictures: (pixels [3, Hc, Wc], uint8 or floats in 0..1, on the model's device; placement) of
            each.
        batch: windows in one call; a picture seen whole is one window.
    """
    windows: dict[tuple[tuple[int, int], torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for i, (pixels, placement) in enumerate(pictures):
        origins = [(0, 0)] if placement.origins is None else placement.origins.tolist()
        h, w = placement.crop
        windows.setdefault((placement.crop, pixels.dtype), []).extend(
            (i, pixels[:, y : y + h, x : x + w]) for y, x in origins
        )
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
