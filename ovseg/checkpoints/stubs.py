"""Checkpoints that hold a training's settings beside its tensors, read without running code: every class that is not a tensor's becomes an
empty stub.

GroupViT's family saves ``{"model": tensors, "config": an omegaconf object, "metrics": a defaultdict, ...}``. torch's own reader, which runs
nothing but what builds tensors, refuses such a file by the names of its classes; here those names, if all of them are of a known kind,
stand for stubs that take whatever they are given and keep nothing. No module of theirs is imported.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

# Settings and metrics: all else is refused.
_MODULES = ("omegaconf", "typing", "numpy", "enum")
_NAMES = ("collections.defaultdict", "operator.getitem", "_codecs.encode",
          *(f"builtins.{name}" for name in ("bool", "bytes", "complex", "dict", "float", "int", "list", "set", "str", "tuple")))


class Stub:
    """In place of an object of another library."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Mapping:
    """In place of a class that is filled item by item, which torch's reader does to plain ones alone."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def known_names(path: Path) -> list[str] | None:
    """The names in a checkpoint that torch's reader does not know; None unless all of them are settings' and metrics'."""
    try:
        names = _unknown(path)
    except Exception:  # a damaged or hostile file, or torch's first format, which does not list them
        return None
    known = all(name in _NAMES or name.partition(".")[0] in _MODULES for name in names)
    return sorted(names) if known and names else None


def refused_names(path: Path) -> list[str]:
    """The names in a checkpoint that torch's reader does not know; none where they cannot be
    listed."""
    try:
        return sorted(_unknown(path))
    except Exception:  # as above
        return []


def load_with_stubs(path: Path, names: list[str]) -> Any:
    """The checkpoint, with stubs for these names."""
    stubs = [(type("Stub", (_Mapping if name == "collections.defaultdict" else Stub,), {}), name) for name in names]
    with torch.serialization.safe_globals(stubs), open(path, "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _unknown(path: Path) -> list[str]:
    with open(path, "rb") as file:
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)
