"""Typed options: a dataclass is the schema, a mapping of names the values. Errors name the key and the closest one that exists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError, first_line

_T = TypeVar("_T")


def unknown_key(key: str, known: Iterable[str], where: str = "", moved: Mapping[str, str] | None = None) -> ConfigError:
    """The error for a key that does not exist; ``moved``: names of earlier versions -> what stands for them now."""
    if moved and key in moved:
        return ConfigError(f"{where}{key}: unknown key; {moved[key]}")
    names = sorted(known)
    close = get_close_matches(key, names, 1, 0.4)
    return ConfigError(f"{where}{key}: unknown key, " + (f"did you mean {where}{close[0]}?" if close else f"expected one of {names}"))


def options_of(schema: type[_T], given: Mapping[str, Any], where: str) -> _T:
    """An instance of the dataclass ``schema`` with the values ``given``; what is not given keeps its default.

    Args:
        schema: with annotations that OmegaConf knows: numbers, strings, booleans, None, lists, dictionaries, Any.
        given: by name of the field.
        where: before the name in messages.

    Raises:
        ConfigError: for an unknown key, a value of another type, NaN or an infinity.
    """
    known = [field.name for field in fields(schema)]  # type: ignore[arg-type]
    check_finite(given, f"{where}.")
    for key in given:
        if key not in known:
            raise unknown_key(str(key), known, f"{where}.")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(given)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{where}.{key}: {first_line(error)}") from error


def not_finite(values: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(key, number) of what is NaN or infinite in mappings and lists of any depth: no option means anything then."""
    if isinstance(values, float) and not math.isfinite(values):
        yield prefix.rstrip("."), values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from not_finite(value, f"{prefix}{key}.")
    elif isinstance(values, (list, tuple)):
        for i, value in enumerate(values):
            yield from not_finite(value, f"{prefix.rstrip('.')}[{i}].")


def check_finite(values: Any, prefix: str = "") -> None:
    """Raises ConfigError for the first of ``not_finite``."""
    for key, value in not_finite(values, prefix):
        raise ConfigError(f"{key} is {value}; expected a finite number")
