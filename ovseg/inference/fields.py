"""Fields of the three values: each with a line of help, from which the command line makes an option; and checks of their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

from ..errors import InputError


def option(default: Any, text: str) -> Any:
    """A field that callers set by name; ``text`` is what ``--help`` says about it."""
    return field(default=default, metadata={"help": text})


def one_of(value: Any, name: str, expected: Sequence[Any]) -> None:
    if getattr(value, name) not in expected:
        raise InputError(f"{name} is {getattr(value, name)!r}; expected one of {list(expected)}")


def positive(value: Any, *names: str) -> None:
    """None, or an integer above zero."""
    for name in names:
        number = getattr(value, name)
        if number is not None and not (isinstance(number, int) and number > 0):
            raise InputError(f"{name} is {number!r}; expected a positive integer")
