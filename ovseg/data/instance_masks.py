"""Masks drawn from COCO's instances: polygons and run lengths of a JSON file, by pycocotools.

Crowds are drawn first, then instances from the largest to the smallest, so that what lies on a
table is not hidden by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import DataError
from ..libraries import require
from ..text_files import text_of, tree_of

NOTHING = 0  # the value of a pixel on no instance; classes follow
CROWD = 255
MOST_CLASSES = CROWD - 1
_FORM = (
    "COCO's instances: images with id, file_name, height and width, categories, and annotations "
    "with image_id, category_id and segmentation"
)


@dataclass
class _Picture:
    """A picture's size, and its instances: (area, value, segmentation, id)."""

    height: int
    width: int
    instances: list[tuple[float, int, Any, Any]] = field(default_factory=list)


class InstanceFile:
    """The instances of a split.

    Args:
        path: of the JSON file.
        classes: names of categories, in the order of the values: the first is 1. Instances of
            other categories are not drawn.

    Attributes:
        keys: names of the pictures without their suffix, in the order of the file.

    Raises:
        DataError: for a file that is damaged or of another form, an id that stands twice, and a
            class that is none of its categories.
        MissingLibrary: without pycocotools.
    """

    def __init__(self, path: Path, classes: tuple[str, ...]):
        require("pycocotools", f"masks from {path.name}")
        if len(classes) > MOST_CLASSES:
            raise DataError(
                f"{path}: {len(classes)} classes are to be drawn; expected at most {MOST_CLASSES}"
            )
        self.path = path
        tree = self._tree()
        values = self._values(tree["categories"], classes)
        self._pictures: dict[str, _Picture] = {}
        keys: dict[Any, str] = {}
        for entry in tree["images"]:
            number, name, height, width = self._of(
                entry, id=int, file_name=str, height=int, width=int
            )
            key = str(PurePosixPath(name).with_suffix(""))
            if number in keys or key in self._pictures:
                raise DataError(f"{path}: the image {number} ({name}) stands twice; expected once")
            if min(height, width) < 1:
                raise DataError(f"{path}: {name} is {width}x{height}; expected a positive size")
            keys[number] = key
            self._pictures[key] = _Picture(height, width)
        seen = set()
        for entry in tree["annotations"]:
            number, image, category = self._of(entry, id=int, image_id=int, category_id=int)
            if number in seen:
                raise DataError(f"{path}: the annotation id {number} stands twice; expected once")
            seen.add(number)
            if image not in keys or category not in values:
                what = f"image {image}" if image not in keys else f"category {category}"
                raise DataError(f"{path}: annotation {number} is of {what}, which it does not list")
            self._add(self._pictures[keys[image]], entry, values[category])

    @property
    def keys(self) -> list[str]:
        """Names of the pictures without their suffix, in the order of the file."""
        return list(self._pictures)

    def draw(self, key: str, max_pixels: int) -> np.ndarray:
        """Return the values of a picture's mask, uint8 [H, W].

        Raises:
            DataError: for a picture that is not in the file or too large, and for a segmentation
                that cannot be drawn.
        """
        if key not in self._pictures:
            raise DataError(
                f"{self.path} does not list the picture {key!r}; expected its instances"
            )
        picture = self._pictures[key]
        if picture.height * picture.width > max_pixels:
            raise DataError(
                f"{self.path}: {key} is {picture.width}x{picture.height}; the limit is "
                f"{max_pixels} pixels"
            )
        mask = np.full((picture.height, picture.width), NOTHING, np.uint8)
        for _, value, shape, number in sorted(picture.instances, key=lambda one: -one[0]):
            mask[self._drawn(shape, picture, number)] = value
        return mask

    def _tree(self) -> dict[str, Any]:
        try:
            tree = tree_of(text_of(self.path, "file of instances", _FORM, DataError), is_json=True)
        except ValueError as error:
            raise DataError(f"{self.path} is {error}; expected {_FORM}") from error
        for key in ("images", "annotations", "categories"):
            if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
                raise DataError(f"{self.path} holds no list of {key}; expected {_FORM}")
        return tree

    def _values(self, categories: list[Any], classes: tuple[str, ...]) -> dict[int, int | None]:
        """Return the value of each category; None for one that is not drawn."""
        values = {name: value for value, name in enumerate(classes, NOTHING + 1)}
        found: dict[int, int | None] = {}
        for entry in categories:
            number, name = self._of(entry, id=int, name=str)
            if number in found:
                raise DataError(
                    f"{self.path}: the category id {number} stands twice; expected once"
                )
            found[number] = values.pop(name, None)
        if values:
            raise DataError(
                f"{self.path} has no category {next(iter(values))!r}; expected all of "
                f"{len(classes)} classes, of which {len(values)} are missing"
            )
        return found

    def _of(self, entry: Any, **kinds: type) -> list[Any]:
        """Return values of an entry, each held to its kind."""
        if not isinstance(entry, dict):
            raise DataError(f"{self.path} holds {str(entry)[:40]!r} where an object is expected")
        for name, kind in kinds.items():
            value = entry.get(name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise DataError(
                    f"{self.path}: {name} of the entry {entry.get('id')!r} is {str(value)[:40]!r}; "
                    f"expected {_FORM}"
                )
        return [entry[name] for name in kinds]

    def _add(self, picture: _Picture, entry: dict[str, Any], value: int | None) -> None:
        """Keep an instance: crowds as the largest of all."""
        if value is None:
            return
        area = entry.get("area", 0.0)
        if isinstance(area, bool) or not isinstance(area, (int, float)) or not math.isfinite(area):
            raise DataError(
                f"{self.path}: area of annotation {entry['id']} is {area!r}; expected a number"
            )
        crowd = bool(entry.get("iscrowd"))
        picture.instances.append(
            (
                math.inf if crowd else float(area),
                CROWD if crowd else value,
                entry.get("segmentation"),
                entry["id"],
            )
        )

    def _drawn(self, shape: Any, picture: _Picture, number: Any) -> np.ndarray:
        """Return the pixels of an instance, bool [H, W]."""
        from pycocotools import mask as coco

        height = picture.height
        width = picture.width
        try:
            if isinstance(shape, dict):
                runs = _runs(shape, height, width)
            else:
                runs = coco.merge(coco.frPyObjects(_polygons(shape, height, width), height, width))
            return coco.decode(runs).astype(bool)
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            OverflowError,
        ) as error:
            raise DataError(
                f"{self.path}: the segmentation of annotation {number} cannot be drawn: {error}; "
                "expected polygons [x, y, x, y, x, y, ...] or run lengths of the picture's size"
            ) from error


