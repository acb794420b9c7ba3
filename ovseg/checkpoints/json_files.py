"""Files of JSON beside weights: configurations, indices, states. Plain files of bounded length,
whatever a folder from elsewhere holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..paths import read_bounded

MOST = 64 << 20  # bytes; the largest that are known, indices of tensors, have a few million


def load_json(path: Path) -> Any:
    """Return what a file of JSON holds.

    Raises:
        OSError: if it is not there, no plain file, or too long; ValueError: if it is no JSON in
            UTF-8, or nested too deeply.
    """
    try:
        return json.loads(read_bounded(path, MOST).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        CheckpointError: for anything else.
    """
    try:
        found = load_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}; expected names and values")
    return found
