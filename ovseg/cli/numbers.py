"""Numbers on the command line: what argparse reads them with."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """An integer of ``least`` or more."""

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"is {text!r}; expected an integer of {least} or more")
        return number

    return whole


def finite(text: str) -> float:
    """A number; neither NaN nor an infinity."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"is {text!r}; expected a finite number")
    return number


def above_zero(text: str) -> float:
    number = finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"is {text!r}; expected a number above 0")
    return number
