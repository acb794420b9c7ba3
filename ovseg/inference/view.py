"""How pictures are seen: the first of the three values that make a label map."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.images import MAX_PIXELS
from ..errors import InputError
from .fields import one_of, option, positive

WINDOWS = 32  # times max_tokens: patches of all windows of a picture


def patches(size: tuple[int, int], patch: int, stride: int | None = None) -> int:
    """How many a window of ``size`` has."""
    return math.prod(max(0, side - patch) // (stride or patch) + 1 for side in size)


@dataclass(frozen=True)
class View:
    """How a picture is resized and cut before a model sees it.

    Attributes:
        short_side: pictures are resized to this short side, keeping their shape; the model's training size if None.
        long_side: and made smaller where their long side would exceed this.
        resize: ``bicubic`` (antialiased, Pillow's) or ``bilinear`` (without antialiasing, as OpenCV does it).
        crop: side of square sliding windows in the resized picture; None sees the picture whole.
        stride: pixels from one window to the next; half of ``crop`` if None.
        window_batch: windows, or pictures seen whole, in one encoder call; those of several pictures share calls.
        max_pixels: pictures with more are refused, as they come and as they are resized; the one limit, in place of Pillow's.
        max_tokens: patches in one window, or in a picture seen whole: time and memory grow with their square. All windows of a picture
            may have ``WINDOWS`` times as many.
    """

    short_side: int | None = option(None, "resize pictures to this short side before encoding")
    long_side: int | None = option(None, "and make them smaller where the long side would exceed this")
    resize: str = option("bicubic", "bicubic (antialiased) or bilinear (not, as OpenCV does it)")
    crop: int | None = option(None, "see the resized picture through square windows of this side")
    stride: int | None = option(None, "pixels from one window to the next (default: half of --crop)")
    window_batch: int = option(8, "windows in one encoder call, of several pictures")
    max_pixels: int = option(MAX_PIXELS, f"pictures of more pixels are refused ({MAX_PIXELS})")
    max_tokens: int = option(32768, "pictures of more patches in one view are refused (32768)")

    def __post_init__(self):
        one_of(self, "resize", ("bicubic", "bilinear"))
        positive(self, "short_side", "long_side", "crop", "stride", "window_batch", "max_pixels", "max_tokens")
        if self.stride is not None and self.crop is None:
            raise InputError(f"stride is {self.stride} and crop is missing; expected both, or neither")
        if self.crop and self.stride and self.stride > self.crop:
            raise InputError(f"stride is {self.stride}; expected 1 to the crop, {self.crop} pixels")

    @property
    def step(self) -> int | None:
        """Pixels from one window to the next; None without windows."""
        return None if self.crop is None else self.stride or max(1, self.crop // 2)

    def check(self, *, patch: int, trained: int, stride: int | None = None) -> None:
        """Whether a model of this patch, training size and step between patches (the patch if None) can see pictures so.

        Raises:
            InputError: for a short side below a patch, and windows that are no whole patches, exceed the short side or have too many.
        """
        short = self.short_side or trained
        if short < patch:
            raise InputError(f"short_side is {short}; expected at least a patch, {patch} pixels")
        if self.crop is not None and not (patch <= self.crop <= short and self.crop % patch == 0):
            raise InputError(f"crop is {self.crop}; expected a multiple of the patch, {patch} pixels, up to the short side, {short}")
        if self.crop is not None and (count := patches((self.crop, self.crop), patch, stride)) > self.max_tokens:
            raise InputError(f"crop is {self.crop}, {count} patches of {patch}; expected at most {self.max_tokens} (max_tokens)")
