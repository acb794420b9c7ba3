"""Rules of labelling, a file each. A model names its rule by the file, ``model.decision``; each file calls its rule ``Rule``."""

from __future__ import annotations

import importlib
import pkgutil

from ...errors import InputError
from .base import Decision


def rule_names() -> list[str]:
    """The files beside this one."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def rule(name: str) -> type[Decision]:
    """The rule of a file.

    Raises:
        InputError: if there is none of this name.
    """
    if name not in rule_names():
        raise InputError(f"decision is {name!r}; expected one of {rule_names()}")
    return importlib.import_module(f"{__name__}.{name}").Rule


__all__ = ["Decision", "rule", "rule_names"]
