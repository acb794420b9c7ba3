"""Files that are given as pictures and are none for this package to read.

Some are of kinds that are not read: what they are, by name or first bytes, and what to do. Others
are pictures that this package wrote: they are marked inside, so that a search for pictures knows
results of earlier runs from a user's own. What counts is the mark, or the journal of ``ovseg
segment``; the name only says where to look for a mark: few files are opened.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ..text_files import records_of


def suffixes(text: str) -> tuple[str, ...]:
    """Return the suffixes that a text names, with blanks between them."""
    return tuple(text.split())


HEIF_SUFFIXES = (".heic", ".heif", ".hif")
VIDEO_SUFFIXES = suffixes(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .3gp .mts .m2ts .ogv .mxf"
)
RAW_SUFFIXES = suffixes(
    ".raw .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .x3f .3fr .erf "
    ".kdc .mrw .iiq"
)
JOURNAL = "ovseg_segment.jsonl"
SOFTWARE = "ovseg"
_HEIF = (
    "a HEIC picture, which is read where pillow-heif is installed; pip install pillow-heif, or "
    "convert it: heif-convert in.heic out.jpg"
)
_VIDEO = (
    "a video; expected pictures, such as its frames: ffmpeg -i in.mp4 -vf fps=1 frames/%05d.png"
)
_RAW = "the raw file of a camera; expected a developed picture: darktable-cli in.nef out.jpg"
_SVG = "a drawing of lines; expected its pixels: rsvg-convert -w 1024 in.svg -o out.png"
_PDF = "a document; expected its pages as pictures: pdftoppm -png in.pdf page"
_PAGE = (
    "text of the web (HTML or XML), as a download that failed leaves it; expected the picture "
    "itself"
)
_POINTER = "a pointer of Git LFS in place of the file; expected the file: git lfs pull"
_AVIF = "an AVIF picture, and this Pillow is built without AVIF; expected Pillow from PyPI"
_BY_SUFFIX = {
    **dict.fromkeys(HEIF_SUFFIXES, _HEIF),
    **dict.fromkeys(VIDEO_SUFFIXES, _VIDEO),
    **dict.fromkeys(RAW_SUFFIXES, _RAW),
    **dict.fromkeys((".svg", ".svgz"), _SVG),
    **dict.fromkeys((".pdf", ".ps", ".eps"), _PDF),
    **dict.fromkeys((".html", ".htm"), _PAGE),
}
# What stands behind "ftyp"; whatever else does is a video.
_BRANDS = {
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), _HEIF
    ),
    **dict.fromkeys((b"avif", b"avis"), _AVIF),
    b"crx ": _RAW,
}
_BEGINNINGS = {
    b"%PDF": _PDF,
    b"%!PS": _PDF,
    b"\x1aE\xdf\xa3": _VIDEO,  # Matroska
    b"\x00\x00\x01\xba": _VIDEO,  # MPEG
    b"\x00\x00\x01\xb3": _VIDEO,
    b"FLV\x01": _VIDEO,
    b"0&\xb2u\x8ef\xcf\x11": _VIDEO,  # Windows Media
    b"version https://git-lfs": _POINTER,
    b"FUJIFILMCCD-RAW": _RAW,
}
# Names of pictures that are written: by segment; by eval, demo and train; by validation; by data
# check.
_NAMED = re.compile(
    r"\.(overlay|mask|strip)\.png$"
    r"|(^|_)(gallery|sweep|confusion|classes|loss|train|val|test)\.png$"
    r"|^step_\d{8}\.png$"
)
# What tells a folder of results.
_IN_FOLDERS = (".ovseg.lock", JOURNAL, "results.json", "log.jsonl")


def by_suffix(suffix: str) -> str | None:
    """Return what a file that ends so is and what to do, "a video; expected ...".

    None where there is nothing to say.
    """
    return _BY_SUFFIX.get(suffix.lower())


def not_read(suffix: str, formats: str) -> str:
    """Say why pictures that end so are left out of a folder or shard."""
    what = by_suffix(suffix)
    advice = f"it is {what}" if what else f"expected {formats}"
    return f"pictures that end in {suffix} are not read; {advice}"


def by_content(head: bytes) -> str | None:
    """Return what a file is by its first bytes."""
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], _VIDEO)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return _VIDEO
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<?xml", b"<!doctype", b"<html", b"<svg", b"<!--", b"<head", b"<error")):
        return _SVG if b"<svg" in text else _PAGE
    return next((what for start, what in _BEGINNINGS.items() if head.startswith(start)), None)


def is_heif(head: bytes) -> bool:
    """Return whether a file that begins so is a HEIC picture."""
    return by_content(head) == _HEIF


def reads_heif() -> bool:
    """Return whether pillow-heif is installed."""
    return find_spec("pillow_heif") is not None


def register_heif() -> None:
    """Teach Pillow HEIC by pillow-heif.

    Raises:
        ImportError: if it does not import.
    """
    from pillow_heif import register_heif_opener

    register_heif_opener()


def png_mark(path: str | os.PathLike) -> dict[str, Any]:
    """Return options for Pillow's ``save``: a mark in a PNG, nothing in other files."""
    if Path(path).suffix.lower() != ".png":
        return {}
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    return {"pnginfo": info}


class OwnResults:
    """Knows results of earlier runs; remembers the journals that it has read."""

    def __init__(self) -> None:
        self._journals: dict[Path, dict[str, int]] = {}

    def holds(self, path: Path) -> bool:
        """Return whether the file is a result.

        It is named like one, and marked as one or, unchanged since, in the journal of a folder
        above.
        """
        if _NAMED.search(path.name) is None:
            return False
        try:
            with open(path, "rb") as file:
                start = file.read(256)  # Pillow writes the mark right after the header
            size = path.stat().st_size
        except OSError:
            return False
        if start.startswith(b"\x89PNG") and f"tEXtSoftware\0{SOFTWARE}".encode() in start:
            return True
        whole = Path(os.path.abspath(path))
        return any(
            self._written(folder).get(whole.relative_to(folder).as_posix()) == size
            for folder in whole.parents
        )

    def _written(self, folder: Path) -> dict[str, int]:
        """Return the sizes of the files that a folder's journal names, by their paths below it."""
        if folder not in self._journals:
            found: dict[str, int] = {}
            try:
                entries = records_of(folder / JOURNAL)[0]
            except OSError:
                entries = []
            for entry in entries:
                name = entry.get("name")
                files = entry.get("files")
                if isinstance(name, str) and isinstance(files, dict):
                    above = Path(name).parent
                    found |= {(above / file).as_posix(): size for file, size in files.items()}
            self._journals[folder] = found
        return self._journals[folder]


def is_folder_of_results(folder: Path) -> bool:
    """Return whether a run writes or wrote into it."""
    return any((folder / name).exists() for name in _IN_FOLDERS)
