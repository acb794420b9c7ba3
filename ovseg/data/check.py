"""Checks of a benchmark on disk.

They find missing and damaged files, unequal sizes, values that mean nothing, labels off by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, InputError
from ..progress import bar
from ..replacing import replacing
from .benchmark_sets import Item, SegmentationSet
from .folders import look
from .images import orientation, read_image
from .mask_files import IGNORE, read_mask

_CLEARLY = 0.6  # the share of the misfit that must be left where labels are said to be shifted
_VALUES = 65536  # that a mask can hold


@dataclass
class CheckReport:
    """The findings of a check of a benchmark.

    Attributes:
        name, split, folder, masks: what was looked at.
        pictures, expected, looked_at: of the split, as published, and how many were read.
        problems: files that are missing or damaged, pictures whose mask has another size, keys that
            stand twice, masks without a picture, pictures that the set leaves out, a line each.
        turned: pictures with an EXIF orientation that is not 1, by file.
        made_on: on which pixels of those the description says that masks were made; None if it does
            not.
        values: pixels of each value of the masks.
        invalid: values that are no class, with their pixels and a file that holds them.
        ignored: share of all pixels that do not count.
        uncounted: masks of which no pixel counts.
        shares: of each class, among the pixels that count.
        absent: classes on no pixel.
        shift: by which the values fit the known shares of the classes best; 0 is right, None if
            they are not known.
        partial: what is there of all pictures, where a part will do; see ``SegmentationSet``.
    """

    name: str
    split: str
    folder: str
    masks: str
    pictures: int
    expected: int | None
    looked_at: int
    problems: list[str] = field(default_factory=list)
    turned: dict[str, int] = field(default_factory=dict)
    made_on: str | None = None
    ignored: float = 0.0
    uncounted: list[str] = field(default_factory=list)
    values: dict[int, int] = field(default_factory=dict)
    invalid: dict[int, tuple[int, str]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    shift: int | None = None
    partial: str | None = None

    @property
    def wrong(self) -> list[str]:
        """The faults to mend before figures mean anything; empty if there are none."""
        found = []
        if self.problems:
            found.append(f"{len(self.problems)} files are missing, damaged or of unequal size")
        if self.turned and self.made_on is None:
            found.append(
                f"{len(self.turned)} pictures have an EXIF orientation (first "
                f"{next(iter(self.turned))}) and the set does not say whether masks were made on "
                "upright or on stored pixels: expected masks_made_on in a .yaml that is `like` it"
            )
        present = [name for name, share in self.shares.items() if share > 0]
        if self.values and not present:
            found.append("no pixel of any mask counts")
        elif len(present) == 1 < len(self.shares):
            binary = ": masks of 0 and 255 are black and white pictures, not labels"
            found.append(
                f"{present[0]!r} is the class of every pixel that counts"
                f"{binary if set(self.values) <= {0, 255} else ''}"
            )
        found += [
            f"value {value} on {pixels} pixels is no class (first in {file})"
            for value, (pixels, file) in self.invalid.items()
        ]
        count = self.expected is not None and self.pictures != self.expected
        if count and self.partial is None:
            found.append(f"{self.pictures} pictures, {self.expected} are published")
        if self.shift:
            found.append(
                f"labels look shifted by {self.shift:+d}: the class histogram fits the known one "
                "better that way"
            )
        return found

    def __str__(self) -> str:
        fit = "not known"
        if self.shift is not None:
            fit = f"shifted by {self.shift:+d}" if self.shift else "as they are"
        top = sorted(self.shares.items(), key=lambda item: -item[1])[:8]
        largest = ", ".join(f"{name} {100 * share:.1f} %" for name, share in top if share > 0)
        uncounted = ""
        if self.uncounted:
            uncounted = f"; all of them in {len(self.uncounted)} masks, first {self.uncounted[0]}"
        lines = [
            f"{self.name}, {self.split}: {self.pictures} pictures in {self.folder}, masks "
            f"{self.masks}, {self.looked_at} looked at",
            *([f"partial: {self.partial}"] if self.partial else []),
            f"labels fit the known class histogram: {fit}",
            f"largest classes: {largest}",
            f"ignored: {100 * self.ignored:.1f} % of the pixels{uncounted}",
        ]
        if self.turned:
            shown = ", ".join(f"{file} ({value})" for file, value in list(self.turned.items())[:8])
            lines.append(
                f"{len(self.turned)} pictures turned by EXIF, masks taken as made on "
                f"{self.made_on or 'upright'} pixels: "
                f"{shown}{', ...' if len(self.turned) > 8 else ''}"
            )
        if self.absent:
            more = f" and {len(self.absent) - 12} more" if len(self.absent) > 12 else ""
            lines.append(
                f"{len(self.absent)} classes on no pixel: {', '.join(self.absent[:12])}{more}"
            )
        lines += [f"  {problem}" for problem in self.problems[:20]]
        if len(self.problems) > 20:
            lines.append(f"  and {len(self.problems) - 20} more")
        lines += [f"WRONG: {wrong}" for wrong in self.wrong] or ["nothing wrong found"]
        return "\n".join(lines)


def check_set(
    data: SegmentationSet, *, sample: int | None = None, progress: bool = False
) -> CheckReport:
    """Read every picture and mask (or ``sample`` of them, evenly spread) and count every value."""
    chosen: Sequence[int] = range(len(data))
    if sample is not None:
        chosen = np.unique(np.linspace(0, len(data) - 1, sample).astype(int)).tolist()
    about = data.description
    report = CheckReport(
        about.name,
        data.split,
        str(data.root),
        data.layout.path,
        len(data),
        data.expected,
        len(chosen),
        problems=_of_names(data),
        made_on=about.masks_made_on,
        partial=data.partial,
    )
    values = np.zeros(_VALUES, np.int64)
    for i in bar(chosen, show=progress, unit="picture", desc="checking"):
        values += _check_item(data, data.items[i], report)
    report.values = {int(value): int(values[value]) for value in np.flatnonzero(values)}
    table = data.layout.table
    kept = table > IGNORE
    report.ignored = float(values[table == IGNORE].sum() / max(1, values.sum()))
    pixels = np.bincount(table[kept], weights=values[kept], minlength=about.number).tolist()
    names = data.classes or tuple(map(str, range(about.number)))
    counts = dict(zip(names, pixels, strict=True))
    report.shares = {name: count / max(1.0, sum(pixels)) for name, count in counts.items()}
    report.absent = [name for name, count in counts.items() if count == 0]
    if values.any():
        report.shift = _shift(values, table, about.shares, data.classes)
    return report


def _check_item(data: SegmentationSet, item: Item, report: CheckReport) -> np.ndarray:
    """Look at one picture and its mask; return how many pixels have each value."""
    counts = np.zeros(_VALUES, np.int64)
    image = None
    turned = 1
    try:
        image = read_image(item.image, max_pixels=data.max_pixels)
        turned = orientation(item.image)
        if turned != 1:
            report.turned[str(item.image)] = turned
    except InputError as error:
        report.problems.append(str(error))
    try:
        mask = data.read_mask(item)
    except DataError as error:
        if str(error) not in report.problems:
            report.problems.append(str(error))
        return counts
    if image is not None and mask.shape != (image.height, image.width):
        report.problems.append(
            f"{item.mask} is {mask.shape[1]}x{mask.shape[0]} and its picture "
            f"{image.width}x{image.height}"
            f"{f', turned by its EXIF orientation {turned}' if turned != 1 else ''}"
        )
    counts = np.bincount(mask.ravel(), minlength=_VALUES)
    table = data.layout.table
    if not counts[table > IGNORE].any():
        report.uncounted.append(str(item.mask))
    for value in np.flatnonzero((counts > 0) & (table < IGNORE)).tolist():
        pixels, file = report.invalid.get(value, (0, str(item.mask)))
        report.invalid[value] = (pixels + int(counts[value]), file)
    return counts


def _of_names(data: SegmentationSet) -> list[str]:
    """Say what is wrong with the list, or with the folders where there is none, without reading."""
    found = [
        f"the key {key!r} stands {number} times in the list"
        for key, number in data.listed.repeated.items()
    ] + data.listed.unmatched
    found += data.halves
    if data.others is None:
        return found
    found += data.others.bad
    images = data.description.images(data.split)
    found += [
        f"{data.others.root / name} is left out: pictures of the set are {images}"
        for name in data.others.pictures
    ]
    before, _, after = data.layout.path.partition("{}")
    folder, _, start = before.rpartition("/")
    keys = set(data.listed.keys)
    masks = look(data.root / folder)
    # `ovseg segment --format mask` may have made the masks.
    for name in sorted(masks.pictures + masks.results):
        if not (name.startswith(start) and name.endswith(after)):
            continue
        # x_labelTrainIds.png beside x.png is another layout's mask of x.
        parts = name[len(start) : len(name) - len(after)].split("_")
        if not any("_".join(parts[: i + 1]) in keys for i in range(len(parts))):
            found.append(f"{data.root / folder / name} is a mask without a picture")
    return found


def _shift(
    values: np.ndarray, table: np.ndarray, shares: dict[str, float], classes: tuple[str, ...]
) -> int | None:
    """Return which of -1, 0, 1 added to the values fits the known shares best.

    It has the least sum_c |share_c - p_c|, far below that of 0; None if no shares are known.
    """
    if not shares:
        return None
    largest = 255 if not values[256:].any() else 65535
    p = values[: largest + 1] / values.sum()
    at = np.array([np.flatnonzero(table == classes.index(name))[0] for name in shares])
    known = np.array(list(shares.values()))
    # A class written one too low wraps round to the largest value, which is how background 0
    # becomes 255.
    misfit = {
        shift: float(np.abs(known - p[(at + shift) % (largest + 1)]).sum()) for shift in (0, -1, 1)
    }
    best = min(misfit, key=lambda shift: misfit[shift])
    return best if misfit[best] < _CLEARLY * misfit[0] else 0


def convert_masks(data: SegmentationSet, *, progress: bool = False) -> tuple[int, int, list[str]]:
    """Write the masks of the set with its labels as values, under the name of its first layout.

    Some tools want them so. Masks that are there already are left.

    Returns:
        How many were written and left, and what could not be converted, a line each.
    """
    layouts = data.description.layouts(data.split)
    if data.instances is not None:
        raise InputError(
            f"{data.description.name}: masks are drawn from {data.layout.path} whenever they are "
            "read; expected a set whose masks are pictures"
        )
    if data.layout.path == layouts[0].path:
        raise InputError(
            f"{data.description.name} lies there as {layouts[0].path} already; expected one of "
            f"{[layout.path for layout in layouts[1:]]} to convert"
        )
    # Label to value of the first layout; ignored is 255.
    back: Any = np.full(_VALUES, 255, np.uint8)
    for value in range(255, -1, -1):
        if layouts[0].table[value] > IGNORE:
            back[layouts[0].table[value]] = value
    written = 0
    left = 0
    bad: list[str] = []
    for item in bar(data.items, show=progress, unit="mask", desc="converting"):
        target = data.root / layouts[0].path.format(item.key)
        if target.exists():
            left += 1
            continue
        try:
            truth = data.truth(read_mask(item.mask, max_pixels=data.max_pixels), item.mask)
        except DataError as error:
            bad.append(str(error))
            continue
        with replacing(target) as part:
            Image.fromarray(np.where(truth == IGNORE, 255, back[truth]).astype(np.uint8)).save(part)
        written += 1
    return written, left, bad
