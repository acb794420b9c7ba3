"""Options of a dataclass from a mapping: unknown keys and values of the wrong kind are errors that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from ..errors import ConfigError

T = TypeVar("T")


def fill(schema: type[T], values: Mapping[str, Any], key: str = "") -> T:
    """An object of the dataclass ``schema`` with these values, the rest as it stands there.

    Args:
        schema: of types that OmegaConf knows; parts may be dataclasses.
        values: from YAML or a command line.
        key: where they stand, for messages: ``data`` gives 'data.root: unknown key'.

    Raises:
        ConfigError: see above.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    prefix = f"{key}." if key else ""
    check_keys(values, schema, prefix)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(values)))
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{prefix}{where}: {str(error).splitlines()[0]}") from error


def check_keys(values: Any, schema: Any, prefix: str = "") -> None:
    """Every key of a mapping, and of the mappings in it, is a field of the dataclass."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'options'} is {values!r}; expected a mapping")
    known = {f.name: f for f in fields(schema)}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1, 0.4)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"expected one of {sorted(known)}"
            raise ConfigError(f"{prefix}{name}: unknown key, {hint}")
        part = known[name].default_factory
        if is_dataclass(part):
            check_keys(value, part, f"{prefix}{name}.")
