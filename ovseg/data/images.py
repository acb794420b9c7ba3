"""Pictures from anywhere to RGB, with hostile input in mind: size known before decoding, few formats, no half pictures."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # allow-list: security fixes of Pillow are mostly in rare formats
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_PIXELS = 64_000_000
_OPENING = threading.Lock()


def read_image(source: Any, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB picture, upright by its EXIF orientation.

    Args:
        source: path, bytes, PIL image, uint8 array [H, W, 3] or [H, W], tensor [3, H, W] (uint8, or float in 0..1).
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        InputError: if it cannot be read, is truncated, too large, empty, or of another kind; the message names it.
    """
    if isinstance(source, torch.Tensor):
        return _from_array(_tensor_to_array(source), max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "image", max_pixels)
    if isinstance(source, (bytes, bytearray)):
        return _decode(io.BytesIO(source), f"image of {len(source)} bytes", max_pixels)
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            raise InputError(f"image {str(source)!r} does not exist; expected a picture file ({', '.join(FORMATS)})")
        return _decode(source, str(source), max_pixels)
    raise InputError(f"image is a {type(source).__name__}; expected a path, bytes, PIL image, array or tensor")


def open_image(file: Any) -> Image.Image:
    """``Image.open`` of ``FORMATS`` without Pillow's own limit of pixels: the caller's is the one that holds."""
    with _OPENING:  # the limit is a global; only a header is read meanwhile
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def picture_size(header: bytes) -> int:
    """Pixels of a picture by its first bytes; 0 where they do not tell."""
    try:
        with open_image(io.BytesIO(header)) as image:
            return image.width * image.height
    except (OSError, SyntaxError, ValueError, EOFError):
        return 0


def _decode(file: Any, name: str, max_pixels: int) -> Image.Image:
    try:
        with open_image(file) as image:
            return _to_rgb(image, name, max_pixels)
    except UnidentifiedImageError as error:
        raise InputError(f"cannot decode {name}: it is none of {', '.join(FORMATS)}, or its header is damaged") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot decode {name}: {error}; expected a complete picture") from error


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width}x{height}; expected at least one pixel")
    if width * height > max_pixels:
        raise InputError(f"{name} is {width}x{height} = {width * height} pixels; the limit is {max_pixels}: it is too large. "
                         "Resize it, or set max_pixels (--max-pixels where pictures are segmented)")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.float32)
        image = Image.fromarray((values / 257.0).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _tensor_to_array(x: torch.Tensor) -> np.ndarray:
    if x.dim() != 3 or x.shape[0] != 3:
        raise InputError(f"image has shape {list(x.shape)}; expected [3, H, W]")
    if x.is_floating_point():
        if not bool(x.isfinite().all()):
            raise InputError("image holds NaN or infinity; expected values in 0..1")
        low, high = float(x.min()), float(x.max())
        if low < 0 or high > 1:
            raise InputError(f"image holds values from {low:g} to {high:g}; expected 0..1 (not normalised)")
        x = (x * 255).round()
    elif x.dtype != torch.uint8:
        raise InputError(f"image has dtype {x.dtype}; expected uint8 or floats in 0..1")
    return x.to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _from_array(x: np.ndarray, max_pixels: int) -> Image.Image:
    if x.dtype != np.uint8:
        raise InputError(f"image has dtype {x.dtype}; expected uint8")
    if not (x.ndim == 2 or (x.ndim == 3 and x.shape[2] == 3)) or x.size == 0:
        raise InputError(f"image has shape {list(x.shape)}; expected [H, W, 3] or [H, W] with at least one pixel")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(x)), "image", max_pixels)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB picture to float [3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
