"""Fields of the three values: each with a line of help, from which the command line makes an
option; and checks of their values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from ..errors import InputError

SCALES = (1e-6, 1e6)  # of cosines: beyond, float32 holds no difference between two labels


def option(default: Any, text: str) -> Any:
    """A field that callers set by name; ``text`` is what ``--help`` says about it."""
    return field(default=default, metadata={"help": text})


def shown(value: Any) -> str:
    """A value in a message; of a long one its kind, as of a tensor."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def one_of(value: Any, name: str, expected: Sequence[Any]) -> None:
    found = getattr(value, name)
    if not isinstance(found, str | None) or found not in expected:
        raise InputError(f"{name} is {shown(found)}; expected one of {list(expected)}")


def positive(value: Any, *names: str) -> None:
    """None, or an integer above zero."""
    for name in names:
        number = getattr(value, name)
        if number is not None:
            positive_integer(name, number)


def positive_integer(name: str, number: Any) -> int:
    """An integer above zero, and no bool."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InputError(f"{name} is {shown(number)}; expected a positive integer")
    return number


def number(value: Any, name: str, low: float, top: float, expected: str) -> None:
    """None, or a finite number of ``low`` to ``top``; ``expected`` in words."""
    found = getattr(value, name)
    if found is None:
        return
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise InputError(f"{name} is {shown(found)}; expected {expected}")
    if not math.isfinite(found) or not low <= found <= top:
        raise InputError(f"{name} is {found}; expected {expected}")


def biases(value: Any, name: str) -> None:
    """None, or finite numbers by the names of classes."""
    found = getattr(value, name)
    if found is None:
        return
    if not isinstance(found, Mapping):
        raise InputError(
            f"{name} is a {type(found).__name__}; expected numbers by the names of classes"
        )
    for key, one in found.items():
        if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
            raise InputError(
                f"{name} of {key!r} is {one!r}; expected a finite number. allowed= leaves a class "
                "out"
            )
