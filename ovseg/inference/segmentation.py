"""A label map and the forms it is written in: overlay, index mask, JSON, RLE.

All are made in blocks of rows, without a copy of the whole map. Below ``Segmentation`` stand the
pictures of label maps: colours, overlay with legend, strips of image, truth and prediction, contact
sheets; Pillow only.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.file_types import png_mark
from ..data.images import read_image
from ..errors import InputError
from ..replacing import file_for, replacing

_BLOCK = 1 << 18  # pixels
_INK = (25, 25, 25)
_PAPER = (255, 255, 255)
_NONE = (0, 0, 0)  # where there is no label
_MOST_IN_MASK = 65535  # 16 bits, the last for background
_LEAST_SIDE = 384  # of an overlay, so that its legend can be read

Colour = tuple[int, ...]


@dataclass
class Segmentation:
    """A label map at the size of the picture.

    Attributes:
        image: the picture, RGB.
        names: the labels asked for.
        labels: int16 [H, W], int32 for more than 32768 names; index into ``names``, -1 is
            background.
        scores: float32 [H, W] of the winner, before the background was decided: its cosine, or what
            the activation made of it.
    """

    image: Image.Image
    names: list[str]
    labels: np.ndarray
    scores: np.ndarray

    @property
    def areas(self) -> dict[str, float]:
        """The share of the picture of each label."""
        shares = count_labels(self.labels, len(self.names))[1:] / self.labels.size
        return dict(zip(self.names, shares.tolist(), strict=True))

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        """Return the picture under its label map, with a legend below it."""
        return overlay(self.image, self.labels, self.names, alpha=alpha, legend=legend)

    def save(self, path: str | Path, *, alpha: float = 0.55, legend: bool = True) -> Path:
        """Write the overlay; the format follows the suffix."""
        path = file_for(path, "path")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.overlay(alpha, legend).save(path, **png_mark(path))
        except ValueError as error:
            raise InputError(
                f"cannot save {str(path)!r}: {error}; expected a suffix such as .png"
            ) from error
        return path

    def save_mask(self, path: str | Path) -> Path:
        """Write the indices as PNG.

        They have 8 bits, the overlay's palette and 255 for background; beyond 255 labels 16 bits,
        grey, and 65535.
        """
        path = file_for(path, "path")
        if len(self.names) > _MOST_IN_MASK:
            raise InputError(
                f"a mask holds at most {_MOST_IN_MASK} labels and there are {len(self.names)}; "
                "expected another format"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        wide = len(self.names) > 255
        values = self.labels.astype(np.uint16 if wide else np.uint8)
        for rows in blocks(self.labels.shape):
            values[rows][self.labels[rows] < 0] = _MOST_IN_MASK if wide else 255
        mask = Image.fromarray(values) if wide else Image.fromarray(values, "L")
        if not wide:
            mask.putpalette(np.concatenate([palette(255), np.zeros((1, 3), np.uint8)]).tobytes())
        mask.save(path, **png_mark(path))
        return path

    def to_dict(self) -> dict[str, Any]:
        """Return areas and scores for JSON.

        Of each label its share of the picture, its pixels and the mean score on them (null without
        pixels).
        """
        (none, *pixels), means = self._tally()
        areas = [{"area": round(n / self.labels.size, 6), "pixels": n} for n in (none, *pixels)]
        rows = [
            {"label": name, "index": i, **areas[i + 1], "score": means[i]}
            for i, name in enumerate(self.names)
        ]
        height, width = self.labels.shape
        return {"width": width, "height": height, "labels": rows, "background": areas[0]}

    def to_rle(self) -> list[dict[str, Any]]:
        """Return COCO's uncompressed run-length code of each label that occurs.

        Counts go down the columns, beginning with zeros.
        ``pycocotools.mask.frPyObjects(row["segmentation"], *row["segmentation"]["size"])``
        compresses it.
        """
        return list(self.rle_rows())

    def rle_rows(self) -> Iterator[dict[str, Any]]:
        """Yield what ``to_rle`` returns, one label at a time."""
        _, means = self._tally()
        label, start = _runs(self.labels)
        end = np.append(start[1:], self.labels.size)
        order = np.argsort(label, kind="stable")
        of_label = np.searchsorted(label[order], np.arange(len(self.names) + 1))
        for i, name in enumerate(self.names):
            runs = order[of_label[i] : of_label[i + 1]]
            if not len(runs):
                continue
            edges = np.stack([start[runs], end[runs]], 1).ravel()
            counts = np.diff(edges, prepend=0)
            if edges[-1] < self.labels.size:
                counts = np.append(counts, self.labels.size - edges[-1])
            yield {
                "label": name,
                "index": i,
                "score": means[i],
                "segmentation": {"size": list(self.labels.shape), "counts": counts.tolist()},
            }

    def _tally(self) -> tuple[list[int], list[float | None]]:
        """Return the pixels of the background and of each label, and the mean score of each label.

        The mean is None without pixels.
        """
        pixels = count_labels(self.labels, len(self.names))
        sums = np.zeros(len(self.names) + 1)
        for rows in blocks(self.labels.shape):
            bins = self.labels[rows].ravel().astype(np.int64) + 1
            sums += np.bincount(bins, self.scores[rows].ravel(), len(sums))
        means = [
            round(float(total / count), 6) if count else None
            for total, count in zip(sums[1:], pixels[1:], strict=True)
        ]
        return pixels.tolist(), means


def _runs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (label, first place) of every run down the columns, one column after the other."""
    found: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    last = None
    for columns in blocks(labels.shape[::-1]):
        flat = np.ascontiguousarray(labels[:, columns].T).ravel()
        begins = np.concatenate([[last is None or flat[0] != last], flat[1:] != flat[:-1]])
        first = np.flatnonzero(begins)
        found.append(flat[first])
        starts.append(first + columns.start * len(labels))
        last = flat[-1]
    return np.concatenate(found), np.concatenate(starts)


