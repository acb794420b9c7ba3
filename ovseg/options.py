"""Typed options: a dataclass is the schema, a mapping of names the values. Errors name the key and the closest one that exists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError

_T = TypeVar("_T")


def unknown_key(key: str, known: Iterable[str], where: str = "") -> ConfigError:
    """The error for a key that does not exist."""
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
        ConfigError: for an unknown key or a value of another type.
    """
    known = [field.name for field in fields(schema)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise unknown_key(str(key), known, f"{where}.")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(given)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{where}.{key}: {str(error).splitlines()[0]}") from error


def within(name: str, value: int, low: int, high: int, error: type[Exception] = ConfigError) -> None:
    """Whether an integer makes sense; what sizes memory or starts processes has an upper end too.

    Raises:
        error: naming it and both ends.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise error(f"{name} is {value!r}; expected {low} to {high}")
