"""Pictures from anywhere to RGB, with hostile input in mind.

Their size is known before they are decoded, formats are listed, there are no half pictures. Where a
picture can be seen through, white lies behind it; read, trained on and evaluated alike.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..dense import FLOATS, check_dense
from ..errors import InputError
from ..paths import no_file
from .file_types import HEIF_SUFFIXES, by_content, is_heif, reads_heif, register_heif, suffixes

# What photographs come in, each known by its first bytes; security fixes of Pillow are mostly in
# the rarer ones. GIF, TIFF, WebP and AVIF may hold several pictures: the first is read.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM", "QOI")
SUFFIXES = suffixes(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .bmp .dib .gif .tif .tiff .jp2 .j2k .j2c .jpc "
    ".jpx .avif .ppm .pgm .pbm .pnm .pfm .qoi"
) + (HEIF_SUFFIXES if reads_heif() else ())
ORIENTATION = 0x0112  # the EXIF tag
MAX_PIXELS = 64_000_000
TOO_LARGE = "Resize it, or set max_pixels (--max-pixels of a command, data.max_pixels in a recipe)"
_OPENING = threading.Lock()
_HEAD = 512  # bytes that tell what a file is
_PNG = b"\x89PNG\r\n\x1a\n"
_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # of PNG: texts and colour profile
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow makes 0..255 of such values, but not of the one that is transparent.
_LOW_BITS = {"L;2": 85, "L;4": 17}
_Used = TypeVar("_Used")


def read_image(source: Any, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an RGB picture, upright by its EXIF orientation, on white where it is transparent.

    Of several in one file it is the first.

    16 bits a channel are scaled to 8. Floats (a picture of mode F, a tensor) are values in 0..1;
    32-bit integers (mode I) are refused, for nothing says what their white is. Texts and a colour
    profile that Pillow finds too large are not needed and left out.

    Args:
        source: path, bytes, PIL image, uint8 array [H, W, 3], [H, W, 4] (RGBA) or [H, W], tensor
            [3, H, W] (uint8, or float in 0..1).
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        InputError: if it cannot be read, is truncated, too large, empty, or of another kind; the
            message names it.
    """
    if isinstance(source, torch.Tensor):
        return _from_array(_tensor_to_array(source), max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        with _named("image"):
            return _to_rgb(source, "image", max_pixels)
    file, name = _file_of(source)
    with _named(name, file):
        return use_picture(file, lambda image: _to_rgb(image, name, max_pixels))


def orientation(source: str | Path | bytes) -> int:
    """Return the EXIF orientation of a picture file, 1 (as it is stored) to 8, from its header.

    Raises:
        InputError: as ``read_image``, as far as the header goes.
    """
    file, name = _file_of(source)
    with _named(name, file):
        return use_picture(file, orientation_of)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an open picture.

    It is 1 where it has none, or EXIF that cannot be read: the pixels are not to suffer for it.
    """
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF raises about anything
        return 1
    return found if found in range(1, 9) else 1  # others mean nothing, and nobody turns by them


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels [H, W, ...] as an EXIF orientation says and ``read_image`` does."""
    if orientation >= 5:  # stored lying on its side
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return pixels[rows, columns]


def _file_of(source: Any) -> tuple[Any, str]:
    """Return what Pillow opens, and its name in messages."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source), f"image of {len(source)} bytes"
    if isinstance(source, (str, Path)):
        if (found := no_file(source)) is not None:
            raise InputError(
                f"image {str(source)!r} {found}; expected a picture file ({', '.join(FORMATS)})"
            )
        return source, str(source)
    raise InputError(
        f"image is a {type(source).__name__}; expected a path, bytes, PIL image, array or tensor"
    )


@contextlib.contextmanager
def opened(file: Any, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """Open a picture of some formats without Pillow's limit of pixels: the caller's holds."""
    with _OPENING:  # the limit is a global; only a header is read meanwhile
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            image = Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        yield image


def use_picture(
    file: Any, use: Callable[[Image.Image], _Used], formats: Sequence[str] = FORMATS
) -> _Used:
    """Return what ``use`` makes of an open picture.

    It is called once more where metadata alone were in the way, or where Pillow is still to be told
    of a library.
    """
    try:
        with opened(file, formats) as image:
            return use(image)
    except InputError:
        raise
    except UnidentifiedImageError:
        if formats is not FORMATS or not is_heif(_head(file)) or not reads_heif():
            raise
        register_heif()
        with opened(file, ("HEIF",)) as image:
            return use(image)
    except ValueError:
        if _head(file)[:8] != _PNG:
            raise
    with opened(_without_large_metadata(file), formats) as image:
        return use(image)


def _head(file: Any) -> bytes:
    """Return the first bytes of a path or an open file."""
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:_HEAD]
    try:
        with open(file, "rb") as stream:
            return stream.read(_HEAD)
    except OSError:
        return b""


def _without_large_metadata(file: Any) -> io.BytesIO:
    """Return a PNG without those texts and profiles that Pillow refuses for their size.

    Its bound, which is there for the sake of memory, stays: each is unpacked up to it and no
    further. What else is wrong with the file stays wrong.
    """
    kept = io.BytesIO()
    kept.write(_PNG)
    given = isinstance(file, io.BytesIO)
    with io.BytesIO(file.getvalue()) if given else open(file, "rb") as source:
        source.seek(len(_PNG))
        chunks = PngImagePlugin.PngStream(source)
        kind = b""
        while kind != b"IEND" and len(head := source.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            start = source.tell()
            try:
                if kind in _METADATA:
                    chunks.call(kind, start, size)
            except (ValueError, SyntaxError, OSError):
                source.seek(start + size + 4)
            else:
                source.seek(start)
                kept.write(head + source.read(size + 4))  # and its checksum
    kept.seek(0)
    return kept


def picture_size(header: bytes) -> int:
    """Return the pixels of a picture by its first bytes; 0 where they do not tell."""
    # Of PNG Pillow would read metadata first, which may be longer than these bytes.
    if header[:8] == _PNG and len(header) >= 24:
        width, height = struct.unpack(">II", header[16:24])
        return width * height
    with contextlib.suppress(Exception), opened(io.BytesIO(header)) as image:
        return image.width * image.height
    return 0


@contextlib.contextmanager
def _named(name: str, file: Any = None) -> Iterator[None]:
    """Turn whatever Pillow raises over a damaged picture into an error that names it."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        head = b"" if file is None else _head(file)
        what = "empty; expected a picture" if file is not None and not head else by_content(head)
        told = f", but {what}" if what else ", or its header is damaged"
        raise InputError(
            f"cannot decode {name}: it is none of {', '.join(FORMATS)}{told}"
        ) from error
    except ImportError as error:
        raise InputError(
            f"cannot decode {name}: a library that it needs does not import: {error}"
        ) from error
    except Exception as error:  # decoders of damaged pictures raise about anything
        raise InputError(
            f"cannot decode {name}: {error or type(error).__name__}; expected a complete picture"
        ) from error


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width}x{height}; expected at least one pixel")
    if width * height > max_pixels:
        raise InputError(
            f"{name} is {width}x{height} = {width * height} pixels; the limit is {max_pixels}: it "
            f"is too large. {TOO_LARGE}"
        )
    kind = image.format
    packing = _packing(image)
    _load(image)  # before its orientation is asked for: Pillow turns TIFF by itself
    if (turn := _TURNS.get(orientation_of(image))) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip at 0 and 255
        values = np.asarray(image)
        grey = Image.fromarray(_to_bytes(values, image.mode, kind, name))
        return _on_white(grey, _is_key(values, image.info.get("transparency"), packing))
    if image.mode == "LAB":
        raise InputError(
            f"{name} is in CIELAB colours (mode LAB), which are not converted; expected RGB or grey"
        )
    if image.mode in ("1", "L", "RGB") and "transparency" in image.info:
        clear = _is_key(np.asarray(image), image.info["transparency"], packing)
        image = image.copy()
        del image.info["transparency"]  # Pillow would convert it too
        return _on_white(image, clear)
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("LA" if image.mode == "La" else "RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(seen.convert("RGBA"), mask=seen.getchannel("A"))
    return white


def _load(image: Image.Image) -> None:
    """Decode the pixels; metadata behind them that are too large make them no less complete."""
    try:
        image.load()
    except ValueError:
        tiles = getattr(image, "tile", None)  # which is emptied by the last row
        if image.format != "PNG" or tiles:
            raise


def _packing(image: Image.Image) -> str:
    """Say how a picture that is not loaded yet lies in its file, in Pillow's words: "RGB;16B"."""
    tiles = getattr(image, "tile", None)
    found = tiles[0][3] if tiles else ""
    if not isinstance(found, str):
        found = str(found[0]) if found else ""
    return found


def _is_key(values: np.ndarray, key: Any, packing: str) -> np.ndarray | None:
    """Return where a picture [H, W] or [H, W, 3] has the one value that stands for nothing.

    As PNG and GIF have it; None: there is none.
    """
    if values.ndim == 2 and isinstance(key, int):
        return values == (bool(key) if values.dtype == bool else key * _LOW_BITS.get(packing, 1))
    if values.ndim == 3 and isinstance(key, tuple) and len(key) == values.shape[2]:
        # Of 16 bits Pillow keeps the upper half.
        bits = 8 if "16" in packing or max(key) > 255 else 0
        return (values == np.array([value >> bits for value in key])).all(-1)
    return None


def _on_white(image: Image.Image, clear: np.ndarray | None) -> Image.Image:
    """Return the picture in RGB, white where ``clear``."""
    rgb = image.convert("RGB")
    if clear is not None:
        rgb.paste("white", mask=Image.fromarray(clear))
    return rgb


def _to_bytes(values: np.ndarray, mode: str, kind: str | None, name: str) -> np.ndarray:
    """Scale the values of a grey picture of more than 8 bits to 0..255."""
    low = float(values.min())
    high = float(values.max())
    if mode == "F":
        if not 0 <= low <= high <= 1:  # NaN is neither
            raise InputError(
                f"{name} holds floats (mode F) from {low:g} to {high:g}; expected 0..1, or 8 or "
                "16 bits"
            )
        return (values.astype(np.float64) * 255).round().astype(np.uint8)
    if mode == "I" and kind != "PPM":  # Pillow scales those to 16 bits
        raise InputError(
            f"{name} holds 32-bit integers (mode I) from {low:g} to {high:g}, whose white is not "
            "known; expected 8 or 16 bits, scaled to 0..255 or 0..65535"
        )
    return (values.astype(np.float32) / 257.0).clip(0, 255).astype(np.uint8)


def _tensor_to_array(x: torch.Tensor) -> np.ndarray:
    check_dense("image", x, "a tensor [3, H, W]")
    if x.dim() != 3 or x.shape[0] != 3:
        raise InputError(f"image has shape {list(x.shape)}; expected [3, H, W]")
    if x.dtype in FLOATS:
        if not bool(x.isfinite().all()):
            raise InputError("image holds NaN or infinity; expected values in 0..1")
        low = float(x.min())
        high = float(x.max())
        if low < 0 or high > 1:
            raise InputError(
                f"image holds values from {low:g} to {high:g}; expected 0..1 (not normalised)"
            )
        x = (x * 255).round()
    elif x.dtype != torch.uint8:
        raise InputError(f"image has dtype {x.dtype}; expected uint8 or floats in 0..1")
    return x.to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _from_array(x: np.ndarray, max_pixels: int) -> Image.Image:
    if x.dtype != np.uint8:
        raise InputError(f"image has dtype {x.dtype}; expected uint8")
    if not (x.ndim == 2 or (x.ndim == 3 and x.shape[2] in (3, 4))) or x.size == 0:
        raise InputError(
            f"image has shape {list(x.shape)}; expected [H, W, 3], [H, W, 4] (RGBA) or [H, W] "
            "with at least one pixel"
        )
    return _to_rgb(Image.fromarray(np.ascontiguousarray(x)), "image", max_pixels)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB picture to float [3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
