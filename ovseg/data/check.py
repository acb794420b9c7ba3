"""What is wrong with a benchmark on disk: missing and damaged files, unequal sizes, values that mean nothing, labels off by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, InputError
from ..progress import bar
from ..replacing import replacing
from .images import read_image
from .segmentation_sets import IGNORE, SegmentationSet, read_mask

_CLEARLY = 0.6  # shifted labels must fit the known shares so much better than the labels as they are


@dataclass
class CheckReport:
    """What was found.

    Attributes:
        name, split, folder, masks: what was looked at.
        pictures, expected, looked_at: of the split, as published, and how many were read.
        problems: files that are missing or damaged and pictures whose mask has another size, a line each.
        values: pixels of each value of the masks.
        invalid: values that are no class, with their pixels and a file that holds them.
        shares: of each class, among the pixels that count.
        absent: classes on no pixel.
        shift: by which the values fit the known shares of the classes best; 0 is right, None if they are not known.
    """

    name: str
    split: str
    folder: str
    masks: str
    pictures: int
    expected: int | None
    looked_at: int
    problems: list[str] = field(default_factory=list)
    values: dict[int, int] = field(default_factory=dict)
    invalid: dict[int, tuple[int, str]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    shift: int | None = None

    @property
    def wrong(self) -> list[str]:
        """What must be mended before figures mean anything; empty if nothing."""
        found = [f"{len(self.problems)} files are missing, damaged or of unequal size"] if self.problems else []
        found += [f"value {value} on {pixels} pixels is no class (first in {file})" for value, (pixels, file) in self.invalid.items()]
        if self.expected is not None and self.pictures != self.expected:
            found.append(f"{self.pictures} pictures, {self.expected} are published")
        if self.shift:
            found.append(f"labels look shifted by {self.shift:+d}: the class histogram fits the known one better that way")
        return found

    def __str__(self) -> str:
        known = "not known" if self.shift is None else "as they are" if self.shift == 0 else f"shifted by {self.shift:+d}"
        lines = [f"{self.name}, {self.split}: {self.pictures} pictures in {self.folder}, masks {self.masks}, {self.looked_at} looked at",
                 f"labels fit the known class histogram: {known}"]
        top = sorted(self.shares.items(), key=lambda item: -item[1])[:8]
        lines.append("largest classes: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in top if share > 0))
        if self.absent:
            more = f" and {len(self.absent) - 12} more" if len(self.absent) > 12 else ""
            lines.append(f"{len(self.absent)} classes on no pixel: {', '.join(self.absent[:12])}{more}")
        lines += [f"  {problem}" for problem in self.problems[:20]]
        if len(self.problems) > 20:
            lines.append(f"  and {len(self.problems) - 20} more")
        lines += [f"WRONG: {wrong}" for wrong in self.wrong] or ["nothing wrong found"]
        return "\n".join(lines)


def check_set(data: SegmentationSet, *, sample: int | None = None, progress: bool = False) -> CheckReport:
    """Read every picture and mask (or ``sample`` of them, evenly spread) and count every value."""
    assert data.layout is not None
    chosen = range(len(data)) if sample is None else np.unique(np.linspace(0, len(data) - 1, sample).astype(int)).tolist()
    report = CheckReport(data.description.name, data.split, str(data.root), data.layout.path, len(data), data.expected, len(chosen))
    values, table = np.zeros(65536, np.int64), data.layout.table
    for i in bar(chosen, show=progress, unit="picture", desc="checking"):
        item = data.items[i]
        try:
            image = read_image(item.image)
        except InputError as error:
            report.problems.append(str(error))
            image = None
        try:
            mask = read_mask(item.mask)
        except DataError as error:
            report.problems.append(str(error))
            continue
        if image is not None and mask.shape != (image.height, image.width):
            report.problems.append(f"{item.mask} is {mask.shape[1]}x{mask.shape[0]} and its picture {image.width}x{image.height}")
        counts = np.bincount(mask.ravel(), minlength=65536)
        values += counts
        for value in np.flatnonzero((counts > 0) & (table < IGNORE)):
            pixels, file = report.invalid.get(int(value), (0, str(item.mask)))
            report.invalid[int(value)] = (pixels + int(counts[value]), file)
    report.values = {int(v): int(values[v]) for v in np.flatnonzero(values)}
    kept = table > IGNORE
    pixels = np.bincount(table[kept], weights=values[kept], minlength=data.description.number).tolist()
    names = data.classes or tuple(map(str, range(data.description.number)))
    report.shares = {name: share / max(1.0, sum(pixels)) for name, share in zip(names, pixels, strict=True)}
    report.absent = [name for name, count in zip(names, pixels, strict=True) if count == 0]
    report.shift = _shift(values, table, data.description.shares, data.classes) if values.any() else None
    return report


def _shift(values: np.ndarray, table: np.ndarray, shares: dict[str, float], classes: tuple[str, ...]) -> int | None:
    """Which of -1, 0, 1 added to the values fits the known shares best: the least sum_c |share_c - p_c|, if far below that of 0."""
    if not shares:
        return None
    largest = 255 if not values[256:].any() else 65535
    p = values[: largest + 1] / values.sum()
    at = np.array([np.flatnonzero(table == classes.index(name))[0] for name in shares])
    known = np.array(list(shares.values()))
    # A class written one too low wraps round to the largest value, which is how background 0 becomes 255.
    misfit = {shift: float(np.abs(known - p[(at + shift) % (largest + 1)]).sum()) for shift in (0, -1, 1)}
    best = min(misfit, key=lambda shift: misfit[shift])
    return best if misfit[best] < _CLEARLY * misfit[0] else 0


def convert_masks(data: SegmentationSet, *, progress: bool = False) -> tuple[int, int]:
    """Write the masks of the set with its labels as values, under the name of its first layout, for tools that want them so.

    Masks that are there already are left. Returns (written, left).
    """
    layouts = data.description.layouts(data.split)
    assert data.root is not None and data.layout is not None
    if data.layout.path == layouts[0].path:
        raise InputError(f"{data.description.name} lies there as {layouts[0].path} already; expected one of "
                         f"{[layout.path for layout in layouts[1:]]} to convert")
    back: Any = np.full(65536, 255, np.uint8)  # label to value of the first layout; ignored is 255
    for value in range(255, -1, -1):
        if layouts[0].table[value] > IGNORE:
            back[layouts[0].table[value]] = value
    written = 0
    for item in bar(data.items, show=progress, unit="mask", desc="converting"):
        target = data.root / layouts[0].path.format(item.key)
        if target.exists():
            continue
        truth = data.truth(read_mask(item.mask), item.mask)
        with replacing(target) as part:
            Image.fromarray(np.where(truth == IGNORE, 255, back[truth]).astype(np.uint8)).save(part)
        written += 1
    return written, len(data) - written
