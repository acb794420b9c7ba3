"""Image towers by kind: one small class for each way that open_clip's models see a picture."""

from __future__ import annotations

from typing import Any

from .base import Encoded, ImageTower
from .clip_vit import ClipVit
from .feature_map import FeatureMap, is_feature_map
from .resnet import ClipResNet
from .timm_vit import TimmVit, is_timm_vit

__all__ = ["ClipVit", "Encoded", "ImageTower", "image_tower"]

SUPPORTED = ("open_clip's VisionTransformer and ModifiedResNet, timm's VisionTransformer and Eva, and timm's towers whose map "
             "[B, D, h, w] is averaged (ConvNeXt, FastViT)")


def image_tower(visual: Any, stride: int | None = None, attention_backend: str = "sdpa") -> ImageTower:
    """The tower over ``visual`` of an open_clip model; its blocks are taken over in place.

    Raises:
        ValueError: for a tower of another kind, and for a stride that it cannot have.
    """
    kind = type(visual).__name__
    if kind == "VisionTransformer":
        return ClipVit(visual, stride, attention_backend)
    if kind == "ModifiedResNet":
        return ClipResNet(visual, stride)
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and is_timm_vit(trunk):
        return TimmVit(visual, stride, attention_backend)
    if trunk is not None and is_feature_map(visual):
        return FeatureMap(visual, stride)
    name = type(trunk).__name__ if trunk is not None else kind
    fixed = "RelPos" in name or name.startswith("Swin")
    because = ", whose tables of relative positions are those of one picture size" if fixed else ""
    raise ValueError(f"the image tower is {name}{because}; expected {SUPPORTED}")
