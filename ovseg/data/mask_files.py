"""Masks of a benchmark in files: how their values are read, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from ..paths import no_file
from .images import MAX_PIXELS, TOO_LARGE, orientation_of, use_picture

IGNORE = -1  # of a truth: pixels that are not counted


INVALID = -2


_MASK_FORMATS = ("PNG", "TIFF", "BMP")


_MOST = 65535  # value of a mask


@dataclass(frozen=True)
class MaskLayout:
    """The layout of a benchmark's masks: their paths, and the meaning of their values.

    Attributes:
        path: below the set's folder, ``{}`` for the key of a picture; or a ``.json`` of instances.
        table: int16 [65536], the label of each value; -1 is ignored, -2 must not occur.
    """

    path: str
    table: np.ndarray

    @property
    def drawn(self) -> bool:
        """True where masks are drawn from one file of instances; see ``instance_masks.py``."""
        return self.path.endswith(".json")


def table_of(rule: dict[str, Any], classes: int) -> np.ndarray:
    """Return the table of a description's rule, int16 [65536].

    The rule gives a ``map``; or classes one after the other from the value ``start``, without the
    ``removed`` ones, the first one labelled ``label``. Then ``background`` values are 0 and
    ``ignore`` values are not counted.

    Raises:
        ValueError: for a value that no mask can hold, or a label that is no class.
    """
    table = np.full(_MOST + 1, INVALID, np.int16)
    if "map" in rule:
        for value, label in rule["map"].items():
            if not (isinstance(label, int) and 0 <= label < classes):
                raise ValueError(
                    f"value {value} is mapped to {label!r}; expected a class, 0 to {classes - 1}"
                )
            table[_values([value])] = label
    else:
        value = rule["start"]
        removed = set(rule.get("removed", ()))
        for label in range(rule.get("label", 0), classes):
            while value in removed:
                value += 1
            table[_values([value])] = label
            value += 1
    table[_values(rule.get("background", ()))] = 0
    table[_values(rule.get("ignore", ()))] = IGNORE
    return table


def _values(entries: Iterable[int | str]) -> list[int]:
    """Return the values that entries stand for, each a number or a range such as 91-181."""
    found: list[int] = []
    for entry in entries:
        first, _, last = str(entry).partition("-")
        if not (first.isdigit() and (last or first).isdigit() and int(last or first) <= _MOST):
            raise ValueError(
                f"{entry!r} is no value of a mask; expected 0 to {_MOST}, or a range such as 91-181"
            )
        found += range(int(first), int(last or first) + 1)
    return found


def read_mask(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read the values of a mask [H, W] as they are stored, uint8 or uint16.

    They are class indices, with or without a palette.

    Raises:
        DataError: for a missing, damaged or coloured mask; the message names it.
    """
    if (found := no_file(path)) is not None:
        raise DataError(f"mask {path} {'is missing' if found == 'does not exist' else found}")

    def values_of(mask: Image.Image) -> np.ndarray:
        if mask.width * mask.height > max_pixels:
            raise DataError(
                f"mask {path} is {mask.width}x{mask.height}; the limit is {max_pixels} pixels. "
                f"{TOO_LARGE}"
            )
        if mask.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
            raise DataError(
                f"mask {path} is a {mask.mode} picture; expected class indices in one channel, "
                "grey or with a palette"
            )
        if orientation_of(mask) != 1:
            raise DataError(
                f"mask {path} has an EXIF orientation of its own; expected masks that are stored "
                "as they are to be read"
            )
        return np.asarray(mask)

    try:
        values = use_picture(path, values_of, _MASK_FORMATS)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"cannot decode mask {path}: it is none of {', '.join(_MASK_FORMATS)}, or its header "
            "is damaged"
        ) from error
    except Exception as error:  # decoders of damaged pictures raise about anything
        raise DataError(
            f"cannot decode mask {path}: {error}; expected a complete {' or '.join(_MASK_FORMATS)}"
        ) from error
    if values.dtype.kind == "i" and (int(values.min()) < 0 or int(values.max()) > _MOST):
        raise DataError(
            f"mask {path} holds values from {int(values.min())} to {int(values.max())}; expected "
            f"0 to {_MOST}"
        )
    if values.dtype == bool:
        return values.astype(np.uint8)
    return values.astype(values.dtype if values.dtype.kind == "u" else np.uint16)
