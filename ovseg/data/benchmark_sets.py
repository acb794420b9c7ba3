"""Segmentation benchmarks in the folder layouts users have.

Each set is described by a file in ``data/sets``: pictures, masks, classes, and what a mask's values
mean; ``describe`` takes the path of such a file of yours as well. Layouts are those of
mmsegmentation and of the data sets' own archives; masks are mapped while they are read, so nothing
needs converting.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, InputError, NoData
from ..paths import address, as_given, exists, no_file
from ..progress import waiting
from ..registration import Registry, yaml_files
from ..text_files import text_of, tree_of
from .folders import Folder
from .images import MAX_PIXELS, orientation, read_image, upright
from .labels import LabelSet
from .mask_files import INVALID, MaskLayout, read_mask, table_of
from .split_lists import KeyList, read_list

logger = logging.getLogger(__name__)
SETS: Registry[Path] = Registry(
    "data set", lambda: yaml_files(Path(__file__).parent / "sets"), InputError
)
MADE_ON = ("upright", "stored")


@dataclass(frozen=True)
class SetDescription:
    """A benchmark without its files.

    Attributes:
        name, title: as tables show it.
        classes: in the order of the labels.
        background: whether class 0 stands for everything else.
        unseen: classes held out in zero-shot training.
        texts: what stands for a class where its name does not.
        shares: rough shares of the labelled pixels of some classes, by which shifted labels are
            found.
        tree: the description as read.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    background: bool
    unseen: tuple[str, ...]
    texts: dict[str, str]
    shares: dict[str, float]
    tree: dict[str, Any]

    @property
    def label_set(self) -> LabelSet:
        """The classes as labels, without the background."""
        if not self.classes:
            raise InputError(
                f"{self.name} comes without class names; expected them in a file, --labels-file, "
                f"{self.number} classes"
            )
        return LabelSet.of(
            {name: self.texts.get(name, name) for name in self.classes[int(self.background) :]}
        )

    @property
    def number(self) -> int:
        """How many classes there are, named or not."""
        return self.tree.get("number", len(self.classes))

    @property
    def masks_made_on(self) -> str | None:
        """The pixels that masks lie on where a picture has an EXIF orientation.

        ``upright``, as people see it; ``stored``, as the file has them. None: the description does
        not say, and upright is taken.
        """
        return self.tree.get("masks_made_on")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.tree["splits"])

    def layouts(self, split: str) -> list[MaskLayout]:
        """Return the ways masks of this split may be stored, the preferred one first."""
        masks = self.part(split).get("masks", self.tree["masks"])
        return [
            MaskLayout(entry["path"], table_of(entry["values"], self.number)) for entry in masks
        ]

    def images(self, split: str) -> str:
        """Return where pictures lie below the set's folder, ``{}`` for the key."""
        return self.part(split).get("images", self.tree["images"])

    def part(self, split: str) -> dict[str, Any]:
        """Return what the description says about one split alone.

        Raises:
            InputError: if it has none of that name.
        """
        if split not in self.splits:
            raise InputError(f"split is {split!r}; {self.name} has {', '.join(self.splits)}")
        return self.tree["splits"][split]


def list_sets() -> list[str]:
    """Return the names of the benchmark sets in the package."""
    return list(SETS)


def describe(name: str) -> SetDescription:
    """Read the description of a benchmark.

    Args:
        name: of ``list_sets``, or a file of the form of those in ``data/sets``.

    Raises:
        InputError: for an unknown name, or a file that lacks something.
    """
    is_file = Path(name).suffix in (".yaml", ".yml")
    if not is_file and name not in SETS:
        raise InputError(
            f"data set is {name!r}; expected one of {list_sets()}, or a .yaml file that describes "
            "one"
        )
    path = Path(name) if is_file else SETS[name]
    try:
        tree = _read(path)
        found = SetDescription(
            path.stem,
            tree["title"],
            tuple(tree["classes"]),
            bool(tree["background"]),
            tuple(tree.get("unseen", ())),
            dict(tree.get("texts", {})),
            dict(tree.get("shares", {})),
            tree,
        )
        _check_form(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} does not describe a data set: {type(error).__name__}: {error}"
        ) from error
    unknown = [c for c in (*found.unseen, *found.texts, *found.shares) if c not in found.classes]
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is none of the classes")
    twice = [c for i, c in enumerate(found.classes) if c in found.classes[:i]]
    if twice:
        raise InputError(f"{path}: the class {twice[0]!r} stands twice")
    return found


def _check_form(found: SetDescription) -> None:
    """Raise ValueError for classes that are no texts, and for paths without a place for the key."""
    for name in found.classes:
        if not isinstance(name, str):
            raise ValueError(
                f"the class {name!r} is a {type(name).__name__}; expected a text, in YAML in "
                "quotation marks"
            )
    if found.masks_made_on not in (None, *MADE_ON):
        raise ValueError(
            f"masks_made_on is {found.masks_made_on!r}; expected one of {list(MADE_ON)}"
        )
    for split in found.splits:
        for pattern in (found.images(split), *(layout.path for layout in found.layouts(split))):
            if not pattern.count("{}") == pattern.count("{") == pattern.count("}") == 1:
                raise ValueError(
                    f"path {pattern!r} holds {pattern.count('{}')} '{{}}'; expected one, for the "
                    "key, and no other braces"
                )


def _read(path: Path, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a description with what it takes over from those that it is ``like``.

    Args:
        path: of the file.
        below: names of those that led here.
    """
    expected = "one of ovseg data list, or a .yaml file that describes one"
    try:
        tree = tree_of(text_of(path, "data set", expected, InputError))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is {error}") from error
    if not isinstance(tree, dict):
        raise InputError(
            f"{path} holds a {type(tree).__name__}; expected the description of a data set"
        )
    if "like" not in tree:
        return tree
    like = tree["like"]
    if like not in SETS or like in below:
        others = [name for name in list_sets() if name not in below]
        raise InputError(f"{path}: like is {like!r}; expected one of {others}")
    base = _read(SETS[like], (*below, like))
    return {**base, **tree, "splits": {**base["splits"], **tree.get("splits", {})}}


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

    Attributes:
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
    ):
        self.max_pixels = max_pixels
        self.description = description or describe(name)
        self.split = split
        self.others: Folder | None = None
        images = self.description.images(split)
        self.root = self._find_root(root, images)
        self.listed = self._find_keys(images)
        self.layout = self._find_layout()
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
        if "list" in part:
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
