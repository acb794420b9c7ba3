"""Lists of a split: a line is the key of a picture, whatever it holds; forms in which lists are
published are understood.

Segmentation benchmarks in the folder layouts users have: pictures, masks, classes, and what a
mask's values mean.

Each set is described by a file in ``data/sets``; ``describe`` takes the path of such a file of
yours as well. Layouts are those of mmsegmentation and of the data sets' own archives; masks are
mapped while they are read, so nothing needs converting.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, InputError, NoData
from ..paths import address, as_given, exists, no_file
from ..progress import waiting
from ..registration import Registry, yaml_files
from ..text_files import lines_of, text_of, tree_of
from .folders import Folder
from .images import MAX_PIXELS, SUFFIXES, orientation, read_image, upright
from .labels import LabelSet
from .masks import IGNORE, INVALID, MaskLayout, read_mask, table_of

_ENDING = "(?:" + "|".join(map(re.escape, SUFFIXES)) + ")"


@dataclass
class KeyList:
    """Keys in their order, each once.

    Attributes:
        repeated: keys that stand several times, and how often.
        unmatched: lines whose two names belong to different keys.
    """

    keys: list[str]
    repeated: dict[str, int] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)


def read_list(path: Path, root: Path, images: str) -> KeyList:
    """The keys that a list names.

    A line is a key, spaces and all, if the picture of that key is there, or if it has no other
    form: with the picture's suffix (``x.jpg``), with its folder too (``/JPEGImages/x.jpg``),
    followed by its mask (``/JPEGImages/x.jpg /SegmentationClassAug/x.png``) or by itself, or by -1,
    0 or 1, as VOC's lists of one class are.

    Args:
        root, images: of the set; ``images`` holds ``{}`` for the key.

    Raises:
        DataError: for a list that is missing, empty or no UTF-8 text.
    """
    counts: dict[str, int] = {}
    unmatched = []
    for line in lines_of(
        path, "list", "a text file with the key of a picture on each line", DataError
    ):
        key, mask = _key(line, images, root)
        if mask is not None and not re.match(
            rf"{re.escape(_last(key))}(?![0-9A-Za-z])", _last(mask)
        ):
            unmatched.append(f"{path}: {line!r} names a picture and a mask of different keys")
        counts[key] = counts.get(key, 0) + 1
    return KeyList(
        list(counts), {key: number for key, number in counts.items() if number > 1}, unmatched
    )


def _key(line: str, images: str, root: Path) -> tuple[str, str | None]:
    """(key of a line, the mask's name if the line has one)."""
    columns = line.split()
    suffix = Path(line).suffix.lower() in SUFFIXES
    if (len(columns) == 1 and not suffix and "/" not in line) or _is_there(line, images, root):
        return line, None  # as most lists are, or a key that looks like another form
    if (pair := re.match(rf"(.+?{_ENDING})\s+(\S.*)$", line, re.IGNORECASE)) is not None:
        return _bare(pair[1], images, root), pair[2]
    if len(columns) == 2 and columns[0] == columns[1]:
        return columns[0], None
    if (flag := re.search(r"\s+(-1|0|1)$", line)) is not None and _is_there(
        line[: flag.start()], images, root
    ):
        return line[: flag.start()], None
    return _bare(line, images, root), None


def _bare(name: str, images: str, root: Path) -> str:
    """A key from the name of its picture: without the folder of ``images`` and what leads there,
    without the suffix.
    """
    before, after = images.split("{}")
    if before and f"/{before}" in f"/{name}":
        name = f"/{name}".rpartition(f"/{before}")[2]
    if after and name.endswith(after):
        return name.removesuffix(after)
    stem = re.sub(f"{_ENDING}$", "", name, flags=re.IGNORECASE)
    return stem if _is_there(stem, images, root) else name


def _is_there(key: str, images: str, root: Path) -> bool:
    return no_file(root / images.format(key)) is None


def _last(name: str) -> str:
    return name.rpartition("/")[2]


__all__ = [
    "IGNORE",
    "Item",
    "MaskLayout",
    "SegmentationSet",
    "SetDescription",
    "describe",
    "list_sets",
    "read_mask",
]
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
        return self.tree.get("number", len(self.classes))

    @property
    def masks_made_on(self) -> str | None:
        """The pixels that masks lie on where a picture has an EXIF orientation: ``upright``, as
        people see it; ``stored``, as the file has them. None: the description does not say, and
        upright is taken.
        """
        return self.tree.get("masks_made_on")

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.tree["splits"])

    def layouts(self, split: str) -> list[MaskLayout]:
        """The ways masks of this split may be stored, the preferred one first."""
        masks = self._of(split).get("masks", self.tree["masks"])
        return [
            MaskLayout(entry["path"], table_of(entry["values"], self.number)) for entry in masks
        ]

    def images(self, split: str) -> str:
        """Where pictures lie below the set's folder, ``{}`` for the key."""
        return self._of(split).get("images", self.tree["images"])

    def _of(self, split: str) -> dict[str, Any]:
        if split not in self.splits:
            raise InputError(f"split is {split!r}; {self.name} has {', '.join(self.splits)}")
        return self.tree["splits"][split]


def list_sets() -> list[str]:
    """Return the names of the benchmark sets in the package."""
    return list(SETS)


