"""A progress bar on a terminal, silence in a log; and lines that are for the user, beside results."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(items: Iterable | None = None, *, show: bool = True, **options: Any) -> tqdm:
    """tqdm over ``items``, hidden if ``show`` is false or stderr is no terminal."""
    return tqdm(items, disable=not show or not sys.stderr.isatty(), mininterval=0.5, **options)


def note(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"{text}\n")
