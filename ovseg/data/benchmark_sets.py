"""Segmentation benchmarks in the folder layouts users have.

Each set is described by a file in ``data/sets``: pictures, masks, classes, and what a mask's values
mean; ``describe`` of ``set_descriptions.py`` takes the path of such a file of yours as well.
Layouts are those of mmsegmentation and of the data sets' own archives; masks are mapped while they
are read, so nothing needs converting.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError, InputError, NoData
from ..paths import address, as_given, exists, no_file
from ..progress import waiting
from .folders import Folder
from .images import MAX_PIXELS, orientation, read_image, upright
from .instance_masks import InstanceFile
from .mask_files import INVALID, MaskLayout, read_mask
from .set_descriptions import SETS, SetDescription, describe, list_sets
from .split_lists import KeyList, read_list

logger = logging.getLogger(__name__)
__all__ = [
    "SETS",
    "Item",
    "SegmentationSet",
    "SetDescription",
    "describe",
    "list_sets",
]


@dataclass(frozen=True)
class Item:
    """A picture of a set and its mask; ``key`` names both."""

    key: str
    image: Path
    mask: Path


class SegmentationSet:
    """One split of a benchmark on disk.

    Args:
        name: of ``list_sets``, or a ``.yaml`` description.
        root: the data root, in which the set lies under one of its usual folders, or that folder
            itself.
        split: ``val``, ``train``, ...
        description: in place of ``name``.
        max_pixels: pictures and masks with more are refused before they are decoded.
        partial: whether a part of the pictures will do: those of which picture and mask are there.

    Attributes:
        partial: what is there of it all, "223 of 1449"; None where nothing is missing.
        halves: of a part, pictures without their mask and masks without their picture, a line each.
        listed: what the split's list says, or the names of the pictures where it has none.
        others: where it has none, what else lies among the pictures.

    Raises:
        DataError: where the folder, the list or every mask is missing, saying where they were
            looked for.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        split: str = "val",
        *,
        description: SetDescription | None = None,
        max_pixels: int = MAX_PIXELS,
        partial: bool = False,
    ):
        self.max_pixels = max_pixels
        self.description = description or describe(name)
        self.split = split
        self.others: Folder | None = None
        images = self.description.images(split)
        self.instances: InstanceFile | None = None
        self.root = self._find_root(root, images)
        self.listed = self._find_keys(images)
        self.layout = self._find_layout()
        self.partial: str | None = None
        self.halves: list[str] = []
        if partial:
            self._keep_what_is_there(images)
        self.items = [
            Item(key, self.root / images.format(key), self.root / self.layout.path.format(key))
            for key in self.listed.keys
        ]

    def _find_root(self, root: str | Path, images: str) -> Path:
        """Return the set's folder: a usual one below the data root, or the root itself."""
        about = self.description
        if (what := address(root)) is not None:
            raise NoData(f"{about.name}: root {as_given(root)!r} {what}")
        beginning = Path(about.part(self.split).get("list") or _folder_of(images))
        for layout in about.layouts(self.split):
            if layout.drawn:
                beginning = Path(layout.path)
        looked = [Path(root) / folder for folder in (*about.tree.get("folders", ()), ".")]
        found = next((folder for folder in looked if exists(folder / beginning)), None)
        if found is None:
            raise DataError(
                f"{about.name}: {beginning} is in none of "
                f"{', '.join(str(folder) for folder in looked)}; expected {about.title} in its "
                "usual layout"
            )
        return found

    def _find_keys(self, images: str) -> KeyList:
        """Return the keys of the split's list, or those of the pictures where it has none."""
        part = self.description.part(self.split)
        drawn = [one for one in self.description.layouts(self.split) if one.drawn]
        if drawn:
            names = tuple(self.description.tree["classes"])
            self.instances = InstanceFile(self.root / drawn[0].path, names)
            listed = KeyList(self.instances.keys)
        elif "list" in part:
            listed = read_list(self.root / part["list"], self.root, images)
        else:
            self.others = Folder(self.root / _folder_of(images))
            before, _, after = images.partition("{}")
            listed = KeyList(_keys(self.others, before.rpartition("/")[2], after))
            if self.others.results and listed.keys:
                logger.warning("%s", self.others.left_out()[0])
        if not listed.keys:
            found = self.others.found() if self.others else "nothing"
            raise DataError(
                f"{self.description.name}: no picture {images} in {self.root}, but {found}"
            )
        if listed.repeated:
            logger.warning(
                "%s: %d keys stand several times in the list and count once, the first: %r",
                self.root / part["list"],
                len(listed.repeated),
                next(iter(listed.repeated)),
            )
        return listed

    def _find_layout(self) -> MaskLayout:
        """Return the layout of which there are most masks: a conversion may have been killed."""
        keys = self.listed.keys
        layouts = self.description.layouts(self.split)
        there = [layout for layout in layouts if any(self._masks(layout))]
        if not there:
            tried = " and ".join(str(self.root / layout.path.format(keys[0])) for layout in layouts)
            raise DataError(
                f"{self.description.name}: no mask of {len(keys)} pictures is in {self.root}; for "
                f"the first, {keys[0]!r}, {tried} was looked for"
            )
        return there[0] if len(there) == 1 else max(there, key=lambda one: sum(self._masks(one)))

    def _keep_what_is_there(self, images: str) -> None:
        """Keep the keys of which picture and mask are there; say how many of all they are.

        Raises:
            DataError: if there is none.
        """
        every = self.listed.keys
        kept = []
        for key, masked in zip(every, self._masks(self.layout), strict=True):
            picture = self.root / images.format(key)
            mask = self.root / self.layout.path.format(key)
            there = no_file(picture) is None
            if there and masked:
                kept.append(key)
            elif there:
                self.halves.append(f"{picture} is there and its mask {mask} is not")
            elif masked and not self.layout.drawn:
                self.halves.append(f"{mask} is there and its picture {picture} is not")
        if not kept:
            raise DataError(
                f"{self.description.name}: of {len(every)} pictures none is in {self.root} with "
                f"its mask; expected a part of them: {images}, {self.layout.path}"
            )
        if self.halves:
            logger.warning(
                "%s: %d pictures or masks are left out, for the other one is missing; the first: "
                "%s",
                self.description.name,
                len(self.halves),
                self.halves[0],
            )
        self.listed.keys = kept
        whole = max(len(every), self.expected or 0)
        if len(kept) < whole:
            self.partial = f"{len(kept)} of {whole}"

    def _masks(self, layout: MaskLayout) -> Iterator[bool]:
        """Tell of each key whether its mask is there."""
        return (no_file(self.root / layout.path.format(key)) is None for key in self.listed.keys)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the labels."""
        return self.description.classes

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names of the classes that zero-shot training holds out."""
        return self.description.unseen

    @property
    def expected(self) -> int | None:
        """How many pictures the split has as published."""
        return self.description.part(self.split).get("count")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """Read (picture, truth int16 [H, W]); -1 is not counted.

        Raises:
            DataError: for a picture or mask that is missing, damaged, of another size, or with
                values that mean nothing.
        """
        item = self.items[i]
        try:
            image = read_image(item.image, max_pixels=self.max_pixels)
        except InputError as error:
            raise DataError(str(error)) from error
        truth = self.truth(self.read_mask(item), item.mask)
        if truth.shape != (image.height, image.width):
            raise DataError(
                f"{item.mask} is {truth.shape[1]}x{truth.shape[0]} and {item.image} is "
                f"{image.width}x{image.height}; expected one size"
            )
        return image, truth

    def truth(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Return the labels of a mask's values.

        Raises:
            DataError: for a value that is no class.
        """
        truth = self.layout.table[values]
        bad = truth == INVALID
        if bad.any():
            value = int(values[bad][0])
            raise DataError(
                f"{path} holds the value {value} on {int(bad.sum())} pixels, which is no class of "
                f"{self.description.name}; see ovseg data check"
            )
        return truth

    def read_mask(self, item: Item) -> np.ndarray:
        """Read the values of a mask on the pixels of the upright picture.

        Raises:
            DataError: for a missing, damaged or coloured mask, or a picture whose orientation
                cannot be read.
        """
        if self.instances is not None:
            values = self.instances.draw(item.key, self.max_pixels)
        else:
            values = read_mask(item.mask, max_pixels=self.max_pixels)
        if self.description.masks_made_on != "stored":
            return values
        try:
            return np.ascontiguousarray(upright(values, orientation(item.image)))
        except InputError as error:
            raise DataError(str(error)) from error


def _folder_of(pattern: str) -> str:
    """Return the folder in which the keys of a path with ``{}`` begin."""
    return pattern.partition("{}")[0].rpartition("/")[0]


def _keys(folder: Folder, start: str, after: str) -> list[str]:
    """Return the keys of pictures whose path begins and ends so; others stay in the folder's."""
    with waiting(f"looking through {folder.root}"):
        for _ in folder.walk():
            pass
    shortest = len(start) + len(after) + 1
    taken = {
        name
        for name in folder.pictures
        if name.startswith(start) and name.endswith(after) and len(name) >= shortest
    }
    folder.pictures = sorted(set(folder.pictures) - taken)
    return sorted(name[len(start) : len(name) - len(after)] for name in taken)
