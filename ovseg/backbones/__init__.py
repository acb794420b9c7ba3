"""Backbones by kind: ``open_clip`` and ``tiny``. open_clip imports torchvision; the tiny models do without it."""

from __future__ import annotations

from typing import Any

from ..options import options_of
from .base import ClipBackbone
from .tiny import TinyClip, TinyOptions

KINDS = ("open_clip", "tiny")


def options_type(kind: str) -> type:
    """The dataclass of a kind's options."""
    if kind == "tiny":
        return TinyOptions
    if kind != "open_clip":
        raise ValueError(f"backbone.kind is {kind!r}; expected one of {list(KINDS)}")
    from .open_clip import OpenClipOptions

    return OpenClipOptions


def build_backbone(kind: str, **options: Any) -> ClipBackbone:
    """A backbone of random weights, or with those that ``options`` name."""
    checked: Any = options_of(options_type(kind), options, "backbone")
    if kind == "tiny":
        return TinyClip(**vars(checked))
    from .open_clip import OpenClipBackbone

    return OpenClipBackbone(checked.architecture, checked.clip, checked.stride, checked.attention_backend)
