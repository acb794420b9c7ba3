"""Backbones by kind, a file each: ``open_clip``, ``tiny``, and ``grouping``, the towers of GroupViT and OVSegmentor.

A file holds its options, a dataclass, and its class; ``KINDS`` says their names. It is imported when it is asked for: open_clip imports
torchvision, and the tiny models do without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..options import options_of
from .base import ClipBackbone

KINDS = {  # options, class
    "grouping": ("GroupingOptions", "GroupingBackbone"), "open_clip": ("OpenClipOptions", "OpenClipBackbone"),
    "tiny": ("TinyOptions", "TinyClip"),
}


def options_type(kind: str) -> type:
    """The dataclass of a kind's options."""
    return _named(kind, 0)


def build_backbone(kind: str, **options: Any) -> ClipBackbone:
    """A backbone of random weights, or with those that ``options`` name."""
    checked: Any = options_of(options_type(kind), options, "backbone")
    given = dict(vars(checked))
    if "clip" in given:
        given["weights"] = given.pop("clip")
    return _named(kind, 1)(**given)


def _named(kind: str, which: int) -> Any:
    if kind not in KINDS:
        raise ValueError(f"backbone.kind is {kind!r}; expected one of {list(KINDS)}")
    return getattr(import_module(f".{kind}", __name__), KINDS[kind][which])
