"""Typed options: a dataclass is the schema, a mapping of names the values.

Errors name the key and the closest one that exists.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

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
    hints = get_type_hints(schema)
    mappings = {}
    for key, value in given.items():
        if hints[key] in (Any, dict[str, Any]) and isinstance(value, Mapping):
            with contextlib.suppress(_NotPlain):
                mappings[key] = _plain(value)
    rest = {key: value for key, value in given.items() if key not in mappings}
    try:
        check_finite(mappings, where)
        found = OmegaConf.merge(OmegaConf.structured(schema), rest)
        check_finite(OmegaConf.to_container(found), where)
        built: Any = OmegaConf.to_object(found)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{where}.{key}: {first_line(error)}") from error
    return replace(built, **mappings) if mappings else built


class _NotPlain(Exception):
    """A value that is left to OmegaConf."""


def _plain(value: Any) -> Any:
    """Copy mappings and lists of numbers and texts, as OmegaConf would, in a hundredth of the time.

    A vocabulary may be among them.

    Raises:
        _NotPlain: for anything else, and for texts in which OmegaConf reads more than the text.
    """
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return [_plain(one) for one in value]
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str and "${" not in value and value != "???":
        return value
    raise _NotPlain


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