def _polygons(shape: Any, height: int, width: int) -> list[list[float]]:
    """Return polygons, inside of the picture: pycocotools does not look where it draws.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(shape, list) or not shape:
        raise ValueError(f"it is {str(shape)[:40]!r}")
    found = []
    for polygon in shape:
        corners = np.asarray(polygon, np.float64)
        if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2:
            raise ValueError(f"a polygon has {corners.size} numbers")
        if not np.isfinite(corners).all():
            raise ValueError("a polygon holds NaN or infinities")
        found.append(np.clip(corners.reshape(-1, 2), 0, (width, height)).ravel().tolist())
    return found


def _runs(shape: dict[str, Any], height: int, width: int) -> Any:
    """Return run lengths as pycocotools packs them.

    Raises:
        ValueError: for those of another size.
    """
    from pycocotools import mask as coco

    if list(shape["size"]) != [height, width]:
        raise ValueError(f"it has the size {shape['size']} and the picture {[height, width]}")
    counts = shape["counts"]
    if isinstance(counts, str):
        counts = _unpacked(counts)
    runs = np.asarray(counts)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or (runs < 0).any():
        raise ValueError("its counts are no list of whole numbers")
    if int(runs.sum()) != height * width:
        raise ValueError(f"its counts add up to {int(runs.sum())}")
    return coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)


def _unpacked(text: str) -> list[int]:
    """Return the run lengths of a text: six bits a letter, differences to the one before the last.

    pycocotools reads such texts too, but not whether they cover the picture: where they are short
    it returns memory that nobody wrote.

    Raises:
        ValueError: for a text that is none.
    """
    counts: list[int] = []
    number = 0
    place = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its counts hold the letter {letter!r}")
        number |= (bits & 31) << 5 * place
        place += 1
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << 5 * place
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = 0
        place = 0
    if place:
        raise ValueError("its counts end too early")
    return counts