def describe(name: str) -> SetDescription:
    """The description of a benchmark by its name, or from a file of the form of those in
    ``data/sets``.

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
        if (
            other := next((name for name in tree["classes"] if not isinstance(name, str)), None)
        ) is not None:
            raise ValueError(
                f"the class {other!r} is a {type(other).__name__}; expected a text, in YAML in "
                "quotation marks"
            )
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
        if found.masks_made_on not in (None, *MADE_ON):
            raise ValueError(
                f"masks_made_on is {found.masks_made_on!r}; expected one of {list(MADE_ON)}"
            )
        for split in found.splits:
            for pattern in (found.images(split), *(layout.path for layout in found.layouts(split))):
                if pattern.count("{}") != 1 or pattern.count("{") != 1 or pattern.count("}") != 1:
                    raise ValueError(
                        f"path {pattern!r} holds {pattern.count('{}')} '{{}}'; expected one, for "
                        "the key, and no other braces"
                    )
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


def _read(path: Path, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tree of a description with what it takes over from those that it is ``like``; ``below``:
    those that led here.
    """
    try:
        tree = tree_of(
            text_of(
                path,
                "data set",
                "one of ovseg data list, or a .yaml file that describes one",
                InputError,
            )
        )
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
        raise InputError(
            f"{path}: like is {like!r}; expected one of "
            f"{[name for name in list_sets() if name not in below]}"
        )
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
        self.split, tree = split, self.description.tree
        part = self.description._of(split)
        images = self.description.images(split)
        layouts = self.description.layouts(split)
        if (what := address(root)) is not None:
            raise NoData(f"{self.description.name}: root {as_given(root)!r} {what}")
        looked = [Path(root) / folder for folder in (*tree.get("folders", ()), ".")]
        before, _, after = images.partition("{}")
        folder_of, _, start = before.rpartition("/")
        beginning = Path(part.get("list") or folder_of)
        self.root = next((folder for folder in looked if exists(folder / beginning)), None)
        if self.root is None:
            raise DataError(
                f"{self.description.name}: {beginning} is in none of "
                f"{', '.join(str(folder) for folder in looked)}; expected "
                f"{self.description.title} in its usual layout"
            )
        self.others: Folder | None = None
        if "list" in part:
            self.listed = read_list(self.root / part["list"], self.root, images)
        else:
            self.others = Folder(self.root / folder_of)
            self.listed = KeyList(_keys(self.others, start, after))
        keys = self.listed.keys
        if not keys:
            found = self.others.found() if self.others else "nothing"
            raise DataError(
                f"{self.description.name}: no picture {images} in {self.root}, but {found}"
            )
        if self.others is not None and self.others.results:
            logger.warning("%s", self.others.left_out()[0])
        if self.listed.repeated:
            logger.warning(
                "%s: %d keys stand several times in the list and count once, the first: %r",
                self.root / part["list"],
                len(self.listed.repeated),
                next(iter(self.listed.repeated)),
            )
        there = [layout for layout in layouts if any(self._masks(layout, keys))]
        # Of a conversion that was killed there are some masks, and all of those it reads.
        self.layout = max(
            there,
            key=lambda layout: sum(self._masks(layout, keys)) if len(there) > 1 else 0,
            default=None,
        )
        if self.layout is None:
            tried = " and ".join(str(self.root / layout.path.format(keys[0])) for layout in layouts)
            raise DataError(
                f"{self.description.name}: no mask of {len(keys)} pictures is in {self.root}; for "
                f"the first, {keys[0]!r}, "
                f"{tried} was looked for"
            )
        self.items = [
            Item(key, self.root / images.format(key), self.root / self.layout.path.format(key))
            for key in keys
        ]

    def _masks(self, layout: MaskLayout, keys: Sequence[str]) -> Iterator[bool]:
        assert self.root is not None
        return (no_file(self.root / layout.path.format(key)) is None for key in keys)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.description.classes

    @property
    def unseen(self) -> tuple[str, ...]:
        return self.description.unseen

    @property
    def expected(self) -> int | None:
        """How many pictures the split has as published."""
        return self.description._of(self.split).get("count")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """(picture, truth int16 [H, W]); -1 is not counted.

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
                f"{image.width}x{image.height}; "
                "expected one size"
            )
        return image, truth

    def truth(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Labels of a mask's values."""
        assert self.layout is not None
        truth = self.layout.table[values]
        bad = truth == INVALID
        if bad.any():
            value = int(values[bad][0])
            raise DataError(
                f"{path} holds the value {value} on {int(bad.sum())} pixels, which is no class of "
                f"{self.description.name}; "
                "see ovseg data check"
            )
        return truth

    def read_mask(self, item: Item) -> np.ndarray:
        """The values of a mask on the pixels of the upright picture.

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


def _keys(folder: Folder, start: str, after: str) -> list[str]:
    """Of the pictures whose path begins and ends so; the others stay in ``folder.pictures``."""
    with waiting(f"looking through {folder.root}"):
        for _ in folder.walk():
            pass
    taken = {
        name
        for name in folder.pictures
        if name.startswith(start) and name.endswith(after) and len(name) > len(start) + len(after)
    }
    folder.pictures = sorted(set(folder.pictures) - taken)
    return sorted(name[len(start) : len(name) - len(after)] for name in taken)
