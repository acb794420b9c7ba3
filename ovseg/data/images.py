"""Pictures from anywhere to RGB, with hostile input in mind: size known before decoding, listed formats, no half pictures."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..dense import FLOATS, check_dense
from ..errors import InputError
from ..paths import no_file

# What photographs come in, each known by its first bytes; security fixes of Pillow are mostly in the rarer ones. GIF, TIFF, WebP and AVIF
# may hold several pictures: the first is read.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM", "QOI")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".jp2", ".j2k",
            ".j2c", ".jpc", ".jpx", ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".qoi")  # fmt: skip
ORIENTATION = 0x0112  # the EXIF tag
MAX_PIXELS = 64_000_000
_OPENING = threading.Lock()


def read_image(source: Any, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB picture, upright by its EXIF orientation.

    16 bits a channel are scaled to 8. Floats (a picture of mode F, a tensor) are values in 0..1; 32-bit integers (mode I) are refused, for
    nothing says what their white is.

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
        with _named("image"):
            return _to_rgb(source, "image", max_pixels)
    file, name = _file_of(source)
    with _named(name), opened(file) as image:
        return _to_rgb(image, name, max_pixels)


def orientation(source: str | Path | bytes) -> int:
    """The EXIF orientation of a picture file, 1 (upright as it is stored) to 8, from its header.

    Raises:
        InputError: as ``read_image``, as far as the header goes.
    """
    file, name = _file_of(source)
    with _named(name), opened(file) as image:
        found = image.getexif().get(ORIENTATION, 1)
        return found if found in range(1, 9) else 1  # others mean nothing, and Pillow does not turn


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels [H, W, ...] turned as an EXIF orientation says, as ``read_image`` turns pictures."""
    if orientation >= 5:  # stored lying on its side
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return pixels[rows, columns]


def _file_of(source: Any) -> tuple[Any, str]:
    """(what Pillow opens, its name in messages)."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source), f"image of {len(source)} bytes"
    if isinstance(source, (str, Path)):
        if (found := no_file(source)) is not None:
            raise InputError(f"image {str(source)!r} {found}; expected a picture file ({', '.join(FORMATS)})")
        return source, str(source)
    raise InputError(f"image is a {type(source).__name__}; expected a path, bytes, PIL image, array or tensor")


@contextlib.contextmanager
def opened(file: Any, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """``Image.open`` of some formats without Pillow's own limit of pixels: the caller's is the one that holds."""
    with _OPENING:  # the limit is a global; only a header is read meanwhile
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        yield image


def picture_size(header: bytes) -> int:
    """Pixels of a picture by its first bytes; 0 where they do not tell."""
    with contextlib.suppress(Exception), opened(io.BytesIO(header)) as image:
        return image.width * image.height
    return 0


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever Pillow raises over a damaged picture, as an error that names it."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"cannot decode {name}: it is none of {', '.join(FORMATS)}, or its header is damaged") from error
    except Exception as error:  # decoders of damaged pictures raise about anything
        raise InputError(f"cannot decode {name}: {error or type(error).__name__}; expected a complete picture") from error


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width}x{height}; expected at least one pixel")
    if width * height > max_pixels:
        raise InputError(f"{name} is {width}x{height} = {width * height} pixels; the limit is {max_pixels}: it is too large. "
                         "Resize it, or set max_pixels (--max-pixels where pictures are segmented)")
    kind = image.format
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion would clip at 0 and 255
        return Image.fromarray(_to_bytes(np.asarray(image), image.mode, kind, name)).convert("RGB")
    if image.mode == "LAB":
        raise InputError(f"{name} is in CIELAB colours (mode LAB), which are not converted; expected RGB or grey")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, mode: str, kind: str | None, name: str) -> np.ndarray:
    """Values of a grey picture of more than 8 bits in 0..255."""
    low, high = float(values.min()), float(values.max())
    if mode == "F":
        if not 0 <= low <= high <= 1:  # NaN is neither
            raise InputError(f"{name} holds floats (mode F) from {low:g} to {high:g}; expected 0..1, or 8 or 16 bits")
        return (values.astype(np.float64) * 255).round().astype(np.uint8)
    if mode == "I" and kind != "PPM":  # Pillow scales those to 16 bits
        raise InputError(f"{name} holds 32-bit integers (mode I) from {low:g} to {high:g}, whose white is not known; expected 8 or 16 "
                         "bits, scaled to 0..255 or 0..65535")
    return (values.astype(np.float32) / 257.0).clip(0, 255).astype(np.uint8)


def _tensor_to_array(x: torch.Tensor) -> np.ndarray:
    check_dense("image", x, "a tensor [3, H, W]")
    if x.dim() != 3 or x.shape[0] != 3:
        raise InputError(f"image has shape {list(x.shape)}; expected [3, H, W]")
    if x.dtype in FLOATS:
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
