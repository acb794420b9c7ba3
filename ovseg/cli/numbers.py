"""Numbers on the command line."""

from __future__ import annotations

import argparse

from ..errors import InputError


def at_least(least: int, options: argparse.Namespace, *names: str) -> None:
    """Raises InputError for an option, or one of several numbers of an option, below ``least``. One that is not given is none."""
    for name in names:
        given = getattr(options, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < least:
                raise InputError(f"--{name.replace('_', '-')} is {number}; expected at least {least}")
