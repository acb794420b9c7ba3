"""Reading pictures: every kind that people have, and every kind of damage."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg.data.images import read_image
from ovseg.errors import InputError


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_modes(mode):
    image = Image.new("RGB", (9, 6), (10, 200, 30)).convert(mode)
    read = read_image(encoded(image))
    assert read.mode == "RGB" and read.size == (9, 6)


def test_cmyk_jpeg():
    assert read_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))[0] > 200


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    read = np.asarray(read_image(encoded(Image.fromarray(values))))[..., 0]
    assert abs(int(read[0, 0])) <= 1 and abs(int(read[-1, -1]) - 255) <= 1 and len(np.unique(read)) > 50


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert read_image(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).size == (10, 20)


def test_arrays_and_tensors():
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    image = read_image(array)
    assert np.array_equal(np.asarray(image), array)
    assert np.array_equal(np.asarray(read_image(torch.from_numpy(array).permute(2, 0, 1))), array)
    assert np.array_equal(np.asarray(read_image(torch.from_numpy(array).permute(2, 0, 1) / 255)), array)
    assert read_image(image).size == (4, 4) and read_image(array[..., 0]).mode == "RGB"


def png_header(width, height):
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\x00\x00\x00\x00IDAT"


@pytest.mark.parametrize("source,message", [
    ("nowhere.png", "image 'nowhere.png' does not exist; expected a picture file"),
    (b"GIF89a" + bytes(40), "it is none of JPEG, PNG, WEBP, BMP"),
    (b"", "image of 0 bytes"),
    (png_header(100_000, 100_000), "too large|the limit is"),
    (3.5, "image is a float; expected a path"),
    (np.zeros((4, 4, 3)), "image has dtype float64; expected uint8"),
    (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
    (np.zeros((4, 4, 2), np.uint8), r"image has shape \[4, 4, 2\]"),
    (torch.full((3, 4, 4), float("nan")), "image holds NaN or infinity"),
    (torch.full((3, 4, 4), 2.0), r"values from 2 to 2; expected 0\.\.1"),
    (torch.zeros(3, 4, 4, dtype=torch.int64), "image has dtype torch.int64"),
    (torch.zeros(4, 4), r"image has shape \[4, 4\]; expected \[3, H, W\]"),
])
def test_bad_sources(source, message):
    began = time.time()
    with pytest.raises(InputError, match=message):
        read_image(source)
    assert time.time() - began < 2


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncated_anywhere(form):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)), form)
    for share in (0.05, 0.3, 0.6, 0.9):
        with pytest.raises(InputError, match="cannot decode"):
            read_image(whole[: int(share * len(whole))])


def test_limit_on_pixels():
    with pytest.raises(InputError, match=r"is 30x20 = 600 pixels; the limit is 500"):
        read_image(encoded(Image.new("RGB", (30, 20))), max_pixels=500)
