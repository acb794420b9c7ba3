"""Reading pictures: every kind that people have, and every kind of damage."""

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg.data.images import FORMATS, orientation, read_image
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
    (b"8BPS" + bytes(40), "it is none of JPEG, PNG, WEBP, BMP, DIB, GIF, TIFF"),
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


@pytest.mark.parametrize("form", [pytest.param(form, marks=pytest.mark.bad_input("pictures", f"cut off: {form}")) for form in FORMATS])
def test_truncated_anywhere(form):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)), form)
    for share in (0.05, 0.3, 0.6, 0.9, 0.99):
        with pytest.raises(InputError, match="cannot decode"):
            read_image(whole[: int(share * len(whole))])


def test_limit_on_pixels():
    with pytest.raises(InputError, match=r"is 30x20 = 600 pixels; the limit is 500"):
        read_image(encoded(Image.new("RGB", (30, 20))), max_pixels=500)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form):
    """Lossless ones to the last bit, the others nearly; what is in front counts, not the name."""
    array = np.asarray(Image.new("RGB", (50, 40), (200, 30, 90))).copy()
    array[10:30, 10:40] = (10, 120, 250)
    read = np.asarray(read_image(encoded(Image.fromarray(array), form)))
    assert read.shape == array.shape and np.abs(read.astype(int) - array)[::8, ::8].mean() < 8
    assert orientation(encoded(Image.fromarray(array), form)) == 1


def test_the_first_of_several_pictures_is_read():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    for form in ("GIF", "TIFF", "WEBP", "PNG", "AVIF", "MPO"):
        read = read_image(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
        assert read.size == (8, 8) and read.getpixel((4, 4))[0] > 200 and read.getpixel((4, 4))[2] < 60, form


@pytest.mark.parametrize("low,high", [(0.0, 1.0), (0.25, 0.5)])
def test_float_pictures_are_read_as_float_tensors_are(low, high):
    values = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
    for source in (Image.fromarray(values), encoded(Image.fromarray(values), "TIFF")):
        read = np.asarray(read_image(source))
        assert np.array_equal(read[..., 0], (values.astype(np.float64) * 255).round().astype(np.uint8))
        assert np.array_equal(read, np.asarray(read_image(torch.from_numpy(values).expand(3, 8, 8))))


def test_grey_maps_of_16_bits_are_scaled():
    """Pillow opens them in mode I, scaled to 16 bits."""
    for most in (65535, 1023):
        values = np.linspace(0, most, 64, dtype=np.uint16).reshape(8, 8)
        data = b"P5 8 8 %d\n" % most + values.astype(">u2").tobytes()
        read = np.asarray(read_image(data))[..., 0].astype(int)
        assert read[0, 0] == 0 and read[-1, -1] == 255 and np.abs(read - values * (255 / most)).max() <= 1


def bad(what):
    return pytest.mark.bad_input("pictures", what)


def filled(value, dtype):
    return Image.fromarray(np.full((4, 4), value, dtype))


@pytest.mark.parametrize("image,message", [
    pytest.param(filled(255, np.float32), r"floats \(mode F\) from 255 to 255; expected 0\.\.1", marks=bad("mode F in 0..255")),
    pytest.param(filled(-0.5, np.float32), "floats .* from -0.5", marks=bad("mode F below 0")),
    pytest.param(filled(np.nan, np.float32), "floats .* from nan", marks=bad("mode F with NaN")),
    pytest.param(filled(np.inf, np.float32), "floats .* to inf", marks=bad("mode F with infinity")),
    pytest.param(filled(255, np.int32), r"32-bit integers \(mode I\) from 255 to 255, whose white", marks=bad("mode I in 0..255")),
    pytest.param(filled(65535, np.int32), "32-bit integers", marks=bad("mode I in 0..65535")),
    pytest.param(Image.new("LAB", (4, 4)), r"CIELAB colours \(mode LAB\)", marks=bad("CIELAB")),
])
def test_grey_values_without_a_scale_are_refused(tmp_path, image, message):
    for source in (image, encoded(image, "TIFF")):
        with pytest.raises(InputError, match=message):
            read_image(source)
    image.save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif .*{message}"):
        read_image(tmp_path / "a.tif")


@bad("a PIL image whose file is cut off")
def test_a_pil_image_that_is_cut_off(tmp_path):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)))
    with pytest.raises(InputError, match="cannot decode image"):
        read_image(Image.open(io.BytesIO(whole[: len(whole) // 2])))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [pytest.param(form, marks=bad(f"bytes changed at random: {form}"))
                                  for form in FORMATS])
def test_damaged_anywhere_is_a_picture_or_an_error_that_names_it(form):
    rng = np.random.default_rng(0)
    whole = encoded(Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)), form)
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, rng.choice([60, len(whole)]), rng.integers(1, 8)):
            data[at] = rng.integers(256)
        try:
            assert read_image(bytes(data)).mode == "RGB"
        except InputError as error:
            assert "image of" in str(error)


@pytest.mark.parametrize("what", [pytest.param(what, marks=bad(f"as a picture: {what}")) for what in (
    "a folder", "a FIFO", "a device", "a link to nothing", "a link that leads back to itself")])
def test_what_is_no_file(tmp_path, what):
    path = tmp_path / "x.png"
    if what == "a folder":
        path.mkdir()
    elif what == "a FIFO":
        os.mkfifo(path)
    elif what.startswith("a link"):
        path.symlink_to("gone" if what == "a link to nothing" else "x.png")
    path = "/dev/zero" if what == "a device" else path
    with pytest.raises(InputError, match=f"image .* is {what}; expected a picture file"):
        read_image(path)


@pytest.mark.parametrize("name,message", [
    pytest.param("x" * 300 + ".png", "File name too long", marks=bad("a name of 300 letters")),
    pytest.param("a\0.png", "holds a NUL character", marks=bad("a name with a NUL character")),
])
def test_names_that_no_file_can_have(name, message):
    with pytest.raises(InputError, match=message):
        read_image(name)
