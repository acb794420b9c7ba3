"""Files that people give as pictures and that are none which are read: named for what they are,
with what to do.
"""

import numpy as np
import pytest
from PIL import Image, ImageFile

from ovseg.cli.main import main
from ovseg.data import file_types as foreign_files
from ovseg.data import images
from ovseg.data.folders import look
from ovseg.data.images import read_image
from ovseg.errors import InputError
from ovseg.inference.sources import find_pictures

HEIC = b"\0\0\0\x18ftypheic" + bytes(40)
pytestmark = pytest.mark.third_trial(10)


@pytest.mark.parametrize(
    "data,message",
    [
        (HEIC, "a HEIC picture.* pip install pillow-heif"),
        (b"\0\0\0\x18ftypmif1" + bytes(40), "a HEIC picture"),
        (
            b"\0\0\0\x18ftypisom" + bytes(40),
            "a video; expected pictures, such as its frames: ffmpeg",
        ),
        (b"\0\0\0\x14ftypqt  " + bytes(40), "a video"),
        (b"RIFF\0\0\0\0AVI LIST", "a video"),
        (b"\x1aE\xdf\xa3" + bytes(40), "a video"),
        (b"%PDF-1.7\n", "a document; expected its pages as pictures: pdftoppm"),
        (
            b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
            "a drawing of lines; .* rsvg-convert",
        ),
        (
            b"<!DOCTYPE html><title>404</title>",
            "text of the web .* as a download that failed leaves it",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "a pointer of Git LFS .* git lfs pull",
        ),
        (b"\0\0\0\x18ftypcrx " + bytes(40), "the raw file of a camera"),
        (b"", "but empty; expected a picture"),
        (b"whatever", "or its header is damaged"),
    ],
)
def test_what_a_file_is_by_its_first_bytes(tmp_path, data, message, monkeypatch):
    """Also where its name says that it is a JPEG."""
    monkeypatch.setattr(images, "reads_heif", lambda: False)
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (tmp_path / "a.jpg", data):
        with pytest.raises(InputError, match=f"cannot decode .* is none of JPEG, .*{message}"):
            read_image(source)


@pytest.mark.parametrize(
    "name,message",
    [
        ("clip.mp4", "clip.mp4' is a video; expected pictures, such as its frames: ffmpeg"),
        ("CLIP.MOV", "CLIP.MOV' is a video"),
        ("a.nef", "a.nef' is the raw file of a camera"),
        ("a.svg", "a.svg' is a drawing of lines"),
        ("a.pdf", "a.pdf' is a document"),
    ],
)
def test_what_a_file_is_by_its_name(tmp_path, name, message, capsys):
    (tmp_path / name).write_bytes(b"x")
    assert (
        main(
            [
                "segment",
                str(tmp_path / name),
                "--labels",
                "cat",
                "-m",
                "pacl_tiny",
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_in_folders_they_are_counted_and_named(tmp_path, capsys):
    for name in ("a.mp4", "b.mov", "c.nef", "d.svg"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        InputError,
        match=r"holds no picture but .*1 \.mp4.*\.mp4 is a video; expected pictures, such as its frames",
    ):
        find_pictures([str(tmp_path)])
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    sources, problems = find_pictures([str(tmp_path)])
    told = capsys.readouterr().err
    assert (
        len(sources) == 1
        and "2 files are no pictures and are left out: 1 .mp4, 1 .mov" in told
        and ".mp4 is a video" in told
    )
    assert [message.split("it is ")[1].split(";")[0] for message in problems] == [
        "the raw file of a camera",
        "a drawing of lines",
    ]


def test_heic_is_read_where_pillow_heif_is(tmp_path, monkeypatch):
    class Plugin(ImageFile.ImageFile):
        """A stand-in for what pillow-heif registers, as far as Pillow sees it."""

        format = "HEIF"

        def _open(self):
            self._size, self._mode = (1, 1), "RGB"
            self.tile = [ImageFile._Tile("raw", (0, 0, 1, 1), 12, "RGB")]

    def register():
        Image.register_open("HEIF", Plugin, lambda head: head[4:12] == b"ftypheic")

    monkeypatch.setattr(images, "reads_heif", lambda: True)
    monkeypatch.setattr(images, "register_heif", register)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    (tmp_path / "IMG_1.jpg").write_bytes(HEIC)
    assert (
        np.asarray(read_image(tmp_path / "IMG_1.jpg")).shape
        == np.asarray(read_image(HEIC)).shape
        == (1, 1, 3)
    )

    def broken():
        raise ImportError("libheif.so.1: cannot open shared object file")

    monkeypatch.setattr(images, "register_heif", broken)
    with pytest.raises(InputError, match="a library that it needs does not import: libheif"):
        read_image(HEIC)


def test_suffixes_follow_what_is_installed(tmp_path):
    assert (".heic" in images.SUFFIXES) == foreign_files.reads_heif()
    (tmp_path / "a.heic").write_bytes(HEIC)
    assert bool(look(tmp_path).pictures) == foreign_files.reads_heif()
