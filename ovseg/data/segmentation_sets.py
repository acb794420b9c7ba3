"""Segmentation benchmarks in the folder layouts users have: pictures, masks, classes, and what a mask's values mean.

Each set is described by a file in ``data/sets``; ``describe`` takes the path of such a file of yours as well. Layouts are those of
mmsegmentation and of the data sets' own archives; masks are mapped while they are read, so nothing needs converting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import DataError, InputError
from .images import MAX_PIXELS, read_image
from .labels import LabelSet

IGNORE = -1  # of a truth: pixels that are not counted
_SETS = Path(__file__).parent / "sets"
_INVALID = -2
_MASK_FORMATS = ("PNG", "TIFF", "BMP")


@dataclass(frozen=True)
class MaskLayout:
    """Where masks lie and what their values mean.

    Attributes:
        path: below the set's folder, ``{}`` for the key of a picture.
        table: int16 [65536], the label of each value; -1 is ignored, -2 must not occur.
    """

    path: str
    table: np.ndarray


@dataclass(frozen=True)
class SetDescription:
    """A benchmark without its files.

    Attributes:
        name, title: as tables show it.
        classes: in the order of the labels.
        background: whether class 0 stands for everything else.
        unseen: classes held out in zero-shot training.
        texts: what stands for a class where its name does not.
        shares: rough shares of the labelled pixels of some classes, by which shifted labels are found.
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
            raise InputError(f"{self.name} comes without class names; expected them in a file, --labels-file, {self.number} classes")
        return LabelSet.of({name: self.texts.get(name, name) for name in self.classes[int(self.background) :]})

    @property
    def number(self) -> int:
        return self.tree.get("number", len(self.classes))

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.tree["splits"])

    def layouts(self, split: str) -> list[MaskLayout]:
        """The ways masks of this split may be stored, the preferred one first."""
        masks = self._of(split).get("masks", self.tree["masks"])
        return [MaskLayout(entry["path"], _table(entry["values"], self.number)) for entry in masks]

    def _of(self, split: str) -> dict[str, Any]:
        if split not in self.splits:
            raise InputError(f"split is {split!r}; {self.name} has {', '.join(self.splits)}")
        return self.tree["splits"][split]


def list_sets() -> list[str]:
    return sorted(path.stem for path in _SETS.glob("*.yaml"))


