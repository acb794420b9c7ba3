"""Kinds of data, one file each: a recipe names the file, ``data: {kind: folder, root: ...}``.

A file ``<kind>.py`` holds ``Options``, a dataclass with ``kind`` and everything that can be set,
and ``create(options, inputs, ...)``. It is found by its name; nothing else needs to know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...options import typed
from ...registration import Registry, modules
from .base import ModelInputs, Sample, Source, SourceOptions

__all__ = [
    "ModelInputs",
    "Sample",
    "Source",
    "SourceOptions",
    "create_source",
    "list_kinds",
    "load_options",
]
SOURCES: Registry[Any] = Registry("data.kind", lambda: modules(__name__))
SPLITS = ("train", "val")


def list_kinds() -> list[str]:
    """Return the names of the kinds of data."""
    return list(SOURCES)


def load_options(tree: Mapping[str, Any]) -> SourceOptions:
    """Make the options of a kind from the ``data`` of a recipe.

    Raises:
        ConfigError: for an unknown kind, unknown keys, values of the wrong kind or out of their
            bounds; the message names the key.
    """
    kind = tree.get("kind")
    if kind not in list_kinds():
        raise ConfigError(f"data.kind is {kind!r}; expected one of {list_kinds()}")
    return typed(SOURCES[str(kind)].Options, tree, "data")


def create_source(
    options: SourceOptions,
    inputs: ModelInputs,
    *,
    split: str = "train",
    seed: int = 0,
    progress: bool = False,
) -> Source:
    """Open the pictures that the options describe, as ``inputs`` wants them.

    Args:
        options: of ``load_options``, or made in Python.
        inputs: of the model.
        split: ``train``, or ``val``: no augmentation, where a kind has it.
        seed: of data that is made, as the scenes are.
        progress: whether a bar is shown.

    Raises:
        ConfigError: for options that do not go together.
        DataError: if there is nothing to read.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {list(SPLITS)}")
    create = SOURCES[options.kind].create
    return create(options, inputs, split=split, seed=seed, progress=progress)