def palette(count: int) -> np.ndarray:
    """Return distinct colours, uint8 [count, 3]; the first ones do not depend on ``count``."""
    rows = []
    for i in range(count):
        # The golden ratio: neighbours in the list are far apart on the wheel.
        hue = (i * 0.618034 + 0.02) % 1.0
        saturation = (0.85, 0.55, 0.75)[i % 3]
        rows.append(colorsys.hsv_to_rgb(hue, saturation, (0.95, 0.80, 0.60)[i // 3 % 3]))
    return (np.array(rows).reshape(count, 3) * 255).round().astype(np.uint8)


def colour(labels: np.ndarray, count: int) -> np.ndarray:
    """Colour a label map [H, W], uint8 [H, W, 3]; labels below 0 are black."""
    table = np.concatenate([palette(count), np.array([_NONE], np.uint8)])
    return table[np.where(labels < 0, count, labels)]


def blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices of rows of [rows, width], of about a quarter of a million pixels each."""
    step = max(1, _BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def count_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """Count the pixels of the background and of each of ``count`` labels, int64 [1 + count]."""
    found = np.zeros(count + 1, np.int64)
    for rows in blocks(labels.shape):
        found += np.bincount(labels[rows].ravel().astype(np.int64) + 1, minlength=count + 1)
    return found


def overlay(
    image: Image.Image,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    alpha: float = 0.55,
    legend: bool = True,
) -> Image.Image:
    """Return the picture under its label map, and below it the names found, with their areas.

    Small pictures are enlarged by whole factors, so that the legend can be read.

    Args:
        image: the picture.
        labels: [H, W], index into ``names``; -1 is background.
        names: of the labels.
        alpha: how much of the labels is seen.
        legend: whether the names are written.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise InputError(
            f"alpha is {alpha!r}; expected 0, the picture alone, to 1, the labels alone"
        )
    image = _rgb(image)
    factor = max(1, -(-_LEAST_SIDE // max(image.size)))
    width, height = image.width * factor, image.height * factor
    below = legend_strip(_shares(labels, names), width) if legend else None
    picture = Image.new("RGB", (width, height + (below.height if below else 0)), _PAPER)
    for rows in blocks((image.height, image.width * factor**2)):
        above = max(rows.start - 1, 0)  # a row more, to see an edge to it
        large = _enlarged(labels[above : rows.stop], factor)
        edge = np.zeros(large.shape, bool)
        edge[:, 1:] |= large[:, 1:] != large[:, :-1]
        edge[1:] |= large[1:] != large[:-1]
        skipped = (rows.start - above) * factor
        large, edge = large[skipped:], edge[skipped:]
        # Not crop: Pillow's limit of pixels acts there.
        box = (0, rows.start, image.width, rows.stop)
        size = (image.width, rows.stop - rows.start)
        base = _enlarged(np.asarray(image.resize(size, Image.Resampling.NEAREST, box)), factor)
        mixed = (1 - alpha) * base + alpha * colour(large, len(names))
        shown = np.where(large[..., None] < 0, base, mixed)
        shown[edge] = _PAPER
        picture.paste(Image.fromarray(shown.round().astype(np.uint8)), (0, rows.start * factor))
    if below:
        picture.paste(below, (0, height))
    return picture


def _shares(labels: np.ndarray, names: Sequence[str]) -> list[tuple[Colour, str]]:
    """Return the legend of a label map, the largest areas first."""
    colours = palette(len(names))
    none, *shares = (count_labels(labels, len(names)) / labels.size).tolist()
    order = sorted(((share, i) for i, share in enumerate(shares) if share > 0), reverse=True)
    entries: list[tuple[Colour, str]] = [
        (tuple(colours[i]), f"{names[i]} {_percent(share)}") for share, i in order
    ]
    if none > 0:
        entries.append((_NONE, f"background {_percent(none)}"))
    return entries


def strip(
    image: Image.Image, maps: dict[str, np.ndarray], names: Sequence[str], *, side: int = 320
) -> Image.Image:
    """Return the picture and label maps over it in a row, the names that occur below.

    Small pictures are enlarged to ``side``.

    Args:
        image: the picture.
        maps: title -> label map.
        names: of the labels.
        side: in pixels.
    """
    factor = max(1, -(-side // max(image.size)))
    base = np.asarray(_rgb(image))
    panels = {"picture": base} | {
        title: (0.3 * base + 0.7 * colour(labels, len(names))).round().astype(np.uint8)
        for title, labels in maps.items()
    }
    font = ImageFont.load_default(15)
    margin = 8
    top = 26
    width, height = image.width * factor, image.height * factor
    row = Image.new("RGB", (len(panels) * (width + margin) + margin, top + height + margin), _PAPER)
    draw = ImageDraw.Draw(row)
    for i, (title, panel) in enumerate(panels.items()):
        x = margin + i * (width + margin)
        draw.text((x, 5), title, fill=_INK, font=font)
        row.paste(Image.fromarray(_enlarged(panel, factor)), (x, top))
    present = {int(i) for labels in maps.values() for i in np.unique(labels)}
    entries = legend_of(present - {-1}, names)
    if -1 in present:
        entries.append((_NONE, "background"))
    return _stack([row, legend_strip(entries, row.width)])


def _enlarged(x: np.ndarray, factor: int) -> np.ndarray:
    return x.repeat(factor, 0).repeat(factor, 1)


def _rgb(image: Image.Image) -> Image.Image:
    """Return the picture as it was labelled."""
    if image.mode == "RGB":
        return image
    return read_image(image, max_pixels=image.width * image.height)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "<1 %"


def save_result(image: Image.Image, path: Path) -> Path:
    """Write a picture by rename, marked as a result that is no input of later runs."""
    with replacing(path) as part:
        image.save(part, **png_mark(path))
    return path


def legend_of(present: Iterable[int], names: Sequence[str]) -> list[tuple[Colour, str]]:
    """Return the colours and names of the labels that are present."""
    colours = palette(len(names))
    return [(tuple(int(v) for v in colours[i]), names[i]) for i in sorted(present)]


def legend_strip(entries: Sequence[tuple[Colour, str]], width: int) -> Image.Image:
    """Return colour swatches with text, wrapped to ``width``."""
    font = ImageFont.load_default(14)
    line = 22
    pad = 8
    x = pad
    y = 4
    placed = []
    for colour_, text in entries:
        needed = 20 + int(font.getlength(text)) + 14
        if x + needed > width and x > pad:
            x = pad
            y += line
        placed.append((x, y, colour_, text))
        x += needed
    strip = Image.new("RGB", (width, y + line + 2), _PAPER)
    draw = ImageDraw.Draw(strip)
    for x, y, colour_, text in placed:
        draw.rectangle([x, y + 3, x + 13, y + 16], fill=colour_, outline=_INK)
        draw.text((x + 19, y + 1), text, fill=_INK, font=font)
    return strip


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    legend: Sequence[tuple[Colour, str]] = (),
    scale: int = 2,
) -> Image.Image:
    """Return pictures in rows, one title a row at the left, with a legend below.

    Args:
        rows: pictures [H, W, 3] uint8.
        titles: of the rows.
        legend: colours and names.
        scale: by which pictures are enlarged.
    """
    font = ImageFont.load_default(14)
    margin = 6
    left = margin * 2 + max((int(font.getlength(title)) for title in titles), default=0)
    lines = []
    for row, title in zip(rows, titles, strict=True):
        pictures = [_enlarged(picture, scale) for picture in row]
        height = max(picture.shape[0] for picture in pictures)
        width = left + sum(picture.shape[1] + margin for picture in pictures)
        line = Image.new("RGB", (width, height + margin), _PAPER)
        ImageDraw.Draw(line).text((margin, height // 2 - 8), title, fill=_INK, font=font)
        x = left
        for picture in pictures:
            line.paste(Image.fromarray(picture), (x, 0))
            x += picture.shape[1] + margin
        lines.append(line)
    sheet = _stack(lines)
    return _stack([sheet, legend_strip(legend, sheet.width)]) if legend else sheet


def _stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures below each other."""
    width = max(picture.width for picture in pictures)
    out = Image.new("RGB", (width, sum(picture.height for picture in pictures)), _PAPER)
    y = 0
    for picture in pictures:
        out.paste(picture, (0, y))
        y += picture.height
    return out
