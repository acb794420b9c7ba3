"""Pictures of label maps: colours, overlay with legend, strips of image, truth and prediction. Pillow only."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.images import read_image
from ..data.own_results import png_mark
from ..errors import InputError
from ..replacing import replacing

_BLOCK = 1 << 18  # pixels
_INK, _PAPER, _NONE = (25, 25, 25), (255, 255, 255), (0, 0, 0)


def palette(count: int) -> np.ndarray:
    """``count`` distinct colours, uint8 [count, 3]; the first ones do not depend on ``count``."""
    rows = []
    for i in range(count):
        hue = (i * 0.618034 + 0.02) % 1.0  # golden ratio: neighbours in the list are far apart on the wheel
        rows.append(colorsys.hsv_to_rgb(hue, (0.85, 0.55, 0.75)[i % 3], (0.95, 0.80, 0.60)[i // 3 % 3]))
    return (np.array(rows).reshape(count, 3) * 255).round().astype(np.uint8)


def colour(labels: np.ndarray, count: int) -> np.ndarray:
    """Label map [H, W] to uint8 [H, W, 3]; labels below 0 are black."""
    table = np.concatenate([palette(count), np.array([_NONE], np.uint8)])
    return table[np.where(labels < 0, count, labels)]


def blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of rows of [rows, width], of about a quarter of a million pixels each."""
    step = max(1, _BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def count_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """Pixels of the background and of each of ``count`` labels, int64 [1 + count]."""
    found = np.zeros(count + 1, np.int64)
    for rows in blocks(labels.shape):
        found += np.bincount(labels[rows].ravel().astype(np.int64) + 1, minlength=count + 1)
    return found


def overlay(image: Image.Image, labels: np.ndarray, names: Sequence[str], *, alpha: float = 0.55,
            legend: bool = True) -> Image.Image:
    """The picture under its label map, and below it the names found with their share of the area.

    Small pictures are enlarged to 384 pixels, by whole factors, so that the legend can be read.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha!r}; expected 0, the picture alone, to 1, the labels alone")
    image = _rgb(image)
    factor = max(1, -(-384 // max(image.size)))
    width, height, strip = image.width * factor, image.height * factor, None
    if legend:
        counts, colours = count_labels(labels, len(names)) / labels.size, palette(len(names))
        shares = sorted(((float(share), i) for i, share in enumerate(counts[1:])), reverse=True)
        entries = [(tuple(colours[i]), f"{names[i]} {_percent(share)}") for share, i in shares if share > 0]
        if counts[0] > 0:
            entries.append((_NONE, f"background {_percent(float(counts[0]))}"))
        strip = legend_strip(entries, width)
    picture = Image.new("RGB", (width, height + (strip.height if strip else 0)), _PAPER)
    for rows in blocks((image.height, image.width * factor**2)):
        above = max(rows.start - 1, 0)  # a row more, to see an edge to it
        part = labels[above : rows.stop]
        large = part.repeat(factor, 0).repeat(factor, 1)
        edge = np.zeros(large.shape, bool)
        edge[:, 1:] |= large[:, 1:] != large[:, :-1]
        edge[1:] |= large[1:] != large[:-1]
        skipped = (rows.start - above) * factor
        large, edge = large[skipped:], edge[skipped:]
        box = (0, rows.start, image.width, rows.stop)  # not crop: Pillow's limit of pixels acts there
        base = np.asarray(image.resize((image.width, rows.stop - rows.start), Image.Resampling.NEAREST, box))
        base = base.repeat(factor, 0).repeat(factor, 1)
        shown = np.where(large[..., None] < 0, base, (1 - alpha) * base + alpha * colour(large, len(names)))
        shown[edge] = _PAPER
        picture.paste(Image.fromarray(shown.round().astype(np.uint8)), (0, rows.start * factor))
    if strip:
        picture.paste(strip, (0, height))
    return picture


def strip(image: Image.Image, maps: dict[str, np.ndarray], names: Sequence[str], *, side: int = 320) -> Image.Image:
    """The picture, and its label maps over it, in a row, a title above each, the names that occur below.

    Small pictures are enlarged to ``side``.
    """
    factor, base = max(1, -(-side // max(image.size))), np.asarray(_rgb(image))
    panels = {"picture": base} | {title: (0.3 * base + 0.7 * colour(labels, len(names))).round().astype(np.uint8)
                                  for title, labels in maps.items()}
    font, margin, top = ImageFont.load_default(15), 8, 26
    width, height = image.width * factor, image.height * factor
    row = Image.new("RGB", (len(panels) * (width + margin) + margin, top + height + margin), _PAPER)
    draw = ImageDraw.Draw(row)
    for i, (title, panel) in enumerate(panels.items()):
        x = margin + i * (width + margin)
        draw.text((x, 5), title, fill=_INK, font=font)
        row.paste(Image.fromarray(panel.repeat(factor, 0).repeat(factor, 1)), (x, top))
    present = sorted({int(i) for labels in maps.values() for i in np.unique(labels)}, key=lambda i: (i < 0, i))
    entries = [(tuple(int(v) for v in palette(len(names))[i]), names[i]) if i >= 0 else (_NONE, "background") for i in present]
    return _stack([row, legend_strip(entries, row.width)])


def _rgb(image: Image.Image) -> Image.Image:
    """The picture as it was labelled."""
    return image if image.mode == "RGB" else read_image(image, max_pixels=image.width * image.height)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "<1 %"


def save_result(image: Image.Image, path: Path) -> Path:
    """Write a picture by rename, marked as a result that is no input of later runs."""
    with replacing(path) as part:
        image.save(part, **png_mark(path))
    return path


def legend_strip(entries: Sequence[tuple[tuple[int, ...], str]], width: int) -> Image.Image:
    """Colour swatches with text, wrapped to ``width``."""
    font, line, pad = ImageFont.load_default(14), 22, 8
    x, y, placed = pad, 4, []
    for colour_, text in entries:
        needed = 20 + int(font.getlength(text)) + 14
        if x + needed > width and x > pad:
            x, y = pad, y + line
        placed.append((x, y, colour_, text))
        x += needed
    strip = Image.new("RGB", (width, y + line + 2), _PAPER)
    draw = ImageDraw.Draw(strip)
    for x, y, colour_, text in placed:
        draw.rectangle([x, y + 3, x + 13, y + 16], fill=colour_, outline=_INK)
        draw.text((x + 19, y + 1), text, fill=_INK, font=font)
    return strip


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], legend: Sequence[tuple[tuple[int, ...], str]] = (),
                  scale: int = 2) -> Image.Image:
    """Pictures in rows (one title a row, at the left), enlarged by ``scale``, with a legend below."""
    font, margin = ImageFont.load_default(14), 6
    left = margin * 2 + max((int(font.getlength(title)) for title in titles), default=0)
    lines = []
    for row, title in zip(rows, titles, strict=True):
        pictures = [picture.repeat(scale, 0).repeat(scale, 1) for picture in row]
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
    width = max(picture.width for picture in pictures)
    out = Image.new("RGB", (width, sum(picture.height for picture in pictures)), _PAPER)
    y = 0
    for picture in pictures:
        out.paste(picture, (0, y))
        y += picture.height
    return out
