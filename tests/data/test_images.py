"""Reading pictures: every kind that people have, and every kind of damage."""

import io
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

from ovseg.data.images import FORMATS, orientation, picture_size, read_image
from ovseg.data.mask_files import read_mask
from ovseg.errors import DataError, InputError
from ovseg.inference.segmentation import overlay, strip


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
    assert (
        read_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))[0]
        > 200
    )


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    read = np.asarray(read_image(encoded(Image.fromarray(values))))[..., 0]
    assert (
        abs(int(read[0, 0])) <= 1
        and abs(int(read[-1, -1]) - 255) <= 1
        and len(np.unique(read)) > 50
    )


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert read_image(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).size == (10, 20)


def test_arrays_and_tensors():
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    image = read_image(array)
    assert np.array_equal(np.asarray(image), array)
    assert np.array_equal(np.asarray(read_image(torch.from_numpy(array).permute(2, 0, 1))), array)
    assert np.array_equal(
        np.asarray(read_image(torch.from_numpy(array).permute(2, 0, 1) / 255)), array
    )
    assert read_image(image).size == (4, 4) and read_image(array[..., 0]).mode == "RGB"


def png_header(width, height):
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\x00\x00\x00\x00IDAT"
    )


@pytest.mark.parametrize(
    "source,message",
    [
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
    ],
)
def test_bad_sources(source, message):
    began = time.time()
    with pytest.raises(InputError, match=message):
        read_image(source)
    assert time.time() - began < 2


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=pytest.mark.bad_input("pictures", f"cut off: {form}"))
        for form in FORMATS
    ],
)
def test_truncated_anywhere(form):
    whole = encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)), form
    )
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
        assert (
            read.size == (8, 8) and read.getpixel((4, 4))[0] > 200 and read.getpixel((4, 4))[2] < 60
        ), form


@pytest.mark.parametrize("low,high", [(0.0, 1.0), (0.25, 0.5)])
def test_float_pictures_are_read_as_float_tensors_are(low, high):
    values = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
    for source in (Image.fromarray(values), encoded(Image.fromarray(values), "TIFF")):
        read = np.asarray(read_image(source))
        assert np.array_equal(
            read[..., 0], (values.astype(np.float64) * 255).round().astype(np.uint8)
        )
        assert np.array_equal(
            read, np.asarray(read_image(torch.from_numpy(values).expand(3, 8, 8)))
        )


def test_grey_maps_of_16_bits_are_scaled():
    """Pillow opens them in mode I, scaled to 16 bits."""
    for most in (65535, 1023):
        values = np.linspace(0, most, 64, dtype=np.uint16).reshape(8, 8)
        data = b"P5 8 8 %d\n" % most + values.astype(">u2").tobytes()
        read = np.asarray(read_image(data))[..., 0].astype(int)
        assert (
            read[0, 0] == 0
            and read[-1, -1] == 255
            and np.abs(read - values * (255 / most)).max() <= 1
        )


def bad(what):
    return pytest.mark.bad_input("pictures", what)


def filled(value, dtype):
    return Image.fromarray(np.full((4, 4), value, dtype))


@pytest.mark.parametrize(
    "image,message",
    [
        pytest.param(
            filled(255, np.float32),
            r"floats \(mode F\) from 255 to 255; expected 0\.\.1",
            marks=bad("mode F in 0..255"),
        ),
        pytest.param(filled(-0.5, np.float32), "floats .* from -0.5", marks=bad("mode F below 0")),
        pytest.param(
            filled(np.nan, np.float32), "floats .* from nan", marks=bad("mode F with NaN")
        ),
        pytest.param(
            filled(np.inf, np.float32), "floats .* to inf", marks=bad("mode F with infinity")
        ),
        pytest.param(
            filled(255, np.int32),
            r"32-bit integers \(mode I\) from 255 to 255, whose white",
            marks=bad("mode I in 0..255"),
        ),
        pytest.param(filled(65535, np.int32), "32-bit integers", marks=bad("mode I in 0..65535")),
        pytest.param(Image.new("LAB", (4, 4)), r"CIELAB colours \(mode LAB\)", marks=bad("CIELAB")),
    ],
)
def test_grey_values_without_a_scale_are_refused(tmp_path, image, message):
    for source in (image, encoded(image, "TIFF")):
        with pytest.raises(InputError, match=message):
            read_image(source)
    image.save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif .*{message}"):
        read_image(tmp_path / "a.tif")


@bad("a PIL image whose file is cut off")
def test_a_pil_image_that_is_cut_off(tmp_path):
    whole = encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    )
    with pytest.raises(InputError, match="cannot decode image"):
        read_image(Image.open(io.BytesIO(whole[: len(whole) // 2])))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=bad(f"bytes changed at random: {form}")) for form in FORMATS]
)
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


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=bad(f"as a picture: {what}"))
        for what in (
            "a folder",
            "a FIFO",
            "a device",
            "a link to nothing",
            "a link that leads back to itself",
        )
    ],
)
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