def describe(name: str) -> SetDescription:
    """The description of a benchmark by its name, or from a file of the form of those in ``data/sets``.

    Raises:
        InputError: for an unknown name, or a file that lacks something.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else _SETS / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"data set is {name!r}; expected one of {list_sets()}, or a .yaml file that describes one")
    try:
        tree = _read(path)
        tree = {**_read(_SETS / f"{tree['like']}.yaml"), **tree, "splits": _merged(tree)} if "like" in tree else tree
        found = SetDescription(path.stem, tree["title"], tuple(map(str, tree["classes"])), bool(tree["background"]),
                               tuple(tree.get("unseen", ())), dict(tree.get("texts", {})), dict(tree.get("shares", {})), tree)
        for split in found.splits:
            found.layouts(split)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} does not describe a data set: {type(error).__name__}: {error}") from error
    unknown = [c for c in (*found.unseen, *found.texts, *found.shares) if c not in found.classes]
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is none of the classes")
    return found


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds a {type(tree).__name__}; expected the description of a data set")
    return tree


def _merged(tree: dict[str, Any]) -> dict[str, Any]:
    return {**_read(_SETS / f"{tree['like']}.yaml")["splits"], **tree.get("splits", {})}


def _values(entries: Iterable[int | str]) -> list[int]:
    found: list[int] = []
    for entry in entries:
        first, _, last = str(entry).partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _table(rule: dict[str, Any], classes: int) -> np.ndarray:
    """``map``; or classes one after the other from the value ``start``, without the ``removed`` ones, the first one labelled ``label``.
    Then ``background`` values are 0 and ``ignore`` values are not counted."""
    table = np.full(65536, _INVALID, np.int16)
    if "map" in rule:
        for value, label in rule["map"].items():
            table[value] = label
    else:
        value, removed = rule["start"], set(rule.get("removed", ()))
        for label in range(rule.get("label", 0), classes):
            while value in removed:
                value += 1
            table[value], value = label, value + 1
    table[_values(rule.get("background", ()))] = 0
    table[_values(rule.get("ignore", ()))] = IGNORE
    return table


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
        root: the data root, in which the set lies under one of its usual folders, or that folder itself.
        split: ``val``, ``train``, ...
        description: in place of ``name``.

    Raises:
        DataError: where the folder, the list or every mask is missing, saying where they were looked for.
    """

    def __init__(self, name: str, root: str | Path, split: str = "val", *, description: SetDescription | None = None):
        self.description = description or describe(name)
        self.split, tree = split, self.description.tree
        part = self.description._of(split)
        images = part.get("images", tree["images"])
        layouts = self.description.layouts(split)
        looked = [Path(root) / folder for folder in (*tree.get("folders", ()), ".")]
        beginning = Path(part.get("list") or images.split("{}")[0])
        self.root = next((folder for folder in looked if (folder / beginning).exists()), None)
        if self.root is None:
            raise DataError(f"{self.description.name}: {beginning} is in none of {', '.join(str(folder) for folder in looked)}; expected "
                            f"{self.description.title} in its usual layout")
        keys = self._listed(self.root / part["list"]) if "list" in part else _keys(self.root, images)
        if not keys:
            raise DataError(f"{self.description.name}: no picture {images} in {self.root}")
        self.layout = next((layout for layout in layouts if any((self.root / layout.path.format(key)).is_file() for key in keys)), None)
        if self.layout is None:
            raise DataError(f"{self.description.name}: no mask of {len(keys)} pictures is in {self.root}; expected "
                            + " or ".join(layout.path for layout in layouts))
        self.items = [Item(key, self.root / images.format(key), self.root / self.layout.path.format(key)) for key in keys]

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
            DataError: for a picture or mask that is missing, damaged, of another size, or with values that mean nothing.
        """
        item = self.items[i]
        try:
            image = read_image(item.image)
        except InputError as error:
            raise DataError(str(error)) from error
        truth = self.truth(read_mask(item.mask), item.mask)
        if truth.shape != (image.height, image.width):
            raise DataError(f"{item.mask} is {truth.shape[1]}x{truth.shape[0]} and {item.image} is {image.width}x{image.height}; "
                            "expected one size")
        return image, truth

    def truth(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Labels of a mask's values."""
        assert self.layout is not None
        truth = self.layout.table[values]
        bad = truth == _INVALID
        if bad.any():
            value = int(values[bad][0])
            raise DataError(f"{path} holds the value {value} on {int(bad.sum())} pixels, which is no class of {self.description.name}; "
                            "see ovseg data check")
        return truth

    @staticmethod
    def _listed(path: Path) -> list[str]:
        # Context's and VOC's lists may carry a second column.
        return [line.split()[0] for line in path.read_text("utf-8-sig").splitlines() if line.strip()]


def _keys(root: Path, pattern: str) -> list[str]:
    before, after = pattern.split("{}")
    folder = root / before
    return sorted(path.relative_to(folder).as_posix()[: -len(after)] for path in folder.rglob(f"*{after}") if path.is_file())


def read_mask(path: Path) -> np.ndarray:
    """The values of a mask [H, W], uint8 or uint16: class indices, with or without a palette.

    Raises:
        DataError: for a missing, damaged or coloured mask; the message names it.
    """
    if not path.is_file():
        raise DataError(f"mask {path} is missing")
    try:
        with Image.open(path, formats=_MASK_FORMATS) as mask:
            if mask.width * mask.height > MAX_PIXELS:
                raise DataError(f"mask {path} is {mask.width}x{mask.height}; the limit is {MAX_PIXELS} pixels")
            if mask.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
                raise DataError(f"mask {path} is a {mask.mode} picture; expected class indices in one channel, grey or with a palette")
            values = np.asarray(mask)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode mask {path}: {error}; expected a complete {' or '.join(_MASK_FORMATS)}") from error
    if values.dtype.kind == "i" and (int(values.min()) < 0 or int(values.max()) > 65535):
        raise DataError(f"mask {path} holds values from {int(values.min())} to {int(values.max())}; expected 0 to 65535")
    return values.astype(np.uint8 if values.dtype == bool else values.dtype if values.dtype.kind == "u" else np.uint16)
