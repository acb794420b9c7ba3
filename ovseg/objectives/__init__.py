"""Objectives by name: one file each, named like the system that it trains."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..errors import ConfigError
from ..models.base import OVSegModel
from ..options import options_of
from .base import Losses, Objective, Progress, Rows

__all__ = ["Losses", "Objective", "Progress", "Rows", "create_objective", "list_objectives"]
_SHARED = ("base", "contrast", "grouping", "mask_consistency", "mgca_reference", "one_gradient", "superpixel")


def list_objectives() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def create_objective(model: OVSegModel, name: str | None = None, **options: Any) -> Objective:
    """What trains ``model``.

    Args:
        model: a system.
        name: of ``list_objectives``; the model's own if None.
        options: of the objective.

    Raises:
        ConfigError: for an unknown objective or option.
    """
    name = name or model.objective
    if name not in list_objectives():
        raise ConfigError(f"objective is {name!r}; expected one of {list_objectives()}")
    module = importlib.import_module(f".{name}", __name__)
    own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    kind: Any = next(x for x in own if issubclass(x, Objective))
    schema = getattr(kind, "Options", None)
    if schema is None:
        if options:
            raise ConfigError(f"objective {name!r} has no options and {sorted(options)} are given; expected none")
        return kind(model)
    return kind(model, options_of(schema, options, f"objective {name}"))