@pytest.mark.parametrize(
    "name,message",
    [
        pytest.param("x" * 300 + ".png", "File name too long", marks=bad("a name of 300 letters")),
        pytest.param("a\0.png", "holds a NUL character", marks=bad("a name with a NUL character")),
    ],
)
def test_names_that_no_file_can_have(name, message):
    with pytest.raises(InputError, match=message):
        read_image(name)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, depth, colours, row, *between):
    """A picture of one row in PNG's own terms, ``between`` its header and its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colours, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(between)
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def shorts(*values):
    return struct.pack(f">{len(values)}H", *values)


MIB = 1 << 20
PACKED = zlib.compress(bytes(2 * MIB))
LARGE = {
    "a packed text": (b"zTXt", b"k\0\0" + PACKED),
    "a packed text in UTF-8": (b"iTXt", b"k\0\1\0\0\0" + PACKED),
    "a colour profile": (b"iCCP", b"k\0\0" + PACKED),
    "a text": (b"tEXt", b"k\0" + b"a" * 2 * MIB),
}
NOISE = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)


def with_chunk(whole, new, *, behind):
    """``new`` before the pixels, or behind them."""
    at = whole.rindex(struct.pack(">I", 0) + b"IEND") if behind else 33
    return whole[:at] + new + whole[at:]


@pytest.mark.third_trial(10)
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("what", LARGE)
def test_metadata_beyond_pillows_bound_leave_a_png_intact(tmp_path, what, behind, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", MIB)  # of 64, which take seconds
    data = with_chunk(encoded(Image.fromarray(NOISE)), chunk(*LARGE[what]), behind=behind)
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        assert np.array_equal(np.asarray(read_image(source)), NOISE) and orientation(source) == 1
    assert picture_size(data[:100]) == 600
    with pytest.raises(InputError, match="cannot decode"):
        read_image(data[: data.index(b"IDAT") + 40])  # cut off all the same
    assert not ImageFile.LOAD_TRUNCATED_IMAGES and PngImagePlugin.MAX_TEXT_CHUNK == MIB


@pytest.mark.third_trial(10)
def test_other_metadata_of_such_a_png_still_count(tmp_path):
    turned = encoded(
        Image.fromarray(NOISE),
        exif=bytes.fromhex("4578696600004d4d002a000000080001011200030000000100060000") + bytes(4),
    )
    large = with_chunk(turned, chunk(*LARGE["a colour profile"]), behind=False)
    assert read_image(turned).size == read_image(large).size == (20, 30) and orientation(large) == 6
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    (tmp_path / "m.png").write_bytes(
        with_chunk(encoded(Image.fromarray(mask)), chunk(*LARGE["a packed text"]), behind=True)
    )
    assert np.array_equal(read_mask(tmp_path / "m.png"), mask)
    (tmp_path / "m.png").write_bytes(
        with_chunk(encoded(Image.fromarray(NOISE)), chunk(*LARGE["a packed text"]), behind=False)
    )
    with pytest.raises(DataError, match="is a RGB picture"):
        read_mask(tmp_path / "m.png")


@pytest.mark.third_trial(10)
def test_a_bomb_in_metadata_is_unpacked_to_the_bound_alone(monkeypatch):
    data = with_chunk(
        encoded(Image.fromarray(NOISE)),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(64 * MIB), 1)),
        behind=False,
    )
    asked = []
    unpack = PngImagePlugin._safe_zlib_decompress
    monkeypatch.setattr(
        PngImagePlugin,
        "_safe_zlib_decompress",
        lambda packed: asked.append(len(packed)) or unpack(packed),
    )
    tracemalloc.start()
    try:
        assert (
            read_image(data).size == (30, 20) and len(asked) == 2
        )  # by Pillow, and to see which chunk it was
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.third_trial(10)
def test_a_pil_image_with_such_metadata_behind_its_pixels():
    data = with_chunk(encoded(Image.fromarray(NOISE)), chunk(*LARGE["a packed text"]), behind=True)
    assert np.array_equal(np.asarray(read_image(Image.open(io.BytesIO(data)))), NOISE)


@pytest.mark.third_trial(10)
@pytest.mark.parametrize(
    "form,options",
    [
        ("JPEG", {"icc_profile": bytes(2 * MIB)}),
        ("WEBP", {"icc_profile": bytes(2 * MIB), "xmp": bytes(2 * MIB)}),
        ("TIFF", {"icc_profile": bytes(2 * MIB)}),
        ("AVIF", {"icc_profile": bytes(2 * MIB)}),
        ("GIF", {"comment": b"a" * 2 * MIB}),
    ],
)
def test_large_metadata_of_other_formats(form, options):
    assert read_image(encoded(Image.fromarray(NOISE), form, **options)).size == (30, 20)


@pytest.mark.third_trial(10)
def test_damaged_exif_leaves_the_pixels_intact():
    for data in (
        with_chunk(encoded(Image.fromarray(NOISE)), chunk(b"eXIf", b"garbage"), behind=False),
        encoded(Image.fromarray(NOISE), "WEBP", lossless=True, exif=b"Exif\0\0garbage"),
    ):
        assert np.array_equal(np.asarray(read_image(data)), NOISE) and orientation(data) == 1


RED, WHITE, GREY = (200, 0, 0), (255, 255, 255), (16, 16, 16)
HALF = np.array([[[*RED, 0], [*RED, 255], [*RED, 128]]], np.uint8)  # clear, opaque, between
COLOURS = chunk(b"PLTE", bytes([10, 20, 30, *RED]))
TRANSPARENT = {
    "grey, 1 bit": (png(8, 1, 0, b"\x7f", chunk(b"tRNS", shorts(0))), [WHITE, WHITE]),
    "grey, 2 bits": (
        png(4, 2, 0, b"\x1b", chunk(b"tRNS", shorts(1))),
        [(0, 0, 0), WHITE, (170, 170, 170)],
    ),
    "grey, 4 bits": (png(2, 4, 0, b"\x01", chunk(b"tRNS", shorts(0))), [WHITE, (17, 17, 17)]),
    "grey, 8 bits": (png(2, 8, 0, bytes([10, 16]), chunk(b"tRNS", shorts(10))), [WHITE, GREY]),
    "grey, 16 bits": (
        png(2, 16, 0, shorts(0x1010, 0x1011), chunk(b"tRNS", shorts(0x1011))),
        [GREY, WHITE],
    ),
    "RGB, 8 bits": (
        png(2, 8, 2, bytes([1, 2, 3, *RED]), chunk(b"tRNS", shorts(1, 2, 3))),
        [WHITE, RED],
    ),
    "RGB, 16 bits": (
        png(2, 16, 2, shorts(0x1234, 9, 9, 0xC8C8, 0, 0), chunk(b"tRNS", shorts(0x1234, 9, 9))),
        [WHITE, RED],
    ),
    "a palette with one clear colour": (
        png(2, 8, 3, b"\0\1", COLOURS, chunk(b"tRNS", b"\0")),
        [WHITE, RED],
    ),
    "a palette with alpha": (
        png(2, 8, 3, b"\0\1", COLOURS, chunk(b"tRNS", b"\x80\0")),
        [(132, 137, 142), WHITE],
    ),
    "grey and alpha, 16 bits": (png(2, 16, 4, shorts(0x1010, 0, 0x1010, 0xFFFF)), [WHITE, GREY]),
    "RGBA, 16 bits": (png(2, 16, 6, shorts(0xC8C8, 0, 0, 0, 0xC8C8, 0, 0, 0xFFFF)), [WHITE, RED]),
    "GIF": (encoded(Image.fromarray(HALF), "GIF"), [WHITE, RED]),
    **{
        form: (encoded(Image.fromarray(HALF), form, **options), [WHITE, RED, (227, 127, 127)])
        for form, options in {
            "PNG": {},
            "WEBP": {"lossless": True, "exact": True},
            "TIFF": {},
            "JPEG2000": {},
            "QOI": {},
            "AVIF": {"quality": 100},
        }.items()
    },
    "an array": (HALF, [WHITE, RED, (227, 127, 127)]),
    "an image": (Image.fromarray(HALF), [WHITE, RED, (227, 127, 127)]),
    "an image, premultiplied": (
        Image.fromarray(HALF).convert("RGBa"),
        [WHITE, RED, (227, 127, 127)],
    ),
    "an image, grey": (Image.fromarray(HALF).convert("LA"), [WHITE, (60, 60, 60)]),
    "an image, grey, premultiplied": (
        Image.fromarray(HALF).convert("LA").convert("La"),
        [WHITE, (60, 60, 60)],
    ),
}


@pytest.mark.third_trial(10)
@pytest.mark.parametrize("what", TRANSPARENT)
def test_white_lies_behind_what_is_transparent(what):
    """Whatever colours the file hides there."""
    source, expected = TRANSPARENT[what]
    read = np.asarray(read_image(source))[0, : len(expected)].astype(int)
    assert np.abs(read - expected).max() <= (1 if what == "AVIF" else 0)


@pytest.mark.third_trial(10)
def test_pictures_of_results_have_the_same_background():
    labels = np.full((1, 3), -1)
    for shown in (
        overlay(Image.fromarray(HALF), labels, ["cat"], legend=False),
        strip(Image.fromarray(HALF), {}, ["cat"]),
    ):
        colours = {colour for _, colour in shown.getcolors(1 << 20)}
        assert (227, 127, 127) in colours and (100, 0, 0) not in colours


@pytest.mark.third_trial(10)
def test_headers_of_nonsense_about_transparency():
    for mode, value in (("L", b"ab"), ("RGB", 3), ("L", 70000), ("1", (1, 2, 3))):
        image = Image.new(mode, (2, 1))
        image.info["transparency"] = value
        assert np.asarray(read_image(image)).max() == 0 and image.info["transparency"] == value


@pytest.mark.third_trial(10)
def test_four_inks():
    for source in (
        encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"),
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)),
    ):
        assert read_image(source).getpixel((4, 4)) == (255, 0, 0)
