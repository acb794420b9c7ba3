"""Typed options: a dataclass is the schema, a mapping of names the values.

Errors name the key and the closest one that exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .bounds import check_bounds
from .errors import ConfigError, first_line

_T = TypeVar("_T")
# Of difflib's ratio: a letter lost or two that changed places are close; "wandb" is no "train".
_CLOSE = 0.65


def unknown_key(
    key: str, known: Iterable[str], where: str = "", moved: Mapping[str, str] | None = None
) -> ConfigError:
    """Return the error for a key that does not exist.

    Args:
        key: as it was given.
        known: keys that exist.
        where: before the key in messages.
        moved: names of earlier versions -> what stands for them now.
    """
    if moved and key in moved:
        return ConfigError(f"{where}{key}: unknown key; {moved[key]}")
    names = sorted(known)
    close = get_close_matches(key, names, 1, _CLOSE)
    hint = f"did you mean {where}{close[0]}? Expected one of" if close else "expected one of"
    return ConfigError(f"{where}{key}: unknown key, {hint} {names}")


def options_of(schema: type[_T], given: Mapping[str, Any], where: str) -> _T:
    """Build an instance of the dataclass ``schema`` and hold it to the bounds of its fields.

    Args:
        schema: as of ``typed``; what each field may be is declared by ``bounds.bounded``.
        given: by name of the field.
        where: before the name in messages.

    Raises:
        ConfigError: as ``typed``, and for a value out of its bounds.
    """
    built = typed(schema, given, where)
    check_bounds(built, f"{where}.")
    return built


def typed(schema: type[_T], given: Mapping[str, Any], where: str) -> _T:
    """Build an instance of the dataclass ``schema``; what is not given keeps its default.

    Args:
        schema: with annotations that OmegaConf knows: numbers, strings, booleans, None, lists,
            dictionaries, Any.
        given: by name of the field.
        where: before the name in messages.

    Raises:
        ConfigError: for an unknown key, a value of another type, NaN or an infinity.
    """
    known = [field.name for field in fields(schema)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise unknown_key(str(key), known, f"{where}.")
    try:
        # Nobody else sees the two change. A vocabulary is a thousand texts, and copying is slow.
        found = OmegaConf.unsafe_merge(OmegaConf.structured(schema), dict(given))
        built: Any = OmegaConf.to_object(found)
        check_finite(asdict(built), where)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{where}.{key}: {first_line(error)}") from error
    return built


def check_finite(values: Any, key: str = "") -> None:
    """Refuse NaN and infinities, which no option means, at any depth of mappings and lists.

    Raises:
        ConfigError: naming the key of the first, below ``key``.
    """
    inner = values if isinstance(values, (list, tuple)) else [values]
    if any(isinstance(number, float) and not math.isfinite(number) for number in inner):
        raise ConfigError(
            f"{key} is {list(values) if isinstance(values, tuple) else values}; expected finite "
            "numbers"
        )
    for name, value in values.items() if isinstance(values, Mapping) else enumerate(inner):
        if isinstance(value, (Mapping, list, tuple)):
            check_finite(
                value, f"{key}[{name}]" if isinstance(name, int) else f"{key}.{name}".lstrip(".")
            )
        elif isinstance(values, Mapping):
            check_finite(value, f"{key}.{name}".lstrip("."))
